"""Sign hashes: `tau` sign bits of random projections, packed into one bucket number."""

from dataclasses import dataclass

import numpy as np

from yoso_core.reference.arrays import Array, working
from yoso_core.reference.hadamard import hadamard_transform

Seed = np.random.Generator | int | None

HUGE = 2.0**60
"""Vectors with larger entries are scaled down before they are hashed."""


@dataclass(frozen=True)
class HashLayout:
    """Where the bits of every code come from.

    One *part* is one random rotation of the padded vector. It gives ``padded_dim`` sign bits.

    >>> HashLayout(padded_dim=64, codes_per_part=8, parts=4).parts
    4
    """

    padded_dim: int
    """``D``: the vector's dimension rounded up to a power of two."""
    codes_per_part: int
    """``D // tau`` codes fit in one part; 0 when ``tau > D`` and a code spans several parts."""
    parts: int
    """Rotations needed for all ``num_hash`` codes."""


def hash_layout(num_hash: int, hash_code_len: int, dim: int) -> HashLayout:
    """The layout for ``num_hash`` codes of ``hash_code_len`` bits from vectors of dimension
    ``dim``. It is that of the paper's kernels.

    >>> hash_layout(32, 8, 64)
    HashLayout(padded_dim=64, codes_per_part=8, parts=4)
    """
    padded_dim = 1 << (dim - 1).bit_length()
    codes_per_part = padded_dim // hash_code_len
    if codes_per_part:
        return HashLayout(padded_dim, codes_per_part, -(-num_hash // codes_per_part))
    return HashLayout(padded_dim, 0, -(-num_hash * hash_code_len // padded_dim))


def sample_signs(num_hash: int, hash_code_len: int, dim: int, *, batch_shape: tuple[int, ...] = (), rng: Seed = None) -> Array:
    """Draw the random diagonals D1, D2, D3 of the fast projection: independent fair signs.

    Returns int8 ``(*batch_shape, 3, parts, D)`` of +1 and -1; ``[..., 0, :, :]`` is D1, which is
    applied first.

    >>> sample_signs(32, 8, 64, rng=0).shape
    (3, 4, 64)
    """
    layout = hash_layout(num_hash, hash_code_len, dim)
    shape = (*batch_shape, 3, layout.parts, layout.padded_dim)
    return 2 * np.random.default_rng(rng).integers(0, 2, size=shape, dtype=np.int8) - 1


def sample_planes(num_hash: int, hash_code_len: int, dim: int, *, batch_shape: tuple[int, ...] = (), rng: Seed = None) -> Array:
    """Draw the normals of ``num_hash * hash_code_len`` random hyperplanes: independent standard
    normal entries.

    Returns float32 ``(*batch_shape, dim, num_hash * hash_code_len)``; bit ``b`` of code ``h`` is
    column ``h * tau + b``.

    >>> sample_planes(32, 8, 64, rng=0).shape
    (64, 256)
    """
    shape = (*batch_shape, dim, num_hash * hash_code_len)
    return np.random.default_rng(rng).standard_normal(size=shape, dtype=np.float32)


def within_range(x: Array) -> Array:
    """Rows with entries larger than `HUGE` are scaled down by a power of two, so that no later sum
    overflows.

    The scaling is exact, and it does not change any sign.
    """
    largest = np.max(np.abs(x), axis=-1, keepdims=True, initial=0)
    exponent = np.frexp(largest)[1]
    return np.ldexp(x, np.where(largest > HUGE, -exponent, 0))


def pack_bits(bits: Array) -> Array:
    """``code = sum_b bits[..., b] * 2**b`` as int32."""
    powers = 1 << np.arange(bits.shape[-1], dtype=np.int32)
    return np.asarray(np.sum(bits * powers, axis=-1, dtype=np.int32))


def fast_hash(vectors: Array, signs: Array, num_hash: int, hash_code_len: int) -> Array:
    """Sign bits of the fast random rotation ``H D3 H D2 H D1 x``, ``tau`` bits to a code.

    With ``per = D // tau``, bit ``b`` of code ``h`` is
    ``projection[h // per][(h % per) * tau + b] > 0`` and counts ``2**b``. When ``tau > D``, the
    projections of all parts form one stream, which is cut every ``tau`` bits.

    Parameters
    ----------
    vectors : float ``(..., n, d)``, of any scale. They are padded with zeros to ``D`` and hashed in
        float32, or in float64 if they are float64.
    signs : int8 ``(*batch, 3, parts, D)`` from `sample_signs`. ``batch`` broadcasts against the
        leading dims of the vectors.

    Returns
    -------
    int32 ``(..., n, num_hash)``, each in ``[0, 2**hash_code_len)``. A zero vector has code 0.

    Source: Zeng et al. 2021, section 3.2, after Andoni et al. 2015 (arXiv 1509.02897). With three
    rounds the signs are nearly those of Gaussian planes when D is large. For small D the collision
    probability is biased; the project's documentation says by how much.

    >>> x = np.random.default_rng(0).standard_normal((5, 64))
    >>> fast_hash(x, sample_signs(4, 8, 64, rng=0), 4, 8).shape
    (5, 4)
    """
    layout = hash_layout(num_hash, hash_code_len, vectors.shape[-1])
    padding = [(0, 0)] * (vectors.ndim - 1) + [(0, layout.padded_dim - vectors.shape[-1])]
    projection = np.pad(within_range(working(vectors)), padding)[..., None, :]  # (..., n, 1, D)
    diagonals = signs[..., None, :, :, :]  # (*batch, 1, 3, parts, D)
    with np.errstate(invalid="ignore"):  # non-finite vectors have no sides
        for stage in range(3):
            projection = hadamard_transform(projection * diagonals[..., stage, :, :].astype(projection.dtype))
        bits = projection > 0  # (..., n, parts, D)
    rows = bits.shape[:-2]
    if layout.codes_per_part:
        bits = bits[..., : layout.codes_per_part * hash_code_len]
        codes = bits.reshape(*rows, layout.parts * layout.codes_per_part, hash_code_len)[..., :num_hash, :]
    else:
        stream = bits.reshape(*rows, layout.parts * layout.padded_dim)
        codes = stream[..., : num_hash * hash_code_len].reshape(*rows, num_hash, hash_code_len)
    return pack_bits(codes)


def hyperplane_hash(vectors: Array, planes: Array, num_hash: int, hash_code_len: int) -> Array:
    """Sign bits of Gaussian projections: bit ``b`` of code ``h`` is
    ``x . planes[:, h * tau + b] > 0`` and counts ``2**b``.

    Two vectors at angle ``theta`` agree on one bit with probability ``1 - theta / pi`` exactly
    (Charikar 2002, "Similarity estimation techniques from rounding algorithms"), so codes of
    ``tau`` bits collide with probability ``(1 - theta / pi)**tau``.

    Parameters
    ----------
    vectors : float ``(..., n, d)``.
    planes : float ``(*batch, d, num_hash * hash_code_len)`` from `sample_planes`. ``batch``
        broadcasts against the leading dims of the vectors.

    Returns
    -------
    int32 ``(..., n, num_hash)``.

    >>> hyperplane_hash(np.eye(2), np.array([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]]), 1, 3)
    array([[3],
           [6]], dtype=int32)
    """
    x = within_range(working(vectors))
    with np.errstate(invalid="ignore"):
        bits = x @ planes.astype(x.dtype) > 0
    return pack_bits(bits.reshape(*bits.shape[:-1], num_hash, hash_code_len))
