"""YOSO attention as a whole."""

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
) -> Array | tuple[Array, Array]:
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

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A non-finite query gives NaN in its row. A kept
    non-finite key gives NaN in every row of its head. With ``return_length`` a pair: that, and
    ``(..., n_q, 1)`` in the dtype in which the rows were summed.

    Source: Zeng et al. 2021, equation 5 and section 3.4.

    >>> x = np.eye(2)
    >>> yoso_attention(x, x, x, hash_code_len=1, use_expectation=True).round(3)
    array([[0.894, 0.447],
           [0.447, 0.894]])
    """
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    v = working(value)
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
        out = lsh_cumulation_tables(query_code, key_code, v, 1 << bits, query_mask=keep_query, key_mask=keep_key, oversample=oversample)
        nonfinite_head = np.any(keep_key & ~np.isfinite(key).all(axis=-1), axis=-1)
        out = np.where(nonfinite_head[..., None, None] & keep_query[..., None], np.nan, mark_nonfinite_rows(out, query, keep_query))
    rows = nan_unless_finite(out.astype(v.dtype))
    out = (l2_normalize(rows, tiny=TINY_NORM) if normalize_output else rows).astype(value.dtype)
    return (out, row_norm(rows)) if return_length else out
