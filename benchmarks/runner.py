"""Run a suite: check first, then time both sides in turns. Every repeat is kept."""

import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from yoso_core import variants
from yoso_core.benchmarks import bias, error, learning, memory
from yoso_core.benchmarks import isa as limits
from yoso_core.benchmarks.cases import SUITES, Case, Suite, Workload
from yoso_core.benchmarks.contenders import CONTENDERS, tensors
from yoso_core.benchmarks.floor import floor, measured_rates
from yoso_core.benchmarks.machines import MACHINES, Machine, results_name, where
from yoso_core.benchmarks.sides import Check, Ours, Peer, Tensors
from yoso_core.benchmarks.traffic import traffic
from yoso_core.files import write_json
from yoso_core.gpu.device import DoesNotFit

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]

SAMPLE_SECONDS = 0.05
"""A short call is repeated until one timed sample lasts about this long."""
CASE_SECONDS = 12.0
"""Long calls get fewer repeats, but at least three, so that a case takes about this long."""
MEGABYTE = 1e6
MEMORY = ("memory", "memory share")


STUDIES: dict[str, Callable[..., Path]] = {"bias": bias.run_bias, "error": error.run_error, "learning": learning.run_learning}
"""Suites that measure the estimate, not its cost."""


class RedComparison(RuntimeError):
    """A result differs from the definition, or a call raised. It is raised after the table is
    printed and the results are written.
    """


def run_suite(
    name: str,
    *,
    repeats: int = 7,
    quick: bool = False,
    filter: str | None = None,
    isa: str | None = None,
    output: Path = Path("benchmarks/results"),
    progress: bool = True,
) -> Path:
    """Measure a suite, print its table, and write every repeat to ``output``.

    The results are written again after every case, and say how many cases of how many are there.

    Every case is first compared with the definition, at the same shapes. Where the results differ,
    or the call raises, the case is red: it is not timed, and no number of it is shown. A side that
    cannot run at a size, for want of memory or of a package, is shown as such.

    Parameters
    ----------
    name : ``"cpu"``; ``"gpu"``, on CUDA; ``"model"``, the whole model beside transformers'; or
        ``"bias"``, how far the fast hashes are from their ideal; ``"error"``, how far the error bar
        and the plan are from what happens; or ``"learning"``, what a model makes of the way it is
        sampled in training.
    repeats : timed samples of each side, in turns. Slow cases get fewer, but at least three.
    quick : run only the cases that are marked quick, on small inputs, to see that the benchmark
        works; ``"bias"``, ``"error"`` and ``"learning"`` take few draws and steps.
    filter : run only the cases with this text in their names, in upper or lower case. Their results
        go to a file of their own, and there is no picture.
    isa : ``"avx2"`` or ``"avx512"``: both sides are limited to these instructions, in a process of
        its own. For suites on the CPU.
    output : a folder, made where it does not exist.
    progress : show what is running.

    Returns
    -------
    The path of the JSON file, which names the machine: ``cpu-amd-epyc-zen-3-avx2.json``, or
    ``gpu-nvidia-h100-80gb-hbm3.json``. A limited run has ``-limited`` after that, then a part of a
    suite ``-quick`` or ``-filter-`` and the text.

    Raises
    ------
    ValueError : there is no such suite, it cannot run on this machine, ``repeats`` is below 1, no
        case has ``filter`` in its name, this processor does not have ``isa``, or the suite takes no
        ``filter`` or ``isa``.
    ModuleNotFoundError : a package that the suite needs is missing.
    RedComparison : a case is red. The others are still measured, printed and written.
    """
    if repeats < 1:
        raise ValueError(f"repeats: need at least 1, got {repeats}")
    output = Path(output)
    if name not in (known := [*SUITES, *STUDIES]):
        raise ValueError(f"name: no suite {name!r}; there are {', '.join(known)}")
    _check_limit(name, isa)
    if name in STUDIES:
        if filter is not None:
            raise ValueError(f"filter: the suite {name!r} has no cases to choose from; {', '.join(SUITES)} have")
        return STUDIES[name](output, quick=quick, progress=progress)
    suite, cases = SUITES[name], _chosen(name, quick=quick, filter=filter)
    _need_packages(name, cases)
    if isa is not None:
        options = {"name": name, "repeats": repeats, "quick": quick, "filter": filter, "output": str(output), "progress": progress}
        return limits.run_limited(isa, options)
    device = _device(name)
    if reason := MACHINES[device].missing():
        raise ValueError(f"name: the suite {name!r} cannot run here: {reason}; `yoso bench cpu` runs anywhere")

    from rich.console import Console
    from rich.progress import Progress

    from yoso_core.benchmarks.report import print_suite

    results: Result = {
        "suite": name,
        "quick": quick,
        "filter": filter,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": where(device),
        "settings": settings(suite, repeats),
        "rates": asdict(measured_rates(device)),
        "progress": {"measured": 0, "of": len(cases)},
        "cases": [],
    }
    path = output / f"{results_name(name, results['environment'], quick=quick, filter=filter)}.json"
    console = Console(width=None if sys.stdout.isatty() else 160)
    measured: list[Result] = results["cases"]
    checks: dict[Workload, Check] = {}
    # Refreshed by hand, since a thread that draws would be measured too.
    with Progress(console=console, auto_refresh=False, transient=True, disable=not progress) as bar:
        task = bar.add_task("", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name, refresh=True)
            measured.append(run_case(case, repeats=repeats, checks=checks))
            results["progress"]["measured"] = len(measured)
            results["environment"] = where(device)  # again, since a case may load a package
            write_json(path, results)
            bar.advance(task)
    print_suite(results, console)
    if suite.picture and filter is None:
        _draw(results, path.with_suffix(".png"), console)
    if red := sum(case["verdict"] == "red" for case in measured):
        raise RedComparison(f"{red} of {len(measured)} cases are red, see {path}")
    return path


def _device(suite: str) -> str:
    return SUITES[suite].cases[0].ours.device


def _check_limit(suite: str, isa: str | None) -> None:
    if isa is None:
        return
    able = [name for name in SUITES if _device(name) == "cpu"]
    if suite not in able:
        raise ValueError(f"isa: the suite {suite!r} cannot be limited; {' and '.join(able)} can")
    limits.check(isa)


def _chosen(suite: str, *, quick: bool, filter: str | None) -> list[Case]:
    """The cases to run."""
    cases = [case for case in SUITES[suite].cases if case.quick or not quick]
    if filter is None:
        return cases
    chosen = [case for case in cases if filter.lower() in case.name.lower()]
    if not (filter.strip() and chosen):
        names = "; ".join(case.name for case in cases)
        raise ValueError(f"filter: no case of {suite!r}{' that is quick' if quick else ''} has {filter!r} in its name; there are: {names}")
    return chosen


def _draw(results: Result, path: Path, console: "Console") -> None:
    if importlib.util.find_spec("matplotlib"):
        from yoso_core.benchmarks.plots import plot_suite

        plot_suite(results, path)
    else:
        console.print("no picture: matplotlib is not installed (pip install 'yoso-core[plots]')")


def _need_packages(suite: str, cases: Sequence[Case]) -> None:
    needed = {package for case in cases for workload in _sides(case) for package in CONTENDERS[workload.run].requires}
    missing = sorted(package for package in needed if importlib.util.find_spec(package) is None)
    if missing:
        raise ModuleNotFoundError(f"the suite {suite!r} needs {' and '.join(missing)}: pip install 'yoso-core[model]'")


def _sides(case: Case) -> list[Workload]:
    return [workload for workload in (case.ours, case.beside, *case.also) if workload]


def run_case(case: Case, *, repeats: int, checks: dict[Workload, Check]) -> Result:
    """The results of one case, as in the JSON. ``checks`` holds the workloads that have been
    compared already.
    """
    result, sides = _described(case)
    try:
        for workload, side in sides.items():
            contender = CONTENDERS[workload.run]
            if reason := _unavailable(workload):
                side["cannot_run"] = reason
            elif workload not in checks and isinstance(contender, Ours):
                with _cannot_run(workload, side):
                    checks[workload] = contender.check(workload)
        compared = [checks[workload] for workload in sides if workload in checks]
        if red := [found.tolerance_used for found in compared if not found.green]:
            by = f" by {red[0]:.3g} times what is allowed" if isfinite(red[0]) else ""
            return _red(case, f"differs from the definition{by}")
        result["checks"] = [asdict(found) for found in compared]
        if "cannot_run" not in sides[case.ours]:
            able = {workload: side for workload, side in sides.items() if "cannot_run" not in side}
            if case.measure in MEMORY:
                _memory(able)
            else:
                _times(able, repeats)
    except Exception as error:  # a broken case must not stop the others: it is red and says why
        return _red(case, f"{type(error).__name__}: {error}")
    if "cannot_run" in sides[case.ours]:
        return {**result, "verdict": "cannot run", "why": sides[case.ours]["cannot_run"]}
    if case.measure not in MEMORY and isinstance(CONTENDERS[case.ours.run], Ours):
        result["floor"] = _floor(case.ours, sides[case.ours]["median"])
    return result | _compare(case, result)


def _described(case: Case) -> tuple[Result, dict[Workload, Result]]:
    """A case before anything is measured, and the descriptions of its sides, which it holds."""
    sides = {workload: describe(workload) for workload in _sides(case)}
    result = {
        "name": case.name,
        "measure": case.measure,
        "limit": case.limit,
        "aim": case.aim,
        "share": case.share,
        "ours": sides[case.ours],
        "beside": sides[case.beside] if case.beside else None,
        "also": [sides[workload] for workload in case.also],
    }
    return result, sides


def _red(case: Case, why: str) -> Result:
    """A red case. What has been measured of it is left out."""
    return {**_described(case)[0], "verdict": "red", "why": why}


def _unavailable(workload: Workload) -> str | None:
    """Why a variant that a workload names cannot run on this machine; ``None`` where all can."""
    contender = CONTENDERS[workload.run]
    if isinstance(contender, Ours):
        for op, name in contender.steps(workload):
            for variant in variants(op):
                if variant.name == name and not variant.available:
                    return f"{name}: {variant.reason}"
    return None


@contextmanager
def _cannot_run(workload: Workload, side: Result) -> Iterator[None]:
    """Note in the description of a side that it cannot run: the machine has no room, or a peer
    raises. Any other error is a fault and is raised.
    """
    try:
        yield
    except Exception as error:
        no_room = isinstance(error, DoesNotFit | MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not (no_room or (isinstance(CONTENDERS[workload.run], Peer) and isinstance(error, RuntimeError | ImportError))):
            raise
        side["cannot_run"] = ". ".join(" ".join(str(error).split()).split(". ")[:2]) or type(error).__name__


def _floor(workload: Workload, seconds: float) -> Result:
    rates = measured_rates(workload.device)
    least = floor(workload, rates)
    found = {**asdict(least), "fraction": least.seconds / seconds, "bandwidth": least.bytes / rates.copy_bytes / seconds}
    moved = traffic(workload, MACHINES[workload.device].limits()) if workload.device != "cpu" else None
    if moved is not None:
        by_design = sum(kernel.moved for kernel in moved)
        found["by_design"] = {
            "bytes": by_design,
            "cached": sum(kernel.cached for kernel in moved),
            "fraction": by_design / rates.copy_bytes / seconds,
        }
    return found


def describe(workload: Workload) -> Result:
    contender = CONTENDERS[workload.run]
    names = dict.fromkeys(name for _, name in contender.steps(workload) if name) if isinstance(contender, Ours) else ()
    return {**asdict(workload), "variant": " + ".join(names) or None, "label": contender.label}


def _memory(sides: Mapping[Workload, Result]) -> None:
    for workload, side in sides.items():
        with _cannot_run(workload, side):
            side["working_bytes"] = memory.working_memory(workload)


def _times(sides: Mapping[Workload, Result], repeats: int) -> None:
    """Time every side that can run; all its repeats go into its description."""
    calls: list[Callable[[], Any]] = []
    first: list[float] = []
    measured: list[Result] = []
    given: dict[Workload, Tensors] = {}
    machine = MACHINES[next(iter(sides)).device]
    for workload, side in sides.items():
        with _cannot_run(workload, side):
            shapes = replace(workload, run="", variant=None)
            given[shapes] = given.get(shapes) or tensors(workload)  # all sides get the same tensors
            call = CONTENDERS[workload.run].bind(workload, given[shapes])
            first.append(_seconds(call, machine=machine))
            calls.append(call)
            measured.append(side)
    for side, seconds in zip(measured, in_turns(calls, repeats, machine=machine, first=first), strict=True):
        side |= {"seconds": seconds, "median": median(seconds), "min": min(seconds), "max": max(seconds)}


def in_turns(
    calls: Sequence[Callable[[], Any]], repeats: int, *, machine: Machine = MACHINES["cpu"], first: Sequence[float] | None = None
) -> list[list[float]]:
    """Seconds per call of every sample: A B A B ..., after a warm-up of each. ``first`` are the
    seconds of the first calls, where those have been made.

    Every turn of a short call begins with a call that is not timed, since the threads of the other
    side may still be spinning.
    """
    warm = [_seconds(call, machine=machine) for call in calls] if first is None else first
    warm = [_seconds(call, machine=machine) if t < machine.patience else t for call, t in zip(calls, warm, strict=True)]
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
                kept.append(_seconds(call, number, machine=machine))
    finally:
        gc.enable()
    return samples


def _seconds(call: Callable[[], Any], number: int = 1, *, machine: Machine) -> float:
    """Seconds per call, from an idle machine until all ``number`` calls are done. On a GPU the
    calls queue up behind each other, as they do in use.
    """
    machine.wait()
    start = time.perf_counter()
    for _ in range(number):
        call()
    machine.wait()
    return (time.perf_counter() - start) / number


def _compare(case: Case, result: Result) -> Result:
    """The number of the case, its spread over the pairs of neighboring samples, and whether it
    reaches the target.
    """
    ours, beside = result["ours"], result["beside"]
    if case.measure == "memory":
        megabytes = ours["working_bytes"] / MEGABYTE
        return {"value": megabytes, "verdict": _verdict(case, megabytes)}
    if case.measure == "bandwidth":
        share = result["floor"]["bandwidth"]
        return {"value": share, "verdict": _verdict(case, share)}
    if beside is None:
        return {"value": None, "verdict": "no target"}
    if "cannot_run" in beside:
        return {"value": None, "verdict": "no peer"}
    if case.measure == "memory share":
        share = ours["working_bytes"] / beside["working_bytes"]
        return {"value": share, "verdict": _verdict(case, share)}

    def ratio(t_ours: float, t_beside: float) -> float:
        return t_beside / t_ours if case.measure == "speedup" else t_ours / (case.share * t_beside)

    if case.measure == "overhead":
        apart = (ours["median"] - beside["median"]) * 1e6
        return {"value": apart, "verdict": _verdict(case, apart)}
    pairs = [ratio(a, b) for a, b in zip(ours["seconds"], beside["seconds"], strict=True)]
    value = ratio(ours["median"], beside["median"])
    spread = {"median": median(pairs), "min": min(pairs), "max": max(pairs)}
    return {"value": value, "pairs": spread, **_over_faster(case, result), "verdict": _verdict(case, value)}


def _over_faster(case: Case, result: Result) -> Result:
    """The speedup over the peer in the dtype in which it is fastest, where it was timed in more
    than one.
    """
    beside = result["beside"]
    other = [side for side in result.get("also", []) if side["run"] == beside["run"] and "median" in side]
    if case.measure != "speedup" or not other:
        return {}
    fastest = min((beside, *other), key=lambda side: side["median"])
    return {"over_faster": {"value": fastest["median"] / result["ours"]["median"], "dtype": fastest["dtype"]}}


def _verdict(case: Case, value: float) -> str:
    if case.limit is None:
        return "no target"
    return "reached" if (value >= case.limit if case.measure in ("speedup", "bandwidth") else value <= case.limit) else "missed"


def settings(suite: Suite, repeats: int) -> Result:
    import torch

    return {
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "input": suite.inputs,
        "sampled": suite.sampled,
    }
