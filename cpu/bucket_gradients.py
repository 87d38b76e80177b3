"""What meets in the buckets of one head, for the gradients with the lower bound: see
`yoso_core.cpu.sampled_gradients`.

``triples`` is a flat array. A *triple* is a packed row of ``q``, one of ``g`` and one of the sum
for ``q``; or ``k``, ``v`` and the sum for ``k``. Those of the keys follow those of the queries.
"""

from typing import NamedTuple

import numpy as np

from yoso_core.cpu.compiling import helper, subroutine
from yoso_core.cpu.lanes import LANES, fill, load, multiply_add, prefetch, store, total
from yoso_core.cpu.products import WIDE_REGISTERS, dot_products, product
from yoso_core.cpu.rows import transpose_rows
from yoso_core.cpu.scratch import aligned, padded_width

TILE = 96
"""Queries, and keys, of a bucket that are paired at a time, at most; larger buckets are cut into
equal tiles.
"""

FEW_PAIRS = 24
"""Pairs that are done one by one: only more of them are worth a tile."""


class HeadSizes(NamedTuple):
    """Of one head and its scratch."""

    n_q: int
    n_k: int
    num_hash: int
    buckets: int
    value_dim: int
    width: int
    """Of a packed query or key."""
    width_v: int
    """Of a packed value."""
    triple: int
    """Numbers to a triple: ``2 width + width_v``."""


class Side(NamedTuple):
    """The queries, or the keys, of one bucket."""

    first: int
    """Where they are listed in ``order``."""
    size: int
    start: int
    """Where the triples of all queries, or keys, begin."""


@helper
def sides_of(begins, sizes, hash, bucket):
    """The queries and the keys of a bucket."""
    query_at, key_at = hash * (sizes.buckets + 2) + bucket, (sizes.num_hash + hash) * (sizes.buckets + 2) + bucket
    i, j = np.intp(begins[query_at]), np.intp(begins[key_at])
    queries = Side(first=hash * sizes.n_q + i, size=begins[query_at + 1] - i, start=0)
    keys = Side(first=sizes.num_hash * sizes.n_q + hash * sizes.n_k + j, size=begins[key_at + 1] - j, start=sizes.n_q * sizes.triple)
    return queries, keys


@helper
def triple_of(order, side, row, sizes):
    """Where the triple of a row of a side begins."""
    return side.start + np.intp(order[side.first + row]) * sizes.triple


@helper
def triple_offsets(offsets, order, side, first, count, sizes):
    """Where the triples of rows ``first ... first + count - 1`` of a side begin."""
    for t in range(count):
        offsets[t] = triple_of(order, side, first + t, sizes)


@helper
def prefetch_triples(triples, order, side, sizes):
    """Those of the first tile of a side, while something else is computed."""
    for t in range(min(side.size, TILE)):
        at = triple_of(order, side, t, sizes)
        for c in range(at, at + sizes.triple, LANES):
            prefetch(triples, c)


@helper
def add_pairs_one_by_one(triples, ours, theirs, p, r, sizes):
    """Each of the few pairs of a bucket by itself, straight from the rows to the sums. ``ours`` and
    ``theirs`` are offsets.
    """
    width, sums = sizes.width, sizes.width + sizes.width_v
    for t in range(p):
        for u in range(r):
            product = fill(triples.dtype.type(0))
            for c in range(width, sums, LANES):
                product = multiply_add(load(triples, ours[t] + c), load(triples, theirs[u] + c), product)
            grad_cosine = fill(total(product))
            for c in range(0, width, LANES):
                our_sum, their_sum = load(triples, ours[t] + sums + c), load(triples, theirs[u] + sums + c)
                store(triples, ours[t] + sums + c, multiply_add(grad_cosine, load(triples, theirs[u] + c), our_sum))
                store(triples, theirs[u] + sums + c, multiply_add(grad_cosine, load(triples, ours[t] + c), their_sum))


@helper
def add_tile_of_pairs(triples, ours, theirs, p, r, sizes, tile, grad_cosines):
    """Up to `TILE` rows of one side by as many of the other: a tile of ``g . v``, and what it adds
    to both sides. ``ours`` and ``theirs`` are offsets.
    """
    width, sums = sizes.width, sizes.width + sizes.width_v
    transpose_rows(tile=tile, step=TILE, packed=triples, offsets=ours, shift=width, count=p, width=sizes.width_v)
    if p <= LANES and WIDE_REGISTERS:
        dot_products(
            target=grad_cosines,
            target_offsets=TILE,
            weights=triples,
            weight_offsets=theirs,
            weight_at=width,
            vectors=tile,
            vector_offsets=TILE,
            rows=r,
            terms=sizes.value_dim,
        )
    else:
        product(
            target=grad_cosines,
            target_offsets=TILE,
            weights=triples,
            weight_offsets=theirs,
            weight_at=width,
            term_offsets=1,
            vectors=tile,
            vector_offsets=TILE,
            rows=r,
            terms=sizes.value_dim,
            width=padded_width(p),
            fresh=True,
        )
    product(
        target=triples,
        target_offsets=ours,
        target_at=sums,
        weights=grad_cosines,
        weight_offsets=1,
        term_offsets=TILE,
        vectors=triples,
        vector_offsets=theirs,
        rows=p,
        terms=r,
        width=width,
    )
    product(
        target=triples,
        target_offsets=theirs,
        target_at=sums,
        weights=grad_cosines,
        weight_offsets=TILE,
        term_offsets=1,
        vectors=triples,
        vector_offsets=ours,
        rows=r,
        terms=p,
        width=width,
    )


@helper
def tile_size(count):
    """Of equal tiles for so many rows, a multiple of four."""
    tiles = (count + TILE - 1) // TILE
    return ((count + tiles - 1) // tiles + 3) // 4 * 4


@helper
def make_outer_product(outer, triples, order, side, offsets, sizes):
    """``outer[r, :] = sum_j triple[j, width + r] triple[j, :width]``: what stands second in the
    triples of a side by what stands first.
    """
    for j in range(0, side.size, TILE):
        count = min(TILE, side.size - j)
        triple_offsets(offsets, order, side, j, count, sizes)
        product(
            target=outer,
            target_offsets=sizes.width,
            weights=triples,
            weight_offsets=1,
            weight_at=sizes.width,
            term_offsets=offsets,
            vectors=triples,
            vector_offsets=offsets,
            rows=sizes.value_dim,
            terms=count,
            width=sizes.width,
            fresh=j == 0,
        )


@helper
def apply_outer_product(outer, triples, order, side, offsets, sizes):
    """To the sum in every triple of a side is added what stands second in it, times ``outer``."""
    for i in range(0, side.size, TILE):
        count = min(TILE, side.size - i)
        triple_offsets(offsets, order, side, i, count, sizes)
        product(
            target=triples,
            target_offsets=offsets,
            target_at=sizes.width + sizes.width_v,
            weights=triples,
            weight_offsets=offsets,
            weight_at=sizes.width,
            term_offsets=1,
            vectors=outer,
            vector_offsets=sizes.width,
            rows=count,
            terms=sizes.value_dim,
            width=sizes.width,
        )


@subroutine
def walk_buckets(triples, begins, order, sizes, hash0, hash1, first, last):
    """Buckets ``first ... last - 1`` of hashes ``hash0 ... hash1 - 1`` of a head: what meets in
    them is added to the sums.
    """
    width, width_v = sizes.width, sizes.width_v
    our_offsets, their_offsets = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
    tile, grad_cosines = aligned(width_v * TILE, triples.dtype), aligned(TILE * TILE, triples.dtype)
    outer = aligned(sizes.value_dim * width, triples.dtype)
    for hash in range(hash0, hash1):
        for bucket in range(first, last):
            queries, keys = sides_of(begins, sizes, hash, bucket)
            if bucket + 1 < last:
                for side in sides_of(begins, sizes, hash, bucket + 1):
                    prefetch_triples(triples, order, side, sizes)
            p, r = queries.size, keys.size
            if p == 0 or r == 0:
                continue
            if p * r * sizes.triple <= 2 * (p + r) * width * width_v:
                # The side that fills its vectors of lanes better is transposed: ours.
                ours, theirs = queries, keys
                if padded_width(p) * r > padded_width(r) * p:
                    ours, theirs = keys, queries
                our_size, their_size = tile_size(ours.size), tile_size(theirs.size)
                for t in range(0, ours.size, our_size):
                    p = min(our_size, ours.size - t)
                    triple_offsets(our_offsets, order, ours, t, p, sizes)
                    for u in range(0, theirs.size, their_size):
                        r = min(their_size, theirs.size - u)
                        triple_offsets(their_offsets, order, theirs, u, r, sizes)
                        if p * r <= FEW_PAIRS:
                            add_pairs_one_by_one(triples, our_offsets, their_offsets, p, r, sizes)
                        else:
                            add_tile_of_pairs(
                                triples=triples,
                                ours=our_offsets,
                                theirs=their_offsets,
                                p=p,
                                r=r,
                                sizes=sizes,
                                tile=tile,
                                grad_cosines=grad_cosines,
                            )
            else:
                giver, taker = keys, queries
                for _ in range(2):  # from the keys to the queries, then back
                    make_outer_product(outer, triples, order, giver, their_offsets, sizes)
                    apply_outer_product(outer, triples, order, taker, our_offsets, sizes)
                    giver, taker = taker, giver
