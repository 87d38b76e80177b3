"""Any number of leading dims as exactly two, (batch, heads), without a copy where the strides allow
it.
"""

from typing import Any

import numpy as np
from numba import types

Array = Any


def working_dtype(x: Array) -> Any:
    """float64 is computed in float64, everything else in float32."""
    return np.float64 if x.dtype == np.float64 else np.float32


def heads(x: Array, tail: int = 2) -> Array:
    """``(..., *tail)`` as ``(batch, heads, *tail)``; ``tail`` is the number of dims that are no
    leading dims.
    """
    leading = x.ndim - tail
    if leading < 2:
        return x.reshape((1,) * (2 - leading) + x.shape)
    return x if leading == 2 else x.reshape(-1, *x.shape[leading - 1 :])


def rows(x: Array, dtype: Any) -> Array:
    """``(..., n, d)`` as ``(batch, heads, n, d)`` in ``dtype``, the entries of a row next to each
    other.
    """
    x = heads(x.astype(dtype, copy=False))
    packed = x.flags.aligned and (x.shape[-1] <= 1 or x.strides[-1] == x.itemsize)
    return x if packed else np.ascontiguousarray(x)


def kept(mask: Array | None, shape: tuple[int, ...]) -> Array:
    """A mask over ``shape = (..., n)`` as uint8 ``(batch, heads, n)``: 1 = keep."""
    keep = np.ones(1, np.uint8) if mask is None else (mask != 0).view(np.uint8)
    return heads(np.broadcast_to(keep, shape), tail=1)


def input_array(dtype: Any, ndim: int) -> Any:
    """Numba's type of an argument that is only read: any strides."""
    return types.Array(dtype, ndim, "A", readonly=True)


def output_array(dtype: Any, ndim: int) -> Any:
    """Numba's type of a result: C-contiguous."""
    return types.Array(dtype, ndim, "C")


def aligned_empty(count: int, dtype: Any) -> Array:
    """Uninitialized memory that starts on a cache line."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(count + 64 // item, dtype)
    start = (-(raw.ctypes.data // item)) % (64 // item)
    return raw[start : start + count]
