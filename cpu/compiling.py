"""How the kernels here are compiled: once, ahead of the first call, kept on disk between
processes.

The disk only saves time. Where nothing can be kept, or what was kept is damaged, kernels are
compiled anew.
"""

import contextlib
import hashlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core.caching import CacheImpl, CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

HERE = Path(__file__).resolve().parent

log = logging.getLogger("yoso_core")

njit: Any = numba.njit

OPTIONS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}

PIECE = {**OPTIONS, "no_cpython_wrapper": True, "_nrt": True}
"""Options of what kernels call and Python does not: there is no way in from Python, which saves a
tenth of the time to compile.
"""

MERGED: Any = {**PIECE, "forceinline": True, "_nrt": False}
"""Options of a piece that is merged into its caller. It counts no references to the arrays that it
is given, which its caller holds: Numba cannot always prove such counting needless, and in an
innermost loop it takes most of the time.
"""


@cache
def source_stamp() -> str:
    """A digest of every source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _locator(base: type[Any]) -> type[Any]:
    """One of Numba's own ways to a cache folder, with a stamp that covers helpers in other files.

    Numba throws a compiled kernel away when the file that defines it changes. Ours are built from
    helpers in several files, so the stamp is that of the whole package: an edit anywhere in it
    compiles afresh and never serves stale code.

    A folder that cannot be written is taken as well: an image may hold kernels that its user only
    reads.
    """

    class Locator(base):  # type: ignore[misc]
        def get_source_stamp(self) -> str:
            return source_stamp()

        def ensure_cache_path(self) -> None:
            with contextlib.suppress(OSError):
                super().ensure_cache_path()

    return Locator


class _CheckedFile(IndexDataCacheFile):
    """A file of machine code that ends with a digest of it, so that one which was cut off, or holds
    zeros after a crash of the machine, is never run.
    """

    def _dump(self, obj: Any) -> bytes:
        data: bytes = super()._dump(obj)
        return data + hashlib.sha256(data).digest()

    def _load_data(self, name: str) -> Any:
        with open(self._data_path(name), "rb") as file:
            data = file.read()
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError(f"{self._data_path(name)} is damaged")
        return super()._load_data(name)


@cache
def _caches() -> tuple[type[Any], ...]:
    """Numba's cache at each place where it looks for a folder, in its order."""
    found = []
    for base in CacheImpl._locator_classes:
        places = type("Places", (CompileResultCacheImpl,), {"_locator_classes": [_locator(base)]})
        found.append(type("Cache", (FunctionCache,), {"_impl_class": places}))
    return tuple(found)


class KernelCache:
    """The machine code of one kernel on disk: read from the first folder that has it, written to
    the first that takes it. In place of Numba's own cache, which knows one folder, and lets every
    fault of the disk end the call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.caches: list[Any] = []
        for kind in _caches():
            with contextlib.suppress(RuntimeError, ValueError):  # such a place is not for this function
                found = kind(function)
                file = found._cache_file
                found._cache_file = _CheckedFile(found.cache_path, found._impl.filename_base, file._source_stamp)
                self.caches.append(found)

    @property
    def cache_path(self) -> str | None:
        """For Numba's statistics: the folder that comes first."""
        return self.caches[0].cache_path if self.caches else None

    @property
    def files(self) -> list[Path]:
        """What is kept of this kernel, wherever it is."""
        return [path for one in self.caches for path in Path(one.cache_path).glob(f"{one._impl.filename_base}.*.nbc")]

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The kernel from disk, or ``None``."""
        for one in self.caches:
            try:
                found = one.load_overload(signature, target)
            except Exception as damage:  # whatever a damaged file makes of pickle, or a folder that must not be read
                log.info("compiling anew, since %s holds a file that cannot be used: %s", one.cache_path, damage)
                with contextlib.suppress(OSError):
                    one.flush()
                continue
            if found is not None:
                return found
        _announce()
        return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keep the kernel, where there is a place."""
        problems = []
        for one in self.caches:
            try:
                one.save_overload(signature, compiled)
            except Exception as problem:  # the same, and a full disk
                problems.append(f"{one.cache_path} ({problem.strerror if isinstance(problem, OSError) else problem})")
            else:
                return
        _warn_of_disk(problems)


said: set[str] = set()
"""What a process says once, and has said: ``"compiling"`` and ``"not kept"``."""


def _announce() -> None:
    """Where a person looks, say why the first call takes so long."""
    if "compiling" not in said and sys.stderr is not None and sys.stderr.isatty():
        said.add("compiling")
        print("yoso_core: compiling for this processor, once (`yoso warmup` does it ahead)", file=sys.stderr, flush=True)


def _warn_of_disk(problems: list[str]) -> None:
    if "not kept" not in said:
        said.add("not kept")
        where = ", nor in ".join(problems) or "any folder"
        warnings.warn(
            f"compiled kernels cannot be kept in {where}, so every process compiles its own; "
            "name a folder that can be written in NUMBA_CACHE_DIR",
            RuntimeWarning,
            stacklevel=2,
        )


def kernel(**arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile ``function(first, last, ...)``, which does the tasks ``first ... last - 1``, for
    exactly these types of its ``arguments``. It runs without the GIL, and its machine code is kept
    on disk.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        assert [*inspect.signature(function).parameters] == ["first", "last", *arguments], "every argument needs its type"
        return compile_or_load(function, types.void(types.intp, types.intp, *arguments.values()))

    return compiled


def compile_or_load(function: Callable[..., Any], signature: Any) -> Any:
    """A function compiled for one signature, from disk if it is there."""
    compiled = njit(**OPTIONS)(function)
    compiled._cache = KernelCache(function)
    compiled.compile(signature)
    compiled.disable_compile()
    return compiled


def helper(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that is merged into its caller, so that constants of the caller become
    constants here. Keyword arguments cost nothing. It makes and returns no array.
    """
    return njit(function, **MERGED)


def allocating_helper(function: Callable[..., Any]) -> Any:
    """A `helper` that makes an array, or returns one: it does count references."""
    return njit(function, **{**MERGED, "_nrt": True})


def subroutine(function: Callable[..., Any]) -> Any:
    """A piece of a kernel that stays a function of its own: worth a call, and compiled once for all
    its callers.
    """
    return njit(function, **PIECE)
