"""Kernels under the sanitizers of the compiler: AddressSanitizer for accesses beyond memory,
ThreadSanitizer for races.
"""

import os
import pickle
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from yoso_core.gpu.emulator import build
from yoso_core.gpu.emulator.places import Frame, frames, place_in

Kind = Literal["address", "thread"]

_OPTIONS = {
    "address": ("ASAN_OPTIONS", "symbolize=0:detect_leaks=0:halt_on_error=0"),
    "thread": ("TSAN_OPTIONS", "symbolize=0:exitcode=0:history_size=4:suppress_equal_addresses=0"),
}

# Everything that the child launches is built for the sanitizer.
_CHILD = """
import os, pickle, sys
os.environ.pop("LD_PRELOAD")  # the compiler need not run under the sanitizer
from yoso_core.gpu.emulator.emulator import build_for
with open(sys.argv[1], "rb") as file:
    kind, code, names = pickle.load(file)
with build_for(kind):
    exec(compile(code, "<sanitized>", "exec"), {"__name__": "<sanitized>", **names})
"""


@dataclass(frozen=True)
class Report:
    """What a sanitizer found, once for each place."""

    kind: str
    """In the sanitizer's words: ``data race``, ``heap-buffer-overflow``, ``use-after-poison``
    (beyond an array in shared memory).
    """
    kernel: str
    file: str
    line: int
    places: tuple[tuple[str, int], ...]
    """Every line of the kernel's source that the report names: of a race, both sides."""
    text: str
    """The whole report."""

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind} at " + ", ".join(f"{file}:{line}" for file, line in self.places)


@cache
def _preloaded(compiler: tuple[str, ...], kind: str) -> list[str] | str:
    """How a program is started with the sanitizer's library in it, or why that cannot be."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[kind]
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
    if not os.path.exists(path):
        return f"{compiler[0]} has no {name}: use g++, and install the package with that library if it has one of its own"
    start = ["env", f"LD_PRELOAD={path}"]
    # Addresses that Linux draws at random may lie where ThreadSanitizer's own must be. Some
    # containers do not allow to switch that off.
    fixed = ["setarch", platform.machine(), "-R", *start]
    tried = [fixed, start] if kind == "thread" and shutil.which("setarch") else [start]
    for command in tried:
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return command
    return f"{name} does not run here: {done.stderr.strip()}"


def missing(kind: Kind) -> str | None:
    """Why kernels cannot run under this sanitizer here; ``None`` if they can."""
    reason = build.missing()
    if reason:
        return reason
    if sys.platform != "linux":
        return f"the emulator runs its sanitizers on Linux only, this is {sys.platform}"
    found = _preloaded(build.compiler().command, kind)
    return found if isinstance(found, str) else None


def sanitized(kind: Kind, code: str, *, timeout: float = 600, **names: Any) -> list[Report]:
    """Run Python code in a child process, with every kernel that it launches in the emulator built
    for a sanitizer.

    Parameters
    ----------
    kind : ``"address"`` finds accesses beyond arrays and shared memory, ``"thread"`` accesses of
        two threads that nothing orders.
    code : a text, since the sanitizer must be in the process from its start.
    names : what the code finds defined; they travel by pickle.

    Raises
    ------
    RuntimeError : what `missing` says, or the code has raised; the message holds its traceback.

    >>> from yoso_core.gpu.emulator import sanitizers
    >>> code = "print('no kernel, no report')"
    >>> [] if sanitizers.missing("thread") else sanitizers.sanitized("thread", code)
    []
    """
    if kind not in _OPTIONS:
        raise ValueError(f'kind: got {kind!r}, must be "address" or "thread"')
    start = missing(kind) or _preloaded(build.compiler().command, kind)
    if isinstance(start, str):
        raise RuntimeError(start)
    variable, options = _OPTIONS[kind]
    with tempfile.TemporaryDirectory() as folder:
        inputs, reports = Path(folder) / "inputs", Path(folder) / "report"
        inputs.write_bytes(pickle.dumps((kind, code, names)))
        environment = {
            **os.environ,
            variable: f"{options}:log_path={reports}",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [*start, sys.executable, "-c", _CHILD, str(inputs)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as late:
            raise RuntimeError(f"the code has not ended in {timeout} s under the {kind} sanitizer") from late
        if done.returncode:
            raise RuntimeError(f"the code has failed under the {kind} sanitizer, exit code {done.returncode}:\n{done.stderr.strip()}")
        return _parse("\n".join(path.read_text("utf-8", "replace") for path in sorted(Path(folder).glob("report.*"))))


_HEAD = re.compile(
    r"(?:ERROR: AddressSanitizer|WARNING: ThreadSanitizer): (?P<kind>.*?)(?: on (?:unknown )?address| \(pid|$)",
    re.MULTILINE,
)
_FRAME = re.compile(r"#\d+ .*?\((?P<library>[^()]+)\+0x(?P<offset>[0-9a-f]+)\).*")
# What follows is about other matters: where memory comes from, where a thread was made.
_REST = re.compile(r"^ *(?:.* is located |Location is |Thread |Address |SUMMARY)", re.MULTILINE)
_CALL = "cuda_emulator_call_"


def _parse(text: str) -> list[Report]:
    """The reports that concern a kernel, those of one kind and the same places once. Others are of
    the interpreter's own libraries.
    """
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)] * bool(heads)
    found: dict[Any, Report] = {}
    for head, end in zip(heads, ends, strict=True):
        whole = text[head.start() : end]
        body = _REST.split(whole, maxsplit=1)[0]
        stack = [frame for line in _FRAME.finditer(body) for frame in _frames(line)]
        kernels = [frame.function.removeprefix(_CALL) for frame in stack if frame.function.startswith(_CALL)]
        places = tuple(dict.fromkeys(place for line in _FRAME.finditer(body) if (place := place_in(_frames(line)))))
        if kernels and places:
            report = Report(head["kind"].strip(), kernels[0], *places[0], places, _FRAME.sub(_named, whole).strip())
            found.setdefault((report.kind, report.kernel, places), report)
    return list(found.values())


def _frames(line: re.Match[str]) -> tuple[Frame, ...]:
    """The functions of one line of a report, if it is one of a kernel's library."""
    library = build.cache_folder() / Path(line["library"]).name  # ThreadSanitizer names no folder
    offset = int(line["offset"], 16)
    return frames(str(library), [offset])[offset] if library.exists() else ()


def _named(line: re.Match[str]) -> str:
    found = _frames(line)
    return "in " + ", called by ".join(f"{frame.function} {frame.file}:{frame.line}" for frame in found) if found else line[0]
