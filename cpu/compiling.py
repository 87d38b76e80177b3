"""How the kernels here are compiled: once, ahead of the first call, kept on disk between
processes.
"""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import CacheImpl

HERE = Path(__file__).resolve().parent

njit: Any = numba.njit

OPTIONS = {"nogil": True, "error_model": "numpy"}


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


def kernel(signature: str | Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile for exactly this signature, without the GIL, and keep the machine code on disk."""
    return njit(signature, cache=True, **OPTIONS)


def helper(function: Callable[..., Any]) -> Any:
    """A piece of a kernel: always merged into its caller, so that constants of the caller become
    constants here.
    """
    return njit(function, forceinline=True, **OPTIONS)
