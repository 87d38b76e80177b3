"""The command ``yoso``."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import support
from typer.testing import CliRunner, Result

from yoso_core import backends, registry, sample_signs
from yoso_core.cli import app

COMMANDS = ["info", "compare", "kernel", "demo", "fill-mask", "convert", "plan", "tutorial", "warmup", "bench"]
SMALL = ["--n", "33", "--dim", "16", "--num-hash", "7", "--hash-code-len", "5", "--repeats", "2"]


def yoso(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), prog_name="yoso")


def test_help_names_every_command() -> None:
    result = yoso("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str) -> None:
    assert yoso(command, "--help").exit_code == 0


def test_as_a_module_and_light() -> None:
    """A real process; and help must not wait for Numba or torch."""
    done = subprocess.run([sys.executable, "-m", "yoso_core", "info", "--json"], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout)["environment"]["versions"]["numpy"] == np.__version__
    heavy = "import sys, yoso_core.cli; print([m for m in ('numba', 'torch', 'matplotlib', 'yoso_core.cpu') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"


def test_info() -> None:
    result = yoso("info")
    assert result.exit_code == 0
    assert all(op in result.output for op in registry.OPERATIONS)
    rounds, padded_dim = sample_signs(32, 8, 64, rng=0).shape
    told = " ".join(result.output.split())
    assert f"D = {padded_dim}, {rounds - 3} rotations in a chain of {rounds} rounds; 12 rounds with layout='paper'" in told
    assert "64 KiB for one hash, 2 MiB for all 32" in told


def test_info_json_marks_the_choice_and_the_definition() -> None:
    rows = json.loads(yoso("info", "--json").stdout)["operations"]
    for op in registry.OPERATIONS:
        assert [row["name"] for row in rows if row["op"] == op and row["automatic"]] == [support.on_the_cpu(op)[0].name]
        assert sum(row["definition"] for row in rows if row["op"] == op) == 1


def test_info_says_what_a_gpu_needs() -> None:
    report = json.loads(yoso("info", "--json").stdout)["environment"]["gpu"]
    assert report.keys() >= {"GPU", "CuPy", "Numba", "numba-cuda"}
    assert report["Numba"] != "not installed"
    reason = backends.missing("cupy")
    assert reason is None or report["GPU"] == reason


def test_info_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = backends.importlib.util.find_spec
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None if name == "cupy" else find(name))
    monkeypatch.setattr(backends, "missing", backends.missing.__wrapped__)
    result = " ".join(yoso("info").output.split())
    assert "the package 'cupy' is not installed: pip install 'yoso-core[cuda12]' (or [cuda13]" in result
    assert "CuPy: not installed" in result


def test_kernel_lists_and_prints() -> None:
    listed = yoso("kernel")
    assert listed.exit_code == 0
    assert re.search(r"shared_table +CUDA C\+\+ +cumulation.cu +lsh_cumulation cupy:shared_table", listed.stdout)
    assert re.search(r"hash_vectors +Numba CUDA +hashing.py +fast_hash numba_cuda:shared_memory", listed.stdout)
    printed = yoso("kernel", "global_table_scatter").stdout
    assert printed.startswith("CUDA C++, cumulation.cu line ")
    assert "// global_table_scatter\n//   A warp takes one key" in printed
    assert printed.rstrip().endswith("}")
    assert "global_table_gather" not in printed
    both = yoso("kernel", "cupy:global_table").stdout
    assert "// global_table_scatter" in both
    assert "// global_table_gather" in both
    assert yoso("kernel", "emulated:global_table").stdout == both
    assert "@cuda.jit\ndef hash_vectors(" in yoso("kernel", "hash_vectors").stdout


def test_compare_emulates_when_asked() -> None:
    support.need("emulated", "stepped")
    small = ["--n", "7", "--heads", "1", "--dim", "4", "--num-hash", "2", "--hash-code-len", "3", "--repeats", "1"]
    assert "emulated:" not in yoso("compare", "lsh_cumulation", *small).output
    result = yoso("compare", "lsh_cumulation", *small, "--emulate")
    assert result.exit_code == 0, result.output
    for variant in (
        "emulated:shared_table",
        "emulated:sorted_buckets",
        "emulated:global_table",
        "stepped:shared_table",
        "stepped:global_table",
    ):
        assert re.search(rf"{variant} +agrees", result.output)


def test_compare_says_what_does_not_fit() -> None:
    support.need("emulated")
    sizes = ["--n", "7", "--heads", "1", "--dim", "4", "--num-hash", "2", "--hash-code-len", "20", "--repeats", "1"]
    result = yoso("compare", "lsh_cumulation", *sizes, "--variants", "emulated:shared_table,emulated:sorted_buckets")
    assert result.exit_code == 0, "it is no fault"
    assert "Cannot run here: emulated:shared_table (hashtable_capacity: " in " ".join(result.output.split())
    assert "one column of 1048576 buckets takes 4,194,308 bytes of shared memory" in " ".join(result.output.split())


def test_info_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda where: "needs 'pkg[cpu]'" if where != "numpy" else None)
    assert "no: needs 'pkg[cpu]'" in yoso("info").output


def test_compare() -> None:
    result = yoso("compare", "lsh_cumulation", *SMALL, "--variants", "numpy:tables, numpy:pairs", "--masked")
    assert result.exit_code == 0
    assert re.search(r"numpy:tables +agrees", result.output)
    assert "key_mask: bool (1, 1, 33)" in " ".join(result.output.split())


def test_compare_json_is_nothing_but_json(tmp_path: Path) -> None:
    sizes = ["--n-key", "20", "--value-dim", "8", "--dtype", "bfloat16", "--library", "torch", "--seed", "3", "--heads", "1"]
    result = yoso("compare", "yoso_attention", *SMALL, *sizes, "--json", "--plot", str(tmp_path / "x.png"))
    read = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert read["inputs"]["value"] == "bfloat16 (1, 1, 20, 8)"
    assert read["repeats"] == 2
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


OWN_KERNELS = """
from yoso_core import reference

def sound(vectors, signs, num_hash, hash_code_len):
    return reference.fast_hash(vectors, signs, num_hash, hash_code_len)

def planted(*given):
    return sound(*given) ^ 1

nothing = None
"""


@pytest.mark.parametrize(("name", "word", "status"), [("sound", "agrees", 0), ("planted", "disagrees", 1)])
def test_a_kernel_of_the_readers_own_joins_and_decides_the_exit_status(tmp_path: Path, name: str, word: str, status: int) -> None:
    (tmp_path / "my_kernels.py").write_text(OWN_KERNELS)
    result = yoso("compare", "fast_hash", *SMALL, "--variants", "numpy:formula", "--also", f"{tmp_path}/my_kernels.py:{name}")
    assert result.exit_code == status, result.output
    assert re.search(rf"^{name} +{word}", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("my_kernels.py", "--also: need FILE.py:NAME, got 'my_kernels.py'"),
        ("nowhere.py:sound", "--also: nowhere.py is not a Python file that can be read"),
        ("{folder}/my_kernels.py:absent", "--also: {folder}/my_kernels.py has no 'absent'"),
        ("{folder}/my_kernels.py:nothing", "--also: target: need a function, got None"),
        ("{folder}/broken.py:f", "--also: {folder}/broken.py cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_one_line(tmp_path: Path, also: str, message: str) -> None:
    (tmp_path / "my_kernels.py").write_text(OWN_KERNELS)
    (tmp_path / "broken.py").write_text("1 / 0")
    result = yoso("compare", "fast_hash", *SMALL, "--also", also.format(folder=tmp_path))
    assert (result.exit_code, result.stderr) == (2, f"yoso compare: {message.format(folder=tmp_path)}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compare", "softmax"], "yoso compare: OP: no operation 'softmax'; there are hadamard_transform"),
        (["compare", "fast_hash", "--n", "-1"], "yoso compare: --n: need an integer at least 0, got -1"),
        (["compare", "fast_hash", "--num-hash", "0"], "yoso compare: --num-hash: need an integer at least 1, got 0"),
        (["compare", "fast_hash", "--hash-code-len", "31"], "yoso compare: --hash-code-len: need an integer between 1 and 30"),
        (["compare", "fast_hash", "--dtype", "int8"], "yoso compare: --dtype: need one of 'float16'"),
        (["compare", "fast_hash", "--masked"], "yoso compare: --masked: fast_hash takes no masks"),
        (["compare", "fast_hash", "--variants", "cpu:best"], "yoso compare: --variants: fast_hash has no variant 'cpu:best'"),
        (["compare", "fast_hash", "--repeats", "0"], "yoso compare: --repeats: need an integer at least 1"),
        (["compare", "fast_hash", "--plot", "/no/such/folder/x.png"], "yoso compare: --plot: the folder /no/such/folder does not exist"),
        (["compare", "fast_hash", "--plot", "x.docx"], "yoso compare: --plot: need a file name such as x.png, got x.docx"),
        (["kernel", "nope"], "yoso kernel: NAME: no kernel or CUDA variant 'nope'; `yoso kernel` lists them"),
        (["info", "--dim", "0"], "yoso info: --dim: need an integer at least 1, got 0"),
        (["demo", "--text", "/no/such/file"], "yoso demo: --text: cannot read /no/such/file"),
        (["demo", "--output", "/no/such/folder/x.png"], "yoso demo: --output: the folder /no/such/folder does not exist"),
        (["bench", "nope"], "yoso bench: SUITE: no suite 'nope'"),
        (["bench", "cpu", "--isa", "sse"], "yoso bench: --isa: no limit 'sse'; there are avx2, avx512"),
        (["bench", "gpu", "--isa", "avx2"], "yoso bench: --isa: the suite 'gpu' cannot be limited; cpu and model can"),
        (
            ["bench", "cpu", "--filter", "nope"],
            "yoso bench: --filter: no case of 'cpu' has 'nope' in its name; there are: sampled, n = 512",
        ),
        (["bench", "--output", __file__], f"yoso bench: --output: {__file__} is a file, need a folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(args: list[str], message: str) -> None:
    result = yoso(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
