"""Rows scaled to unit length, and the gradient of that step."""

import numpy as np

from yoso_core.reference.arrays import Array, working

TINY_NORM = 1e-12
"""An attention output shorter than this counts as zero: it has no direction."""


def row_norm(x: Array) -> Array:
    """Euclidean length of every row, ``(..., n, 1)``. Each row is divided by its largest entry
    first, so that no square overflows or vanishes.
    """
    largest = np.max(np.abs(x), axis=-1, keepdims=True, initial=0)
    scale = np.where(largest > 0, largest, 1).astype(x.dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # the length of a non-finite or huge row is not finite
        return scale * np.sqrt(np.sum((x / scale) ** 2, axis=-1, keepdims=True))


def l2_normalize(x: Array, tiny: float = 0.0) -> Array:
    """``y = x / |x|`` for every row. A row with ``|x| <= tiny`` becomes zeros, a non-finite row
    becomes NaN.

    ``x (..., n, d)`` may have any float dtype and any scale. The result has the working dtype:
    float16 is widened to float32.

    >>> l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    x = working(x)
    norm = row_norm(x)
    largest = np.max(np.abs(x), axis=-1, keepdims=True, initial=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = x / largest
        unit = scaled / np.sqrt(np.sum(scaled * scaled, axis=-1, keepdims=True))
    return np.where(np.isnan(norm), np.nan, np.where(norm <= tiny, 0, unit)).astype(x.dtype)


def l2_normalize_backward(grad: Array, x: Array, tiny: float = 0.0) -> Array:
    """Gradient of `l2_normalize`: ``(g - (g . y) y) / |x|`` with ``y = x / |x|``, and zero where
    ``|x| <= tiny``.

    >>> l2_normalize_backward(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]]))
    array([[0.5, 0. ]])
    """
    y, norm = l2_normalize(x, tiny), row_norm(working(x))
    tangent = grad - np.sum(grad * y, axis=-1, keepdims=True) * y
    return np.where(norm <= tiny, 0, tangent / np.where(norm <= tiny, 1, norm)).astype(y.dtype)
