"""Bernoulli cumulation by tables. The equation is in `yoso_core.reference.lsh_cumulation_pairs`.

A *column* is the part of a table that belongs to one hash and one value dim: a number for every
bucket. Keys add their values to the buckets of their codes. Then queries read the buckets of their
codes, and add them up over the hashes.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, DoesNotFit
from yoso_core.gpu.numba_kernels import arrays
from yoso_core.gpu.numba_kernels.smoothing import smooth

THREADS = 256
_DIMS = 32
_SECTOR_BYTES = 32


@cuda.jit
def add_keys_to_table(key_hash_code, value, keep_key, table, first_dim):
    """``table[head, hash, code_hash(k_j), offset] += v_j[first_dim + offset]``: the paper's
    scatter.

    key_hash_code ``(heads, n_k, num_hash)``, value ``(heads, n_k, d_v)``, keep_key
    ``(heads, n_k)``; table ``(heads, num_hash, buckets, dims)``, zeros at first.

    *A block* takes as many keys of one head as it has rows, and the value dims of the table. *A
    thread* takes one dim of one key, and all hashes. Neighboring threads add to neighboring entries
    of the table. Other threads may add to the same bucket, so the addition is atomic. *Bytes*: the
    codes and these value dims once, and for each key and hash ``dims`` sums read and written.
    *Deterministic*: no, the atomic additions come in any order.
    """
    head, offset = cuda.blockIdx.y, cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + offset
    if key >= value.shape[1] or dim >= value.shape[2] or keep_key[head, key] == 0:
        return
    v = value[head, key, dim]
    for hash in range(table.shape[1]):
        code = key_hash_code[head, key, hash]
        if 0 <= code < table.shape[2]:
            cuda.atomic.add(table, (head, hash, code, offset), v)


@cuda.jit
def read_table(query_hash_code, keep_query, table, out, first_dim, one_over_m):
    """``out_i[first_dim + offset] = 1/m sum_hash table[head, hash, code_hash(q_i), offset]``: the
    paper's gather.

    query_hash_code ``(heads, n_q, num_hash)``, keep_query ``(heads, n_q)``, out
    ``(heads, n_q, d_v)``; the table as in `add_keys_to_table`.

    *A block* takes as many queries of one head as it has rows. *A thread* takes one dim of one
    query, and writes it once. *Bytes*: the codes once, ``dims`` table entries for each query and
    hash, the result once. *Deterministic*: yes, for a given table.
    """
    head, offset = cuda.blockIdx.y, cuda.threadIdx.x
    query = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + offset
    if query >= out.shape[1] or dim >= out.shape[2]:
        return
    total = out.dtype.type(0)
    if keep_query[head, query] != 0:
        for hash in range(table.shape[1]):
            code = query_hash_code[head, query, hash]
            if 0 <= code < table.shape[2]:
                total += table[head, hash, code, offset]
    total *= one_over_m
    out[head, query, dim] = total if math.isfinite(total) else math.nan


@cuda.jit
def cumulate_in_shared_table(
    query_hash_code, key_hash_code, value, keep_query, keep_key, out, hashtable_capacity, hashes_at_once, dims_at_once, one_over_m
):
    """The whole cumulation for some value dims of one head, with its table in shared memory and
    without atomics.

    Arrays as in `add_keys_to_table` and `read_table`. ``out`` holds zeros at first, and sums are
    added to it, some hashes at a time.

    *A block* takes ``dims_at_once`` value dims of one head, and ``hashes_at_once`` hashes at a
    time. For these it has three steps with a barrier after each: clear the table, let the keys add,
    let the queries read. *Shared memory*: the table, ``hashtable_capacity`` rows with one number
    for each column. So threads with neighboring columns work in neighboring banks, whatever their
    rows. *A thread* owns a column while keys add: it goes through all keys in order, and no other
    thread writes there. Then it takes pairs of a query and a dim in turn. *Bytes*: the codes once
    for each block of dims, the values once for each group of hashes, the result twice for each
    group. *Deterministic*: yes. Keys and hashes come in order, however many are done at a time.
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
            hash, dim = first_hash + column // dims, first_dim + column % dims
            for key in range(value.shape[1]):
                code = key_hash_code[head, key, hash]
                if keep_key[head, key] != 0 and 0 <= code < hashtable_capacity:
                    table[code * columns + column] += value[head, key, dim]
        cuda.syncthreads()

        for i in range(thread, out.shape[1] * dims, threads):
            query, offset = i // dims, i % dims
            if keep_query[head, query] != 0:
                total = out[head, query, first_dim + offset]
                for hash in range(hashes):
                    code = query_hash_code[head, query, first_hash + hash]
                    if 0 <= code < hashtable_capacity:
                        total += table[code * columns + hash * dims + offset]
                if first_hash + hashes == num_hash:
                    total *= one_over_m
                    if not math.isfinite(total):
                        total = out.dtype.type(math.nan)
                out[head, query, first_dim + offset] = total
        cuda.syncthreads()


class TableCut(NamedTuple):
    """The part of the work whose tables are in global memory at a time."""

    heads: int
    dims: int
    """Value dims of each of these heads."""


def table_cut(device: Device, heads: int, num_hash: int, capacity: int, value_dim: int, dtype: Any, oversample: int = 0) -> TableCut:
    """How many heads and value dims have their tables in global memory at a time; with
    oversampling, ``oversample + 1`` tables for each hash.

    There are 32 dims, as in the paper, or fewer if the tables of one head do not fit with 32.
    Raises `DoesNotFit` if they do not fit with one dim.

    >>> from yoso_core.gpu.emulator.stepper import Stepper
    >>> table_cut(Stepper(), heads=16, num_hash=32, capacity=256, value_dim=64, dtype=np.float32)
    TableCut(heads=16, dims=32)
    """
    column = (oversample + 1) * num_hash * capacity * np.dtype(dtype).itemsize
    if column > device.max_table:
        raise DoesNotFit(
            f"hashtable_capacity: {num_hash} hashes of {capacity} buckets take {column:,} bytes for one value dim of one head, more than "
            f"the {device.max_table:,} allowed here; the variants sorted_buckets and sorted_pairs of the CUDA C++ kernels take any"
        )
    dims = min(_DIMS, value_dim, device.max_table // column)
    return TableCut(min(heads, layout.MAX_GRID_YZ, device.max_table // (column * dims)), dims)


def lsh_cumulation_global_table(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
) -> Array:
    """The paper's algorithm: tables of all hashes in global memory, 32 value dims at a time; with
    oversampling they are smoothed there. Raises `DoesNotFit` if they need more memory than the
    device allows.
    """
    query_code, key_code = layout.heads(device, query_hash_code), layout.heads(device, key_hash_code)
    v = arrays.computed(device, value)
    keep_query = arrays.kept(device, query_mask, query_hash_code.shape[:-1])
    keep_key = arrays.kept(device, key_mask, key_hash_code.shape[:-1])
    heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[1:]
    out = device.zeros((heads, n_q, d_v), v.dtype)
    if out.size and n_k:
        heads_at_once, dims = table_cut(device, heads, num_hash, hashtable_capacity, d_v, v.dtype, oversample)
        rows = THREADS // dims
        tables = device.empty(((oversample + 1) * heads_at_once * num_hash, hashtable_capacity, dims), v.dtype)
        one_over_m = v.dtype.type(1 / num_hash)
        for first_head in range(0, heads, heads_at_once):
            part = slice(first_head, min(first_head + heads_at_once, heads))
            count = (part.stop - part.start) * num_hash
            spheres = tables[: (oversample + 1) * count].reshape(oversample + 1, count, hashtable_capacity, dims)
            table = spheres[0].reshape(-1, num_hash, hashtable_capacity, dims)
            for first_dim in range(0, d_v, dims):
                spheres[...] = 0
                device.launch(
                    add_keys_to_table,
                    grid=(layout.ceil_div(n_k, rows), table.shape[0]),
                    block=(dims, rows),
                    args={
                        "key_hash_code": key_code[part],
                        "value": v[part],
                        "keep_key": keep_key[part],
                        "table": table,
                        "first_dim": np.int64(first_dim),
                    },
                )
                if oversample:
                    smooth(device, spheres, spheres[0])
                device.launch(
                    read_table,
                    grid=(layout.ceil_div(n_q, rows), table.shape[0]),
                    block=(dims, rows),
                    args={
                        "query_hash_code": query_code[part],
                        "keep_query": keep_query[part],
                        "table": table,
                        "out": out[part],
                        "first_dim": np.int64(first_dim),
                        "one_over_m": one_over_m,
                    },
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
    oversample: int = 0,
) -> Array:
    """Tables in shared memory, one column to a thread: the kernel `cumulate_in_shared_table`.
    Raises `DoesNotFit` if not even one column fits, and with oversampling, which it lacks.
    """
    query_code, key_code = layout.heads(device, query_hash_code), layout.heads(device, key_hash_code)
    v = arrays.computed(device, value)
    heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[1:]
    out = device.zeros((heads, n_q, d_v), v.dtype)
    if out.size and n_k:
        if oversample:
            raise DoesNotFit(
                f"oversample: got {oversample}, but this kernel does not smooth its tables in shared memory; use the variant global_table"
            )
        column = hashtable_capacity * v.dtype.itemsize
        columns = device.max_shared // column
        if columns == 0:
            raise DoesNotFit(
                f"hashtable_capacity: a column of {hashtable_capacity} buckets takes {column:,} bytes of shared memory, a block here has "
                f"{device.max_shared:,}; the variant global_table takes more, sorted_buckets of the CUDA C++ kernels any"
            )
        dims = min(_SECTOR_BYTES // v.dtype.itemsize, d_v, columns)  # memory moves whole sectors
        hashes = min(num_hash, columns // dims)
        device.launch(
            cumulate_in_shared_table,
            grid=(heads, layout.ceil_div(d_v, dims)),
            block=(min(THREADS, max(hashes, n_q) * dims),),
            args={
                "query_hash_code": query_code,
                "key_hash_code": key_code,
                "value": v,
                "keep_query": arrays.kept(device, query_mask, query_hash_code.shape[:-1]),
                "keep_key": arrays.kept(device, key_mask, key_hash_code.shape[:-1]),
                "out": out,
                "hashtable_capacity": np.int64(hashtable_capacity),
                "hashes_at_once": np.int64(hashes),
                "dims_at_once": np.int64(dims),
                "one_over_m": v.dtype.type(1 / num_hash),
            },
            shared=column * hashes * dims,
        )
    return arrays.rounded(device, out, (*query_hash_code.shape[:-1], d_v), value.dtype)
