"""YOSO attention as a whole, from the kernels of its parts and those in `attention.cu`.

The equation is in `yoso_core.reference.yoso_attention`.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from yoso_core.gpu import layout as gpu_layout
from yoso_core.gpu.cupy_kernels.cumulation import lsh_cumulation_shared_table, lsh_cumulation_sorted_buckets
from yoso_core.gpu.cupy_kernels.expectation import expectation_attention_blocked
from yoso_core.gpu.cupy_kernels.hashing import fast_hash_warp_per_vector, hyperplane_hash_thread_per_code
from yoso_core.gpu.device import Array, CudaKernel, Device
from yoso_core.reference.hashing import Layout

_WARPS = 8
_THREADS = 256
_SCANNED_ROWS = 256
"""In a block of `scan_exponents`."""


def _kernel(name: str, value: Array, **defines: int) -> CudaKernel:
    return CudaKernel("attention.cu", name, (*gpu_layout.value_define(value), *defines.items()))


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
    layout: Layout = "chained",
    return_length: bool = False,
    oversample: int = 0,
    return_error: bool = False,
) -> Array | tuple[Array, ...]:
    masks = {"query_mask": query_mask, "key_mask": key_mask}
    accumulator = gpu_layout.accumulator(value)
    query_nonfinite = head_nonfinite = exponent = squares = errors = None
    if use_expectation:
        sums = expectation_attention_blocked(device, query, key, value, hash_code_len, **masks, out_dtype=accumulator)
    else:
        query_nonfinite, key_nonfinite = (device.empty(x.shape[:-1], np.uint8) for x in (query, key))
        bits = hash_code_len + oversample
        query_code, key_code = (
            _hash(device, x, signs, planes, num_hash, bits, layout, nonfinite)
            for x, nonfinite in ((query, query_nonfinite), (key, key_nonfinite))
        )
        cumulate = partial(cumulate, device, query_code, key_code, value, 1 << bits, **masks, oversample=oversample, out_dtype=accumulator)
        if return_error:
            exponent, errors = _exponents(device, value, key_mask), device.empty(query.shape[:-1], np.float32)
            sums, squares = cumulate(exponent=exponent)
        else:
            sums = cumulate()
        head_nonfinite = _nonfinite_heads(device, key_nonfinite, key_mask, value)
    out = device.empty(sums.shape, value.dtype)
    lengths = device.empty((*sums.shape[:-1], 1), accumulator) if return_length else None
    rows, value_dim = gpu_layout.count(out.shape[:-1]), out.shape[-1]
    if out.size or (rows and return_error):
        device.launch(
            _kernel("finish_attention", value, **({"SPREAD": 1} if return_error else {})),
            grid=(gpu_layout.ceil_div(rows, _WARPS),),
            block=(32 * _WARPS,),
            args={
                "sums": sums,
                "query_mask": gpu_layout.mask_bytes(device, query_mask, query.shape[:-1]),
                "query_nonfinite": query_nonfinite,
                "head_nonfinite": head_nonfinite,
                "out": out,
                "lengths": lengths,
                "num_rows": np.int64(rows),
                "rows_per_head": np.int64(out.shape[-2]),
                "value_dim": np.int32(value_dim),
                "normalize": np.int32(normalize_output),
                "own_squares": squares,
                "exponent": exponent,
                "errors": errors,
                "slices": np.int32(0 if squares is None else squares.shape[1]),
                "num_hash": np.int32(num_hash),
            },
        )
    asked = [x for x in (lengths, errors) if x is not None]
    return (out, *asked) if asked else out


def _hash(
    device: Device,
    x: Array,
    signs: Array | None,
    planes: Array | None,
    num_hash: int,
    hash_code_len: int,
    layout: Layout,
    nonfinite: Array,
) -> Array:
    if signs is not None:
        return fast_hash_warp_per_vector(device, x, signs, num_hash, hash_code_len, layout=layout, nonfinite=nonfinite)
    if planes is not None:
        return hyperplane_hash_thread_per_code(device, x, planes, num_hash, hash_code_len, nonfinite=nonfinite)
    raise ValueError("signs: sampling needs signs or planes")


def _nonfinite_heads(device: Device, key_nonfinite: Array, key_mask: Array | None, value: Array) -> Array:
    """int32 ``(heads,)``: 1 if a kept key of the head is non-finite."""
    heads = gpu_layout.count(key_nonfinite.shape[:-1])
    head_nonfinite = device.empty((heads,), np.int32)
    if heads:
        device.launch(
            _kernel("mark_nonfinite_heads", value),
            grid=(heads,),
            block=(_THREADS,),
            args={
                "row_nonfinite": key_nonfinite,
                "mask": gpu_layout.mask_bytes(device, key_mask, key_nonfinite.shape),
                "head_nonfinite": head_nonfinite,
                "rows_per_head": np.int32(key_nonfinite.shape[-1]),
            },
        )
    return head_nonfinite


def _exponents(device: Device, value: Array, key_mask: Array | None) -> Array:
    """int32 ``(heads,)``: of the largest kept value of each head, as `scan_exponents` stores it."""
    rows, value_dim = value.shape[-2:]
    exponent = device.zeros((gpu_layout.count(value.shape[:-2]),), np.int32)
    if value.size:
        device.launch(
            _kernel("scan_exponents", value),
            grid=(gpu_layout.ceil_div(rows, _SCANNED_ROWS) * exponent.size,),
            block=(_THREADS,),
            args={
                "value": gpu_layout.heads(device, value),
                "key_mask": gpu_layout.mask_bytes(device, key_mask, value.shape[:-1]),
                "exponent": exponent,
                **gpu_layout.int32s(rows_per_head=rows, value_dim=value_dim),
            },
        )
    return exponent


def yoso_attention_shared_table(device: Device, query: Array, key: Array, value: Array, **options: object) -> Array | tuple[Array, ...]:
    """Hash by `warp_per_vector` or `thread_per_code`, cumulate by `shared_table`, normalize. Raises
    `DoesNotFit` if not even one column of the table fits into shared memory.
    """
    return _attend(device, lsh_cumulation_shared_table, query, key, value, **options)  # type: ignore[arg-type]


def yoso_attention_sorted_buckets(device: Device, query: Array, key: Array, value: Array, **options: object) -> Array | tuple[Array, ...]:
    """Hash by `warp_per_vector` or `thread_per_code`, cumulate by `sorted_buckets`, normalize. Any
    ``hash_code_len + oversample``.
    """
    return _attend(device, lsh_cumulation_sorted_buckets, query, key, value, **options)  # type: ignore[arg-type]
