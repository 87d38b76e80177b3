"""Every variant of an operation on the same inputs: how far from the truth, whether repeatable, how
fast.
"""

import hashlib
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

from yoso_core import checks
from yoso_core.arrays import device_of, library_of, one_caller
from yoso_core.gpu.device import DoesNotFit
from yoso_core.inputs import example_inputs
from yoso_core.places import Place, wait
from yoso_core.registry import Variant, op_name, variants
from yoso_core.truth import HASHES, Arrays, bind, call, definition_of, errors_of, outputs_of, tolerance, truth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table


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
    """Root mean square error over the root mean square of the truth, the worst over outputs and
    runs.
    """
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

    def run(self, op: str, shapes: Sequence[tuple[int, ...]], *, timed: bool) -> None:
        caller = one_caller({name: x for name, x in self.arguments.items() if library_of(x)})
        try:
            wait(caller, self.variant.where)
            start = time.perf_counter()
            result = call(op, self.arguments, self.variant.name)
            wait(caller, self.variant.where)
            seconds = time.perf_counter() - start
        except DoesNotFit as error:
            self.reason = str(error)
            return
        except Exception as error:  # whatever a variant raises is its result, and belongs into the table
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

    def row(self, op: str, true: Arrays, allowed: Arrays) -> Row:
        variant = self.variant
        about = (variant.name, variant.definition, variant.deterministic, self.reason, self.failure)
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
        """As a table for `rich.print`, the definition marked ``=``. What a variant failed with is
        in `notes`.
        """
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
        """What each variant that failed or cannot run said; those that said the same share a
        line.
        """
        said: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if text := row.reason or row.failure:
                said.setdefault((row.verdict, text), []).append(row.variant)
        return [f"{', '.join(names)} {verdict}: {text}" for (verdict, text), names in said.items()]

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
        one is given.

        Needs matplotlib; raises ``ImportError`` without it, and ``ValueError`` for a file name
        whose ending it does not know.
        """
        try:
            from yoso_core import draw
        except ImportError as error:
            raise ImportError("plot: matplotlib is not installed: pip install 'yoso-core[plots]'") from error
        from matplotlib import rc_context

        rows = [row for row in self.rows if row.verdict != "cannot run"]
        with rc_context(draw.STYLE):
            figure = draw.Picture(figsize=(11, 1.9 + 0.55 * max(len(rows), 2)), layout="constrained")
            errors, times = figure.subplots(1, 2, sharey=True)
            if self.op in HASHES:
                _plot_errors(errors, {"share of codes that differ": [row.codes_share for row in rows]})
            else:
                series = {"largest absolute": [row.max_error for row in rows], "RMS, relative": [row.rms_error for row in rows]}
                _plot_errors(errors, series)
            _plot_times(times, rows)
            labels = [row.variant + ("" if row.verdict == "agrees" else f"\n({row.verdict})") for row in rows]
            errors.set_yticks(range(len(labels)), labels)
            errors.set_ylim(len(labels) - 0.5, -0.5)
            inputs = ", ".join(f"{name}: {what}".replace(" ", "\N{NO-BREAK SPACE}") for name, what in self.inputs.items())
            figure.suptitle(textwrap.fill(f"{self.op}({inputs})", 120), fontsize=10)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _plot_errors(axes: "Axes", series: Mapping[str, Sequence[float | None]]) -> None:
    """Dots on a log scale. Zero and infinity have no place on one: they stand at its edges, and say
    so.
    """
    from yoso_core.draw import BLUE, ORANGE

    finite = [x for values in series.values() for x in values if x and np.isfinite(x)]
    left, right = (min(finite) / 10, max(finite) * 10) if finite else (1e-9, 1e-6)
    lifts = (-0.13, 0.13) if len(series) > 1 else (0.0,)
    for (label, values), color, marker, lift in zip(series.items(), (BLUE, ORANGE), "os", lifts, strict=False):
        shown = [(y + lift, value) for y, value in enumerate(values) if value is not None]
        edged = [left if value == 0 else min(value, right) for _, value in shown]
        axes.plot(edged, [y for y, _ in shown], marker, color=color, markersize=8, label=label, clip_on=False, zorder=3)
        for y, value in shown:
            if value == 0:
                axes.annotate("exact", (left, y), (8, 0), textcoords="offset points", ha="left", va="center", fontsize=8)
            elif not np.isfinite(value):
                axes.annotate("not finite", (right, y), (-8, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("error against the definition in float64" if len(series) > 1 else next(iter(series)))
    axes.grid(axis="x")
    if len(series) > 1:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _plot_times(axes: "Axes", rows: Sequence[Row]) -> None:
    from yoso_core.draw import BLUE

    axes.set_xscale("log")
    seconds: list[float] = []
    for y, row in enumerate(rows):
        if row.median_seconds is not None and row.min_seconds is not None and row.max_seconds is not None:
            whiskers = [[row.median_seconds - row.min_seconds], [row.max_seconds - row.median_seconds]]
            axes.errorbar(row.median_seconds, y, xerr=whiskers, fmt="o", color=BLUE, markersize=8, capsize=5)
            axes.annotate(
                duration(row.median_seconds), (row.median_seconds, y), (0, 9), textcoords="offset points", ha="center", fontsize=8
            )
            seconds += row.min_seconds, row.max_seconds
    if seconds:  # whole decades, with room for a label at either end
        axes.set_xlim(10 ** np.floor(np.log10(min(seconds) / 1.5)), 10 ** np.ceil(np.log10(max(seconds) * 1.5)))
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.set_xlabel("time: median, smallest to largest")
    axes.grid(axis="x")


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
    emulate: bool = False,
    progress: bool = False,
    **kwargs: Any,
) -> Comparison:
    """Run every variant of an operation on the same inputs: errors against the definition, bits,
    times.

    >>> print(yoso_core.compare("fast_hash"))  # doctest: +SKIP

    Parameters
    ----------
    op : the function, or its name.
    args, kwargs : the inputs, as for the function; without any, those of `example_inputs`. Where a
        sampled attention is given neither signs nor planes, signs are drawn once, and every variant
        gets them.
    repeats : timed runs of each, in turns, after one that is not timed (the first may compile).
    names : only these variants.
    emulate : the CUDA kernels too, run on the CPU: ``emulated:...`` and ``stepped:...``. They are
        slow, and their times are not a GPU's.
    progress : a bar on stderr, if it takes longer than a second or two.

    Returns
    -------
    A `Comparison`: a row for every variant, those that fail or cannot run among them. The errors
    are against `truth`; a variant agrees
    where they are within `tolerance` in every run. Variants on another device than the inputs get
    copies, made before the clock starts.

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
    elif not emulate:
        chosen = [variant for variant in chosen if variant.kernel.place.automatic]
    if not args and not kwargs:
        args, kwargs = example_inputs(name)
    arguments = bind(name, args, kwargs)
    trials = [
        _Trial(variant, _on_device(arguments, variant.kernel.place) if variant.available else {}, reason=variant.reason)
        for variant in chosen
    ]
    with _progress(3 + len(trials) * (repeats + 1), name, progress) as advance:
        definition = call(name, _on_device(arguments, definition_of(name).place), definition_of(name).name)  # refuses wrong inputs
        shapes = [x.shape for x in outputs_of(definition)]
        advance()
        true = truth(name, (), arguments)
        advance()
        allowed = tolerance(name, (), arguments, true=true)
        advance()
        for turn in range(repeats + 1):
            for trial in trials:
                if trial.alive:
                    trial.run(name, shapes, timed=turn > 0)
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


def _on_device(arguments: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The arguments where a place can have them: torch tensors and CuPy arrays are copied to its
    device if they are on another.
    """

    def moved(x: Any) -> Any:
        library = library_of(x)
        if library is None or device_of(x, library).partition(":")[0] == place.device:
            return x
        if library == "torch":
            return x.to(place.device)
        return x.get() if library == "cupy" else x  # NumPy arrays: the face copies them itself

    return {name: moved(x) for name, x in arguments.items()}


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
    loaded = {name: sys.modules[name].__version__ for name in ("yoso_core", "numpy", "numba", "torch", "cupy") if name in sys.modules}
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **loaded},
    }
