"""Gradients of both kinds of attention from all pairs, without a matrix of weights anywhere.

For unit vectors, with ``C_ij`` the weight and ``w_ij`` its factor::

    grad_cosine_ij = C_ij w_ij (g_i . v_j)
    dq_i = sum_j grad_cosine_ij k_j
    dk_j = sum_i grad_cosine_ij q_i
    dv_j = sum_i C_ij g_i

All three come from one walk over tiles of 64 queries by 64 keys (`yoso_core.cpu.spans`). Two
products make a tile of cosines and one of ``g . v``, which become ``C`` and ``grad_cosine`` in
place (`yoso_core.cpu.weights`), and three products add them up.

Sampled attention with the lower bound needs no pairs: see `yoso_core.cpu.sampled_gradients`.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import lsh_cumulation
from yoso_core.cpu.lanes import LANES, load, store
from yoso_core.cpu.precision import common_dtype, rounded, stored_rows
from yoso_core.cpu.rows import l2_normalize_backward, packed_rows, store_row, unit_rows
from yoso_core.cpu.sampled_gradients import lsh_lower_bound_backward
from yoso_core.cpu.scratch import aligned, aligned_empty, clear, padded_width
from yoso_core.cpu.spans import (
    TILE,
    PairTile,
    add_over_keys,
    add_over_queries,
    list_kept,
    pair_products,
    piece_of_span,
    pieces_of_span,
    row_offsets,
    tiles_to_span,
    transpose_span,
)
from yoso_core.cpu.threads import in_steps, share
from yoso_core.cpu.views import Array, heads, input_array, int_tuple, kept, output_array
from yoso_core.cpu.weights import POLYNOMIALS, SCRATCH, STEEP_FOR_GRADIENTS, collision_rates, weigh, weigh_exactly
from yoso_core.reference.expectation import Grad
from yoso_core.reference.smoothing import plain_codes

Gradients = tuple[Array, Array, Array]

ENOUGH_TASKS = 16
"""Where there are fewer heads, the queries of a head are dealt to several tasks, each with sums of
its own for all keys.
"""


class Sizes(NamedTuple):
    """What the kernel cannot see in the shapes of its arrays."""

    parts: int
    """Pieces of the queries of a head, each with sums of its own."""
    span: int
    pieces: int
    """Of the tiles of a span."""
    value_dim: int
    hash_code_len: int


@helper
def load_codes(codes, stored, head, queries, span):
    """The codes of a span's queries: from ``stored (batch, heads, n, m)`` to
    ``codes[hash * span + t]``.
    """
    for t in range(len(queries)):
        for hash in range(stored.shape[3]):
            codes[hash * span + t] = stored[(*head, queries[t], hash)]


@helper
def clear_masked(grad, keep, head, first, last):
    """Zeros in the masked rows among ``first ... last - 1``."""
    for i in range(first, last):
        if not keep[(*head, i)]:
            grad[(*head, i)] = 0


@helper
def finish_queries(grad, head, queries, sums, unit, offsets, length):
    """The sums of a span become gradients with respect to the queries as they came."""
    width = padded_width(grad.shape[3])
    for t in range(len(queries)):
        l2_normalize_backward(
            grad=sums,
            at=t * width,
            unit=unit,
            unit_at=offsets[t],
            width=width,
            length=length[(*head, queries[t])],
            zeros_stay=False,
        )
        store_row(grad, head, queries[t], sums, t * width)


@helper
def weigh_pairs(
    weights, grad_cosines, pairs, query_tiles, unit_key, key_offsets, dim, polynomials, hash_code_len, exact, sampled, rates, scratch
):
    """Cosines become weights, and ``g . v`` the gradients with respect to the cosines, in place.

    Constants: ``exact`` and ``sampled``, as in the kernel.
    """
    if exact:
        weigh_exactly(
            weights=weights,
            grad_cosines=grad_cosines,
            pairs=pairs,
            query_tiles=query_tiles,
            unit_key=unit_key,
            key_offsets=key_offsets,
            dim=dim,
            polynomials=polynomials,
            hash_code_len=hash_code_len,
            sampled=sampled,
            rates=rates,
            scratch=scratch,
        )
    else:
        weigh(
            weights=weights,
            grad_cosines=grad_cosines,
            pairs=pairs,
            query_tiles=query_tiles,
            unit_key=unit_key,
            key_offsets=key_offsets,
            dim=dim,
            polynomials=polynomials,
            steep=STEEP_FOR_GRADIENTS,
            hash_code_len=hash_code_len,
            scratch=scratch,
        )


@cache
def _gradient_kernel(dtype: Any, polynomials: tuple[tuple[float, ...], tuple[float, ...]], exact: bool, sampled: bool) -> Any:
    """A task takes a part of the queries of a head, a piece of a span at a step, past all keys. It
    finishes the gradients of its queries. The gradients of the unit keys and of the values it adds
    up in rows of its own; a head has ``parts`` of them.

    For ``64 * 64`` pairs it does ``64 * 64 (3 d + 2 d_v)`` multiply-adds. Constants: ``exact`` says
    which ``w`` is meant, ``sampled`` that ``C`` is a collision rate. The list of types makes it
    long.
    """

    @kernel(
        sizes=int_tuple(Sizes),
        unit_query=input_array(dtype, 1),
        query_length=input_array(dtype, 3),
        grad_out=input_array(dtype, 1),
        query_code=input_array(types.int32, 4),
        keep_query=input_array(types.uint8, 3),
        unit_key=input_array(dtype, 1),
        value=input_array(dtype, 1),
        key_code=input_array(types.int32, 4),
        keep_key=input_array(types.uint8, 3),
        grad_query=output_array(dtype, 4),
        key_sums=output_array(dtype, 1),
        value_sums=output_array(dtype, 1),
        step0=types.intp,
        step1=types.intp,
    )
    def gradient(
        first,
        last,
        sizes,
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
        step0,
        step1,
    ):
        n_q, n_k, dim, span = keep_query.shape[2], keep_key.shape[2], grad_query.shape[3], sizes.span
        width, width_v = padded_width(dim), padded_width(sizes.value_dim)
        query_tiles, grad_tiles = aligned(span * width, unit_query.dtype), aligned(span * width_v, unit_query.dtype)
        query_sums, codes = aligned(span * width, unit_query.dtype), aligned(span * query_code.shape[3], np.int32)
        all_queries, query_offsets, grad_offsets = np.empty(span, np.intp), np.empty(span, np.intp), np.empty(span, np.intp)
        all_keys, key_offsets, value_offsets = np.empty(n_k, np.intp), np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        weights, grad_cosines = aligned(TILE * TILE, unit_query.dtype), aligned(TILE * TILE, unit_query.dtype)
        rates, scratch = aligned(TILE * TILE if sampled else 0, unit_query.dtype), aligned(SCRATCH, unit_query.dtype)
        tiles = (n_q + TILE - 1) // TILE
        for task in range(first, last):
            head_index, part = divmod(task, sizes.parts)
            head = divmod(head_index, keep_query.shape[1])
            keys = list_kept(all_keys, keep_key, head, 0, n_k)
            if step0 == 0:
                clear(key_sums, task * n_k * width, n_k * width)
                clear(value_sums, task * n_k * width_v, n_k * width_v)
            first_query, end = tiles * part // sizes.parts * TILE, min(tiles * (part + 1) // sizes.parts * TILE, n_q)
            for step in range(step0, step1):
                turn, piece = divmod(step, sizes.pieces)
                begin, stop = min(first_query + turn * span, end), min(first_query + (turn + 1) * span, end)
                queries = list_kept(all_queries, keep_query, head, begin, stop)
                begin, stop, first_kept, last_kept = piece_of_span(queries, begin, stop, piece, span // TILE, sizes.pieces)
                queries = queries[first_kept:last_kept]
                num_queries = len(queries)
                clear_masked(grad_query, keep_query, head, begin, stop)
                if num_queries == 0:
                    continue
                transpose_span(query_tiles, query_offsets, unit_query, queries, head_index * n_q, width)
                transpose_span(grad_tiles, grad_offsets, grad_out, queries, head_index * n_q, width_v)
                if sampled:
                    load_codes(codes, query_code, head, queries, span)
                clear(query_sums, 0, num_queries * width)
                for block in range(0, len(keys), TILE):
                    count = min(TILE, len(keys) - block)
                    row_offsets(key_offsets, keys[block : block + count], head_index * n_k, width)
                    row_offsets(value_offsets, keys[block : block + count], head_index * n_k, width_v)
                    for s in range(0, num_queries, TILE):
                        pairs = PairTile(query0=s, queries=min(TILE, num_queries - s), keys=count)
                        pair_products(weights, pairs, query_tiles, unit_key, key_offsets, dim)
                        pair_products(grad_cosines, pairs, grad_tiles, value, value_offsets, sizes.value_dim)
                        if sampled:
                            collision_rates(
                                rates=rates, pairs=pairs, codes=codes, span=span, key_code=key_code, head=head, keys=keys[block:]
                            )
                        weigh_pairs(
                            weights=weights,
                            grad_cosines=grad_cosines,
                            pairs=pairs,
                            query_tiles=query_tiles,
                            unit_key=unit_key,
                            key_offsets=key_offsets,
                            dim=dim,
                            polynomials=polynomials,
                            hash_code_len=sizes.hash_code_len,
                            exact=exact,
                            sampled=sampled,
                            rates=rates,
                            scratch=scratch,
                        )
                        add_over_keys(query_sums, grad_cosines, pairs, unit_key, key_offsets, width)
                        add_over_queries(
                            sums=key_sums,
                            sum_offsets=key_offsets,
                            sum_at=(task - head_index) * n_k * width,
                            weights=grad_cosines,
                            pairs=pairs,
                            rows=unit_query,
                            offsets=query_offsets,
                            width=width,
                        )
                        add_over_queries(
                            sums=value_sums,
                            sum_offsets=value_offsets,
                            sum_at=(task - head_index) * n_k * width_v,
                            weights=weights,
                            pairs=pairs,
                            rows=grad_out,
                            offsets=grad_offsets,
                            width=width_v,
                        )
                finish_queries(grad_query, head, queries, sums=query_sums, unit=unit_query, offsets=query_offsets, length=query_length)

    return gradient


@cache
def _finish_kernel(dtype: Any) -> Any:
    """Gradients of keys and values: the sums of the parts, added up in order. A task is a row of a
    head.
    """

    @kernel(
        parts=types.intp,
        key_sums=output_array(dtype, 1),
        value_sums=output_array(dtype, 1),
        unit_key=input_array(dtype, 1),
        key_length=input_array(dtype, 3),
        keep_key=input_array(types.uint8, 3),
        grad_key=output_array(dtype, 4),
        grad_value=output_array(dtype, 4),
    )
    def finish(first, last, parts, key_sums, value_sums, unit_key, key_length, keep_key, grad_key, grad_value):
        n = keep_key.shape[2]
        width, width_v = padded_width(grad_key.shape[3]), padded_width(grad_value.shape[3])
        for task in range(first, last):
            head_index, j = divmod(task, n)
            head = divmod(head_index, keep_key.shape[1])
            row = head_index * parts * n + j
            for part in range(1, parts):
                add_row(key_sums, row * width, (row + part * n) * width, width)
                add_row(value_sums, row * width_v, (row + part * n) * width_v, width_v)
            l2_normalize_backward(
                grad=key_sums,
                at=row * width,
                unit=unit_key,
                unit_at=task * width,
                width=width,
                length=key_length[(*head, j)] if keep_key[(*head, j)] else key_length.dtype.type(0),
                zeros_stay=False,
            )
            store_row(grad_key, head, j, key_sums, row * width)
            store_row(grad_value, head, j, value_sums, row * width_v)

    return finish


@helper
def add_row(flat, to, start, width):
    """``flat[to : to + width] += flat[start : start + width]``"""
    for c in range(0, width, LANES):
        store(flat, to + c, load(flat, to + c) + load(flat, start + c))


def _by_pairs(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    codes: tuple[Array, Array] | None,
    hash_code_len: int,
    *,
    grad: Grad,
    query_mask: Array | None,
    key_mask: Array | None,
    num_threads: int | None,
) -> Gradients:
    """All three gradients from all pairs, with the expectation as weights, or the collisions of
    ``codes``.
    """
    dtype = common_dtype(query, value)
    q, k, v, g = (stored_rows(x, dtype) for x in (query, key, value, grad_out))
    (unit_query, query_length, _), (unit_key, key_length, _) = (unit_rows(x, dtype, num_threads) for x in (q, k))
    keep_key = kept(key_mask, key.shape[:-1])
    query_code, key_code = (np.empty((1, 1, 1, 0), np.int32),) * 2 if codes is None else map(heads, codes)
    batch, num_heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    heads_in_all, tiles = batch * num_heads, -(-n_q // TILE)
    parts = max(1, min(tiles, -(-ENOUGH_TASKS // max(heads_in_all, 1))))
    grad_q, grad_k, grad_v = np.empty(q.shape, dtype), np.empty(k.shape, dtype), np.empty(v.shape, dtype)
    key_sums, value_sums = (aligned_empty(heads_in_all * parts * n_k * padded_width(dim), dtype) for dim in (d, d_v))
    numba_type = from_dtype(np.dtype(dtype))
    bytes_of_a_query = (3 * padded_width(d) + 2 * padded_width(d_v)) * grad_q.itemsize
    span = TILE * tiles_to_span(tiles, bytes_of_a_query)
    pieces = pieces_of_span(span // TILE, 2.0 * n_k * (d + d_v))
    gradient = partial(
        _gradient_kernel(numba_type, POLYNOMIALS[numba_type], grad == "exact", codes is not None),
        sizes=Sizes(parts=parts, span=span, pieces=pieces, value_dim=d_v, hash_code_len=hash_code_len),
        unit_query=unit_query,
        query_length=query_length,
        grad_out=packed_rows(g, dtype, num_threads),
        query_code=query_code,
        keep_query=kept(query_mask, query.shape[:-1]),
        unit_key=unit_key,
        value=packed_rows(v, dtype, num_threads),
        key_code=key_code,
        keep_key=keep_key,
        grad_query=grad_q,
        key_sums=key_sums,
        value_sums=value_sums,
    )
    cost, tasks = 2.0 * heads_in_all * n_q * n_k * (d + d_v), heads_in_all * parts
    steps = -(-(-(-tiles // parts) * TILE) // span) * pieces
    share(tasks, in_steps(gradient, steps, cost / max(tasks, 1)), num_threads=num_threads, cost=cost)
    finish = partial(
        _finish_kernel(numba_type),
        parts=parts,
        key_sums=key_sums,
        value_sums=value_sums,
        unit_key=unit_key,
        key_length=key_length,
        keep_key=keep_key,
        grad_key=grad_k,
        grad_value=grad_v,
    )
    in_sums = key_sums.nbytes + value_sums.nbytes
    share(heads_in_all * n_k, finish, num_threads=num_threads, cost=in_sums / grad_q.itemsize, moved=in_sums)
    grads = (grad_q, query), (grad_k, key), (grad_v, value)
    grad_q, grad_k, grad_v = (rounded(grad.reshape(x.shape), x.dtype, num_threads) for grad, x in grads)
    return grad_q, grad_k, grad_v


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
    options: dict[str, Any] = {"grad": grad, "query_mask": query_mask, "key_mask": key_mask, "num_threads": num_threads}
    return _by_pairs(grad_out, query, key, value, None, hash_code_len, **options)


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
    oversample: int = 0,
    backward_num_hash: int | None = None,
    num_threads: int | None = None,
) -> Gradients:
    """See `yoso_core.reference.lsh_attention_backward`.

    With ``grad="lower_bound"`` bucket by bucket, in time linear in ``n``; with ``grad="exact"``
    over all pairs.
    """
    arrays, codes = (grad_out, query, key, value), (query_hash_code, key_hash_code)
    options: dict[str, Any] = {"query_mask": query_mask, "key_mask": key_mask, "num_threads": num_threads}
    query_code, key_code = (plain_codes(x, hash_code_len, oversample, backward_num_hash) for x in codes)
    plain = query_code, key_code
    if grad == "exact":
        grad_query, grad_key, grad_value = _by_pairs(*arrays, plain, hash_code_len, grad=grad, **options)
        if plain[0] is codes[0]:
            return grad_query, grad_key, grad_value
    else:
        grad_query, grad_key = lsh_lower_bound_backward(*arrays, plain, hash_code_len, **options)
    grad_value = lsh_cumulation(
        key_hash_code,
        query_hash_code,
        grad_out,
        1 << (hash_code_len + oversample),
        query_mask=key_mask,
        key_mask=query_mask,
        oversample=oversample,
        num_threads=num_threads,
    )
    return grad_query, grad_key, grad_value
