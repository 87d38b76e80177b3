"""The real device: CUDA C++ compiled by NVRTC on first use and launched through CuPy on the
caller's stream.
"""

import logging
import time
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from yoso_core.gpu.cupy_kernels.source import options, parameter_names, unit_of
from yoso_core.gpu.device import Arguments, Array, CudaKernel, KernelText, Launch, Shape, in_order, record

log = logging.getLogger("yoso_core")

_NO_POINTER = np.uint64(0)
_WITHOUT_OPT_IN = 48 << 10
"""Bytes of shared memory that any block may have; a kernel must opt in to more."""


@cache
def _limits(index: int) -> tuple[int, int]:
    import cupy

    with cupy.cuda.Device(index) as device:
        return int(device.attributes["MaxSharedMemoryPerBlockOptin"]), int(device.mem_info[1])


@cache
def _module(text: str, flags: tuple[str, ...], names: tuple[str, ...] | None, index: int) -> Any:
    import cupy

    return cupy.RawModule(code=text, options=flags, backend="nvrtc", name_expressions=names)


@cache
def _function(kernel: CudaKernel | KernelText, index: int) -> tuple[Any, tuple[str, ...]]:
    """The kernel as CuPy calls it, and the names of its parameters."""
    # A text of the reader's own may hold a template, or a kernel that is not extern "C": the
    # compiler must then be asked for its name.
    names = (kernel.name,) if isinstance(kernel, KernelText) and 'extern "C"' not in kernel.text else None
    text, start = unit_of(kernel), time.perf_counter()
    function = _module(text, options(kernel), names, index).get_function(kernel.name)
    macros = " ".join(f"{name}={value}" for name, value in kernel.defines)
    log.info("%s of %s (%s): compiled, or found in CuPy's cache, in %.1f s", kernel.name, kernel.file, macros, time.perf_counter() - start)
    return function, parameter_names(text, kernel.name)


class CupyDevice:
    """A GPU. CuPy's current device and stream must already be the caller's.

    The first launch of a kernel compiles it, alone, and says so in the log: 0.03 to 0.6 s on an
    idle core (NVRTC 13 for sm_90), several seconds on a busy or a slow one. CuPy keeps the machine
    code on disk, in ``CUPY_CACHE_DIR``. Nothing here waits for the GPU.

    Parameters
    ----------
    index : the number of the GPU.
    stream : the address of the CUDA stream to launch on.
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

    def launch(self, kernel: CudaKernel | KernelText, grid: Sequence[int], block: Sequence[int], args: Arguments, shared: int = 0) -> None:
        """Launch a kernel on the current stream: see `Device.launch`."""
        function, names = _function(kernel, self.index)
        passed = tuple(_NO_POINTER if x is None else x for x in in_order(args, names, kernel.name))
        if shared > _WITHOUT_OPT_IN and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        function(tuple(grid), tuple(block), passed, shared_mem=shared)
        record(Launch("cupy", kernel.name, tuple(grid), tuple(block), shared))
