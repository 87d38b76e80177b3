"""How much memory a call takes beyond its inputs and its output: on the CPU measured in a process
of its own, on a GPU by torch's allocator.

``python -m yoso_core.benchmarks.memory '{"run": "yoso", "n": 4096}'`` prints the number of bytes on
the CPU.
"""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from yoso_core.benchmarks.cases import Workload
from yoso_core.benchmarks.contenders import CONTENDERS, tensors
from yoso_core.benchmarks.machines import MACHINES

# With a fixed threshold, freed blocks go back to the system at once. Otherwise glibc keeps some,
# and a call that reuses them seems to take no memory.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def working_memory(workload: Workload) -> int:
    """Bytes that one call of ``workload`` takes at its peak, beyond its inputs and its output."""
    if workload.device != "cpu":
        return measure_on_gpu(workload)
    command = [sys.executable, "-m", "yoso_core.benchmarks.memory", json.dumps(asdict(workload))]
    done = subprocess.run(command, env={**os.environ, **_ALLOCATOR}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {workload.run} failed:\n{done.stderr.strip()}")
    return int(done.stdout.split()[-1])


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, the resident size now, or VmHWM, its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field + ":"))


def measure(workload: Workload) -> int:
    """Peak resident size during one call, less the resident size before it, less the output.

    A call on 64 tokens comes first, so neither compiling nor loading is counted.
    """
    contender = CONTENDERS[workload.run]
    tiny = replace(workload, n=64)
    contender.bind(tiny, tensors(tiny))()
    call = contender.bind(workload, tensors(workload))
    # The peak starts again from here. Where the system forbids that, it is the peak of the whole
    # process, which is larger or equal.
    with contextlib.suppress(PermissionError), open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = _status("VmRSS")
    out = call()
    return max(0, _status("VmHWM") - before - _bytes(out))


def _bytes(out: Any) -> int:
    """The bytes of an output, or of an output and the gradients."""
    return sum(int(x.nbytes) for x in (out if isinstance(out, tuple) else (out,)))


def measure_on_gpu(workload: Workload) -> int:
    """Peak of torch's allocator during one call, less what it held before, less the output. CuPy
    allocates there too.

    A call at the same shapes comes first, so no workspace that a library keeps is counted.
    """
    import torch

    call, wait = CONTENDERS[workload.run].bind(workload, tensors(workload)), MACHINES[workload.device].wait
    call()
    wait()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = call()
    wait()
    return max(0, int(torch.cuda.max_memory_allocated()) - int(before) - _bytes(out))


if __name__ == "__main__":
    print(measure(Workload(**json.loads(sys.argv[1]))))
