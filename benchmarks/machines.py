"""Where the tensors of a suite live, and what that changes for measuring. No other module of the
benchmarks tells CPU and GPU apart.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from yoso_core import processor
from yoso_core.benchmarks import isa
from yoso_core.memory import in_words

Result = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The memory that a block and a table may take on a GPU. Variants cut their work to fit."""

    max_shared: int
    """Bytes of shared memory that one block can have."""
    max_table: int
    """Bytes that a table in device memory may take."""


H100 = Limits(max_shared=227 << 10, max_table=20 << 30)
"""A GPU with 80 GiB. Bytes are counted for it where there is no GPU."""


@dataclass(frozen=True)
class Machine:
    torch: str
    """The name of the device in torch."""
    missing: Callable[[], str | None]
    """Why nothing can be measured here, and what to do about it; ``None`` where it can."""
    wait: Callable[[], None]
    """Returns when the device has finished all its work."""
    patience: float
    """A first call of fewer seconds tells little about the next one. It is made again before the
    repeats are planned.
    """
    about: Callable[[], Result]
    """What to add to the description of the machine in the results."""
    limits: Callable[[], Limits]
    """The limits for which bytes are counted."""


def _missing_cuda() -> str | None:
    from yoso_core.backends import missing

    if reason := missing("cupy"):
        return reason
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} cannot use the GPU: install a build of it for CUDA (https://pytorch.org says how)"
    return None


def _wait_for_cuda() -> None:
    import torch

    torch.cuda.synchronize()


def _about_cuda() -> Result:
    import torch

    from yoso_core.backends import gpu_report

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": {
            "name": found.name,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "compute_capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_mb": round(getattr(found, "L2_cache_size", 0) / 1e6, 1),
            "driver": _driver(),
            "cuda_of_torch": torch.version.cuda,
            "found": gpu_report(),
        }
    }


def _driver() -> str | None:
    """The driver's version by ``nvidia-smi``; ``None`` where that is not installed."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split()[0] if done.returncode == 0 and done.stdout.strip() else None


def _limits_of_cuda() -> Limits:
    import torch

    from yoso_core.gpu.cupy_kernels.cuda import CupyDevice

    device = CupyDevice(torch.cuda.current_device(), 0)
    return Limits(device.max_shared, device.max_table)


MACHINES: dict[str, Machine] = {
    "cpu": Machine(
        torch="cpu",
        missing=lambda: None,
        wait=lambda: None,
        patience=1.0,
        about=dict,
        limits=lambda: H100,
    ),
    "cuda": Machine(
        torch="cuda",
        missing=_missing_cuda,
        wait=_wait_for_cuda,
        patience=float("inf"),  # a first call may include compiling, however long it takes
        about=_about_cuda,
        limits=_limits_of_cuda,
    ),
}


def results_name(suite: str, environment: Result, *, quick: bool = False, filter: str | None = None) -> str:
    """The name of the results file, without its ending: the suite, then the GPU where there is one,
    or the processor and the instruction set. A run of some cases only has a name of its own, so it
    never takes the place of a whole one.

    >>> results_name("gpu", {"gpu": {"name": "NVIDIA H100 80GB HBM3"}})
    'gpu-nvidia-h100-80gb-hbm3'
    >>> where = {"processor": "AMD EPYC", "microarchitecture": "Zen 3", "instruction_set": "AVX2"}
    >>> results_name("cpu", where, filter="n = 512")
    'cpu-amd-epyc-zen-3-avx2-filter-n-512'
    """
    if gpu := environment.get("gpu"):
        machine = [gpu["name"]]
    else:
        used = (environment.get("instruction_set") or "").replace("AVX-512", "AVX512")
        limited = "limited" if environment.get("limited") else None
        machine = [_without_marks(environment.get("processor") or ""), environment.get("microarchitecture"), used, limited]
    part = ["quick" if quick else None, None if filter is None else f"filter {filter}"]
    return "-".join(slug for said in (suite, *machine, *part) if (slug := _slug(said or "")))


def _without_marks(name: str) -> str:
    """``"Intel(R) Xeon(R) Gold"`` is ``"Intel Xeon Gold"``."""
    return re.sub(r"\((R|TM)\)", "", name, flags=re.IGNORECASE)


def _slug(said: str) -> str:
    return re.sub("[^a-z0-9]+", "-", said.lower()).strip("-")


def processor_of(environment: Result) -> str:
    """The processor and what was used of it, as far as the results know.

    >>> processor_of({"processor": "AMD EPYC", "cores": 2, "instruction_set": "AVX2"})
    'AMD EPYC, 2 cores, AVX2'
    """
    finer = environment.get("microarchitecture")
    used = environment.get("instruction_set")
    said = [f"{environment['processor']} ({finer})" if finer else environment["processor"], f"{environment['cores']} cores"]
    if used:
        said.append(f"limited to {used}" if environment.get("limited") else used)
    return ", ".join(said)


_CACHES = {"l1d": "L1d {} a core", "l2": "L2 {} a core", "l3": "L3 {}"}


def machine_of(environment: Result) -> str:
    """The processor with its caches, as far as the results know them.

    >>> machine_of({"processor": "AMD EPYC", "cores": 2, "caches": {"l1d": 32768, "l3": None}})
    'AMD EPYC, 2 cores, L1d 32 KiB a core'
    """
    caches = environment.get("caches") or {}
    sizes = [said.format(in_words(caches[cache])) for cache, said in _CACHES.items() if caches.get(cache)]
    return ", ".join([processor_of(environment), *sizes])


def used_instruction_set() -> str:
    """The widest that either side uses: AVX2, AVX-512, AMX or NEON, or what torch names otherwise.

    torch uses AMX, for products of bfloat16, where the processor has it and nothing limits it.
    """
    import torch

    used = torch.backends.cpu.get_cpu_capability()
    flags = processor.flags()
    if used == "AVX512":
        return "AMX" if "amx_tile" in flags and not isa.in_force() else "AVX-512"
    return "NEON" if used == "DEFAULT" and "asimd" in flags else used


def where(device: str) -> Result:
    """The machine and the versions of the packages.

    ``instruction_set`` is the one that is used. ``limited`` has the variables of the environment
    that limit it, with their values.
    """
    from yoso_core.comparison import environment

    found = environment() | {"instruction_set": used_instruction_set(), "limited": isa.in_force()}
    if "transformers" in sys.modules:
        found["versions"]["transformers"] = sys.modules["transformers"].__version__
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {**found, "memory_gb": memory_gb, **MACHINES[device].about()}
