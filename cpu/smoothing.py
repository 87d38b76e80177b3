"""Tables of buckets averaged over their neighbors, by spheres: see
`yoso_core.reference.smooth_table`.

Sixteen columns of a table at a time are copied to scratch, ``T_0``, with zeros for ``T_1 ... T_s``
behind them; there every bit adds to each ``T_r`` what stands across it in ``T_(r-1)``. The rows
come in *blocks*. First the bits that connect rows of a block are done, block after block; then
those that connect blocks, for one row of every block after the other. So what is at work stays in
first-level cache, and the scratch as a whole passes through it twice.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Protocol

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, load, store
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.threads import BATCH_COST, share
from yoso_core.cpu.views import Array, input_array, output_array, rows, working_dtype
from yoso_core.reference.smoothing import smoothing_weights

BLOCK = 64
"""Rows to a block."""


class Cut(Protocol):
    """`yoso_core.cpu.rounds.Cut`, as far as it says where tables stand."""

    @property
    def num_hash(self) -> int: ...
    @property
    def per(self) -> int: ...
    @property
    def splits(self) -> int: ...
    @property
    def table_size(self) -> int: ...


@helper
def place(row):
    """Where a row stands in its sphere: an empty one after each block keeps rows of different
    blocks from competing for the same lines of the cache.
    """
    return (row + row // BLOCK) * LANES


@helper
def load_columns(spheres, size, oversample, count, tables, start, d_v, column):
    """``T_0``: 16 columns of ``count`` rows, fewer at the end of a row; zeros for the others."""
    zero = fill(spheres.dtype.type(0))
    width = min(LANES, d_v - column)
    for row in range(count):
        at, source = place(row), start + row * d_v + column
        if width == LANES:
            store(spheres, at, load(tables, source))
        else:
            store(spheres, at, zero)
            for c in range(width):
                spheres[at + c] = tables[source + c]
        for r in range(1, oversample + 1):
            store(spheres, r * size + at, zero)


@helper
def add_across(spheres, size, oversample, row, other):
    """Two rows that differ in one bit: each gets in ``T_r`` what the other has in ``T_(r-1)``."""
    here, there = place(row), place(other)
    for r in range(oversample, 0, -1):
        at, below = r * size, (r - 1) * size
        x, y = load(spheres, below + here), load(spheres, below + there)
        store(spheres, at + here, load(spheres, at + here) + y)
        store(spheres, at + there, load(spheres, at + there) + x)


@helper
def add_neighbors(spheres, size, oversample, count):
    """All bits of a table of ``count`` rows."""
    near = min(count, BLOCK)
    for base in range(0, count, near):
        bit = 1
        while bit < near:
            for first in range(base, base + near, 2 * bit):
                for row in range(first, first + bit):
                    add_across(spheres, size, oversample, row, row + bit)
            bit *= 2
    for low in range(near):
        bit = near
        while bit < count:
            for first in range(low, count, 2 * bit):
                for row in range(first, first + bit, near):
                    add_across(spheres, size, oversample, row, row + bit)
            bit *= 2


@helper
def store_columns(spheres, size, weights, count, tables, start, d_v, column):
    """``sum_r a_r T_r`` back to the table."""
    width = min(LANES, d_v - column)
    for row in range(count):
        at, source = place(row), start + row * d_v + column
        total = load(spheres, at)
        for r in range(1, len(weights)):
            total = total + load(spheres, r * size + at) * fill(weights[r])
        if width == LANES:
            store(tables, source, total)
        else:
            store(spheres, at, total)
            for c in range(width):
                tables[source + c] = spheres[at + c]


@cache
def _smooth_kernel(dtype: Any, oversample: int) -> Any:
    """A task is 16 columns of the table of a hash: ``s bits`` additions an entry, in cache.

    The tables of ``parts`` parts of some heads, ``per`` to a part, begin ``part_size`` entries
    after one another; those of hashes from ``num_hash`` on are not there.
    """

    @kernel(
        tables=output_array(dtype, 1),
        weights=input_array(dtype, 1),
        part0=types.intp,
        parts=types.intp,
        per=types.intp,
        num_hash=types.intp,
        part_size=types.intp,
        count=types.intp,
        d_v=types.intp,
    )
    def smooth(first, last, tables, weights, part0, parts, per, num_hash, part_size, count, d_v):
        columns = (d_v + LANES - 1) // LANES
        size = place(count - 1) + LANES
        spheres = aligned((oversample + 1) * size, tables.dtype)
        for task in range(first, last):
            table, column = divmod(task, columns)
            slot, hash = divmod(table, per)
            if (part0 + slot % parts) * per + hash < num_hash:
                start = slot * part_size + hash * count * d_v
                load_columns(spheres, size, oversample, count, tables, start, d_v, column * LANES)
                add_neighbors(spheres, size, oversample, count)
                store_columns(spheres, size, weights, count, tables, start, d_v, column * LANES)

    return smooth


class Smoothing:
    """The step between the rounds: tables of ``count`` rows, smoothed in place."""

    def __init__(self, count: int, d_v: int, oversample: int, dtype: Any) -> None:
        self.columns = -(-d_v // LANES)
        bits = count.bit_length() - 1
        self.cost = 3.0 * oversample * (bits + 1) * count * d_v
        """Of the table of a hash."""
        weights = np.array(smoothing_weights(bits - oversample, oversample), dtype)
        self.work = partial(_smooth_kernel(from_dtype(np.dtype(dtype)), oversample), weights=weights, count=count, d_v=d_v)

    def _call(self, cut: Cut, part0: int, parts: int, tables: Array) -> dict[str, Any]:
        part_size = cut.splits * cut.per * cut.table_size
        return {"tables": tables, "part0": part0, "parts": parts, "per": cut.per, "num_hash": cut.num_hash, "part_size": part_size}

    def in_pieces(self, cut: Cut, part0: int, parts: int, tables: Array) -> Iterator[None]:
        """Those of one head, by this thread alone, which may be stopped at each step."""
        call, tasks = self._call(cut, part0, parts, tables), parts * cut.per * self.columns
        together = max(1, int(BATCH_COST * self.columns / max(self.cost, 1)))
        for task in range(0, tasks, together):
            self.work(task, min(task + together, tasks), **call)
            yield

    def by_all_threads(self, cut: Cut, part0: int, parts: int, heads: int, tables: Array, num_threads: int | None) -> None:
        """Those of some heads."""
        hashes = heads * parts * cut.per
        work = partial(self.work, **self._call(cut, part0, parts, tables))
        share(hashes * self.columns, work, num_threads=num_threads, cost=hashes * self.cost)


def smooth_table(table: Array, oversample: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.smooth_table`.

    Working memory: ``16 (s + 1)`` columns a thread.
    """
    dtype = working_dtype(table)
    x = rows(table, dtype)
    heads, (count, d_v) = x.shape[0] * x.shape[1], x.shape[2:]
    smoothed = np.array(x, order="C", copy=True).reshape(-1)
    smoothing = Smoothing(count, d_v, oversample, dtype)
    whole = {"part0": 0, "parts": 1, "per": 1, "num_hash": 1, "part_size": count * d_v}
    if smoothed.size:
        work = partial(smoothing.work, tables=smoothed, **whole)
        share(heads * smoothing.columns, work, num_threads=num_threads, cost=heads * smoothing.cost)
    np.copyto(smoothed, np.nan, where=np.isinf(smoothed))
    return smoothed.reshape(table.shape).astype(table.dtype, copy=False)
