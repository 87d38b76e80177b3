"""Smoothing: what all hashes of `tau` bits say that can be made of a few bits more.

A hash of ``tau + s`` bits holds ``C(tau + s, tau)`` hashes of ``tau`` bits, one for each choice of
bits. Two codes that differ in ``r`` bits collide in those choices that leave the ``r`` bits out, a
share of ``a_r = C(tau + s - r, tau) / C(tau + s, tau)``. The mean over all choices has the same
expectation as one of them and much less variance.
"""

from functools import lru_cache
from itertools import combinations
from math import comb
from typing import Any

import numpy as np

from yoso_core.reference.arrays import Array, nan_unless_finite, working


@lru_cache(maxsize=256)
def smoothing_weights(hash_code_len: int, oversample: int) -> tuple[float, ...]:
    """``a_r`` for ``r = 0 ... s``: what a key counts whose code differs from the query's in ``r``
    of ``tau + s`` bits. Beyond ``s`` it counts nothing.

    >>> smoothing_weights(2, 2)
    (1.0, 0.5, 0.16666666666666666)
    """
    bits = hash_code_len + oversample
    choices = comb(bits, hash_code_len)
    return tuple(comb(bits - r, hash_code_len) / choices for r in range(oversample + 1))


@lru_cache(maxsize=16)
def neighbors(bits: int, oversample: int) -> tuple[tuple[int, ...], ...]:
    """For ``r = 0 ... s`` the codes of ``r`` set bits of ``bits``: xor with them leads from a code
    to all that are ``r`` bits away.

    >>> neighbors(3, 2)
    ((0,), (1, 2, 4), (3, 5, 6))
    """
    return tuple(tuple(sum(1 << bit for bit in chosen) for chosen in combinations(range(bits), r)) for r in range(oversample + 1))


def whole_table_pays(bits: int, oversample: int, reads: int) -> bool:
    """Whether smoothing the whole table takes fewer additions a column than to visit the neighbors
    of every code that is read: ``s bits 2**bits <= reads sum_r C(bits, r)``.

    >>> whole_table_pays(10, 2, 4096), whole_table_pays(14, 2, 4096)
    (True, False)
    """
    return oversample * bits << bits <= reads * _within(bits, oversample)


def smoothing_additions(bits: int, oversample: int, reads: int) -> int:
    """Additions a column that smoothing costs one hash, the cheaper way, beyond those of filling
    and reading a plain table.

    >>> smoothing_additions(10, 0, 4096), smoothing_additions(10, 2, 4096)
    (0, 20480)
    """
    if whole_table_pays(bits, oversample, reads):
        return oversample * bits << bits
    return reads * (_within(bits, oversample) - 1)


def _within(bits: int, oversample: int) -> int:
    """Codes of so many bits that differ from a given one in ``s`` at most."""
    return sum(comb(bits, r) for r in range(oversample + 1))


def count_bits(codes: Array) -> Array:
    """The number of set bits of each integer; of negative ones, in two's complement.

    >>> count_bits(np.array([0, 5, 255, -1], np.int32))
    array([ 0,  2,  8, 32])
    """
    found = np.zeros(codes.shape, np.intp)
    codes = codes.view(f"u{codes.dtype.itemsize}")  # a negative number shifted to the right never ends
    while np.any(codes):
        found += (codes & 1).astype(np.intp)
        codes = codes >> 1
    return found


def plain_codes(codes: Any, hash_code_len: int, oversample: int, backward_num_hash: int | None) -> Any:
    """The lowest ``tau`` bits of the codes of the first ``backward_num_hash`` hashes, ``None`` for
    all: what the gradients of query and key are made from. NumPy's or torch's; the codes themselves
    where that is all of them.

    >>> plain_codes(np.array([[13, 2, 7]]), 2, 2, 2)
    array([[1, 2]])
    """
    few = codes if backward_num_hash is None else codes[..., :backward_num_hash]
    return few & ((1 << hash_code_len) - 1) if oversample else few


def agreement(query_code: Array, key_code: Array, hash_code_len: int, oversample: int) -> Array:
    """``a_r`` of every pair of codes, ``(n_q, n_k)`` for ``(n_q,)`` and ``(n_k,)``; without
    oversampling, 1 where they are equal.

    >>> agreement(np.array([0]), np.array([0, 1, 3, 7]), 2, 1).round(3)
    array([[1.   , 0.333, 0.   , 0.   ]])
    """
    if oversample == 0:
        return (query_code[:, None] == key_code).astype(np.float64)
    weights = np.zeros(hash_code_len + oversample + 1)
    weights[: oversample + 1] = smoothing_weights(hash_code_len, oversample)
    return weights[count_bits(query_code[:, None] ^ key_code)]


def smooth_table_pairs(table: Array, oversample: int) -> Array:
    """``out[c] = sum_{c'} a_{|c xor c'|} table[c']``, ``|.|`` the number of set bits: the
    definition, row by row.

    Parameters
    ----------
    table : float ``(..., 2**(tau + s), d_v)``: one row for each code.
    oversample : ``s``.

    Returns
    -------
    ``(..., 2**(tau + s), d_v)`` in the dtype of ``table``. A non-finite entry gives NaN in the rows
    within ``s`` bits of its own.

    >>> smooth_table_pairs(np.array([[1.0], [0.0], [0.0], [4.0]]), 1)
    array([[1. ],
           [2.5],
           [2.5],
           [4. ]])
    """
    x = nan_unless_finite(working(table))
    rows = x.shape[-2]
    codes = np.arange(rows)
    out = np.empty_like(x)
    for code in codes:
        weight = agreement(codes[code : code + 1], codes, rows.bit_length() - 1 - oversample, oversample)[0]
        near = np.flatnonzero(weight)
        out[..., code, :] = np.einsum("r,...rc->...c", weight[near].astype(x.dtype), x[..., near, :])
    return nan_unless_finite(out).astype(table.dtype)


def smooth_table(table: Array, oversample: int) -> Array:
    """The same as `smooth_table_pairs` in ``s (tau + s)`` additions an entry, by spheres.

    Let ``T_r[c]`` be the sum of the rows at a distance of ``r`` bits from ``c``. Taken bit by bit,
    a row at distance ``r`` that differs in bit ``b`` is at distance ``r - 1`` from the neighbor
    across ``b``::

        T_r[c] += T_(r-1)[c xor 2**b]     for b = 0 ... tau + s - 1, and r = s ... 1

    starting from ``T_0 = table`` and zeros; what is read on the right is what bits below ``b`` have
    left there. Then ``out = sum_r a_r T_r``.

    The average is also a convolution over the group of bit strings, so a Hadamard transform over
    the rows turns it into one factor a row. That takes ``2 (tau + s)`` additions, but they cancel:
    far from every key it leaves rounding errors where there is nothing, which the scaling of a row
    to unit length would make into an answer. Here nothing is subtracted.

    >>> smooth_table(np.array([[1.0], [0.0], [0.0], [4.0]]), 1)
    array([[1. ],
           [2.5],
           [2.5],
           [4. ]])
    """
    x = nan_unless_finite(working(table))
    rows = x.shape[-2]
    bits = rows.bit_length() - 1
    codes = np.arange(rows)
    spheres = [x, *(np.zeros_like(x) for _ in range(oversample))]
    for bit in range(bits):
        across = codes ^ (1 << bit)
        for r in range(oversample, 0, -1):
            spheres[r] = spheres[r] + spheres[r - 1][..., across, :]
    weights = smoothing_weights(bits - oversample, oversample)
    out = sum((x.dtype.type(weight) * sphere for weight, sphere in zip(weights, spheres, strict=True)), np.zeros_like(x))
    return nan_unless_finite(out).astype(table.dtype)
