"""Kernels under the compiler's sanitizers: AddressSanitizer for accesses outside of arrays,
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
from yoso_core.gpu.emulator.source_lines import Frame, SourceLine, frames, source_line

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
    """What a sanitizer found; one report for each set of source lines."""

    kind: str
    """In the sanitizer's words: ``data race``, ``heap-buffer-overflow``, ``use-after-poison``
    (outside of an array in shared memory).
    """
    kernel: str
    file: str
    line: int
    source_lines: tuple[SourceLine, ...]
    """Every line of the kernel's source that the report names: of a race, both sides."""
    text: str
    """The whole report."""

    def __str__(self) -> str:
        return f"{self.kernel}: {self.kind} at " + ", ".join(f"{file}:{line}" for file, line in self.source_lines)


@cache
def _preloaded(compiler: tuple[str, ...], kind: str) -> list[str] | str:
    """How to start a program with the sanitizer's library in it, or why that is not possible."""
    name = {"address": "libasan.so", "thread": "libtsan.so"}[kind]
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout.strip()
    if not os.path.exists(path):
        return f"{compiler[0]} has no {name}: use g++, and install the package with that library if it has one of its own"
    start = ["env", f"LD_PRELOAD={path}"]
    # ThreadSanitizer needs some addresses that Linux may give away at random. `setarch -R` switches
    # that off, but some containers do not allow it.
    fixed = ["setarch", platform.machine(), "-R", *start]
    tried = [fixed, start] if kind == "thread" and shutil.which("setarch") else [start]
    for command in tried:
        done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return command
    return f"{name} does not run here: {done.stderr.strip()}"


def missing(kind: Kind) -> str | None:
    """Why kernels cannot run under this sanitizer here; ``None`` if they can.

    >>> missing("thread") is None or "Linux" in missing("thread") or "libtsan" in missing("thread")
    True
    """
    reason = build.missing()
    if reason:
        return reason
    if sys.platform != "linux":
        return f"the emulator runs its sanitizers on Linux only, this is {sys.platform}"
    found = _preloaded(build.compiler().command, kind)
    return found if isinstance(found, str) else None


def sanitized(kind: Kind, code: str, *, timeout: float = 600, **names: Any) -> list[Report]:
    """Run Python code in a child process. Every kernel that it launches in the emulator is built
    for a sanitizer.

    Parameters
    ----------
    kind : ``"address"`` finds accesses outside of arrays and shared memory; ``"thread"`` finds
        accesses of two threads that nothing orders.
    code : a text, since the sanitizer must be in the process from its start.
    names : names that the code finds defined; their values are pickled.

    Raises
    ------
    RuntimeError : the reason that `missing` gives, or the traceback of an exception in the code.

    >>> from yoso_core.gpu.emulator import sanitized
    >>> code = '''
    ... import numpy as np
    ... from yoso_core.gpu import KernelText
    ... from yoso_core.gpu.emulator import Emulator
    ... kernel = KernelText(text, "fill", file="fill.cu")
    ... Emulator().launch(kernel, grid=(1,), block=(8,), args=(np.zeros(7, np.int32),))
    ... '''
    >>> text = 'extern "C" __global__ void fill(int* x) { x[threadIdx.x] = 1; }'
    >>> for report in sanitized("address", code, text=text):
    ...     print(report)
    fill: heap-buffer-overflow at fill.cu:1
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
# The rest of a report is about other things: where memory comes from, where a thread was made.
_REST = re.compile(r"^ *(?:.* is located |Location is |Thread |Address |SUMMARY)", re.MULTILINE)
_CALL = "cuda_emulator_call_"


def _parse(text: str) -> list[Report]:
    """The reports about kernels, each kind once for the same source lines. Other reports are about
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
        lines = tuple(dict.fromkeys(known for line in _FRAME.finditer(body) if (known := source_line(_frames(line)))))
        if kernels and lines:
            report = Report(head["kind"].strip(), kernels[0], *lines[0], lines, _FRAME.sub(_named, whole).strip())
            found.setdefault((report.kind, report.kernel, lines), report)
    return list(found.values())


def _frames(line: re.Match[str]) -> tuple[Frame, ...]:
    """The frames of one line of a report, if the line is about a kernel's library."""
    library = build.cache_folder() / Path(line["library"]).name  # ThreadSanitizer names no folder
    offset = int(line["offset"], 16)
    return frames(str(library), [offset])[offset] if library.exists() else ()


def _named(line: re.Match[str]) -> str:
    found = _frames(line)
    return "in " + ", called by ".join(f"{frame.function} {frame.file}:{frame.line}" for frame in found) if found else line[0]
