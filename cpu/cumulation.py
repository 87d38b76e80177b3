"""Bernoulli cumulation by tables: a table per hash, small enough to stay in cache.

`yoso_core.cpu.rounds` explains the two rounds, `yoso_core.cpu.codes` where their codes come from.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.codes import Codes, StoredCodes
from yoso_core.cpu.compiling import kernel
from yoso_core.cpu.finishing import Rows, empty_rows, finish_rows
from yoso_core.cpu.lanes import LANES
from yoso_core.cpu.neighbors import read_neighbors
from yoso_core.cpu.precision import rounded, rows, stored_rows, working_dtype
from yoso_core.cpu.relabeling import dense_tables_fit, relabeled
from yoso_core.cpu.rounds import KEY_BLOCK, Cut, Group, Sizes, accumulate, clear_piece, make_plan, part_of, scatter_task
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.smoothing import smoothing_step
from yoso_core.cpu.steps import TableStep, table_at
from yoso_core.cpu.tables import find_buckets, gather_row, gather_squares, scatter_row, squares_of
from yoso_core.cpu.views import Array, heads, input_array, kept, output_array
from yoso_core.reference.smoothing import whole_table_pays


@cache
def _scatter_kernel(dtype: Any, stored_value: Any, code: Any, stored: bool) -> Any:
    """The tables of one group, from codes ``(heads, m, n)`` of its heads. A task is (head,
    ``together`` parts, piece of the keys), a step of it a block of its keys. The first one clears
    the tables, as long as they fit in the cache; otherwise ``clears`` steps before it do.

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
        key_code=input_array(code, 3),
        value=input_array(stored_value, 4),
        keep=input_array(types.uint8, 3),
    )
    def scatter(
        first, last, tables, head0, part0, parts, together, clears, step0, step1, num_hash, per, splits, table_size, key_code, value, keep
    ):
        n = value.shape[2]
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        buckets = aligned(cut.per * LANES, np.intp)
        for task in range(first, last):
            slot, number0, split = scatter_task(task, group, together, cut)
            head = divmod(group.head0 + slot, value.shape[1])
            begin, end = n * split // cut.splits, n * (split + 1) // cut.splits
            for step in range(step0, step1):
                block = begin + (step - clears) * KEY_BLOCK
                stop = min(block + KEY_BLOCK, end) if step >= clears else block
                for number in range(number0, min(number0 + together, group.parts)):
                    part = part_of(cut, group, slot, number, split)
                    if step < max(1, clears):
                        clear_piece(tables, part, step, max(1, clears))
                    for j in range(block, stop, LANES):
                        count = min(LANES, stop - j)
                        find_buckets(buckets, part, key_code, slot, j, count, value.shape[3], stored)
                        for t in range(count):
                            if keep[(*head, j + t)]:
                                scatter_row(tables, buckets, t, part.hashes, value, head, j + t, stored)

    return scatter


@cache
def _gather_kernel(dtype: Any, code: Any, stored: bool, spread: bool) -> Any:
    """Output rows from the tables of one group. A task is (head, block of queries). Reads
    ``n m d_v`` entries of the tables. With ``spread``, a constant, ``errors`` become the relative
    standard errors of the rows; ``squares`` is their scratch, ``row_squares`` holds the squares of
    every row of the tables, and ``units`` is as in `yoso_core.cpu.finishing.units`. Heads of
    ``out`` may share their memory.
    """

    @kernel(
        tables=input_array(dtype, 1),
        row_squares=input_array(dtype, 1),
        head0=types.intp,
        part0=types.intp,
        parts=types.intp,
        block=types.intp,
        num_hash=types.intp,
        per=types.intp,
        splits=types.intp,
        table_size=types.intp,
        query_code=input_array(code, 3),
        keep=input_array(types.uint8, 3),
        nonfinite=input_array(types.uint8, 3),
        out=types.Array(dtype, 4, "A"),
        lengths=output_array(dtype, 3),
        normalize=types.boolean,
        units=input_array(dtype, 2),
        squares=output_array(dtype, 3),
        errors=output_array(types.float32, 3),
    )
    def gather(
        first,
        last,
        tables,
        row_squares,
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
        units,
        squares,
        errors,
    ):
        n = out.shape[2]
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        buckets = aligned(cut.per * LANES, np.intp)
        blocks = (n + block - 1) // block
        for task in range(first, last):
            slot, turn = divmod(task, blocks)
            head = divmod(group.head0 + slot, out.shape[1])
            begin, stop = turn * block, min((turn + 1) * block, n)
            for number in range(group.parts):
                part = part_of(cut, group, slot, number, 0)
                fresh = part.hash0 == 0
                for tile in range(begin, stop, LANES):
                    count = min(LANES, stop - tile)
                    find_buckets(buckets, part, query_code, slot, tile, count, out.shape[3], stored)
                    for i in range(tile, tile + count):
                        if keep[(*head, i)]:
                            gather_row(tables, buckets, i - tile, part.hashes, fresh, out, head, i, stored)
                            if spread:
                                found = gather_squares(row_squares, buckets, i - tile, part.hashes if out.shape[3] > 0 else 0, stored)
                                squares[(*head, i)] = found if fresh else squares[(*head, i)] + found
                    if part.hash0 + part.hashes == cut.num_hash:
                        finish_rows(
                            out=out,
                            lengths=lengths,
                            errors=errors,
                            squares=squares,
                            units=units,
                            keep=keep,
                            nonfinite=nonfinite,
                            head=head,
                            begin=tile,
                            end=tile + count,
                            num_hash=cut.num_hash,
                            normalize=normalize,
                            spread=spread,
                        )

    return gather


@cache
def _squares_kernel(dtype: Any) -> Any:
    """The squares of every row of the tables of one group, in the unit of its head, summed: what
    the errors of its readers need. A task is the table of a hash; for the layout see
    `yoso_core.cpu.steps.TableStep`.
    """

    @kernel(
        tables=input_array(dtype, 1),
        row_squares=output_array(dtype, 1),
        units=input_array(dtype, 2),
        head0=types.intp,
        part0=types.intp,
        parts=types.intp,
        per=types.intp,
        num_hash=types.intp,
        part_size=types.intp,
        count=types.intp,
        d_v=types.intp,
    )
    def add_squares(first, last, tables, row_squares, units, head0, part0, parts, per, num_hash, part_size, count, d_v):
        for task in range(first, last):
            head_index, start, there = table_at(task, part0, parts, per, num_hash, part_size, count * d_v)
            if there:
                unit = units[divmod(head0 + head_index, units.shape[1])]
                for row in range(count):
                    row_squares[start // d_v + row] = squares_of(tables, start + row * d_v, d_v, unit)

    return add_squares


def _squares_step(count: int, d_v: int, units: Array) -> TableStep:
    """Tables of ``count`` rows."""
    work = partial(_squares_kernel(from_dtype(units.dtype)), units=units, count=count, d_v=d_v)
    return TableStep(work, tasks=1, cost=float(count * d_v))


def tables_pay(capacity: int, oversample: int, n_q: int, n_k: int) -> bool:
    """Whether tables of all buckets are the way: they cost no more than the keys do, and with
    oversampling to smooth them costs less than to read the neighbors of every query's bucket.
    """
    if oversample == 0:
        return dense_tables_fit(capacity, n_k)
    return dense_tables_fit(capacity, max(n_q, n_k)) and whole_table_pays(capacity.bit_length() - 1, oversample, n_q)


def by_tables(
    codes: tuple[Codes, Codes],
    code: Any,
    value: Array,
    hashtable_capacity: int,
    oversample: int,
    *,
    num_hash: int,
    stored: bool,
    dtype: Any,
    keep: tuple[Array, Array],
    nonfinite: Array,
    normalize: bool,
    spread: bool,
    num_threads: int | None,
) -> Rows:
    """From codes of queries and keys in the integer type ``code``; ``keep`` likewise. ``stored`` as
    in `yoso_core.cpu.tables.find_buckets`. The ``value`` (`stored_rows`) is added up in ``dtype``;
    rows are in that, or rounded to what the value is stored in.
    """
    n_k, d_v = value.shape[2:]
    sizes = Sizes(value.shape[0], value.shape[1], keep[0].shape[2], n_k, d_v)
    plan = make_plan(sizes, dtype, num_hash=num_hash, capacity=hashtable_capacity, num_threads=num_threads)
    found = empty_rows(value, dtype, value.dtype if plan.by_head else dtype, keep, spread, num_threads)
    working, code_type = from_dtype(np.dtype(dtype)), from_dtype(np.dtype(code))
    accumulate(
        plan,
        sizes,
        codes,
        partial(_scatter_kernel(working, from_dtype(value.dtype), code_type, stored), value=value, keep=keep[1], **plan.cut._asdict()),
        partial(
            _gather_kernel(working, code_type, stored, spread),
            keep=keep[0],
            nonfinite=nonfinite,
            normalize=normalize,
            **{name: array for name, array in found._asdict().items() if name != "out"},
            **plan.cut._asdict(),
        ),
        found.out,
        smoothing=smoothing_step(hashtable_capacity, d_v, oversample, dtype) if oversample else None,
        squares=_squares_step(hashtable_capacity, d_v, found.units) if spread else None,
        num_threads=num_threads,
    )
    return found


def by_stored_codes(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    oversample: int,
    *,
    dtype: Any,
    keep: tuple[Array, Array],
    nonfinite: Array,
    normalize: bool,
    spread: bool,
    num_threads: int | None,
) -> Rows:
    """`by_tables` for int32 codes ``(batch, heads, n, m)`` that may be out of range, whatever the
    capacity: where whole tables do not pay, occupied buckets alone have rows.
    """
    query_code, key_code = query_hash_code, key_hash_code
    rest: dict[str, Any] = {"keep": keep, "nonfinite": nonfinite, "normalize": normalize, "spread": spread, "num_threads": num_threads}
    if not tables_pay(hashtable_capacity, oversample, query_code.shape[2], key_code.shape[2]):
        if oversample:
            return read_neighbors(query_code, key_code, rows(value, dtype, num_threads), hashtable_capacity, oversample, **rest)
        query_code, key_code = relabeled(query_code, key_code, *keep, hashtable_capacity, num_threads)
        hashtable_capacity = key_code.shape[2] + 1
    codes = StoredCodes(query_code), StoredCodes(key_code)
    num_hash = query_code.shape[3]
    return by_tables(codes, np.int32, value, hashtable_capacity, oversample, num_hash=num_hash, stored=True, dtype=dtype, **rest)


def lsh_cumulation(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.lsh_cumulation_tables`.

    Working memory: tables of 32 MiB (`yoso_core.cpu.rounds.TABLE_BYTES`), or the tables of four
    hashes, ``4 c d_v`` numbers with ``c = min(hashtable_capacity, 4 n_k)``, where that is more; and
    labels the size of the codes where ``hashtable_capacity > 4 n_k``.
    """
    query_code, key_code = heads(query_hash_code), heads(key_hash_code)
    batch, num_heads, n_q, _ = query_code.shape
    dtype = working_dtype(value)
    found = by_stored_codes(
        query_code,
        key_code,
        stored_rows(value, dtype),
        hashtable_capacity,
        oversample,
        dtype=dtype,
        keep=(kept(query_mask, query_hash_code.shape[:-1]), kept(key_mask, key_hash_code.shape[:-1])),
        nonfinite=np.broadcast_to(np.zeros(1, np.uint8), (batch, num_heads, 1 + n_q)),
        normalize=False,
        spread=False,
        num_threads=num_threads,
    )
    return rounded(found.out.reshape(*query_hash_code.shape[:-1], value.shape[-1]), value.dtype, num_threads)
