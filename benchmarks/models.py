"""The whole model beside transformers': one layer of the base configuration, with the same weights
and the same tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.sides import Check, Ours, Peer, Tensors
from yoso_core.registry import automatic, definition_of

TOLERANCE = 1e-5
"""The error allowed. An entry of the output is about 1, since LayerNorm has scaled it. An entry of
a gradient is divided by the largest one of its parameter.
"""


def _config(workload: Workload) -> dict[str, Any]:
    """The base configuration with one layer, and without dropout, so that both sides compute the
    same.
    """
    hidden = workload.heads * workload.dim
    return {
        "hidden_size": hidden,
        "num_attention_heads": workload.heads,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 1,
        "max_position_embeddings": max(4096, workload.n),
        "num_hash": workload.num_hash,
        "hash_code_len": workload.hash_code_len,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        # Larger than the default, with which attention would hardly change the output.
        "initializer_range": 0.1,
    }


@lru_cache(maxsize=2)
def _models(shapes: Workload) -> tuple[Any, Any]:
    """Our model and transformers', with the same weights. ``shapes`` is the same for every length
    and every contender.
    """
    import torch
    import transformers

    from yoso_core.model import YosoConfig, YosoModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = YosoModel(YosoConfig(**_config(shapes)))
        theirs = transformers.YosoModel(transformers.YosoConfig(**_config(shapes)))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _model(workload: Workload, *, own: bool) -> Any:
    found = _models(replace(workload, run="", n=4096, variant=None))
    return found[0] if own else found[1]


def _tokens(workload: Workload) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 50265, (workload.batch, workload.n), generator=generator)


def _grad_out(workload: Workload) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randn(workload.batch, workload.n, workload.heads * workload.dim, generator=generator)


def _forward(model: Any, workload: Workload) -> Callable[[], Any]:
    import torch

    tokens = _tokens(workload)

    @torch.no_grad()
    def call() -> Any:
        return model.eval()(tokens).last_hidden_state

    return call


def _step(model: Any, workload: Workload) -> Callable[[], Any]:
    """The output and the gradients of all parameters, for a given gradient of the output."""
    import torch

    tokens, grad = _tokens(workload), _grad_out(workload)
    parameters = list(model.parameters())

    def call() -> Any:
        out = model.train()(tokens).last_hidden_state
        return out, *torch.autograd.grad(out, parameters, grad)

    return call


@dataclass(frozen=True)
class Model(Ours):
    """Our model. Where it samples, it is compared with itself on the definition's attention; with
    the expectation, it is compared with transformers' model.
    """

    use_expectation: bool
    training: bool = False

    @property
    def ops(self) -> tuple[str, ...]:
        attention = "expectation_attention" if self.use_expectation else "yoso_attention"
        if not self.training:
            return ("encoder_layer", attention)
        back = "expectation_attention_backward" if self.use_expectation else "lsh_attention_backward"
        return ("encoder_layer", attention, "encoder_layer_backward", back)

    def steps(self, workload: Workload) -> tuple[tuple[str, str | None], ...]:
        chosen = automatic("yoso_attention", workload.device)
        return (("yoso_attention", chosen.name if chosen else None),)

    def bind(self, workload: Workload, given: Tensors) -> Callable[[], Any]:
        import torch

        model = _model(workload, own=True)
        call = (_step if self.training else _forward)(model, workload)

        def with_settings() -> Any:
            model.config.use_expectation = self.use_expectation
            torch.manual_seed(0)  # training draws from torch's generator
            return call()

        return with_settings

    def check(self, workload: Workload) -> Check:
        found = self.bind(workload, {})()
        if self.use_expectation:
            right = (_step if self.training else _forward)(_model(workload, own=False), workload)()
        else:
            config = _model(workload, own=True).config
            config.kernel_variant = definition_of("yoso_attention").name
            try:
                right = self.bind(workload, {})()
            finally:
                config.kernel_variant = None
        checks = [_compared(x, y) for x, y in zip(_several(found), _several(right), strict=True)]
        return max(checks, key=lambda check: check.tolerance_used)


def _several(out: Any) -> tuple[Any, ...]:
    return out if isinstance(out, tuple) else (out,)


def _compared(found: Any, right: Any) -> Check:
    result, exact = (x.detach().double().numpy() for x in (found, right))
    scale = max(1.0, float(np.abs(exact).max(initial=0)))
    return Check.of(result, exact, np.full_like(exact, TOLERANCE * scale), len(exact))


def _theirs(call: Callable[[Any, Workload], Callable[[], Any]]) -> Callable[[Workload, Tensors], Callable[[], Any]]:
    return lambda workload, given: call(_model(workload, own=False), workload)


def _dense_layers(workload: Workload, given: Tensors) -> Callable[[], Any]:
    """Our model with the values as the context. No attention makes the layer faster than this."""
    import torch
    from torch import nn

    model = _model(workload, own=True)
    attention = model.encoder.layer[0].attention.self

    class NoAttention(nn.Module):
        def forward(self, hidden_states: Any, *rest: Any) -> Any:
            attention.query(hidden_states)
            attention.key(hidden_states)
            return attention.value(hidden_states), None

    call, instead = _forward(model, workload), NoAttention()

    @torch.no_grad()
    def without() -> Any:
        model.encoder.layer[0].attention.self = instead
        try:
            return call()
        finally:
            model.encoder.layer[0].attention.self = attention

    return without


_NEEDS = ("torch", "transformers")

MODELS: dict[str, Model | Peer] = {
    "yoso_model": Model("YOSO model, sampled", "yoso_attention", _NEEDS, use_expectation=False),
    "yoso_model_expectation": Model("YOSO model, exact expectation", "yoso_attention", _NEEDS, use_expectation=True),
    "yoso_model_training": Model("YOSO model, sampled, forward + backward", "yoso_attention", _NEEDS, use_expectation=False, training=True),
    "yoso_model_expectation_training": Model(
        "YOSO model, exact expectation, forward + backward", "yoso_attention", _NEEDS, use_expectation=True, training=True
    ),
    "transformers_model": Peer("transformers YosoModel", _NEEDS, _theirs(_forward)),
    "transformers_model_training": Peer("transformers YosoModel, forward + backward", _NEEDS, _theirs(_step)),
    "dense_layers": Peer("the layer without its attention", _NEEDS, _dense_layers),
}
