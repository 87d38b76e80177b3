"""What the launchers here share: half types widened before the kernels and rounded after them, and
masks that are always there.
"""

from typing import Any

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, Shape


def computed(device: Device, x: Array) -> Array:
    """``(..., n, d)`` as contiguous ``(heads, n, d)`` in the dtype that it is computed in; float16
    and bfloat16 become float32, exactly.
    """
    flat = layout.heads(device, x)
    if x.dtype == np.uint16:  # the upper half of a float32 is a bfloat16
        return (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.astype(layout.accumulator(x), copy=False)


def rounded(device: Device, x: Array, shape: Shape, dtype: Any) -> Array:
    """A computed result in the caller's shape and dtype: to the nearest, ties to even."""
    x = x.reshape(shape)
    if dtype != np.uint16:
        with np.errstate(over="ignore"):  # beyond float16 is infinity
            return x.astype(dtype, copy=False)
    bits = x.view(np.uint32)
    nearest = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return device.xp.where(device.xp.isnan(x), 0x7FFF, nearest).astype(np.uint16)


def kept(device: Device, mask: Array | None, rows: Shape) -> Array:
    """The mask as uint8 ``(heads, n)``, nonzero = keep. A kernel here takes no ``None``: no mask
    keeps all.
    """
    keep = layout.mask_bytes(device, mask, rows)
    return device.xp.ones((layout.count(rows[:-1]), rows[-1]), np.uint8) if keep is None else keep
