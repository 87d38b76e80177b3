"""How much memory there is, and what is said before more than that is asked for: where the system
promises memory that it does not have, the process would be killed without a word.
"""

import os
from pathlib import Path


def available_memory() -> int | None:
    """Bytes that a process can have now, as far as the system, or the container, tells.

    >>> available_memory() is None or available_memory() > 0
    True
    """
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        limits += [1024 * int(line.split()[1]) for line in meminfo.read_text("utf-8").splitlines() if line.startswith("MemAvailable:")]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for most, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        found = [Path("/sys/fs/cgroup", name) for name in (most, used)]
        if all(path.exists() for path in found):
            numbers = [path.read_text("utf-8").strip() for path in found]
            if all(number.isdigit() for number in numbers):
                limits.append(max(0, int(numbers[0]) - int(numbers[1])))
    return min(limits, default=None)


def need_memory(name: str, least: int) -> None:
    """Raise ``MemoryError`` if ``least`` bytes are more than there are. The message begins with
    ``name``, that of an argument.
    """
    available = available_memory()
    if available is not None and least > available:
        raise MemoryError(f"{name}: takes at least {in_words(least)} of memory, {in_words(available)} can be had")


def in_words(count: int) -> str:
    """A number of bytes in a unit that suits it.

    >>> in_words(3 << 19), in_words(100)
    ('1.5 MiB', '100 bytes')
    """
    units = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
    unit = max(0, min(len(units) - 1, (count.bit_length() - 1) // 10))
    return f"{count / (1 << 10 * unit):.4g} {units[unit]}"
