"""Work shared between threads.

Plain Python threads that call kernels compiled without the GIL. Numba's own threading layers abort
the process when two Python threads use them at once, or kill a child that was forked after a call;
threads of `concurrent.futures` do neither, and a forked child starts its own.

The callers decide what is added up with what, from shapes alone. Here work is only dealt out, so
the number of threads never changes a bit.

Python handles a signal only between two calls of a kernel. So no call lasts long: tasks are dealt
out in *batches* of bounded cost, and a task that costs more is done in *pieces*. After an
exception, a KeyboardInterrupt among them, no thread begins another one.
"""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numba.core import config

SERIAL_COST = 300_000
"""Work below so many arithmetic operations is done by the caller: waking a thread would take
longer.
"""

BATCH_COST, BATCH_BYTES = 500_000_000, 64 << 20
"""Arithmetic operations that a thread does, and bytes that it moves, before it looks whether it has
to stop: some hundredths of a second.
"""

Work = Callable[[int, int], Iterator[object] | None]
"""``work(first, last)`` does the tasks ``first ... last - 1``. Where that takes long it returns an
iterator, which does a piece of them at each step.
"""

_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()


class _Here(threading.local):
    alone = False
    """This thread asks nobody for help: it is a helper, or it waits for helpers. What interrupts it
    (a signal handler, a finalizer) and calls a kernel would wait for a lock of the pool that the
    thread itself may hold.
    """


_here = _Here()


def default_threads() -> int:
    """The cores this process may use, or what ``NUMBA_NUM_THREADS`` says."""
    return int(config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def _be_alone() -> None:
    _here.alone = True


def _helpers() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            count = max(1, (os.cpu_count() or 1) - 1)
            _pool = ThreadPoolExecutor(count, thread_name_prefix="yoso_core", initializer=_be_alone)
        return _pool


def _forget_pool() -> None:
    """In a forked child the pool's threads are gone: the next call makes new ones."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):  # where there is no fork there is nothing to do
    os.register_at_fork(after_in_child=_forget_pool)


class _Tasks:
    """The tasks of one call that no thread has begun. A deque deals them out without a lock, which
    an exception could leave locked.
    """

    def __init__(self, tasks: int, batch: int, work: Work) -> None:
        self.tasks, self.batch, self.work = tasks, batch, work
        self.starts = deque(range(0, tasks, batch))
        self.stopped = False

    def take(self) -> None:
        """Do batches until none is left."""
        try:
            while True:
                try:
                    first = self.starts.popleft()
                except IndexError:
                    return
                pieces = self.work(first, min(first + self.batch, self.tasks))
                if pieces is not None:
                    for _ in pieces:
                        if self.stopped:
                            return
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """No thread begins anything more."""
        self.stopped = True
        self.starts.clear()


def share(tasks: int, work: Work, *, num_threads: int | None, cost: float, moved: float = 0) -> None:
    """Call ``work(first, last)`` until the tasks ``0 ... tasks - 1`` are done, on up to
    ``num_threads`` threads, this one among them.

    ``cost`` is the rough number of arithmetic operations of all tasks together, ``moved`` that of
    bytes, where these take longer. An exception of any task is raised here, as soon as every thread
    is through with the batch, or the piece, that it has begun.
    """
    threads = 1 if _here.alone or cost < SERIAL_COST else min(num_threads or default_threads(), tasks)
    batch = max(1, int(tasks / max(1, cost / BATCH_COST, moved / BATCH_BYTES)))
    if threads <= 1:
        _Tasks(tasks, batch, work).take()
    else:
        _with_helpers(_Tasks(tasks, min(batch, max(1, tasks // (8 * threads))), work), threads - 1)


def _with_helpers(tasks: _Tasks, number: int) -> None:
    helpers: list[Future[None]] = []
    try:
        _here.alone = True
        with contextlib.suppress(RuntimeError):  # the interpreter is shutting down and takes no new work: this thread does it all
            helpers.extend(_helpers().submit(tasks.take) for _ in range(number))
        tasks.take()
        _wait_for(helpers)
    except BaseException:
        tasks.stop()
        _wait_for(helpers)
        raise
    finally:
        _here.alone = False
    for helper in helpers:
        if not helper.cancelled():
            helper.result()


def _wait_for(helpers: list[Future[None]]) -> None:
    """Until they are through, or will never begin."""
    for helper in helpers:
        if not helper.cancel():
            helper.exception()


def in_steps(work: Callable[..., object], steps: int, cost: float, **arguments: Any) -> Work:
    """Tasks that may take long. ``work(first, last, step0=, step1=, **arguments)`` does their steps
    ``step0 ... step1 - 1`` of ``0 ... steps - 1``, which must follow each other.

    ``cost`` is that of one task. A task that costs more than a batch is done a few steps at a time.
    """
    together = steps if cost <= BATCH_COST else max(1, int(steps * BATCH_COST / cost))

    def whole(first: int, last: int) -> None:
        work(first, last, step0=0, step1=steps, **arguments)

    def in_pieces(first: int, last: int) -> Iterator[None]:
        for task in range(first, last):
            for step in range(0, steps, together):
                work(task, task + 1, step0=step, step1=min(step + together, steps), **arguments)
                yield

    return whole if together >= steps else in_pieces
