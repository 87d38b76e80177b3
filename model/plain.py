"""YOSO attention in torch's own operations, for graphs that leave PyTorch.

While `torch.onnx.export` runs, `yoso_core.model.yoso_attention` computes here, so that an ONNX file
holds standard operators alone. There are no gradients of YOSO's kind here: nothing is trained in
such a graph.

- **Hashes** are those of `yoso_core.reference`: the butterflies follow the same tree, so the codes
  of the same vectors are the same bits, in every runtime that follows IEEE arithmetic. Entries must
  lie within [2**-60, 2**60] or be zero. Codes by planes are matrix products, which round
  differently from one runtime to another.
- **Cumulation** up to `TABLE_CODE_LEN` bits goes through a table for each hash, in linear time.
  Longer codes are compared pair by pair: their tables would be too large.
- **The expectation** takes memory for all pairs, ``n_q n_k`` for each head, where the library's own
  kernels need ``n_q + n_k``. The cosines are in float64, since the angle between nearly equal
  vectors would lose half its digits in float32.
"""

import math
import sys
from typing import Any

import torch
from torch import Tensor

from yoso_core.model.weights import agreement, working
from yoso_core.reference.hashing import HUGE, WARM_UP, Layout, chain_factor, hash_layout
from yoso_core.reference.normalize import TINY_NORM
from yoso_core.reference.smoothing import smoothing_weights

TABLE_CODE_LEN = 12
"""The longest codes whose tables, of ``2**tau`` rows, are made."""

HASHES_AT_ONCE = 4
"""Hashes whose tables exist at the same time: fewer take less memory, more make a smaller graph."""


def in_onnx_export() -> bool:
    """Whether this call is being recorded by `torch.onnx.export`, by either of its exporters."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return recorded and _exporting()


def _exporting() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


# This is what `torch.compiler.assume_constant_result` does; that would import the compiler. Without
# it the compiler takes the answer for False, and the exporter falls back on what it records.
_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]


def yoso_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalize_output: bool = True,
    **options: Any,
) -> Tensor:
    """What `yoso_core.model.yoso_attention` computes for these arguments. They are not checked
    again, and those that choose kernels and gradients have no effect.

    ``ValueError`` where hashes would have to be drawn: a graph needs fixed ones.

    >>> x = torch.eye(2)
    >>> yoso_attention(x, x, x, num_hash=1, hash_code_len=1, use_expectation=True)
    tensor([[0.8944, 0.4472],
            [0.4472, 0.8944]])
    """
    query, key, values = _kept(query, query_mask), _kept(key, key_mask), _kept(value, key_mask)
    values = values.masked_fill(~torch.isfinite(values), torch.nan)
    tau = options["hash_code_len"]
    if options.get("use_expectation"):
        out = expected_weights(query, key, tau).to(values.dtype) @ values
    else:
        oversample = options.get("oversample", 0)
        out = lsh_cumulation(*_codes(query, key, **options), values, tau + oversample, oversample)
        nonfinite_query, nonfinite_key = (~torch.isfinite(x).all(dim=-1, keepdim=True) for x in (query, key))
        out = out.masked_fill(nonfinite_query | nonfinite_key.any(dim=-2, keepdim=True), torch.nan)
    if normalize_output:
        out = _unit(out, tiny=TINY_NORM)
    return _kept(out, query_mask).to(value.dtype)


def attention_weights(
    query: Tensor, key: Tensor, *, query_mask: Tensor | None = None, key_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """The weights of `yoso_attention` for the same arguments, ``(..., n_q, n_k)``.

    >>> x = torch.eye(2)
    >>> attention_weights(x, x, num_hash=1, hash_code_len=1, use_expectation=True)
    tensor([[1.0000, 0.5000],
            [0.5000, 1.0000]])
    """
    q, k = _kept(query, query_mask), _kept(key, key_mask)
    if options.get("use_expectation"):
        weights = expected_weights(q, k, options["hash_code_len"])
    else:
        weights = collision_rate(*_codes(q, k, **options), options["hash_code_len"], options.get("oversample", 0)).to(q.dtype)
    if key_mask is not None:
        weights = weights.masked_fill((key_mask == 0).unsqueeze(-2), 0)
    return _kept(weights, query_mask).to(query.dtype)


def _codes(
    query: Tensor,
    key: Tensor,
    *,
    num_hash: int,
    hash_code_len: int,
    signs: Tensor | None = None,
    planes: Tensor | None = None,
    layout: Layout = "chained",
    oversample: int = 0,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    bits = hash_code_len + oversample
    if signs is not None:
        return fast_hash(query, signs, num_hash, bits, layout), fast_hash(key, signs, num_hash, bits, layout)
    if planes is not None:
        return hyperplane_hash(query, planes, num_hash, bits), hyperplane_hash(key, planes, num_hash, bits)
    raise ValueError("signs: a graph needs fixed hashes; export the model in evaluation (model.eval()), or give signs or planes")


def expected_weights(query: Tensor, key: Tensor, hash_code_len: int) -> Tensor:
    """``(1 - theta_ij / pi)**tau`` for all pairs, ``(..., n_q, n_k)``, in float32 at least.

    >>> expected_weights(torch.eye(2), torch.eye(2), 3)
    tensor([[1.0000, 0.1250],
            [0.1250, 1.0000]])
    """
    cosine = _unit(query.double()) @ _unit(key.double()).transpose(-2, -1)
    tangent_squared = (2 / (1 + cosine) - 1).abs()  # of half the angle; rounding may leave it just below zero
    theta = 2 * tangent_squared.to(working(query.dtype)).sqrt().atan()
    return (1 - theta / math.pi) ** hash_code_len


def fast_hash(vectors: Tensor, signs: Tensor, num_hash: int, hash_code_len: int, layout: Layout = "chained") -> Tensor:
    """The codes of `yoso_core.fast_hash`, as int64.

    >>> fast_hash(torch.eye(2), torch.ones(4, 2, dtype=torch.int8), num_hash=1, hash_code_len=2)
    tensor([[1],
            [2]])
    """
    dim = int(vectors.shape[-1])  # the old exporter counts in tensors
    padded_dim = int(signs.shape[-1])
    x = _within_range(vectors)
    if dim < padded_dim:
        x = torch.nn.functional.pad(x, (0, padded_dim - dim))
    signs = signs.to(x.dtype)
    return _pack_bits((_chained_bits if layout == "chained" else _paper_bits)(x, signs, num_hash, hash_code_len))


def _paper_bits(x: Tensor, signs: Tensor, num_hash: int, hash_code_len: int) -> Tensor:
    """The bits of every code, ``(..., n, m, tau)``."""
    layout = hash_layout(num_hash, hash_code_len, int(x.shape[-1]))
    projection = x.unsqueeze(-2)  # (..., n, parts, D)
    diagonals = signs.unsqueeze(-4)  # (..., 1, 3, parts, D)
    for stage in range(3):
        projection = hadamard_transform(projection * diagonals.select(-3, stage))
    bits = projection > 0
    if layout.codes_per_part:
        bits = bits[..., : layout.codes_per_part * hash_code_len]
    stream = bits.flatten(-2)[..., : num_hash * hash_code_len]
    return torch.unflatten(stream, -1, (num_hash, hash_code_len))


def _chained_bits(x: Tensor, signs: Tensor, num_hash: int, hash_code_len: int) -> Tensor:
    """The bits of every code, ``(..., n, m, tau)``."""
    rounds, dim = (int(size) for size in signs.shape[-2:])
    rotations = []
    for round in range(1, rounds + 1):
        x = hadamard_transform(x * signs.select(-2, round - 1).unsqueeze(-2)) * chain_factor(round, dim)
        if round > WARM_UP:
            rotations.append(x > 0)
    stream, apart = torch.cat(rotations, dim=-1), len(rotations) * dim // hash_code_len
    return torch.stack([stream[..., bit * apart : bit * apart + num_hash] for bit in range(hash_code_len)], dim=-1)


def hyperplane_hash(vectors: Tensor, planes: Tensor, num_hash: int, hash_code_len: int) -> Tensor:
    """The codes of `yoso_core.hyperplane_hash`, as int64.

    >>> planes = torch.tensor([[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]])
    >>> hyperplane_hash(torch.eye(2), planes, num_hash=1, hash_code_len=3)
    tensor([[3],
            [6]])
    """
    x = _within_range(vectors)
    bits = x @ planes.to(x.dtype) > 0
    return _pack_bits(torch.unflatten(bits, -1, (num_hash, hash_code_len)))


def hadamard_transform(x: Tensor) -> Tensor:
    """`yoso_core.hadamard_transform` over the last axis, by the same tree of sums.

    >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([10., -2., -4.,  0.])
    """
    dim = int(x.shape[-1])  # the old exporter counts in tensors
    index, stride = torch.arange(dim, device=x.device), dim // 2
    while stride:
        sign = (1 - 2 * (index // stride % 2)).to(x.dtype)
        x = x.index_select(-1, index ^ stride) + x * sign  # upper + lower in the one, upper - lower in the other
        stride //= 2
    return x


def lsh_cumulation(query_code: Tensor, key_code: Tensor, value: Tensor, code_len: int, oversample: int = 0) -> Tensor:
    """`yoso_core.lsh_cumulation` for codes of ``code_len = tau + s`` bits as `fast_hash` gives
    them.

    >>> codes = torch.tensor([[0], [1], [0]])
    >>> lsh_cumulation(codes, codes, torch.tensor([[1.0], [2.0], [4.0]]), code_len=1)
    tensor([[5.],
            [2.],
            [5.]])
    """
    if code_len > TABLE_CODE_LEN:
        return collision_rate(query_code, key_code, code_len - oversample, oversample).to(value.dtype) @ value
    num_hash = int(query_code.shape[-1])
    # Sums with zeros in place of `expand` and `zeros`: the old exporter takes sizes for constants.
    wide = torch.zeros(int(value.shape[-1]), dtype=torch.int64, device=value.device)
    empty = torch.zeros(1 << code_len, 1, device=value.device, dtype=value.dtype) + wide
    out = value.new_zeros(())
    query_code, key_code = query_code.transpose(-2, -1), key_code.transpose(-2, -1)  # (..., m, n)
    for first in range(0, num_hash, HASHES_AT_ONCE):
        read, write = (code[..., first : first + HASHES_AT_ONCE, :].unsqueeze(-1) for code in (query_code, key_code))
        nothing = (write * 0).to(value.dtype)  # (..., hashes, n_k, 1)
        tables = (nothing.sum(dim=-2, keepdim=True) + empty).scatter_add(-2, write + wide, value.unsqueeze(-3) + nothing)
        out = out + smooth_table(tables, code_len, oversample).gather(-2, read + wide).sum(dim=-3)
    return out / num_hash


def smooth_table(table: Tensor, code_len: int, oversample: int) -> Tensor:
    """`yoso_core.smooth_table`, by spheres, of tables ``(..., 2**code_len, d_v)``.

    >>> smooth_table(torch.tensor([[1.0], [0.0], [0.0], [4.0]]), code_len=2, oversample=1)
    tensor([[1.0000],
            [2.5000],
            [2.5000],
            [4.0000]])
    """
    if oversample == 0:
        return table
    codes = torch.arange(1 << code_len, device=table.device)
    spheres = [table, *(torch.zeros_like(table) for _ in range(oversample))]
    for bit in range(code_len):
        for r in range(oversample, 0, -1):
            spheres[r] = spheres[r] + spheres[r - 1].index_select(-2, codes ^ (1 << bit))
    for r, weight in enumerate(smoothing_weights(code_len - oversample, oversample)[1:], start=1):
        table = table + weight * spheres[r]
    return table


def collision_rate(query_code: Tensor, key_code: Tensor, hash_code_len: int = 1, oversample: int = 0) -> Tensor:
    """The share of hashes in which two codes are equal, for all pairs: float32 ``(..., n_q, n_k)``.
    With ``oversample``, what they count where they are nearly equal.

    >>> collision_rate(torch.tensor([[0, 1]]), torch.tensor([[0, 1], [0, 3], [2, 3]]))
    tensor([[1.0000, 0.5000, 0.0000]])
    """
    num_hash = int(query_code.shape[-1])
    pairs = zip(query_code.unbind(dim=-1), key_code.unbind(dim=-1), strict=True)
    return torch.stack([agreement(of_query, of_key, hash_code_len, oversample) for of_query, of_key in pairs]).sum(dim=0) / num_hash


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows in the working precision, masked ones zero: they add nothing, whatever they held."""
    x = x.to(working(x.dtype))
    return x if mask is None else x.masked_fill((mask == 0).unsqueeze(-1), 0)


def _unit(x: Tensor, tiny: float = 0.0) -> Tensor:
    """Rows of length one; zeros where the length is at most ``tiny``, NaN where it is NaN."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    scaled = x / largest.masked_fill(largest == 0, 1)  # no square overflows or vanishes
    length = (scaled * scaled).sum(dim=-1, keepdim=True).sqrt()
    return (scaled / length.masked_fill(length == 0, 1)).masked_fill(largest * length <= tiny, 0)


def _within_range(x: Tensor) -> Tensor:
    """Rows with an entry beyond `HUGE` times a small power of two, so that no sum overflows."""
    small = 2.0**-70 if x.dtype == torch.float32 else 2.0**-980
    return torch.where(x.abs().amax(dim=-1, keepdim=True) > HUGE, x * small, x)


def _pack_bits(bits: Tensor) -> Tensor:
    """``sum_b bits[..., b] * 2**b``, as int64."""
    powers = torch.tensor([1 << b for b in range(bits.shape[-1])], device=bits.device)
    return (bits * powers).sum(dim=-1)
