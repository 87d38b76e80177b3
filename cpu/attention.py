"""Sampled YOSO attention in one go: hash a tile, use its codes, forget them.

`yoso_core.cpu.rounds` explains the two rounds. The two kernels here make the codes on the spot: a
tile of 16 vectors is rotated for the part at hand, its sign bits are packed, and the 16 rows are
scattered or gathered while the codes are in registers and first-level cache. Those of
`yoso_core.cpu.cumulation` are their twins, loop by loop, that read stored codes.
"""

from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.cumulation import cumulate
from yoso_core.cpu.expectation import expect
from yoso_core.cpu.finishing import finish_row
from yoso_core.cpu.hashing import check_dim, fast_hash, hyperplane_hash, spread_signs
from yoso_core.cpu.lanes import LANES
from yoso_core.cpu.relabeling import dense_tables_fit
from yoso_core.cpu.rounds import KEY_BLOCK, Cut, Group, accumulate, clear_piece, is_last, make_plan, part_of, scatter_task, tables_fit
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.tables import gather_tile, scatter_tile
from yoso_core.cpu.tiles import load_rotated, pack
from yoso_core.cpu.views import Array, common_dtype, input_array, kept, output_array, rows
from yoso_core.reference.hashing import HashLayout, Layout, hash_layout


@helper
def hash_tile(tile, dim, codes, finite, x, signs, head, i, part, hash_code_len):
    """The codes of one part for up to 16 rows of ``x``, from ``x[*head, i]`` on. Returns whether
    ``finite`` was written, as in `load_rotated`.
    """
    looked_at = load_rotated(tile=tile, dim=dim, finite=finite, x=x, signs=signs, head=head, i=i, part=part.number)
    pack(tile, codes, part.hashes, hash_code_len)
    return looked_at


@cache
def _scatter_kernel(dim: int, dtype: Any) -> Any:
    """The tables of one group, with codes hashed from the keys. A task is (head, ``together``
    parts, piece of the keys), a step of it a block of its keys. The first one clears the tables, as
    long as they fit in the cache; otherwise ``clears`` steps before it do.

    Reads ``n (d + d_v)`` entries of keys and values; rotates in ``3 n D log2 D`` additions; adds
    ``n d_v`` entries to a table in cache for every hash. The list of types makes it long.
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
        hash_code_len=types.intp,
        key=input_array(dtype, 4),
        signs=input_array(dtype, 5),
        value=input_array(dtype, 4),
        keep=input_array(types.uint8, 3),
        nonfinite=output_array(types.uint8, 3),
    )
    def scatter(
        first,
        last,
        tables,
        head0,
        part0,
        parts,
        together,
        clears,
        step0,
        step1,
        num_hash,
        per,
        splits,
        table_size,
        hash_code_len,
        key,
        signs,
        value,
        keep,
        nonfinite,
    ):
        n = key.shape[2]
        tile = aligned(dim * LANES, key.dtype)
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        codes, offsets = aligned(cut.per * LANES, np.int32), np.empty(cut.per, np.intp)
        finite = np.ones(LANES, np.uint8)
        for task in range(first, last):
            head_index, number0, split = scatter_task(task, group, together, cut)
            head = divmod(group.head0 + head_index, key.shape[1])
            begin, end = n * split // cut.splits, n * (split + 1) // cut.splits
            for step in range(step0, step1):
                block = begin + (step - clears) * KEY_BLOCK
                stop = min(block + KEY_BLOCK, end) if step >= clears else block
                for number in range(number0, min(number0 + together, group.parts)):
                    part = part_of(cut, group, head_index, number, split)
                    if step < max(1, clears):
                        clear_piece(tables, part, step, max(1, clears))
                    for i in range(block, stop, LANES):
                        if hash_tile(
                            tile=tile,
                            dim=dim,
                            codes=codes,
                            finite=finite,
                            x=key,
                            signs=signs,
                            head=head,
                            i=i,
                            part=part,
                            hash_code_len=hash_code_len,
                        ):
                            for t in range(min(LANES, stop - i)):
                                if keep[(*head, i + t)] and not finite[t]:
                                    nonfinite[(*head, 0)] = 1
                        scatter_tile(
                            tables=tables,
                            part=part,
                            codes=codes,
                            offsets=offsets,
                            guarded=False,
                            value=value,
                            keep=keep,
                            head=head,
                            i=i,
                            stop=stop,
                        )

    return scatter


@cache
def _gather_kernel(dim: int, dtype: Any) -> Any:
    """Output rows from the tables of one group, with codes hashed from the queries. A task is
    (head, block of queries).
    """

    @kernel(
        tables=output_array(dtype, 1),
        head0=types.intp,
        part0=types.intp,
        parts=types.intp,
        block=types.intp,
        num_hash=types.intp,
        per=types.intp,
        splits=types.intp,
        table_size=types.intp,
        hash_code_len=types.intp,
        query=input_array(dtype, 4),
        signs=input_array(dtype, 5),
        keep=input_array(types.uint8, 3),
        nonfinite=output_array(types.uint8, 3),
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
        hash_code_len,
        query,
        signs,
        keep,
        nonfinite,
        out,
        lengths,
        normalize,
    ):
        n = query.shape[2]
        tile = aligned(dim * LANES, query.dtype)
        group, cut = Group(head0, part0, parts), Cut(num_hash, per, splits, table_size)
        codes, offsets = aligned(cut.per * LANES, np.int32), np.empty(cut.per, np.intp)
        finite = np.ones(LANES, np.uint8)
        blocks = (n + block - 1) // block
        for task in range(first, last):
            head_index, turn = divmod(task, blocks)
            head = divmod(group.head0 + head_index, query.shape[1])
            begin, stop = turn * block, min((turn + 1) * block, n)
            for number in range(group.parts):
                part = part_of(cut, group, head_index, number, 0)
                for i in range(begin, stop, LANES):
                    if hash_tile(
                        tile=tile,
                        dim=dim,
                        codes=codes,
                        finite=finite,
                        x=query,
                        signs=signs,
                        head=head,
                        i=i,
                        part=part,
                        hash_code_len=hash_code_len,
                    ):
                        for t in range(min(LANES, stop - i)):
                            nonfinite[(*head, 1 + i + t)] = 1 - finite[t]
                    gather_tile(tables=tables, part=part, codes=codes, offsets=offsets, guarded=False, out=out, keep=keep, head=head, i=i)
            if is_last(cut, group):
                scale = out.dtype.type(1 / cut.num_hash)
                for i in range(begin, stop):
                    lengths[(*head, i)] = finish_row(
                        out=out, keep=keep, nonfinite=nonfinite, head=head, i=i, scale=scale, normalize=normalize
                    )

    return gather


def _by_stored_codes(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int,
    hash_code_len: int,
    signs: Array | None,
    planes: Array | None,
    layout: Layout,
    query_mask: Array | None,
    key_mask: Array | None,
    normalize_output: bool,
    num_threads: int | None,
) -> tuple[Array, Array]:
    """All codes first, then the cumulation."""
    if signs is not None:
        codes = [fast_hash(x, signs, num_hash, hash_code_len, layout=layout, num_threads=num_threads) for x in (query, key)]
    else:
        assert planes is not None  # the face draws signs where neither is given
        codes = [hyperplane_hash(x, planes, num_hash, hash_code_len, num_threads=num_threads) for x in (query, key)]
    dtype = common_dtype(query, value)
    q, k = rows(query, dtype), rows(key, dtype)
    nonfinite = np.empty((*q.shape[:2], 1 + q.shape[2]), np.uint8)
    nonfinite[:, :, 0] = (kept(key_mask, key.shape[:-1]) & ~np.isfinite(k).all(axis=-1)).any(axis=-1)
    nonfinite[:, :, 1:] = ~np.isfinite(q).all(axis=-1)
    return cumulate(
        codes[0],
        codes[1],
        value,
        1 << hash_code_len,
        query_mask=query_mask,
        key_mask=key_mask,
        nonfinite=nonfinite,
        normalize=normalize_output,
        num_threads=num_threads,
    )


def _fused(
    query: Array,
    key: Array,
    value: Array,
    layout: HashLayout,
    *,
    num_hash: int,
    hash_code_len: int,
    signs: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    normalize_output: bool,
    num_threads: int | None,
) -> tuple[Array, Array]:
    """The two rounds with codes made on the spot."""
    dtype = common_dtype(query, value)
    q, k, v = rows(query, dtype), rows(key, dtype), rows(value, dtype)
    n_k, d_v = v.shape[2:]
    out, lengths = np.empty((*q.shape[:3], d_v), dtype), np.empty(q.shape[:3], dtype)
    plan = make_plan(
        out,
        n_k,
        num_hash=num_hash,
        per=min(layout.codes_per_part, num_hash),
        table_size=(1 << hash_code_len) * d_v,
        num_threads=num_threads,
    )
    numba_type = from_dtype(out.dtype)
    shared: dict[str, Any] = {
        **plan.cut._asdict(),
        "hash_code_len": hash_code_len,
        "signs": spread_signs(signs, query.shape[:-2], dtype),
        "nonfinite": np.zeros((*q.shape[:2], 1 + q.shape[2]), np.uint8),
    }
    accumulate(
        plan,
        out,
        n_k,
        partial(_scatter_kernel(layout.padded_dim, numba_type), key=k, value=v, keep=kept(key_mask, key.shape[:-1]), **shared),
        partial(
            _gather_kernel(layout.padded_dim, numba_type),
            query=q,
            keep=kept(query_mask, query.shape[:-1]),
            out=out,
            lengths=lengths,
            normalize=normalize_output,
            **shared,
        ),
        num_threads=num_threads,
    )
    return out.reshape(*query.shape[:-1], d_v).astype(value.dtype, copy=False), lengths.reshape(*query.shape[:-1], 1)


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
    layout: Layout = "paper",
    return_length: bool = False,
    num_threads: int | None = None,
) -> Array | tuple[Array, Array]:
    """See `yoso_core.reference.yoso_attention`.

    Working memory: tables of 32 MiB (`yoso_core.cpu.rounds.TABLE_BYTES`) at most, whatever ``n``.
    Codes are stored, ``4 m (n_q + n_k)`` bytes a head, with planes, with a chain, where
    ``2**tau > 4 n_k`` (then their labels too), where ``tau > D``, and where the tables of one part
    would pass that limit; the table of one hash then takes ``min(2**tau, 4 n_k) d_v`` numbers,
    eight of them at a time.
    """
    masks: dict[str, Any] = {"query_mask": query_mask, "key_mask": key_mask}
    options: dict[str, Any] = {
        "num_hash": num_hash,
        "hash_code_len": hash_code_len,
        "normalize_output": normalize_output,
        "num_threads": num_threads,
    }
    if use_expectation:
        found = expect(query, key, value, hash_code_len, normalize=normalize_output, num_threads=num_threads, **masks)
    elif signs is not None and layout == "paper" and (triples := _fits_fused(query, key, value, num_hash, hash_code_len)) is not None:
        found = _fused(query, key, value, triples, signs=signs, **options, **masks)
    else:
        found = _by_stored_codes(query, key, value, signs=signs, planes=planes, layout=layout, **options, **masks)
    return found if return_length else found[0]


def _fits_fused(query: Array, key: Array, value: Array, num_hash: int, hash_code_len: int) -> HashLayout | None:
    """The layout of the hash where its codes can be made on the spot; ``None`` where they must be
    stored.
    """
    layout = hash_layout(num_hash, hash_code_len, query.shape[-1])
    check_dim("query", layout.padded_dim)
    per, capacity, itemsize = min(layout.codes_per_part, num_hash), 1 << hash_code_len, np.dtype(common_dtype(query, value)).itemsize
    fits = per > 0 and dense_tables_fit(capacity, key.shape[-2]) and tables_fit(per, capacity * value.shape[-1], itemsize)
    return layout if fits else None
