"""Sixteen vectors at a time: loaded crosswise, rotated by the fast Hadamard projection, read off as
hash codes.

A *tile* holds coordinate ``j`` of vector ``t`` at ``tile[j * 16 + t]``, so a butterfly between two
coordinates is one addition of lanes. All strides inside it are compile-time constants of the kernel
that calls these helpers.
"""

import math

import numpy as np
from numba import types

from yoso_core.cpu.compiling import helper
from yoso_core.cpu.lanes import LANES, absolute, all_at_most, fill, fill_from, load, load_transposed, store, weight_where_positive
from yoso_core.reference.hashing import HUGE

MAX_DIM = 1 << 18
"""Largest padded dimension that has butterflies below: a tile of it is 16 MiB in float32."""


@helper
def aligned(count, dtype):
    """Uninitialized scratch that starts on a cache line, so that no load of 16 floats straddles
    two.
    """
    raw = np.empty(count + LANES, dtype)
    start = (-(raw.ctypes.data // raw.itemsize)) % LANES
    return raw[start : start + count]


@helper
def take(tile, j, flip, signs, b, h, stage, part):
    """Coordinate ``j`` of all vectors, times its random sign if ``flip``, a constant, says so."""
    return load(tile, j * LANES) * fill_from(signs, (b, h, stage, part, j)) if flip else load(tile, j * LANES)


@helper
def butterflies_2(tile, dim, h, flip, signs, b, head, stage, part):
    """One stage, stride ``h``."""
    for block in range(0, dim, 2 * h):
        for j in range(block, block + h):
            a0 = take(tile, j, flip, signs, b, head, stage, part)
            a1 = take(tile, j + h, flip, signs, b, head, stage, part)
            store(tile, j * LANES, a0 + a1)
            store(tile, (j + h) * LANES, a0 - a1)


@helper
def butterflies_4(tile, dim, h, flip, signs, b, head, stage, part):
    """Two stages in one pass over the tile, strides ``2h`` and ``h``."""
    for block in range(0, dim, 4 * h):
        for j in range(block, block + h):
            a0 = take(tile, j, flip, signs, b, head, stage, part)
            a1 = take(tile, j + h, flip, signs, b, head, stage, part)
            a2 = take(tile, j + 2 * h, flip, signs, b, head, stage, part)
            a3 = take(tile, j + 3 * h, flip, signs, b, head, stage, part)
            b0, b1, b2, b3 = a0 + a2, a1 + a3, a0 - a2, a1 - a3
            store(tile, j * LANES, b0 + b1)
            store(tile, (j + h) * LANES, b0 - b1)
            store(tile, (j + 2 * h) * LANES, b2 + b3)
            store(tile, (j + 3 * h) * LANES, b2 - b3)


@helper
def butterflies_8(tile, dim, h, flip, signs, b, head, stage, part):
    """Three stages in one pass over the tile, strides ``4h``, ``2h`` and ``h``."""
    for block in range(0, dim, 8 * h):
        for j in range(block, block + h):
            a0 = take(tile, j, flip, signs, b, head, stage, part)
            a1 = take(tile, j + h, flip, signs, b, head, stage, part)
            a2 = take(tile, j + 2 * h, flip, signs, b, head, stage, part)
            a3 = take(tile, j + 3 * h, flip, signs, b, head, stage, part)
            a4 = take(tile, j + 4 * h, flip, signs, b, head, stage, part)
            a5 = take(tile, j + 5 * h, flip, signs, b, head, stage, part)
            a6 = take(tile, j + 6 * h, flip, signs, b, head, stage, part)
            a7 = take(tile, j + 7 * h, flip, signs, b, head, stage, part)
            b0, b1, b2, b3 = a0 + a4, a1 + a5, a2 + a6, a3 + a7
            b4, b5, b6, b7 = a0 - a4, a1 - a5, a2 - a6, a3 - a7
            a0, a1, a2, a3 = b0 + b2, b1 + b3, b0 - b2, b1 - b3
            a4, a5, a6, a7 = b4 + b6, b5 + b7, b4 - b6, b5 - b7
            store(tile, j * LANES, a0 + a1)
            store(tile, (j + h) * LANES, a0 - a1)
            store(tile, (j + 2 * h) * LANES, a2 + a3)
            store(tile, (j + 3 * h) * LANES, a2 - a3)
            store(tile, (j + 4 * h) * LANES, a4 + a5)
            store(tile, (j + 5 * h) * LANES, a4 - a5)
            store(tile, (j + 6 * h) * LANES, a6 + a7)
            store(tile, (j + 7 * h) * LANES, a6 - a7)


@helper
def hadamard(tile, dim, flip, signs, b, h, stage, part):
    """The transform of all 16 vectors, largest stride first, after a change of signs if ``flip``.

    ``dim`` is a constant, so only its own passes are compiled: the bits of ``log2 dim`` that are no
    multiple of three first, then threes.
    """
    if dim in (2, 16, 128, 1024, 8192, 65536):
        butterflies_2(tile, dim, dim // 2, flip, signs, b, h, stage, part)
        flip = False
    if dim in (4, 32, 256, 2048, 16384, 131072):
        butterflies_4(tile, dim, dim // 4, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 262144:
        butterflies_8(tile, dim, 32768, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 32768:
        butterflies_8(tile, dim, 4096, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 4096:
        butterflies_8(tile, dim, 512, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 512:
        butterflies_8(tile, dim, 64, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 64:
        butterflies_8(tile, dim, 8, flip, signs, b, h, stage, part)
        flip = False
    if dim >= 8:
        butterflies_8(tile, dim, 1, flip, signs, b, h, stage, part)
        flip = False
    if dim == 1 and flip:
        store(tile, 0, take(tile, 0, True, signs, b, h, stage, part))


@helper
def rotate(tile, dim, signs, b, h, part):
    """``H D3 H D2 H D1`` in place; ``signs (batch, heads, 3, parts, D)`` as floats."""
    for stage in range(3):
        hadamard(tile, dim, True, signs, b, h, stage, part)


@helper
def pack(tile, codes, count, hash_code_len):
    """Sign bits to codes: code ``c`` of vector ``t`` goes to ``codes[c * 16 + t]``; coordinate
    ``c * tau + b`` is worth ``2**b``.
    """
    for c in range(count):
        code = fill(types.int32(0))
        for b in range(hash_code_len):
            code = code | weight_where_positive(load(tile, (c * hash_code_len + b) * LANES), types.int32(1 << b))
        store(codes, c * LANES, code)


@helper
def load_tile(tile, dim, x, b, h, i):
    """Up to 16 rows of ``x[b, h, i:]`` as a tile, padded with zeros to ``dim`` coordinates and 16
    vectors.

    Returns whether all is well: every entry finite and none beyond 2**60 (by the sum of magnitudes,
    which is no smaller). If not, the caller must call `tame_tile`.
    """
    d = x.shape[3]
    count = min(LANES, x.shape[2] - i)
    full = d - d % LANES if count == LANES else 0
    for j in range(0, full, LANES):
        load_transposed(x, (b, h, i, j), tile, j * LANES)
    zero = fill(x.dtype.type(0))
    for j in range(full, dim):
        store(tile, j * LANES, zero)
    for t in range(count):
        for j in range(full, d):
            tile[j * LANES + t] = x[b, h, i + t, j]
    magnitude = zero
    for j in range(d):
        magnitude = magnitude + absolute(load(tile, j * LANES))
    return all_at_most(magnitude, x.dtype.type(HUGE))


@helper
def load_rotated(tile, dim, finite, x, signs, b, h, i, part):
    """Up to 16 rows of ``x[b, h, i:]`` as a tile, rotated for one part. Returns whether ``finite``
    says anything of interest.
    """
    well = load_tile(tile, dim, x, b, h, i)
    if not well:
        tame_tile(tile, dim, finite)
    rotate(tile, dim, signs, b, h, part)
    return not well


@helper
def tame_tile(tile, dim, finite):
    """Scale vectors with entries beyond 2**60 by an exact power of two; note in ``finite`` which
    vectors are finite.
    """
    for t in range(LANES):
        largest = 0.0
        finite[t] = 1
        for j in range(dim):
            entry = abs(tile[j * LANES + t])
            largest = max(largest, entry)
            if not math.isfinite(entry):
                finite[t] = 0
        if finite[t] and largest > HUGE:
            exponent = math.frexp(largest)[1]
            for j in range(dim):
                tile[j * LANES + t] = math.ldexp(tile[j * LANES + t], -exponent)
