"""Bernoulli cumulation by tables: a table per hash, small enough to stay in cache.

Two rounds. *Scatter*: each task owns the tables of one part (a few hashes) of one head, clears them
and adds the value of every key to its bucket. *Gather*: each task owns a block of queries of one
head and adds up the buckets they fall into. The tables are written by one task each and every
output row by one task, hash after hash, so nothing depends on which thread does what.

The same two rounds serve stored codes (`lsh_cumulation`) and codes that are made on the fly, a tile
at a time, and never stored (`yoso_core.cpu.attention`): only the kernels that fetch the codes
differ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, load, store, total
from yoso_core.cpu.threads import default_threads, share
from yoso_core.cpu.tiles import aligned
from yoso_core.cpu.views import Array, aligned_empty, heads, input_array, kept, output_array, rows, working_dtype
from yoso_core.reference.normalize import TINY_NORM

TABLE_BYTES = 32 << 20
"""Tables that exist at one time, at most; more heads or hashes than fit are done in groups. One
part of one head is always held.
"""

KEY_BLOCK = QUERY_BLOCK = 2048
"""Keys and queries that one thread takes through all its parts before it goes on: so they are read
from memory once, not for every part.
"""

SMALL_QUERY_BLOCK = 512
"""Queries to a gather task where all threads share a head."""

SPLIT_TASKS = 16
SPLIT_KEYS = 4096
"""Where there are fewer than so many (head, part) pairs, the keys are split as well, in pieces of
at least so many.
"""

PART = 8
"""Hashes to a part when codes are read from memory: eight tables of 256 buckets by 64 floats fill
half of a 1 MiB cache.
"""


@dataclass(frozen=True)
class Plan:
    """How the work is cut up.

    What touches a sum (hashes to a part, pieces of the keys) follows from shapes alone. The rest,
    which depends on the number of threads, does not touch any.
    """

    parts: int
    per: int
    """Hashes to a part (the last may have fewer)."""
    splits: int
    """Pieces of the keys."""
    table_size: int
    """Entries of one hash's table."""
    by_head: bool
    """With heads enough for every thread, one thread scatters and gathers a head, in tables of its
    own that stay in its cache. Else all threads scatter first, into tables of many heads, and then
    gather.
    """
    heads_at_once: int
    parts_at_once: int

    @property
    def entries(self) -> int:
        """Size of the tables that one group needs."""
        return self.heads_at_once * self.parts_at_once * self.splits * self.per * self.table_size


def plan(shape: tuple[int, ...], n_k: int, num_hash: int, per: int, table_size: int, itemsize: int, num_threads: int | None) -> Plan:
    """``shape`` is that of the output, ``(batch, heads, n_q, d_v)``."""
    num_heads, threads = shape[0] * shape[1], num_threads or default_threads()
    parts = -(-num_hash // per)
    part_bytes = max(per * table_size * itemsize, 1)
    affordable = max(1, TABLE_BYTES // part_bytes)
    splits = max(1, min(SPLIT_TASKS // max(num_heads * parts, 1), n_k // SPLIT_KEYS, affordable))
    if splits == 1 and num_heads >= 2 * threads and affordable >= threads:
        return Plan(parts, per, splits, table_size, True, 1, min(parts, affordable // threads))
    slots = max(1, affordable // splits)
    parts_at_once = min(parts, slots)
    return Plan(parts, per, splits, table_size, False, max(1, min(num_heads, slots // parts_at_once)), parts_at_once)


@helper
def clear(tables, start, count):
    """Zeros in ``tables[start : start + count]``."""
    zero = fill(tables.dtype.type(0))
    full = count - count % LANES
    for c in range(start, start + full, LANES):
        store(tables, c, zero)
    for c in range(start + full, start + count):
        tables[c] = 0


@helper
def find_rows(places, start, table_size, codes, count, t, d_v):
    """Where in the tables the buckets of vector ``t`` begin: code ``c`` is
    ``codes[c * 16 + t]``.
    """
    for c in range(count):
        places[c] = start + c * table_size + np.intp(codes[c * LANES + t]) * d_v


@helper
def guard_rows(places, capacity, codes, count, t):
    """Leave out the hashes whose code is out of range: unchecked codes from outside must not reach
    beyond a table. How many are left.
    """
    left = 0
    for c in range(count):
        if 0 <= codes[c * LANES + t] < capacity:
            places[left] = places[c]
            left += 1
    return left


@helper
def scatter_tile(tables, start, table_size, codes, places, hashes, guarded, value, keep, b, h, i, stop):
    """Add up to 16 values, from row ``i`` on, to their buckets in ``hashes`` tables; 64 columns at
    a time stay in registers.

    ``guarded``, a constant: the codes come from outside and may be out of range.
    """
    d_v = value.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    for t in range(min(LANES, stop - i)):
        if keep[b, h, i + t]:
            count = hashes
            find_rows(places, start, table_size, codes, count, t, d_v)
            if guarded:
                count = guard_rows(places, table_size // max(d_v, 1), codes, count, t)
            for r in range(0, wide, 4 * LANES):
                v0, v1 = load(value, (b, h, i + t, r)), load(value, (b, h, i + t, r + LANES))
                v2, v3 = load(value, (b, h, i + t, r + 2 * LANES)), load(value, (b, h, i + t, r + 3 * LANES))
                for c in range(count):
                    at = places[c] + r
                    store(tables, at, load(tables, at) + v0)
                    store(tables, at + LANES, load(tables, at + LANES) + v1)
                    store(tables, at + 2 * LANES, load(tables, at + 2 * LANES) + v2)
                    store(tables, at + 3 * LANES, load(tables, at + 3 * LANES) + v3)
            for r in range(wide, full, LANES):
                v0 = load(value, (b, h, i + t, r))
                for c in range(count):
                    store(tables, places[c] + r, load(tables, places[c] + r) + v0)
            for r in range(full, d_v):
                for c in range(count):
                    tables[places[c] + r] += value[b, h, i + t, r]


@helper
def gather_tile(tables, start, table_size, codes, places, hashes, guarded, out, keep, fresh, b, h, i):
    """Add the buckets of up to 16 queries to their output rows (or begin the rows with them, where
    ``fresh``).
    """
    d_v = out.shape[3]
    wide, full = d_v - d_v % (4 * LANES), d_v - d_v % LANES
    zero = fill(out.dtype.type(0))
    for t in range(min(LANES, out.shape[2] - i)):
        if keep[b, h, i + t]:
            count = hashes
            find_rows(places, start, table_size, codes, count, t, d_v)
            if guarded:
                count = guard_rows(places, table_size // max(d_v, 1), codes, count, t)
            for r in range(0, wide, 4 * LANES):
                y0, y1, y2, y3 = zero, zero, zero, zero
                if not fresh:
                    y0, y1 = load(out, (b, h, i + t, r)), load(out, (b, h, i + t, r + LANES))
                    y2, y3 = load(out, (b, h, i + t, r + 2 * LANES)), load(out, (b, h, i + t, r + 3 * LANES))
                for c in range(count):
                    at = places[c] + r
                    y0, y1 = y0 + load(tables, at), y1 + load(tables, at + LANES)
                    y2, y3 = y2 + load(tables, at + 2 * LANES), y3 + load(tables, at + 3 * LANES)
                store(out, (b, h, i + t, r), y0)
                store(out, (b, h, i + t, r + LANES), y1)
                store(out, (b, h, i + t, r + 2 * LANES), y2)
                store(out, (b, h, i + t, r + 3 * LANES), y3)
            for r in range(wide, full, LANES):
                y0 = zero if fresh else load(out, (b, h, i + t, r))
                for c in range(count):
                    y0 = y0 + load(tables, places[c] + r)
                store(out, (b, h, i + t, r), y0)
            for r in range(full, d_v):
                y = out.dtype.type(0) if fresh else out[b, h, i + t, r]
                for c in range(count):
                    y += tables[places[c] + r]
                out[b, h, i + t, r] = y


@helper
def finish_row(out, b, h, i, scale):
    """Times ``scale``; infinities become NaN (``y - y`` is 0 for a finite number and NaN for any
    other).
    """
    d_v = out.shape[3]
    full = d_v - d_v % LANES
    for r in range(0, full, LANES):
        y = load(out, (b, h, i, r)) * fill(scale)
        store(out, (b, h, i, r), y + (y - y))
    for r in range(full, d_v):
        y = out[b, h, i, r] * scale
        out[b, h, i, r] = y + (y - y)


@helper
def normalize_row(out, b, h, i, scale):
    """Times ``scale``, then to unit length; a row shorter than 1e-12 becomes zeros, one that is not
    finite NaN.
    """
    d_v = out.shape[3]
    full = d_v - d_v % LANES
    squares = fill(out.dtype.type(0))
    for r in range(0, full, LANES):
        y = load(out, (b, h, i, r)) * fill(scale)
        squares = squares + y * y
    length2 = total(squares)
    for r in range(full, d_v):
        y = out[b, h, i, r] * scale
        length2 += y * y
    if 1e-20 < length2 < 1e30:
        to_unit = scale / out.dtype.type(math.sqrt(length2))
        for r in range(0, full, LANES):
            store(out, (b, h, i, r), load(out, (b, h, i, r)) * fill(to_unit))
        for r in range(full, d_v):
            out[b, h, i, r] *= to_unit
    else:
        normalize_extreme_row(out, b, h, i, scale)


@helper
def normalize_extreme_row(out, b, h, i, scale):
    """`normalize_row` where squares overflow, vanish or are NaN: divide by the largest entry
    first.
    """
    d_v = out.shape[3]
    largest = 0.0
    finite = True
    for r in range(d_v):
        entry = abs(float(out[b, h, i, r]))
        finite = finite and math.isfinite(entry)
        largest = max(largest, entry)
    length2 = 0.0
    if finite and largest > 0:
        for r in range(d_v):
            length2 += (out[b, h, i, r] / largest) ** 2
    length = largest * math.sqrt(length2)
    for r in range(d_v):
        if not finite:
            out[b, h, i, r] = np.nan
        elif length * scale <= TINY_NORM:
            out[b, h, i, r] = 0
        else:
            out[b, h, i, r] = out[b, h, i, r] / largest / math.sqrt(length2)


@helper
def finish_rows(out, keep, spoiled, b, h, first, last, scale, normalize):
    """The last touch to a block of rows: zeros for masked queries, NaN where a key or the query was
    not finite (``spoiled``).
    """
    for i in range(first, last):
        if not keep[b, h, i]:
            out[b, h, i, :] = 0
        elif spoiled[b, h, 0] or spoiled[b, h, 1 + i]:
            out[b, h, i, :] = np.nan
        elif normalize:
            normalize_row(out, b, h, i, scale)
        else:
            finish_row(out, b, h, i, scale)


@cache
def _finish_kernel(dtype: Any) -> Any:
    """`finish_rows` without normalization, for results that are summed elsewhere. A task is (head,
    block of rows).
    """

    @kernel(
        types.void(types.intp, types.intp, output_array(dtype, 4), input_array(types.uint8, 3), input_array(types.uint8, 3), types.float64)
    )
    def finish(first, last, out, keep, spoiled, scale):
        n = out.shape[2]
        blocks = (n + SMALL_QUERY_BLOCK - 1) // SMALL_QUERY_BLOCK
        for task in range(first, last):
            head, turn = divmod(task, blocks)
            b, h = divmod(head, out.shape[1])
            stop = min((turn + 1) * SMALL_QUERY_BLOCK, n)
            finish_rows(out, keep, spoiled, b, h, turn * SMALL_QUERY_BLOCK, stop, out.dtype.type(scale), False)

    return finish


def finish(out: Array, keep: Array, spoiled: Array, scale: float, num_threads: int | None) -> None:
    """``out (batch, heads, n, d_v)`` times ``scale``, in place; zeros in masked rows, NaN in
    spoiled ones and for infinities.
    """
    run = _finish_kernel(from_dtype(out.dtype))
    share(
        out.shape[0] * out.shape[1] * -(-out.shape[2] // SMALL_QUERY_BLOCK),
        lambda first, last: run(first, last, out, keep, spoiled, scale),
        num_threads=num_threads,
        cost=float(out.size),
    )


@cache
def _scatter_kernel(dtype: Any) -> Any:
    """Tables of the parts ``part0 ... part0 + parts - 1`` of the heads from ``head0`` on, from
    stored codes.

    A task is (head, ``together`` parts, piece of the keys). Reads ``n (m code bytes + d_v)``
    entries, adds ``n m d_v`` times into cache.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(types.int32, 4),
            input_array(dtype, 4),
            input_array(types.uint8, 3),
            output_array(dtype, 1),
            *([types.intp] * 7),
        )
    )
    def scatter(first, last, key_code, value, keep, tables, head0, part0, parts, together, per, splits, table_size):
        n, num_hash = key_code.shape[2], key_code.shape[3]
        codes, places = aligned(per * LANES, np.int32), np.empty(per, np.intp)
        for task in range(first, last):
            head, part1, split = task_of(task, parts, together, splits)
            b, h = divmod(head0 + head, key_code.shape[1])
            begin, end = n * split // splits, n * (split + 1) // splits
            for block in range(begin, max(end, begin + 1), KEY_BLOCK):
                stop = min(block + KEY_BLOCK, end)
                for part in range(part1, min(part1 + together, parts)):
                    hash0 = (part0 + part) * per
                    count = min(per, num_hash - hash0)
                    start = ((head * parts + part) * splits + split) * per * table_size
                    if block == begin:
                        clear(tables, start, count * table_size)
                    for i in range(block, stop, LANES):
                        load_codes(codes, key_code, b, h, i, hash0, count, stop)
                        scatter_tile(tables, start, table_size, codes, places, count, True, value, keep, b, h, i, stop)

    return scatter


@helper
def task_of(task, parts, together, splits):
    """Number of the head, first part, and piece of the keys of a scatter task."""
    slot, split = divmod(task, splits)
    head, turn = divmod(slot, (parts + together - 1) // together)
    return head, turn * together, split


@helper
def load_codes(codes, stored, b, h, i, hash0, count, stop):
    """``count`` codes of up to 16 rows, from ``stored (batch, heads, n, m)`` to
    ``codes[c * 16 + t]``.
    """
    for t in range(min(LANES, stop - i)):
        for c in range(count):
            codes[c * LANES + t] = stored[b, h, i + t, hash0 + c]


@cache
def _merge_kernel(dtype: Any) -> Any:
    """The tables of the pieces of one part, added up into the first piece's, in order."""

    @kernel(types.void(types.intp, types.intp, output_array(dtype, 1), types.intp, types.intp))
    def merge(first, last, tables, splits, part_size):
        for slot in range(first, last):
            start = slot * splits * part_size
            for split in range(1, splits):
                piece = start + split * part_size
                for r in range(part_size):
                    tables[start + r] += tables[piece + r]

    return merge


@cache
def _gather_kernel(dtype: Any) -> Any:
    """Output rows from the tables, from stored codes. A task is (head, block of queries). Reads
    ``n m d_v`` entries of the tables.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            input_array(dtype, 1),
            output_array(dtype, 4),
            input_array(types.uint8, 3),
            types.boolean,
            *([types.intp] * 7),
        )
    )
    def gather(first, last, query_code, keep, tables, out, spoiled, normalize, head0, part0, parts, block, per, splits, table_size):
        n, num_hash = query_code.shape[2], query_code.shape[3]
        codes, places = aligned(per * LANES, np.int32), np.empty(per, np.intp)
        blocks = (n + block - 1) // block
        for task in range(first, last):
            head, turn = divmod(task, blocks)
            b, h = divmod(head0 + head, query_code.shape[1])
            stop = min((turn + 1) * block, n)
            for part in range(parts):
                hash0 = (part0 + part) * per
                count = min(per, num_hash - hash0)
                start = (head * parts + part) * splits * per * table_size
                for i in range(turn * block, stop, LANES):
                    load_codes(codes, query_code, b, h, i, hash0, count, stop)
                    gather_tile(tables, start, table_size, codes, places, count, True, out, keep, hash0 == 0, b, h, i)
            if (part0 + parts) * per >= num_hash:
                finish_rows(out, keep, spoiled, b, h, turn * block, stop, out.dtype.type(1 / num_hash), normalize)

    return gather


def accumulate(
    shape: Plan,
    out: Array,
    n_k: int,
    num_hash: int,
    scatter: Callable[..., object],
    gather: Callable[..., object],
    *,
    num_threads: int | None,
) -> None:
    """Both rounds, for as many heads and parts at a time as the plan says.

    ``scatter(first, last, tables, head0, part0, parts, together)`` does a range of tasks of one
    group, ``together`` parts to a task; ``gather(first, last, tables, head0, part0, parts, block)``
    likewise, ``block`` queries to a task.
    """
    batch, num_heads, n_q, d_v = out.shape
    heads_in_all = batch * num_heads
    head_work = num_hash * (d_v + 64)
    part_size = shape.per * shape.table_size
    if shape.by_head:

        def do_heads(first: int, last: int) -> None:
            tables = aligned_empty(shape.entries, out.dtype)
            for head in range(first, last):
                for part0 in range(0, shape.parts, shape.parts_at_once):
                    parts = min(shape.parts_at_once, shape.parts - part0)
                    scatter(0, 1, tables, head, part0, parts, parts)
                    gather(0, -(-n_q // QUERY_BLOCK), tables, head, part0, parts, QUERY_BLOCK)

        cost = heads_in_all * (head_work * (n_q + n_k) + shape.parts * part_size)
        share(heads_in_all, do_heads, num_threads=num_threads, cost=cost)
        return
    tables = aligned_empty(shape.entries, out.dtype)
    merge = _merge_kernel(from_dtype(out.dtype))
    for head0 in range(0, heads_in_all, shape.heads_at_once):
        heads_now = min(shape.heads_at_once, heads_in_all - head0)
        for part0 in range(0, shape.parts, shape.parts_at_once):
            parts = min(shape.parts_at_once, shape.parts - part0)
            slots = heads_now * parts
            group = (tables, head0, part0, parts)
            share(
                slots * shape.splits,
                lambda first, last, group=group: scatter(first, last, *group, 1),  # type: ignore[misc]
                num_threads=num_threads,
                cost=heads_now * head_work * n_k + slots * part_size,
            )
            if shape.splits > 1:
                share(
                    slots,
                    lambda first, last: merge(first, last, tables, shape.splits, part_size),
                    num_threads=num_threads,
                    cost=slots * shape.splits * part_size,
                )
            share(
                heads_now * -(-n_q // SMALL_QUERY_BLOCK),
                lambda first, last, group=group: gather(first, last, *group, SMALL_QUERY_BLOCK),  # type: ignore[misc]
                num_threads=num_threads,
                cost=heads_now * head_work * n_q,
            )


def dense_tables_fit(capacity: int, n_k: int) -> bool:
    """Whether a table of all buckets costs no more than the keys do; else the occupied buckets are
    numbered first.
    """
    return capacity <= 4 * n_k


@cache
def _relabel_kernel() -> Any:
    """Number the occupied buckets of each (head, hash) from 1 on, in the order in which keys first
    meet them; 0 is the empty bucket.

    A hash map with open addressing, at most half full. ``slots`` holds the code plus one, or 0 for
    a free place. A code out of range meets nobody.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(types.int32, 4),
            input_array(types.int32, 4),
            input_array(types.uint8, 3),
            output_array(types.int32, 4),
            output_array(types.int32, 4),
            types.intp,
        )
    )
    def relabel(first, last, query_code, key_code, keep, query_label, key_label, capacity):
        n_k, num_hash = key_code.shape[2], key_code.shape[3]
        size = 4
        while size < 2 * n_k:
            size *= 2
        slots, labels = np.empty(size, np.int64), np.empty(size, np.int32)
        for task in range(first, last):
            head, c = divmod(task, num_hash)
            b, h = divmod(head, key_code.shape[1])
            slots[:] = 0
            occupied = 0
            for i in range(n_k):
                if keep[b, h, i] and 0 <= key_code[b, h, i, c] < capacity:
                    place = find_slot(slots, key_code[b, h, i, c])
                    if slots[place] == 0:
                        occupied += 1
                        slots[place], labels[place] = np.int64(key_code[b, h, i, c]) + 1, occupied
                    key_label[b, h, i, c] = labels[place]
                else:
                    key_label[b, h, i, c] = 0
            for i in range(query_code.shape[2]):
                place = find_slot(slots, query_code[b, h, i, c])
                query_label[b, h, i, c] = labels[place] if slots[place] != 0 else 0

    return relabel


@helper
def find_slot(slots, code):
    """The place of this code, or the free place where it belongs."""
    place = (np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
    last = np.uint64(len(slots) - 1)
    place = place & last
    while slots[place] != 0 and slots[place] != np.int64(code) + 1:
        place = (place + np.uint64(1)) & last
    return place


def relabeled(query_code: Array, key_code: Array, keep: Array, capacity: int, num_threads: int | None) -> tuple[Array, Array]:
    """Codes ``(batch, heads, n, m)`` as labels of occupied buckets, ``0 ... n_k``; nobody is in
    bucket 0.
    """
    query_label, key_label = np.empty(query_code.shape, np.int32), np.empty(key_code.shape, np.int32)
    batch, num_heads, _, num_hash = key_code.shape
    run = _relabel_kernel()
    share(
        batch * num_heads * num_hash,
        lambda first, last: run(first, last, query_code, key_code, keep, query_label, key_label, capacity),
        num_threads=num_threads,
        cost=10.0 * (query_code.size + key_code.size),
    )
    return query_label, key_label


def lsh_cumulation(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    spoiled: Array | None = None,
    normalize: bool = False,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.lsh_cumulation_tables`.

    Working memory: tables of 32 MiB (`TABLE_BYTES`), or the tables of eight hashes, ``8 c d_v``
    numbers with ``c = min(hashtable_capacity, 4 n_k)``, where that is more; and labels the size of
    the codes where ``hashtable_capacity > 4 n_k``.

    ``spoiled`` and ``normalize`` are for attention: uint8 ``(batch, heads, 1 + n_q)`` that marks a
    head (at 0) and queries (from 1) whose rows must be NaN, and whether rows are scaled to unit
    length.
    """
    dtype = working_dtype(value)
    query_code, key_code, v = heads(query_hash_code), heads(key_hash_code), rows(value, dtype)
    keep_query, keep_key = kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[2:]
    if not dense_tables_fit(hashtable_capacity, n_k):
        query_code, key_code = relabeled(query_code, key_code, keep_key, hashtable_capacity, num_threads)
        hashtable_capacity = n_k + 1
    if spoiled is None:
        spoiled = np.broadcast_to(np.zeros(1, np.uint8), (batch, num_heads, 1 + n_q))
    out = np.empty((batch, num_heads, n_q, d_v), dtype)
    shape = plan(out.shape, n_k, num_hash, min(PART, num_hash), hashtable_capacity * d_v, out.itemsize, num_threads)
    numba_type = from_dtype(out.dtype)
    scatter, gather = _scatter_kernel(numba_type), _gather_kernel(numba_type)
    cut = (shape.per, shape.splits, shape.table_size)
    accumulate(
        shape,
        out,
        n_k,
        num_hash,
        lambda first, last, tables, *group: scatter(first, last, key_code, v, keep_key, tables, *group, *cut),
        lambda first, last, tables, *group: gather(first, last, query_code, keep_query, tables, out, spoiled, normalize, *group, *cut),
        num_threads=num_threads,
    )
    return out.reshape(*query_hash_code.shape[:-1], d_v).astype(value.dtype, copy=False)
