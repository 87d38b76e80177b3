"""Bernoulli cumulation by tables. The equation stands in
`yoso_core.reference.lsh_cumulation_pairs`.

A *column* is the part of a table that belongs to one hash and one value dim: a number for every
bucket. Keys add their values to the buckets of their codes, then queries read the buckets of
theirs, and add up what they find over the hashes.
"""

import math
from typing import Any

import numpy as np
from numba import cuda

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, DoesNotFit
from yoso_core.gpu.numba_kernels import arrays

THREADS = 256
_DIMS = 32
_SECTOR_BYTES = 32


@cuda.jit
def add_keys_to_table(key_hash_code, value, keep_key, table, first_dim):
    """``table[head, h, code_h(k_j), c] += v_j[first_dim + c]``: the paper's scatter.

    key_hash_code ``(heads, n_k, num_hash)``, value ``(heads, n_k, d_v)``, keep_key
    ``(heads, n_k)``; table ``(heads, num_hash, buckets, dims)``, zeros at first.

    *A block* takes as many keys of one head as it has rows, and the value dims of the table. *A
    thread* takes one dim of one key, through all hashes. Neighbors add to neighbors in the table,
    but keys of other threads may be adding to the same bucket: the addition is atomic. *Bytes*: the
    codes and these value dims once, and for each key and hash ``dims`` sums read and written.
    *Deterministic*: no, atomics come in any order, and float sums depend on it.
    """
    head, c = cuda.blockIdx.y, cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + c
    if key >= value.shape[1] or dim >= value.shape[2] or keep_key[head, key] == 0:
        return
    v = value[head, key, dim]
    for h in range(table.shape[1]):
        code = key_hash_code[head, key, h]
        if 0 <= code < table.shape[2]:
            cuda.atomic.add(table, (head, h, code, c), v)


@cuda.jit
def read_table(query_hash_code, keep_query, table, out, first_dim, one_over_m):
    """``out_i[first_dim + c] = 1/m sum_h table[head, h, code_h(q_i), c]``: the paper's gather.

    query_hash_code ``(heads, n_q, num_hash)``, keep_query ``(heads, n_q)``, out
    ``(heads, n_q, d_v)``; the table as in `add_keys_to_table`.

    *A block* takes as many queries of one head as it has rows. *A thread* takes one dim of one
    query, and writes it once. *Bytes*: the codes once, ``dims`` table entries for each query and
    hash, the result once. *Deterministic*: yes, for a given table.
    """
    head, c = cuda.blockIdx.y, cuda.threadIdx.x
    query = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + c
    if query >= out.shape[1] or dim >= out.shape[2]:
        return
    total = out.dtype.type(0)
    if keep_query[head, query] != 0:
        for h in range(table.shape[1]):
            code = query_hash_code[head, query, h]
            if 0 <= code < table.shape[2]:
                total += table[head, h, code, c]
    total *= one_over_m
    out[head, query, dim] = total if math.isfinite(total) else math.nan


@cuda.jit
def cumulate_in_shared_table(
    query_hash_code, key_hash_code, value, keep_query, keep_key, out, hashtable_capacity, hashes_at_once, dims_at_once, one_over_m
):
    """The whole cumulation for some value dims of one head, with its table in shared memory and
    without atomics.

    Arrays as in `add_keys_to_table` and `read_table`; ``out`` holds zeros at first, and is added
    to, some hashes at a time.

    *A block* takes ``dims_at_once`` value dims of one head, and ``hashes_at_once`` hashes at a
    time, each in three steps with a barrier after each: clear the table, let the keys add, let the
    queries read. *Shared memory*: the table, ``hashtable_capacity`` rows of one number for each
    column. Threads with neighboring columns then work in neighboring banks, whatever their rows. *A
    thread* owns a column while keys add: it goes through all keys in order, and nobody else writes
    there. Then it takes (query, dim) pairs in turn. *Bytes*: the codes once for each block of dims,
    the values once for each group of hashes, the result twice for each group. *Deterministic*: yes.
    Keys come in order, hashes come in order, however many are done at a time.
    """
    table = cuda.shared.array(0, value.dtype)
    head, first_dim = cuda.blockIdx.x, cuda.blockIdx.y * dims_at_once
    thread, threads = cuda.threadIdx.x, cuda.blockDim.x
    num_hash = key_hash_code.shape[2]
    dims = min(dims_at_once, value.shape[2] - first_dim)

    for first_hash in range(0, num_hash, hashes_at_once):
        hashes = min(hashes_at_once, num_hash - first_hash)
        columns = hashes * dims

        for i in range(thread, hashtable_capacity * columns, threads):
            table[i] = 0
        cuda.syncthreads()

        for column in range(thread, columns, threads):
            h, dim = first_hash + column // dims, first_dim + column % dims
            for key in range(value.shape[1]):
                code = key_hash_code[head, key, h]
                if keep_key[head, key] != 0 and 0 <= code < hashtable_capacity:
                    table[code * columns + column] += value[head, key, dim]
        cuda.syncthreads()

        for i in range(thread, out.shape[1] * dims, threads):
            query, c = i // dims, i % dims
            if keep_query[head, query] != 0:
                total = out[head, query, first_dim + c]
                for h in range(hashes):
                    code = query_hash_code[head, query, first_hash + h]
                    if 0 <= code < hashtable_capacity:
                        total += table[code * columns + h * dims + c]
                if first_hash + hashes == num_hash:
                    total *= one_over_m
                    if not math.isfinite(total):
                        total = out.dtype.type(math.nan)
                out[head, query, first_dim + c] = total
        cuda.syncthreads()


def table_cut(device: Device, heads: int, num_hash: int, capacity: int, value_dim: int, dtype: Any) -> tuple[int, int]:
    """How many heads, and of these how many value dims, have their tables in global memory at one
    time.

    32 dims, as in the paper, or fewer where even one head's tables of 32 would not fit. Raises
    `DoesNotFit` where one dim does not.
    """
    column = num_hash * capacity * np.dtype(dtype).itemsize
    if column > device.max_table:
        raise DoesNotFit(
            f"hashtable_capacity: {num_hash} hashes of {capacity} buckets take {column:,} bytes for one value dim of one head, more than "
            f"the {device.max_table:,} allowed here; the variants sorted_buckets and sorted_pairs of the CUDA C++ kernels take any"
        )
    dims = min(_DIMS, value_dim, device.max_table // column)
    return min(heads, layout.MAX_GRID_YZ, device.max_table // (column * dims)), dims


def lsh_cumulation_global_table(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """The paper's algorithm: tables of all hashes in global memory, 32 value dims at a time. Raises
    `DoesNotFit` where they do not fit.
    """
    query_code, key_code = layout.heads(device, query_hash_code), layout.heads(device, key_hash_code)
    v = arrays.computed(device, value)
    keep_query = arrays.kept(device, query_mask, query_hash_code.shape[:-1])
    keep_key = arrays.kept(device, key_mask, key_hash_code.shape[:-1])
    heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[1:]
    out = device.zeros((heads, n_q, d_v), v.dtype)
    if out.size and n_k:
        heads_at_once, dims = table_cut(device, heads, num_hash, hashtable_capacity, d_v, v.dtype)
        rows = THREADS // dims
        tables = device.empty((heads_at_once, num_hash, hashtable_capacity, dims), v.dtype)
        one_over_m = v.dtype.type(1 / num_hash)
        for first_head in range(0, heads, heads_at_once):
            part = slice(first_head, min(first_head + heads_at_once, heads))
            table = tables[: part.stop - part.start]
            for first_dim in range(0, d_v, dims):
                table[...] = 0
                device.launch(
                    add_keys_to_table,
                    (layout.ceil_div(n_k, rows), table.shape[0]),
                    (dims, rows),
                    (key_code[part], v[part], keep_key[part], table, np.int64(first_dim)),
                )
                device.launch(
                    read_table,
                    (layout.ceil_div(n_q, rows), table.shape[0]),
                    (dims, rows),
                    (query_code[part], keep_query[part], table, out[part], np.int64(first_dim), one_over_m),
                )
    return arrays.rounded(device, out, (*query_hash_code.shape[:-1], d_v), value.dtype)


def lsh_cumulation_shared_table(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """Tables in shared memory, a column to a thread: `cumulate_in_shared_table`. Raises
    `DoesNotFit` where not even one column fits.
    """
    query_code, key_code = layout.heads(device, query_hash_code), layout.heads(device, key_hash_code)
    v = arrays.computed(device, value)
    keep_query = arrays.kept(device, query_mask, query_hash_code.shape[:-1])
    keep_key = arrays.kept(device, key_mask, key_hash_code.shape[:-1])
    heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[1:]
    out = device.zeros((heads, n_q, d_v), v.dtype)
    if out.size and n_k:
        column = hashtable_capacity * v.dtype.itemsize
        columns = device.max_shared // column
        if columns == 0:
            raise DoesNotFit(
                f"hashtable_capacity: a column of {hashtable_capacity} buckets takes {column:,} bytes of shared memory, a block here has "
                f"{device.max_shared:,}; the variant global_table takes more, sorted_buckets of the CUDA C++ kernels any"
            )
        dims = min(_SECTOR_BYTES // v.dtype.itemsize, d_v, columns)  # a sector is the least that memory hands out
        hashes = min(num_hash, columns // dims)
        numbers = (np.int64(hashtable_capacity), np.int64(hashes), np.int64(dims), v.dtype.type(1 / num_hash))
        device.launch(
            cumulate_in_shared_table,
            (heads, layout.ceil_div(d_v, dims)),
            (min(THREADS, max(hashes, n_q) * dims),),
            (query_code, key_code, v, keep_query, keep_key, out, *numbers),
            shared=column * hashes * dims,
        )
    return arrays.rounded(device, out, (*query_hash_code.shape[:-1], d_v), value.dtype)
