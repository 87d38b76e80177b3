"""The text of a `.cu` file as a compiler gets it: the project's own headers put in where they are
named.
"""

import re
from functools import cache
from pathlib import Path

from yoso_core.gpu.device import CudaKernel

HERE = Path(__file__).resolve().parent

FILES: tuple[str, ...] = tuple(sorted(path.name for path in HERE.glob("*.cu")))

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
KERNEL = re.compile(r'^extern "C" __global__ void(?:\s+__launch_bounds__\(.*?\))?\s+(\w+)\(', re.MULTILINE)
"""The head of a kernel; its group 1 is the name."""


@cache
def source(file: str) -> str:
    """One text, so that a cache keyed by it never serves a kernel whose header has changed. Line
    numbers stay those of the files.
    """

    def include(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start()) + 2
        return f'#line 1 "{found[1]}"\n{(HERE / found[1]).read_text("utf-8")}#line {line} "{file}"'

    text = (HERE / file).read_text("utf-8")
    return f'#line 1 "{file}"\n' + _INCLUDE.sub(include, text)


@cache
def kernels_in(file: str) -> tuple[str, ...]:
    """The names of the kernels that a file defines."""
    return tuple(KERNEL.findall((HERE / file).read_text("utf-8")))


def options(kernel: CudaKernel) -> tuple[str, ...]:
    """What the compiler is told beyond the target: the standard, and the macros of the kernel."""
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines))
