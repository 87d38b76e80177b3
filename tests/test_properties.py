"""What holds for any input, tried on random sizes: every variant that can run here.

Values are whole numbers and hashes a power of two, so that sums are exact whatever their order:
equal means equal.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import support
from hypothesis import given, reject, settings
from hypothesis import strategies as st

import yoso_core
from yoso_core.gpu.device import DoesNotFit
from yoso_core.reference.arrays import Array

settings.register_profile("yoso", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("yoso")

FLOATS = st.sampled_from(["float32", "float64"])
ROWS = st.integers(0, 20)
SEEDS = st.integers(0, 2**32 - 1)
CODE_LENGTHS = st.sampled_from([1, 2, 5, 9, 30])
DIMS = st.sampled_from([1, 3, 4, 48])


def where_it_fits(test: Callable[..., None]) -> Callable[..., None]:
    """Inputs for which a variant says that it has no room are not its to be right about."""

    @wraps(test)
    def tried(*args: Any, **kwargs: Any) -> None:
        try:
            test(*args, **kwargs)
        except DoesNotFit:
            reject()

    return tried


def runnable(*ops: str) -> list[Any]:
    return [pytest.param(op, v.name, id=f"{op}-{v.name}") for op in ops for v in support.on_the_cpu(op)]


SUMS = runnable("lsh_cumulation", "lsh_weighted_cumulation")
ATTENTIONS = runnable("expectation_attention", "yoso_attention")


class Sums:
    """A random call of a cumulation, plain or weighted, with the key side held apart so that it can
    be cut and shuffled.
    """

    def __init__(self, op: str, variant: str, seed: int, n_q: int, n_k: int, tau: int, dtype: str) -> None:
        self.rng = np.random.default_rng(seed)
        self.op, self.variant, self.dtype, self.tau = op, variant, dtype, tau
        self.m, self.d_w, self.d_v = (int(self.rng.choice([1, 2, 8])), int(self.rng.integers(1, 5)), int(self.rng.integers(1, 9)))
        pool = self.rng.integers(1 << tau, size=4)
        self.query_code = self.rng.choice(pool, size=(n_q, self.m)).astype(np.int32)
        self.key_code = self.rng.choice(pool, size=(n_k, self.m)).astype(np.int32)
        self.query_weight, self.key_weight = self.whole(n_q, self.d_w), self.whole(n_k, self.d_w)
        self.value = self.whole(n_k, self.d_v)

    def whole(self, *shape: int) -> Array:
        return self.rng.integers(-8, 9, size=shape).astype(self.dtype)

    def __call__(self, value: Array | None = None, keys: Any = slice(None), **masks: Array) -> Array:
        value = (self.value if value is None else value)[keys]
        key_code, key_weight = self.key_code[keys], self.key_weight[keys]
        if self.op == "lsh_cumulation":
            return yoso_core.lsh_cumulation(self.query_code, key_code, value, 1 << self.tau, **masks, variant=self.variant)
        weighted = (self.query_code, self.query_weight, key_code, key_weight, value)
        return yoso_core.lsh_weighted_cumulation(*weighted, 1 << self.tau, **masks, variant=self.variant)


@pytest.mark.parametrize(("op", "variant"), SUMS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_sums_are_linear_in_the_values(op: str, variant: str, seed: int, n_q: int, n_k: int, tau: int, dtype: str) -> None:
    call = Sums(op, variant, seed, n_q, n_k, tau, dtype)
    other = call.whole(n_k, call.d_v)
    np.testing.assert_array_equal(call(2 * call.value - 3 * other), 2 * call() - 3 * call(other))


@pytest.mark.parametrize(("op", "variant"), SUMS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_the_order_of_the_keys_does_not_matter(op: str, variant: str, seed: int, n_q: int, n_k: int, tau: int, dtype: str) -> None:
    call = Sums(op, variant, seed, n_q, n_k, tau, dtype)
    np.testing.assert_array_equal(call(keys=call.rng.permutation(n_k)), call())


@pytest.mark.parametrize(("op", "variant"), SUMS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, cut=ROWS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_two_parts_of_the_keys_add_up(op: str, variant: str, seed: int, n_q: int, n_k: int, cut: int, tau: int, dtype: str) -> None:
    call = Sums(op, variant, seed, n_q, n_k, tau, dtype)
    np.testing.assert_array_equal(call(keys=slice(cut)) + call(keys=slice(cut, None)), call())


@pytest.mark.parametrize(("op", "variant"), SUMS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_masked_is_truncated(op: str, variant: str, seed: int, n_q: int, n_k: int, tau: int, dtype: str) -> None:
    call = Sums(op, variant, seed, n_q, n_k, tau, dtype)
    keep_query, keep_key = call.rng.random(n_q) > 0.4, call.rng.random(n_k) > 0.4
    truncated = call(keys=keep_key)
    call.value[~keep_key] = call.key_weight[~keep_key] = np.nan  # whatever hides there is not looked at
    masked = call(query_mask=keep_query, key_mask=keep_key)
    np.testing.assert_array_equal(masked[keep_query], truncated[keep_query])
    assert not masked[~keep_query].any()
    assert not call(key_mask=np.zeros(n_k, np.uint8)).any()


def sampler(op: str, variant: str) -> tuple[Any, dict[str, Any]]:
    """What draws for this hash, and the layout to name: a kernel with a block to a part has the
    paper's alone.
    """
    if op == "hyperplane_hash":
        return yoso_core.sample_planes, {}
    how = {"layout": "paper"} if variant.endswith(":block_per_part") else {}
    return partial(yoso_core.sample_signs, **how), how


@pytest.mark.parametrize(("op", "variant"), runnable("hadamard_transform", "fast_hash", "hyperplane_hash"))
@given(seed=SEEDS, heads=st.integers(0, 3), n=ROWS, d=DIMS, tau=CODE_LENGTHS, m=st.integers(1, 5), dtype=FLOATS)
@where_it_fits
def test_a_batch_is_its_heads_one_by_one(
    op: str, variant: str, seed: int, heads: int, n: int, d: int, tau: int, m: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    face = getattr(yoso_core, op)
    if op == "hadamard_transform":
        x = rng.standard_normal((2, heads, n, 1 << (d - 1).bit_length())).astype(dtype)
        batched = face(x, variant=variant)
        for i, j in np.ndindex(2, heads):
            np.testing.assert_array_equal(batched[i, j], face(x[i, j], variant=variant))
        return
    sample, how = sampler(op, variant)
    x, drawn = rng.standard_normal((2, heads, n, d)).astype(dtype), sample(m, tau, d, batch_shape=(heads,), rng=rng)
    batched = face(x, drawn, m, tau, variant=variant, **how)
    assert ((batched >= 0) & (batched < 1 << tau)).all()
    for i, j in np.ndindex(2, heads):
        np.testing.assert_array_equal(batched[i, j], face(x[i, j], drawn[j], m, tau, variant=variant, **how))


@pytest.mark.parametrize(("op", "variant"), runnable("fast_hash", "hyperplane_hash"))
@given(seed=SEEDS, d=DIMS, tau=CODE_LENGTHS, m=st.integers(1, 5), exponent=st.integers(-30, 30), dtype=FLOATS)
@where_it_fits
def test_a_positive_scale_changes_no_code(op: str, variant: str, seed: int, d: int, tau: int, m: int, exponent: int, dtype: str) -> None:
    """By powers of two, which round nothing; the opposite vector has the opposite bits where no
    projection is zero.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((9, d)).astype(dtype)
    sample, how = sampler(op, variant)
    drawn = sample(m, tau, d, rng=rng)
    hashed = getattr(yoso_core, op)(x, drawn, m, tau, variant=variant, **how)
    np.testing.assert_array_equal(getattr(yoso_core, op)(np.ldexp(x, exponent), drawn, m, tau, variant=variant, **how), hashed)
    if op == "hyperplane_hash":
        np.testing.assert_array_equal(getattr(yoso_core, op)(-x, drawn, m, tau, variant=variant), (1 << tau) - 1 - hashed)


class Attention:
    """A random call of the expectation, or of the whole attention by signs, planes or
    expectation.
    """

    def __init__(
        self, op: str, variant: str, seed: int, leading: tuple[int, ...], n_q: int, n_k: int, d: int, tau: int, dtype: str
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.query, self.key, self.value = (self.normal(*leading, n, d) for n in (n_q, n_k, n_k))
        self.options: dict[str, Any] = {"hash_code_len": tau, "variant": variant}
        self.face = getattr(yoso_core, op)
        if op == "yoso_attention":
            m = int(self.rng.integers(1, 9))
            draw = [
                {"signs": yoso_core.sample_signs(m, tau, d, rng=self.rng)},
                {"planes": yoso_core.sample_planes(m, tau, d, rng=self.rng)},
                {"use_expectation": True},
            ][int(self.rng.integers(3))]
            self.options |= {"num_hash": m, "normalize_output": bool(self.rng.integers(2)), **draw}

    def normal(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def __call__(self, query: Any = ..., key: Any = ..., **masks: Array) -> Array:
        """``query`` and ``key`` pick rows."""
        out: Array = self.face(self.query[query], self.key[key], self.value[key], **masks, **self.options)
        return out

    def same(self, a: Array, b: Array) -> None:
        tolerance = 2e-4 if self.dtype == "float32" else 1e-11
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("op", "variant"), ATTENTIONS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, d=DIMS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_attention_does_not_see_the_order_of_the_keys(
    op: str, variant: str, seed: int, n_q: int, n_k: int, d: int, tau: int, dtype: str
) -> None:
    call = Attention(op, variant, seed, (), n_q, n_k, d, tau, dtype)
    call.same(call(key=call.rng.permutation(n_k)), call())


@pytest.mark.parametrize(("op", "variant"), ATTENTIONS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, d=DIMS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_padded_attention_is_truncated_attention(
    op: str, variant: str, seed: int, n_q: int, n_k: int, d: int, tau: int, dtype: str
) -> None:
    call = Attention(op, variant, seed, (), n_q, n_k, d, tau, dtype)
    keep_query, keep_key = call.rng.random(n_q) > 0.4, call.rng.random(n_k) > 0.4
    truncated = call(keep_query, keep_key)
    call.query[~keep_query] = call.key[~keep_key] = call.value[~keep_key] = np.nan
    masked = call(query_mask=keep_query, key_mask=keep_key)
    call.same(masked[keep_query], truncated)
    assert not masked[~keep_query].any()
    assert not call(query_mask=keep_query, key_mask=np.zeros(n_k, bool)).any()


@pytest.mark.parametrize(("op", "variant"), ATTENTIONS)
@given(seed=SEEDS, heads=st.integers(0, 3), n_q=ROWS, n_k=ROWS, d=DIMS, tau=CODE_LENGTHS, dtype=FLOATS)
@where_it_fits
def test_attention_of_a_batch_is_that_of_its_heads(
    op: str, variant: str, seed: int, heads: int, n_q: int, n_k: int, d: int, tau: int, dtype: str
) -> None:
    call = Attention(op, variant, seed, (2, heads), n_q, n_k, d, tau, dtype)
    batched = call()
    for head in np.ndindex(2, heads):
        call.same(batched[head], call(head, head))


@pytest.mark.parametrize(("op", "variant"), ATTENTIONS)
@given(seed=SEEDS, n_q=ROWS, n_k=ROWS, d=DIMS, tau=CODE_LENGTHS, exponent=st.integers(-30, 30), dtype=FLOATS)
@where_it_fits
def test_attention_does_not_see_the_length_of_a_query(
    op: str, variant: str, seed: int, n_q: int, n_k: int, d: int, tau: int, exponent: int, dtype: str
) -> None:
    call = Attention(op, variant, seed, (), n_q, n_k, d, tau, dtype)
    plain = call()
    call.query, call.key = np.ldexp(call.query, exponent), np.ldexp(call.key, -exponent)
    call.same(call(), plain)


@pytest.mark.parametrize(("op", "variant"), runnable("expectation_attention"))
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("d", [1, 20, 64])
def test_identical_vectors_have_expectation_1(op: str, variant: str, dtype: str, d: int) -> None:
    """For every code length; one head for each of 63 vectors at lengths from 1e-4 to 1e4."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((63, 1, d)) * 10.0 ** rng.integers(-3, 4, size=(63, 1, 1))).astype(dtype)
    for tau in range(1, 31):
        out = getattr(yoso_core, op)(x, x.copy(), np.ones((63, 1, 1), dtype), tau, variant=variant)
        np.testing.assert_allclose(out, 1, rtol=0, atol=1e-5)
