"""What every reference operation needs of NumPy: the working precision, masks and a walk over the
heads.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def working(x: Array) -> Array:
    """``x`` in the precision it is computed in: float16 is widened to float32, the others stay as
    they are.
    """
    return x.astype(np.float32) if x.dtype == np.float16 else x


def full_mask(mask: Array | None, shape: tuple[int, ...]) -> Array:
    """The mask as booleans of ``shape = (..., n)``; ``None`` keeps every entry, nonzero means
    keep.
    """
    return np.ones(shape, bool) if mask is None else np.broadcast_to(mask != 0, shape)


def each_head(leading: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of every batch/head, so that the mathematics below a loop is that of plain
    matrices.
    """
    return iter(np.ndindex(*leading))


def nan_unless_finite(x: Array) -> Array:
    """Infinities become NaN: a result that met a number that is not finite says so, always in the
    same way.
    """
    return np.where(np.isfinite(x), x, np.nan).astype(x.dtype)
