"""What a launcher needs of the place where its kernels run, be it a GPU or an emulation of one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

Array = Any
"""A `cupy.ndarray` or a `numpy.ndarray`, as the device has it. bfloat16, which neither has, travels
as its bits: uint16.
"""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CudaKernel:
    """A kernel in CUDA C++, by its file in `cupy_kernels`, its name, and the macros that it is
    compiled with.
    """

    file: str
    name: str
    defines: tuple[tuple[str, str | int], ...] = ()


@dataclass(frozen=True)
class Launch:
    """One launch, as `launches` records it."""

    where: str
    """``cupy``, ``numba_cuda``, ``emulated`` or ``stepped``."""
    kernel: str
    grid: Shape
    block: Shape
    shared: int
    """Bytes of dynamic shared memory of each block."""


class DoesNotFit(ValueError):
    """These sizes need more memory than the device allows a kernel: raised before anything is
    launched.
    """


class Device(Protocol):
    """The launchers are written against this, once, and run on a GPU and on the CPU alike."""

    xp: ModuleType
    """``cupy`` or ``numpy``: for reshaping, contiguous copies and changes of dtype."""
    max_shared: int
    """Bytes of shared memory that one block can have, opted in to."""
    max_table: int
    """Bytes that a table in global memory may take."""

    def empty(self, shape: Shape, dtype: Any) -> Array: ...

    def zeros(self, shape: Shape, dtype: Any) -> Array: ...

    def launch(self, kernel: Any, grid: Sequence[int], block: Sequence[int], args: Sequence[Any], shared: int = 0) -> None:
        """Launch a `CudaKernel`, or for the Numba devices a kernel function, on the current stream.

        ``args`` are arrays of this device, NumPy scalars of exactly the parameter's type, or
        ``None`` for a null pointer. A launch that the device refuses raises here.
        """


_observers: ContextVar[tuple[list[Launch], ...]] = ContextVar("observers", default=())


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Every launch made in the body, by this thread, in order.

    >>> with launches() as made:
    ...     pass
    >>> made
    []
    """
    made: list[Launch] = []
    token = _observers.set((*_observers.get(), made))
    try:
        yield made
    finally:
        _observers.reset(token)


def record(launch: Launch) -> None:
    """For the devices: a launch has been made."""
    for made in _observers.get():
        made.append(launch)
