"""Launchers of the gradients of attention: the kernels in `gradients.cu`.

The equations stand in `yoso_core.reference.expectation_attention_backward` and
`yoso_core.reference.lsh_attention_backward`.
"""

from dataclasses import dataclass

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.cupy_kernels.cumulation import lsh_cumulation_shared_table, lsh_cumulation_sorted_buckets
from yoso_core.gpu.cupy_kernels.expectation import unit_rows
from yoso_core.gpu.cupy_kernels.sorting import sort_codes
from yoso_core.gpu.cupy_kernels.weighted import lsh_weighted_cumulation_outer_products
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit
from yoso_core.reference.expectation import Grad

Gradients = tuple[Array, Array, Array]

_ROWS = 32
_THREADS = 128
_WARPS = 8


@dataclass(frozen=True)
class _Side:
    """Queries with the gradients of their outputs, or keys with their values, as the kernels want
    them: ``(heads, n, ...)``.
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
        flat,
        unit_rows(device, flat),
        layout.heads(device, companion),
        layout.mask_bytes(device, mask, vectors.shape[:-1]),
        None if code is None else layout.heads(device, code),
    )


def _pull(device: Device, side: _Side, other: _Side, spread: Array | None, hash_code_len: int, grad: Grad) -> Array:
    """``pull`` of `pull_rows`, the gradient by the unit rows of a side; ``spread`` is filled where
    one is given.
    """
    heads, n, dim = side.unit.shape
    companion_dim = side.companion.shape[2]
    pull = device.empty(side.unit.shape, side.unit.dtype)
    columns = 32 if side.unit.dtype == np.float64 else 64
    widest = max(dim, 0 if spread is None else companion_dim)
    num_hash = 0 if side.code is None else side.code.shape[2]
    sizes = (n, other.unit.shape[1], dim, companion_dim, num_hash, hash_code_len, grad == "exact")
    for part in layout.grid_slices(heads) if pull.size else ():
        device.launch(
            CudaKernel("gradients.cu", "pull_rows", layout.value_define(side.companion)),
            (layout.ceil_div(n, _ROWS), layout.ceil_div(widest, columns), part.stop - part.start),
            (_THREADS,),
            (
                *(layout.part_of(x, part) for x in (side.unit, side.companion, side.code, side.mask)),
                *(layout.part_of(x, part) for x in (other.unit, other.companion, other.code, other.mask)),
                pull[part],
                layout.part_of(spread, part),
                *map(np.int32, sizes),
            ),
        )
    return pull


def _spoiled_heads(device: Device, side: _Side) -> Array:
    """int32 ``(heads,)``: 1 where a kept row of the side, or its companion, is not finite."""
    spoiled = device.zeros(side.unit.shape[:1], np.int32)
    if side.rows:
        numbers = (np.int64(side.rows), np.int64(side.unit.shape[1]), *map(np.int32, (side.unit.shape[2], side.companion.shape[2])))
        device.launch(
            CudaKernel("gradients.cu", "note_spoiled_heads", layout.value_define(side.companion)),
            (layout.ceil_div(side.rows, _WARPS),),
            (32 * _WARPS,),
            (side.unit, side.companion, side.mask, spoiled, *numbers),
        )
    return spoiled


def _through_normalization(
    device: Device, side: _Side, pull: Array, like: Array, factor: float = 1.0, head_spoiled: Array | None = None
) -> Array:
    """The gradient by the caller's vectors, ``like`` them, from that by their unit rows, which is
    ``factor * pull``.
    """
    out = device.empty(like.shape, like.dtype)
    if out.size:
        dim = like.shape[-1]
        device.launch(
            CudaKernel("gradients.cu", "through_normalization", layout.value_define(side.vectors)),
            (layout.ceil_div(side.rows, _WARPS),),
            (32 * _WARPS,),
            (
                side.vectors,
                pull,
                side.mask,
                head_spoiled,
                out.reshape(side.vectors.shape),
                np.int64(side.rows),
                np.int64(side.vectors.shape[1]),
                np.int32(dim),
                layout.accumulator(like)(factor),
            ),
        )
    return out


def _by_pairs(
    device: Device, queries: _Side, keys: _Side, query: Array, key: Array, value: Array, hash_code_len: int, grad: Grad
) -> Gradients:
    """All three gradients from all pairs, with the collisions of the codes as weights if there are
    codes, else with the expectation.
    """
    grad_value = device.empty(value.shape, value.dtype)
    pull_query = _pull(device, queries, keys, None, hash_code_len, grad)
    pull_key = _pull(device, keys, queries, grad_value.reshape(keys.companion.shape), hash_code_len, grad)
    return _through_normalization(device, queries, pull_query, query), _through_normalization(device, keys, pull_key, key), grad_value


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
    """32 rows to a block, which walks over the other side: once by query, once by key. Repeatable
    bit by bit.

    Working memory: unit copies of query and key, and their gradients before the normalization.
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
) -> Gradients:
    """``grad="lower_bound"``: three cumulations, linear in ``n_q + n_k``; ``"exact"``: all pairs,
    blocked, with their collisions counted.

    With the lower bound the gradient of the query is a cumulation of unit keys, weighted by
    ``grad_out`` and ``value``; that of the key is the same from the other side, and that of the
    value a plain cumulation of ``grad_out``. Repeatable bit by bit.
    """
    queries = _side(device, query, grad_out, query_mask, query_hash_code)
    keys = _side(device, key, value, key_mask, key_hash_code)
    if grad == "exact":
        return _by_pairs(device, queries, keys, query, key, value, hash_code_len, grad)
    capacity = 1 << hash_code_len
    sorted_query, sorted_key = (sort_codes(device, side.code, capacity, side.mask) for side in (queries, keys))
    g, v = (layout.widened(x) for x in (grad_out, value))  # as the unit rows are: the kernel takes all of one dtype
    pull_query = lsh_weighted_cumulation_outer_products(
        device,
        query_hash_code,
        g,
        key_hash_code,
        v,
        keys.unit.reshape(key.shape),
        capacity,
        query_mask=query_mask,
        key_mask=key_mask,
        sorted_codes=(sorted_query, sorted_key),
    )
    pull_key = lsh_weighted_cumulation_outer_products(
        device,
        key_hash_code,
        v,
        query_hash_code,
        g,
        queries.unit.reshape(query.shape),
        capacity,
        query_mask=key_mask,
        key_mask=query_mask,
        sorted_codes=(sorted_key, sorted_query),
    )
    plain = (device, key_hash_code, query_hash_code, grad_out, capacity)
    try:
        grad_value = lsh_cumulation_shared_table(*plain, query_mask=key_mask, key_mask=query_mask)
    except DoesNotFit:
        grad_value = lsh_cumulation_sorted_buckets(*plain, query_mask=key_mask, key_mask=query_mask, sorted_codes=sorted_query)
    half = hash_code_len / 2
    return (
        _through_normalization(device, queries, pull_query, query, half, _spoiled_heads(device, keys)),
        _through_normalization(device, keys, pull_key, key, half, _spoiled_heads(device, queries)),
        grad_value,
    )
