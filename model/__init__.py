"""PyTorch: the kernels as operators with gradients, differentiable YOSO attention, and the whole
YOSO model for Hugging Face.

- `attention` has the function that people call; `ops` registers the operators
  ``torch.ops.yoso_core`` below it.
- `configuration`, `layers` and `heads` are the model. Classes, parameters and outputs have the
  names that they have in transformers, which is imported when one of them is first used.
- `draws` makes the hashes of evaluation. `values` says which tensors can be looked into.
- `auto` puts the model where transformers' YOSO stands.
- `tokenizer`, `filling` and `original` read checkpoints and use them.
- `encoders` puts YOSO attention into other models.

The mathematics of attention stays in the kernels.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    missing = "yoso_core.model needs PyTorch, which is not installed: pip install 'yoso-core[model]'"
    raise ModuleNotFoundError(missing, name="torch") from error

from yoso_core.model.attention import sample_signs, yoso_attention, yoso_attention_with_weights
from yoso_core.model.weights import expected_weights

if TYPE_CHECKING:
    from yoso_core.model.auto import adopt, export_for_hub, register_auto_classes
    from yoso_core.model.configuration import YosoConfig
    from yoso_core.model.encoders import YosoAttentionOptions, enable_yoso_attention
    from yoso_core.model.filling import fill_mask, load_masked_lm
    from yoso_core.model.heads import (
        YosoForMaskedLM,
        YosoForMultipleChoice,
        YosoForPreTraining,
        YosoForQuestionAnswering,
        YosoForSequenceClassification,
        YosoForTokenClassification,
        YosoModel,
        YosoPreTrainedModel,
    )
    from yoso_core.model.original import convert_original_checkpoint
    from yoso_core.model.tokenizer import load_tokenizer

__all__ = [
    "YosoAttentionOptions",
    "YosoConfig",
    "YosoForMaskedLM",
    "YosoForMultipleChoice",
    "YosoForPreTraining",
    "YosoForQuestionAnswering",
    "YosoForSequenceClassification",
    "YosoForTokenClassification",
    "YosoModel",
    "YosoPreTrainedModel",
    "adopt",
    "convert_original_checkpoint",
    "enable_yoso_attention",
    "expected_weights",
    "export_for_hub",
    "fill_mask",
    "load_masked_lm",
    "load_tokenizer",
    "register_auto_classes",
    "sample_signs",
    "yoso_attention",
    "yoso_attention_with_weights",
]

_LAZY = {
    "YosoAttentionOptions": "encoders",
    "YosoConfig": "configuration",
    "YosoForMaskedLM": "heads",
    "YosoForMultipleChoice": "heads",
    "YosoForPreTraining": "heads",
    "YosoForQuestionAnswering": "heads",
    "YosoForSequenceClassification": "heads",
    "YosoForTokenClassification": "heads",
    "YosoModel": "heads",
    "YosoPreTrainedModel": "heads",
    "adopt": "auto",
    "convert_original_checkpoint": "original",
    "enable_yoso_attention": "encoders",
    "export_for_hub": "auto",
    "fill_mask": "filling",
    "load_masked_lm": "filling",
    "load_tokenizer": "tokenizer",
    "register_auto_classes": "auto",
}


if not TYPE_CHECKING:  # hidden from type checkers, which would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'yoso_core.model' has no attribute {name!r}")
        try:
            return getattr(import_module(f"yoso_core.model.{_LAZY[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            missing = f"yoso_core.model.{name} needs transformers, which is not installed: pip install 'yoso-core[model]'"
            raise ModuleNotFoundError(missing, name="transformers") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
