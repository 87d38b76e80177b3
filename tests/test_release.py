"""What releases the package: workflows, the citation, and the check of what is built."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs yoso_core[dev]")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8")))
ON = True  # how YAML 1.1 reads the key `on`

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])


def workflow(path: Path) -> dict[Any, Any]:
    read: dict[Any, Any] = yaml.safe_load(path.read_text("utf-8"))
    return read


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job.get("steps", ())]


def test_there_are_two_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "release.yml"]


@each_workflow
def test_an_action_is_pinned_to_one_version(path: Path) -> None:
    used = [step["uses"] for step in steps(path) if "uses" in step]
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@v\d+\.\d+\.\d+", name)] == []


@each_workflow
def test_a_workflow_runs_files_that_are_there(path: Path) -> None:
    jobs = workflow(path)["jobs"].values()
    commands = [step["run"] for step in steps(path) if "run" in step]
    named = [word for command in commands for word in command.split() if re.match(r"\.ci/|\w+\.txt$", word)]
    named += [job["uses"] for job in jobs if "uses" in job]
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []


@each_workflow
def test_a_workflow_has_no_more_rights_than_it_needs(path: Path) -> None:
    read = workflow(path)
    assert read["permissions"] == {"contents": "read"}
    assert {name: job["permissions"] for name, job in read["jobs"].items() if "permissions" in job} == (
        {"publish": {"id-token": "write"}} if path.stem == "release" else {}
    )


def test_everything_runs_on_every_python_that_the_package_names() -> None:
    check = workflow(ROOT / ".github/workflows/ci.yml")["jobs"]["check"]
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    assert check["strategy"]["matrix"]["python"] == named
    assert f">={named[0]}" == PROJECT["requires-python"]
    assert [step["run"] for step in check["steps"] if "run" in step] == [".ci/run"]


def test_what_has_to_pass_are_targets_of_make() -> None:
    named = re.search(r"(?m)^set -- (.+)$", (ROOT / ".ci/run").read_text("utf-8"))
    assert named is not None
    wanted = named[1].split()
    assert {"test", "lint", "types", "dist"} <= set(wanted) <= TARGETS


def test_contributing_lists_every_target_of_make() -> None:
    listed = re.findall(r"(?m)^\| `make ([a-z-]+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert sorted(listed) == sorted(TARGETS - {"help"})


def test_a_tag_releases_when_everything_is_green() -> None:
    read = workflow(ROOT / ".github/workflows/release.yml")
    assert read[ON] == {"push": {"tags": ["v*"]}}
    assert set(read["jobs"]["publish"]["needs"]) == {"check", "build"}
    assert read["jobs"]["check"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow(ROOT / ".github/workflows/ci.yml")[ON]
    assert any("--tag" in step.get("run", "") for step in read["jobs"]["build"]["steps"])


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["cff-version"] == "1.2.0"
    assert (citation["version"], citation["license"], citation["title"]) == (PROJECT["version"], PROJECT["license"], "yoso_core")
    assert citation["authors"] == PROJECT["authors"]
    assert " ".join(citation["abstract"].split()) == PROJECT["description"]
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "2111.09714" in paper["url"]
    assert paper["title"].startswith("You Only Sample (Almost) Once")
    assert [author["family-names"] for author in paper["authors"]] == ["Zeng", "Xiong", "Ravi", "Acharya", "Fung", "Singh"]


@pytest.fixture(scope="module")
def check_dist() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / ".ci/check_dist.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel(folder: Path, names: set[str]) -> Path:
    path = folder / "yoso_core-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "")
    return path


LICENSE = "yoso_core-0.1.0.dist-info/licenses/LICENSE"


def test_a_whole_wheel_passes_the_check(check_dist: ModuleType, tmp_path: Path) -> None:
    files = check_dist.sources()
    assert {"yoso_core/py.typed", "yoso_core/cpu/lanes.py", "yoso_core/gpu/cupy_kernels/common.cuh"} <= files
    check_dist.check_files(wheel(tmp_path, files | {LICENSE}))


@pytest.mark.parametrize(
    ("missing", "added", "message"),
    [
        ("yoso_core/py.typed", None, "py.typed is not in it"),
        ("yoso_core/gpu/cupy_kernels/common.cuh", None, "common.cuh is not in it"),
        (None, "yoso_core/cpu/forgotten.py", "forgotten.py is not in the source tree"),
        (None, "gpu/__init__.py", "only yoso_core may land in site-packages"),
        (LICENSE, None, "LICENSE is missing"),
    ],
)
def test_a_wheel_is_refused(check_dist: ModuleType, tmp_path: Path, missing: str | None, added: str | None, message: str) -> None:
    names = (check_dist.sources() | {LICENSE} | {added}) - {missing, None}
    with pytest.raises(SystemExit, match=message):
        check_dist.check_files(wheel(tmp_path, names))


def test_an_sdist_with_a_link_in_it_is_refused(check_dist: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "yoso_core-0.1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        link = tarfile.TarInfo("yoso_core-0.1.0/src/yoso_core")
        link.type, link.linkname = tarfile.SYMTYPE, "../yoso_core"
        tar.addfile(link)
    with pytest.raises(SystemExit, match="src/yoso_core is a link"):
        check_dist.check_files(path)


@pytest.mark.parametrize(
    ("tag", "heading", "message"),
    [
        ("v0.1.1", "## [0.1.0] - 2026-01-31", "not what the tag v0.1.1 releases"),
        ("0.1.0", "## [0.1.0] - 2026-01-31", "not what the tag 0.1.0 releases"),
        ("v0.1.0", "## [0.1.0] - Unreleased", "with the date of the release"),
        ("v0.1.0", "## [0.1.0] - 2026-01-31", None),
    ],
)
def test_a_tag_has_to_be_that_of_the_version(
    check_dist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tag: str, heading: str, message: str | None
) -> None:
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n", "utf-8")
    monkeypatch.setattr(check_dist, "ROOT", tmp_path)
    for name in ("yoso_core-0.1.0-py3-none-any.whl", "yoso_core-0.1.0.tar.gz"):
        if message is None:
            check_dist.check_version(Path(name), tag)
        else:
            with pytest.raises(SystemExit, match=message):
                check_dist.check_version(Path(name), tag)


# Make


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("of_torch", "asked", "extra"),
    [("'13.0'", (), "cuda13"), ("'12.8'", (), "cuda12"), ("None", (), "cuda13"), ("'13.0'", ("CUDA=cuda12",), "cuda12")],
)
def test_the_benchmark_of_a_gpu_takes_the_cuda_of_torch(of_torch: str, asked: tuple[str, ...], extra: str, tmp_path: Path) -> None:
    """In an environment whose programs say what they were called with."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "torch.py").write_text(f"class version:\n    cuda = {of_torch}\n", "utf-8")
    (programs / "python").write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n', "utf-8")
    for name in ("pip", "yoso"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@"\n', "utf-8")
    for program in programs.iterdir():
        program.chmod(0o755)
    (tmp_path / "installed-dev").touch()
    of_make = ("ARGS", "CUDA", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")  # of the make that runs the tests
    environment = {name: value for name, value in os.environ.items() if name not in of_make}
    command = ["make", f"VENV={tmp_path}", *asked, "bench-gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"pip install --quiet --constraint constraints.txt --editable .[{extra}]" in done.stdout
    assert done.stdout.endswith("yoso bench gpu\n")
