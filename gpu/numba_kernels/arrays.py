"""What the launchers here share: half types are widened before the kernels and rounded after them,
and every kernel gets masks.
"""

from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, Shape


def computed(device: Device, x: Array) -> Array:
    """``(..., n, d)`` as contiguous ``(heads, n, d)`` in the dtype of the computation: float16 and
    bfloat16 become float32, exactly.

    >>> from yoso_core.gpu.emulator.stepper import Stepper
    >>> x = computed(Stepper(), np.zeros((2, 3, 5, 4), np.float16))
    >>> x.shape, x.dtype
    ((6, 5, 4), dtype('float32'))
    """
    flat = layout.heads(device, x)
    if x.dtype == np.uint16:  # the upper half of a float32 is a bfloat16
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(layout.accumulator(x), copy=False)


def rounded(device: Device, x: Array, shape: Shape, dtype: Any) -> Array:
    """A result in the caller's shape and dtype, rounded to nearest, ties to even.

    >>> from yoso_core.gpu.emulator.stepper import Stepper
    >>> rounded(Stepper(), np.array([1 / 3], np.float32), (1,), np.float16)
    array([0.3333], dtype=float16)
    """
    x = x.reshape(shape)
    if dtype != np.uint16:
        with np.errstate(over="ignore"):  # beyond the range of float16 is infinity
            return x.astype(dtype, copy=False)
    bits = x.view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return device.xp.where(device.xp.isnan(x), 0x7FFF, nearest).astype(np.uint16)


def kept(device: Device, mask: Array | None, rows: Shape) -> Array:
    """The mask as uint8 ``(heads, n)``, nonzero = keep. A Numba kernel takes no ``None``, so no
    mask becomes one that keeps every row.

    >>> from yoso_core.gpu.emulator.stepper import Stepper
    >>> kept(Stepper(), None, (2, 3))
    array([[1, 1, 1],
           [1, 1, 1]], dtype=uint8)
    """
    keep = layout.mask_bytes(device, mask, rows)
    return device.xp.ones((layout.count(rows[:-1]), rows[-1]), np.uint8) if keep is None else keep
