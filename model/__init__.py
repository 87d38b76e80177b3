"""PyTorch: the kernels as operators with gradients, and differentiable YOSO attention.

`ops` registers ``torch.ops.yoso_core``: the operators, their shapes for the compiler, their gradients. `attention` is the function that
people call. The mathematics stays in the kernels.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    missing = "yoso_core.model needs PyTorch, which is not installed: pip install 'yoso-core[model]'"
    raise ModuleNotFoundError(missing, name="torch") from error

from yoso_core.model.attention import sample_signs, yoso_attention

__all__ = ["sample_signs", "yoso_attention"]
