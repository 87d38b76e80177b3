"""The examples in docstrings run and say what they print, and every public function has one."""

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Once

import yoso_core

FACE = Path(yoso_core.__file__).parent

PUBLIC = ("yoso_core", "yoso_core.reference", "yoso_core.model", "yoso_core.gpu", "yoso_core.gpu.emulator")
"""Modules whose ``__all__`` is documented."""


def sources() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for folder, _, files in os.walk(FACE, followlinks=True):
        package = ".".join(("yoso_core", *Path(folder).relative_to(FACE).parts))
        for file in files:
            name = file.removesuffix(".py")
            if file.endswith(".py") and name.isidentifier() and name != "__main__":
                found[package if name == "__init__" else f"{package}.{name}"] = Path(folder, file)
    return dict(sorted(found.items()))


WITH_EXAMPLES = [name for name, path in sources().items() if ">>> " in path.read_text("utf-8")]

# In a process of their own: an example may register what it likes with transformers.
RUN = """
import doctest, importlib, io, json, sys, warnings
found = {}
for name in sys.argv[2:]:
    try:
        module = importlib.import_module(name)
    except ImportError as missing:
        found[name] = {"missing": str(missing)}
        continue
    printed, tried = io.StringIO(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
            if test.examples:
                result = doctest.DocTestRunner(verbose=False).run(test, out=printed.write)
                tried.append((test.name, result.attempted, len(test.examples)))
    found[name] = {"tried": tried, "printed": printed.getvalue()}
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def outcomes(once: Once) -> dict[str, Any]:
    """What the examples of every module gave; they run once for all workers."""

    def run(written: Path) -> None:
        command = [sys.executable, "-c", RUN, str(written), *WITH_EXAMPLES]
        done = subprocess.run(command, cwd=written.parent, capture_output=True, text=True, encoding="utf-8", timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    found: dict[str, Any] = json.loads(once("examples.json", run).read_text("utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_print_what_they_say(module: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[module]
    if missing := outcome.get("missing"):
        pytest.skip(f"{module} needs what is not installed: {missing}")
    assert outcome["printed"] == ""
    assert outcome["tried"], ">>> stands in no docstring that doctest finds"
    assert [name for name, attempted, examples in outcome["tried"] if attempted < examples] == [], "examples are skipped"


def test_the_check_sees_a_wrong_example_and_a_skipped_one(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text('"""\n>>> 1 + 1\n3\n>>> 1 / 0  # doctest: +SKIP\n"""\n', "utf-8")
    command = [sys.executable, "-c", RUN, "found.json", "wrong", "no_such_module"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True, timeout=60)
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert "Expected:\n    3\nGot:\n    2\n" in found["wrong"]["printed"]
    assert found["wrong"]["tried"] == [["wrong", 1, 2]]
    assert found["no_such_module"] == {"missing": "No module named 'no_such_module'"}


def public_functions() -> dict[str, Any]:
    found = {}
    for name in PUBLIC:
        module = importlib.import_module(name)
        found |= {f"{name}.{listed}": getattr(module, listed) for listed in module.__all__}
    return {name: thing for name, thing in found.items() if inspect.isfunction(thing)}


def test_every_public_function_has_an_example() -> None:
    assert [name for name, function in public_functions().items() if ">>> " not in (function.__doc__ or "")] == []
