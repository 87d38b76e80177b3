"""Launchers of the weighted cumulation. The kernels are in `weighted.cu`, the equation is in
`yoso_core.reference.lsh_weighted_cumulation_pairs`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.cupy_kernels.sorting import SortedCodes, sort_codes
from yoso_core.gpu.device import Array, CudaKernel, Device

_WARP = 32
_ROWS = 8
_PAIR_COLUMNS = 128
"""Value dims that a warp of `sorted_pairs` holds in registers."""
_COORDINATES = 64
"""Coordinates of a weight that `weight_by_weight_gather` adds up separately before they join the
total: sums of sums round less.
"""
_OUTER_THREADS = 128
_STRETCH = 32
"""Sorted keys of a block of `outer_products`."""
_CACHE_BYTES = 24 << 20
"""A group of heads of this size goes through all hashes before the next group, in one launch: half
of the L2 cache of an H100, so that the group stays in it.
"""


@dataclass(frozen=True)
class _Call:
    """The arrays and sizes of one call, in the kernels' shape: ``(heads, n, ...)``."""

    device: Device
    query_hash_code: Array
    query_weight: Array
    key_hash_code: Array
    key_weight: Array
    value: Array
    query_mask: Array | None
    key_mask: Array | None
    out: Array
    capacity: int

    @property
    def heads(self) -> int:
        return int(self.value.shape[0])

    @property
    def n_q(self) -> int:
        return int(self.query_hash_code.shape[1])

    @property
    def n_k(self) -> int:
        return int(self.value.shape[1])

    @property
    def num_hash(self) -> int:
        return int(self.query_hash_code.shape[2])

    @property
    def weight_dim(self) -> int:
        return int(self.query_weight.shape[2])

    @property
    def value_dim(self) -> int:
        return int(self.value.shape[2])

    @property
    def accumulator(self) -> Any:
        return layout.accumulator(self.value)

    def kernel(self, name: str) -> CudaKernel:
        return CudaKernel("weighted.cu", name, (("VALUE", layout.c_type(self.value)), ("OUT", layout.c_type(self.out))))

    def zero_sums(self) -> Array:
        """``(heads, n_q, d_v)``, with rows filled up to a multiple of four so that a thread can
        move four entries at once.
        """
        return self.device.zeros((self.heads, self.n_q, 4 * layout.ceil_div(self.value_dim, 4)), self.accumulator)

    def finish(self, sums: Array) -> None:
        """From sums over hashes and keys to the result."""
        rows = self.heads * self.n_q
        self.device.launch(
            self.kernel("finish_rows"),
            grid=(layout.ceil_div(rows, _ROWS),),
            block=(_WARP, _ROWS),
            args={
                "query_weight": self.query_weight,
                "query_mask": self.query_mask,
                "sums": sums,
                "out": self.out,
                "rows": np.int64(rows),
                **layout.int32s(num_hash=self.num_hash, weight_dim=self.weight_dim, value_dim=self.value_dim),
            },
        )


def _call(
    device: Device,
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    query_mask: Array | None,
    key_mask: Array | None,
    out_dtype: Any,
) -> tuple[Array, _Call]:
    """The result, not yet filled, and the call that fills it."""
    out = device.empty((*query_hash_code.shape[:-1], value.shape[-1]), value.dtype if out_dtype is None else out_dtype)
    query_code = layout.heads(device, query_hash_code)
    call = _Call(
        device=device,
        query_hash_code=query_code,
        query_weight=layout.heads(device, query_weight),
        key_hash_code=layout.heads(device, key_hash_code),
        key_weight=layout.heads(device, key_weight),
        value=layout.heads(device, value),
        query_mask=layout.mask_bytes(device, query_mask, query_hash_code.shape[:-1]),
        key_mask=layout.mask_bytes(device, key_mask, key_hash_code.shape[:-1]),
        out=out.reshape(*query_code.shape[:2], value.shape[-1]),
        capacity=hashtable_capacity,
    )
    return out, call


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
    out_dtype: Any = None,
) -> Array:
    """The paper's algorithm: a table in global memory for each coordinate of the weights and 32
    value dims.

    Its float atomics make it not repeatable bit by bit. Raises `DoesNotFit` if the table needs more
    memory than the device allows. ``out_dtype`` : the dtype of the result, if not that of
    ``value``.
    """
    out, call = _call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if out.size == 0:
        return out
    sums = call.zero_sums()
    shape = (call.heads, call.num_hash, call.capacity, _WARP)
    if call.n_k:
        layout.check_table(device, shape, call.accumulator, "sorted_pairs")
        table = device.empty(shape, call.accumulator)
        for first in range(0, call.weight_dim, _COORDINATES):
            block_sums = call.zero_sums()
            for coordinate in range(first, min(first + _COORDINATES, call.weight_dim)):
                for first_dim in range(0, call.value_dim, _WARP):
                    table[...] = 0
                    _scatter_and_gather(call, table, block_sums, coordinate, first_dim)
            sums += block_sums
    call.finish(sums)
    return out


def _scatter_and_gather(call: _Call, table: Array, sums: Array, coordinate: int, first_dim: int) -> None:
    sizes = layout.int32s(
        num_hash=call.num_hash,
        capacity=call.capacity,
        weight_dim=call.weight_dim,
        value_dim=call.value_dim,
        coordinate=coordinate,
        first_dim=first_dim,
    )
    for part in layout.grid_slices(call.heads):
        heads = part.stop - part.start
        call.device.launch(
            call.kernel("weight_by_weight_scatter"),
            grid=(layout.ceil_div(call.n_k, _ROWS), heads),
            block=(_WARP, _ROWS),
            args={
                "key_hash_code": call.key_hash_code[part],
                "key_weight": call.key_weight[part],
                "value": call.value[part],
                "key_mask": layout.part_of(call.key_mask, part),
                "table": table[part],
                "n_k": np.int32(call.n_k),
                **sizes,
            },
        )
        call.device.launch(
            call.kernel("weight_by_weight_gather"),
            grid=(layout.ceil_div(call.n_q, _ROWS), heads),
            block=(_WARP, _ROWS),
            args={
                "query_hash_code": call.query_hash_code[part],
                "query_weight": call.query_weight[part],
                "query_mask": layout.part_of(call.query_mask, part),
                "table": table[part],
                "sums": sums[part],
                "n_q": np.int32(call.n_q),
                **sizes,
            },
        )


def lsh_weighted_cumulation_sorted_pairs(
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
    out_dtype: Any = None,
) -> Array:
    """Keys are sorted by code, and one warp for each query goes through its buckets key by key. Any
    capacity, repeatable bit by bit.

    The cost grows with the number of pairs that meet. ``out_dtype`` : the dtype of the result, if
    not that of ``value``.
    """
    out, call = _call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if out.size == 0:
        return out
    sorted_keys = sort_codes(device, call.key_hash_code, call.capacity, call.key_mask)
    for part in layout.grid_slices(call.heads):
        device.launch(
            call.kernel("sorted_pairs"),
            grid=(layout.ceil_div(call.n_q, _ROWS), layout.ceil_div(call.value_dim, _PAIR_COLUMNS), part.stop - part.start),
            block=(_WARP, _ROWS),
            args={
                "query_hash_code": call.query_hash_code[part],
                "query_weight": call.query_weight[part],
                "query_mask": layout.part_of(call.query_mask, part),
                "sorted_code": sorted_keys.code[part],
                "order": sorted_keys.order[part],
                "key_weight": call.key_weight[part],
                "value": call.value[part],
                "out": call.out[part],
                **layout.int32s(
                    n_q=call.n_q,
                    n_k=call.n_k,
                    num_hash=call.num_hash,
                    capacity=call.capacity,
                    weight_dim=call.weight_dim,
                    value_dim=call.value_dim,
                ),
            },
        )
    return out


def lsh_weighted_cumulation_outer_products(
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
    out_dtype: Any = None,
    sorted_codes: tuple[SortedCodes, SortedCodes] | None = None,
) -> Array:
    """Keys and queries are sorted by code. The keys of a bucket become one matrix, and the queries
    of the bucket are multiplied by it.

    Any capacity, repeatable bit by bit, and linear in ``n_q + n_k`` however the codes are spread.
    ``out_dtype`` : the dtype of the result, if not that of ``value``. ``sorted_codes`` : the sorted
    codes of the queries and of the keys from `sort_codes`, if the caller has them.
    """
    out, call = _call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if out.size == 0:
        return out
    sums = call.zero_sums()
    if call.n_k:
        sorted_queries, sorted_keys = sorted_codes or (
            sort_codes(device, call.query_hash_code, call.capacity, call.query_mask),
            sort_codes(device, call.key_hash_code, call.capacity, call.key_mask),
        )
        head_bytes = sum(x[0].nbytes for x in (call.query_weight, call.key_weight, call.value, sums))
        slices = layout.ceil_div(call.value_dim, 32 if call.accumulator == np.float64 else 64)
        stretches = min(layout.ceil_div(call.n_k, _STRETCH), max(1, layout.MAX_GRID_X // (slices * call.num_hash)))
        of_head = stretches * slices * call.num_hash  # blocks
        for part in layout.grid_slices(call.heads, layout.MAX_GRID_X // of_head):
            heads = part.stop - part.start
            device.launch(
                call.kernel("outer_products"),
                grid=(of_head * heads,),
                block=(_OUTER_THREADS,),
                args={
                    "sorted_query_code": sorted_queries.code[part],
                    "query_order": sorted_queries.order[part],
                    "query_weight": call.query_weight[part],
                    "sorted_key_code": sorted_keys.code[part],
                    "key_order": sorted_keys.order[part],
                    "key_weight": call.key_weight[part],
                    "value": call.value[part],
                    "sums": sums[part],
                    "turns": device.zeros((1 + heads * slices,), np.uint32),
                    **layout.int32s(
                        heads=heads,
                        heads_at_once=min(heads, max(1, _CACHE_BYTES // max(head_bytes, 1))),
                        stretches=stretches,
                        n_q=call.n_q,
                        n_k=call.n_k,
                        num_hash=call.num_hash,
                        capacity=call.capacity,
                        weight_dim=call.weight_dim,
                        value_dim=call.value_dim,
                    ),
                },
            )
    call.finish(sums)
    return out
