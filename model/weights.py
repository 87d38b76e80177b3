"""The ``n_q x n_k`` weights themselves, in torch's own operations: to look at, and for what needs
pairs. Memory is quadratic.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from yoso_core.reference.expectation import Grad
from yoso_core.reference.smoothing import plain_codes, smoothing_weights


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
    q, k = unit_rows(query, query_mask), unit_rows(key, key_mask)
    weights = (1 - _angles(q, k) / math.pi) ** hash_code_len
    return _masked_pairs(weights, query_mask, key_mask).to(query.dtype)


def working(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are computed: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class Pairs(NamedTuple):
    """Queries and keys whose weights are wanted one by one: ``n_q n_k`` numbers a head."""

    query: Tensor
    key: Tensor
    query_mask: Tensor | None
    key_mask: Tensor | None
    hash_code_len: int
    grad: Grad

    def expected(self) -> Tensor:
        """``E_ij``, in float32 at least."""
        query, key = (x.to(working(x.dtype)) for x in (self.query, self.key))
        return expected_weights(query, key, self.hash_code_len, query_mask=self.query_mask, key_mask=self.key_mask)

    def sampled(
        self, query_hash_code: Tensor, key_hash_code: Tensor, oversample: int = 0, backward_num_hash: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """``C_ij``, what the collisions of the codes count, in float32 at least: in the output, and
        in the gradients of query and key; see `yoso_core.lsh_attention_backward`.
        """
        used = self._collision_rate(query_hash_code, key_hash_code, oversample)
        if oversample == 0 and backward_num_hash in (None, query_hash_code.shape[-1]):
            return used, used
        how = self.hash_code_len, oversample, backward_num_hash
        return used, self._collision_rate(plain_codes(query_hash_code, *how), plain_codes(key_hash_code, *how), 0)

    def _collision_rate(self, query_hash_code: Tensor, key_hash_code: Tensor, oversample: int) -> Tensor:
        num_hash = query_hash_code.shape[-1]
        shape = (*query_hash_code.shape[:-1], key_hash_code.shape[-2])
        count = torch.zeros(shape, dtype=working(self.query.dtype), device=self.query.device)
        for hash in range(num_hash):
            count = count + agreement(query_hash_code[..., hash], key_hash_code[..., hash], self.hash_code_len, oversample).to(count.dtype)
        return _masked_pairs(count / num_hash, self.query_mask, self.key_mask)

    def slope(self, weights: Tensor) -> Tensor:
        """``C_ij w_ij``, how a weight moves with the cosine of its pair; see
        `yoso_core.reference.gradient_factor`.
        """
        if self.grad == "lower_bound":
            return weights * (self.hash_code_len / 2)
        theta = _angles(*self._unit())
        return weights * self.hash_code_len / ((math.pi - theta).clamp_min(1e-3) * torch.sin(theta).clamp_min(1e-3))

    def in_graph(self, weights: Tensor, gradient_weights: Tensor) -> Tensor:
        """``weights`` as they are, with ``slope(gradient_weights)`` as their derivative by the
        cosine.
        """
        q, k = self._unit()
        cosine = q @ k.mT
        return weights.detach() + self.slope(gradient_weights).detach() * (cosine - cosine.detach())

    def moved_rows(self, weights: Tensor, of_vectors: Tensor, value: Tensor, tangents: tuple[Tensor | None, ...]) -> Tensor:
        """``sum_j dC_ij v_j + C_ij dv_j`` for the tangents of query, key and value; ``of_vectors``
        are the weights whose slope is meant.
        """
        moved_query, moved_key, moved_value = tangents
        q, k = self._unit()
        moved_cosine = torch.zeros_like(of_vectors)
        if moved_query is not None:
            moved_cosine = moved_cosine + unit_tangent(self.query, moved_query, self.query_mask) @ k.mT
        if moved_key is not None:
            moved_cosine = moved_cosine + q @ unit_tangent(self.key, moved_key, self.key_mask).mT
        rows = (self.slope(of_vectors) * moved_cosine) @ self.kept(value)
        return rows if moved_value is None else rows + weights @ self.kept(moved_value)

    def kept(self, value: Tensor) -> Tensor:
        """The values in the precision of the weights, zeros where a key is masked."""
        value = value.to(working(self.query.dtype))
        return value if self.key_mask is None else value.masked_fill((self.key_mask == 0).unsqueeze(-1), 0)

    def _unit(self) -> tuple[Tensor, Tensor]:
        return unit_rows(self.query, self.query_mask), unit_rows(self.key, self.key_mask)


def agreement(query_code: Tensor, key_code: Tensor, hash_code_len: int, oversample: int) -> Tensor:
    """What two codes of one hash count, for all pairs of ``(..., n_q)`` and ``(..., n_k)``: 1 where
    they are equal, less where they nearly are; see `yoso_core.reference.smoothing`.

    >>> agreement(torch.tensor([0]), torch.tensor([0, 1, 3, 7]), hash_code_len=2, oversample=1)
    tensor([[1.0000, 0.3333, 0.0000, 0.0000]])
    """
    if oversample == 0:
        return (query_code.unsqueeze(-1) == key_code.unsqueeze(-2)).float()
    differing = query_code.unsqueeze(-1) ^ key_code.unsqueeze(-2)
    distance = torch.stack([(differing >> bit) & 1 for bit in range(hash_code_len + oversample)]).sum(dim=0)
    counts = torch.zeros_like(distance, dtype=torch.float32)
    for r, weight in enumerate(smoothing_weights(hash_code_len, oversample)):
        counts = torch.where(distance == r, weight, counts)
    return counts


def _angles(unit_query: Tensor, unit_key: Tensor) -> Tensor:
    """Angles between unit vectors, ``(..., n_q, n_k)``; a right angle where both are zero.

    The arccos of a cosine near 1 would lose the angle. From ``|q - k|`` and ``|q + k|`` it is
    exact.
    """
    difference, total = (torch.cdist(unit_query, other, compute_mode="donot_use_mm_for_euclid_dist") for other in (unit_key, -unit_key))
    both_zero = difference + total == 0
    return 2 * torch.atan2(difference.masked_fill(both_zero, 1), total.masked_fill(both_zero, 1))


def _masked_pairs(weights: Tensor, query_mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Zeros in the rows of masked queries and the columns of masked keys."""
    for mask, dim in ((query_mask, -1), (key_mask, -2)):
        if mask is not None:
            weights = weights.masked_fill((mask == 0).unsqueeze(dim), 0)
    return weights


def unit_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Rows of length one, in float32 at least. A zero row and a masked row become zeros."""
    x, largest = _kept_wide(x, mask)
    x = x.masked_fill(largest == 0, 0)  # a row without a direction has no gradient
    return torch.nn.functional.normalize(x / largest.clamp_min(torch.finfo(x.dtype).tiny), dim=-1)


def unit_tangent(x: Tensor, tangent: Tensor, mask: Tensor | None) -> Tensor:
    """How `unit_rows` moves with ``x``: ``(dx - (dx . u) u) / |x|`` for unit ``u``; zero for a zero
    row and for a masked one.
    """
    x, largest = _kept_wide(x, mask)
    scale = largest.masked_fill(largest == 0, 1)
    length = torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)
    unit = unit_rows(x, None)
    tangent = _kept_wide(tangent, mask)[0] / scale
    across = tangent - (tangent * unit).sum(dim=-1, keepdim=True) * unit
    return (across / length.masked_fill(length == 0, 1)).masked_fill(largest == 0, 0)


def _kept_wide(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``x`` in float32 at least with zeros in masked rows, and the largest entry of every row, so
    that rows divided by it have squares that neither overflow nor vanish.
    """
    if mask is not None:
        x = x.masked_fill((mask == 0).unsqueeze(-1), 0)
    x = x.to(working(x.dtype))
    return x, x.detach().abs().amax(dim=-1, keepdim=True)
