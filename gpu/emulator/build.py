"""From the text of a `.cu` file to a library: what is rewritten in the text, how it is compiled,
where the library is kept.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from yoso_core.gpu.cupy_kernels.source import parameter_names
from yoso_core.gpu.emulator.source_lines import CALLS

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "cupy_kernels"

FLAVOURS = ("plain", "counted", "address", "thread")
"""How a kernel is built: plain, with every access reported, for AddressSanitizer, for
ThreadSanitizer.
"""

# Matches declarations of shared memory. It also matches comments and strings, to skip them.
_SHARED = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?P<extern>\bextern\s+)?(?P<before>(?:\b(?:static|volatile)\s+)*)\b__shared__\b(?P<declaration>[^;{}]*);',
    re.DOTALL,
)
# The same for constant memory without a value.
_CONSTANT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?:\bstatic\s+)?\b__constant__\b(?P<declaration>[^;{}=()]*);', re.DOTALL)
_TYPE_AND_NAME = re.compile(r"(?P<type>.*?[\s>&*)])(?P<name>[A-Za-z_]\w*)\s*(?P<dims>(?:\[.*\])?)\s*", re.DOTALL)
_NAME = re.compile(r"(?P<pointer>[\s*&]*)(?P<name>[A-Za-z_]\w*)\s*(?P<dims>(?:\[.*\])?)\s*", re.DOTALL)
_BOUNDED = re.compile(
    r'(?P<before>(?:\b(?:extern\s+"C"|static|__global__|void)\s+)*)__launch_bounds__\s*'
    r"\((?P<bounds>(?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)(?P<after>(?:\s|\b__global__\b|\bvoid\b)*)(?P<name>\w+)"
)
_TEMPLATE = re.compile(r"\btemplate\s*<[^;{}]*>\s*\Z")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"](?P<header>[^>"\n]+)[>"].*$', re.MULTILINE)
_LINE = re.compile(r"^#line (\d+).*$", re.MULTILINE)
_ALIGNMENT = re.compile(r"\b(?:alignas|__align__)\s*\([^)]*\)")


class Named(ctypes.Structure):
    """`Named` in `runtime.hpp`."""

    _fields_ = (("name", ctypes.c_char_p), ("element", ctypes.c_uint), ("extents", ctypes.c_uint * 4))


class Parameter(ctypes.Structure):
    """One parameter of a kernel, from the compiler: `Parameter` in `runtime.hpp`."""

    kind: bytes
    size: int
    component: int
    alignment: int
    is_pointer: int
    _fields_ = (
        ("kind", ctypes.c_char),
        ("size", ctypes.c_ubyte),
        ("component", ctypes.c_ubyte),
        ("alignment", ctypes.c_ubyte),
        ("is_pointer", ctypes.c_ubyte),
    )


class Constant(ctypes.Structure):
    """A variable in constant memory without a value in the text: `Constant` in `runtime.hpp`."""


Constant._fields_ = (
    ("begin", ctypes.c_void_p),
    ("bytes", ctypes.c_ulonglong),
    ("named", Named),
    ("entry", Parameter),
    ("is_set", ctypes.c_int),
    ("next", ctypes.POINTER(Constant)),
)


@dataclass(frozen=True)
class Function:
    """A kernel in a loaded library."""

    name: str
    call: int
    """The address of the function that the runtime calls in every thread."""
    max_threads: int
    """The largest block that its ``__launch_bounds__`` allow; 0 if it has none."""
    parameters: tuple[Parameter, ...]
    parameter_names: tuple[str, ...]
    lines: dict[tuple[str, int], str]
    """The text of the kernel's source as it is compiled, by file and line."""


@dataclass(frozen=True)
class Library:
    """A compiled `.cu` file, loaded."""

    path: Path
    loaded: ctypes.CDLL
    """The functions of the runtime are found in it, too."""
    functions: dict[str, Function]

    @property
    def constants(self) -> Any:
        """A pointer to the first `Constant`, null if there is none."""
        first = self.loaded.cuda_emulator_constants
        first.restype = ctypes.POINTER(Constant)
        return first()

    def each_constant(self) -> Iterator[Constant]:
        at = self.constants
        while at:
            yield at.contents
            at = at.contents.next


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]
    identity: str
    """A text that changes when the compiler does."""


@cache
def _compiler_for(cxx: str | None, path: str | None) -> Compiler | str:
    """The compiler for these settings of the environment, or the reason why there is none."""
    if sys.platform not in ("linux", "darwin"):
        return f"the emulator of CUDA kernels needs Linux or macOS, this is {sys.platform}"
    for command in [shlex.split(cxx)] if cxx else [["g++"], ["clang++"], ["c++"]]:
        program = shutil.which(command[0], path=path)
        if program:
            made = os.stat(os.path.realpath(program))
            identity = f"{os.path.realpath(program)} {made.st_size} {made.st_mtime_ns} {platform.machine()}"
            return Compiler((program, *command[1:]), identity)
    wanted = f"CXX={cxx} names no program" if cxx else "no C++ compiler was found (g++ or clang++)"
    remedy = "xcode-select --install" if sys.platform == "darwin" else "apt install g++, dnf install gcc-c++"
    return f"the emulator of CUDA kernels needs a C++17 compiler: {wanted}; install one ({remedy}) or name one in CXX"


def _found() -> Compiler | str:
    return _compiler_for(os.environ.get("CXX") or None, os.environ.get("PATH"))


def missing() -> str | None:
    """Why nothing can be emulated here, in one line with the remedy; ``None`` if it can.

    >>> missing() is None or "install" in missing()
    True
    """
    found = _found()
    return found if isinstance(found, str) else None


@cache
def _is_clang(command: tuple[str, ...]) -> bool:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return "clang" in done.stdout


def missing_for_counting() -> str | None:
    """Why `count_traffic` and `checked` cannot work here; ``None`` if they can.

    They need g++, because clang splits vectors before it reports an access: the reported accesses
    are then not those of a GPU.

    >>> missing_for_counting() is None or "g++" in missing_for_counting()
    True
    """
    if missing() or (sys.platform == "linux" and not _is_clang(compiler().command)):
        return missing()
    return f"count_traffic and checked need Linux and g++: this is {sys.platform} with {compiler().command[0]}; name g++ in CXX"


def compiler() -> Compiler:
    """The C++ compiler. Raises ``RuntimeError`` with the reason from `missing` if there is none."""
    found = _found()
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def cache_folder() -> Path:
    """Where libraries are kept: in ``$YOSO_CORE_CACHE``, else in the user's cache. Everything in it
    may be deleted at any time.

    >>> cache_folder().name
    'emulator'
    """
    named = os.environ.get("YOSO_CORE_CACHE")
    if named:
        return Path(named).expanduser() / "emulator"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "yoso_core" / "emulator"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "yoso_core" / "emulator"


def _split(declaration: str) -> list[str]:
    """Split at the commas outside brackets. Inside ``[]`` and ``()`` a ``<`` compares; elsewhere it
    opens the arguments of a template.
    """
    parts, round_or_square, angle, start = [], 0, 0, 0
    for i, letter in enumerate(declaration):
        round_or_square += (letter in "([{") - (letter in ")]}")
        if not round_or_square:
            angle += (letter == "<") - (letter == ">")
        if letter == "," and not round_or_square and not angle:
            parts.append(declaration[start:i])
            start = i + 1
    return [*parts, declaration[start:]]


def _line_of(text: str, position: int) -> int:
    """The line of a position, counted as the last ``#line`` before it says."""
    directives = list(_LINE.finditer(text, 0, position))
    first, start = (int(directives[-1][1]), directives[-1].end() + 1) if directives else (1, 0)
    return first + text.count("\n", start, position)


def _members(declaration: str) -> list[tuple[str, str]] | None:
    """The names of ``float a[4], *b``, each with a declaration of its own; ``None`` if it is not
    understood.

    >>> _members("float a[4], *b")
    [('a', 'float a[4]'), ('b', 'float  *b')]
    """
    first, *others = _split(declaration)
    # The type ends before the name: the arguments of a template and the size of an array may hold
    # names, too.
    head = _TYPE_AND_NAME.fullmatch(first)
    tails = [(other, _NAME.fullmatch(other)) for other in others]
    if head is None or any(tail is None for _, tail in tails):
        return None
    of_all = head["type"].rstrip("*& \t\n")  # a pointer is one for its own name alone
    return [(head["name"], first), *((tail["name"], f"{of_all} {other}") for other, tail in tails if tail)]


def rewrite_bounds(text: str) -> str:
    """Turn the ``__launch_bounds__`` of kernels, before or after ``__global__`` or ``void``, into
    constants, for the check of launches. Line numbers stay the same.

    >>> rewrite_bounds('extern "C" __global__ void __launch_bounds__(64) k() {}').split("; } ")[1]
    'extern "C" __global__ void  k() {}'
    """

    def replace(found: re.Match[str]) -> str:
        rest = found["before"] + found["after"] + found["name"]
        if _TEMPLATE.search(text, 0, found.start()):  # its arguments may be in the bounds
            return rest
        constant = f"namespace cuda_emulator_bounds {{ constexpr int {found['name']} = cuda_emulator::first_of({found['bounds']}); }}"
        return f"{constant} {rest}"

    return _BOUNDED.sub(replace, text)


KNOWN_HEADERS = (
    *("cuda_runtime.h", "cuda.h", "device_launch_parameters.h", "device_functions.h", "math_constants.h", "vector_types.h"),
    *("math.h", "cmath", "stdint.h", "cstdint", "stddef.h", "cstddef", "stdio.h", "cstdio", "assert.h", "cassert"),
    *("limits.h", "climits", "float.h", "cfloat", "algorithm"),
)
"""What they declare for kernels is there without them."""

NO_HEADERS = {
    "cooperative_groups.h": "cooperative groups: use __syncthreads, __syncwarp and the __shfl_sync functions",
    "cuda_fp16.h": "arithmetic of half: widen it to float, as common.cuh does",
    "cuda_bf16.h": "arithmetic of bfloat16: widen it to float, as common.cuh does",
    "mma.h": "tensor cores",
    "cuda_pipeline.h": "asynchronous copies: copy by hand",
    "curand_kernel.h": "random numbers of cuRAND: pass them in, or write a generator",
    "cub/cub.cuh": "CUB",
    "iostream": "streams: use printf",
}


def rewrite_includes(text: str) -> str:
    """Take out the headers whose contents the emulator has built in. Raises ``ValueError`` for a
    header of what it does not have.

    >>> rewrite_includes("#include <cuda_runtime.h>\\nint x;")
    '\\nint x;'
    """

    def replace(found: re.Match[str]) -> str:
        header = found["header"]
        if header in NO_HEADERS:
            raise ValueError(f"line {_line_of(text, found.start())}: {found[0].strip()}: the emulator has no {NO_HEADERS[header]}")
        return "" if header in KNOWN_HEADERS else found[0]

    return _INCLUDE.sub(replace, text)


def rewrite_shared(text: str) -> str:
    """Turn declarations of shared memory into references to the emulator's memory. Line numbers
    stay the same.

    ``__shared__ float a[4], b;`` becomes a struct for each of the two, and a reference to its only
    member. ``extern __shared__ float c[];`` becomes a pointer. Raises ``ValueError`` for a
    declaration that it does not understand.

    >>> rewrite_shared("extern __shared__ float c[];")
    'float* const c = cuda_emulator::whole_dynamic_shared<float>("c");'
    """
    numbers = iter(range(len(text)))

    def replace(found: re.Match[str]) -> str:
        if found["declaration"] is None:
            return found[0]
        declaration = ("volatile " if "volatile" in found["before"] else "") + found["declaration"]
        members = _members(declaration)
        if members is None:
            line = _line_of(text, found.start())
            raise ValueError(f"line {line}: the emulator does not understand this declaration of shared memory: {found[0]}")
        if found["extern"]:
            name, member = members[0]
            kind = _ALIGNMENT.sub("", member[: member.rindex(name)]).strip()
            return f'{kind}* const {name} = cuda_emulator::whole_dynamic_shared<{kind}>("{name}");' + "\n" * found[0].count("\n")
        made = []
        for name, member in members:
            struct = f"cuda_emulator_shared_{next(numbers)}"
            made.append(
                f"struct {struct} {{ {member.strip()}; static constexpr cuda_emulator::Named cuda_emulator_named(const char* is) "
                f"{{ return cuda_emulator::named<decltype({struct}::{name})>(is); }} }}; "
                f'auto& {name} = cuda_emulator::shared<{struct}>("{name}").{name};'
            )
        return " ".join(made)

    return _SHARED.sub(replace, text)


def rewrite_constants(text: str) -> str:
    """Turn declarations of constant memory without a value into references to pages of their own,
    which a launch fills. Line numbers stay the same.

    >>> rewrite_constants("__constant__ float c[4];").split("; ")[-1]
    'static auto& c = cuda_emulator_constant_0_at.pages.held.c;'
    """
    numbers = iter(range(len(text)))

    def replace(found: re.Match[str]) -> str:
        members = _members(found["declaration"]) if found["declaration"] is not None else None
        made = []
        for name, member in members or ():
            struct = f"cuda_emulator_constant_{next(numbers)}"
            made.append(
                f"struct {struct} {{ {member.strip()}; }}; "
                f'static cuda_emulator::ConstantPages<{struct}, decltype({struct}::{name})> {struct}_at("{name}"); '
                f"static auto& {name} = {struct}_at.pages.held.{name};"
            )
        return " ".join(made) or found[0]

    return _CONSTANT.sub(replace, text)


_ALWAYS = (
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fsigned-char",
    "-fstack-clash-protection",
    "-g",
    "-w",
)
# What C++ leaves open: `undefined.hpp`.
_OPEN = ("-fsanitize=bounds,return,float-cast-overflow,shift-exponent",)
_FLAGS = {
    "plain": ("-O1", *_OPEN),
    # The compiler must not split a vector before its accesses are counted.
    "counted": (
        "-O1",
        *_OPEN,
        "-fsanitize=thread,signed-integer-overflow",
        "-fno-tree-sra",
        "-fno-ipa-sra",
        "--param=tsan-distinguish-volatile=1",
    ),
    "address": ("-O1", "-fsanitize=address", "-fsanitize-recover=address", "-fno-omit-frame-pointer"),
    "thread": ("-O1", "-fsanitize=thread"),
}


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((compiler().identity, *compiler().command[1:], *parts)).encode()).hexdigest()[:24]


def _make(to: Path, file: str, text: str, flags: tuple[str, ...], inputs: tuple[str, ...], sanitizer: bool = True) -> None:
    """Compile a text to a shared library. It is moved to its path in one step, so that no process
    sees half a file.

    Without ``sanitizer``, a library that is compiled for a sanitizer is not linked to it.
    """
    name = "-install_name,@rpath/" if sys.platform == "darwin" else "-soname,"
    rpath = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    link_flags = tuple(flag for flag in flags if sanitizer or not flag.startswith("-fsanitize"))
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            written, compiled, made = (Path(folder) / name for name in (Path(file).name, "kernel.o", to.name))
            written.write_text(text, "utf-8")
            commands = (
                [*_ALWAYS, *flags, f"-I{HERE}", f"-I{KERNELS}", "-c", "-x", "c++", str(written), "-o", str(compiled)],
                [*link_flags, "-shared", f"-Wl,{name}{to.name}", f"-Wl,-rpath,{rpath}", str(compiled), *inputs, "-o", str(made)],
            )
            for command in commands:
                whole = [*compiler().command, *command]
                done = subprocess.run(whole, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{whole[0]} cannot compile this for the emulator:\n{done.stderr.strip()}")
            os.replace(made, to)
    except OSError as problem:
        raise RuntimeError(f"the emulator keeps what it compiles in {to.parent}: {problem}; name a folder in YOSO_CORE_CACHE") from problem


def _load(path: Path, make: Callable[[], None]) -> ctypes.CDLL:
    """Load a library. It is made first if it is missing, and made again if it cannot be loaded."""
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)
    make()
    return ctypes.CDLL(str(path))


_SOURCES = ("build.py", "runtime.hpp", "cuda.hpp", "arrays.hpp", "looks.hpp", "undefined.hpp", "traffic.hpp", "fences.hpp", "runtime.cpp")


@cache
def _texts() -> tuple[str, ...]:
    """Everything that a library depends on beside the kernel: the emulator's own files, and the way
    this file compiles.
    """
    return tuple((HERE / name).read_text("utf-8") for name in _SOURCES)


def _runtime(flavour: str) -> Path:
    flags = ("-std=c++17", "-O2", f"-DCUDA_EMULATOR_{flavour.upper()}")
    path = cache_folder() / f"runtime-{_key(*_texts(), *flags)}.so"
    _load(path, lambda: _make(path, "runtime.cpp", _texts()[-1], flags, ("-lpthread", "-ldl")))
    return path


def _lines(text: str) -> dict[tuple[str, int], str]:
    """The lines of a text, each by the file and the number that the last ``#line`` before it says.

    >>> _lines('#line 7 "a.cu"\\nint x;')
    {('a.cu', 7): 'int x;'}
    """
    found, file, number = {}, "", 0
    for line in text.splitlines():
        directive = _LINE.match(line)
        if directive:
            file, number = line.partition('"')[2].rstrip('"'), int(directive[1])
        else:
            found[file, number] = line
            number += 1
    return found


@cache
def load(file: str, text: str, kernels: tuple[str, ...], options: tuple[str, ...], flavour: str) -> Library:
    """The library of a `.cu` file, with all its kernels. It is compiled with these options on first
    use.

    ``-DNAME=value`` becomes a line before the text, so that it changes no header of the emulator.
    Raises ``RuntimeError`` if there is no compiler, or with the messages of the compiler.
    """
    defines = [option[2:].partition("=") for option in options if option.startswith("-D")]
    flags = (*(option for option in options if not option.startswith("-D")), *_FLAGS[flavour], f"-DCUDA_EMULATOR_{flavour.upper()}")
    rewritten = rewrite_constants(rewrite_bounds(rewrite_shared(rewrite_includes(text))))
    whole = "\n".join(
        (
            '#include "cuda.hpp"',
            *(f"#define {name} {value or '1'}" for name, _, value in defines),
            f'#line 1 "{file}"',
            rewritten,
            f'#line 1 "{CALLS}"',
            *(f"CUDA_EMULATOR_KERNEL({name})" for name in kernels),
            "",
        )
    )
    runtime = _runtime(flavour)
    path = runtime.with_name(f"{Path(file).stem}-{_key(*_texts(), whole, *flags)}.so")
    library = _load(path, lambda: _make(path, file, whole, flags, (str(runtime),), flavour in ("address", "thread")))
    functions, lines = {}, _lines(rewritten)
    for name in kernels:
        described, count = getattr(library, f"cuda_emulator_parameters_{name}"), ctypes.c_int()
        described.restype = ctypes.POINTER(Parameter)
        parameters = described(ctypes.byref(count))
        if not parameters:  # not under these macros
            continue
        call = ctypes.cast(getattr(library, f"cuda_emulator_call_{name}"), ctypes.c_void_p).value
        assert call is not None
        found = tuple(Parameter.from_buffer_copy(parameters[i]) for i in range(count.value))
        bound = getattr(library, f"cuda_emulator_bound_{name}")()
        functions[name] = Function(name, call, bound, found, parameter_names(text, name), lines)
    return Library(path, library, functions)
