"""Tables from results: for the terminal, and for the README files, which are never typed by hand.

``python -m yoso_core.benchmarks.report``, from the root of the repository, rewrites every block between ``<!-- bench:NAME -->`` and
``<!-- /bench -->`` in README.md and benchmarks/README.md from the committed JSON.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoso_core.benchmarks.bias import bias_table

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]

FILES = (Path("README.md"), Path("benchmarks/README.md"))
RESULTS = Path("benchmarks/results")

_COLUMNS = ("case", "ours", "beside", "result", "target", "verdict", "floor / time")
_STYLE = {"reached": "green", "missed": "bold red", "red": "bold white on red"}
_BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def spread(middle: float, low: float, high: float) -> str:
    """Seconds as ``25.1 ms (24.8 to 26.0)``, all in the unit of the first."""
    scale, unit = (1, "s") if middle >= 1 else (1e-3, "ms") if middle >= 1e-3 else (1e-6, "µs")
    digits = 2 if middle / scale < 10 else 1 if middle / scale < 100 else 0
    return f"{middle / scale:.{digits}f} {unit} ({low / scale:.{digits}f} to {high / scale:.{digits}f})"


def size(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _side(side: Result | None) -> str:
    if side is None:
        return ""
    if "working_bytes" in side:
        return size(side["working_bytes"])
    return spread(side["median"], side["min"], side["max"])


def row(case: Result) -> tuple[str, ...]:
    """One line of a table, in the order of its columns. A red case has no number."""
    if case["verdict"] == "red":
        return (case["name"], "", "", "", "", "red", "")
    speedup = case["measure"] == "speedup"
    target = "" if case["limit"] is None else f"{'≥' if speedup else '≤'} {case['limit']:g}"
    if case["measure"] == "memory":
        value, target = f"{case['value']:.3g} MB", target and f"{target} MB"
    else:
        value = f"{case['value']:.3g}x" if case["value"] is not None else ""
    aim = f", aim {case['aim']:g}" if case["aim"] is not None else ""
    fraction = f"{case['floor']['fraction']:.0%}" if "floor" in case else ""
    return (case["name"], _side(case["ours"]), _side(case["beside"]), value, target + aim, case["verdict"], fraction)


def print_suite(run: Result, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(*_COLUMNS, title=f"yoso bench {run['suite']}", caption=f"{caption(run)} {floor_note(run)}", caption_justify="left")
    for case in run["cases"]:
        cells = row(case)
        table.add_row(*(Text(cell, style=_STYLE.get(cell, "")) for cell in cells))
    console.print(table)
    for case in run["cases"]:
        if case["verdict"] == "red":
            console.print(Text(f"red: {case['name']}: {case['why']}", style="red"))


def caption(run: Result) -> str:
    where = run["environment"]
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    return (
        f"{run['date'][:10]}, {where['processor']}, {where['cores']} cores, {where['memory_gb']:g} GB, "
        f"load average before {run['settings']['load_average_before']:g}; {versions}. "
        "Times are medians (smallest to largest), the two sides measured in turns."
    )


def floor_note(run: Result) -> str:
    copied, multiplied = run["rates"]["copy_bytes"] / 1e9, run["rates"]["multiply_adds"] / 1e9
    return (
        f"Floor: the longer of moving query, key, value and output once, at the {copied:.3g} GB/s that copies reach here, and the "
        f"arithmetic, at the {multiplied:.3g} billion multiply-adds a second that a matrix product reaches here."
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def headline_block(run: Result) -> str:
    """For the README: the cases that stand there, without the floor."""
    rows = [row(case)[:-1] for case in run["cases"] if case["headline"]]
    return f"{markdown(_COLUMNS[:-1], rows)}\n{caption(run)}\n"


def full_block(run: Result) -> str:
    return f"{markdown(_COLUMNS, [row(case) for case in run['cases']])}\n{caption(run)} {floor_note(run)}\n"


BLOCKS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "cpu": ("cpu.json", headline_block),
    "cpu-all": ("cpu.json", full_block),
    "bias": ("hadamard_bias.json", bias_table),
}
"""What stands between the markers of each name: the results it comes from, and how it is written."""


def filled(text: str, results: Path) -> str:
    """``text`` with every block written anew. ``KeyError`` for a block that nothing writes."""

    def block(found: re.Match[str]) -> str:
        file, write = BLOCKS[found["name"]]
        return found[1] + write(json.loads((results / file).read_text("utf-8"))) + found[3]

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(filled(file.read_text("utf-8"), RESULTS), "utf-8")
