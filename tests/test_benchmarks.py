"""The benchmarks measure what they say, and show no number that they should not. Nothing here is a
timed assertion.
"""

import gc
import json
import math
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from typer.testing import CliRunner

import yoso_core
from yoso_core import backends, model, processor, reference, registry
from yoso_core.benchmarks import (
    bias,
    cases,
    contenders,
    directions,
    equal_error,
    error,
    floor,
    isa,
    learning,
    limited,
    machines,
    memory,
    plots,
    promise,
    report,
    runner,
    traffic,
)
from yoso_core.benchmarks.cases import Case, Suite, Workload
from yoso_core.benchmarks.contenders import CONTENDERS, Composed, FaceFunction
from yoso_core.benchmarks.floor import Rates, least_bytes, operations
from yoso_core.benchmarks.machines import H100, MACHINES, Limits
from yoso_core.benchmarks.sides import Check, Ours, Peer, Tensors
from yoso_core.cli import app
from yoso_core.gpu.cupy_kernels import weighted
from yoso_core.gpu.device import DoesNotFit, Launch, launches, record
from yoso_core.reference.hashing import ROTATIONS

ROOT = Path(__file__).parents[1]
TINY = Workload("yoso", 32, heads=2, dim=16, num_hash=4, hash_code_len=4, variant="numpy:formula")
PEER = replace(TINY, run="sdpa", variant=None)
NUMBERS = {"seconds", "median", "min", "max", "value", "pairs", "working_bytes", "floor", "checks"}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a sample, no measuring of the machine, and no time for the garbage of other
    tests.
    """
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(runner, "measured_rates", lambda device: Rates(1e9, 1e9))


@pytest.fixture(autouse=True)
def a_processor(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processor with AVX2 and nothing wider, in place of the one at hand."""
    told = tmp_path_factory.mktemp("proc") / "cpuinfo"
    told.write_text("model name\t: Stand-in\nflags\t\t: fpu fma avx2\n\n")
    monkeypatch.setattr(processor, "CPUINFO", told)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for variable in isa.LIMITS["avx2"]:
        monkeypatch.delenv(variable, raising=False)
    return told


STEM = "fake-stand-in-avx2"
"""The name of a file with results of that processor."""


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *suite: Case, **options: Any) -> dict[str, Any]:
    monkeypatch.setitem(cases.SUITES, "fake", Suite(suite, inputs="stand-ins", sampled="the whole pass"))
    path = runner.run_suite("fake", output=output, progress=False, **{"repeats": 4, **options})
    return json.loads(path.read_text("utf-8"))


def run_red(monkeypatch: pytest.MonkeyPatch, output: Path, *suite: Case) -> dict[str, Any]:
    with pytest.raises(runner.RedComparison, match="cases are red"):
        run(monkeypatch, output, *suite)
    return json.loads((output / f"{STEM}.json").read_text("utf-8"))


def speedup(name: str, limit: float | None, **options: Any) -> Case:
    return Case("fake", name, "speedup", TINY, PEER, limit=limit, **options)


def test_every_repeat_is_kept_beside_the_machine_and_the_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(
        monkeypatch, tmp_path, speedup("a", 1e-9, aim=2.0), Case("fake", "b", "cost", replace(TINY, dtype="bfloat16"), TINY, limit=1e9)
    )
    assert result["suite"] == "fake"
    assert {"processor", "cores", "instruction_set", "memory_gb", "system", "versions"} <= result["environment"].keys()
    assert {"repeats", "threads", "load_average_before"} <= result["settings"].keys()
    for case in result["cases"]:
        assert case["verdict"] == "reached"
        assert all(found["tolerance_used"] <= 1 and found["rows"] == 32 for found in case["checks"])
        for side in (case["ours"], case["beside"]):
            assert len(side["seconds"]) == 4
            assert side["min"] <= side["median"] <= side["max"]
        assert case["pairs"]["min"] <= case["pairs"]["median"] <= case["pairs"]["max"]
        assert case["floor"]["fraction"] > 0
    first = result["cases"][0]
    assert first["value"] == pytest.approx(first["beside"]["median"] / first["ours"]["median"])
    assert (first["limit"], first["aim"]) == (1e-9, 2.0)
    assert first["ours"]["variant"] == "numpy:formula"
    assert (tmp_path / f"{STEM}.png").stat().st_size > 0
    assert (result["environment"]["instruction_set"], result["environment"]["limited"]) == ("AVX2", {})
    assert result["environment"]["caches"].keys() == {"l1d", "l2", "l3"}


def test_a_cost_is_counted_by_its_share_of_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (case,) = run(monkeypatch, tmp_path, Case("fake", "twice", "cost", replace(TINY, n=64), TINY, share=2.0, limit=0.0))["cases"]
    assert case["value"] == pytest.approx(case["ours"]["median"] / (2 * case["beside"]["median"]))
    assert case["verdict"] == "missed"


def test_a_missed_target_is_printed_as_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case,) = run(monkeypatch, tmp_path, speedup("slow", 1e9))["cases"]
    assert case["verdict"] == "missed"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "slow" in line)
    assert "missed" in line
    assert "missed" in report.full_block({**json.loads((tmp_path / f"{STEM}.json").read_text("utf-8"))})


def test_a_red_comparison_shows_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = yoso_core.yoso_attention
    monkeypatch.setattr(yoso_core, "yoso_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    timed = speedup("doomed", 1e-9)
    result = run_red(monkeypatch, tmp_path, timed, replace(timed, measure="memory", name="doomed too"))
    for case in result["cases"]:
        assert case["verdict"] == "red"
        assert "differs from the definition" in case["why"]
        assert not NUMBERS & (case.keys() | case["ours"].keys() | case["beside"].keys())
        assert not any(cell for cell in report.row(case, report.columns_of(result))[1:] if cell != "red")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ doomed")]
    assert len(lines) == 2
    assert not any(character.isdigit() for line in lines for character in line)


@pytest.mark.parametrize("row", [0, 17, -1])
def test_one_wrong_row_is_red(monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    right = yoso_core.yoso_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        out[:, :, row] = out[:, :, row].roll(1, dims=-1)
        return out

    ours = CONTENDERS["yoso"]
    assert isinstance(ours, Ours)
    assert ours.check(TINY).green
    monkeypatch.setattr(yoso_core, "yoso_attention", wrong)
    assert not ours.check(TINY).green


def test_not_a_number_is_red() -> None:
    assert not Check(tolerance_used=float("nan"), largest_error=float("nan"), rows=1).green


def test_a_case_that_raises_is_red_and_the_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = Case("fake", "broken", "speedup", replace(TINY, variant="cpu:none"), PEER)
    first, second = run_red(monkeypatch, tmp_path, broken, speedup("sound", 1e-9))["cases"]
    assert first["verdict"] == "red"
    assert "has no variant 'cpu:none'" in first["why"]
    assert second["verdict"] == "reached"


def test_the_two_sides_take_turns() -> None:
    order: list[str] = []
    samples = runner.in_turns([lambda: order.append("A"), lambda: order.append("B")], 5)
    assert "".join(order) == "AB" + "AB" + "AB" * 5  # first calls, warm-up, samples
    assert [len(s) for s in samples] == [5, 5]


def test_short_calls_are_repeated_within_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 0.02)
    calls = []
    runner.in_turns([lambda: calls.append(time.sleep(0.001))], 1)
    assert len(calls) > 4


def test_long_calls_get_fewer_repeats_but_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "CASE_SECONDS", 0.0)
    assert [len(s) for s in runner.in_turns([lambda: None], 7)] == [3]
    assert [len(s) for s in runner.in_turns([lambda: None], 2)] == [2]


def test_quick_leaves_the_full_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, speedup("short", None, quick=True), speedup("long", None), quick=True)
    assert [case["name"] for case in result["cases"]] == ["short"]
    assert [file.name for file in tmp_path.glob("*.json")] == [f"{STEM}-quick.json"]
    assert result["cases"][0]["verdict"] == "no target"


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no suite 'tpu'; there are cpu, gpu, model, bias, error"):
        runner.run_suite("tpu", output=tmp_path)
    with pytest.raises(ValueError, match="repeats: need at least 1, got 0"):
        runner.run_suite("cpu", repeats=0, output=tmp_path)
    monkeypatch.setitem(CONTENDERS, "sdpa", Peer("absent", ("no_such_package",), lambda workload, given: lambda: None))
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install 'yoso-core\[model\]'"):
        run(monkeypatch, tmp_path, speedup("a", None))


@pytest.mark.parametrize(
    ("named", "flags", "used"),
    [
        ("AVX2", "avx2 avx512f", "AVX2"),
        ("AVX512", "avx512f", "AVX-512"),
        ("AVX512", "avx512f amx_tile", "AMX"),
        ("DEFAULT", "asimd", "NEON"),
        ("DEFAULT", "sse2", "DEFAULT"),
        ("SVE256", "asimd sve", "SVE256"),
    ],
)
def test_the_instruction_set_is_the_one_that_is_used(
    monkeypatch: pytest.MonkeyPatch, a_processor: Path, named: str, flags: str, used: str
) -> None:
    a_processor.write_text(f"flags : {flags}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: named)
    assert machines.used_instruction_set() == used
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")
    assert machines.used_instruction_set() == used.replace("AMX", "AVX-512")
    assert machines.where("cpu")["limited"] == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"}


def test_a_machine_in_words_and_one_of_which_less_is_known() -> None:
    older = {"processor": "AMD EPYC", "cores": 2}
    assert machines.machine_of(older) == "AMD EPYC, 2 cores"
    known = {**older, "microarchitecture": "Zen 5", "instruction_set": "AVX2", "caches": {"l1d": 49152, "l2": 1 << 20, "l3": None}}
    assert machines.machine_of(known) == "AMD EPYC (Zen 5), 2 cores, AVX2, L1d 48 KiB a core, L2 1 MiB a core"
    assert machines.processor_of({**known, "limited": {"a": "b"}}) == "AMD EPYC (Zen 5), 2 cores, limited to AVX2"


def in_this_process(monkeypatch: pytest.MonkeyPatch, status: int = 0) -> list[dict[str, str]]:
    """The environments of the processes that are started. What one would do is done here."""
    environments: list[dict[str, str]] = []

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        environments.append(env)
        if not status:
            with monkeypatch.context() as patch:
                for variable in isa.LIMITS["avx2"]:
                    patch.setenv(variable, env[variable])
                limited.main(Path(command[-2]), json.loads(command[-1]))
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(isa.subprocess, "run", start)
    return environments


def test_a_limited_run_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environments = in_this_process(monkeypatch)
    result = run(monkeypatch, tmp_path, speedup("short", None, quick=True), speedup("long", None), isa="avx2", filter="LONG", repeats=2)
    (given,) = environments
    assert given.items() >= isa.LIMITS["avx2"].items()
    assert result["environment"]["limited"] == isa.LIMITS["avx2"]
    assert [case["name"] for case in result["cases"]] == ["long"]
    assert [file.name for file in tmp_path.iterdir()] == [f"{STEM}-limited-filter-long.json"]
    assert "limited to AVX2" in report.caption(result)
    assert isa.LIMITS["avx2"].keys() == isa.LIMITS["avx512"].keys()


def test_errors_of_a_limited_run_come_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_this_process(monkeypatch)
    with pytest.raises(runner.RedComparison, match="1 of 1 cases are red"):
        run(monkeypatch, tmp_path, Case("fake", "broken", "speedup", replace(TINY, variant="cpu:none"), PEER), isa="avx2")
    in_this_process(monkeypatch, status=-9)
    with pytest.raises(RuntimeError, match="the process limited to avx2 ended with status -9"):
        run(monkeypatch, tmp_path, speedup("a", None), isa="avx2")


def test_a_limit_that_cannot_be_is_refused(tmp_path: Path, a_processor: Path) -> None:
    for name in ("gpu", "bias", "error", "learning"):
        with pytest.raises(ValueError, match=f"isa: the suite '{name}' cannot be limited; cpu and model can"):
            runner.run_suite(name, isa="avx2", output=tmp_path)
    with pytest.raises(ValueError, match="isa: no limit 'sse'; there are avx2, avx512"):
        runner.run_suite("cpu", isa="sse", output=tmp_path)
    with pytest.raises(ValueError, match="isa: this processor does not have avx512; it has avx2"):
        runner.run_suite("cpu", isa="avx512", output=tmp_path)
    a_processor.write_text("Features : asimd\n")
    with pytest.raises(ValueError, match="isa: this processor does not have avx2; it has NEON"):
        runner.run_suite("model", isa="avx2", output=tmp_path)


def test_the_process_that_measures_memory_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, str] = {}

    def start(command: list[str], *, env: dict[str, str], **options: Any) -> Any:
        given.update(env)
        return subprocess.CompletedProcess(command, 0, stdout="17\n")

    monkeypatch.setattr(memory.subprocess, "run", start)
    for variable, value in isa.LIMITS["avx512"].items():
        monkeypatch.setenv(variable, value)
    assert memory.working_memory(TINY) == 17
    assert given.items() >= isa.LIMITS["avx512"].items()


def test_our_kernels_are_limited_too() -> None:
    products = pytest.importorskip("yoso_core.cpu.products", reason="needs Numba")
    for name, wide in (("avx2", False), ("avx512", True)):
        assert products.has_wide_registers(isa.LIMITS[name]["NUMBA_CPU_FEATURES"]) is wide


def test_a_filter_chooses_cases_and_leaves_the_whole_results_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = (speedup("Short, n = 8", None), speedup("long, n = 88", None), speedup("longest", None, quick=True))
    whole = run(monkeypatch, tmp_path, *suite, repeats=1)
    assert (len(whole["cases"]), whole["filter"]) == (3, None)
    before = (tmp_path / f"{STEM}.json").read_bytes()
    part = run(monkeypatch, tmp_path, *suite, repeats=1, filter="sHORT")
    assert ([case["name"] for case in part["cases"]], part["filter"]) == (["Short, n = 8"], "sHORT")
    assert (tmp_path / f"{STEM}.json").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {f"{STEM}.json", f"{STEM}.png", f"{STEM}-filter-short.json"}
    assert report.committed(tmp_path, "fake").keys() == {STEM}
    with pytest.raises(
        ValueError, match="filter: no case of 'fake' has 'none' in its name; there are: Short, n = 8; long, n = 88; longest"
    ):
        run(monkeypatch, tmp_path, *suite, filter="none")
    with pytest.raises(ValueError, match="filter: no case of 'fake' that is quick has 'short' in its name; there are: longest"):
        run(monkeypatch, tmp_path, *suite, filter="short", quick=True)
    with pytest.raises(ValueError, match=r"filter: no case .* has ''"):
        run(monkeypatch, tmp_path, *suite, filter="")
    with pytest.raises(ValueError, match="filter: the suite 'bias' has no cases to choose from; cpu, gpu, model"):
        runner.run_suite("bias", filter="long", output=tmp_path)


def test_an_interrupt_loses_one_case_and_the_rest_makes_no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right, told = runner.run_case, []

    def interrupted(case: Case, **options: Any) -> Any:
        told.append(case.name)
        if len(told) == 3:
            raise KeyboardInterrupt
        return right(case, **options)

    monkeypatch.setattr(runner, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path, *(speedup(name, None) for name in "abcd"), repeats=1)
    found = json.loads((tmp_path / f"{STEM}.json").read_text("utf-8"))
    assert ([case["name"] for case in found["cases"]], found["progress"]) == (["a", "b"], {"measured": 2, "of": 4})
    with pytest.raises(ValueError, match=rf"{STEM}.json: unfinished, 2 of 4 cases are there; run `yoso bench fake` to its end"):
        report.committed(tmp_path, "fake")


def test_a_finished_run_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert run(monkeypatch, tmp_path, speedup("a", None), repeats=1)["progress"] == {"measured": 1, "of": 1}


def test_a_peer_in_another_dtype_gives_a_ratio_over_the_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = speedup("both", 1e-9, headline=True, also=(replace(PEER, dtype="bfloat16"), replace(PEER, run="yoso")))
    (measured,) = run(monkeypatch, tmp_path, case)["cases"]
    peers = {side["dtype"]: side["median"] for side in (measured["beside"], measured["also"][0])}
    faster = min(peers, key=lambda dtype: peers[dtype])
    assert measured["over_faster"] == {"value": peers[faster] / measured["ours"]["median"], "dtype": faster}
    assert measured["value"] == peers["float32"] / measured["ours"]["median"], "at equal dtype, as the target is"
    (alone,) = run(monkeypatch, tmp_path, speedup("one", None))["cases"]
    assert "over_faster" not in alone


def with_numbers(value: float | None, faster: tuple[float, str] | None = None, **said: Any) -> dict[str, Any]:
    """A case of the CPU suite with the numbers that its tables show."""
    side = {"median": 1.0, "min": 1.0, "max": 1.0, "dtype": "float32"}
    case = {"name": "first", "measure": "speedup", "limit": 3, "aim": None, "verdict": "reached", "ours": side, "beside": side}
    over = {} if faster is None else {"over_faster": {"value": faster[0], "dtype": faster[1]}}
    return {**case, "value": value, **over, **said}


def of_processor(used: str, *measured: dict[str, Any]) -> dict[str, Any]:
    where = {"processor": "P", "cores": 2, "instruction_set": used, "memory_gb": 1.0, "versions": {}}
    rest = {"date": "2026-01-01", "settings": {"load_average_before": 0}, "rates": {"copy_bytes": 1e9, "multiply_adds": 1e9}}
    return {"suite": "fake", "environment": where, "cases": list(measured), **rest}


def test_the_tables_show_the_ratio_over_the_faster() -> None:
    results = of_processor("AVX2", with_numbers(9.0, (4.0, "bfloat16")), with_numbers(9.0, name="second"))
    columns = report.columns_of(results)
    first, second = (dict(zip(columns, report.row(case, columns), strict=True)) for case in results["cases"])
    assert (first["result"], first["over the faster"], second["over the faster"]) == ("9x", "4x (bfloat16)", "")
    assert columns.index("over the faster") == columns.index("result") + 1
    assert "over the faster" not in report.columns_of(of_processor("AVX2", with_numbers(9.0)))
    assert "Over the faster: " in report.floor_note(results)
    assert report._headline(results["cases"][0])[-1] == "1.00 s (9x, bf16 4x)"
    assert report._headline(with_numbers(9.0, (9.0, "float32")))[-1] == "1.00 s (9x)"


def test_of_several_processors_the_worst_and_the_best_are_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"name": "used", "measure": "memory"}
    suite = (speedup("first", 3, headline=True), speedup("used", 64, headline=True), speedup("red", None, headline=True))
    monkeypatch.setitem(cases.SUITES, "fake", Suite(suite, inputs="", sampled=""))
    missed = {"verdict": "missed"}
    red = {"name": "red", "verdict": "red", "limit": None}
    files = [
        of_processor("AVX-512", with_numbers(9.0, (2.5, "bfloat16")), with_numbers(7.0, **used), with_numbers(None, **red)),
        of_processor("AVX2", with_numbers(2.0, **missed), with_numbers(2.0, **used)),
        of_processor("NEON", with_numbers(2.25), with_numbers(3.0, **used), with_numbers(4.0, name="red", limit=None)),
    ]
    lines = report.headline_block(files).splitlines()
    assert lines[0] == "| case | worst | best |"
    assert lines[2:5] == [
        "| first | 2x < 3 (AVX2) | 2.5x (AVX-512) |",
        "| used | 7 MB (AVX-512) | 2 MB (AVX2) |",
        "| red | red (AVX-512) | 4x (NEON) |",
    ]
    prose = " ".join(lines[5:])
    assert "Targets reached: AVX-512: 2 of 2; AVX2: 1 of 2; NEON: 2 of 2." in prose


def test_headlines_are_narrow_also_where_targets_are_missed() -> None:
    chosen = [case for case in cases.SUITES["cpu"].cases if case.headline]
    for faster in (None, (0.123, "bfloat16")):
        measured = [
            with_numbers(0.456, faster if "SDPA" in case.name else None, name=case.name, limit=case.limit, aim=80, verdict="missed")
            for case in chosen
            if case.measure == "speedup"
        ]
        results = of_processor("AVX-512", *measured) | {"suite": "cpu"}
        for files in ([results], [results, results]):
            assert max(map(len, report.headline_block(files).splitlines())) < report.PROSE_COLUMNS


def test_every_processor_has_its_section(tmp_path: Path) -> None:
    for used in ("AVX-512", "AVX2"):
        (tmp_path / f"cpu-p-{used.lower()}.json").write_text(json.dumps(of_processor(used, with_numbers(2.0))))
        (tmp_path / f"model-p-{used.lower()}.json").write_text(json.dumps(of_processor(used, with_numbers(2.0))))
    text = report.machines_block(tmp_path, "cpu")
    assert text.index("### P, 2 cores, AVX-512") < text.index("(results/cpu-p-avx-512.png)") < text.index("### P, 2 cores, AVX2")
    assert text.count("| first |") == 2
    assert "png" not in report.machines_block(tmp_path, "model"), "that suite makes no picture"
    assert "No result of `yoso bench cpu` is committed" in report.BLOCKS["cpu"](tmp_path / "none")


def test_softmax_is_measured_in_bfloat16_too_on_the_same_numbers() -> None:
    found = {(case.ours.run, case.ours.n, case.ours.hash_code_len): case for case in cases.SUITES["cpu"].cases if case.also}
    assert found.keys() == {("yoso", n, 8) for n in (512, 4096, 16384)} | {("yoso_training", 4096, 8)}
    assert all(case.beside and case.also == (replace(case.beside, dtype="bfloat16"),) for case in found.values())
    half = replace(PEER, dtype="bfloat16")
    wide, narrow = contenders.tensors(PEER), contenders.tensors(half)
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in ("query", "key", "value"))
    assert CONTENDERS["sdpa"].bind(half, narrow)().dtype == torch.bfloat16


def test_the_cpu_suite_holds_the_numbers_to_reach() -> None:
    suite = cases.SUITES["cpu"].cases
    assert len({case.name for case in suite}) == len(suite)
    assert all(case.suite == "cpu" for case in suite)
    speeds = {
        case.ours.n: (case.limit, case.aim) for case in suite if case.beside and case.beside.run == "sdpa" and case.measure == "speedup"
    }
    assert [speeds[n] for n in (512, 4096, 16384)] == [(1.5, 3), (12, 20), (40, 80)]
    assert all(case.limit == (256 if case.ours.run == "yoso_training" else 64) for case in suite if case.measure == "memory")


def test_the_cpu_suite_holds_the_numbers_to_reach_in_training() -> None:
    found = {
        (case.ours.run, case.beside and case.beside.run, case.ours.n, case.ours.hash_code_len, case.ours.backward_num_hash): (
            case.measure,
            case.limit,
            case.aim,
        )
        for case in cases.TRAINING
    }
    assert found == {
        ("yoso_training", "sdpa_training", 1024, 8, None): ("speedup", None, None),
        ("yoso_training", "sdpa_training", 4096, 8, None): ("speedup", 3, 8),
        ("yoso_training", "sdpa_training", 16384, 8, None): ("speedup", 6, 30),
        ("yoso_training", "sdpa_training", 16384, 14, None): ("speedup", 8, None),
        ("yoso_training", "sdpa_training", 4096, 8, 8): ("speedup", 9, None),
        ("yoso_training", "sdpa_training", 16384, 8, 8): ("speedup", 22, None),
        ("yoso_expectation_training", "transformers_expectation_training", 4096, 8, None): ("speedup", 6, None),
        ("yoso_training", None, 65536, 8, None): ("memory", 256, None),
        ("cumulation_operator", "cumulation_kernel", 16, 8, None): ("overhead", 50, None),
    }
    assert set(cases.TRAINING) <= set(cases.SUITES["cpu"].cases)
    assert all(case.beside is None or case.beside.backward_num_hash is None for case in cases.TRAINING)


def test_gradients_from_fewer_hashes_are_checked_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Workload("yoso_training", 40, heads=2, dim=8, num_hash=6, hash_code_len=3, backward_num_hash=2)
    contender = CONTENDERS["yoso_training"]
    assert isinstance(contender, Ours)
    assert contender.check(few).green
    every = replace(few, backward_num_hash=None)
    assert operations(few) < operations(every)
    told = iter([{}, {"backward_num_hash": 2}, {"backward_num_hash": 2}])  # the call is not told, the definition is
    monkeypatch.setattr(contenders, "_fewer", lambda workload: next(told))
    contenders._right_gradients.cache_clear()
    assert not contender.check(few).green


def test_the_readme_shows_five_cases_of_the_cpu_suite() -> None:
    assert {
        (name, case.ours.run, case.ours.n, case.measure) for name, suite in cases.SUITES.items() for case in suite.cases if case.headline
    } == {
        ("cpu", "yoso", 4096, "speedup"),
        ("cpu", "yoso", 16384, "speedup"),
        ("cpu", "yoso_expectation", 4096, "speedup"),
        ("cpu", "yoso_training", 4096, "speedup"),
        ("cpu", "yoso", 262_144, "memory"),
    }
    lines = report.BLOCKS["cpu"](ROOT / report.RESULTS).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 5
    assert {line.count("|") for line in table} == {4}
    assert all(len(line) <= report.PROSE_COLUMNS for line in lines)


def test_a_missed_headline_says_so_and_a_red_one_has_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, speedup("slow", 1e9, headline=True), speedup("fast", 1e-9), speedup("free", None))
    block = report.headline_block([result])
    assert "missed: ≥ 1e+09" in next(line for line in block.splitlines() if line.startswith("| slow |"))
    assert " ".join(block.split()).endswith("AVX2: 1 of 2 targets reached.")
    result["cases"][0] = {**runner._red(speedup("slow", 1e9), "it differs")}
    assert "| slow | red |  |" in report.headline_block([result])


def test_prose_below_a_table_is_wrapped_and_makes_no_list() -> None:
    prose = report.wrapped("forward + backward - less * more " * 40)
    assert all(len(line) <= report.PROSE_COLUMNS for line in prose.splitlines())
    assert not any(line.startswith(("+ ", "- ", "* ")) for line in prose.splitlines())
    assert " ".join(prose.split()) == "forward + backward - less * more " * 39 + "forward + backward - less * more"
    for file in report.FILES:
        blocks = report._BLOCK.finditer((ROOT / file).read_text("utf-8"))
        prose_lines = [line for found in blocks for line in found[0].splitlines() if not line.startswith("|")]
        assert all(len(line) <= report.PROSE_COLUMNS for line in prose_lines)


def test_the_model_suite_holds_the_numbers_to_reach() -> None:
    suite = cases.SUITES["model"].cases
    assert len({case.name for case in suite}) == len(suite)
    assert all(case.suite == "model" and (case.ours.num_hash, case.ours.hash_code_len) == (64, 9) for case in suite)
    reach = {(case.measure, case.ours.run, case.ours.n): case.limit for case in suite if case.limit is not None}
    assert reach == {
        ("speedup", "yoso_model", 4096): 15,
        ("speedup", "yoso_model_expectation", 4096): 7,
        ("memory share", "yoso_model", 4096): 1 / 3,
        ("memory share", "yoso_model_expectation", 4096): 1 / 3,
        ("speedup", "yoso_model_training", 1024): 3,
    }
    peers = {"yoso_model_training": "transformers_model_training", "yoso_model": "transformers_model"}
    for case in suite:
        assert case.beside == replace(case.ours, run=peers[case.ours.run.replace("_expectation", "")])


MODELS = ["yoso_model", "yoso_model_expectation", "yoso_model_training", "yoso_model_expectation_training"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_another_attention_is_red(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from yoso_core.model import layers

    workload, contender = Workload(name, 20, heads=2, dim=8, num_hash=5, hash_code_len=3), CONTENDERS[name]
    assert isinstance(contender, Ours)
    assert contender.check(workload).green
    right = layers.yoso_attention

    def wrong(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return out if options["variant"] else out.roll(1, dims=-2)

    monkeypatch.setattr(layers, "yoso_attention", wrong)
    assert not contender.check(workload).green


def test_the_layer_without_its_attention_leaves_the_model_as_it_was() -> None:
    workload = Workload("dense_layers", 20, heads=2, dim=8)
    whole = CONTENDERS["yoso_model_expectation"].bind(replace(workload, run="yoso_model_expectation"), {})
    before = whole()
    without = CONTENDERS["dense_layers"].bind(workload, {})()
    assert not torch.allclose(before, without)
    assert torch.equal(before, whole())


def test_a_memory_share_is_of_what_the_peer_takes() -> None:
    case = next(case for case in cases.SUITES["model"].cases if case.measure == "memory share")
    sides = {"ours": {"working_bytes": 30}, "beside": {"working_bytes": 100}}
    assert runner._compare(case, sides) == {"value": 0.3, "verdict": "reached"}
    assert runner._compare(case, {**sides, "ours": {"working_bytes": 34}})["verdict"] == "missed"


def test_the_floor_counts_the_additions_of_the_transforms() -> None:
    # D = 64, tau = 8, m = 32: 4 rotations, so 7 rounds of 64 * 6 additions; then 32 table rows of
    # 64.
    assert operations(Workload("yoso", n=1, heads=1)) == 2 * (7 * 64 * 6 + 32 * 64)


def test_memory_is_what_a_call_takes_beyond_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(workload: Workload, given: Tensors) -> Any:
        def call() -> torch.Tensor:
            scratch = np.ones(40_000_000 if workload.n > 64 else 8, np.uint8)
            out = torch.ones(20_000_000 if workload.n > 64 else 8, dtype=torch.uint8)
            return out + int(scratch[0]) - 1 if workload.n <= 64 else out

        return call

    monkeypatch.setitem(CONTENDERS, "hungry", Peer("hungry", (), bind))
    assert 39e6 < memory.measure(Workload("hungry", 65, heads=1, dim=1)) < 45e6


def test_gradients_are_no_working_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(workload: Workload, given: Tensors) -> Any:
        return lambda: tuple(torch.ones(10_000_000 if workload.n > 64 else 8, dtype=torch.uint8) for _ in range(4))

    monkeypatch.setitem(CONTENDERS, "hungry", Peer("hungry", (), bind))
    assert memory.measure(Workload("hungry", 65, heads=1, dim=1)) < 5e6


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    assert 0 <= memory.working_memory(TINY) < 1e9
    with pytest.raises(RuntimeError, match="measuring the memory of nobody failed"):
        memory.working_memory(replace(TINY, run="nobody"))


def test_tables_are_written_from_results_and_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, speedup("first", 1e9, headline=True), speedup("second", None))
    (tmp_path / "cpu-a.json").write_text(json.dumps(result))
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:cpu-all -->\n<!-- /bench -->\nafter\n"
    once = report.filled(text, tmp_path)
    assert report.filled(once, tmp_path) == once
    assert once.startswith("before\n<!-- bench:cpu -->\n| case |")
    assert once.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in once
    assert (once.count("| first |"), once.count("| second |")) == (2, 1)
    assert once.count(" floor / time |") == 1, "the table of the README is a narrow one"
    with pytest.raises(KeyError, match="nothing"):
        report.filled("<!-- bench:nothing -->\n<!-- /bench -->", tmp_path)


@pytest.mark.parametrize("file", report.FILES, ids=str)
def test_committed_tables_are_those_of_the_committed_results(file: Path) -> None:
    text = (ROOT / file).read_text("utf-8")
    assert text == report.filled(text, ROOT / report.RESULTS), "run python -m yoso_core.benchmarks.report"


def largest(dim: int, hash_code_len: int) -> tuple[float, float]:
    cell = bias.measure(dim, hash_code_len, draws=256, variant="numpy:formula")
    return cell["largest"], cell["largest_standard_error"]


def test_the_hadamard_hash_is_biased_where_it_is_known_to_be() -> None:
    assert largest(1, 4) == (0.0, 0.0)
    # A right angle in the plane: (a, b) and (b, -a) agree in exactly one of the two signs, so codes
    # of two bits never collide.
    assert largest(2, 2)[0] == pytest.approx(0.25)
    assert largest(2, 2) == largest(2, 2)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("hash_code_len", bias.CODE_LENS)
def test_the_bias_bound_holds_for_large_dimensions(dim: int, hash_code_len: int) -> None:
    assert largest(dim, hash_code_len)[0] < bias.BOUND


@pytest.mark.parametrize("hash_code_len", bias.CODE_LENS)
def test_the_bias_bound_rejects_another_code_length(monkeypatch: pytest.MonkeyPatch, hash_code_len: int) -> None:
    right = bias.expected_weight
    monkeypatch.setattr(bias, "expected_weight", lambda theta, tau: right(theta, tau + 1))
    assert largest(64, hash_code_len)[0] > 2 * bias.BOUND


def test_relative_biases_tell_the_layouts_apart() -> None:
    """At a setting of the paper's own; planes have none."""
    setting = promise.Setting(32, 11, 32)
    found = {}
    for hash in bias.HASHES:
        groups = promise.groups_for(setting, 0.5, 0.02, num_hash=32, least=32)
        found[hash] = promise.relative(promise.collisions(hash, "Gaussian", setting, 0.5, groups=groups)[:, 1], 0.5, 11)
    assert found["paper"][0] < -0.2
    for hash in ("chained", "planes"):
        assert abs(found[hash][0]) < 4 * found[hash][1]
    assert [bias.rounds(hash, setting) for hash in bias.HASHES] == [48, 14, None]
    few = promise.Setting(64, 8, 32)
    assert [bias.rounds(hash, few) for hash in bias.HASHES] == [12, 7, None]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[np.ndarray[Any, Any]]:
    """A package with a table of 7 words of 384 numbers, in the place of the real one."""
    model = tmp_path / "tiny_minilm" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    table = np.random.default_rng(0).standard_normal((7, 384), dtype=np.float32)
    save_file({"embeddings.word_embeddings.weight": table, "other": table[:1]}, model / "model.safetensors")
    (model / "vocab.txt").write_text("[PAD]\n[unused0]\nthe\nof\n##ing\ncat\ndog\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(directions, "MINILM", "tiny_minilm")
    directions.word_vectors.cache_clear()
    yield table[2:]
    directions.word_vectors.cache_clear()


def test_words_are_rows_of_the_table(monkeypatch: pytest.MonkeyPatch, words: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(directions.word_vectors(), words)
    first, across = directions.KINDS["words"](np.random.default_rng(1), 40, 128)
    slices = words.reshape(5, 3, 128)
    for x, y in zip(first, across, strict=True):
        (word, part), (other, same) = (np.argwhere((slices == v).all(-1))[0] for v in (x, y))
        assert word != other
        assert part == same
    assert directions.kinds_here() == list(directions.KINDS)
    monkeypatch.setattr(directions, "MINILM", "no_such_package")
    assert directions.missing_words() == "no package no_such_package"
    assert directions.kinds_here() == [kind for kind in directions.KINDS if kind != "words"]


@pytest.mark.usefixtures("words")
@pytest.mark.parametrize("kind", directions.KINDS)
@pytest.mark.parametrize("cosine", promise.BOUNDS)
def test_pairs_lie_at_their_angle(kind: str, cosine: float) -> None:
    first, second = directions.pairs_at_cosine(kind, cosine, 50, 32, np.random.default_rng(0)).astype(np.float64)
    for x in (first, second):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.sum(first * second, axis=-1), cosine, atol=1e-6)


def test_collisions_are_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hash whose codes are drawn here: pairs meet in every third hash."""
    setting = promise.Setting(4, 2, 12)

    def codes(hash: str, setting: promise.Setting, vectors: np.ndarray[Any, Any], rng: np.random.Generator) -> np.ndarray[Any, Any]:
        drawn = rng.integers(1, 4, size=(*vectors.shape[:2], setting.num_hash))
        drawn[:, promise.PAIRS :] = drawn[:, : promise.PAIRS] * (np.arange(setting.num_hash) % 3 == 0)
        return drawn

    monkeypatch.setattr(promise, "drawn_codes", codes)
    found = promise.collisions("chained", "Gaussian", setting, 0.5, groups=promise.BLOCK + 3)
    assert found.shape == (promise.BLOCK + 3, 3)
    np.testing.assert_allclose(found, np.broadcast_to([3 / 8, 4 / 12, 1 / 9], found.shape))


def test_the_variance_of_a_mean() -> None:
    """Independent hashes have a ratio of 1; hashes that are equal in pairs one of 2."""
    rng, num_hash = np.random.default_rng(5), 6
    hits = rng.random((400, 50, num_hash)) < 0.3
    for meet, ratio in ((hits, 1), (np.repeat(hits[..., :3], 2, axis=-1), 2)):
        rate = meet.mean(axis=-1)
        rates = np.stack([rate.mean(axis=1), rate.mean(axis=1), (rate**2).mean(axis=1)], axis=1)
        found, error = promise.variance_ratio(rates, num_hash)
        assert 0.005 < error < 0.05
        assert abs(found - ratio) < 4 * error


def results_of_bias() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / report.RESULTS / "hadamard_bias.json").read_text("utf-8"))
    return found


def test_committed_promises_are_kept() -> None:
    """Every row of the table of rotations, on every kind of vectors, for 8 hashes and for as many
    as there is room for. Standard errors are at most a quarter of the bound; 720 cells are allowed
    three of them.
    """
    results = results_of_bias()
    assert results["left_out"] is None
    assert not results["quick"]
    cells = {(c["dim"], c["hash_code_len"], c["num_hash"], c["kind"], c["cosine"]): c for c in results["promise"]}
    assert set(cells) == {
        (setting.dim, setting.hash_code_len, num_hash, kind, cosine)
        for setting in promise.PROMISED
        for num_hash in (promise.FEW, setting.num_hash)
        for kind in directions.KINDS
        for cosine in promise.cosines(kind)
    }
    for key, cell in cells.items():
        assert cell["rotations"] == ROTATIONS[key[0]][key[1]]
        assert cell["bound"] == promise.BOUNDS[key[-1]]
        assert cell["standard_error"] < cell["bound"] / 4, key
        assert abs(cell["bias"]) < cell["bound"] + 3 * cell["standard_error"], key


def test_committed_biases_of_random_directions_are_the_predicted_ones() -> None:
    """All cells together: chi-squared of the differences. Without the bits that share a rotation
    the prediction is far off.
    """

    def chi_squared(predicted: Callable[[promise.Setting, float], float]) -> float:
        cells = [c for c in results_of_bias()["promise"] if c["kind"] == "Gaussian" and c["num_hash"] != promise.FEW]
        found = []
        for c in cells:
            setting = promise.Setting(c["dim"], c["hash_code_len"], c["num_hash"], c["rotations"])
            found.append(((c["bias"] - predicted(setting, c["cosine"])) / c["standard_error"]) ** 2)
        return float(np.mean(found))

    assert chi_squared(promise.predicted) < 2
    assert chi_squared(lambda setting, cosine: 0.0) > 10


def test_committed_pairs_near_45_degrees() -> None:
    """One-hot pairs there are outside of the promise, by as much as the documentation says."""
    cells = results_of_bias()["near"]
    assert {(c["dim"], c["hash_code_len"], c["layout"], c["cosine"]) for c in cells} == {
        (s.dim, s.hash_code_len, layout, cosine) for s in promise.PROMISED for layout in ("paper", "chained") for cosine in promise.NEAR
    }
    largest = {
        layout: [f"{100 * max(abs(c['bias']) for c in cells if (c['layout'], c['dim']) == (layout, dim)):.1f}%" for dim in ROTATIONS]
        for layout in ("chained", "paper")
    }
    said = " ".join((ROOT / "docs" / "hashing.md").read_text("utf-8").split())
    chained, paper = largest["chained"], largest["paper"]
    assert f"up to {chained[0]} at `D = 32`, {chained[1]} at `D = 64` and {chained[2]} at `D = 128`" in said
    assert f"by up to {paper[0]}, {paper[1]} and {paper[2]}." in said


def test_committed_relative_biases_and_variances() -> None:
    """The paper's layout is far off, planes are not. The mean over the codes of a chain varies no
    more than that over independent codes, beyond 3%.
    """
    cells = results_of_bias()["relative"]
    assert [
        (promise.Setting(*(c[name] for name in ("dim", "hash_code_len", "num_hash", "rotations"))), c["kind"], c["hash"]) for c in cells
    ] == bias.rows(list(directions.KINDS))
    for cell in cells:
        at = dict(zip(cell["cosines"], zip(cell["bias"], cell["standard_error"], strict=True), strict=True))
        if cell["hash"] == "planes":
            assert all(abs(found) < 4 * error for found, error in at.values())
        if cell["hash"] == "paper" and cell["kind"] == "Gaussian" and cell["dim"] <= 64:
            assert at[0.0][0] < -0.1
        for ratio, spread in zip(cell["variance"], cell["variance_standard_error"], strict=True):
            assert cell["hash"] == "paper" or ratio + spread < bias.VARIANCE_BOUND, cell


def test_the_tables_of_bias_have_every_cell() -> None:
    cell = {"dim": 4, "hash_code_len": 2, "num_hash": 3, "rotations": 5, "kind": "sparse", "hash": "planes", "rounds": None}
    numbers = {"bias": [-0.1234, 0.0], "standard_error": [0.01, 0.002], "variance": [0.9, 1.01], "variance_standard_error": [0.1, 0.02]}
    results = {"relative": [cell | {"cosines": [0.0, 0.5]} | numbers]}
    assert bias.relative_table(results).splitlines() == [
        "| d, tau, m | vectors | hash | rounds | cosine 0 | cosine 0.5 |",
        "| --- | --- | --- | ---: | ---: | ---: |",
        "| 4, 2, 3; 5 rotations | sparse | planes |  | -12.3 ± 1.0% | +0.0 ± 0.2% |",
    ]
    assert bias.variance_table(results).splitlines()[2:] == [
        "| 4, 2, 3; 5 rotations | planes | 0.900 ± 0.100, sparse at 0 | 1.010 ± 0.020, sparse at 0.5 |"
    ]
    cells = [
        cell | {"num_hash": m, "kind": kind, "cosine": cosine, "bound": bound, "bias": bias, "standard_error": 0.001}
        for m, kind, cosine, bound, bias in (
            (8, "a", 0.0, 0.04, -0.03),
            (8, "a", 0.5, 0.015, 0.012),
            (8, "b", 0.5, 0.015, 0.0),
            (10, "a", 0.0, 0.04, 0.01),
            (10, "b", 0.0, 0.04, 0.02),
        )
    ]
    assert promise.promise_table({"promise": cells}).splitlines() == [
        "| d, tau | rotations | m | a | b | largest / bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| 4, 2 | 5 | 8 | +1.2 ± 0.1% at 0.5 | +0.0 ± 0.1% at 0.5 | 0.80 |",
        "| 4, 2 | 5 | 10 | +1.0 ± 0.1% at 0 | +2.0 ± 0.1% at 0 | 0.50 |",
    ]
    near = [
        cell | {"layout": layout, "rounds": rounds, "cosine": cosine, "bias": cosine / rounds, "standard_error": 0.001}
        for layout, rounds in (("paper", 2), ("chained", 7))
        for cosine in promise.NEAR
    ]
    assert promise.near_table({"near": near}).splitlines()[2:] == [
        "| 4, 2, 3 | 7 | +10.0 ± 0.1% | +10.1 ± 0.1% | 2 | +35.0 ± 0.1% | +35.5 ± 0.1% |"
    ]


def test_where_a_chain_takes_more_rounds() -> None:
    """Every size is in the table exactly if the shapes of the draws say so."""
    shown = {row.split(" | ")[0].strip("| "): row.strip("|").split("|")[1:] for row in promise.rounds_table().splitlines()[2:]}
    for setting in promise.PROMISED:
        numbers = setting.hash_code_len, setting.dim
        for m, cell in zip(promise.TABLE_HASHES, shown.get(f"{setting.dim}, {setting.hash_code_len}", [""] * 5), strict=True):
            chained = yoso_core.sample_signs(m, *numbers, layout="chained", rng=0).shape[0]
            paper = math.prod(yoso_core.sample_signs(m, *numbers, layout="paper", rng=0).shape[:2])
            assert cell.strip() == (f"{chained} > {paper}" if chained > paper else "")


def test_the_whole_suite_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bias, "DIMS", (4,))
    monkeypatch.setattr(bias, "CODE_LENS", (2,))
    monkeypatch.setattr(bias, "SETTINGS", (promise.Setting(32, 8, 8),))
    monkeypatch.setattr(promise, "PROMISED", (promise.Setting(32, 8, 28, 7),))
    monkeypatch.setattr(directions, "MINILM", "no_such_package")
    path = runner.run_suite("bias", quick=True, output=tmp_path, progress=False)
    assert path == tmp_path / "hadamard_bias-quick.json"
    results = json.loads(path.read_text("utf-8"))
    assert results["left_out"] == "no package no_such_package"
    assert {c["kind"] for c in results["promise"]} == {"Gaussian", "one-hot", "sparse", "clustered"}
    assert "words are left out: no package no_such_package" in capsys.readouterr().out


def test_as_many_hashes_as_leave_the_same_error() -> None:
    mark, *chains = equal_error.measure_equal_error("normal", 256, draws=8, repeats=2)
    assert (mark["layout"], mark["num_hash"]) == ("paper", equal_error.MARK)
    assert [row["oversample"] for row in chains] == list(equal_error.OVERSAMPLE)
    numbers = [row["num_hash"] for row in chains]
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] > equal_error.MARK  # weights that are too small have less variance
    for row in chains:
        assert row["error"] == pytest.approx(mark["error"], rel=0.05, abs=4 * (row["standard_error"] + mark["standard_error"]))
    assert all(len(row["seconds"]) == 2 for row in [mark, *chains])


def test_the_table_of_equal_errors() -> None:
    rows = [
        {"layout": layout, "oversample": s, "num_hash": m, "error": 0.5, "standard_error": 0.01, "kind": "normal", "n": 4096, "seconds": t}
        for layout, s, m, t in (("paper", 0, 32, [0.2, 0.1, 0.4]), ("chained", 0, 38, [0.1]), ("chained", 2, 14, [0.05, 0.4, 0.05]))
    ]
    assert equal_error.equal_error_table({"equal_error": rows}).splitlines() == [
        "| vectors | n | squared error | paper, m = 32 | chain, s = 0 | chain, s = 2 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| normal | 4,096 | 0.500 ± 0.010 | 200 ms | m = 38: 2.00x | m = 14: 4.00x |",
    ]


def test_the_suite_error_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(error, "TAUS", (4,))
    monkeypatch.setattr(error, "CHOICES", ((8, 0, 16),))
    monkeypatch.setattr(error, "KINDS", {"normal": error.KINDS["normal"]})
    monkeypatch.setattr(equal_error, "KINDS", {"normal": equal_error.KINDS["normal"]})
    path = runner.run_suite("error", quick=True, output=tmp_path, progress=False)
    assert path == tmp_path / "error-quick.json"
    results = json.loads(path.read_text("utf-8"))
    assert len(results["variance"]) == len(error.HASHES) * len(error.OVERSAMPLES) * len(error.PAIR_COSINES)
    assert [(c["kind"], c["num_hash"]) for c in results["rows"]] == [("normal", 16)]
    assert len(results["equal_error"]) == 1 + len(equal_error.OVERSAMPLE)


def test_the_suite_learning_in_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(learning, "SETTINGS", learning.SETTINGS[:2])
    path = runner.run_suite("learning", quick=True, output=tmp_path, progress=False)
    assert path == tmp_path / "learning-quick.json"
    results = json.loads(path.read_text("utf-8"))
    assert [(row["seed"], row["setting"]) for row in results["rows"]] == [(0, "m = 16"), (0, "m = 16, the paper's layout")]
    assert all(np.isfinite(row[column]) for row in results["rows"] for column in learning.COLUMNS)
    assert results["rows"][0]["as_trained"] < results["rows"][0]["before"], "it learns while it is sampled"
    monkeypatch.setattr(learning, "learn", lambda *_: pytest.fail("this seed is there already"))
    assert runner.run_suite("learning", quick=True, output=tmp_path, progress=False) == path


def test_the_table_of_learning() -> None:
    losses = {"a": [1.0, 2.0], "b": [1.5, 2.1]}
    rows = [
        {"seed": seed, "setting": name, "as_trained": loss, "other_layout": loss + 1, "expectation": loss - 1}
        for name, of_seeds in losses.items()
        for seed, loss in enumerate(of_seeds)
    ]
    assert learning.learning_table({"settings": {"settings": ["a", "b"]}, "rows": rows}).splitlines()[2:] == [
        "| a | 1.500 | 2.500 | 0.500 |",
        "| b | 1.800 (+0.300 ± 0.200) | 2.800 (+0.300 ± 0.200) | 0.800 (+0.300 ± 0.200) |",
    ]


def test_committed_biases_keep_the_bound() -> None:
    cells = results_of_bias()["cells"]
    assert {(cell["dim"], cell["hash_code_len"]) for cell in cells} == {(dim, tau) for dim in bias.DIMS for tau in bias.CODE_LENS}
    assert all(cell["largest"] < bias.BOUND for cell in cells if cell["dim"] >= 64)


# Training: forward and backward


TRAINED = replace(TINY, run="yoso_training", variant=None)
WRONG_GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled": lambda g: g * 1.001,
    "first row": lambda g: torch.cat([g[..., :1, :].roll(1, dims=-1), g[..., 1:, :]], dim=-2),
    "last row": lambda g: torch.cat([g[..., :-1, :], g[..., -1:, :].roll(1, dims=-1)], dim=-2),
    "not a number": lambda g: g * float("nan"),
    "zero": torch.zeros_like,
}


def training(run_name: str) -> tuple[contenders.Training, Any, str]:
    """The contender, and where its differentiable function stands."""
    contender = CONTENDERS[run_name]
    assert isinstance(contender, contenders.Training)
    return contender, model if contender.op == "yoso_attention" else model.ops, contender.op


@pytest.mark.parametrize("how", WRONG_GRADIENTS)
@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("run_name", ["yoso_training", "yoso_expectation_training"])
def test_a_wrong_gradient_is_red(monkeypatch: pytest.MonkeyPatch, run_name: str, name: str, how: str) -> None:
    contender, module, function = training(run_name)
    right = getattr(module, function)

    def wrong(**given: Any) -> torch.Tensor:
        through = given[name] * 1
        through.register_hook(WRONG_GRADIENTS[how])
        return right(**{**given, name: through})

    workload = replace(TRAINED, run=run_name)
    assert contender.check(workload).green
    monkeypatch.setattr(module, function, wrong)
    assert not contender.check(workload).green


def test_a_gradient_that_misses_the_scaling_to_unit_length_is_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = model.yoso_attention

    def wrong(**given: Any) -> torch.Tensor:
        sums = right(**given, normalize_output=False)
        return sums / torch.linalg.vector_norm(sums, dim=-1, keepdim=True).clamp_min(1e-12).detach()

    monkeypatch.setattr(model, "yoso_attention", wrong)
    assert torch.allclose(
        CONTENDERS["yoso_training"].bind(TRAINED, contenders.tensors(TRAINED))()[0],
        CONTENDERS["yoso"].bind(TINY, contenders.tensors(TINY))(),
        atol=1e-6,
    )
    case = Case("fake", "doomed", "speedup", TRAINED, replace(TRAINED, run="sdpa_training"), limit=1e-9)
    (found,) = run_red(monkeypatch, tmp_path, case)["cases"]
    assert "differs from the definition" in found["why"]
    assert not NUMBERS & (found.keys() | found["ours"].keys() | found["beside"].keys())


def test_a_wrong_output_is_red_though_its_gradients_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    contender, module, function = training("yoso_training")
    right = getattr(module, function)
    monkeypatch.setattr(module, function, lambda **given: right(**given) + 1e-3)
    assert not contender.check(TRAINED).green


@pytest.mark.parametrize("n", [1, 70])
def test_the_rows_compared_are_those_of_the_whole_definition(n: int) -> None:
    """Of 70 rows 64 are compared; the definition on the whole head says the same of them as on the
    parts.
    """
    contender, _, _ = training("yoso_training")
    workload = replace(TRAINED, n=n, run="")
    rows = contenders._spread(n, 64)
    q, k, v, signs = (contenders._last_head(workload)[name].double().numpy() for name in ("query", "key", "value", "signs"))
    codes = [reference.fast_hash(x.astype(np.float32), signs.astype(np.int8), 4, 4) for x in (q, k)]
    sums = reference.lsh_cumulation_tables(*codes, v, 16)
    grad = reference.l2_normalize_backward(contenders.grad_out(workload)[-1:, -1:].double().numpy(), sums, 1e-12)
    whole = reference.lsh_attention_backward(grad, q, k, v, *codes, 4)
    for (exact, allowed), expected in zip(contenders._right_gradients(contender, workload), whole, strict=True):
        assert np.allclose(exact, expected[:, :, rows], rtol=1e-12, atol=1e-14)
        assert allowed.shape == exact.shape == (1, 1, len(rows), 16)


def test_in_training_all_get_the_same_gradient_and_do_the_same() -> None:
    pytest.importorskip("transformers")

    def values_of(run_name: str, workload: Workload) -> list[torch.Tensor]:
        workload = replace(workload, run=run_name)
        found = CONTENDERS[run_name].bind(workload, contenders.tensors(workload))()
        return [x.reshape(workload.heads, workload.n, workload.dim) for x in found]

    ours = values_of("yoso_expectation_training", TRAINED)
    theirs = values_of("transformers_expectation_training", TRAINED)
    assert len(ours) == len(theirs) == len(values_of("sdpa_training", TRAINED)) == 4
    for i in (0, 3):  # theirs ends at unit vectors, so the gradients of query and key differ by their scaling
        assert torch.allclose(ours[i], theirs[i], atol=1e-5)


def test_an_overhead_is_a_difference_in_microseconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (case,) = (case for case in cases.TRAINING if case.measure == "overhead")
    (found,) = run(monkeypatch, tmp_path, replace(case, suite="fake", limit=0.0), repeats=1)["cases"]
    assert found["value"] == pytest.approx(1e6 * (found["ours"]["median"] - found["beside"]["median"]))
    assert found["ours"]["variant"] == "cpu:tables"
    found["value"] = 12.345
    assert report.row(found)[3:5] == ("12.3 µs", "≤ 0 µs")
    assert runner._verdict(replace(case, limit=50), 49.9) == "reached"
    assert runner._verdict(replace(case, limit=50), 50.1) == "missed"


def test_the_kernel_alone_does_what_the_operator_does() -> None:
    workload = replace(TINY, run="cumulation_operator", variant=None)
    operator, kernel = (
        CONTENDERS[name].bind(workload, contenders.tensors(workload)) for name in ("cumulation_operator", "cumulation_kernel")
    )
    assert np.array_equal(operator().numpy(), kernel())


@pytest.mark.slow
def test_the_picture_is_of_the_forward_pass_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peer = replace(TRAINED, run="sdpa_training")
    suite = (Case("fake", "time", "speedup", TRAINED, peer), Case("fake", "memory", "memory", TRAINED, limit=256.0), speedup("sound", None))
    result = run(monkeypatch, tmp_path, *suite, repeats=1)
    assert {line.run for quantity in ("median", "working_bytes") for line in plots.curves(result, quantity)} <= {"yoso", "sdpa"}
    assert not plots._drawn(result["cases"][1]["ours"]), "nor is what it promises"
    assert len(result["cases"][0]["ours"]["variant"].split(" + ")) == 2, "forward and backward"


# The suite for GPUs, without one: on a machine that says it is one, and by hand.


TINY_GPU = replace(TINY, batch=2, device="cuda")
STAND_IN = {"name": "NVIDIA Stand-in 1GB", "memory_gb": 1.0, "driver": "1.2", "cuda_of_torch": "12.9"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The CPU in place of a GPU; every wait for it is noted."""
    noted: list[float] = []
    stand_in = replace(
        MACHINES["cuda"],
        torch="cpu",
        missing=lambda: None,
        wait=lambda: noted.append(time.perf_counter()),
        about=lambda: {"gpu": STAND_IN},
        limits=lambda: H100,
    )
    monkeypatch.setitem(MACHINES, "cuda", stand_in)
    for name, held in (("reset_peak_memory_stats", None), ("memory_allocated", 1000), ("max_memory_allocated", 10_000_000)):
        monkeypatch.setattr(torch.cuda, name, lambda held=held: held)
    return noted


def shrunk(workload: Workload | None) -> Any:
    """The same kind of workload, small, by what runs on a CPU."""
    return workload and replace(workload, batch=2, heads=2, n=16, dim=16, num_hash=4, hash_code_len=4, variant=None)


def gpu_workloads() -> list[Workload]:
    return [side for case in cases.SUITES["gpu"].cases for side in (case.ours, case.beside, *case.also) if side]


def cuda_variants(op: str) -> set[str]:
    return {kernel.name for kernel in registry.KERNELS if kernel.op == op and kernel.backend.device == "cuda"}


def test_the_gpu_suite_is_about_all_cuda_variants_and_no_other() -> None:
    suite = cases.SUITES["gpu"].cases
    assert len({case.name for case in suite}) == len(suite)
    assert {case.suite for case in suite} == {"gpu"}
    assert {(side.device, side.batch, side.heads, side.dim, side.num_hash, side.hash_code_len) for side in gpu_workloads()} == {
        ("cuda", 8, 12, 64, 32, 8)
    }
    named: dict[str, set[str | None]] = {}
    for workload in gpu_workloads():
        contender = CONTENDERS[workload.run]
        if isinstance(contender, Ours):
            for op, name in contender.steps(workload)[
                : 1 if isinstance(contender, contenders.Training) else None
            ]:  # no step back has a name
                named.setdefault(op, set()).add(name)
    assert named == {op: cuda_variants(op) for op in named}
    assert set(named) == {"fast_hash", "lsh_cumulation", "lsh_weighted_cumulation", "expectation_attention", "yoso_attention"}


def test_the_gpu_suite_holds_the_numbers_to_reach() -> None:
    limits: dict[tuple[str, str], dict[int, float]] = {}
    for case in cases.SUITES["gpu"].cases:
        if case.limit is not None:
            assert (case.ours.run, case.ours.variant) == ("yoso", "cupy:shared_table")
            limits.setdefault((case.beside.run if case.beside else case.measure, case.ours.dtype), {})[case.ours.n] = case.limit
    assert limits == {
        ("paper", "float32"): {4096: 5, 16384: 5},
        ("paper_tables", "float32"): {4096: 5, 16384: 5},
        ("flash", "float16"): {16384: 1, 32768: 1, 65536: 1},
        ("bandwidth", "float32"): {4096: 0.5, 16384: 0.5},
        ("bandwidth", "float16"): {4096: 0.5, 16384: 0.5},
    }
    trained = {(case.ours.n, case.ours.dtype, case.beside and case.beside.run) for case in cases.GPU if case.ours.run == "yoso_training"}
    assert trained == {(n, *how) for n in (512, 4096, 16384) for how in (("float16", "flash_training"), ("float32", "sdpa_training"))}
    whole = [case for case in cases.SUITES["gpu"].cases if case.ours.run == "yoso" and case.measure == "speedup"]
    for variant in ("cupy:shared_table", "cupy:sorted_buckets"):
        for dtype in ("float32", "float16"):
            assert {c.ours.n for c in whole if (c.ours.variant, c.ours.dtype) == (variant, dtype)} == set(cases.GPU_SIZES)
        assert {c.ours.n for c in cases.GPU if c.measure == "memory" and c.ours.variant == variant} == {4096, 16384, 65536}


def test_beside_every_cuda_variant_stand_softmax_and_the_paper() -> None:
    for case in cases.SUITES["gpu"].cases:
        runs = {(side.run.removesuffix("_training"), side.dtype) for side in (case.beside, *case.also) if side}
        assert case.measure == "bandwidth" or ("flash", "float16") in runs or "paper_tables" in {run for run, _ in runs}
        if case.measure == "speedup" and case.ours.dtype == "float32" and case.ours.n <= 16384 and not case.limit:
            assert ("sdpa", "float32") in runs


def test_every_gpu_case_runs_on_a_stand_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for run_name in ("paper", "paper_tables"):
        monkeypatch.setitem(CONTENDERS, run_name, replace(CONTENDERS[run_name], hash_variant=None, cumulation_variant=None))
    small = tuple(
        replace(case, ours=shrunk(case.ours), beside=shrunk(case.beside), also=tuple(map(shrunk, case.also)))
        for case in cases.SUITES["gpu"].cases
    )
    monkeypatch.setitem(cases.SUITES, "gpu", replace(cases.SUITES["gpu"], cases=small))
    path = runner.run_suite("gpu", repeats=1, output=tmp_path, progress=False)
    assert path == tmp_path / "gpu-nvidia-stand-in-1gb.json"
    assert path.with_suffix(".png").stat().st_size > 0
    result = json.loads(path.read_text("utf-8"))
    assert result["environment"]["gpu"] == STAND_IN
    assert [case["name"] for case in result["cases"]] == [case.name for case in small]
    assert {case["verdict"] for case in result["cases"]} <= {"reached", "missed", "no target"}
    for case in result["cases"]:
        quantity = "working_bytes" if case["measure"] == "memory" else "seconds"
        assert all(quantity in side for side in (case["ours"], case["beside"], *case["also"]) if side)
        assert case["measure"] == "memory" or case["floor"]["bandwidth"] > 0
    assert waits
    printed = " ".join(capsys.readouterr().out.split())
    assert "NVIDIA Stand-in 1GB" in printed
    assert "torch flash attention, float16: " in printed


def test_without_a_gpu_the_suite_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def bench() -> str:
        result = CliRunner().invoke(app, ["bench", "gpu"])
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        return result.stderr

    monkeypatch.setattr(backends, "missing", lambda where: f"{where} is not installed: pip install it")
    assert "SUITE: the suite 'gpu' cannot run here: cupy is not installed: pip install it; `yoso bench cpu` runs anywhere" in bench()
    monkeypatch.setattr(backends, "missing", lambda where: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"torch {torch.__version__} cannot use the GPU: install a build of it for CUDA" in bench()


def test_the_file_of_results_has_the_name_of_the_machine() -> None:
    assert machines.results_name("cpu", {}) == "cpu"
    intel = {"processor": "Intel(R) Xeon(R) Platinum 8480+", "microarchitecture": "Sapphire Rapids", "instruction_set": "AVX-512"}
    assert machines.results_name("cpu", intel) == "cpu-intel-xeon-platinum-8480-sapphire-rapids-avx512"
    limited = {**intel, "instruction_set": "AVX2", "limited": {"ATEN_CPU_CAPABILITY": "avx2"}}
    name = machines.results_name("model", limited, quick=True, filter="N = 4,096!")
    assert name == "model-intel-xeon-platinum-8480-sapphire-rapids-avx2-limited-quick-filter-n-4-096"
    assert machines.results_name("gpu", {"gpu": {"name": "NVIDIA GeForce RTX 4090 (Laptop)"}}) == "gpu-nvidia-geforce-rtx-4090-laptop"


def test_a_sample_ends_when_the_machine_is_done(waits: list[float]) -> None:
    calls: list[float] = []
    samples = runner.in_turns([lambda: calls.append(time.perf_counter())], 2, machine=MACHINES["cuda"], first=[1000.0])
    assert len(waits) == 2 * 3, "before and after each: a second call, whatever the first took, and two samples"
    assert all(waits[2 * i] < calls[i] < waits[2 * i + 1] for i in range(3))
    assert [len(s) for s in samples] == [2]


@pytest.mark.parametrize("index", [(0, 0), (-1, -1)])
def test_one_wrong_head_of_a_batch_is_red(monkeypatch: pytest.MonkeyPatch, waits: list[float], index: tuple[int, int]) -> None:
    right = yoso_core.yoso_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        out = right(*args, **kwargs)
        out[index] = out[index].roll(1, dims=-1)
        return out

    monkeypatch.setattr(yoso_core, "yoso_attention", wrong)
    ours = CONTENDERS["yoso"]
    assert isinstance(ours, Ours)
    assert ours.check(TINY_GPU).green == (index == (0, 0)), "the last head of the last batch is compared"


def test_one_wrong_code_is_red(monkeypatch: pytest.MonkeyPatch, waits: list[float], tmp_path: Path) -> None:
    right = yoso_core.fast_hash
    workload = replace(TINY_GPU, run="hash")

    def wrong(vectors: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(vectors, *args, **kwargs)
        out[-1, -1, -1, -1] ^= 1
        return out

    monkeypatch.setattr(yoso_core, "fast_hash", wrong)
    case = runner.run_case(Case("fake", "hash", "speedup", workload), repeats=1, checks={})
    assert (case["verdict"], case["why"]) == ("red", "differs from the definition")


@pytest.mark.skipif(bool(backends.missing("emulated")), reason=str(backends.missing("emulated")))
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["paper", "paper_tables"])
def test_the_paper_composed_of_its_kernels_is_green(waits: list[float], name: str, dtype: str) -> None:
    """By the same CUDA sources, emulated."""
    paper = CONTENDERS[name]
    assert isinstance(paper, Composed)
    emulated = [f"emulated:{variant.partition(':')[2]}" for variant in (paper.hash_variant, paper.cumulation_variant) if variant]
    paper = replace(paper, hash_variant=emulated[0], cumulation_variant=emulated[1])
    workload = replace(TINY_GPU, run=name, dtype=dtype)
    assert paper.check(workload).green


def failing(error: Exception, *, from_call: int = 0) -> Callable[..., Any]:
    """A call that raises, the first one or a later."""
    made = iter(range(1_000_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(made) >= from_call:
            raise error
        return torch.zeros(1)

    return call


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has a total capacity of 1 GiB. Try less.")


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, DoesNotFit("hashtable_capacity: a table takes more"), MemoryError("no room")])
def test_what_does_not_fit_is_said_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(yoso_core, "yoso_attention", failing(error))
    peer = replace(TINY_GPU, run="sdpa", variant=None)
    small = Case("fake", "small", "speedup", TINY_GPU, peer, limit=5, also=(peer,))
    found = run(monkeypatch, tmp_path, small, replace(small, measure="memory", name="memory too"))
    said = str(error).partition(". GPU")[0]
    for case in found["cases"]:
        assert (case["verdict"], case["why"]) == ("cannot run", said)
        assert not NUMBERS & case["ours"].keys()
        assert report.row(case)[1:] == ("cannot run", "", "", report.row(case)[4], "cannot run", "")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"YOSO, sampled, numpy:formula, float32 cannot run at n = 32: {said}" in printed


def test_a_peer_that_cannot_run_leaves_ours_its_numbers(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    unable = Peer("absent", (), lambda workload, given: failing(RuntimeError("No available kernel. Aborting execution.")))
    monkeypatch.setitem(CONTENDERS, "flash", unable)
    flash, sdpa = (replace(TINY_GPU, run=name, variant=None) for name in ("flash", "sdpa"))
    result = runner.run_case(Case("fake", "a", "speedup", TINY_GPU, flash, limit=1, also=(flash, sdpa)), repeats=2, checks={})
    assert (result["verdict"], result["value"]) == ("no peer", None)
    assert result["beside"]["cannot_run"] == "No available kernel. Aborting execution."
    assert [len(side.get("seconds", [])) for side in (result["ours"], *result["also"])] == [2, 0, 2]
    assert report.row(result, report.columns_of({"cases": [result]}))[2] == "cannot run"
    assert report.cannot_run({"cases": [result]}) == ["absent, float32 cannot run at n = 32: No available kernel. Aborting execution"]


def test_ours_that_raises_is_red_and_leaves_no_number(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(memory, "working_memory", failing(RuntimeError("CUDA error: an illegal memory access"), from_call=1))
    case = Case("fake", "a", "memory", TINY_GPU, replace(TINY_GPU, variant="numpy:formula", n=16))
    result = runner.run_case(case, repeats=1, checks={})
    assert (result["verdict"], result["why"]) == ("red", "RuntimeError: CUDA error: an illegal memory access")
    assert not NUMBERS & (result.keys() | result["ours"].keys() | result["beside"].keys())


def test_a_variant_that_this_machine_lacks_is_said(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    monkeypatch.setattr(backends, "missing", lambda where: "no NVIDIA GPU" if where == "numba_cuda" else None)
    workload = replace(TINY_GPU, run="hash", variant="numba_cuda:shared_memory")
    result = runner.run_case(Case("fake", "a", "speedup", workload), repeats=1, checks={})
    assert (result["verdict"], result["why"]) == ("cannot run", "numba_cuda:shared_memory: no NVIDIA GPU")


def test_memory_on_a_gpu_is_what_its_allocator_held_beyond_the_output(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    held = {"now": 500, "peak": 0}

    def call() -> torch.Tensor:
        held["peak"] = held["now"] + 900
        return torch.zeros(100, dtype=torch.uint8)

    monkeypatch.setitem(CONTENDERS, "hungry", Peer("hungry", (), lambda workload, given: call))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: held["peak"])
    assert memory.working_memory(Workload("hungry", 8, heads=1, dim=1, device="cuda")) == 800
    assert len(waits) == 2


def test_rates_are_measured_on_the_device(waits: list[float]) -> None:
    rates = floor._torch_rates("cuda", size=1 << 20, side=64)
    assert rates.copy_bytes > 0
    assert rates.multiply_adds > 0
    assert len(waits) == 2 * 2 * 10


# Bytes. One head, four rows of two numbers, m = 3, tau = 2: vectors of 4 * 2 * 4 = 32 bytes, codes
# of 4 * 3 * 4 = 48.
FEW = Workload("cumulation", 4, heads=1, dim=2, num_hash=3, hash_code_len=2, device="cuda")


def test_the_least_bytes_by_hand() -> None:
    assert least_bytes(replace(FEW, run="hash")) == 32 + 48
    assert least_bytes(FEW) == 2 * 48 + 2 * 32
    assert least_bytes(replace(FEW, run="weighted")) == 2 * 48 + 4 * 32
    assert least_bytes(replace(FEW, run="yoso")) == least_bytes(replace(FEW, run="paper")) == 4 * 32
    assert least_bytes(replace(FEW, run="yoso_expectation", dtype="float16", batch=3)) == 3 * 4 * 16
    assert least_bytes(replace(FEW, run="yoso_training")) == 8 * 32
    with pytest.raises(ValueError, match="sdpa is no operation of this library"):
        least_bytes(replace(FEW, run="sdpa"))


def test_the_operations_by_hand() -> None:
    # D = 2, and 3 codes of 2 bits: 3 rotations, so 6 rounds of 2 * 1 additions.
    assert operations(replace(FEW, run="hash")) == 4 * 6 * 2
    assert operations(FEW) == 4 * 2 * 3 * 2
    assert operations(replace(FEW, run="yoso")) == 2 * 4 * 6 * 2 + 4 * 2 * 3 * 2
    # 3 hashes, each with 4 * 4 / 4 pairs that meet: 12 pairs of 4 multiply-adds; by outer products
    # it would be 2 * 12 * 4.
    assert operations(replace(FEW, run="weighted")) == 12 * 4
    assert operations(replace(FEW, run="yoso_expectation")) == 16 * 4
    # Backward: what each of 12 pairs gives the other, and the gradient of the values; four more
    # products of 16 * 2.
    assert operations(replace(FEW, run="yoso_training")) == operations(replace(FEW, run="yoso")) + 12 * 3 * 2 + 4 * 2 * 3 * 2
    assert operations(replace(FEW, run="yoso_expectation_training")) == 16 * 4 + 16 * 8


def moved(op: str, variant: str, workload: Workload, limits: Limits = H100) -> dict[str, tuple[int, int, int]]:
    return {k.kernel: (k.read, k.written, k.cached) for k in traffic.by_design(op, variant, workload, limits)}


def test_the_bytes_of_the_hashes_by_hand() -> None:
    # Six rounds of D = 2: 12 signs for a head, asked for by each of four vectors; in the paper's
    # layout three parts, 18 signs.
    assert moved("fast_hash", "cupy:warp_per_vector", FEW) == {"warp_per_chain": (32 + 12, 48, 3 * 12)}
    assert moved("fast_hash", "cupy:block_per_part", FEW) == {"block_per_part": (3 * 32 + 18, 48, 3 * 18)}
    assert moved("fast_hash", "numba_cuda:shared_memory", FEW) == {"hash_by_chain": (32 + 12, 48, 3 * 12)}
    half = replace(FEW, dtype="float16")
    assert moved("fast_hash", "cupy:warp_per_vector", half)["warp_per_chain"] == (16 + 12, 48, 3 * 12)
    assert moved("fast_hash", "numba_cuda:shared_memory", half)["(widen)"] == (16, 32, 0)


def test_the_bytes_of_the_shared_table_by_hand() -> None:
    assert moved("lsh_cumulation", "cupy:shared_table", FEW) == {"shared_table": (2 * 48 + 32, 32, 0)}, "one block does it all"
    # 5 rows of 4 bytes to a column: room for 4 columns, which 3 hashes share, so each of two blocks
    # has one value dim.
    narrow = Limits(max_shared=80, max_table=1 << 30)
    assert moved("lsh_cumulation", "cupy:shared_table", FEW, narrow) == {"shared_table": (2 * 48 + 32, 32, 2 * 48)}
    # Room for 2 columns: two rounds of 2 and 1 hashes. The values come twice, and sums wait for the
    # second round.
    narrower = Limits(max_shared=40, max_table=1 << 30)
    assert moved("lsh_cumulation", "cupy:shared_table", FEW, narrower) == {"shared_table": (2 * 48 + 2 * 32 + 32, 32 + 32, 2 * 48)}


def test_the_bytes_of_the_sorted_buckets_by_hand() -> None:
    found = moved("lsh_cumulation", "cupy:sorted_buckets", FEW)
    # Codes up to 4, which marks what is masked: one pass of four bits, over 12 codes and their
    # rows. No stretch is full. 3 hashes with 4 buckets of 2 sums; every one of 12 codes reads a row
    # of 8 bytes, after a bisection of at most 3 steps.
    assert found == {
        "transpose_codes": (48, 96, 0),
        "sort_codes": (96, 96, 48),
        "sum_buckets": (96 + 32, 96, 2 * 32),
        "gather_buckets": (48 + 96, 32, 96 - 96 + 3 * 48),
    }
    # Sums of one hash at a time: values come three times, and the result waits twice.
    grouped = moved("lsh_cumulation", "cupy:sorted_buckets", FEW, Limits(1 << 10, max_table=32))
    assert grouped["sum_buckets"] == (96 + 3 * 32, 96, 0)
    assert grouped["gather_buckets"] == (48 + 96 + 2 * 32, 32 + 2 * 32, 3 * 48)
    # 130 keys are three stretches; the second and the third begin inside a bucket.
    assert moved("lsh_cumulation", "cupy:sorted_buckets", replace(FEW, n=130))["join_stretches"] == (2 * 3 * 2 * 8, 3 * 2 * 8, 0)


def test_the_bytes_of_the_global_table_by_hand() -> None:
    # 3 hashes of 4 buckets of 32 sums, of which two are used: 1,536 bytes to clear, 96 to fill and
    # to read.
    assert moved("lsh_cumulation", "cupy:global_table", FEW) == {
        "(zeros)": (0, 1536, 0),
        "global_table_scatter": (48 + 32 + 96, 96, 96),
        "global_table_gather": (48 + 96, 32, 0),
    }
    assert moved("lsh_cumulation", "cupy:global_table", replace(FEW, dim=33))["(zeros)"] == (0, 2 * 1536, 0)
    # Numba's has tables of two sums, a byte of a mask for each row, and a result that starts as
    # zeros.
    assert moved("lsh_cumulation", "numba_cuda:global_table", FEW) == {
        "(zeros)": (0, 2 * 4 + 32 + 96, 0),
        "add_keys_to_table": (48 + 4 + 32 + 96, 96, 96),
        "read_table": (48 + 4 + 96, 32, 0),
    }
    # Room for 3 columns of 16 bytes: 2 value dims of one hash at a time, three rounds.
    assert moved("lsh_cumulation", "numba_cuda:shared_table", FEW, Limits(48, 1 << 30)) == {
        "(zeros)": (0, 8 + 32, 0),
        "cumulate_in_shared_table": (2 * 48 + 3 * 8 + 2 * 3 * 32, 3 * 32, 0),
    }


def test_the_bytes_of_the_weighted_cumulations_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    outer = moved("lsh_weighted_cumulation", "cupy:outer_products", FEW)
    assert outer["sort_codes"] == (2 * 96, 2 * 96, 2 * 48), "both sides"
    # Code and row of either side for each of three hashes; three times vectors, and sums in rows of
    # four, which stay in the cache.
    assert outer["outer_products"] == (3 * 4 * 16 + 3 * 32 + 64, 64, 2 * (3 * 32 + 64 + 64))
    monkeypatch.setattr(weighted, "_CACHE_BYTES", 0)
    assert moved("lsh_weighted_cumulation", "cupy:outer_products", FEW)["outer_products"] == (3 * (4 * 16 + 3 * 32 + 64), 3 * 64, 0)
    assert outer["finish_rows"] == (32 + 32, 32, 0)
    # 12 pairs that meet, of a row number, a weight and a value each; 8 + 8 bytes; two bisections
    # for each code.
    pairs = moved("lsh_weighted_cumulation", "cupy:sorted_pairs", FEW)["sorted_pairs"]
    assert pairs == (3 * 48 + 3 * 32, 32, 12 * (4 + 16) + 2 * 3 * 48 - (48 + 2 * 32))
    # Each of two coordinates has its own table, and fetches 8 bytes, all that a row has, for one
    # number.
    paper = moved("lsh_weighted_cumulation", "cupy:weight_by_weight", FEW)
    assert paper["(zeros)"] == (0, 32 + 2 * 1536, 0)
    assert paper["weight_by_weight_scatter"] == (2 * (48 + 4 * 8) + 2 * 32 + 2 * 96, 2 * 96, 2 * 96)
    assert paper["weight_by_weight_gather"] == (2 * (48 + 4 * 8) + 2 * 96 + 2 * 32, 2 * 32, 0)


def test_the_bytes_of_attention_by_hand() -> None:
    assert moved("expectation_attention", "cupy:blocked", FEW) == {"normalize_rows": (64, 64, 0), "expectation": (96, 32, 0)}
    # 65 queries are two blocks, each of which asks for all keys and values.
    assert moved("expectation_attention", "cupy:blocked", replace(FEW, n=65))["expectation"][2] == 2 * 65 * 8
    half = moved("yoso_attention", "cupy:shared_table", replace(FEW, dtype="float16"))
    assert half == {
        "warp_per_chain": (2 * (16 + 12), 2 * (48 + 4), 2 * 3 * 12),  # and one byte for each vector: whether it is finite
        "shared_table": (2 * 48 + 16, 32, 0),  # sums leave it as float32
        "mark_nonfinite_heads": (4, 0, 0),
        "finish_attention": (32 + 4, 16, 0),
    }
    paper = traffic.traffic(replace(FEW, run="paper")) or []
    assert [k.kernel for k in paper].count("block_per_part") == 2
    assert (paper[-1].kernel, paper[-1].read, paper[-1].written) == ("(normalize)", 64, 32)
    assert traffic.traffic(replace(FEW, run="sdpa")) is None
    assert traffic.traffic(replace(FEW, variant="cpu:tables")) is None


class Recorder:
    """A device on which launchers run and kernels do not."""

    xp = np

    def __init__(self, limits: Limits) -> None:
        self.max_shared, self.max_table = limits.max_shared, limits.max_table
        self.bytes: Counter[str] = Counter()

    def empty(self, shape: Any, dtype: Any) -> Any:
        return np.zeros(shape, dtype)

    zeros = empty

    def launch(self, kernel: Any, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
        name = kernel.name if hasattr(kernel, "name") else kernel.py_func.__name__
        record(Launch("recorded", name, tuple(grid), tuple(block), shared))
        self.bytes[name] += sum(x.nbytes for x in args.values() if isinstance(x, np.ndarray))


STREAMED = {"warp_per_chain", "shared_table", "transpose_codes", "sort_codes", "normalize_rows", "expectation"}
"""Kernels that move each of their arrays once, where the work needs one round."""


@pytest.mark.parametrize("limits", [H100, Limits(max_shared=2000, max_table=200_000)], ids=["roomy", "tight"])
@pytest.mark.parametrize("sizes", [(16, 8, "float32"), (130, 40, "float32"), (130, 40, "float16"), (70, 16, "float64")], ids=str)
@pytest.mark.parametrize(("op", "variant"), traffic.FORMULAS)
def test_the_formulas_know_every_launch(
    monkeypatch: pytest.MonkeyPatch, op: str, variant: str, sizes: tuple[int, int, str], limits: Limits, waits: list[float]
) -> None:
    """Which kernels, how often, and where it is simple, how many bytes: as the launchers have
    it.
    """
    n, dim, dtype = sizes
    name, ours = next((name, found) for name, found in CONTENDERS.items() if isinstance(found, FaceFunction) and found.op == op)
    workload = Workload(name, n, heads=2, dim=dim, dtype=dtype, num_hash=5, hash_code_len=4, variant=variant, batch=2, device="cuda")
    monkeypatch.setattr(yoso_core, "fast_hash", lambda x, signs, m, tau: torch.zeros(*x.shape[:-1], m, dtype=torch.int32))
    given = ours.arguments(workload, contenders.tensors(workload))
    arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    arguments.pop("validate", None)
    if variant == "cupy:block_per_part":
        sizes_of_hash = workload.num_hash, workload.hash_code_len, workload.dim
        arguments |= {"layout": "paper", "signs": yoso_core.sample_signs(*sizes_of_hash, batch_shape=(2,), layout="paper", rng=0)}
    if op == "yoso_attention":
        arguments |= {"use_expectation": False, "planes": None, "query_mask": None, "key_mask": None, "normalize_output": True}
    (kernel,) = (kernel for kernel in registry.KERNELS if (kernel.op, kernel.name) == (op, variant))
    recorder = Recorder(limits)
    with launches() as made:
        kernel.load()(recorder, **arguments)
    counted = {k.kernel: k for k in traffic.by_design(op, variant, workload, limits)}
    assert {name: k.launches for name, k in counted.items() if k.launches} == Counter(launch.kernel for launch in made)
    for name in STREAMED & counted.keys():
        if limits is H100:
            assert counted[name].read + counted[name].written == recorder.bytes[name], name


def test_what_stands_for_results_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "gpu-nvidia-a-quick.json").write_text('{"quick": true}')
    text = report.filled("<!-- bench:gpu -->\n<!-- /bench -->", tmp_path)
    assert "No result of a GPU is committed yet" in text
    assert not any(character.isdigit() for character in text)


def test_every_gpu_has_its_section(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, waits: list[float]) -> None:
    peer = replace(TINY_GPU, run="sdpa", variant=None)
    share = Case("fake", "share", "bandwidth", TINY_GPU, limit=0.5)
    result = run(monkeypatch, tmp_path, Case("fake", "first", "speedup", TINY_GPU, peer, limit=1e9, also=(peer,)), share)
    for name in ("b", "a"):
        result["environment"]["gpu"] = STAND_IN | {"name": f"GPU {name}"}
        (tmp_path / f"gpu-gpu-{name}.json").write_text(json.dumps(result))
    text = report.filled("<!-- bench:gpu -->\n<!-- /bench -->", tmp_path)
    assert text.index("### GPU a") < text.index("![time and memory against n](results/gpu-gpu-a.png)") < text.index("### GPU b")
    assert (text.count("| first |"), text.count("| missed |")) == (2, 2 * 2)
    assert "torch scaled_dot_product_attention, float32: " in text
    assert "| ≥ 50% |" in text
    assert "driver 1.2, torch for CUDA 12.9" in text


def test_a_gpu_line_is_drawn_for_each_dtype_and_variant() -> None:
    def side(run_name: str, variant: str | None, dtype: str, n: int) -> dict[str, Any]:
        workload = Workload(run_name, n, dtype=dtype, variant=variant, batch=8, device="cuda")
        return {**vars(workload), "label": run_name, "median": float(n)}

    table = [("yoso", "cupy:shared_table", "float32"), ("yoso", "cupy:shared_table", "float16"), ("flash", None, "float16")]
    found = plots.curves({"cases": [{"ours": side(*table[0], 8), "beside": side(*table[2], 8), "also": [side(*table[1], 4)]}]}, "median")
    assert {(line.run, line.variant, line.dtype): curve for line, curve in found.items()} == {
        table[0]: {8: 8.0},
        table[1]: {4: 4.0},
        table[2]: {8: 8.0},
    }
