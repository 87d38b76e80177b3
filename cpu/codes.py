"""Where the rounds of `yoso_core.cpu.rounds` get the codes of some heads: from the caller, or from
the vectors, made for the heads at hand and forgotten.
"""

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Protocol

import numpy as np

from yoso_core.cpu.hashing import BLOCK, Hash
from yoso_core.cpu.threads import BATCH_COST, share
from yoso_core.cpu.views import Array


class Codes(Protocol):
    """The codes of one side, ``(heads, m, n)`` for the heads that are asked for."""

    @property
    def cost(self) -> float:
        """Of the codes of a head."""
        ...

    def of_head(self, head: int) -> Generator[None, None, Array]:
        """By this thread alone, which may be stopped at each step."""
        ...

    def of_heads(self, head0: int, heads: int, num_threads: int | None) -> Array:
        """By all threads."""
        ...


class StoredCodes:
    """Codes ``(batch, heads, n, m)`` that are there already."""

    cost = 0.0

    def __init__(self, codes: Array) -> None:
        self.codes = codes.reshape(codes.shape[0] * codes.shape[1], *codes.shape[2:])

    def of_head(self, head: int) -> Generator[None, None, Array]:
        yield from ()
        return self.codes[head : head + 1]

    def of_heads(self, head0: int, heads: int, num_threads: int | None) -> Array:
        return self.codes[head0 : head0 + heads]


class MadeCodes:
    """Codes of vectors ``x (batch, heads, n, d)``, made when they are asked for.

    ``nonfinite (batch * heads, n)``, zeros so far, gets a 1 for each vector that is not finite;
    ``made(head0, heads)``, if given, is called when the codes of some heads are there.
    """

    def __init__(self, x: Array, hash: Hash, code: Any, nonfinite: Array, made: Callable[[int, int], None] | None = None) -> None:
        self.x, self.hash, self.code, self.nonfinite, self.made = x, hash, code, nonfinite, made
        self.n = x.shape[2]
        self.blocks = -(-self.n // BLOCK)
        self.cost = self.n * hash.cost

    def _begun(self, head0: int, heads: int) -> tuple[Array, Callable[[int, int], None]]:
        """Room for the codes, and what fills it, a range of blocks at a time."""
        codes = np.empty((heads, self.hash.num_hash, self.n), self.code)
        return codes, partial(self.hash.work, x=self.x, codes=codes, nonfinite=self.nonfinite[head0 : head0 + heads], head0=head0)

    def _done(self, head0: int, heads: int) -> None:
        if self.made is not None:
            self.made(head0, heads)

    def of_head(self, head: int) -> Generator[None, None, Array]:
        codes, work = self._begun(head, 1)
        together = max(1, int(BATCH_COST / (BLOCK * self.hash.cost)))
        for block in range(0, self.blocks, together):
            work(block, min(block + together, self.blocks))
            yield
        self._done(head, 1)
        return codes

    def of_heads(self, head0: int, heads: int, num_threads: int | None) -> Array:
        codes, work = self._begun(head0, heads)
        share(heads * self.blocks, work, num_threads=num_threads, cost=heads * self.cost)
        self._done(head0, heads)
        return codes
