"""The real device: Numba's CUDA kernels on CuPy's arrays and the caller's stream. Numba compiles a
kernel on first use for the types of its arguments.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from yoso_core.gpu.device import Arguments, Array, Launch, Shape, in_order, record


@cache
def _memory(device_id: int) -> int:
    import cupy

    with cupy.cuda.Device(device_id) as device:
        return int(device.mem_info[1])


def parameter_names(kernel: Any) -> tuple[str, ...]:
    """The names of the parameters of a kernel in Python.

    >>> from yoso_core.gpu.numba_kernels.cumulation import add_keys_to_table
    >>> parameter_names(add_keys_to_table)
    ('key_hash_code', 'value', 'keep_key', 'table', 'first_dim')
    """
    code = getattr(kernel, "py_func", kernel).__code__
    return code.co_varnames[: code.co_argcount]


class NumbaCuda:
    """A GPU. CuPy's current device and stream must already be the caller's.

    The first launch of a kernel with new types compiles it (about a second; kept for the life of
    the process). Nothing here waits for the GPU, or for a stream that an array carries.

    Parameters
    ----------
    device_id : the number of the GPU.
    stream_pointer : the address of the CUDA stream to launch on; 0 is the default stream.
    """

    def __init__(self, device_id: int, stream_pointer: int) -> None:
        import cupy
        from numba import cuda

        self.xp: ModuleType = cupy
        self.max_shared = 48 << 10  # newer GPUs have more, but Numba cannot opt in to it
        self.max_table = _memory(device_id) // 4
        self._gpu = cuda.gpus[device_id]
        with self._gpu:
            self._stream = cuda.external_stream(stream_pointer) if stream_pointer else 0

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        return self.xp.zeros(shape, dtype)

    def launch(self, kernel: Any, grid: Sequence[int], block: Sequence[int], args: Arguments, shared: int = 0) -> None:
        """Launch a kernel on the stream: see `Device.launch`."""
        from numba import cuda

        with self._gpu:
            values = in_order(args, parameter_names(kernel), kernel.__name__)
            passed = [cuda.as_cuda_array(x, sync=False) if isinstance(x, self.xp.ndarray) else x for x in values]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Grid size")  # a small input makes a small grid
                configured = kernel[tuple(grid), tuple(block), self._stream, shared]
            configured(*passed)
        record(Launch("numba_cuda", kernel.__name__, tuple(grid), tuple(block), shared))
