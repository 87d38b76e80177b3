"""Launchers of the gradients of attention. The kernels are in `gradients.cu`.

The equations are in `yoso_core.reference.expectation_attention_backward` and
`yoso_core.reference.lsh_attention_backward`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.cupy_kernels.cumulation import lsh_cumulation_shared_table, lsh_cumulation_sorted_buckets
from yoso_core.gpu.cupy_kernels.expectation import unit_rows
from yoso_core.gpu.cupy_kernels.sorting import SortedCodes, sort_codes
from yoso_core.gpu.cupy_kernels.weighted import lsh_weighted_cumulation_outer_products
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit
from yoso_core.reference.expectation import Grad

Gradients = tuple[Array, Array, Array]

_ROWS = 32
_THREADS = 128
_WARPS = 8


@dataclass(frozen=True)
class _Side:
    """One side of the pairs as the kernels take it, ``(heads, n, ...)``: queries, with the
    gradients of their outputs as companions, or keys, with their values.
    """

    vectors: Array
    unit: Array
    companion: Array
    mask: Array | None
    code: Array | None

    @property
    def rows(self) -> int:
        return int(self.vectors.shape[0] * self.vectors.shape[1])


def _side(device: Device, vectors: Array, companion: Array, mask: Array | None, code: Array | None = None) -> _Side:
    flat = layout.heads(device, vectors)
    return _Side(
        vectors=flat,
        unit=unit_rows(device, flat),
        companion=layout.heads(device, companion),
        mask=layout.mask_bytes(device, mask, vectors.shape[:-1]),
        code=None if code is None else layout.heads(device, code),
    )


def _grad_unit(device: Device, side: _Side, other: _Side, grad_companion: Array | None, hash_code_len: int, grad: Grad) -> Array:
    """The gradient by the unit rows of a side, by the kernel `gradient_rows`. It also fills
    ``grad_companion``, if that is given.
    """
    heads, n, dim = side.unit.shape
    companion_dim = side.companion.shape[2]
    grad_unit = device.empty(side.unit.shape, side.unit.dtype)
    columns = 32 if side.unit.dtype == np.float64 else 64
    widest = max(dim, 0 if grad_companion is None else companion_dim)
    for part in layout.grid_slices(heads) if grad_unit.size else ():
        device.launch(
            CudaKernel("gradients.cu", "gradient_rows", layout.value_define(side.companion)),
            grid=(layout.ceil_div(n, _ROWS), layout.ceil_div(widest, columns), part.stop - part.start),
            block=(_THREADS,),
            args={
                "unit": side.unit[part],
                "companion": side.companion[part],
                "code": layout.part_of(side.code, part),
                "mask": layout.part_of(side.mask, part),
                "other_unit": other.unit[part],
                "other_companion": other.companion[part],
                "other_code": layout.part_of(other.code, part),
                "other_mask": layout.part_of(other.mask, part),
                "grad_unit": grad_unit[part],
                "grad_companion": layout.part_of(grad_companion, part),
                **layout.int32s(
                    n=n,
                    n_other=other.unit.shape[1],
                    dim=dim,
                    companion_dim=companion_dim,
                    num_hash=0 if side.code is None else side.code.shape[2],
                    hash_code_len=hash_code_len,
                    exact=grad == "exact",
                ),
            },
        )
    return grad_unit


def _nonfinite_heads(device: Device, side: _Side) -> Array:
    """int32 ``(heads,)``: 1 if a kept row of the side, or its companion, is non-finite."""
    nonfinite = device.zeros(side.unit.shape[:1], np.int32)
    if side.rows:
        device.launch(
            CudaKernel("gradients.cu", "scan_nonfinite_heads", layout.value_define(side.companion)),
            grid=(layout.ceil_div(side.rows, _WARPS),),
            block=(32 * _WARPS,),
            args={
                "unit": side.unit,
                "companion": side.companion,
                "mask": side.mask,
                "head_nonfinite": nonfinite,
                "num_rows": np.int64(side.rows),
                "rows_per_head": np.int64(side.unit.shape[1]),
                "dim": np.int32(side.unit.shape[2]),
                "companion_dim": np.int32(side.companion.shape[2]),
            },
        )
    return nonfinite


def _l2_normalize_backward(
    device: Device, side: _Side, grad_unit: Array, like: Array, factor: float = 1.0, head_nonfinite: Array | None = None
) -> Array:
    """The gradient by the caller's vectors, ``like`` them, from the gradient by their unit rows,
    which is ``factor * grad_unit``.
    """
    out = device.empty(like.shape, like.dtype)
    if out.size:
        device.launch(
            CudaKernel("gradients.cu", "l2_normalize_backward", layout.value_define(side.vectors)),
            grid=(layout.ceil_div(side.rows, _WARPS),),
            block=(32 * _WARPS,),
            args={
                "vectors": side.vectors,
                "grad_unit": grad_unit,
                "mask": side.mask,
                "head_nonfinite": head_nonfinite,
                "out": out.reshape(side.vectors.shape),
                "num_rows": np.int64(side.rows),
                "rows_per_head": np.int64(side.vectors.shape[1]),
                "dim": np.int32(like.shape[-1]),
                "factor": layout.accumulator(like)(factor),
            },
        )
    return out


def _by_pairs(
    device: Device,
    queries: _Side,
    keys: _Side,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    grad: Grad,
    grad_value: Array | None = None,
) -> Gradients:
    """All three gradients from all pairs. The weights are the collisions of the codes if there are
    codes, else the expectation. ``grad_value`` : that by the values, if it has other weights.
    """
    grad_companion = None
    if grad_value is None:
        grad_value = device.empty(value.shape, value.dtype)
        grad_companion = grad_value.reshape(keys.companion.shape)
    grad_unit_query = _grad_unit(device, queries, keys, None, hash_code_len, grad)
    grad_unit_key = _grad_unit(device, keys, queries, grad_companion, hash_code_len, grad)
    return (
        _l2_normalize_backward(device, queries, grad_unit_query, query),
        _l2_normalize_backward(device, keys, grad_unit_key, key),
        grad_value,
    )


def expectation_attention_backward_blocked(
    device: Device,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Gradients:
    """A block of the kernel `gradient_rows` takes 32 rows and walks over the other side: once for
    the queries, once for the keys. Repeatable bit by bit.

    Working memory: unit copies of query and key, and the gradients by them.
    """
    queries, keys = _side(device, query, grad_out, query_mask), _side(device, key, value, key_mask)
    return _by_pairs(device, queries, keys, query, key, value, hash_code_len, grad)


def lsh_attention_backward_outer_products(
    device: Device,
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    query_hash_code: Array,
    key_hash_code: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    backward_num_hash: int | None = None,
) -> Gradients:
    """``grad="lower_bound"``: three cumulations, linear in ``n_q + n_k``. ``grad="exact"``: all
    pairs in blocks, with their collisions counted. Repeatable bit by bit.

    With the lower bound, the gradient by the unit queries is a cumulation of the unit keys with the
    weights ``grad_out`` and ``value``. The gradient by the unit keys is the same with the sides
    exchanged. The gradient by the values is a cumulation of ``grad_out`` without weights.

    With oversampling, or with fewer hashes for the vectors, only the last one takes the codes as
    they are: it is then such a cumulation for both kinds of gradient.
    """
    given = query_hash_code, key_hash_code
    few = query_hash_code.shape[-1] if backward_num_hash is None else backward_num_hash
    query_code, key_code = (_plain_codes(device, code, hash_code_len, oversample, few) for code in given)
    as_given = oversample == 0 and few == query_hash_code.shape[-1]
    queries = _side(device, query, grad_out, query_mask, query_code)
    keys = _side(device, key, value, key_mask, key_code)
    masks = query_mask, key_mask
    if grad == "exact":
        grad_value = None if as_given else _grad_value(device, *given, grad_out, *masks, hash_code_len, oversample, None)
        return _by_pairs(device, queries, keys, query, key, value, hash_code_len, grad, grad_value)
    capacity = 1 << hash_code_len
    sorted_query, sorted_key = (sort_codes(device, side.code, capacity, side.mask) for side in (queries, keys))
    g, v = (layout.widened(x) for x in (grad_out, value))  # the kernel takes them in the dtype of the unit rows
    grad_unit_query = lsh_weighted_cumulation_outer_products(
        device,
        query_hash_code=query_code,
        query_weight=g,
        key_hash_code=key_code,
        key_weight=v,
        value=keys.unit.reshape(key.shape),
        hashtable_capacity=capacity,
        query_mask=query_mask,
        key_mask=key_mask,
        sorted_codes=(sorted_query, sorted_key),
    )
    grad_unit_key = lsh_weighted_cumulation_outer_products(
        device,
        query_hash_code=key_code,
        query_weight=v,
        key_hash_code=query_code,
        key_weight=g,
        value=queries.unit.reshape(query.shape),
        hashtable_capacity=capacity,
        query_mask=key_mask,
        key_mask=query_mask,
        sorted_codes=(sorted_key, sorted_query),
    )
    grad_value = _grad_value(device, *given, grad_out, *masks, hash_code_len, oversample, sorted_query if as_given else None)
    half = hash_code_len / 2
    return (
        _l2_normalize_backward(device, queries, grad_unit_query, query, half, _nonfinite_heads(device, keys)),
        _l2_normalize_backward(device, keys, grad_unit_key, key, half, _nonfinite_heads(device, queries)),
        grad_value,
    )


def _plain_codes(device: Device, hash_code: Array, hash_code_len: int, oversample: int, num_hash: int) -> Array:
    """The lowest ``hash_code_len`` bits of the first ``num_hash`` codes. A code that is out of
    range stays so.
    """
    code = hash_code if num_hash == hash_code.shape[-1] else hash_code[..., :num_hash]
    if oversample == 0:
        return code
    in_range = code >> (hash_code_len + oversample) == 0
    return device.xp.where(in_range, code & np.int32((1 << hash_code_len) - 1), code)


def _grad_value(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    grad_out: Array,
    query_mask: Array | None,
    key_mask: Array | None,
    hash_code_len: int,
    oversample: int,
    sorted_query: SortedCodes | None,
) -> Array:
    """The gradient by the values: the cumulation with the sides exchanged."""
    capacity = 1 << (hash_code_len + oversample)
    given = (device, key_hash_code, query_hash_code, grad_out, capacity)
    options: dict[str, Any] = {"query_mask": key_mask, "key_mask": query_mask, "oversample": oversample}
    try:
        return lsh_cumulation_shared_table(*given, **options)
    except DoesNotFit:
        return lsh_cumulation_sorted_buckets(*given, **options, sorted_codes=sorted_query)
