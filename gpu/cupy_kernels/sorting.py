"""Launcher of the radix sort in `sort.cu`."""

from typing import NamedTuple

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, CudaKernel, Device

_THREADS = 256
_DIGIT_BITS = 4
_TILE = 32


class SortedCodes(NamedTuple):
    """Codes in ascending order for each head and hash, int32 ``(heads, m, n)``."""

    code: Array
    order: Array
    """The row that each code came from."""


def sort_codes(device: Device, codes: Array, hashtable_capacity: int, mask: Array | None) -> SortedCodes:
    """Sort the codes of each head and hash. Equal codes keep the order of their rows.

    Masked rows, and codes outside ``[0, hashtable_capacity)``, get the code ``hashtable_capacity``:
    they come last and match no query.

    Parameters
    ----------
    codes : int32, contiguous ``(heads, n, m)``.
    mask : uint8 ``(heads, n)``, nonzero = keep, or ``None``.

    >>> from yoso_core.gpu.emulator import Emulator
    >>> codes = np.array([[[3], [0], [2], [0]]], np.int32)
    >>> found = sort_codes(Emulator(), codes, 4, np.array([[1, 1, 0, 1]], np.uint8))
    >>> found.code[0, 0], found.order[0, 0]
    (array([0, 0, 3, 4], dtype=int32), array([1, 3, 0, 2], dtype=int32))
    """
    heads, n, num_hash = codes.shape
    shape = (heads, num_hash, n)
    code, order = (device.empty(shape, np.int32) for _ in range(2))
    if code.size == 0:
        return SortedCodes(code, order)
    for part in layout.grid_slices(heads):
        device.launch(
            CudaKernel("sort.cu", "transpose_codes"),
            grid=(layout.ceil_div(n, _TILE) * layout.ceil_div(num_hash, _TILE), part.stop - part.start),
            block=(_TILE, 8),
            args={
                "codes": codes[part],
                "mask": layout.part_of(mask, part),
                "sorted_code": code[part],
                "order": order[part],
                **layout.int32s(n=n, num_hash=num_hash, capacity=hashtable_capacity),
            },
        )
    code_out, order_out = (device.empty(shape, np.int32) for _ in range(2))
    shifts = range(0, max(1, (hashtable_capacity - 1).bit_length()), _DIGIT_BITS)
    for shift in shifts:
        arrays = {"code": code, "order": order, "code_out": code_out, "order_out": order_out}
        device.launch(
            CudaKernel("sort.cu", "sort_codes"),
            grid=(heads * num_hash,),
            block=(_THREADS,),
            args={**arrays, **layout.int32s(n=n, shift=shift, rest=shift == shifts[-1])},
        )
        code, order, code_out, order_out = code_out, order_out, code, order
    return SortedCodes(code, order)
