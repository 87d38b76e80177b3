"""What ``yoso warmup`` does: kernels compiled before they are needed."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from yoso_core import checks


@dataclass(frozen=True)
class Warmed:
    """What is on disk now."""

    what: str
    number: int
    """Of the kernels, or of the variants."""
    fresh: int
    """Of these, compiled just now."""
    folders: dict[str, int]
    """Bytes that are kept, by folder."""


def warm_cpu(dims: Sequence[int], dtypes: Sequence[str], *, progress: bool = False) -> Warmed:
    """Compile every kernel for the CPU, or find that it is kept already.

    Raises
    ------
    ValueError : a dim or a dtype that no kernel is for; Numba cannot compile here.
    OSError : kernels cannot be kept.
    """
    from yoso_core.backends import missing

    _check(dims, dtypes)
    if reason := missing("cpu"):
        raise ValueError(f"nothing can be compiled: {reason}")
    from yoso_core.cpu import compiling, warmup

    padded = sorted({1 << (dim - 1).bit_length() for dim in dims})
    compiling.said.add("compiling")  # that is what was asked for
    kernels = list(warmup.all_kernels(padded, dtypes))
    files: set[Path] = set()
    fresh = 0
    with warnings.catch_warnings(), _bar("compiling", len(kernels), progress) as advance:
        warnings.filterwarnings("error", "compiled kernels cannot be kept", RuntimeWarning)
        for name, make in kernels:
            advance(name)
            try:
                kept = warmup.warm(make)
            except RuntimeWarning as warning:
                raise OSError(str(warning)) from None
            files |= set(kept.files)
            fresh += kept.fresh
    return Warmed("CPU kernels", len(kernels), fresh, _by_folder(files))


def warm_emulator(dims: Sequence[int], dtypes: Sequence[str], *, progress: bool = False) -> Warmed:
    """Compile the CUDA kernels for the emulator, at the sizes of `example_inputs`: every emulated
    variant runs once, on a few vectors.

    Raises
    ------
    ValueError : a dim or a dtype that no kernel is for; the emulator cannot run here.
    OSError : the compiler fails.
    """
    from yoso_core.backends import missing

    _check(dims, dtypes)
    if reason := missing("emulated"):
        raise ValueError(f"emulate: {reason}")
    from yoso_core.gpu.device import DoesNotFit
    from yoso_core.gpu.emulator.build import cache_folder
    from yoso_core.inputs import example_inputs
    from yoso_core.operations import OPERATIONS
    from yoso_core.registry import variants

    before = set(cache_folder().glob("*.so"))
    calls = [
        (operation, variant.name, dim, dtype)
        for operation in OPERATIONS.values()
        for variant in variants(operation.name)
        if variant.where == "emulated"
        for dim in dims
        for dtype in dtypes
        if not (operation.power_of_two and dim & (dim - 1))
    ]
    with _bar("compiling for the emulator", len(calls), progress) as advance:
        for operation, name, dim, dtype in calls:
            advance(f"{operation.name} {name} {dim} {dtype}")
            args, kwargs = example_inputs(
                operation.name, heads=1, n=8, dim=dim, dtype=dtype, library="torch" if dtype == "bfloat16" else "numpy"
            )
            try:
                operation.function(*args, **kwargs, variant=name)
            except DoesNotFit:
                continue
            except RuntimeError as error:
                raise OSError(f"emulate: {error}") from error
    files = set(cache_folder().glob("*.so"))
    return Warmed("libraries for the emulator", len(files), len(files - before), _by_folder(files))


def _check(dims: Sequence[int], dtypes: Sequence[str]) -> None:
    for dim in dims:
        checks.integer("dim", dim, 1, 1024)
    for dtype in dtypes:
        checks.one_of("dtype", dtype, ("float16", "bfloat16", "float32", "float64"))


def _by_folder(files: set[Path]) -> dict[str, int]:
    folders: dict[str, int] = {}
    for file in sorted(files):
        folders[str(file.parent)] = folders.get(str(file.parent), 0) + os.stat(file).st_size
    return folders


@contextmanager
def _bar(what: str, total: int, wanted: bool) -> Iterator[Callable[[str], object]]:
    """``advance(name)`` says which one begins."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not wanted) as bar:
        task = bar.add_task(what, total=total)
        done = -1

        def advance(name: str) -> None:
            nonlocal done
            done += 1
            bar.update(task, completed=done, description=f"{what}: {name}")

        yield advance
