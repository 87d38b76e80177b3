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

from yoso_core import checks
from yoso_core import ops as face
from yoso_core.model.operators import Operator, keep, trailing_dims
from yoso_core.model.weights import Pairs, working
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import Layout
from yoso_core.reference.normalize import TINY_NORM
from yoso_core.registry import variants

Gradients = tuple[Tensor, Tensor, Tensor]

GROUP_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""The backward pass of attention takes as many heads at a time as fit into so many bytes: their
codes, unit vectors and results.
"""

HALF = (torch.float16, torch.bfloat16)


def _no_second_derivative(op: Operator) -> None:
    """Refuse to differentiate gradients."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(
            f"yoso_core::{op.__name__.removesuffix('_backward')}: there is no second derivative; take first gradients alone "
            "(create_graph=False), or differentiate the formula of yoso_core.reference in torch's own operations"
        )

    op.differentiate(save=lambda ctx, inputs, output: None, backward=refuse, jvp=refuse)


# The transform: linear, and its own transpose


@Operator
def hadamard_transform(x: Tensor, variant: str | None = None) -> Tensor:
    """See `yoso_core.hadamard_transform`. Its gradient is the transform of the gradient."""
    return face.hadamard_transform(x, variant=variant)


@hadamard_transform.register_fake
def _(x: Tensor, variant: str | None = None) -> Tensor:
    return x.new_empty(x.shape)


def _save_variant(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.variant = inputs[-1]


def _transform_of(ctx: Any, moved: Tensor, _: None = None) -> Any:
    return hadamard_transform(moved, ctx.variant)


hadamard_transform.differentiate(save=_save_variant, backward=lambda ctx, grad_out: (_transform_of(ctx, grad_out), None), jvp=_transform_of)


# Hashes: whole numbers, without gradients


@Operator
def fast_hash(
    vectors: Tensor, signs: Tensor, num_hash: int, hash_code_len: int, layout: str = "chained", variant: str | None = None
) -> Tensor:
    """See `yoso_core.fast_hash`."""
    return face.fast_hash(vectors, signs, num_hash, hash_code_len, layout=cast(Layout, layout), variant=variant)


@Operator
def hyperplane_hash(vectors: Tensor, planes: Tensor, num_hash: int, hash_code_len: int, variant: str | None = None) -> Tensor:
    """See `yoso_core.hyperplane_hash`."""
    return face.hyperplane_hash(vectors, planes, num_hash, hash_code_len, variant=variant)


@fast_hash.register_fake
@hyperplane_hash.register_fake
def _(vectors: Tensor, draw: Tensor, num_hash: int, *rest: Any) -> Tensor:
    return vectors.new_empty(*vectors.shape[:-1], num_hash, dtype=torch.int32)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


for _hash, _arguments in ((fast_hash, 6), (hyperplane_hash, 5)):
    _hash.differentiate(save=_save_nothing, backward=lambda ctx, _, count=_arguments: (None,) * count, jvp=lambda ctx, *tangents: None)


# Smoothing: linear, and its own transpose


@Operator
def smooth_table(table: Tensor, oversample: int, variant: str | None = None) -> Tensor:
    """See `yoso_core.smooth_table`. Its gradient is the smoothed gradient."""
    return face.smooth_table(table, oversample, variant=variant)


@smooth_table.register_fake
def _(table: Tensor, oversample: int, variant: str | None = None) -> Tensor:
    return table.new_empty(table.shape)


def _save_smoothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1:]


def _smoothed(ctx: Any, moved: Tensor, *_: None) -> Any:
    return smooth_table(moved, *ctx.how)


smooth_table.differentiate(save=_save_smoothing, backward=lambda ctx, grad_out: (_smoothed(ctx, grad_out), None, None), jvp=_smoothed)


# Cumulations: linear in the values, so each is its own gradient with queries and keys exchanged,
# any number of times


@Operator
def lsh_cumulation(
    query_hash_code: Tensor,
    key_hash_code: Tensor,
    value: Tensor,
    hashtable_capacity: int,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    oversample: int = 0,
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
        oversample=oversample,
        validate=validate,
        variant=variant,
    )


@lsh_cumulation.register_fake
def _(query_hash_code: Tensor, key_hash_code: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return value.new_empty(*query_hash_code.shape[:-1], value.shape[-1])


def _save_cumulation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """What a backward pass calls: the same sums forth, or with queries and keys exchanged back."""
    *tensors, capacity, query_mask, key_mask, oversample, _, variant = inputs
    keep(ctx, *tensors, query_mask, key_mask)
    ctx.how = {"hashtable_capacity": capacity, "oversample": oversample, "validate": False, "variant": variant}


def _cumulation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query_code, key_code, _, query_mask, key_mask = ctx.saved_tensors
    grad_value = lsh_cumulation(key_code, query_code, grad_out, query_mask=key_mask, key_mask=query_mask, **ctx.how)
    return None, None, grad_value, *(None,) * 6


def _cumulation_jvp(ctx: Any, _: None, __: None, value: Tensor | None, *rest: None) -> Tensor | None:
    """``sum_j C_ij dv_j``."""
    query_code, key_code, _, query_mask, key_mask = ctx.saved_tensors
    return None if value is None else lsh_cumulation(query_code, key_code, value, query_mask=query_mask, key_mask=key_mask, **ctx.how)


lsh_cumulation.differentiate(save=_save_cumulation, backward=_cumulation_backward, jvp=_cumulation_jvp)


@Operator
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


def _save_weighted(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, capacity, query_mask, key_mask, _, variant = inputs
    keep(ctx, *tensors, query_mask, key_mask)
    ctx.how = {"hashtable_capacity": capacity, "validate": False, "variant": variant}


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


def _weighted_jvp(
    ctx: Any, _: None, query_weight: Tensor | None, __: None, key_weight: Tensor | None, value: Tensor | None, *rest: None
) -> Tensor | None:
    """Linear in each of three: the sum with each in turn replaced by its tangent."""
    query_code, a, key_code, b, v, query_mask, key_mask = ctx.saved_tensors
    moved: Tensor | None = None
    for args in ((query_weight, b, v), (a, key_weight, v), (a, b, value)):
        if all(x is not None for x in args):
            x, y, z = args
            part = lsh_weighted_cumulation(query_code, x, key_code, y, z, query_mask=query_mask, key_mask=key_mask, **ctx.how)
            moved = part if moved is None else moved + part
    return moved


lsh_weighted_cumulation.differentiate(save=_save_weighted, backward=_weighted_backward, jvp=_weighted_jvp)


# The expectation


@Operator
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


@Operator
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
    keep(ctx, query, key, value, query_mask, key_mask)


def _expectation_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, query_mask, key_mask = ctx.saved_tensors
    grads = expectation_attention_backward(
        grad_out, query, key, value, hash_code_len=ctx.hash_code_len, query_mask=query_mask, key_mask=key_mask, grad=ctx.grad
    )
    return *grads, None, None, None, None, None


def _expectation_jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
    query, key, value, query_mask, key_mask = ctx.saved_tensors
    pairs = Pairs(query, key, query_mask, key_mask, ctx.hash_code_len, ctx.grad)
    weights = pairs.expected()
    return pairs.moved_rows(weights, weights, value, tangents[:3]).to(value.dtype)


expectation_attention.differentiate(save=_save_expectation, backward=_expectation_backward, jvp=_expectation_jvp)
_no_second_derivative(expectation_attention_backward)


# The whole attention


class _How(NamedTuple):
    """The other arguments of a call of `yoso_attention`, in the operator's order."""

    num_hash: int
    hash_code_len: int
    use_expectation: bool = False
    normalize_output: bool = True
    grad: str = "lower_bound"
    backward: str = "lsh"
    layout: str = "chained"
    oversample: int = 0
    backward_num_hash: int | None = None
    variant: str | None = None

    @property
    def by_expectation(self) -> bool:
        """The gradients come from the expected weights."""
        return self.use_expectation or self.backward == "expectation"


@Operator
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
    layout: str = "chained",
    oversample: int = 0,
    backward_num_hash: int | None = None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor]:
    """See `yoso_core.model.yoso_attention`, which draws the signs and calls this operator.

    Returns the output, and for the backward pass the length of every row before it was scaled:
    ``(..., n_q, 1)``, in float32 at least; ``(..., n_q, 0)`` where nothing was scaled. Of the rest
    only the inputs are kept. The backward pass hashes again, to the same codes, which is cheaper
    than to store them.
    """
    checks.one_of("grad", grad, ("lower_bound", "exact"))
    checks.one_of("backward", backward, ("lsh", "expectation"))
    checks.backward_num_hash(backward_num_hash, num_hash)
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
        "layout": layout,
        "oversample": oversample,
        "variant": variant,
    }
    if normalize_output:
        out, length = face.yoso_attention(query, key, value, **options, return_length=True)
    else:
        out = face.yoso_attention(query, key, value, **options, normalize_output=False)
        length = value.new_empty(*query.shape[:-1], 0, dtype=working(value.dtype))
    return out, length


@yoso_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, signs: Tensor, planes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, _, *settings = rest  # after the two masks
    how, rows = _How(*settings), query.shape[:-1]
    return value.new_empty(*rows, value.shape[-1]), value.new_empty(*rows, int(how.normalize_output), dtype=working(value.dtype))


def _widened(x: Tensor) -> Tensor:
    return x.to(working(x.dtype))


def l2_normalize_moved(moved: Tensor, out: Tensor, length: Tensor) -> Tensor:
    """How unit rows ``out`` move with the rows ``x`` that they were: ``(dx - (dx . y) y) / |x|``,
    zero for rows shorter than 1e-12. The map is its own transpose, so it is the gradient of the
    step too: `yoso_core.reference.l2_normalize_backward`, from the scaled rows and their lengths.
    """
    dx, y = _widened(moved), _widened(out)
    along = (dx * y).sum(dim=-1, keepdim=True)
    tiny = length <= TINY_NORM
    return torch.addcmul(dx, along, y, value=-1).div_(length.masked_fill(tiny, 1)).masked_fill_(tiny, 0)


@Operator
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
    layout: str,
    oversample: int,
    backward_num_hash: int | None,
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
        layout=layout,
        oversample=oversample,
        backward_num_hash=backward_num_hash,
        variant=variant,
    )
    leading, rows = tuple(query.shape[:-2]), query.shape[-2] + key.shape[-2]
    head_bytes = max(query.element_size(), 4) * rows * (num_hash + 2 * query.shape[-1] + value.shape[-1])
    groups = list(_head_groups(leading, head_bytes, GROUP_BYTES[query.device.type]))
    if len(groups) == 1:
        return gradients(saved)
    found = _like(query, key, value)
    for heads in groups:
        part = gradients(_Saved(**{name: _of_heads(x, trailing_dims(name, layout), leading, heads) for name, x in saved._asdict().items()}))
        for whole, few in zip(found, part, strict=True):
            whole[heads] = few
    return found


def _like(query: Tensor, key: Tensor, value: Tensor) -> Gradients:
    """Room for the three gradients."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


@yoso_attention_backward.register_fake
def _(grad_out: Tensor, out: Tensor, length: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Gradients:
    return _like(query, key, value)


@Operator
def lsh_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_hash_code: Tensor,
    key_hash_code: Tensor,
    hash_code_len: int,
    grad: str = "lower_bound",
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    oversample: int = 0,
    backward_num_hash: int | None = None,
    validate: bool = True,
    variant: str | None = None,
) -> Gradients:
    """See `yoso_core.lsh_attention_backward`."""
    return face.lsh_attention_backward(
        grad_out,
        query,
        key,
        value,
        query_hash_code,
        key_hash_code,
        hash_code_len,
        grad=cast(Grad, grad),
        query_mask=query_mask,
        key_mask=key_mask,
        oversample=oversample,
        backward_num_hash=backward_num_hash,
        validate=validate,
        variant=variant,
    )


@expectation_attention_backward.register_fake
@lsh_attention_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Gradients:
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


def _of_heads(x: Tensor | None, trailing: int, leading: tuple[int, ...], heads: tuple[Any, ...]) -> Any:
    """The part of one tensor that belongs to these heads; what heads share is expanded first."""
    return None if x is None else x.expand(*leading, *x.shape[x.dim() - trailing :])[heads]


def _gradients_of_heads(
    saved: _Saved,
    *,
    num_hash: int,
    hash_code_len: int,
    by_expectation: bool,
    normalize_output: bool,
    grad: Grad,
    layout: str,
    oversample: int,
    backward_num_hash: int | None,
    variant: str | None,
) -> Gradients:
    query, key, value, grad_rows = saved.query, saved.key, saved.value, saved.grad_out
    if normalize_output:
        value = _widened(value)
        grad_rows = l2_normalize_moved(saved.grad_out, saved.out, saved.length)
    options: dict[str, Any] = {"grad": grad, "query_mask": saved.query_mask, "key_mask": saved.key_mask}
    if by_expectation:
        found = face.expectation_attention_backward(grad_rows, query, key, value, hash_code_len, **options)
    else:
        draw = saved.signs, saved.planes, num_hash, hash_code_len + oversample, layout, variant
        query_code, key_code = (codes_of(x, *draw) for x in (query, key))
        options |= {"oversample": oversample, "backward_num_hash": backward_num_hash, "validate": False}
        found = face.lsh_attention_backward(grad_rows, query, key, value, query_code, key_code, hash_code_len, **options)
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


def codes_of(
    vectors: Tensor,
    signs: Tensor | None,
    planes: Tensor | None,
    num_hash: int,
    code_len: int,
    layout: str,
    variant: str | None,
) -> Tensor:
    """The codes of the forward pass again, of ``code_len = tau + s`` bits.

    Codes by signs are the same bits in every variant. Codes by planes are not, so those come from
    the backend of the forward pass.
    """
    if signs is not None:
        return cast(Tensor, fast_hash(vectors, signs, num_hash, code_len, layout))
    backend = None if variant is None else variant.partition(":")[0]
    same = next((v.name for v in variants("hyperplane_hash") if v.where == backend), None)
    return cast(Tensor, hyperplane_hash(vectors, planes, num_hash, code_len, variant=same))


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.how = inputs[:7], _How(*inputs[7:])
    out, length = output
    ctx.mark_non_differentiable(length)
    keep(ctx, *tensors, out if ctx.how.normalize_output else None, length)


def _attention_backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    how: _How = ctx.how
    *tensors, out, length = ctx.saved_tensors
    grads = yoso_attention_backward(
        grad_out,
        grad_out if out is None else out,
        length,
        *tensors,
        num_hash=how.num_hash,
        hash_code_len=how.hash_code_len,
        by_expectation=how.by_expectation,
        normalize_output=how.normalize_output,
        grad=how.grad,
        layout=how.layout,
        oversample=how.oversample,
        backward_num_hash=how.backward_num_hash,
        variant=how.variant,
    )
    return *grads, *(None,) * (len(_How._fields) + 4)


def _attention_jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
    how: _How = ctx.how
    query, key, value, signs, planes, query_mask, key_mask, out, length = ctx.saved_tensors
    pairs = Pairs(query, key, query_mask, key_mask, how.hash_code_len, cast(Grad, how.grad))
    if how.by_expectation:
        weights = (pairs.expected(),) * 2
    else:
        draw = signs, planes, how.num_hash, how.hash_code_len + how.oversample, how.layout, how.variant
        query_code, key_code = (codes_of(x, *draw) for x in (query, key))
        weights = pairs.sampled(query_code, key_code, how.oversample, how.backward_num_hash)
    moved = pairs.moved_rows(*weights, value, tangents[:3])
    if out is not None:
        moved = l2_normalize_moved(moved, out, length)
    return moved.to(value.dtype), None


yoso_attention.differentiate(save=_save_attention, backward=_attention_backward, jvp=_attention_jvp)
for _backward in (yoso_attention_backward, lsh_attention_backward):
    _no_second_derivative(_backward)
