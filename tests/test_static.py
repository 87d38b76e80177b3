"""What the compiler says of the CUDA kernels: it is committed, and it does not get worse."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from yoso_core.benchmarks import static
from yoso_core.benchmarks.static import TARGETS, resident_warps
from yoso_core.cli import app
from yoso_core.gpu.cupy_kernels.source import FILES, kernels_in
from yoso_core.gpu.device import CudaKernel

A100, H100, _ = TARGETS
FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
COMMITTED: dict[str, Any] = json.loads((FOLDER / static.FILE).read_text("utf-8"))
NEEDED = ("kernel", "file", "macros", "dtype", "target", "threads")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in NEEDED)


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "warps"),
    [
        (32, 0, 256, 64),  # as many as there are
        (33, 0, 256, 48),  # 1,280 registers for a warp: room for 6 blocks of 8
        (128, 0, 512, 16),  # all registers for one block
        (255, 0, 512, 0),  # more than there are
        (16, 0, 32, 32),  # no more than 32 blocks
        (16, 0, 40, 64),  # the second warp of a block is there, though most of it is not
        (32, 227 << 10, 224, 7),  # all shared memory
        (32, 113 << 10, 224, 14),  # and 1 KiB for each block
        (32, (113 << 10) + 1, 224, 7),
    ],
)
def test_warps_by_hand(registers: int, shared: int, threads: int, warps: int) -> None:
    assert resident_warps(H100, registers, shared, threads) == warps


def test_every_kernel_is_committed_for_every_target_and_dtype() -> None:
    names = {name for file in FILES for name in kernels_in(file)}
    found = {(row["kernel"], row["target"], row["dtype"]) for row in COMMITTED["kernels"]}
    assert found == {(name, target.name, dtype) for name in names for target in TARGETS for dtype in static.DTYPES}
    assert len({key(row) for row in COMMITTED["kernels"]}) == len(COMMITTED["kernels"])


def test_no_kernel_uses_local_memory_and_every_block_finds_room() -> None:
    assert [row for row in COMMITTED["kernels"] if row["local"] or not row["warps"]] == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_kernel_takes_no_more_than_is_committed(dtype: str) -> None:
    """On an H100. Where a kernel is changed for the better, `yoso bench gpu --static` says so."""
    if reason := static.missing():
        pytest.skip(reason)
    committed = {key(row): row for row in COMMITTED["kernels"] if (row["target"], row["dtype"]) == (H100.name, dtype)}
    found = {key(row): row for row in static.rows((H100,), (dtype,))}
    assert set(found) == set(committed), "kernels are launched otherwise: run `yoso bench gpu --static` again"
    for which, row in found.items():
        assert row["local"] <= committed[which]["local"], which
        assert row["warps"] >= committed[which]["warps"], which


def test_blocks_are_cut_to_the_memory_of_the_target() -> None:
    def threads(target: static.Target) -> int:
        return next(one.threads for one in static.launched(target, "float32") if one.kernel.name == "shared_table")

    assert (threads(A100), threads(H100)) == (32 * 5, 32 * 7)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if static.missing() is None:
        with pytest.raises(RuntimeError, match=r"^nothing of sort.cu for sm_90:"):
            static.compiled(static.Launched(CudaKernel("sort.cu", "nothing", (("TILE", "}"),)), 32, 0), H100)
    runner = CliRunner()
    refused = runner.invoke(app, ["bench", "cpu", "--static", "--output", str(tmp_path)])
    assert refused.exit_code == 2
    assert "--static: the suite 'cpu' has no kernels of a GPU" in refused.stderr
    monkeypatch.setattr(static, "missing", lambda: "no compiler: install one")
    refused = runner.invoke(app, ["bench", "gpu", "--static", "--output", str(tmp_path)])
    assert refused.exit_code == 2
    assert "--static: no compiler: install one" in refused.stderr
    monkeypatch.undo()
    monkeypatch.setattr(static, "missing", lambda: None)
    monkeypatch.setattr(static, "rows", lambda: iter([{"kernel": "k"}]))
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    done = runner.invoke(app, ["bench", "gpu", "--static", "--output", str(tmp_path)])
    assert done.stdout == f"written: {tmp_path / static.FILE}\n"
    assert json.loads((tmp_path / static.FILE).read_text("utf-8"))["kernels"] == [{"kernel": "k"}]
