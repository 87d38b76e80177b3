"""The processor at hand: its name, its vectors and its caches, as far as the system tells."""

import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

_ZEN = {
    25: (((0x00, 0x0F), "Zen 3"), ((0x10, 0x1F), "Zen 4"), ((0x20, 0x5F), "Zen 3"), ((0x60, 0xAF), "Zen 4")),
    26: (((0x00, 0xFF), "Zen 5"),),
}
"""AMD's names by family, and by the first and last of its models."""
_INTEL = {106: "Ice Lake", 143: "Sapphire Rapids", 207: "Emerald Rapids"}
"""Intel's names by model, of family 6."""


def _fields() -> dict[str, str]:
    """What Linux says of the first processor; empty where there is no Linux."""
    if not CPUINFO.exists():
        return {}
    first = CPUINFO.read_text().partition("\n\n")[0]
    return {name.strip(): said.strip() for name, _, said in (line.partition(":") for line in first.splitlines())}


def name() -> str:
    """As the processor calls itself: ``"AMD EPYC"`` in a virtual machine that says no more."""
    return _fields().get("model name") or platform.processor() or platform.machine()


def microarchitecture() -> str | None:
    """``"Zen 3"``, where the numbers of family and model are known here; else the numbers,
    ``"family 25 model 200"``. ``None`` where the system has none.
    """
    fields = _fields()
    if not (fields.get("cpu family", "").isdigit() and fields.get("model", "").isdigit()):
        return None
    family, model = int(fields["cpu family"]), int(fields["model"])
    known = {
        "AuthenticAMD": next((zen for (first, last), zen in _ZEN.get(family, ()) if first <= model <= last), None),
        "GenuineIntel": _INTEL.get(model) if family == 6 else None,
    }
    return known.get(fields.get("vendor_id", "")) or f"family {family} model {model}"


def flags() -> frozenset[str]:
    """What it can do, in Linux's words: ``"avx2"``, ``"avx512f"``, ``"amx_tile"``, ``"asimd"``."""
    fields = _fields()
    return frozenset((fields.get("flags") or fields.get("Features") or "").split())


def instruction_set() -> str:
    """The widest vectors that this processor has: ``"AVX-512, AMX"``. Which of them are used is for
    each library to choose.
    """
    found = flags()
    widest = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON")) if flag in found), "unknown")
    return f"{widest}, AMX" if "amx_tile" in found else widest


_LEVELS = {
    "l1d": ("1", ("Data", "Unified"), "SC_LEVEL1_DCACHE_SIZE"),
    "l2": ("2", ("Unified", "Data"), "SC_LEVEL2_CACHE_SIZE"),
    "l3": ("3", ("Unified", "Data"), "SC_LEVEL3_CACHE_SIZE"),
}
"""Of each cache: its level and kinds in Linux's folders, and its name in C's library."""


def caches() -> dict[str, int | None]:
    """Bytes of the first core's caches: ``l1d`` and ``l2``, and ``l3``, which cores share. ``None``
    where the system does not say.
    """
    told = {}
    for folder in sorted(CACHES.glob("index*")):
        try:
            level, kind, size = ((folder / part).read_text().strip() for part in ("level", "type", "size"))
        except OSError:  # a virtual machine may leave one out
            continue
        told[level, kind] = _bytes(size)
    return {
        cache: next((told[level, kind] for kind in kinds if told.get((level, kind))), None) or _by_c(number)
        for cache, (level, kinds, number) in _LEVELS.items()
    }


def _bytes(size: str) -> int | None:
    """``"512K"`` in bytes."""
    digits, unit = (size[:-1], size[-1]) if size[-1:] in ("K", "M", "G") else (size, "")
    return int(digits) << {"": 0, "K": 10, "M": 20, "G": 30}[unit] if digits.isdigit() else None


def _by_c(number: str) -> int | None:
    try:
        found = os.sysconf(number)
    except (ValueError, OSError):  # no such number here
        return None
    return found if found > 0 else None
