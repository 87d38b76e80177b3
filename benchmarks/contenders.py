"""Who can be measured: how each is called, and how ours are checked before any number of theirs is shown."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks.cases import Workload
from yoso_core.truth import tolerance, truth

Tensors = dict[str, Any]
"""``query``, ``key``, ``value`` ``(1, heads, n, d)`` and ``signs``, torch tensors on the CPU."""


@dataclass(frozen=True)
class Check:
    """How far a result is from the definition."""

    tolerance_used: float
    """Error by what is allowed, the largest over all entries compared: green up to 1."""
    largest_error: float
    rows: int
    """Query rows compared, all of the last head."""

    @property
    def green(self) -> bool:
        return self.tolerance_used <= 1  # NaN is red


@dataclass(frozen=True)
class Ours:
    """An operation of this library: it has a definition to be checked against."""

    label: str
    op: str
    arguments: Callable[[Workload, Tensors], dict[str, Any]]
    rows: int
    """Query rows that the definition can afford."""
    requires: tuple[str, ...] = ("torch",)

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        return partial(getattr(yoso_core, self.op), **self.arguments(workload, given), variant=workload.variant)

    def check(self, workload: Workload) -> Check:
        """The whole call, of which rows spread over the last head are compared: a slip in a stride of heads or rows shows there."""
        given = tensors(workload)
        out = self.bind(workload, given)()
        rows = np.unique(np.linspace(0, workload.n - 1, min(workload.n, self.rows)).astype(int))
        last_head = {name: x[-1:] if name == "signs" else x[:, -1:] for name, x in given.items()}
        arguments = self.arguments(workload, {**last_head, "query": last_head["query"][:, :, rows]})
        (exact,) = truth(self.op, (), arguments)
        (allowed,) = tolerance(self.op, (), arguments, true=(exact,))
        error = np.abs(out[:, -1:, rows].double().numpy() - exact)
        with np.errstate(divide="ignore", invalid="ignore"):
            used = np.where(error == 0, 0, error / allowed)
        return Check(float(np.max(used, initial=0)), float(np.max(error, initial=0)), len(rows))


@dataclass(frozen=True)
class Peer:
    """What a reader would use instead."""

    label: str
    requires: tuple[str, ...]
    bind: Callable[[Workload, Tensors], Callable[[], Any]]


def tensors(workload: Workload) -> Tensors:
    """The inputs: the same for every contender, and on every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (1, workload.heads, workload.n, workload.dim)
    drawn = {name: torch.randn(shape, generator=generator).to(getattr(torch, workload.dtype)) for name in ("query", "key", "value")}
    signs = yoso_core.sample_signs(workload.num_hash, workload.hash_code_len, workload.dim, batch_shape=(workload.heads,), rng=0)
    return {**drawn, "signs": torch.from_numpy(signs)}


def _sampled(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**given, "num_hash": workload.num_hash, "hash_code_len": workload.hash_code_len}


def _expected(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**{name: given[name] for name in ("query", "key", "value")}, "hash_code_len": workload.hash_code_len}


def _sdpa(workload: Workload, given: Tensors) -> Callable[[], Any]:
    import torch

    return partial(torch.nn.functional.scaled_dot_product_attention, given["query"], given["key"], given["value"])


def _transformers_expectation(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """As its YosoSelfAttention calls it: heads folded into the batch, masks of ones. Unit vectors are made outside the timed call."""
    import torch
    from transformers.models.yoso.modeling_yoso import YosoCumulation

    query, key, value = (given[name].flatten(0, 1) for name in ("query", "key", "value"))
    query, key = torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(key, dim=-1)
    mask = torch.ones(query.shape[:2], dtype=torch.int32)
    config = {"hash_code_len": workload.hash_code_len}

    def call() -> Any:
        with torch.no_grad():
            return YosoCumulation.apply(mask, mask, query, key, value, config)  # type: ignore[no-untyped-call]

    return call


CONTENDERS: dict[str, Ours | Peer] = {
    "yoso": Ours("YOSO, sampled", "yoso_attention", _sampled, rows=4096),
    "yoso_expectation": Ours("YOSO, exact expectation", "expectation_attention", _expected, rows=256),
    "sdpa": Peer("torch scaled_dot_product_attention", ("torch",), _sdpa),
    "transformers_expectation": Peer("transformers YosoCumulation", ("torch", "transformers"), _transformers_expectation),
}
