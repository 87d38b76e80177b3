"""Tables from results, for the terminal and for the README files. No number there is typed by hand.

``python -m yoso_core.benchmarks.report``, from the root of the repository, rewrites every block
between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` in README.md, benchmarks/README.md and
docs/hashing.md from the committed JSON.
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yoso_core.benchmarks import error, static
from yoso_core.benchmarks.bias import bias_table, relative_table, variance_table
from yoso_core.benchmarks.cases import SUITES
from yoso_core.benchmarks.contenders import CONTENDERS
from yoso_core.benchmarks.equal_error import equal_error_table
from yoso_core.benchmarks.floor import least_bytes
from yoso_core.benchmarks.learning import learning_table
from yoso_core.benchmarks.machines import H100, machine_of, processor_of
from yoso_core.benchmarks.promise import kept_table, near_table, promise_table, rounds_table
from yoso_core.benchmarks.sides import Ours
from yoso_core.benchmarks.tables import markdown
from yoso_core.benchmarks.traffic import FORMULAS, Traffic, by_design, traffic
from yoso_core.files import written

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]

FILES = (Path("README.md"), Path("benchmarks/README.md"), Path("docs/hashing.md"))
RESULTS = Path("benchmarks/results")

_COLUMNS = ("case", "ours", "beside", "result", "target", "verdict", "floor / time")
_STYLE = {"reached": "green", "missed": "bold red", "red": "bold white on red", "cannot run": "dim", "no peer": "dim"}
PROSE_COLUMNS = 100
"""Lines of prose in the README files are at most so wide."""

_HELD = "\N{NO-BREAK SPACE}"

_BLOCK = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def spread(middle: float, low: float, high: float) -> str:
    """A median and its range, all in the unit of the median.

    >>> spread(0.0251, 0.0248, 0.026)
    '25.1 ms (24.8 to 26.0)'
    """
    scale, unit = (1, "s") if middle >= 1 else (1e-3, "ms") if middle >= 1e-3 else (1e-6, "µs")
    digits = 2 if middle / scale < 10 else 1 if middle / scale < 100 else 0
    return f"{middle / scale:.{digits}f} {unit} ({low / scale:.{digits}f} to {high / scale:.{digits}f})"


def seconds(middle: float) -> str:
    """Seconds, in the unit that `spread` takes.

    >>> seconds(0.0251)
    '25.1 ms'
    """
    return spread(middle, middle, middle).partition(" (")[0]


def size(count: float) -> str:
    """A number of bytes, in GB or MB.

    >>> size(2_410_000_000)
    '2.41 GB'
    """
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _side(side: Result | None) -> str:
    if side is None:
        return ""
    if "cannot_run" in side:
        return "cannot run"
    if "working_bytes" in side:
        return size(side["working_bytes"])
    return spread(side["median"], side["min"], side["max"]) if "median" in side else ""


def _also(case: Result) -> str:
    """The others of a case in short: name, dtype, time, and how many times ours that is."""
    said = []
    for side in case.get("also", []):
        name = f"{side['label']}, {side['dtype']}"
        if "median" in side and "median" in case["ours"]:
            said.append(f"{name}: {seconds(side['median'])} ({side['median'] / case['ours']['median']:.3g}x)")
        elif _side(side):
            said.append(f"{name}: {_side(side)}")
    return "; ".join(said)


def row(case: Result, columns: Sequence[str] = _COLUMNS) -> tuple[str, ...]:
    """One row of a table, in the order of its columns. A red case has no number."""
    cells = dict.fromkeys(columns, "") | {"case": case["name"], "verdict": case["verdict"]}
    if case["verdict"] != "red":
        cells |= {"ours": _side(case["ours"]), "beside": _side(case["beside"]), "also": _also(case), **_result(case)}
        if "floor" in case:
            cells["floor / time"] = f"{case['floor']['fraction']:.0%}"
            if "by_design" in case["floor"]:
                cells["by design / time"] = f"{case['floor']['by_design']['fraction']:.0%}"
    return tuple(cells[column] for column in columns)


_UNITS = {
    "speedup": ("≥", "x"),
    "cost": ("≤", "x"),
    "bandwidth": ("≥", "%"),
    "memory": ("≤", " MB"),
    "memory share": ("≤", "x"),
    "overhead": ("≤", " µs"),
}


def _result(case: Result) -> dict[str, str]:
    """The number of a case, and its target."""
    sign, unit = _UNITS[case["measure"]]
    scale = 100 if case["measure"] == "bandwidth" else 1
    value, limit, aim = case.get("value"), case["limit"], case["aim"]
    target = "" if limit is None else f"{sign} {limit * scale:.3g}{unit if unit != 'x' else ''}"
    return {
        "result": "" if value is None else f"{value * scale:.3g}{unit}",
        "over the faster": f"{faster['value']:.3g}x ({faster['dtype']})" if (faster := case.get("over_faster")) else "",
        "target": target + (f", aim {aim:g}" if aim is not None else ""),
    }


def columns_of(results: Result) -> tuple[str, ...]:
    """The columns of the full table. Three more where the results have them: the ratio to the peer
    in its faster dtype, the bandwidth that a variant uses, and others on the same inputs.
    """
    faster = any("over_faster" in case for case in results["cases"])
    by_design = any("by_design" in case.get("floor", {}) for case in results["cases"])
    also = any(case.get("also") for case in results["cases"])
    columns = [column for name in _COLUMNS for column in ((name, "over the faster") if faster and name == "result" else (name,))]
    return (*columns, *(["by design / time"] if by_design else []), *(["also"] if also else []))


def print_suite(results: Result, console: "Console") -> None:
    from rich.table import Table
    from rich.text import Text

    columns = tuple(column for column in columns_of(results) if column != "also")
    table = Table(
        *columns, title=f"yoso bench {results['suite']}", caption=f"{caption(results)} {floor_note(results)}", caption_justify="left"
    )
    for case in results["cases"]:
        cells = row(case, columns)
        table.add_row(*(Text(cell, style=_STYLE.get(cell, "")) for cell in cells))
    console.print(table)
    for case in results["cases"]:
        if case["verdict"] == "red":
            console.print(Text(f"red: {case['name']}: {case['why']}", style="red"))
    for line in (*others(results), *cannot_run(results)):
        console.print(Text(line))


def others(results: Result) -> list[str]:
    """The times in the last column of the full table: a line for each side, with all sizes."""
    found: dict[str, dict[int, str]] = {}
    for case in results["cases"]:
        for side in case.get("also", []):
            if "median" in side:
                found.setdefault(f"{side['label']}, {side['dtype']}", {}).setdefault(side["n"], seconds(side["median"]))
    return [f"{who}: {', '.join(f'{took} at n = {n:,}' for n, took in sorted(times.items()))}" for who, times in found.items()]


def cannot_run(results: Result) -> list[str]:
    """Which sides could not run, at which sizes, and why: a line for each reason."""
    found: dict[tuple[str, str], set[int]] = {}
    for case in results["cases"]:
        for side in (case["ours"], case["beside"], *case.get("also", [])):
            if side and "cannot_run" in side and case["verdict"] != "red":
                variant = f", {side['variant']}" if side["variant"] else ""
                found.setdefault((f"{side['label']}{variant}, {side['dtype']}", side["cannot_run"]), set()).add(side["n"])
    return [
        f"{who} cannot run at n = {', '.join(f'{n:,}' for n in sorted(sizes))}: {why.rstrip('.')}" for (who, why), sizes in found.items()
    ]


def caption(results: Result) -> str:
    where = results["environment"]
    machine = f"{machine_of(where)}, {where['memory_gb']:g} GB"
    if gpu := where.get("gpu"):
        machine = f"{gpu['name']}, {gpu['memory_gb']:g} GB, driver {gpu['driver']}, torch for CUDA {gpu['cuda_of_torch']}; {machine}"
    return (
        f"{results['date'][:10]}, {machine}, load average before {results['settings']['load_average_before']:g}; {_versions(where)}. "
        f"Times are medians (smallest to largest), {'the two' if columns_of(results) == _COLUMNS else 'all'} sides measured in turns."
    )


def _versions(where: Result) -> str:
    return ", ".join(f"{package} {version}" for package, version in where["versions"].items())


def _three_digits(number: float) -> str:
    return f"{float(format(number, '.3g')):,g}"


def floor_note(results: Result) -> str:
    copied, multiplied = (_three_digits(results["rates"][name] / 1e9) for name in ("copy_bytes", "multiply_adds"))
    what = "query, key, value and output" if columns_of(results) == _COLUMNS else "every input and the output"
    note = (
        f"Floor: the longer of moving {what} once, at the {copied} GB/s that copies reach here, and the "
        f"arithmetic, at the {multiplied} billion multiply-adds a second that a matrix product reaches here."
    )
    if "by design / time" in columns_of(results):
        note += " By design: the bytes that the variant's kernels move to and from memory, at the rate of copies."
    if "over the faster" in columns_of(results):
        note += (
            " Over the faster: beside the peer in the dtype, given in brackets, in which it takes less time; targets are for equal dtypes."
        )
    return note


def wrapped(prose: str) -> str:
    """A paragraph of Markdown, at most `PROSE_COLUMNS` wide.

    A plus, a minus or a star stays on the line of the word before it: at the start of a line it
    would make a list.
    """
    held = re.sub(" ([-+*]) ", f"{_HELD}\\1 ", prose)
    lines = textwrap.fill(held, PROSE_COLUMNS, break_long_words=False, break_on_hyphens=False)
    return lines.replace(_HELD, " ")


def headline_block(files: Sequence[Result]) -> str:
    """For the README: the headline cases in three narrow columns, and how many targets of the whole
    suite are reached. Of one file, the times of both sides; of several, for each case the worst and
    the best number, with the instruction set.
    """
    if not files:
        return _none("cpu")
    chosen = [case.name for case in SUITES[files[0]["suite"]].cases if case.headline]
    if len(files) == 1:
        (results,) = files
        header: tuple[str, ...] = ("case", "ours", "beside (times ours)")
        rows = [_headline(case) for case in results["cases"] if case["name"] in chosen]
        note = f"{results['date'][:10]}, {processor_of(results['environment'])}: {_reached(results)} targets reached."
    else:
        header = ("case", "worst", "best")
        there = {case["name"] for results in files for case in results["cases"]}
        rows = [_extremes(name, files) for name in chosen if name in there]
        reached = "; ".join(f"{_isa(results)}: {_reached(results)}" for results in files)
        note = f"SDPA in its faster dtype. Targets reached: {reached}."
    return f"{markdown(header, rows)}\n{wrapped(f'Medians, in turns. {note}')}\n"


def _reached(results: Result) -> str:
    targets = [case["verdict"] for case in results["cases"] if case["limit"] is not None]
    return f"{targets.count('reached')} of {len(targets)}"


def _isa(results: Result) -> str:
    return results["environment"].get("instruction_set") or "unknown"


def _extremes(name: str, files: Sequence[Result]) -> tuple[str, str, str]:
    """A case in short: the worst and the best of several files, each with the instruction set."""
    found = [(case, _isa(results)) for results in files for case in results["cases"] if case["name"] == name]
    found.sort(key=lambda pair: _standing(pair[0]))
    worst, best = (f"{_number(case)} ({isa})" for case, isa in (found[0], found[-1]))
    return _short_name(name), worst, best


def _short_name(case: str) -> str:
    """The README has narrow columns."""
    return case.replace("forward + backward", "training")


def _standing(case: Result) -> float:
    """Of two numbers of a case the better one is larger. No number is worse than any."""
    value = case.get("over_faster", case).get("value")
    if value is None:
        return -inf
    return float(value if _UNITS[case["measure"]][0] == "≥" else -value)


def _number(case: Result) -> str:
    """The number of a case, over the faster where there is that, and beside it a target that is
    missed: ``"5.6x < 6"``. The verdict where there is no number.
    """
    number = f"{faster['value']:.3g}x" if (faster := case.get("over_faster")) else _result(case)["result"]
    if number and case["verdict"] == "missed":
        number += f" {'<' if _UNITS[case['measure']][0] == '≥' else '>'} {case['limit']:.3g}"
    return number or str(case["verdict"])


def _headline(case: Result) -> tuple[str, str, str]:
    """A case in short. A missed target is said, and a red case has no number."""
    name = _short_name(case["name"])
    if case["verdict"] == "red":
        return name, "red", ""
    ours, beside = (_short(case[side]) for side in ("ours", "beside"))
    found = _result(case)
    said = [found["result"]] if found["result"] and case["measure"] != "memory" else []
    faster = case.get("over_faster")
    if faster and faster["dtype"] != case["beside"]["dtype"]:
        said.append(f"{faster['dtype'].replace('bfloat', 'bf')} {faster['value']:.3g}x")
    if case["verdict"] == "missed":
        said.append(f"missed: {found['target'].partition(', aim')[0]}")
    return name, ours, " ".join([*([beside] if beside else []), *([f"({', '.join(said)})"] if said else [])])


def _short(side: Result | None) -> str:
    return seconds(side["median"]) if side and "median" in side else _side(side)


def full_block(results: Result) -> str:
    columns = columns_of(results)
    notes = "".join(f"\n{wrapped(f'{reason}.')}\n" for reason in cannot_run(results))
    table = markdown(columns, [row(case, columns) for case in results["cases"]])
    return f"{table}{notes}\n{wrapped(f'{caption(results)} {floor_note(results)}')}\n"


def committed(folder: Path, suite: str) -> dict[str, Result]:
    """The results of a whole suite, one for each machine, by the names of their files.

    ``ValueError`` for a run that did not come to its end.
    """
    found = {file.stem: _read(file) for file in sorted(folder.glob(f"{suite}-*.json"))}
    whole = {stem: results for stem, results in found.items() if not (results.get("quick") or results.get("filter"))}
    for stem, results in whole.items():
        progress = results.get("progress")  # older files were written at the end only
        if progress and progress["measured"] < progress["of"]:
            there = f"{progress['measured']} of {progress['of']} cases"
            raise ValueError(f"{folder / stem}.json: unfinished, {there} are there; run `yoso bench {suite}` to its end")
    return whole


def _none(suite: str) -> str:
    if suite == "gpu":
        none = "No result of a GPU is committed yet: nobody has run the suite on one, and no time of a CUDA variant is known."
    else:
        none = f"No result of `yoso bench {suite}` is committed yet."
    return f"{wrapped(none)}\n"


def machines_block(folder: Path, suite: str) -> str:
    """A section for every machine with committed results, or a line that there is none."""
    sections = []
    for stem, results in committed(folder, suite).items():
        where = results["environment"]
        title = where["gpu"]["name"] if "gpu" in where else processor_of(where)
        picture = f"![time and memory against n](results/{stem}.png)\n\n" if SUITES[suite].picture else ""
        sections.append(f"### {title}\n\n{picture}{full_block(results)}")
    return "\n".join(sections) or _none(suite)


REFERENCE = 4096
"""The length n for which bytes are counted where there are no results."""


def bytes_block(folder: Path) -> str:
    """The bytes that each CUDA variant moves in the setting of the suite ``gpu``, in float32.
    `traffic` has the formulas.
    """
    shapes = next(w for w in (case.ours for case in SUITES["gpu"].cases) if w.n == REFERENCE and w.dtype == "float32")
    rows = []
    for op, variant in FORMULAS:
        name = next(name for name, contender in CONTENDERS.items() if isinstance(contender, Ours) and contender.op == op)
        rows.append((op, variant, *_counted(by_design(op, variant, shapes), least_bytes(replace(shapes, run=name)))))
    for name in ("paper", "paper_tables"):
        workload = replace(shapes, run=name, variant=None)
        rows.append((name, CONTENDERS[name].label, *_counted(traffic(workload) or [], least_bytes(workload))))
    header = ("operation", "variant", "least", "device memory", "least / moved", "from cache", "by kernel")
    setting = f"batch {shapes.batch}, {shapes.heads} heads, n = {shapes.n:,}, d = {shapes.dim}, {shapes.dtype}"
    hashes = f"m = {shapes.num_hash}, tau = {shapes.hash_code_len}"
    note = f"{setting}, {hashes}, on a GPU with {H100.max_shared >> 10} KiB of shared memory to a block."
    return f"{markdown(header, rows)}\n{wrapped(note)}\n"


def _counted(kernels: Sequence[Traffic], least: int) -> tuple[str, ...]:
    moved, cached = Counter[str](), 0
    for kernel in kernels:
        moved[kernel.kernel] += kernel.moved
        cached += kernel.cached
    by_kernel = ", ".join(f"{name} {size(count)}" for name, count in moved.items())
    return (size(least), size(moved.total()), f"{least / moved.total():.0%}", size(cached), by_kernel)


def _read(file: Path) -> Result:
    found: Result = json.loads(file.read_text("utf-8"))
    return found


BLOCKS: dict[str, Callable[[Path], str]] = {
    "cpu": lambda folder: headline_block(list(committed(folder, "cpu").values())),
    "cpu-all": lambda folder: machines_block(folder, "cpu"),
    "model": lambda folder: machines_block(folder, "model"),
    "bias": lambda folder: bias_table(_read(folder / "hadamard_bias.json")),
    "bias-relative": lambda folder: relative_table(_read(folder / "hadamard_bias.json")),
    "bias-promise": lambda folder: promise_table(_read(folder / "hadamard_bias.json")),
    "bias-kept": lambda folder: kept_table(_read(folder / "hadamard_bias.json")),
    "bias-near": lambda folder: near_table(_read(folder / "hadamard_bias.json")),
    "bias-variance": lambda folder: variance_table(_read(folder / "hadamard_bias.json")),
    "bias-rounds": lambda folder: rounds_table(),
    "error-variance": lambda folder: error.variance_table(_read(folder / "error.json")),
    "error-coverage": lambda folder: error.coverage_table(_read(folder / "error.json")),
    "error-cosine": lambda folder: error.cosine_table(_read(folder / "error.json")),
    "error-equal": lambda folder: equal_error_table(_read(folder / "error.json")),
    "learning": lambda folder: learning_table(_read(folder / "learning.json")),
    "gpu": lambda folder: machines_block(folder, "gpu"),
    "gpu-bytes": bytes_block,
    "gpu-static": lambda folder: static.static_table(_read(folder / static.FILE)),
}
"""For each name, the function that writes the text between its markers, given the folder of
results.
"""


def filled(text: str, folder: Path) -> str:
    """``text`` with every block written again. ``KeyError`` for a block of an unknown name."""
    return _BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]](folder) + found[3], text)


if __name__ == "__main__":
    for file in FILES:
        with written(file) as part:
            part.write_text(filled(file.read_text("utf-8"), RESULTS), "utf-8")
