"""The caller's CUDA stream and memory, made CuPy's own for the length of a launch."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class _TorchStream:
    """torch's current stream, as any library takes one."""

    def __init__(self, index: int) -> None:
        self._pointer = int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def _torch_memory(index: int) -> Callable[[int], Any]:
    """CuPy's memory out of torch's allocator: in the order of torch's stream, and safe in a CUDA
    graph that torch captures.
    """
    import cupy

    torch = sys.modules["torch"]

    def allocate(size: int) -> Any:
        memory = torch.empty(max(size, 1), dtype=torch.uint8, device=f"cuda:{index}")
        return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(memory.data_ptr(), max(size, 1), memory, index), 0)

    return allocate


@contextmanager
def callers_stream(library: str, index: int | None) -> Iterator[tuple[int, int]]:
    """The device, current stream and allocator of ``library``, made CuPy's own for the body:
    ``(device, stream pointer)``.

    ``index`` is the number of the GPU; ``None``, for arrays on the host, is CuPy's current one.
    """
    import cupy

    index = cupy.cuda.Device().id if index is None else index
    with cupy.cuda.Device(index):
        if library != "torch":
            yield index, cupy.cuda.get_current_stream().ptr
            return
        with cupy.cuda.Stream.from_external(_TorchStream(index)) as stream, cupy.cuda.using_allocator(_torch_memory(index)):
            yield index, stream.ptr
