"""Expected attention, blocked: 32 queries by 4 keys in registers, no matrix of weights anywhere.

The weight ``(1 - arccos(c) / pi)**tau`` of a cosine ``c`` comes from ``arccos(c) = sqrt(1 - c) P(c)`` for ``c >= 0`` and
``pi - arccos(-c)`` below, with ``P`` a polynomial. Beyond ``|c| = 0.99`` the cosine no longer determines the angle well, and it is taken
from differences instead.
"""

import math
from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import finish_rows
from yoso_core.cpu.lanes import (
    LANES,
    absolute,
    all_at_most,
    fill,
    fill_from,
    load,
    multiply_add,
    square_root,
    store,
    where_less,
)
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned, load_tile
from yoso_core.cpu.views import Array, input_array, kept, output_array, rows, working_dtype

STEEP, STEEP_FOR_GRADIENTS = 0.99, 0.9
"""Cosines beyond this are turned into angles by differences of the vectors. Gradients need sines too, which suffer sooner."""

KEYS_AT_ONCE = 4
KEY_BLOCK = 64
DIM_BLOCK = 128
"""Keys, and coordinates, that are added up by themselves before they join the total: sums of sums round less."""

QUERY_TILE = 2 * LANES


def arccos_polynomial(degree: int) -> tuple[float, ...]:
    """``arccos(x) / (pi sqrt(1 - x))`` on [0, 1] as a polynomial in ``2x - 1``, highest power first, interpolated at Chebyshev points.

    The nearest singularity, ``x = -1``, makes the error shrink 5.8 times with every degree.
    """
    series = np.polynomial.Chebyshev.interpolate(lambda x: np.arccos(x) / (np.pi * np.sqrt(1 - x)), degree, domain=[0, 1])
    powers = np.polynomial.chebyshev.cheb2poly(series.coef)
    return tuple(float(c) for c in powers[::-1])


POLYNOMIAL = {types.float32: arccos_polynomial(8), types.float64: arccos_polynomial(18)}
"""Off by 1.3e-9 and 1.2e-15 at most."""


@cache
def _unit_kernel(dtype: Any) -> Any:
    """Rows scaled to unit length (zero rows stay zero), their lengths, and which of them are not finite. A task is one row."""

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            output_array(dtype, 4),
            output_array(dtype, 3),
            output_array(types.uint8, 3),
        )
    )
    def normalize(first, last, x, unit, lengths, spoiled):
        n, d = x.shape[2], x.shape[3]
        for task in range(first, last):
            head, i = divmod(task, n)
            b, h = divmod(head, x.shape[1])
            largest = x.dtype.type(0)
            finite = True
            for c in range(d):
                entry = abs(x[b, h, i, c])
                finite = finite and math.isfinite(entry)
                largest = max(largest, entry)
            spoiled[b, h, i] = not finite
            squares = 0.0  # in float64: a sum of a thousand squares in float32 would show
            for c in range(d):
                entry = x[b, h, i, c] / largest if largest > 0 else x.dtype.type(0)
                unit[b, h, i, c] = entry
                squares += float(entry) * float(entry)
            length = x.dtype.type(math.sqrt(squares)) if largest > 0 else x.dtype.type(1)
            lengths[b, h, i] = largest * length
            for c in range(d):
                unit[b, h, i, c] = unit[b, h, i, c] / length if finite else x.dtype.type(np.nan)

    return normalize


def unit_rows(x: Array, num_threads: int | None) -> tuple[Array, Array, Array]:
    """``x (batch, heads, n, d)`` with rows of unit length, their lengths, and uint8 ``(batch, heads, n)``: 1 where a row was not finite."""
    unit, lengths, spoiled = np.empty(x.shape, x.dtype), np.empty(x.shape[:-1], x.dtype), np.empty(x.shape[:-1], np.uint8)
    run = _unit_kernel(from_dtype(x.dtype))
    share(spoiled.size, lambda first, last: run(first, last, x, unit, lengths, spoiled), num_threads=num_threads, cost=10.0 * x.size)
    return unit, lengths, spoiled


@helper
def agreement(cosine, polynomial, like):
    """``1 - arccos(c) / pi`` for lanes of cosines: the chance that one random hyperplane does not separate two vectors."""
    zero, one = fill(like.dtype.type(0)), fill(like.dtype.type(1))
    magnitude = absolute(cosine)
    rest = one - magnitude
    rest = where_less(rest, zero, zero, rest)
    centred = magnitude + magnitude - one
    series = zero
    for coefficient in polynomial:
        series = multiply_add(series, centred, fill(like.dtype.type(coefficient)))
    angle = square_root(rest) * series
    return where_less(cosine, zero, angle, one - angle)


@helper
def chance_and_sine(cosine, tile, unit_key, b, h, j, polynomial, steep, want_sine, scratch):
    """``1 - theta / pi`` and, if wanted, ``sin theta`` of 16 vectors, coordinate by coordinate in ``tile``, and vector ``j``.

    Lanes beyond ``steep`` are done again from differences: ``theta = 2 atan2(|q - k|, |q + k|)``, ``sin theta = |q - k| |q + k| / 2``.
    """
    zero, one = fill(tile.dtype.type(0)), fill(tile.dtype.type(1))
    chance = agreement(cosine, polynomial, tile)
    sine = zero
    if want_sine:
        square = one - cosine * cosine
        sine = square_root(where_less(square, zero, zero, square))
    if all_at_most(absolute(cosine), tile.dtype.type(steep)):
        return chance, sine
    apart, along = zero, zero
    for c in range(unit_key.shape[3]):
        q, k = load(tile, c * LANES), fill_from(unit_key, (b, h, j, c))
        apart, along = multiply_add(q - k, q - k, apart), multiply_add(q + k, q + k, along)
    store(scratch, 0, chance)
    store(scratch, LANES, cosine)
    store(scratch, 2 * LANES, apart)
    store(scratch, 3 * LANES, along)
    store(scratch, 4 * LANES, sine)
    for t in range(LANES):
        if abs(scratch[LANES + t]) > steep:
            difference, together = math.sqrt(scratch[2 * LANES + t]), math.sqrt(scratch[3 * LANES + t])
            scratch[t] = 1 - 2 * math.atan2(difference, together) / math.pi
            scratch[4 * LANES + t] = difference * together / 2
    return load(scratch, 0), load(scratch, 4 * LANES)


@helper
def power(base, exponent):
    """``base ** exponent`` for an integer of at least 1, by squaring."""
    while exponent & 1 == 0:
        base = base * base
        exponent >>= 1
    result = base
    exponent >>= 1
    while exponent > 0:
        base = base * base
        if exponent & 1:
            result = result * base
        exponent >>= 1
    return result


@helper
def weight(cosine, tile, unit_key, b, h, j, polynomial, hash_code_len, scratch):
    """``(1 - arccos(c) / pi)**tau`` for 16 queries and key ``j``."""
    return power(chance_and_sine(cosine, tile, unit_key, b, h, j, polynomial, STEEP, False, scratch)[0], hash_code_len)


@helper
def products(tile0, tile1, unit_key, b, h, j0, j1, j2, j3, first, last):
    """The dot products of 32 queries with four keys, over the coordinates ``first ... last - 1``: eight registers of sums."""
    zero = fill(tile0.dtype.type(0))
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    for c in range(first, last):
        q0, q1 = load(tile0, c * LANES), load(tile1, c * LANES)
        k0, k1 = fill_from(unit_key, (b, h, j0, c)), fill_from(unit_key, (b, h, j1, c))
        k2, k3 = fill_from(unit_key, (b, h, j2, c)), fill_from(unit_key, (b, h, j3, c))
        a0, a1 = multiply_add(q0, k0, a0), multiply_add(q0, k1, a1)
        a2, a3 = multiply_add(q0, k2, a2), multiply_add(q0, k3, a3)
        b0, b1 = multiply_add(q1, k0, b0), multiply_add(q1, k1, b1)
        b2, b3 = multiply_add(q1, k2, b2), multiply_add(q1, k3, b3)
    return a0, a1, a2, a3, b0, b1, b2, b3


@helper
def list_kept(chosen, keep, b, h):
    """The kept rows of a head; the last is repeated, to be given weight zero, so that a group of four can always be filled."""
    count = 0
    for j in range(keep.shape[2]):
        if keep[b, h, j]:
            chosen[count] = j
            count += 1
    for j in range(count, count + KEYS_AT_ONCE):
        chosen[j] = chosen[max(count - 1, 0)]
    return count


@helper
def all_products(tile0, tile1, rows, b, h, j0, j1, j2, j3):
    """`products` over all coordinates, `DIM_BLOCK` at a time."""
    dim = rows.shape[3]
    a0, a1, a2, a3, b0, b1, b2, b3 = products(tile0, tile1, rows, b, h, j0, j1, j2, j3, 0, min(dim, DIM_BLOCK))
    for c in range(DIM_BLOCK, dim, DIM_BLOCK):
        c0, c1, c2, c3, d0, d1, d2, d3 = products(tile0, tile1, rows, b, h, j0, j1, j2, j3, c, min(dim, c + DIM_BLOCK))
        a0, a1, a2, a3 = a0 + c0, a1 + c1, a2 + c2, a3 + c3
        b0, b1, b2, b3 = b0 + d0, b1 + d1, b2 + d2, b3 + d3
    return a0, a1, a2, a3, b0, b1, b2, b3


@helper
def drop_missing(left, like, a0, a1, a2, a3, b0, b1, b2, b3):
    """Zeros for the keys beyond the last."""
    zero = fill(like.dtype.type(0))
    if left < 4:
        a3, b3 = zero, zero
    if left < 3:
        a2, b2 = zero, zero
    if left < 2:
        a1, b1 = zero, zero
    return a0, a1, a2, a3, b0, b1, b2, b3


@helper
def add_rows(block_sum, rows, b, h, j0, j1, j2, j3, a0, a1, a2, a3, b0, b1, b2, b3):
    """Four rows, each times its weights, on top of the sums of 32 queries: ``block_sum[c * 32 + t] += sum_u weight_u[t] rows[j_u, c]``."""
    for c in range(rows.shape[3]):
        v0, v1 = fill_from(rows, (b, h, j0, c)), fill_from(rows, (b, h, j1, c))
        v2, v3 = fill_from(rows, (b, h, j2, c)), fill_from(rows, (b, h, j3, c))
        y0, y1 = load(block_sum, c * QUERY_TILE), load(block_sum, c * QUERY_TILE + LANES)
        y0, y1 = multiply_add(a0, v0, y0), multiply_add(b0, v0, y1)
        y0, y1 = multiply_add(a1, v1, y0), multiply_add(b1, v1, y1)
        y0, y1 = multiply_add(a2, v2, y0), multiply_add(b2, v2, y1)
        y0, y1 = multiply_add(a3, v3, y0), multiply_add(b3, v3, y1)
        store(block_sum, c * QUERY_TILE, y0)
        store(block_sum, c * QUERY_TILE + LANES, y1)


@helper
def load_two_tiles(tile0, tile1, x, b, h, i):
    """32 rows of ``x[b, h, i:]`` as two tiles, as far as there are so many."""
    load_tile(tile0, x.shape[3], x, b, h, i)
    if i + LANES < x.shape[2]:
        load_tile(tile1, x.shape[3], x, b, h, i + LANES)
    else:
        tile1[:] = 0


@cache
def _expectation_kernel(dtype: Any, polynomial: tuple[float, ...]) -> Any:
    """Output rows of 32 queries for each task, which walks over all kept keys, four at a time.

    Held in first-level cache: 32 queries crosswise (``32 d`` entries) and their sums (``64 d_v``). For every 128 pairs it reads
    ``4 (d + d_v)`` entries of keys and values and does ``128 (d + d_v)`` multiply-adds in registers.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            input_array(dtype, 4),
            input_array(dtype, 4),
            input_array(types.uint8, 3),
            input_array(types.uint8, 3),
            input_array(types.uint8, 3),
            output_array(dtype, 4),
            types.intp,
            types.boolean,
        )
    )
    def attend(first, last, unit_query, unit_key, value, keep_query, keep_key, spoiled, out, hash_code_len, normalize):
        n_q, n_k, d, d_v = unit_query.shape[2], unit_key.shape[2], unit_query.shape[3], value.shape[3]
        tile0, tile1 = aligned(d * LANES, out.dtype), aligned(d * LANES, out.dtype)
        block_sum, sums = aligned(d_v * QUERY_TILE, out.dtype), aligned(d_v * QUERY_TILE, out.dtype)
        scratch = aligned(5 * LANES, out.dtype)
        chosen = np.empty(n_k + KEYS_AT_ONCE, np.intp)
        listed, num_kept = -1, 0
        tasks_per_head = (n_q + QUERY_TILE - 1) // QUERY_TILE
        for task in range(first, last):
            head, part = divmod(task, tasks_per_head)
            b, h = divmod(head, unit_query.shape[1])
            if head != listed:
                listed, num_kept = head, list_kept(chosen, keep_key, b, h)
            i = part * QUERY_TILE
            load_two_tiles(tile0, tile1, unit_query, b, h, i)
            sums[:] = 0
            for block in range(0, num_kept, KEY_BLOCK):
                block_sum[:] = 0
                for group in range(block, min(block + KEY_BLOCK, num_kept), KEYS_AT_ONCE):
                    j0, j1, j2, j3 = chosen[group], chosen[group + 1], chosen[group + 2], chosen[group + 3]
                    a0, a1, a2, a3, b0, b1, b2, b3 = all_products(tile0, tile1, unit_key, b, h, j0, j1, j2, j3)
                    a0 = weight(a0, tile0, unit_key, b, h, j0, polynomial, hash_code_len, scratch)
                    a1 = weight(a1, tile0, unit_key, b, h, j1, polynomial, hash_code_len, scratch)
                    a2 = weight(a2, tile0, unit_key, b, h, j2, polynomial, hash_code_len, scratch)
                    a3 = weight(a3, tile0, unit_key, b, h, j3, polynomial, hash_code_len, scratch)
                    b0 = weight(b0, tile1, unit_key, b, h, j0, polynomial, hash_code_len, scratch)
                    b1 = weight(b1, tile1, unit_key, b, h, j1, polynomial, hash_code_len, scratch)
                    b2 = weight(b2, tile1, unit_key, b, h, j2, polynomial, hash_code_len, scratch)
                    b3 = weight(b3, tile1, unit_key, b, h, j3, polynomial, hash_code_len, scratch)
                    a0, a1, a2, a3, b0, b1, b2, b3 = drop_missing(num_kept - group, out, a0, a1, a2, a3, b0, b1, b2, b3)
                    add_rows(block_sum, value, b, h, j0, j1, j2, j3, a0, a1, a2, a3, b0, b1, b2, b3)
                for c in range(0, d_v * QUERY_TILE, LANES):
                    store(sums, c, load(sums, c) + load(block_sum, c))
            stop = min(i + QUERY_TILE, n_q)
            for t in range(stop - i):
                for c in range(d_v):
                    out[b, h, i + t, c] = sums[c * QUERY_TILE + t]
            finish_rows(out, keep_query, spoiled, b, h, i, stop, out.dtype.type(1), normalize)

    return attend


def expectation_attention(
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize: bool = False,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.expectation_attention`. ``normalize``: scale the rows of the result to unit length, for attention.

    Working memory: unit copies of query and key.
    """
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    unit_query, _, spoiled_query = unit_rows(rows(query, dtype), num_threads)
    unit_key, _, _ = unit_rows(rows(key, dtype), num_threads)
    v = rows(value, dtype)
    keep_query, keep_key = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    batch, num_heads, n_q, d = unit_query.shape
    n_k, d_v = v.shape[2:]
    spoiled = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    spoiled[:, :, 1:] = spoiled_query
    out = np.empty((batch, num_heads, n_q, d_v), dtype)
    numba_type = from_dtype(out.dtype)
    run = _expectation_kernel(numba_type, POLYNOMIAL[numba_type])
    share(
        batch * num_heads * -(-n_q // QUERY_TILE),
        lambda first, last: run(first, last, unit_query, unit_key, v, keep_query, keep_key, spoiled, out, hash_code_len, normalize),
        num_threads=num_threads,
        cost=float(batch * num_heads) * n_q * n_k * (d + d_v),
    )
    return out.reshape(*query.shape[:-1], d_v).astype(value.dtype, copy=False)
