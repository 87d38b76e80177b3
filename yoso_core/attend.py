"""The functions as people call them: any array, with gradients where they are wanted.

The top of the house: it goes to `yoso_core.ops`, or to the operators of `yoso_core.model` for torch
tensors whose numbers cannot be looked at, since a program is recorded or transformed. Attention
goes there too where it requires gradients. Nothing below imports it.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from yoso_core import adaptive, ops
from yoso_core.arrays import Array, of_a_program
from yoso_core.reference.hashing import Layout, Seed

P = ParamSpec("P")
R = TypeVar("R")


def _or_operator(function: Callable[P, R]) -> Callable[P, R]:
    """The function, or its operator for the tensors of a recorded or transformed program."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not of_a_program(*args, *kwargs.values()):
            return function(*args, **kwargs)
        from yoso_core.model import ops as operators

        found: R = getattr(operators, function.__name__)(*args, **kwargs)
        return found

    return call


hadamard_transform = _or_operator(ops.hadamard_transform)
fast_hash = _or_operator(ops.fast_hash)
hyperplane_hash = _or_operator(ops.hyperplane_hash)
lsh_cumulation = _or_operator(ops.lsh_cumulation)
smooth_table = _or_operator(ops.smooth_table)
lsh_weighted_cumulation = _or_operator(ops.lsh_weighted_cumulation)
expectation_attention = _or_operator(ops.expectation_attention)
expectation_attention_backward = _or_operator(ops.expectation_attention_backward)
lsh_attention_backward = _or_operator(ops.lsh_attention_backward)


def yoso_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int = 32,
    hash_code_len: int = 8,
    use_expectation: bool = False,
    signs: Array | None = None,
    planes: Array | None = None,
    rng: Seed = None,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    normalize_output: bool = True,
    layout: Layout = "chained",
    rotations: int | None = None,
    oversample: int = 0,
    return_error: bool = False,
    target_error: float | None = None,
    quantile: float = 0.9,
    max_num_hash: int | None = None,
    variant: str | None = None,
) -> Any:
    """YOSO attention: ``out_i = y_i / |y_i|`` with ``y_i = sum_j C_ij v_j``. Differentiable on
    torch tensors.

    ``C_ij`` is the share of ``num_hash`` random hashes in which query ``i`` and key ``j`` fall into
    one bucket. The cost is linear in ``n``. With ``use_expectation``, ``C_ij`` is its expected
    value ``(1 - arccos(q_i . k_j) / pi)**tau``, at quadratic cost.

    Parameters
    ----------
    query, key : float ``(..., n_q, d)`` and ``(..., n_k, d)``. Only their directions matter.
    value : float ``(..., n_k, d_v)``.
    num_hash, hash_code_len : ``m`` and ``tau`` (1 to 30).
    signs : the draw to use, from `sample_signs`.
    planes : Gaussian planes to use instead, from `sample_planes`: dense, and exactly unbiased. The
        expectation looks at neither.
    rng : a `numpy.random.Generator`, an int seed, or ``None`` for fresh entropy. It draws the signs
        where none are given: one draw for each index of the last leading dim (the heads), shared
        over the dims before it, so that a result does not depend on its neighbors in a batch.
    query_mask, key_mask : bool or integer ``(..., n_q)`` and ``(..., n_k)``, each dim equal or 1,
        nonzero = keep. Masked entries are skipped. Masked queries get zeros.
    normalize_output : scale every row to unit length, in float32 at least. A row shorter than
        1e-12, such as that of a query that met no key, becomes zeros.
    layout : of the signs. ``"chained"`` is unbiased, and cheaper for many hashes; ``"paper"``
        repeats the paper and its kernels, whose collisions are too rare: see `fast_hash`.
    rotations : of a chain that is drawn here; see `sample_signs`.
    oversample : ``s``: hash with ``tau + s`` bits, and count a key whose code differs in ``r`` of
        them ``C(tau + s - r, tau) / C(tau + s, tau)``: the mean over all hashes of ``tau`` of those
        bits. The same expectation with less noise, see `smooth_table`; ``signs`` or ``planes`` are
        then draws for ``tau + s`` bits.
    return_error : return a pair, the rows and how far each may be from its expectation: its
        relative standard error before the scaling to unit length, ``sqrt(sum_c s_c**2 / m) / |y|``
        with ``s_c`` the standard deviation of coordinate ``c`` between the rows that single hashes
        would give (divisor ``m - 1``). With an error ``e``, the cosine between the row and its
        expectation is about ``sqrt(1 - e**2)``. Not for the expectation nor for a single hash.
    target_error : add hashes, ``num_hash`` at a time, each group a draw of its own from ``rng``,
        until a share ``quantile`` of the rows has at most this error. Rows that are masked, that
        have no key left, or that are not finite do not count.
    quantile : the share of rows, over all batches and heads, above 0 and up to 1.
    max_num_hash : stop there in any case; at least ``num_hash``. ``None``: at 16 groups.
    variant : a name from `variants`, or ``None`` for the best that can run here.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. With ``return_error`` ``(out, error)``, ``error``
    float32 ``(..., n_q)``: 0 for masked rows, which are zeros whatever the draw; infinite where no
    hash met a key; NaN where the row is, and, from a compiled kernel, where the row is below 1e-15
    (float64: 1e-140) of the largest value of its head, so that squares of it vanish. With
    ``target_error`` ``(out, error, num_hash_used)``, the last an int. Neither has gradients:
    tensors that require them are refused, and so are programs that torch records or transforms, and
    autocast.

    A non-finite query gives NaN in its row, a
    non-finite key that is kept in every row of its head, a non-finite value that is kept in every
    row that meets it.

    Torch tensors go to `yoso_core.model.yoso_attention` where they require gradients, under
    `torch.autocast` (the result then has autocast's dtype), and where torch records or transforms a
    program: `torch.compile`, `torch.export`, `torch.jit.trace`, `torch.func`. It draws from torch's
    own generator where ``rng`` is ``None``, and takes ``grad`` and ``backward`` besides: which
    gradient it is.

    Source: Zeng et al. 2021 (arXiv 2111.09714).

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> exact = yoso_attention(x, x, x, use_expectation=True)
    >>> sampled = yoso_attention(x, x, x, num_hash=64, rng=0)
    >>> bool((exact * sampled).sum(-1).mean() > 0.9)
    True
    >>> out, error, used = yoso_attention(x, x, x, num_hash=16, target_error=0.3, rng=0)
    >>> bool((error <= 0.3).mean() >= 0.9), used
    (True, 32)
    """
    without_gradients = {"return_error": return_error, "target_error": target_error is not None}
    for name, asked in without_gradients.items():
        if asked and _wants_torch(query, key, value):
            raise ValueError(
                f"{name}: not with gradients, under autocast, or in a program that torch records or transforms; "
                "call it under torch.no_grad() with plain tensors"
            )
    attend: Callable[..., Any] = ops.yoso_attention
    asked_for: dict[str, Any] = {"return_error": True} if return_error else {}
    if target_error is not None:
        attend = adaptive.yoso_attention
        asked_for = {"target_error": target_error, "quantile": quantile, "max_num_hash": max_num_hash}
    elif _wants_torch(query, key, value):
        from yoso_core.model import yoso_attention as attend
    return attend(
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
        **asked_for,
    )


def _wants_torch(*arrays: Array) -> bool:
    """Whether attention belongs to `yoso_core.model`: gradients are wanted, autocast chooses the
    dtype, or torch records or transforms a program.
    """
    torch = sys.modules.get("torch")
    tensors = [] if torch is None else [x for x in arrays if isinstance(x, torch.Tensor)]
    if torch is None or not tensors:
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    device = tensors[0].device.type
    return of_a_program(*tensors) or (device in ("cpu", "cuda") and torch.is_autocast_enabled(device))
