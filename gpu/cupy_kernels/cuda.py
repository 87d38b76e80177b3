"""The real device: the `.cu` files compiled by NVRTC on first use and launched through CuPy on the
caller's stream.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from yoso_core.gpu.cupy_kernels.source import options, source
from yoso_core.gpu.device import Array, CudaKernel, Launch, Shape, record

_NO_POINTER = np.uint64(0)
_WITHOUT_OPT_IN = 48 << 10
"""Bytes of shared memory that any block may have; more must be asked for."""


@cache
def _limits(index: int) -> tuple[int, int]:
    import cupy

    with cupy.cuda.Device(index) as device:
        return int(device.attributes["MaxSharedMemoryPerBlockOptin"]), int(device.mem_info[1])


@cache
def _module(kernel_file: str, flags: tuple[str, ...], index: int) -> Any:
    import cupy

    return cupy.RawModule(code=source(kernel_file), options=flags, backend="nvrtc")


@cache
def _function(kernel: CudaKernel, index: int) -> Any:
    return _module(kernel.file, options(kernel), index).get_function(kernel.name)


class CupyDevice:
    """A GPU, with CuPy's current device and stream already set to the caller's.

    The first launch of a kernel compiles it (0.1 to 1 s; CuPy keeps the result on disk), and
    nothing here ever waits for the GPU.
    """

    def __init__(self, index: int, stream: int) -> None:
        import cupy

        self.xp: ModuleType = cupy
        self.index, self.stream = index, stream
        self.max_shared, memory = _limits(index)
        self.max_table = memory // 4

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.zeros(shape, dtype)

    def launch(self, kernel: CudaKernel, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int = 0) -> None:
        function = _function(kernel, self.index)
        if shared > _WITHOUT_OPT_IN and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function(tuple(grid), tuple(block), tuple(_NO_POINTER if x is None else x for x in args), shared_mem=shared)
        record(Launch("cupy", kernel.name, tuple(grid), tuple(block), shared))
