"""Compiles kernels before they are needed; Numba keeps them in files.

A second process, on another core, runs `yoso_core.demo.compiling` while the first one measures
attention. Where all is compiled already, it takes a few seconds.
"""

import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiling_ahead(wanted: bool) -> Iterator["subprocess.Popen[bytes] | None"]:
    """The second process, or ``None`` where it is not wanted. It is ended with the block."""
    if not wanted:
        yield None
        return
    command = [sys.executable, "-P", "-m", "yoso_core.demo.compiling"]  # -P: the package that is installed, not a folder of its name
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
