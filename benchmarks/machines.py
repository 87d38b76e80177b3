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


def results_name(suite: str, environment: Result) -> str:
    """The name of the results file, without its ending: the suite, and the GPU where there is one.

    >>> results_name("gpu", {"gpu": {"name": "NVIDIA H100 80GB HBM3"}})
    'gpu-nvidia-h100-80gb-hbm3'
    """
    gpu = environment.get("gpu")
    return suite if gpu is None else f"{suite}-{re.sub('[^a-z0-9]+', '-', gpu['name'].lower()).strip('-')}"


def where(device: str) -> Result:
    """The machine and the versions of the packages."""
    import torch

    from yoso_core.comparison import environment

    found = environment()
    found["instruction_set"] = torch.backends.cpu.get_cpu_capability()
    if "transformers" in sys.modules:
        found["versions"]["transformers"] = sys.modules["transformers"].__version__
    memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {**found, "memory_gb": memory_gb, **MACHINES[device].about()}
