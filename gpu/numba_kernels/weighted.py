"""Weighted cumulation, weight by weight. The equation is in
`yoso_core.reference.lsh_weighted_cumulation_pairs`.

The weight of a pair is a dot product, and the query's weight leaves the sum, one coordinate at a
time: ``sum_j (a . b_j) v_j = sum_r a_r (sum_j b_jr v_j)``. So each coordinate ``r`` is a cumulation
of the values times ``b_jr``, and a query multiplies what it reads by ``a_r``. This is the paper's
first version.
"""

import math

import numpy as np
from numba import cuda

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device
from yoso_core.gpu.numba_kernels import arrays
from yoso_core.gpu.numba_kernels.cumulation import THREADS, table_cut


@cuda.jit
def add_weighted_keys_to_table(key_hash_code, key_weight, value, keep_key, table, coordinate, first_dim):
    """``table[head, hash, code_hash(k_j), offset] += w v_j[first_dim + offset]``, where ``w`` is
    ``key_weight_j[coordinate]``.

    key_weight ``(heads, n_k, d_w)``. The other arrays, and the work of blocks and threads, are as
    in `add_keys_to_table` of the unweighted cumulation.

    *Bytes*: the codes, one weight of each key and these value dims once, and for each key and hash
    ``dims`` sums read and written. *Deterministic*: no, the atomic additions come in any order.
    """
    head, offset = cuda.blockIdx.y, cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + offset
    if key >= value.shape[1] or dim >= value.shape[2] or keep_key[head, key] == 0:
        return
    v = key_weight[head, key, coordinate] * value[head, key, dim]
    for hash in range(table.shape[1]):
        code = key_hash_code[head, key, hash]
        if 0 <= code < table.shape[2]:
            cuda.atomic.add(table, (head, hash, code, offset), v)


@cuda.jit
def read_weighted_table(query_hash_code, query_weight, keep_query, table, out, coordinate, first_dim, one_over_m):
    """``out_i[first_dim + offset] += query_weight_i[coordinate] / m * total``, where ``total`` is
    ``sum_hash table[head, hash, code_hash(q_i), offset]``.

    query_weight ``(heads, n_q, d_w)``. The other arrays, and the work of blocks and threads, are as
    in `read_table` of the unweighted cumulation. ``out`` holds zeros at first. A non-finite weight
    makes its row NaN even if the query met no key, since the weight is multiplied by zero.

    *Bytes*: the codes and one weight of each query once, ``dims`` table entries for each query and
    hash, the result read and written. *Deterministic*: yes, for a given table.
    """
    head, offset = cuda.blockIdx.y, cuda.threadIdx.x
    query = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    dim = first_dim + offset
    if query >= out.shape[1] or dim >= out.shape[2] or keep_query[head, query] == 0:
        return
    total = out.dtype.type(0)
    for hash in range(table.shape[1]):
        code = query_hash_code[head, query, hash]
        if 0 <= code < table.shape[2]:
            total += table[head, hash, code, offset]
    total = out[head, query, dim] + query_weight[head, query, coordinate] * total * one_over_m
    out[head, query, dim] = total if math.isfinite(total) else math.nan


def lsh_weighted_cumulation_weight_by_weight(
    device: Device,
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """The paper's first version: a table in global memory for one coordinate of the weights at a
    time. Raises `DoesNotFit` if it needs more memory than the device allows.
    """
    query_code, key_code = layout.heads(device, query_hash_code), layout.heads(device, key_hash_code)
    a, b, v = (arrays.computed(device, x) for x in (query_weight, key_weight, value))
    keep_query = arrays.kept(device, query_mask, query_hash_code.shape[:-1])
    keep_key = arrays.kept(device, key_mask, key_hash_code.shape[:-1])
    heads, n_q, num_hash = query_code.shape
    n_k, d_v = v.shape[1:]
    out = device.zeros((heads, n_q, d_v), v.dtype)
    if out.size:
        heads_at_once, dims = table_cut(device, heads, num_hash, hashtable_capacity, d_v, v.dtype)
        rows = THREADS // dims
        tables = device.empty((heads_at_once, num_hash, hashtable_capacity, dims), v.dtype)
        one_over_m = v.dtype.type(1 / num_hash)
        for first_head in range(0, heads, heads_at_once):
            part = slice(first_head, min(first_head + heads_at_once, heads))
            table = tables[: part.stop - part.start]
            for first_dim in range(0, d_v, dims):
                for coordinate in range(a.shape[2]):
                    offsets = {"coordinate": np.int64(coordinate), "first_dim": np.int64(first_dim)}
                    table[...] = 0
                    if n_k:
                        device.launch(
                            add_weighted_keys_to_table,
                            grid=(layout.ceil_div(n_k, rows), table.shape[0]),
                            block=(dims, rows),
                            args={
                                "key_hash_code": key_code[part],
                                "key_weight": b[part],
                                "value": v[part],
                                "keep_key": keep_key[part],
                                "table": table,
                                **offsets,
                            },
                        )
                    device.launch(
                        read_weighted_table,
                        grid=(layout.ceil_div(n_q, rows), table.shape[0]),
                        block=(dims, rows),
                        args={
                            "query_hash_code": query_code[part],
                            "query_weight": a[part],
                            "keep_query": keep_query[part],
                            "table": table,
                            "out": out[part],
                            **offsets,
                            "one_over_m": one_over_m,
                        },
                    )
    return arrays.rounded(device, out, (*query_hash_code.shape[:-1], d_v), value.dtype)
