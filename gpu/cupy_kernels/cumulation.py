"""Launchers of the Bernoulli cumulation. The kernels are in `cumulation.cu`, the equation is in
`yoso_core.reference.lsh_cumulation_pairs`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.cupy_kernels.smoothing import held_bits, smooth
from yoso_core.gpu.cupy_kernels.sorting import SortedCodes, sort_codes
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit

_WARP = 32
_ROWS = 8
_STRETCH = 64
_MOST_THREADS, _MOST_THREADS_SMOOTHING = 512, 384
"""In a block of `shared_table`, which is compiled for as many: of the 65,536 registers of a
multiprocessor a thread gets up to 128, with oversampling up to 168.
"""
_REGISTERS = 48
"""For the rows that a thread of `shared_table` holds while it smooths."""
_GROUP_BYTES = 256 << 20
"""Limit for the bucket sums that are in memory at a time: those of all hashes for some heads, or of
some hashes if one head has more.
"""


@dataclass(frozen=True)
class _Call:
    """The arrays and sizes of one call, in the kernels' shape: ``(heads, n, ...)``."""

    device: Device
    query_hash_code: Array
    key_hash_code: Array
    value: Array
    query_mask: Array | None
    key_mask: Array | None
    out: Array
    capacity: int
    oversample: int
    exponent: Array | None
    """int32 ``(heads,)``: of the largest value of each head, as `scan_exponents` stores it, if the
    squares of the hashes' own rows are wanted.
    """

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
    def value_dim(self) -> int:
        return int(self.value.shape[2])

    @property
    def accumulator(self) -> Any:
        return layout.accumulator(self.value)

    @property
    def is_trivial(self) -> bool:
        """Nothing to launch: the result is empty, or all zeros since there is no key."""
        return self.out.size == 0 or self.n_k == 0

    def kernel(self, name: str, **defines: int) -> CudaKernel:
        types = (("VALUE", layout.c_type(self.value)), ("OUT", layout.c_type(self.out)))
        return CudaKernel("cumulation.cu", name, (*types, *defines.items()))

    def squares(self, slices: int = 1) -> Array | None:
        """Room for the squares of the hashes' own rows, summed over each of some slices of the
        value dims: ``(heads, slices, n_q)``. Zeros if nothing is launched; ``None`` if nobody wants
        them.
        """
        make = self.device.zeros if self.is_trivial else self.device.empty
        return None if self.exponent is None else make((self.heads, slices, self.n_q), self.accumulator)

    @property
    def spread(self) -> dict[str, int]:
        """The macro of kernels that sum squares."""
        return {} if self.exponent is None else {"SPREAD": 1}

    @property
    def holds_own_rows(self) -> bool:
        """Whether the gather sums over neighbors, which mix the hashes, and must also tell their
        rows apart.
        """
        return self.exponent is not None and self.oversample > 0


def _call(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    query_mask: Array | None,
    key_mask: Array | None,
    oversample: int,
    out_dtype: Any,
    exponent: Array | None = None,
) -> tuple[Array, _Call]:
    """The result, not yet filled unless the call is trivial, and the call that fills it."""
    out = device.empty((*query_hash_code.shape[:-1], value.shape[-1]), value.dtype if out_dtype is None else out_dtype)
    if out.size and not value.shape[-2]:
        out[...] = 0
    query_code = layout.heads(device, query_hash_code)
    call = _Call(
        device=device,
        query_hash_code=query_code,
        key_hash_code=layout.heads(device, key_hash_code),
        value=layout.heads(device, value),
        query_mask=layout.mask_bytes(device, query_mask, query_hash_code.shape[:-1]),
        key_mask=layout.mask_bytes(device, key_mask, key_hash_code.shape[:-1]),
        out=out.reshape(*query_code.shape[:2], value.shape[-1]),
        capacity=hashtable_capacity,
        oversample=oversample,
        exponent=exponent,
    )
    return out, call


def _with_squares(out: Array, squares: Array | None) -> Array | tuple[Array, Array]:
    return out if squares is None else (out, squares)


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
    out_dtype: Any = None,
) -> Array:
    """The paper's algorithm: tables in global memory, 32 value dims at a time; with oversampling
    they are smoothed there. Raises `DoesNotFit` if they need more memory than the device allows.
    """
    out, call = _call(device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, oversample, out_dtype)
    if call.is_trivial:
        return out
    shape = (call.heads, call.num_hash, call.capacity, _WARP)
    layout.check_table(device, shape, call.accumulator, "sorted_buckets")
    for first_dim in range(0, call.value_dim, _WARP):
        table = device.zeros(shape, call.accumulator)
        sizes = layout.int32s(num_hash=call.num_hash, capacity=call.capacity, value_dim=call.value_dim, first_dim=first_dim)
        for part in layout.grid_slices(call.heads):
            heads = part.stop - part.start
            device.launch(
                call.kernel("global_table_scatter"),
                grid=(layout.ceil_div(call.n_k, _ROWS), heads),
                block=(_WARP, _ROWS),
                args={
                    "key_hash_code": call.key_hash_code[part],
                    "value": call.value[part],
                    "key_mask": layout.part_of(call.key_mask, part),
                    "table": table[part],
                    "n_k": np.int32(call.n_k),
                    **sizes,
                },
            )
            if oversample:
                tables = table[part].reshape(-1, call.capacity, _WARP)
                smooth(device, tables, tables, oversample, min(_WARP, call.value_dim - first_dim))
            device.launch(
                call.kernel("global_table_gather"),
                grid=(layout.ceil_div(call.n_q, _ROWS), heads),
                block=(_WARP, _ROWS),
                args={
                    "query_hash_code": call.query_hash_code[part],
                    "query_mask": layout.part_of(call.query_mask, part),
                    "table": table[part],
                    "out": call.out[part],
                    "n_q": np.int32(call.n_q),
                    **sizes,
                },
            )
    return out


class SharedTable(NamedTuple):
    """How `shared_table` divides its work."""

    lanes: int
    """Threads in a group: ``side_by_side`` rounded up to a power of two."""
    side_by_side: int
    """Hashes that a block does at a time."""
    width: int
    """Value dims of a block."""


def shared_table_layout(
    num_hash: int, value_dim: int, hashtable_capacity: int, max_shared: int, itemsize: int, oversample: int = 0
) -> SharedTable:
    """The division of work for tables that fit into ``max_shared`` bytes.

    A column takes ``(hashtable_capacity + 1) * itemsize`` bytes, and with oversampling those of
    ``T_1 ... T_s`` too (`column_rows`). A block has ``lanes * width`` columns, at most as many as
    registers allow threads. Raises `DoesNotFit` if not even one column fits.

    >>> shared_table_layout(32, 64, 256, 227 * 1024, 4)
    SharedTable(lanes=32, side_by_side=32, width=7)
    >>> shared_table_layout(32, 64, 1024, 227 * 1024, 4, oversample=2)
    SharedTable(lanes=16, side_by_side=16, width=1)
    """
    column = column_rows(hashtable_capacity, oversample, itemsize) * itemsize
    columns = min(max_shared // column, _MOST_THREADS_SMOOTHING if oversample else _MOST_THREADS)
    if columns < 1:
        smoothed = f", smoothed with oversample={oversample}," if oversample else ""
        raise DoesNotFit(
            f"hashtable_capacity: one column of {hashtable_capacity} buckets{smoothed} takes {column:,} bytes of shared "
            f"memory, a block here has {max_shared:,}; use the variant sorted_buckets, which takes any capacity"
        )
    most = min(_WARP, 1 << (columns.bit_length() - 1))
    side_by_side = layout.ceil_div(num_hash, layout.ceil_div(num_hash, most))
    lanes = layout.pow2_at_least(side_by_side)
    width = min(value_dim, columns // lanes)
    return SharedTable(lanes, side_by_side, layout.ceil_div(value_dim, layout.ceil_div(value_dim, width)))


def column_rows(hashtable_capacity: int, oversample: int, itemsize: int) -> int:
    """Numbers in a column of `shared_table`: a row for each bucket and one for masked keys. The
    sums ``T_1 ... T_s`` of the smoothing have a row for each bucket too, unless all rows are in
    registers while they are smoothed.

    >>> column_rows(256, 0, 4), column_rows(1024, 2, 4), column_rows(16, 2, 4)
    (257, 3073, 17)
    """
    bits = hashtable_capacity.bit_length() - 1
    spheres = oversample if bits > held_bits(oversample, itemsize, _REGISTERS) else 0
    return (1 + spheres) * hashtable_capacity + 1


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
    out_dtype: Any = None,
    exponent: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Tables in shared memory, one column to a thread: scatter, smoothing and gather in one kernel.
    Raises `DoesNotFit` if not even one column fits.

    ``exponent`` : int32 ``(heads,)`` from `scan_exponents`: also return the squares of the hashes'
    own rows, in units squared, ``(heads, slices of the value dims, n_q)``.
    """
    out, call = _call(
        device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, oversample, out_dtype, exponent
    )
    if call.is_trivial:
        return _with_squares(out, call.squares())
    item = np.dtype(call.accumulator).itemsize
    lanes, side_by_side, width = shared_table_layout(call.num_hash, call.value_dim, call.capacity, device.max_shared, item, oversample)
    smoothing = {"OVERSAMPLE": oversample, "HELD_BITS": held_bits(oversample, item, _REGISTERS)} if oversample else {}
    unfinished = None if side_by_side >= call.num_hash else device.empty(call.out.shape, call.accumulator)
    slices = layout.ceil_div(call.value_dim, width)
    squares = call.squares(slices)
    for part in layout.grid_slices(call.heads):
        device.launch(
            call.kernel("shared_table", LANES=lanes, **smoothing, **call.spread),
            grid=(slices, part.stop - part.start),
            block=(_WARP * layout.ceil_div(lanes * width, _WARP),),
            args={
                "query_hash_code": call.query_hash_code[part],
                "key_hash_code": call.key_hash_code[part],
                "value": call.value[part],
                "query_mask": layout.part_of(call.query_mask, part),
                "key_mask": layout.part_of(call.key_mask, part),
                "unfinished": layout.part_of(unfinished, part),
                "out": call.out[part],
                **layout.int32s(
                    n_q=call.n_q,
                    n_k=call.n_k,
                    num_hash=call.num_hash,
                    capacity=call.capacity,
                    value_dim=call.value_dim,
                    width=width,
                    side_by_side=side_by_side,
                ),
                "exponent": layout.part_of(call.exponent, part),
                "squares": layout.part_of(squares, part),
            },
            shared=column_rows(call.capacity, oversample, item) * lanes * width * item,
        )
    return _with_squares(out, squares)


def lsh_cumulation_sorted_buckets(
    device: Device,
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    out_dtype: Any = None,
    sorted_codes: SortedCodes | None = None,
    exponent: Array | None = None,
) -> Array | tuple[Array, Array]:
    """Keys are sorted by code, buckets are summed as runs of neighbors, and queries find them by
    bisection; with oversampling also those of up to ``s`` other bits. Any capacity, no float
    atomics.

    ``sorted_codes`` : the sorted codes of the keys from `sort_codes`, if the caller has them.
    ``exponent`` : as in `lsh_cumulation_shared_table`, with one slice.
    """
    out, call = _call(
        device, query_hash_code, key_hash_code, value, hashtable_capacity, query_mask, key_mask, oversample, out_dtype, exponent
    )
    if call.is_trivial:
        return _with_squares(out, call.squares())
    sorted_keys = sorted_codes or sort_codes(device, call.key_hash_code, call.capacity, call.key_mask)
    item = np.dtype(call.accumulator).itemsize
    row_bytes = call.n_k * call.value_dim * item
    budget = min(_GROUP_BYTES, device.max_table) // row_bytes  # of pairs of a head and a hash
    together = max(1, min(call.num_hash, budget, layout.MAX_GRID_YZ))
    if call.holds_own_rows:
        together = min(together, device.max_shared // (min(call.value_dim, _WARP) * item))
    head_groups = layout.grid_slices(call.heads, budget // together)
    bucket_sum = device.empty((head_groups[0].stop * together, call.n_k, call.value_dim), call.accumulator)
    unfinished = None if together == call.num_hash else device.empty(call.out.shape, call.accumulator)
    squares = call.squares()
    for heads in head_groups:
        for first_hash in range(0, call.num_hash, together):
            group = min(together, call.num_hash - first_hash)
            _sum_buckets(call, sorted_keys, bucket_sum, heads, first_hash, group)
            _gather_buckets(call, sorted_keys, bucket_sum, unfinished, squares, heads, first_hash, group)
    return _with_squares(out, squares)


def _sum_buckets(call: _Call, sorted_keys: SortedCodes, bucket_sum: Array, heads: slice, first_hash: int, group: int) -> None:
    """Fill ``bucket_sum`` for some heads and for ``group`` hashes from ``first_hash`` on."""
    threads = min(_WARP * layout.ceil_div(call.value_dim, _WARP), 256)
    stretches = layout.ceil_div(call.n_k, _STRETCH)
    sizes = layout.int32s(n_k=call.n_k, num_hash=call.num_hash, first_hash=first_hash, capacity=call.capacity, value_dim=call.value_dim)
    call.device.launch(
        call.kernel("sum_buckets"),
        grid=(stretches, group, heads.stop - heads.start),
        block=(threads,),
        args={
            "sorted_code": sorted_keys.code[heads],
            "order": sorted_keys.order[heads],
            "value": call.value[heads],
            "bucket_sum": bucket_sum,
            **sizes,
        },
    )
    if stretches > 1:
        call.device.launch(
            call.kernel("join_stretches"),
            grid=(group, heads.stop - heads.start),
            block=(threads,),
            args={"sorted_code": sorted_keys.code[heads], "bucket_sum": bucket_sum, **sizes},
        )


def _gather_buckets(
    call: _Call,
    sorted_keys: SortedCodes,
    bucket_sum: Array,
    unfinished: Array | None,
    squares: Array | None,
    heads: slice,
    first_hash: int,
    group: int,
) -> None:
    """Let the queries of some heads read ``bucket_sum``, which holds ``group`` hashes from
    ``first_hash`` on.
    """
    smoothing = layout.int32s(oversample=call.oversample) if call.oversample else {}
    rows, shared, macros = _ROWS, 0, dict(call.spread)
    if call.holds_own_rows:
        rows, macros["MY_DIMS"], shared = own_rows_layout(
            group, call.value_dim, call.device.max_shared, np.dtype(call.accumulator).itemsize
        )
    call.device.launch(
        call.kernel("gather_neighbors" if call.oversample else "gather_buckets", **macros),
        grid=(layout.ceil_div(call.n_q, rows), heads.stop - heads.start),
        block=(_WARP, rows),
        args={
            "query_hash_code": call.query_hash_code[heads],
            "query_mask": layout.part_of(call.query_mask, heads),
            "sorted_code": sorted_keys.code[heads],
            "bucket_sum": bucket_sum,
            "unfinished": layout.part_of(unfinished, heads),
            "out": call.out[heads],
            **layout.int32s(
                n_q=call.n_q,
                n_k=call.n_k,
                num_hash=call.num_hash,
                first_hash=first_hash,
                group=group,
                capacity=call.capacity,
                value_dim=call.value_dim,
            ),
            **smoothing,
            "exponent": layout.part_of(call.exponent, heads),
            "squares": layout.part_of(squares, heads),
        },
        shared=shared,
    )


class OwnRows(NamedTuple):
    """How `gather_neighbors` divides its work while it holds each hash's own row."""

    rows: int
    """Queries of a block."""
    dims: int
    """Value dims of a lane at a time."""
    shared: int
    """Bytes of shared memory."""


def own_rows_layout(group: int, value_dim: int, max_shared: int, itemsize: int) -> OwnRows:
    """The most dims with which four queries fit into a block: fewer dims look up every bucket more
    often. One dim if none do.

    >>> own_rows_layout(32, 64, 227 * 1024, 4), own_rows_layout(256, 128, 227 * 1024, 4)
    (OwnRows(rows=8, dims=4, shared=65536), OwnRows(rows=7, dims=1, shared=229376))
    """
    for dims in (4, 2, 1):
        of_query = group * min(value_dim, _WARP * dims) * itemsize
        rows = min(_ROWS, max_shared // of_query)
        if rows >= 4:
            break
    return OwnRows(rows, dims, rows * of_query)
