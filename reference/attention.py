"""YOSO attention as a whole."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from yoso_core.reference.arrays import Array, full_mask, nan_unless_finite, working
from yoso_core.reference.cumulation import lsh_cumulation_tables, mark_nonfinite_rows
from yoso_core.reference.expectation import expectation_attention
from yoso_core.reference.hashing import Layout, fast_hash, hyperplane_hash
from yoso_core.reference.normalize import TINY_NORM, l2_normalize, row_norm


def yoso_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int = 32,
    hash_code_len: int = 8,
    use_expectation: bool = False,
    signs: Array | None = None,
    planes: Array | None = None,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize_output: bool = True,
    layout: Layout = "chained",
    oversample: int = 0,
    return_length: bool = False,
    return_error: bool = False,
) -> Array | tuple[Array, ...]:
    """``out_i = y_i / |y_i|`` with ``y_i = sum_j C_ij v_j``: attention by hash collisions, or by
    their expectation.

    ``C_ij`` is the share of the ``num_hash`` hashes in which query and key fall into the same
    bucket; ``signs`` or ``planes`` hold the random hashes. With ``use_expectation`` it is the
    expected share instead, ``(1 - arccos(q_i . k_j) / pi)**tau`` for unit ``q`` and ``k``. The
    scale of query and key does not matter.

    Parameters
    ----------
    query, key : float ``(..., n_q, d)`` and ``(..., n_k, d)``. value : float ``(..., n_k, d_v)``.
    num_hash, hash_code_len : ``m`` hashes of ``tau`` bits.
    signs : from `sample_signs`; or planes : from `sample_planes`. Not needed for the expectation.
    query_mask, key_mask : ``(..., n_q)`` and ``(..., n_k)``, nonzero = keep.
    normalize_output : scale every output row to unit length. A row shorter than 1e-12 becomes
        zeros: its query met no key.
    layout : that of the signs.
    oversample : ``s``: hashes have ``tau + s`` bits, and a key counts the share ``a_r`` of their
        choices of ``tau`` bits that the ``r`` bits are not in by which its code differs from the
        query's: the same mean, less variance. See `yoso_core.reference.smoothing`.
    return_length : also return ``|y_i|``, which the gradient of that step needs.
    return_error : also return the relative standard error of ``y_i``: see `standard_error`. Not for
        the expectation, and not for a single hash.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A non-finite query gives NaN in its row. A kept
    non-finite key gives NaN in every row of its head. With ``return_length`` a pair: that, and
    ``(..., n_q, 1)`` in the dtype in which the rows were summed. With ``return_error`` the error,
    float32 ``(..., n_q)``, comes last.

    Source: Zeng et al. 2021, equation 5 and section 3.4.

    >>> x = np.eye(2)
    >>> yoso_attention(x, x, x, hash_code_len=1, use_expectation=True).round(3)
    array([[0.894, 0.447],
           [0.447, 0.894]])
    """
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    v = working(value)
    if return_error and (use_expectation or num_hash < 2):
        raise ValueError("return_error: needs two sampled hashes or more; the expectation and a single hash have no spread")
    if use_expectation:
        out = expectation_attention(query, key, v, hash_code_len, query_mask=keep_query, key_mask=keep_key)
    else:
        bits = hash_code_len + oversample
        if signs is not None:
            query_code, key_code = (fast_hash(x, signs, num_hash, bits, layout=layout) for x in (query, key))
        elif planes is not None:
            query_code, key_code = (hyperplane_hash(x, planes, num_hash, bits) for x in (query, key))
        else:
            raise ValueError("signs: sampling needs signs or planes")
        options: dict[str, Any] = {"query_mask": keep_query, "key_mask": keep_key, "oversample": oversample}
        out = lsh_cumulation_tables(query_code, key_code, v, 1 << bits, **options)
        nonfinite_head = np.any(keep_key & ~np.isfinite(key).all(axis=-1), axis=-1)
        out = np.where(nonfinite_head[..., None, None] & keep_query[..., None], np.nan, mark_nonfinite_rows(out, query, keep_query))
    rows = nan_unless_finite(out.astype(v.dtype))
    out = (l2_normalize(rows, tiny=TINY_NORM) if normalize_output else rows).astype(value.dtype)
    asked = [row_norm(rows)] if return_length else []
    if return_error:
        of_hashes = (lsh_cumulation_tables(*codes, v, 1 << bits, **options) for codes in single_hashes(query_code, key_code))
        asked.append(np.where(keep_query, standard_error(rows, of_hashes, num_hash), 0).astype(np.float32))
    return (out, *asked) if asked else out


def single_hashes(query_hash_code: Array, key_hash_code: Array) -> Iterator[tuple[Array, Array]]:
    """The codes of one hash after the other, ``(..., n, 1)``."""
    for hash in range(query_hash_code.shape[-1]):
        yield query_hash_code[..., hash : hash + 1], key_hash_code[..., hash : hash + 1]


def standard_error(mean: Array, of_hashes: Iterable[Array], num_hash: int) -> Array:
    """``sqrt(sum_c s_c**2 / m) / |y|``: how far a row ``y`` is from its expectation, relative to
    its length, as the spread of the hashes' own rows tells.

    ``y = 1/m sum_h r_h`` is the mean of the rows ``r_h`` that each hash alone would give, so
    ``s_c**2 = 1/(m - 1) sum_h (r_hc - y_c)**2`` estimates the variance of a coordinate of one of
    them, and ``s_c**2 / m`` that of ``y_c``. The hashes of a draw must be independent, and at least
    two.

    Parameters
    ----------
    mean : ``y``, float ``(..., n_q, d_v)``. of_hashes : the ``m`` rows ``r_h``, each like ``y``.
    num_hash : ``m``.

    Returns
    -------
    ``(..., n_q)`` in the dtype of ``mean``; infinite where ``y = 0``, since nothing is known of how
    far zero is from the expectation, and NaN where ``y`` is not finite. Rows are divided by the
    largest entry of ``y`` before anything is squared, so no scale of the values overflows.

    A kernel need not go over the hashes twice: ``sum_c s_c**2`` is also
    ``(sum_h |r_h|**2 - |sum_h r_h|**2 / m) / (m - 1)``. Both terms are rounded by an ulp or so of
    ``m |y|**2``, so an error below ``sqrt(ulp / (m - 1))`` cannot be told from none: 6e-5 for 32
    hashes in float32.

    >>> of_hashes = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    >>> standard_error(np.array([[0.5, 0.5]]), of_hashes, 2)
    array([1.])
    """
    largest = np.max(np.abs(mean), axis=-1, keepdims=True, initial=0)
    total = np.zeros(mean.shape[:-1], mean.dtype)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        for rows in of_hashes:
            total += np.sum(((rows - mean) / largest) ** 2, axis=-1)
        error = np.sqrt(total / (num_hash * (num_hash - 1)) / np.sum((mean / largest) ** 2, axis=-1))
    return np.where(largest[..., 0] == 0, np.inf, error).astype(mean.dtype)
