"""What a launcher needs of the device that runs its kernels: a GPU, or an emulator of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

Array = Any
"""A `cupy.ndarray` or a `numpy.ndarray`, as the device has it. Neither library has bfloat16: such
an array is passed as its bits, in uint16.
"""

Shape = tuple[int, ...]

Arguments = Sequence[Any] | Mapping[str, Any]
"""The arguments of a launch: one for each parameter of the kernel, in their order, or by the names
of the parameters, in the same order.
"""


@dataclass(frozen=True)
class CudaKernel:
    """One of the package's own kernels in CUDA C++: its file in `cupy_kernels`, its name, and the
    macros that it is compiled with.
    """

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()


@dataclass(frozen=True)
class KernelText:
    """A kernel of your own in CUDA C++: its text, its name in the text, and the macros that it is
    compiled with.

    The text may include the package's headers, such as ``#include "common.cuh"``. Every device for
    CUDA C++ takes a `KernelText` beside the package's own `CudaKernel`, and compiles it once.

    >>> import numpy as np
    >>> from yoso_core.gpu import KernelText
    >>> from yoso_core.gpu.emulator import Emulator
    >>> text = '''
    ... extern "C" __global__ void scale(float* x, int n) {
    ...   const int i = blockIdx.x * blockDim.x + threadIdx.x;
    ...   if (i < n) x[i] *= FACTOR;
    ... }'''
    >>> x = np.arange(5, dtype=np.float32)
    >>> scale = KernelText(text, "scale", (("FACTOR", 10),))
    >>> Emulator().launch(scale, grid=(1,), block=(32,), args=(x, np.int32(5)))
    >>> x
    array([ 0., 10., 20., 30., 40.], dtype=float32)
    """

    text: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()
    file: str = "kernel.cu"
    """The name of the text in messages."""


@dataclass(frozen=True)
class CudaVariant:
    """Your own variant of an operation in CUDA C++, to compare with the library's or to register.

    It runs on a GPU through CuPy, and on a CPU through the emulator.

    Parameters
    ----------
    launcher : called as ``launcher(device, *arguments)``. ``device`` is a `Device`; the arguments
        are those of the public function, as C-contiguous arrays of that device; masks are keyword
        arguments, and come only when they are given. It returns one array, or a tuple where the
        operation has several outputs.

    The cumulation of one value dim by one thread, pair after pair:

    >>> import math
    >>> import numpy as np
    >>> from yoso_core.gpu import CudaVariant, KernelText
    >>> from yoso_core.gpu.emulator import Emulator
    >>> pairs = KernelText('''
    ... extern "C" __global__ void pairs(const int* query_code, const int* key_code,
    ...                                  const float* value, float* out,
    ...                                  int n_q, int n_k, int num_hash, int value_dim) {
    ...   const int head = blockIdx.y, query = head * n_q + blockIdx.x, dim = threadIdx.x;
    ...   float sum = 0;
    ...   for (int key = head * n_k; key < (head + 1) * n_k; ++key) {
    ...     for (int hash = 0; hash < num_hash; ++hash) {
    ...       if (query_code[query * num_hash + hash] == key_code[key * num_hash + hash]) {
    ...         sum += value[key * value_dim + dim];
    ...       }
    ...     }
    ...   }
    ...   out[query * value_dim + dim] = sum / num_hash;
    ... }''', "pairs")
    >>> def lsh_cumulation(device, query_hash_code, key_hash_code, value, hashtable_capacity):
    ...     *leading, n_q, num_hash = query_hash_code.shape
    ...     n_k, value_dim = value.shape[-2:]
    ...     out = device.empty((*leading, n_q, value_dim), value.dtype)
    ...     sizes = [np.int32(size) for size in (n_q, n_k, num_hash, value_dim)]
    ...     args = (query_hash_code, key_hash_code, value, out, *sizes)
    ...     device.launch(pairs, grid=(n_q, math.prod(leading)), block=(value_dim,), args=args)
    ...     return out
    >>> mine = CudaVariant(lsh_cumulation)

    Called by hand, on the emulator:

    >>> code = np.array([[0, 1], [2, 1]], np.int32)
    >>> value = np.array([[1, 2], [3, 4]], np.float32)
    >>> mine.launcher(Emulator(), code, code, value, 4)
    array([[2.5, 4. ],
           [3.5, 5. ]], dtype=float32)
    """

    launcher: Callable[..., Any]


@dataclass(frozen=True)
class NumbaCudaVariant:
    """Your own variant of an operation in Numba CUDA, to compare with the library's or to register.

    It runs on a GPU, and on a CPU through the stepper.

    Parameters
    ----------
    launcher : called as ``launcher(device, *arguments)``, as that of a `CudaVariant`; the kernels
        that it launches are functions under ``@cuda.jit``.

    The cumulation of one value dim by one thread, pair after pair:

    >>> import math
    >>> import numpy as np
    >>> from numba import cuda
    >>> from yoso_core.gpu import NumbaCudaVariant
    >>> from yoso_core.gpu.emulator.stepper import Stepper
    >>> @cuda.jit
    ... def pairs(query_code, key_code, value, out):
    ...     head, query, dim = cuda.blockIdx.y, cuda.blockIdx.x, cuda.threadIdx.x
    ...     total = value.dtype.type(0)
    ...     for key in range(key_code.shape[1]):
    ...         for hash in range(key_code.shape[2]):
    ...             if query_code[head, query, hash] == key_code[head, key, hash]:
    ...                 total += value[head, key, dim]
    ...     out[head, query, dim] = total / key_code.shape[2]
    >>> def lsh_cumulation(device, query_hash_code, key_hash_code, value, hashtable_capacity):
    ...     *leading, n_q, num_hash = query_hash_code.shape
    ...     n_k, value_dim = value.shape[-2:]
    ...     heads = math.prod(leading)
    ...     out = device.empty((heads, n_q, value_dim), value.dtype)
    ...     codes = [code.reshape(heads, -1, num_hash) for code in (query_hash_code, key_hash_code)]
    ...     args = (*codes, value.reshape(heads, n_k, value_dim), out)
    ...     device.launch(pairs, grid=(n_q, heads), block=(value_dim,), args=args)
    ...     return out.reshape(*leading, n_q, value_dim)
    >>> mine = NumbaCudaVariant(lsh_cumulation)

    Called by hand, on the stepper:

    >>> code = np.array([[0, 1], [2, 1]], np.int32)
    >>> value = np.array([[1, 2], [3, 4]], np.float32)
    >>> mine.launcher(Stepper(), code, code, value, 4)
    array([[2.5, 4. ],
           [3.5, 5. ]], dtype=float32)
    """

    launcher: Callable[..., Any]


@dataclass(frozen=True)
class Launch:
    """One launch, as `launches` records it."""

    where: str
    """The backend: ``cupy``, ``numba_cuda``, ``emulated`` or ``stepped``."""
    kernel: str
    grid: Shape
    block: Shape
    shared: int
    """Bytes of dynamic shared memory for each block."""


class DoesNotFit(ValueError):
    """These sizes need more memory than the device allows a kernel. A launcher raises it before it
    launches anything.
    """


class Device(Protocol):
    """What launchers are written against. The same launcher then runs on a GPU and on a CPU."""

    xp: ModuleType
    """``cupy`` or ``numpy``: for reshaping, contiguous copies and changes of dtype."""
    max_shared: int
    """Bytes of shared memory that one block can have, with opt-in."""
    max_table: int
    """Bytes that a table in global memory may take."""

    def empty(self, shape: Shape, dtype: Any) -> Array:
        """A new array whose entries the kernel must write."""

    def zeros(self, shape: Shape, dtype: Any) -> Array:
        """A new array of zeros."""

    def launch(self, kernel: Any, grid: Sequence[int], block: Sequence[int], args: Arguments, shared: int = 0) -> None:
        """Launch a kernel on the current stream. A launch that the device refuses raises here.

        Parameters
        ----------
        kernel : a `CudaKernel` or a `KernelText`; for the Numba devices, a kernel function.
        grid, block : one to three sizes.
        args : arrays of this device, NumPy scalars of exactly the parameter's type, or ``None`` for
            a null pointer; a sequence, or a mapping from the names of the parameters.
        shared : bytes of dynamic shared memory.
        """


def in_order(args: Arguments, names: Sequence[str], kernel: str) -> tuple[Any, ...]:
    """The arguments of a launch as a tuple. Raises ``TypeError`` if they have names, and these are
    not the names of the kernel's parameters in their order.

    ``names`` is empty for a kernel whose parameters are not known.

    >>> in_order({"x": 1, "n": 5}, ("x", "n"), "scale")
    (1, 5)
    >>> in_order({"n": 5, "x": 1}, ("x", "n"), "scale")
    Traceback (most recent call last):
    ...
    TypeError: args: scale has the parameters x, n, got n, x
    """
    if not isinstance(args, Mapping):
        return tuple(args)
    if names and tuple(args) != tuple(names):
        raise TypeError(f"args: {kernel} has the parameters {', '.join(names)}, got {', '.join(args)}")
    return tuple(args.values())


_observers: ContextVar[tuple[list[Launch], ...]] = ContextVar("observers", default=())


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Every launch that this thread makes in the body, in order.

    >>> import numpy as np
    >>> import yoso_core
    >>> from yoso_core import gpu
    >>> vectors, signs = np.ones((5, 8)), yoso_core.sample_signs(4, 3, 8, rng=0)
    >>> with gpu.launches() as made:
    ...     code = yoso_core.fast_hash(vectors, signs, 4, 3, variant="emulated:warp_per_vector")
    >>> [(launch.kernel, launch.grid, launch.block) for launch in made]
    [('warp_per_chain', (2, 1, 1), (128, 1, 1))]
    """
    made: list[Launch] = []
    token = _observers.set((*_observers.get(), made))
    try:
        yield made
    finally:
        _observers.reset(token)


def record(launch: Launch) -> None:
    """For devices: say that a launch has been made.

    >>> with launches() as made:
    ...     record(Launch("emulated", "scale", (1,), (32,), 0))
    >>> made[0].kernel
    'scale'
    """
    for made in _observers.get():
        made.append(launch)
