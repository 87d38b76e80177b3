"""The processor is named by what the system tells; the tests bring what it would tell."""

import os
import platform
from pathlib import Path

import pytest

from yoso_core import processor

EPYC = "processor : 0\nvendor_id : {vendor}\ncpu family : {family}\nmodel : {model}\nmodel name : AMD EPYC\nflags : fpu {flags}\n\n"


def told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, vendor: str = "AuthenticAMD", family: int = 25, model: int = 1, flags: str = ""
) -> None:
    said = EPYC.format(vendor=vendor, family=family, model=model, flags=flags)
    (tmp_path / "cpuinfo").write_text(said + said.replace("AMD EPYC", "another"))
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    ("vendor", "family", "model", "name"),
    [
        ("AuthenticAMD", 25, 0x01, "Zen 3"),
        ("AuthenticAMD", 25, 0x11, "Zen 4"),
        ("AuthenticAMD", 25, 0x50, "Zen 3"),
        ("AuthenticAMD", 25, 0xA0, "Zen 4"),
        ("AuthenticAMD", 25, 0xB0, "family 25 model 176"),
        ("AuthenticAMD", 26, 0x02, "Zen 5"),
        ("AuthenticAMD", 23, 0x31, "family 23 model 49"),
        ("GenuineIntel", 6, 106, "Ice Lake"),
        ("GenuineIntel", 6, 143, "Sapphire Rapids"),
        ("GenuineIntel", 6, 207, "Emerald Rapids"),
        ("GenuineIntel", 25, 1, "family 25 model 1"),
    ],
)
def test_the_microarchitecture_by_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, family: int, model: int, name: str
) -> None:
    told(monkeypatch, tmp_path, vendor=vendor, family=family, model=model)
    assert processor.microarchitecture() == name
    assert processor.name() == "AMD EPYC"


@pytest.mark.parametrize(
    ("flags", "widest"),
    [("avx2", "AVX2"), ("avx2 avx512f", "AVX-512"), ("avx512f amx_tile", "AVX-512, AMX"), ("asimd", "NEON"), ("sse2", "unknown")],
)
def test_the_widest_vectors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, widest: str) -> None:
    told(monkeypatch, tmp_path, flags=flags)
    assert processor.instruction_set() == widest
    assert processor.flags() == {"fpu", *flags.split()}


def test_where_the_system_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(processor, "CACHES", tmp_path / "absent")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    for answer in (0, -1):
        monkeypatch.setattr(os, "sysconf", lambda number, answer=answer: answer)
        assert processor.caches() == {"l1d": None, "l2": None, "l3": None}
    assert (processor.name(), processor.microarchitecture(), processor.flags()) == ("riscv64", None, frozenset())


def test_the_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate([("1", "Instruction", "32K"), ("1", "Data", "48K"), ("2", "Unified", "1M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for part, said in (("level", level), ("type", kind), ("size", size)):
            (folder / part).write_text(f"{said}\n")
    (tmp_path / "index3").mkdir()  # a folder that says nothing
    monkeypatch.setattr(processor, "CACHES", tmp_path)
    monkeypatch.setattr(os, "sysconf", {"SC_LEVEL3_CACHE_SIZE": 32 << 20}.__getitem__)
    assert processor.caches() == {"l1d": 48 << 10, "l2": 1 << 20, "l3": 32 << 20}
