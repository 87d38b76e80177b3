"""Bernoulli cumulation: every query adds up the values of the keys that share its bucket.

Each operation is here twice. By *pairs* is its definition and costs ``n_q * n_k``. By *tables* is
the paper's algorithm and costs ``n_q + n_k``. Both compute in the working dtype of ``value`` and
round once, at the end, to its dtype.

`lsh_cumulation_pairs` and `lsh_cumulation_tables` also take codes of more bits than a hash has, and
smooth: see `yoso_core.reference.smoothing`.
"""

import numpy as np

from yoso_core.reference.arrays import Array, each_head, full_mask, nan_unless_finite, working
from yoso_core.reference.smoothing import agreement, neighbors, plain_codes, smooth_table, smoothing_weights, whole_table_pays

WEIGHT_BLOCK = 16
"""Coordinates of the weights whose tables exist at the same time."""


def collision_rate(query_hash_code: Array, key_hash_code: Array, hashtable_capacity: int = 1, oversample: int = 0) -> Array:
    """``C_ij = 1/m sum_h [code_h(q_i) = code_h(k_j)]`` for codes ``(n_q, m)`` and ``(n_k, m)`` of
    one head, float64. With ``oversample``, ``a_r`` in place of 1 or 0 for codes of
    ``log2(hashtable_capacity)`` bits that differ in ``r``.

    >>> collision_rate(np.array([[0, 1]]), np.array([[0, 1], [0, 3], [2, 3]]))
    array([[1. , 0.5, 0. ]])
    """
    num_hash = query_hash_code.shape[-1]
    hash_code_len = hashtable_capacity.bit_length() - 1 - oversample
    collisions = np.zeros((query_hash_code.shape[0], key_hash_code.shape[0]))
    for hash in range(num_hash):
        collisions += agreement(query_hash_code[:, hash], key_hash_code[:, hash], hash_code_len, oversample)
    return collisions / num_hash


def backward_rates(
    query_hash_code: Array, key_hash_code: Array, hash_code_len: int, oversample: int, backward_num_hash: int | None
) -> tuple[Array, Array]:
    """``C_ij`` of the backward pass for the codes of one head: in the gradient of the value, the
    rate of the forward pass; in those of query and key, that of the `plain_codes`.

    >>> backward_rates(np.array([[0b00]]), np.array([[0b01], [0b10]]), 1, 1, None)
    (array([[0.5, 0.5]]), array([[0., 1.]]))
    """
    of_value = collision_rate(query_hash_code, key_hash_code, 1 << (hash_code_len + oversample), oversample)
    query_code, key_code = (plain_codes(x, hash_code_len, oversample, backward_num_hash) for x in (query_hash_code, key_hash_code))
    return of_value, collision_rate(query_code, key_code)


def lsh_cumulation_pairs(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
) -> Array:
    """``out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] v_j``: the definition, pair by pair.

    With ``oversample`` the bracket is ``a_r`` instead, where ``r`` counts the bits in which the two
    codes differ: `yoso_core.reference.smoothing`.

    Parameters
    ----------
    query_hash_code, key_hash_code : int32 ``(..., n_q, m)`` and ``(..., n_k, m)``, each in
        ``[0, hashtable_capacity)``.
    value : float ``(..., n_k, d_v)``.
    hashtable_capacity : number of buckets; ``2**(tau + s)`` with ``oversample = s > 0``.
    query_mask, key_mask : ``(..., n_q)`` and ``(..., n_k)``, nonzero = keep. A masked key is
        skipped, so it may hold NaN. A masked query gets zeros.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A non-finite entry of a value gives NaN in the
    rows of all queries that meet it.

    Source: Zeng et al. 2021, equation for the YOSO estimator in section 3.1.

    >>> codes = np.array([[0], [1], [0]], np.int32)
    >>> lsh_cumulation_pairs(codes, codes, np.array([[1.0], [2.0], [4.0]]), 2)
    array([[5.],
           [2.],
           [5.]])
    """
    keep_query = full_mask(query_mask, query_hash_code.shape[:-1])
    keep_key = full_mask(key_mask, key_hash_code.shape[:-1])
    v = nan_unless_finite(working(value))
    out = np.zeros((*query_hash_code.shape[:-1], value.shape[-1]), v.dtype)
    for head in each_head(value.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        codes = query_hash_code[head][queries], key_hash_code[head][keys]
        rate = collision_rate(*codes, hashtable_capacity, oversample).astype(v.dtype)
        out[head][queries] = weighted_sum(rate, rate > 0, v[head][keys])
    return nan_unless_finite(out).astype(value.dtype)


def weighted_sum(weight: Array, met: Array, value: Array) -> Array:
    """``out_i = sum_j weight_ij v_j`` over the pairs that met. A non-finite value changes only the
    rows of queries that met it.
    """
    finite = np.isfinite(value)
    with np.errstate(invalid="ignore"):  # a weight that is not finite makes a row of NaN
        out = np.where(met, weight, 0) @ np.where(finite, value, 0)
    return np.where(met.astype(weight.dtype) @ ~finite > 0, np.nan, out).astype(value.dtype)


def bucket_labels(query_code: Array, key_code: Array) -> tuple[int, Array, Array]:
    """Number the occupied buckets 0, 1, ... Memory then grows with the number of vectors, not with
    ``2**tau``. Returns how many there are, and the number of every query's and key's bucket.
    """
    occupied, label = np.unique(np.concatenate([query_code, key_code]), return_inverse=True)
    return len(occupied), label[: len(query_code)], label[len(query_code) :]


def lsh_cumulation_tables(
    query_hash_code: Array,
    key_hash_code: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    oversample: int = 0,
) -> Array:
    """The same as `lsh_cumulation_pairs`, in linear time: every value is added to its bucket, then
    every query reads its bucket.

    ``table[c] = sum_{j : code(k_j) = c} v_j``, ``out_i = 1/m sum_h table_h[code_h(q_i)]``. With
    ``oversample``, the table is smoothed before it is read; or, where it would be large against
    what is read of it, a query reads the neighbors of its bucket too.

    Source: Zeng et al. 2021, algorithm 1.

    >>> codes = np.array([[0], [1], [0]], np.int32)
    >>> lsh_cumulation_tables(codes, codes, np.array([[1.0], [2.0], [4.0]]), 2)
    array([[5.],
           [2.],
           [5.]])
    """
    num_hash = query_hash_code.shape[-1]
    keep_query = full_mask(query_mask, query_hash_code.shape[:-1])
    keep_key = full_mask(key_mask, key_hash_code.shape[:-1])
    v = nan_unless_finite(working(value))
    out = np.zeros((*query_hash_code.shape[:-1], value.shape[-1]), v.dtype)
    for head in each_head(value.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        for hash in range(num_hash):
            codes = query_hash_code[head][queries, hash], key_hash_code[head][keys, hash]
            out[head][queries] += _read_buckets(*codes, v[head][keys], hashtable_capacity, oversample)
    return nan_unless_finite(out / num_hash).astype(value.dtype)


def _read_buckets(query_code: Array, key_code: Array, value: Array, capacity: int, oversample: int) -> Array:
    """``sum_j a_r v_j`` for the queries and keys of one hash, by the table of its buckets."""
    bits = capacity.bit_length() - 1
    if oversample and whole_table_pays(bits, oversample, len(query_code)):
        table = np.zeros((capacity, value.shape[-1]), value.dtype)
        np.add.at(table, key_code, value)
        return smooth_table(table, oversample)[query_code]
    out = np.zeros((len(query_code), value.shape[-1]), value.dtype)
    for masks, weight in zip(neighbors(bits, oversample), smoothing_weights(bits - oversample, oversample), strict=True):
        for mask in masks:
            size, read, write = bucket_labels(query_code ^ np.int32(mask), key_code)
            table = np.zeros((size, value.shape[-1]), value.dtype)
            np.add.at(table, write, value)
            out += out.dtype.type(weight) * table[read]
    return out


def lsh_weighted_cumulation_pairs(
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """``out_i = 1/m sum_h sum_j [code_h(q_i) = code_h(k_j)] (query_weight_i . key_weight_j) v_j``:
    the definition, pair by pair.

    Parameters
    ----------
    query_weight, key_weight : float ``(..., n_q, d_w)`` and ``(..., n_k, d_w)``, in the dtype of
        ``value``.
    The other parameters are those of `lsh_cumulation_pairs`.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A non-finite query weight gives NaN in its row,
    whether it met a key or not.

    Source: Zeng et al. 2021, section 3.3. Every gradient of sampled attention has this form.

    >>> codes, weight = np.array([[0], [1], [0]], np.int32), np.array([[1.0], [2.0], [3.0]])
    >>> value = np.array([[1.0], [2.0], [4.0]])
    >>> lsh_weighted_cumulation_pairs(codes, weight, codes, weight, value, 2)
    array([[13.],
           [ 8.],
           [39.]])
    """
    keep_query = full_mask(query_mask, query_hash_code.shape[:-1])
    keep_key = full_mask(key_mask, key_hash_code.shape[:-1])
    qw, kw, v = working(query_weight), working(key_weight), nan_unless_finite(working(value))
    out = np.zeros((*query_hash_code.shape[:-1], value.shape[-1]), v.dtype)
    for head in each_head(value.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        rate = collision_rate(query_hash_code[head][queries], key_hash_code[head][keys]).astype(v.dtype)
        with np.errstate(invalid="ignore"):
            weight = rate * (qw[head][queries] @ kw[head][keys].T)
        out[head][queries] = weighted_sum(weight, rate > 0, v[head][keys])
    return nan_unless_finite(mark_nonfinite_rows(out, qw, keep_query)).astype(value.dtype)


def mark_nonfinite_rows(out: Array, query: Array, keep_query: Array) -> Array:
    """NaN in the row of every kept query that is not finite."""
    nonfinite = keep_query & ~np.isfinite(query).all(axis=-1)
    return np.where(nonfinite[..., None], np.nan, out).astype(out.dtype)


def lsh_weighted_cumulation_tables(
    query_hash_code: Array,
    query_weight: Array,
    key_hash_code: Array,
    key_weight: Array,
    value: Array,
    hashtable_capacity: int,
    *,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
) -> Array:
    """The same as `lsh_weighted_cumulation_pairs`, in linear time: the query's weight is taken out
    of the sum, coordinate by coordinate.

    ``sum_j (a . b_j) v_j = sum_r a_r (sum_j b_jr v_j)``, so each coordinate ``r`` has a table of
    ``key_weight_r * value``.

    >>> codes, weight = np.array([[0], [1], [0]], np.int32), np.array([[1.0], [2.0], [3.0]])
    >>> value = np.array([[1.0], [2.0], [4.0]])
    >>> lsh_weighted_cumulation_tables(codes, weight, codes, weight, value, 2)
    array([[13.],
           [ 8.],
           [39.]])
    """
    keep_query = full_mask(query_mask, query_hash_code.shape[:-1])
    keep_key = full_mask(key_mask, key_hash_code.shape[:-1])
    num_hash, num_weight = query_hash_code.shape[-1], query_weight.shape[-1]
    qw, kw, v = working(query_weight), working(key_weight), nan_unless_finite(working(value))
    out = np.zeros((*query_hash_code.shape[:-1], value.shape[-1]), v.dtype)
    for head in each_head(value.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        for hash in range(num_hash):
            size, read, write = bucket_labels(query_hash_code[head][queries, hash], key_hash_code[head][keys, hash])
            total = np.zeros_like(out[head][queries])
            for r in range(0, num_weight, WEIGHT_BLOCK):
                a, b = (w[head][kept, r : r + WEIGHT_BLOCK] for w, kept in ((qw, queries), (kw, keys)))
                table = np.zeros((size, b.shape[1], value.shape[-1]), v.dtype)
                with np.errstate(invalid="ignore"):
                    np.add.at(table, write, b[:, :, None] * v[head][keys][:, None, :])
                    total += np.einsum("ir,irc->ic", a, table[read])
            out[head][queries] += total
    return nan_unless_finite(mark_nonfinite_rows(out / num_hash, qw, keep_query)).astype(value.dtype)
