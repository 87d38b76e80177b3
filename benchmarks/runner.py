"""Run a suite: check first, then time both sides in turns, and keep every repeat."""

import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from yoso_core import variants
from yoso_core.benchmarks import bias, memory
from yoso_core.benchmarks.cases import SUITES, Case, Workload
from yoso_core.benchmarks.contenders import CONTENDERS, Check, Ours, Tensors, tensors
from yoso_core.benchmarks.floor import floor, measured_rates
from yoso_core.comparison import environment

Result = dict[str, Any]

SAMPLE_SECONDS = 0.05
"""A short call is repeated until one timed sample lasts about so long."""
CASE_SECONDS = 12.0
"""Long calls get fewer repeats, so that a case takes about so long; three at least."""
MEGABYTE = 1e6


class RedComparison(RuntimeError):
    """A result differs from the definition, or a call raised: said once the table is printed and the results are written."""


def run_suite(
    name: str, *, repeats: int = 7, quick: bool = False, output: Path = Path("benchmarks/results"), progress: bool = True
) -> Path:
    """Measure a suite, print its table, and write every repeat to ``output``.

    Of every case the results are compared with the definition first, at the same shapes. Where that fails, or the call raises, the case is
    red: nothing of it is timed and no number of it is shown.

    Parameters
    ----------
    name : ``"cpu"``, or ``"bias"`` for the table of how far the Hadamard hash is from its ideal.
    repeats : timed samples per side, in turns; slow cases get fewer, but three at least.
    quick : only the cases that are marked quick: whether the benchmark works, on small inputs.
    output : a folder, made where it does not exist.
    progress : show what is running.

    Returns
    -------
    The JSON file.

    Raises
    ------
    ValueError : there is no such suite, or ``repeats`` is below 1.
    ModuleNotFoundError : a package that the suite needs is missing.
    RedComparison : a case is red; the others are measured, printed and written all the same.
    """
    if repeats < 1:
        raise ValueError(f"repeats: need at least 1, got {repeats}")
    output = Path(output)
    if name == "bias":
        return bias.run(output, progress=progress)
    if name not in SUITES:
        raise ValueError(f"name: no suite {name!r}; there are {', '.join([*SUITES, 'bias'])}")
    cases = [case for case in SUITES[name] if case.quick or not quick]
    _need_packages(name, cases)

    from rich.console import Console
    from rich.progress import Progress

    from yoso_core.benchmarks.report import print_suite

    before = settings(repeats)
    console = Console(width=None if sys.stdout.isatty() else 160)
    results: list[Result] = []
    checks: dict[Workload, Check] = {}
    # Drawn by hand, since a thread that draws would be measured too.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name, refresh=True)
            results.append(run_case(case, repeats=repeats, checks=checks))
            bar.advance(task)
    run = {
        "suite": name,
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": where(),
        "settings": before,
        "rates": asdict(measured_rates()),
        "cases": results,
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / (f"{name}-quick.json" if quick else f"{name}.json")
    path.write_text(json.dumps(run, indent=1) + "\n", "utf-8")
    print_suite(run, console)
    if importlib.util.find_spec("matplotlib"):
        from yoso_core.benchmarks.plots import plot_suite

        plot_suite(run, path.with_suffix(".png"))
    else:
        console.print("no picture: matplotlib is not installed (pip install 'yoso-core[plots]')")
    if red := sum(case["verdict"] == "red" for case in results):
        raise RedComparison(f"{red} of {len(results)} cases are red, see {path}")
    return path


def _need_packages(suite: str, cases: Sequence[Case]) -> None:
    workloads = [w for case in cases for w in (case.ours, case.beside) if w]
    needed = {package for workload in workloads for package in CONTENDERS[workload.run].requires}
    missing = sorted(package for package in needed if importlib.util.find_spec(package) is None)
    if missing:
        raise ModuleNotFoundError(f"the suite {suite!r} needs {' and '.join(missing)}: pip install 'yoso-core[model]'")


def run_case(case: Case, *, repeats: int, checks: dict[Workload, Check]) -> Result:
    """One case as it stands in the JSON. ``checks`` remembers what has been compared already."""
    result: Result = {
        "name": case.name,
        "measure": case.measure,
        "headline": case.headline,
        "limit": case.limit,
        "aim": case.aim,
        "share": case.share,
        "ours": describe(case.ours),
        "beside": describe(case.beside) if case.beside else None,
    }
    sides = [workload for workload in (case.ours, case.beside) if workload]
    try:
        for workload in sides:
            contender = CONTENDERS[workload.run]
            if workload not in checks and isinstance(contender, Ours):
                checks[workload] = contender.check(workload)
        compared = [checks[workload] for workload in sides if workload in checks]
        if red := [found for found in compared if not found.green]:
            why = f"differs from the definition by {red[0].tolerance_used:.3g} times what is allowed"
            return {**result, "verdict": "red", "why": why}
        result["checks"] = [asdict(found) for found in compared]
        measured = _memory(sides) if case.measure == "memory" else _times(sides, repeats)
    except Exception as error:  # a broken case must not take the others with it: it is red, and says why
        return {**result, "verdict": "red", "why": f"{type(error).__name__}: {error}"}
    for side, numbers in zip(("ours", "beside"), measured, strict=False):
        result[side] |= numbers
    result |= _compare(case, measured)
    if case.measure != "memory" and isinstance(CONTENDERS[case.ours.run], Ours):
        least = floor(case.ours, measured_rates())
        result["floor"] = {**asdict(least), "fraction": least.seconds / measured[0]["median"]}
    return result


def describe(workload: Workload) -> Result:
    contender = CONTENDERS[workload.run]
    chosen = workload.variant or variants(contender.op)[0].name if isinstance(contender, Ours) else None
    return {**asdict(workload), "variant": chosen, "label": contender.label}


def _memory(sides: Sequence[Workload]) -> list[Result]:
    return [{"working_bytes": memory.working_memory(workload)} for workload in sides]


def _times(sides: Sequence[Workload], repeats: int) -> list[Result]:
    calls: list[Callable[[], Any]] = []
    given: dict[tuple[int | str, ...], Tensors] = {}
    for workload in sides:
        shapes = (workload.n, workload.heads, workload.dim, workload.dtype, workload.num_hash, workload.hash_code_len)
        given[shapes] = given.get(shapes) or tensors(workload)  # both sides get the same tensors
        calls.append(CONTENDERS[workload.run].bind(workload, given[shapes]))
    seconds = in_turns(calls, repeats)
    return [{"seconds": s, "median": median(s), "min": min(s), "max": max(s)} for s in seconds]


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds per call of every sample: A B A B ..., after a warm-up of each.

    Every turn of a short call begins with one that is not timed, since the other side's threads may still be spinning.
    """
    warm = [_seconds(call) for call in calls]
    warm = [_seconds(call) if t < 1 else t for call, t in zip(calls, warm, strict=True)]  # the first call of a short one tells little
    numbers = [max(1, round(SAMPLE_SECONDS / t)) for t in warm]
    rounds = min(repeats, max(3, int(CASE_SECONDS / sum(warm))))
    samples: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, number, kept in zip(calls, numbers, samples, strict=True):
                if number > 1:
                    call()
                kept.append(_seconds(call, number))
    finally:
        gc.enable()
    return samples


def _seconds(call: Callable[[], Any], number: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number


def _compare(case: Case, measured: Sequence[Result]) -> Result:
    """The number that the case is about, its spread over the pairs of neighbouring samples, and whether it is reached."""
    if case.measure == "memory":
        megabytes = measured[0]["working_bytes"] / MEGABYTE
        return {"value": megabytes, "verdict": _verdict(case, megabytes)}
    if len(measured) == 1:
        return {"value": None, "verdict": "no target"}
    ours, beside = measured

    def ratio(t_ours: float, t_beside: float) -> float:
        return t_beside / t_ours if case.measure == "speedup" else t_ours / (case.share * t_beside)

    pairs = [ratio(a, b) for a, b in zip(ours["seconds"], beside["seconds"], strict=True)]
    value = ratio(ours["median"], beside["median"])
    return {"value": value, "pairs": {"median": median(pairs), "min": min(pairs), "max": max(pairs)}, "verdict": _verdict(case, value)}


def _verdict(case: Case, value: float) -> str:
    if case.limit is None:
        return "no target"
    return "reached" if (value >= case.limit if case.measure == "speedup" else value <= case.limit) else "missed"


def where() -> Result:
    """The machine and the versions of what ran on it."""
    found = environment()
    if "transformers" in sys.modules:
        found["versions"]["transformers"] = sys.modules["transformers"].__version__
    return {**found, "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)}


def settings(repeats: int) -> Result:
    import torch

    return {
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "input": "1 x heads x n x d, standard normal, torch tensors on the CPU",
        "sampled": "the whole forward pass: hash both sides, cumulate, normalise; signs drawn outside",
    }
