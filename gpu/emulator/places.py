"""From an address in a library to a line of the source."""

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

Place = tuple[str, int]
"""File and line."""

CALLS = "<calls>"
"""The file, in the eyes of the compiler, of the functions that call the kernels."""


@dataclass(frozen=True)
class Frame:
    """One function on the way to a place: the place's own, or one that it has been inlined into."""

    function: str
    file: str
    line: int


_known: dict[tuple[str, int], tuple[Frame, ...]] = {}


def frames(library: str, offsets: Iterable[int]) -> dict[int, tuple[Frame, ...]]:
    """The functions that each offset into a library lies in, innermost first; none without
    `addr2line`, or in a stripped library.
    """
    wanted = list(offsets)
    unknown = sorted({offset for offset in wanted if (library, offset) not in _known})
    program = shutil.which("addr2line")
    if unknown and program:
        command = [program, "-a", "-f", "-i", "-e", library, *map(hex, unknown)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # An address, then a line with a function and one with its place, for each frame.
        for block in re.split(r"^(?=0x)", done.stdout, flags=re.MULTILINE)[1:]:
            offset, *lines = block.splitlines()
            found = (_frame(name, place) for name, place in zip(lines[::2], lines[1::2], strict=True))
            _known[library, int(offset, 16)] = tuple(frame for frame in found if frame)
    return {offset: _known.get((library, offset), ()) for offset in wanted}


def places(library: str, offsets: Iterable[int]) -> dict[int, Place | None]:
    """The line of the kernels' source that each offset into a library comes from; ``None`` where
    that cannot be found.

    Where a function of the emulator has been inlined, it is the line that calls it.
    """
    return {offset: place_in(found) for offset, found in frames(library, offsets).items()}


def place_in(found: Iterable[Frame]) -> Place | None:
    """The innermost frame that is not the emulator's own."""
    own = (".hpp", ".cpp", CALLS)
    return next(((frame.file, frame.line) for frame in found if not frame.file.endswith(own)), None)


def _frame(function: str, place: str) -> Frame | None:
    """From ``/folder/file.cu:12 (discriminator 3)``."""
    path, _, line = place.partition(" (")[0].rpartition(":")
    return Frame(function, path.rpartition("/")[2], int(line)) if line.isdigit() and int(line) else None
