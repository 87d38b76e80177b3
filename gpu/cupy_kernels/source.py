"""The text of a kernel as a compiler gets it, with the package's headers put in."""

import re
from functools import cache
from pathlib import Path

from yoso_core.gpu.device import CudaKernel, KernelText

HERE = Path(__file__).resolve().parent

FILES: tuple[str, ...] = tuple(sorted(path.name for path in HERE.glob("*.cu")))
HEADERS: tuple[str, ...] = tuple(sorted(path.name for path in HERE.glob("*.cuh")))

_INCLUDE = re.compile(rf'^#include "({"|".join(map(re.escape, HEADERS))})"$', re.MULTILINE)
KERNEL = re.compile(r'^extern "C" __global__ void(?:\s+__launch_bounds__\(.*?\))?\s+(\w+)\(', re.MULTILINE)
"""The head of a kernel; its group 1 is the name."""


def with_headers(file: str, text: str) -> str:
    """The text of a file with the package's headers in the place of their ``#include`` lines. Line
    numbers in messages stay those of the files.

    >>> with_headers("mine.cu", '#include "sort.cuh"').splitlines()[:2]
    ['#line 1 "mine.cu"', '#line 1 "sort.cuh"']
    """

    def include(found: re.Match[str]) -> str:
        line = text.count("\n", 0, found.start()) + 2
        return f'#line 1 "{found[1]}"\n{(HERE / found[1]).read_text("utf-8")}#line {line} "{file}"'

    return f'#line 1 "{file}"\n' + _INCLUDE.sub(include, text)


@cache
def source(file: str) -> str:
    """The text of a `.cu` file and its headers. A cache with this text as its key never serves a
    kernel whose header has changed.

    >>> source("sort.cu").splitlines()[0]
    '#line 1 "sort.cu"'
    """
    return with_headers(file, (HERE / file).read_text("utf-8"))


def source_of(kernel: CudaKernel | KernelText) -> str:
    """What a compiler of CUDA C++ is given for a kernel."""
    return source(kernel.file) if isinstance(kernel, CudaKernel) else with_headers(kernel.file, kernel.text)


@cache
def unit_of(kernel: CudaKernel | KernelText) -> str:
    """What is compiled to launch a kernel on a GPU: its file without the other kernels there, which
    take most of the compiler's time. Lines in messages stay those of the file.

    >>> KERNEL.findall(unit_of(CudaKernel("sort.cu", "sort_codes")))
    ['sort_codes']
    """
    text = source_of(kernel)
    if isinstance(kernel, KernelText):
        return text
    parts, end = [], 0
    for head in KERNEL.finditer(text):
        if head[1] != kernel.name:
            closed = text.index("\n}\n", head.start()) + 2  # alone at the start of its line
            parts += [text[end : head.start()], "\n" * text.count("\n", head.start(), closed)]
            end = closed
    return "".join((*parts, text[end:]))


@cache
def kernels_in(file: str) -> tuple[str, ...]:
    """The names of the kernels that a file defines.

    >>> kernels_in("sort.cu")
    ('transpose_codes', 'sort_codes')
    """
    return tuple(KERNEL.findall((HERE / file).read_text("utf-8")))


@cache
def parameter_names(text: str, kernel: str) -> tuple[str, ...]:
    """The names of the parameters of a kernel; empty if the text is not as expected.

    >>> parameter_names("__global__ void scale(float* __restrict__ x, int n) {}", "scale")
    ('x', 'n')
    """
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.search(rf"\b{re.escape(kernel)}\s*\(([^()]*)\)\s*\{{", plain)
    return tuple(re.findall(r"(\w+)\s*(?:,|$)", found[1].strip())) if found else ()


def options(kernel: CudaKernel | KernelText) -> tuple[str, ...]:
    """The options of the compiler beside the target: the standard, and the kernel's macros.

    >>> options(CudaKernel("hashing.cu", "warp_per_vector", (("D", 64),)))
    ('--std=c++17', '-DD=64')
    """
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines))
