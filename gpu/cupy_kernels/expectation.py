"""Launcher of expected attention. The kernels are in `expectation.cu`, the equation is in
`yoso_core.reference.expectation_attention`.
"""

from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, CudaKernel, Device

_ROWS = 8
_QUERIES = 64
_THREADS = 256


def unit_rows(device: Device, vectors: Array) -> Array:
    """Rows scaled to unit length, as contiguous ``(heads, n, d)`` in the dtype of their sums.
    Non-finite rows become NaN.

    >>> from yoso_core.gpu.emulator import Emulator
    >>> unit_rows(Emulator(), np.array([[3, 4], [0, 0]], np.float32))
    array([[[0.6, 0.8],
            [0. , 0. ]]], dtype=float32)
    """
    flat = layout.heads(device, vectors)
    unit = device.empty(flat.shape, layout.accumulator(flat))
    if unit.size:
        rows = flat.shape[0] * flat.shape[1]
        device.launch(
            CudaKernel("expectation.cu", "normalize_rows", layout.value_define(flat)),
            grid=(layout.ceil_div(rows, _ROWS),),
            block=(32, _ROWS),
            args={"vectors": flat, "unit": unit, "rows": np.int64(rows), "dim": np.int32(flat.shape[2])},
        )
    return unit


def expectation_attention_blocked(
    device: Device,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    out_dtype: Any = None,
) -> Array:
    """A block of the kernel `expectation` takes 64 queries and walks over the keys. Working memory:
    unit copies of query and key.

    ``out_dtype`` : the dtype of the result, if not that of ``value``.
    """
    out = device.empty((*query.shape[:-1], value.shape[-1]), value.dtype if out_dtype is None else out_dtype)
    if out.size == 0:
        return out
    unit_query, unit_key, values = unit_rows(device, query), unit_rows(device, key), layout.heads(device, value)
    keep_query, keep_key = layout.mask_bytes(device, query_mask, query.shape[:-1]), layout.mask_bytes(device, key_mask, key.shape[:-1])
    (heads, n_q, dim), (n_k, value_dim) = unit_query.shape, values.shape[1:]
    flat_out = out.reshape(heads, n_q, value_dim)
    columns = 32 if layout.accumulator(value) == np.float64 else 64
    kernel = CudaKernel("expectation.cu", "expectation", (*layout.value_define(values), ("OUT", layout.c_type(out))))
    for part in layout.grid_slices(heads):
        device.launch(
            kernel,
            grid=(layout.ceil_div(n_q, _QUERIES), layout.ceil_div(value_dim, columns), part.stop - part.start),
            block=(_THREADS,),
            args={
                "unit_query": unit_query[part],
                "unit_key": unit_key[part],
                "value": values[part],
                "query_mask": layout.part_of(keep_query, part),
                "key_mask": layout.part_of(keep_key, part),
                "out": flat_out[part],
                **layout.int32s(n_q=n_q, n_k=n_k, dim=dim, value_dim=value_dim, hash_code_len=hash_code_len),
            },
        )
    return out
