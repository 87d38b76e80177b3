"""What the emulator of CUDA C++ and the stepper of Numba kernels share: orders, faults, and the
check of launches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from yoso_core.gpu.device import Shape

Order = str | int
"""``"forward"``, ``"reverse"``, or an int: the seed of a random order."""

Sizes = Sequence[int] | int
"""Of a grid or a block: one to three sizes, or an int for one."""

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65_535, 65_535)

_order: ContextVar[Order | None] = ContextVar("order", default=None)


class KernelFault(RuntimeError):
    """A kernel has a fault, or a GPU would refuse its launch.

    ``kernel`` is the name of the kernel. ``block`` and ``thread`` are indices ``(x, y, z)``;
    ``file`` and ``line`` are the source line. Each of them is ``None`` if it is not known.

    >>> fault = KernelFault("scale", "divides by zero", block=(1, 0, 0), file="mine.cu", line=3)
    >>> print(fault)
    scale: divides by zero (block (1, 0, 0), mine.cu:3)
    >>> fault.line
    3
    """

    def __init__(
        self,
        kernel: str,
        message: str,
        *,
        block: Shape | None = None,
        thread: Shape | None = None,
        file: str | None = None,
        line: int | None = None,
    ) -> None:
        where = [] if block is None else [f"block {block}"]
        where += [] if thread is None else [f"thread {thread}"]
        where += [] if file is None else [f"{file}:{line}"]
        super().__init__(f"{kernel}: {message}" + (f" ({', '.join(where)})" if where else ""))
        self.kernel, self.block, self.thread, self.file, self.line = kernel, block, thread, file, line

    def of(self, message: str) -> "KernelFault":
        """The same place, with another message."""
        return KernelFault(self.kernel, message, block=self.block, thread=self.thread, file=self.file, line=self.line)


@contextmanager
def order(order: Order) -> Iterator[None]:
    """Run the blocks and threads of all launches in the body in this order, in the emulator and in
    the stepper.

    The order is ``"forward"``, ``"reverse"``, or an int, which is the seed of a random order. In a
    random order, warps of a block also overtake each other. A kernel without a race gives the same
    result in every order, up to the order of its float atomics.

    >>> import numpy as np
    >>> from yoso_core.gpu import KernelText
    >>> from yoso_core.gpu.emulator import Emulator
    >>> text = 'extern "C" __global__ void last(int* x) { *x = threadIdx.x; }'
    >>> x = np.zeros(1, np.int32)
    >>> for chosen in ("forward", "reverse"):
    ...     with order(chosen):
    ...         Emulator().launch(KernelText(text, "last"), grid=(1,), block=(32,), args=(x,))
    ...     print(x)
    [31]
    [0]
    """
    token = _order.set(checked_order(order))
    try:
        yield
    finally:
        _order.reset(token)


def checked_order(order: Order) -> Order:
    """The order itself. Raises ``ValueError`` if it is none.

    >>> checked_order("backward")
    Traceback (most recent call last):
    ...
    ValueError: order: got 'backward', must be "forward", "reverse" or a seed (an int from 0 on)
    """
    if order in ("forward", "reverse") or (isinstance(order, int | np.integer) and not isinstance(order, bool) and order >= 0):
        return order
    raise ValueError(f'order: got {order!r}, must be "forward", "reverse" or a seed (an int from 0 on)')


def order_here(otherwise: Order) -> Order:
    """The order that the context manager `order` has set here, or else the one given.

    >>> order_here("reverse")
    'reverse'
    """
    chosen = _order.get()
    return otherwise if chosen is None else chosen


def launch_sizes(
    kernel: str, grid: Sizes, block: Sizes, shared: int, max_shared: int, max_threads: int = MAX_THREADS
) -> tuple[Shape, Shape]:
    """Grid and block with three sizes each. Raises `KernelFault` for a launch that a GPU would
    refuse.

    ``max_threads`` is the largest block that the ``__launch_bounds__`` of the kernel allow.

    >>> launch_sizes("scale", (5,), (8, 4), 0, 48 << 10)
    ((5, 1, 1), (8, 4, 1))
    """
    whole = []
    for name, sizes, most in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        given = tuple(int(size) for size in ([sizes] if isinstance(sizes, int | np.integer) else sizes))
        three = (*given, 1, 1, 1)[:3]
        if not 1 <= len(given) <= 3 or any(not 1 <= size <= limit for size, limit in zip(three, most, strict=True)):
            raise KernelFault(kernel, f"invalid launch: {name} {given}, where each size must be from 1 to {most}")
        whole.append(three)
    threads = whole[1][0] * whole[1][1] * whole[1][2]
    if threads > max_threads:
        raise KernelFault(
            kernel, f"invalid launch: a block of {whole[1]} has {threads} threads, {max_threads} is the most that the kernel allows"
        )
    if not 0 <= shared <= max_shared:
        raise KernelFault(kernel, f"invalid launch: {shared} bytes of dynamic shared memory, a block here has {max_shared}")
    return whole[0], whole[1]
