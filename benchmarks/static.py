"""What the compiler says of every CUDA kernel, without a GPU: the registers and the local memory of
a thread, the shared memory of a block, and the warps that a multiprocessor holds at a time.

Every kernel is compiled as the launchers ask for it in the setting of the suite ``gpu``. Nothing is
run, and nothing here is a time.
"""

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from yoso_core import registry
from yoso_core.benchmarks.tables import markdown
from yoso_core.files import write_json
from yoso_core.gpu.cupy_kernels.source import options, unit_of
from yoso_core.gpu.device import Arguments, Array, CudaKernel, Shape
from yoso_core.inputs import example_inputs
from yoso_core.operations import OPERATIONS
from yoso_core.reference import sample_signs

Result = dict[str, Any]

FILE = "kernels.json"
DTYPES = ("float32", "float64", "float16", "bfloat16")
ROWS, NUM_HASH, HASH_CODE_LEN, DIM = 256, 32, 8, 64
"""The setting. How a launcher divides its work does not depend on more rows than these."""

_WARP = 32
_REGISTERS, _WARPS, _BLOCKS = 65_536, 64, 32
"""Of a multiprocessor: registers, and the most warps and blocks that it holds at a time."""
_REGISTER_UNIT = 256
"""Registers are given to a warp in such pieces."""
_RESERVED = 1 << 10
"""Bytes of shared memory that every block takes for the system."""


@dataclass(frozen=True)
class Target:
    """A kind of GPU, as the compiler names it."""

    name: str
    example: str
    shared: int
    """Bytes of shared memory of a multiprocessor; a block may have all but 1 KiB of it."""


TARGETS = (Target("sm_80", "A100", 164 << 10), Target("sm_90", "H100", 228 << 10), Target("sm_100", "B200", 228 << 10))


@dataclass(frozen=True)
class Launched:
    """A kernel as a launcher asks for it."""

    kernel: CudaKernel
    threads: int
    """Of a block."""
    shared: int
    """Bytes of dynamic shared memory of a block."""


class Recorder:
    """A `yoso_core.gpu.Device` that runs nothing and keeps what is launched."""

    xp: ModuleType = np
    max_table = 20 << 30

    def __init__(self, target: Target) -> None:
        self.max_shared = target.shared - _RESERVED
        self.launched: list[Launched] = []

    def empty(self, shape: Shape, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    zeros = empty

    def launch(self, kernel: CudaKernel, grid: Shape, block: Shape, args: Arguments, shared: int = 0) -> None:
        self.launched.append(Launched(kernel, int(np.prod(block)), shared))


_PLAIN: Result = {"use_expectation": False, "planes": None, "query_mask": None, "key_mask": None, "normalize_output": True}
"""What `yoso_core.yoso_attention` gives its launchers where the caller says nothing."""

_MODES: dict[str, tuple[Result, ...]] = {
    "yoso_attention": tuple(_PLAIN | mode for mode in ({}, {"return_error": True}, {"oversample": 2, "return_error": True})),
    "lsh_cumulation": ({}, {"oversample": 2}),
    "lsh_attention_backward": ({}, {"grad": "exact"}),
    "fast_hash": ({}, {"layout": "paper"}),
}
"""Options of an operation with which it launches other kernels, or launches them otherwise."""


def launched(target: Target, dtype: str) -> list[Launched]:
    """What the launchers of all operations ask for, each kernel as often as it is asked for
    otherwise.

    >>> found = launched(TARGETS[1], "float32")
    >>> next(one for one in found if one.kernel.name == "shared_table")  # doctest: +ELLIPSIS
    Launched(kernel=CudaKernel(file='cumulation.cu', ...), threads=224, shared=230272)
    """
    device = Recorder(target)
    for row in registry.KERNELS:
        if row.where == "cupy":
            for mode in _MODES.get(row.op, ({},)):
                if row.name.endswith(":block_per_part") and "layout" not in mode:
                    continue  # which has no kernel for a chain
                row.load()(device, **_arguments(row.op, dtype, mode))
    return list(dict.fromkeys(device.launched))


def _arguments(op: str, dtype: str, mode: Result) -> Result:
    setting = {"heads": 1, "n": ROWS, "dim": DIM, "num_hash": NUM_HASH, "hash_code_len": HASH_CODE_LEN}
    drawn = "float16" if dtype == "bfloat16" else dtype
    positional, given = example_inputs(op, **setting, dtype=drawn, oversample=mode.get("oversample"))  # type: ignore[arg-type]
    given |= dict(zip(OPERATIONS[op].positional, positional, strict=True)) | mode
    if mode.get("layout") == "paper":
        given["signs"] = sample_signs(NUM_HASH, HASH_CODE_LEN, DIM, layout="paper", rng=0)
    if dtype == "bfloat16":  # a launcher gets its bits
        given = {name: x.view(np.uint16) if getattr(x, "dtype", None) == np.float16 else x for name, x in given.items()}
    return given


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one kind of GPU."""

    registers: int
    """Of a thread."""
    local: int
    """Bytes of a thread's local memory: spilled registers, and arrays that no register can hold."""
    shared: int
    """Bytes of a block."""
    warps: int
    """On a multiprocessor at a time, by these numbers; it holds 64 at most."""


def resident_warps(target: Target, registers: int, shared: int, threads: int) -> int:
    """How many warps a multiprocessor holds at a time: whole blocks, for which registers and shared
    memory suffice.

    >>> resident_warps(TARGETS[1], registers=96, shared=33_296, threads=128)
    20
    """
    warps = -(-threads // _WARP)
    of_warp = -(-registers * _WARP // _REGISTER_UNIT) * _REGISTER_UNIT
    return warps * min(_BLOCKS, _WARPS // warps, _REGISTERS // (of_warp * warps), target.shared // (shared + _RESERVED))


def missing() -> str | None:
    """Why nothing can be compiled here; ``None`` where it can."""
    remedy = "pip install cuda-bindings nvidia-cuda-nvrtc"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return f"the package 'cuda-bindings' is not installed: {remedy}"
    from cuda.bindings import nvrtc

    try:
        nvrtc.nvrtcVersion()
    except RuntimeError as error:  # the library is looked for at the first call
        return f"NVRTC, the compiler of CUDA, was not found ({error}): {remedy}"
    return None


def compiled(one: Launched, target: Target) -> Resources:
    """What the assembler says of a kernel, compiled with the flags that CuPy adds.

    Raises
    ------
    RuntimeError : the compiler refuses the kernel.
    """
    from cuda.bindings import nvrtc

    _, program = nvrtc.nvrtcCreateProgram(unit_of(one.kernel).encode(), one.kernel.file.encode(), 0, [], [])
    flags = (*options(one.kernel), "-ftz=true", f"-arch={target.name}", "--ptxas-options=-v")
    (error,) = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 1)  # written in place, so it must be one that nobody else has
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    said = log.decode().strip("\0")
    if int(error):
        raise RuntimeError(f"{one.kernel.name} of {one.kernel.file} for {target.name}: {said}")
    static = re.search(r"(\d+) bytes smem", said)
    registers, local = (int(_first(pattern, said)) for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack frame"))
    shared = one.shared + (int(static[1]) if static else 0)
    return Resources(registers, local, shared, resident_warps(target, registers, shared, one.threads))


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"the compiler does not say what a kernel takes, {pattern!r} is not in: {text}")
    return found[1]


def rows(targets: tuple[Target, ...] = TARGETS, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Result]:
    """One for every kernel as it is launched, for each dtype and target."""
    for dtype in dtypes:
        for target in targets:
            for one in launched(target, dtype):
                macros = " ".join(f"{name}={value}" for name, value in one.kernel.defines)
                about = {"kernel": one.kernel.name, "file": one.kernel.file, "macros": macros, "dtype": dtype, "target": target.name}
                yield {**about, "threads": one.threads, **asdict(compiled(one, target))}


def run_static(output: Path) -> Path:
    """Compile every kernel, and write what it takes to ``kernels.json`` in the folder.

    Raises
    ------
    ValueError : nothing can be compiled here, with the reason.
    """
    if reason := missing():
        raise ValueError(f"static: {reason}")
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    setting = {"n": ROWS, "num_hash": NUM_HASH, "hash_code_len": HASH_CODE_LEN, "dim": DIM}
    path = output / FILE
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "nvrtc": f"{major}.{minor}", "setting": setting}
    write_json(path, {**about, "kernels": list(rows())})
    return path


def static_table(results: Result, target: Target = TARGETS[1]) -> str:
    """The numbers of one target in float32, and behind a slash in float16 where they differ."""
    found: dict[tuple[str, ...], dict[str, Result]] = {}
    for row in results["kernels"]:
        if row["target"] == target.name and row["dtype"] in ("float32", "float16"):
            own = " ".join(macro for macro in row["macros"].split() if not macro.startswith(("VALUE=", "OUT=")))
            found.setdefault((row["kernel"], own, str(row["threads"])), {})[row["dtype"]] = row

    def numbers(of: dict[str, Result], name: str) -> str:
        return " / ".join(dict.fromkeys(f"{of[dtype][name]:,}" for dtype in ("float32", "float16") if dtype in of))

    names = ("registers", "local", "shared", "warps")
    table = [(f"`{kernel}`", own, threads, *(numbers(of, name) for name in names)) for (kernel, own, threads), of in found.items()]
    header = ("kernel", "macros", "threads", "registers", "local memory", "shared memory", "warps")
    return markdown(header, table, left=2)
