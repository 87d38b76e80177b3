"""Half precision on the CPU: read as it is, computed in float32, rounded once. So every result is
that of the widened arguments, rounded, to the last bit.
"""

from collections.abc import Callable
from platform import machine
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import yoso_core
from yoso_core import ops
from yoso_core.cpu import precision

HALF = [torch.float16, torch.bfloat16]
SIZES = [(1, 7, 5, 33, 3), (2, 130, 137, 64, 64), (8, 70, 90, 40, 33)]
"""Heads, queries, keys, dims of queries and of values: by all threads, and by heads. All are hashed
in 64 dims, so that few kernels are compiled.
"""


def inputs(dtype: torch.dtype, heads: int, n_q: int, n_k: int, d: int, d_v: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "query": normal(heads, n_q, d),
        "key": normal(n_k, heads, d).transpose(0, 1),  # not contiguous
        "value": normal(heads, n_k, d_v),
        "grad_out": normal(heads, n_q, d_v),
        "mask": torch.arange(n_k) % 5 > 0,
    }


def codes(x: dict[str, Any], bits: int) -> tuple[Tensor, Tensor]:
    signs = torch.from_numpy(yoso_core.sample_signs(9, bits, x["query"].shape[-1], rng=1))
    query, key = (yoso_core.fast_hash(x[name].float(), signs, 9, bits) for name in ("query", "key"))
    return query, key


def attention(x: dict[str, Any], **options: Any) -> Any:
    return ops.yoso_attention(x["query"], x["key"], x["value"], key_mask=x["mask"].expand(*x["key"].shape[:-1]), rng=3, **options)


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "hadamard_transform": lambda x: yoso_core.hadamard_transform(torch.nn.functional.pad(x["query"], (0, 64 - x["query"].shape[-1]))),
    "fast_hash": lambda x: codes(x, 8),
    "fast_hash, paper": lambda x: yoso_core.fast_hash(
        x["key"],
        torch.from_numpy(yoso_core.sample_signs(5, 8, x["key"].shape[-1], layout="paper", rng=1)),
        5,
        8,
        layout="paper",
    ),
    "hyperplane_hash": lambda x: yoso_core.hyperplane_hash(
        x["query"], torch.from_numpy(yoso_core.sample_planes(5, 4, x["query"].shape[-1], rng=1)).bfloat16().to(x["query"].dtype), 5, 4
    ),
    "attention": lambda x: attention(x, num_hash=9, hash_code_len=4),
    "attention, not normalized": lambda x: attention(x, num_hash=9, hash_code_len=4, normalize_output=False),
    "attention, smoothed, error": lambda x: attention(x, num_hash=9, hash_code_len=4, oversample=2, return_error=True),
    "attention, rare buckets": lambda x: attention(x, num_hash=9, hash_code_len=20),
    "attention, neighbors": lambda x: attention(x, num_hash=9, hash_code_len=16, oversample=1),
    "attention, expectation": lambda x: attention(x, hash_code_len=8, use_expectation=True),
    "expectation_attention": lambda x: yoso_core.expectation_attention(x["query"], x["key"], x["value"], 8),
    "lsh_cumulation": lambda x: yoso_core.lsh_cumulation(*codes(x, 5), x["value"], 32),
    "lsh_cumulation, neighbors": lambda x: yoso_core.lsh_cumulation(*codes(x, 14), x["value"], 1 << 14, oversample=1),
    "lsh_weighted_cumulation": lambda x: yoso_core.lsh_weighted_cumulation(
        codes(x, 4)[0], x["query"], codes(x, 4)[1], x["key"], x["value"], 16
    ),
    "smooth_table": lambda x: yoso_core.smooth_table(x["value"].repeat(1, 40, 1)[:, :32].contiguous(), 2),
    "lsh_attention_backward": lambda x: yoso_core.lsh_attention_backward(x["grad_out"], x["query"], x["key"], x["value"], *codes(x, 4), 4),
    "lsh_attention_backward, exact": lambda x: yoso_core.lsh_attention_backward(
        x["grad_out"], x["query"], x["key"], x["value"], *codes(x, 4), 4, grad="exact"
    ),
    "lsh_attention_backward, fewer hashes": lambda x: yoso_core.lsh_attention_backward(
        x["grad_out"], x["query"], x["key"], x["value"], *codes(x, 6), 4, oversample=2, backward_num_hash=3
    ),
    "expectation_attention_backward": lambda x: yoso_core.expectation_attention_backward(
        x["grad_out"], x["query"], x["key"], x["value"], 8
    ),
}


IN_BOTH = ["fast_hash", "attention", "lsh_attention_backward"]
"""Calls that are tried in float16 too, which is read in the same places."""


def results(found: Any) -> list[Any]:
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("call", "dtype"), [*((call, torch.bfloat16) for call in CALLS), *((call, torch.float16) for call in IN_BOTH)], ids=str
)
def test_a_result_is_that_of_float32_rounded(call: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    half = inputs(dtype, *sizes)
    wide = {name: x.float() if x.is_floating_point() else x for name, x in half.items()}
    for got, want in zip(results(CALLS[call](half)), results(CALLS[call](wide)), strict=True):
        kept = not want.is_floating_point() or want.ndim < half["query"].ndim  # codes, errors of rows
        assert got.dtype == (want.dtype if kept else dtype)
        assert torch.equal(got.nan_to_num(7.0), want.to(got.dtype).nan_to_num(7.0))


@pytest.mark.parametrize("instructions", [True, False])
def test_numpys_float16_likewise(instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where the processor has no instructions for it."""
    if not instructions:
        monkeypatch.setattr(precision, "FLOAT16", False)
    x = {name: tensor.numpy() for name, tensor in inputs(torch.float16, *SIZES[2]).items()}
    wide = {name: array.astype(np.float32) for name, array in x.items()}
    signs = yoso_core.sample_signs(9, 4, 40, rng=1)

    def calls(x: dict[str, Any]) -> list[Any]:
        query_code, key_code = (yoso_core.fast_hash(x[name], signs, 9, 4) for name in ("query", "key"))
        backward = yoso_core.lsh_attention_backward(x["grad_out"], x["query"], x["key"], x["value"], query_code, key_code, 4)
        attention = yoso_core.yoso_attention(x["query"], x["key"], x["value"], num_hash=9, hash_code_len=4, signs=signs)
        return [attention, yoso_core.lsh_cumulation(query_code, key_code, x["value"], 16), *backward]

    for got, want in zip(calls(x), calls(wide), strict=True):
        assert got.dtype == np.float16
        np.testing.assert_array_equal(got, want.astype(np.float16))


@pytest.mark.parametrize("dtype", HALF)
def test_widening_and_rounding_are_torchs(dtype: torch.dtype) -> None:
    """Every number of 16 bits to float32; and back what lies on it, between two, and beyond."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 1, 256, 256)
    bits = every.view(torch.int16).numpy()
    stored = bits.view(np.float16) if dtype == torch.float16 else bits.view(np.uint16)
    wide = torch.from_numpy(precision.rows(stored, np.float32, 2))
    number = ~every.isnan()
    assert torch.equal(wide.isnan(), ~number)
    assert torch.equal(wide[number].view(torch.int32), every.float()[number].view(torch.int32))

    size = every.float()[number].abs()
    steps = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    between = torch.cat([x + (torch.nextafter(x, torch.tensor(torch.inf)) - x) for x in (size, -size)])
    fine = torch.cat([size[:-1, None] + (size[1:, None] - size[:-1, None]) * steps, -size[:-1, None]], dim=1).flatten()
    x = torch.cat([between, fine, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, -3e38, 1e-45, 65519.9, 65520.0])])
    got = precision.rounded(x.numpy(), np.float16 if dtype == torch.float16 else precision.BFLOAT16, 2)
    found, want = torch.from_numpy(got.view(np.int16)).view(dtype), x.to(dtype)
    assert torch.equal(found.isnan(), want.isnan())
    assert torch.equal(found[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


def test_queries_and_values_of_different_dtypes() -> None:
    x = inputs(torch.float32, *SIZES[1])
    x["value"] = x["value"].bfloat16()
    wide = {**x, "value": x["value"].float()}
    assert torch.equal(CALLS["attention"](x), CALLS["attention"](wide).bfloat16())


def test_instructions_follow_what_is_compiled_for() -> None:
    arm = machine() in ("aarch64", "arm64")
    assert precision.reads_float16("+avx2,+f16c,+fma")
    assert precision.reads_float16("+avx2,+fma") == arm
    assert precision.reads_float16("") == arm
