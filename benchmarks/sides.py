"""The two kinds of sides in a comparison: one of ours, which is checked before any number of it is
shown, or a peer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from yoso_core.benchmarks.cases import Workload

Array = np.ndarray[Any, Any]
Tensors = dict[str, Any]
"""``query``, ``key`` and ``value``, all ``(batch, heads, n, d)``, and ``signs``: torch tensors on
the device of the workload.
"""


@dataclass(frozen=True)
class Check:
    """How far a result is from the definition."""

    tolerance_used: float
    """The largest error over the error allowed, of all entries compared: green up to 1."""
    largest_error: float
    rows: int
    """Query rows compared, all of the last head; for gradients, rows of query and of key."""

    @property
    def green(self) -> bool:
        return self.tolerance_used <= 1  # NaN is red

    @classmethod
    def of(cls, result: Array, exact: Array, allowed: Array, rows: int) -> "Check":
        error = np.abs(result - exact)
        with np.errstate(divide="ignore", invalid="ignore"):
            used = np.where(error == 0, 0, error / allowed)
        return cls(float(np.max(used, initial=0)), float(np.max(error, initial=0)), rows)


@dataclass(frozen=True)
class Ours(ABC):
    """A side of this library: it has a definition and is checked against it."""

    label: str
    op: str
    requires: tuple[str, ...]

    @abstractmethod
    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        """The call that is measured."""

    @abstractmethod
    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        """The operations that run, each with its variant, in order."""

    @abstractmethod
    def check(self, workload: Workload) -> Check:
        """How far its result is from the definition's."""

    @property
    def ops(self) -> tuple[str, ...]:
        """The operations that have to be computed."""
        return (self.op,)


@dataclass(frozen=True)
class Peer:
    """A side that a reader would use instead."""

    label: str
    requires: tuple[str, ...]
    bind: Callable[[Workload, Tensors], Callable[[], Any]]
