"""The operations of `yoso_core` as PyTorch operators, ``torch.ops.yoso_core.*``: with shapes for
the compiler, and with gradients.

Each calls the face's function of its name, which checks the arguments and runs the best kernel on
the tensor's own memory. Shapes alone are told to the compiler, so a wrong argument raises the same
error in compiled code, when it runs.

Operators are pure functions of tensors: random signs are drawn outside. The functions here take the
tensors of `yoso_core` under the names that they have there, and ``variant``.
"""

import math
from collections.abc import Iterator
from typing import Any, cast

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
"""Codes and unit vectors of the backward pass, and its results, are made for so many heads at a
time that they fit in this.
"""

HALF = (torch.float16, torch.bfloat16)


def _shaped(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


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
    return _shaped(vectors, *vectors.shape[:-1], num_hash, dtype=torch.int32)


# Cumulations: linear in the values, so that each is its own gradient with queries and keys
# exchanged, any number of times


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
    ``dv_j = 1/m sum_h sum_i [code_h(q_i) = code_h(k_j)] g_i``.
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
def _(query_hash_code: Tensor, key_hash_code: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    return _shaped(value, *query_hash_code.shape[:-1], value.shape[-1])


def _keep_cumulation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.capacity, query_mask, key_mask, _, ctx.variant = inputs
    ctx.save_for_backward(*tensors, query_mask, key_mask)


def _cumulation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query_code, key_code, _, query_mask, key_mask = ctx.saved_tensors
    grad_value = lsh_cumulation(key_code, query_code, grad_out, ctx.capacity, key_mask, query_mask, False, ctx.variant)
    return None, None, grad_value, None, None, None, None, None


lsh_cumulation.register_autograd(_cumulation_backward, setup_context=_keep_cumulation)


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
    """See `yoso_core.lsh_weighted_cumulation`. With weights ``a`` and ``b`` and ``C_ij`` the share
    of hashes that collide:

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
def _(
    query_hash_code: Tensor, query_weight: Tensor, key_hash_code: Tensor, key_weight: Tensor, value: Tensor, *rest: Any, **options: Any
) -> Tensor:
    return _shaped(value, *query_hash_code.shape[:-1], value.shape[-1])


def _weighted_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query_code, a, key_code, b, value, query_mask, key_mask = ctx.saved_tensors
    _, wants_a, _, wants_b, wants_value, *_ = ctx.needs_input_grad
    forth = (ctx.capacity, query_mask, key_mask, False, ctx.variant)
    back = (ctx.capacity, key_mask, query_mask, False, ctx.variant)
    return (
        None,
        lsh_weighted_cumulation(query_code, grad_out, key_code, value, b, *forth) if wants_a else None,
        None,
        lsh_weighted_cumulation(key_code, value, query_code, grad_out, a, *back) if wants_b else None,
        lsh_weighted_cumulation(key_code, b, query_code, a, grad_out, *back) if wants_value else None,
        *(None,) * 5,
    )


lsh_weighted_cumulation.register_autograd(_weighted_backward, setup_context=_keep_cumulation)


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
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    return _shaped(value, *query.shape[:-1], value.shape[-1])


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
    masks: dict[str, Any] = {"query_mask": query_mask, "key_mask": key_mask}
    return face.expectation_attention_backward(grad_out, query, key, value, hash_code_len, grad=cast(Grad, grad), **masks, variant=variant)


@expectation_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Gradients:
    return _shaped(query, *query.shape), _shaped(key, *key.shape), _shaped(value, *value.shape)


def _keep_expectation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.hash_code_len, query_mask, key_mask, ctx.grad, _ = inputs
    ctx.save_for_backward(query, key, value, query_mask, key_mask)


def _expectation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, query_mask, key_mask = ctx.saved_tensors
    grads = expectation_attention_backward(grad_out, query, key, value, ctx.hash_code_len, query_mask, key_mask, ctx.grad)
    return *grads, None, None, None, None, None


expectation_attention.register_autograd(_expectation_backward, setup_context=_keep_expectation)
expectation_attention_backward.register_autograd(_no_second_derivative("expectation_attention"))


# The whole attention


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
    """See `yoso_core.model.yoso_attention`, which calls this with everything drawn.

    Returns the output and, for the backward pass, the length of every row before it was scaled:
    ``(..., n_q, 1)``, in float32 at least; empty where nothing was scaled, or with
    ``for_backward=False``. Nothing else is kept but the inputs: the backward pass hashes again, to
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
def _(
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
    out = _shaped(value, *query.shape[:-1], value.shape[-1])
    if not (normalize_output and for_backward):
        return out, value.new_empty(0)
    return out, _shaped(value, *query.shape[:-1], 1, dtype=torch.float32 if value.dtype in HALF else None)


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Scale ``rows`` to unit length in place; rows shorter than 1e-12 become zeros. Returns them
    and their lengths.
    """
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    if not rows.is_cuda and math.isfinite(length.sum()):
        return rows.div_(torch.threshold(length, TINY_NORM, torch.inf)), length
    # A sum of squares overflows long before its root, so the rows are made smaller first. On a GPU
    # always: to ask would be to wait.
    largest = torch.linalg.vector_norm(rows, ord=torch.inf, dim=-1, keepdim=True)
    rows /= torch.threshold(largest, 0, 1)
    scaled = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    length = largest * scaled
    return rows.div_(scaled.masked_fill(length <= TINY_NORM, torch.inf)), length


def _rows_backward(grad_out: Tensor, out: Tensor, length: Tensor) -> Tensor:
    """The gradient before the rows ``out`` were scaled to unit length: ``(g - (g . y) y) / |x|``,
    zero for rows without a direction.
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
    """Gradients of `yoso_attention` by query, key and value; ``variant`` is that of the forward
    pass.
    """
    leading, d, d_v = query.shape[:-2], query.shape[-1], value.shape[-1]
    n = query.shape[-2] + key.shape[-2]
    per_head = max(query.element_size(), 4) * n * (num_hash + 2 * d + d_v)
    groups = list(_head_groups(tuple(leading), per_head, GROUP_BYTES[query.device.type]))
    given = (grad_out, out, length, query, key, value, signs, planes, query_mask, key_mask)
    how: tuple[Any, ...] = (num_hash, hash_code_len, by_expectation, normalize_output, grad, variant)
    if len(groups) == 1:
        return _gradients_of_heads(*given, *how)
    tails = (2, 2, 2, 2, 2, 2, 3, 2, 1, 1)  # dims that are no leading dims
    found = (_shaped(query, *query.shape), _shaped(key, *key.shape), _shaped(value, *value.shape))
    for group in groups:
        heads: list[Any] = [
            None if x is None else x.expand(*leading, *x.shape[x.dim() - tail :])[group] for x, tail in zip(given, tails, strict=True)
        ]
        parts = list(_gradients_of_heads(*heads, *how))
        for whole in found:
            whole[group] = parts.pop(0)
    return found


def _gradients_of_heads(
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
    options: dict[str, Any] = {"grad": grad, "query_mask": query_mask, "key_mask": key_mask}
    wide, g = value, grad_out
    if normalize_output:
        wide, g = _widened(value), _rows_backward(grad_out, out, length)
    if by_expectation:
        found = face.expectation_attention_backward(g, query, key, wide, hash_code_len, **options)
    else:
        code_q, code_k = (_codes(x, signs, planes, num_hash, hash_code_len, variant) for x in (query, key))
        found = face.lsh_attention_backward(g, query, key, wide, code_q, code_k, hash_code_len, **options, validate=False)
    return found[0], found[1], found[2].to(value.dtype)


def _head_groups(leading: tuple[int, ...], per_head: int, limit: int) -> Iterator[tuple[Any, ...]]:
    """Indices into the leading dims that cover them, each of as many heads as fit in ``limit``
    bytes; ``()`` is all of them.
    """
    if not leading or math.prod(leading) * per_head <= limit:
        yield ()
        return
    step = limit // (math.prod(leading[1:]) * per_head)
    for i in range(0, leading[0], max(step, 1)):
        if step:
            yield (slice(i, i + step),)
        else:
            yield from ((i, *rest) for rest in _head_groups(leading[1:], per_head, limit))


def _codes(vectors: Tensor, signs: Tensor | None, planes: Tensor | None, num_hash: int, hash_code_len: int, variant: str | None) -> Tensor:
    """The codes of the forward pass again. Those of planes are the same only in the same place, so
    there it is done.
    """
    if signs is not None:
        return face.fast_hash(vectors, signs, num_hash, hash_code_len)
    place = None if variant is None else variant.partition(":")[0]
    there = next((v.name for v in variants("hyperplane_hash") if v.where == place), None)
    return face.hyperplane_hash(vectors, planes, num_hash, hash_code_len, variant=there)


@yoso_attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, length: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Gradients:
    return _shaped(query, *query.shape), _shaped(key, *key.shape), _shaped(value, *value.shape)


def _keep_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, num_hash, hash_code_len, use_expectation, normalize_output, grad, backward, for_backward, variant = inputs
    out, length = output
    ctx.mark_non_differentiable(length)
    ctx.save_for_backward(*tensors, out if normalize_output else None, length)
    ctx.lengths_kept = for_backward or not normalize_output
    ctx.how = (num_hash, hash_code_len, use_expectation or backward == "expectation", normalize_output, grad, variant)


def _attention_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.lengths_kept:
        raise RuntimeError("yoso_core::yoso_attention: called with for_backward=False, so it kept nothing to make gradients from")
    query, key, value, signs, planes, query_mask, key_mask, out, length = ctx.saved_tensors
    out = grad_out if out is None else out
    grads = yoso_attention_backward(grad_out, out, length, query, key, value, signs, planes, query_mask, key_mask, *ctx.how)
    return *grads, *(None,) * 12


yoso_attention.register_autograd(_attention_backward, setup_context=_keep_attention)
yoso_attention_backward.register_autograd(_no_second_derivative("yoso_attention"))
