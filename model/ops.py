"""The operations of `yoso_core` as PyTorch operators, ``torch.ops.yoso_core.*``, with gradients.

Each operator calls the function of its name in `yoso_core.ops`, which checks the arguments and runs
the best kernel on the tensor's own memory. The compiler learns the shapes of the results alone, so
a wrong argument raises the same error in compiled code, when that code runs.

Operators are pure functions of tensors: random signs are drawn outside. An operator takes the
arguments of the function that it calls, masks and ``variant`` among them, under the same names.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.library import custom_op

from yoso_core import checks
from yoso_core import ops as face
from yoso_core.reference.expectation import Grad
from yoso_core.reference.normalize import TINY_NORM
from yoso_core.registry import variants

Gradients = tuple[Tensor, Tensor, Tensor]

GROUP_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""The backward pass of attention takes as many heads at a time as fit into so many bytes: their
codes, unit vectors and results.
"""

HALF = (torch.float16, torch.bfloat16)


def _no_second_derivative(name: str) -> Any:
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"yoso_core::{name}: there is no second derivative; take first gradients alone (create_graph=False), or differentiate the "
            "formula of yoso_core.reference in torch's own operations"
        )

    return backward


# Hashes: whole numbers, without gradients


@custom_op("yoso_core::fast_hash", mutates_args=())
def fast_hash(vectors: Tensor, signs: Tensor, num_hash: int, hash_code_len: int, variant: str | None = None) -> Tensor:
    """See `yoso_core.fast_hash`."""
    return face.fast_hash(vectors, signs, num_hash, hash_code_len, variant=variant)


@custom_op("yoso_core::hyperplane_hash", mutates_args=())
def hyperplane_hash(vectors: Tensor, planes: Tensor, num_hash: int, hash_code_len: int, variant: str | None = None) -> Tensor:
    """See `yoso_core.hyperplane_hash`."""
    return face.hyperplane_hash(vectors, planes, num_hash, hash_code_len, variant=variant)


@fast_hash.register_fake
@hyperplane_hash.register_fake
def _(vectors: Tensor, draw: Tensor, num_hash: int, hash_code_len: int, variant: str | None = None) -> Tensor:
    return vectors.new_empty(*vectors.shape[:-1], num_hash, dtype=torch.int32)


# Cumulations: linear in the values, so each is its own gradient with queries and keys exchanged,
# any number of times


@custom_op("yoso_core::lsh_cumulation", mutates_args=())
def lsh_cumulation(
    query_hash_code: Tensor,
    key_hash_code: Tensor,
    value: Tensor,
    hashtable_capacity: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    validate: bool = True,
    variant: str | None = None,
) -> Tensor:
    """See `yoso_core.lsh_cumulation`.

    Its gradient: ``dv_j = 1/m sum_h sum_i [code_h(q_i) = code_h(k_j)] g_i``.
    """
    return face.lsh_cumulation(
        query_hash_code,
        key_hash_code,
        value,
        hashtable_capacity,
        query_mask=query_mask,
        key_mask=key_mask,
        validate=validate,
        variant=variant,
    )


@lsh_cumulation.register_fake
def _(query_hash_code: Tensor, key_hash_code: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(*query_hash_code.shape[:-1], value.shape[-1])


def _save_cumulation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """For either cumulation. What a backward pass calls: the same sums forth, or with queries and
    keys exchanged back.
    """
    *tensors, capacity, query_mask, key_mask, _, variant = inputs
    ctx.save_for_backward(*tensors, query_mask, key_mask)
    ctx.how = {"hashtable_capacity": capacity, "validate": False, "variant": variant}


def _cumulation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query_code, key_code, _, query_mask, key_mask = ctx.saved_tensors
    grad_value = lsh_cumulation(key_code, query_code, grad_out, query_mask=key_mask, key_mask=query_mask, **ctx.how)
    return None, None, grad_value, None, None, None, None, None


lsh_cumulation.register_autograd(_cumulation_backward, setup_context=_save_cumulation)


@custom_op("yoso_core::lsh_weighted_cumulation", mutates_args=())
def lsh_weighted_cumulation(
    query_hash_code: Tensor,
    query_weight: Tensor,
    key_hash_code: Tensor,
    key_weight: Tensor,
    value: Tensor,
    hashtable_capacity: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    validate: bool = True,
    variant: str | None = None,
) -> Tensor:
    """See `yoso_core.lsh_weighted_cumulation`.

    Its gradients, with weights ``a`` and ``b``, and ``C_ij`` the share of hashes that collide:
    ``da_i = sum_j C_ij (g_i . v_j) b_j``, ``db_j = sum_i C_ij (v_j . g_i) a_i``,
    ``dv_j = sum_i C_ij (b_j . a_i) g_i``.
    """
    return face.lsh_weighted_cumulation(
        query_hash_code,
        query_weight,
        key_hash_code,
        key_weight,
        value,
        hashtable_capacity,
        query_mask=query_mask,
        key_mask=key_mask,
        validate=validate,
        variant=variant,
    )


@lsh_weighted_cumulation.register_fake
def _(query_hash_code: Tensor, query_weight: Tensor, key_hash_code: Tensor, key_weight: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(*query_hash_code.shape[:-1], value.shape[-1])


def _weighted_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query_code, a, key_code, b, value, query_mask, key_mask = ctx.saved_tensors
    _, wants_a, _, wants_b, wants_value, *_ = ctx.needs_input_grad

    def to_queries(weight: Tensor, key_weight: Tensor, summed: Tensor) -> Tensor:
        masks = {"query_mask": query_mask, "key_mask": key_mask}
        return lsh_weighted_cumulation(query_code, weight, key_code, key_weight, summed, **masks, **ctx.how)

    def to_keys(weight: Tensor, query_weight: Tensor, summed: Tensor) -> Tensor:
        masks = {"query_mask": key_mask, "key_mask": query_mask}
        return lsh_weighted_cumulation(key_code, weight, query_code, query_weight, summed, **masks, **ctx.how)

    grad_a = to_queries(grad_out, value, b) if wants_a else None
    grad_b = to_keys(value, grad_out, a) if wants_b else None
    grad_value = to_keys(b, a, grad_out) if wants_value else None
    return None, grad_a, None, grad_b, grad_value, None, None, None, None, None


lsh_weighted_cumulation.register_autograd(_weighted_backward, setup_context=_save_cumulation)


# The expectation


@custom_op("yoso_core::expectation_attention", mutates_args=())
def expectation_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hash_code_len: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    grad: str = "lower_bound",
    variant: str | None = None,
) -> Tensor:
    """See `yoso_core.expectation_attention`, and for ``grad``
    `yoso_core.expectation_attention_backward`.
    """
    checks.one_of("grad", grad, ("lower_bound", "exact"))
    return face.expectation_attention(query, key, value, hash_code_len, query_mask=query_mask, key_mask=key_mask, variant=variant)


@expectation_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(*query.shape[:-1], value.shape[-1])


@custom_op("yoso_core::expectation_attention_backward", mutates_args=())
def expectation_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hash_code_len: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    grad: str = "lower_bound",
    variant: str | None = None,
) -> Gradients:
    """See `yoso_core.expectation_attention_backward`."""
    return face.expectation_attention_backward(
        grad_out,
        query,
        key,
        value,
        hash_code_len,
        grad=cast(Grad, grad),
        query_mask=query_mask,
        key_mask=key_mask,
        variant=variant,
    )


def _save_expectation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.hash_code_len, query_mask, key_mask, ctx.grad, _ = inputs
    ctx.save_for_backward(query, key, value, query_mask, key_mask)


def _expectation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, query_mask, key_mask = ctx.saved_tensors
    grads = expectation_attention_backward(
        grad_out, query, key, value, hash_code_len=ctx.hash_code_len, query_mask=query_mask, key_mask=key_mask, grad=ctx.grad
    )
    return *grads, None, None, None, None, None


expectation_attention.register_autograd(_expectation_backward, setup_context=_save_expectation)
expectation_attention_backward.register_autograd(_no_second_derivative("expectation_attention"))


# The whole attention


class _How(NamedTuple):
    """The other arguments of a call of `yoso_attention`, in the operator's order."""

    num_hash: int
    hash_code_len: int
    use_expectation: bool = False
    normalize_output: bool = True
    grad: str = "lower_bound"
    backward: str = "lsh"
    for_backward: bool = True
    variant: str | None = None


@custom_op("yoso_core::yoso_attention", mutates_args=())
def yoso_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    signs: Tensor | None,
    planes: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    num_hash: int,
    hash_code_len: int,
    use_expectation: bool = False,
    normalize_output: bool = True,
    grad: str = "lower_bound",
    backward: str = "lsh",
    for_backward: bool = True,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `yoso_core.model.yoso_attention`, which draws the signs and calls this operator.

    Returns the output, and for the backward pass the length of every row before it was scaled:
    ``(..., n_q, 1)``, in float32 at least. The lengths are empty where nothing was scaled, or with
    ``for_backward=False``. Of the rest only the inputs are kept. The backward pass hashes again, to
    the same codes, which is cheaper than to store them.
    """
    checks.one_of("grad", grad, ("lower_bound", "exact"))
    checks.one_of("backward", backward, ("lsh", "expectation"))
    if signs is None and planes is None and not use_expectation:
        checks.hash_numbers(num_hash, hash_code_len)
        checks.vectors("query", query)
        raise ValueError("signs: the operator draws nothing itself; give signs or planes, or call yoso_core.model.yoso_attention")
    options: dict[str, Any] = {
        "num_hash": num_hash,
        "hash_code_len": hash_code_len,
        "use_expectation": use_expectation,
        "signs": signs,
        "planes": planes,
        "query_mask": query_mask,
        "key_mask": key_mask,
        "variant": variant,
    }
    if not (normalize_output and for_backward):
        return face.yoso_attention(query, key, value, **options, normalize_output=normalize_output), value.new_empty(0)
    rows = face.yoso_attention(query, key, _widened(value), **options, normalize_output=False)
    out, length = _unit_rows(rows)
    return out.to(value.dtype), length


@yoso_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, signs: Tensor, planes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, *settings = rest  # after the two masks
    how, rows = _How(*settings), query.shape[:-1]
    out = value.new_empty(*rows, value.shape[-1])
    if not (how.normalize_output and how.for_backward):
        return out, value.new_empty(0)
    return out, value.new_empty(*rows, 1, dtype=torch.float32 if value.dtype in HALF else None)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``rows`` to unit length in place; rows shorter than 1e-12 become zeros. Returns the
    rows and the lengths that they had.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not rows.is_cuda and math.isfinite(length.sum()):
        return rows.div_(torch.threshold(length, TINY_NORM, torch.inf)), length
    # A sum of squares overflows long before its root does, so the rows are made smaller first. On a
    # GPU this is done always: a look at the lengths would wait for the GPU.
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=-1, keepdim=True)
    rows /= torch.threshold(largest, 0, 1)
    scaled = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    length = largest * scaled
    return rows.div_(scaled.masked_fill(length <= TINY_NORM, torch.inf)), length


def _l2_normalize_backward(grad_out: Tensor, out: Tensor, length: Tensor) -> Tensor:
    """The gradient before the rows ``out`` were scaled to unit length: ``(g - (g . y) y) / |x|``,
    zero for rows shorter than 1e-12. As `yoso_core.reference.l2_normalize_backward`, from the
    scaled rows and their lengths.
    """
    g, y = _widened(grad_out), _widened(out)
    along = (g * y).sum(dim=-1, keepdim=True)
    return torch.addcmul(g, along, y, value=-1).div_(length).masked_fill_(length <= TINY_NORM, 0)


@custom_op("yoso_core::yoso_attention_backward", mutates_args=())
def yoso_attention_backward(
    grad_out: Tensor,
    out: Tensor,
    length: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    signs: Tensor | None,
    planes: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    num_hash: int,
    hash_code_len: int,
    by_expectation: bool,
    normalize_output: bool,
    grad: str,
    variant: str | None,
) -> Gradients:
    """The gradients of `yoso_attention` by query, key and value.

    ``out`` and ``length`` are what the forward pass returned, and ``variant`` is what it was given.
    With ``by_expectation`` the weights are the expected ones.
    """
    saved = _Saved(
        grad_out=grad_out,
        out=out,
        length=length,
        query=query,
        key=key,
        value=value,
        signs=signs,
        planes=planes,
        query_mask=query_mask,
        key_mask=key_mask,
    )
    gradients = partial(
        _gradients_of_heads,
        num_hash=num_hash,
        hash_code_len=hash_code_len,
        by_expectation=by_expectation,
        normalize_output=normalize_output,
        grad=cast(Grad, grad),
        variant=variant,
    )
    leading, rows = tuple(query.shape[:-2]), query.shape[-2] + key.shape[-2]
    head_bytes = max(query.element_size(), 4) * rows * (num_hash + 2 * query.shape[-1] + value.shape[-1])
    groups = list(_head_groups(leading, head_bytes, GROUP_BYTES[query.device.type]))
    if len(groups) == 1:
        return gradients(saved)
    found = _like(query, key, value)
    for heads in groups:
        part = gradients(_Saved(**{name: _of_heads(name, x, leading, heads) for name, x in saved._asdict().items()}))
        for whole, few in zip(found, part, strict=True):
            whole[heads] = few
    return found


def _like(query: Tensor, key: Tensor, value: Tensor) -> Gradients:
    """Room for the three gradients."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@expectation_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Gradients:
    return _like(query, key, value)


@yoso_attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, length: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Gradients:
    return _like(query, key, value)


class _Saved(NamedTuple):
    """The tensors of `yoso_attention_backward`, for all heads or for some."""

    grad_out: Tensor
    out: Tensor
    length: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    signs: Tensor | None
    planes: Tensor | None
    query_mask: Tensor | None
    key_mask: Tensor | None


_TRAILING_DIMS = {"signs": 3, "query_mask": 1, "key_mask": 1}
"""How many dims of a tensor are no leading dims, where it is not two."""


def _of_heads(name: str, x: Tensor | None, leading: tuple[int, ...], heads: tuple[Any, ...]) -> Any:
    """The part of one tensor that belongs to these heads; what heads share is expanded first."""
    if x is None:
        return None
    return x.expand(*leading, *x.shape[x.dim() - _TRAILING_DIMS.get(name, 2) :])[heads]


def _gradients_of_heads(
    saved: _Saved, *, num_hash: int, hash_code_len: int, by_expectation: bool, normalize_output: bool, grad: Grad, variant: str | None
) -> Gradients:
    query, key, value, grad_rows = saved.query, saved.key, saved.value, saved.grad_out
    if normalize_output:
        value = _widened(value)
        grad_rows = _l2_normalize_backward(saved.grad_out, saved.out, saved.length)
    options: dict[str, Any] = {"grad": grad, "query_mask": saved.query_mask, "key_mask": saved.key_mask}
    if by_expectation:
        found = face.expectation_attention_backward(grad_rows, query, key, value, hash_code_len, **options)
    else:
        query_code, key_code = (_codes(x, saved.signs, saved.planes, num_hash, hash_code_len, variant) for x in (query, key))
        codes: dict[str, Any] = {"query_hash_code": query_code, "key_hash_code": key_code, "hash_code_len": hash_code_len}
        found = face.lsh_attention_backward(grad_rows, query, key, value, **codes, **options, validate=False)
    grad_query, grad_key, grad_value = found
    return grad_query, grad_key, grad_value.to(saved.value.dtype)


def _head_groups(leading: tuple[int, ...], head_bytes: int, limit: int) -> Iterator[tuple[Any, ...]]:
    """Indices into the leading dims that cover them, each of as many heads as fit into ``limit``
    bytes; ``()`` is all of them.
    """
    if not leading or math.prod(leading) * head_bytes <= limit:
        yield ()
        return
    step = limit // (math.prod(leading[1:]) * head_bytes)
    for i in range(0, leading[0], max(step, 1)):
        if step:
            yield (slice(i, i + step),)
        else:
            yield from ((i, *rest) for rest in _head_groups(leading[1:], head_bytes, limit))


def _codes(vectors: Tensor, signs: Tensor | None, planes: Tensor | None, num_hash: int, hash_code_len: int, variant: str | None) -> Tensor:
    """The codes of the forward pass again.

    Codes by signs are the same bits in every variant. Codes by planes are not, so those come from
    the backend of the forward pass.
    """
    if signs is not None:
        return face.fast_hash(vectors, signs, num_hash, hash_code_len)
    backend = None if variant is None else variant.partition(":")[0]
    same = next((v.name for v in variants("hyperplane_hash") if v.where == backend), None)
    return face.hyperplane_hash(vectors, planes, num_hash, hash_code_len, variant=same)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, how = inputs[:7], _How(*inputs[7:])
    out, length = output
    ctx.mark_non_differentiable(length)
    ctx.save_for_backward(*tensors, out if how.normalize_output else None, length)
    ctx.lengths_kept = how.for_backward or not how.normalize_output
    ctx.how = {
        "num_hash": how.num_hash,
        "hash_code_len": how.hash_code_len,
        "by_expectation": how.use_expectation or how.backward == "expectation",
        "normalize_output": how.normalize_output,
        "grad": how.grad,
        "variant": how.variant,
    }


def _attention_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.lengths_kept:
        raise RuntimeError(
            "yoso_core::yoso_attention: called with for_backward=False, so it kept nothing to make gradients from; call it with "
            "for_backward=True"
        )
    *tensors, out, length = ctx.saved_tensors
    grads = yoso_attention_backward(grad_out, grad_out if out is None else out, length, *tensors, **ctx.how)
    return *grads, *(None,) * (len(_How._fields) + 4)


yoso_attention.register_autograd(_attention_backward, setup_context=_save_attention)
yoso_attention_backward.register_autograd(_no_second_derivative("yoso_attention"))
