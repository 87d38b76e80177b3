"""Differentiable attention: its gradients beside the reference's, under torch's transformations,
and in a layer that learns.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import needs_torch_compiler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import yoso_core
from yoso_core import reference, registry
from yoso_core.model import ops, sample_signs, yoso_attention
from yoso_core.reference.normalize import TINY_NORM, l2_normalize, l2_normalize_backward

M, TAU = 6, 3

MODES: dict[str, dict[str, Any]] = {
    "lsh": {},
    "lsh-exact": {"grad": "exact"},
    "lsh-dense": {"backward": "expectation"},
    "lsh-dense-exact": {"backward": "expectation", "grad": "exact"},
    "expectation": {"use_expectation": True},
    "expectation-exact": {"use_expectation": True, "grad": "exact"},
}

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def problem(
    *leading: int, n_q: int = 9, n_k: int = 7, d: int = 6, d_v: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """Query, key and value that want gradients, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((n_q, d), (n_k, d), (n_k, d_v), (n_q, d_v))
    tensors = [torch.randn(*leading, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:]


def drawn(*heads: int, d: int = 6, m: int = M, tau: int = TAU) -> Tensor:
    return torch.from_numpy(yoso_core.sample_signs(m, tau, d, batch_shape=heads, rng=0))


def attention(*tensors: Tensor, **options: Any) -> Tensor:
    return yoso_attention(*tensors, **{"num_hash": M, "hash_code_len": TAU, **options})


def gradients(function: Callable[..., Tensor], tensors: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(function(*tensors), tensors, grad_out.to(tensors[2].dtype)))


def by_reference(tensors: list[Tensor], grad_out: Tensor, signs: Tensor, mode: dict[str, Any], **masks: Tensor) -> list[Any]:
    """Output and gradients by the reference alone: explicit loops over all pairs, and the gradient
    of the output's normalization.
    """
    query, key, value, g = (x.detach().numpy() for x in (*tensors, grad_out))
    numpy_masks: dict[str, Any] = {name: x.numpy() for name, x in masks.items()}
    grad, dense = mode.get("grad", "lower_bound"), mode.get("backward") == "expectation" or mode.get("use_expectation", False)
    codes = [reference.fast_hash(x, signs.numpy(), M, TAU) for x in (query, key)]
    if mode.get("use_expectation"):
        rows = reference.expectation_attention(query, key, value, TAU, **numpy_masks)
    else:
        rows = reference.lsh_cumulation_pairs(*codes, value, 1 << TAU, **numpy_masks)
    g = l2_normalize_backward(g, rows, TINY_NORM)
    if dense:
        found = reference.expectation_attention_backward(g, query, key, value, TAU, grad=grad, **numpy_masks)
    else:
        found = reference.lsh_attention_backward(g, query, key, value, *codes, TAU, grad=grad, **numpy_masks)
    return [l2_normalize(rows, TINY_NORM), *found]


def close(got: Any, expected: Any, tolerance: float) -> None:
    """Relative to the largest entry, or to 1, the size of a term: an entry is a sum whose terms may
    cancel.
    """
    got, expected = np.asarray(got.detach(), np.float64), np.asarray(expected.detach() if isinstance(expected, Tensor) else expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max(initial=1))


# Results and gradients beside the reference


@every_mode
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_output_and_gradients_are_the_references(mode: dict[str, Any], masked: bool, dtype: torch.dtype) -> None:
    *tensors, grad_out = problem(2, 3, dtype=dtype)
    signs = drawn(3)
    generator = torch.Generator().manual_seed(1)
    masks = {"query_mask": torch.rand(2, 1, 9, generator=generator) > 0.3, "key_mask": torch.rand(2, 3, 7, generator=generator) > 0.3}
    masks = masks if masked else {}
    out = attention(*tensors, signs=signs, **masks, **mode)
    grads = torch.autograd.grad(out, tensors, grad_out)
    for got, expected in zip((out, *grads), by_reference(tensors, grad_out, signs, mode, **masks), strict=True):
        assert got.dtype == dtype
        close(got, expected, 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("mode", [mode for mode in MODES.values() if "use_expectation" not in mode])
def test_the_comparison_rejects_other_codes(mode: dict[str, Any]) -> None:
    """Its twin: one sign turned over."""
    *tensors, grad_out = problem(2, 3)
    signs = drawn(3)
    other = signs.clone()
    other.view(-1)[0] *= -1
    with pytest.raises(AssertionError):
        close(attention(*tensors, signs=signs, **mode), by_reference(tensors, grad_out, other, mode)[0], 2e-5)


def separated(n_q: int = 5, n_k: int = 7) -> list[Tensor]:
    """Two heads in float64 whose cosines lie within 0.99: nearer the ends the derivative runs off
    to infinity.
    """
    for seed in range(100):
        query, key, value, _ = problem(2, n_q=n_q, n_k=n_k, d=3, dtype=torch.float64, seed=seed)
        if (nn.functional.normalize(query, dim=-1) @ nn.functional.normalize(key, dim=-1).mT).abs().max() <= 0.99:
            return [query, key, value]
    raise AssertionError("no seed serves")


@pytest.mark.parametrize("normalize_output", [False, True])
def test_the_exact_gradient_is_the_derivative(normalize_output: bool) -> None:
    def exact(*tensors: Tensor) -> Tensor:
        return attention(*tensors, use_expectation=True, grad="exact", normalize_output=normalize_output)

    assert torch.autograd.gradcheck(exact, separated())


def test_the_lower_bound_is_not_the_derivative() -> None:
    """For one pair it is the derivative times ``(pi - theta) sin(theta) / 2``, never more than
    0.91; that of the value is the same.
    """

    def by(grad: Any) -> Callable[..., Tensor]:
        return lambda *tensors: attention(*tensors, use_expectation=True, grad=grad, normalize_output=False)

    assert not torch.autograd.gradcheck(by("lower_bound"), separated(), raise_exception=False)
    pair = separated(1, 1)
    grad_out = torch.ones(2, 1, 4, dtype=torch.float64)
    lower, exact = (gradients(by(grad), pair, grad_out) for grad in ("lower_bound", "exact"))
    theta = torch.arccos(torch.cosine_similarity(pair[0], pair[1], dim=-1)).detach()[..., None]
    short = (torch.pi - theta) * theta.sin() / 2
    assert short.max() < 0.911
    for i in (0, 1):
        torch.testing.assert_close(lower[i], short * exact[i], rtol=1e-9, atol=0)
    torch.testing.assert_close(lower[2], exact[2], rtol=0, atol=0)
    angles = torch.linspace(0, torch.pi, 10_001, dtype=torch.float64)
    assert float(((torch.pi - angles) * angles.sin() / 2).max()) == pytest.approx(0.910, abs=1e-3)


# Sampled gradients are right on average

DRAWS = 600


def deviations(mode: dict[str, Any], spoil: Callable[[Tensor], Tensor] = lambda planes: planes, *, factor: float = 1) -> list[Tensor]:
    """How far the mean gradients of many draws are from those of the expectation, in standard
    errors. Every draw is a head.
    """
    *tensors, grad_out = problem(n_q=4, n_k=5, d=5, d_v=3, dtype=torch.float64)
    planes = torch.from_numpy(yoso_core.sample_planes(M, TAU, 5, batch_shape=(DRAWS,), rng=0))
    heads = [x.detach().expand(DRAWS, *x.shape).clone().requires_grad_() for x in tensors]
    options: dict[str, Any] = {"normalize_output": False, "grad": mode.get("grad", "lower_bound")}
    sampled = gradients(lambda *x: attention(*x, planes=spoil(planes), **options), heads, grad_out.expand(DRAWS, *grad_out.shape))
    right = gradients(lambda *x: attention(*x, use_expectation=True, **options), tensors, grad_out)
    return [(factor * x.mean(0) - y) / (factor * x.std(0) / DRAWS**0.5) for x, y in zip(sampled, right, strict=True)]


def check_unbiased(found: list[Tensor]) -> None:
    """Deviations in standard errors are nearly standard normal: none beyond 4.5, and their squares
    are 1 on average.
    """
    for deviation in found:
        assert deviation.abs().max() < 4.5
        assert deviation.square().mean() < 2


@pytest.mark.parametrize("mode", [{}, {"grad": "exact"}], ids=["lower_bound", "exact"])
def test_sampled_gradients_are_those_of_the_expectation_on_average(mode: dict[str, Any]) -> None:
    check_unbiased(deviations(mode))


def one_plane_for_all_bits(planes: Tensor) -> Tensor:
    return planes.unflatten(-1, (M, TAU))[..., :1].expand(-1, -1, -1, TAU).flatten(-2)


def one_plane_used_twice(planes: Tensor) -> Tensor:
    """Two of the three bits of every code are the same."""
    return planes.unflatten(-1, (M, TAU))[..., [0, 1, 1]].flatten(-2)


@pytest.mark.parametrize("mode", [{}, {"grad": "exact"}], ids=["lower_bound", "exact"])
@pytest.mark.parametrize("spoil", [one_plane_for_all_bits, one_plane_used_twice])
def test_the_check_of_the_mean_rejects_planes_that_are_not_independent(mode: dict[str, Any], spoil: Any) -> None:
    with pytest.raises(AssertionError):
        check_unbiased(deviations(mode, spoil))


@pytest.mark.parametrize("factor", [0.9, M])
def test_the_check_of_the_mean_rejects_a_wrong_factor(factor: float) -> None:
    with pytest.raises(AssertionError):
        check_unbiased(deviations({}, factor=factor))


@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
def test_the_dense_backward_of_a_sample_is_that_of_the_expectation(grad: Any) -> None:
    *tensors, grad_out = problem(2)
    dense = gradients(lambda *x: attention(*x, backward="expectation", normalize_output=False, grad=grad), tensors, grad_out)
    right = gradients(lambda *x: attention(*x, use_expectation=True, normalize_output=False, grad=grad), tensors, grad_out)
    for x, y in zip(dense, right, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


# Edges


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["identical", "opposite"])
def test_gradients_are_finite_for_equal_and_for_opposite_vectors(mode: dict[str, Any], dtype: torch.dtype, sign: int) -> None:
    query, _, value, grad_out = problem(2, n_q=7, dtype=dtype)
    key = (sign * query.detach()).requires_grad_()
    out = attention(query, key, value, signs=drawn(2), **mode)
    assert out.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out, (query, key, value), grad_out))


@every_mode
def test_rows_that_met_no_key_are_zeros_with_zero_gradients(mode: dict[str, Any]) -> None:
    """A key in the opposite direction shares no bucket, and its expected weight is zero."""
    query, _, value, grad_out = problem(1, n_q=1, n_k=1, dtype=torch.float64)
    key = (-query.detach()).requires_grad_()
    out = attention(query, key, value, signs=drawn(1), **mode)
    assert not out.any()
    for x in torch.autograd.grad(out, (query, key, value), grad_out):
        assert not x.any()


@every_mode
def test_some_rows_that_met_no_key_leave_the_others_alone(mode: dict[str, Any]) -> None:
    query, key, value, grad_out = problem(1, n_q=2, n_k=1, dtype=torch.float64)
    with torch.no_grad():
        query[0, 0], query[0, 1] = -key[0, 0], key[0, 0] + 0.01 * query[0, 1]
    grads = gradients(lambda *x: attention(*x, signs=drawn(1), **mode), [query, key, value], grad_out)
    alone = gradients(lambda *x: attention(*x, signs=drawn(1), **mode), [query[:, 1:], key, value], grad_out[:, 1:])
    assert not grads[0][0, 0].any()
    close(grads[0][:, 1:], alone[0], 1e-12)
    close(grads[1], alone[1], 1e-12)
    close(grads[2], alone[2], 1e-12)
    assert alone[2].any()


@every_mode
def test_a_head_whose_keys_are_all_masked(mode: dict[str, Any]) -> None:
    *tensors, grad_out = problem(2)
    key_mask = torch.tensor([[False], [True]])
    with torch.no_grad():
        tensors[1][0], tensors[2][0] = torch.nan, torch.inf
    out = attention(*tensors, signs=drawn(2), key_mask=key_mask, **mode)
    assert not out[0].any()
    for x in torch.autograd.grad(out, tensors, grad_out):
        assert not x[0].any()
        assert x[1].isfinite().all()
        assert x[1].any()


@every_mode
def test_masked_rows_may_hold_anything(mode: dict[str, Any]) -> None:
    *tensors, grad_out = problem(2)
    generator = torch.Generator().manual_seed(1)
    keep_query, keep_key = torch.rand(2, 9, generator=generator) > 0.3, torch.rand(2, 7, generator=generator) > 0.3

    def masked(*x: Tensor) -> Tensor:
        return attention(*x, signs=drawn(2), query_mask=keep_query, key_mask=keep_key, **mode)

    clean = gradients(masked, tensors, grad_out)
    with torch.no_grad():
        tensors[0][~keep_query], tensors[1][~keep_key], tensors[2][~keep_key] = torch.nan, torch.nan, torch.inf
    grad_out[~keep_query] = torch.nan
    for x, y in zip(gradients(masked, tensors, grad_out), clean, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@every_mode
@pytest.mark.parametrize(("n_q", "n_k"), [(1, 1), (1, 7), (9, 1), (0, 7), (9, 0), (0, 0)])
def test_one_row_and_none(mode: dict[str, Any], n_q: int, n_k: int) -> None:
    *tensors, grad_out = problem(2, n_q=n_q, n_k=n_k)
    out = attention(*tensors, signs=drawn(2), **mode)
    grads = torch.autograd.grad(out, tensors, grad_out)
    for got, expected in zip((out, *grads), by_reference(tensors, grad_out, drawn(2), mode), strict=True):
        close(got, expected, 2e-5)


@every_mode
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 1, 3, 2)], ids=str)
def test_any_number_of_leading_dims(mode: dict[str, Any], leading: tuple[int, ...]) -> None:
    *tensors, grad_out = problem(*leading)
    out = attention(*tensors, signs=drawn(), **mode)
    assert out.shape == (*leading, 9, 4)
    grads = torch.autograd.grad(out, tensors, grad_out)
    flat = [x.detach().reshape(-1, *x.shape[-2:]).requires_grad_() for x in tensors] if 0 not in leading else tensors
    again = gradients(lambda *x: attention(*x, signs=drawn(), **mode), flat, grad_out.reshape((*flat[0].shape[:-1], 4)))
    for x, y in zip(grads, again, strict=True):
        torch.testing.assert_close(x, y.reshape(x.shape), rtol=0, atol=0)


@every_mode
def test_non_contiguous_and_broadcast_inputs(mode: dict[str, Any]) -> None:
    """Heads beside the tokens, columns first, one key for both batches, and a gradient of one
    number for all.
    """
    query, key, value, _ = problem(2, 3)
    with torch.no_grad():
        key[1] = key[0]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, signs=drawn(3), normalize_output=False, **mode).sum()

    expected = torch.autograd.grad(plain(query, key, value), (query, key, value))
    by_token = query.detach().transpose(1, 2).contiguous().requires_grad_()
    by_column = value.detach().mT.contiguous().requires_grad_()
    single = key.detach()[:1].clone().requires_grad_()
    got = torch.autograd.grad(plain(by_token.transpose(1, 2), single.expand(2, -1, -1, -1), by_column.mT), (by_token, single, by_column))
    torch.testing.assert_close(got[0].transpose(1, 2), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1].sum(0, keepdim=True), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[2].mT, expected[2], rtol=0, atol=0)


@every_mode
@pytest.mark.parametrize("limit", [1, 3_000], ids=["a head at a time", "two batches at a time"])
def test_heads_in_groups_give_what_all_give_at_once(mode: dict[str, Any], limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    *tensors, grad_out = problem(3, 2)
    masks = {"query_mask": torch.arange(9) < torch.tensor([9, 5, 7])[:, None, None], "key_mask": torch.ones(1, 1, 1, dtype=torch.bool)}

    def masked(*x: Tensor) -> Tensor:
        return attention(*x, signs=drawn(2), **masks, **mode)

    whole = gradients(masked, tensors, grad_out)
    monkeypatch.setitem(ops.GROUP_BYTES, "cpu", limit)
    for x, y in zip(gradients(masked, tensors, grad_out), whole, strict=True):
        close(x, y, 1e-6)


@pytest.mark.parametrize(
    ("leading", "limit", "groups"),
    [
        ((), 1, [()]),
        ((0, 3), 1, [()]),
        ((2, 3), 6, [()]),
        ((2, 3), 3, [(slice(0, 1),), (slice(1, 2),)]),
        ((5,), 2, [(slice(0, 2),), (slice(2, 4),), (slice(4, 6),)]),
        ((2, 2), 1, [(0, slice(0, 1)), (0, slice(1, 2)), (1, slice(0, 1)), (1, slice(1, 2))]),
        ((2,), 0.5, [(0,), (1,)]),
    ],
)
def test_groups_cover_the_heads(leading: tuple[int, ...], limit: float, groups: list[Any]) -> None:
    assert list(ops._head_groups(leading, 1000, int(limit * 1000))) == groups


@pytest.mark.parametrize("scale", [1e-30, 1e-11, 1.0, 1e15, 1e25])
def test_output_rows_of_any_length_are_scaled(scale: float) -> None:
    """Squares of rows beyond 1e19 overflow in float32; rows shorter than 1e-12 count as zero."""
    query, key, value, grad_out = problem(1)
    values = (scale * value.detach()).requires_grad_()
    out = attention(query, key, values, use_expectation=True)
    right = attention(query, key, value, use_expectation=True)
    grads = torch.autograd.grad(out, (query, values), grad_out)
    expected = torch.autograd.grad(right, (query, value), grad_out)
    if scale == 1e-30:
        assert not any(x.any() for x in (out, *grads))
    else:
        close(out, right, 1e-5)
        close(grads[0], expected[0], 1e-4)
        close(grads[1] * scale, expected[1], 1e-4)


def test_rows_of_very_different_lengths_are_scaled_side_by_side() -> None:
    query, key, value, grad_out = (torch.cat([x.detach()] * 3) for x in problem(1))
    scale = torch.tensor([1e25, 1.0, 1e-30])[:, None, None]
    tensors = [x.requires_grad_() for x in (query, key, scale * value)]
    out = attention(*tensors, use_expectation=True)
    grads = torch.autograd.grad(out, tensors, grad_out)
    close(out[0], out[1], 1e-5)
    close(grads[0][0], grads[0][1], 1e-4)
    close(grads[2][0] * 1e25, grads[2][1], 1e-4)
    for x in (out, *grads):
        assert x[:2].any()
        assert not x[2].any()


def test_not_finite_input_shows_where_it_matters() -> None:
    for bad in (torch.nan, torch.inf):
        query, key, value, grad_out = problem(2)
        with torch.no_grad():
            query[0, 3, 1] = bad
        out = attention(query, key, value, signs=drawn(2))
        assert out[0, 3].isnan().all()
        assert out[0, :3].isfinite().all()
        assert out[1].isfinite().all()
        grads = torch.autograd.grad(out, (query, key, value), grad_out)
        assert not grads[0][0, 3].isfinite().all()
        assert all(x[1].isfinite().all() for x in grads)


# Dtypes


@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_dtypes_are_computed_in_float32(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """What is left is the rounding of each result, and that of the output that the gradient of its
    normalization sees.
    """
    *tensors, grad_out = problem(2, dtype=dtype)
    wide = [x.detach().float().requires_grad_() for x in tensors]
    ulp = torch.finfo(dtype).eps
    out, right = (attention(*x, signs=drawn(2), **mode) for x in (tensors, wide))
    assert out.dtype == dtype
    close(out.float(), right, ulp)
    grads, expected = torch.autograd.grad(out, tensors, grad_out), torch.autograd.grad(right, wide, grad_out.float())
    for x, y in zip(grads, expected, strict=True):
        assert x.dtype == dtype
        close(x.float(), y, 4 * ulp)


def test_a_short_row_in_float16_has_finite_gradients() -> None:
    """Its gradient, about one over its length, is far beyond float16 on the way."""
    query, _, value, grad_out = problem(1, n_q=1, n_k=1, dtype=torch.float16)
    key = (-query.detach() + 0.7).requires_grad_()
    grads = gradients(lambda *x: attention(*x, use_expectation=True, hash_code_len=12), [query, key, value], grad_out)
    assert all(x.isfinite().all() for x in grads[:2])


@every_mode
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_the_value_in_the_low_dtype_and_hashes_in_float32(mode: dict[str, Any], dtype: torch.dtype) -> None:
    """Mixed inputs as a model under autocast has them; the codes are those of the tensors as they
    come.
    """
    *tensors, grad_out = problem(2)
    mixed = [tensors[0], tensors[1].detach().to(dtype).requires_grad_(), tensors[2]]
    with torch.autocast("cpu", dtype=dtype):
        out = attention(*mixed, signs=drawn(2), **mode)
    assert out.dtype == dtype
    plain = [tensors[0], mixed[1].detach().float().requires_grad_(), tensors[2].detach().to(dtype).float().requires_grad_()]
    right = attention(*plain, signs=drawn(2), **mode)
    ulp = torch.finfo(dtype).eps
    close(out.float(), right, ulp)
    grads, expected = torch.autograd.grad(out, mixed, grad_out.to(dtype)), torch.autograd.grad(right, plain, grad_out.to(dtype).float())
    for x, y, like in zip(grads, expected, mixed, strict=True):
        assert x.dtype == like.dtype
        close(x.float(), y, 4 * ulp)


def test_autocast_leaves_float64_and_wrong_dtypes_alone() -> None:
    *tensors, _ = problem(2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*tensors).dtype == torch.float64
        with pytest.raises(TypeError, match=r"^value: need one of float16"):
            attention(tensors[0], tensors[1], torch.ones(2, 7, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"^key: need the dtype of query"):  # without autocast nothing is converted
        attention(tensors[0], tensors[1].float(), tensors[2])


# Compiled, exported, checkpointed


@needs_torch_compiler
@pytest.mark.slow
@every_mode
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_code_gives_the_same(mode: dict[str, Any], dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: attention(*x, signs=drawn_once, **mode), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    drawn_once = drawn(3)
    for n in (9, 12):
        *tensors, grad_out = problem(2, 3, n_q=n)
        got = gradients(compiled, tensors, grad_out)
        expected = gradients(lambda *x: attention(*x, signs=drawn_once, **mode), tensors, grad_out)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), attention(*tensors, signs=drawn_once, **mode), rtol=0, atol=0)


@needs_torch_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # in torch's own inductor
def test_inductor_with_work_around_the_attention() -> None:
    """The code that runs in production: pieces before and after are fused by the compiler, so their
    roundings differ.
    """
    torch.compiler.reset()
    signs, mask = drawn(3), torch.arange(7) < torch.tensor([7, 4])[:, None, None]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q * 2, k, torch.tanh(v), signs=signs, key_mask=mask)
        return out.transpose(1, 2).flatten(2).relu()

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for n in (9, 12):
        *tensors, _ = problem(2, 3, n_q=n)
        grad_out = torch.ones(2, n, 12)
        for x, y in zip(gradients(compiled, tensors, grad_out), gradients(block, tensors, grad_out), strict=True):
            close(x, y, 1e-5)


@needs_torch_compiler
def test_a_compiled_draw_is_a_draw() -> None:
    """Signs drawn in compiled code: fresh at every call, fair, and the same in the backward
    pass.
    """
    torch.compiler.reset()
    *tensors, grad_out = problem(2, 3)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.manual_seed(0)
    first, second = compiled(*tensors), compiled(*tensors)
    assert (first != second).any()
    torch.manual_seed(0)
    torch.testing.assert_close(attention(*tensors), first, rtol=0, atol=0)
    torch.manual_seed(0)
    expected = gradients(attention, tensors, grad_out)
    for x, y in zip(torch.autograd.grad(first, tensors, grad_out), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@needs_torch_compiler
@pytest.mark.parametrize("use_expectation", [False, True])
def test_compiled_code_under_autocast_gives_the_same(use_expectation: bool) -> None:
    torch.compiler.reset()
    *tensors, grad_out = problem(2, 3)
    signs = drawn(3)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k.bfloat16(), v, signs=signs, use_expectation=use_expectation).float()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), layer(*tensors), rtol=0, atol=0)
    for x, y in zip(gradients(compiled, tensors, grad_out), gradients(layer, tensors, grad_out), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_inference_mode() -> None:
    query, key, value, _ = problem(2)
    signs = drawn(2)
    with torch.inference_mode():
        out = attention(query, key, value, signs=signs)
    torch.testing.assert_close(out.clone(), attention(query.detach(), key.detach(), value.detach(), signs=signs), rtol=0, atol=0)


@pytest.mark.parametrize("use_expectation", [False, True])
def test_export_with_dynamic_shapes(use_expectation: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(6, 6)

        def forward(self, x: Tensor, signs: Tensor) -> Tensor:
            q = self.project(x)
            return attention(q, x, x, signs=signs, use_expectation=use_expectation)

    torch.manual_seed(0)
    layer, signs = Layer(), drawn(3)
    batch, n = torch.export.Dim("batch"), torch.export.Dim("n")
    exported = torch.export.export(layer, (torch.randn(2, 3, 9, 6), signs), dynamic_shapes=({0: batch, 2: n}, None)).module()
    x = torch.randn(4, 3, 17, 6)
    torch.testing.assert_close(exported(x, signs), layer(x, signs), rtol=0, atol=0)


@every_mode
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])
def test_checkpointing_recomputes_with_the_same_draw(mode: dict[str, Any], use_reentrant: bool) -> None:
    *tensors, grad_out = problem(2, 3)

    def layer(*x: Tensor) -> Tensor:
        return attention(*x, **mode)  # draws from torch's own generator, whose state checkpointing restores

    torch.manual_seed(0)
    expected = gradients(layer, tensors, grad_out)
    torch.manual_seed(0)
    out = checkpoint(layer, *tensors, use_reentrant=use_reentrant)
    torch.rand(5)  # what happens in between changes nothing
    out.backward(grad_out)
    for x, y in zip(tensors, expected, strict=True):
        torch.testing.assert_close(x.grad, y, rtol=0, atol=0)


def test_nothing_of_the_size_of_all_pairs_is_kept() -> None:
    query, key, value, _ = problem(1, n_q=2000, n_k=2000)
    kept: list[int] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    for mode in MODES.values():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            attention(query, key, value, **mode)
    assert max(kept) == 2000 * 6


# Random draws


def test_the_draw_comes_from_where_it_was_asked() -> None:
    *tensors, _ = problem(2, 3)
    x = [t.detach() for t in tensors]
    torch.testing.assert_close(attention(*x, rng=5), yoso_core.yoso_attention(*x, num_hash=M, hash_code_len=TAU, rng=5), rtol=0, atol=0)
    seeded = [attention(*x, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    torch.testing.assert_close(seeded[0], seeded[1], rtol=0, atol=0)
    assert (seeded[0] != seeded[2]).any()
    torch.manual_seed(3)
    out = attention(*x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    signs = sample_signs(M, TAU, 6, batch_shape=(3,))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(attention(*x, signs=signs), out, rtol=0, atol=0)
    for source in ({"rng": 5}, {"generator": torch.Generator()}, {"signs": signs}, {"use_expectation": True}):
        attention(*x, **source)
    assert torch.equal(torch.get_rng_state(), state)  # none of these touches torch's own generator


def test_one_draw_a_head_shared_over_the_batch() -> None:
    query, key, value, _ = (x.detach() for x in problem(1, 1))
    query, key, value = (x.expand(2, 3, -1, -1) for x in (query, key, value))
    out = attention(query, key, value)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)
    assert (out[:, 0] != out[:, 1]).any()


def test_drawn_signs_are_fair() -> None:
    torch.manual_seed(0)
    signs = sample_signs(32, 8, 64, batch_shape=(50,))
    assert signs.dtype == torch.int8
    assert signs.shape == (50, *yoso_core.sample_signs(32, 8, 64).shape)
    assert set(signs.unique().tolist()) == {-1, 1}
    assert abs(signs.double().mean()) < 4 / signs.numel() ** 0.5
    assert sample_signs(3, 20, 6).shape == yoso_core.sample_signs(3, 20, 6).shape
    with pytest.raises(ValueError, match=r"^hash_code_len: need an integer between 1 and 30, got 0"):
        sample_signs(3, 0, 6)


# The face


def test_the_signature_is_that_of_the_face_and_says_besides_which_gradient_it_is() -> None:
    ours, face = (list(inspect.signature(f).parameters.values()) for f in (yoso_attention, yoso_core.yoso_attention))
    besides = [p for p in ours if p.name in ("grad", "backward", "backward_num_hash", "generator")]
    of_values = ("return_error", "target_error", "quantile", "max_num_hash")  # without gradients
    shared = [(p.name, p.kind, p.default) for p in face if p.name not in of_values]
    assert [(p.name, p.kind, p.default) for p in ours if p not in besides] == shared
    assert [(p.name, p.kind, p.default) for p in besides] == [
        ("grad", inspect.Parameter.KEYWORD_ONLY, "lower_bound"),
        ("backward", inspect.Parameter.KEYWORD_ONLY, "lsh"),
        ("backward_num_hash", inspect.Parameter.KEYWORD_ONLY, None),
        ("generator", inspect.Parameter.KEYWORD_ONLY, None),
    ]


@pytest.mark.parametrize("use_expectation", [False, True])
def test_the_faces_function_is_differentiable_on_tensors(use_expectation: bool) -> None:
    *tensors, grad_out = problem(2, 3)
    options = {"num_hash": M, "hash_code_len": TAU, "rng": 0, "use_expectation": use_expectation}
    out = yoso_core.yoso_attention(*tensors, **options)
    assert out.requires_grad
    expected = gradients(lambda *x: yoso_attention(*x, **options), tensors, grad_out)
    for x, y in zip(torch.autograd.grad(out, tensors, grad_out), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    with torch.no_grad():
        plain = yoso_core.yoso_attention(*tensors, **options)
        torch.testing.assert_close(yoso_attention(*tensors, **options), plain, rtol=0, atol=0)
    assert not plain.requires_grad
    close(out, plain, 1e-6)


def test_gradients_of_some_inputs_alone() -> None:
    query, key, value, grad_out = problem(2)
    signs = drawn(2)
    expected = gradients(lambda *x: attention(*x, signs=signs), [query, key, value], grad_out)
    for i in range(3):
        inputs = [x if i == j else x.detach() for j, x in enumerate((query, key, value))]
        (got,) = torch.autograd.grad(attention(*inputs, signs=signs), inputs[i], grad_out)
        torch.testing.assert_close(got, expected[i], rtol=0, atol=0)


@pytest.mark.parametrize(("variant", "hashed_by"), [(None, "cpu:tiles"), ("cpu:fused", "cpu:tiles"), ("numpy:formula", "numpy:formula")])
def test_planes_give_gradients_too(variant: str | None, hashed_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass hashes by planes on the backend of the forward pass: the sums of two
    backends may fall on two sides of a plane.
    """
    *tensors, grad_out = problem(2, 3)
    planes = torch.from_numpy(yoso_core.sample_planes(M, TAU, 6, batch_shape=(3,), rng=0))
    codes = [yoso_core.hyperplane_hash(x.detach(), planes, M, TAU) for x in tensors[:2]]
    expected = yoso_core.lsh_attention_backward(grad_out, *(x.detach() for x in tensors), *codes, TAU)
    ran: list[tuple[str, str]] = []
    call_kernel = registry.Kernel.call

    def recording(kernel: registry.Kernel, *args: Any) -> Any:
        ran.append((kernel.op, kernel.name))
        return call_kernel(kernel, *args)

    monkeypatch.setattr(registry.Kernel, "call", recording)
    got = gradients(lambda *x: attention(*x, planes=planes, normalize_output=False, variant=variant), tensors, grad_out)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert [name for op, name in ran if op == "hyperplane_hash"] == [hashed_by] * 2


# Wrong arguments

ONES = torch.ones(2, 9, 6)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_hash": 0}, ValueError, "num_hash: need an integer at least 1, got 0"),
    ({"hash_code_len": 31}, ValueError, "hash_code_len: need an integer between 1 and 30, got 31"),
    ({"hash_code_len": 0}, ValueError, "hash_code_len: need an integer between 1 and 30, got 0"),
    ({"query": torch.ones(6)}, ValueError, "query: need at least 2 dimensions, got shape (6,)"),
    ({"query": torch.ones(2, 9, 0), "key": torch.ones(2, 9, 0)}, ValueError, "query: vectors need at least one coordinate"),
    ({"query": ONES.to(torch.int64)}, TypeError, "query: need one of float16, bfloat16, float32, float64"),
    ({"key": ONES.double()}, TypeError, "key: need the dtype of query, float32, got float64"),
    ({"key": torch.ones(2, 9, 7)}, ValueError, "key: need 6 at axis -1 (d of query), got shape (2, 9, 7)"),
    ({"key": torch.ones(1, 9, 6)}, ValueError, "key: need leading dims (2,) (those of query), got shape (1, 9, 6)"),
    ({"value": torch.ones(2, 8, 6)}, ValueError, "value: need 9 at axis -2 (n of key), got shape (2, 8, 6)"),
    ({"value": ONES.double()}, TypeError, "value: float64 does not go with query of float32"),
    ({"key_mask": torch.ones(2, 9)}, TypeError, "key_mask: need bool or integer with nonzero = keep, got float32"),
    ({"query_mask": torch.ones(9, dtype=torch.bool)}, ValueError, "query_mask: need 2 dims, each that of query (2, 9) or 1"),
    ({"signs": torch.ones(3, 3, 8, dtype=torch.int8)}, ValueError, "signs: need shape (*batch, 4, 8)"),
    ({"signs": torch.zeros(6, 8, dtype=torch.int8)}, ValueError, "signs: every entry must be +1 or -1"),
    ({"planes": torch.ones(6, 6), "signs": torch.ones(3, 1, 8, dtype=torch.int8)}, ValueError, "planes: give signs or planes, not both"),
    ({"grad": "upper"}, ValueError, "grad: need one of 'lower_bound', 'exact', got 'upper'"),
    ({"backward": "dense"}, ValueError, "backward: need one of 'lsh', 'expectation', got 'dense'"),
    ({"variant": "cpu:magic"}, ValueError, "variant: yoso_attention has no variant 'cpu:magic'; it has cpu:fused"),
]
good_call: dict[str, Any] = {"query": ONES, "key": ONES, "value": ONES, "num_hash": 2, "hash_code_len": 3}
each_wrong = pytest.mark.parametrize(
    ("changes", "error", "message"), WRONG, ids=["-".join(c) + f"-{i}" for i, (c, _, _) in enumerate(WRONG)]
)


@each_wrong
@pytest.mark.parametrize("wants_gradients", [False, True])
def test_a_wrong_argument_is_refused(changes: dict[str, Any], error: type[Exception], message: str, wants_gradients: bool) -> None:
    call = good_call | changes
    if wants_gradients:
        call["value"] = call["value"].clone().requires_grad_()
    with pytest.raises(error, match="^" + re.escape(message)):
        yoso_attention(**call)


@each_wrong
def test_compiled_code_refuses_it_with_the_same_error(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda call: yoso_attention(**call), fullgraph=True, backend="aot_eager")
    with pytest.raises(error, match="^" + re.escape(message)):
        compiled(good_call | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": [[1.0]]}, TypeError, "query: need a NumPy array, a torch tensor or a CuPy array, got list"),
        ({"value": np.ones((2, 9, 6), np.float32)}, TypeError, "value: a NumPy array, but query is a torch tensor"),
        ({"key_mask": np.ones((2, 9), bool)}, TypeError, "key_mask: a NumPy array, but query is a torch tensor"),
        (
            {name: np.ones((2, 9, 6), np.float32) for name in ("query", "key", "value")},
            TypeError,
            "query: need a torch tensor, got an array",
        ),
        ({"key": ONES.to("meta")}, ValueError, "key: on meta, but query is on cpu"),
        ({"key": ONES.to_sparse()}, TypeError, "key: need a dense tensor"),
        ({"num_hash": 2.0}, TypeError, "num_hash: need an integer, got float"),
        ({"rng": 0.5}, TypeError, "rng: need a numpy.random.Generator, an int seed or None, got float"),
        ({"generator": 5}, TypeError, "generator: need a torch.Generator or None, got int"),
        ({"generator": torch.Generator(), "rng": 0}, ValueError, "generator: give rng or generator, not both"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_kind_of_argument_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        yoso_attention(**good_call | changes)


@every_mode
def test_there_is_no_second_derivative(mode: dict[str, Any]) -> None:
    *tensors, _ = problem(2)
    (first,) = torch.autograd.grad(attention(*tensors, **mode).square().sum(), tensors[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^yoso_core::yoso_attention: there is no second derivative"):
        first.sum().backward()


# Learning

KEYS, VALUES = 8, 4


class Retriever(nn.Module):
    """Is shown pairs of a key and a value, and one of the keys again, whose value it must name. It
    starts with unrelated vectors for a key that is shown and one that is asked for, so it has to
    learn which belong together: through the gradients of query and key.
    """

    def __init__(self, mode: dict[str, Any], *, no_context: bool = False) -> None:
        super().__init__()
        self.asked, self.keys, self.values = nn.Embedding(KEYS, 16), nn.Embedding(KEYS, 16), nn.Embedding(VALUES, 16)
        self.head = nn.Linear(16, VALUES)
        self.mode, self.no_context = mode, no_context

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        query, key, value = self.asked(asked)[:, None, None], self.keys(keys)[:, None], self.values(values)[:, None]
        context = yoso_attention(query, key, value, num_hash=16, hash_code_len=4, **self.mode)[:, 0, 0]
        logits: Tensor = self.head(0 * context if self.no_context else context)
        return logits


def examples(count: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    keys, values = torch.rand(count, KEYS).argsort(-1), torch.randint(VALUES, (count, KEYS))
    each, place = torch.arange(count), torch.randint(KEYS, (count,))
    return (keys, values, keys[each, place]), values[each, place]


def accuracy_after_training(model: Retriever) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(150):
        shown, right = examples(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*shown), right).backward()
        optimizer.step()
    with torch.no_grad():
        shown, right = examples(1000)
        return float((model(*shown).argmax(-1) == right).double().mean())


@pytest.mark.slow
@every_mode
def test_a_layer_learns_to_retrieve(mode: dict[str, Any]) -> None:
    """Chance is 0.25, with a deviation of 0.014. Without its context the model stays there; with
    queries and keys as drawn it gets half.
    """
    torch.manual_seed(0)
    assert accuracy_after_training(Retriever(mode)) > 0.95
    torch.manual_seed(0)
    assert abs(accuracy_after_training(Retriever(mode, no_context=True)) - 1 / VALUES) < 0.06
    torch.manual_seed(0)
    frozen = Retriever(mode)
    frozen.asked.requires_grad_(False)
    frozen.keys.requires_grad_(False)
    assert accuracy_after_training(frozen) < 0.7
