"""Who can be measured: how each is called, and how ours are checked before any number of theirs is shown."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.machines import MACHINES
from yoso_core.registry import automatic
from yoso_core.truth import tolerance, truth

Array = np.ndarray[Any, Any]
Tensors = dict[str, Any]
"""``query``, ``key``, ``value`` ``(batch, heads, n, d)`` and ``signs``, torch tensors on the device of the workload."""


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

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        """The operations that run, each with its variant, in order."""
        if workload.variant is not None:
            return ((self.op, workload.variant),)
        chosen = automatic(self.op, workload.device)
        return ((self.op, chosen.name if chosen else None),)

    def check(self, workload: Workload) -> Check:
        """The whole call, of which rows spread over the last head are compared: a slip in a stride of heads or rows shows there."""
        rows, exact, allowed = _right(self.op, self.arguments, self.rows, replace(workload, run="", variant=None))
        out = self.bind(workload, tensors(workload))()
        error = np.abs(out[-1:, -1:, rows].double().cpu().numpy() - exact)
        with np.errstate(divide="ignore", invalid="ignore"):
            used = np.where(error == 0, 0, error / allowed)
        return Check(float(np.max(used, initial=0)), float(np.max(error, initial=0)), len(rows))


@lru_cache(maxsize=16)
def _right(
    op: str, arguments: Callable[[Workload, Tensors], dict[str, Any]], most_rows: int, workload: Workload
) -> tuple[Array, Array, Array]:
    """The rows to compare, what is right there, and how far a result may be from it. Kept, since variants share it."""
    rows = np.unique(np.linspace(0, workload.n - 1, min(workload.n, most_rows)).astype(int))
    last_head = {name: (x[-1:] if name == "signs" else x[-1:, -1:]).cpu() for name, x in tensors(workload).items()}
    given = arguments(workload, {**last_head, "query": last_head["query"][:, :, rows]})
    (exact,) = truth(op, (), given)
    (allowed,) = tolerance(op, (), given, true=(exact,))
    return rows, exact, allowed


@dataclass(frozen=True)
class Composed(Ours):
    """Sampled attention from its public parts, each by a variant named, as it is without a fused one."""

    hash_variant: str | None = None
    cumulation_variant: str | None = None

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        return partial(self._attend, **self.arguments(workload, given))

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        hashing = ("fast_hash", self.hash_variant)
        return (hashing, hashing, ("lsh_cumulation", self.cumulation_variant))

    def _attend(self, query: Any, key: Any, value: Any, *, signs: Any, num_hash: int, hash_code_len: int) -> Any:
        import torch

        query_code, key_code = (yoso_core.fast_hash(x, signs, num_hash, hash_code_len, variant=self.hash_variant) for x in (query, key))
        capacity = 1 << hash_code_len
        sums = yoso_core.lsh_cumulation(query_code, key_code, value, capacity, validate=False, variant=self.cumulation_variant)
        return torch.nn.functional.normalize(sums.float(), dim=-1).to(sums.dtype)


@dataclass(frozen=True)
class Peer:
    """What a reader would use instead."""

    label: str
    requires: tuple[str, ...]
    bind: Callable[[Workload, Tensors], Callable[[], Any]]


def tensors(workload: Workload) -> Tensors:
    """The inputs: the same for every contender, and on every run."""
    import torch

    device = MACHINES[workload.device].torch
    generator = torch.Generator(device).manual_seed(0)
    shape = (workload.batch, workload.heads, workload.n, workload.dim)
    dtype = getattr(torch, workload.dtype)
    drawn = {name: torch.randn(shape, generator=generator, device=device).to(dtype) for name in ("query", "key", "value")}
    signs = yoso_core.sample_signs(workload.num_hash, workload.hash_code_len, workload.dim, batch_shape=(workload.heads,), rng=0)
    return {**drawn, "signs": torch.from_numpy(signs).to(device)}


def _sampled(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**given, "num_hash": workload.num_hash, "hash_code_len": workload.hash_code_len}


def _expected(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**{name: given[name] for name in ("query", "key", "value")}, "hash_code_len": workload.hash_code_len}


def _hashed(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {
        "vectors": given["query"],
        "signs": given["signs"],
        "num_hash": workload.num_hash,
        "hash_code_len": workload.hash_code_len,
    }


def _cumulated(workload: Workload, given: Tensors) -> dict[str, Any]:
    """Codes are made outside the timed call, and are right by construction: nothing looks at them again."""
    query_code, key_code = (
        yoso_core.fast_hash(given[name], given["signs"], workload.num_hash, workload.hash_code_len) for name in ("query", "key")
    )
    return {
        "query_hash_code": query_code,
        "key_hash_code": key_code,
        "value": given["value"],
        "hashtable_capacity": 1 << workload.hash_code_len,
        "validate": False,
    }


def _weighted(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**_cumulated(workload, given), "query_weight": given["query"], "key_weight": given["key"]}


def _sdpa(workload: Workload, given: Tensors) -> Callable[[], Any]:
    import torch

    return partial(torch.nn.functional.scaled_dot_product_attention, given["query"], given["key"], given["value"])


def _flash(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """Flash attention or nothing: torch may not choose another kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = _sdpa(workload, given)

    def call() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend()

    return call


def _transformers_expectation(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """As its YosoSelfAttention calls it: heads folded into the batch, masks of ones. Unit vectors are made outside the timed call."""
    import torch
    from transformers.models.yoso.modeling_yoso import YosoCumulation

    query, key, value = (given[name].flatten(0, 1) for name in ("query", "key", "value"))
    query, key = torch.nn.functional.normalize(query, dim=-1), torch.nn.functional.normalize(key, dim=-1)
    mask = torch.ones(query.shape[:2], dtype=torch.int32, device=query.device)
    config = {"hash_code_len": workload.hash_code_len}

    def call() -> Any:
        with torch.no_grad():
            return YosoCumulation.apply(mask, mask, query, key, value, config)  # type: ignore[no-untyped-call]

    return call


CONTENDERS: dict[str, Ours | Peer] = {
    "yoso": Ours("YOSO, sampled", "yoso_attention", _sampled, rows=4096),
    "yoso_expectation": Ours("YOSO, exact expectation", "expectation_attention", _expected, rows=256),
    "hash": Ours("fast_hash", "fast_hash", _hashed, rows=4096),
    "cumulation": Ours("lsh_cumulation", "lsh_cumulation", _cumulated, rows=256),
    "weighted": Ours("lsh_weighted_cumulation", "lsh_weighted_cumulation", _weighted, rows=256),
    "paper": Composed(
        "the paper's algorithm",
        "yoso_attention",
        _sampled,
        rows=4096,
        hash_variant="cupy:block_per_part",
        cumulation_variant="cupy:global_table",
    ),
    "paper_tables": Composed(
        "the paper's tables with our hash",
        "yoso_attention",
        _sampled,
        rows=4096,
        hash_variant="cupy:warp_per_vector",
        cumulation_variant="cupy:global_table",
    ),
    "sdpa": Peer("torch scaled_dot_product_attention", ("torch",), _sdpa),
    "flash": Peer("torch flash attention", ("torch",), _flash),
    "transformers_expectation": Peer("transformers YosoCumulation", ("torch", "transformers"), _transformers_expectation),
}
