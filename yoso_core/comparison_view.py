"""How a `yoso_core.Comparison` is shown: as text, as a table for rich, and as a picture."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from yoso_core.files import written
from yoso_core.operations import OPERATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from yoso_core.comparison import Comparison, Row

WIDTH = 100
"""Columns of the notes below a table."""


def _unit(seconds: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "µs"))


def duration(seconds: float) -> str:
    """``"12.3 ms"``: three digits in the unit that suits."""
    scale, unit = _unit(seconds)
    return f"{seconds / scale:.3g} {unit}"


class _Column(NamedTuple):
    name: str
    cells: list[str]


DISPENSABLE = ("from - to", "RMS error", "share", "same bits", "of limit", "emulated", "largest error", "speed")
"""Columns that a narrow terminal does without, the first to go first."""


def _shown(comparison: "Comparison") -> "list[Row]":
    """The rows of the table; what cannot run here is in a note."""
    return [row for row in comparison.rows if row.verdict != "cannot run"]


def _definition(comparison: "Comparison") -> "Row | None":
    return next((row for row in comparison.rows if row.definition and row.median_seconds is not None), None)


def _columns(comparison: "Comparison") -> list[_Column]:
    rows, definition = _shown(comparison), _definition(comparison)
    columns = [_Column("variant", [_name(row) for row in rows]), _Column("verdict", [_verdict(row) for row in rows])]
    if OPERATIONS[comparison.op].is_hash:
        columns.append(_Column("codes that differ", ["-" if row.codes_differing is None else f"{row.codes_differing:,}" for row in rows]))
        columns.append(_Column("share", [_number(row.codes_share) for row in rows]))
    else:
        exact = _is_truth(comparison)
        for name, numbers in (
            ("largest error", [row.max_error for row in rows]),
            ("RMS error", [row.rms_error for row in rows]),
            ("of limit", [row.tolerance_used for row in rows]),
        ):
            columns.append(
                _Column(name, ["truth" if exact and row.definition else _number(number) for row, number in zip(rows, numbers, strict=True)])
            )
    same = {True: "yes", False: "no", None: "-"}
    columns.append(_Column("same bits", [same[row.repeatable] for row in rows]))
    columns.append(_Column("time", [_time(row) for row in rows]))
    columns.append(_Column("from - to", [_range(row) for row in rows]))
    if definition is not None:
        columns.append(_Column("speed", [_speed(row, definition) for row in rows]))
    if any(row.emulated for row in rows):
        columns.append(_Column("emulated", [_time(row, emulated=True) for row in rows]))
    return columns


def _is_truth(comparison: "Comparison") -> bool:
    """In float64 the definition is its own truth: its error of 0 says nothing."""
    floats = {what.partition(" ")[0] for what in comparison.inputs.values() if what.startswith(("float", "bfloat"))}
    return floats == {"float64"}


def _name(row: "Row") -> str:
    return " ".join([row.variant, *(["*"] if row.automatic else []), *(["="] if row.definition else [])])


def _verdict(row: "Row") -> str:
    if row.verdict != "agrees" or not row.content:
        return row.verdict
    return row.content if row.content.startswith("all ") else f"agrees, {row.content}"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.2g}"


def _time(row: "Row", *, emulated: bool = False) -> str:
    return "-" if row.median_seconds is None or row.emulated is not emulated else duration(row.median_seconds)


def _range(row: "Row") -> str:
    if row.min_seconds is None or row.max_seconds is None or row.emulated:
        return "-"
    return f"{duration(row.min_seconds)} - {duration(row.max_seconds)}"


def _speed(row: "Row", definition: "Row") -> str:
    if row.median_seconds is None or row.emulated or definition.median_seconds is None:
        return "-"
    return f"{definition.median_seconds / row.median_seconds:.3g}x"


def title(comparison: "Comparison") -> str:
    return f"{comparison.op}({', '.join(f'{name}: {what}' for name, what in comparison.inputs.items())})"


def text(comparison: "Comparison") -> str:
    """The table and its notes, as plain text."""
    columns = _columns(comparison)
    widths = [max(map(len, (column.name, *column.cells))) for column in columns]
    lines = [[column.name for column in columns], *zip(*(column.cells for column in columns), strict=True)]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    below = [textwrap.fill(note, WIDTH, break_long_words=False, break_on_hyphens=False) for note in notes(comparison)]
    return "\n".join([title(comparison), *rows, "", *below])


def table(comparison: "Comparison", width: int | None = None) -> "Table":
    """The table for `rich.print`, in ``width`` columns of text as far as it can be."""
    from rich.table import Table
    from rich.text import Text

    columns = _columns(comparison)
    for name in DISPENSABLE:
        widths = [max(*map(len, column.cells), *map(len, column.name.split(" ", 1)), 0) + 2 for column in columns]
        if width is not None and sum(widths) > width:
            columns = [column for column in columns if column.name != name]
    shown = Table(title=Text(title(comparison)), title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for i, column in enumerate(columns):
        shown.add_column(column.name.replace(" ", "\n", 1), justify="right" if i > 1 else "left", no_wrap=True)
    for row, *cells in zip(_shown(comparison), *(column.cells for column in columns), strict=True):
        shown.add_row(*cells, style=None if row.verdict == "agrees" else "bold red")
    return shown


def notes(comparison: "Comparison") -> list[str]:
    """What stands below the table, a paragraph each; the last is the answer."""
    rows = _shown(comparison)
    failed = [f"{row.variant} failed: {row.failure}" for row in rows if row.failure]
    said: dict[str, list[str]] = {}
    for row in comparison.rows:
        if row.reason:
            said.setdefault(row.reason, []).append(row.variant)
    missing = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in said.items())
    return [
        _signs(comparison),
        *(["Emulated kernels ran on the CPU: their time is not a GPU's."] if any(row.emulated for row in rows) else []),
        *failed,
        *([f"Cannot run here: {missing}."] if missing else []),
        _answer(comparison),
    ]


def _signs(comparison: "Comparison") -> str:
    rows = _shown(comparison)
    signs = [
        *(["* is what the library takes by itself here"] if any(row.automatic for row in rows) else []),
        *(["= is the definition"] if any(row.definition for row in rows) else []),
    ]
    if OPERATIONS[comparison.op].is_hash:
        errors = "Codes are compared with the definition's in the same dtype."
    else:
        errors = (
            "Errors are against the definition in float64: the largest is absolute, RMS is relative, and the limit is what rounding allows."
        )
    times = "Time is the median; speed is relative to the definition." if _definition(comparison) else "Time is the median."
    return " ".join([*(["; ".join(signs) + "."] if signs else []), errors, times])


def _answer(comparison: "Comparison") -> str:
    """One sentence: which variant, how exact, how many times faster than the definition."""
    timed = [row for row in _shown(comparison) if row.verdict == "agrees" and not row.emulated and row.median_seconds is not None]
    if not timed:
        agreed = ", ".join(row.variant for row in _shown(comparison) if row.verdict == "agrees")
        return f"None of those that agree ({agreed}) has a time here." if agreed else "No variant agrees with the definition."
    best, definition = min(timed, key=lambda row: row.median_seconds or 0), _definition(comparison)
    if best.content.startswith("all "):
        return f"There is nothing to compare: the output is {best.content}, by the definition and by every variant that agrees."
    exact = "with the definition's own codes" if OPERATIONS[comparison.op].is_hash and not best.codes_differing else "exact to rounding"
    taken = "what the library takes by itself, " if best.automatic else ""
    if definition is None or best.definition or definition.median_seconds is None or best.median_seconds is None:
        return f"The fastest that agrees is {best.variant}, {taken}{'the definition itself' if best.definition else exact}."
    times = definition.median_seconds / best.median_seconds
    return f"The fastest that agrees is {best.variant}, {taken}{exact}, {times:.3g} times as fast as the definition."


def plot(comparison: "Comparison", path: str | Path | None = None) -> "Figure":
    """See `yoso_core.Comparison.plot`."""
    try:
        from yoso_core import draw
    except ImportError as error:
        raise ImportError("plot: matplotlib is not installed: pip install 'yoso-core[plots]'") from error
    rows = _shown(comparison)
    with draw.look():
        figure = draw.Picture(figsize=(11, 1.9 + 0.55 * max(len(rows), 2)), layout="constrained")
        errors, times = figure.subplots(1, 2, sharey=True)
        if OPERATIONS[comparison.op].is_hash:
            _plot_errors(errors, {"share of codes that differ": [row.codes_share for row in rows]})
        else:
            series = {"largest absolute": [row.max_error for row in rows], "RMS, relative": [row.rms_error for row in rows]}
            _plot_errors(errors, series)
        _plot_times(times, rows)
        labels = [_name(row) + ("" if row.verdict == "agrees" else f"\n({row.verdict})") for row in rows]
        errors.set_yticks(range(len(labels)), labels)
        errors.set_ylim(len(labels) - 0.5, -0.5)
        inputs = title(comparison).replace(": ", ":\N{NO-BREAK SPACE}").replace(" (", "\N{NO-BREAK SPACE}(")
        figure.suptitle(textwrap.fill(inputs, 120), fontsize=10)
    if path is not None:
        with written(path) as part:
            figure.savefig(part, dpi=150)
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


def _plot_times(axes: "Axes", rows: "Sequence[Row]") -> None:
    from yoso_core.draw import BLUE

    axes.set_xscale("log")
    seconds: list[float] = []
    for y, row in enumerate(rows):
        if row.emulated or row.median_seconds is None or row.min_seconds is None or row.max_seconds is None:
            continue
        whiskers = [[row.median_seconds - row.min_seconds], [row.max_seconds - row.median_seconds]]
        axes.errorbar(row.median_seconds, y, xerr=whiskers, fmt="o", color=BLUE, markersize=8, capsize=5)
        label = duration(row.median_seconds)
        axes.annotate(label, (row.median_seconds, y), (0, 9), textcoords="offset points", ha="center", fontsize=8)
        seconds += row.min_seconds, row.max_seconds
    if seconds:  # whole decades, with room for a label at either end
        axes.set_xlim(10 ** np.floor(np.log10(min(seconds) / 1.5)), 10 ** np.ceil(np.log10(max(seconds) * 1.5)))
    axes.xaxis.set_major_formatter(lambda x, _: duration(x))
    axes.set_xlabel("time: median, smallest to largest")
    axes.grid(axis="x")
