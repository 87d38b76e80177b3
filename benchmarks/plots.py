"""One picture of a suite: time and memory of the forward pass against the length of the input, both
axes logarithmic.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yoso_core.benchmarks.machines import machine_of
from yoso_core.draw import BLUE, FAINT, GREEN, ORANGE, PURPLE, SKY, VERMILION
from yoso_core.files import written

Result = dict[str, Any]
Curve = dict[int, float]


@dataclass(frozen=True)
class Line:
    """Whose numbers make one line, and how it looks. The colors are Okabe and Ito's, which the
    color-blind tell apart; the markers are for print.
    """

    run: str
    color: str
    marker: str
    style: str = "-"
    device: str = "cpu"
    dtype: str = "float32"
    variant: str | None = None
    """``None``: any."""
    label: str | None = None
    """``None``: the label in the results."""

    def fits(self, side: Result) -> bool:
        return (
            (side["run"], side["dtype"], side["dim"]) == (self.run, self.dtype, 64)
            and side.get("device", "cpu") == self.device
            and self.variant in (None, side["variant"])
        )


LINES = (
    Line("yoso", BLUE, "o"),
    Line("yoso_expectation", GREEN, "s"),
    Line("sdpa", VERMILION, "^", "--"),
    Line("transformers_expectation", PURPLE, "D", "--"),
    Line("yoso", BLUE, "o", device="cuda", variant="cupy:shared_table", label="YOSO, shared_table"),
    Line("yoso", SKY, "o", ":", device="cuda", dtype="float16", variant="cupy:shared_table", label="YOSO, shared_table, float16"),
    Line("yoso", GREEN, "s", device="cuda", variant="cupy:sorted_buckets", label="YOSO, sorted_buckets"),
    Line("paper", ORANGE, "v", "--", device="cuda"),
    Line("sdpa", VERMILION, "^", "--", device="cuda", label="torch SDPA, float32"),
    Line("flash", PURPLE, "D", "--", device="cuda", dtype="float16", label="torch flash attention, float16"),
)


def curves(results: Result, quantity: str) -> dict[Line, Curve]:
    """``quantity`` (``"median"`` or ``"working_bytes"``) against n, for every line that the results
    have numbers for.
    """
    found: dict[Line, Curve] = {}
    for side in _sides(results):
        for line in LINES:
            if quantity in side and line.fits(side):
                found.setdefault(line, {}).setdefault(side["n"], side[quantity])
    return found


def _drawn(side: Result) -> bool:
    return any(line.fits(side) for line in LINES)


def _sides(results: Result) -> list[Result]:
    return [side for case in results["cases"] for side in (case["ours"], case["beside"], *case.get("also", [])) if side]


def plot_suite(results: Result, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    labels = {side["run"]: side["label"] for side in _sides(results)}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = {}
    for axes, quantity, unit, title in (
        (left, "median", 1e-3, "time of one forward pass, ms"),
        (right, "working_bytes", 1e6, "memory beyond inputs and output, MB"),
    ):
        for line, curve in curves(results, quantity).items():
            n = sorted(curve)
            style = {"color": line.color, "marker": line.marker, "linestyle": line.style}
            (drawn[line.label or labels[line.run]],) = axes.plot(n, [curve[i] / unit for i in n], **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("tokens, n")
        axes.set_title(title, loc="left")
        axes.grid(True, which="major", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for limit in {case["limit"] for case in results["cases"] if case["measure"] == "memory" and case["limit"] and _drawn(case["ours"])}:
        right.axhline(limit, color="#555555", linewidth=1, linestyle=":")
        right.annotate(
            f"promised of ours: {limit:g} MB", (0.99, limit), xycoords=right.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
        )
    columns = 4 if len(drawn) <= 4 else 3
    figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=columns, frameon=False, fontsize=9)
    where, batch = results["environment"], results["cases"][0]["ours"].get("batch", 1)
    dtype, machine = "float32, ", machine_of(where)
    if "gpu" in where:  # there the legend has the dtypes
        dtype, machine = "", where["gpu"]["name"]
    setting = f"{batch} x 12 heads, d = 64, {dtype}m = 32, tau = 8; {machine}"
    figure.supxlabel(setting, fontsize=8, color="#555555")
    with written(path) as part:
        figure.savefig(part, dpi=150)
