"""Scratch memory of the kernels: aligned, padded to whole vectors of lanes, filled."""

from typing import Any

import numpy as np
from numba.extending import register_jitable

from yoso_core.cpu.compiling import MERGED, allocating_helper, helper
from yoso_core.cpu.lanes import LANES, fill, store

CACHE_LINE = 64
"""Bytes."""


@register_jitable(**MERGED)
def padded_width(dim: int) -> int:
    """``dim`` rounded up to whole vectors of lanes: the entries that a packed row takes. For Python
    and for kernels.
    """
    return (dim + LANES - 1) // LANES * LANES


def aligned_empty(count: int, dtype: Any) -> Any:
    """Uninitialized memory that starts on a cache line. For Python; kernels call `aligned`."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(count + CACHE_LINE // item, dtype)
    start = (-(raw.ctypes.data // item)) % (CACHE_LINE // item)
    return raw[start : start + count]


@allocating_helper
def aligned(count, dtype):
    """Uninitialized memory of a kernel that starts on a cache line, so that no load of 16 floats
    crosses from one line into the next.
    """
    raw = np.empty(count + LANES, dtype)
    start = (-(raw.ctypes.data // raw.itemsize)) % LANES
    return raw[start : start + count]


@helper
def clear(flat, start, count):
    """Zeros in ``flat[start : start + count]``."""
    zero = fill(flat.dtype.type(0))
    full = count - count % LANES
    for c in range(start, start + full, LANES):
        store(flat, c, zero)
    for c in range(start + full, start + count):
        flat[c] = 0
