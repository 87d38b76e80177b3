"""The estimator against its expectation, over many draws; and for every check a biased twin of the
estimator that it must reject.

Seeds are fixed, so a check that passes passes always; the limits are such that a sound estimator
passes at nearly every seed.
"""

from collections.abc import Callable

import numpy as np
import pytest

import yoso_core
from yoso_core.reference.arrays import Array

PAIRS = 24
COSINES = np.linspace(-0.5, 0.98, PAIRS)

Twin = Callable[..., Array]
"""``estimate(query, key, num_hash, tau, rng)``: the mean collision rate of every pair."""


def dense_pairs(rng: np.random.Generator, dim: int) -> tuple[Array, Array]:
    """One pair of unit vectors for each of `COSINES`, every pair in a plane of its own."""
    q, across = rng.standard_normal((2, PAIRS, 1, dim))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    across -= np.sum(q * across, axis=-1, keepdims=True) * q
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    cosine = COSINES[:, None, None]
    return q, cosine * q + np.sqrt(1 - cosine**2) * across


def sparse_pairs(rng: np.random.Generator, dim: int) -> tuple[Array, Array]:
    """The same angles between vectors of one entry and of two."""
    places = np.argsort(rng.random((PAIRS, dim)))[:, :2]
    q, across = (np.eye(dim)[places[:, i]][:, None, :] for i in (0, 1))
    cosine = COSINES[:, None, None]
    return q, cosine * q + np.sqrt(1 - cosine**2) * across


def expected(tau: int) -> Array:
    return (1 - np.arccos(COSINES) / np.pi) ** tau


def rate(query_code: Array, key_code: Array, tau: int) -> Array:
    """Every pair is a head with one query, one key and the value 1."""
    return yoso_core.lsh_cumulation(query_code, key_code, np.ones((PAIRS, 1, 1)), 1 << tau)[:, 0, 0]


def by_hyperplanes(query: Array, key: Array, num_hash: int, tau: int, rng: np.random.Generator) -> Array:
    """Every pair has planes of its own, so that the errors of two pairs are independent."""
    planes = yoso_core.sample_planes(num_hash, tau, query.shape[-1], batch_shape=(PAIRS,), rng=rng)
    codes = [yoso_core.hyperplane_hash(x.astype(np.float32), planes, num_hash, tau) for x in (query, key)]
    return rate(*codes, tau)


def by_hadamard(query: Array, key: Array, num_hash: int, tau: int, rng: np.random.Generator) -> Array:
    """In the paper's layout; `test_chains.py` has the chain's."""
    signs = yoso_core.sample_signs(num_hash, tau, query.shape[-1], layout="paper", rng=rng)
    codes = [yoso_core.fast_hash(x.astype(np.float32), signs, num_hash, tau, layout="paper") for x in (query, key)]
    return rate(*codes, tau)


# The twins: each spoils an estimator in one way.


def with_one_bit_more(estimate: Twin) -> Twin:
    return lambda query, key, num_hash, tau, rng: estimate(query, key, num_hash, tau + 1, rng)


def with_one_plane_for_all_bits(estimate: Twin) -> Twin:
    """Every bit of a code repeats the first, so that codes collide as often as a single bit
    does.
    """
    return lambda query, key, num_hash, tau, rng: estimate(query, key, num_hash, 1, rng)


def without_one_over_m(estimate: Twin) -> Twin:
    return lambda query, key, num_hash, tau, rng: num_hash * estimate(query, key, num_hash, tau, rng)


TWINS = [with_one_bit_more, with_one_plane_for_all_bits, without_one_over_m]


# Hyperplanes are unbiased


def check_unbiased(estimate: Twin, tau: int) -> None:
    """Deviations in standard errors are standard normal: none beyond 4, and their squares add up to
    about their number.
    """
    rng, num_hash = np.random.default_rng(0), 4000
    query, key = dense_pairs(rng, 16)
    right = expected(tau)
    deviation = (estimate(query, key, num_hash, tau, rng) - right) / np.sqrt(right * (1 - right) / num_hash)
    assert np.abs(deviation).max() < 4
    assert np.sum(deviation**2) < PAIRS + 4 * np.sqrt(2 * PAIRS)


@pytest.mark.parametrize("tau", [2, 4, 8])
def test_hyperplanes_are_unbiased(tau: int) -> None:
    check_unbiased(by_hyperplanes, tau)


@pytest.mark.parametrize("twin", TWINS)
@pytest.mark.parametrize("tau", [2, 4, 8])
def test_the_check_of_hyperplanes_rejects(twin: Callable[[Twin], Twin], tau: int) -> None:
    with pytest.raises(AssertionError):
        check_unbiased(twin(by_hyperplanes), tau)


# The fast projection is nearly so, once D is large

DENSE_BOUND, SPARSE_BOUND = 0.02, 0.06
"""Of ``|mean collision rate - expectation|``, for D >= 64 and tau <= 9. The first is promised; the
second says what sparse vectors cost.
"""


def largest_bias(estimate: Twin, dim: int, tau: int, pairs: Callable[[np.random.Generator, int], tuple[Array, Array]]) -> float:
    rng = np.random.default_rng(0)
    return float(np.abs(estimate(*pairs(rng, dim), 20_000, tau, rng) - expected(tau)).max())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tau", [1, 4, 8, 9])
def test_the_fast_projection_is_within_its_bound(dim: int, tau: int) -> None:
    assert largest_bias(by_hadamard, dim, tau, dense_pairs) < DENSE_BOUND


@pytest.mark.parametrize("twin", TWINS[:1] + TWINS[2:])
@pytest.mark.parametrize("tau", [1, 4, 8, 9])
def test_the_bound_rejects(twin: Callable[[Twin], Twin], tau: int) -> None:
    assert largest_bias(twin(by_hadamard), 64, tau, dense_pairs) > DENSE_BOUND


@pytest.mark.parametrize("tau", [4, 8, 9])
def test_the_bound_rejects_one_plane_for_all_bits(tau: int) -> None:
    assert largest_bias(with_one_plane_for_all_bits(by_hadamard), 64, tau, dense_pairs) > DENSE_BOUND


@pytest.mark.parametrize("tau", [1, 9])
def test_sparse_vectors_are_less_well_served(tau: int) -> None:
    """Three rounds do not make a vector of one or two entries Gaussian."""
    assert 0.01 < largest_bias(by_hadamard, 64, tau, sparse_pairs) < SPARSE_BOUND


@pytest.mark.parametrize(("dim", "tau", "at_least"), [(4, 1, 0.1), (4, 4, 0.2), (8, 4, 0.03)])
def test_small_dimensions_are_visibly_biased(dim: int, tau: int, at_least: float) -> None:
    assert largest_bias(by_hadamard, dim, tau, dense_pairs) > at_least


def test_hyperplanes_are_not_biased_where_the_fast_projection_is() -> None:
    assert largest_bias(by_hyperplanes, 4, 4, dense_pairs) < 0.02


# The error falls as 1 / sqrt(m)

Sampled = Callable[..., Array]
"""``attention(x, value, num_hash, tau, rng)``, not normalized."""


def attention(x: Array, value: Array, num_hash: int, tau: int, rng: np.random.Generator) -> Array:
    return yoso_core.yoso_attention(x, x, value, num_hash=num_hash, hash_code_len=tau, rng=rng, normalize_output=False)


def slope_of_the_error(sampled: Sampled) -> float:
    """Of log RMS error over log m, for m from 4 to 256, in 64 dimensions."""
    rng, tau = np.random.default_rng(0), 6
    centers = rng.standard_normal((8, 64))
    x = (centers[rng.integers(8, size=128)] + 0.7 * rng.standard_normal((128, 64))).astype(np.float32)
    value = rng.standard_normal((128, 16)).astype(np.float32)
    right = yoso_core.expectation_attention(x, x, value, tau)
    counts = np.array([4, 16, 64, 256])
    rms = [np.sqrt(np.mean([(sampled(x, value, int(m), tau, rng) - right) ** 2 for _ in range(8)])) for m in counts]
    return float(np.polyfit(np.log(counts), np.log(rms), 1)[0])


def test_the_error_falls_with_the_root_of_the_number_of_hashes() -> None:
    assert slope_of_the_error(attention) == pytest.approx(-0.5, abs=0.1)


@pytest.mark.parametrize("twin", TWINS)
def test_the_check_of_the_slope_rejects(twin: Callable[[Sampled], Sampled]) -> None:
    assert slope_of_the_error(twin(attention)) != pytest.approx(-0.5, abs=0.1)
