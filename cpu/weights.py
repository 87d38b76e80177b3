"""Cosines to expected weights, a tile of pairs at a time, with what the gradients need besides.

The weight of a cosine ``c`` is ``(1 - arccos(c) / pi)**tau``. Its base comes from polynomials ``R``
and ``P``: ``1/2 + c R(c^2)`` where all cosines of a key and the queries of a tile are small, as
most are; else from ``arccos(c) = sqrt(1 - c) P(c)`` for ``c >= 0`` and ``pi - arccos(-c)`` below.
Beyond ``|c| = 0.99`` the cosine no longer determines the angle well, and differences of the vectors
do.

In all tiles here, of key ``u`` and query ``t`` what stands at ``u * TILE + t``.
"""

import math

import numpy as np
from numba import types

from yoso_core.cpu.compiling import helper
from yoso_core.cpu.lanes import (
    LANES,
    absolute,
    all_at_most,
    count_where_equal,
    fill,
    fill_from,
    load,
    multiply_add,
    square_root,
    store,
    to_float,
    where_less,
)
from yoso_core.cpu.scratch import padded_width
from yoso_core.cpu.spans import TILE
from yoso_core.cpu.views import Array

STEEP, STEEP_FOR_GRADIENTS = 0.99, 0.9
"""Cosines beyond this are turned into angles by differences of the vectors. Gradients need sines
too, which lose their digits sooner.
"""

MODERATE = 0.65
"""Up to this magnitude a cosine is small: ``R`` is fitted for these."""

SMALLEST = 1e-3
"""Both factors of the exact derivative's denominator are held at this at least."""

SCRATCH = 5 * LANES
"""Numbers of scratch that the weights of steep cosines take."""


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
def chance_of_any(cosine, polynomial, like):
    """``1 - arccos(c) / pi`` for lanes of cosines: the chance that one random hyperplane does not
    separate two vectors.
    """
    zero, one = fill(like.dtype.type(0)), fill(like.dtype.type(1))
    magnitude = absolute(cosine)
    rest = one - magnitude
    rest = where_less(rest, zero, zero, rest)
    argument = magnitude + magnitude - one
    series = zero
    for coefficient in polynomial:
        series = multiply_add(series, argument, fill(like.dtype.type(coefficient)))
    angle = square_root(rest) * series
    return where_less(cosine, zero, angle, one - angle)


@helper
def chance_of_moderate(cosine, polynomial, like):
    """`chance_of_any` for lanes of magnitudes up to `MODERATE`."""
    square = cosine * cosine
    series = fill(like.dtype.type(0))
    for coefficient in polynomial:
        series = multiply_add(series, square, fill(like.dtype.type(coefficient)))
    return multiply_add(series, cosine, fill(like.dtype.type(0.5)))


@helper
def chance_and_sine(cosine, query_tile, query_at, unit_key, key_at, dim, polynomial, steep, want_sine, scratch):
    """``1 - theta / pi`` and, if wanted, ``sin theta`` of 16 queries and one key.

    Coordinate ``c`` of the queries begins at ``query_tile[query_at + c * TILE]``; the key at
    ``unit_key[key_at]``. Lanes beyond ``steep`` are done again from differences:
    ``theta = 2 atan2(|q - k|, |q + k|)``, ``sin theta = |q - k| |q + k| / 2``.
    """
    zero, one = fill(query_tile.dtype.type(0)), fill(query_tile.dtype.type(1))
    chance = chance_of_any(cosine, polynomial, query_tile)
    sine = zero
    if want_sine:
        square = one - cosine * cosine
        sine = square_root(where_less(square, zero, zero, square))
    if all_at_most(absolute(cosine), query_tile.dtype.type(steep)):
        return chance, sine
    apart, along = zero, zero
    for c in range(dim):
        q, k = load(query_tile, c * TILE + query_at), fill_from(unit_key, key_at + c)
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
def put_weight(weights, grad_cosines, at, chance, hash_code_len):
    """``C = chance**tau`` in place of a cosine and, where there are ``grad_cosines``,
    ``C tau / 2 (g . v)`` in place of ``g . v``.
    """
    weight = power(chance, hash_code_len)
    store(weights, at, weight)
    if grad_cosines is not None:
        store(grad_cosines, at, weight * load(grad_cosines, at) * fill(weights.dtype.type(hash_code_len / 2)))


@helper
def weigh(weights, grad_cosines, pairs, query_tiles, unit_key, key_offsets, dim, polynomials, steep, hash_code_len, scratch):
    """A tile of cosines becomes expected weights, in place.

    ``grad_cosines`` is None, or a tile of ``g . v``, which becomes the gradient with respect to the
    cosines, with the lower bound. The vectors are needed for steep cosines alone.
    """
    for_moderate, for_all = polynomials
    for u in range(pairs.keys):
        at = u * TILE
        largest = largest_magnitude(weights, at, pairs.queries)
        if all_at_most(largest, weights.dtype.type(MODERATE)):
            for t in range(at, at + pairs.queries, LANES):
                put_weight(weights, grad_cosines, t, chance_of_moderate(load(weights, t), for_moderate, weights), hash_code_len)
        elif all_at_most(largest, weights.dtype.type(steep)):
            for t in range(at, at + pairs.queries, LANES):
                put_weight(weights, grad_cosines, t, chance_of_any(load(weights, t), for_all, weights), hash_code_len)
        else:
            for t in range(0, pairs.queries, LANES):
                chance, _ = chance_and_sine(
                    cosine=load(weights, at + t),
                    query_tile=query_tiles,
                    query_at=pairs.query0 * padded_width(dim) + t,
                    unit_key=unit_key,
                    key_at=key_offsets[u],
                    dim=dim,
                    polynomial=for_all,
                    steep=steep,
                    want_sine=False,
                    scratch=scratch,
                )
                put_weight(weights, grad_cosines, at + t, chance, hash_code_len)


@helper
def collision_rates(rates, pairs, codes, span, key_code, head, keys):
    """The share of hashes in which a query and a key have the same code, for a tile of pairs.

    ``codes[hash * span + t]`` are those of query ``t`` of the span; ``keys[u]`` is the row of key
    ``u``.
    """
    num_hash = key_code.shape[3]
    for u in range(pairs.keys):
        for t in range(0, pairs.queries, LANES):
            count = fill(types.int32(0))
            for hash in range(num_hash):
                count = count_where_equal(count, load(codes, hash * span + pairs.query0 + t), key_code[(*head, keys[u], hash)])
            store(rates, u * TILE + t, to_float(count, rates.dtype.type(0)) * fill(rates.dtype.type(1 / num_hash)))


@helper
def weigh_exactly(
    weights, grad_cosines, pairs, query_tiles, unit_key, key_offsets, dim, polynomials, hash_code_len, sampled, rates, scratch
):
    """`weigh` with the factor of the exact gradient. If ``sampled``, a constant, says so, the
    collision ``rates`` are the weights.
    """
    smallest, pi, one = fill(weights.dtype.type(SMALLEST)), fill(weights.dtype.type(np.pi)), fill(weights.dtype.type(1))
    for_moderate, for_all = polynomials
    for u in range(pairs.keys):
        moderate = all_at_most(largest_magnitude(weights, u * TILE, pairs.queries), weights.dtype.type(MODERATE))
        for t in range(0, pairs.queries, LANES):
            at = u * TILE + t
            cosine = load(weights, at)
            if moderate:  # as in `weigh`: the gradient of the value is that of the lower bound, to the bit
                chance, sine = chance_of_moderate(cosine, for_moderate, weights), square_root(one - cosine * cosine)
            else:
                chance, sine = chance_and_sine(
                    cosine=cosine,
                    query_tile=query_tiles,
                    query_at=pairs.query0 * padded_width(dim) + t,
                    unit_key=unit_key,
                    key_at=key_offsets[u],
                    dim=dim,
                    polynomial=for_all,
                    steep=STEEP_FOR_GRADIENTS,
                    want_sine=True,
                    scratch=scratch,
                )
            weight = load(rates, at) if sampled else power(chance, hash_code_len)
            left = chance * pi
            left, sine = where_less(left, smallest, smallest, left), where_less(sine, smallest, smallest, sine)
            store(weights, at, weight)
            store(grad_cosines, at, weight * load(grad_cosines, at) * fill(weights.dtype.type(hash_code_len)) / (left * sine))
