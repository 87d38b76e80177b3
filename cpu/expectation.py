"""Expected attention, blocked: 64 queries by 64 keys at a time, no matrix of weights anywhere.

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
from yoso_core.cpu.cumulation import clear, finish_rows
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
from yoso_core.cpu.products import product
from yoso_core.cpu.rows import packed_rows, ramp, store_row, turn_rows, unit_rows
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, input_array, kept, output_array, rows, working_dtype

STEEP, STEEP_FOR_GRADIENTS = 0.99, 0.9
"""Cosines beyond this are turned into angles by differences of the vectors. Gradients need sines too, which suffer sooner."""

TILE = 64
"""Queries, and keys, to a tile. Keys are added up a tile at a time before they join the total: sums of sums round less."""


def arccos_polynomial(degree: int) -> tuple[float, ...]:
    """``arccos(x) / (pi sqrt(1 - x))`` on [0, 1] as a polynomial in ``2x - 1``, highest power first, interpolated at Chebyshev points.

    The nearest singularity, ``x = -1``, makes the error shrink 5.8 times with every degree.
    """
    series = np.polynomial.Chebyshev.interpolate(lambda x: np.arccos(x) / (np.pi * np.sqrt(1 - x)), degree, domain=[0, 1])
    powers = np.polynomial.chebyshev.cheb2poly(series.coef)
    return tuple(float(c) for c in powers[::-1])


POLYNOMIAL = {types.float32: arccos_polynomial(8), types.float64: arccos_polynomial(18)}
"""Off by 1.3e-9 and 1.2e-15 at most."""


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
def chance_and_sine(cosine, tile, at, unit_key, place, d, polynomial, steep, want_sine, scratch):
    """``1 - theta / pi`` and, if wanted, ``sin theta`` of 16 queries and the key at ``unit_key[place]``.

    Coordinate ``c`` of the queries is ``tile[c * TILE + at]`` and on. Lanes beyond ``steep`` are done again from differences:
    ``theta = 2 atan2(|q - k|, |q + k|)``, ``sin theta = |q - k| |q + k| / 2``.
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
    for c in range(d):
        q, k = load(tile, c * TILE + at), fill_from(unit_key, place + c)
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
def all_flat(cosines, at, count, steep):
    """Whether none of ``cosines[at : at + count]`` lies beyond ``steep`` (a NaN does not)."""
    largest = fill(cosines.dtype.type(0))
    for t in range(0, count, LANES):
        magnitude = absolute(load(cosines, at + t))
        largest = where_less(largest, magnitude, magnitude, largest)
    return all_at_most(largest, cosines.dtype.type(steep))


@helper
def weigh(weights, tile, count, unit_key, places, rows, d, polynomial, steep, hash_code_len, scratch):
    """A tile of cosines, ``rows`` keys by ``count`` queries, to expected weights, in place."""
    for u in range(rows):
        at = u * TILE
        if all_flat(weights, at, count, steep):
            for t in range(0, count, LANES):
                store(weights, at + t, power(agreement(load(weights, at + t), polynomial, weights), hash_code_len))
        else:
            for t in range(0, count, LANES):
                cosine = load(weights, at + t)
                chance, _ = chance_and_sine(cosine, tile, t, unit_key, places[u], d, polynomial, steep, False, scratch)
                store(weights, at + t, power(chance, hash_code_len))


@helper
def list_kept(chosen, keep, b, h, first, last):
    """The kept rows among ``first ... last - 1`` of a head, and how many they are."""
    count = 0
    for i in range(first, last):
        if keep[b, h, i]:
            chosen[count] = i
            count += 1
    return count


@helper
def find_places(places, chosen, first, count, head_row, width):
    """Where in a flat array of all heads the rows ``chosen[first : first + count]`` of a head begin; ``head_row`` is its first."""
    for u in range(count):
        places[u] = (head_row + chosen[first + u]) * width


@helper
def all_products(products, tile, tile_places, rows, places, singles, d, count):
    """``products[u * TILE + t] = sum_c rows[places[u] + c] tile[c * TILE + t]`` for ``count`` rows."""
    product(products, tile_places, 0, rows, places, singles, tile, tile_places, 0, count, d, TILE, True)


@cache
def _expectation_kernel(dtype: Any, polynomial: tuple[float, ...]) -> Any:
    """Output rows of 64 queries for each task, which walks over all kept keys, 64 at a time.

    Held in the first two levels of cache: the queries crosswise (``64 d`` entries), a tile of weights, and sums (``64 d_v``). For every
    ``64 * 64`` pairs it reads ``64 (d + d_v)`` entries of keys and values and does ``64 * 64 (d + d_v)`` multiply-adds in registers.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 1),
            input_array(dtype, 1),
            input_array(dtype, 1),
            input_array(types.uint8, 3),
            input_array(types.uint8, 3),
            input_array(types.uint8, 3),
            output_array(dtype, 4),
            types.intp,
            types.intp,
            types.boolean,
        )
    )
    def attend(first, last, unit_query, unit_key, value, keep_query, keep_key, spoiled, out, d, hash_code_len, normalize):
        n_q, n_k, d_v = keep_query.shape[2], keep_key.shape[2], out.shape[3]
        width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
        tile, weights, sums = aligned(width * TILE, out.dtype), aligned(TILE * TILE, out.dtype), aligned(TILE * width_v, out.dtype)
        scratch = aligned(5 * LANES, out.dtype)
        queries, keys = np.empty(TILE, np.intp), np.empty(n_k, np.intp)
        query_places, key_places, value_places = np.empty(TILE, np.intp), np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        singles, tile_places, sum_places = ramp(max(width, TILE), 1), ramp(max(width, TILE), TILE), ramp(TILE, width_v)
        listed, num_keys = -1, 0
        tasks_per_head = (n_q + TILE - 1) // TILE
        for task in range(first, last):
            head, turn = divmod(task, tasks_per_head)
            b, h = divmod(head, keep_query.shape[1])
            if head != listed:
                listed, num_keys = head, list_kept(keys, keep_key, b, h, 0, n_k)
            i, stop = turn * TILE, min((turn + 1) * TILE, n_q)
            num_queries = list_kept(queries, keep_query, b, h, i, stop)
            find_places(query_places, queries, 0, num_queries, head * n_q, width)
            if num_queries > 0:
                turn_rows(tile, TILE, unit_query, query_places, 0, num_queries, width)
            clear(sums, 0, num_queries * width_v)
            for block in range(0, num_keys if num_queries > 0 else 0, TILE):
                count = min(TILE, num_keys - block)
                find_places(key_places, keys, block, count, head * n_k, width)
                find_places(value_places, keys, block, count, head * n_k, width_v)
                all_products(weights, tile, tile_places, unit_key, key_places, singles, d, count)
                weigh(weights, tile, num_queries, unit_key, key_places, count, d, polynomial, STEEP, hash_code_len, scratch)
                product(sums, sum_places, 0, weights, singles, tile_places, value, value_places, 0, num_queries, count, width_v, False)
            for t in range(num_queries):
                store_row(out, b, h, queries[t], sums, sum_places[t])
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

    Working memory: unit copies of query and key, and one of the value unless its rows lie next to each other in whole vectors of lanes.
    """
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    q, k, v = (rows(x, dtype) for x in (query, key, value))
    unit_query, _, spoiled_query = unit_rows(q, num_threads)
    unit_key, _, _ = unit_rows(k, num_threads)
    values = packed_rows(v, num_threads)
    keep_query, keep_key = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    batch, num_heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    spoiled = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    spoiled[:, :, 1:] = spoiled_query
    out = np.empty((batch, num_heads, n_q, d_v), dtype)
    numba_type = from_dtype(out.dtype)
    run = _expectation_kernel(numba_type, POLYNOMIAL[numba_type])
    share(
        batch * num_heads * -(-n_q // TILE),
        lambda first, last: run(first, last, unit_query, unit_key, values, keep_query, keep_key, spoiled, out, d, hash_code_len, normalize),
        num_threads=num_threads,
        cost=float(batch * num_heads) * n_q * n_k * (d + d_v),
    )
    return out.reshape(*query.shape[:-1], d_v).astype(value.dtype, copy=False)
