"""How the kernels here are compiled: once, ahead of the first call, kept on disk between
processes.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import CacheImpl

HERE = Path(__file__).resolve().parent

njit: Any = numba.njit

OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}

PIECE = {**OPTIONS, "no_cpython_wrapper": True}
"""Options of what kernels call and Python does not: there is no way in from Python, which saves a
tenth of the time to compile.
"""

MERGED: Any = {**PIECE, "forceinline": True}
"""Options of a piece that is merged into its caller."""


@cache
def source_stamp() -> str:
    """A digest of every source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _locator(base: type[Any]) -> type[Any]:
    """Numba's own way to a cache folder, with a stamp that covers helpers in other files.

    Numba throws a compiled kernel away when the file that defines it changes. Ours are built from
    helpers in several files, so the stamp is that of the whole package: an edit anywhere in it
    compiles afresh and never serves stale code.
    """

    class Locator(base):  # type: ignore[misc]
        def get_source_stamp(self) -> str:
            return source_stamp()

        @classmethod
        def from_function(cls, py_func: Any, py_file: str) -> Any:
            return super().from_function(py_func, py_file) if Path(py_file).resolve().parent == HERE else None

    return Locator


CacheImpl._locator_classes[:0] = [_locator(base) for base in CacheImpl._locator_classes]


def kernel(**arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile ``function(first, last, ...)``, which does the tasks ``first ... last - 1``, for
    exactly these types of its ``arguments``. It runs without the GIL, and its machine code is kept
    on disk.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        assert [*inspect.signature(function).parameters] == ["first", "last", *arguments], "every argument needs its type"
        return njit(types.void(types.intp, types.intp, *arguments.values()), cache=True, **OPTIONS)(function)

    return compiled


def helper(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that is merged into its caller, so that constants of the caller become
    constants here. Keyword arguments cost nothing.
    """
    return njit(function, **MERGED)


def subroutine(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that stays a function of its own: worth a call, and compiled once for all
    its callers.
    """
    return njit(function, **PIECE)
