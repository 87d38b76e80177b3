"""A reader's own kernel: called like the public function, on arrays of its own, its result checked.

`yoso_core.register` and ``yoso_core.compare(..., also=...)`` take one; see `register` for what it
is given and what it returns.
"""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

import numpy as np

from yoso_core.gpu.device import CudaVariant, DoesNotFit, NumbaCudaVariant
from yoso_core.operations import Operation

BACKENDS_OF = {CudaVariant: ("cupy", "emulated"), NumbaCudaVariant: ("numba_cuda", "stepped")}
"""Where the launcher of a CUDA kernel can run."""

_FUNCTIONS = ("numpy", "cpu")

PLAIN = {"layout": "chained", "oversample": 0, "return_error": False}
"""Options, and what they say where a kernel need not know of them."""


class WrongResult(ValueError):
    """What the kernel returned, or did to its arguments, cannot be right."""


def check_target(target: object, where: str) -> None:
    """Raises where a target does not run on that backend."""
    for wrapper, wheres in BACKENDS_OF.items():
        if isinstance(target, wrapper) and where not in wheres:
            raise ValueError(f"where: a {wrapper.__name__} runs on {' or '.join(map(repr, wheres))}, got {where!r}")
        if where in wheres and not isinstance(target, wrapper):
            raise TypeError(f"target: a kernel for {where!r} comes as {wrapper.__name__}(launcher), got {target!r}")
    if where in _FUNCTIONS and not callable(target):
        raise TypeError(f"target: need a function, got {target!r}")


def adapted(operation: Operation, target: Any) -> Callable[..., Any]:
    """The kernel as the backends call one: arguments by name, behind the device where there is
    one.

    A kernel returns what the public function does, so with ``return_error=True``, which it is given
    only where the caller asks, a pair. What the library asks for besides, the length of a row
    before it was scaled, comes from a second call that does not scale.
    """
    function = target.launcher if isinstance(target, CudaVariant | NumbaCudaVariant) else target

    def call(*device: Any, num_threads: int | None = None, return_length: bool = False, **arguments: Any) -> Any:
        result = _called(operation, function, device, arguments)
        if not return_length:
            return result
        out, *asked = result if isinstance(result, tuple) else (result,)
        rows = _called(operation, function, device, {**arguments, "normalize_output": False, "return_error": False})
        return out, _row_length(rows), *asked

    return call


def _called(operation: Operation, function: Callable[..., Any], device: tuple[Any, ...], arguments: Mapping[str, Any]) -> Any:
    """The kernel's result, after every check of it. It is given the options of `PLAIN` only where
    they are not plain.
    """
    plain = {name: x for name, x in PLAIN.items() if name not in operation.positional}
    fresh = {name: _copied(x) for name, x in arguments.items() if x is not None and not (name in plain and x == plain[name])}
    for name in plain:
        if name in fresh and not _takes(function, name):
            raise DoesNotFit(f"{name}: this kernel does not take it; give its function a parameter {name}, or leave the option out")
    expected = operation.outputs_of(fresh)
    shapes = [output.shape(fresh) for output in expected]
    dtypes = [np.dtype(output.dtype or np.int32) if output.dtype_of is None else fresh[output.dtype_of].dtype for output in expected]
    given = {name: _copied(x) for name, x in fresh.items()}
    positional = [given[name] for name in operation.positional]
    keywords = {name: x for name, x in given.items() if name not in operation.positional}
    result = function(*device, *positional, **keywords)
    for name, x in fresh.items():
        if hasattr(x, "dtype") and not _same_bytes(x, given[name]):
            raise WrongResult(f"overwrote its argument {name}")
    outputs = result if isinstance(result, tuple) else (result,)
    if len(outputs) != len(expected):
        raise WrongResult(f"returned {len(outputs)} arrays, need {len(shapes)}: {', '.join(o.name for o in expected)}")
    array_type = type(next(x for x in given.values() if hasattr(x, "dtype")))
    for output, x, shape, dtype in zip(expected, outputs, shapes, dtypes, strict=True):
        if not isinstance(x, array_type):
            raise WrongResult(f"returned {'nothing' if x is None else type(x).__name__}, need an array")
        if tuple(x.shape) != shape:
            raise WrongResult(f"returned shape {tuple(x.shape)}, need {shape}")
        if x.dtype != dtype:
            of = "" if output.dtype_of is None else f", the dtype of {output.dtype_of}"
            raise WrongResult(f"returned {x.dtype}, need {dtype}{of}")
    return result


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it has such a parameter, as far as Python can tell."""
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):
        return True
    return name in parameters or any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())


def _row_length(rows: Any) -> Any:
    """``|y_i|`` in float32 at least, in the operators that NumPy and CuPy share; a bfloat16 comes
    as its bits.
    """
    if rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    wide = rows.astype(np.promote_types(rows.dtype, np.float32))
    largest = abs(wide).max(axis=-1, keepdims=True, initial=0)
    scale = largest + (largest == 0)
    return scale * ((wide / scale) ** 2).sum(axis=-1, keepdims=True) ** 0.5


def _copied(x: Any) -> Any:
    return x.copy(order="C") if hasattr(x, "dtype") else x


def _same_bytes(x: Any, y: Any) -> bool:
    if x.shape != y.shape or not x.size:
        return bool(x.shape == y.shape)
    return bool((x.reshape(-1).view(np.uint8) == y.reshape(-1).view(np.uint8)).all())
