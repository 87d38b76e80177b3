"""Whether code may look at the numbers in a tensor."""

import torch
from torch import Tensor


def shapes_alone() -> bool:
    """Whether `FakeTensorMode` is on, as in estimators of memory and FLOPs: operators compute
    shapes and no numbers.

    >>> shapes_alone()
    False
    """
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def values_can_be_read(x: Tensor) -> bool:
    """Whether ``x`` has numbers, and a look at them stays out of every graph.

    ``False`` for tensors on the device ``meta``, for fake tensors, for tensors inside a transform
    of `torch.func`, and while `torch.compile`, `torch.export`, `torch.jit.trace` or ``make_fx``
    records a graph. A check of values is left out then.

    >>> values_can_be_read(torch.ones(2)), values_can_be_read(torch.ones(2, device="meta"))
    (True, False)
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or x.is_meta or shapes_alone():
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    return not (torch._C._functorch.is_functorch_wrapped_tensor(x) or isinstance(x, torch._subclasses.FakeTensor))
