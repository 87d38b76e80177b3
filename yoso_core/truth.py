"""What is right, and how far from it rounding may take a result."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yoso_core import checks, ops, reference
from yoso_core.arrays import Array, library_of, one_caller
from yoso_core.reference.arrays import full_mask
from yoso_core.reference.expectation import Grad
from yoso_core.registry import Kernel, op_name, variants

Arrays = tuple[NDArray[Any], ...]
"""One array per output of an operation."""

HASHES = {"fast_hash": 0.0, "hyperplane_hash": 1e-3}
"""Share of codes that may differ from the definition: none where the order of additions is part of
the definition, few where it is not.
"""

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


def truth(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arrays:
    """What is right: the definition, run in float64 on the inputs as they are; one NumPy array per
    output.

    Hash codes come from the definition in the caller's own dtype (half types in float32), since a
    code is a matter of rounding. So do the codes inside a sampled `yoso_attention`: its truth is
    the float64 sum over the collisions that the caller's dtype makes. Entries beyond the range of
    the output's dtype are infinite, as they are when rounded.
    """
    name = op_name(op)
    arguments = bind(name, args, kwargs)
    found = _define(name, arguments if name in HASHES else _cast(name, arguments, np.float64))
    if name in HASHES:
        return found
    limits = [float(_finfo(arguments[like]).max) for like in _OUTPUTS[name]]
    return tuple(np.where(np.abs(x) > limit, np.copysign(np.inf, x), x) for x, limit in zip(found, limits, strict=True))


def tolerance(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, true: Arrays | None = None) -> Arrays:
    """How far a variant may be from the truth, entry by entry: ``(2 u + 4) ulp`` of the terms that
    were added up.

    *The terms*, ``1/m sum |terms|``, are the definition in float64 with every number that is summed
    replaced by its absolute value: rounding is relative to them, not to the sum, which may cancel.
    For rows scaled to unit length they are divided by the row's length before scaling: 1 for a row
    in which nothing cancels, more for one that is shorter than its terms. An expected weight counts
    with what a rounded cosine moves it by.

    *u* is what the definition itself loses in the caller's dtype: its largest error by the terms,
    in ulp, over all entries. A variant may lose twice as much, for it adds in another order, plus 4
    ulp, for where the definition is right by luck. Nothing wider than float64 can judge float64, so
    there *u* is measured on the inputs rounded to float32; in ulp it is the same.

    An *ulp* is that of the output's dtype (half types are computed in float32 and rounded once).
    Where no term is added the result must be exact. For hashes the one number is the share of codes
    that may differ: none, or 1e-3 for hyperplanes.

    Parameters
    ----------
    true : the result of `truth` for the same arguments, if it is at hand.
    """
    name = op_name(op)
    if name in HASHES:
        return (np.array(HASHES[name]),)
    arguments = bind(name, args, kwargs)
    true = truth(name, (), arguments) if true is None else true
    terms = _terms(name, arguments)
    judged, judged_true, judged_terms = arguments, true, terms
    if any(checks.dtype_name(arguments[like]) == "float64" for like in _OUTPUTS[name]):
        with np.errstate(over="ignore"):  # numbers beyond float32 give no finite error, and count for nothing
            judged = _cast(name, arguments, np.float32, all_floats=True)
        judged_true, judged_terms = truth(name, (), judged), _terms(name, judged)
    own = outputs_of(call(name, judged, definition_of(name).name))
    allowed = []
    for i, like in enumerate(_OUTPUTS[name]):
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = np.nan_to_num(errors_of(own[i], judged_true[i]) / judged_terms[i], nan=0, posinf=0)
        ulps = np.max(lost, initial=0) / float(_finfo(judged[like]).eps)
        allowed.append((2 * ulps + 4) * float(_finfo(arguments[like]).eps) * terms[i])
    return tuple(allowed)


def bind(op: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name. The signs of a sampled attention are drawn here, so that every variant
    is given the same.
    """
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


def call(op: str, arguments: Mapping[str, Any], variant: str) -> Any:
    return getattr(ops, op)(**arguments, variant=variant)


def definition_of(op: str) -> Kernel:
    return next(variant.kernel for variant in variants(op) if variant.definition)


def _define(op: str, arguments: Mapping[str, Any]) -> Arrays:
    """The definition's own function on NumPy arrays: it may be given dtypes that the checked one
    refuses to mix.
    """
    return outputs_of(definition_of(op).load()(**{name: as_numpy(x) for name, x in arguments.items() if name != "validate"}))


def outputs_of(result: Any) -> Arrays:
    return tuple(as_numpy(x) for x in result) if isinstance(result, tuple) else (as_numpy(result),)


def as_numpy(x: Any) -> Any:
    """An array of any library as NumPy; anything else as it is."""
    return x if library_of(x) is None else one_caller({"array": x}).to_numpy(x)


def _cast(op: str, arguments: Mapping[str, Any], dtype: type[np.floating[Any]], *, all_floats: bool = False) -> dict[str, Any]:
    """Every float array in ``dtype``, except, unless ``all_floats``, those that a sampled attention
    hashes: codes stay as they are.
    """
    sampled = op == "yoso_attention" and not arguments.get("use_expectation")
    hashed = ("query", "key", "planes") if sampled and not all_floats else ()
    arrays = {name: as_numpy(x) for name, x in arguments.items()}
    return {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" and name not in hashed else x
        for name, x in arrays.items()
    }


def _finfo(x: Array) -> Any:
    return np.finfo(x.dtype) if library_of(x) == "numpy" else sys.modules["torch"].finfo(x.dtype)


def _terms(op: str, arguments: Mapping[str, Any]) -> Arrays:
    """``1/m sum |terms|`` in float64; no less than the smallest normal number where there is any
    term, and 0 where there is none.
    """
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

    A variant may take ``arccos`` of a cosine up to 0.99. What rounding the cosine costs is then no
    fault of its own: one ulp moves the weight by
    ``tau / pi (1 - theta / pi)**(tau - 1) / sin(theta)`` ulp. Nearer to 1 it must do better, and
    gets no such allowance.
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
    """The sums of the backward definitions with every term by its absolute value; the angles are
    those of the signed vectors.
    """
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


def errors_of(result: NDArray[Any], true: NDArray[Any]) -> NDArray[Any]:
    """``|result - true|``; 0 where both are the same infinity or both NaN, infinite where one of
    them alone is not finite.
    """
    wide = result.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(wide - true), nan=np.inf, posinf=np.inf)
    return np.where((wide == true) | (np.isnan(wide) & np.isnan(true)), 0, distance)
