"""Every variant of an operation on the same inputs: how far from the truth, whether repeatable, how
fast. `yoso_core.comparison_view` shows what is found here.
"""

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from yoso_core import checks, processor, registry
from yoso_core.arrays import device_of, library_of, one_caller
from yoso_core.backends import BACKENDS, Backend, wait
from yoso_core.gpu.device import DoesNotFit
from yoso_core.inputs import example_inputs
from yoso_core.operations import Arrays, Operation, operation_of
from yoso_core.own_kernel import BACKENDS_OF, WrongResult
from yoso_core.registry import Variant, definition_of
from yoso_core.truth import bind, call, errors_of, outputs_of, tolerance, truth

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SETTLED = 0.1
"""Times are settled when the middle half of them lies within this share of their median."""
MOST_RUNS, MOST_SECONDS = 50, 0.2
"""A variant whose times do not settle is not run more often, or no longer, on top of
``repeats``.
"""


@dataclass(frozen=True)
class Row:
    """What one variant did."""

    variant: str
    definition: bool
    automatic: bool
    """The one that the library takes by itself for these inputs."""
    emulated: bool
    """A CUDA kernel that ran on the CPU: its time says nothing about a GPU."""
    deterministic: bool
    """It promises the same bits for the same input."""
    reason: str | None = None
    """Why it cannot run here."""
    failure: str | None = None
    """What it did wrong, where there is no result to compare: the error that it raised, for one."""
    agrees: bool = False
    """Within the tolerance in every run."""
    content: str = ""
    """What makes a comparison say little: ``"all zero"``, ``"all NaN"``, ``"12 of 6,400 NaN"``."""
    max_error: float | None = None
    """Largest absolute error, over all entries, outputs and runs."""
    rms_error: float | None = None
    """Root mean square error over the root mean square of the truth, the worst over outputs and
    runs.
    """
    tolerance_used: float | None = None
    """Largest error in units of what is allowed there."""
    codes_differing: int | None = None
    codes_share: float | None = None
    repeatable: bool | None = None
    """All runs gave the same bits."""
    runs: int = 0
    """Timed runs."""
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
    automatic: bool
    arguments: Mapping[str, Any]
    """On the variant's own device."""
    results: dict[bytes, Arrays] = field(default_factory=dict)
    """Every result that differs in its bits, NaNs included."""
    seconds: list[float] = field(default_factory=list)
    reason: str | None = None
    failure: str | None = None

    @property
    def alive(self) -> bool:
        return self.reason is None and self.failure is None

    @property
    def settled(self) -> bool:
        """Timed often enough: its times agree, or it has had its share."""
        if not self.alive or sum(self.seconds) >= MOST_SECONDS or len(self.seconds) >= MOST_RUNS:
            return True
        if len(self.seconds) < 5:
            return False
        low, middle, high = quantiles(self.seconds, n=4)
        return high - low <= SETTLED * middle

    def run(self, operation: Operation, shapes: Sequence[tuple[int, ...]], *, timed: bool) -> None:
        caller = one_caller({name: x for name, x in self.arguments.items() if library_of(x)})
        try:
            wait(caller, self.variant.where)
            with np.errstate(over="ignore", invalid="ignore"):  # what does not fit the output's dtype is infinite, and is compared
                start = time.perf_counter()
                result = call(operation.name, self.arguments, self.variant.name)
                wait(caller, self.variant.where)
                seconds = time.perf_counter() - start
        except DoesNotFit as error:
            self.reason = str(error)
            return
        except WrongResult as error:
            self.failure = str(error)
            return
        except (Exception, SystemExit) as error:  # whatever a variant raises is its result, and belongs into the table
            self.failure = f"{type(error).__name__}: {error}"
            return
        outputs = outputs_of(result)
        if [x.shape for x in outputs] != list(shapes):
            self.failure = f"returned shapes {[x.shape for x in outputs]}, the definition {list(shapes)}"
            return
        if timed:
            self.seconds.append(seconds)
        bits = hashlib.blake2b(b"".join(x.tobytes() for x in outputs)).digest()
        self.results.setdefault(bits, tuple(x.copy() for x in outputs))

    def row(self, operation: Operation, true: Arrays, allowed: Arrays) -> Row:
        variant = self.variant
        about = Row(
            variant=variant.name,
            definition=variant.definition,
            automatic=self.automatic,
            emulated=not variant.kernel.backend.automatic,
            deterministic=variant.deterministic,
            reason=self.reason,
            failure=self.failure,
        )
        if not self.alive:
            return about
        measured = [_measure(operation, result, true, allowed) for result in self.results.values()]
        worst: dict[str, Any] = {name: max(m[name] for m in measured) for name in measured[0]}
        return replace(
            about,
            agrees=worst["tolerance_used"] <= 1,
            content=_content(operation, next(iter(self.results.values()))),
            repeatable=len(self.results) == 1,
            runs=len(self.seconds),
            median_seconds=median(self.seconds),
            min_seconds=min(self.seconds),
            max_seconds=max(self.seconds),
            **worst,
        )


def _content(operation: Operation, result: Arrays) -> str:
    """What `Row` says of a result in which there is little to compare."""
    size = sum(x.size for x in result)
    if operation.is_hash or not size:
        return ""
    counts = {
        "zero": sum(int(np.sum(x == 0)) for x in result),
        "NaN": sum(int(np.sum(np.isnan(x))) for x in result),
        "infinite": sum(int(np.sum(np.isinf(x))) for x in result),
    }
    whole = [f"all {what}" for what, count in counts.items() if count == size]
    some = [f"{count:,} of {size:,} {what}" for what, count in counts.items() if count and what != "zero"]
    return ", ".join(whole or some)


def _measure(operation: Operation, result: Arrays, true: Arrays, allowed: Arrays) -> dict[str, float]:
    """The errors of one result, the worst over its outputs, as fields of `Row`."""
    if operation.is_hash:
        differing, share = int(np.sum(result[0] != true[0])), float(np.mean(result[0] != true[0])) if true[0].size else 0.0
        used = share / float(allowed[0]) if allowed[0] else np.inf
        return {"codes_differing": differing, "codes_share": share, "tolerance_used": used if differing else 0.0}
    largest, relative, used = 0.0, 0.0, 0.0
    for x, right, limit in zip(result, true, allowed, strict=True):
        error = errors_of(x, right)
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
    """The variants of one operation side by side: print it, or ask for `table`, `to_json` or
    `plot`.
    """

    op: str
    inputs: dict[str, str]
    """Every argument: dtype and shape of an array, the value of anything else."""
    repeats: int
    """Timed runs of each variant, at least."""
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    """Versions and machine, as `environment` gives them."""

    @property
    def agrees(self) -> bool:
        """Every variant that can run here agrees with the definition and keeps its promises."""
        return all(row.verdict in ("agrees", "cannot run") for row in self.rows)

    def __str__(self) -> str:
        from yoso_core import comparison_view

        return comparison_view.text(self)

    def table(self, width: int | None = None) -> "Table":
        """The rows as a table for `rich.print`; fewer columns where ``width`` is too narrow. What
        stands below it is in `notes`.
        """
        from yoso_core import comparison_view

        return comparison_view.table(self, width)

    @property
    def notes(self) -> list[str]:
        """What stands below the table: what its signs mean, what failed and why, what cannot run
        here, and at last which variant is the fastest of those that agree.
        """
        from yoso_core import comparison_view

        return comparison_view.notes(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers. A number that is not finite is the string
        ``"inf"``, since JSON has no other.
        """
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
        """Error and time of every variant that can run here, side by side; written to ``path`` if
        one is given. Kernels that were emulated have no time in it.

        Needs matplotlib; raises ``ImportError`` without it, and ``ValueError`` for a file name
        whose ending it does not know.
        """
        from yoso_core import comparison_view

        return comparison_view.plot(self, path)


def compare(
    op: str | Callable[..., Any],
    *args: Any,
    repeats: int = 5,
    variants: Sequence[str] | None = None,
    also: Mapping[str, Any] | None = None,
    emulate: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Comparison:
    """Run every variant of an operation on the same inputs: errors against the definition, bits,
    times.

    Parameters
    ----------
    op : the function, or its name.
    args, kwargs : the inputs, as for the function; without any, those of `example_inputs`. Where a
        sampled attention is given neither signs nor planes, signs are drawn once, and every variant
        gets them.
    repeats : timed runs of each, in turns, after one that is not timed (the first may compile).
        Short calls are timed more often, until their times agree.
    variants : only these variants.
    also : kernels of your own by name, as `register` takes them: functions, `CudaVariant` or
        `NumbaCudaVariant`. The row of a CUDA kernel is called ``<where>:<name>``.
    emulate : the CUDA kernels too, run on the CPU: ``emulated:...`` and ``stepped:...``. They are
        slow, and their times are not a GPU's.
    progress : a bar on stderr, if it takes longer than a second or two.

    Returns
    -------
    A `Comparison`: a row for every variant, those that fail or cannot run among them. The errors
    are against the truth, which is the definition in float64; a variant agrees where they are
    within what rounding allows, in every run. Variants on another device than the inputs get
    copies, made before the clock starts.

    Raises
    ------
    ValueError, TypeError : no such operation or variant, or inputs that the function refuses. What
        a variant raises, or a kernel of yours gets wrong, is a row of the table.

    >>> import numpy as np, yoso_core
    >>> def mine(query_hash_code, key_hash_code, value, hashtable_capacity):
    ...     meet = query_hash_code[..., :, None, :] == key_hash_code[..., None, :, :]
    ...     return (meet.mean(-1, dtype=value.dtype) @ value).astype(value.dtype)
    >>> found = yoso_core.compare("lsh_cumulation", also={"mine": mine})
    >>> [row.verdict for row in found.rows if row.variant == "mine"]
    ['agrees']
    """
    operation = operation_of(op)
    name = operation.name
    checks.integer("repeats", repeats, 1)
    with ExitStack() as registrations:
        own = _registered(name, {} if also is None else also, emulate, registrations)
        chosen = _chosen(name, variants, own, emulate)
        if not args and not kwargs:
            args, kwargs = example_inputs(name)
        arguments = bind(name, args, kwargs)
        with _progress(3 + len(chosen) * (repeats + 1), name, progress) as advance:
            true, allowed, shapes = _right(operation, arguments, advance)
            taken = registry.automatic(name, one_caller({argument: x for argument, x in arguments.items() if library_of(x)}).kind)
            trials = [
                _Trial(
                    variant,
                    automatic=taken is not None and variant.name == taken.name,
                    arguments=_on_device(arguments, variant.kernel.backend) if variant.available else {},
                    reason=variant.reason,
                )
                for variant in chosen
            ]
            for turn in range(repeats + 1):
                for trial in trials:
                    if trial.alive:
                        trial.run(operation, shapes, timed=turn > 0)
                    advance()
        while unsettled := [trial for trial in trials if not trial.settled]:
            for trial in unsettled:
                trial.run(operation, shapes, timed=True)
    rows = tuple(trial.row(operation, true, allowed) for trial in trials)
    return Comparison(name, _describe(arguments), repeats, rows, environment())


def _registered(op: str, also: Mapping[str, Any], emulate: bool, registrations: ExitStack) -> list[str]:
    """The names of the reader's kernels, in the registry for as long as ``registrations`` is
    open.
    """
    if not isinstance(also, Mapping):
        raise TypeError(f"also: need a dict of kernels by name, got {type(also).__name__}")
    taken = {variant.name for variant in registry.variants(op)}
    own = []
    for name, target in also.items():
        wheres = next((wheres for wrapper, wheres in BACKENDS_OF.items() if isinstance(target, wrapper)), ())
        for where in wheres or ("numpy",):
            called = f"{where}:{name}" if wheres else name
            if wheres and not (emulate or BACKENDS[where].automatic):
                continue
            if called in taken:
                raise ValueError(f"also: {op} has a variant {called!r} already; take another name")
            try:
                registrations.enter_context(registry.register(op, called, target, where=where))
            except (ValueError, TypeError) as error:
                raise type(error)(f"also: {error}") from None
            own.append(called)
    return own


def _chosen(op: str, wanted: Sequence[str] | None, own: Sequence[str], emulate: bool) -> list[Variant]:
    listed = registry.variants(op)
    if wanted is None:
        return [variant for variant in listed if emulate or variant.kernel.backend.automatic or variant.name in own]
    known = [variant.name for variant in listed]
    if isinstance(wanted, str) or not wanted:
        raise TypeError(f"variants: need a list of variants of {op}, such as {known}, got {wanted!r}")
    for name in wanted:
        if name not in known:
            raise ValueError(f"variants: {op} has no variant {name!r}; it has {', '.join(known)}")
    return [variant for variant in listed if variant.name in wanted or variant.name in own]


def _right(
    operation: Operation, arguments: Mapping[str, Any], advance: Callable[[], object]
) -> tuple[Arrays, Arrays, list[tuple[int, ...]]]:
    """What is right, how far from it a result may be, and the shapes of a result. The definition
    runs first, since it refuses wrong inputs.
    """
    definition = definition_of(operation.name)
    with np.errstate(over="ignore", invalid="ignore"):
        result = call(operation.name, _on_device(arguments, definition.backend), definition.name)
        advance()
        true = truth(operation.name, (), arguments)
        advance()
        allowed = tolerance(operation.name, (), arguments, true=true)
        advance()
    return true, allowed, [x.shape for x in outputs_of(result)]


@contextmanager
def _progress(total: int, label: str, wanted: bool) -> Iterator[Callable[[], object]]:
    if not wanted:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=label, delay=1.5, leave=False, unit="run") as bar:
        yield bar.update


def _on_device(arguments: Mapping[str, Any], backend: Backend) -> dict[str, Any]:
    """The arguments where a backend can have them: torch tensors and CuPy arrays are copied to its
    device if they are on another.
    """

    def moved(x: Any) -> Any:
        library = library_of(x)
        if library is None or device_of(x, library).partition(":")[0] == backend.device:
            return x
        if library == "torch":
            return x.to(backend.device)
        return x.get() if library == "cupy" else x  # NumPy arrays: the face copies them itself

    return {name: moved(x) for name, x in arguments.items()}


def _describe(arguments: Mapping[str, Any]) -> dict[str, str]:
    def shown(x: Any) -> str:
        return repr(x) if library_of(x) is None else f"{checks.dtype_name(x)} {tuple(x.shape)}"

    return {name: shown(x) for name, x in arguments.items() if x is not None}


def environment() -> dict[str, Any]:
    """The machine, and the version of what is loaded: numbers mean little without them."""
    loaded = {name: sys.modules[name].__version__ for name in ("yoso_core", "numpy", "numba", "torch", "cupy") if name in sys.modules}
    return {
        "processor": processor.name(),
        "microarchitecture": processor.microarchitecture(),
        "instruction_set": processor.instruction_set(),
        "cores": os.cpu_count(),
        "caches": processor.caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **loaded},
    }
