"""Launcher of the radix sort in `sort.cu`."""

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, CudaKernel, Device

_THREADS = 256
_DIGIT_BITS = 4
_TILE = 32


SortedCodes = tuple[Array, Array]
"""What `sort_codes` returns."""


def sort_codes(device: Device, codes: Array, hashtable_capacity: int, mask: Array | None) -> SortedCodes:
    """Codes in ascending order for each head and hash, and the row that each came from; equal codes
    keep the order of their rows.

    Parameters
    ----------
    codes : int32, contiguous ``(heads, n, m)``. mask : uint8 ``(heads, n)``, nonzero = keep, or
        ``None``.

    Returns
    -------
    ``sorted_code, order``, both int32 ``(heads, m, n)``. Masked rows, and codes outside
    ``[0, hashtable_capacity)``, have the code
    ``hashtable_capacity``: they stand last and match nobody.
    """
    heads, n, num_hash = codes.shape
    shape = (heads, num_hash, n)
    code, order = (device.empty(shape, np.int32) for _ in range(2))
    if code.size == 0:
        return code, order
    numbers = (np.int32(n), np.int32(num_hash), np.int32(hashtable_capacity))
    for part in layout.grid_slices(heads):
        device.launch(
            CudaKernel("sort.cu", "transpose_codes"),
            (layout.ceil_div(n, _TILE), layout.ceil_div(num_hash, _TILE), part.stop - part.start),
            (_TILE, 8),
            (codes[part], None if mask is None else mask[part], code[part], order[part], *numbers),
        )
    code_out, order_out = (device.empty(shape, np.int32) for _ in range(2))
    for shift in range(0, hashtable_capacity.bit_length(), _DIGIT_BITS):
        arrays = (code, order, code_out, order_out)
        device.launch(CudaKernel("sort.cu", "sort_codes"), (heads * num_hash,), (_THREADS,), (*arrays, np.int32(n), np.int32(shift)))
        code, order, code_out, order_out = code_out, order_out, code, order
    return code, order
