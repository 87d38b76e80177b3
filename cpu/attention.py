"""Sampled YOSO attention in one go: hash a tile, use its codes, forget them.

`yoso_core.cpu.cumulation` explains the two rounds. Here their kernels make the codes on the spot: a
tile of 16 vectors is rotated for the part at hand, its sign bits are packed, and the 16 rows are
scattered or gathered while the codes are in registers and first-level cache.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import (
    KEY_BLOCK,
    TABLE_BYTES,
    accumulate,
    clear,
    dense_tables_fit,
    finish_rows,
    gather_tile,
    lsh_cumulation,
    plan,
    scatter_tile,
    task_of,
)
from yoso_core.cpu.expectation import expectation_attention
from yoso_core.cpu.hashing import check_dim, fast_hash, hyperplane_hash, spread_signs
from yoso_core.cpu.lanes import LANES
from yoso_core.cpu.tiles import aligned, load_rotated, pack
from yoso_core.cpu.views import Array, input_array, kept, output_array, rows, working_dtype
from yoso_core.reference.hashing import hash_layout


@helper
def hash_tile(tile, dim, codes, finite, x, signs, b, h, i, part, count, hash_code_len):
    """``count`` codes of one part for up to 16 rows of ``x[b, h, i:]``. Returns whether ``finite``
    says anything of interest.
    """
    look = load_rotated(tile, dim, finite, x, signs, b, h, i, part)
    pack(tile, codes, count, hash_code_len)
    return look


@cache
def _scatter_kernel(dim: int, dtype: Any) -> Any:
    """As `cumulation._scatter_kernel`, with codes hashed from the keys. A task is (head,
    ``together`` parts, piece of the keys).

    Reads ``n (d + d_v)`` entries of keys and values; rotates in ``3 n D log2 D`` additions; adds
    ``n d_v`` entries to a table in cache for every hash.
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            input_array(dtype, 5),
            input_array(dtype, 4),
            input_array(types.uint8, 3),
            output_array(types.uint8, 3),
            output_array(dtype, 1),
            *([types.intp] * 9),
        )
    )
    def scatter(
        first,
        last,
        key,
        signs,
        value,
        keep,
        spoiled,
        tables,
        head0,
        part0,
        parts,
        together,
        num_hash,
        hash_code_len,
        per,
        splits,
        table_size,
    ):
        n = key.shape[2]
        tile = aligned(dim * LANES, key.dtype)
        codes, places = aligned(per * LANES, np.int32), np.empty(per, np.intp)
        finite = np.ones(LANES, np.uint8)
        for task in range(first, last):
            head, part1, split = task_of(task, parts, together, splits)
            b, h = divmod(head0 + head, key.shape[1])
            begin, end = n * split // splits, n * (split + 1) // splits
            for block in range(begin, max(end, begin + 1), KEY_BLOCK):
                stop = min(block + KEY_BLOCK, end)
                for part in range(part1, min(part1 + together, parts)):
                    count = min(per, num_hash - (part0 + part) * per)
                    start = ((head * parts + part) * splits + split) * per * table_size
                    if block == begin:
                        clear(tables, start, count * table_size)
                    for i in range(block, stop, LANES):
                        if hash_tile(tile, dim, codes, finite, key, signs, b, h, i, part0 + part, count, hash_code_len):
                            for t in range(min(LANES, stop - i)):
                                if keep[b, h, i + t] and not finite[t]:
                                    spoiled[b, h, 0] = 1
                        scatter_tile(tables, start, table_size, codes, places, count, False, value, keep, b, h, i, stop)

    return scatter


@cache
def _gather_kernel(dim: int, dtype: Any) -> Any:
    """As `cumulation._gather_kernel`, with codes hashed from the queries. A task is (head, block of
    queries).
    """

    @kernel(
        types.void(
            types.intp,
            types.intp,
            input_array(dtype, 4),
            input_array(dtype, 5),
            input_array(types.uint8, 3),
            output_array(types.uint8, 3),
            output_array(dtype, 1),
            output_array(dtype, 4),
            types.boolean,
            *([types.intp] * 9),
        )
    )
    def gather(
        first,
        last,
        query,
        signs,
        keep,
        spoiled,
        tables,
        out,
        normalize,
        head0,
        part0,
        parts,
        block,
        num_hash,
        hash_code_len,
        per,
        splits,
        table_size,
    ):
        n = query.shape[2]
        tile = aligned(dim * LANES, query.dtype)
        codes, places = aligned(per * LANES, np.int32), np.empty(per, np.intp)
        finite = np.ones(LANES, np.uint8)
        blocks = (n + block - 1) // block
        for task in range(first, last):
            head, turn = divmod(task, blocks)
            b, h = divmod(head0 + head, query.shape[1])
            stop = min((turn + 1) * block, n)
            for part in range(part0, part0 + parts):
                count = min(per, num_hash - part * per)
                start = (head * parts + part - part0) * splits * per * table_size
                for i in range(turn * block, stop, LANES):
                    if hash_tile(tile, dim, codes, finite, query, signs, b, h, i, part, count, hash_code_len):
                        for t in range(min(LANES, stop - i)):
                            spoiled[b, h, 1 + i + t] = 1 - finite[t]
                    gather_tile(tables, start, table_size, codes, places, count, False, out, keep, part == 0, b, h, i)
            if (part0 + parts) * per >= num_hash:
                scale = out.dtype.type(1 / num_hash)
                finish_rows(out, keep, spoiled, b, h, turn * block, stop, scale, normalize)

    return gather


def yoso_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int = 32,
    hash_code_len: int = 8,
    use_expectation: bool = False,
    signs: Array | None = None,
    planes: Array | None = None,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize_output: bool = True,
    num_threads: int | None = None,
) -> Array:
    """See `yoso_core.reference.yoso_attention`.

    Working memory: tables of 32 MiB (`TABLE_BYTES`) at most, whatever ``n``. Codes are stored,
    ``4 m (n_q + n_k)`` bytes a head, with planes, where ``2**tau > 4 n_k`` (then their labels too),
    where ``tau > D``, and where the tables of one part would pass `TABLE_BYTES`; the table of one
    hash then takes ``min(2**tau, 4 n_k) d_v`` numbers, eight of them at a time.
    """
    if use_expectation:
        return expectation_attention(
            query,
            key,
            value,
            hash_code_len,
            query_mask=query_mask,
            key_mask=key_mask,
            normalize=normalize_output,
            num_threads=num_threads,
        )
    dtype = np.promote_types(working_dtype(query), working_dtype(value))
    q, k, v = rows(query, dtype), rows(key, dtype), rows(value, dtype)
    batch, num_heads, n_q, dim = q.shape
    n_k, d_v = v.shape[2:]
    capacity = 1 << hash_code_len
    layout = hash_layout(num_hash, hash_code_len, dim)
    if signs is not None:
        check_dim("query", layout.padded_dim)
    per = min(layout.codes_per_part, num_hash)
    spoiled = np.zeros((batch, num_heads, 1 + n_q), np.uint8)
    fused = per > 0 and dense_tables_fit(capacity, n_k) and per * capacity * d_v * v.itemsize <= TABLE_BYTES
    if signs is None or not fused:
        if signs is not None:
            codes = [fast_hash(x, signs, num_hash, hash_code_len, num_threads=num_threads) for x in (query, key)]
        else:
            assert planes is not None  # the face draws signs where neither is given
            codes = [hyperplane_hash(x, planes, num_hash, hash_code_len, num_threads=num_threads) for x in (query, key)]
        keep = kept(key_mask, key.shape[:-1])
        spoiled[:, :, 0] = (keep & ~np.isfinite(k).all(axis=-1)).any(axis=-1)
        spoiled[:, :, 1:] = ~np.isfinite(q).all(axis=-1)
        return lsh_cumulation(
            codes[0],
            codes[1],
            value,
            capacity,
            query_mask=query_mask,
            key_mask=key_mask,
            spoiled=spoiled,
            normalize=normalize_output,
            num_threads=num_threads,
        )
    keep_query, keep_key = kept(query_mask, query.shape[:-1]), kept(key_mask, key.shape[:-1])
    spread = spread_signs(signs, query.shape[:-2], dtype)
    out = np.empty((batch, num_heads, n_q, d_v), dtype)
    numba_type = from_dtype(np.dtype(dtype))
    scatter, gather = _scatter_kernel(layout.padded_dim, numba_type), _gather_kernel(layout.padded_dim, numba_type)
    shape = plan(out.shape, n_k, num_hash, per, capacity * d_v, out.itemsize, num_threads)
    cut = (num_hash, hash_code_len, shape.per, shape.splits, shape.table_size)
    accumulate(
        shape,
        out,
        n_k,
        num_hash,
        lambda first, last, tables, *group: scatter(first, last, k, spread, v, keep_key, spoiled, tables, *group, *cut),
        lambda first, last, tables, *group: gather(
            first, last, q, spread, keep_query, spoiled, tables, out, normalize_output, *group, *cut
        ),
        num_threads=num_threads,
    )
    return out.reshape(*query.shape[:-1], d_v).astype(value.dtype, copy=False)
