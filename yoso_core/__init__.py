"""YOSO attention (Zeng et al., ICML 2021, arXiv 2111.09714): linear-cost self-attention by LSH
Bernoulli sampling.

Arrays of NumPy or PyTorch go in, the same kind comes out::

    import numpy as np, yoso_core

    x = np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32)
    out = yoso_core.yoso_attention(x, x, x, num_hash=32, hash_code_len=8, rng=0)

`yoso_core.reference` says what is right, in NumPy that reads like the formulas. `variants` lists
what else computes it here, and ``variant=`` of every function pins one by name: it runs or raises
with the reason. Without it the best that can run is chosen.

`YosoModel`, `YosoForMaskedLM` and the other heads are the whole model in PyTorch, at home in
Hugging Face.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from yoso_core.attend import (
    expectation_attention,
    expectation_attention_backward,
    fast_hash,
    hadamard_transform,
    hyperplane_hash,
    lsh_attention_backward,
    lsh_cumulation,
    lsh_weighted_cumulation,
    smooth_table,
    yoso_attention,
)
from yoso_core.ops import sample_planes, sample_signs
from yoso_core.registry import Registration, Variant, register, variants

if TYPE_CHECKING:
    from yoso_core.comparison import Comparison, compare
    from yoso_core.inputs import example_inputs
    from yoso_core.model import (
        YosoConfig,
        YosoForMaskedLM,
        YosoForMultipleChoice,
        YosoForPreTraining,
        YosoForQuestionAnswering,
        YosoForSequenceClassification,
        YosoForTokenClassification,
        YosoModel,
    )
    from yoso_core.planning import Choice, Plan, plan

__version__ = "0.1.0"

__all__ = [
    "Choice",
    "Comparison",
    "Plan",
    "Registration",
    "Variant",
    "YosoConfig",
    "YosoForMaskedLM",
    "YosoForMultipleChoice",
    "YosoForPreTraining",
    "YosoForQuestionAnswering",
    "YosoForSequenceClassification",
    "YosoForTokenClassification",
    "YosoModel",
    "__version__",
    "compare",
    "example_inputs",
    "expectation_attention",
    "expectation_attention_backward",
    "fast_hash",
    "hadamard_transform",
    "hyperplane_hash",
    "lsh_attention_backward",
    "lsh_cumulation",
    "lsh_weighted_cumulation",
    "plan",
    "register",
    "sample_planes",
    "sample_signs",
    "smooth_table",
    "variants",
    "yoso_attention",
]

_LAZY = {
    "compare": "comparison",
    "example_inputs": "inputs",
    "plan": "planning",
    "Choice": "planning",
    "Comparison": "comparison",
    "Plan": "planning",
    "YosoConfig": "model",
    "YosoForMaskedLM": "model",
    "YosoForMultipleChoice": "model",
    "YosoForPreTraining": "model",
    "YosoForQuestionAnswering": "model",
    "YosoForSequenceClassification": "model",
    "YosoForTokenClassification": "model",
    "YosoModel": "model",
}


if not TYPE_CHECKING:  # hidden from type checkers, which would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(import_module(f"yoso_core.{_LAZY[name]}"), name)
        raise AttributeError(f"module 'yoso_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
