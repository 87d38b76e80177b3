"""The CUDA C++ as text: it compiles offline for every target without a warning, and the registry
names the kernels that are there.
"""

import re
from collections import Counter
from itertools import product

import pytest

from yoso_core import registry
from yoso_core.gpu.catalog import catalog
from yoso_core.gpu.cupy_kernels.source import FILES, kernels_in, options, parameter_names, source
from yoso_core.gpu.device import CudaKernel

TARGETS = ("sm_75", "sm_80", "sm_90", "sm_100")
VALUES = ("float", "double", "float16", "bfloat16")
Defines = tuple[tuple[str, str | int], ...]
MORE: dict[str, tuple[Defines, ...]] = {
    "hashing.cu": tuple((("D", size),) for size in (1, 32, 64, 1024)),
    "attention.cu": ((("SPREAD", 1),),),
    "cumulation.cu": (
        (("LANES", 1), ("OUT", "float"), ("SPREAD", 1), ("MY_DIMS", 1)),
        (("LANES", 32),),
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


def compile_offline(text: str, flags: tuple[str, ...], target: str) -> tuple[bytes, str]:
    """What NVRTC makes of it with the flags that CuPy adds: the cubin, empty where it fails, and
    all that it has to say.
    """
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    try:
        error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
    except RuntimeError as missing:
        pytest.skip(f"NVRTC is not installed: {missing}")
    given = [flag.encode() for flag in (*flags, "-ftz=true", f"-arch={target}")]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
    log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
    log_text = bytes(log_into(nvrtc, program, len(log))).decode().strip("\0\n ")
    if int(error):
        return b"", log_text
    cubin = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin, log_text


def log_into(nvrtc: object, program: object, length: int) -> bytes:
    log = bytes(length + 1)  # written in place, so not of length one: those are CPython's own, shared by the whole process
    nvrtc.nvrtcGetProgramLog(program, log)  # type: ignore[attr-defined]
    return log


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("target", [x if x == "sm_90" else pytest.param(x, marks=pytest.mark.long) for x in TARGETS])
def test_compiles_without_a_warning(file: str, target: str) -> None:
    for defines in builds(file):
        cubin, log = compile_offline(source(file), options(CudaKernel(file, "", defines)), target)
        assert log == "", defines
        assert cubin.startswith(b"\x7fELF"), defines
        for name in kernels_in(file):
            assert name.encode() in cubin, defines


def test_the_compiler_is_heard() -> None:
    """A planted warning and a planted error come through, with the line in the file."""
    kernel = '#line 1 "planted.cu"\nextern "C" __global__ void k(int* x) {\n  int unused;\n  x[0] = 1;\n}\n'
    _, log = compile_offline(kernel, ("--std=c++17",), "sm_80")
    assert "planted.cu(2)" in log
    assert "unused" in log
    cubin, log = compile_offline(kernel.replace("x[0] = 1", "x[0] = y"), ("--std=c++17",), "sm_80")
    assert cubin == b""
    assert 'identifier "y" is undefined' in log


def test_an_empty_log_leaves_the_bytes_of_others_alone() -> None:
    """It has one byte, and CPython has one object for each bytes of length one."""
    _, log = compile_offline('extern "C" __global__ void k(int* x) { x[0] = 1; }', ("--std=c++17",), "sm_80")
    assert log == ""
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
