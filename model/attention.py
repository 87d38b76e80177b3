"""Differentiable YOSO attention on torch tensors."""

import math
from typing import Literal

import torch
from torch import Tensor

from yoso_core import checks
from yoso_core import ops as face
from yoso_core.arrays import one_caller
from yoso_core.model import ops
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

    ``generator=None`` draws from torch's own generator of ``device``, so `torch.manual_seed` rules.
    A generator draws on its own device, and the result goes to ``device`` (``None``: stays there).
    """
    if not torch.compiler.is_compiling():
        num_hash, hash_code_len, dim, batch_shape = face._check_draw(num_hash, hash_code_len, dim, batch_shape)
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
    """`yoso_core.yoso_attention` with gradients of query, key and value, under `torch.compile`,
    autocast and activation checkpointing.

    Parameters
    ----------
    query, key, value, num_hash, hash_code_len, use_expectation, query_mask, key_mask,
        normalize_output : those of `yoso_core.yoso_attention`; torch tensors of one device.
    signs, planes : the draw to use. Where neither is given, signs are drawn here, one draw for each
        index of the last leading dim (the heads) and shared over the dims before it: from ``rng``
        as in `yoso_core.yoso_attention` (not under `torch.compile`), or from ``generator``, or from
        torch's own generator of the device, which `torch.manual_seed` seeds and checkpointing
        preserves. With a generator of your own, checkpointing would draw afresh: draw outside the
        checkpointed region (`sample_signs`) and pass ``signs``.
    variant : of the forward pass. The backward pass takes the best that can run on the tensors'
        device.
    grad : with ``C_ij`` the weights of the forward pass, for unit vectors
        ``dq_i = sum_j C_ij w_ij (g_i . v_j) k_j``, likewise ``dk_j``. ``"lower_bound"``:
        ``w = tau / 2``, the paper's, which is *not* the derivative: for a single pair it is the
        derivative times ``(pi - theta) sin(theta) / 2``, at most 0.91. ``"exact"``: the derivative
        of the expected weight, ``w = tau / ((pi - theta) sin theta)``; sampled, its cost grows with
        ``n_q n_k``.
    backward : ``"lsh"``: with ``C_ij`` the collisions of the forward pass. ``"expectation"``: with
        the expected weights, whose cost grows with ``n_q n_k`` (Hugging Face's
        ``lsh_backward=False``).

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. Under autocast ``value`` is taken in autocast's
    dtype, query and key as they come (in
    the wider dtype of the two); hashes, sums and lengths are in float32 at least. Masked rows, and
    rows that met no key, are zeros
    with zero gradients. There is no second derivative: taking one raises.

    Working memory is linear in ``n_q + n_k``. Kept for the backward pass: the inputs, the output
    and one number a row.

    Source: Zeng et al. 2021 (arXiv 2111.09714), sections 3.1 to 3.4.
    """
    if not torch.compiler.is_compiling():  # compiled, the operator says what is wrong, when it runs
        num_hash, hash_code_len = checks.hash_numbers(num_hash, hash_code_len)
        _check_kinds({"query": query, "key": key, "value": value}, signs, planes, query_mask, key_mask)
        _check_source(rng, generator)
    query, key, value = _under_autocast(query, key, value)
    good = num_hash >= 1 and 1 <= hash_code_len <= checks.MAX_CODE_LEN and query.dim() >= 2 and query.shape[-1] >= 1
    if signs is None and planes is None and not use_expectation and good:
        heads, dim = tuple(query.shape[-3:-2]), query.shape[-1]
        if rng is not None:
            signs = torch.from_numpy(face.sample_signs(num_hash, hash_code_len, dim, batch_shape=heads, rng=rng)).to(query.device)
        else:
            signs = sample_signs(num_hash, hash_code_len, dim, batch_shape=heads, generator=generator, device=query.device)
    out, _ = ops.yoso_attention(
        query,
        key,
        value,
        signs,
        planes,
        query_mask,
        key_mask,
        num_hash,
        hash_code_len,
        bool(use_expectation),
        bool(normalize_output),
        grad,
        backward,
        torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        variant,
    )
    return out


def expected_weights(
    query: Tensor, key: Tensor, hash_code_len: int, *, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> Tensor:
    """The expected weights themselves, ``E_ij = (1 - theta_ij / pi)**tau``, to look at:
    ``(..., n_q, n_k)``, so memory is quadratic.

    ``yoso_attention(..., use_expectation=True)`` is ``E @ value`` with every row scaled to unit
    length. ``theta`` is the angle between query ``i`` and key ``j``; a zero vector is at a right
    angle to all. Rows of masked queries and columns of masked keys are zeros. Computed in float32
    at least, returned in the dtype of ``query``; differentiable, by the true derivative.

    Source: Zeng et al. 2021 (arXiv 2111.09714), section 3.1.
    """
    q, k = (_unit(x, mask) for x, mask in ((query, query_mask), (key, key_mask)))
    # arccos near 1 would lose the angle: from the two chords it is exact at both ends.
    apart, opposite = (torch.cdist(q, other, compute_mode="donot_use_mm_for_euclid_dist") for other in (k, -k))
    both_zero = apart + opposite == 0
    angle = 2 * torch.atan2(apart.masked_fill(both_zero, 1), opposite.masked_fill(both_zero, 1))
    weights = (1 - angle / math.pi) ** hash_code_len
    for mask, dim in ((query_mask, -1), (key_mask, -2)):
        if mask is not None:
            weights = weights.masked_fill((mask == 0).unsqueeze(dim), 0)
    return weights.to(query.dtype)


def _unit(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of length one, or zero where the row is zero; masked rows are zero, whatever they
    held.
    """
    if mask is not None:
        x = x.masked_fill((mask == 0).unsqueeze(-1), 0)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(dim=-1, keepdim=True)
    x = x.masked_fill(largest == 0, 0)  # without a direction there is no gradient either
    x = x / largest.clamp_min(torch.finfo(x.dtype).tiny)  # no square overflows or vanishes
    return torch.nn.functional.normalize(x, dim=-1)


def _check_kinds(
    required: dict[str, Tensor], signs: Tensor | None, planes: Tensor | None, query_mask: Tensor | None, key_mask: Tensor | None
) -> None:
    """What the operator cannot say: that something is no tensor, or has no numbers beside others
    that do.
    """
    given = [*required.values(), *(x for x in (signs, planes, query_mask, key_mask) if x is not None)]
    if all(isinstance(x, Tensor) for x in given) and all(x.device == given[0].device for x in given):
        return
    with torch.no_grad():
        library = one_caller(required, signs=signs, planes=planes, query_mask=query_mask, key_mask=key_mask).library
    raise TypeError(f"query: need a torch tensor, got an array of {library}; yoso_core.yoso_attention takes those, without gradients")


def _check_source(rng: Seed, generator: torch.Generator | None) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: need a torch.Generator or None, got {type(generator).__name__}")
    if rng is not None:
        raise ValueError("generator: give rng or generator, not both")


def _under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast: the value in its low dtype, query and key in the wider of theirs. float64 is
    left alone, as autocast does.
    """
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value
    if not {query.dtype, key.dtype, value.dtype} <= {torch.float32, *ops.HALF}:
        return query, key, value
    vectors = torch.promote_types(query.dtype, key.dtype)
    return query.to(vectors), key.to(vectors), value.to(torch.get_autocast_dtype(device))
