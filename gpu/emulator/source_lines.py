"""From an address in a library to a line of the source."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

SourceLine = tuple[str, int]
"""A file and the number of a line."""

CALLS = "<calls>"
"""The name that the compiler is given for the file of the functions that call the kernels."""


@dataclass(frozen=True)
class Frame:
    """A source line in a function. If the function is inlined into others, each has a frame."""

    function: str
    file: str
    line: int


_known: dict[tuple[str, int], tuple[Frame, ...]] = {}


def frames(library: str, offsets: Iterable[int]) -> dict[int, tuple[Frame, ...]]:
    """The frames of each offset into a library, innermost first. They are empty without `addr2line`
    and for a stripped library.
    """
    wanted = list(offsets)
    unknown = sorted({offset for offset in wanted if (library, offset) not in _known})
    program = shutil.which("addr2line")
    if unknown and program:
        command = [program, "-a", "-f", "-i", "-e", library, *map(hex, unknown)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # An address, then for each frame a line with the function and one with the source line.
        for block in re.split(r"^(?=0x)", done.stdout, flags=re.MULTILINE)[1:]:
            offset, *lines = block.splitlines()
            found = (_frame(function, source) for function, source in zip(lines[::2], lines[1::2], strict=True))
            _known[library, int(offset, 16)] = tuple(frame for frame in found if frame)
    return {offset: _known.get((library, offset), ()) for offset in wanted}


def source_lines(library: str, offsets: Iterable[int]) -> dict[int, SourceLine | None]:
    """The line of the kernel's source for each offset into a library, ``None`` if it cannot be
    found.

    For an inlined function of the emulator it is the line that calls the function.
    """
    return {offset: source_line(found) for offset, found in frames(library, offsets).items()}


def source_line(found: Iterable[Frame]) -> SourceLine | None:
    """The line of the innermost frame that is not the emulator's own.

    >>> source_line([Frame("update", "cuda.hpp", 180), Frame("scatter", "mine.cu", 7)])
    ('mine.cu', 7)
    """
    own = (".hpp", ".cpp", CALLS)
    return next(((frame.file, frame.line) for frame in found if not frame.file.endswith(own)), None)


def _frame(function: str, source: str) -> Frame | None:
    """From ``/folder/file.cu:12 (discriminator 3)``."""
    path, _, line = source.partition(" (")[0].rpartition(":")
    return Frame(function, path.rpartition("/")[2], int(line)) if line.isdigit() and int(line) else None
