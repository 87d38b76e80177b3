"""Weighted cumulation, bucket by bucket.

Inside a bucket the weighted sum is linear attention: ``sum_j (a_i . b_j) v_j = (sum_j v_j b_j^T) a_i``. With ``p`` queries and ``r``
keys in it, going over pairs costs about ``2 p r (d_w + d_v)`` operations and the outer products ``2 (p + r) d_w d_v``. Whichever is less
is done, so the cost never grows faster than ``n``, however skewed the buckets.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import clear, dense_tables_fit, relabelled
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, load_transposed, multiply_add, store
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array, rows, working_dtype

ENOUGH_TASKS = 16
"""Where there are fewer heads, the hashes of a head are dealt to several tasks, each with sums of its own."""


@helper
def sort_by_bucket(codes, keep, b, h, c, begins, order):
    """Counting sort of the kept rows: bucket ``k`` holds ``order[begins[k] : begins[k + 1]]``, in ascending order.

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
def load_weights(tile, raw, x, b, h, chosen, start):
    """The rows ``chosen[start : start + 16]`` of ``x[b, h]`` as a tile, coordinate by coordinate; missing vectors are zeros."""
    d = x.shape[3]
    full = d - d % LANES
    zero = fill(x.dtype.type(0))
    for t in range(LANES):
        if start + t < len(chosen):
            j = chosen[start + t]
            for c in range(0, full, LANES):
                store(raw, (t, c), load(x, (b, h, j, c)))
            for c in range(full, d):
                raw[t, c] = x[b, h, j, c]
        else:
            for c in range(0, raw.shape[1], LANES):
                store(raw, (t, c), zero)
    for c in range(0, d, LANES):
        load_transposed(raw, (0, c), tile, c * LANES)


@helper
def add_by_pairs(out, query_weight, key_weight, value, b, h, g, queries, keys, tile, raw, products):
    """16 keys at a time: all their products with one query at once, then their values on top of its row."""
    d_w, d_v = query_weight.shape[3], value.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    zero = fill(value.dtype.type(0))
    for start in range(0, len(keys), LANES):
        load_weights(tile, raw, key_weight, b, h, keys, start)
        count = min(LANES, len(keys) - start)
        for i in queries:
            even, odd = zero, zero
            for c in range(0, d_w - 1, 2):
                even = multiply_add(fill_from(query_weight, (b, h, i, c)), load(tile, c * LANES), even)
                odd = multiply_add(fill_from(query_weight, (b, h, i, c + 1)), load(tile, (c + 1) * LANES), odd)
            if d_w % 2:
                even = multiply_add(fill_from(query_weight, (b, h, i, d_w - 1)), load(tile, (d_w - 1) * LANES), even)
            store(products, 0, even + odd)
            for c in range(0, wide, 4 * LANES):
                y0, y1 = load(out, (g, b, h, i, c)), load(out, (g, b, h, i, c + LANES))
                y2, y3 = load(out, (g, b, h, i, c + 2 * LANES)), load(out, (g, b, h, i, c + 3 * LANES))
                for t in range(count):
                    j, w = keys[start + t], fill_from(products, t)
                    y0 = multiply_add(w, load(value, (b, h, j, c)), y0)
                    y1 = multiply_add(w, load(value, (b, h, j, c + LANES)), y1)
                    y2 = multiply_add(w, load(value, (b, h, j, c + 2 * LANES)), y2)
                    y3 = multiply_add(w, load(value, (b, h, j, c + 3 * LANES)), y3)
                store(out, (g, b, h, i, c), y0)
                store(out, (g, b, h, i, c + LANES), y1)
                store(out, (g, b, h, i, c + 2 * LANES), y2)
                store(out, (g, b, h, i, c + 3 * LANES), y3)
            for c in range(wide, full, LANES):
                y0 = load(out, (g, b, h, i, c))
                for t in range(count):
                    y0 = multiply_add(fill_from(products, t), load(value, (b, h, keys[start + t], c)), y0)
                store(out, (g, b, h, i, c), y0)
            for c in range(full, d_v):
                for t in range(count):
                    out[g, b, h, i, c] += products[t] * value[b, h, keys[start + t], c]


@helper
def add_by_outer_product(out, query_weight, key_weight, value, b, h, g, queries, keys, outer):
    """``outer[r * d_v + c] = sum_j key_weight_jr value_jc``, then for every query its rows, each times a coordinate of the weight."""
    d_w, d_v = query_weight.shape[3], value.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    zero = fill(value.dtype.type(0))
    clear(outer, 0, d_w * d_v)
    grouped = len(keys) - len(keys) % 4
    for start in range(0, grouped, 4):
        j0, j1, j2, j3 = keys[start], keys[start + 1], keys[start + 2], keys[start + 3]
        for c in range(0, full, LANES):
            v0, v1 = load(value, (b, h, j0, c)), load(value, (b, h, j1, c))
            v2, v3 = load(value, (b, h, j2, c)), load(value, (b, h, j3, c))
            for r in range(d_w):
                row = multiply_add(fill_from(key_weight, (b, h, j0, r)), v0, load(outer, r * d_v + c))
                row = multiply_add(fill_from(key_weight, (b, h, j1, r)), v1, row)
                row = multiply_add(fill_from(key_weight, (b, h, j2, r)), v2, row)
                store(outer, r * d_v + c, multiply_add(fill_from(key_weight, (b, h, j3, r)), v3, row))
    for start in range(grouped, len(keys)):
        j0 = keys[start]
        for c in range(0, full, LANES):
            v0 = load(value, (b, h, j0, c))
            for r in range(d_w):
                store(outer, r * d_v + c, multiply_add(fill_from(key_weight, (b, h, j0, r)), v0, load(outer, r * d_v + c)))
    for j in keys:
        for r in range(d_w):
            for c in range(full, d_v):
                outer[r * d_v + c] += key_weight[b, h, j, r] * value[b, h, j, c]
    for i in queries:
        for c in range(0, wide, 4 * LANES):
            y0, y1, y2, y3 = zero, zero, zero, zero
            for r in range(d_w):
                w, at = fill_from(query_weight, (b, h, i, r)), r * d_v + c
                y0 = multiply_add(w, load(outer, at), y0)
                y1 = multiply_add(w, load(outer, at + LANES), y1)
                y2 = multiply_add(w, load(outer, at + 2 * LANES), y2)
                y3 = multiply_add(w, load(outer, at + 3 * LANES), y3)
            store(out, (g, b, h, i, c), load(out, (g, b, h, i, c)) + y0)
            store(out, (g, b, h, i, c + LANES), load(out, (g, b, h, i, c + LANES)) + y1)
            store(out, (g, b, h, i, c + 2 * LANES), load(out, (g, b, h, i, c + 2 * LANES)) + y2)
            store(out, (g, b, h, i, c + 3 * LANES), load(out, (g, b, h, i, c + 3 * LANES)) + y3)
        for c in range(wide, full, LANES):
            y0 = zero
            for r in range(d_w):
                y0 = multiply_add(fill_from(query_weight, (b, h, i, r)), load(outer, r * d_v + c), y0)
            store(out, (g, b, h, i, c), load(out, (g, b, h, i, c)) + y0)
        for c in range(full, d_v):
            for r in range(d_w):
                out[g, b, h, i, c] += query_weight[b, h, i, r] * outer[r * d_v + c]


@cache
def _buckets_kernel(dtype: Any) -> Any:
    """A task is (head, group of hashes): it sorts queries and keys by bucket, hash after hash, and adds to the output rows of its group."""

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
            output_array(dtype, 5),
            types.intp,
        )
    )
    def accumulate(first, last, query_code, query_weight, key_code, key_weight, value, keep_query, keep_key, out, capacity):
        n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], query_code.shape[3]
        d_w, d_v = query_weight.shape[3], value.shape[3]
        groups = out.shape[0]
        query_begins, key_begins = np.empty(capacity + 2, np.intp), np.empty(capacity + 2, np.intp)
        query_order, key_order = np.empty(n_q, np.intp), np.empty(n_k, np.intp)
        outer = aligned(d_w * d_v, value.dtype)
        padded_w = (d_w + LANES - 1) // LANES * LANES
        tile, raw = aligned(padded_w * LANES, value.dtype), aligned(LANES * padded_w, value.dtype).reshape(LANES, padded_w)
        products = aligned(LANES, value.dtype)
        for task in range(first, last):
            head, g = divmod(task, groups)
            b, h = divmod(head, query_code.shape[1])
            out[g, b, h] = 0
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
                        add_by_pairs(out, query_weight, key_weight, value, b, h, g, queries, keys, tile, raw, products)
                    else:
                        add_by_outer_product(out, query_weight, key_weight, value, b, h, g, queries, keys, outer)

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

    Working memory: an order of queries and keys for each thread; labels the size of the codes where ``hashtable_capacity > 4 n_k``; and for
    fewer than 16 heads, up to 16 copies of the output.
    """
    dtype = working_dtype(value)
    query_code, key_code = heads(query_hash_code), heads(key_hash_code)
    qw, kw, v = rows(query_weight, dtype), rows(key_weight, dtype), rows(value, dtype)
    keep_query, keep_key = kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[2:]
    if not dense_tables_fit(hashtable_capacity, n_k):
        query_code, key_code = relabelled(query_code, key_code, keep_key, hashtable_capacity, num_threads)
        hashtable_capacity = n_k + 1
    groups = max(1, min(num_hash, ENOUGH_TASKS // max(batch * num_heads, 1)))
    partial = np.empty((groups, batch, num_heads, n_q, d_v), dtype)
    run = _buckets_kernel(from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * groups,
        lambda first, last: run(first, last, query_code, qw, key_code, kw, v, keep_query, keep_key, partial, hashtable_capacity),
        num_threads=num_threads,
        cost=float(batch * num_heads * num_hash) * (n_q + n_k) * (qw.shape[-1] + d_v),
    )
    out = partial[0]
    for more in partial[1:]:
        out += more
    out *= dtype(1 / num_hash)
    spoiled = ~np.isfinite(qw).all(axis=-1, keepdims=True) | ~np.isfinite(out)
    np.copyto(out, np.nan, where=spoiled)
    np.copyto(out, 0, where=keep_query[..., None] == 0)
    return out.reshape(*query_hash_code.shape[:-1], d_v).astype(value.dtype, copy=False)
