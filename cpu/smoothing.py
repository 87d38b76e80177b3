"""Tables of buckets averaged over their neighbors: see `yoso_core.reference.smooth_table`. Sixteen
columns of a table at a time, in cache.

Let ``S`` replace every row by the sum of those that are one bit away. The sums ``T_r`` over all
rows at a distance of ``r`` bits follow from each other, since a neighbor of such a row is one bit
nearer or further: ``S T_r = (r + 1) T_(r+1) + (B - r + 1) T_(r-1)`` for ``B`` bits. So what is
wanted, ``sum_r a_r T_r``, is a polynomial in ``S``, and `recurrence` (Clenshaw's) applies ``S`` to
the table ``s`` times in all::

    b_r = a_r T_0 - (B - r) / (r + 2) b_(r+2) + 1 / (r + 1) S b_(r+1)     for r = s ... 0

where ``b_0`` is the smoothed table, and ``b`` beyond ``s`` is zero. What is subtracted from a row,
it or nearer ones have put there, so a row that nothing reaches stays exactly zero.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, load, multiply_add, store
from yoso_core.cpu.precision import rounded, rows, working_dtype
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.steps import TableStep, table_at
from yoso_core.cpu.views import Array, input_array, output_array
from yoso_core.reference.smoothing import smoothing_weights


def recurrence(bits: int, oversample: int) -> list[tuple[float, float, float]]:
    """For ``r = s - 1 ... 0`` the factors of the table, of ``b_(r+2)`` and of ``S b_(r+1)`` in
    ``b_r``. Of the first two, ``b_(r+1)`` and ``b_(r+2)`` stand for the table, since
    ``b_s = a_s T_0``.

    >>> recurrence(9, 1)
    [(1.0, 0.0, 0.1111111111111111)]
    """
    weights = smoothing_weights(bits - oversample, oversample)
    steps = [(weights[r], -(bits - r) / (r + 2), 1 / (r + 1)) for r in range(oversample)]
    last = weights[oversample]
    own, _, across = steps[-1]
    steps[-1] = own, 0.0, across * last
    if oversample > 1:
        own, lost, across = steps[-2]
        steps[-2] = own + lost * last, 0.0, across
    return steps[::-1]


@helper
def load_columns(scratch, at, tables, source, width):
    """16 columns of a row of the table, fewer at its end, where ``scratch[at]`` helps out."""
    if width < LANES:
        store(scratch, at, fill(scratch.dtype.type(0)))
        for c in range(width):
            scratch[at + c] = tables[source + c]
        return load(scratch, at)
    return load(tables, source)


@helper
def store_columns(scratch, at, tables, source, width, smoothed):
    """The opposite; what ``scratch[at]`` held is lost."""
    if width < LANES:
        store(scratch, at, smoothed)
        for c in range(width):
            tables[source + c] = scratch[at + c]
    else:
        store(tables, source, smoothed)


@helper
def neighbors_of_four(source, count, a):
    """``S`` for the four rows from ``a`` on, which share the sums of their neighbors among
    themselves.
    """
    b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
    inner, outer = load(source, b) + load(source, c), load(source, a) + load(source, d)
    y_a, y_b, y_c, y_d = inner, outer, outer, inner
    bit = 4 * LANES
    while bit < count * LANES:
        across = a ^ bit
        y_a, y_b = y_a + load(source, across), y_b + load(source, across + LANES)
        y_c, y_d = y_c + load(source, across + 2 * LANES), y_d + load(source, across + 3 * LANES)
        bit *= 2
    return y_a, y_b, y_c, y_d


@helper
def average(scratch, size, steps, count, tables, start, d_v, width):
    """Some columns of a table, by the ``steps`` of `recurrence`. ``scratch`` has room for the table
    and, if they are needed, for two ``b``: ``size`` numbers each, a row more than there are.
    """
    last = len(steps) - 1
    for row in range(count):
        at = row * LANES
        store(scratch, at, load_columns(scratch, at, tables, start + row * d_v, width))
    source = scratch[:size]
    for step in range(len(steps)):
        own, older, across = fill(steps[step, 0]), fill(steps[step, 1]), fill(steps[step, 2])
        target = scratch[size : 2 * size] if step % 2 == 0 else scratch[2 * size :]
        for a in range(0, count * LANES, 4 * LANES):
            sums = neighbors_of_four(source, count, a)
            for t in range(4):
                at = a + t * LANES
                y = multiply_add(sums[t], across, load(scratch, at) * own)
                if step > 1:
                    y = multiply_add(load(target, at), older, y)
                if step < last:
                    store(target, at, y)
                else:
                    store_columns(scratch, size - LANES, tables, start + (a // LANES + t) * d_v, width, y)
        source = target


@cache
def _smooth_kernel(dtype: Any) -> Any:
    """A task is 16 columns of the table of a hash: ``s bits`` additions an entry, in cache.

    The tables of ``parts`` parts of some heads, ``per`` to a part, begin ``part_size`` entries
    after one another; those of hashes from ``num_hash`` on are not there.
    """

    @kernel(
        tables=output_array(dtype, 1),
        steps=input_array(dtype, 2),
        part0=types.intp,
        parts=types.intp,
        per=types.intp,
        num_hash=types.intp,
        part_size=types.intp,
        count=types.intp,
        d_v=types.intp,
    )
    def smooth(first, last, tables, steps, part0, parts, per, num_hash, part_size, count, d_v):
        columns = (d_v + LANES - 1) // LANES
        size = (count + 1) * LANES
        scratch = aligned(min(len(steps), 3) * size, tables.dtype)
        for task in range(first, last):
            table, column = divmod(task, columns)
            _, start, there = table_at(table, part0, parts, per, num_hash, part_size, count * d_v)
            if there:
                start += column * LANES
                width = min(LANES, d_v - column * LANES)
                average(scratch, size, steps, count, tables, start, d_v, width)

    return smooth


def smoothing_step(count: int, d_v: int, oversample: int, dtype: Any) -> TableStep:
    """Tables of ``count`` rows, smoothed in place."""
    bits = count.bit_length() - 1
    steps = np.array(recurrence(bits, oversample), dtype)
    work = partial(_smooth_kernel(from_dtype(np.dtype(dtype))), steps=steps, count=count, d_v=d_v)
    return TableStep(work, tasks=-(-d_v // LANES), cost=2.0 * oversample * (bits + 1) * count * d_v)


def smooth_table(table: Array, oversample: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.smooth_table`.

    Working memory: ``min(s, 3)`` times 16 columns of the table a thread.
    """
    dtype = working_dtype(table)
    x = rows(table, dtype, num_threads)
    heads, (count, d_v) = x.shape[0] * x.shape[1], x.shape[2:]
    smoothed = np.array(x, order="C", copy=True).reshape(-1)
    if smoothed.size and oversample:
        step = smoothing_step(count, d_v, oversample, dtype)
        step.by_all_threads(
            heads, {"tables": smoothed, "part0": 0, "parts": 1, "per": 1, "num_hash": 1, "part_size": count * d_v}, num_threads
        )
    np.copyto(smoothed, np.nan, where=np.isinf(smoothed))
    return rounded(smoothed.reshape(table.shape), table.dtype, num_threads)
