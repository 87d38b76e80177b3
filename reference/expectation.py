"""YOSO-E, attention with the exact expected weights; and the gradients of both kinds of
attention.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from yoso_core.reference.arrays import Array, each_head, full_mask, nan_unless_finite, working
from yoso_core.reference.cumulation import backward_rates, mark_nonfinite_rows
from yoso_core.reference.normalize import l2_normalize, l2_normalize_backward

Grad = Literal["lower_bound", "exact"]


def angles(unit: Array, others: Array) -> Array:
    """Angle in radians between one unit vector ``(d,)`` and each of ``(n, d)``:
    ``2 atan2(|q - k|, |q + k|)``.

    ``arccos(q . k)`` loses half of its digits where the vectors nearly agree, which is where the
    weight is largest. It is NaN where rounding makes the cosine larger than 1. A zero vector is
    perpendicular to all.

    >>> angles(np.array([1.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])) / np.pi
    array([0. , 0.5, 1. ])
    """
    apart = np.sqrt(np.sum((unit - others) ** 2, axis=-1))
    along = np.sqrt(np.sum((unit + others) ** 2, axis=-1))
    no_direction = (~others.any(axis=-1) | ~unit.any()) & ~np.isnan(apart)
    return np.where(no_direction, unit.dtype.type(np.pi / 2), 2 * np.arctan2(apart, along))


def expected_weight(theta: Array, hash_code_len: int) -> Array:
    """``E = (1 - theta / pi)**tau``: the probability that ``tau`` random hyperplanes all fail to
    separate two vectors.

    >>> expected_weight(np.pi * np.array([0.0, 0.25, 0.5, 1.0]), 2)
    array([1.    , 0.5625, 0.25  , 0.    ])
    """
    return (1 - theta / np.pi) ** hash_code_len


def gradient_factor(theta: Array, hash_code_len: int, grad: Grad) -> Array:
    """``w`` in ``dq_i = sum_j C_ij w_ij (g_i . v_j) k_j``.

    ``"lower_bound"``: ``tau / 2``, as in the paper (section 3.3). It is finite everywhere, and not
    the derivative of any function. ``"exact"``: ``tau / ((pi - theta) sin theta)``, which makes
    ``E w`` the derivative of ``E`` with respect to the cosine. It is infinite for equal and for
    opposite vectors, so both factors of the denominator are at least 1e-3.

    >>> theta = np.array([np.pi / 2])
    >>> gradient_factor(theta, 8, "lower_bound"), gradient_factor(theta, 8, "exact").round(2)
    (array([4.]), array([5.09]))
    """
    if grad == "lower_bound":
        return np.full_like(theta, hash_code_len / 2)
    return hash_code_len / (np.maximum(np.pi - theta, 1e-3) * np.maximum(np.sin(theta), 1e-3))


def expectation_attention(
    query: Array, key: Array, value: Array, hash_code_len: int, *, query_mask: Array | None = None, key_mask: Array | None = None
) -> Array:
    """``out_i = sum_j (1 - arccos(q_i . k_j) / pi)**tau v_j`` for unit ``q`` and ``k``. Sampling
    estimates this.

    Parameters
    ----------
    query, key : float ``(..., n_q, d)`` and ``(..., n_k, d)``, of any scale. They are scaled to
        unit length here, in float32 or more.
    value : float ``(..., n_k, d_v)``.
    hash_code_len : ``tau``.
    query_mask, key_mask : ``(..., n_q)`` and ``(..., n_k)``, nonzero = keep. Masked keys are
        skipped, masked queries get zeros.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``, not normalized. Queries are done one at a time,
    so memory is linear in ``n_q + n_k``.

    Source: Zeng et al. 2021, section 3.1 (YOSO-E).

    >>> expectation_attention(np.eye(2), np.eye(2), np.eye(2), 3)
    array([[1.   , 0.125],
           [0.125, 1.   ]])
    """
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    q, k, v = l2_normalize(query), l2_normalize(key), nan_unless_finite(working(value))
    out = np.zeros((*query.shape[:-1], value.shape[-1]), v.dtype)
    for head in each_head(query.shape[:-2]):
        keys, values = k[head][keep_key[head]], v[head][keep_key[head]]
        for i in np.flatnonzero(keep_query[head]).tolist():
            out[(*head, i)] = expected_weight(angles(q[(*head, i)], keys), hash_code_len) @ values
    return nan_unless_finite(mark_nonfinite_rows(out, q, keep_query)).astype(value.dtype)


def expectation_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of ``sum(grad_out * expectation_attention(query, key, value, ...))``, including the
    normalization of query and key.

    With ``E_ij`` the weights and ``w_ij`` of `gradient_factor`, for unit vectors::

        dq_i = sum_j E_ij w_ij (g_i . v_j) k_j
        dk_j = sum_i E_ij w_ij (g_i . v_j) q_i
        dv_j = sum_i E_ij g_i

    ``grad_out`` is ``(..., n_q, d_v)``. The other parameters are those of `expectation_attention`.

    Returns
    -------
    ``(grad_query, grad_key, grad_value)``, each in the shape and dtype of its input. Masked rows
    get zeros.

    >>> x, ones = np.eye(2), np.ones((2, 2))
    >>> expectation_attention_backward(ones, x, x, x, 3)[2]
    array([[1.125, 1.125],
           [1.125, 1.125]])
    """

    def weights(head: tuple[int, ...], i: int, keys: Array, theta: Array) -> tuple[Array, Array]:
        expected = expected_weight(theta, hash_code_len)
        return expected, expected

    return attention_backward(grad_out, query, key, value, weights, hash_code_len, grad, query_mask, key_mask)


def lsh_attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    query_hash_code: Array,
    key_hash_code: Array,
    hash_code_len: int,
    *,
    grad: Grad = "lower_bound",
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
    backward_num_hash: int | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of sampled attention for fixed codes: those of `expectation_attention_backward`
    with the collision rate ``C_ij`` of the codes in place of ``E_ij``.

    ``query_hash_code (..., n_q, m)`` and ``key_hash_code (..., n_k, m)`` are those of the forward
    pass, of ``tau + s`` bits with ``oversample = s``. The gradient of the value takes the smoothed
    rate, that of the forward pass. Those of query and key take the plain rate of the lowest
    ``tau`` bits in the first ``backward_num_hash`` hashes (``None``: in all), which has the same
    mean. This definition goes over all pairs. With ``grad="lower_bound"`` each gradient is also a
    (weighted) cumulation, so fast variants take linear time. The exact factor depends on the pair,
    so no variant of it is linear.

    Source: Zeng et al. 2021, section 3.3.

    >>> x, ones, codes = np.eye(2), np.ones((2, 2)), np.array([[0, 1], [0, 3]], np.int32)
    >>> lsh_attention_backward(ones, x, x, x, codes, codes, 2)[2]
    array([[1.5, 1.5],
           [1.5, 1.5]])
    """

    def weights(head: tuple[int, ...], i: int, keys: Array, theta: Array) -> tuple[Array, Array]:
        codes = query_hash_code[head][i : i + 1], key_hash_code[head][keys]
        of_value, of_vectors = backward_rates(*codes, hash_code_len, oversample, backward_num_hash)
        return of_value[0].astype(theta.dtype), of_vectors[0].astype(theta.dtype)

    return attention_backward(grad_out, query, key, value, weights, hash_code_len, grad, query_mask, key_mask)


def attention_backward(
    grad_out: Array,
    query: Array,
    key: Array,
    value: Array,
    weights: Callable[[tuple[int, ...], int, Array, Array], tuple[Array, Array]],
    hash_code_len: int,
    grad: Grad,
    query_mask: Array | None,
    key_mask: Array | None,
) -> tuple[Array, Array, Array]:
    """The three sums, one query at a time. ``weights(head, i, keys, theta)`` gives the weights
    ``C_i`` of query ``i`` and all kept keys, which are at angles ``theta``: for the gradient of the
    value, and for those of query and key.
    """
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    q, k, v, g = l2_normalize(query), l2_normalize(key), working(value), working(grad_out)
    grad_q, grad_k, grad_v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for head in each_head(query.shape[:-2]):
        kept = keep_key[head]
        keys, values = k[head][kept], v[head][kept]
        for i in np.flatnonzero(keep_query[head]).tolist():
            q_i, g_i = q[(*head, i)], g[(*head, i)]
            theta = angles(q_i, keys)
            of_value, of_vectors = weights(head, i, kept, theta)
            grad_cosine = of_vectors * gradient_factor(theta, hash_code_len, grad) * (values @ g_i)
            grad_q[(*head, i)] = grad_cosine @ keys
            grad_k[head][kept] += grad_cosine[:, None] * q_i
            grad_v[head][kept] += of_value[:, None] * g_i
    # From the gradients of the unit vectors to those of query and key as they came.
    return (
        np.where(keep_query[..., None], l2_normalize_backward(grad_q, query), 0).astype(query.dtype),
        np.where(keep_key[..., None], l2_normalize_backward(grad_k, key), 0).astype(key.dtype),
        grad_v.astype(value.dtype),
    )
