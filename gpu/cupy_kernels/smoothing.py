"""Launcher of the smoothing of tables. The kernel is in `smoothing.cu`, the equation is in
`yoso_core.reference.smooth_table`.
"""

from typing import NamedTuple

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit

_THREADS = 256
_REGISTERS = 64
"""For the rows that a thread of `smooth_spheres` holds: two blocks then share a multiprocessor."""
_WIDEST = 32
_NARROWEST_BYTES = 16
"""Of the columns of a block: half of what memory moves at a time. The next block takes the rest."""


def held_bits(oversample: int, itemsize: int, registers: int) -> int:
    """How many bits a thread crosses while its rows, ``oversample + 1`` numbers each, stay in this
    many registers; at least one.

    >>> [held_bits(s, 4, 64) for s in (1, 2, 4, 8)]
    [5, 4, 3, 2]
    """
    return max(1, (registers * 4 // ((oversample + 1) * itemsize)).bit_length() - 1)


class SmoothingLayout(NamedTuple):
    """How `smooth_spheres` divides its work."""

    launches: int
    cross: int
    """Bits that a launch crosses; the last one may cross fewer."""
    width: int
    """Columns of a block."""
    held: int
    """Bits that a thread crosses at a time."""


def smoothing_layout(bits: int, columns: int, oversample: int, max_shared: int, itemsize: int) -> SmoothingLayout:
    """The fewest launches whose blocks fit into ``max_shared`` bytes, with all columns side by side
    or 16 bytes of them; then the widest blocks of which two fit.

    >>> smoothing_layout(10, 64, 2, 227 * 1024, 4)
    SmoothingLayout(launches=1, cross=10, width=8, held=4)
    >>> smoothing_layout(20, 64, 2, 227 * 1024, 4)
    SmoothingLayout(launches=2, cross=10, width=8, held=4)
    """
    held = held_bits(oversample, itemsize, _REGISTERS)
    narrowest = min(layout.pow2_at_least(columns), _NARROWEST_BYTES // itemsize)
    for launches in range(1, bits + 1):
        cross = layout.ceil_div(bits, launches)
        width = min(layout.pow2_at_least(columns), _WIDEST)
        while width > narrowest and 2 * slab_bytes(cross, width, oversample, held, itemsize) > max_shared:
            width //= 2
        if slab_bytes(cross, width, oversample, held, itemsize) <= max_shared:
            break
    return SmoothingLayout(launches, cross, width, held)


def slab_bytes(cross: int, width: int, oversample: int, held: int, itemsize: int) -> int:
    """Shared memory of a block: none if its rows never leave the registers.

    >>> slab_bytes(10, 8, 2, 4, 4), slab_bytes(4, 8, 2, 4, 4)
    (104448, 0)
    """
    return 0 if cross <= held else (oversample + 1) * ((1 << cross) + (1 << cross >> held)) * width * itemsize


def smooth(device: Device, table: Array, out: Array, oversample: int, columns: int) -> None:
    """Smooth the first ``columns`` columns of tables ``(tables, rows, stride)`` into ``out``, which
    may be ``table``.

    Where it takes several launches, ``T_1 ... T_s`` of as many tables and columns as the device
    allows are in global memory in between. Raises `DoesNotFit` if those of one column are too
    large.
    """
    count, rows = table.shape[:2]
    bits, item = rows.bit_length() - 1, np.dtype(layout.accumulator(table)).itemsize
    plan = smoothing_layout(bits, columns, oversample, device.max_shared, item)
    tables_at_once, columns_at_once = count, columns
    if plan.launches > 1:
        column_bytes = oversample * rows * item
        if column_bytes > device.max_table:
            raise DoesNotFit(
                f"oversample: sums over {oversample} distances for a column of {rows} rows take {column_bytes:,} bytes, more than the "
                f"{device.max_table:,} allowed here; move the table to the CPU"
            )
        columns_at_once = min(columns, device.max_table // column_bytes)
        tables_at_once = device.max_table // (column_bytes * columns_at_once)
    kernel = CudaKernel(
        "smoothing.cu",
        "smooth_spheres",
        (("VALUE", layout.c_type(table)), ("OUT", layout.c_type(out)), ("OVERSAMPLE", oversample), ("HELD_BITS", plan.held)),
    )
    for part in layout.grid_slices(count, tables_at_once):
        for first_column in range(0, columns, columns_at_once):
            width = min(columns_at_once, columns - first_column)
            _cross_all_bits(device, kernel, plan, table[part], out[part], bits, oversample, first_column, width)


def _cross_all_bits(
    device: Device,
    kernel: CudaKernel,
    plan: SmoothingLayout,
    table: Array,
    out: Array,
    bits: int,
    oversample: int,
    first_column: int,
    columns: int,
) -> None:
    """The launches for some tables, and for ``columns`` columns from ``first_column`` on."""
    count, rows, stride = table.shape
    spheres = device.empty((oversample, count, rows, columns), layout.accumulator(table)) if plan.launches > 1 else None
    for first_bit in range(0, bits, plan.cross):
        cross = min(plan.cross, bits - first_bit)
        device.launch(
            kernel,
            grid=(layout.ceil_div(columns, plan.width) << (bits - cross), count),
            block=(min(_THREADS, plan.width << max(0, cross - plan.held)),),
            args={
                "table": table,
                "spheres": spheres,
                "out": out,
                **layout.int32s(
                    bits=bits,
                    first_bit=first_bit,
                    cross=cross,
                    stride=stride,
                    first_column=first_column,
                    columns=columns,
                    width=plan.width,
                ),
            },
            shared=slab_bytes(cross, plan.width, oversample, plan.held, np.dtype(layout.accumulator(table)).itemsize),
        )


def smooth_table_spheres(device: Device, table: Array, oversample: int) -> Array:
    """By spheres: rows meet their neighbors bit by bit, in registers and shared memory. Tables that
    do not fit there take several launches.
    """
    if oversample == 0:
        return _nan_unless_finite(device, table)
    out = device.empty(table.shape, table.dtype)
    if out.size:
        tables = layout.heads(device, table)
        smooth(device, tables, out.reshape(tables.shape), oversample, table.shape[-1])
    return out


def _nan_unless_finite(device: Device, x: Array) -> Array:
    if x.dtype == np.uint16:  # the bits of a bfloat16
        return device.xp.where((x & 0x7F80) == 0x7F80, np.uint16(0x7FFF), x)
    return device.xp.where(device.xp.isfinite(x), x, x.dtype.type(np.nan))
