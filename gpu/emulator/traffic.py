"""What a kernel moves, counted access by access: bytes, sectors, bank conflicts, atomics,
barriers.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields

from yoso_core.gpu.device import Shape
from yoso_core.gpu.emulator.places import places


@dataclass(frozen=True)
class Counters:
    """What is counted, of a launch or of one line. *Accesses* are those of warps: what its threads
    do together counts once.
    """

    global_read_bytes: int = 0
    """Asked for by threads; two threads that ask for the same bytes count twice."""
    global_written_bytes: int = 0
    global_atomic_bytes: int = 0
    global_accesses: int = 0
    """Reads, writes and atomics of warps."""
    global_sectors: int = 0
    """Pieces of 32 bytes that the accesses touch: what a GPU moves between its caches for them."""
    least_global_sectors: int = 0
    """What they would touch if the same bytes lay side by side."""
    global_atomics: int = 0
    """By threads."""
    global_atomic_collisions: int = 0
    """Atomics that must wait for another of the same access of their warp, since both are for one
    address.
    """
    global_atomics_contended: int = 0
    """Atomics for an address that another atomic of the block was for since the last barrier."""
    shared_read_bytes: int = 0
    shared_written_bytes: int = 0
    shared_accesses: int = 0
    """Reads and writes of warps."""
    shared_wavefronts: int = 0
    """Turns that the 32 banks need for them."""
    least_shared_wavefronts: int = 0
    """Turns without a bank conflict: one for accesses of up to 4 bytes, two for 8, four for 16."""
    shared_atomics: int = 0
    shared_atomic_collisions: int = 0
    shared_atomics_contended: int = 0
    uninitialized_reads: int = 0
    """Reads by threads of shared memory that no thread of the block has written."""

    @property
    def bank_conflicts(self) -> int:
        """Turns of the banks beyond the least."""
        return self.shared_wavefronts - self.least_shared_wavefronts

    @property
    def global_bytes(self) -> int:
        return self.global_read_bytes + self.global_written_bytes + self.global_atomic_bytes

    @property
    def coalescing(self) -> float:
        """The least number of sectors over those touched: 1 is best."""
        return self.least_global_sectors / self.global_sectors if self.global_sectors else 1.0


@dataclass(frozen=True)
class LineTraffic(Counters):
    """One line of the source."""

    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Traffic(Counters):
    """One launch, or several added up."""

    kernel: str = ""
    launches: int = 1
    blocks: int = 0
    threads: int = 0
    barriers: int = 0
    """Passed by blocks: a barrier that every block passes once counts once for each block."""
    warp_syncs: int = 0
    shuffles: int = 0
    """Of warps; votes are ``__ballot_sync`` and its like."""
    votes: int = 0
    lines: tuple[LineTraffic, ...] = field(default=(), repr=False)
    """The same by line, in the order of the files; empty without `addr2line`, which comes with g++.
    """


@dataclass
class TrafficLog:
    """What `count_traffic` fills. ``print`` shows a line for each kernel."""

    launches: list[Traffic] = field(default_factory=list)

    @property
    def total(self) -> Traffic:
        return _sum("total", self.launches)

    @property
    def kernels(self) -> list[Traffic]:
        """The launches of each kernel added up, in the order of the first."""
        names = dict.fromkeys(launch.kernel for launch in self.launches)
        return [_sum(name, [launch for launch in self.launches if launch.kernel == name]) for name in names]

    def __str__(self) -> str:
        rows = [_HEADS, *(_row(traffic) for traffic in (*self.kernels, self.total))]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
        return "\n".join(
            "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        )


_HEADS = (
    "kernel",
    "launches",
    "read",
    "written",
    "atomic",
    "sectors",
    "coalesced",
    "shared",
    "conflicts",
    "atomics",
    "collide",
    "barriers",
    "shuffles",
)


def _row(traffic: Traffic) -> tuple[str, ...]:
    return (
        traffic.kernel,
        f"{traffic.launches:,}",
        _bytes(traffic.global_read_bytes),
        _bytes(traffic.global_written_bytes),
        _bytes(traffic.global_atomic_bytes),
        f"{traffic.global_sectors:,}",
        f"{traffic.coalescing:.0%}",
        f"{traffic.shared_accesses:,}",
        f"{traffic.bank_conflicts:,}",
        f"{traffic.global_atomics + traffic.shared_atomics:,}",
        f"{traffic.global_atomic_collisions + traffic.shared_atomic_collisions:,}",
        f"{traffic.barriers:,}",
        f"{traffic.shuffles + traffic.votes:,}",
    )


def _bytes(count: int) -> str:
    return f"{count} B" if count < 10_000 else f"{count / 1e3:,.0f} kB" if count < 10_000_000 else f"{count / 1e6:,.0f} MB"


_COUNTED = tuple(counted.name for counted in fields(Counters))
_OF_LAUNCH = ("launches", "blocks", "threads", "barriers", "warp_syncs", "shuffles", "votes")


def _sum(kernel: str, launches: list[Traffic]) -> Traffic:
    numbers = {name: sum(getattr(launch, name) for launch in launches) for name in (*_COUNTED, *_OF_LAUNCH)}
    by_line: dict[tuple[str, int], list[LineTraffic]] = {}
    for launch in launches:
        for line in launch.lines:
            by_line.setdefault((line.file, line.line), []).append(line)
    lines = tuple(
        LineTraffic(**{name: sum(getattr(line, name) for line in by_line[place]) for name in _COUNTED}, file=place[0], line=place[1])
        for place in sorted(by_line)
    )
    return Traffic(kernel=kernel, lines=lines, **numbers)


_logs: ContextVar[tuple[TrafficLog, ...]] = ContextVar("logs", default=())
_NOT, _BUT_FOR_UNINITIALISED, _CHECKED = range(3)
_checked: ContextVar[int] = ContextVar("checked", default=_NOT)


@contextmanager
def count_traffic() -> Iterator[TrafficLog]:
    """Count what the launches in the body move, of any emulator.

    An access outside every array raises `KernelFault` here, where a plain launch may miss it. It
    takes Linux and g++.
    """
    log = TrafficLog()
    token = _logs.set((*_logs.get(), log))
    try:
        yield log
    finally:
        _logs.reset(token)


@contextmanager
def checked(*, uninitialized: bool = True) -> Iterator[None]:
    """Check every access of the launches in the body, and raise `KernelFault` for the first that
    must not be. It takes Linux and g++.

    These are: one outside every array; a vector at an address that is no multiple of its size; two
    accesses by different threads, one of them a write, not both atomic, with no barrier in between;
    and, unless told otherwise, a read of shared memory that no thread of the block has written.
    """
    token = _checked.set(_CHECKED if uninitialized else _BUT_FOR_UNINITIALISED)
    try:
        yield
    finally:
        _checked.reset(token)


def checks() -> int:
    """What the runtime is told to check in this context."""
    return _checked.get()


def is_counted() -> bool:
    return bool(_logs.get()) or _checked.get() != _NOT


class Tally(ctypes.Structure):
    """One place in the code: `Tally` in `traffic.hpp`."""

    _fields_ = (
        ("offset", ctypes.c_ulonglong),
        ("access", ctypes.c_int),
        ("is_shared", ctypes.c_int),
        ("accesses", ctypes.c_ulonglong),
        ("bytes", ctypes.c_ulonglong),
        ("warp_accesses", ctypes.c_ulonglong),
        ("sectors", ctypes.c_ulonglong),
        ("least_sectors", ctypes.c_ulonglong),
        ("wavefronts", ctypes.c_ulonglong),
        ("least_wavefronts", ctypes.c_ulonglong),
        ("collisions", ctypes.c_ulonglong),
        ("contended", ctypes.c_ulonglong),
        ("uninitialized", ctypes.c_ulonglong),
    )


class Totals(ctypes.Structure):
    """`Totals` in `traffic.hpp`."""

    _fields_ = tuple((name, ctypes.c_ulonglong) for name in ("barriers", "warp_syncs", "shuffles", "votes"))


_READ, _WRITE, _ATOMIC = range(3)


def _counters(tally: Tally) -> dict[str, int]:
    space = "shared" if tally.is_shared else "global"
    if tally.access == _ATOMIC:
        counted = {"atomics": tally.accesses, "atomic_collisions": tally.collisions, "atomics_contended": tally.contended}
        made = {f"{space}_{name}": number for name, number in counted.items()}
        made |= {} if tally.is_shared else {"global_atomic_bytes": tally.bytes}
    else:
        made = {f"{space}_{'read' if tally.access == _READ else 'written'}_bytes": tally.bytes}
        made |= {"shared_accesses": tally.warp_accesses} if tally.is_shared else {}
    if tally.is_shared:
        made |= {"shared_wavefronts": tally.wavefronts, "least_shared_wavefronts": tally.least_wavefronts}
    else:
        made |= {"global_accesses": tally.warp_accesses, "global_sectors": tally.sectors, "least_global_sectors": tally.least_sectors}
    return {**made, "uninitialized_reads": tally.uninitialized}


def tallies(library: ctypes.CDLL) -> tuple[list[Tally], Totals]:
    """Copies of what has been counted in the last launch from a library."""
    count, totals = ctypes.c_int(), ctypes.POINTER(Totals)()
    read = library.cuda_emulator_tallies
    read.restype = ctypes.POINTER(Tally)
    found = read(ctypes.byref(count), ctypes.byref(totals))
    return [Tally.from_buffer_copy(found[i]) for i in range(count.value)], Totals.from_buffer_copy(totals.contents)


def log_traffic(kernel: str, grid: Shape, block: Shape, library: str, counted: tuple[list[Tally], Totals]) -> None:
    """Hand a launch to the logs that are open."""
    if not _logs.get():
        return
    by_place, totals = counted
    where = places(library, (tally.offset - 1 for tally in by_place))  # an offset is of the instruction after a call
    parts = []
    for tally in by_place:
        found = where[tally.offset - 1]
        parts.append(LineTraffic(**_counters(tally), file=found[0] if found else "", line=found[1] if found else 0))
    whole = _sum(kernel, [Traffic(lines=tuple(parts))])
    blocks = grid[0] * grid[1] * grid[2]
    made = Traffic(
        **{name: sum(getattr(part, name) for part in parts) for name in _COUNTED},
        kernel=kernel,
        blocks=blocks,
        threads=blocks * block[0] * block[1] * block[2],
        barriers=totals.barriers,
        warp_syncs=totals.warp_syncs,
        shuffles=totals.shuffles,
        votes=totals.votes,
        lines=tuple(line for line in whole.lines if line.file),
    )
    for log in _logs.get():
        log.launches.append(made)
