"""The last touch to output rows: the factor ``1/m``, unit length if wanted, zeros for masked
queries, NaN where something was not finite.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, absolute, fill, largest, load, multiply_add, read, read_one, store, total, where_less
from yoso_core.cpu.threads import share
from yoso_core.cpu.views import Array, input_array, output_array
from yoso_core.reference.normalize import TINY_NORM

ROW_BLOCK = 512
"""Rows to a task."""


@helper
def scale_row(out, head, i, scale):
    """Multiply by ``scale``; infinities become NaN (``y - y`` is 0 for a finite number and NaN for
    any other).
    """
    d_v = out.shape[3]
    full = d_v - d_v % LANES
    for c in range(0, full, LANES):
        y = load(out, (*head, i, c)) * fill(scale)
        store(out, (*head, i, c), y + (y - y))
    for c in range(full, d_v):
        y = out[(*head, i, c)] * scale
        out[(*head, i, c)] = y + (y - y)


@helper
def normalize_row(out, head, i, scale):
    """Multiply by ``scale``, then scale to unit length. A row shorter than 1e-12 becomes zeros, one
    that is not finite NaN. Returns the length before that.
    """
    d_v = out.shape[3]
    full = d_v - d_v % LANES
    squares = fill(out.dtype.type(0))
    for c in range(0, full, LANES):
        y = load(out, (*head, i, c)) * fill(scale)
        squares = squares + y * y
    length2 = total(squares)
    for c in range(full, d_v):
        y = out[(*head, i, c)] * scale
        length2 += y * y
    if 1e-20 < length2 < 1e30:
        length = out.dtype.type(math.sqrt(length2))
        to_unit = scale / length
        for c in range(0, full, LANES):
            store(out, (*head, i, c), load(out, (*head, i, c)) * fill(to_unit))
        for c in range(full, d_v):
            out[(*head, i, c)] *= to_unit
        return length
    return normalize_extreme_row(out, head, i, scale)


@helper
def normalize_extreme_row(out, head, i, scale):
    """`normalize_row` where squares overflow, vanish or are NaN: divide by the largest entry
    first.
    """
    d_v = out.shape[3]
    largest = 0.0
    finite = True
    for c in range(d_v):
        entry = abs(float(out[(*head, i, c)]))
        finite = finite and math.isfinite(entry)
        largest = max(largest, entry)
    length2 = 0.0
    if finite and largest > 0:
        for c in range(d_v):
            length2 += (out[(*head, i, c)] / largest) ** 2
    length = largest * scale * math.sqrt(length2)
    for c in range(d_v):
        if not finite:
            out[(*head, i, c)] = np.nan
        elif length <= TINY_NORM:
            out[(*head, i, c)] = 0
        else:
            out[(*head, i, c)] = out[(*head, i, c)] / largest / math.sqrt(length2)
    return out.dtype.type(length if finite else np.nan)


@helper
def finish_row(out, keep, nonfinite, head, i, scale, normalize):
    """The last touch to a row. Returns its length before it was scaled to unit length; 0 where that
    is not asked for, and for masked queries.

    ``nonfinite (batch, heads, 1 + n_q)`` marks what makes NaN: at 0 the whole head, where a key was
    not finite, and from 1 on the queries.
    """
    length = out.dtype.type(0)
    if not keep[(*head, i)]:
        out[(*head, i)] = 0
    elif nonfinite[(*head, 0)] or nonfinite[(*head, 1 + i)]:
        out[(*head, i)] = np.nan
        length = out.dtype.type(np.nan)
    elif normalize:
        length = normalize_row(out, head, i, scale)
    else:
        scale_row(out, head, i, scale)
    return length


class Rows(NamedTuple):
    """What a sampled attention makes, with its scratch; the first three are results."""

    out: Array
    """``(batch, heads, n_q, d_v)``."""
    lengths: Array
    """``(batch, heads, n_q)``: those of the rows before they were scaled."""
    errors: Array
    """float32 ``(batch, heads, n_q)``; 0 for masked rows. Empty where nobody asks."""
    squares: Array
    """``(batch, heads, n_q)``: of each hash's own row, times ``units**2``, summed."""
    units: Array
    """``(batch, heads)``: see `units`."""


def empty_rows(value: Array, dtype: Any, stored: Any, keep: tuple[Array, Array], spread: bool, num_threads: int | None) -> Rows:
    """Room for the rows of queries and keys with these masks, computed in ``dtype``, ``stored`` in
    another; ``spread``: and for their errors.
    """
    rows = *value.shape[:2], keep[0].shape[2]
    of_errors = rows if spread else (0, 0, 0)
    return Rows(
        out=np.empty((*rows, value.shape[3]), stored),
        lengths=np.empty(rows, dtype),
        errors=np.zeros(of_errors, np.float32),
        squares=np.empty(of_errors, dtype),
        units=units(value, dtype, keep[1], num_threads) if spread else np.broadcast_to(np.ones(1, dtype), rows[:2]),
    )


@helper
def row_error(out, head, i, unit, squares, num_hash):
    """The relative standard error of the sum of ``num_hash`` rows in ``out``, whose squares, times
    ``unit**2``, add up to ``squares``: see `yoso_core.reference.attention.standard_error`. Infinite
    for a row of zeros; NaN for one that is not finite, or so short that squares of it vanish.
    """
    d_v = out.shape[3]
    full = d_v - d_v % LANES
    lengths2, of_lanes = fill(out.dtype.type(0)), fill(out.dtype.type(0))
    for c in range(0, full, LANES):
        y = absolute(load(out, (*head, i, c)) * fill(unit))
        lengths2, of_lanes = multiply_add(y, y, lengths2), where_less(of_lanes, y, y, of_lanes)
    length2, longest = total(lengths2), largest(of_lanes)
    for c in range(full, d_v):
        y = abs(out[(*head, i, c)] * unit)
        length2, longest = length2 + y * y, max(longest, y)
    if not math.isfinite(length2):
        return np.nan
    if longest == 0:
        return np.inf
    if longest < num_hash * (1e-140 if out.itemsize == 8 else 1e-15):
        return np.nan
    return math.sqrt(max(0.0, num_hash * squares / length2 - 1) / (num_hash - 1))


@helper
def finish_rows(out, lengths, errors, squares, units, keep, nonfinite, head, begin, end, num_hash, normalize, spread):
    """`finish_row` for rows ``begin ... end - 1`` of a head, which are sums over ``num_hash``
    hashes; with ``spread`` their errors before it. The arrays are those of `Rows`.
    """
    scale = out.dtype.type(1 / num_hash)
    for i in range(begin, end):
        if spread and keep[(*head, i)]:
            marked = nonfinite[(*head, 0)] or nonfinite[(*head, 1 + i)]
            errors[(*head, i)] = np.nan if marked else row_error(out, head, i, units[head], squares[(*head, i)], num_hash)
        lengths[(*head, i)] = finish_row(out=out, keep=keep, nonfinite=nonfinite, head=head, i=i, scale=scale, normalize=normalize)


@cache
def _units_kernel(dtype: Any, stored: Any) -> Any:
    """See `units`. A task is a head; reads its values once."""

    @kernel(value=input_array(stored, 4), keep=input_array(types.uint8, 3), units=output_array(dtype, 2))
    def find_units(first, last, value, keep, units):
        n, d_v = value.shape[2:]
        full = d_v - d_v % LANES
        nothing = units.dtype.type(0)
        zero = fill(nothing)
        for task in range(first, last):
            head = divmod(task, value.shape[1])
            of_lanes, of_rest = zero, nothing
            for j in range(n):
                if keep[(*head, j)]:
                    of_row, rest = zero, zero
                    for c in range(0, full, LANES):
                        y = read(value, (*head, j, c))
                        of_row, rest = where_less(of_row, absolute(y), absolute(y), of_row), rest + (y - y)
                    last_of_row, left = nothing, total(rest)
                    for c in range(full, d_v):
                        y = read_one(value, (*head, j, c))
                        last_of_row, left = max(last_of_row, abs(y)), left + (y - y)
                    if left == 0:  # NaN where an entry is not finite
                        of_lanes, of_rest = where_less(of_lanes, of_row, of_row, of_lanes), max(of_rest, last_of_row)
            units[head] = math.ldexp(1.0, -math.frexp(max(largest(of_lanes), of_rest))[1])

    return find_units


def units(value: Array, dtype: Any, keep: Array, num_threads: int | None) -> Array:
    """A power of two for each head, by which its values ``(batch, heads, n, d_v)`` are multiplied
    before they are squared, so that no square overflows or vanishes: one over the largest kept
    value, about.
    """
    found = np.empty(value.shape[:2], dtype)
    find = partial(_units_kernel(from_dtype(found.dtype), from_dtype(value.dtype)), value=value, keep=keep, units=found)
    share(found.size, find, num_threads=num_threads, cost=float(value.size), moved=float(value.nbytes))
    return found


@cache
def _finish_kernel(dtype: Any) -> Any:
    """`finish_row` without normalization, for results that are summed elsewhere. A task is (head,
    block of rows).
    """

    @kernel(out=output_array(dtype, 4), keep=input_array(types.uint8, 3), nonfinite=input_array(types.uint8, 3), scale=types.float64)
    def finish(first, last, out, keep, nonfinite, scale):
        n = out.shape[2]
        blocks = (n + ROW_BLOCK - 1) // ROW_BLOCK
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head = divmod(head_index, out.shape[1])
            for i in range(block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, n)):
                finish_row(out=out, keep=keep, nonfinite=nonfinite, head=head, i=i, scale=out.dtype.type(scale), normalize=False)

    return finish


def finish(out: Array, keep: Array, nonfinite: Array, scale: float, num_threads: int | None) -> None:
    """``out (batch, heads, n, d_v)`` times ``scale``, in place; zeros in masked rows, NaN for
    infinities and in rows that ``nonfinite`` marks, as in `finish_row`.
    """
    share(
        out.shape[0] * out.shape[1] * -(-out.shape[2] // ROW_BLOCK),
        partial(_finish_kernel(from_dtype(out.dtype)), out=out, keep=keep, nonfinite=nonfinite, scale=scale),
        num_threads=num_threads,
        cost=float(out.size),
        moved=2.0 * out.nbytes,
    )
