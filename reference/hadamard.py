"""The fast Walsh-Hadamard transform."""

import numpy as np

from yoso_core.reference.arrays import Array, working


def hadamard_transform(x: Array) -> Array:
    """Unnormalized Walsh-Hadamard transform over the last axis, in Sylvester order.

    ``y_k = sum_j (-1)^{popcount(j & k)} x_j``, that is ``y = H_D x`` with ``H_1 = [1]`` and
    ``H_{2D} = [[H_D, H_D], [H_D, -H_D]]``, in ``D log2 D`` additions instead of ``D^2``.

    The butterflies run from the largest stride to the smallest, and every output is a sum of two
    operands. This tree is part of the definition: every implementation that follows it gets the
    same bits on every machine.

    Parameters
    ----------
    x : float array ``(..., D)``, ``D`` a power of two.

    Returns
    -------
    Array of the same shape and dtype. float16 is added up in float32 and rounded once at the end.

    Raises
    ------
    ValueError : ``D`` is not a power of two.

    Source: J. J. Sylvester, 1867. Its use in hashing: Zeng et al. 2021 (arXiv 2111.09714), section
    3.2, after Andoni et al. 2015 (arXiv 1509.02897).

    >>> hadamard_transform(np.array([1.0, 2.0, 3.0, 4.0]))
    array([10., -2., -4.,  0.])
    """
    dim = x.shape[-1]
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"x: the last dimension must be a power of two, got {dim}")
    y, stride = working(x).copy(), dim // 2
    while stride:
        pairs = y.reshape(*y.shape[:-1], dim // (2 * stride), 2, stride)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        y = np.stack([upper + lower, upper - lower], axis=-2).reshape(y.shape)
        stride //= 2
    return y.astype(x.dtype)
