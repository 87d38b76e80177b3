"""Weighted cumulation, bucket by bucket.

Inside a bucket the weighted sum is linear attention:
``sum_j (a_i . b_j) v_j = (sum_j v_j b_j^T) a_i``. With ``p`` queries and ``r`` keys in it, going
over pairs costs about ``2 p r (d_w + d_v)`` operations and the outer products
``2 (p + r) d_w d_v``. Whichever is less is done, so the cost never grows faster than ``n``, however
skewed the buckets.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import clear, dense_tables_fit, finish, relabeled
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, load_transposed, multiply_add, store
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array, rows, working_dtype

ENOUGH_TASKS = 16
"""Where there are fewer heads, the hashes of a head are dealt to several tasks, each with sums of
its own.
"""


@helper
def sort_by_bucket(codes, keep, b, h, c, begins, order):
    """Counting sort of the kept rows: bucket ``k`` holds ``order[begins[k] : begins[k + 1]]``, in
    ascending order.

    Unchecked codes that are out of range stand in no bucket.
    """
    capacity = len(begins) - 2
    begins[:] = 0
    for i in range(codes.shape[2]):
        if keep[b, h, i] and 0 <= codes[b, h, i, c] < capacity:
            begins[codes[b, h, i, c] + 2] += 1
    for k in range(2, len(begins)):
        begins[k] += begins[k - 1]
    for i in range(codes.shape[2]):
        if keep[b, h, i] and 0 <= codes[b, h, i, c] < capacity:
            bucket = codes[b, h, i, c] + 1
            order[begins[bucket]] = i
            begins[bucket] += 1


@helper
def load_bucket(tile, raw, values, key_weight, value, b, h, keys, start):
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
                store(raw, (t, c), load(key_weight, (b, h, j, c)))
            for c in range(wide_w, d_w):
                raw[t, c] = key_weight[b, h, j, c]
            for c in range(0, wide_v, LANES):
                store(values, t * d_v + c, load(value, (b, h, j, c)))
            for c in range(wide_v, d_v):
                values[t * d_v + c] = value[b, h, j, c]
        else:
            raw[t, :] = 0
            clear(values, t * d_v, d_v)
    for c in range(0, d_w, LANES):
        load_transposed(raw, (0, c), tile, c * LANES)


@helper
def add_combinations(target, at0, at1, at2, at3, weights, w0, w1, w2, w3, count, vectors, d_v):
    """Four rows at once: ``target[at_u + c] += sum_t weights[w_u + t] vectors[t * d_v +
    c]`` for ``t < count``.

    The same row may stand in two places: all are read before any is written, so it is counted once.
    """
    wide, full = d_v - d_v % (2 * LANES), d_v - d_v % LANES
    for c in range(0, wide, 2 * LANES):
        a0, b0 = load(target, at0 + c), load(target, at0 + c + LANES)
        a1, b1 = load(target, at1 + c), load(target, at1 + c + LANES)
        a2, b2 = load(target, at2 + c), load(target, at2 + c + LANES)
        a3, b3 = load(target, at3 + c), load(target, at3 + c + LANES)
        for t in range(count):
            v0, v1 = load(vectors, t * d_v + c), load(vectors, t * d_v + c + LANES)
            x0, x1 = fill_from(weights, w0 + t), fill_from(weights, w1 + t)
            x2, x3 = fill_from(weights, w2 + t), fill_from(weights, w3 + t)
            a0, b0 = multiply_add(x0, v0, a0), multiply_add(x0, v1, b0)
            a1, b1 = multiply_add(x1, v0, a1), multiply_add(x1, v1, b1)
            a2, b2 = multiply_add(x2, v0, a2), multiply_add(x2, v1, b2)
            a3, b3 = multiply_add(x3, v0, a3), multiply_add(x3, v1, b3)
        store(target, at0 + c, a0)
        store(target, at0 + c + LANES, b0)
        store(target, at1 + c, a1)
        store(target, at1 + c + LANES, b1)
        store(target, at2 + c, a2)
        store(target, at2 + c + LANES, b2)
        store(target, at3 + c, a3)
        store(target, at3 + c + LANES, b3)
    for c in range(wide, full, LANES):
        a0, a1, a2, a3 = load(target, at0 + c), load(target, at1 + c), load(target, at2 + c), load(target, at3 + c)
        for t in range(count):
            v0 = load(vectors, t * d_v + c)
            a0, a1 = multiply_add(fill_from(weights, w0 + t), v0, a0), multiply_add(fill_from(weights, w1 + t), v0, a1)
            a2, a3 = multiply_add(fill_from(weights, w2 + t), v0, a2), multiply_add(fill_from(weights, w3 + t), v0, a3)
        store(target, at0 + c, a0)
        store(target, at1 + c, a1)
        store(target, at2 + c, a2)
        store(target, at3 + c, a3)
    for c in range(full, d_v):
        y0, y1, y2, y3 = target[at0 + c], target[at1 + c], target[at2 + c], target[at3 + c]
        for t in range(count):
            v = vectors[t * d_v + c]
            y0 += weights[w0 + t] * v
            y1 += weights[w1 + t] * v
            y2 += weights[w2 + t] * v
            y3 += weights[w3 + t] * v
        target[at0 + c], target[at1 + c], target[at2 + c], target[at3 + c] = y0, y1, y2, y3


@helper
def multiply_queries(products, query_weight, tile, b, h, i0, i1, i2, i3):
    """The products of four queries with the 16 keys of a tile, to ``products[u * 16 + t]``: sums
    over even and over odd coordinates.
    """
    d_w = query_weight.shape[3]
    zero = fill(products.dtype.type(0))
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, zero, zero, zero, zero
    for c in range(0, d_w - 1, 2):
        k0, k1 = load(tile, c * LANES), load(tile, (c + 1) * LANES)
        a0, a1 = multiply_add(fill_from(query_weight, (b, h, i0, c)), k0, a0), multiply_add(fill_from(query_weight, (b, h, i1, c)), k0, a1)
        a2, a3 = multiply_add(fill_from(query_weight, (b, h, i2, c)), k0, a2), multiply_add(fill_from(query_weight, (b, h, i3, c)), k0, a3)
        b0 = multiply_add(fill_from(query_weight, (b, h, i0, c + 1)), k1, b0)
        b1 = multiply_add(fill_from(query_weight, (b, h, i1, c + 1)), k1, b1)
        b2 = multiply_add(fill_from(query_weight, (b, h, i2, c + 1)), k1, b2)
        b3 = multiply_add(fill_from(query_weight, (b, h, i3, c + 1)), k1, b3)
    if d_w % 2:
        k0 = load(tile, (d_w - 1) * LANES)
        a0 = multiply_add(fill_from(query_weight, (b, h, i0, d_w - 1)), k0, a0)
        a1 = multiply_add(fill_from(query_weight, (b, h, i1, d_w - 1)), k0, a1)
        a2 = multiply_add(fill_from(query_weight, (b, h, i2, d_w - 1)), k0, a2)
        a3 = multiply_add(fill_from(query_weight, (b, h, i3, d_w - 1)), k0, a3)
    store(products, 0, a0 + b0)
    store(products, LANES, a1 + b1)
    store(products, 2 * LANES, a2 + b2)
    store(products, 3 * LANES, a3 + b3)


@helper
def four_of(rows, first):
    """Four rows from ``first`` on; past the end the last one again, which `add_combinations` counts
    once.
    """
    last = len(rows) - 1
    return rows[first], rows[min(first + 1, last)], rows[min(first + 2, last)], rows[min(first + 3, last)]


@helper
def add_by_pairs(out, out0, query_weight, key_weight, value, b, h, queries, keys, tile, raw, values, products):
    """16 keys at a time: their products with four queries at once, then their values on top of the
    queries' rows.
    """
    d_v = value.shape[3]
    for start in range(0, len(keys), LANES):
        load_bucket(tile, raw, values, key_weight, value, b, h, keys, start)
        count = min(LANES, len(keys) - start)
        for first in range(0, len(queries), 4):
            i0, i1, i2, i3 = four_of(queries, first)
            multiply_queries(products, query_weight, tile, b, h, i0, i1, i2, i3)
            at0, at1, at2, at3 = out0 + i0 * d_v, out0 + i1 * d_v, out0 + i2 * d_v, out0 + i3 * d_v
            add_combinations(out, at0, at1, at2, at3, products, 0, LANES, 2 * LANES, 3 * LANES, count, values, d_v)


@helper
def add_by_outer_product(out, out0, query_weight, key_weight, value, b, h, queries, keys, tile, raw, values, outer, four_weights):
    """``outer[r * d_v + c] = sum_j key_weight_jr value_jc``, then for every query its rows, each
    times a coordinate of the weight.
    """
    d_w, d_v = query_weight.shape[3], value.shape[3]
    clear(outer, 0, d_w * d_v)
    for start in range(0, len(keys), LANES):
        load_bucket(tile, raw, values, key_weight, value, b, h, keys, start)
        count = min(LANES, len(keys) - start)
        for first in range(0, d_w, 4):
            r0, r1, r2, r3 = first, min(first + 1, d_w - 1), min(first + 2, d_w - 1), min(first + 3, d_w - 1)
            add_combinations(
                outer,
                r0 * d_v,
                r1 * d_v,
                r2 * d_v,
                r3 * d_v,
                tile,
                r0 * LANES,
                r1 * LANES,
                r2 * LANES,
                r3 * LANES,
                count,
                values,
                d_v,
            )
    for first in range(0, len(queries), 4):
        i0, i1, i2, i3 = four_of(queries, first)
        for r in range(d_w):
            four_weights[r], four_weights[d_w + r] = query_weight[b, h, i0, r], query_weight[b, h, i1, r]
            four_weights[2 * d_w + r], four_weights[3 * d_w + r] = query_weight[b, h, i2, r], query_weight[b, h, i3, r]
        at0, at1, at2, at3 = out0 + i0 * d_v, out0 + i1 * d_v, out0 + i2 * d_v, out0 + i3 * d_v
        add_combinations(out, at0, at1, at2, at3, four_weights, 0, d_w, 2 * d_w, 3 * d_w, d_w, outer, d_v)


@cache
def _buckets_kernel(dtype: Any) -> Any:
    """A task is (head, group of hashes): it sorts queries and keys by bucket, hash after hash, and
    adds to the output rows of its group.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(types.int32, 4),
            input_array(dtype, 4),
            input_array(types.int32, 4),
            input_array(dtype, 4),
            input_array(dtype, 4),
            input_array(types.uint8, 3),
            input_array(types.uint8, 3),
            output_array(dtype, 1),
            types.intp,
            types.intp,
        )
    )
    def accumulate(first, last, query_code, query_weight, key_code, key_weight, value, keep_query, keep_key, out, groups, capacity):
        n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], query_code.shape[3]
        d_w, d_v = query_weight.shape[3], value.shape[3]
        query_begins, key_begins = np.empty(capacity + 2, np.intp), np.empty(capacity + 2, np.intp)
        query_order, key_order = np.empty(n_q, np.intp), np.empty(n_k, np.intp)
        padded_w = (d_w + LANES - 1) // LANES * LANES
        tile, raw = aligned(padded_w * LANES, value.dtype), aligned(LANES * padded_w, value.dtype).reshape(LANES, padded_w)
        values, products = aligned(LANES * d_v, value.dtype), aligned(4 * LANES, value.dtype)
        outer, four_weights = aligned(d_w * d_v, value.dtype), aligned(4 * d_w, value.dtype)
        for task in range(first, last):
            head, g = divmod(task, groups)
            b, h = divmod(head, query_code.shape[1])
            out0 = task * n_q * d_v
            clear(out, out0, n_q * d_v)
            for c in range(num_hash * g // groups, num_hash * (g + 1) // groups):
                sort_by_bucket(query_code, keep_query, b, h, c, query_begins, query_order)
                sort_by_bucket(key_code, keep_key, b, h, c, key_begins, key_order)
                for k in range(capacity):
                    queries = query_order[query_begins[k] : query_begins[k + 1]]
                    keys = key_order[key_begins[k] : key_begins[k + 1]]
                    if len(queries) == 0 or len(keys) == 0:
                        continue
                    by_pairs = len(queries) * len(keys) * (d_w + d_v)
                    by_outer_product = (len(queries) + len(keys)) * d_w * d_v
                    if by_pairs <= by_outer_product:
                        add_by_pairs(out, out0, query_weight, key_weight, value, b, h, queries, keys, tile, raw, values, products)
                    else:
                        add_by_outer_product(
                            out, out0, query_weight, key_weight, value, b, h, queries, keys, tile, raw, values, outer, four_weights
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

    Working memory: an order of queries and keys for each thread; labels the size of the codes where
    ``hashtable_capacity > 4 n_k``; and for fewer than 16 heads, up to 16 copies of the output.
    """
    dtype = working_dtype(value)
    query_code, key_code = heads(query_hash_code), heads(key_hash_code)
    qw, kw, v = rows(query_weight, dtype), rows(key_weight, dtype), rows(value, dtype)
    keep_query, keep_key = kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[2:]
    if not dense_tables_fit(hashtable_capacity, n_k):
        query_code, key_code = relabeled(query_code, key_code, keep_key, hashtable_capacity, num_threads)
        hashtable_capacity = n_k + 1
    groups = max(1, min(num_hash, ENOUGH_TASKS // max(batch * num_heads, 1)))
    partial = np.empty((batch, num_heads, groups, n_q, d_v), dtype)
    flat = partial.reshape(-1)
    run = _buckets_kernel(from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * groups,
        lambda first, last: run(first, last, query_code, qw, key_code, kw, v, keep_query, keep_key, flat, groups, hashtable_capacity),
        num_threads=num_threads,
        cost=float(batch * num_heads * num_hash) * (n_q + n_k) * (qw.shape[-1] + d_v),
    )
    out = partial[:, :, 0] if groups == 1 else partial.sum(axis=2)
    spoiled = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    spoiled[:, :, 1:] = ~np.isfinite(qw).all(axis=-1)
    finish(out, keep_query, spoiled, 1 / num_hash, num_threads)
    return out.reshape(*query_hash_code.shape[:-1], d_v).astype(value.dtype, copy=False)
