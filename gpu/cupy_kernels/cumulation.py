"""Launchers of the Bernoulli cumulation: the kernels in `cumulation.cu`.

The equation stands in `yoso_core.reference.lsh_cumulation_pairs`.
"""

from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.cupy_kernels.sorting import SortedCodes, sort_codes
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit

_WARP = 32
_ROWS = 8
_STRETCH = 64
_GROUP_BYTES = 256 << 20
"""Bucket sums that stand in memory at one time: those of all hashes for some heads, or of some
hashes where one head has more.
"""


class _Call:
    """The arrays of one call as the kernels want them, and where the result goes."""

    def __init__(
        self,
        device: Device,
        query_hash_code: Array,
        key_hash_code: Array,
        value: Array,
        hashtable_capacity: int,
        query_mask: Array | None,
        key_mask: Array | None,
        out_dtype: Any,
    ) -> None:
        self.query_code, self.key_code, self.value = (layout.heads(device, x) for x in (query_hash_code, key_hash_code, value))
        self.query_mask = layout.mask_bytes(device, query_mask, query_hash_code.shape[:-1])
        self.key_mask = layout.mask_bytes(device, key_mask, key_hash_code.shape[:-1])
        self.heads, self.n_q, self.num_hash = self.query_code.shape
        self.n_k, self.value_dim = self.value.shape[1:]
        self.capacity = hashtable_capacity
        self.accumulator = layout.accumulator(value)
        self.out = device.empty((*query_hash_code.shape[:-1], self.value_dim), value.dtype if out_dtype is None else out_dtype)
        self.flat_out = self.out.reshape(self.heads, self.n_q, self.value_dim)
        if self.out.size and not self.n_k:
            self.out[...] = 0

    @property
    def trivial(self) -> bool:
        """Nothing to launch: the result is empty, or there is no key and it is zeros."""
        return self.out.size == 0 or self.n_k == 0

    def kernel(self, name: str, **defines: int) -> CudaKernel:
        types = (("VALUE", layout.c_type(self.value)), ("OUT", layout.c_type(self.out)))
        return CudaKernel("cumulation.cu", name, (*types, *defines.items()))


def lsh_cumulation_global_table(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    out_dtype: Any = None,
) -> Array:
    """The paper's algorithm: tables in global memory, 32 value dims at a time. Raises `DoesNotFit`
    where they do not fit.
    """
    call = _Call(device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, out_dtype)
    if call.trivial:
        return call.out
    shape = (call.heads, call.num_hash, call.capacity, _WARP)
    layout.check_table(device, shape, call.accumulator, "sorted_buckets")
    for first_dim in range(0, call.value_dim, _WARP):
        table = device.zeros(shape, call.accumulator)
        numbers = tuple(np.int32(x) for x in (call.num_hash, call.capacity, call.value_dim, first_dim))
        for part in layout.grid_slices(call.heads):
            heads = part.stop - part.start
            device.launch(
                call.kernel("global_table_scatter"),
                (layout.ceil_div(call.n_k, _ROWS), heads),
                (_WARP, _ROWS),
                (call.key_code[part], call.value[part], layout.part_of(call.key_mask, part), table[part], np.int32(call.n_k), *numbers),
            )
            device.launch(
                call.kernel("global_table_gather"),
                (layout.ceil_div(call.n_q, _ROWS), heads),
                (_WARP, _ROWS),
                (
                    call.query_code[part],
                    layout.part_of(call.query_mask, part),
                    table[part],
                    call.flat_out[part],
                    np.int32(call.n_q),
                    *numbers,
                ),
            )
    return call.out


def shared_table_layout(num_hash: int, value_dim: int, hashtable_capacity: int, max_shared: int, itemsize: int) -> tuple[int, int, int]:
    """``(lanes, side_by_side, width)``: threads to a group, hashes that they do at one time, and
    value dims to a block.

    A column takes ``(hashtable_capacity + 1) * itemsize`` bytes, and a block has ``lanes * width``
    of them.

    Raises
    ------
    DoesNotFit : not even one column fits.

    >>> shared_table_layout(32, 64, 256, 227 * 1024, 4)
    (32, 32, 7)
    """
    columns = max_shared // ((hashtable_capacity + 1) * itemsize)
    if columns < 1:
        raise DoesNotFit(
            f"hashtable_capacity: one column of {hashtable_capacity} buckets takes {(hashtable_capacity + 1) * itemsize:,} bytes of shared "
            f"memory, a block here has {max_shared:,}; use the variant sorted_buckets, which takes any capacity"
        )
    most = min(_WARP, 1 << (columns.bit_length() - 1))
    side_by_side = layout.ceil_div(num_hash, layout.ceil_div(num_hash, most))
    lanes = layout.pow2_at_least(side_by_side)
    width = min(value_dim, columns // lanes, 1024 // lanes)
    return lanes, side_by_side, layout.ceil_div(value_dim, layout.ceil_div(value_dim, width))


def lsh_cumulation_shared_table(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    out_dtype: Any = None,
) -> Array:
    """Tables in shared memory, a column to a thread, scatter and gather in one kernel. Raises
    `DoesNotFit` where no column fits.
    """
    call = _Call(device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, out_dtype)
    if call.trivial:
        return call.out
    item = np.dtype(call.accumulator).itemsize
    lanes, side_by_side, width = shared_table_layout(call.num_hash, call.value_dim, call.capacity, device.max_shared, item)
    unfinished = None if side_by_side >= call.num_hash else device.empty(call.flat_out.shape, call.accumulator)
    sizes = (call.n_q, call.n_k, call.num_hash, call.capacity, call.value_dim, width, side_by_side)
    for part in layout.grid_slices(call.heads):
        device.launch(
            call.kernel("shared_table", LANES=lanes),
            (layout.ceil_div(call.value_dim, width), part.stop - part.start),
            (_WARP * layout.ceil_div(lanes * width, _WARP),),
            (
                call.query_code[part],
                call.key_code[part],
                call.value[part],
                layout.part_of(call.query_mask, part),
                layout.part_of(call.key_mask, part),
                layout.part_of(unfinished, part),
                call.flat_out[part],
                *map(np.int32, sizes),
            ),
            shared=(call.capacity + 1) * lanes * width * item,
        )
    return call.out


def lsh_cumulation_sorted_buckets(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    out_dtype: Any = None,
    sorted_codes: SortedCodes | None = None,
) -> Array:
    """Keys sorted by code, buckets summed as runs of neighbors, found again by bisection: any
    capacity, no float atomics.

    ``sorted_codes``: those of the keys, as `sort_codes` gives them, where the caller has them.
    """
    call = _Call(device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, out_dtype)
    if call.trivial:
        return call.out
    sorted_code, order = sorted_codes or sort_codes(device, call.key_code, call.capacity, call.key_mask)
    row_bytes = call.n_k * call.value_dim * np.dtype(call.accumulator).itemsize
    budget = min(_GROUP_BYTES, device.max_table) // row_bytes  # of sums of one head and hash
    together = max(1, min(call.num_hash, budget))
    head_groups = layout.grid_slices(call.heads, budget // together)
    bucket_sum = device.empty((head_groups[0].stop * together, call.n_k, call.value_dim), call.accumulator)
    unfinished = None if together == call.num_hash else device.empty(call.flat_out.shape, call.accumulator)
    threads = min(_WARP * layout.ceil_div(call.value_dim, _WARP), 256)
    stretches = layout.ceil_div(call.n_k, _STRETCH)
    n_k, num_hash, capacity, value_dim = (np.int32(x) for x in (call.n_k, call.num_hash, call.capacity, call.value_dim))

    for part in head_groups:
        heads = part.stop - part.start
        for first_hash in range(0, call.num_hash, together):
            group, first = min(together, call.num_hash - first_hash), np.int32(first_hash)
            device.launch(
                call.kernel("sum_buckets"),
                (stretches, group, heads),
                (threads,),
                (sorted_code[part], order[part], call.value[part], bucket_sum, n_k, num_hash, first, capacity, value_dim),
            )
            if stretches > 1:
                device.launch(
                    call.kernel("join_stretches"),
                    (group, heads),
                    (threads,),
                    (sorted_code[part], bucket_sum, n_k, num_hash, first, capacity, value_dim),
                )
            device.launch(
                call.kernel("gather_buckets"),
                (layout.ceil_div(call.n_q, _ROWS), heads),
                (_WARP, _ROWS),
                (
                    call.query_code[part],
                    layout.part_of(call.query_mask, part),
                    sorted_code[part],
                    bucket_sum,
                    layout.part_of(unfinished, part),
                    call.flat_out[part],
                    np.int32(call.n_q),
                    n_k,
                    num_hash,
                    first,
                    np.int32(group),
                    capacity,
                    value_dim,
                ),
            )
    return call.out
