"""YOSO attention as people call it: any array, with gradients where they are wanted.

The top of the house: it goes to `yoso_core.ops`, or to `yoso_core.model` for torch tensors that
require gradients. Nothing below imports it.
"""

import sys

from yoso_core import ops
from yoso_core.arrays import Array
from yoso_core.reference.hashing import Seed


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
    variant: str | None = None,
) -> Array:
    """YOSO attention: ``out_i = y_i / |y_i|`` with ``y_i = sum_j C_ij v_j``; differentiable on
    torch tensors.

    ``C_ij`` is the share of ``num_hash`` random hashes in which query ``i`` and key ``j`` fall into
    one bucket, which costs time linear in ``n``; or, with ``use_expectation``, its expected value
    ``(1 - arccos(q_i . k_j) / pi)**tau``.

    Parameters
    ----------
    query, key : float ``(..., n_q, d)`` and ``(..., n_k, d)``; only their directions matter.
    value : float ``(..., n_k, d_v)``.
    num_hash, hash_code_len : ``m`` and ``tau`` (1 to 30).
    signs : the draw to use, from `sample_signs`; or planes : Gaussian planes, from `sample_planes`,
        dense and exactly unbiased. The expectation needs neither, and does not look at them.
    rng : where neither is given, signs are drawn from this generator or seed (``None``: fresh
        entropy), one draw for each index of the last leading dim (the heads) and shared over the
        dims before it, so that a result does not depend on its neighbors in a batch.
    query_mask, key_mask : bool or integer ``(..., n_q)`` and ``(..., n_k)``, each dim equal or 1,
        nonzero = keep. Masked entries are skipped; masked queries get zeros.
    normalize_output : scale every row to unit length, in float32 at least; a row shorter than
        1e-12, such as that of a query that met no key, becomes zeros.

    Returns
    -------
    ``(..., n_q, d_v)`` in the dtype of ``value``. A query that is not finite gives NaN in its row,
    a kept key that is not finite
    gives NaN in every row of its head, a kept value that is not finite in every row that meets it.

    Torch tensors that require gradients, while gradients are enabled, go to
    `yoso_core.model.yoso_attention`, which draws from torch's own
    generator where ``rng`` is ``None``, and takes ``grad`` and ``backward`` besides: which gradient
    it is.

    Source: Zeng et al. 2021 (arXiv 2111.09714).
    """
    attend = ops.yoso_attention
    if _wants_gradients(query, key, value):
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
        variant=variant,
    )


def _wants_gradients(*arrays: Array) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in arrays)
