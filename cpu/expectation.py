"""Expected attention, blocked: 64 queries by 64 keys at a time, no matrix of weights anywhere.

`yoso_core.cpu.spans` explains how the pairs are cut up, `yoso_core.cpu.weights` how a cosine
becomes a weight.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import kernel
from yoso_core.cpu.finishing import finish_row
from yoso_core.cpu.precision import common_dtype, rounded, stored_rows
from yoso_core.cpu.rows import packed_rows, store_row, unit_rows
from yoso_core.cpu.scratch import aligned, clear, padded_width
from yoso_core.cpu.spans import (
    TILE,
    PairTile,
    add_over_keys,
    list_kept,
    pair_products,
    piece_of_span,
    pieces_of_span,
    row_offsets,
    tiles_to_span,
    transpose_span,
)
from yoso_core.cpu.threads import share
from yoso_core.cpu.views import Array, input_array, int_tuple, kept, output_array
from yoso_core.cpu.weights import POLYNOMIALS, SCRATCH, STEEP, weigh

ENOUGH_TASKS = 64
"""Spans are made shorter rather than have fewer tasks than this."""


class Sizes(NamedTuple):
    """What the kernel cannot see in the shapes of its arrays."""

    dim: int
    hash_code_len: int
    span: int
    pieces: int
    """Of the tiles of a span."""


@cache
def _expectation_kernel(dtype: Any, polynomials: tuple[tuple[float, ...], tuple[float, ...]]) -> Any:
    """A task makes the output rows of a piece of a span of queries: all kept keys pass by, 64 at a
    time.

    For ``64 * 64`` pairs it does ``64 * 64 (d + d_v)`` multiply-adds in registers; a key and its
    value are read from memory once for all queries of the span.
    """

    @kernel(
        sizes=int_tuple(Sizes),
        unit_query=input_array(dtype, 1),
        unit_key=input_array(dtype, 1),
        value=input_array(dtype, 1),
        keep_query=input_array(types.uint8, 3),
        keep_key=input_array(types.uint8, 3),
        nonfinite=input_array(types.uint8, 3),
        out=output_array(dtype, 4),
        lengths=output_array(dtype, 3),
        normalize=types.boolean,
    )
    def attend(first, last, sizes, unit_query, unit_key, value, keep_query, keep_key, nonfinite, out, lengths, normalize):
        n_q, n_k, span, dim = keep_query.shape[2], keep_key.shape[2], sizes.span, sizes.dim
        width, width_v = padded_width(dim), padded_width(out.shape[3])
        query_tiles, sums = aligned(span * width, out.dtype), aligned(span * width_v, out.dtype)
        weights, scratch = aligned(TILE * TILE, out.dtype), aligned(SCRATCH, out.dtype)
        all_queries, all_keys, query_offsets = np.empty(span, np.intp), np.empty(n_k, np.intp), np.empty(span, np.intp)
        key_offsets, value_offsets = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
        listed, keys = -1, all_keys[:0]
        spans_per_head = (n_q + span - 1) // span
        for task in range(first, last):
            span_index, piece = divmod(task, sizes.pieces)
            head_index, turn = divmod(span_index, spans_per_head)
            head = divmod(head_index, keep_query.shape[1])
            if head_index != listed:
                listed, keys = head_index, list_kept(all_keys, keep_key, head, 0, n_k)
            begin, stop = turn * span, min((turn + 1) * span, n_q)
            queries = list_kept(all_queries, keep_query, head, begin, stop)
            begin, stop, first_kept, last_kept = piece_of_span(queries, begin, stop, piece, span // TILE, sizes.pieces)
            queries = queries[first_kept:last_kept]
            num_queries = len(queries)
            transpose_span(query_tiles, query_offsets, unit_query, queries, head_index * n_q, width)
            clear(sums, 0, num_queries * width_v)
            for block in range(0, len(keys) if num_queries > 0 else 0, TILE):
                count = min(TILE, len(keys) - block)
                row_offsets(key_offsets, keys[block : block + count], head_index * n_k, width)
                row_offsets(value_offsets, keys[block : block + count], head_index * n_k, width_v)
                for s in range(0, num_queries, TILE):
                    pairs = PairTile(query0=s, queries=min(TILE, num_queries - s), keys=count)
                    pair_products(weights, pairs, query_tiles, unit_key, key_offsets, dim)
                    weigh(
                        weights=weights,
                        grad_cosines=None,
                        pairs=pairs,
                        query_tiles=query_tiles,
                        unit_key=unit_key,
                        key_offsets=key_offsets,
                        dim=dim,
                        polynomials=polynomials,
                        steep=STEEP,
                        hash_code_len=sizes.hash_code_len,
                        scratch=scratch,
                    )
                    add_over_keys(sums, weights, pairs, value, value_offsets, width_v)
            for t in range(num_queries):
                store_row(out, head, queries[t], sums, t * width_v)
            for i in range(begin, stop):
                lengths[(*head, i)] = finish_row(
                    out=out, keep=keep_query, nonfinite=nonfinite, head=head, i=i, scale=out.dtype.type(1), normalize=normalize
                )

    return attend


def expectation_attention(
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.expectation_attention`.

    Working memory: unit copies of query and key, and one of the value unless its rows are packed as
    they are.
    """
    return expect(query, key, value, hash_code_len, query_mask=query_mask, key_mask=key_mask, normalize=False, num_threads=num_threads)[0]


def expect(
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    query_mask: Array | None,
    key_mask: Array | None,
    normalize: bool,
    num_threads: int | None,
) -> tuple[Array, Array]:
    """`expectation_attention`; with ``normalize`` rows are scaled to unit length, for attention.
    Returns the rows, and the length of each before that.
    """
    dtype = common_dtype(query, value)
    q, k, v = (stored_rows(x, dtype) for x in (query, key, value))
    unit_query, _, nonfinite_query = unit_rows(q, dtype, num_threads)
    unit_key, _, _ = unit_rows(k, dtype, num_threads)
    batch, num_heads, n_q, d = q.shape
    n_k, d_v = v.shape[2:]
    nonfinite = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    nonfinite[:, :, 1:] = nonfinite_query
    out, lengths = np.empty((batch, num_heads, n_q, d_v), dtype), np.empty((batch, num_heads, n_q), dtype)
    numba_type = from_dtype(out.dtype)
    tiles = -(-n_q // TILE)
    spread = batch * num_heads * tiles // ENOUGH_TASKS
    span = TILE * tiles_to_span(max(1, min(tiles, spread)), (padded_width(d) + padded_width(d_v)) * out.itemsize)
    pieces = pieces_of_span(span // TILE, float(n_k) * (d + d_v))
    attend = partial(
        _expectation_kernel(numba_type, POLYNOMIALS[numba_type]),
        sizes=Sizes(dim=d, hash_code_len=hash_code_len, span=span, pieces=pieces),
        unit_query=unit_query,
        unit_key=unit_key,
        value=packed_rows(v, dtype, num_threads),
        keep_query=kept(query_mask, query.shape[:-1]),
        keep_key=kept(key_mask, key.shape[:-1]),
        nonfinite=nonfinite,
        out=out,
        lengths=lengths,
        normalize=normalize,
    )
    cost = float(batch * num_heads) * n_q * n_k * (d + d_v)
    share(batch * num_heads * -(-n_q // span) * pieces, attend, num_threads=num_threads, cost=cost)
    leading = query.shape[:-1]
    return rounded(out.reshape(*leading, d_v), value.dtype, num_threads), lengths.reshape(*leading, 1)
