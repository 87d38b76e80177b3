"""Smoothing of tables. The equation, and the way by spheres, are in
`yoso_core.reference.smooth_table`.

Here ``spheres`` is an array ``(s + 1, tables, rows, columns)`` of ``T_0 ... T_s``: ``T_r`` has the
sums of all rows at a distance of ``r`` bits, and ``T_0`` is the table.
"""

import math

import numpy as np
from numba import cuda

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, DoesNotFit
from yoso_core.gpu.numba_kernels import arrays

_THREADS = 256
_COLUMNS = 32


@cuda.jit
def cross_bit(spheres, bit):
    """``T_r[c] += T_(r-1)[c xor 2**bit]`` for ``r = s ... 1`` and every row ``c``.

    *A block* takes as many pairs of rows of one table as it has rows of threads, and its columns.
    *A thread* takes the two rows of a pair, which differ in the bit, in one column. No other thread
    reads or writes these numbers, so the sums stay in place and no barrier is needed. *Bytes*: all
    spheres read once, all but the first written once. *Deterministic*: yes.
    """
    table, column = cuda.blockIdx.y, cuda.blockIdx.z * cuda.blockDim.x + cuda.threadIdx.x
    pair = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if 2 * pair >= spheres.shape[2] or column >= spheres.shape[3]:
        return
    low = 2 * pair - pair % (1 << bit)
    high = low + (1 << bit)
    for r in range(spheres.shape[0] - 1, 0, -1):
        spheres[r, table, low, column] += spheres[r - 1, table, high, column]
        spheres[r, table, high, column] += spheres[r - 1, table, low, column]


@cuda.jit
def weigh_spheres(spheres, out, bits):
    """``out = sum_r a_r T_r``, where ``a_r / a_(r-1) = (s - r + 1) / (bits - r + 1)``.

    out ``(tables, rows, columns)``; it may be ``T_0``.

    *A block* takes as many rows of one table as it has rows of threads, and its columns. *A thread*
    takes one entry. *Bytes*: all spheres read once, the result written once. *Deterministic*: yes.
    """
    table, column = cuda.blockIdx.y, cuda.blockIdx.z * cuda.blockDim.x + cuda.threadIdx.x
    row = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if row >= out.shape[1] or column >= out.shape[2]:
        return
    number = out.dtype.type
    oversample = spheres.shape[0] - 1
    total = spheres[oversample, table, row, column]
    for r in range(oversample, 0, -1):
        total = total * (number(oversample - r + 1) / number(bits - r + 1)) + spheres[r - 1, table, row, column]
    out[table, row, column] = total if math.isfinite(total) else math.nan


def smooth(device: Device, spheres: Array, out: Array) -> None:
    """Smooth the tables ``spheres[0]`` into ``out``, which may be ``spheres[0]``: a launch for each
    bit, and one that weighs the spheres. The other spheres hold zeros at first.
    """
    count, rows, columns = out.shape
    bits, width = rows.bit_length() - 1, min(_COLUMNS, columns)
    block = width, _THREADS // width
    for part in layout.grid_slices(count):
        grid = part.stop - part.start, layout.ceil_div(columns, width)
        for bit in range(bits if spheres.shape[0] > 1 else 0):
            device.launch(
                cross_bit,
                grid=(layout.ceil_div(rows // 2, block[1]), *grid),
                block=block,
                args={"spheres": spheres[:, part], "bit": np.int64(bit)},
            )
        device.launch(
            weigh_spheres,
            grid=(layout.ceil_div(rows, block[1]), *grid),
            block=block,
            args={"spheres": spheres[:, part], "out": out[part], "bits": np.int64(bits)},
        )


def smooth_table_spheres(device: Device, table: Array, oversample: int) -> Array:
    """By spheres in global memory, bit by bit. Raises `DoesNotFit` if those of one table need more
    memory than the device allows.
    """
    x = arrays.computed(device, table)
    out = device.empty(x.shape, x.dtype)
    if out.size:
        table_bytes = (oversample + 1) * x[0].nbytes
        if table_bytes > device.max_table:
            raise DoesNotFit(
                f"table: {oversample + 1} of shape {x.shape[1:]}, one for each distance, take {table_bytes:,} bytes, more than the "
                f"{device.max_table:,} allowed here; smooth fewer columns at a time"
            )
        for part in layout.grid_slices(x.shape[0], device.max_table // table_bytes):
            spheres = device.zeros((oversample + 1, *x[part].shape), x.dtype)
            spheres[0] = x[part]
            smooth(device, spheres, out[part])
    return arrays.rounded(device, out, table.shape, table.dtype)
