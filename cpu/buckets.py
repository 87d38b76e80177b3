"""Weighted cumulation, bucket by bucket.

Inside a bucket the weighted sum is linear attention:
``sum_j (a_i . b_j) v_j = (sum_j v_j b_j^T) a_i``. With ``p`` queries and ``r`` keys in it, going
over pairs costs about ``2 p r (d_w + d_v)`` operations and the outer products
``2 (p + r) d_w d_v``. Whichever is less is done, so the cost never grows faster than ``n``, however
skewed the buckets.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.finishing import finish
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, load_transposed, multiply_add, store
from yoso_core.cpu.precision import rounded, rows, working_dtype
from yoso_core.cpu.relabeling import dense_tables_fit, relabeled
from yoso_core.cpu.scratch import aligned, clear, padded_width
from yoso_core.cpu.sorting import HASHES_AT_ONCE, read_labels, sort_by_label
from yoso_core.cpu.threads import BATCH_COST, in_steps, share
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array

ENOUGH_TASKS = 16
"""Where there are fewer heads, the hashes of a head are dealt to several tasks, each with sums of
its own.
"""


RANGE_BATCHES = 4
"""A hash that costs more batches than this is done a range of buckets at a time, though rows are
sorted anew for each.
"""


@helper
def load_bucket(tile, raw, values, key_weight, value, head, keys, start):
    """Up to 16 keys of a bucket, ``keys[start : start + 16]``: their weights as a tile, coordinate
    by coordinate, their values row by row.

    Missing vectors have weights and values of zero.
    """
    d_w, d_v = key_weight.shape[3], value.shape[3]
    wide_w, wide_v = d_w - d_w % LANES, d_v - d_v % LANES
    for t in range(LANES):
        if start + t < len(keys):
            j = keys[start + t]
            for c in range(0, wide_w, LANES):
                store(raw, (t, c), load(key_weight, (*head, j, c)))
            for c in range(wide_w, d_w):
                raw[t, c] = key_weight[(*head, j, c)]
            for c in range(0, wide_v, LANES):
                store(values, t * d_v + c, load(value, (*head, j, c)))
            for c in range(wide_v, d_v):
                values[t * d_v + c] = value[(*head, j, c)]
        else:
            raw[t, :] = 0
            clear(values, t * d_v, d_v)
    for c in range(0, d_w, LANES):
        load_transposed(raw, (0, c), tile, c * LANES)


@helper
def four_of(first, count):
    """Four numbers from ``first`` on; past the end, ``count``, the last one is repeated."""
    last = count - 1
    return first, min(first + 1, last), min(first + 2, last), min(first + 3, last)


@helper
def four_offsets(start, four, step):
    """Where four rows begin in a flat array."""
    i0, i1, i2, i3 = four
    return start + i0 * step, start + i1 * step, start + i2 * step, start + i3 * step


@helper
def add_combinations(target, target_offsets, weights, weight_offsets, terms, vectors, width):
    """Four rows at once: ``target[target_offsets[u] + c] += sum_t weights[weight_offsets[u] + t]
    vectors[t * width + c]`` for ``t < terms`` and ``c < width``.

    A row that is repeated is counted once, since all are read before any is written.
    """
    t0, t1, t2, t3 = target_offsets
    w0, w1, w2, w3 = weight_offsets
    wide, full = width - width % (2 * LANES), width - width % LANES
    for c in range(0, wide, 2 * LANES):
        a0, b0 = load(target, t0 + c), load(target, t0 + c + LANES)
        a1, b1 = load(target, t1 + c), load(target, t1 + c + LANES)
        a2, b2 = load(target, t2 + c), load(target, t2 + c + LANES)
        a3, b3 = load(target, t3 + c), load(target, t3 + c + LANES)
        for t in range(terms):
            v0, v1 = load(vectors, t * width + c), load(vectors, t * width + c + LANES)
            x0, x1 = fill_from(weights, w0 + t), fill_from(weights, w1 + t)
            x2, x3 = fill_from(weights, w2 + t), fill_from(weights, w3 + t)
            a0, b0 = multiply_add(x0, v0, a0), multiply_add(x0, v1, b0)
            a1, b1 = multiply_add(x1, v0, a1), multiply_add(x1, v1, b1)
            a2, b2 = multiply_add(x2, v0, a2), multiply_add(x2, v1, b2)
            a3, b3 = multiply_add(x3, v0, a3), multiply_add(x3, v1, b3)
        store(target, t0 + c, a0)
        store(target, t0 + c + LANES, b0)
        store(target, t1 + c, a1)
        store(target, t1 + c + LANES, b1)
        store(target, t2 + c, a2)
        store(target, t2 + c + LANES, b2)
        store(target, t3 + c, a3)
        store(target, t3 + c + LANES, b3)
    for c in range(wide, full, LANES):
        a0, a1, a2, a3 = load(target, t0 + c), load(target, t1 + c), load(target, t2 + c), load(target, t3 + c)
        for t in range(terms):
            v0 = load(vectors, t * width + c)
            a0, a1 = multiply_add(fill_from(weights, w0 + t), v0, a0), multiply_add(fill_from(weights, w1 + t), v0, a1)
            a2, a3 = multiply_add(fill_from(weights, w2 + t), v0, a2), multiply_add(fill_from(weights, w3 + t), v0, a3)
        store(target, t0 + c, a0)
        store(target, t1 + c, a1)
        store(target, t2 + c, a2)
        store(target, t3 + c, a3)
    for c in range(full, width):
        y0, y1, y2, y3 = target[t0 + c], target[t1 + c], target[t2 + c], target[t3 + c]
        for t in range(terms):
            v = vectors[t * width + c]
            y0 += weights[w0 + t] * v
            y1 += weights[w1 + t] * v
            y2 += weights[w2 + t] * v
            y3 += weights[w3 + t] * v
        target[t0 + c], target[t1 + c], target[t2 + c], target[t3 + c] = y0, y1, y2, y3


@helper
def multiply_queries(products, query_weight, tile, head, four):
    """The products of four queries with the 16 keys of a tile, to ``products[u * 16 + t]``: sums
    over even and over odd coordinates.
    """
    i0, i1, i2, i3 = four
    d_w = query_weight.shape[3]
    zero = fill(products.dtype.type(0))
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for c in range(0, d_w - 1, 2):
        k0, k1 = load(tile, c * LANES), load(tile, (c + 1) * LANES)
        a0 = multiply_add(fill_from(query_weight, (*head, i0, c)), k0, a0)
        a1 = multiply_add(fill_from(query_weight, (*head, i1, c)), k0, a1)
        a2 = multiply_add(fill_from(query_weight, (*head, i2, c)), k0, a2)
        a3 = multiply_add(fill_from(query_weight, (*head, i3, c)), k0, a3)
        b0 = multiply_add(fill_from(query_weight, (*head, i0, c + 1)), k1, b0)
        b1 = multiply_add(fill_from(query_weight, (*head, i1, c + 1)), k1, b1)
        b2 = multiply_add(fill_from(query_weight, (*head, i2, c + 1)), k1, b2)
        b3 = multiply_add(fill_from(query_weight, (*head, i3, c + 1)), k1, b3)
    if d_w % 2:
        k0 = load(tile, (d_w - 1) * LANES)
        a0 = multiply_add(fill_from(query_weight, (*head, i0, d_w - 1)), k0, a0)
        a1 = multiply_add(fill_from(query_weight, (*head, i1, d_w - 1)), k0, a1)
        a2 = multiply_add(fill_from(query_weight, (*head, i2, d_w - 1)), k0, a2)
        a3 = multiply_add(fill_from(query_weight, (*head, i3, d_w - 1)), k0, a3)
    store(products, 0, a0 + b0)
    store(products, LANES, a1 + b1)
    store(products, 2 * LANES, a2 + b2)
    store(products, 3 * LANES, a3 + b3)


@helper
def pick(rows, four):
    """Four entries of a list."""
    i0, i1, i2, i3 = four
    return rows[i0], rows[i1], rows[i2], rows[i3]


@helper
def add_by_outer_product(out, out0, query_weight, key_weight, value, head, queries, keys, tile, raw, values, outer, four_weights):
    """``outer[r * d_v + c] = sum_j key_weight_jr value_jc``, then for every query its rows, each
    times a coordinate of the weight.
    """
    d_w, d_v = query_weight.shape[3], value.shape[3]
    clear(outer, 0, d_w * d_v)
    for start in range(0, len(keys), LANES):
        load_bucket(tile=tile, raw=raw, values=values, key_weight=key_weight, value=value, head=head, keys=keys, start=start)
        for first in range(0, d_w, 4):
            four = four_of(first, d_w)
            add_combinations(
                target=outer,
                target_offsets=four_offsets(0, four, d_v),
                weights=tile,
                weight_offsets=four_offsets(0, four, LANES),
                terms=min(LANES, len(keys) - start),
                vectors=values,
                width=d_v,
            )
    for first in range(0, len(queries), 4):
        four = pick(queries, four_of(first, len(queries)))
        i0, i1, i2, i3 = four
        for r in range(d_w):
            four_weights[r], four_weights[d_w + r] = query_weight[(*head, i0, r)], query_weight[(*head, i1, r)]
            four_weights[2 * d_w + r], four_weights[3 * d_w + r] = query_weight[(*head, i2, r)], query_weight[(*head, i3, r)]
        add_combinations(
            target=out,
            target_offsets=four_offsets(out0, four, d_v),
            weights=four_weights,
            weight_offsets=(0, d_w, 2 * d_w, 3 * d_w),
            terms=d_w,
            vectors=outer,
            width=d_v,
        )


@cache
def _buckets_kernel(dtype: Any) -> Any:
    """A task is (head, group of hashes), a step of it one hash, or one of ``ranges`` of its
    buckets: it sorts queries and keys by bucket, and adds to the output rows of its group.

    By pairs, 16 keys at a time: their products with four queries at once, then their values on top
    of the queries' rows.
    """

    @kernel(
        query_code=input_array(types.int32, 4),
        query_weight=input_array(dtype, 4),
        key_code=input_array(types.int32, 4),
        key_weight=input_array(dtype, 4),
        value=input_array(dtype, 4),
        keep_query=input_array(types.uint8, 3),
        keep_key=input_array(types.uint8, 3),
        out=output_array(dtype, 1),
        groups=types.intp,
        capacity=types.intp,
        ranges=types.intp,
        step0=types.intp,
        step1=types.intp,
    )
    def accumulate(
        first,
        last,
        query_code,
        query_weight,
        key_code,
        key_weight,
        value,
        keep_query,
        keep_key,
        out,
        groups,
        capacity,
        ranges,
        step0,
        step1,
    ):
        n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], query_code.shape[3]
        d_w, d_v = query_weight.shape[3], value.shape[3]
        query_labels, key_labels = np.empty((HASHES_AT_ONCE, n_q), np.int32), np.empty((HASHES_AT_ONCE, n_k), np.int32)
        query_begins, key_begins = np.empty(capacity + 2, np.intp), np.empty(capacity + 2, np.intp)
        query_order, key_order = np.empty(n_q, np.intp), np.empty(n_k, np.intp)
        padded_w = padded_width(d_w)
        tile, raw = aligned(padded_w * LANES, value.dtype), aligned(LANES * padded_w, value.dtype).reshape(LANES, padded_w)
        values, products = aligned(LANES * d_v, value.dtype), aligned(4 * LANES, value.dtype)
        outer, four_weights = aligned(d_w * d_v, value.dtype), aligned(4 * d_w, value.dtype)
        for task in range(first, last):
            head_index, group = divmod(task, groups)
            head = divmod(head_index, query_code.shape[1])
            out0 = task * n_q * d_v
            if step0 == 0:
                clear(out, out0, n_q * d_v)
            begin = num_hash * group // groups
            end = min(begin + (step1 + ranges - 1) // ranges, num_hash * (group + 1) // groups)
            first_bucket, last_bucket = capacity * (step0 % ranges) // ranges, capacity * ((step1 - 1) % ranges + 1) // ranges
            for hash0 in range(begin + step0 // ranges, end, HASHES_AT_ONCE):
                count = min(HASHES_AT_ONCE, end - hash0)
                read_labels(query_labels[:count], query_code, keep_query, head, hash0, capacity)
                read_labels(key_labels[:count], key_code, keep_key, head, hash0, capacity)
                for hash in range(count):
                    sort_by_label(query_labels[hash], query_begins, 0, query_order, 0, capacity)
                    sort_by_label(key_labels[hash], key_begins, 0, key_order, 0, capacity)
                    for bucket in range(first_bucket, last_bucket):
                        queries = query_order[query_begins[bucket] : query_begins[bucket + 1]]
                        keys = key_order[key_begins[bucket] : key_begins[bucket + 1]]
                        if len(queries) == 0 or len(keys) == 0:
                            continue
                        by_pairs = len(queries) * len(keys) * (d_w + d_v)
                        by_outer_product = (len(queries) + len(keys)) * d_w * d_v
                        if by_pairs <= by_outer_product:
                            for start in range(0, len(keys), LANES):
                                load_bucket(
                                    tile=tile,
                                    raw=raw,
                                    values=values,
                                    key_weight=key_weight,
                                    value=value,
                                    head=head,
                                    keys=keys,
                                    start=start,
                                )
                                for i in range(0, len(queries), 4):
                                    four = pick(queries, four_of(i, len(queries)))
                                    multiply_queries(products, query_weight, tile, head, four)
                                    add_combinations(
                                        target=out,
                                        target_offsets=four_offsets(out0, four, d_v),
                                        weights=products,
                                        weight_offsets=(0, LANES, 2 * LANES, 3 * LANES),
                                        terms=min(LANES, len(keys) - start),
                                        vectors=values,
                                        width=d_v,
                                    )
                        else:
                            add_by_outer_product(
                                out=out,
                                out0=out0,
                                query_weight=query_weight,
                                key_weight=key_weight,
                                value=value,
                                head=head,
                                queries=queries,
                                keys=keys,
                                tile=tile,
                                raw=raw,
                                values=values,
                                outer=outer,
                                four_weights=four_weights,
                            )

    return accumulate


def lsh_weighted_cumulation(
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.lsh_weighted_cumulation_pairs`.

    Working memory: an order of queries and keys for each thread, and their labels for 16 hashes;
    labels the size of the codes where ``hashtable_capacity > 4 n_k``; and for fewer than 16 heads,
    up to 16 copies of the output.
    """
    dtype = working_dtype(value)
    query_code, key_code = heads(query_hash_code), heads(key_hash_code)
    qw, kw, v = (rows(x, dtype, num_threads) for x in (query_weight, key_weight, value))
    keep_query, keep_key = kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[2:]
    if not dense_tables_fit(hashtable_capacity, n_k):
        query_code, key_code = relabeled(query_code, key_code, keep_query, keep_key, hashtable_capacity, num_threads)
        hashtable_capacity = n_k + 1
    groups = max(1, min(num_hash, ENOUGH_TASKS // max(batch * num_heads, 1)))
    partial_sums = np.empty((batch, num_heads, groups, n_q, d_v), dtype)
    d_w, rows_in_all = qw.shape[-1], n_q + n_k
    in_buckets = min(n_q * n_k / hashtable_capacity * (d_w + d_v), float(rows_in_all) * d_w * d_v)
    cost_of_a_hash = max(in_buckets, float(rows_in_all) * (d_w + d_v))
    ranges = 1 + int(cost_of_a_hash / (RANGE_BATCHES * BATCH_COST))
    accumulate = partial(
        _buckets_kernel(from_dtype(np.dtype(dtype))),
        query_code=query_code,
        query_weight=qw,
        key_code=key_code,
        key_weight=kw,
        value=v,
        keep_query=keep_query,
        keep_key=keep_key,
        out=partial_sums.reshape(-1),
        groups=groups,
        capacity=hashtable_capacity,
        ranges=ranges,
    )
    tasks, cost = batch * num_heads * groups, batch * num_heads * num_hash * cost_of_a_hash
    share(tasks, in_steps(accumulate, -(-num_hash // groups) * ranges, cost / max(tasks, 1)), num_threads=num_threads, cost=cost)
    out = partial_sums[:, :, 0] if groups == 1 else partial_sums.sum(axis=2)
    nonfinite = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    nonfinite[:, :, 1:] = ~np.isfinite(qw).all(axis=-1)
    finish(out, keep_query, nonfinite, 1 / num_hash, num_threads)
    return rounded(out.reshape(*query_hash_code.shape[:-1], d_v), value.dtype, num_threads)
