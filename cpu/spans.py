"""Attention over all pairs, cut so that it runs from the cache: 64 queries by 64 keys at a time.

A *span* is what a task keeps of its queries, in the second level of cache: their rows, transposed,
64 to a tile, and the sums that it makes for them. Tiles of 64 keys pass by, and each meets all
queries of the span, so it is read from memory once for them all.
"""

from typing import NamedTuple

from yoso_core.cpu.compiling import allocating_helper, helper
from yoso_core.cpu.products import product
from yoso_core.cpu.rows import transpose_rows
from yoso_core.cpu.scratch import padded_width
from yoso_core.cpu.threads import BATCH_COST

TILE = 64
"""Queries, and keys, to a tile. Keys are added up a tile at a time before they join the total: sums
of sums round less.
"""

SPAN_BYTES = 512 << 10
"""What a span takes, at most."""


class PairTile(NamedTuple):
    """Up to 64 queries of a span by up to 64 keys. In flat arrays, of key ``u`` and query ``t``
    what stands at ``u * TILE + t``.
    """

    query0: int
    """The first query, counted in the span."""
    queries: int
    keys: int


def tiles_to_span(tiles: int, bytes_of_a_query: int) -> int:
    """How many of so many tiles of queries make a span."""
    return max(1, min(tiles, SPAN_BYTES // (bytes_of_a_query * TILE)))


def pieces_of_span(tiles: int, cost_of_a_query: float) -> int:
    """Into how many pieces a span of so many tiles is cut, so that a piece, which has one tile at
    least, is a batch at most.
    """
    return min(tiles, max(1, round(tiles * TILE * cost_of_a_query / BATCH_COST)))


@helper
def piece_of_span(queries, begin, stop, piece, tiles, pieces):
    """A piece of a span that begins with query ``begin`` and has ``tiles`` tiles: its rows
    ``begin ... stop - 1``, masked ones among them, and which of the kept ``queries`` it has.

    The tiles are those of the whole span, so the pieces change no bit.
    """
    first = min(tiles * piece // pieces * TILE, len(queries))
    last = min(tiles * (piece + 1) // pieces * TILE, len(queries))
    if piece > 0:
        begin = queries[first] if first < len(queries) else stop
    if last < len(queries):
        stop = queries[last]
    return begin, stop, first, last


@allocating_helper
def list_kept(chosen, keep, head, first, last):
    """The kept rows among ``first ... last - 1`` of a head, as a part of ``chosen``."""
    count = 0
    for i in range(first, last):
        if keep[(*head, i)]:
            chosen[count] = i
            count += 1
    return chosen[:count]


@helper
def row_offsets(offsets, chosen, row0, width):
    """Where the chosen rows of a head begin among the packed rows of all heads; the first of the
    head is row ``row0`` there.
    """
    for u in range(len(chosen)):
        offsets[u] = (row0 + chosen[u]) * width


@helper
def transpose_span(tiles, offsets, packed, queries, row0, width):
    """The queries of a span, transposed, `TILE` to a tile: the tile of query ``s`` and on begins at
    ``tiles[s * width]``. Where their rows begin goes to ``offsets``, as in `row_offsets`.
    """
    row_offsets(offsets, queries, row0, width)
    for s in range(0, len(queries), TILE):
        transpose_rows(
            tile=tiles[s * width :],
            step=TILE,
            packed=packed,
            offsets=offsets[s:],
            shift=0,
            count=min(TILE, len(queries) - s),
            width=width,
        )


@helper
def pair_products(products, pairs, query_tiles, rows, offsets, dim):
    """``products[u, t] = row_u . query_t`` for a tile of pairs: the rows of the keys are packed,
    those of the queries transposed.
    """
    product(
        target=products,
        target_offsets=TILE,
        weights=rows,
        weight_offsets=offsets,
        term_offsets=1,
        vectors=query_tiles,
        vector_offsets=TILE,
        vector_at=pairs.query0 * padded_width(dim),
        rows=pairs.keys,
        terms=dim,
        width=padded_width(pairs.queries),
        fresh=True,
    )


@helper
def add_over_keys(sums, weights, pairs, rows, offsets, width):
    """``sum_t += sum_u weights[u, t] row_u`` for every query ``t`` of a tile of pairs. ``sums`` are
    those of the span.
    """
    product(
        target=sums,
        target_offsets=width,
        target_at=pairs.query0 * width,
        weights=weights,
        weight_offsets=1,
        term_offsets=TILE,
        vectors=rows,
        vector_offsets=offsets,
        rows=pairs.queries,
        terms=pairs.keys,
        width=width,
    )


@helper
def add_over_queries(sums, sum_offsets, sum_at, weights, pairs, rows, offsets, width):
    """``sum_u += sum_t weights[u, t] row_t`` for every key ``u`` of a tile of pairs. ``offsets``
    are those of all queries of the span.
    """
    product(
        target=sums,
        target_offsets=sum_offsets,
        target_at=sum_at,
        weights=weights,
        weight_offsets=TILE,
        term_offsets=1,
        vectors=rows,
        vector_offsets=offsets[pairs.query0 :],
        rows=pairs.keys,
        terms=pairs.queries,
        width=width,
    )
