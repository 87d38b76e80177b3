"""Inputs for any operation, made from a seed: what `compare`, the tests and a curious reader start
from.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from yoso_core import checks, ops, reference
from yoso_core.arrays import Array
from yoso_core.registry import op_name
from yoso_core.truth import HASHES


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
    masked : add masks that keep about three of four queries and keys, shared over the heads.

    Raises
    ------
    ValueError : a size is out of range, the dtype is none of these, or the operation takes no
        masks.
    """
    name = op_name(op)
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
    checks.one_of("library", library, ("numpy", "torch"))
    if library == "torch":
        try:
            import torch
        except ImportError as error:
            raise ImportError("library: torch is not installed: pip install 'yoso-core[model]'") from error
    checks.one_of("dtype", dtype, ("float16", "float32", "float64", *(["bfloat16"] if library == "torch" else [])))
    if name == "hadamard_transform" and dim & (dim - 1):
        raise ValueError(f"dim: hadamard_transform needs a power of two, got {dim}")

    rng = np.random.default_rng(seed)
    leading = (batch, heads)
    key = rng.standard_normal((*leading, n_key, dim))
    query = 0.5 * rng.standard_normal((*leading, n, dim))
    if n_key:
        query += key[..., np.arange(n) % n_key, :]
    value = rng.standard_normal((*leading, n_key, value_dim))
    grad_out = rng.standard_normal((*leading, n, value_dim))
    signs = ops.sample_signs(num_hash, hash_code_len, dim, batch_shape=(heads,), rng=rng)
    planes = ops.sample_planes(num_hash, hash_code_len, dim, batch_shape=(heads,), rng=rng)
    masks = {"query_mask": rng.random((batch, 1, n)) < 0.75, "key_mask": rng.random((batch, 1, n_key)) < 0.75} if masked else {}

    def drawn(x: NDArray[Any]) -> Array:
        if library == "numpy":
            return x.astype(dtype) if x.dtype == np.float64 else x
        tensor = torch.from_numpy(x)
        return tensor.to(getattr(torch, dtype)) if x.dtype == np.float64 else tensor

    q, k, v, g = (drawn(x) for x in (query, key, value, grad_out))
    m, tau = num_hash, hash_code_len
    if name in ("hadamard_transform", *HASHES):
        if masked:
            raise ValueError(f"masked: {name} takes no masks")
        args: dict[str, tuple[Any, ...]] = {
            "hadamard_transform": (q,),
            "fast_hash": (q, drawn(signs), m, tau),
            "hyperplane_hash": (q, drawn(planes), m, tau),
        }
        return args[name], {}
    query_code, key_code = (drawn(reference.fast_hash(x.astype(np.float32), signs, m, tau)) for x in (query, key))
    args = {
        "lsh_cumulation": (query_code, key_code, v, 1 << tau),
        "lsh_weighted_cumulation": (query_code, q, key_code, k, v, 1 << tau),
        "expectation_attention": (q, k, v, tau),
        "expectation_attention_backward": (g, q, k, v, tau),
        "lsh_attention_backward": (g, q, k, v, query_code, key_code, tau),
        "yoso_attention": (q, k, v),
    }
    options = {mask: drawn(kept) for mask, kept in masks.items()}
    if name == "yoso_attention":
        options |= {"num_hash": m, "hash_code_len": tau, "signs": drawn(signs)}
    return args[name], options
