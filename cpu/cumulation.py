"""Bernoulli cumulation by tables: a table per hash, small enough to stay in cache.

`yoso_core.cpu.rounds` explains the two rounds. The two kernels here read stored codes; those of
`yoso_core.cpu.attention` are their twins, loop by loop, that make the codes on the spot.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.finishing import finish_row
from yoso_core.cpu.lanes import LANES
from yoso_core.cpu.relabeling import dense_tables_fit, relabeled
from yoso_core.cpu.rounds import KEY_BLOCK, Cut, Group, accumulate, clear_piece, is_last, make_plan, part_of, scatter_task
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.tables import gather_tile, scatter_tile
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array, rows, working_dtype

PART = 8
"""Hashes to a part when codes are read from memory: eight tables of 256 buckets by 64 floats fill
half of a 1 MiB cache.
"""


@helper
def load_codes(codes, stored, head, i, part, stop):
    """The codes of one part for up to 16 rows, from ``i`` to ``stop - 1``: from
    ``stored (batch, heads, n, m)`` to ``codes[hash * 16 + t]``.
    """
    for t in range(min(LANES, stop - i)):
        for hash in range(part.hashes):
            codes[hash * LANES + t] = stored[(*head, i + t, part.hash0 + hash)]


@cache
def _scatter_kernel(dtype: Any) -> Any:
    """The tables of one group, from stored codes. A task is (head, ``together`` parts, piece of the
    keys), a step of it a block of its keys. The first one clears the tables, as long as they fit in
    the cache; otherwise ``clears`` steps before it do.

    Reads ``n (m code bytes + d_v)`` entries, adds ``n m d_v`` times into cache.
    """

    @kernel(
        tables=output_array(dtype, 1),
        head0=types.intp,
        part0=types.intp,
        parts=types.intp,
        together=types.intp,
        clears=types.intp,
        step0=types.intp,
        step1=types.intp,
        num_hash=types.intp,
        per=types.intp,
        splits=types.intp,
        table_size=types.intp,
        key_code=input_array(types.int32, 4),
        value=input_array(dtype, 4),
        keep=input_array(types.uint8, 3),
    )
    def scatter(
        first, last, tables, head0, part0, parts, together, clears, step0, step1, num_hash, per, splits, table_size, key_code, value, keep
    ):
        n = key_code.shape[2]
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        codes, offsets = aligned(cut.per * LANES, np.int32), np.empty(cut.per, np.intp)
        for task in range(first, last):
            head_index, number0, split = scatter_task(task, group, together, cut)
            head = divmod(group.head0 + head_index, key_code.shape[1])
            begin, end = n * split // cut.splits, n * (split + 1) // cut.splits
            for step in range(step0, step1):
                block = begin + (step - clears) * KEY_BLOCK
                stop = min(block + KEY_BLOCK, end) if step >= clears else block
                for number in range(number0, min(number0 + together, group.parts)):
                    part = part_of(cut, group, head_index, number, split)
                    if step < max(1, clears):
                        clear_piece(tables, part, step, max(1, clears))
                    for i in range(block, stop, LANES):
                        load_codes(codes, key_code, head, i, part, stop)
                        scatter_tile(
                            tables=tables,
                            part=part,
                            codes=codes,
                            offsets=offsets,
                            guarded=True,
                            value=value,
                            keep=keep,
                            head=head,
                            i=i,
                            stop=stop,
                        )

    return scatter


@cache
def _gather_kernel(dtype: Any) -> Any:
    """Output rows from the tables of one group, from stored codes. A task is (head, block of
    queries). Reads ``n m d_v`` entries of the tables.
    """

    @kernel(
        tables=input_array(dtype, 1),
        head0=types.intp,
        part0=types.intp,
        parts=types.intp,
        block=types.intp,
        num_hash=types.intp,
        per=types.intp,
        splits=types.intp,
        table_size=types.intp,
        query_code=input_array(types.int32, 4),
        keep=input_array(types.uint8, 3),
        nonfinite=input_array(types.uint8, 3),
        out=output_array(dtype, 4),
        lengths=output_array(dtype, 3),
        normalize=types.boolean,
    )
    def gather(
        first,
        last,
        tables,
        head0,
        part0,
        parts,
        block,
        num_hash,
        per,
        splits,
        table_size,
        query_code,
        keep,
        nonfinite,
        out,
        lengths,
        normalize,
    ):
        n = query_code.shape[2]
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        codes, offsets = aligned(cut.per * LANES, np.int32), np.empty(cut.per, np.intp)
        blocks = (n + block - 1) // block
        for task in range(first, last):
            head_index, turn = divmod(task, blocks)
            head = divmod(group.head0 + head_index, query_code.shape[1])
            begin, stop = turn * block, min((turn + 1) * block, n)
            for number in range(group.parts):
                part = part_of(cut, group, head_index, number, 0)
                for i in range(begin, stop, LANES):
                    load_codes(codes, query_code, head, i, part, stop)
                    gather_tile(tables=tables, part=part, codes=codes, offsets=offsets, guarded=True, out=out, keep=keep, head=head, i=i)
            if is_last(cut, group):
                scale = out.dtype.type(1 / cut.num_hash)
                for i in range(begin, stop):
                    lengths[(*head, i)] = finish_row(
                        out=out, keep=keep, nonfinite=nonfinite, head=head, i=i, scale=scale, normalize=normalize
                    )

    return gather


def lsh_cumulation(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.lsh_cumulation_tables`.

    Working memory: tables of 32 MiB (`yoso_core.cpu.rounds.TABLE_BYTES`), or the tables of eight
    hashes, ``8 c d_v`` numbers with ``c = min(hashtable_capacity, 4 n_k)``, where that is more; and
    labels the size of the codes where ``hashtable_capacity > 4 n_k``.
    """
    codes = query_hash_code, key_hash_code
    return cumulate(*codes, value, hashtable_capacity, query_mask=query_mask, key_mask=key_mask, num_threads=num_threads)[0]


def cumulate(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None,
    key_mask: Array | None,
    nonfinite: Array | None = None,
    normalize: bool = False,
    num_threads: int | None,
) -> tuple[Array, Array]:
    """`lsh_cumulation`, with what attention needs besides: uint8 ``nonfinite (batch, heads, 1 +
    n_q)`` marks a head (at 0) and queries (from 1) whose rows must be NaN; and with ``normalize``
    rows are scaled to unit length. Returns the rows, and the length of each before that.
    """
    dtype = working_dtype(value)
    query_code, key_code, v = heads(query_hash_code), heads(key_hash_code), rows(value, dtype)
    keep_query, keep_key = kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])
    batch, num_heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[2:]
    if not dense_tables_fit(hashtable_capacity, n_k):
        query_code, key_code = relabeled(query_code, key_code, keep_query, keep_key, hashtable_capacity, num_threads)
        hashtable_capacity = n_k + 1
    if nonfinite is None:
        nonfinite = np.broadcast_to(np.zeros(1, np.uint8), (batch, num_heads, 1 + n_q))
    out, lengths = np.empty((batch, num_heads, n_q, d_v), dtype), np.empty((batch, num_heads, n_q), dtype)
    plan = make_plan(out, n_k, num_hash=num_hash, per=min(PART, num_hash), table_size=hashtable_capacity * d_v, num_threads=num_threads)
    numba_type = from_dtype(out.dtype)
    accumulate(
        plan,
        out,
        n_k,
        partial(_scatter_kernel(numba_type), key_code=key_code, value=v, keep=keep_key, **plan.cut._asdict()),
        partial(
            _gather_kernel(numba_type),
            query_code=query_code,
            keep=keep_query,
            nonfinite=nonfinite,
            out=out,
            lengths=lengths,
            normalize=normalize,
            **plan.cut._asdict(),
        ),
        num_threads=num_threads,
    )
    leading = query_hash_code.shape[:-1]
    return out.reshape(*leading, d_v).astype(value.dtype, copy=False), lengths.reshape(*leading, 1)
