"""The benchmarks measure what they say, and show no number that they should not. Nothing here is a timed assertion."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import yoso_core
from yoso_core.benchmarks import bias, cases, contenders, memory, report, runner
from yoso_core.benchmarks.cases import Case, Workload
from yoso_core.benchmarks.contenders import CONTENDERS, Peer
from yoso_core.benchmarks.floor import Rates, operations

ROOT = Path(__file__).parents[1]
TINY = Workload("yoso", 32, heads=2, dim=16, num_hash=4, hash_code_len=4, variant="numpy:formula")
PEER = replace(TINY, run="sdpa", variant=None)
NUMBERS = {"seconds", "median", "min", "max", "value", "pairs", "working_bytes", "floor", "checks"}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call a sample, and no measuring of the machine."""
    monkeypatch.setattr(runner, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(runner, "measured_rates", lambda: Rates(1e9, 1e9))


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *suite: Case, **options: Any) -> dict[str, Any]:
    monkeypatch.setitem(cases.SUITES, "fake", suite)
    path = runner.run_suite("fake", output=output, progress=False, **{"repeats": 4, **options})
    return json.loads(path.read_text())


def run_red(monkeypatch: pytest.MonkeyPatch, output: Path, *suite: Case) -> dict[str, Any]:
    with pytest.raises(runner.RedComparison, match="cases are red"):
        run(monkeypatch, output, *suite)
    return json.loads((output / "fake.json").read_text())


def speedup(name: str, limit: float | None, **options: Any) -> Case:
    return Case("fake", name, "speedup", TINY, PEER, limit=limit, **options)


def test_every_repeat_is_kept_beside_the_machine_and_the_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(
        monkeypatch, tmp_path, speedup("a", 1e-9, aim=2.0), Case("fake", "b", "cost", replace(TINY, dtype="bfloat16"), TINY, limit=1e9)
    )
    assert result["suite"] == "fake"
    assert {"processor", "cores", "memory_gb", "system", "versions"} <= result["environment"].keys()
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
    assert (tmp_path / "fake.png").stat().st_size > 0


def test_a_cost_is_counted_by_its_share_of_the_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (case,) = run(monkeypatch, tmp_path, Case("fake", "twice", "cost", replace(TINY, n=64), TINY, share=2.0, limit=0.0))["cases"]
    assert case["value"] == pytest.approx(case["ours"]["median"] / (2 * case["beside"]["median"]))
    assert case["verdict"] == "missed"


def test_a_missed_target_is_printed_as_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case,) = run(monkeypatch, tmp_path, speedup("slow", 1e9))["cases"]
    assert case["verdict"] == "missed"
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "slow" in line)
    assert "missed" in line
    assert "missed" in report.full_block({**json.loads((tmp_path / "fake.json").read_text())})


def test_a_red_comparison_shows_no_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = yoso_core.yoso_attention
    monkeypatch.setattr(yoso_core, "yoso_attention", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    timed = speedup("doomed", 1e-9)
    result = run_red(monkeypatch, tmp_path, timed, replace(timed, measure="memory", name="doomed too"))
    for case in result["cases"]:
        assert case["verdict"] == "red"
        assert "differs from the definition" in case["why"]
        assert not NUMBERS & (case.keys() | case["ours"].keys() | case["beside"].keys())
        assert not any(cell for cell in report.row(case)[1:] if cell != "red")
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
    assert isinstance(ours, contenders.Ours)
    assert ours.check(TINY).green
    monkeypatch.setattr(yoso_core, "yoso_attention", wrong)
    assert not ours.check(TINY).green


def test_not_a_number_is_red() -> None:
    assert not contenders.Check(tolerance_used=float("nan"), largest_error=float("nan"), rows=1).green


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
    assert not (tmp_path / "fake.json").exists()
    assert result["cases"][0]["verdict"] == "no target"


def test_wrong_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no suite 'gpu'; there are cpu, bias"):
        runner.run_suite("gpu", output=tmp_path)
    with pytest.raises(ValueError, match="repeats: need at least 1, got 0"):
        runner.run_suite("cpu", repeats=0, output=tmp_path)
    monkeypatch.setitem(CONTENDERS, "sdpa", Peer("absent", ("no_such_package",), lambda workload, given: lambda: None))
    with pytest.raises(ModuleNotFoundError, match=r"needs no_such_package: pip install 'yoso-core\[model\]'"):
        run(monkeypatch, tmp_path, speedup("a", None))


def test_the_cpu_suite_holds_the_numbers_to_reach() -> None:
    suite = cases.SUITES["cpu"]
    assert len({case.name for case in suite}) == len(suite)
    assert all(case.suite == "cpu" for case in suite)
    speeds = {
        case.ours.n: (case.limit, case.aim) for case in suite if case.beside and case.beside.run == "sdpa" and case.measure == "speedup"
    }
    assert [speeds[n] for n in (512, 4096, 16384)] == [(1.5, 3), (12, 20), (40, 80)]
    assert all(case.limit == 64 for case in suite if case.measure == "memory")


def test_the_floor_counts_the_additions_of_the_transforms() -> None:
    # D = 64, tau = 8: 8 codes a part, so 4 parts for 32 hashes, each of 3 transforms of 64 * 6 additions; then 32 table rows of 64.
    assert operations(Workload("yoso", n=1, heads=1)) == 2 * (4 * 3 * 64 * 6 + 32 * 64)


def test_memory_is_what_a_call_takes_beyond_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(workload: Workload, given: contenders.Tensors) -> Any:
        def call() -> torch.Tensor:
            scratch = np.ones(40_000_000 if workload.n > 64 else 8, np.uint8)
            out = torch.ones(20_000_000 if workload.n > 64 else 8, dtype=torch.uint8)
            return out + int(scratch[0]) - 1 if workload.n <= 64 else out

        return call

    monkeypatch.setitem(CONTENDERS, "hungry", Peer("hungry", (), bind))
    assert 39e6 < memory.measure(Workload("hungry", 65, heads=1, dim=1)) < 45e6


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    assert 0 <= memory.working_memory(TINY) < 1e9
    with pytest.raises(RuntimeError, match="measuring the memory of nobody failed"):
        memory.working_memory(replace(TINY, run="nobody"))


def test_tables_are_written_from_results_and_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = run(monkeypatch, tmp_path, speedup("first", 1e9, headline=True), speedup("second", None))
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    text = "before\n<!-- bench:cpu -->\nold\n<!-- /bench -->\nbetween\n<!-- bench:cpu-all -->\n<!-- /bench -->\nafter\n"
    once = report.filled(text, tmp_path)
    assert report.filled(once, tmp_path) == once
    assert once.startswith("before\n<!-- bench:cpu -->\n| case |")
    assert once.endswith("<!-- /bench -->\nafter\n")
    assert "old" not in once
    assert (once.count("| first |"), once.count("| second |")) == (2, 1)
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
    # A right angle in the plane: (a, b) and (b, -a) agree in exactly one of the two signs, so codes of two bits never collide.
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


def test_committed_biases_keep_the_bound() -> None:
    cells = json.loads((ROOT / report.RESULTS / "hadamard_bias.json").read_text())["cells"]
    assert {(cell["dim"], cell["hash_code_len"]) for cell in cells} == {(dim, tau) for dim in bias.DIMS for tau in bias.CODE_LENS}
    assert all(cell["largest"] < bias.BOUND for cell in cells if cell["dim"] >= 64)
