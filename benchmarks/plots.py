"""One picture of a suite: time and memory against the length of the input, both axes logarithmic."""

from pathlib import Path
from typing import Any

Result = dict[str, Any]
Curve = dict[int, float]

_MARKS = {
    # Okabe and Ito's colours, told apart by the colour-blind, and by their markers in print.
    "yoso": ("#0072B2", "o", "-"),
    "yoso_expectation": ("#009E73", "s", "-"),
    "sdpa": ("#D55E00", "^", "--"),
    "transformers_expectation": ("#CC79A7", "D", "--"),
}


def curves(run: Result, quantity: str) -> dict[str, Curve]:
    """``quantity`` (``"median"`` or ``"working_bytes"``) against n for everyone who ran at the plain setting."""
    found: dict[str, Curve] = {}
    for case in run["cases"]:
        for side in (case["ours"], case["beside"]):
            if side and quantity in side and (side["dtype"], side["dim"]) == ("float32", 64):
                found.setdefault(side["run"], {}).setdefault(side["n"], side[quantity])
    return found


def plot_suite(run: Result, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    labels = {side["run"]: side["label"] for case in run["cases"] for side in (case["ours"], case["beside"]) if side}
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    drawn = {}
    for axes, quantity, unit, title in (
        (left, "median", 1e-3, "time of one forward pass, ms"),
        (right, "working_bytes", 1e6, "memory beyond inputs and output, MB"),
    ):
        for name, curve in curves(run, quantity).items():
            colour, marker, line = _MARKS[name]
            n = sorted(curve)
            (drawn[labels[name]],) = axes.plot(n, [curve[i] / unit for i in n], color=colour, marker=marker, linestyle=line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("tokens, n")
        axes.set_title(title, loc="left")
        axes.grid(True, which="major", color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for limit in {case["limit"] for case in run["cases"] if case["measure"] == "memory" and case["limit"]}:
        right.axhline(limit, color="#555555", linewidth=1, linestyle=":")
        right.annotate(
            f"promised of ours: {limit:g} MB", (0.99, limit), xycoords=right.get_yaxis_transform(), ha="right", va="bottom", fontsize=8
        )
    figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    where = run["environment"]
    setting = f"1 x 12 heads, d = 64, float32, m = 32, tau = 8; {where['processor']}, {where['cores']} cores"
    figure.supxlabel(setting, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150)
