"""Install a wheel into a fresh virtual environment and use it from another folder:
``python .ci/check_wheel.py FILE.whl``.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"

USE = """
import numpy as np, yoso_core

x = np.random.default_rng(0).standard_normal((2, 63, 48), dtype=np.float32)
out = yoso_core.yoso_attention(x, x, x, rng=0)
assert out.shape == x.shape and out.dtype == x.dtype, (out.shape, out.dtype)
assert np.allclose(np.linalg.norm(out, axis=-1), 1, atol=1e-5), "rows are not of unit length"
print("yoso_core", yoso_core.__version__, "works from", yoso_core.__path__[0])
"""


def check_files(wheel: Path) -> None:
    """The wheel holds one top-level package, its type marker and its license."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if top != {"yoso_core"}:
        sys.exit(f"{wheel.name}: only yoso_core may land in site-packages, it would put {sorted(top)}")
    for ending in ("yoso_core/py.typed", ".dist-info/licenses/LICENSE"):
        if not any(name.endswith(ending) for name in names):
            sys.exit(f"{wheel.name}: {ending} is missing")


def check_use(wheel: Path) -> None:
    """The wheel and the packages that it asks for, no extra among them, suffice to compute and to
    run the command.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin_folder = Path(folder, "bin")

        def run(program: str, *arguments: str) -> None:
            subprocess.run([str(bin_folder / program), *arguments], cwd=folder, check=True)

        run("pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), str(wheel))
        run("python", "-c", USE)
        run("yoso", "--help")
        run("yoso", "kernel", "shared_table")
        run("yoso", "tutorial", "1")
        run("yoso", "compare", "lsh_cumulation", "--emulate", "--n", "33", "--dim", "8", "--num-hash", "3", "--repeats", "1")


if __name__ == "__main__":
    path = Path(sys.argv[1]).resolve()
    check_files(path)
    check_use(path)
