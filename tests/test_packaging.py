"""What the package promises before anything is computed: a light import, the names it lists, and
files that agree with each other.
"""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from setuptools import find_packages

import yoso_core
from yoso_core import reference

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
FACE = ROOT / "yoso_core"
NOT_INSTALLED = {"build", "dist", "src", "tests"}
PUBLIC_FUNCTIONS = [name for name in yoso_core.__all__ if inspect.isfunction(getattr(yoso_core, name))]
HEAVY = ("numba", "cupy", "torch", "transformers", "matplotlib", "rich", "typer", "tqdm", "scipy")
MACHINE_PATH = re.compile(r"""["'](\.\./|/(home|root|work|mnt|tmp|Users)/)""")


def in_new_process(code: str, folder: Path) -> str:
    """What ``code`` prints in a Python of its own, started outside the source tree."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_import_loads_numpy_alone(tmp_path: Path) -> None:
    loaded = in_new_process("import sys, yoso_core; print(*sys.modules)", tmp_path).split()
    assert "numpy" in loaded
    assert not {module.partition(".")[0] for module in loaded} & set(HEAVY)


@pytest.mark.parametrize("name", yoso_core.__all__)
def test_every_listed_name_is_there(name: str) -> None:
    assert getattr(yoso_core, name) is not None


@pytest.mark.parametrize("package", ["yoso_core", "yoso_core.model"])
def test_completion_knows_names_that_nobody_has_used_yet(package: str, tmp_path: Path) -> None:
    code = f"import {package} as p; print(set(p.__all__) - set(dir(p)) or 'all', hasattr(p, 'no_such_name'))"
    assert in_new_process(code, tmp_path) == "all False\n"


def top_folders() -> list[Path]:
    return [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_INSTALLED and not path.name.startswith(".")]


def installed_folders() -> set[Path]:
    """Where the packages that setuptools finds stand, links followed."""
    found = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert found == {"where": ["src"], "namespaces": False}
    return {(ROOT / "src" / package.replace(".", "/")).resolve() for package in find_packages(str(ROOT / "src"))}


def test_every_package_of_the_source_tree_is_installed() -> None:
    installed = installed_folders()
    with_init = {init.parent for top in top_folders() for init in top.rglob("__init__.py")}
    with_modules = {module.parent for folder in installed for module in folder.rglob("*.py")}
    assert with_init | with_modules == installed


def test_a_link_puts_every_package_of_the_root_into_the_one_package() -> None:
    """Relative ones, which a clone keeps: ``yoso_core/cpu`` leads to ``cpu``."""
    packages = {top.name for top in top_folders() if (top / "__init__.py").is_file() and top != FACE}
    links = {path.name: str(path.readlink()) for path in FACE.iterdir() if path.is_symlink()}
    assert links == {name: f"../{name}" for name in packages}
    assert {path.name: str(path.readlink()) for path in (ROOT / "src").iterdir() if path.is_symlink()} == {"yoso_core": "../yoso_core"}


@pytest.mark.parametrize("installed", [True, False], ids=["installed", "not-installed"])
def test_modules_run_from_the_root_of_the_repository(installed: bool, tmp_path: Path) -> None:
    """There ``./yoso_core`` comes first, with or without an install, which ``-S`` leaves out."""
    command = [sys.executable, *([] if installed else ["-S"]), "-m"]
    environment = os.environ | {"PYTHONPATH": str(Path(np.__file__).parents[1])}

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    elsewhere = run(tmp_path, "yoso_core", "--help")
    assert (elsewhere.returncode == 0) == installed, elsewhere.stderr
    listing = run(ROOT, "yoso_core", "kernel", "shared_table")
    assert listing.returncode == 0, listing.stderr
    assert "__global__" in listing.stdout
    tests = run(ROOT, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_reference.py", "-k", "hadamard")
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout


def test_no_source_names_a_path_of_one_machine() -> None:
    sources = {path for folder in installed_folders() for path in folder.rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in sources if MACHINE_PATH.search(path.read_text("utf-8"))} == set()


def test_version_is_one() -> None:
    version = PYPROJECT["project"]["version"]
    assert version == yoso_core.__version__
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def explained(name: str) -> str:
    """A function's docstring, with those it refers to in the words "those of `other`"."""
    doc = getattr(yoso_core, name).__doc__ or ""
    others = {other for those in re.findall(r"those\s+of\s+([^.]*)\.", doc) for other in re.findall(r"(?<!`)`(\w+)`", those)}
    return "\n".join([doc, *(explained(other) for other in others & set(PUBLIC_FUNCTIONS))])


@pytest.mark.parametrize("name", PUBLIC_FUNCTIONS)
def test_docstring_names_every_parameter(name: str) -> None:
    """But ``variant``, which means the same everywhere, and which the package's own docstring
    explains.
    """
    parameters = set(inspect.signature(getattr(yoso_core, name)).parameters) - {"variant"}
    words = set(re.findall(r"\w+", explained(name)))
    assert parameters - words == set()


def test_package_docstring_explains_variant() -> None:
    assert "variant=" in (yoso_core.__doc__ or "")


@pytest.mark.parametrize("name", reference.__all__)
def test_reference_says_what_it_defines(name: str) -> None:
    thing: Any = getattr(reference, name)
    assert not inspect.isfunction(thing) or (thing.__doc__ or "").strip()
