from collections.abc import Iterator

import pytest
from hypothesis import settings

# The first example of a property may compile a kernel, which takes seconds: no deadline on one
# example.
settings.register_profile("kernels", parent=settings(), deadline=None)
settings.load_profile("kernels")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For torch models so small that waking a thread takes longer than its work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
