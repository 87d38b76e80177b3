"""Traffic of a kernel, counted access by access: bytes, sectors, bank conflicts, atomics,
barriers.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields

from yoso_core.gpu.device import Shape
from yoso_core.gpu.emulator.source_lines import source_lines


@dataclass(frozen=True)
class Counters:
    """The counts of a launch or of one line. An *access* is one of a warp: what its threads do
    together counts once.
    """

    global_read_bytes: int = 0
    """Bytes that threads read. Two threads that read the same bytes count twice."""
    global_written_bytes: int = 0
    global_atomic_bytes: int = 0
    global_accesses: int = 0
    """Reads, writes and atomics of warps."""
    global_sectors: int = 0
    """Pieces of 32 bytes that the accesses touch. A GPU moves these between its caches."""
    least_global_sectors: int = 0
    """The sectors that they would touch if the same bytes were neighbors."""
    global_atomics: int = 0
    """Atomics of threads."""
    global_atomic_collisions: int = 0
    """Atomics that must wait for another of the same access of their warp, since both have the same
    address.
    """
    global_atomics_contended: int = 0
    """Atomics whose address another atomic of the block has used since the last barrier."""
    shared_read_bytes: int = 0
    shared_written_bytes: int = 0
    shared_accesses: int = 0
    """Reads and writes of warps."""
    shared_wavefronts: int = 0
    """Turns that the 32 banks need for these accesses."""
    least_shared_wavefronts: int = 0
    """Turns without bank conflicts: one for accesses of up to 4 bytes, two for 8, four for 16."""
    shared_atomics: int = 0
    shared_atomic_collisions: int = 0
    shared_atomics_contended: int = 0
    uninitialized_reads: int = 0
    """Reads of shared memory that no thread of the block has written."""

    @property
    def bank_conflicts(self) -> int:
        """Turns of the banks beyond the least number."""
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
    """The counts of one line of the source."""

    file: str = ""
    line: int = 0


@dataclass(frozen=True)
class Traffic(Counters):
    """The counts of one launch, or the sums over several."""

    kernel: str = ""
    launches: int = 1
    blocks: int = 0
    threads: int = 0
    barriers: int = 0
    """Barriers that blocks pass: one that every block passes once counts once for each block."""
    warp_syncs: int = 0
    shuffles: int = 0
    """Shuffles of warps."""
    votes: int = 0
    """``__ballot_sync`` and the like, of warps."""
    lines: tuple[LineTraffic, ...] = field(default=(), repr=False)
    """The same for each line, sorted by file and line. It is empty without `addr2line`, which comes
    with g++.
    """


@dataclass
class TrafficLog:
    """The launches that `count_traffic` has seen. ``print`` shows a line for each kernel."""

    launches: list[Traffic] = field(default_factory=list)

    @property
    def total(self) -> Traffic:
        """The sums over all launches."""
        return _sum("total", self.launches)

    @property
    def kernels(self) -> list[Traffic]:
        """The sums over the launches of each kernel, in the order of first launches."""
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
        LineTraffic(**{name: sum(getattr(part, name) for part in by_line[file, line]) for name in _COUNTED}, file=file, line=line)
        for file, line in sorted(by_line)
    )
    return Traffic(kernel=kernel, lines=lines, **numbers)


_logs: ContextVar[tuple[TrafficLog, ...]] = ContextVar("logs", default=())
_RACES, _UNINITIALIZED, _BARRIERS = 1, 2, 4  # `Checks` in `runtime.cpp`
_checked: ContextVar[int] = ContextVar("checked", default=0)


@contextmanager
def count_traffic() -> Iterator[TrafficLog]:
    """Count the traffic of the emulator's launches in the body. It needs Linux and g++.

    An access outside every array raises `KernelFault` here; a plain launch may miss a read before
    an array.

    >>> import numpy as np
    >>> from yoso_core.gpu import KernelText
    >>> from yoso_core.gpu.emulator import Emulator
    >>> text = 'extern "C" __global__ void fill(float* x) { x[2 * threadIdx.x] = 1; }'
    >>> x = np.zeros(64, np.float32)
    >>> with count_traffic() as log:
    ...     Emulator().launch(KernelText(text, "fill"), grid=(1,), block=(32,), args=(x,))
    >>> log.total.global_written_bytes, log.total.global_sectors, log.total.coalescing
    (128, 8, 0.5)
    """
    log = TrafficLog()
    token = _logs.set((*_logs.get(), log))
    try:
        yield log
    finally:
        _logs.reset(token)


@contextmanager
def checked(*, uninitialized: bool = True, early_exit: bool = True) -> Iterator[None]:
    """Check every access of the emulator's launches in the body, and raise `KernelFault` for the
    first forbidden one. It needs Linux and g++.

    Forbidden are:

    - an access outside every array;
    - a vector at an address that is not a multiple of its size;
    - a race: two accesses by different threads, at least one of them a write, not both atomic,
      with no barrier and no fences in between;
    - an int that overflows;
    - if ``uninitialized``, a read of shared memory that no thread of the block has written;
    - if ``early_exit``, a barrier that a thread of the block has ended without. Hardware lets the
      others pass; the guide still wants every thread there.

    >>> import numpy as np
    >>> from yoso_core.gpu import KernelText
    >>> from yoso_core.gpu.emulator import Emulator
    >>> text = 'extern "C" __global__ void count(int* x) { *x += 1; }'
    >>> with checked():
    ...     Emulator().launch(
    ...         KernelText(text, "count"), grid=(1,), block=(8,), args=(np.zeros(1, np.int32),)
    ...     )  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    yoso_core.gpu.emulator.common.KernelFault: count: x[0] read, and no barrier orders that ...
    """
    token = _checked.set(_RACES + _UNINITIALIZED * uninitialized + _BARRIERS * early_exit)
    try:
        yield
    finally:
        _checked.reset(token)


def checks() -> int:
    """The checks that the runtime makes in this context, a sum; 0 for none."""
    return _checked.get()


def is_counting() -> bool:
    """Whether somebody wants the traffic of launches in this context."""
    return bool(_logs.get())


def is_counted() -> bool:
    """Whether launches in this context need the build that counts."""
    return is_counting() or bool(checks())


class Tally(ctypes.Structure):
    """The counts of one instruction: `Tally` in `traffic.hpp`."""

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
    """Copies of the counts of a library's last launch."""
    count, totals = ctypes.c_int(), ctypes.POINTER(Totals)()
    read = library.cuda_emulator_tallies
    read.restype = ctypes.POINTER(Tally)
    found = read(ctypes.byref(count), ctypes.byref(totals))
    return [Tally.from_buffer_copy(found[i]) for i in range(count.value)], Totals.from_buffer_copy(totals.contents)


def log_traffic(kernel: str, grid: Shape, block: Shape, library: str, counted: tuple[list[Tally], Totals]) -> None:
    """Add a launch to the logs that are open."""
    if not _logs.get():
        return
    instructions, totals = counted
    lines = source_lines(library, (tally.offset - 1 for tally in instructions))  # an offset is that of the instruction after a call
    parts = []
    for tally in instructions:
        found = lines[tally.offset - 1]
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
