"""What makes a kernel an operator of PyTorch: shapes for the compiler, gradients, forward-mode
derivatives, and a rule for `torch.vmap`.

`Operator` holds a `torch.library.custom_op`. Called in plain eager code or by the compiler, it is
that. Under `torch.func` (grad, vjp, jvp, jacrev, vmap, ...) and with dual tensors it goes through
an `torch.autograd.Function` with the same rules, since torch asks a custom operator for none.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad
from torch.library import custom_op

from yoso_core.arrays import has_tangent, is_transformed

_TRAILING = {"signs": 3, "query_mask": 1, "key_mask": 1, "x": 1}
"""Dims of an argument that are no leading dims, where they are not two."""

_BROADCAST = ("signs", "planes", "query_mask", "key_mask")
"""Arguments whose leading dims may be fewer, or 1."""


def trailing_dims(name: str, layout: str) -> int:
    """How many dims of an argument, by its name, are no leading dims: 2 of ``(..., n, d)``. Those
    of signs depend on their layout.
    """
    return 2 if name == "signs" and layout == "chained" else _TRAILING.get(name, 2)


class Operator:
    """Decorator: the operator ``torch.ops.yoso_core.<name>``, callable as the function was. The
    function's first tensor says how many leading dims there are.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.__wrapped__ = function
        self.signature = inspect.signature(function)
        self.raw = custom_op(f"yoso_core::{function.__name__}", function, mutates_args=())
        self.raw.register_vmap(self._batched)
        self.rules: type[torch.autograd.Function] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not is_transformed():
            return self.raw(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        assert self.rules is not None  # every operator says how it is differentiated
        return self.rules.apply(*bound.args)  # type: ignore[no-untyped-call]

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the compiler learns: shapes and dtypes of the results."""
        self.raw.register_fake(function)
        return function

    def differentiate(self, *, save: Callable[..., None], backward: Callable[..., Any], jvp: Callable[..., Any]) -> None:
        """Say how it is differentiated, with the signatures of `torch.autograd.Function`:
        ``save(ctx, inputs, output)``, ``backward(ctx, *grads)`` and ``jvp(ctx, *tangents)``.
        """
        raw = self.raw
        raw.register_autograd(backward, setup_context=save)
        _refuse_tangents(self)

        class Rules(torch.autograd.Function):
            generate_vmap_rule = True

            @staticmethod
            def forward(*inputs: Any) -> Any:
                if not torch._C._are_functorch_transforms_active():  # torch.func has taken tangents off itself
                    inputs = tuple(primal(x) for x in inputs)
                return raw(*inputs)

        Rules.setup_context, Rules.backward, Rules.jvp = (staticmethod(f) for f in (save, backward, jvp))  # type: ignore[method-assign]
        self.rules = Rules

    def _batched(self, info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """The rule for vmap: its dim becomes the first of the leading dims, of which there may be
        any number.
        """
        named = dict(zip(self.signature.parameters, args, strict=False))
        dims = dict(zip(named, in_dims, strict=True))
        first = next(name for name, x in named.items() if isinstance(x, Tensor))
        layout = named.get("layout", "chained")
        leading = named[first].dim() - (dims[first] is not None) - trailing_dims(first, layout)
        moved = {
            name: _with_batch(x, dims[name], leading + trailing_dims(name, layout), info.batch_size, name in _BROADCAST)
            for name, x in named.items()
        }
        found = self.raw(**moved)
        return found, (0,) * len(found) if isinstance(found, tuple) else 0


def _with_batch(x: Any, dim: int | None, dims: int, size: int, broadcast: bool) -> Any:
    """An argument of ``dims`` dims, or of fewer where it broadcasts, with the dim of a batch in
    front; what is no tensor stays.
    """
    if not isinstance(x, Tensor):
        return x
    if dim is not None:
        x = x.movedim(dim, 0)
        return x.reshape(x.shape[0], *(1,) * (dims + 1 - x.dim()), *x.shape[1:]) if broadcast else x
    x = x.reshape(*(1,) * (dims + 1 - x.dim()), *x.shape)
    return x if broadcast else x.expand(size, *x.shape[1:])


def primal(x: Any) -> Any:
    """A tensor without its forward-mode derivative."""
    return forward_ad.unpack_dual(x).primal if has_tangent(x) else x  # type: ignore[no-untyped-call]


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for the backward pass and for forward-mode derivatives."""
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _refuse_tangents(op: Operator) -> None:
    """Let the operator itself, ``torch.ops.yoso_core.<name>``, refuse dual tensors: torch would
    drop their tangents. `Operator` takes them off before it calls it.
    """
    inner: Callable[..., Any] = make_autograd_impl(op.raw._opoverload, op.raw)

    def checked(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        given = op.signature.bind(*args, **kwargs).arguments if forward_ad._current_level >= 0 else {}
        for name, x in given.items():
            if has_tangent(x):
                raise NotImplementedError(
                    f"{name}: carries a forward-mode derivative, which torch.ops.yoso_core.{op.__name__} and compiled code cannot pass "
                    f"on; call yoso_core.model.ops.{op.__name__} outside torch.compile"
                )
        return inner(keyset, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the replacement, which is meant
        _LIBRARY.impl(op.__name__, checked, "Autograd", with_keyset=True, allow_override=True)  # type: ignore[no-untyped-call]


_LIBRARY = torch.library.Library("yoso_core", "FRAGMENT")  # type: ignore[no-untyped-call]
