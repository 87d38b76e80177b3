"""Expected attention, blocked: 64 queries by 64 keys at a time, no matrix of weights anywhere.

The weight of a cosine ``c`` is ``(1 - arccos(c) / pi)**tau``. Where all cosines of a key and the
queries of a tile are small, as most are, the base is ``1/2 + c R(c^2)``; else it comes from
``arccos(c) = sqrt(1 - c) P(c)`` for ``c >= 0`` and ``pi - arccos(-c)`` below. ``P`` and ``R`` are
polynomials. Beyond ``|c| = 0.99`` the cosine no longer determines the angle well, and it is taken
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
from yoso_core.cpu.rows import packed_rows, ramp, store_row, turn_rows, unit_rows, width_of
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, input_array, kept, output_array, rows, working_dtype

STEEP, STEEP_FOR_GRADIENTS = 0.99, 0.9
"""Cosines beyond this are turned into angles by differences of the vectors. Gradients need sines
too, which suffer sooner.
"""

TILE = 64
"""Queries, and keys, to a tile. Keys are added up a tile at a time before they join the total: sums
of sums round less.
"""

SPAN_BYTES = 512 << 10
"""What a task keeps of its queries, at most. A tile of keys meets all of them before it leaves the
second level of cache.
"""

ENOUGH_TASKS = 64
"""Spans are made shorter rather than have fewer tasks than this."""

MODERATE = 0.65
"""Up to this magnitude a cosine is small: ``R`` is fitted for these."""


def arccos_polynomial(degree: int) -> tuple[float, ...]:
    """``arccos(x) / (pi sqrt(1 - x))`` on [0, 1] as a polynomial in ``2x - 1``, highest power
    first, interpolated at Chebyshev points.

    The nearest singularity, ``x = -1``, makes the error shrink 5.8 times with every degree.
    """
    series = np.polynomial.Chebyshev.interpolate(lambda x: np.arccos(x) / (np.pi * np.sqrt(1 - x)), degree, domain=[0, 1])
    powers = np.polynomial.chebyshev.cheb2poly(series.coef)
    return tuple(float(c) for c in powers[::-1])


def arcsin_polynomial(degree: int) -> tuple[float, ...]:
    """``arcsin(c) / (pi c)`` for ``|c| <= MODERATE`` as a polynomial in ``c^2``, highest power
    first, interpolated at Chebyshev points.
    """

    def ratio(square: Array) -> Array:
        c = np.sqrt(square)
        return np.arcsin(c) / (np.pi * c)

    series = np.polynomial.Chebyshev.interpolate(ratio, degree, domain=[0, MODERATE**2])
    return tuple(float(c) for c in series.convert(kind=np.polynomial.Polynomial).coef[::-1])


POLYNOMIALS = {
    types.float32: (arcsin_polynomial(7), arccos_polynomial(8)),
    types.float64: (arcsin_polynomial(18), arccos_polynomial(18)),
}
"""``R`` and ``P``. Off by 1.3e-9 and 1.2e-15 at most."""


@helper
def agreement(cosine, polynomial, like):
    """``1 - arccos(c) / pi`` for lanes of cosines: the chance that one random hyperplane does not
    separate two vectors.
    """
    zero, one = fill(like.dtype.type(0)), fill(like.dtype.type(1))
    magnitude = absolute(cosine)
    rest = one - magnitude
    rest = where_less(rest, zero, zero, rest)
    centerd = magnitude + magnitude - one
    series = zero
    for coefficient in polynomial:
        series = multiply_add(series, centerd, fill(like.dtype.type(coefficient)))
    angle = square_root(rest) * series
    return where_less(cosine, zero, angle, one - angle)


@helper
def agreement_of_moderate(cosine, polynomial, like):
    """`agreement` for lanes of magnitudes up to `MODERATE`."""
    square = cosine * cosine
    series = fill(like.dtype.type(0))
    for coefficient in polynomial:
        series = multiply_add(series, square, fill(like.dtype.type(coefficient)))
    return multiply_add(series, cosine, fill(like.dtype.type(0.5)))


@helper
def chance_and_sine(cosine, tile, at, unit_key, place, d, polynomial, steep, want_sine, scratch):
    """``1 - theta / pi`` and, if wanted, ``sin theta`` of 16 queries and the key at
    ``unit_key[place]``.

    Coordinate ``c`` of the queries is ``tile[c * TILE + at]`` and on. Lanes beyond ``steep`` are
    done again from differences: ``theta = 2 atan2(|q - k|, |q + k|)``,
    ``sin theta = |q - k| |q + k| / 2``.
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
def largest_magnitude(cosines, at, count):
    """Of ``cosines[at : at + count]``, lane by lane (a NaN does not count)."""
    largest = fill(cosines.dtype.type(0))
    for t in range(at, at + count, LANES):
        magnitude = absolute(load(cosines, t))
        largest = where_less(largest, magnitude, magnitude, largest)
    return largest


@helper
def put_weight(weights, pulls, at, chance, hash_code_len):
    """``C = chance**tau`` in place of a cosine and, unless there are no ``pulls``,
    ``C tau / 2 (g . v)`` in place of ``g . v``.
    """
    weight = power(chance, hash_code_len)
    store(weights, at, weight)
    if pulls is not None:
        store(pulls, at, weight * load(pulls, at) * fill(weights.dtype.type(hash_code_len / 2)))


@helper
def weigh(weights, pulls, tile, shift, count, unit_key, places, rows, d, polynomials, steep, hash_code_len, scratch):
    """A tile of cosines, ``rows`` keys by ``count`` queries, to expected weights, in place; and one
    of ``g . v`` to pulls, if given.

    The queries, of which only steep cosines need more, stand crosswise from ``tile[shift]`` on.
    """
    for_moderate, for_all = polynomials
    for u in range(rows):
        at = u * TILE
        largest = largest_magnitude(weights, at, count)
        if all_at_most(largest, weights.dtype.type(MODERATE)):
            for t in range(at, at + count, LANES):
                put_weight(weights, pulls, t, agreement_of_moderate(load(weights, t), for_moderate, weights), hash_code_len)
        elif all_at_most(largest, weights.dtype.type(steep)):
            for t in range(at, at + count, LANES):
                put_weight(weights, pulls, t, agreement(load(weights, t), for_all, weights), hash_code_len)
        else:
            for t in range(0, count, LANES):
                cosine = load(weights, at + t)
                chance, _ = chance_and_sine(cosine, tile, shift + t, unit_key, places[u], d, for_all, steep, False, scratch)
                put_weight(weights, pulls, at + t, chance, hash_code_len)


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
    """Where in a flat array of all heads the rows ``chosen[first : first + count]`` of a head
    begin; ``head_row`` is its first.
    """
    for u in range(count):
        places[u] = (head_row + chosen[first + u]) * width


@helper
def all_products(products, places, tile, shift, num_queries, rows, row_places, singles, d, count):
    """``products[u * TILE + t] = sum_c rows[row_places[u] + c] tile[shift + c * TILE +
    t]`` for ``count`` rows and all queries ``t``.
    """
    lanes = (num_queries + LANES - 1) // LANES * LANES
    product(products, places, 0, rows, row_places, singles, tile, places, shift, count, d, lanes, True)


@helper
def turn_tiles(tiles, packed, places, count, width):
    """`turn_rows`, `TILE` rows at a time: tile ``s`` begins at ``tiles[s * TILE * width]``."""
    for s in range(0, count, TILE):
        turn_rows(tiles[s * width :], TILE, packed, places[s:], 0, min(TILE, count - s), width)


def tiles_to_span(tiles: int, bytes_of_a_query: int) -> int:
    """How many of so many tiles of queries the cache holds."""
    return max(1, min(tiles, SPAN_BYTES // (bytes_of_a_query * TILE)))


@cache
def _expectation_kernel(dtype: Any, polynomials: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    """Output rows of a span of queries for each task, which walks over all kept keys, 64 at a time,
    and for these over the queries.

    Held in the second level of cache: the queries of the span crosswise, and their sums. For
    ``64 * 64`` pairs it does ``64 * 64 (d + d_v)`` multiply-adds in registers; a key and its value
    are read from memory once to a span.
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
            types.intp,
        )
    )
    def attend(first, last, unit_query, unit_key, value, keep_query, keep_key, spoiled, out, d, hash_code_len, normalize, span):
        n_q, n_k, d_v = keep_query.shape[2], keep_key.shape[2], out.shape[3]
        width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
        tiles, sums = aligned(width * span, out.dtype), aligned(span * width_v, out.dtype)
        weights, scratch = aligned(TILE * TILE, out.dtype), aligned(5 * LANES, out.dtype)
        queries, keys, query_places = np.empty(span, np.intp), np.empty(n_k, np.intp), np.empty(span, np.intp)
        key_places, value_places = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        singles, tile_places, sum_places = ramp(max(width, TILE), 1), ramp(max(width, TILE), TILE), ramp(TILE, width_v)
        listed, num_keys = -1, 0
        tasks_per_head = (n_q + span - 1) // span
        for task in range(first, last):
            head, turn = divmod(task, tasks_per_head)
            b, h = divmod(head, keep_query.shape[1])
            if head != listed:
                listed, num_keys = head, list_kept(keys, keep_key, b, h, 0, n_k)
            i, stop = turn * span, min((turn + 1) * span, n_q)
            num_queries = list_kept(queries, keep_query, b, h, i, stop)
            find_places(query_places, queries, 0, num_queries, head * n_q, width)
            turn_tiles(tiles, unit_query, query_places, num_queries, width)
            clear(sums, 0, num_queries * width_v)
            for block in range(0, num_keys if num_queries > 0 else 0, TILE):
                count = min(TILE, num_keys - block)
                find_places(key_places, keys, block, count, head * n_k, width)
                find_places(value_places, keys, block, count, head * n_k, width_v)
                for s in range(0, num_queries, TILE):
                    some, shift = min(TILE, num_queries - s), s * width
                    all_products(weights, tile_places, tiles, shift, some, unit_key, key_places, singles, d, count)
                    weigh(weights, None, tiles, shift, some, unit_key, key_places, count, d, polynomials, STEEP, hash_code_len, scratch)
                    product(
                        sums, sum_places, s * width_v, weights, singles, tile_places, value, value_places, 0, some, count, width_v, False
                    )
            for t in range(num_queries):
                store_row(out, b, h, queries[t], sums, t * width_v)
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
    """See `yoso_core.reference.expectation_attention`. ``normalize``: scale the rows of the result
    to unit length, for attention.

    Working memory: unit copies of query and key, and one of the value unless its rows lie next to
    each other in whole vectors of lanes.
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
    run = _expectation_kernel(numba_type, POLYNOMIALS[numba_type])
    tiles = -(-n_q // TILE)
    spread = batch * num_heads * tiles // ENOUGH_TASKS
    span = TILE * tiles_to_span(max(1, min(tiles, spread)), (width_of(d) + width_of(d_v)) * out.itemsize)
    arrays = (unit_query, unit_key, values, keep_query, keep_key, spoiled, out)
    share(
        batch * num_heads * -(-n_q // span),
        lambda first, last: run(first, last, *arrays, d, hash_code_len, normalize, span),
        num_threads=num_threads,
        cost=float(batch * num_heads) * n_q * n_k * (d + d_v),
    )
    return out.reshape(*query.shape[:-1], d_v).astype(value.dtype, copy=False)
