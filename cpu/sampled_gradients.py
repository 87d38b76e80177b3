"""Gradients of sampled attention with the lower bound, bucket by bucket, in time linear in ``n``.

What meets in a bucket of one hash adds to all three gradients at once::

    dq_i += sum_j (g_i . v_j) k_j      dk_j += sum_i (g_i . v_j) q_i      dv_j += sum_i g_i

With ``p`` queries and ``r`` keys in the bucket there are two ways to the first two. By *pairs*: the
products ``g . v``, once for both, about ``p r (2 d + d_v)`` multiply-adds. By *outer products*:
``sum_j v_j k_j^T`` times every ``g`` and ``sum_i g_i q_i^T`` times every ``v``, about
``2 (p + r) d d_v``. Whichever is less is done, so the cost never grows faster than ``n``, however
skewed the buckets. The third is a plain cumulation, and `yoso_core.cpu.cumulation` does it.

A head is copied to scratch first: a row of ``q``, ``g`` and the sum for ``q`` side by side,
likewise ``k``, ``v`` and the sum for ``k``, so that a visit finds all it needs in one place. The
buckets of a hash touch different rows, so threads may share them; every row is added to hash after
hash, whoever does it.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import OPTIONS, helper, kernel, njit
from yoso_core.cpu.cumulation import clear, dense_tables_fit, find_slot, lsh_cumulation
from yoso_core.cpu.lanes import LANES, fill, load, multiply_add, store, total
from yoso_core.cpu.products import dot_products, product
from yoso_core.cpu.rows import leave_normalization, pack_rows_of, ramp, store_row, turn_rows, unit_rows_of, width_of
from yoso_core.cpu.threads import default_threads, share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, aligned_empty, heads, input_array, kept, output_array, rows, working_dtype

TILE = 96
"""Queries, and keys, of a bucket that are paired at a time, at most; larger buckets are cut into
equal tiles.
"""

SORTED_AT_ONCE = 16
"""Hashes of a head that are sorted by one task: as many codes as stand in a cache line."""

ROW_BLOCK = 256
"""Rows to a task, where threads share a head."""

RANGES = 32
"""Tasks into which the buckets of a hash are cut, where threads share a head."""

CACHE_BYTES = 32 << 20
"""Scratch of all heads that are in work, at most, so that it stays in the cache; a larger head is
in work alone, shared by all threads.
"""

FEW_PAIRS = 24
"""Pairs that are done one by one: only more of them are worth a tile."""

ALL, PREPARE, SORT, WALK, FINISH = range(5)


@helper
def label_by_hash_map(query_label, key_label, slots, labels):
    """Number the buckets in which there is a key: codes become labels ``0, 1, ...``, in the order
    in which keys first show them.

    A hash map with open addressing, at most half full: ``slots`` holds the code plus one, or 0 for
    a free place. Negative codes stay, and a query whose bucket has no key gets -1.
    """
    slots[:] = 0
    occupied = 0
    for i in range(len(key_label)):
        if key_label[i] >= 0:
            place = find_slot(slots, key_label[i])
            if slots[place] == 0:
                slots[place], labels[place] = np.int64(key_label[i]) + 1, occupied
                occupied += 1
            key_label[i] = labels[place]
    for i in range(len(query_label)):
        if query_label[i] >= 0:
            place = find_slot(slots, query_label[i])
            query_label[i] = labels[place] if slots[place] != 0 else -1


@helper
def sort_by_label(label, begins, begins_at, order, order_at, buckets):
    """Counting sort: bucket ``k`` holds the rows from ``order[order_at + begins[begins_at + k]]``
    on, up to the next, ascending.

    Negative labels are left out.
    """
    begins[begins_at : begins_at + buckets + 2] = 0
    for i in range(len(label)):
        if label[i] >= 0:
            begins[begins_at + label[i] + 2] += 1
    for k in range(begins_at + 2, begins_at + buckets + 2):
        begins[k] += begins[k - 1]
    for i in range(len(label)):
        if label[i] >= 0:
            bucket = begins_at + label[i] + 1
            order[order_at + begins[bucket]] = i
            begins[bucket] += 1


def read_labels(labels, code, keep, b, h, hash0, count, capacity):
    """Codes of ``count`` hashes, hash by hash: ``labels[c, i]``, or -1 for what is masked or out of
    range (unchecked codes may be).
    """
    for i in range(code.shape[2]):
        for c in range(count):
            number = code[b, h, i, hash0 + c]
            labels[c, i] = number if keep[b, h, i] and 0 <= number < capacity else -1


read_labels = njit(read_labels, **OPTIONS)


def sort_hashes(query_code, key_code, keep_query, keep_key, b, h, hash0, count, capacity, buckets, begins, order):
    """Sort the queries and keys of a head by their buckets, for hashes
    ``hash0 ... hash0 + count - 1``.

    ``begins (2, m, buckets + 2)`` and ``order (2, m, n)``, flat: queries, then keys.
    """
    n_q, n_k, num_hash = query_code.shape[2], key_code.shape[2], query_code.shape[3]
    query_label, key_label = np.empty((count, n_q), np.int32), np.empty((count, n_k), np.int32)
    read_labels(query_label, query_code, keep_query, b, h, hash0, count, capacity)
    read_labels(key_label, key_code, keep_key, b, h, hash0, count, capacity)
    size = 4
    while size < 2 * n_k and capacity > buckets:
        size *= 2
    slots, numbers = np.empty(size, np.int64), np.empty(size, np.int32)
    for c in range(count):
        if capacity > buckets:
            label_by_hash_map(query_label[c], key_label[c], slots, numbers)
        row = hash0 + c
        sort_by_label(query_label[c], begins, row * (buckets + 2), order, row * n_q, buckets)
        sort_by_label(key_label[c], begins, (num_hash + row) * (buckets + 2), order, num_hash * n_q + row * n_k, buckets)


sort_hashes = njit(sort_hashes, **OPTIONS)


@helper
def pull_pairs_one_by_one(rows, queries, keys, p, r, width, width_v):
    """Each of the few pairs of a bucket by itself, straight from the rows to the sums."""
    sums = width + width_v
    for t in range(p):
        for u in range(r):
            product = fill(rows.dtype.type(0))
            for c in range(width, sums, LANES):
                product = multiply_add(load(rows, queries[t] + c), load(rows, keys[u] + c), product)
            pull = fill(total(product))
            for c in range(0, width, LANES):
                query_sum, key_sum = load(rows, queries[t] + sums + c), load(rows, keys[u] + sums + c)
                store(rows, queries[t] + sums + c, multiply_add(pull, load(rows, keys[u] + c), query_sum))
                store(rows, keys[u] + sums + c, multiply_add(pull, load(rows, queries[t] + c), key_sum))


@helper
def pull_by_pairs(rows, ours, theirs, p, r, width, width_v, d_v, tile, pulls, singles, seconds, tiles):
    """Up to `TILE` rows of one side by as many of the other: a tile of ``g . v``, and what it adds
    to both sides.
    """
    sums = width + width_v
    turn_rows(tile, TILE, rows, ours, width, p, width_v)
    if p <= LANES:
        dot_products(pulls, tiles, rows, theirs, width, tile, tiles, r, d_v)
    else:
        product(pulls, tiles, 0, rows, theirs, seconds, tile, tiles, 0, r, d_v, (p + LANES - 1) // LANES * LANES, True)
    product(rows, ours, sums, pulls, singles, tiles, rows, theirs, 0, p, r, width, False)
    product(rows, theirs, sums, pulls, tiles, singles, rows, ours, 0, r, p, width, False)


@helper
def tile_size(count):
    """Of equal tiles for so many rows, a multiple of four."""
    tiles = (count + TILE - 1) // TILE
    return ((count + tiles - 1) // tiles + 3) // 4 * 4


@helper
def find_places(places, order, first, count, start, step):
    """Where the rows ``order[first : first + count]`` of a side begin that begins at ``start``."""
    for t in range(count):
        places[t] = start + np.intp(order[first + t]) * step


@helper
def add_outer_products(outer, outer_places, rows, order, first, count, start, step, places, width, d_v, seconds):
    """``outer[c, :] = sum_j rows[j, width + c] rows[j, :width]``: of what stands second in a row
    with what stands first.
    """
    for j in range(0, count, TILE):
        some = min(TILE, count - j)
        find_places(places, order, first + j, some, start, step)
        product(outer, outer_places, 0, rows, seconds, places, rows, places, 0, d_v, some, width, j == 0)


@helper
def apply_outer_products(outer, outer_places, rows, order, first, count, start, step, places, width, width_v, d_v, seconds):
    """On top of the sum in a row: what stands second in it, times ``outer``."""
    for i in range(0, count, TILE):
        some = min(TILE, count - i)
        find_places(places, order, first + i, some, start, step)
        product(rows, places, width + width_v, rows, places, seconds, outer, outer_places, 0, some, d_v, width, False)


def walk_buckets(rows, begins, order, n_q, n_k, num_hash, buckets, d, d_v, hash0, hash1, first, last):
    """Buckets ``first ... last - 1`` of hashes ``hash0 ... hash1 - 1`` of the head in ``rows``."""
    width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
    step = 2 * width + width_v
    key_start = n_q * step
    queries, keys = np.empty(TILE, np.intp), np.empty(TILE, np.intp)
    tile, pulls, outer = aligned(width_v * TILE, rows.dtype), aligned(TILE * TILE, rows.dtype), aligned(d_v * width, rows.dtype)
    longest = max(TILE, width, width_v)
    singles, seconds, tiles, outer_places = ramp(longest, 1), ramp(longest, 1), ramp(longest, TILE), ramp(longest, width)
    seconds += width
    how = (width, width_v, d_v, tile, pulls, singles, seconds, tiles)
    for c in range(hash0, hash1):
        query_begins, key_begins = c * (buckets + 2), (num_hash + c) * (buckets + 2)
        query_order, key_order = c * n_q, num_hash * n_q + c * n_k
        for k in range(first, last):
            i, j = np.intp(begins[query_begins + k]), np.intp(begins[key_begins + k])
            p, r = begins[query_begins + k + 1] - i, begins[key_begins + k + 1] - j
            if p == 0 or r == 0:
                continue
            i, j = i + query_order, j + key_order
            if p * r * (2 * width + width_v) <= 2 * (p + r) * width * width_v:
                # The side that fills its vectors of lanes better is ours: its rows are turned
                # crosswise.
                if (p + LANES - 1) // LANES * r <= (r + LANES - 1) // LANES * p:
                    i0, p0, start0, j0, r0, start1 = i, p, 0, j, r, key_start
                else:
                    i0, p0, start0, j0, r0, start1 = j, r, key_start, i, p, 0
                tile_p, tile_r = tile_size(p0), tile_size(r0)
                for t in range(0, p0, tile_p):
                    some = min(tile_p, p0 - t)
                    find_places(queries, order, i0 + t, some, start0, step)
                    for u in range(0, r0, tile_r):
                        count = min(tile_r, r0 - u)
                        find_places(keys, order, j0 + u, count, start1, step)
                        if some * count <= FEW_PAIRS:
                            pull_pairs_one_by_one(rows, queries, keys, some, count, width, width_v)
                        else:
                            pull_by_pairs(rows, queries, keys, some, count, *how)
            else:
                start0, start1 = 0, key_start
                for _ in range(2):  # from the keys to the queries, then back
                    add_outer_products(outer, outer_places, rows, order, j, r, start1, step, keys, width, d_v, seconds)
                    apply_outer_products(outer, outer_places, rows, order, i, p, start0, step, queries, width, width_v, d_v, seconds)
                    i, p, start0, j, r, start1 = j, r, start1, i, p, start0


walk_buckets = njit(walk_buckets, **OPTIONS)


@helper
def clear_sums(rows, start, step, first, last, width):
    """Zeros for the sums of rows ``first ... last - 1`` of a side."""
    for i in range(first, last):
        clear(rows, start + (i + 1) * step - width, width)


@helper
def scale_row(rows, at, width, scale, spoiled):
    """Times ``scale``; what is not finite becomes NaN, the whole row where it is ``spoiled``."""
    for c in range(at, at + width, LANES):
        y = load(rows, c) * fill(scale)
        store(rows, c, fill(rows.dtype.type(np.nan)) if spoiled else y + (y - y))


def finish_rows_of(rows, start, step, lengths, spoiled, keep, b, h, first, last, factor, grad):
    """Sums of rows ``first ... last - 1`` of a side to gradients by the rows themselves; zeros for
    masked rows.
    """
    width = (grad.shape[3] + LANES - 1) // LANES * LANES
    for i in range(first, last):
        at = start + (i + 1) * step - width
        scale_row(rows, at, width, rows.dtype.type(factor), spoiled[i])
        length = lengths[i] if keep[b, h, i] else rows.dtype.type(0)
        leave_normalization(rows, at, rows, start + i * step, width, length, True)
        store_row(grad, b, h, i, rows, at)


finish_rows_of = njit(finish_rows_of, **OPTIONS)


@cache
def _backward_kernel(dtype: Any) -> Any:
    """All of a head for each task (stage ``ALL``), or one stage of one head, ``head``, whose
    scratch all threads share.

    ``rows``, flat, are those of the queries, then those of the keys; so are ``lengths`` and
    ``spoiled``. A task of stage ``PREPARE`` or ``FINISH`` is a block of rows of both sides, of
    ``SORT`` some hashes, of ``WALK`` a range of the buckets of hash ``number``.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            types.intp,
            types.intp,
            types.intp,
            *([input_array(dtype, 4)] * 4),
            *([input_array(types.int32, 4)] * 2),
            *([input_array(types.uint8, 3)] * 2),
            *([output_array(dtype, 4)] * 2),
            output_array(dtype, 1),
            output_array(dtype, 1),
            output_array(types.int32, 1),
            output_array(types.int32, 1),
            output_array(types.uint8, 1),
            types.intp,
            types.intp,
            types.float64,
        )
    )
    def backward(
        first,
        last,
        stage,
        head,
        number,
        grad_out,
        query,
        key,
        value,
        query_code,
        key_code,
        keep_query,
        keep_key,
        grad_query,
        grad_key,
        rows,
        lengths,
        begins,
        order,
        spoiled,
        capacity,
        buckets,
        factor,
    ):
        n_q, n_k, num_hash, d, d_v = query.shape[2], key.shape[2], query_code.shape[3], query.shape[3], value.shape[3]
        width, width_v = (d + LANES - 1) // LANES * LANES, (d_v + LANES - 1) // LANES * LANES
        step = 2 * width + width_v
        key_start = n_q * step
        lengths_q, lengths_k, spoiled_q, spoiled_k = lengths[:n_q], lengths[n_q:], spoiled[:n_q], spoiled[n_q:]
        whole = stage == ALL
        for task in range(first, last):
            b, h = divmod(task if whole else head, query.shape[1])
            i, stop_q = (0, n_q) if whole else (min(task * ROW_BLOCK, n_q), min((task + 1) * ROW_BLOCK, n_q))
            j, stop_k = (0, n_k) if whole else (min(task * ROW_BLOCK, n_k), min((task + 1) * ROW_BLOCK, n_k))
            if whole or stage == PREPARE:
                unit_rows_of(rows, 0, step, query, b, h, i, stop_q, lengths_q, spoiled_q)
                unit_rows_of(rows, key_start, step, key, b, h, j, stop_k, lengths_k, spoiled_k)
                pack_rows_of(rows, width, step, grad_out, b, h, i, stop_q, spoiled_q)
                pack_rows_of(rows, key_start + width, step, value, b, h, j, stop_k, spoiled_k)
                clear_sums(rows, 0, step, i, stop_q, width)
                clear_sums(rows, key_start, step, j, stop_k, width)
            if whole or stage == SORT:
                hash0 = 0 if whole else task * SORTED_AT_ONCE
                for c in range(hash0, num_hash if whole else min(hash0 + SORTED_AT_ONCE, num_hash), SORTED_AT_ONCE):
                    count = min(SORTED_AT_ONCE, num_hash - c)
                    sort_hashes(query_code, key_code, keep_query, keep_key, b, h, c, count, capacity, buckets, begins, order)
            if whole or stage == WALK:
                hash0, hash1 = (0, num_hash) if whole else (number, number + 1)
                begin, end = (0, buckets) if whole else (buckets * task // RANGES, buckets * (task + 1) // RANGES)
                walk_buckets(rows, begins, order, n_q, n_k, num_hash, buckets, d, d_v, hash0, hash1, begin, end)
            if whole or stage == FINISH:
                scale = factor / num_hash
                finish_rows_of(rows, 0, step, lengths_q, spoiled_q, keep_query, b, h, i, stop_q, scale, grad_query)
                finish_rows_of(rows, key_start, step, lengths_k, spoiled_k, keep_key, b, h, j, stop_k, scale, grad_key)

    return backward


def lsh_lower_bound_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    query_hash_code: Array,
    key_hash_code: Array,
    hash_code_len: int,
    query_mask: Array | None,
    key_mask: Array | None,
    num_threads: int | None,
) -> tuple[Array, Array, Array]:
    """See `yoso_core.reference.lsh_attention_backward` with ``grad="lower_bound"``.

    Working memory for a head: ``(n_q + n_k) (2 d + d_v)`` numbers, and twice the size of its codes.
    Each thread has a head in work as long as they stay within 32 MiB (`CACHE_BYTES`) together; a
    larger head is in work alone, shared by all threads.
    """
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    q, k, v, g = (rows(x, dtype) for x in (query, key, value, grad_out))
    codes = heads(query_hash_code), heads(key_hash_code)
    keep = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    batch, num_heads, n_q, d = q.shape
    n_k, d_v, num_hash, heads_in_all = k.shape[2], v.shape[3], codes[0].shape[3], batch * num_heads
    capacity = 1 << hash_code_len
    buckets = capacity if dense_tables_fit(capacity, n_k) else n_k
    grads = np.empty(q.shape, dtype), np.empty(k.shape, dtype)
    step = 2 * width_of(d) + width_of(d_v)
    entries = (n_q + n_k) * step
    run = _backward_kernel(from_dtype(np.dtype(dtype)))

    def call(first: int, last: int, stage: int, head: int, number: int, scratch: tuple[Array, ...]) -> None:
        run(first, last, stage, head, number, g, q, k, v, *codes, *keep, *grads, *scratch, capacity, buckets, hash_code_len / 2)

    def scratch() -> tuple[Array, ...]:
        return (
            aligned_empty(entries, dtype),
            np.empty(n_q + n_k, dtype),
            np.empty(2 * num_hash * (buckets + 2), np.int32),
            np.empty(num_hash * (n_q + n_k), np.int32),
            np.empty(n_q + n_k, np.uint8),
        )

    threads = num_threads or default_threads()
    bytes_of_a_head = entries * grads[0].itemsize + 4 * num_hash * (n_q + n_k + 2 * buckets)
    cost = float(num_hash) * (n_q + n_k) * step * 20
    if min(threads, heads_in_all) * bytes_of_a_head <= CACHE_BYTES and (heads_in_all >= 2 * threads or cost < 1e7):
        spare: list[tuple[Array, ...]] = []

        def do_heads(first: int, last: int) -> None:
            try:
                mine = spare.pop()
            except IndexError:
                mine = scratch()
            call(first, last, ALL, 0, 0, mine)
            spare.append(mine)

        share(heads_in_all, do_heads, num_threads=num_threads, cost=cost * heads_in_all)
    else:
        shared = scratch()
        blocks = -(-max(n_q, n_k) // ROW_BLOCK)
        for head in range(heads_in_all):

            def stage(which: int, tasks: int, cost: float, number: int = 0, head: int = head) -> None:
                share(tasks, lambda first, last: call(first, last, which, head, number, shared), num_threads=num_threads, cost=cost)

            stage(PREPARE, blocks, 3.0 * entries)
            stage(SORT, -(-num_hash // SORTED_AT_ONCE), 10.0 * num_hash * (n_q + n_k))
            for number in range(num_hash):
                stage(WALK, RANGES, cost / num_hash, number)
            stage(FINISH, blocks, 3.0 * entries)
    return (
        grads[0].reshape(query.shape).astype(query.dtype, copy=False),
        grads[1].reshape(key.shape).astype(key.dtype, copy=False),
        lsh_cumulation(codes[1], codes[0], g, capacity, query_mask=keep[1], key_mask=keep[0], num_threads=num_threads)
        .reshape(value.shape)
        .astype(value.dtype, copy=False),
    )
