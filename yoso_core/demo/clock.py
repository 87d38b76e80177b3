"""The time that a run of the demo may take: what is left of it, what had to be left out, and the
bar that shows both to a person at a terminal.
"""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task, TextColumn
from rich.progress_bar import ProgressBar
from rich.text import Text


class Clock:
    """A budget of seconds, counted from the moment this object is made.

    A part of the demo gets a `share`, asks before each piece of work what is left of it, and names
    in ``left_out`` what it did not do. As a context manager the clock shows a bar on stderr, if
    ``show`` is true, the budget is finite and stderr is a terminal.
    """

    def __init__(self, seconds: float = math.inf, *, show: bool = False) -> None:
        self.seconds = seconds
        self.left_out: list[str] = []
        self._start = time.perf_counter()
        visible = show and math.isfinite(seconds) and sys.stderr.isatty()
        columns = (TextColumn("{task.description}", markup=False), _Spent(self), _Left(self))
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True, disable=not visible)
        self._task = self._progress.add_task("")

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def left(self) -> float:
        """Seconds until the budget is spent; negative once it is."""
        return self.seconds - self.elapsed

    def share(self, share: float) -> Callable[[], float]:
        """A `left` of one part of the work: the seconds until it has used its share of what is left
        now. So a part that is quick, or slow, leaves the others more, or less.
        """
        until = self.elapsed + share * max(0.0, self.left())
        return lambda: until - self.elapsed

    def doing(self, what: str) -> None:
        """What the bar says from now on."""
        self._progress.update(self._task, description=what)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()


class _OfClock(ProgressColumn):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock


class _Spent(_OfClock):
    def render(self, task: Task) -> ProgressBar:
        return ProgressBar(total=self.clock.seconds, completed=min(self.clock.elapsed, self.clock.seconds), width=30)


class _Left(_OfClock):
    def render(self, task: Task) -> Text:
        return Text(f"at most {max(0.0, self.clock.left()):.0f} s left")
