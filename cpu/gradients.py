"""Gradients of both kinds of attention, without a matrix of weights anywhere.

For unit vectors all three have one form: 32 rows ``x`` with companions ``p`` walk over all rows ``y`` with companions ``r``::

    first_i = sum_j C_ij w_ij (p_i . r_j) y_j        second_i = sum_j C_ij r_j

With queries and output gradients as ``x, p`` and keys and values as ``y, r``, ``first`` is the gradient of the query. With the roles
exchanged it is that of the key, and ``second`` that of the value. So one kernel, called twice, does it all, and one task writes each row.

Sampled attention with the lower bound needs no pairs: its gradients are cumulations, in time linear in ``n``.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.buckets import lsh_weighted_cumulation
from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import load_codes, lsh_cumulation
from yoso_core.cpu.expectation import (
    KEY_BLOCK,
    KEYS_AT_ONCE,
    POLYNOMIAL,
    QUERY_TILE,
    STEEP_FOR_GRADIENTS,
    add_rows,
    all_products,
    chance_and_sine,
    drop_missing,
    list_kept,
    load_two_tiles,
    power,
    unit_rows,
)
from yoso_core.cpu.lanes import LANES, count_where_equal, fill, load, store, to_float, where_less
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array, rows, working_dtype
from yoso_core.reference.expectation import Grad

Gradients = tuple[Array, Array, Array]

SMALLEST = 1e-3
"""Both factors of the exact derivative's denominator are held at this at least."""


@helper
def collision_rate(code_tile, other_code, b, h, j, like):
    """The share of hashes in which 16 rows and row ``j`` have the same code."""
    num_hash = other_code.shape[3]
    count = fill(types.int32(0))
    for c in range(num_hash):
        count = count_where_equal(count, load(code_tile, c * LANES), other_code[b, h, j, c])
    return to_float(count, like.dtype.type(0)) * fill(like.dtype.type(1 / num_hash))


@helper
def weight_and_pull(cosine, product, tile, code_tile, unit_y, other_code, b, h, j, polynomial, tau, exact, sampled, scratch):
    """``C`` and ``C w p.r`` for 16 rows and row ``j``. Constants: ``exact``, which ``w``; ``sampled``, ``C`` is a collision rate."""
    chance, sine = chance_and_sine(cosine, tile, unit_y, b, h, j, polynomial, STEEP_FOR_GRADIENTS, exact, scratch)
    weight = collision_rate(code_tile, other_code, b, h, j, tile) if sampled else power(chance, tau)
    if exact:
        smallest = fill(tile.dtype.type(SMALLEST))
        left = chance * fill(tile.dtype.type(np.pi))
        left, sine = where_less(left, smallest, smallest, left), where_less(sine, smallest, smallest, sine)
        return weight, weight * product * fill(tile.dtype.type(tau)) / (left * sine)
    return weight, weight * product * fill(tile.dtype.type(tau / 2))


@cache
def _pull_kernel(dtype: Any, polynomial: tuple[float, ...], exact: bool, sampled: bool) -> Any:
    """``first`` and ``second`` of the module's equation for 32 rows ``x`` in each task, which walks over all kept rows ``y``, four at once.

    For every 128 pairs it does ``128 (2 d + d_v)`` multiply-adds, and ``128 d_v`` more if ``second`` is wanted. ``first`` leaves through
    the normalisation of ``x``: ``(f - (f . u) u) / |x|`` for the unit row ``u``; rows of length zero, and masked ones, get zeros.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            input_array(dtype, 3),
            input_array(dtype, 4),
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            input_array(dtype, 4),
            input_array(dtype, 4),
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            output_array(dtype, 4),
            output_array(dtype, 4),
            types.intp,
            types.boolean,
        )
    )
    def pull(
        task0,
        task1,
        unit_x,
        length_x,
        companion_x,
        code_x,
        keep_x,
        unit_y,
        companion_y,
        code_y,
        keep_y,
        first,
        second,
        tau,
        want_second,
    ):
        n, d, d_v = unit_x.shape[2], unit_x.shape[3], companion_x.shape[3]
        tile0, tile1 = aligned(d * LANES, first.dtype), aligned(d * LANES, first.dtype)
        companion0, companion1 = aligned(d_v * LANES, first.dtype), aligned(d_v * LANES, first.dtype)
        codes0, codes1 = aligned(code_x.shape[3] * LANES, np.int32), aligned(code_x.shape[3] * LANES, np.int32)
        first_block, first_sum = aligned(d * QUERY_TILE, first.dtype), aligned(d * QUERY_TILE, first.dtype)
        second_block, second_sum = aligned(d_v * QUERY_TILE, first.dtype), aligned(d_v * QUERY_TILE, first.dtype)
        scratch = aligned(5 * LANES, first.dtype)
        chosen = np.empty(unit_y.shape[2] + KEYS_AT_ONCE, np.intp)
        listed, num_kept = -1, 0
        tasks_per_head = (n + QUERY_TILE - 1) // QUERY_TILE
        for task in range(task0, task1):
            head, turn = divmod(task, tasks_per_head)
            b, h = divmod(head, unit_x.shape[1])
            if head != listed:
                listed, num_kept = head, list_kept(chosen, keep_y, b, h)
            i = turn * QUERY_TILE
            load_two_tiles(tile0, tile1, unit_x, b, h, i)
            load_two_tiles(companion0, companion1, companion_x, b, h, i)
            if sampled:
                load_codes(codes0, code_x, b, h, i, 0, code_x.shape[3], n)
                load_codes(codes1, code_x, b, h, i + LANES, 0, code_x.shape[3], n)
            first_sum[:] = 0
            second_sum[:] = 0
            for block in range(0, num_kept, KEY_BLOCK):
                first_block[:] = 0
                second_block[:] = 0
                for group in range(block, min(block + KEY_BLOCK, num_kept), KEYS_AT_ONCE):
                    j0, j1, j2, j3 = chosen[group], chosen[group + 1], chosen[group + 2], chosen[group + 3]
                    a0, a1, a2, a3, b0, b1, b2, b3 = all_products(tile0, tile1, unit_y, b, h, j0, j1, j2, j3)
                    p0, p1, p2, p3, q0, q1, q2, q3 = all_products(companion0, companion1, companion_y, b, h, j0, j1, j2, j3)
                    with_0 = (tile0, codes0, unit_y, code_y, b, h)
                    with_1 = (tile1, codes1, unit_y, code_y, b, h)
                    how = (polynomial, tau, exact, sampled, scratch)
                    a0, p0 = weight_and_pull(a0, p0, *with_0, j0, *how)
                    a1, p1 = weight_and_pull(a1, p1, *with_0, j1, *how)
                    a2, p2 = weight_and_pull(a2, p2, *with_0, j2, *how)
                    a3, p3 = weight_and_pull(a3, p3, *with_0, j3, *how)
                    b0, q0 = weight_and_pull(b0, q0, *with_1, j0, *how)
                    b1, q1 = weight_and_pull(b1, q1, *with_1, j1, *how)
                    b2, q2 = weight_and_pull(b2, q2, *with_1, j2, *how)
                    b3, q3 = weight_and_pull(b3, q3, *with_1, j3, *how)
                    p0, p1, p2, p3, q0, q1, q2, q3 = drop_missing(num_kept - group, first, p0, p1, p2, p3, q0, q1, q2, q3)
                    add_rows(first_block, unit_y, b, h, j0, j1, j2, j3, p0, p1, p2, p3, q0, q1, q2, q3)
                    if want_second:
                        a0, a1, a2, a3, b0, b1, b2, b3 = drop_missing(num_kept - group, first, a0, a1, a2, a3, b0, b1, b2, b3)
                        add_rows(second_block, companion_y, b, h, j0, j1, j2, j3, a0, a1, a2, a3, b0, b1, b2, b3)
                for c in range(0, d * QUERY_TILE, LANES):
                    store(first_sum, c, load(first_sum, c) + load(first_block, c))
                for c in range(0, d_v * QUERY_TILE, LANES):
                    store(second_sum, c, load(second_sum, c) + load(second_block, c))
            for t in range(min(QUERY_TILE, n - i)):
                zero_row = not keep_x[b, h, i + t] or length_x[b, h, i + t] == 0
                along = first.dtype.type(0)
                for c in range(d):
                    along += first_sum[c * QUERY_TILE + t] * unit_x[b, h, i + t, c]
                for c in range(d):
                    across = first_sum[c * QUERY_TILE + t] - along * unit_x[b, h, i + t, c]
                    first[b, h, i + t, c] = 0 if zero_row else across / length_x[b, h, i + t]
                if want_second:
                    for c in range(d_v):
                        second[b, h, i + t, c] = second_sum[c * QUERY_TILE + t] if keep_x[b, h, i + t] else 0

    return pull


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
    """All three gradients from all pairs, with the expectation as weights, or the collisions of ``codes``."""
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    (unit_q, length_q, _), (unit_k, length_k, _) = (unit_rows(rows(x, dtype), num_threads) for x in (query, key))
    g, v = rows(grad_out, dtype), rows(value, dtype)
    keep_q, keep_k = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    code_q, code_k = (np.empty((1, 1, 1, 0), np.int32),) * 2 if codes is None else map(heads, codes)
    grad_q, grad_k, grad_v = np.empty_like(unit_q), np.empty_like(unit_k), np.empty(v.shape, dtype)
    nothing = np.empty((0, 0, 0, 0), dtype)
    numba_type = from_dtype(np.dtype(dtype))
    run = _pull_kernel(numba_type, POLYNOMIAL[numba_type], grad == "exact", codes is not None)
    batch, num_heads, n_q, d = unit_q.shape
    n_k, d_v = v.shape[2:]
    queries, keys = (unit_q, length_q, g, code_q, keep_q), (unit_k, length_k, v, code_k, keep_k)
    for x, y, first, second in ((queries, keys, grad_q, nothing), (keys, queries, grad_k, grad_v)):
        unit_y, _, companion_y, code_y, keep_y = y
        share(
            batch * num_heads * -(-x[0].shape[2] // QUERY_TILE),
            lambda task0, task1, x=x, y=(unit_y, companion_y, code_y, keep_y), first=first, second=second: run(  # type: ignore[misc]
                task0, task1, *x, *y, first, second, hash_code_len, second.size > 0
            ),
            num_threads=num_threads,
            cost=2.0 * batch * num_heads * n_q * n_k * (d + d_v),
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
    """See `yoso_core.reference.expectation_attention_backward`. Working memory: unit copies of query and key."""
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

    With ``grad="lower_bound"`` two weighted cumulations and a plain one, in time linear in ``n``; with ``grad="exact"`` over all pairs.
    """
    if grad == "exact":
        codes = (query_hash_code, key_hash_code)
        return _by_pairs(grad_out, query, key, value, codes, hash_code_len, grad, query_mask, key_mask, num_threads)
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    (unit_q, length_q, _), (unit_k, length_k, _) = (unit_rows(rows(x, dtype), num_threads) for x in (query, key))
    g, v = rows(grad_out, dtype), rows(value, dtype)
    codes_q, codes_k, capacity = heads(query_hash_code), heads(key_hash_code), 1 << hash_code_len
    forth = {"query_mask": kept(query_mask, query.shape[:-1]), "key_mask": kept(key_mask, key.shape[:-1])}
    back = {"query_mask": forth["key_mask"], "key_mask": forth["query_mask"]}
    pull_q = lsh_weighted_cumulation(codes_q, g, codes_k, v, unit_k, capacity, **forth, num_threads=num_threads)
    pull_k = lsh_weighted_cumulation(codes_k, v, codes_q, g, unit_q, capacity, **back, num_threads=num_threads)
    grad_v = lsh_cumulation(codes_k, codes_q, g, capacity, **back, num_threads=num_threads)
    return (
        _through_normalisation(pull_q, hash_code_len / 2, unit_q, length_q, num_threads)
        .reshape(query.shape)
        .astype(query.dtype, copy=False),
        _through_normalisation(pull_k, hash_code_len / 2, unit_k, length_k, num_threads).reshape(key.shape).astype(key.dtype, copy=False),
        grad_v.reshape(value.shape).astype(value.dtype, copy=False),
    )


@cache
def _normalisation_kernel(dtype: Any) -> Any:
    """The chain through the normalisation, in place: ``factor (f - (f . u) u) / |x|``. A task is one row.

    Rows of length zero get zeros; rows that are zero stay so, even where ``u`` is NaN.
    """

    @kernel(types.void(types.intp, types.intp, output_array(dtype, 4), input_array(dtype, 4), input_array(dtype, 3), types.float64))
    def chain(first, last, pull, unit, lengths, factor):
        n, d = pull.shape[2], pull.shape[3]
        for task in range(first, last):
            head, i = divmod(task, n)
            b, h = divmod(head, pull.shape[1])
            along, any_pull = pull.dtype.type(0), False
            for c in range(d):
                along += pull[b, h, i, c] * unit[b, h, i, c]
                any_pull = any_pull or pull[b, h, i, c] != 0
            scale = pull.dtype.type(factor) / lengths[b, h, i] if lengths[b, h, i] != 0 else pull.dtype.type(0)
            for c in range(d):
                across = (pull[b, h, i, c] - along * unit[b, h, i, c]) * scale
                pull[b, h, i, c] = across if any_pull and lengths[b, h, i] != 0 else 0

    return chain


def _through_normalisation(pull: Array, factor: float, unit: Array, lengths: Array, num_threads: int | None) -> Array:
    run = _normalisation_kernel(from_dtype(pull.dtype))
    share(lengths.size, lambda first, last: run(first, last, pull, unit, lengths, factor), num_threads=num_threads, cost=5.0 * pull.size)
    return pull
