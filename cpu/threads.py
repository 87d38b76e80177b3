"""Work shared between threads.

Plain Python threads that call kernels compiled without the GIL. Numba's own threading layers abort
the process when two Python threads use them at once, or kill a child that was forked after a call;
threads of `concurrent.futures` do neither, and a forked child starts its own.

The callers decide what is added up with what, from shapes alone. Here work is only dealt out, so
the number of threads never changes a bit.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from numba.core import config

SERIAL_COST = 300_000
"""Work below so many arithmetic operations is done by the caller: waking a thread would take
longer.
"""

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def default_threads() -> int:
    """The cores this process may use, or what ``NUMBA_NUM_THREADS`` says."""
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _helpers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="yoso_core")
        return _pool


def _forget_pool() -> None:
    """In a forked child the pool's threads are gone: the next call makes new ones."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # where there is no fork there is nothing to do
    os.register_at_fork(after_in_child=_forget_pool)


def share(tasks: int, work: Callable[[int, int], object], *, num_threads: int | None, cost: float) -> None:
    """Call ``work(first, last)`` until the tasks ``0 ... tasks - 1`` are done, on up to
    ``num_threads`` threads, this one among them.

    ``cost`` is the rough number of arithmetic operations of all tasks together. An exception of any
    task is raised here.
    """
    threads = min(num_threads or default_threads(), tasks)
    if threads <= 1 or cost < SERIAL_COST:
        if tasks:
            work(0, tasks)
        return
    batch = max(1, tasks // (8 * threads))
    starts = iter(range(0, tasks, batch))
    guard = threading.Lock()

    def take() -> None:
        while True:
            with guard:
                first = next(starts, None)
            if first is None:
                return
            work(first, min(first + batch, tasks))

    helpers: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # the interpreter is shutting down and takes no new work: this thread does it all
        helpers += [_helpers().submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        waiting = [helper for helper in helpers if not helper.cancel()]
        for helper in waiting:
            helper.exception()
    for helper in waiting:
        helper.result()
