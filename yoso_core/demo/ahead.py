"""Compiles kernels before they are needed; Numba keeps them in files.

A second process, on another core, compiles what the training needs while the first one measures
attention. ``python -m yoso_core.demo.ahead everything`` compiles all that the demo needs; the
Makefile does so once, at the end of the installation. Where all is compiled already, both take a
few seconds.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


@contextmanager
def compiling_ahead(wanted: bool) -> Iterator["subprocess.Popen[bytes] | None"]:
    """The second process, or ``None`` where it is not wanted. It is ended with the block."""
    if not wanted:
        yield None
        return
    command = [sys.executable, "-P", "-m", "yoso_core.demo.ahead"]  # -P: the package that is installed, not a folder of its name
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet) as process:
        try:
            yield process
        finally:
            process.kill()


def compiled(process: "subprocess.Popen[bytes] | None", seconds: float) -> bool:
    """Whether the second process is through, after a wait of at most ``seconds``. One that failed
    is through as well: what it has left is compiled where it is needed.
    """
    if process is not None:
        try:
            process.wait(None if math.isinf(seconds) else max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return False
    return True


def compile_everything() -> None:
    """Run the demo with as little work as there can be, on the default text."""
    from yoso_core.demo import LanguageSizes, Sizes, run

    language = LanguageSizes(steps=1, windows=1, nums_hash=(16,), fills=1)
    sizes = Sizes(passage=512, words=1, nums_hash=(32, 64), hashes=64, lengths=(512,), repeats=1, agreement=64, language=language)
    with TemporaryDirectory() as folder:
        run(output=Path(folder) / "picture.png", show=False, budget=math.inf, sizes=sizes, ahead=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["everything"]:
        compile_everything()
    else:
        from yoso_core.demo import LanguageSizes
        from yoso_core.demo.language import compile_kernels

        compile_kernels(LanguageSizes())
