"""Smoothing: tables and pairs against every choice of bits, what it leaves alone, gradients, and
the variance that it takes away.
"""

from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest
import torch

import yoso_core
from yoso_core import reference
from yoso_core.model import YosoConfig, YosoModel, yoso_attention_with_weights
from yoso_core.model import yoso_attention as torch_attention
from yoso_core.reference.arrays import Array
from yoso_core.reference.smoothing import neighbors, smoothing_weights, whole_table_pays


def codes_and_values(bits: int, num_hash: int = 3, n_q: int = 21, n_k: int = 34, d_v: int = 5, seed: int = 0) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    query_code, key_code = (rng.integers(1 << bits, size=(n, num_hash), dtype=np.int32) for n in (n_q, n_k))
    return query_code, key_code, rng.standard_normal((n_k, d_v))


def chosen_bits(codes: Array, chosen: tuple[int, ...]) -> Array:
    """The code of the bits that are chosen, in their order."""
    return sum(((codes >> bit & 1) << place for place, bit in enumerate(chosen)), np.zeros_like(codes))


SMALL = [(1, 1), (2, 1), (2, 2), (3, 2), (4, 3), (1, 4), (5, 0)]


@pytest.mark.parametrize(("tau", "s"), SMALL)
@pytest.mark.parametrize("variant", ["numpy:pairs", "numpy:tables", "cpu:tables"])
def test_it_is_the_mean_over_every_choice_of_bits(tau: int, s: int, variant: str) -> None:
    bits = tau + s
    query_code, key_code, value = codes_and_values(bits)
    every = [
        reference.lsh_cumulation_pairs(chosen_bits(query_code, chosen), chosen_bits(key_code, chosen), value, 1 << tau)
        for chosen in combinations(range(bits), tau)
    ]
    got = yoso_core.lsh_cumulation(query_code, key_code, value, 1 << bits, oversample=s, variant=variant)
    np.testing.assert_allclose(got, np.mean(every, axis=0), rtol=1e-12, atol=1e-13)


def by_transform(table: Array, s: int) -> Array:
    """Averaging is a convolution over the group of bit strings. Its factor at a row is the share of
    choices of ``s`` bits that leave out the row's set bits, times ``2**s``.
    """
    rows = table.shape[-2]
    bits = rows.bit_length() - 1
    factor = np.array([2**s * comb(bits - row.bit_count(), s) / comb(bits, s) for row in range(rows)])
    transformed = reference.hadamard_transform(table.swapaxes(-1, -2)) * factor
    return reference.hadamard_transform(transformed).swapaxes(-1, -2) / rows


@pytest.mark.parametrize(("tau", "s"), SMALL)
@pytest.mark.parametrize("variant", ["numpy:pairs", "numpy:spheres", "cpu:recurrence"])
def test_a_table_is_convolved(tau: int, s: int, variant: str) -> None:
    table = np.random.default_rng(1).standard_normal((2, 1 << (tau + s), 19))
    got = yoso_core.smooth_table(table, s, variant=variant)
    np.testing.assert_allclose(got, by_transform(table, s), atol=1e-12)
    np.testing.assert_allclose(got.sum(axis=-2), 2**s * table.sum(axis=-2), rtol=1e-9)
    if s:
        assert np.abs(got - by_transform(table, s - 1)).max() > 0.1  # a wrong factor shows


@pytest.mark.parametrize("tau", [1, 8, 12])
def test_weights(tau: int) -> None:
    for s in range(5):
        weights = smoothing_weights(tau, s)
        assert weights[0] == 1
        assert len(weights) == s + 1
        # As many pairs of codes at distance r as there are count 2**s collisions in all.
        assert sum(comb(tau + s, r) * a for r, a in enumerate(weights)) == pytest.approx(2**s)
        # For independent bits of any probability the expectation is that of tau bits.
        for p in (0.2, 0.5, 0.9):
            assert sum(comb(tau + s, r) * p ** (tau + s - r) * (1 - p) ** r * a for r, a in enumerate(weights)) == pytest.approx(p**tau)


def test_far_from_every_key_there_is_nothing() -> None:
    """Exactly nothing, so that a row of zeros stays one when it is scaled. A transform and its
    inverse leave rounding errors there.
    """
    table = np.zeros((64, 3), np.float32)
    table[5] = 1e6, 0.1, 1e-6
    far = np.array([bin(row ^ 5).count("1") > 2 for row in range(64)])
    for variant in ("numpy:pairs", "numpy:spheres", "cpu:recurrence"):
        got = yoso_core.smooth_table(table, 2, variant=variant)
        assert (got[far] == 0).all()
        assert (got[~far] > 0).all()
    assert (by_transform(table / np.float32(3), 2)[far] != 0).any()


@pytest.mark.parametrize("variant", ["numpy:tables", "numpy:pairs", "cpu:tables"])
@pytest.mark.parametrize(("tau", "s", "n_q"), [(3, 2, 40), (26, 3, 9)])
def test_a_number_that_is_not_finite_is_met_within_s_bits(variant: str, tau: int, s: int, n_q: int) -> None:
    bits = tau + s
    query_code, key_code, value = codes_and_values(bits, num_hash=1, n_q=n_q)
    query_code[: n_q // 2, 0] = key_code[7, 0] ^ np.random.default_rng(3).integers(1 << min(bits, 6), size=n_q // 2).astype(np.int32)
    value[7, 2] = np.inf
    got = yoso_core.lsh_cumulation(query_code, key_code, value, 1 << bits, oversample=s, variant=variant)
    met = np.array([bin(int(code) ^ int(key_code[7, 0])).count("1") <= s for code in query_code[:, 0]])
    assert 0 < met.sum() < n_q
    np.testing.assert_array_equal(np.isnan(got[:, 2]), met)
    assert np.isfinite(np.delete(got, 2, axis=1)).all()


def test_neighbors_are_all_codes_within_s_bits() -> None:
    found = neighbors(6, 3)
    assert [len(masks) for masks in found] == [comb(6, r) for r in range(4)]
    assert all(mask.bit_count() == r for r, masks in enumerate(found) for mask in masks)
    assert len({mask for masks in found for mask in masks}) == sum(map(len, found))


def test_either_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole tables, and by the neighbors of what is read."""
    from yoso_core.cpu import cumulation

    query_code, key_code, value = codes_and_values(7, n_q=90, n_k=60)
    assert whole_table_pays(7, 2, 90)
    tables = yoso_core.lsh_cumulation(query_code, key_code, value, 1 << 7, oversample=2, variant="cpu:tables")
    monkeypatch.setattr(cumulation, "tables_pay", lambda *sizes: False)
    near = yoso_core.lsh_cumulation(query_code, key_code, value, 1 << 7, oversample=2, variant="cpu:tables")
    np.testing.assert_allclose(near, tables, rtol=1e-12, atol=1e-14)
    assert (near != tables).any()


@pytest.mark.parametrize("s", [1, 2])
def test_bad_sizes_are_named(s: int) -> None:
    query_code, key_code, value = codes_and_values(4)
    with pytest.raises(ValueError, match=rf"^hashtable_capacity: with oversample={s} need 2\*\*\(tau \+ {s}\) .*, got 24"):
        yoso_core.lsh_cumulation(query_code, key_code, value, 24, oversample=s)
    with pytest.raises(ValueError, match=r"^hashtable_capacity: "):
        yoso_core.lsh_cumulation(query_code, key_code, value, 1 << s, oversample=s, validate=False)
    with pytest.raises(ValueError, match=r"^oversample: need an integer between 0 and 29, got -1"):
        yoso_core.smooth_table(np.zeros((4, 2)), -1)
    with pytest.raises(ValueError, match=r"^table: with oversample=3 need 2\*\*\(tau \+ 3\)"):
        yoso_core.smooth_table(np.zeros((8, 2)), 3)
    with pytest.raises(ValueError, match=r"^oversample: need an integer between 0 and 0, got 1"):
        yoso_core.yoso_attention(value, value, value, hash_code_len=30, oversample=1)
    signs = yoso_core.sample_signs(8, 8, 5, rng=0)
    with pytest.raises(ValueError, match=r"^signs: need shape"):
        yoso_core.yoso_attention(value, value, value, num_hash=8, hash_code_len=8, oversample=6, signs=signs)
    with pytest.raises(ValueError, match=r"^backward_num_hash: need an integer between 1 and 3, got 4"):
        yoso_core.lsh_attention_backward(*(np.zeros((21, 2)),) * 4, query_code, query_code, 4, backward_num_hash=4)


# What it takes away


def pair_variance(p: float, tau: int, s: int) -> float:
    second = sum(comb(tau + s, r) * p ** (tau + s - r) * (1 - p) ** r * a**2 for r, a in enumerate(smoothing_weights(tau, s)))
    return float(second - p ** (2 * tau))


def counted(tau: int, s: int, cosine: float, hashed_bits: int | None = None, draws: int = 400_000) -> Array:
    """What a key at this cosine counts in each of many draws of one hash by planes, whose codes are
    read as if they had ``hashed_bits - s`` bits and ``s`` more.
    """
    bits = tau + s
    rng = np.random.default_rng([tau, s])
    x = np.array([[1.0, 0.0], [cosine, np.sqrt(1 - cosine**2)]])
    codes = yoso_core.hyperplane_hash(x, rng.standard_normal((2, draws * bits)), draws, bits)
    of_length = (hashed_bits or bits) - s
    weight = np.array([*smoothing_weights(of_length, s), *[0.0] * (bits - s)])
    return weight[reference.smoothing.count_bits(codes[0] ^ codes[1])]


@pytest.mark.parametrize(("tau", "s"), [(4, 0), (4, 2), (8, 1), (8, 4)])
def test_the_mean_stays_and_the_variance_falls(tau: int, s: int) -> None:
    """Both are those of the closed form; weights that belong to one bit more are found out."""
    cosine = 0.8
    p = 1 - np.arccos(cosine) / np.pi
    found = counted(tau, s, cosine)
    mean, variance = found.mean(), found.var(ddof=1)
    error = np.sqrt(variance / len(found))
    assert abs(mean - p**tau) < 4 * error
    assert variance == pytest.approx(pair_variance(p, tau, s), rel=0.03)
    if s:
        assert variance < 0.85 * pair_variance(p, tau, 0)
        off = counted(tau, s, cosine, hashed_bits=tau + s + 1)
        assert abs(off.mean() - p**tau) > 4 * error


# Gradients


def inputs(requires_grad: bool = True, n: int = 40, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, v, g = (torch.randn(2, n, 12, generator=generator, dtype=dtype) for _ in range(3))
    k = q + 0.4 * torch.randn(2, n, 12, generator=generator, dtype=dtype)
    return [x.requires_grad_() if requires_grad else x for x in (q, k, v)] + [g]


OPTIONS: dict[str, Any] = {"num_hash": 6, "hash_code_len": 3, "oversample": 2}


def test_the_gradient_of_the_value_is_the_cumulation_with_roles_exchanged() -> None:
    q, k, v, g = inputs()
    signs = torch.from_numpy(yoso_core.sample_signs(6, 5, 12, rng=0))
    torch_attention(q, k, v, **OPTIONS, signs=signs, normalize_output=False).backward(g)
    codes = [yoso_core.fast_hash(x.detach(), signs, 6, 5) for x in (k, q)]
    exchanged = yoso_core.lsh_cumulation(*codes, g, 1 << 5, oversample=2)
    assert v.grad is not None
    torch.testing.assert_close(v.grad, exchanged)


def test_fewer_hashes_in_the_backward_pass() -> None:
    """All hashes give the same gradients; a few give those of query and key alone from the first,
    plain.
    """
    signs = torch.from_numpy(yoso_core.sample_signs(6, 5, 12, rng=0))

    def gradients(**options: Any) -> list[torch.Tensor]:
        q, k, v, g = inputs()
        torch_attention(q, k, v, **OPTIONS, signs=signs, normalize_output=False, **options).backward(g)
        return [x.grad for x in (q, k, v) if x.grad is not None]

    every, also, few = gradients(), gradients(backward_num_hash=6), gradients(backward_num_hash=2)
    for x, y in zip(every, also, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    torch.testing.assert_close(few[2], every[2], rtol=0, atol=0)
    q, k, v, g = inputs(requires_grad=False)
    codes = [yoso_core.fast_hash(x, signs, 6, 5)[..., :2] & 7 for x in (q, k)]
    plain = yoso_core.lsh_attention_backward(g, q, k, v, *codes, 3)
    for x, y in zip(few[:2], plain[:2], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("variant", ["cpu:buckets", "numpy:pairs"])
def test_gradients_have_the_mean_of_the_expectations(variant: str) -> None:
    """Those of query, key and value, over draws; a factor for one bit more is found out."""
    q, k, v, g = (x.numpy() for x in inputs(requires_grad=False, n=12))
    tau, s, m, draws = 3, 2, 4, 400
    rng = np.random.default_rng(0)
    found: list[list[Array]] = [[], [], []]
    for _ in range(draws):
        planes = yoso_core.sample_planes(m, tau + s, 12, rng=rng).astype(np.float64)
        codes = [yoso_core.hyperplane_hash(x, planes, m, tau + s) for x in (q, k)]
        grads = yoso_core.lsh_attention_backward(g, q, k, v, *codes, tau, oversample=s, backward_num_hash=2, variant=variant)
        for kept, grad in zip(found, grads, strict=True):
            kept.append(grad)
    right = yoso_core.expectation_attention_backward(g, q, k, v, tau)
    wrong = yoso_core.expectation_attention_backward(g, q, k, v, tau + 1)

    def distance(samples: list[Array], truth: Array) -> float:
        """Mean squared distance in standard errors, 1 for the truth."""
        stacked = np.stack(samples)
        error = stacked.std(axis=0, ddof=1) / np.sqrt(draws)
        return float(np.mean(((stacked.mean(axis=0) - truth) / error) ** 2))

    for samples, truth, other in zip(found, right, wrong, strict=True):
        assert distance(samples, truth) < 1.35
        assert distance(samples, other) > 1.8


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in torch's own forward mode
def test_torch_knows_all_of_it() -> None:
    """The weights that are returned, forward mode against backward, and compiled shapes."""
    q, k, v, _ = inputs()
    signs = torch.from_numpy(yoso_core.sample_signs(6, 5, 12, rng=0))
    plain = torch_attention(q, k, v, **OPTIONS, signs=signs, backward_num_hash=3)
    out, weights = yoso_attention_with_weights(q, k, v, **OPTIONS, signs=signs, backward_num_hash=3)
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    torch.testing.assert_close(torch.nn.functional.normalize(weights @ v, dim=-1), plain)
    of_plain, of_weights = (torch.autograd.grad((x * x.detach().roll(1)).sum(), [q, k, v]) for x in (plain, out))
    for x, y in zip(of_plain, of_weights, strict=True):
        torch.testing.assert_close(x, y)

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return torch_attention(*x, **OPTIONS, signs=signs, backward_num_hash=3)

    primals = tuple(x.detach() for x in (q, k, v))
    tangents = tuple(torch.randn_like(x) for x in primals)
    moved, pulled = torch.func.jvp(attend, primals, tangents)[1], torch.func.vjp(attend, *primals)[1]
    cotangent = torch.randn_like(moved)
    back = sum((x * y).sum() for x, y in zip(pulled(cotangent), tangents, strict=True))
    torch.testing.assert_close((moved * cotangent).sum(), back)
    table = torch.randn(3, 32, 4, dtype=torch.float64, requires_grad=True)
    smooth = yoso_core.smooth_table
    assert torch.autograd.gradcheck(lambda x: torch.ops.yoso_core.smooth_table(x, 2), table)
    torch.testing.assert_close(torch.ops.yoso_core.smooth_table(table, 2).detach(), smooth(table.detach(), 2))


def test_in_a_model() -> None:
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = YosoConfig(**sizes, use_expectation=False, num_hash=8, hash_code_len=4, oversample=2, backward_num_hash=2)
    torch.manual_seed(0)
    model = YosoModel(config).eval()
    ids = torch.randint(3, 40, (2, 30))
    smoothed = model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, smoothed, rtol=0, atol=0)
    model.config.oversample = 0
    plain = model(ids).last_hidden_state
    assert not torch.equal(plain, smoothed)
    model.config.use_expectation = True
    exact = model(ids).last_hidden_state
    assert (smoothed - exact).norm() < (plain - exact).norm()
    model.config.use_expectation, model.config.oversample = False, 2
    model.train()(ids).last_hidden_state.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())
    with pytest.raises(ValueError, match=r"^oversample: need an integer between 0 and 26"):
        YosoConfig(hash_code_len=4, oversample=27)
    with pytest.raises(ValueError, match=r"^backward_num_hash: need an integer between 1 and 8, got 9"):
        YosoConfig(num_hash=8, backward_num_hash=9)
