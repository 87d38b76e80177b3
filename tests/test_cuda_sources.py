"""The CUDA C++ as text: it compiles offline for every target without a warning, and the registry
names the kernels that are there.
"""

import re
from collections import Counter
from itertools import product
from typing import NamedTuple

import pytest

from yoso_core import registry
from yoso_core.gpu.catalog import catalog
from yoso_core.gpu.cupy_kernels.source import FILES, kernels_in, options, parameter_names, source, source_of, unit_of
from yoso_core.gpu.device import CudaKernel, KernelText

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100")
VALUES = ("float", "double", "float16", "bfloat16")
Defines = tuple[tuple[str, str | int], ...]
MORE: dict[str, tuple[Defines, ...]] = {
    "hashing.cu": tuple((("D", size),) for size in (1, 32, 64, 1024)),
    "attention.cu": ((("SPREAD", 1),),),
    "cumulation.cu": (
        (("LANES", 1), ("OUT", "float"), ("SPREAD", 1), ("MY_DIMS", 1)),
        (("LANES", 32),),
        (("LANES", 32), ("SPREAD", 1)),
        (("LANES", 16), ("OVERSAMPLE", 2), ("HELD_BITS", 3)),
    ),
    "smoothing.cu": ((("OVERSAMPLE", 1), ("HELD_BITS", 4)), (("OVERSAMPLE", 29), ("HELD_BITS", 1))),
}
"""What a file is compiled with besides VALUE; the sizes at the ends."""


def builds(file: str) -> list[Defines]:
    """The macros that the launchers give. A float64 is only ever rounded to itself."""
    found = []
    for value, more in product(VALUES, MORE.get(file, ((),))):
        out = tuple((name, "double" if name == "OUT" and value == "double" else what) for name, what in more)
        found.append((("VALUE", value), *out))
    return found


class Compiled(NamedTuple):
    """What NVRTC makes of a text. Machine code and PTX are empty where it fails."""

    cubin: bytes
    ptx: str
    log: str
    """All that it has to say, but for what ptxas uses."""
    local: dict[str, int]
    """Bytes of a thread's local memory, by kernel: spilled registers, and arrays whose indices are
    known too late.
    """


def compile_offline(text: str, flags: tuple[str, ...], target: str) -> Compiled:
    """Compiled with the flags that CuPy adds."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
    except RuntimeError as missing:
        pytest.skip(f"NVRTC is not installed: {missing}")
    given = [flag.encode() for flag in (*flags, "-ftz=true", f"-arch={target}", "--ptxas-options=-v")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    said = bytes(log_into(nvrtc, program, len(log))).decode().strip("\0\n ")
    frames = re.findall(r"Function properties for (\w+)\n.*?(\d+) bytes stack frame", said)
    log_text = "\n".join(line for line in said.splitlines() if not re.match(r"ptxas (info|  )", line))
    if int(error):
        return Compiled(b"", "", log_text, {})
    cubin = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    ptx = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return Compiled(cubin, ptx.decode().strip("\0"), log_text, {name: int(size) for name, size in frames})


def log_into(nvrtc: object, program: object, length: int) -> bytes:
    log = bytes(length + 1)  # written in place, so not of length one: those are CPython's own, shared by the whole process
    nvrtc.nvrtcGetProgramLog(program, log)  # type: ignore[attr-defined]
    return log


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", [x if x == "sm_90" else pytest.param(x, marks=pytest.mark.long) for x in TARGETS])
def test_compiles_without_a_warning_into_registers(file: str, target: str) -> None:
    """On an H100, sm_90, no variable of a thread is in local memory."""
    for name, defines in product(kernels_in(file), builds(file)):
        kernel = CudaKernel(file, name, defines)
        made = compile_offline(unit_of(kernel), options(kernel), target)
        assert made.log == "", kernel
        assert made.cubin.startswith(b"\x7fELF"), kernel
        assert set(made.local) == {name}
        assert target != "sm_90" or made.local[name] == 0, kernel


@pytest.mark.parametrize("file", FILES)
def test_a_unit_is_its_file_with_one_kernel(file: str) -> None:
    """On the same lines, and with everything that is no kernel."""
    whole = source(file).splitlines()
    for name in kernels_in(file):
        lines = unit_of(CudaKernel(file, name)).splitlines()
        assert len(lines) == len(whole)
        assert all(line in ("", there) for line, there in zip(lines, whole, strict=True))
    left = [set(unit_of(CudaKernel(file, name)).splitlines()) for name in kernels_in(file)]
    assert set.union(*left) == set(whole)


def basic_blocks(ptx: str, kernel: str) -> list[str]:
    """The stretches of a kernel in which every instruction runs after the other."""
    body = ptx[ptx.index(f".entry {kernel}(") :]
    return re.split(r"(?m)^\$L__BB\w+:|^\s*(?:@%p\d+ )?bra.*$", body[: body.index("\n}")])


CONVERTED = """
#include "common.cuh"
extern "C" __global__ void convert(const VALUE* x, float* wide, VALUE* narrowed) {
  const float y = widen(x[threadIdx.x]);
  wide[threadIdx.x] = y;
  narrowed[threadIdx.x] = narrow<VALUE>(y * 3);
}
"""


def test_a_float16_is_converted_by_one_instruction_each_way() -> None:
    """No branch on what was loaded."""
    made = compile_offline(source_of(KernelText(CONVERTED, "convert")), ("--std=c++17", "-DVALUE=float16"), "sm_90")
    assert len(basic_blocks(made.ptx, "convert")) == 1
    assert made.ptx.count("cvt.f32.f16") == made.ptx.count("cvt.rn.f16.f32") == 1


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("lanes", [8, 32])
def test_shared_table_loads_keys_together_and_adds_up_without_a_loop(value: str, lanes: int) -> None:
    """Of the eight masks, codes and values of a batch, most are asked for before any is waited for;
    the array that a group of threads adds up is never indexed by a variable.
    """
    made = compile_offline(source("cumulation.cu"), ("--std=c++17", f"-DVALUE={value}", f"-DLANES={lanes}"), "sm_90")
    blocks = basic_blocks(made.ptx, "shared_table")
    assert max(block.count("ld.global.nc.u8") for block in blocks) == 8
    assert max(block.count("ld.global") for block in blocks) > 12
    words = 2 if value == "double" else 1
    assert max(block.count("shfl.sync.bfly") for block in blocks) == (lanes - 1) * words


def test_the_compiler_is_heard() -> None:
    """A planted warning and a planted error come through, with the line in the file."""
    kernel = '#line 1 "planted.cu"\nextern "C" __global__ void k(int* x) {\n  int unused;\n  x[0] = 1;\n}\n'
    log = compile_offline(kernel, ("--std=c++17",), "sm_80").log
    assert "planted.cu(2)" in log
    assert "unused" in log
    failed = compile_offline(kernel.replace("x[0] = 1", "x[0] = y"), ("--std=c++17",), "sm_80")
    assert failed.cubin == b""
    assert 'identifier "y" is undefined' in failed.log
    indexed = """extern "C" __global__ void k(int* x, int n) {
      int a[64];
      for (int i = 0; i < 64; ++i) a[i] = x[i];
      for (int i = 0; i < n; ++i) a[x[i] & 63] += i;
      for (int i = 0; i < 64; ++i) x[i] = a[i];
    }"""
    assert compile_offline(indexed, ("--std=c++17",), "sm_80").local == {"k": 256}


def test_an_empty_log_leaves_the_bytes_of_others_alone() -> None:
    """It has one byte, and CPython has one object for each bytes of length one."""
    made = compile_offline('extern "C" __global__ void k(int* x) { x[0] = 1; }', ("--std=c++17",), "sm_80")
    assert made.log == ""
    assert [bytes([i])[0] for i in range(256)] == list(range(256))


def test_every_file_is_one_text_without_headers_of_cuda() -> None:
    for file in FILES:
        assert "#include" not in source(file)
        assert f'#line 1 "{file}"' in source(file)


def test_the_parameters_of_every_kernel_are_known() -> None:
    """Launches name their arguments, which are checked if the parameters are known."""
    for file in FILES:
        for kernel in kernels_in(file):
            names = parameter_names(source(file), kernel)
            (head,) = re.findall(rf"^[^/\n]*\b{kernel}\(([^)]*)\) \{{", source(file), re.MULTILINE)
            assert len(names) == head.count(",") + 1, kernel
            assert all(re.search(rf"\b{name}\b", head) for name in names)


def test_kernels_have_names_of_their_own_and_the_registry_knows_them() -> None:
    names = Counter((text.language, text.name) for text in catalog())
    assert max(names.values()) == 1, names
    languages = {"cupy": "CUDA C++", "numba_cuda": "Numba CUDA"}
    used = {(languages[row.where], kernel) for row in registry.KERNELS if row.where in languages for kernel in row.kernels}
    assert used == set(names), "each is in the registry, and the registry names no other"
    assert {name for file in FILES for name in kernels_in(file)} == {name for language, name in names if language == "CUDA C++"}


@pytest.mark.parametrize("text", catalog(), ids=lambda text: f"{text.language}-{text.name}")
def test_every_kernel_opens_with_a_note(text: object) -> None:
    """What a block and a thread do, what it moves, and whether the result is deterministic."""
    note = text.text.lower()  # type: ignore[attr-defined]
    assert "block" in note
    assert re.search(r"\bmoves?\b|\breads\b|bytes", note)
    assert "deterministic" in note
