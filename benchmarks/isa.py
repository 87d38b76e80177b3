"""A run that may use no wider instructions than are named: both sides, in a process of its own,
since Numba, torch and its libraries read their limits when they are imported. That process is
`yoso_core.benchmarks.limited`.
"""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yoso_core import processor

_AVX2 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+popcnt"

LIMITS: dict[str, dict[str, str]] = {
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": _AVX2,
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    # torch's libraries may use all of AVX-512, products of bfloat16 included, but no AMX.
    "avx512": {
        "NUMBA_CPU_NAME": "skylake-avx512",
        "NUMBA_CPU_FEATURES": f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl,-prefer-256-bit",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E3",
    },
}
"""For each instruction set, the environment of a process that uses no wider one: ours by Numba,
torch's by ATen, oneDNN and MKL.
"""
_NEEDED = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}}
"""The flags of a processor that has it."""


def in_force() -> dict[str, str]:
    """The variables by which this process is limited, with their values; empty where it is not."""
    return {variable: os.environ[variable] for variable in LIMITS["avx2"] if variable in os.environ}


def check(isa: str) -> None:
    """``ValueError`` where there is no such limit, or this processor does not have it."""
    if isa not in LIMITS:
        raise ValueError(f"isa: no limit {isa!r}; there are {', '.join(LIMITS)}")
    flags = processor.flags()
    if not _NEEDED[isa] <= flags:
        has = [name for name, needed in _NEEDED.items() if needed <= flags]
        raise ValueError(f"isa: this processor does not have {isa}; it has {', '.join(has) or processor.instruction_set()}")


def run_limited(isa: str, options: Mapping[str, Any]) -> Path:
    """`run_suite` with ``options``, in a process limited to ``isa``. Its errors are raised here."""
    with TemporaryDirectory() as folder:
        outcome = Path(folder, "outcome")
        command = [sys.executable, "-m", "yoso_core.benchmarks.limited", str(outcome), json.dumps(options)]
        done = subprocess.run(command, env={**os.environ, **LIMITS[isa]})
        if done.returncode:
            raise RuntimeError(f"the process limited to {isa} ended with status {done.returncode}")
        found = pickle.loads(outcome.read_bytes())
    if isinstance(found, Exception):
        raise found
    return Path(found)
