"""How far a sampled row may be from its expectation: the error bar, hashes until it is small
enough, and the plan that predicts it. Every statistical check has twins that it must reject.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch
from typer.testing import CliRunner

import yoso_core
from yoso_core import own_kernel, planning, reference
from yoso_core.benchmarks import error as bench
from yoso_core.cli import app
from yoso_core.reference.arrays import Array
from yoso_core.truth import tolerance, truth

ROOT = Path(__file__).parents[1]
REFERENCE = "numpy:formula"


def draw(
    n: int = 40, d: int = 16, d_v: int = 8, *, leading: tuple[int, ...] = (2,), seed: int = 0, dtype: str = "float32"
) -> tuple[Array, ...]:
    """Queries near keys, so that codes meet."""
    rng = np.random.default_rng(seed)
    key = rng.standard_normal((*leading, n, d))
    query = key + 0.5 * rng.standard_normal(key.shape)
    return query.astype(dtype), key.astype(dtype), rng.standard_normal((*leading, n, d_v)).astype(dtype)


def attend(*arrays: Any, **options: Any) -> Any:
    return yoso_core.yoso_attention(*arrays, **{"layout": "chained"} | options)


# The definition


def test_two_hashes_by_hand() -> None:
    """The first hash meets both keys, the second only the other one."""
    planes = np.eye(2, dtype=np.float32)
    query, key = np.array([[1.0, 1.0]]), np.array([[1.0, -1.0], [1.0, 1.0]])
    options = {"num_hash": 2, "hash_code_len": 1, "planes": planes, "normalize_output": False, "return_error": True}
    out, error = yoso_core.yoso_attention(query, key, np.array([[2.0, 0.0], [0.0, 3.0]]), **options)  # type: ignore[arg-type]
    np.testing.assert_array_equal(out, [[1.0, 3.0]])  # the hashes' rows are (2, 3) and (0, 3)
    np.testing.assert_allclose(error, [np.sqrt(2 / 2 / 10)])
    assert error.dtype == np.float32


def slow_error(query: Array, key: Array, value: Array, signs: Array, m: int, tau: int, s: int, masks: dict[str, Array]) -> Array:
    """Hash by hash, coordinate by coordinate, in float64."""
    codes = [reference.fast_hash(x, signs, m, tau + s, layout="chained") for x in (query, key)]
    rows = [
        reference.lsh_cumulation_pairs(q, k, value.astype(np.float64), 1 << (tau + s), oversample=s, **masks)
        for q, k in ((codes[0][..., h : h + 1], codes[1][..., h : h + 1]) for h in range(m))
    ]
    found = np.zeros(query.shape[:-1])
    for at in np.ndindex(found.shape):
        spread = [np.std([row[at][c] for row in rows], ddof=1) for c in range(value.shape[-1])]
        mean = np.mean([row[at] for row in rows], axis=0)
        if masks and not masks["query_mask"][at]:
            continue
        found[at] = np.sqrt(np.sum(np.square(spread)) / m) / np.linalg.norm(mean) if mean.any() else np.inf
    return found


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("s", [0, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_error_is_what_its_formula_says(dtype: str, s: int, masked: bool) -> None:
    query, key, value = draw(dtype=dtype)
    tau = 6 if s else 9  # so that some queries meet no key
    signs = yoso_core.sample_signs(5, tau + s, 16, layout="chained", rng=1)
    rng = np.random.default_rng(2)
    masks = {name: rng.random((2, 40)) > 0.3 for name in ("query_mask", "key_mask")} if masked else {}
    options: dict[str, Any] = {"num_hash": 5, "hash_code_len": tau, "oversample": s, "signs": signs, **masks}
    options["variant"] = REFERENCE
    out, error = attend(query, key, value, return_error=True, **options)
    np.testing.assert_array_equal(out, attend(query, key, value, **options))
    expected = slow_error(query, key, value, signs, 5, tau, s, masks)
    assert (expected == np.inf).any() or s
    np.testing.assert_allclose(error, expected, rtol=1e-4 if dtype != "float64" else 1e-6)
    assert error.dtype == np.float32
    plain, length, again = yoso_core.ops.yoso_attention(
        query, key, value, layout="chained", return_length=True, return_error=True, **options
    )
    assert length.shape == (2, 40, 1)
    np.testing.assert_array_equal(plain, out)
    np.testing.assert_array_equal(again, error)


def test_masked_rows_have_no_error_and_rows_without_a_key_an_infinite_one() -> None:
    query, key, value = draw()
    keep_query, keep_key = np.ones((2, 40), bool), np.ones((2, 40), bool)
    keep_query[0, :5] = False
    keep_key[1] = False
    query[0, :5] = np.nan
    key[1], value[1] = np.nan, np.inf
    _, error = attend(query, key, value, num_hash=4, hash_code_len=3, query_mask=keep_query, key_mask=keep_key, return_error=True, rng=0)
    assert (error[0, :5] == 0).all()
    assert np.isfinite(error[0]).all()
    assert (error[1] == np.inf).all()


def test_a_row_that_is_not_finite_has_no_finite_error() -> None:
    query, key, value = draw()
    query[0, 3], value[1, 7, 2] = np.inf, np.nan
    out, error = attend(query, key, value, num_hash=4, hash_code_len=3, return_error=True, rng=0)
    np.testing.assert_array_equal(np.isnan(error), np.isnan(out).any(axis=-1))
    assert np.isnan(error[0, 3])
    assert np.isnan(error[1]).any()


def test_hashes_that_agree_leave_no_error() -> None:
    x = np.ones((3, 8), np.float32)
    _, error = attend(x, x, x, num_hash=8, return_error=True, rng=0)
    np.testing.assert_array_equal(error, 0)


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 2.0**-100), ("float32", 2.0**100), ("float64", 2.0**-900), ("float64", 2.0**900)])
def test_the_scale_of_the_values_does_not_matter(dtype: str, scale: float) -> None:
    query, key, value = draw(dtype=dtype)
    options: dict[str, Any] = {"num_hash": 8, "hash_code_len": 4, "return_error": True, "rng": 0, "normalize_output": False}
    np.testing.assert_allclose(attend(query, key, value * np.array(scale, dtype), **options)[1], attend(query, key, value, **options)[1])


def test_no_rows_no_errors() -> None:
    empty = np.zeros((2, 0, 4), np.float32)
    x = np.ones((2, 3, 4), np.float32)
    assert attend(empty, x, x, return_error=True, rng=0)[1].shape == (2, 0)
    assert (attend(x, empty, empty, return_error=True, rng=0)[1] == np.inf).all()


def test_what_has_no_spread_is_refused() -> None:
    query, key, value = draw()
    with pytest.raises(ValueError, match=r"^return_error: the expectation is no estimate"):
        attend(query, key, value, use_expectation=True, return_error=True)
    with pytest.raises(ValueError, match=r"^return_error: .* needs num_hash of at least 2, got 1$"):
        attend(query, key, value, num_hash=1, return_error=True, rng=0)
    signs = yoso_core.sample_signs(1, 8, 16, rng=0)
    with pytest.raises(ValueError, match=r"^return_error: needs two sampled hashes"):
        reference.yoso_attention(query, key, value, num_hash=1, signs=signs, return_error=True)


# Kernels


@pytest.mark.parametrize("variant", [v.name for v in support.on_the_cpu("yoso_attention")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("s", [0, 1])
def test_a_kernel_has_the_definitions_error(variant: str, dtype: str, s: int) -> None:
    query, key, value = draw(dtype=dtype, n=33)
    signs = yoso_core.sample_signs(6, 5 + s, 16, layout="chained", rng=1)
    call = {"query": query, "key": key, "value": value, "num_hash": 6, "hash_code_len": 5, "oversample": s, "signs": signs}
    call |= {"layout": "chained", "return_error": True, "key_mask": np.arange(33)[None] < 20}
    found = yoso_core.yoso_attention(**call, variant=variant)
    for got, right, allowed in zip(found, truth("yoso_attention", (), call), tolerance("yoso_attention", (), call), strict=True):
        finite = np.isfinite(right)
        np.testing.assert_array_equal(np.isinf(got), np.isinf(right))
        assert (np.abs(got - right)[finite] <= allowed[finite]).all()


Rows = Callable[..., tuple[Array, Array]]


def twin(of_square: Callable[[Array, int], Array]) -> Rows:
    """The definition, with the square of its error changed."""

    def spoiled(query: Array, key: Array, value: Array, *, num_hash: int = 32, return_error: bool = False, **options: Any) -> Any:
        found = reference.yoso_attention(query, key, value, num_hash=num_hash, return_error=return_error, **options)
        return (found[0], np.sqrt(of_square(found[1] ** 2, num_hash)).astype(np.float32)) if return_error else found

    return spoiled


TWINS: dict[str, Rows] = {
    "divisor m": twin(lambda square, m: square * (m - 1) / m),
    "1/m forgotten": twin(lambda square, m: square * m),
    "the mean not taken off": twin(lambda square, m: square + 1 / (m - 1)),
}


def test_a_comparison_takes_the_error_and_rejects_wrong_ones() -> None:
    right = twin(lambda square, m: square)
    found = yoso_core.compare(
        "yoso_attention", *draw(), num_hash=6, hash_code_len=4, return_error=True, repeats=1, rng=0, also={"right": right} | TWINS
    )
    verdicts = {row.variant: row.verdict for row in found.rows}
    assert verdicts[REFERENCE] == verdicts["right"] == "agrees"
    assert {verdicts[name] for name in TWINS} == {"disagrees"}


def test_kernels_of_readers() -> None:
    arrays, usual = draw(), own_kernel.PLAIN["layout"]

    def knows_nothing_of_it(query: Array, key: Array, value: Array, *, num_hash: int = 32, hash_code_len: int = 8, **signs: Any) -> Array:
        raise AssertionError("was called")

    def plain(query: Array, key: Array, value: Array, *, num_hash: int, hash_code_len: int, signs: Array, use_expectation: bool,
              normalize_output: bool) -> Any:  # fmt: skip
        options = {"num_hash": num_hash, "hash_code_len": hash_code_len, "signs": signs, "normalize_output": normalize_output}
        return reference.yoso_attention(query, key, value, layout=usual, **options)  # type: ignore[arg-type]

    def of_wrong_shape(query: Array, key: Array, value: Array, **options: Any) -> Any:
        out, error = reference.yoso_attention(query, key, value, **options)
        return out, error[..., None]

    with yoso_core.register("yoso_attention", "mine", plain):
        assert yoso_core.yoso_attention(*arrays, layout=usual, variant="mine", rng=0).shape == (2, 40, 8)
        with pytest.raises(ValueError, match=r"^return_error: this kernel does not take it"):
            yoso_core.yoso_attention(*arrays, layout=usual, variant="mine", rng=0, return_error=True)
    with yoso_core.register("yoso_attention", "mine", of_wrong_shape), pytest.raises(ValueError, match=r"returned shape \(2, 40, 1\)"):
        attend(*arrays, variant="mine", rng=0, return_error=True)
    with yoso_core.register("yoso_attention", "mine", TWINS["divisor m"]):
        asked = yoso_core.ops.yoso_attention(*arrays, layout="chained", variant="mine", rng=0, return_length=True, return_error=True)
        assert [x.shape for x in asked] == [(2, 40, 8), (2, 40, 1), (2, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tensors(dtype: torch.dtype) -> None:
    query, key, value = (torch.from_numpy(x).to(dtype) for x in draw())
    out, error = attend(query, key, value, num_hash=8, hash_code_len=4, return_error=True, rng=0)
    assert (out.dtype, error.dtype, error.shape) == (dtype, torch.float32, (2, 40))
    widened = [x.float().numpy() for x in (query, key, value)]
    np.testing.assert_allclose(error.numpy(), attend(*widened, num_hash=8, hash_code_len=4, return_error=True, rng=0)[1], rtol=1e-5)
    both = {"return_error": {"return_error": True}, "target_error": {"target_error": 0.5}}
    for name, asked in both.items():
        with pytest.raises(ValueError, match=rf"^{name}: not with gradients"):
            attend(query.clone().requires_grad_(), key, value, **asked)
        with pytest.raises(ValueError, match=rf"^{name}: not with gradients, under autocast"), torch.autocast("cpu"):
            attend(query, key, value, **asked)
        with pytest.raises(ValueError, match=rf"^{name}: not with gradients"):
            attend(query.to("meta"), key.to("meta"), value.to("meta"), **asked)
        with torch.no_grad():
            attend(query.clone().requires_grad_(), key, value, rng=0, num_hash=4, hash_code_len=3, **asked)


# Hashes until the error is small enough


def groups_by_hand(arrays: tuple[Array, ...], number: int, size: int, tau: int, s: int, rng: int) -> list[tuple[Array, Array]]:
    """Mean and error over the hashes of the first group, of the first two, and so on, each drawn
    from one generator in turn.
    """
    query, value = arrays[0], arrays[2].astype(np.float64)
    source, rows, found = np.random.default_rng(rng), [], []
    for _ in range(number):
        signs = yoso_core.sample_signs(size, tau + s, query.shape[-1], batch_shape=query.shape[-3:-2], layout="chained", rng=source)
        codes = [reference.fast_hash(x, signs, size, tau + s, layout="chained") for x in arrays[:2]]
        for h in range(size):
            one = (code[..., h : h + 1] for code in codes)
            rows.append(reference.lsh_cumulation_tables(*one, value, 1 << (tau + s), oversample=s))
        mean = np.mean(rows, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.sqrt(np.var(rows, axis=0, ddof=1).sum(axis=-1) / len(rows)) / np.linalg.norm(mean, axis=-1)
        found.append((mean, np.where(mean.any(axis=-1), error, np.inf)))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("s", [0, 2])
def test_groups_together_are_one_sample(dtype: str, s: int) -> None:
    arrays = draw(dtype=dtype)
    options: dict[str, Any] = {"num_hash": 4, "hash_code_len": 6, "oversample": s, "rng": 3}
    out, error, used = attend(*arrays, target_error=1e-9, max_num_hash=21, **options)
    assert used == 20
    mean, expected = groups_by_hand(arrays, 5, 4, 6, s, 3)[-1]
    np.testing.assert_allclose(error, expected, rtol=2e-5)
    np.testing.assert_allclose(out, reference.l2_normalize(mean), atol=2e-6)
    raw, _, _ = attend(*arrays, target_error=1e-9, max_num_hash=21, normalize_output=False, **options)
    np.testing.assert_allclose(raw, mean, atol=2e-6)
    assert (out.dtype, error.dtype, type(used)) == (np.dtype(dtype), np.float32, int)


def test_it_stops_at_the_first_group_that_is_near_enough() -> None:
    arrays = draw(n=60, leading=())
    errors = [error for _, error in groups_by_hand(arrays, 16, 8, 5, 0, 1)]
    for target, quantile in ((0.5, 0.5), (0.5, 0.9), (0.3, 0.9), (0.3, 1.0)):
        _, error, used = attend(*arrays, num_hash=8, hash_code_len=5, target_error=target, quantile=quantile, rng=1)
        first = next((i for i, e in enumerate(errors) if np.mean(e <= target) >= quantile), 15)
        assert used == 8 * (first + 1)
        np.testing.assert_allclose(error, errors[first], rtol=2e-5)


def test_rows_that_can_come_no_nearer_do_not_count() -> None:
    query, key, value = draw(n=60)
    keep_query, keep_key = np.ones((2, 60), bool), np.ones((2, 60), bool)
    keep_query[0, 10:] = False  # far from every key
    query[0, 10:] = -key[0].mean(axis=0)
    keep_key[1] = False
    query[0, 0] = np.nan
    options: dict[str, Any] = {"num_hash": 8, "hash_code_len": 5, "target_error": 0.6, "quantile": 1.0, "rng": 1}
    _, error, used = attend(query, key, value, query_mask=keep_query, key_mask=keep_key, **options)
    assert used < 128
    assert (error[0, 1:10] <= 0.6).all()
    assert (error[0, 10:] == 0).all()
    assert np.isnan(error[0, 0])
    assert (error[1] == np.inf).all()
    nothing = attend(query, key, value, query_mask=np.zeros((2, 60), bool), **options)
    assert nothing[2] == 8


def test_half_precision_is_rounded_once() -> None:
    query, key, value = draw(dtype="float16")
    options: dict[str, Any] = {"num_hash": 4, "hash_code_len": 5, "target_error": 0.3, "rng": 0}
    out, error, used = attend(query, key, value, **options)
    wide = attend(query.astype(np.float32), key.astype(np.float32), value.astype(np.float32), **options)
    assert (out.dtype, used) == (np.float16, wide[2])
    np.testing.assert_allclose(out.astype(np.float64), wide[0], rtol=2.0**-11, atol=2.0**-25)
    np.testing.assert_array_equal(error, wide[1])


@pytest.mark.parametrize(("dtype", "scale"), [("float32", 2.0**-80), ("float32", 2.0**100), ("float64", 2.0**900)])
def test_groups_of_any_scale(dtype: str, scale: float) -> None:
    query, key, value = draw(dtype=dtype)
    options: dict[str, Any] = {"num_hash": 4, "hash_code_len": 5, "target_error": 0.3, "rng": 0, "normalize_output": False}
    (out, error, used), (right, right_error, right_used) = (attend(query, key, value * np.array(x, dtype), **options) for x in (scale, 1.0))
    np.testing.assert_array_equal(out, right * np.array(scale, dtype))
    np.testing.assert_array_equal(error, right_error)
    assert used == right_used


def test_tensors_come_back_as_tensors() -> None:
    query, key, value = (torch.from_numpy(x).bfloat16() for x in draw())
    out, error, used = attend(
        query, key, value, num_hash=4, hash_code_len=5, target_error=0.3, rng=0, key_mask=torch.ones(2, 40, dtype=torch.int32)
    )
    assert (out.dtype, error.dtype, type(used)) == (torch.bfloat16, torch.float32, int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_error": 0.0}, "target_error: need a number above 0, got 0"),
        ({"target_error": "0.1"}, "target_error: need a number, got str '0.1'"),
        ({"target_error": True}, "target_error: need a number, got bool True"),
        ({"target_error": 0.1, "quantile": 1.5}, "quantile: need a number above 0 and up to 1, got 1.5"),
        ({"target_error": 0.1, "max_num_hash": 31}, "max_num_hash: need an integer at least 32, got 31"),
        ({"target_error": 0.1, "num_hash": 1}, "target_error: the spread between hashes needs num_hash of at least 2, got 1"),
        ({"target_error": 0.1, "use_expectation": True}, "target_error: the expectation is no estimate"),
        ({"target_error": 0.1, "signs": np.ones((1, 1, 1), np.int8)}, "signs: target_error draws every group"),
        ({"target_error": 0.1, "planes": np.ones((1, 1), np.float32)}, "planes: target_error draws every group"),
    ],
)
def test_what_a_target_does_not_go_with(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        attend(*draw(), **options)


# The error bar is right on average; its twins are not


FEW = 4
"""Hashes, so that a wrong divisor shows."""


@cache
def squares_over_draws() -> tuple[Array, Array, Array]:
    """Over 300 draws of planes: the squared error that is claimed, the squared length, and the real
    squared error, of every row.
    """
    rng = np.random.default_rng(0)
    query, key, value = draw(n=48, leading=(), dtype="float64")
    exact = reference.expectation_attention(query, key, value, 4)
    found = []
    for _ in range(300):
        planes = yoso_core.sample_planes(FEW, 4, 16, rng=rng)
        options: dict[str, Any] = {"num_hash": FEW, "hash_code_len": 4, "planes": planes, "normalize_output": False, "return_error": True}
        out, error = reference.yoso_attention(query, key, value, **options)
        squared_length = np.sum(out**2, axis=-1)
        found.append((np.where(squared_length > 0, error, 0) ** 2, squared_length, np.sum((out - exact) ** 2, axis=-1)))
    claimed, length, real = (np.array(x) for x in zip(*found, strict=True))
    return claimed, length, real


def claimed_over_real(of_square: Callable[[Array, int], Array]) -> tuple[float, float]:
    """Mean of the claimed squared error over that of the real one, and its standard error over
    draws.
    """
    square, length, real = squares_over_draws()
    claimed, right = np.mean(of_square(square, FEW) * length, axis=1), np.mean(real, axis=1)
    ratio = np.mean(claimed) / np.mean(right)
    spread = np.std((claimed - ratio * right) / np.mean(right), ddof=1)
    return float(ratio), float(spread / np.sqrt(len(right)))


def test_the_squared_error_is_unbiased() -> None:
    ratio, error = claimed_over_real(lambda square, m: square)
    assert error < 0.04
    assert abs(ratio - 1) < 3 * error


@pytest.mark.parametrize(
    "spoil", [lambda square, m: square * (m - 1) / m, lambda square, m: square * m], ids=["divisor m", "1/m forgotten"]
)
def test_the_check_rejects(spoil: Callable[[Array, int], Array]) -> None:
    ratio, error = claimed_over_real(spoil)
    assert abs(ratio - 1) > 3 * error


# The closed forms


def by_enumeration(tau: int, s: int, together: float, p_j: float, p_k: float) -> float:
    """``E[W_j W_k]`` over all patterns of ``tau + s`` bits, each with four ways to agree, and all
    choices of ``tau`` bits.
    """
    chances = {(1, 1): together, (1, 0): p_j - together, (0, 1): p_k - together, (0, 0): 1 - p_j - p_k + together}
    choices = list(combinations(range(tau + s), tau))
    total = 0.0
    for pattern in product(chances, repeat=tau + s):
        shares = [np.mean([all(pattern[bit][key] for bit in chosen) for chosen in choices]) for key in (0, 1)]
        total += float(np.prod([chances[bit] for bit in pattern])) * shares[0] * shares[1]
    return total


@pytest.mark.parametrize(("tau", "s"), [(1, 0), (2, 1), (2, 2), (1, 3)])
def test_the_mean_product_is_that_of_every_pattern(tau: int, s: int) -> None:
    together, p_j, p_k = 0.35, 0.6, 0.5
    found = planning.mean_product(np.array([together]), np.array([p_j * p_k]), tau, s)[0]
    assert found == pytest.approx(by_enumeration(tau, s, together, p_j, p_k))


@pytest.mark.parametrize(("tau", "s"), [(8, 0), (8, 2), (12, 4)])
def test_the_two_closed_forms_of_a_pair_are_one(tau: int, s: int) -> None:
    """By the overlap of two choices, and by the Hamming distance."""
    p = 2 / 3
    by_distance = sum(
        math.comb(tau + s, r) * p ** (tau + s - r) * (1 - p) ** r * a**2 for r, a in enumerate(reference.smoothing_weights(tau, s))
    )
    assert bench.pair_variance(tau, s, 0.5) == pytest.approx(by_distance - p ** (2 * tau))


@cache
def measured_variance(hash: str, tau: int, s: int) -> tuple[float, float]:
    return bench.measured_pair_variance(hash, tau, s, 0.8, draws=40, pairs=500)


def variance_ratio(hash: str, tau: int, s: int, form: Callable[[int, int, float], float]) -> tuple[float, float]:
    variance, error = measured_variance(hash, tau, s)
    return variance / form(tau, s, 0.8) - 1, error / form(tau, s, 0.8)


def with_one_bit_too_few(tau: int, s: int, cosine: float) -> float:
    """``a_(r+1)`` in place of ``a_r``."""
    p, weights = 1 - np.arccos(cosine) / np.pi, (*reference.smoothing_weights(tau, s)[1:], 0.0)
    return float(sum(math.comb(tau + s, r) * p ** (tau + s - r) * (1 - p) ** r * a**2 for r, a in enumerate(weights)) - p ** (2 * tau))


@pytest.mark.parametrize("hash", bench.HASHES)
@pytest.mark.parametrize(("tau", "s"), [(4, 0), (8, 2), (12, 1)])
def test_the_variance_of_a_pair_is_its_closed_form(hash: str, tau: int, s: int) -> None:
    ratio, error = variance_ratio(hash, tau, s, bench.pair_variance)
    assert error < 0.02
    assert abs(ratio) < 0.02 + 3 * error


@pytest.mark.parametrize(("tau", "s"), [(8, 2), (12, 1)])
def test_that_check_rejects_other_forms(tau: int, s: int) -> None:
    def plain(tau: int, s: int, cosine: float) -> float:
        return bench.pair_variance(tau, 0, cosine)

    for form in (with_one_bit_too_few, plain):
        ratio, error = variance_ratio("planes", tau, s, form)
        assert abs(ratio) > 0.02 + 3 * error


def rows_of(arrays: tuple[Array, ...], most: int = 10**6) -> Iterator[Any]:
    """Every query as a row of the plan."""
    query, key, value = (x.astype(np.float64) for x in arrays)
    unit = [reference.l2_normalize(x) for x in (query, key)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "MOST_PAIR_KEYS", most)
        rng = np.random.default_rng(0)
        yield from [planning.with_pairs(planning._Row((), q, unit[1], value), rng) for q in unit[0]]


def clusters(n: int = 64, seed: int = 5) -> tuple[Array, ...]:
    rng = np.random.default_rng(seed)
    centers, at = rng.standard_normal((4, 16)), rng.integers(4, size=(2, n))
    query, key = centers[at] + 0.5 * rng.standard_normal((2, n, 16))
    return query, key, centers[at[1], :8] + rng.standard_normal((n, 8))


def measured_moments(arrays: tuple[Array, ...], tau: int, s: int) -> tuple[float, float]:
    """Mean over rows of the relative variance of one hash, by many planes, and its standard
    error.
    """
    query, key, value = arrays
    exact = reference.expectation_attention(query, key, value, tau)
    found, rng = [], np.random.default_rng(1)
    for _ in range(30):
        planes = yoso_core.sample_planes(100, tau + s, 16, rng=rng)
        codes = [yoso_core.hyperplane_hash(x, planes, 100, tau + s) for x in (query, key)]
        weight = planning.weigher(tau, s)(codes[0][:, None] ^ codes[1])  # (n_q, n_k, m)
        rows = np.einsum("qkm,kc->qmc", weight, value)
        found.append(np.mean(np.sum((rows - exact[:, None]) ** 2, axis=-1).mean(axis=1) / np.sum(exact**2, axis=-1)))
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(30))


@pytest.mark.parametrize(("tau", "s"), [(4, 0), (4, 2), (8, 1)])
def test_the_variance_of_a_row_has_the_covariance_of_its_keys(tau: int, s: int) -> None:
    """And its twin, in which keys are independent, has far too little."""
    arrays = clusters()
    rows = list(rows_of(arrays))
    predicted = np.mean([row.moments(tau, s).variance for row in rows])
    measured, error = measured_moments(arrays, tau, s)
    assert error < 0.02 * measured
    assert abs(predicted - measured) < 4 * error
    for row in rows:
        row.pairs.weight[...] = 0
    assert np.mean([row.moments(tau, s).variance for row in rows]) < 0.8 * measured


def test_drawn_keys_give_the_sum_over_all_pairs_on_average() -> None:
    arrays = clusters(n=200)
    whole = np.array([row.moments(6, 1) for row in rows_of(arrays)])
    drawn = np.array([row.moments(6, 1) for row in rows_of(arrays, most=48)])
    difference = (drawn - whole) / whole.mean(axis=0)
    error = difference.std(axis=0, ddof=1) / np.sqrt(len(difference))
    assert (error < 0.05).all()
    assert (np.abs(difference.mean(axis=0)) < 3.5 * error).all()
    assert (np.abs(drawn - whole).max(axis=0) > 0).all()


# The plan


@pytest.fixture
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds by a count alone, the same on every machine; and few rows."""
    monkeypatch.setattr(planning, "MOST_ROWS", 16)
    monkeypatch.setattr(planning, "measured_rates", lambda caller, key, value: (1e-9, 2e-9, 1e-9))


@pytest.mark.usefixtures("quick_clock")
@pytest.mark.parametrize("kind", ["normal", "clusters"])
def test_predicted_cosines_are_those_that_come(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_ROWS", 128)
    rng = np.random.default_rng(3)
    arrays = tuple(x.astype(np.float32) for x in (clusters(n=128) if kind == "clusters" else [rng.standard_normal((128, 16))] * 3))
    planned = planning.plan(*arrays, hash_code_len=6, num_hash=(8, 32, 96), oversample=(0, 2), rng=0)
    exact = attend(*arrays, hash_code_len=6, use_expectation=True)
    for choice in planned.choices:
        draws = [attend(*arrays, **choice.options, rng=seed) for seed in range(4)]
        measured = np.mean([np.mean(np.sum(out * exact, axis=-1)) for out in draws])
        assert choice.cosine == pytest.approx(measured, abs=0.02)
        assert choice.standard_error < 0.02


@pytest.mark.usefixtures("quick_clock")
def test_the_best_is_the_cheapest_that_reaches_the_cosine() -> None:
    x = np.random.default_rng(0).standard_normal((2, 200, 16)).astype(np.float32)
    planned = planning.plan(x, x, x, cosine=0.9, hash_code_len=(4, 6), oversample=(0, 2), rng=0)
    assert [c.seconds for c in planned.choices] == sorted(c.seconds for c in planned.choices)
    reaching = [c for c in planned.choices if c.cosine >= 0.9]
    assert planned.best is reaching[0]
    assert planned.best in planned.shortlist
    assert [(c.hash_code_len, c.oversample) for c in planned.shortlist] == [(4, 0), (4, 2), (6, 0), (6, 2)]
    assert str(planned.best.options) in str(planned)
    read = json.loads(planned.to_json())
    assert read["best"]["options"] == planned.best.options
    assert len(read["choices"]) == len(planned.choices) == 48
    hopeless = planning.plan(x, x, x, cosine=0.999, num_hash=4, oversample=0, hash_code_len=4, rng=0)
    assert hopeless.best is None
    assert "none reaches" in str(hopeless)
    assert json.loads(hopeless.to_json())["best"] is None


@pytest.mark.usefixtures("quick_clock")
def test_a_plan_is_repeatable_and_takes_masks_and_tensors() -> None:
    query, key, value = clusters(n=96)
    keep = np.arange(96)[None] < 60
    padded = [np.where(keep[0, :, None], x, np.nan)[None].astype(np.float32) for x in (query, key, value)]
    options: dict[str, Any] = {"num_hash": (8, 16), "oversample": 0, "rng": 7}
    with_masks = planning.plan(*padded, query_mask=keep, key_mask=keep, **options)
    cut = planning.plan(*(x[:, :60] for x in padded), **options)
    assert [(c.cosine, c.error) for c in with_masks.choices] == [(c.cosine, c.error) for c in cut.choices]
    tensors = planning.plan(*(torch.from_numpy(x[:, :60]) for x in padded), **options)
    assert [c.cosine for c in tensors.choices] == [c.cosine for c in cut.choices]


def test_more_rows_than_it_looks_at_cost_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured_rates", lambda caller, key, value: (0.0, 0.0, 0.0))
    monkeypatch.setattr(planning, "MOST_ROWS", 32)
    x = np.random.default_rng(0).standard_normal((3, 7, 300, 8)).astype(np.float32)
    assert planning.plan(x, x, x, num_hash=4, oversample=0, rng=0).rows == planning.MOST_ROWS
    assert planning.plan(x[:1, :1, :20], x[:1, :1], x[:1, :1], num_hash=4, oversample=0, rng=0).rows == 20
    monkeypatch.setattr(planning, "MOST_ROW_KEYS", 0)
    assert planning.plan(x, x, x, num_hash=4, oversample=0, rng=0).rows == planning.LEAST_ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cosine": 0}, "cosine: need a number above 0 and up to 1, got 0"),
        ({"num_hash": []}, "num_hash: need at least one number, got none"),
        ({"oversample": 25}, "oversample: need an integer between 0 and 22, got 25"),
        ({"query_mask": np.zeros((1, 40), bool)}, "query: no row is kept that has a key to meet"),
        ({"value": np.zeros((2, 40, 8), np.float32)}, "value: no row that is kept has an expectation other than zero"),
        ({"key": np.full((2, 40, 16), np.nan, np.float32)}, "key: a row that is kept holds a number that is not finite"),
        ({"query": np.ones((2, 40), np.int64)}, "query: need one of float16"),
    ],
)
@pytest.mark.usefixtures("quick_clock")
def test_what_a_plan_refuses(change: dict[str, Any], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), draw(), strict=True)) | {"rng": 0} | change
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        planning.plan(**arguments)


def test_times_are_measured_here() -> None:
    x = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    rates = planning.measured_rates(yoso_core.arrays.Caller("numpy", "cpu"), x, x)
    assert all(rate >= 0 for rate in rates)
    assert rates[0] > 0
    assert rates[1] > 0


@pytest.mark.usefixtures("quick_clock")
def test_the_command_plans(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "qkv.npz", query=x, key=x, value=x, key_mask=np.ones(64, bool))
    np.savez(tmp_path / "half.npz", query=x)
    (tmp_path / "text.npy").write_text("no numbers")

    def yoso(*args: str) -> Any:
        return CliRunner().invoke(app, ["plan", *args, "--num-hash", "8", "--num-hash", "32", "--oversample", "0"], prog_name="yoso")

    printed = yoso(str(tmp_path / "x.npy"), "--cosine", "0.8")
    assert printed.exit_code == 0
    assert "Take yoso_attention(query, key, value, num_hash=8, hash_code_len=8, oversample=0, layout='chained')" in printed.output
    read = json.loads(yoso(str(tmp_path / "qkv.npz"), "--cosine", "0.8", "--json").stdout)
    assert read["best"]["num_hash"] == 8
    assert yoso("--cosine", "0.9999", "--json").exit_code == 1
    for name, message in (("half.npz", "has no key, value"), ("text.npy", "is not an .npy or .npz file"), ("none.npy", "No such file")):
        refused = yoso(str(tmp_path / name))
        assert refused.exit_code == 2
        assert message in refused.stderr
    assert "--cosine: need a number above 0" in yoso("--cosine", "2").stderr


# The suite `yoso bench error`, and the page


def test_the_tables_of_the_suite() -> None:
    cell = {"hash": "planes", "hash_code_len": 8, "oversample": 0, "cosine": 0.5, "ratio": 1.01, "standard_error": 0.004}
    assert bench.variance_table({"variance": [cell]}).splitlines()[2] == "| planes | 8 | 0.5 | 1.010 ± 0.004 |"
    row = bench.row_cell("normal", 8, 0, 16, draws=2) | {"predicted": 0.5, "predicted_standard_error": 0.001}
    for table in (bench.coverage_table, bench.cosine_table):
        line = table({"rows": [row]}).splitlines()[2]
        assert line.startswith("| normal | 8 | 0 | 16 | ")
        assert line.count("|") == table({"rows": [row]}).splitlines()[0].count("|")


def committed() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "error.json").read_text("utf-8"))
    return read


def test_the_page_has_the_gains_of_smoothing() -> None:
    gains = [bench.pair_variance(8, 0, 0.0) / bench.pair_variance(8, s, 0.0) for s in (1, 2, 4)]
    assert "smaller than without smoothing by {:.2f}, {:.2f} and {:.2f}".format(*gains) in " ".join(page().split())


def test_committed_variances_are_the_closed_form() -> None:
    cells = committed()["variance"]
    assert len(cells) == len(bench.HASHES) * len(bench.TAUS) * len(bench.OVERSAMPLES) * len(bench.PAIR_COSINES)
    for cell in cells:
        assert abs(cell["ratio"] - 1) <= 0.05, cell


def test_committed_predictions_are_near() -> None:
    cells = committed()["rows"]
    assert {cell["kind"] for cell in cells} == set(bench.KINDS)
    for cell in cells:
        assert abs(cell["predicted"] - cell["cosine"]) <= 0.02, cell


def test_committed_coverages_are_those_of_the_page() -> None:
    """In percent, by bits and hashes: the five kinds, then the encoder."""
    said = {(8, 16): (90, 95), (8, 32): (94, 98), (8, 64): (94, 98), (12, 16): (87, 91), (12, 64): (92, 96)}
    for cell in committed()["rows"]:
        low, high = (71, 90) if cell["kind"] == "encoder" else said[cell["hash_code_len"], cell["num_hash"]]
        assert low <= round(100 * cell["coverage"]) <= high, cell
        assert 0.7 <= cell["squared_error_ratio"] <= 1.01, cell
        assert cell["across"] <= (0.16 if cell["kind"] == "encoder" else 0.035), cell
        assert cell["coverage_standard_error"] < 0.02


@pytest.mark.long
def test_the_plan_for_a_trained_encoder() -> None:
    if reason := bench.encoder_missing():
        pytest.skip(f"the trained encoder: {reason}")
    query, key, value = bench.inputs("encoder")
    assert query.shape == (4, 512, 32)
    planned = planning.plan(query, key, value, num_hash=(16, 64), oversample=(0, 2), rng=0)
    for choice in planned.choices:
        cell = bench.row_cell("encoder", 8, choice.oversample, choice.num_hash, draws=4)
        assert choice.cosine == pytest.approx(cell["cosine"], abs=0.03)


def page() -> str:
    return (ROOT / "docs" / "error.md").read_text("utf-8")


@pytest.mark.slow
def test_the_lines_of_the_page_run() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", page())
    assert blocks
    for block in blocks:
        exec(compile(block, "error.md", "exec"), names)
