"""Sixteen vectors at a time: transposed, rotated by the fast Hadamard projection, packed into hash
codes.

A *tile* holds coordinate ``c`` of vector ``t`` at ``tile[c * 16 + t]``, so a butterfly between two
coordinates is one addition of lanes. All strides inside it are compile-time constants of the kernel
that calls these helpers.
"""

import math
from typing import Any

from numba import types
from numba.extending import overload

from yoso_core.cpu.compiling import MERGED, helper
from yoso_core.cpu.lanes import LANES, absolute, all_at_most, fill, fill_from, load, load_transposed, read_one, store, weight_where_positive
from yoso_core.reference.hashing import HUGE

MAX_DIM = 1 << 18
"""Largest padded dimension: a tile of it is 16 MiB in float32."""


@helper
def take(tile, c, flip, signs, diagonal):
    """Coordinate ``c`` of all vectors, times its random sign ``signs[*diagonal, c]`` if ``flip``, a
    constant, says so.
    """
    return load(tile, c * LANES) * fill_from(signs, (*diagonal, c)) if flip else load(tile, c * LANES)


@helper
def butterflies_2(tile, dim, stride, flip, signs, diagonal):
    """One stage."""
    for block in range(0, dim, 2 * stride):
        for c in range(block, block + stride):
            a0 = take(tile, c, flip, signs, diagonal)
            a1 = take(tile, c + stride, flip, signs, diagonal)
            store(tile, c * LANES, a0 + a1)
            store(tile, (c + stride) * LANES, a0 - a1)


@helper
def butterflies_4(tile, dim, stride, flip, signs, diagonal):
    """Two stages in one pass over the tile, with strides ``2 stride`` and ``stride``."""
    for block in range(0, dim, 4 * stride):
        for c in range(block, block + stride):
            a0 = take(tile, c, flip, signs, diagonal)
            a1 = take(tile, c + stride, flip, signs, diagonal)
            a2 = take(tile, c + 2 * stride, flip, signs, diagonal)
            a3 = take(tile, c + 3 * stride, flip, signs, diagonal)
            b0, b1, b2, b3 = a0 + a2, a1 + a3, a0 - a2, a1 - a3
            store(tile, c * LANES, b0 + b1)
            store(tile, (c + stride) * LANES, b0 - b1)
            store(tile, (c + 2 * stride) * LANES, b2 + b3)
            store(tile, (c + 3 * stride) * LANES, b2 - b3)


@helper
def butterflies_8(tile, dim, stride, flip, signs, diagonal):
    """Three stages in one pass over the tile, with strides ``4 stride``, ``2 stride`` and
    ``stride``.
    """
    for block in range(0, dim, 8 * stride):
        for c in range(block, block + stride):
            a0 = take(tile, c, flip, signs, diagonal)
            a1 = take(tile, c + stride, flip, signs, diagonal)
            a2 = take(tile, c + 2 * stride, flip, signs, diagonal)
            a3 = take(tile, c + 3 * stride, flip, signs, diagonal)
            a4 = take(tile, c + 4 * stride, flip, signs, diagonal)
            a5 = take(tile, c + 5 * stride, flip, signs, diagonal)
            a6 = take(tile, c + 6 * stride, flip, signs, diagonal)
            a7 = take(tile, c + 7 * stride, flip, signs, diagonal)
            b0, b1, b2, b3 = a0 + a4, a1 + a5, a2 + a6, a3 + a7
            b4, b5, b6, b7 = a0 - a4, a1 - a5, a2 - a6, a3 - a7
            a0, a1, a2, a3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
            a4, a5, a6, a7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
            store(tile, c * LANES, a0 + a1)
            store(tile, (c + stride) * LANES, a0 - a1)
            store(tile, (c + 2 * stride) * LANES, a2 + a3)
            store(tile, (c + 3 * stride) * LANES, a2 - a3)
            store(tile, (c + 4 * stride) * LANES, a4 + a5)
            store(tile, (c + 5 * stride) * LANES, a4 - a5)
            store(tile, (c + 6 * stride) * LANES, a6 + a7)
            store(tile, (c + 7 * stride) * LANES, a6 - a7)


def _passes(dim: int, block: int) -> Any:
    """The butterflies inside blocks of ``block`` coordinates, as a chain of passes over the tile.

    A pass does three stages. The first does one or two where ``log2 block`` is not a multiple of
    three, so that all others do three.
    """
    stages = (block.bit_length() - 1) % 3 or 3
    butterflies, stride = (butterflies_2, butterflies_4, butterflies_8)[stages - 1], block >> stages
    if stride == 1:
        return helper(lambda tile, flip, signs, diagonal: butterflies(tile, dim, 1, flip, signs, diagonal))
    rest = _passes(dim, stride)

    @helper
    def first_and_rest(tile, flip, signs, diagonal):
        butterflies(tile, dim, stride, flip, signs, diagonal)
        rest(tile, False, signs, diagonal)

    return first_and_rest


def hadamard(tile, dim, flip, signs, diagonal):
    """The transform of all 16 vectors, largest stride first, in place.

    Before it every coordinate is multiplied by its sign ``signs[*diagonal, c]`` if ``flip``, a
    constant, says so. ``dim`` is a constant too. For kernels only.
    """
    raise NotImplementedError


@overload(hadamard, prefer_literal=True, jit_options=MERGED)
def _hadamard(tile, dim, flip, signs, diagonal):
    if not isinstance(dim, types.IntegerLiteral):
        return None
    if dim.literal_value == 1:
        return lambda tile, dim, flip, signs, diagonal: store(tile, 0, take(tile, 0, flip, signs, diagonal))
    passes = _passes(dim.literal_value, dim.literal_value)
    return lambda tile, dim, flip, signs, diagonal: passes(tile, flip, signs, diagonal)


@helper
def rotate(tile, dim, signs, head, part):
    """``H D3 H D2 H D1`` in place; ``signs (batch, heads, 3, parts, D)`` as floats."""
    for stage in range(3):
        hadamard(tile, dim, True, signs, (*head, stage, part))


@helper
def pack(tile, codes, count, hash_code_len):
    """Sign bits to codes. Code ``hash`` of vector ``t`` goes to ``codes[hash * 16 + t]``;
    coordinate ``hash * tau + bit`` is worth ``2**bit``.
    """
    for hash in range(count):
        code = fill(types.int32(0))
        for bit in range(hash_code_len):
            code = code | weight_where_positive(load(tile, (hash * hash_code_len + bit) * LANES), types.int32(1 << bit))
        store(codes, hash * LANES, code)


@helper
def load_tile(tile, dim, x, head, i):
    """Up to 16 rows of ``x``, from ``x[*head, i]`` on, as a tile, padded with zeros to ``dim``
    coordinates and 16 vectors.

    Returns whether every entry is finite and none exceeds 2**60, judged by the sum of magnitudes,
    which is at least as large as any of them. If not, the caller must call `tame_tile`.
    """
    d = x.shape[3]
    count = min(LANES, x.shape[2] - i)
    full = d - d % LANES if count == LANES else 0
    for c in range(0, full, LANES):
        load_transposed(x, (*head, i, c), tile, c * LANES)
    zero = fill(tile.dtype.type(0))
    for c in range(full, dim):
        store(tile, c * LANES, zero)
    for t in range(count):
        for c in range(full, d):
            tile[c * LANES + t] = read_one(x, (*head, i + t, c))
    magnitude = zero
    for c in range(d):
        magnitude = magnitude + absolute(load(tile, c * LANES))
    return all_at_most(magnitude, tile.dtype.type(HUGE))


@helper
def tame_tile(tile, dim, finite):
    """Scale vectors with entries beyond 2**60 by an exact power of two; write to ``finite`` which
    vectors are finite.
    """
    for t in range(LANES):
        largest = 0.0
        finite[t] = 1
        for c in range(dim):
            entry = abs(tile[c * LANES + t])
            largest = max(largest, entry)
            if not math.isfinite(entry):
                finite[t] = 0
        if finite[t] and largest > HUGE:
            exponent = math.frexp(largest)[1]
            for c in range(dim):
                tile[c * LANES + t] = math.ldexp(tile[c * LANES + t], -exponent)
