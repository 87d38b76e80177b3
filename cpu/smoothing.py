"""Tables of buckets averaged over their neighbors, by spheres: see
`yoso_core.reference.smooth_table`. Sixteen columns of a table at a time.

One bit of oversampling: the columns are copied to scratch, and each row adds up those that are one
bit away.

More of them: scratch holds ``T_0 ... T_s``, where every bit adds to each ``T_r`` what stands across
it in ``T_(r-1)``. The rows come in *blocks*. First the bits that connect rows of a block are done,
block after block; then those that connect blocks, for one row of every block after the other. So
what is at work stays in first-level cache, and the scratch as a whole passes through it twice.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, load, store
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.steps import TableStep, table_at
from yoso_core.cpu.views import Array, input_array, output_array, rows, working_dtype
from yoso_core.reference.smoothing import smoothing_weights

BLOCK = 64
"""Rows to a block."""

PLACE = (BLOCK + 1) * LANES
"""From one block to the next: an empty row after each keeps rows of different blocks from competing
for the same lines of the cache.
"""


@helper
def load_columns(spheres, at, tables, source, width):
    """16 columns of a row of the table, fewer at its end, where ``spheres[at]`` helps out."""
    if width < LANES:
        store(spheres, at, fill(spheres.dtype.type(0)))
        for c in range(width):
            spheres[at + c] = tables[source + c]
        return load(spheres, at)
    return load(tables, source)


@helper
def store_columns(spheres, at, tables, source, width, smoothed):
    """The opposite; what ``spheres[at]`` held is lost."""
    if width < LANES:
        store(spheres, at, smoothed)
        for c in range(width):
            tables[source + c] = spheres[at + c]
    else:
        store(tables, source, smoothed)


@helper
def average_one_bit(columns, weights, count, tables, start, d_v, width):
    """``T_0 + a_1 T_1`` of some columns of a table; ``columns`` is scratch for ``count + 1``
    rows. Four rows at a time share the sums of their neighbors among themselves.
    """
    for row in range(count):
        store(columns, row * LANES, load_columns(columns, row * LANES, tables, start + row * d_v, width))
    weight = fill(weights[1])
    for a in range(0, count * LANES, 4 * LANES):
        b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
        inner, outer = load(columns, b) + load(columns, c), load(columns, a) + load(columns, d)
        y_a, y_b, y_c, y_d = inner, outer, outer, inner
        bit = 4 * LANES
        while bit < count * LANES:
            across = a ^ bit
            y_a, y_b = y_a + load(columns, across), y_b + load(columns, across + LANES)
            y_c, y_d = y_c + load(columns, across + 2 * LANES), y_d + load(columns, across + 3 * LANES)
            bit *= 2
        spare, source = count * LANES, start + a // LANES * d_v
        store_columns(columns, spare, tables, source, width, load(columns, a) + y_a * weight)
        store_columns(columns, spare, tables, source + d_v, width, load(columns, b) + y_b * weight)
        store_columns(columns, spare, tables, source + 2 * d_v, width, load(columns, c) + y_c * weight)
        store_columns(columns, spare, tables, source + 3 * d_v, width, load(columns, d) + y_d * weight)


@helper
def begin_four(spheres, size, oversample, a, tables, source, d_v, width):
    """``T_0`` of four rows of the table, and what `add_four` makes of it."""
    b, c, d = a + LANES, a + 2 * LANES, a + 3 * LANES
    x_a, x_b = load_columns(spheres, a, tables, source, width), load_columns(spheres, b, tables, source + d_v, width)
    x_c, x_d = load_columns(spheres, c, tables, source + 2 * d_v, width), load_columns(spheres, d, tables, source + 3 * d_v, width)
    put_four(spheres, a, LANES, x_a, x_b, x_c, x_d)
    put_four(spheres, a + size, LANES, x_b + x_c, x_a + x_d, x_a + x_d, x_b + x_c)
    if oversample > 1:
        put_four(spheres, a + 2 * size, LANES, x_d, x_c, x_b, x_a)
    zero = fill(spheres.dtype.type(0))
    for r in range(3, oversample + 1):
        put_four(spheres, a + r * size, LANES, zero, zero, zero, zero)


@helper
def put_four(spheres, at, apart, a, b, c, d):
    """Rows at ``at``, ``at + apart`` and so on."""
    store(spheres, at, a)
    store(spheres, at + apart, b)
    store(spheres, at + 2 * apart, c)
    store(spheres, at + 3 * apart, d)


@helper
def add_two(spheres, size, oversample, here, apart):
    """Two rows, ``apart`` from each other, which one bit tells apart: each gets in ``T_r`` what the
    other has in ``T_(r-1)``.
    """
    there = here + apart
    for r in range(oversample, 0, -1):
        at, below = r * size, (r - 1) * size
        x, y = load(spheres, below + here), load(spheres, below + there)
        store(spheres, at + here, load(spheres, at + here) + y)
        store(spheres, at + there, load(spheres, at + there) + x)


@helper
def add_four(spheres, size, oversample, a, apart):
    """Four rows, ``apart`` from each other, which two bits tell apart, the outer ones and the inner
    ones by both: each gets in ``T_r`` what its two neighbors have in ``T_(r-1)`` and the opposite
    one in ``T_(r-2)``.
    """
    b, c, d = a + apart, a + 2 * apart, a + 3 * apart
    for r in range(oversample, 0, -1):
        at, below, further = r * size, (r - 1) * size, (r - 2) * size
        inner = load(spheres, below + b) + load(spheres, below + c)
        outer = load(spheres, below + a) + load(spheres, below + d)
        y_a, y_b = load(spheres, at + a) + inner, load(spheres, at + b) + outer
        y_c, y_d = load(spheres, at + c) + outer, load(spheres, at + d) + inner
        if r > 1:
            y_a, y_b = y_a + load(spheres, further + d), y_b + load(spheres, further + c)
            y_c, y_d = y_c + load(spheres, further + b), y_d + load(spheres, further + a)
        put_four(spheres, at + a, apart, y_a, y_b, y_c, y_d)


@helper
def add_bits(spheres, size, oversample, start, step, bit, count):
    """Bits of the numbers ``0 ... count - 1`` of rows that stand ``step`` apart, from ``bit`` on,
    two at a time.
    """
    while 2 * bit < count:
        for first in range(0, count, 4 * bit):
            for row in range(first, first + bit):
                add_four(spheres, size, oversample, start + row * step, bit * step)
        bit *= 4
    if bit < count:
        for row in range(bit):
            add_two(spheres, size, oversample, start + row * step, bit * step)


@helper
def average_spheres(spheres, size, oversample, weights, count, tables, start, d_v, width):
    """``T_0 + sum_r a_r T_r`` of some columns of a table; ``spheres`` is scratch for ``s + 1``
    times ``size`` numbers.
    """
    block = min(count, BLOCK)
    blocks = count // block
    for number in range(blocks):
        at, source = number * PLACE, start + number * block * d_v
        for row in range(0, block, 4):
            begin_four(spheres, size, oversample, at + row * LANES, tables, source + row * d_v, d_v, width)
        add_bits(spheres, size, oversample, at, LANES, 4, block)
    for row in range(block):
        add_bits(spheres, size, oversample, row * LANES, PLACE, 1, blocks)
        for number in range(blocks):
            at, source = number * PLACE + row * LANES, start + (number * block + row) * d_v
            smoothed = load(spheres, at)
            for r in range(1, oversample + 1):
                smoothed = smoothed + load(spheres, r * size + at) * fill(weights[r])
            store_columns(spheres, at, tables, source, width, smoothed)


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
        size = (count + BLOCK - 1) // BLOCK * PLACE
        scratch = aligned((count + 1) * LANES if oversample == 1 else (oversample + 1) * size, tables.dtype)
        for task in range(first, last):
            table, column = divmod(task, columns)
            _, start, there = table_at(table, part0, parts, per, num_hash, part_size, count * d_v)
            if there:
                start += column * LANES
                width = min(LANES, d_v - column * LANES)
                if oversample == 1:
                    average_one_bit(scratch, weights, count, tables, start, d_v, width)
                else:
                    average_spheres(scratch, size, oversample, weights, count, tables, start, d_v, width)

    return smooth


def smoothing_step(count: int, d_v: int, oversample: int, dtype: Any) -> TableStep:
    """Tables of ``count`` rows, smoothed in place."""
    bits = count.bit_length() - 1
    weights = np.array(smoothing_weights(bits - oversample, oversample), dtype)
    work = partial(_smooth_kernel(from_dtype(np.dtype(dtype)), oversample), weights=weights, count=count, d_v=d_v)
    return TableStep(work, tasks=-(-d_v // LANES), cost=3.0 * oversample * (bits + 1) * count * d_v)


def smooth_table(table: Array, oversample: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.smooth_table`.

    Working memory: ``16 (s + 1)`` columns a thread; 16 for ``s = 1``.
    """
    dtype = working_dtype(table)
    x = rows(table, dtype)
    heads, (count, d_v) = x.shape[0] * x.shape[1], x.shape[2:]
    smoothed = np.array(x, order="C", copy=True).reshape(-1)
    if smoothed.size and oversample:
        step = smoothing_step(count, d_v, oversample, dtype)
        step.by_all_threads(
            heads, {"tables": smoothed, "part0": 0, "parts": 1, "per": 1, "num_hash": 1, "part_size": count * d_v}, num_threads
        )
    np.copyto(smoothed, np.nan, where=np.isinf(smoothed))
    return smoothed.reshape(table.shape).astype(table.dtype, copy=False)
