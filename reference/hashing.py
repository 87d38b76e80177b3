"""Sign hashes: `tau` sign bits of random projections, packed into one bucket number.

The fast projections are rotations ``H D``: random signs, then a Hadamard transform. Two layouts say
which rotations, and which of their coordinates make a code:

- ``"paper"``: for each part a triple ``H D3 H D2 H D1 x`` of its own, and the bits of a code next
  to each other in it, as in the kernels of the paper.
- ``"chained"``: one chain ``y_r = H D_r y_(r-1)``. The coordinates of every round from the fourth
  on are used, and the bits of a code are spread over them. With ``tau`` rotations every bit comes
  from a rotation of its own; with fewer, a few bits share one.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from yoso_core.reference.arrays import Array, working
from yoso_core.reference.hadamard import hadamard_transform

Seed = np.random.Generator | int | None

Layout = Literal["chained", "paper"]

LAYOUTS: tuple[Layout, ...] = ("chained", "paper")

WARM_UP = 3
"""Rounds of a chain whose coordinates are not used: those of the first few still show the
vector.
"""

ROTATIONS: dict[int, dict[int, int]] = {
    32: {8: 7, 9: 8, 10: 10, 11: 10, 12: 11},
    64: {8: 4, 9: 5, 10: 6, 11: 7, 12: 8},
    128: {8: 3, 9: 4, 10: 4, 11: 5, 12: 6},
}
"""``ROTATIONS[D][tau]``: the fewest rotations with which the mean collision weight of a chain is
within 1.5% of the expected one at cosines of 0.5 to 0.9, and within 4% at a right angle. It was
measured, for 8 hashes and for as many as the rotations have room for (the suite ``bias`` of the
benchmarks).
"""

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


def least_rotations(num_hash: int, hash_code_len: int, dim: int) -> int:
    """The rotations that have enough coordinates for ``num_hash`` codes: ``ceil(m tau / D)``.

    >>> least_rotations(32, 8, 64)
    4
    """
    return -(-num_hash * hash_code_len // (1 << (dim - 1).bit_length()))


def default_rotations(num_hash: int, hash_code_len: int, dim: int) -> int:
    """The rotations that `sample_signs` takes when none are asked for: those of `ROTATIONS`, or one
    for each bit of a code where the table has no row, and more where ``num_hash`` codes need more.

    >>> default_rotations(32, 8, 64), default_rotations(64, 8, 64), default_rotations(32, 8, 256)
    (4, 8, 8)
    """
    padded_dim = 1 << (dim - 1).bit_length()
    few = ROTATIONS.get(padded_dim, {}).get(hash_code_len, hash_code_len)
    return max(few, least_rotations(num_hash, hash_code_len, dim))


def signs_shape(num_hash: int, hash_code_len: int, dim: int, layout: Layout, rotations: int | None = None) -> tuple[int, ...]:
    """The shape of one draw of signs: ``(3, parts, D)``, or ``(rotations + 3, D)`` for a chain.

    ``rotations=None``: those of `default_rotations`.

    >>> signs_shape(32, 8, 64, "paper"), signs_shape(32, 8, 64, "chained")
    ((3, 4, 64), (7, 64))
    """
    paper = hash_layout(num_hash, hash_code_len, dim)
    if layout == "paper":
        return 3, paper.parts, paper.padded_dim
    if rotations is None:
        rotations = default_rotations(num_hash, hash_code_len, dim)
    return rotations + WARM_UP, paper.padded_dim


def sample_signs(
    num_hash: int,
    hash_code_len: int,
    dim: int,
    *,
    batch_shape: tuple[int, ...] = (),
    layout: Layout = "chained",
    rotations: int | None = None,
    rng: Seed = None,
) -> Array:
    """Draw the random diagonals of the fast projection: independent fair signs.

    Returns int8 of +1 and -1: ``(*batch_shape, rotations + 3, D)``, where ``[..., 0, :]`` is D1,
    which is applied first; in the paper's layout ``(*batch_shape, 3, parts, D)``, where
    ``[..., 0, :, :]`` is D1. Below ``D = 8`` rotations reach a few directions only, and weights are
    far too large: take `sample_planes` there.

    >>> sample_signs(32, 8, 64, rng=0).shape
    (7, 64)
    >>> sample_signs(32, 8, 64, layout="paper", rng=0).shape
    (3, 4, 64)
    """
    shape = (*batch_shape, *signs_shape(num_hash, hash_code_len, dim, layout, rotations))
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


def fast_hash(vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "chained") -> Array:
    """Sign bits of fast random rotations, ``tau`` bits to a code.

    In the paper's layout, with ``per = D // tau``, bit ``b`` of code ``h`` is
    ``projection[h // per][(h % per) * tau + b] > 0`` of ``H D3 H D2 H D1 x`` and counts ``2**b``.
    When ``tau > D``, the projections of all parts form one stream, which is cut every ``tau`` bits.

    In a chain, ``y_r = c_r H D_r y_(r-1)`` with ``y_0 = x``. The exact factor
    ``c_r = 2**-(r L // 2 - (r - 1) L // 2)``, ``L = log2 D``, keeps a long chain in range. The
    coordinates of the ``P`` rounds from the fourth on form one stream. With ``M = P D // tau``, bit
    ``b`` of code ``h`` is coordinate ``b M + h`` of it. So the hashes of a smaller ``num_hash`` are
    the first of those of a larger one.

    Parameters
    ----------
    vectors : float ``(..., n, d)``, of any scale. They are padded with zeros to ``D`` and hashed in
        float32, or in float64 if they are float64.
    signs : int8 ``(*batch, 3, parts, D)`` or ``(*batch, P + 3, D)`` from `sample_signs`. ``batch``
        broadcasts against the leading dims of the vectors.
    layout : ``"paper"`` or ``"chained"``, that of the signs.

    Returns
    -------
    int32 ``(..., n, num_hash)``, each in ``[0, 2**hash_code_len)``. A zero vector has code 0.

    Source: Zeng et al. 2021, section 3.2, after Andoni et al. 2015 (arXiv 1509.02897). The bits of
    one rotation are signs of orthogonal projections. They repel each other, so codes in the paper's
    layout collide too seldom; the project's documentation says by how much.

    >>> x = np.random.default_rng(0).standard_normal((5, 64))
    >>> fast_hash(x, sample_signs(4, 8, 64, rng=0), 4, 8).shape
    (5, 4)
    """
    padding = [(0, 0)] * (vectors.ndim - 1) + [(0, signs.shape[-1] - vectors.shape[-1])]
    x = np.pad(within_range(working(vectors)), padding)
    with np.errstate(invalid="ignore"):  # non-finite vectors have no sides
        bits = (_chained_bits if layout == "chained" else _paper_bits)(x, signs, num_hash, hash_code_len)
    return pack_bits(bits)


def _paper_bits(x: Array, signs: Array, num_hash: int, hash_code_len: int) -> Array:
    """The bits of every code, ``(..., n, m, tau)``."""
    layout = hash_layout(num_hash, hash_code_len, x.shape[-1])
    projection = x[..., None, :]  # (..., n, 1, D)
    diagonals = signs[..., None, :, :, :]  # (*batch, 1, 3, parts, D)
    for stage in range(3):
        projection = hadamard_transform(projection * diagonals[..., stage, :, :].astype(x.dtype))
    bits = projection > 0  # (..., n, parts, D)
    rows = bits.shape[:-2]
    if layout.codes_per_part:
        bits = bits[..., : layout.codes_per_part * hash_code_len]
        return bits.reshape(*rows, layout.parts * layout.codes_per_part, hash_code_len)[..., :num_hash, :]
    stream = bits.reshape(*rows, layout.parts * layout.padded_dim)
    return stream[..., : num_hash * hash_code_len].reshape(*rows, num_hash, hash_code_len)


def chain_factor(round: int, dim: int) -> float:
    """The power of two by which round ``round``, counted from 1, of a chain ends: about
    ``1 / sqrt(D)``, so that two rounds keep the length.

    >>> [chain_factor(r, 32) for r in (1, 2, 3)]
    [0.25, 0.125, 0.25]
    """
    stages = dim.bit_length() - 1
    return 2.0 ** -(round * stages // 2 - (round - 1) * stages // 2)


def _chained_bits(x: Array, signs: Array, num_hash: int, hash_code_len: int) -> Array:
    """The bits of every code, ``(..., n, m, tau)``."""
    rounds, dim = signs.shape[-2:]
    rotations = []
    for round in range(1, rounds + 1):
        diagonal = signs[..., None, round - 1, :].astype(x.dtype)
        x = hadamard_transform(x * diagonal) * x.dtype.type(chain_factor(round, dim))
        if round > WARM_UP:
            rotations.append(x > 0)
    stream = np.concatenate(rotations, axis=-1)
    apart = stream.shape[-1] // hash_code_len
    return stream[..., np.arange(num_hash)[:, None] + apart * np.arange(hash_code_len)]


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
