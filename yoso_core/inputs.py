"""Inputs for any operation, made from a seed: what `compare`, the tests and a curious reader start
from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from yoso_core import checks, ops, reference
from yoso_core.memory import need_memory
from yoso_core.operations import Operation, Sizes, operation_of


def example_inputs(
    op: str | Callable[..., Any],
    *,
    batch: int = 1,
    heads: int = 2,
    n: int = 256,
    n_key: int | None = None,
    dim: int = 64,
    value_dim: int | None = None,
    num_hash: int = 32,
    hash_code_len: int = 8,
    oversample: int | None = None,
    dtype: str = "float32",
    masked: bool = False,
    seed: int = 0,
    library: Literal["numpy", "torch"] = "numpy",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` for an operation, so that ``getattr(yoso_core, op)(*args, **kwargs)``
    runs. The same seed gives the same inputs.

    Query ``i`` is key ``i`` (modulo ``n_key``) plus noise, at an angle of about 27 degrees, so that
    buckets meet.

    Parameters
    ----------
    batch, heads : the leading dims.
    n, n_key : number of queries, and of keys (``None``: as many).
    dim, value_dim : ``d``, and ``d_v`` (``None``: the same).
    dtype : ``"float16"``, ``"float32"``, ``"float64"``; with ``library="torch"`` also
        ``"bfloat16"``.
    num_hash, hash_code_len : ``m`` and ``tau``.
    oversample : ``s``: codes have ``tau + s`` bits. ``None``: 0, but 2 for `smooth_table`.
    masked : add masks that keep about three of four queries and keys, shared over the heads.

    Raises
    ------
    ValueError : a size is out of range, the dtype is none of these, or the operation takes no
        masks.
    MemoryError : the inputs, and a call that does the least that it must, do not fit in memory.

    >>> args, kwargs = example_inputs("fast_hash", n=5, dim=16)
    >>> [getattr(x, "shape", x) for x in args]
    [(1, 2, 5, 16), (2, 19, 16), 32, 8]
    """
    operation = operation_of(op)
    n_key, value_dim = n if n_key is None else n_key, dim if value_dim is None else value_dim
    for size, number, low in (
        ("batch", batch, 0),
        ("heads", heads, 0),
        ("n", n, 0),
        ("n_key", n_key, 0),
        ("dim", dim, 1),
        ("value_dim", value_dim, 1),
        ("seed", seed, 0),
    ):
        checks.integer(size, number, low)
    checks.hash_numbers(num_hash, hash_code_len)
    oversample = checks.oversample(operation.oversample if oversample is None else oversample, hash_code_len)
    checks.one_of("library", library, ("numpy", "torch"))
    if library == "torch":
        try:
            import torch
        except ImportError as error:
            raise ImportError("library: torch is not installed: pip install 'yoso-core[model]'") from error
    checks.one_of("dtype", dtype, ("float16", "float32", "float64", *(["bfloat16"] if library == "torch" else [])))
    if operation.power_of_two and dim & (dim - 1):
        raise ValueError(f"dim: {operation.name} needs a power of two, got {dim}")
    if masked and not operation.takes_masks:
        raise ValueError(f"masked: {operation.name} takes no masks")

    shapes = {"batch": batch, "heads": heads, "n": n, "n_key": n_key, "dim": dim, "value_dim": value_dim}
    parts = {"num_hash": num_hash, "hash_code_len": hash_code_len, "oversample": oversample}
    needed = _least_bytes(operation, **shapes, **parts)
    need_memory(_largest(shapes | parts), needed)
    rng = np.random.default_rng(seed)
    leading = (batch, heads)
    key = rng.standard_normal((*leading, n_key, dim))
    query = 0.5 * rng.standard_normal((*leading, n, dim))
    if n_key:
        query += key[..., np.arange(n) % n_key, :]
    value = rng.standard_normal((*leading, n_key, value_dim))
    grad_out = rng.standard_normal((*leading, n, value_dim))
    signs = ops.sample_signs(num_hash, hash_code_len + oversample, dim, batch_shape=(heads,), rng=rng)
    planes = ops.sample_planes(num_hash, hash_code_len + oversample, dim, batch_shape=(heads,), rng=rng)
    masks = {"query_mask": rng.random((batch, 1, n)) < 0.75, "key_mask": rng.random((batch, 1, n_key)) < 0.75} if masked else {}
    arguments = operation.example_inputs(
        _Drawn(num_hash, hash_code_len, oversample, query, key, value, grad_out, signs, planes, masks, seed)
    )

    def drawn(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        if library == "numpy":
            return x.astype(dtype) if x.dtype == np.float64 else x
        tensor = torch.from_numpy(x)
        return tensor.to(getattr(torch, dtype)) if x.dtype == np.float64 else tensor

    given = {name: drawn(x) for name, x in arguments.items()}
    return tuple(given.pop(name) for name in operation.positional), given


def _least_bytes(
    operation: Operation,
    *,
    batch: int,
    heads: int,
    n: int,
    n_key: int,
    dim: int,
    value_dim: int,
    num_hash: int,
    hash_code_len: int,
    oversample: int,
) -> int:
    """What is drawn, in float64 as NumPy draws it, and what a call in float64 reads and writes."""
    rows, rows_key = batch * heads * n, batch * heads * n_key
    vectors = (rows + rows_key) * (dim + value_dim)
    planes = heads * dim * num_hash * (hash_code_len + oversample)
    sizes = Sizes(max(rows, rows_key), max(n, n_key), max(dim, value_dim), num_hash, hash_code_len, 8, oversample)
    return 8 * (vectors + planes) + operation.least_bytes(sizes)


def _largest(sizes: Mapping[str, int]) -> str:
    """The argument to blame where there is no room: that which is furthest from its default."""
    defaults = {name: parameter.default for name, parameter in signature(example_inputs).parameters.items()}
    defaults |= {"n_key": defaults["n"], "value_dim": defaults["dim"], "oversample": 2}
    return max(sizes, key=lambda name: sizes[name] / defaults[name])


@dataclass(frozen=True)
class _Drawn:
    """`yoso_core.operations.Ingredients`, where codes are real ones: those of query and key."""

    num_hash: int
    hash_code_len: int
    oversample: int
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    grad_out: NDArray[Any]
    signs: NDArray[Any]
    planes: NDArray[Any]
    masks: Mapping[str, NDArray[Any]]
    seed: int

    @property
    def vectors(self) -> NDArray[Any]:
        return self.query

    @property
    def draw(self) -> Mapping[str, Any]:
        return {"signs": self.signs}

    @property
    def query_hash_code(self) -> NDArray[Any]:
        return self._codes(self.query)

    @property
    def key_hash_code(self) -> NDArray[Any]:
        return self._codes(self.key)

    @property
    def table(self) -> NDArray[Any]:
        rows = 1 << (self.hash_code_len + self.oversample)
        return np.random.default_rng([self.seed, rows]).standard_normal((*self.value.shape[:-2], rows, self.value.shape[-1]))

    def _codes(self, vectors: NDArray[Any]) -> NDArray[Any]:
        return reference.fast_hash(vectors.astype(np.float32), self.signs, self.num_hash, self.hash_code_len + self.oversample)
