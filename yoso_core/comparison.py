"""Every variant of an operation on the same inputs: how far from the truth, whether repeatable, how fast."""

import hashlib
import inspect
import json
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from yoso_core import checks, ops, reference
from yoso_core.arrays import Array, library_of, one_caller
from yoso_core.reference.arrays import full_mask
from yoso_core.reference.expectation import Grad
from yoso_core.registry import Kernel, Variant, op_name, variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

Arrays = tuple[NDArray[Any], ...]
"""One array per output of an operation."""

HASHES = {"fast_hash": 0.0, "hyperplane_hash": 1e-3}
"""Share of codes that may differ from the definition: none where the order of additions is part of the definition, few where it is not."""

_OUTPUTS = {
    "hadamard_transform": ("x",),
    "lsh_cumulation": ("value",),
    "lsh_weighted_cumulation": ("value",),
    "expectation_attention": ("value",),
    "expectation_attention_backward": ("query", "key", "value"),
    "lsh_attention_backward": ("query", "key", "value"),
    "yoso_attention": ("value",),
}
"""The arguments whose dtypes the outputs have."""

# ---------------------------------------------------------------- inputs


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
    """``(args, kwargs)`` for an operation, so that ``getattr(yoso_core, op)(*args, **kwargs)`` runs. The same seed gives the same inputs.

    Query ``i`` is key ``i`` (modulo ``n_key``) plus noise, at an angle of about 27 degrees, so that buckets meet.

    Parameters
    ----------
    n, n_key : number of queries, and of keys (``None``: as many).
    dim, value_dim : ``d``, and ``d_v`` (``None``: the same).
    dtype : ``"float16"``, ``"float32"``, ``"float64"``; with ``library="torch"`` also ``"bfloat16"``.
    masked : add masks that keep about three of four queries and keys, shared over the heads.

    Raises
    ------
    ValueError : a size is out of range, the dtype is none of these, or the operation takes no masks.
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


# ---------------------------------------------------------------- truth and tolerance


def truth(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arrays:
    """What is right: the definition, run in float64 on the inputs as they are; one NumPy array per output.

    Hash codes come from the definition in the caller's own dtype (half types in float32), since a code is a matter of rounding. So do
    the codes inside a sampled `yoso_attention`: its truth is the float64 sum over the collisions that the caller's dtype makes.
    Entries beyond the range of the output's dtype are infinite, as they are when rounded.
    """
    name = op_name(op)
    arguments = _bind(name, args, kwargs)
    found = _define(name, arguments if name in HASHES else _cast(name, arguments, np.float64))
    if name in HASHES:
        return found
    limits = [float(_finfo(arguments[like]).max) for like in _OUTPUTS[name]]
    return tuple(np.where(np.abs(x) > limit, np.copysign(np.inf, x), x) for x, limit in zip(found, limits, strict=True))


def tolerance(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, true: Arrays | None = None) -> Arrays:
    """How far a variant may be from the truth, entry by entry: ``(2 u + 4) ulp`` of the terms that were added up.

    *The terms*, ``1/m sum |terms|``, are the definition in float64 with every number that is summed replaced by its absolute value:
    rounding is relative to them, not to the sum, which may cancel. For rows scaled to unit length they are divided by the row's
    length before scaling: 1 for a row in which nothing cancels, more for one that is shorter than its terms. An expected weight counts with
    what a rounded cosine moves it by.

    *u* is what the definition itself loses in the caller's dtype: its largest error by the terms, in ulp, over all entries. A variant may
    lose twice as much, for it adds in another order, plus 4 ulp, for where the definition is right by luck. Nothing wider than float64 can
    judge float64, so there *u* is measured on the inputs rounded to float32; in ulp it is the same.

    An *ulp* is that of the output's dtype (half types are computed in float32 and rounded once). Where no term is added the result
    must be exact. For hashes the one number is the share of codes that may differ: none, or 1e-3 for hyperplanes.

    Parameters
    ----------
    true : the result of `truth` for the same arguments, if it is at hand.
    """
    name = op_name(op)
    if name in HASHES:
        return (np.array(HASHES[name]),)
    arguments = _bind(name, args, kwargs)
    true = truth(name, (), arguments) if true is None else true
    terms = _terms(name, arguments)
    judged, judged_true, judged_terms = arguments, true, terms
    if any(checks.dtype_name(arguments[like]) == "float64" for like in _OUTPUTS[name]):
        with np.errstate(over="ignore"):  # numbers beyond float32 give no finite error, and count for nothing
            judged = _cast(name, arguments, np.float32, all_floats=True)
        judged_true, judged_terms = truth(name, (), judged), _terms(name, judged)
    own = _outputs(_call(name, judged, _definition(name).name))
    allowed = []
    for i, like in enumerate(_OUTPUTS[name]):
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = np.nan_to_num(_errors(own[i], judged_true[i]) / judged_terms[i], nan=0, posinf=0)
        ulps = np.max(lost, initial=0) / float(_finfo(judged[like]).eps)
        allowed.append((2 * ulps + 4) * float(_finfo(arguments[like]).eps) * terms[i])
    return tuple(allowed)


def _bind(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. The signs of a sampled attention are drawn here, so that every variant is given the same."""
    if "variant" in kwargs:
        raise TypeError("variant: every variant runs; name those to run in names=[...]")
    arguments = dict(inspect.signature(getattr(ops, op)).bind(*args, **kwargs).arguments)
    rng = arguments.pop("rng", None)
    if op == "yoso_attention" and not arguments.get("use_expectation"):
        query = arguments["query"]
        if arguments.get("signs") is None and arguments.get("planes") is None:
            caller = one_caller({"query": query})
            checks.vectors("query", query)
            numbers = arguments.get("num_hash", 32), arguments.get("hash_code_len", 8)
            signs = ops.sample_signs(*numbers, query.shape[-1], batch_shape=tuple(query.shape[-3:-2]), rng=rng)
            arguments["signs"] = caller.from_numpy(signs)
    return arguments


def _call(op: str, arguments: Mapping[str, Any], variant: str) -> Any:
    return getattr(ops, op)(**arguments, variant=variant)


def _definition(op: str) -> Kernel:
    return next(variant.kernel for variant in variants(op) if variant.definition)


def _define(op: str, arguments: Mapping[str, Any]) -> Arrays:
    """The definition's own function on NumPy arrays: it may be given dtypes that the checked one refuses to mix."""
    return _outputs(_definition(op).load()(**{name: _numpy(x) for name, x in arguments.items() if name != "validate"}))


def _outputs(result: Any) -> Arrays:
    return tuple(_numpy(x) for x in result) if isinstance(result, tuple) else (_numpy(result),)


def _numpy(x: Any) -> Any:
    """An array of any library as NumPy; anything else as it is."""
    return x if library_of(x) is None else one_caller({"array": x}).to_numpy(x)


def _cast(op: str, arguments: Mapping[str, Any], dtype: type[np.floating[Any]], *, all_floats: bool = False) -> dict[str, Any]:
    """Every float array in ``dtype``, except, unless ``all_floats``, those that a sampled attention hashes: codes stay as they are."""
    sampled = op == "yoso_attention" and not arguments.get("use_expectation")
    hashed = ("query", "key", "planes") if sampled and not all_floats else ()
    arrays = {name: _numpy(x) for name, x in arguments.items()}
    return {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" and name not in hashed else x
        for name, x in arrays.items()
    }


def _finfo(x: Array) -> Any:
    return np.finfo(x.dtype) if library_of(x) == "numpy" else sys.modules["torch"].finfo(x.dtype)


def _terms(op: str, arguments: Mapping[str, Any]) -> Arrays:
    """``1/m sum |terms|`` in float64; no less than the smallest normal number where there is any term, and 0 where there is none."""
    wide = _cast(op, arguments, np.float64)
    cosine_ulp = min(1.0, 2.0**-23 / float(_finfo(arguments[_OUTPUTS[op][-1]]).eps))  # half types are computed in float32
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if op == "hadamard_transform":
            x = wide["x"]
            terms: Arrays = (np.broadcast_to(np.sum(np.abs(x), axis=-1, keepdims=True), x.shape),)
        elif op in ("expectation_attention_backward", "lsh_attention_backward"):
            terms = _gradient_terms(**{name: x for name, x in wide.items() if name != "validate"}, cosine_ulp=cosine_ulp)
        elif op == "expectation_attention":
            terms = (_expectation_terms(**wide, cosine_ulp=cosine_ulp),)
        elif op == "yoso_attention":
            plain, given = wide | {"normalize_output": False}, ("query", "key", "value", "hash_code_len", "query_mask", "key_mask")
            if wide.get("use_expectation"):
                terms = (_expectation_terms(**{name: wide[name] for name in given if name in wide}, cosine_ulp=cosine_ulp),)
            else:
                terms = _define(op, plain | {"value": np.abs(wide["value"])})
            if wide.get("normalize_output", True):
                size, length = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (*terms, *_define(op, plain)))
                terms = (np.broadcast_to(size / length, terms[0].shape),)
        else:
            summed = [name for name in ("value", "query_weight", "key_weight") if name in wide]
            terms = _define(op, wide | {name: np.abs(wide[name]) for name in summed})
    smallest = [float(_finfo(arguments[like]).tiny) for like in _OUTPUTS[op]]
    return tuple(np.where(x > 0, np.maximum(x, tiny), 0) for x, tiny in zip(terms, smallest, strict=True))


def _expected_weight_terms(unit_query: NDArray[Any], unit_key: NDArray[Any], hash_code_len: int, cosine_ulp: float) -> NDArray[Any]:
    """The expected weight, plus ``cosine_ulp`` times how far it moves with the cosine.

    A variant may take ``arccos`` of a cosine up to 0.99. What rounding the cosine costs is then no fault of its own: one ulp moves the
    weight by ``tau / pi (1 - theta / pi)**(tau - 1) / sin(theta)`` ulp. Nearer to 1 it must do better, and gets no such allowance.
    """
    cosine = unit_query @ unit_key.T
    theta = np.arccos(np.clip(cosine, -1, 1))
    slope = hash_code_len / np.pi * (1 - theta / np.pi) ** (hash_code_len - 1) / np.maximum(np.sin(theta), np.sqrt(1 - 0.99**2))
    return reference.expected_weight(theta, hash_code_len) + np.where(cosine < 0.991, cosine_ulp * slope, 0)


def _expectation_terms(
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    hash_code_len: int = 8,
    *,
    cosine_ulp: float,
    query_mask: NDArray[Any] | None = None,
    key_mask: NDArray[Any] | None = None,
) -> NDArray[Any]:
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    unit_query, unit_key = reference.l2_normalize(query), reference.l2_normalize(key)
    sums = np.zeros((*query.shape[:-1], value.shape[-1]))
    for head in np.ndindex(query.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        weight = _expected_weight_terms(unit_query[head][queries], unit_key[head][keys], hash_code_len, cosine_ulp)
        sums[head][queries] = weight @ np.abs(value[head][keys])
    return sums


def _gradient_terms(
    grad_out: NDArray[Any],
    query: NDArray[Any],
    key: NDArray[Any],
    value: NDArray[Any],
    query_hash_code: NDArray[Any] | None = None,
    key_hash_code: NDArray[Any] | None = None,
    hash_code_len: int = 8,
    *,
    cosine_ulp: float,
    grad: Grad = "lower_bound",
    query_mask: NDArray[Any] | None = None,
    key_mask: NDArray[Any] | None = None,
) -> Arrays:
    """The sums of the backward definitions with every term by its absolute value; the angles are those of the signed vectors."""
    keep_query, keep_key = full_mask(query_mask, query.shape[:-1]), full_mask(key_mask, key.shape[:-1])
    unit_query, unit_key = reference.l2_normalize(query), reference.l2_normalize(key)
    sums = grad_query, grad_key, grad_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for head in np.ndindex(query.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        q, k, g, v = unit_query[head][queries], unit_key[head][keys], np.abs(grad_out[head][queries]), np.abs(value[head][keys])
        if query_hash_code is None or key_hash_code is None:
            weight = _expected_weight_terms(q, k, hash_code_len, cosine_ulp)
        else:
            weight = reference.collision_rate(query_hash_code[head][queries], key_hash_code[head][keys])
        pull = weight * reference.gradient_factor(np.arccos(np.clip(q @ k.T, -1, 1)), hash_code_len, grad) * (g @ v.T)
        grad_query[head][queries], grad_key[head][keys], grad_value[head][keys] = pull @ np.abs(k), pull.T @ np.abs(q), weight.T @ g
    for total, x, unit in ((grad_query, query, unit_query), (grad_key, key, unit_key)):  # the tangent, by absolute values too
        along = np.sum(total * np.abs(unit), axis=-1, keepdims=True)
        total[...] = np.nan_to_num((total + along * np.abs(unit)) / np.linalg.norm(x, axis=-1, keepdims=True), nan=0, posinf=0)
    return sums


def _errors(result: NDArray[Any], true: NDArray[Any]) -> NDArray[Any]:
    """``|result - true|``; 0 where both are the same infinity or both NaN, infinite where one of them alone is not finite."""
    wide = result.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(wide - true), nan=np.inf, posinf=np.inf)
    return np.where((wide == true) | (np.isnan(wide) & np.isnan(true)), 0, distance)


# ---------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Row:
    """What one variant did."""

    variant: str
    definition: bool
    deterministic: bool
    """It promises the same bits for the same input."""
    reason: str | None = None
    """Why it cannot run here."""
    failure: str | None = None
    """The error that it raised."""
    agrees: bool = False
    """Within the tolerance in every run."""
    max_error: float | None = None
    """Largest absolute error, over all entries, outputs and runs."""
    rms_error: float | None = None
    """Root mean square error over the root mean square of the truth, the worst over outputs and runs."""
    tolerance_used: float | None = None
    """Largest error in units of what is allowed there."""
    codes_differing: int | None = None
    codes_share: float | None = None
    repeatable: bool | None = None
    """All runs gave the same bits."""
    median_seconds: float | None = None
    min_seconds: float | None = None
    max_seconds: float | None = None

    @property
    def verdict(self) -> Literal["agrees", "disagrees", "not repeatable", "failed", "cannot run"]:
        if self.reason is not None:
            return "cannot run"
        if self.failure is not None:
            return "failed"
        if not self.agrees:
            return "disagrees"
        return "agrees" if self.repeatable or not self.deterministic else "not repeatable"


@dataclass
class _Trial:
    """A variant while it is being compared."""

    variant: Variant
    results: dict[bytes, Arrays] = field(default_factory=dict)
    """Every result that differs in its bits, NaNs included."""
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def alive(self) -> bool:
        return self.variant.available and self.failure is None

    def run(self, op: str, arguments: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], *, timed: bool) -> None:
        try:
            start = time.perf_counter()
            result = _call(op, arguments, self.variant.name)
            seconds = time.perf_counter() - start
        except Exception as error:  # whatever a variant raises is its result, and belongs into the table
            self.failure = f"{type(error).__name__}: {error}"
            return
        outputs = _outputs(result)
        if [x.shape for x in outputs] != list(shapes):
            self.failure = f"returned shapes {[x.shape for x in outputs]}, the definition {list(shapes)}"
            return
        if timed:
            self.seconds.append(seconds)
        bits = hashlib.blake2b(b"".join(x.tobytes() for x in outputs)).digest()
        self.results.setdefault(bits, tuple(x.copy() for x in outputs))

    def row(self, op: str, true: Arrays, allowed: Arrays) -> Row:
        variant = self.variant
        about = (variant.name, variant.definition, variant.deterministic, variant.reason, self.failure)
        if not self.alive:
            return Row(*about)
        measured = [_measure(op, result, true, allowed) for result in self.results.values()]
        worst: dict[str, Any] = {name: max(m[name] for m in measured) for name in measured[0]}
        return Row(
            *about,
            agrees=worst["tolerance_used"] <= 1,
            repeatable=len(self.results) == 1,
            median_seconds=median(self.seconds),
            min_seconds=min(self.seconds),
            max_seconds=max(self.seconds),
            **worst,
        )


def _measure(op: str, result: Arrays, true: Arrays, allowed: Arrays) -> dict[str, float]:
    """The errors of one result, the worst over its outputs, as fields of `Row`."""
    if op in HASHES:
        differing, share = int(np.sum(result[0] != true[0])), float(np.mean(result[0] != true[0])) if true[0].size else 0.0
        used = share / float(allowed[0]) if allowed[0] else np.inf
        return {"codes_differing": differing, "codes_share": share, "tolerance_used": used if differing else 0.0}
    largest, relative, used = 0.0, 0.0, 0.0
    for x, right, limit in zip(result, true, allowed, strict=True):
        error = _errors(x, right)
        largest = max(largest, float(np.max(error, initial=0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            share_used = np.where(error > 0, np.nan_to_num(error / limit, nan=np.inf, posinf=np.inf), 0)
        used = max(used, float(np.max(share_used, initial=0)))
        if error.any():
            size = np.linalg.norm(right[np.isfinite(right)])
            relative = max(relative, float(np.linalg.norm(error) / size) if size else np.inf)
    return {"max_error": largest, "rms_error": relative, "tolerance_used": used}


@dataclass(frozen=True)
class Comparison:
    """The variants of one operation side by side: print it, or ask for `table`, `to_json` or `plot`."""

    op: str
    inputs: dict[str, str]
    """Every argument: dtype and shape of an array, the value of anything else."""
    repeats: int
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    """Versions and machine, as `environment` gives them."""

    @property
    def agrees(self) -> bool:
        """Every variant that can run here agrees with the definition and keeps its promises."""
        return all(row.verdict in ("agrees", "cannot run") for row in self.rows)

    def __str__(self) -> str:
        lines = [self._columns, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self._title, *table, *self.notes])

    def table(self) -> "Table":
        """As a table for `rich.print`, the definition marked ``=``. What a variant failed with is in `notes`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self._title), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold underline")
        for i, column in enumerate(self._columns):
            table.add_column(column.replace(" ", "\n"), justify="right" if i > 1 else "left", no_wrap=True)
        style = {"disagrees": "bold red", "failed": "bold red", "not repeatable": "bold red", "cannot run": "dim"}
        for row in self.rows:
            table.add_row(*self._cells(row), style=style.get(row.verdict))
        return table

    @property
    def notes(self) -> list[str]:
        """One line for each variant that failed or cannot run: what it said."""
        said = [(row, row.reason or row.failure) for row in self.rows]
        return [f"{row.variant} {row.verdict}: {text}" for row, text in said if text]

    @property
    def _title(self) -> str:
        return f"{self.op}({', '.join(f'{name}: {what}' for name, what in self.inputs.items())})"

    @property
    def _columns(self) -> tuple[str, ...]:
        errors = ("codes that differ", "share") if self.op in HASHES else ("largest error", "RMS error", "of limit")
        return ("variant", "verdict", *errors, "same bits", "median", "range")

    def _cells(self, row: Row) -> tuple[str, ...]:
        name = f"{row.variant} =" if row.definition else row.variant
        numbers: tuple[float | None, ...] = (row.codes_differing, row.codes_share)
        if self.op not in HASHES:
            numbers = (row.max_error, row.rms_error, row.tolerance_used)
        if row.median_seconds is None or row.min_seconds is None or row.max_seconds is None:
            return (name, row.verdict, *("-" for _ in self._columns[2:]))
        scale, _ = _unit(row.median_seconds)
        return (
            name,
            row.verdict,
            *("-" if number is None else f"{number:,}" if isinstance(number, int) else f"{number:.2g}" for number in numbers),
            "yes" if row.repeatable else "no",
            duration(row.median_seconds),
            f"{row.min_seconds / scale:.3g}-{row.max_seconds / scale:.3g}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers. A number that is not finite is the string ``"inf"``, since JSON has no other."""
        rows = [{**asdict(row), "verdict": row.verdict} for row in self.rows]
        return {
            "op": self.op,
            "agrees": self.agrees,
            "inputs": self.inputs,
            "repeats": self.repeats,
            "rows": [{name: "inf" if x == np.inf else x for name, x in row.items()} for row in rows],
            "environment": self.environment,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Error and time of every variant that ran, side by side; written to ``path`` if one is given.

        Needs matplotlib; raises ``ImportError`` without it, and ``ValueError`` for a file name whose ending it does not know.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot: matplotlib is not installed: pip install 'yoso-core[plots]'") from error

        figure = Figure(figsize=(11, 1.9 + 0.55 * max(len(self.rows), 2)), layout="constrained")
        errors, times = figure.subplots(1, 2, sharey=True)
        if self.op in HASHES:
            _plot_errors(errors, {"share of codes that differ": [row.codes_share for row in self.rows]})
        else:
            series = {"largest absolute": [row.max_error for row in self.rows], "RMS, relative": [row.rms_error for row in self.rows]}
            _plot_errors(errors, series)
        _plot_times(times, self.rows)
        labels = [row.variant + ("" if row.verdict == "agrees" else f"\n({row.verdict})") for row in self.rows]
        errors.set_yticks(range(len(labels)), labels)
        errors.set_ylim(len(labels) - 0.5, -0.5)
        inputs = ", ".join(f"{name}: {what}".replace(" ", "\N{NO-BREAK SPACE}") for name, what in self.inputs.items())
        figure.suptitle(textwrap.fill(f"{self.op}({inputs})", 120), fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


# Two of Okabe and Ito's colours, which stay apart for every kind of colour vision; the shapes differ as well.
_BLUE, _ORANGE = "#0072B2", "#E69F00"


def _plot_errors(axes: "Axes", series: Mapping[str, Sequence[float | None]]) -> None:
    """Dots on a log scale. Zero and infinity have no place on one: they stand at its edges, and say so."""
    finite = [x for values in series.values() for x in values if x and np.isfinite(x)]
    left, right = (min(finite) / 10, max(finite) * 10) if finite else (1e-9, 1e-6)
    lifts = (-0.13, 0.13) if len(series) > 1 else (0.0,)
    for (label, values), colour, marker, lift in zip(series.items(), (_BLUE, _ORANGE), "os", lifts, strict=False):
        shown = [(y + lift, value) for y, value in enumerate(values) if value is not None]
        edged = [left if value == 0 else min(value, right) for _, value in shown]
        axes.plot(edged, [y for y, _ in shown], marker, color=colour, markersize=8, label=label, clip_on=False, zorder=3)
        for y, value in shown:
            if value == 0:
                axes.annotate("exact", (left, y), (8, 0), textcoords="offset points", ha="left", va="center", fontsize=8)
            elif not np.isfinite(value):
                axes.annotate("not finite", (right, y), (-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("error against the definition in float64" if len(series) > 1 else next(iter(series)))
    axes.grid(axis="x", alpha=0.3)
    if len(series) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)


def _plot_times(axes: "Axes", rows: Sequence[Row]) -> None:
    axes.set_xscale("log")
    seconds: list[float] = []
    for y, row in enumerate(rows):
        if row.median_seconds is not None and row.min_seconds is not None and row.max_seconds is not None:
            whiskers = [[row.median_seconds - row.min_seconds], [row.max_seconds - row.median_seconds]]
            axes.errorbar(row.median_seconds, y, xerr=whiskers, fmt="o", color=_BLUE, markersize=8, capsize=5)
            axes.annotate(
                duration(row.median_seconds), (row.median_seconds, y), (0, 9), textcoords="offset points", ha="center", fontsize=8
            )
            seconds += row.min_seconds, row.max_seconds
    if seconds:  # whole decades, with room for a label at either end
        axes.set_xlim(10 ** np.floor(np.log10(min(seconds) / 1.5)), 10 ** np.ceil(np.log10(max(seconds) * 1.5)))
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.set_xlabel("time: median, smallest to largest")
    axes.grid(axis="x", alpha=0.3)


def _unit(seconds: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """``"12.3 ms"``: three digits in the unit that suits."""
    scale, unit = _unit(seconds)
    return f"{seconds / scale:.3g} {unit}"


def compare(
    op: str | Callable[..., Any],
    *args: Any,
    repeats: int = 5,
    names: Sequence[str] | None = None,
    progress: bool = False,
    **kwargs: Any,
) -> Comparison:
    """Run every variant of an operation on the same inputs: errors against the definition, bits, times.

    >>> print(yoso_core.compare("fast_hash"))  # doctest: +SKIP

    Parameters
    ----------
    op : the function, or its name.
    args, kwargs : the inputs, as for the function; without any, those of `example_inputs`. Where a sampled attention is given neither signs
        nor planes, signs are drawn once, and every variant gets them.
    repeats : timed runs of each, in turns, after one that is not timed (the first may compile).
    names : only these variants.
    progress : a bar on stderr, if it takes longer than a second or two.

    Returns
    -------
    A `Comparison`: a row for every variant, those that fail or cannot run among them. The errors are against `truth`; a variant agrees
    where they are within `tolerance` in every run.

    Raises
    ------
    ValueError, TypeError : no such operation or variant, or inputs that the function refuses.
    """
    name = op_name(op)
    checks.integer("repeats", repeats, 1)
    chosen = variants(name)
    if names is not None:
        known = [variant.name for variant in chosen]
        if isinstance(names, str) or not names:
            raise TypeError(f"names: need a list of variants of {name}, such as {known}, got {names!r}")
        for wanted in names:
            if wanted not in known:
                raise ValueError(f"names: {name} has no variant {wanted!r}; it has {', '.join(known)}")
        chosen = [variant for variant in chosen if variant.name in names]
    if not args and not kwargs:
        args, kwargs = example_inputs(name)
    arguments = _bind(name, args, kwargs)
    trials = [_Trial(variant) for variant in chosen]
    with _progress(3 + len(trials) * (repeats + 1), name, progress) as advance:
        definition = _call(name, arguments, _definition(name).name)  # refuses wrong inputs, for all variants
        shapes = [x.shape for x in _outputs(definition)]
        advance()
        true = truth(name, (), arguments)
        advance()
        allowed = tolerance(name, (), arguments, true=true)
        advance()
        for turn in range(repeats + 1):
            for trial in trials:
                if trial.alive:
                    trial.run(name, arguments, shapes, timed=turn > 0)
                advance()
    rows = tuple(trial.row(name, true, allowed) for trial in trials)
    return Comparison(name, _describe(arguments), repeats, rows, environment())


@contextmanager
def _progress(total: int, label: str, wanted: bool) -> Iterator[Callable[[], object]]:
    if not wanted:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, delay=1.5, leave=False, unit="run") as bar:
        yield bar.update


def _describe(arguments: Mapping[str, Any]) -> dict[str, str]:
    def shown(x: Any) -> str:
        return repr(x) if library_of(x) is None else f"{checks.dtype_name(x)} {tuple(x.shape)}"

    return {name: shown(x) for name, x in arguments.items() if x is not None}


def environment() -> dict[str, Any]:
    """The machine, and the version of what is loaded: numbers mean little without them."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    loaded = {name: sys.modules[name].__version__ for name in ("yoso_core", "numpy", "numba", "torch") if name in sys.modules}
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **loaded},
    }
