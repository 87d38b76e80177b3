"""What the emulator of CUDA C++ and the stepper of Numba's kernels share: orders, faults, and the
launches that a GPU refuses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from yoso_core.gpu.device import Shape

Order = str | int
"""``"forward"``, ``"reverse"``, or an int: the seed of a random order."""

MAX_THREADS = 1024
MAX_BLOCK = (1024, 1024, 64)
MAX_GRID = (2**31 - 1, 65_535, 65_535)

_order: ContextVar[Order | None] = ContextVar("order", default=None)


class KernelFault(RuntimeError):
    """A kernel did what it must not, or was launched as it cannot be.

    ``kernel`` is its name; ``block`` and ``thread`` are indices ``(x, y, z)`` and ``file`` and
    ``line`` a place in the source, each ``None`` where the fault has none.
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


@contextmanager
def order(order: Order) -> Iterator[None]:
    """Launches in the body, by any emulator, run their blocks and threads in this order.

    ``"forward"``, ``"reverse"``, or an int, the seed of a random order, which also lets the warps
    of a block overtake each other. A kernel without a race gives the same result in all of them, up
    to the order of its float atomics.
    """
    token = _order.set(checked_order(order))
    try:
        yield
    finally:
        _order.reset(token)


def checked_order(order: Order) -> Order:
    """Raises ``ValueError`` for anything else than an order."""
    if order in ("forward", "reverse") or (isinstance(order, int | np.integer) and not isinstance(order, bool) and order >= 0):
        return order
    raise ValueError(f'order: got {order!r}, must be "forward", "reverse" or a seed (an int from 0 on)')


def order_here(otherwise: Order) -> Order:
    """The order that `order` asks for in this context, or the one given."""
    chosen = _order.get()
    return otherwise if chosen is None else chosen


def launch_sizes(
    kernel: str, grid: Sequence[int], block: Sequence[int], shared: int, max_shared: int, max_threads: int = MAX_THREADS
) -> tuple[Shape, Shape]:
    """Grid and block with three sizes each. Raises `KernelFault` for a launch that a GPU would
    refuse.

    ``max_threads`` is what the kernel itself allows a block, by its ``__launch_bounds__``.
    """
    whole = []
    for name, sizes, most in (("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)):
        given = tuple(int(size) for size in sizes)
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
