"""As many hashes as an error asks for: groups of them, one after the other.

The mean over all hashes is the mean of the groups' means, and the squares around it add up too. So
rows and errors of all groups together are those of one call with all of their hashes, and no group
is kept.
"""

import math
import sys
from typing import Any

from yoso_core import checks, ops
from yoso_core.arrays import Array, one_caller
from yoso_core.reference.normalize import TINY_NORM

MOST_GROUPS = 16
"""Where the caller names no ``max_num_hash``: a quarter of the error of one group."""


def yoso_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    num_hash: int,
    target_error: float,
    quantile: float,
    max_num_hash: int | None,
    rng: Any,
    use_expectation: bool,
    normalize_output: bool,
    **options: Any,
) -> tuple[Array, Array, int]:
    """`yoso_core.yoso_attention` with ``target_error``, whose arguments these are.

    Returns ``(out, error, num_hash_used)``.
    """
    target, share = checks.positive("target_error", target_error), checks.positive("quantile", quantile, 1)
    for name in ("signs", "planes"):
        if options.pop(name) is not None:
            raise ValueError(f"{name}: target_error draws every group of hashes from rng; leave {name} out")
    size, _ = checks.hash_numbers(num_hash, options["hash_code_len"])
    checks.spread(size, use_expectation, asked_by="target_error")
    most = MOST_GROUPS * size if max_num_hash is None else checks.integer("max_num_hash", max_num_hash, size)
    masks = {name: options[name] for name in ("query_mask", "key_mask")}
    xp = sys.modules[one_caller({"query": query, "key": key, "value": value}, **masks).library]
    checks.floating("value", value)
    wide = value if checks.dtype_name(value) in ("float32", "float64") else _as(xp, value, "float32")  # rows are rounded once, at the end
    draw, groups = checks.generator("rng", rng), _Groups(xp, size, value)
    while True:
        found = ops.yoso_attention(query, key, wide, num_hash=size, rng=draw, normalize_output=False, return_error=True, **options)
        groups.add(*found)
        error = groups.error()
        counted = _counted(xp, error, **masks)
        there = int((counted & (error <= target)).sum())
        if there >= share * int(counted.sum()) or groups.num_hash + size > most:
            break
    if masks["query_mask"] is not None:
        error = xp.where(masks["query_mask"] != 0, error, xp.zeros_like(error))
    return _as(xp, groups.rows(normalize_output), checks.dtype_name(value)), _as(xp, error, "float32"), groups.num_hash


class _Groups:
    """The sums of all groups so far, in float64, for values scaled to about 1."""

    def __init__(self, xp: Any, size: int, value: Array) -> None:
        self.xp = xp
        self.size = size
        self.number = 0
        self.mean: Any = 0.0
        self.squares: Any = 0.0
        """``sum_h |r_h - y|**2`` of every row, over all hashes."""
        finite = xp.where(xp.isfinite(value), abs(value), xp.zeros_like(value))
        largest = float(finite.max()) if 0 not in value.shape else 0.0
        self.scale = 2.0 ** math.frexp(largest)[1] if largest else 1.0

    @property
    def num_hash(self) -> int:
        return self.number * self.size

    def add(self, rows: Array, error: Array) -> None:
        """A group's mean rows and relative standard errors. A group in which a row is zero met no
        key there, and adds no squares of its own.
        """
        rows, error = _as(self.xp, rows, "float64") / self.scale, _as(self.xp, error, "float64")
        length = (rows**2).sum(-1)
        none = length == 0
        within = self.xp.where(none, self.xp.zeros_like(error), error) ** 2 * length * (self.size * (self.size - 1))
        self.number += 1
        moved = rows - self.mean
        self.mean = self.mean + moved / self.number
        between = (moved**2).sum(-1) * (self.size * (self.number - 1) / self.number)
        self.squares = self.squares + within + between

    def error(self) -> Array:
        """As `yoso_core.reference.attention.standard_error`, over all hashes so far."""
        length = (self.mean**2).sum(-1)
        some = length != 0  # NaN too
        relative = self.squares / self.xp.where(some, length, self.xp.ones_like(length)) / (self.num_hash * (self.num_hash - 1))
        return self.xp.where(some, relative**0.5, self.xp.full_like(length, math.inf))

    def rows(self, normalize: bool) -> Array:
        """The mean over all hashes, scaled to unit length where that is wanted."""
        if not normalize:
            return self.mean * self.scale
        length = (self.mean**2).sum(-1)[..., None] ** 0.5
        tiny = length * self.scale <= TINY_NORM
        return self.xp.where(tiny, self.xp.zeros_like(self.mean), self.mean / self.xp.where(tiny, self.xp.ones_like(length), length))


def _counted(xp: Any, error: Array, query_mask: Array | None, key_mask: Array | None) -> Array:
    """The rows that more hashes can bring nearer: kept, with a key to meet, and finite."""
    counted = ~xp.isnan(error)
    if query_mask is not None:
        counted = counted & (query_mask != 0)
    if key_mask is not None:
        counted = counted & (key_mask != 0).any(-1)[..., None]
    return counted


def _as(xp: Any, x: Array, dtype: str) -> Array:
    return x.to(getattr(xp, dtype)) if xp.__name__ == "torch" else x.astype(dtype)
