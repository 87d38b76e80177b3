"""Rows of a head on their way into products and out of them.

Products want *packed* rows: flat arrays in which every row is padded with zeros to whole vectors of
lanes (`padded_width`). Here rows are packed, transposed and scaled to unit length. Gradients with
respect to unit rows become gradients with respect to the rows as they came.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel, subroutine
from yoso_core.cpu.lanes import (
    LANES,
    Lanes,
    absolute,
    fill,
    intrinsic,
    load,
    multiply_add,
    read,
    read_one,
    square_root,
    store,
    total,
    where_less,
    write,
    write_one,
)
from yoso_core.cpu.products import some_of, transpose
from yoso_core.cpu.scratch import CACHE_LINE, aligned, aligned_empty, padded_width
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import load_tile
from yoso_core.cpu.views import Array, input_array, output_array

ROW_BLOCK = 256
"""Rows to a task."""


class RowBlock(NamedTuple):
    """Rows ``first ... last - 1`` of a head. Packed into a flat array, row ``i`` begins at
    ``start + i * step``.
    """

    start: int
    step: int
    first: int
    last: int


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
def transpose_rows(tile, step, packed, offsets, shift, count, width):
    """``tile[c * step + t] = packed[offsets[t] + shift + c]`` for ``count`` rows ``t`` and
    ``c < width``.

    Offsets as in `yoso_core.cpu.products`. Rows go 16 at a time; past the last row that one is
    repeated.
    """
    for t in range(0, count, LANES):
        sixteen = some_of(offsets, t, count - 1, LANES)
        for c in range(0, width, LANES):
            transpose(packed, sixteen, shift + c, tile, c * step + t, step)


@helper
def unit_tile(tile, lengths, nonfinite, x, head, i):
    """Up to 16 rows of ``x``, from ``x[*head, i]`` on, transposed and scaled to unit length (zero
    rows stay zero); their lengths; and 1 for each that is not finite.
    """
    d = x.shape[3]
    zero, one = fill(tile.dtype.type(0)), fill(tile.dtype.type(1))
    if not load_tile(tile, padded_width(d), x, head, i):
        for t in range(LANES):
            lengths[t], nonfinite[t] = unit_column(tile, t, d)
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
    nonfinite[:] = 0


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


@subroutine
def pack_unit_rows(out, block, x, head, lengths, nonfinite):
    """A block of rows of ``x[*head]``, scaled to unit length, packed into ``out``; their lengths;
    and 1 for each that is not finite.

    Row by row the result does not depend on where the block begins.
    """
    width = padded_width(x.shape[3])
    tile, square = aligned(width * LANES, out.dtype), aligned(LANES * LANES, out.dtype)
    tile_lengths, tile_nonfinite = np.empty(LANES, out.dtype), np.empty(LANES, np.uint8)
    for i in range(block.first, block.last, LANES):
        count = min(LANES, block.last - i)
        unit_tile(tile, tile_lengths, tile_nonfinite, x, head, i)
        for t in range(count):
            lengths[i + t], nonfinite[i + t] = tile_lengths[t], tile_nonfinite[t]
        for c in range(0, width, LANES):
            transpose_rows(tile=square, step=LANES, packed=tile, offsets=LANES, shift=c * LANES, count=LANES, width=LANES)
            for t in range(count):
                store(out, block.start + (i + t) * block.step + c, load(square, t * LANES))


@subroutine
def pack_rows(out, block, x, head, nonfinite):
    """A block of rows of ``x[*head]``, packed into ``out``; and 1 for each that is not finite."""
    d = x.shape[3]
    full = d - d % LANES
    zero = fill(out.dtype.type(0))
    for i in range(block.first, block.last):
        at, nothing = block.start + i * block.step, zero
        if full < d:
            store(out, at + full, zero)
            for c in range(full, d):
                out[at + c] = read_one(x, (*head, i, c))
            nothing = load(out, at + full) - load(out, at + full)
        for c in range(0, full, LANES):
            row = read(x, (*head, i, c))
            store(out, at + c, row)
            nothing = nothing + (row - row)  # 0 for a finite number, NaN for any other
        nonfinite[i] = total(nothing) != 0


@cache
def _rows_kernel(dtype: Any, stored: Any, unit: bool) -> Any:
    """`pack_unit_rows` or `pack_rows`. A task is a block of rows of a head."""

    @kernel(x=input_array(stored, 4), out=output_array(dtype, 1), lengths=output_array(dtype, 3), nonfinite=output_array(types.uint8, 3))
    def prepare(first, last, x, out, lengths, nonfinite):
        n, width = x.shape[2], padded_width(x.shape[3])
        blocks = (n + ROW_BLOCK - 1) // ROW_BLOCK
        for task in range(first, last):
            head_index, turn = divmod(task, blocks)
            head, first_row = divmod(head_index, x.shape[1]), turn * ROW_BLOCK
            block = RowBlock(start=head_index * n * width, step=width, first=first_row, last=min(first_row + ROW_BLOCK, n))
            if unit:
                pack_unit_rows(out, block, x, head, lengths[head], nonfinite[head])
            else:
                pack_rows(out, block, x, head, nonfinite[head])

    return prepare


def _prepared(x: Array, dtype: Any, unit: bool, num_threads: int | None) -> tuple[Array, Array, Array]:
    out = aligned_empty(math.prod(x.shape[:-1]) * padded_width(x.shape[-1]), dtype)
    lengths, nonfinite = np.empty(x.shape[:-1] if unit else (0, 0, 0), dtype), np.empty(x.shape[:-1], np.uint8)
    share(
        x.shape[0] * x.shape[1] * -(-x.shape[2] // ROW_BLOCK),
        partial(_rows_kernel(from_dtype(out.dtype), from_dtype(x.dtype), unit), x=x, out=out, lengths=lengths, nonfinite=nonfinite),
        num_threads=num_threads,
        cost=3.0 * x.size,
        moved=2.0 * out.nbytes,
    )
    return out, lengths, nonfinite


def unit_rows(x: Array, dtype: Any, num_threads: int | None) -> tuple[Array, Array, Array]:
    """`stored_rows` ``x (batch, heads, n, d)`` scaled to unit length (zero rows stay zero), packed
    and flat; their lengths; and uint8 ``(batch, heads, n)``: 1 where a row is not finite, whose
    unit row is NaN.
    """
    return _prepared(x, dtype, True, num_threads)


def packed_rows(x: Array, dtype: Any, num_threads: int | None) -> Array:
    """`stored_rows` ``x (batch, heads, n, d)``, packed and flat, from the start of a cache line: a
    view if they stand like that already.

    A load of a vector that crosses from one cache line into the next counts twice. Beside a product
    over all pairs a copy costs nothing.
    """
    if x.dtype == dtype and x.shape[-1] % LANES == 0 and x.flags.c_contiguous and x.ctypes.data % CACHE_LINE == 0:
        return x.reshape(-1)
    return _prepared(x, dtype, False, num_threads)[0]


@helper
def store_row(x, head, i, packed, at):
    """``x[*head, i] = packed[at:]``, without the padding."""
    d = x.shape[3]
    full = d - d % LANES
    for c in range(0, full, LANES):
        write(x, (*head, i, c), load(packed, at + c))
    for c in range(full, d):
        write_one(x, (*head, i, c), packed[at + c])


@helper
def l2_normalize_backward(grad, at, unit, unit_at, width, length, zeros_stay):
    """The gradient ``g`` with respect to a unit row ``u = x / |x|`` becomes, in place, that with
    respect to ``x``: ``(g - (g . u) u) / |x|``; zeros where the ``length`` ``|x|`` is zero.

    ``g`` begins at ``grad[at]``, ``u`` at ``unit[unit_at]``. With ``zeros_stay`` a gradient of
    zeros stays so even where ``u`` is NaN.
    """
    zero = fill(grad.dtype.type(0))
    along, size = zero, zero
    for c in range(0, width, LANES):
        g = load(grad, at + c)
        along, size = multiply_add(g, load(unit, unit_at + c), along), size + absolute(g)
    still = length == 0 or (zeros_stay and total(size) == 0)
    projection, divisor = fill(total(along)), fill(length)
    for c in range(0, width, LANES):
        across = (load(grad, at + c) - projection * load(unit, unit_at + c)) / divisor
        store(grad, at + c, zero if still else across)
