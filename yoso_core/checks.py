"""Checks of arguments. Every error names the argument, what it got and what it needs."""

import math
import operator
from collections.abc import Sequence

import numpy as np

from yoso_core.arrays import Array
from yoso_core.reference.hashing import LAYOUTS

MAX_CODE_LEN = 30
"""Codes are int32, and ``2**tau`` must be one too."""

_FLOATS = ("float16", "bfloat16", "float32", "float64")


def dtype_name(x: Array) -> str:
    """``"float32"`` for NumPy's, CuPy's and torch's alike."""
    return str(x.dtype).removeprefix("torch.")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int within ``[low, high]``; bools and floats are refused."""
    if isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: need an integer, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: need an integer, got {type(value).__name__} {value!r}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name}: need an integer {bounds}, got {number}")
    return number


def positive(name: str, value: object, most: float = math.inf) -> float:
    """``value`` as a float above 0 and up to ``most``; bools and what is no number are refused."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name}: need a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not 0 < number <= most:
        raise ValueError(f"{name}: need a number above 0{'' if most == math.inf else f' and up to {most:g}'}, got {number:g}")
    return number


def generator(name: str, rng: object) -> np.random.Generator:
    """A generator from a generator, an int seed, or ``None`` for fresh entropy."""
    if rng is None or isinstance(rng, np.random.Generator):
        return np.random.default_rng(rng)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        return np.random.default_rng(integer(name, rng, 0))
    raise TypeError(f"{name}: need a numpy.random.Generator, an int seed or None, got {type(rng).__name__}")


def hash_numbers(num_hash: object, hash_code_len: object) -> tuple[int, int]:
    return integer("num_hash", num_hash, 1), integer("hash_code_len", hash_code_len, 1, MAX_CODE_LEN)


def oversample(value: object, hash_code_len: int) -> int:
    return integer("oversample", value, 0, MAX_CODE_LEN - hash_code_len)


def spread(num_hash: int, use_expectation: object, asked_by: str = "return_error") -> None:
    """Hashes that differ from each other, of which an error can be told."""
    if use_expectation:
        raise ValueError(f"{asked_by}: the expectation is no estimate and has no error; leave out use_expectation=True or {asked_by}")
    if num_hash < 2:
        raise ValueError(f"{asked_by}: the spread between hashes needs num_hash of at least 2, got {num_hash}")


def backward_num_hash(value: object, num_hash: int) -> int | None:
    return None if value is None else integer("backward_num_hash", value, 1, num_hash)


def draw(num_hash: object, hash_code_len: object, dim: object, batch_shape: object) -> tuple[int, int, int, tuple[int, ...]]:
    """The sizes of a draw of signs or planes."""
    if not isinstance(batch_shape, tuple):
        raise TypeError(f"batch_shape: need a tuple of integers, got {type(batch_shape).__name__}")
    numbers = *hash_numbers(num_hash, hash_code_len), integer("dim", dim, 1)
    return *numbers, tuple(integer("batch_shape", size, 0) for size in batch_shape)


def floating(name: str, x: Array, *, ndim: int = 2, same_as: tuple[str, Array] | None = None) -> None:
    """A float array of at least ``ndim`` dims, in the dtype of another where one is named."""
    dtype = dtype_name(x)
    if dtype not in _FLOATS or not getattr(x.dtype, "isnative", True):
        raise TypeError(f"{name}: need one of {', '.join(_FLOATS)} in native byte order, got {x.dtype}")
    if x.ndim < ndim:
        raise ValueError(f"{name}: need at least {ndim} dimensions, got shape {tuple(x.shape)}")
    if same_as is not None and dtype != dtype_name(same_as[1]):
        raise TypeError(f"{name}: need the dtype of {same_as[0]}, {dtype_name(same_as[1])}, got {dtype}")


def same_precision(name: str, x: Array, other_name: str, other: Array) -> None:
    """float64 goes with float64 alone; the others may be mixed, since all of them are computed in
    float32.
    """
    if (dtype_name(x) == "float64") != (dtype_name(other) == "float64"):
        raise TypeError(f"{name}: {dtype_name(x)} does not go with {other_name} of {dtype_name(other)}; convert one of them")


def vectors(name: str, x: Array, *, same_as: tuple[str, Array] | None = None) -> None:
    """Float ``(..., n, d)`` with ``d >= 1``."""
    floating(name, x, same_as=same_as)
    if x.shape[-1] < 1:
        raise ValueError(f"{name}: vectors need at least one coordinate, got shape {tuple(x.shape)}")


def size(name: str, x: Array, axis: int, needed: int, why: str) -> None:
    if x.shape[axis] != needed:
        raise ValueError(f"{name}: need {needed} at axis {axis} ({why}), got shape {tuple(x.shape)}")


def leading(name: str, x: Array, needed: Sequence[int], why: str) -> None:
    """The batch and head dims, all but the last two."""
    if tuple(x.shape[:-2]) != tuple(needed):
        raise ValueError(f"{name}: need leading dims {tuple(needed)} ({why}), got shape {tuple(x.shape)}")


def broadcastable(name: str, x: Array, tail: Sequence[int], against: Sequence[int], why: str) -> None:
    """Shape ``(*batch, *tail)`` where ``batch`` broadcasts against the leading dims ``against``."""
    shape = tuple(x.shape)
    batch = shape[: len(shape) - len(tail)]
    if len(shape) < len(tail) or shape[len(batch) :] != tuple(tail):
        raise ValueError(f"{name}: need shape (*batch, {', '.join(map(str, tail))}) ({why}), got {shape}")
    if len(batch) > len(against) or any(b not in (1, a) for b, a in zip(batch[::-1], tuple(against)[::-1], strict=False)):
        raise ValueError(f"{name}: batch dims {batch} do not broadcast against the leading dims {tuple(against)}")


def mask(name: str, x: Array | None, rows: Sequence[int], of: str) -> None:
    """Bool or integer, as many dims as ``rows = (..., n)``, each equal or 1."""
    if x is None:
        return
    dtype = dtype_name(x)
    if not (dtype == "bool" or dtype.startswith(("int", "uint"))):
        raise TypeError(f"{name}: need bool or integer with nonzero = keep, got {dtype} (an additive mask means the opposite)")
    shape, rows = tuple(x.shape), tuple(rows)
    if len(shape) != len(rows) or any(s not in (1, r) for s, r in zip(shape, rows, strict=True)):
        raise ValueError(f"{name}: need {len(rows)} dims, each that of {of} {rows} or 1, got shape {shape}")


def codes(name: str, x: Array, *, num_hash: int | None = None) -> None:
    """int32 ``(..., n, m)``."""
    if dtype_name(x) != "int32" or not getattr(x.dtype, "isnative", True):
        raise TypeError(f"{name}: need int32 hash codes, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f"{name}: need shape (..., n, num_hash) with num_hash >= 1, got {tuple(x.shape)}")
    if num_hash is not None:
        size(name, x, -1, num_hash, "num_hash of query_hash_code")


def codes_in_range(name: str, x: Array, capacity: int) -> None:
    """Every code within ``[0, hashtable_capacity)``, masked or not."""
    if 0 in x.shape:
        return
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= capacity:
        raise ValueError(f"{name}: codes must lie in [0, hashtable_capacity = {capacity}), got {low} to {high}")


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: need one of {', '.join(map(repr, allowed))}, got {value!r}")


def rotations(name: str, layout: object, wanted: object, least: int) -> int | None:
    """The rotations of a chain, of which there must be enough; ``None`` chooses. ``name`` is the
    argument that says the layout.
    """
    one_of(name, layout, LAYOUTS)
    if wanted is None:
        return None
    if layout != "chained":
        raise ValueError(f"rotations: a chain has them, {name}={layout!r} has parts; leave it None")
    return integer("rotations", wanted, least)


def signs(x: Array) -> None:
    if dtype_name(x) != "int8":
        raise TypeError(f"signs: need int8 of +1 and -1 as sample_signs draws them, got {x.dtype}")
