"""Attention in torch's own operations beside the reference: this is what an ONNX file computes."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from yoso_core import reference
from yoso_core.model import plain
from yoso_core.model.attention import yoso_attention_with_weights
from yoso_core.reference.hashing import LAYOUTS, Layout

Array = NDArray[Any]

N_Q, N_K = 17, 11

SIZES = {
    "m32-tau8-d64": (32, 8, 64),
    "m7-tau5-d20": (7, 5, 20),
    "m3-tau1-d1": (3, 1, 1),
    "m5-tau13-d8": (5, 13, 8),
    "m9-tau9-d16": (9, 9, 16),
    "m2-tau30-d48": (2, 30, 48),
}
"""Hashes, bits and dims: vectors that are padded, codes longer than a rotation, and codes too long
for tables among them.
"""

every_size = pytest.mark.parametrize(("num_hash", "tau", "dim"), SIZES.values(), ids=SIZES)


def inputs(dim: int, dtype: Any = np.float32, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    query, key, value = (rng.standard_normal((2, 3, n, size)).astype(dtype) for n, size in ((N_Q, dim), (N_K, dim), (N_K, 5)))
    key[:, :, :4] = query[:, :, :4]  # where the weight is largest
    key[:, :, 4:6] = -query[:, :, 4:6]
    query[0, 0, 0], key[1, 1, 1] = 0, 0
    return {"query": query, "key": key, "value": value}


def to_torch(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in arrays.items()}


def attend(arrays: dict[str, Array], **options: Any) -> tuple[Array, Array]:
    """By the reference, and by `plain`."""
    return reference.yoso_attention(**arrays, **options), plain.yoso_attention(**to_torch(arrays | options)).numpy()


def masks(seed: int = 0) -> dict[str, Array]:
    """A query's mask that the heads share; a key's mask, in which a head keeps nothing."""
    rng = np.random.default_rng(seed)
    key_mask = rng.integers(0, 2, (2, 3, N_K))
    key_mask[0, 1] = 0
    return {"query_mask": rng.integers(0, 2, (2, 1, N_Q)).astype(bool), "key_mask": key_mask}


@every_size
@pytest.mark.parametrize("masked", [False, True], ids=["kept", "masked"])
@pytest.mark.parametrize("normalize_output", [False, True], ids=["sums", "normalized"])
@pytest.mark.parametrize("way", ["expectation", "signs", "chain", "planes"])
def test_values_are_those_of_the_reference(num_hash: int, tau: int, dim: int, way: str, masked: bool, normalize_output: bool) -> None:
    options: dict[str, Any] = {"num_hash": num_hash, "hash_code_len": tau, "use_expectation": way == "expectation"}
    if way == "signs":
        options["signs"] = reference.sample_signs(num_hash, tau, dim, batch_shape=(3,), rng=1)
    elif way == "chain":
        options["signs"] = reference.sample_signs(num_hash, tau, dim, batch_shape=(3,), layout="chained", rng=1)
        options["layout"] = "chained"
    elif way == "planes":
        options["planes"] = reference.sample_planes(num_hash, tau, dim, batch_shape=(3,), rng=1)
    expected, got = attend(inputs(dim), **options, **(masks() if masked else {}), normalize_output=normalize_output)
    assert got.dtype == expected.dtype
    # Long codes make small weights, and rows of nothing else are scaled up.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 if way == "expectation" else 1e-6)


@every_size
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_are_bit_for_bit_those_of_the_reference(num_hash: int, tau: int, dim: int, dtype: Any, layout: Layout) -> None:
    vectors = inputs(dim, dtype)["query"]
    signs = reference.sample_signs(num_hash, tau, dim, batch_shape=(3,), layout=layout, rng=1)
    working = torch.from_numpy(vectors.astype(np.float32) if dtype is np.float16 else vectors)
    got = plain.fast_hash(working, torch.from_numpy(signs), num_hash, tau, layout)
    assert np.array_equal(got.numpy(), reference.fast_hash(vectors, signs, num_hash, tau, layout=layout))


@pytest.mark.parametrize("largest", [2.0**100, 2.0**127], ids=["2p100", "2p127"])
def test_huge_vectors_have_the_codes_of_the_reference(largest: float) -> None:
    vectors = np.random.default_rng(0).uniform(-1, 1, (9, 16)).astype(np.float32) * np.float32(largest)
    signs = reference.sample_signs(4, 8, 16, rng=1)
    got = plain.fast_hash(torch.from_numpy(vectors), torch.from_numpy(signs), 4, 8)
    assert np.array_equal(got.numpy(), reference.fast_hash(vectors, signs, 4, 8))


@pytest.mark.parametrize("use_expectation", [True, False], ids=["expectation", "sampled"])
@pytest.mark.parametrize("of", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_nan_where_the_reference_has_nan(of: str, bad: float, use_expectation: bool) -> None:
    arrays = inputs(16)
    arrays[of][1, 0, 3, 2] = bad
    signs = reference.sample_signs(4, 3, 16, rng=1)
    expected, got = attend(arrays, num_hash=4, hash_code_len=3, use_expectation=use_expectation, signs=signs)
    assert np.array_equal(np.isnan(got), np.isnan(expected))
    assert np.isnan(expected).any()
    assert not np.isinf(got).any()


@pytest.mark.parametrize("use_expectation", [True, False], ids=["expectation", "sampled"])
def test_masked_entries_may_hold_anything(use_expectation: bool) -> None:
    options: dict[str, Any] = {"num_hash": 4, "hash_code_len": 3, "use_expectation": use_expectation}
    options |= {"signs": reference.sample_signs(4, 3, 16, rng=1), **masks()}
    clean, dirty = inputs(16), inputs(16)
    keep_query, keep_key = (np.broadcast_to(options[f"{of}_mask"] != 0, (2, 3, n)) for of, n in (("query", N_Q), ("key", N_K)))
    dirty["query"][~keep_query] = np.nan
    dirty["key"][~keep_key], dirty["value"][~keep_key] = np.nan, np.inf
    assert np.array_equal(attend(clean, **options)[1], attend(dirty, **options)[1])


def test_a_row_shorter_than_1e_12_becomes_zeros_and_a_longer_one_has_length_one() -> None:
    arrays = inputs(16)
    arrays["value"][:] = 0
    arrays["value"][0, 0], arrays["value"][1, 0] = 1e-15, 1e-10
    expected, got = attend(arrays, num_hash=4, hash_code_len=3, use_expectation=True)
    assert not got[0, 0].any()
    assert not expected[0, 0].any()
    np.testing.assert_allclose(np.linalg.norm(got[1, 0], axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize("tau", [1, 8, 30])
def test_a_vector_and_itself_have_the_weight_one(tau: int) -> None:
    x = torch.from_numpy(inputs(64)["query"])
    weights = plain.expected_weights(x, x, tau).diagonal(dim1=-2, dim2=-1)
    is_zero = (x == 0).all(dim=-1)
    torch.testing.assert_close(weights[~is_zero], torch.ones_like(weights[~is_zero]), rtol=0, atol=1e-5)
    assert float(weights[is_zero]) == pytest.approx(0.5**tau)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("use_expectation", [True, False], ids=["expectation", "sampled"])
def test_the_result_has_the_dtype_of_the_value(dtype: torch.dtype, use_expectation: bool) -> None:
    tensors = {name: x.to(dtype) for name, x in to_torch(inputs(16)).items()}
    options = to_torch({"signs": reference.sample_signs(4, 3, 16, rng=1)})
    options |= {"num_hash": 4, "hash_code_len": 3, "use_expectation": use_expectation}
    got = plain.yoso_attention(**tensors, **options)
    wide = plain.yoso_attention(**{name: x.double() for name, x in tensors.items()}, **options)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), wide, rtol=0, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dims", [(), (2,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("use_expectation", [True, False], ids=["expectation", "sampled"])
def test_any_leading_dims(dims: tuple[int, ...], use_expectation: bool) -> None:
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((*dims, 7, 12)).astype(np.float32) for name in ("query", "key", "value")}
    signs = reference.sample_signs(5, 3, 12, batch_shape=dims[-1:], rng=1)
    expected, got = attend(arrays, num_hash=5, hash_code_len=3, use_expectation=use_expectation, signs=signs)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("way", ["expectation", "signs", "planes"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=["float16", "float32"])
def test_weights_are_those_of_the_library(way: str, dtype: Any) -> None:
    options: dict[str, Any] = {"num_hash": 5, "hash_code_len": 3, "use_expectation": way == "expectation", **masks()}
    if way == "planes":
        options["planes"] = reference.sample_planes(5, 3, 16, rng=1)
    else:
        options["signs"] = reference.sample_signs(5, 3, 16, rng=1)
    given = to_torch(inputs(16, dtype) | options)
    expected = yoso_attention_with_weights(**given)[1]
    del given["value"]
    torch.testing.assert_close(plain.attention_weights(**given), expected, rtol=0, atol=1e-5)


def test_hashes_that_are_not_fixed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"signs: a graph needs fixed hashes; .*model\.eval\(\)"):
        plain.yoso_attention(**to_torch(inputs(16)), num_hash=4, hash_code_len=3)


def test_outside_an_export_the_operators_run() -> None:
    assert not plain.in_onnx_export()


def test_importing_the_model_loads_neither_the_compiler_nor_the_exporter() -> None:
    program = "import sys, yoso_core.model; print({'torch._dynamo', 'torch.onnx'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"
