"""Differentiable YOSO attention on torch tensors."""

from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor

from yoso_core import checks
from yoso_core import ops as face
from yoso_core.arrays import one_caller
from yoso_core.model import ops, plain
from yoso_core.model.weights import Pairs
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import LAYOUTS, Layout, Seed, least_rotations, signs_shape

Backward = Literal["lsh", "expectation"]


def sample_signs(
    num_hash: int,
    hash_code_len: int,
    dim: int,
    *,
    batch_shape: tuple[int, ...] = (),
    layout: Layout = "chained",
    rotations: int | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """`yoso_core.sample_signs` from torch's random numbers: int8 of +1 and -1.

    Parameters
    ----------
    num_hash, hash_code_len, dim, batch_shape, layout, rotations : those of
        `yoso_core.sample_signs`.
    generator : the source of random numbers. It draws on its own device. ``None``: torch's own
        generator of ``device``, which `torch.manual_seed` seeds.
    device : where the result goes. ``None``: it stays where it was drawn.

    >>> sample_signs(32, 8, 64, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([7, 64])
    """
    if not torch.compiler.is_compiling():
        num_hash, hash_code_len, dim, batch_shape = checks.draw(num_hash, hash_code_len, dim, batch_shape)
        rotations = checks.rotations("layout", layout, rotations, least_rotations(num_hash, hash_code_len, dim))
    shape = (*batch_shape, *signs_shape(num_hash, hash_code_len, dim, layout, rotations))
    if generator is None:
        return 2 * torch.randint(0, 2, shape, dtype=torch.int8, device=device) - 1
    bits = torch.randint(0, 2, shape, dtype=torch.int8, generator=generator, device=generator.device)
    return (2 * bits - 1).to(generator.device if device is None else device)


def yoso_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_hash: int = 32,
    hash_code_len: int = 8,
    use_expectation: bool = False,
    signs: Tensor | None = None,
    planes: Tensor | None = None,
    rng: Seed = None,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    normalize_output: bool = True,
    layout: Layout = "chained",
    rotations: int | None = None,
    oversample: int = 0,
    variant: str | None = None,
    grad: Grad = "lower_bound",
    backward: Backward = "lsh",
    backward_num_hash: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`yoso_core.yoso_attention` with gradients of query, key and value. It also runs under
    `torch.compile`, autocast and activation checkpointing.

    Parameters
    ----------
    query, key, value, num_hash, hash_code_len, use_expectation, query_mask, key_mask,
        normalize_output, layout, rotations, oversample : those of `yoso_core.yoso_attention`; torch
        tensors of one device.
    signs, planes : the draw to use. Where neither is given, signs are drawn here: one draw for each
        index of the last leading dim (the heads), shared over the dims before it.
    rng : draw the signs from this NumPy generator or seed, as `yoso_core.yoso_attention` does. Not
        under `torch.compile`.
    variant : of the forward pass. The backward pass takes the best variant that can run on the
        tensors' device.
    grad : which gradient. For unit vectors ``dq_i = sum_j C_ij w_ij (g_i . v_j) k_j``, likewise
        ``dk_j``, with the weights ``C_ij`` of the forward pass. ``"lower_bound"``, the paper's:
        ``w = tau / 2``. It is *not* the derivative: for a single pair it is the derivative times
        ``(pi - theta) sin(theta) / 2``, at most 0.91. ``"exact"``: the derivative of the expected
        weight, ``w = tau / ((pi - theta) sin theta)``. Its cost grows with ``n_q n_k``, also where
        attention is sampled.
    backward : ``"lsh"``: ``C_ij`` are the collisions of the forward pass. ``"expectation"``: they
        are the expected weights, and the cost grows with ``n_q n_k`` (Hugging Face's
        ``lsh_backward=False``).
    backward_num_hash : with ``backward="lsh"``, from how many of the hashes, the first ones, the
        gradients of query and key come; ``None`` for all. They are an estimate of the same
        gradients at a proportional cost. With ``oversample`` they take the plain collisions of the
        lowest ``tau`` bits, which have the same mean. The gradient of the value is always that of
        the output.
    generator : draw the signs from this torch generator. Checkpointing would draw again from it:
        draw outside the checkpointed region with `sample_signs`, and give ``signs``. Where neither
        ``rng`` nor ``generator`` is given, signs come from torch's own generator of the device,
        which `torch.manual_seed` seeds and checkpointing restores.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. Masked rows, and rows that met no key, are zeros
    with zero gradients. Under autocast ``value`` is converted to autocast's dtype, and query and
    key to the wider of their two dtypes; hashes, sums and lengths are in float32 at least.

    Working memory is linear in ``n_q + n_k``. Kept for the backward pass are the inputs, the output
    and one number for each row.

    Raises
    ------
    ValueError, TypeError : as `yoso_core.yoso_attention`; the message names the argument.
    RuntimeError : a second derivative is asked for. There is none.

    Source: Zeng et al. 2021 (arXiv 2111.09714), sections 3.1 to 3.4.

    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(2, 100, 16, generator=generator, requires_grad=True)  # heads, tokens, dim
    >>> out = yoso_attention(x, x, x, num_hash=8, hash_code_len=4, generator=generator)
    >>> out.shape
    torch.Size([2, 100, 16])
    >>> out.sum().backward()
    >>> x.grad.shape
    torch.Size([2, 100, 16])
    """
    query, key, value, options = _prepared(
        query,
        key,
        value,
        num_hash=num_hash,
        hash_code_len=hash_code_len,
        use_expectation=use_expectation,
        signs=signs,
        planes=planes,
        rng=rng,
        query_mask=query_mask,
        key_mask=key_mask,
        normalize_output=normalize_output,
        layout=layout,
        rotations=rotations,
        oversample=oversample,
        variant=variant,
        grad=grad,
        backward=backward,
        backward_num_hash=backward_num_hash,
        generator=generator,
    )
    if plain.in_onnx_export():
        return plain.yoso_attention(query, key, value, **options)
    return cast(Tensor, ops.yoso_attention(query, key, value, **options)[0])


def yoso_attention_with_weights(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`yoso_attention`, and the weights ``C_ij`` that its output was made with, to look at.

    Parameters
    ----------
    query, key, value, options : those of `yoso_attention`.

    Returns
    -------
    The output, with the same bits and the same gradients as that of `yoso_attention`, and the
    weights ``(..., n_q, n_k)`` in the dtype of ``query``: the share of hashes that collide where
    attention is sampled, else the expected weights. Gradients flow through the weights, so
    ``weights.retain_grad()`` works. Memory is quadratic.

    >>> x = torch.eye(2)
    >>> out, weights = yoso_attention_with_weights(x, x, x, hash_code_len=2, use_expectation=True)
    >>> weights
    tensor([[1.0000, 0.2500],
            [0.2500, 1.0000]])
    """
    bound = signature(yoso_attention).bind(query, key, value, **options)
    bound.apply_defaults()
    query, key, value, chosen = _prepared(**bound.arguments)
    if plain.in_onnx_export():
        return plain.yoso_attention(query, key, value, **chosen), plain.attention_weights(query, key, **chosen)
    with torch.no_grad():
        out, length = ops.yoso_attention(query, key, value, **chosen)
        pairs = Pairs(query, key, chosen["query_mask"], chosen["key_mask"], chosen["hash_code_len"], chosen["grad"])
        if chosen["use_expectation"]:
            used = of_value = of_vectors = pairs.expected()
        else:
            numbers = chosen["num_hash"], chosen["hash_code_len"] + chosen["oversample"], chosen["layout"], chosen["variant"]
            query_code, key_code = (ops.codes_of(x, chosen["signs"], chosen["planes"], *numbers) for x in (query, key))
            used, of_vectors = pairs.sampled(query_code, key_code, chosen["oversample"], chosen["backward_num_hash"])
            of_value = used
            if chosen["backward"] == "expectation":
                of_value = of_vectors = pairs.expected()
    weights = pairs.in_graph(used, of_vectors).to(query.dtype)
    rows = (of_value + (weights - weights.detach())) @ pairs.kept(value)
    moved = (rows - rows.detach()).nan_to_num()  # zero; its gradient is that of the rows
    if chosen["normalize_output"]:
        moved = ops.l2_normalize_moved(moved, out, length)
    return out + moved.to(out.dtype), weights


def _prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_hash: int,
    hash_code_len: int,
    use_expectation: bool,
    signs: Tensor | None,
    layout: Layout,
    rotations: int | None,
    oversample: int,
    rng: Seed,
    generator: torch.Generator | None,
    **others: Any,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The arguments of the operator: checked, converted as autocast wants it, with signs drawn."""
    if not torch.compiler.is_compiling():  # compiled, the operator says what is wrong, when it runs
        num_hash, hash_code_len = checks.hash_numbers(num_hash, hash_code_len)
        oversample = checks.oversample(oversample, hash_code_len)
        checks.one_of("layout", layout, LAYOUTS)
        masks = {name: others[name] for name in ("query_mask", "key_mask")}
        _check_kinds({"query": query, "key": key, "value": value}, signs=signs, planes=others["planes"], **masks)
        _check_source(rng, generator)
    query, key, value = _under_autocast(query, key, value)
    if signs is None and others["planes"] is None and not use_expectation and not plain.in_onnx_export():
        signs = _draw(query, num_hash, hash_code_len + oversample, layout=layout, rotations=rotations, rng=rng, generator=generator)
    others["normalize_output"] = bool(others["normalize_output"])
    numbers = {"num_hash": num_hash, "hash_code_len": hash_code_len, "use_expectation": bool(use_expectation)}
    return query, key, value, {"signs": signs, "layout": layout, "oversample": oversample, **numbers, **others}


def _draw(
    query: Tensor,
    num_hash: int,
    hash_code_len: int,
    *,
    layout: Layout,
    rotations: int | None,
    rng: Seed,
    generator: torch.Generator | None,
) -> Tensor | None:
    """Signs for every head of ``query``. ``None`` where an argument is wrong: the operator says
    which.
    """
    if num_hash < 1 or not 1 <= hash_code_len <= checks.MAX_CODE_LEN or query.dim() < 2 or query.shape[-1] < 1:
        return None
    heads, dim = tuple(query.shape[-3:-2]), query.shape[-1]
    options: dict[str, Any] = {"batch_shape": heads, "layout": layout, "rotations": rotations}
    if rng is None:
        return sample_signs(num_hash, hash_code_len, dim, **options, generator=generator, device=query.device)
    return torch.from_numpy(face.sample_signs(num_hash, hash_code_len, dim, **options, rng=rng)).to(query.device)


def _check_kinds(
    required: dict[str, Tensor], signs: Tensor | None, planes: Tensor | None, query_mask: Tensor | None, key_mask: Tensor | None
) -> None:
    """Check what the operator cannot: that every argument is a tensor, and that all are on one
    device.
    """
    given = [*required.values(), *(x for x in (signs, planes, query_mask, key_mask) if x is not None)]
    if all(isinstance(x, Tensor) and x.layout == torch.strided and not x.is_nested and x.device == given[0].device for x in given):
        return
    with torch.no_grad():
        library = one_caller(required, signs=signs, planes=planes, query_mask=query_mask, key_mask=key_mask).library
    raise TypeError(f"query: need a torch tensor, got an array of {library}; yoso_core.yoso_attention takes it, without gradients")


def _check_source(rng: Seed, generator: torch.Generator | None) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: need a torch.Generator or None, got {type(generator).__name__}")
    if rng is not None:
        raise ValueError("generator: give rng or generator, not both")


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, convert the value to autocast's dtype, and query and key to the wider of
    their two. float64 is left alone, as autocast does.
    """
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value
    if not {query.dtype, key.dtype, value.dtype} <= {torch.float32, *ops.HALF}:
        return query, key, value
    vectors = torch.promote_types(query.dtype, key.dtype)
    return query.to(vectors), key.to(vectors), value.to(torch.get_autocast_dtype(device))
