"""Where nothing can be compiled, kept, written, printed or fetched: what can be done is done, and
what cannot is said in one line.
"""

import ast
import errno
import importlib
import importlib.machinery
import inspect
import io
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import textwrap
import types as python_types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.core.caching import CacheImpl, IndexDataCacheFile
from typer.testing import CliRunner

import yoso_core
from yoso_core import backends, comparison_view, cpu, files, inputs, memory, tutorials
from yoso_core.cli import app
from yoso_core.cpu import compiling, warmup

pytestmark = pytest.mark.slow  # a process for nearly every test

FACE = Path(yoso_core.__file__).parent


def yoso(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), prog_name="yoso")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **environment})


def no_space(*given: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---------------------------------------------------------------- without a compiler


def test_without_compiling_numpy_takes_over() -> None:
    code = """
        import numpy as np, yoso_core
        x = np.ones((4, 8))
        assert (yoso_core.yoso_attention(x, x, x, rng=0) == yoso_core.yoso_attention(x, x, x, rng=0, variant="numpy:formula")).all()
        print(*{v.reason for v in yoso_core.variants("yoso_attention") if v.where == "cpu"})
        from yoso_core.cli import app
        app(["info", "--json"])
        """
    done = python(code, NUMBA_DISABLE_JIT="1")
    assert done.stdout.startswith("Numba compiles nothing here (NUMBA_DISABLE_JIT): unset it"), done.stderr
    assert '"reason": "Numba compiles nothing here (NUMBA_DISABLE_JIT)' in done.stdout


def test_a_numba_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses a NumPy that is newer than it knows."""
    broken = python_types.ModuleType("numba")
    broken.__spec__ = numba.__spec__
    monkeypatch.setitem(sys.modules, "numba", broken)
    reason = backends.BACKENDS["cpu"].missing()
    assert reason is not None
    assert reason.startswith("numba cannot be imported (cannot import name 'config'")


def whole_cupy(**runtime: Any) -> python_types.ModuleType:
    """A CuPy that finds a GPU and NVRTC."""
    cupy = python_types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    vars(cupy)["cuda"] = SimpleNamespace(
        runtime=SimpleNamespace(**{"getDeviceCount": lambda: 1, "CUDARuntimeError": RuntimeError} | runtime),
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
    )
    return cupy


def test_a_broken_numba_cuda_takes_cupy_down_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants are listed together: each is asked for by itself."""
    monkeypatch.setattr(backends, "missing", backends.missing.__wrapped__)
    monkeypatch.setitem(sys.modules, "cupy", whole_cupy())
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", lambda library: "/cuda/include")
    broken = python_types.ModuleType("numba")
    broken.__spec__ = numba.__spec__
    vars(broken)["config"] = numba.config

    def fail(name: str) -> Any:
        raise RuntimeError("cuda.bindings of another version")

    vars(broken)["__getattr__"] = fail
    monkeypatch.setitem(sys.modules, "numba", broken)
    monkeypatch.delitem(sys.modules, "numba.cuda", raising=False)
    found = {v.where: v.reason for v in yoso_core.variants("lsh_cumulation")}
    assert found["cupy"] is None
    assert found["numba_cuda"] is not None
    assert found["numba_cuda"].startswith("numba.cuda cannot be imported (cuda.bindings of another version): pip install")


def test_a_backend_that_breaks_while_it_is_looked_at_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise OSError("libcuda.so.1 is damaged")

    monkeypatch.setattr(backends, "missing", backends.missing.__wrapped__)
    monkeypatch.setitem(sys.modules, "cupy", whole_cupy(getDeviceCount=fail))
    found = {v.where: v.reason for v in yoso_core.variants("fast_hash")}
    assert found["cupy"] == "what it needs could not be looked at (OSError: libcuda.so.1 is damaged)"
    assert found["numpy"] is found["cpu"] is None


def test_the_headers_of_cuda_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy 14 refuses to compile anything without them."""
    pathfinder = pytest.importorskip("cuda.pathfinder", reason="cuda-pathfinder is not installed")
    monkeypatch.setitem(sys.modules, "cupy", whole_cupy())
    for place, reason in (("/cuda/include", None), (None, "CUDA's headers were not found, and CuPy compiles no kernel without: pip")):
        monkeypatch.setattr(pathfinder, "find_nvidia_header_directory", {"cudart": place}.get)
        found = backends.BACKENDS["cupy"].missing()
        assert found is None if reason is None else found is not None and found.startswith(reason)


# ---------------------------------------------------------------- the disk of compiled kernels


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Compile, or load, a small kernel that is kept in ``tmp_path / "kept"`` alone."""
    (tmp_path / "small.py").write_text("def make(add):\n    def small(first, last, x):\n        x[first:last] += add\n    return small\n")
    spec = importlib.util.spec_from_file_location("small", tmp_path / "small.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(compiling, "_caches", partial(_first_place, compiling._caches))
    monkeypatch.setattr(compiling, "said", set())

    def run() -> Any:
        found = compiling.compile_or_load(module.make(2.0), types.void(types.intp, types.intp, types.Array(types.float64, 1, "C")))
        x = np.zeros(3)
        found(0, 2, x)
        assert x.tolist() == [2.0, 2.0, 0.0]
        return found

    return run


def _first_place(places: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    return places()[:1]


def hit(found: Any) -> bool:
    return bool(found.stats.cache_hits) and not found.stats.cache_misses


def test_a_kernel_is_kept(compiled: Callable[[], Any], tmp_path: Path) -> None:
    found = compiled()
    assert not hit(found)
    assert found._cache.files
    assert all(tmp_path / "kept" in path.parents for path in found._cache.files)
    assert hit(compiled())


@pytest.mark.parametrize("suffix", ["nbc", "nbi"])
@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: data[:-40], lambda data: b"", lambda data: bytes(len(data))])
def test_a_damaged_file_is_built_anew(compiled: Callable[[], Any], tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]) -> None:
    compiled()
    (path,) = (tmp_path / "kept").rglob(f"*.{suffix}")
    path.write_bytes(damage(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not hit(compiled())
    assert hit(compiled())


def test_zeros_inside_of_machine_code_are_seen(compiled: Callable[[], Any], tmp_path: Path) -> None:
    """As a crash of the machine leaves them: the file still opens as a pickle."""
    compiled()
    (path,) = (tmp_path / "kept").rglob("*.nbc")
    data = path.read_bytes()
    at = data.index(b"\x7fELF") + 1000 if b"\x7fELF" in data else len(data) // 2
    path.write_bytes(data[:at] + bytes(500) + data[at + 500 :])
    assert not hit(compiled())


def test_on_a_full_disk_it_runs_with_one_warning(compiled: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", no_space)
    with pytest.warns(RuntimeWarning) as noted:
        compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled()
    (warning,) = noted
    message = str(warning.message)
    assert re.fullmatch(
        rf"compiled kernels cannot be kept in {tmp_path}/kept/\S+ \(No space left on device\), so every process compiles its own; "
        "name a folder that can be written in NUMBA_CACHE_DIR",
        message,
    )


def test_what_an_image_holds_is_read_by_a_user_who_cannot_write(compiled: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled()

    def refused(self: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for place in CacheImpl._locator_classes:
        monkeypatch.setattr(place, "ensure_cache_path", refused)
    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", refused)
    assert hit(compiled())


def test_without_a_folder_anywhere_it_runs_with_one_warning(tmp_path: Path) -> None:
    """Neither beside the sources nor in the home folder, as for a user without one in a read-only
    container: files stand in the way of the folders, since nothing is forbidden to root.
    """
    package = tmp_path / "yoso_core"
    shutil.copytree(FACE, package, ignore=shutil.ignore_patterns("__pycache__", "tutorials", "model", "benchmarks"))
    (package / "cpu" / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import numpy as np, yoso_core
        assert yoso_core.__file__.startswith({str(tmp_path)!r})
        x = np.ones((1, 2))
        print(yoso_core.hadamard_transform(x, variant="cpu:tiles"), yoso_core.hadamard_transform(x[:, :1], variant="cpu:tiles"))
        """
    done = python(code, HOME=str(tmp_path / "home"), XDG_CACHE_HOME=str(tmp_path / "home"), NUMBA_CACHE_DIR="", PYTHONDONTWRITEBYTECODE="1")
    assert done.stdout == "[[2. 0.]] [[1.]]\n", done.stderr
    assert done.stderr.count("compiled kernels cannot be kept in") == 1
    assert f"{package}/cpu/__pycache__" in done.stderr
    assert "NUMBA_CACHE_DIR" in done.stderr


def test_a_damaged_runtime_of_the_emulator_is_built_anew(tmp_path: Path) -> None:
    """Every library is linked to it."""
    if reason := backends.missing("emulated"):
        pytest.skip(reason)
    code = """
        import numpy as np
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator
        x = np.zeros(1, np.int32)
        Emulator().launch(KernelText('extern "C" __global__ void one(int* x) { *x = 1; }', "one"), grid=(1,), block=(1,), args=(x,))
        print(x)
        """
    assert python(code, YOSO_CORE_CACHE=str(tmp_path)).stdout == "[1]\n"
    (runtime,) = tmp_path.rglob("runtime-*.so")
    runtime.write_bytes(runtime.read_bytes()[:100])
    done = python(code, YOSO_CORE_CACHE=str(tmp_path))
    assert done.stdout == "[1]\n", done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "lines"), [(Terminal, 1), (io.StringIO, 0)])
def test_a_person_is_told_once_that_it_compiles(
    compiled: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], lines: int
) -> None:
    seen = stream()
    monkeypatch.setattr(sys, "stderr", seen)
    for _ in range(2):
        compiled()
        shutil.rmtree(tmp_path / "kept")
    assert seen.getvalue() == "yoso_core: compiling for this processor, once (`yoso warmup` does it ahead)\n" * lines
    compiling.said.clear()
    compiled()
    before = seen.getvalue()
    compiling.said.clear()
    compiled()
    assert seen.getvalue() == before, "it was on disk"


# ---------------------------------------------------------------- ahead of time


def factory(make: Any) -> tuple[str, str]:
    while isinstance(make, partial):
        make = make.func
    return make.__module__, make.__qualname__


def test_the_list_of_kernels_is_whole() -> None:
    there = set()
    for found in pkgutil.iter_modules(cpu.__path__, "yoso_core.cpu."):
        for name, thing in vars(importlib.import_module(found.name)).items():
            if name.endswith("_kernel") and hasattr(thing, "cache_info") and thing.__module__ == found.name:
                there.add((found.name, name))
    listed = list(warmup.all_kernels([16, 32], ["float32", "float64", "float16", "bfloat16"]))
    assert {factory(make) for _, make in listed} == there
    assert len({name for name, _ in listed}) == len(listed) == 1 + 2 * (19 + 2 * 1) + 4 * (12 + 2 * 8) + 2 * 2
    for _, make in listed:
        inspect.signature(make).bind()


def test_warmup_says_what_is_kept_where(monkeypatch: pytest.MonkeyPatch) -> None:
    every = warmup.all_kernels
    monkeypatch.setattr(warmup, "all_kernels", lambda dims, dtypes: list(every(dims, dtypes))[:1])
    result = yoso("warmup", "--dim", "48", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(r"CPU kernels: [01] compiled, [01] there already\n[\d.]+ KiB in \S+\n", result.stdout)
    assert yoso("warmup", "--dim", "0").stderr == "yoso warmup: --dim: need an integer between 1 and 1024, got 0\n"
    assert yoso("warmup", "--dtype", "int8").stderr.startswith("yoso warmup: --dtype: need one of 'float16', 'bfloat16', 'float32'")


def test_warmup_for_the_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    from yoso_core import operations, warming

    if reason := backends.missing("emulated"):
        pytest.skip(reason)
    monkeypatch.setattr(operations, "OPERATIONS", {"hyperplane_hash": operations.OPERATIONS["hyperplane_hash"]})
    found = warming.warm_emulator([16], ["float32"])
    assert found.number > 0
    assert all(size > 10_000 for size in found.folders.values())


# ---------------------------------------------------------------- more than there is


@pytest.mark.parametrize(
    ("args", "option", "size"),
    [
        ("fast_hash --n 10000000000", "--n", "48.89 TiB"),
        ("yoso_attention --n 100000000 --heads 1000", "--n", "372.5 TiB"),
        ("fast_hash --num-hash 1000000000", "--num-hash", "9.313 TiB"),
        ("lsh_cumulation --num-hash 1000000000", "--num-hash", "11.18 TiB"),
        ("expectation_attention --value-dim 100000000000000", "--value-dim", ""),
    ],
)
def test_sizes_beyond_memory_are_one_line(args: str, option: str, size: str) -> None:
    result = yoso("compare", *args.split())
    assert result.exit_code == 2
    assert re.fullmatch(rf"yoso compare: {option}: takes at least \S+ .iB of memory, \S+ .iB can be had\n", result.stderr)
    assert size in result.stderr


def test_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 20 << 20)
    inputs.example_inputs("fast_hash")
    with pytest.raises(MemoryError, match="n: takes at least"):
        inputs.example_inputs("fast_hash", n=100_000)


def test_memory_that_runs_out_later_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (MemoryError("Unable to allocate 3 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):

        def run_out(*given: object, error: Exception = error, **how: object) -> None:
            raise error

        monkeypatch.setattr(inputs, "example_inputs", run_out)
        result = yoso("compare", "fast_hash")
        assert (result.exit_code, result.stderr) == (2, f"yoso compare: {error}\n")


# ---------------------------------------------------------------- the command line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["info", "kernel", "kernel shared_table", "--help", "compare fast_hash --n 5 --variants numpy:formula"])
def test_output_that_cannot_be_written_is_one_line(command: str) -> None:
    done = subprocess.run(f"{sys.executable} -m yoso_core {command} > /dev/full", shell=True, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"yoso.*No space left on device\n", done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="a shell's way to close a stream")
def test_closed_streams() -> None:
    def run(rest: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(f"{sys.executable} -m yoso_core {rest}", shell=True, capture_output=True, text=True, timeout=120)

    closed = run("info >&-")
    assert (closed.returncode, closed.stderr) == (2, "yoso: standard output is closed\n")
    silent = run("compare fast_hash --n 5 --variants numpy:formula 2>&-")
    assert silent.returncode == 0
    assert "agrees" in silent.stdout
    wrong = run("compare nothing 2>&-")
    assert (wrong.returncode, wrong.stdout) == (2, "")


def test_what_cannot_run_is_no_agreement() -> None:
    variant = next(v for v in yoso_core.variants("fast_hash") if v.where == "cupy")
    if variant.available:
        pytest.skip("this machine has a GPU")
    for named in (variant.name, f"{variant.name},numpy:formula"):
        result = yoso("compare", "fast_hash", "--n", "5", "--variants", named, "--repeats", "1")
        assert result.exit_code == 1
        assert f"Cannot run here: {variant.name}" in " ".join(result.output.split())
    assert yoso("compare", "fast_hash", "--n", "5", "--variants", "numpy:formula", "--repeats", "1").exit_code == 0


def test_options_are_named_as_they_are_typed(tmp_path: Path) -> None:
    assert yoso("demo", "--seed", "-1").stderr == "yoso demo: --seed: need an integer at least 0, got -1\n"
    torch = pytest.importorskip("torch")
    torch.save({"nonsense": torch.zeros(2)}, tmp_path / "x.bin")
    result = yoso("convert", str(tmp_path / "x.bin"), "--output", str(tmp_path / "out"), "--num-attention-heads", "2")
    assert result.exit_code == 2
    assert result.stderr.endswith("leave them out with --drop\n")
    assert "drop=" not in result.stderr


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "x.bin").write_bytes(b"")
    code = f"""
        from unittest import mock
        from yoso_core.cli import app
        from yoso_core.model import tokenizer
        asked = []
        def ask(*given, **how):
            asked.append(given)
            raise ConnectionError
        with mock.patch.object(tokenizer, "get_session", lambda: mock.Mock(head=ask)), mock.patch("time.sleep") as slept:
            for command in (["convert", {str(tmp_path / "x.bin")!r}, "--output", "o", "--tokenizer", "nofolder"],
                            ["fill-mask", "[MASK]", "--model", "nofolder"]):
                try: app(command)
                except SystemExit as ended: print(ended.code, len(asked), slept.called)
        """
    done = python(code, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"))
    assert done.stdout == "2 1 False\n2 2 False\n", done.stderr
    first, second = done.stderr.splitlines()[-2:]
    assert "--tokenizer: no tokenizer in nofolder" in first
    assert "--model: no model in nofolder" in second


# ---------------------------------------------------------------- files


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"

    def write(text: str, fails: bool) -> None:
        with files.written(target) as part:
            assert part.suffix == ".txt"
            assert part.parent == tmp_path
            part.write_text(text)
            if fails:
                no_space()

    with pytest.raises(OSError, match="No space"):
        write("half", True)
    assert list(tmp_path.iterdir()) == []
    write("whole", False)
    target.chmod(0o640)
    with pytest.raises(OSError, match="No space"):
        write("half", True)
    assert target.read_text() == "whole"
    write("again", False)
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("again", 0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    with files.written(link) as part:
        part.write_text("through")
    assert link.is_symlink()
    assert target.read_text() == "through"
    with files.written(os.devnull) as part:
        assert part == Path(os.devnull)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.txt", "notes.txt"]


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"

    def write(fails: bool) -> None:
        with files.written_folder(folder) as part:
            (part / "deep").mkdir()
            (part / "deep" / "x.bin").write_text("x")
            if fails:
                no_space()

    with pytest.raises(OSError, match="No space"):
        write(True)
    assert list(tmp_path.rglob("*.bin")) == []
    assert not folder.exists()
    write(False)
    (folder / "mine.txt").write_text("stays")
    write(False)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == ["deep", "deep/x.bin", "mine.txt"]


def test_a_full_disk_leaves_nothing_that_blocks_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(source: Path, target: Path) -> None:
        Path(target).write_text("half")
        no_space()

    with monkeypatch.context() as full:
        full.setattr(tutorials.shutil, "copyfile", half)
        result = yoso("tutorial", "1", "--folder", str(tmp_path))
        assert (result.exit_code, result.stderr) == (2, "yoso tutorial: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []
    assert yoso("tutorial", "1", "--folder", str(tmp_path)).exit_code == 0

    pytest.importorskip("matplotlib")
    from yoso_core import draw

    picture = tmp_path / "x.png"
    compare = ("compare", "fast_hash", "--n", "5", "--variants", "numpy:formula", "--repeats", "1", "--plot", str(picture))
    with monkeypatch.context() as full:
        full.setattr(draw.Picture, "savefig", lambda self, path, **how: half(picture, path))
        assert yoso(*compare).exit_code == 2
    assert not picture.exists()
    assert yoso(*compare).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_file_is_written_in_one_step() -> None:
    """Whatever the package writes for a reader goes to the part that `files.written` or
    `files.written_folder` gives; the emulator has a folder of its own kind.
    """
    writers = {"write_text", "write_bytes", "savefig", "save_pretrained", "copyfile", "dump", "savez", "save"}
    elsewhere = {("emulator", "build.py"), ("emulator", "sanitizers.py"), ("yoso_core", "draw.py"), ("yoso_core", "files.py")}
    found = []
    for folder, _, names in os.walk(FACE, followlinks=True):
        for path in (Path(folder, name) for name in names if name.endswith(".py") and not name[0].isdigit()):
            if (path.parent.name, path.name) in elsewhere:
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                    text = ast.unparse(node)
                    if not re.search(r"\bpart\b", text):
                        found.append(f"{path.name}: {text}")
    assert found == []
    assert "part" in inspect.getsource(comparison_view.plot)
