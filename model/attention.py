"""Differentiable YOSO attention on torch tensors."""

import math
from typing import Literal

import torch
from torch import Tensor

from yoso_core import checks
from yoso_core import ops as face
from yoso_core.arrays import one_caller
from yoso_core.model import ops, plain
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import Seed, hash_layout

Backward = Literal["lsh", "expectation"]


def sample_signs(
    num_hash: int,
    hash_code_len: int,
    dim: int,
    *,
    batch_shape: tuple[int, ...] = (),
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """`yoso_core.sample_signs` from torch's random numbers: int8 ``(*batch_shape, 3, parts, D)`` of
    +1 and -1.

    Parameters
    ----------
    num_hash, hash_code_len, dim, batch_shape : those of `yoso_core.sample_signs`.
    generator : the source of random numbers. It draws on its own device. ``None``: torch's own
        generator of ``device``, which `torch.manual_seed` seeds.
    device : where the result goes. ``None``: it stays where it was drawn.

    >>> sample_signs(32, 8, 64, generator=torch.Generator().manual_seed(0)).shape
    torch.Size([3, 4, 64])
    """
    if not torch.compiler.is_compiling():
        num_hash, hash_code_len, dim, batch_shape = checks.draw(num_hash, hash_code_len, dim, batch_shape)
    layout = hash_layout(num_hash, hash_code_len, dim)
    shape = (*batch_shape, 3, layout.parts, layout.padded_dim)
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
    variant: str | None = None,
    grad: Grad = "lower_bound",
    backward: Backward = "lsh",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`yoso_core.yoso_attention` with gradients of query, key and value. It also runs under
    `torch.compile`, autocast and activation checkpointing.

    Parameters
    ----------
    query, key, value, num_hash, hash_code_len, use_expectation, query_mask, key_mask,
        normalize_output : those of `yoso_core.yoso_attention`; torch tensors of one device.
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
    if not torch.compiler.is_compiling():  # compiled, the operator says what is wrong, when it runs
        num_hash, hash_code_len = checks.hash_numbers(num_hash, hash_code_len)
        _check_kinds({"query": query, "key": key, "value": value}, signs, planes, query_mask, key_mask)
        _check_source(rng, generator)
    query, key, value = _under_autocast(query, key, value)
    if plain.in_onnx_export():
        return plain.yoso_attention(
            query,
            key,
            value,
            num_hash=num_hash,
            hash_code_len=hash_code_len,
            use_expectation=use_expectation,
            signs=signs,
            planes=planes,
            query_mask=query_mask,
            key_mask=key_mask,
            normalize_output=normalize_output,
        )
    if signs is None and planes is None and not use_expectation:
        signs = _draw(query, num_hash, hash_code_len, rng=rng, generator=generator)
    wants_gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    out, _ = ops.yoso_attention(
        query,
        key,
        value,
        signs=signs,
        planes=planes,
        query_mask=query_mask,
        key_mask=key_mask,
        num_hash=num_hash,
        hash_code_len=hash_code_len,
        use_expectation=bool(use_expectation),
        normalize_output=bool(normalize_output),
        grad=grad,
        backward=backward,
        for_backward=wants_gradients,
        variant=variant,
    )
    return out


def expected_weights(
    query: Tensor, key: Tensor, hash_code_len: int, *, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """The expected weights themselves, ``E_ij = (1 - theta_ij / pi)**tau``, to look at.

    ``yoso_attention(..., use_expectation=True)`` is ``E @ value`` with every row scaled to unit
    length. ``theta_ij`` is the angle between query ``i`` and key ``j``. A zero vector is at a right
    angle to every other vector.

    Parameters
    ----------
    query, key, hash_code_len, query_mask, key_mask : those of `yoso_core.yoso_attention`.

    Returns
    -------
    ``(..., n_q, n_k)`` in the dtype of ``query``, so memory is quadratic. Rows of masked queries
    and columns of masked keys are zeros. The weights are computed in float32 at least. Their
    gradient is the true derivative.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.1.

    >>> query = torch.tensor([[1.0, 0.0]])
    >>> key = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # at 0, 90 and 180 degrees
    >>> expected_weights(query, key, hash_code_len=2)
    tensor([[1.0000, 0.2500, 0.0000]])
    """
    q, k = (_unit(x, mask) for x, mask in ((query, query_mask), (key, key_mask)))
    # The arccos of a cosine near 1 would lose the angle; from |q - k| and |q + k| it is exact.
    difference, total = (torch.cdist(q, other, compute_mode="donot_use_mm_for_euclid_dist") for other in (k, -k))
    both_zero = difference + total == 0
    angle = 2 * torch.atan2(difference.masked_fill(both_zero, 1), total.masked_fill(both_zero, 1))
    weights = (1 - angle / math.pi) ** hash_code_len
    for mask, dim in ((query_mask, -1), (key_mask, -2)):
        if mask is not None:
            weights = weights.masked_fill((mask == 0).unsqueeze(dim), 0)
    return weights.to(query.dtype)


def _unit(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of length one. A zero row and a masked row become zeros."""
    if mask is not None:
        x = x.masked_fill((mask == 0).unsqueeze(-1), 0)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x.masked_fill(largest == 0, 0)  # a row without a direction has no gradient
    x = x / largest.clamp_min(torch.finfo(x.dtype).tiny)  # no square overflows or vanishes
    return torch.nn.functional.normalize(x, dim=-1)


def _draw(query: Tensor, num_hash: int, hash_code_len: int, *, rng: Seed, generator: torch.Generator | None) -> Tensor | None:
    """Signs for every head of ``query``. ``None`` where an argument is wrong: the operator says
    which.
    """
    if num_hash < 1 or not 1 <= hash_code_len <= checks.MAX_CODE_LEN or query.dim() < 2 or query.shape[-1] < 1:
        return None
    heads, dim = tuple(query.shape[-3:-2]), query.shape[-1]
    if rng is None:
        return sample_signs(num_hash, hash_code_len, dim, batch_shape=heads, generator=generator, device=query.device)
    return torch.from_numpy(face.sample_signs(num_hash, hash_code_len, dim, batch_shape=heads, rng=rng)).to(query.device)


def _check_kinds(
    required: dict[str, Tensor], signs: Tensor | None, planes: Tensor | None, query_mask: Tensor | None, key_mask: Tensor | None
) -> None:
    """Check what the operator cannot: that every argument is a tensor, and that all are on one
    device.
    """
    given = [*required.values(), *(x for x in (signs, planes, query_mask, key_mask) if x is not None)]
    if all(isinstance(x, Tensor) for x in given) and all(x.device == given[0].device for x in given):
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
