"""Rows of a head on their way into products and out of them.

Products want flat arrays in which every row is padded with zeros to whole vectors of lanes: its
*width*. Here rows are packed like that, turned crosswise, scaled to unit length; and gradients by
unit rows become gradients by the rows themselves.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types

from yoso_core.cpu.compiling import OPTIONS, helper, kernel, njit
from yoso_core.cpu.lanes import LANES, Lanes, absolute, fill, intrinsic, load, multiply_add, square_root, store, total, where_less
from yoso_core.cpu.products import some_of, transpose
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned, load_tile
from yoso_core.cpu.views import Array, aligned_empty, input_array, output_array

ROW_BLOCK = 256
"""Rows to a task."""

CACHE_LINE = 64
"""Bytes."""


def width_of(dim: int) -> int:
    """``dim`` rounded up to whole vectors of lanes."""
    return -(-dim // LANES) * LANES


def _convert(to: Any) -> Any:
    """Code that turns lanes into lanes of another float type."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(to), LANES)
        if vector == args[0].type:
            return args[0]
        return builder.fpext(args[0], vector) if to == types.float64 else builder.fptrunc(args[0], vector)

    return codegen


@intrinsic
def to_float64(typingctx: Any, lanes: Any) -> Any:
    """The lanes as float64."""
    return Lanes(types.float64)(lanes), _convert(types.float64)


@intrinsic
def to_dtype_of(typingctx: Any, lanes: Any, array: Any) -> Any:
    """The lanes rounded to the dtype of ``array``."""
    return Lanes(array.dtype)(lanes, array), _convert(array.dtype)


@helper
def ramp(count, step):
    """``0, step, 2 step, ...``: where the rows of a tile begin."""
    places = np.empty(count, np.intp)
    for t in range(count):
        places[t] = t * step
    return places


@helper
def turn_rows(tile, step, packed, places, shift, count, width):
    """Rows crosswise: ``tile[c * step + t] = packed[places[t] + shift + c]``, 16 rows ``t`` at a
    time; past the last it stands again.
    """
    for t in range(0, count, LANES):
        sixteen = some_of(places, t, count - 1, LANES)
        for c in range(0, width, LANES):
            transpose(packed, sixteen, shift + c, tile, c * step + t, step)


@helper
def unit_tile(tile, lengths, spoiled, x, b, h, i):
    """Up to 16 rows of ``x[b, h, i:]``, crosswise, scaled to unit length (zero rows stay zero);
    their lengths, and which are not finite.
    """
    d = x.shape[3]
    zero, one = fill(tile.dtype.type(0)), fill(tile.dtype.type(1))
    if not load_tile(tile, (d + LANES - 1) // LANES * LANES, x, b, h, i):
        for t in range(LANES):
            lengths[t], spoiled[t] = unit_column(tile, t, d)
        return
    largest = zero
    for c in range(d):
        entry = absolute(load(tile, c * LANES))
        largest = where_less(largest, entry, entry, largest)
    squares = to_float64(zero)  # in float64: a sum of a thousand squares in float32 would show
    for c in range(d):
        entry = where_less(zero, largest, load(tile, c * LANES) / largest, zero)
        store(tile, c * LANES, entry)
        squares = squares + to_float64(entry * entry)
    length = where_less(zero, largest, to_dtype_of(square_root(squares), tile), one)
    for c in range(d):
        store(tile, c * LANES, load(tile, c * LANES) / length)
    store(lengths, 0, largest * length)
    spoiled[:] = 0


@helper
def unit_column(tile, t, d):
    """`unit_tile` for vector ``t`` alone, which may hold anything: the same operations, one number
    after the other.
    """
    largest, finite = tile.dtype.type(0), True
    for c in range(d):
        entry = abs(tile[c * LANES + t])
        finite = finite and math.isfinite(entry)
        largest = max(largest, entry)
    squares = 0.0
    for c in range(d):
        entry = tile[c * LANES + t] / largest if largest > 0 else tile.dtype.type(0)
        tile[c * LANES + t] = entry
        squares += np.float64(entry * entry)
    length = tile.dtype.type(math.sqrt(squares)) if largest > 0 else tile.dtype.type(1)
    for c in range(d):
        tile[c * LANES + t] = tile[c * LANES + t] / length if finite else tile.dtype.type(np.nan)
    return largest * length, not finite


def unit_rows_of(out, start, step, x, b, h, first, last, lengths, spoiled):
    """Rows ``first ... last - 1`` of ``x[b, h]``, scaled to unit length and padded: row ``i`` to
    ``out[start + i * step]`` and on.

    Row by row the result does not depend on where ``first`` is.
    """
    width = (x.shape[3] + LANES - 1) // LANES * LANES
    tile, square = aligned(width * LANES, out.dtype), aligned(LANES * LANES, out.dtype)
    sixteen_lengths, sixteen_spoiled, places = np.empty(LANES, out.dtype), np.empty(LANES, np.uint8), ramp(LANES, LANES)
    for i in range(first, last, LANES):
        count = min(LANES, last - i)
        unit_tile(tile, sixteen_lengths, sixteen_spoiled, x, b, h, i)
        for t in range(count):
            lengths[i + t], spoiled[i + t] = sixteen_lengths[t], sixteen_spoiled[t]
        for c in range(0, width, LANES):
            turn_rows(square, LANES, tile, places, c * LANES, LANES, LANES)
            for t in range(count):
                store(out, start + (i + t) * step + c, load(square, t * LANES))


unit_rows_of = njit(unit_rows_of, **OPTIONS)


def pack_rows_of(out, start, step, x, b, h, first, last, spoiled):
    """Rows ``first ... last - 1`` of ``x[b, h]``, padded: row ``i`` to ``out[start + i * step]``
    and on. Notes which are not finite.
    """
    d = x.shape[3]
    full = d - d % LANES
    zero = fill(out.dtype.type(0))
    for i in range(first, last):
        at, nothing = start + i * step, zero
        if full < d:
            store(out, at + full, zero)
            for c in range(full, d):
                out[at + c] = x[b, h, i, c]
            nothing = load(out, at + full) - load(out, at + full)
        for c in range(0, full, LANES):
            row = load(x, (b, h, i, c))
            store(out, at + c, row)
            nothing = nothing + (row - row)  # 0 for a finite number, NaN for any other
        spoiled[i] = total(nothing) != 0


pack_rows_of = njit(pack_rows_of, **OPTIONS)


@cache
def _rows_kernel(dtype: Any, unit: bool) -> Any:
    """`unit_rows_of` or `pack_rows_of`. A task is a block of rows of a head."""

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            output_array(dtype, 1),
            output_array(dtype, 3),
            output_array(types.uint8, 3),
        )
    )
    def prepare(first, last, x, out, lengths, spoiled):
        n, width = x.shape[2], (x.shape[3] + LANES - 1) // LANES * LANES
        blocks = (n + ROW_BLOCK - 1) // ROW_BLOCK
        for task in range(first, last):
            head, block = divmod(task, blocks)
            b, h = divmod(head, x.shape[1])
            i, stop, start = block * ROW_BLOCK, min((block + 1) * ROW_BLOCK, n), head * n * width
            if unit:
                unit_rows_of(out, start, width, x, b, h, i, stop, lengths[b, h], spoiled[b, h])
            else:
                pack_rows_of(out, start, width, x, b, h, i, stop, spoiled[b, h])

    return prepare


def _prepared(x: Array, unit: bool, num_threads: int | None) -> tuple[Array, Array, Array]:
    out = aligned_empty(math.prod(x.shape[:-1]) * width_of(x.shape[-1]), x.dtype)
    lengths, spoiled = np.empty(x.shape[:-1] if unit else (0, 0, 0), x.dtype), np.empty(x.shape[:-1], np.uint8)
    run = _rows_kernel(from_dtype(x.dtype), unit)
    share(
        x.shape[0] * x.shape[1] * -(-x.shape[2] // ROW_BLOCK),
        lambda first, last: run(first, last, x, out, lengths, spoiled),
        num_threads=num_threads,
        cost=3.0 * x.size,
    )
    return out, lengths, spoiled


def unit_rows(x: Array, num_threads: int | None) -> tuple[Array, Array, Array]:
    """Rows of ``x (batch, heads, n, d)`` scaled to unit length (zero rows stay zero), padded and
    flat; their lengths; and uint8 ``(batch, heads, n)``: 1 where a row was not finite, whose unit
    row is NaN.
    """
    return _prepared(x, True, num_threads)


def packed_rows(x: Array, num_threads: int | None) -> Array:
    """Rows of ``x (batch, heads, n, d)``, padded and flat, from the start of a cache line: a view
    if they stand like that already.

    Every load of a vector that straddles two cache lines counts twice; beside a product over all
    pairs a copy costs nothing.
    """
    if x.shape[-1] % LANES == 0 and x.flags.c_contiguous and x.ctypes.data % CACHE_LINE == 0:
        return x.reshape(-1)
    return _prepared(x, False, num_threads)[0]


@helper
def store_row(x, b, h, i, packed, at):
    """``x[b, h, i] = packed[at:]``, without the padding."""
    d = x.shape[3]
    full = d - d % LANES
    for c in range(0, full, LANES):
        store(x, (b, h, i, c), load(packed, at + c))
    for c in range(full, d):
        x[b, h, i, c] = packed[at + c]


@helper
def leave_normalization(pull, at, unit, unit_at, width, length, zeros_stay):
    """The gradient ``f`` by a unit row ``u``, in place, to that by the row itself:
    ``(f - (f . u) u) / |x|``; zeros where ``|x|`` is zero.

    ``zeros_stay``: a row of zeros, which nothing pulled, stays so even where ``u`` is NaN.
    """
    zero = fill(pull.dtype.type(0))
    along, size = zero, zero
    for c in range(0, width, LANES):
        f = load(pull, at + c)
        along, size = multiply_add(f, load(unit, unit_at + c), along), size + absolute(f)
    still = length == 0 or (zeros_stay and total(size) == 0)
    projection, divisor = fill(total(along)), fill(length)
    for c in range(0, width, LANES):
        across = (load(pull, at + c) - projection * load(unit, unit_at + c)) / divisor
        store(pull, at + c, zero if still else across)
