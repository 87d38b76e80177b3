"""Look into the built sdist and wheel, then install each into a fresh virtual environment and use
it from another folder: ``python .ci/check_dist.py [--tag vX.Y.Z] dist/*``.

Ends with one line and exit status 1 at the first thing that is wrong.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDINGS = (".py", ".typed", ".cu", ".cuh", ".hpp", ".cpp", ".ipynb")

USE = """
import numpy as np, yoso_core

x = np.random.default_rng(0).standard_normal((2, 63, 48), dtype=np.float32)
out = yoso_core.yoso_attention(x, x, x, rng=0)
assert out.shape == x.shape and out.dtype == x.dtype, (out.shape, out.dtype)
assert np.allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-5), "rows are not of unit length"
"""


def sources() -> set[str]:
    """Every file of the package in the source tree, as ``yoso_core/cpu/lanes.py``."""
    walk = os.walk(ROOT / "yoso_core", followlinks=True)
    files = (Path(folder, name) for folder, _, names in walk for name in names if name.endswith(ENDINGS))
    return {file.relative_to(ROOT).as_posix() for file in files}


def names_in(archive: Path) -> list[str]:
    """The files of a wheel, or of an sdist below its one folder."""
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).namelist()
    with tarfile.open(archive) as tar:
        if strange := [member.name for member in tar if not (member.isfile() or member.isdir())]:
            sys.exit(f"{archive.name}: {strange[0]} is a link, a package index refuses those")
        return [member.name.partition("/")[2] for member in tar if member.isfile()]


def check_files(archive: Path) -> None:
    """It holds the package as it stands in the source tree, the license, and in the case of a wheel
    nothing else.
    """
    names = names_in(archive)
    prefix = "" if archive.suffix == ".whl" else "src/"
    held = {name.removeprefix(prefix) for name in names if name.startswith(f"{prefix}yoso_core/")}
    if different := sorted(sources() ^ held):
        sys.exit(f"{archive.name}: {different[0]} is {'not in it' if different[0] in sources() else 'not in the source tree'}")
    if not any(name.endswith("LICENSE") for name in names):
        sys.exit(f"{archive.name}: LICENSE is missing")
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if archive.suffix == ".whl" and top != {"yoso_core"}:
        sys.exit(f"{archive.name}: only yoso_core may land in site-packages, it would put {sorted(top)}")


def check_version(archive: Path, tag: str) -> None:
    """The tag ``v0.1.0`` releases version 0.1.0, and the change log says when."""
    version = re.match(r"yoso_core-(.+?)(-py3-none-any\.whl|\.tar\.gz)$", archive.name)
    if version is None or tag != f"v{version[1]}":
        sys.exit(f"{archive.name}: not what the tag {tag} releases")
    if not re.search(rf"(?m)^## \[{re.escape(version[1])}\] - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8")):
        sys.exit(f"CHANGELOG.md: no line ## [{version[1]}] - with the date of the release")


def check_use(archive: Path) -> None:
    """The package and what it asks for, no extra among them, suffice to compute and to run the
    command.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_folder = Path(folder, "bin")

        def run(program: str, *arguments: str) -> None:
            command = [str(bin_folder / program), *arguments]
            done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode != 0:
                sys.exit(f"{done.stdout}\n{archive.name}: {program} {' '.join(arguments)} ends with exit status {done.returncode}")

        run("pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(archive))
        run("python", "-c", USE)
        run("yoso", "--help")
        run("yoso", "kernel", "shared_table")
        run("yoso", "tutorial", "1")
        run("yoso", "compare", "lsh_cumulation", "--emulate", "--n", "33", "--dim", "8", "--num-hash", "3", "--repeats", "1")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tag", help="the tag that releases them: v and the version")
    parser.add_argument("archives", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    for archive in options.archives:
        check_files(archive)
        if options.tag is not None:
            check_version(archive, options.tag)
    for archive in options.archives:
        print(f"{archive.name}: installing it elsewhere", flush=True)
        check_use(archive.resolve())
        print(f"{archive.name}: installs and works", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
