"""How the kernels see arrays: any number of leading dims as exactly two, (batch, heads), without a
copy where the strides allow it; and Numba's types of their arguments.
"""

from typing import Any

import numpy as np
from numba import types

Array = Any


def heads(x: Array, tail: int = 2) -> Array:
    """``(..., *dims)`` as ``(batch, heads, *dims)``, where ``tail`` is the number of ``dims``."""
    leading = x.ndim - tail
    if leading < 2:
        return x.reshape((1,) * (2 - leading) + x.shape)
    return x if leading == 2 else x.reshape(-1, *x.shape[leading - 1 :])


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


def int_tuple(kind: type[Any]) -> Any:
    """Numba's type of an argument that is a NamedTuple of integers."""
    return types.NamedUniTuple(types.intp, len(kind._fields), kind)
