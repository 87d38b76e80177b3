"""The backward functions of the face: against finite differences, at the ends where there is no
derivative, and in the caller's arrays.
"""

from typing import Any

import numpy as np
import pytest
import support
import torch

import yoso_core
from yoso_core.reference.arrays import Array

TAU = 4


def separated(rng: np.random.Generator, n_q: int, n_k: int, d: int) -> tuple[Array, Array]:
    """Queries and keys of any length whose cosines lie within 0.99: nearer the ends the derivative
    runs off to infinity.
    """
    while True:
        query, key = rng.standard_normal((2, n_q, d)), rng.standard_normal((2, n_k, d))
        unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key)]
        if np.abs(unit[0] @ unit[1].swapaxes(-1, -2)).max() <= 0.99:
            return query, key


def problem(masked: bool = False) -> tuple[list[Array], dict[str, Any]]:
    """``grad_out``, query, key and value of two heads, and the masks."""
    rng = np.random.default_rng(0)
    query, key = separated(rng, 5, 7, 3)
    value, grad_out = rng.standard_normal((2, 7, 4)), rng.standard_normal((2, 5, 4))
    masks = {"query_mask": rng.random((2, 5)) > 0.4, "key_mask": rng.random((2, 7)) > 0.4} if masked else {}
    return [grad_out, query, key, value], masks


def finite_differences(loss: Any, x: Array, step: float = 1e-6) -> Array:
    slope = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        kept = x[index]
        x[index] = kept + step
        above = loss()
        x[index] = kept - step
        below = loss()
        x[index] = kept
        slope[index] = (above - below) / (2 * step)
    return slope


def backward_variants(op: str) -> list[Any]:
    return [pytest.param(v.name, id=v.name) for v in support.on_the_cpu(op)]


@pytest.mark.parametrize("variant", backward_variants("expectation_attention_backward"))
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_the_exact_gradient_is_the_slope(variant: str, masked: bool) -> None:
    (grad_out, query, key, value), masks = problem(masked)

    def loss() -> float:
        out = yoso_core.expectation_attention(query, key, value, TAU, **masks, variant="numpy:formula")
        return float(np.sum(grad_out * out))

    got = yoso_core.expectation_attention_backward(grad_out, query, key, value, TAU, grad="exact", **masks, variant=variant)
    for x, gradient in zip((query, key, value), got, strict=True):
        np.testing.assert_allclose(gradient, finite_differences(loss, x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("variant", backward_variants("expectation_attention_backward"))
def test_the_lower_bound_is_not_the_slope(variant: str) -> None:
    """For a single pair it points the same way and is short by ``(pi - theta) sin(theta) / 2``,
    here between 0.1 and 0.91.
    """
    (grad_out, query, key, value), _ = problem()
    pair = [x[:, :1] for x in (grad_out, query, key, value)]
    exact = yoso_core.expectation_attention_backward(*pair, TAU, grad="exact", variant=variant)
    lower = yoso_core.expectation_attention_backward(*pair, TAU, variant=variant)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in pair[1:3])
    theta = np.arccos(np.sum(q * k, axis=-1, keepdims=True))
    short = (np.pi - theta) * np.sin(theta) / 2
    assert 0.1 < short.min() < short.max() < 0.91
    for i in (0, 1):
        np.testing.assert_allclose(lower[i], short * exact[i], rtol=1e-9)
    np.testing.assert_array_equal(lower[2], exact[2])

    all_exact = yoso_core.expectation_attention_backward(grad_out, query, key, value, TAU, grad="exact", variant=variant)
    all_lower = yoso_core.expectation_attention_backward(grad_out, query, key, value, TAU, variant=variant)
    for i in (0, 1):
        assert np.linalg.norm(all_lower[i] - all_exact[i]) > 0.1 * np.linalg.norm(all_exact[i])


def test_the_slope_test_rejects_the_lower_bound() -> None:
    (grad_out, query, key, value), _ = problem()
    lower = yoso_core.expectation_attention_backward(grad_out, query, key, value, TAU, grad="lower_bound")[0]
    slope = finite_differences(lambda: float(np.sum(grad_out * yoso_core.expectation_attention(query, key, value, TAU))), query)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(lower, slope, rtol=1e-6, atol=1e-8)


def both(op: str) -> list[Any]:
    return [pytest.param(op, v.name, id=f"{op}-{v.name}") for v in support.on_the_cpu(op)]


EVERY_BACKWARD = both("expectation_attention_backward") + both("lsh_attention_backward")


def gradients(op: str, arrays: list[Any], **options: Any) -> tuple[Any, Any, Any]:
    """Either backward function; the codes of the sampled one put everything into one bucket in half
    of its hashes.
    """
    if op == "lsh_attention_backward":
        query, key = arrays[1], arrays[2]
        codes = [np.zeros((*x.shape[:-1], 2), np.int32) for x in (query, key)]
        codes[1][..., 1] = 1
        if isinstance(query, torch.Tensor):
            codes = [torch.from_numpy(c) for c in codes]
        arrays = [*arrays, *codes]
    result: tuple[Any, Any, Any] = getattr(yoso_core, op)(*arrays, TAU, **options)
    return result


@pytest.mark.parametrize(("op", "variant"), EVERY_BACKWARD)
@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
def test_masked_rows_get_zeros_and_nothing_comes_from_them(op: str, variant: str, grad: str) -> None:
    arrays, masks = problem(masked=True)
    keep_query, keep_key = masks["query_mask"], masks["key_mask"]
    grad_out, query, key, value = arrays
    got = gradients(op, arrays, grad=grad, **masks, variant=variant)
    assert not got[0][~keep_query].any()
    assert not got[1][~keep_key].any()
    assert not got[2][~keep_key].any()
    grad_out[~keep_query] = query[~keep_query] = np.nan
    key[~keep_key] = value[~keep_key] = np.inf
    for head in (0, 1):
        rows, columns = keep_query[head], keep_key[head]
        kept = [grad_out[head][rows], query[head][rows], key[head][columns], value[head][columns]]
        truncated = gradients(op, kept, grad=grad, variant=variant)
        for whole, part, keep in zip(got, truncated, (rows, columns, columns), strict=True):
            np.testing.assert_allclose(whole[head][keep], part, rtol=1e-12, atol=1e-14)
    for spoiled, clean in zip(gradients(op, arrays, grad=grad, **masks, variant=variant), got, strict=True):
        np.testing.assert_array_equal(spoiled, clean)


@pytest.mark.parametrize(("op", "variant"), EVERY_BACKWARD)
@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("key_is", ["identical", "opposite", "zero"])
def test_gradients_stay_finite_where_there_is_no_derivative(op: str, variant: str, grad: str, dtype: str, key_is: str) -> None:
    rng = np.random.default_rng(0)
    query = rng.standard_normal((4, 3)).astype(dtype)
    query[3] = 0
    key = query * {"identical": 1, "opposite": -1, "zero": 0}[key_is]
    value, grad_out = rng.standard_normal((2, 4, 2)).astype(dtype)
    got = gradients(op, [grad_out, query, key, value], grad=grad, variant=variant)
    assert all(np.isfinite(x).all() for x in got)
    assert not got[0][3].any()  # a zero vector has no direction to turn
    if key_is == "zero":
        assert not got[1].any()


@pytest.mark.parametrize(("op", "variant"), EVERY_BACKWARD)
@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
def test_a_gradient_lies_across_its_vector(op: str, variant: str, grad: str) -> None:
    """Only directions matter, so a step along the vector itself changes nothing; and twice the
    length halves the gradient.
    """
    arrays, _ = problem()
    grad_out, query, key, value = arrays
    got = gradients(op, arrays, grad=grad, variant=variant)
    for x, gradient in zip((query, key), got[:2], strict=True):
        np.testing.assert_allclose(np.sum(x * gradient, axis=-1), 0, atol=1e-12)
    longer = gradients(op, [grad_out, 2 * query, 4 * key, value], grad=grad, variant=variant)
    for x, y, factor in zip(longer, got, (2, 4, 1), strict=True):
        np.testing.assert_allclose(x * factor, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("op", ["expectation_attention_backward", "lsh_attention_backward"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gradients_come_back_as_the_callers_tensors(op: str, dtype: str) -> None:
    arrays, _ = problem()
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in arrays]
    got = gradients(op, tensors)
    expected = gradients(op, [x.double().numpy() for x in tensors])
    # The sums run in float32 at least; what is left is one rounding to the dtype.
    rounding = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 1e-5, "float64": 1e-12}[dtype]
    for x, like, y in zip(got, tensors[1:], expected, strict=True):
        assert isinstance(x, torch.Tensor)
        assert x.dtype == like.dtype
        assert x.shape == like.shape
        np.testing.assert_allclose(x.double().numpy(), y, rtol=rounding, atol=rounding * 0.1)


@pytest.mark.parametrize("op", ["expectation_attention_backward", "lsh_attention_backward"])
@pytest.mark.parametrize(("n_q", "n_k"), [(0, 0), (0, 3), (3, 0)])
def test_gradients_of_nothing_are_zeros(op: str, n_q: int, n_k: int) -> None:
    arrays = [np.ones((n_q, 2)), np.ones((n_q, 3)), np.ones((n_k, 3)), np.ones((n_k, 2))]
    for x, like in zip(gradients(op, arrays), arrays[1:], strict=True):
        np.testing.assert_array_equal(x, np.zeros_like(like))
