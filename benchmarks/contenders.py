"""Everything that can be measured: how each is called, and how ours are checked before any number
of them is shown.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.machines import MACHINES
from yoso_core.benchmarks.models import MODELS
from yoso_core.benchmarks.sides import Array, Check, Ours, Peer, Tensors
from yoso_core.reference import l2_normalize_backward
from yoso_core.reference.hashing import Layout
from yoso_core.reference.normalize import TINY_NORM
from yoso_core.registry import automatic, definition_of
from yoso_core.truth import call, outputs_of, tolerance, truth


@dataclass(frozen=True, kw_only=True)
class FaceFunction(Ours):
    """A public function of `yoso_core`."""

    arguments: Callable[[Workload, Tensors], dict[str, Any]]
    rows: int
    """The number of query rows that are compared: as many as the definition can afford."""
    requires: tuple[str, ...] = ("torch",)

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        return partial(getattr(yoso_core, self.op), **self.arguments(workload, given), variant=workload.variant)

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        if workload.variant is not None:
            return ((self.op, workload.variant),)
        chosen = automatic(self.op, workload.device)
        return ((self.op, chosen.name if chosen else None),)

    def check(self, workload: Workload) -> Check:
        """Make the whole call and compare rows spread over the last head. A wrong stride of heads
        or rows shows there.
        """
        same = replace(workload, run="", variant=None)  # as all who share the answer
        rows, exact, allowed = _right(self.op, self.arguments, self.rows, same)
        out = self.bind(workload, tensors(workload))()
        return Check.of(out[-1:, -1:, rows].double().cpu().numpy(), exact, allowed, len(rows))


def _spread(n: int, most: int) -> Array:
    """At most ``most`` of ``n`` rows, spread from the first to the last."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))


def _last_head(workload: Workload) -> Tensors:
    return {name: (x[-1:] if name == "signs" else x[-1:, -1:]).cpu() for name, x in tensors(workload).items()}


@lru_cache(maxsize=16)
def _right(
    op: str, arguments: Callable[[Workload, Tensors], dict[str, Any]], most_rows: int, workload: Workload
) -> tuple[Array, Array, Array]:
    """The rows to compare, the exact result there, and the error that is allowed. The answer is
    kept, since variants share it.
    """
    rows, last_head = _spread(workload.n, most_rows), _last_head(workload)
    given = arguments(workload, {**last_head, "query": last_head["query"][:, :, rows]})
    (exact,) = truth(op, (), given)
    (allowed,) = tolerance(op, (), given, true=(exact,))
    return rows, exact, allowed


@dataclass(frozen=True, kw_only=True)
class Composed(FaceFunction):
    """Sampled attention from its public parts, each by a named variant: the way without a fused
    kernel.
    """

    hash_variant: str | None = None
    cumulation_variant: str | None = None

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        return partial(self._attend, **self.arguments(workload, given))

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        hashing = ("fast_hash", self.hash_variant)
        return (hashing, hashing, ("lsh_cumulation", self.cumulation_variant))

    def _attend(self, query: Any, key: Any, value: Any, *, signs: Any, num_hash: int, hash_code_len: int, layout: Layout) -> Any:
        import torch

        hash = partial(
            yoso_core.fast_hash, signs=signs, num_hash=num_hash, hash_code_len=hash_code_len, layout=layout, variant=self.hash_variant
        )
        query_code, key_code = hash(query), hash(key)
        capacity = 1 << hash_code_len
        sums = yoso_core.lsh_cumulation(query_code, key_code, value, capacity, validate=False, variant=self.cumulation_variant)
        return torch.nn.functional.normalize(sums.float(), dim=-1).to(sums.dtype)


@dataclass(frozen=True, kw_only=True)
class Operator(FaceFunction):
    """The same function as an operator of torch."""

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        import torch

        import yoso_core.model  # noqa: F401  # registers the operators

        return partial(getattr(torch.ops.yoso_core, self.op), **self.arguments(workload, given), variant=workload.variant)


@dataclass(frozen=True, kw_only=True)
class Training(FaceFunction):
    """Forward and backward pass. A call returns the output and the gradients of query, key and
    value.
    """

    backward: str = "lsh_attention_backward"
    """The operation that defines the gradients."""

    @property
    def ops(self) -> tuple[str, ...]:
        return (self.op, self.backward)

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        from yoso_core import model

        attend = model.yoso_attention if self.op == "yoso_attention" else getattr(model.ops, self.op)
        leaves = _leaves(given)
        arguments = {**self.arguments(workload, {**given, **leaves}), **_fewer(workload), "variant": workload.variant}
        return _forward_and_backward(partial(attend, **arguments), leaves, grad_out(workload))

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        chosen = automatic(self.backward, workload.device)
        return (*super().steps(workload), (self.backward, chosen.name if chosen else None))

    def check(self, workload: Workload) -> Check:
        """Make the whole call and compare rows of the output and of the gradients, spread over the
        last head.
        """
        shapes = replace(workload, run="", variant=None)
        rows, exact, allowed = _right(self.op, self.arguments, self.rows, replace(shapes, backward_num_hash=None))
        found = self.bind(workload, tensors(workload))()
        compared = [x.detach()[-1:, -1:, rows].double().cpu().numpy() for x in found]
        right = ((exact, allowed), *_right_gradients(self, shapes))
        checks = [Check.of(x, exact, allowed, len(rows)) for x, (exact, allowed) in zip(compared, right, strict=True)]
        used, error = (np.max([getattr(check, name) for check in checks]) for name in ("tolerance_used", "largest_error"))
        return Check(float(used), float(error), len(rows))


def _fewer(workload: Workload) -> dict[str, int]:
    """What the backward pass of sampled attention is told beside the hashes of the forward pass."""
    return {} if workload.backward_num_hash is None else {"backward_num_hash": workload.backward_num_hash}


@lru_cache(maxsize=16)
def _right_gradients(training: Training, workload: Workload) -> tuple[tuple[Array, Array], ...]:
    """For query, key and value: the exact gradient in the rows that are compared, and the error
    that is allowed.

    Query rows come from all keys, and key and value rows from all queries. Each is a small problem
    of the definition in float64. Where outputs are scaled to unit length, the gradient is first
    taken back through that scaling, for every query. The error allowed is as everywhere: twice the
    definition's own error in the caller's dtype, here from the first sum of the forward pass to the
    last of the backward pass, plus 4 ulp.
    """
    rows = _spread(workload.n, training.rows)
    given = {name: x.numpy() for name, x in _last_head(workload).items()}
    wide = own = grad_out(workload)[-1:, -1:].cpu().numpy()
    if training.op == "yoso_attention":
        wide, own = _before_scaling(training, workload, given, own)
    of_query, of_key = {"query": given["query"]}, {"key": given["key"], "value": given["value"]}
    if training.backward == "lsh_attention_backward":
        for side, name in ((of_query, "query"), (of_key, "key")):
            hashed = (given[name], given["signs"], workload.num_hash, workload.hash_code_len)
            (side[f"{name}_hash_code"],) = truth("fast_hash", hashed, {})
    found: list[tuple[Array, Array]] = []
    for few, many, outputs in ((of_query, of_key, slice(1)), (of_key, of_query, slice(1, 3))):
        problem = {**{name: x[:, :, rows] for name, x in few.items()}, **many, "hash_code_len": workload.hash_code_len, **_fewer(workload)}
        wide_here, own_here = (g[:, :, rows] if few is of_query else g for g in (wide, own))
        exact = truth(training.backward, (), {**problem, "grad_out": wide_here})
        allowed = tolerance(training.backward, (), {**problem, "grad_out": own_here}, true=exact)
        found += list(zip(exact, allowed, strict=True))[outputs]
    return tuple(found)


def _before_scaling(training: Training, workload: Workload, given: Tensors, grad: Array) -> tuple[Array, Array]:
    """``grad`` taken back through the scaling to unit length, for every row. Returned twice: in
    float64, and by the definition in the caller's dtype.
    """
    sums = {**training.arguments(workload, given), "normalize_output": False}
    (wide,) = truth("yoso_attention", (), sums)
    (own,) = outputs_of(call("yoso_attention", sums, definition_of("yoso_attention").name))
    back = l2_normalize_backward(grad, own, TINY_NORM).astype(grad.dtype)  # half types are computed in float32
    return l2_normalize_backward(grad.astype(np.float64), wide, TINY_NORM), back


def tensors(workload: Workload) -> Tensors:
    """The inputs: the same for every contender and in every run."""
    import torch

    device = MACHINES[workload.device].torch
    generator = torch.Generator(device).manual_seed(0)
    shape = (workload.batch, workload.heads, workload.n, workload.dim)
    dtype = getattr(torch, workload.dtype)
    drawn = {name: torch.randn(shape, generator=generator, device=device).to(dtype) for name in ("query", "key", "value")}
    return {**drawn, "signs": _signs(workload, "chained").to(device)}


def _signs(workload: Workload, layout: Layout) -> Any:
    import torch

    numbers = workload.num_hash, workload.hash_code_len, workload.dim
    return torch.from_numpy(yoso_core.sample_signs(*numbers, batch_shape=(workload.heads,), layout=layout, rng=0))


def grad_out(workload: Workload) -> Any:
    """The gradient of the output: the same for every contender and in every run."""
    import torch

    device = MACHINES[workload.device].torch
    generator = torch.Generator(device).manual_seed(1)
    drawn = torch.randn((workload.batch, workload.heads, workload.n, workload.dim), generator=generator, device=device)
    return drawn.to(getattr(torch, workload.dtype))


def _leaves(given: Tensors) -> Tensors:
    """Query, key and value, in the same memory, as tensors that require gradients."""
    return {name: given[name].detach().requires_grad_() for name in ("query", "key", "value")}


def _forward_and_backward(attend: Callable[[], Any], leaves: Tensors, grad: Any) -> Callable[[], Any]:
    import torch

    def call() -> Any:
        out = attend()
        return out, *torch.autograd.grad(out, list(leaves.values()), grad)

    return call


def _sampled(workload: Workload, given: Tensors) -> dict[str, Any]:
    return {**given, "layout": "chained", "num_hash": workload.num_hash, "hash_code_len": workload.hash_code_len}


def _sampled_in_paper_layout(workload: Workload, given: Tensors) -> dict[str, Any]:
    heads = len(given["signs"])  # the last ones
    signs = _signs(workload, "paper")[workload.heads - heads :].to(given["signs"].device)
    return {**_sampled(workload, {**given, "signs": signs}), "layout": "paper"}


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
    """Codes are made outside the timed call. They are in range by construction, so they are not
    checked again.
    """
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


def _sdpa_training(workload: Workload, given: Tensors) -> Callable[[], Any]:
    leaves = _leaves(given)
    return _forward_and_backward(_sdpa(workload, leaves), leaves, grad_out(workload))


def _flash(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """Flash attention, or an error: torch may not choose another kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attend = _sdpa(workload, given)

    def call() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attend()

    return call


def _flash_training(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """The backward pass takes the kernel of the forward pass."""
    leaves = _leaves(given)
    return _forward_and_backward(_flash(workload, leaves), leaves, grad_out(workload))


def _folded(given: Tensors) -> Tensors:
    """Query, key and value with the heads folded into the batch; query and key as unit vectors."""
    from torch.nn.functional import normalize

    folded = {name: given[name].flatten(0, 1) for name in ("query", "key", "value")}
    return {name: x if name == "value" else normalize(x, dim=-1) for name, x in folded.items()}


def _yoso_cumulation(workload: Workload, folded: Tensors) -> Callable[[], Any]:
    """Called as in transformers' YosoSelfAttention, with masks of ones."""
    import torch
    from transformers.models.yoso.modeling_yoso import YosoCumulation

    mask = torch.ones(folded["query"].shape[:2], dtype=torch.int32, device=folded["query"].device)
    config = {"hash_code_len": workload.hash_code_len}
    return partial(YosoCumulation.apply, mask, mask, *folded.values(), config)


def _transformers_expectation(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """Unit vectors are made outside the timed call."""
    import torch

    return torch.no_grad()(_yoso_cumulation(workload, _folded(given)))


def _transformers_expectation_training(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """Unit vectors are made outside the timed call. The gradients are those of unit vectors."""
    leaves = _leaves(_folded(given))
    return _forward_and_backward(_yoso_cumulation(workload, leaves), leaves, grad_out(workload).flatten(0, 1))


def _cumulation_kernel(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """The kernel that the operator calls, by itself, on NumPy arrays."""
    chosen = automatic("lsh_cumulation", workload.device)
    if chosen is None:
        raise RuntimeError(f"device: no variant of lsh_cumulation runs on {workload.device}")
    arguments = _cumulated(workload, given)
    del arguments["validate"]
    arrays = {name: x if isinstance(x, int) else x.numpy() for name, x in arguments.items()}
    return partial(chosen.kernel.load(), **arrays)


CONTENDERS: dict[str, Ours | Peer] = {
    "yoso": FaceFunction("YOSO, sampled", "yoso_attention", arguments=_sampled, rows=4096),
    "yoso_expectation": FaceFunction("YOSO, exact expectation", "expectation_attention", arguments=_expected, rows=256),
    "hash": FaceFunction("fast_hash", "fast_hash", arguments=_hashed, rows=4096),
    "cumulation": FaceFunction("lsh_cumulation", "lsh_cumulation", arguments=_cumulated, rows=256),
    "weighted": FaceFunction("lsh_weighted_cumulation", "lsh_weighted_cumulation", arguments=_weighted, rows=256),
    "paper": Composed(
        "the paper's algorithm",
        "yoso_attention",
        arguments=_sampled_in_paper_layout,
        rows=4096,
        hash_variant="cupy:block_per_part",
        cumulation_variant="cupy:global_table",
    ),
    "paper_tables": Composed(
        "the paper's tables with our hash",
        "yoso_attention",
        arguments=_sampled,
        rows=4096,
        hash_variant="cupy:warp_per_vector",
        cumulation_variant="cupy:global_table",
    ),
    "sdpa": Peer("torch scaled_dot_product_attention", ("torch",), _sdpa),
    "flash": Peer("torch flash attention", ("torch",), _flash),
    "transformers_expectation": Peer("transformers YosoCumulation", ("torch", "transformers"), _transformers_expectation),
    "yoso_training": Training("YOSO, sampled, forward + backward", "yoso_attention", arguments=_sampled, rows=64),
    "yoso_expectation_training": Training(
        "YOSO, exact expectation, forward + backward",
        "expectation_attention",
        arguments=_expected,
        rows=64,
        backward="expectation_attention_backward",
    ),
    "sdpa_training": Peer("torch scaled_dot_product_attention, forward + backward", ("torch",), _sdpa_training),
    "flash_training": Peer("torch flash attention, forward + backward", ("torch",), _flash_training),
    "transformers_expectation_training": Peer(
        "transformers YosoCumulation, forward + backward", ("torch", "transformers"), _transformers_expectation_training
    ),
    "cumulation_operator": Operator("lsh_cumulation as a torch operator", "lsh_cumulation", arguments=_cumulated, rows=256),
    "cumulation_kernel": Peer("the kernel of lsh_cumulation alone", ("torch",), _cumulation_kernel),
    **MODELS,
}
