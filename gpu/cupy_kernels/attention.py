"""YOSO attention as a whole, from the kernels of its parts and those in `attention.cu`.

The equation stands in `yoso_core.reference.yoso_attention`.
"""

from collections.abc import Callable

import numpy as np

from yoso_core.gpu.cupy_kernels import layout
from yoso_core.gpu.cupy_kernels.cumulation import lsh_cumulation_shared_table, lsh_cumulation_sorted_buckets
from yoso_core.gpu.cupy_kernels.expectation import expectation_attention_blocked
from yoso_core.gpu.cupy_kernels.hashing import fast_hash_warp_per_vector, hyperplane_hash_thread_per_code
from yoso_core.gpu.device import Array, CudaKernel, Device

_WARPS = 8


def _kernel(name: str, x: Array) -> CudaKernel:
    return CudaKernel("attention.cu", name, layout.value_define(x))


def _find_spoiled(device: Device, x: Array, mask: Array | None, *, by_row: bool) -> Array:
    """Which rows, as uint8, or which heads, as int32, are not finite; among the heads only rows that are kept count."""
    flat = layout.heads(device, x)
    heads, n, dim = flat.shape
    rows = device.empty((heads, n), np.uint8) if by_row else None
    found = rows if rows is not None else device.zeros((heads,), np.int32)
    if flat.size:
        device.launch(
            _kernel("find_spoiled", x),
            (layout.ceil_div(heads * n, _WARPS),),
            (32 * _WARPS,),
            (flat, mask, rows, None if by_row else found, np.int64(heads * n), np.int64(n), np.int32(dim)),
        )
    return found


def _attend(
    device: Device,
    cumulate: Callable[..., Array],
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int,
    hash_code_len: int,
    use_expectation: bool,
    signs: Array | None,
    planes: Array | None,
    query_mask: Array | None,
    key_mask: Array | None,
    normalize_output: bool,
) -> Array:
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    accumulator = layout.accumulator(value)
    query_spoiled = head_spoiled = None
    keep_query = layout.mask_bytes(device, query_mask, query.shape[:-1])
    if use_expectation:
        sums = expectation_attention_blocked(device, query, key, value, hash_code_len, **masks, out_dtype=accumulator)
    else:
        if signs is not None:
            query_code, key_code = (fast_hash_warp_per_vector(device, x, signs, num_hash, hash_code_len) for x in (query, key))
        elif planes is not None:
            query_code, key_code = (hyperplane_hash_thread_per_code(device, x, planes, num_hash, hash_code_len) for x in (query, key))
        else:
            raise ValueError("signs: sampling needs signs or planes")
        sums = cumulate(device, query_code, key_code, value, 1 << hash_code_len, **masks, out_dtype=accumulator)
        query_spoiled = _find_spoiled(device, query, None, by_row=True)
        head_spoiled = _find_spoiled(device, key, layout.mask_bytes(device, key_mask, key.shape[:-1]), by_row=False)
    out = device.empty(sums.shape, value.dtype)
    if out.size:
        rows, value_dim = layout.count(out.shape[:-1]), out.shape[-1]
        device.launch(
            _kernel("finish_attention", value),
            (layout.ceil_div(rows, _WARPS),),
            (32 * _WARPS,),
            (
                sums,
                keep_query,
                query_spoiled,
                head_spoiled,
                out,
                np.int64(rows),
                np.int64(out.shape[-2]),
                np.int32(value_dim),
                np.int32(normalize_output),
            ),
        )
    return out


def yoso_attention_shared_table(device: Device, query: Array, key: Array, value: Array, **options: object) -> Array:
    """Hash by `warp_per_vector`, cumulate by `shared_table`, normalise. Raises `DoesNotFit` where no column fits into shared memory."""
    return _attend(device, lsh_cumulation_shared_table, query, key, value, **options)  # type: ignore[arg-type]


def yoso_attention_sorted_buckets(device: Device, query: Array, key: Array, value: Array, **options: object) -> Array:
    """Hash by `warp_per_vector`, cumulate by `sorted_buckets`, normalise: any ``hash_code_len``."""
    return _attend(device, lsh_cumulation_sorted_buckets, query, key, value, **options)  # type: ignore[arg-type]
