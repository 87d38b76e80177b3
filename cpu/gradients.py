"""Gradients of both kinds of attention, without a matrix of weights anywhere.

For unit vectors, with ``C_ij`` the weight and ``w_ij`` its factor::

    pull_ij = C_ij w_ij (g_i . v_j)
    dq_i = sum_j pull_ij k_j      dk_j = sum_i pull_ij q_i      dv_j = sum_i C_ij g_i

All three come from one walk over tiles of 64 queries by 64 keys: two products make a tile of
cosines and one of ``g . v``, which become ``C`` and ``pull`` in place, and three products add them
up.

Sampled attention with the lower bound needs no pairs: see `yoso_core.cpu.sampled_gradients`.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import clear
from yoso_core.cpu.expectation import (
    MODERATE,
    POLYNOMIALS,
    STEEP_FOR_GRADIENTS,
    TILE,
    agreement_of_moderate,
    all_products,
    chance_and_sine,
    find_places,
    largest_magnitude,
    list_kept,
    power,
    tiles_to_span,
    turn_tiles,
    weigh,
)
from yoso_core.cpu.lanes import LANES, all_at_most, count_where_equal, fill, load, square_root, store, to_float, where_less
from yoso_core.cpu.products import product
from yoso_core.cpu.rows import leave_normalization, packed_rows, ramp, store_row, unit_rows, width_of
from yoso_core.cpu.sampled_gradients import lsh_lower_bound_backward
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, aligned_empty, heads, input_array, kept, output_array, rows, working_dtype
from yoso_core.reference.expectation import Grad

Gradients = tuple[Array, Array, Array]

SMALLEST = 1e-3
"""Both factors of the exact derivative's denominator are held at this at least."""

ENOUGH_TASKS = 16
"""Where there are fewer heads, the queries of a head are dealt to several tasks, each with sums of
its own for all keys.
"""


@helper
def collision_rate(code_tile, at, step, other_code, b, h, j, like):
    """The share of hashes in which 16 rows and row ``j`` have the same code."""
    num_hash = other_code.shape[3]
    count = fill(types.int32(0))
    for c in range(num_hash):
        count = count_where_equal(count, load(code_tile, c * step + at), other_code[b, h, j, c])
    return to_float(count, like.dtype.type(0)) * fill(like.dtype.type(1 / num_hash))


@helper
def weigh_exactly(
    weights,
    pulls,
    tile,
    shift,
    count,
    unit_key,
    places,
    rows,
    d,
    polynomials,
    tau,
    codes,
    code_at,
    span,
    key_code,
    b,
    h,
    keys,
    block,
    sampled,
    scratch,
):
    """`weigh` with the factor of the exact gradient, and with collision rates for weights if
    ``sampled``, a constant, says so.
    """
    smallest, pi, one = fill(weights.dtype.type(SMALLEST)), fill(weights.dtype.type(np.pi)), fill(weights.dtype.type(1))
    for_moderate, for_all = polynomials
    for u in range(rows):
        moderate = all_at_most(largest_magnitude(weights, u * TILE, count), weights.dtype.type(MODERATE))
        for t in range(0, count, LANES):
            at = u * TILE + t
            cosine = load(weights, at)
            if moderate:  # as in `weigh`: the gradient of the value is that of the lower bound, to the bit
                chance, sine = agreement_of_moderate(cosine, for_moderate, weights), square_root(one - cosine * cosine)
            else:
                chance, sine = chance_and_sine(cosine, tile, shift + t, unit_key, places[u], d, for_all, STEEP_FOR_GRADIENTS, True, scratch)
            weight = collision_rate(codes, code_at + t, span, key_code, b, h, keys[block + u], weights) if sampled else power(chance, tau)
            left = chance * pi
            left, sine = where_less(left, smallest, smallest, left), where_less(sine, smallest, smallest, sine)
            store(weights, at, weight)
            store(pulls, at, weight * load(pulls, at) * fill(weights.dtype.type(tau)) / (left * sine))


@cache
def _pull_kernel(dtype: Any, polynomials: tuple[tuple[float, ...], tuple[float, ...]], exact: bool, sampled: bool) -> Any:
    """A task takes a piece of the queries of a head, a span at a time, past all keys. It finishes
    the gradients of its queries, and adds up those of the keys (by unit keys) and values in rows of
    its own, ``parts`` to a head.

    Each tile of 64 keys meets all queries of a span, 64 at a time, and is read from memory and
    added to once for them all. For ``64 * 64`` pairs ``64 * 64 (3 d + 2 d_v)`` multiply-adds.
    Constants: ``exact``, which ``w``; ``sampled``, whether ``C`` is a collision rate.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            types.intp,
            input_array(dtype, 1),
            input_array(dtype, 3),
            input_array(dtype, 1),
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            input_array(dtype, 1),
            input_array(dtype, 1),
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            output_array(dtype, 4),
            output_array(dtype, 1),
            output_array(dtype, 1),
            types.intp,
            types.intp,
            types.intp,
        )
    )
    def pull(
        first,
        last,
        parts,
        unit_query,
        query_length,
        grad_out,
        query_code,
        keep_query,
        unit_key,
        value,
        key_code,
        keep_key,
        grad_query,
        key_sums,
        value_sums,
        d_v,
        tau,
        span,
    ):
        n_q, n_k, d, num_hash = keep_query.shape[2], keep_key.shape[2], grad_query.shape[3], query_code.shape[3]
        width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
        query_tiles, grad_tiles = aligned(width * span, grad_query.dtype), aligned(width_v * span, grad_query.dtype)
        weights, pulls = aligned(TILE * TILE, grad_query.dtype), aligned(TILE * TILE, grad_query.dtype)
        query_sums, scratch = aligned(span * width, grad_query.dtype), aligned(5 * LANES, grad_query.dtype)
        codes = aligned(num_hash * span, np.int32)
        queries, keys = np.empty(span, np.intp), np.empty(n_k, np.intp)
        query_places, grad_places = np.empty(span, np.intp), np.empty(span, np.intp)
        key_places, value_places = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        key_sum_places, value_sum_places = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        longest = max(width, width_v, TILE)
        singles, tile_places, query_sum_places = ramp(longest, 1), ramp(longest, TILE), ramp(TILE, width)
        tiles = (n_q + TILE - 1) // TILE
        for task in range(first, last):
            head, part = divmod(task, parts)
            b, h = divmod(head, keep_query.shape[1])
            num_keys = list_kept(keys, keep_key, b, h, 0, n_k)
            clear(key_sums, task * n_k * width, n_k * width)
            clear(value_sums, task * n_k * width_v, n_k * width_v)
            end = min(tiles * (part + 1) // parts * TILE, n_q)
            for i in range(tiles * part // parts * TILE, end, span):
                stop = min(i + span, end)
                num_queries = list_kept(queries, keep_query, b, h, i, stop)
                for t in range(i, stop):
                    if not keep_query[b, h, t]:
                        grad_query[b, h, t, :] = 0
                if num_queries == 0:
                    continue
                find_places(query_places, queries, 0, num_queries, head * n_q, width)
                find_places(grad_places, queries, 0, num_queries, head * n_q, width_v)
                turn_tiles(query_tiles, unit_query, query_places, num_queries, width)
                turn_tiles(grad_tiles, grad_out, grad_places, num_queries, width_v)
                if sampled:
                    for t in range(num_queries):
                        for c in range(num_hash):
                            codes[c * span + t] = query_code[b, h, queries[t], c]
                clear(query_sums, 0, num_queries * width)
                for block in range(0, num_keys, TILE):
                    count = min(TILE, num_keys - block)
                    find_places(key_places, keys, block, count, head * n_k, width)
                    find_places(value_places, keys, block, count, head * n_k, width_v)
                    find_places(key_sum_places, keys, block, count, task * n_k, width)
                    find_places(value_sum_places, keys, block, count, task * n_k, width_v)
                    for s in range(0, num_queries, TILE):
                        some, shift = min(TILE, num_queries - s), s * width
                        all_products(weights, tile_places, query_tiles, shift, some, unit_key, key_places, singles, d, count)
                        all_products(pulls, tile_places, grad_tiles, s * width_v, some, value, value_places, singles, d_v, count)
                        if exact:
                            weigh_exactly(
                                weights,
                                pulls,
                                query_tiles,
                                shift,
                                some,
                                unit_key,
                                key_places,
                                count,
                                d,
                                polynomials,
                                tau,
                                codes,
                                s,
                                span,
                                key_code,
                                b,
                                h,
                                keys,
                                block,
                                sampled,
                                scratch,
                            )
                        else:
                            weigh(
                                weights,
                                pulls,
                                query_tiles,
                                shift,
                                some,
                                unit_key,
                                key_places,
                                count,
                                d,
                                polynomials,
                                STEEP_FOR_GRADIENTS,
                                tau,
                                scratch,
                            )
                        product(
                            query_sums,
                            query_sum_places,
                            shift,
                            pulls,
                            singles,
                            tile_places,
                            unit_key,
                            key_places,
                            0,
                            some,
                            count,
                            width,
                            False,
                        )
                        product(
                            key_sums,
                            key_sum_places,
                            0,
                            pulls,
                            tile_places,
                            singles,
                            unit_query,
                            query_places[s:],
                            0,
                            count,
                            some,
                            width,
                            False,
                        )
                        product(
                            value_sums,
                            value_sum_places,
                            0,
                            weights,
                            tile_places,
                            singles,
                            grad_out,
                            grad_places[s:],
                            0,
                            count,
                            some,
                            width_v,
                            False,
                        )
                for t in range(num_queries):
                    at, length = t * width, query_length[b, h, queries[t]]
                    leave_normalization(query_sums, at, unit_query, query_places[t], width, length, False)
                    store_row(grad_query, b, h, queries[t], query_sums, at)

    return pull


@cache
def _finish_kernel(dtype: Any) -> Any:
    """Gradients of keys and values from the sums of the parts, in order. A task is a row of a
    head.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            types.intp,
            output_array(dtype, 1),
            output_array(dtype, 1),
            input_array(dtype, 1),
            input_array(dtype, 3),
            input_array(types.uint8, 3),
            output_array(dtype, 4),
            output_array(dtype, 4),
        )
    )
    def finish(first, last, parts, key_sums, value_sums, unit_key, key_length, keep_key, grad_key, grad_value):
        n, d, d_v = keep_key.shape[2], grad_key.shape[3], grad_value.shape[3]
        width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
        for task in range(first, last):
            head, j = divmod(task, n)
            b, h = divmod(head, keep_key.shape[1])
            row = head * parts * n + j
            for part in range(1, parts):
                for c in range(0, width, LANES):
                    at = row * width + c
                    store(key_sums, at, load(key_sums, at) + load(key_sums, at + part * n * width))
                for c in range(0, width_v, LANES):
                    at = row * width_v + c
                    store(value_sums, at, load(value_sums, at) + load(value_sums, at + part * n * width_v))
            length = key_length[b, h, j] if keep_key[b, h, j] else key_length.dtype.type(0)
            leave_normalization(key_sums, row * width, unit_key, task * width, width, length, False)
            store_row(grad_key, b, h, j, key_sums, row * width)
            store_row(grad_value, b, h, j, value_sums, row * width_v)

    return finish


def _by_pairs(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    codes: tuple[Array, Array] | None,
    hash_code_len: int,
    grad: Grad,
    query_mask: Array | None,
    key_mask: Array | None,
    num_threads: int | None,
) -> Gradients:
    """All three gradients from all pairs, with the expectation as weights, or the collisions of
    ``codes``.
    """
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    q, k, v, g = (rows(x, dtype) for x in (query, key, value, grad_out))
    (unit_q, length_q, _), (unit_k, length_k, _) = (unit_rows(x, num_threads) for x in (q, k))
    packed_v, packed_g = packed_rows(v, num_threads), packed_rows(g, num_threads)
    keep_q, keep_k = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    code_q, code_k = (np.empty((1, 1, 1, 0), np.int32),) * 2 if codes is None else map(heads, codes)
    batch, num_heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    heads_in_all = batch * num_heads
    parts = max(1, min(-(-n_q // TILE), -(-ENOUGH_TASKS // max(heads_in_all, 1))))
    grad_q, grad_k, grad_v = np.empty(q.shape, dtype), np.empty(k.shape, dtype), np.empty(v.shape, dtype)
    key_sums, value_sums = (aligned_empty(heads_in_all * parts * n_k * width_of(dim), dtype) for dim in (d, d_v))
    numba_type = from_dtype(np.dtype(dtype))
    run = _pull_kernel(numba_type, POLYNOMIALS[numba_type], grad == "exact", codes is not None)
    bytes_of_a_query = (3 * width_of(d) + 2 * width_of(d_v)) * grad_q.itemsize
    span = TILE * tiles_to_span(-(-n_q // TILE), bytes_of_a_query)
    queries, keys = (unit_q, length_q, packed_g, code_q, keep_q), (unit_k, packed_v, code_k, keep_k)
    share(
        heads_in_all * parts,
        lambda first, last: run(first, last, parts, *queries, *keys, grad_q, key_sums, value_sums, d_v, hash_code_len, span),
        num_threads=num_threads,
        cost=2.0 * heads_in_all * n_q * n_k * (d + d_v),
    )
    finish = _finish_kernel(numba_type)
    share(
        heads_in_all * n_k,
        lambda first, last: finish(first, last, parts, key_sums, value_sums, unit_k, length_k, keep_k, grad_k, grad_v),
        num_threads=num_threads,
        cost=float(key_sums.size + value_sums.size),
    )
    return (
        grad_q.reshape(query.shape).astype(query.dtype, copy=False),
        grad_k.reshape(key.shape).astype(key.dtype, copy=False),
        grad_v.reshape(value.shape).astype(value.dtype, copy=False),
    )


def expectation_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """See `yoso_core.reference.expectation_attention_backward`.

    Working memory: unit copies of query and key, and sums for the gradients of key and value
    (several, for fewer than 16 heads).
    """
    return _by_pairs(grad_out, query, key, value, None, hash_code_len, grad, query_mask, key_mask, num_threads)


def lsh_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    query_hash_code: Array,
    key_hash_code: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """See `yoso_core.reference.lsh_attention_backward`.

    With ``grad="lower_bound"`` bucket by bucket, in time linear in ``n``; with ``grad="exact"``
    over all pairs.
    """
    if grad == "exact":
        codes = (query_hash_code, key_hash_code)
        return _by_pairs(grad_out, query, key, value, codes, hash_code_len, grad, query_mask, key_mask, num_threads)
    arrays = (grad_out, query, key, value, query_hash_code, key_hash_code)
    return lsh_lower_bound_backward(*arrays, hash_code_len, query_mask, key_mask, num_threads)
