"""Launchers of the weighted cumulation. The equation stands in
`yoso_core.reference.lsh_weighted_cumulation_pairs`, the kernels in `weighted.cu`.
"""

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
"""Coordinates of a weight that `weight_by_weight_gather` adds up by themselves before they join the
total: sums of sums round less.
"""
_OUTER_THREADS = 128
_STRETCH = 32
"""Sorted keys to a block of `outer_products`."""
_CACHE_BYTES = 24 << 20
"""Heads of so many bytes go through all hashes before the next ones: half of the L2 cache of an
H100, so that they stay in it.
"""


class _Call:
    """The arrays of one call as the kernels want them, and where the result goes."""

    def __init__(
        self,
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
    ) -> None:
        self.device = device
        self.query_code, self.key_code = (layout.heads(device, x) for x in (query_hash_code, key_hash_code))
        self.query_weight, self.key_weight, self.value = (layout.heads(device, x) for x in (query_weight, key_weight, value))
        self.query_mask = layout.mask_bytes(device, query_mask, query_hash_code.shape[:-1])
        self.key_mask = layout.mask_bytes(device, key_mask, key_hash_code.shape[:-1])
        self.heads, self.n_q, self.num_hash = self.query_code.shape
        self.n_k, self.value_dim = self.value.shape[1:]
        self.weight_dim = self.query_weight.shape[2]
        self.capacity = hashtable_capacity
        self.accumulator = layout.accumulator(value)
        self.out = device.empty((*query_hash_code.shape[:-1], self.value_dim), value.dtype if out_dtype is None else out_dtype)
        self.flat_out = self.out.reshape(self.heads, self.n_q, self.value_dim)

    def kernel(self, name: str) -> CudaKernel:
        return CudaKernel("weighted.cu", name, (("VALUE", layout.c_type(self.value)), ("OUT", layout.c_type(self.out))))

    def zero_sums(self) -> Array:
        """``(heads, n_q, d_v)``, rows filled up to a multiple of four so that a thread can move
        four at one time.
        """
        return self.device.zeros((self.heads, self.n_q, 4 * layout.ceil_div(self.value_dim, 4)), self.accumulator)

    def finish(self, sums: Array) -> None:
        """From sums over hashes and keys to the result."""
        rows = self.heads * self.n_q
        self.device.launch(
            self.kernel("finish_rows"),
            (layout.ceil_div(rows, _ROWS),),
            (_WARP, _ROWS),
            (
                self.query_weight,
                self.query_mask,
                sums,
                self.flat_out,
                np.int64(rows),
                *map(np.int32, (self.num_hash, self.weight_dim, self.value_dim)),
            ),
        )


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

    Float atomics: not repeatable bit by bit. Raises `DoesNotFit` where the table takes more than
    the device allows. ``out_dtype``: that of the result, if not that of ``value``.
    """
    call = _Call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if call.out.size == 0:
        return call.out
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
                    numbers = (call.num_hash, call.capacity, call.weight_dim, call.value_dim, coordinate, first_dim)
                    _scatter_and_gather(call, table, block_sums, numbers)
            sums += block_sums
    call.finish(sums)
    return call.out


def _scatter_and_gather(call: _Call, table: Array, sums: Array, numbers: tuple[int, ...]) -> None:
    for part in layout.grid_slices(call.heads):
        heads = part.stop - part.start
        call.device.launch(
            call.kernel("weight_by_weight_scatter"),
            (layout.ceil_div(call.n_k, _ROWS), heads),
            (_WARP, _ROWS),
            (
                call.key_code[part],
                call.key_weight[part],
                call.value[part],
                layout.part_of(call.key_mask, part),
                table[part],
                *map(np.int32, (call.n_k, *numbers)),
            ),
        )
        call.device.launch(
            call.kernel("weight_by_weight_gather"),
            (layout.ceil_div(call.n_q, _ROWS), heads),
            (_WARP, _ROWS),
            (
                call.query_code[part],
                call.query_weight[part],
                layout.part_of(call.query_mask, part),
                table[part],
                sums[part],
                *map(np.int32, (call.n_q, *numbers)),
            ),
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
    """Keys sorted by code; a warp to a query goes through its buckets key by key. Any capacity,
    repeatable bit by bit.

    The cost is that of the pairs that meet. ``out_dtype``: that of the result, if not that of
    ``value``.
    """
    call = _Call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if call.out.size == 0:
        return call.out
    sorted_code, order = sort_codes(device, call.key_code, call.capacity, call.key_mask)
    sizes = (call.n_q, call.n_k, call.num_hash, call.capacity, call.weight_dim, call.value_dim)
    for part in layout.grid_slices(call.heads):
        device.launch(
            call.kernel("sorted_pairs"),
            (layout.ceil_div(call.n_q, _ROWS), layout.ceil_div(call.value_dim, _PAIR_COLUMNS), part.stop - part.start),
            (_WARP, _ROWS),
            (
                call.query_code[part],
                call.query_weight[part],
                layout.part_of(call.query_mask, part),
                sorted_code[part],
                order[part],
                call.key_weight[part],
                call.value[part],
                call.flat_out[part],
                *map(np.int32, sizes),
            ),
        )
    return call.out


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
    """Keys and queries sorted by code; a bucket's keys become one matrix, which its queries are
    multiplied with.

    Any capacity, repeatable bit by bit, and linear in ``n_q + n_k`` however the codes are spread.
    ``out_dtype``: that of the result, if not that of ``value``; ``sorted_codes``: those of the
    queries and of the keys, as `sort_codes` gives them, where the caller has them.
    """
    call = _Call(
        device, query_hash_code, query_weight, key_hash_code, key_weight, value, hashtable_capacity, query_mask, key_mask, out_dtype
    )
    if call.out.size == 0:
        return call.out
    sums = call.zero_sums()
    if call.n_k:
        query_side, key_side = sorted_codes or (
            sort_codes(device, call.query_code, call.capacity, call.query_mask),
            sort_codes(device, call.key_code, call.capacity, call.key_mask),
        )
        columns = 32 if call.accumulator == np.float64 else 64
        head_bytes = sum(x[0].nbytes for x in (call.query_weight, call.key_weight, call.value, sums))
        for part in layout.grid_slices(call.heads, _CACHE_BYTES // max(head_bytes, 1)):
            for index in range(call.num_hash):
                sizes = (call.n_q, call.n_k, call.num_hash, index, call.capacity, call.weight_dim, call.value_dim)
                device.launch(
                    call.kernel("outer_products"),
                    (layout.ceil_div(call.n_k, _STRETCH), layout.ceil_div(call.value_dim, columns), part.stop - part.start),
                    (_OUTER_THREADS,),
                    (
                        *(x[part] for x in query_side),
                        call.query_weight[part],
                        *(x[part] for x in key_side),
                        call.key_weight[part],
                        call.value[part],
                        sums[part],
                        *map(np.int32, sizes),
                    ),
                )
    call.finish(sums)
    return call.out
