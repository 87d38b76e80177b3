"""What is right, and how far from it rounding may take a result."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yoso_core.arrays import Array, library_of, one_caller
from yoso_core.operations import Arguments, Arrays, Operation, operation_of
from yoso_core.registry import definition_of


def truth(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> Arrays:
    """What is right: the definition, run in float64 on the inputs as they are; one NumPy array per
    output.

    Hash codes come from the definition in the caller's own dtype (half types in float32), since a
    code is a matter of rounding. So do the codes inside a sampled `yoso_attention`: its truth is
    the float64 sum over the collisions that the caller's dtype makes. Entries beyond the range of
    the output's dtype are infinite, as they are when rounded.
    """
    operation = operation_of(op)
    arguments = bind(op, args, kwargs)
    if operation.is_hash:
        return _define(operation, arguments)
    found = _define(operation, _cast(operation, arguments, np.float64))
    limits = [float(precision.max) for precision in _precisions(operation, arguments)]
    return tuple(np.where(np.abs(x) > limit, np.copysign(np.inf, x), x) for x, limit in zip(found, limits, strict=True))


def tolerance(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Arguments, *, true: Arrays | None = None) -> Arrays:
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
    operation = operation_of(op)
    if operation.is_hash:
        return (np.array(operation.codes_may_differ),)
    arguments = bind(op, args, kwargs)
    precisions = _precisions(operation, arguments)
    true = truth(op, (), arguments) if true is None else true
    terms = _terms(operation, arguments)
    judged, judged_true, judged_terms = arguments, true, terms
    if any(precision.bits == 64 for precision in precisions):
        with np.errstate(over="ignore"):  # numbers beyond float32 give no finite error, and count for nothing
            judged = _cast(operation, arguments, np.float32, all_floats=True)
        judged_true, judged_terms = truth(op, (), judged), _terms(operation, judged)
    own = outputs_of(call(op, judged, operation.definition))
    allowed = []
    for i, (precision, judged_precision) in enumerate(zip(precisions, _precisions(operation, judged), strict=True)):
        with np.errstate(divide="ignore", invalid="ignore"):
            lost = np.nan_to_num(errors_of(own[i], judged_true[i]) / judged_terms[i], nan=0, posinf=0)
        ulps = np.max(lost, initial=0) / float(judged_precision.eps)
        allowed.append((2 * ulps + 4) * float(precision.eps) * terms[i])
    return tuple(allowed)


def bind(op: str | Callable[..., Any], args: Sequence[Any], kwargs: Arguments) -> dict[str, Any]:
    """The arguments by name. What a call would draw at random is drawn here, so that every variant
    is given the same.
    """
    if "variant" in kwargs:
        raise TypeError("variant: every variant runs; choose with variants=[...]")
    operation = operation_of(op)
    return operation.complete(inspect.signature(operation.function).bind(*args, **kwargs).arguments)


def call(op: str | Callable[..., Any], arguments: Arguments, variant: str) -> Any:
    """The public function with arguments by name, and the variant named."""
    return operation_of(op).function(**arguments, variant=variant)


def _define(operation: Operation, arguments: Arguments) -> Arrays:
    """The definition's own function on NumPy arrays: it may be given dtypes that the checked one
    refuses to mix.
    """
    define = definition_of(operation.name).load()
    return outputs_of(define(**{name: as_numpy(x) for name, x in arguments.items() if name != "validate"}))


def outputs_of(result: Any) -> Arrays:
    return tuple(as_numpy(x) for x in result) if isinstance(result, tuple) else (as_numpy(result),)


def as_numpy(x: Any) -> Any:
    """An array of any library as NumPy; anything else as it is."""
    return x if library_of(x) is None else one_caller({"array": x}).to_numpy(x)


def _cast(operation: Operation, arguments: Arguments, dtype: type[np.floating[Any]], *, all_floats: bool = False) -> dict[str, Any]:
    """Every float array in ``dtype``, except, unless ``all_floats``, those that are hashed inside:
    codes stay as they are.
    """
    hashed = () if all_floats else operation.hashed(arguments)
    arrays = {name: as_numpy(x) for name, x in arguments.items() if name != "validate"}
    return {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" and name not in hashed else x
        for name, x in arrays.items()
    }


def _finfo(x: Array) -> Any:
    return np.finfo(x.dtype) if library_of(x) == "numpy" else sys.modules["torch"].finfo(x.dtype)


def _precisions(operation: Operation, arguments: Arguments) -> list[Any]:
    """The `numpy.finfo`, or torch's, of each output's dtype."""
    outputs = operation.outputs_of(arguments)
    return [np.finfo(output.dtype) if output.dtype_of is None else _finfo(arguments[output.dtype_of]) for output in outputs]


def _terms(operation: Operation, arguments: Arguments) -> Arrays:
    """``1/m sum |terms|`` in float64; no less than the smallest normal number where there is any
    term, and 0 where there is none.
    """
    if operation.terms is None:
        raise TypeError(f"terms: the record of {operation.name} does not say what a rounding error is relative to")
    precisions = _precisions(operation, arguments)
    cosine_ulp = min(1.0, 2.0**-23 / float(precisions[0].eps))  # half types are computed in float32
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        terms = operation.terms(_cast(operation, arguments, np.float64), cosine_ulp)
    smallest = [float(precision.tiny) for precision in precisions]
    return tuple(np.where(x > 0, np.maximum(x, tiny), 0) for x, tiny in zip(terms, smallest, strict=True))


def errors_of(result: NDArray[Any], true: NDArray[Any]) -> NDArray[Any]:
    """``|result - true|``; 0 where both are the same infinity or both NaN, infinite where one of
    them alone is not finite.
    """
    wide = result.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.nan_to_num(np.abs(wide - true), nan=np.inf, posinf=np.inf)
    return np.where((wide == true) | (np.isnan(wide) & np.isnan(true)), 0, distance)
