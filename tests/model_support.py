"""What the tests of the model share: tiny models whose attention matters, the same model in
transformers' code, and texts.
"""

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.yoso import modeling_yoso as stock_heads

import yoso_core
from yoso_core.model import YosoConfig, YosoPreTrainedModel

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "hash_code_len": 4,
    "num_hash": 8,
}
"""Heads of 12, so that hashes pad them to 16."""

WAYS: dict[str, dict[str, Any]] = {
    "expectation": {},
    "sampled": {"use_expectation": False},
    "planes": {"use_expectation": False, "use_fast_hash": False},
}
"""To attend."""

OWN = ("grad", "kernel_variant", "hash_seed", "hash_layout", "rotations", "oversample", "backward_num_hash")
"""Settings that transformers' YosoConfig lacks."""


def config(**changes: Any) -> YosoConfig:
    return YosoConfig(**(TINY | changes))


def stock_config(ours: YosoConfig) -> transformers.YosoConfig:
    return transformers.YosoConfig(**{name: value for name, value in ours.to_dict().items() if name not in OWN})


def enliven(model: nn.Module, seed: int = 0) -> None:
    """Draw every weight anew, so large that attention matters, and biases and LayerNorms such that
    none could be left out.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if name.endswith("LayerNorm.weight") else 0.3 * noise)


def lively(head: type[YosoPreTrainedModel] | str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode."""
    head = getattr(yoso_core.model, head) if isinstance(head, str) else head
    model = head(config(**changes))
    enliven(model, seed)
    return model.eval()


def stock(model: YosoPreTrainedModel) -> Any:
    """The same model, with the same weights under the same names, in transformers' code."""
    twin = getattr(stock_heads, type(model).__name__)(stock_config(model.config))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.train(model.training)


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Words; none is the padding's, 1."""
    return torch.randint(3, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within ``tolerance`` of the largest entry, or of 1."""
    assert got.shape == expected.shape
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=0, atol=tolerance * scale)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
