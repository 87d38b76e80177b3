"""The real device: Numba's CUDA kernels on CuPy's arrays and the caller's stream, compiled on first
use for the types they are given.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from yoso_core.gpu.device import Array, Launch, Shape, record


@cache
def _memory(device_id: int) -> int:
    import cupy

    with cupy.cuda.Device(device_id) as device:
        return int(device.mem_info[1])


class NumbaCuda:
    """A GPU, with CuPy's current device and stream already set to the caller's.

    The first launch of a kernel with new types compiles it (about a second; kept for the life of
    the process). Nothing here ever waits for the GPU: arrays are passed as they are, and a stream
    that they carry is not synchronized with.

    Parameters
    ----------
    device_id : the number of the GPU.
    stream_pointer : the address of the CUDA stream to launch on; 0 is the default stream.
    """

    def __init__(self, device_id: int, stream_pointer: int) -> None:
        import cupy
        from numba import cuda

        self.xp: ModuleType = cupy
        self.max_shared = 48 << 10  # Numba has no way to ask for more, which every GPU but the oldest would give
        self.max_table = _memory(device_id) // 4
        self._gpu = cuda.gpus[device_id]
        with self._gpu:
            self._stream = cuda.external_stream(stream_pointer) if stream_pointer else 0

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.zeros(shape, dtype)

    def launch(self, kernel: Any, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int = 0) -> None:
        from numba import cuda

        with self._gpu:
            passed = [cuda.as_cuda_array(x, sync=False) if isinstance(x, self.xp.ndarray) else x for x in args]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Grid size")  # a small input makes a small grid: no news to the caller
                configured = kernel[tuple(grid), tuple(block), self._stream, shared]
            configured(*passed)
        record(Launch("numba_cuda", kernel.__name__, tuple(grid), tuple(block), shared))
