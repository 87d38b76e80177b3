"""What every operation needs: the working precision, masks, and a walk over the heads."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def working(x: Array) -> Array:
    """``x`` in the precision of the computation: float16 is widened to float32, the others stay."""
    return x.astype(np.float32) if x.dtype == np.float16 else x


def full_mask(mask: Array | None, shape: tuple[int, ...]) -> Array:
    """The mask as booleans of ``shape = (..., n)``. Nonzero means keep; ``None`` keeps all."""
    return np.ones(shape, bool) if mask is None else np.broadcast_to(mask != 0, shape)


def each_head(leading: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The index of every head. Inside the loop, ``x[head]`` is a plain matrix."""
    return iter(np.ndindex(*leading))


def nan_unless_finite(x: Array) -> Array:
    """Infinities become NaN, so that a result that met a non-finite number is always NaN."""
    return np.where(np.isfinite(x), x, np.nan).astype(x.dtype)
