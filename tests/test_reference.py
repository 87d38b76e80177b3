"""The reference, against tiny cases worked by hand."""

from typing import Any

import numpy as np
import pytest

from yoso_core import reference
from yoso_core.reference.arrays import Array
from yoso_core.reference.hashing import signs_shape

ROOT_3 = np.sqrt(3.0)


# Hadamard transform


def test_hadamard_of_4_numbers() -> None:
    # (1, 2, 3, 4): stride 2 gives sums (4, 6) and differences (-2, -2); stride 1 gives (10, -2) and
    # (-4, 0).
    x = np.array([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_array_equal(reference.hadamard_transform(x), [10, -2, -4, 0])


def test_hadamard_of_8_numbers() -> None:
    # (1, 0, 1, 0 | 0, 1, 1, 0): stride 4 gives sums (1, 1, 2, 0) and differences (1, -1, 0, 0).
    # Stride 2: (1, 1, 2, 0) -> (3, 1), (-1, 1);  (1, -1, 0, 0) -> (1, -1), (1, -1).
    # Stride 1: (4, 2), (0, -2), (0, 2), (0, 2).
    x = np.array([1.0, 0, 1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(reference.hadamard_transform(x), [4, 2, 0, -2, 0, 2, 0, 2])


def test_hadamard_is_the_product_with_sylvesters_matrix() -> None:
    # H_1 = [1], H_2D = [[H_D, H_D], [H_D, -H_D]].
    matrix = np.array([[1.0]])
    while len(matrix) < 32:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    np.testing.assert_array_equal(reference.hadamard_transform(np.eye(32)), matrix)


def test_hadamard_adds_the_largest_stride_first() -> None:
    # In float32 2**24 + 1 is 2**24. With (a, b, c, d) = (2**24, 1, -2**24, 0) (a + c) + (b + d) is
    # 1; (a + b) + (c + d) is 0.
    x = np.array([2.0**24, 1, -(2.0**24), 0], np.float32)
    assert reference.hadamard_transform(x)[0] == 1


def test_hadamard_adds_float16_in_float32_and_rounds_once() -> None:
    # 2048 + 1 is 2048 in float16, twice over; in float32 the sum of (2048, 1, 0, 1) is 2050, which
    # float16 has.
    x = np.array([2048, 1, 0, 1], np.float16)
    transformed = reference.hadamard_transform(x)
    assert transformed.dtype == np.float16
    assert transformed[0] == 2050


@pytest.mark.parametrize("dim", [0, 3, 12])
def test_hadamard_needs_a_power_of_two(dim: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        reference.hadamard_transform(np.zeros(dim))


# Hashing


@pytest.mark.parametrize(
    ("num_hash", "tau", "d", "padded", "per", "parts"),
    [
        (1, 1, 1, 1, 1, 1),
        (32, 8, 64, 64, 8, 4),
        (33, 8, 64, 64, 8, 5),  # the 33rd code opens a fifth part
        (33, 9, 48, 64, 7, 5),  # 7 codes of 9 bits leave one of 64 coordinates unused; 5 parts hold 35 codes
        (2, 8, 8, 8, 1, 2),
        (7, 13, 7, 8, 0, 12),  # 91 bits in parts of 8
        (3, 30, 1, 1, 0, 90),  # a part for every bit
        (2, 3, 2, 2, 0, 3),
    ],
)
def test_hash_layout(num_hash: int, tau: int, d: int, padded: int, per: int, parts: int) -> None:
    assert reference.hash_layout(num_hash, tau, d) == reference.HashLayout(padded, per, parts)


def test_bits_of_a_code_by_hand() -> None:
    # d = 3, so D = 4; tau = 2, so 2 codes per part; 3 codes need 2 parts. H H = 4, so two idle
    # diagonals leave H D3 H D2 H D1 x = 4 H D1 x.
    x = np.array([[1.0, 2.0, 3.0]])
    signs = np.ones((3, 2, 4), np.int8)
    signs[0, 1] = [-1, 1, 1, 1]
    # Part 0: H(1, 2, 3, 0) = (6, 2, 0, -4): bits 1, 1 | 0, 0, since zero is not positive: codes 1 +
    # 2 = 3 and 0. Part 1: H(-1, 2, 3, 0) = (4, 0, -2, -6): bits 1, 0 | ...: code 1.
    np.testing.assert_array_equal(reference.fast_hash(x, signs, 3, 2, layout="paper"), [[3, 0, 1]])


def test_the_first_diagonal_is_applied_first() -> None:
    # H D1 x = H(-1, 2, 3, 0) = (4, 0, -2, -6); D2 makes it (-4, 0, 2, -6); H H only multiplies by
    # 4: bits 0, 0, 1, 0, worth 4. From the other end, D3 H D2 H x = (8, -4, 0, -12), and H of it
    # (-8, 24, 16, 0): bits 0, 1, 1, 0, worth 6.
    x = np.array([[1.0, 2.0, 3.0, 0.0]])
    signs = np.ones((3, 1, 4), np.int8)
    signs[0, 0], signs[1, 0] = [-1, 1, 1, 1], [-1, 1, -1, 1]
    np.testing.assert_array_equal(reference.fast_hash(x, signs, 1, 4, layout="paper"), [[4]])
    np.testing.assert_array_equal(reference.fast_hash(x, signs[::-1], 1, 4, layout="paper"), [[6]])


def test_a_code_longer_than_a_part_by_hand() -> None:
    # D = 2, tau = 3, m = 2: 6 bits from 3 parts of 2. With idle D2 and D3 a part is 2 H D1 x. D1 =
    # (+, +): H(1, 2) = (3, -1), bits 1, 0. D1 = (+, -): H(1, -2) = (-1, 3), bits 0, 1. D1 = (-, -):
    # (-3, 1), bits 0, 1. The stream 1, 0, 0 | 1, 0, 1 is cut into 1 and 1 + 4 = 5.
    signs = np.ones((3, 3, 2), np.int8)
    signs[0, 1], signs[0, 2] = [1, -1], [-1, -1]
    np.testing.assert_array_equal(reference.fast_hash(np.array([[1.0, 2.0]]), signs, 2, 3, layout="paper"), [[1, 5]])


def test_hyperplane_bits_by_hand() -> None:
    # x = (1, -2) against planes (1, 0), (0, 1), (2, 1), (-1, -1): products 1, -2, 0, 1: bits 1, 0 |
    # 0, 1: codes 1 and 2.
    planes = np.array([[1, 0, 2, -1], [0, 1, 1, -1]], np.float32)
    np.testing.assert_array_equal(reference.hyperplane_hash(np.array([[1.0, -2.0]]), planes, 2, 2), [[1, 2]])


@pytest.mark.parametrize("tau", [1, 9, 30])
def test_a_zero_vector_has_code_0(tau: int) -> None:
    zero = np.zeros((1, 5), np.float32)
    assert not reference.fast_hash(zero, reference.sample_signs(3, tau, 5, rng=0), 3, tau).any()
    assert not reference.hyperplane_hash(zero, reference.sample_planes(3, tau, 5, rng=0), 3, tau).any()


@pytest.mark.parametrize("exponent", [-100, -50, 59, 70, 120])
def test_codes_do_not_see_the_scale(exponent: int) -> None:
    x = np.random.default_rng(0).standard_normal((63, 48)).astype(np.float32)
    signs = reference.sample_signs(7, 9, 48, rng=0)
    scaled = np.ldexp(x, exponent)
    np.testing.assert_array_equal(reference.fast_hash(scaled, signs, 7, 9), reference.fast_hash(x, signs, 7, 9))


def test_signs_and_planes_have_their_shapes_and_repeat_with_their_seed() -> None:
    signs = reference.sample_signs(7, 9, 48, batch_shape=(2, 3), rng=0)
    assert signs.dtype == np.int8
    assert signs.shape == (2, 3, *signs_shape(7, 9, 48, "chained"))
    assert reference.sample_signs(7, 9, 48, layout="paper").shape == (3, 1, 64)
    assert set(np.unique(signs)) == {-1, 1}
    planes = reference.sample_planes(7, 9, 48, batch_shape=(2,), rng=0)
    assert planes.dtype == np.float32
    assert planes.shape == (2, 48, 63)
    np.testing.assert_array_equal(signs, reference.sample_signs(7, 9, 48, batch_shape=(2, 3), rng=0))
    assert (signs != reference.sample_signs(7, 9, 48, batch_shape=(2, 3), rng=1)).any()


# Cumulation: two hashes, four keys, three queries.
#
#          hash 0   hash 1   value                   hash 0 meets   hash 1 meets
#   key 0       0        0    1, 10         query 0     0: k0 k1     1: k1 k2 k3
#   key 1       0        1    2, 20         query 1     2: k2        1: k1 k2 k3
#   key 2       2        1    4, 40         query 2     3: none      3: none
#   key 3       1        1    8, 80

QUERY_CODE = np.array([[0, 1], [2, 1], [3, 3]], np.int32)
KEY_CODE = np.array([[0, 0], [0, 1], [2, 1], [1, 1]], np.int32)
VALUE = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0], [8.0, 80.0]])
QUERY_WEIGHT = np.array([[1.0, 0.0], [2.0, 1.0], [5.0, 5.0]])
KEY_WEIGHT = np.array([[1.0, 1.0], [3.0, -1.0], [0.0, 2.0], [-1.0, 4.0]])

CUMULATIONS = [reference.lsh_cumulation_pairs, reference.lsh_cumulation_tables]
WEIGHTED = [reference.lsh_weighted_cumulation_pairs, reference.lsh_weighted_cumulation_tables]


def test_collision_rate_by_hand() -> None:
    np.testing.assert_array_equal(
        reference.collision_rate(QUERY_CODE, KEY_CODE),
        [[0.5, 1.0, 0.5, 0.5], [0.0, 0.5, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]],
    )


@pytest.mark.parametrize("cumulation", CUMULATIONS)
def test_cumulation_by_hand(cumulation: Any) -> None:
    # Query 0: (1 + 2) + (2 + 4 + 8) = 17, over 2 hashes 8.5. Query 1: 4 + 14 = 18, so 9. Query 2
    # meets no key.
    np.testing.assert_array_equal(cumulation(QUERY_CODE, KEY_CODE, VALUE, 4), [[8.5, 85], [9, 90], [0, 0]])


@pytest.mark.parametrize("cumulation", CUMULATIONS)
def test_masked_cumulation_by_hand(cumulation: Any) -> None:
    # Without key 2: query 0 has (1 + 2) + (2 + 8) = 13, query 1 has 0 + 10. The masked value may
    # hold anything; query 0 is masked below.
    value = VALUE.copy()
    value[2] = [np.nan, np.inf]
    keep_key = np.array([1, 1, 0, 5])
    np.testing.assert_array_equal(cumulation(QUERY_CODE, KEY_CODE, value, 4, key_mask=keep_key), [[6.5, 65], [5, 50], [0, 0]])
    keep_query = np.array([False, True, True])
    masked = cumulation(QUERY_CODE, KEY_CODE, value, 4, query_mask=keep_query, key_mask=keep_key)
    np.testing.assert_array_equal(masked, [[0, 0], [5, 50], [0, 0]])


@pytest.mark.parametrize("cumulation", CUMULATIONS)
def test_a_nonfinite_value_gives_nan_to_who_meets_it(cumulation: Any) -> None:
    # Key 0 is met by query 0 alone; only its first entry is infinite.
    value = VALUE.copy()
    value[0, 0] = np.inf
    np.testing.assert_array_equal(cumulation(QUERY_CODE, KEY_CODE, value, 4), [[np.nan, 85], [9, 90], [0, 0]])


@pytest.mark.parametrize("cumulation", WEIGHTED)
def test_weighted_cumulation_by_hand(cumulation: Any) -> None:
    # Weights a_0 . b = 1, 3, 0, -1 and a_1 . b = 3, 5, 2, 2. Query 0: (1 * 1 + 3 * 2) + (3 * 2 + 0
    # * 4 - 1 * 8) = 7 - 2 = 5, so 2.5. Query 1: 2 * 4 + (5 * 2 + 2 * 4 + 2 * 8) = 42, so 21.
    out = cumulation(QUERY_CODE, QUERY_WEIGHT, KEY_CODE, KEY_WEIGHT, VALUE, 4)
    np.testing.assert_array_equal(out, [[2.5, 25], [21, 210], [0, 0]])


@pytest.mark.parametrize("cumulation", WEIGHTED)
def test_masked_weighted_cumulation_by_hand(cumulation: Any) -> None:
    # Without key 1: query 0: 1 * 1 + (0 * 4 - 1 * 8) = -7, so -3.5. Query 1: 2 * 4 + (2 * 4 + 2 *
    # 8) = 32, so 16.
    value, key_weight = VALUE.copy(), KEY_WEIGHT.copy()
    value[1] = key_weight[1] = np.nan
    keep = np.array([True, False, True, True])
    out = cumulation(QUERY_CODE, QUERY_WEIGHT, KEY_CODE, key_weight, value, 4, key_mask=keep)
    np.testing.assert_array_equal(out, [[-3.5, -35], [16, 160], [0, 0]])


@pytest.mark.parametrize("cumulation", WEIGHTED)
def test_a_nonfinite_query_weight_gives_nan_in_its_row(cumulation: Any) -> None:
    query_weight = QUERY_WEIGHT.copy()
    query_weight[2, 0] = np.inf  # query 2 meets no key, and still says so
    out = cumulation(QUERY_CODE, query_weight, KEY_CODE, KEY_WEIGHT, VALUE, 4)
    np.testing.assert_array_equal(out, [[2.5, 25], [21, 210], [np.nan, np.nan]])


@pytest.mark.parametrize("cumulation", CUMULATIONS)
def test_float16_values_are_added_in_float32(cumulation: Any) -> None:
    # 2048 + 1 + 1 is 2050, which float16 has; adding in float16 would stay at 2048.
    codes = np.zeros((3, 1), np.int32)
    out = cumulation(codes, codes, np.array([[2048], [1], [1]], np.float16), 1)
    assert out.dtype == np.float16
    np.testing.assert_array_equal(out, [[2050]] * 3)


# Expectation

DIRECTIONS = np.array([[1.0, 0.0], [0.5, ROOT_3 / 2], [0.0, 1.0], [-1.0, 0.0]])  # at 0, 60, 90 and 180 degrees from (1, 0)


def test_angles() -> None:
    np.testing.assert_allclose(reference.angles(DIRECTIONS[0], DIRECTIONS), [0, np.pi / 3, np.pi / 2, np.pi], rtol=1e-15, atol=0)


@pytest.mark.parametrize("tau", [1, 2, 30])
def test_expectation_by_hand(tau: int) -> None:
    # 1 - theta / pi is 1, 2/3, 1/2 and 0. With the unit rows as values every weight stands alone.
    out = reference.expectation_attention(DIRECTIONS[:1], DIRECTIONS, np.eye(4), tau)
    np.testing.assert_allclose(out, [[1, (2 / 3) ** tau, 0.5**tau, 0]], rtol=1e-13, atol=1e-300)


def test_expectation_adds_weighted_values_and_skips_what_is_masked() -> None:
    # tau = 2: 1 * 1 + 4/9 * 9 + 1/4 * 4 + 0 * 100 = 6; without the second 2.
    value = np.array([[1.0], [9.0], [4.0], [100.0]])
    np.testing.assert_allclose(reference.expectation_attention(DIRECTIONS[:1], DIRECTIONS, value, 2), [[6]], rtol=1e-15)
    value[1] = np.nan
    query, keep = DIRECTIONS[[0, 0]], np.array([1, 0, 1, 1])
    out = reference.expectation_attention(query, DIRECTIONS, value, 2, query_mask=np.array([1, 0]), key_mask=keep)
    np.testing.assert_allclose(out, [[2], [0]], rtol=1e-15)


@pytest.mark.parametrize("query", [[0.0, 0.0], [1.0, 0.0]])
def test_a_zero_vector_is_perpendicular_to_all(query: list[float]) -> None:
    # Zero query or zero key, also zero against zero: cosine 0, so (1/2)**3.
    key = np.zeros((1, 2))
    np.testing.assert_allclose(reference.expectation_attention(np.array([query]), key, np.ones((1, 1)), 3), [[0.125]], rtol=1e-15)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_expectation_does_not_see_the_scale(scale: float) -> None:
    query, key = (DIRECTIONS * scale).astype(np.float32), DIRECTIONS.astype(np.float32)
    value = np.eye(4, dtype=np.float32)
    scaled, plain = (reference.expectation_attention(q, key, value, 9) for q in (query, key))
    np.testing.assert_allclose(scaled, plain, rtol=1e-5, atol=1e-6)


def test_a_vector_that_is_not_finite_gives_nan() -> None:
    value = np.ones((4, 1))
    query = np.array([[1.0, 0.0], [np.inf, 0.0], [np.nan, 1.0]])
    np.testing.assert_array_equal(np.isnan(reference.expectation_attention(query, DIRECTIONS, value, 2)), [[False], [True], [True]])
    for nonfinite in (np.nan, np.inf):
        key = DIRECTIONS.copy()
        key[3, 1] = nonfinite
        assert np.isnan(reference.expectation_attention(query, key, value, 2)).all()


# Normalization


def test_l2_normalize_by_hand() -> None:
    x = np.array([[3.0, 4.0], [0.0, 0.0], [-5.0, 12.0], [np.inf, 1.0]])
    np.testing.assert_allclose(reference.l2_normalize(x), [[0.6, 0.8], [0, 0], [-5 / 13, 12 / 13], [np.nan, np.nan]], rtol=1e-15)


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e30, 3e38])
def test_l2_normalize_at_the_ends_of_float32(scale: float) -> None:
    x = np.full((1, 4), scale, np.float32)
    np.testing.assert_allclose(reference.l2_normalize(x), [[0.5] * 4], rtol=1e-6)


def test_a_row_below_the_threshold_becomes_zeros() -> None:
    x = np.array([[1e-13, 0.0], [1e-11, 0.0]])
    np.testing.assert_array_equal(reference.l2_normalize(x, reference.TINY_NORM), [[0, 0], [1, 0]])
    np.testing.assert_array_equal(reference.l2_normalize_backward(np.ones((2, 2)), x, reference.TINY_NORM), [[0, 0], [0, 1e11]])


def test_l2_normalize_widens_float16() -> None:
    unit = reference.l2_normalize(np.array([[6e4, 6e4]], np.float16))  # its square would overflow
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[np.sqrt(0.5)] * 2], rtol=1e-6)


def test_l2_normalize_backward_by_hand() -> None:
    # y = (0.6, 0.8), |x| = 5, g = (1, 0): g - (g . y) y = (1 - 0.36, -0.48), over 5.
    np.testing.assert_allclose(
        reference.l2_normalize_backward(np.array([[1.0, 0.0]]), np.array([[3.0, 4.0]])), [[0.128, -0.096]], rtol=1e-14
    )


# Gradients


def test_one_pair_at_a_right_angle_by_hand() -> None:
    # E = 2**-tau at 90 degrees, g . v = 6. Lower bound: dq = E tau/2 6 k; exact: E tau / (pi/2 * 1)
    # 6 k. tau = 2: 1.5 and 1.5 * 4 / pi.
    query, key = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    grad_out, value = np.array([[2.0]]), np.array([[3.0]])
    lower = reference.expectation_attention_backward(grad_out, query, key, value, 2)
    for got, expected in zip(lower, ([[0, 1.5]], [[1.5, 0]], [[0.5]]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-15)
    exact = reference.expectation_attention_backward(grad_out, query, key, value, 2, grad="exact")
    for got, expected in zip(exact, ([[0, 6 / np.pi]], [[6 / np.pi, 0]], [[0.5]]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("tau", [1, 8])
def test_the_lower_bound_lies_at_least_9_percent_below_the_derivative(tau: int) -> None:
    # (pi - theta) sin(theta) is at most 1.8197 (at theta = 1.1127), so exact / lower = 2 / that is
    # at least 1.099; it has no upper bound.
    theta = np.linspace(0.01, np.pi - 0.01, 10_000)
    ratio = reference.gradient_factor(theta, tau, "exact") / reference.gradient_factor(theta, tau, "lower_bound")
    assert ratio.min() == pytest.approx(1.0991, abs=1e-4)
    assert ratio[0] > 60


@pytest.mark.parametrize("tau", [1, 8])
def test_the_exact_factor_is_the_derivative_by_the_cosine(tau: int) -> None:
    cosine, step = np.linspace(-0.99, 0.99, 199), 1e-6
    weight = [reference.expected_weight(np.arccos(cosine + sign * step), tau) for sign in (1, -1)]
    slope = (weight[0] - weight[1]) / (2 * step)
    theta = np.arccos(cosine)
    derivative = reference.expected_weight(theta, tau) * reference.gradient_factor(theta, tau, "exact")
    np.testing.assert_allclose(derivative, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
@pytest.mark.parametrize("masked", [False, True])
def test_sampled_gradients_are_the_double_sum(grad: Any, masked: bool) -> None:
    rng = np.random.default_rng(0)
    query, key, value, grad_out = (rng.standard_normal(shape) for shape in ((5, 3), (6, 3), (6, 2), (5, 2)))
    query_code, key_code = (rng.integers(0, 4, size=(n, 7)).astype(np.int32) for n in (5, 6))
    keep_query = rng.random(5) > 0.3 if masked else np.ones(5, bool)
    keep_key = rng.random(6) > 0.3 if masked else np.ones(6, bool)
    tau = 2
    expected: list[Array] = [np.zeros_like(x) for x in (query, key, value)]
    for i in np.flatnonzero(keep_query):
        for j in np.flatnonzero(keep_key):
            q, k = query[i] / np.linalg.norm(query[i]), key[j] / np.linalg.norm(key[j])
            theta = np.arccos(q @ k)
            w = tau / 2 if grad == "lower_bound" else tau / ((np.pi - theta) * np.sin(theta))
            share = np.mean(query_code[i] == key_code[j])
            grad_cosine = share * w * (grad_out[i] @ value[j])
            expected[0][i] += grad_cosine * (k - (k @ q) * q) / np.linalg.norm(query[i])
            expected[1][j] += grad_cosine * (q - (q @ k) * k) / np.linalg.norm(key[j])
            expected[2][j] += share * grad_out[i]
    got = reference.lsh_attention_backward(
        grad_out, query, key, value, query_code, key_code, tau, grad=grad, query_mask=keep_query, key_mask=keep_key
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-14)


# Attention as a whole


def test_attention_by_hand() -> None:
    # One hash of one bit in one dimension: D = 1, the bit is the sign of x times D1 ... D4 = 1.
    # Queries +, -, 0 and keys +, +, -: codes 1, 0, 0 and 1, 1, 0. Sums (3, 4) + (0, 0), then (0, 0)
    # alone, which has no direction; unnormalized 3, 4 and 0, 0.
    query, key = np.array([[2.0], [-0.5], [0.0]]), np.array([[1.0], [7.0], [-1.0]])
    value = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])
    signs = np.ones((4, 1), np.int8)
    options = {"num_hash": 1, "hash_code_len": 1, "signs": signs}
    np.testing.assert_allclose(reference.yoso_attention(query, key, value, **options), [[0.6, 0.8], [0, 0], [0, 0]], rtol=1e-15)
    raw = reference.yoso_attention(query, key, value, **options, normalize_output=False)
    np.testing.assert_array_equal(raw, [[3, 4], [0, 0], [0, 0]])


def test_attention_that_meets_what_is_not_finite() -> None:
    query, key, value = np.array([[1.0], [-1.0], [np.nan]]), np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])
    signs = np.ones((4, 1), np.int8)
    options = {"num_hash": 1, "hash_code_len": 1, "signs": signs}
    np.testing.assert_array_equal(reference.yoso_attention(query, key, value, **options), [[1], [0], [np.nan]])
    np.testing.assert_array_equal(reference.yoso_attention(query, np.array([[1.0], [np.inf]]), value, **options), [[np.nan]] * 3)
    keep = np.array([True, False])
    masked = reference.yoso_attention(query, np.array([[1.0], [np.inf]]), value, **options, key_mask=keep)
    np.testing.assert_array_equal(masked, [[1], [0], [np.nan]])


def test_attention_samples_by_signs_or_planes_and_needs_one() -> None:
    x = np.ones((1, 1))
    with pytest.raises(ValueError, match="signs or planes"):
        reference.yoso_attention(x, x, x)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_output_has_the_dtype_of_the_value(dtype: Any) -> None:
    query, key, value = (DIRECTIONS.astype(dtype) for _ in range(3))
    signs = reference.sample_signs(3, 2, 2, rng=0)
    assert reference.yoso_attention(query, key, value, num_hash=3, hash_code_len=2, signs=signs).dtype == dtype
    assert reference.expectation_attention(query, key, value, 2).dtype == dtype
    assert all(x.dtype == dtype for x in reference.expectation_attention_backward(value, query, key, value, 2))
    codes = np.zeros((4, 1), np.int32)
    assert all(x.dtype == dtype for x in reference.lsh_attention_backward(value, query, key, value, codes, codes, 2))
    for cumulation in CUMULATIONS:
        assert cumulation(codes, codes, value, 1).dtype == dtype
    for cumulation in WEIGHTED:
        assert cumulation(codes, query, codes, key, value, 1).dtype == dtype


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("tau", [1, 8, 30])
def test_identical_vectors_have_weight_1(dtype: Any, tau: int) -> None:
    x = np.random.default_rng(0).standard_normal((137, 1, 48)).astype(dtype)
    out = reference.expectation_attention(x, x.copy(), np.ones((137, 1, 1), dtype), tau)
    np.testing.assert_allclose(out, 1, atol=1e-5)
