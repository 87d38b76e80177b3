"""The text of every CUDA kernel of the library, with its note: to read, and for ``yoso kernel``."""

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yoso_core.gpu.cupy_kernels.source import FILES, KERNEL
from yoso_core.gpu.cupy_kernels.source import HERE as CUDA_FOLDER

NUMBA_FOLDER = Path(__file__).resolve().parent / "numba_kernels"


@dataclass(frozen=True)
class KernelListing:
    """A kernel of the library as text."""

    name: str
    language: Literal["CUDA C++", "Numba CUDA"]
    file: str
    """The name of the file in the folder of the language."""
    line: int
    text: str
    """The kernel with its note."""


def catalog() -> list[KernelListing]:
    """All kernels, sorted by language, file and line.

    >>> found = next(kernel for kernel in catalog() if kernel.name == "sort_codes")
    >>> found.language, found.file
    ('CUDA C++', 'sort.cu')
    >>> print(found.text.splitlines()[0])
    // sort_codes
    """
    found = [kernel for file in FILES for kernel in _cuda_kernels(file)]
    return found + [kernel for path in sorted(NUMBA_FOLDER.glob("*.py")) for kernel in _numba_kernels(path)]


def _cuda_kernels(file: str) -> list[KernelListing]:
    """From the comment above the first line of a kernel to its closing brace, which is alone at the
    start of a line.
    """
    text = (CUDA_FOLDER / file).read_text("utf-8")
    lines, found = text.splitlines(), []
    for head in KERNEL.finditer(text):
        number = start = text.count("\n", 0, head.start())
        while start and lines[start - 1].startswith("//"):
            start -= 1
        end = lines.index("}", number) + 1
        found.append(KernelListing(head[1], "CUDA C++", file, start + 1, "\n".join(lines[start:end])))
    return found


def _numba_kernels(path: Path) -> list[KernelListing]:
    """Functions under ``@cuda.jit``, with the comment above them, except device functions."""
    text = path.read_text("utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or not any(_is_kernel(ast.unparse(mark)) for mark in node.decorator_list):
            continue
        start = min(mark.lineno for mark in node.decorator_list) - 1
        while start and lines[start - 1].startswith("#"):
            start -= 1
        found.append(KernelListing(node.name, "Numba CUDA", path.name, start + 1, "\n".join(lines[start : node.end_lineno])))
    return sorted(found, key=lambda kernel: kernel.line)


def _is_kernel(decorator: str) -> bool:
    return decorator.startswith("cuda.jit") and "device=True" not in decorator
