"""The way to a GPU and back, walked on the CPU: stand-ins for CuPy, whose kernels the emulator
runs, and for the tensors and streams of torch on a GPU.

They show what is handed to CuPy: text, flags, arguments, shared memory, device and stream; and
which stream waits for which. What CuPy makes of it only a GPU can show.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support
import test_gpu
import torch
from support import Case, build, check_values

import yoso_core
from yoso_core import backends, gpu, registry
from yoso_core.gpu import emulator
from yoso_core.gpu.cupy_kernels import cuda, source

CASE = Case(9, 11, 20, 12, 5, 8, mask="masked")
ROWS = [kernel for kernel in registry.KERNELS if kernel.where == "cupy"]


class CudaError(RuntimeError):
    """What the driver refuses."""


class Gpu:
    """The streams of a GPU: what is queued on each of them, in order, and what the driver refuses
    while one is captured into a graph.
    """

    def __init__(self) -> None:
        self.of_torch = self.of_cupy = 0
        """The current stream of each library; 0 is the NULL stream."""
        self.allocator: Any = None
        """CuPy's; ``None`` is its own pool."""
        self.captured: int | None = None
        self.queued: list[tuple[str, int]] = []

    def queue(self, what: str, stream: int) -> None:
        if stream == 0 and self.captured is not None:
            raise CudaError(f"cudaErrorStreamCaptureImplicit: {what} on the NULL stream while a stream is captured")
        self.queued.append((what, stream))

    def hand_over(self, producer: int, consumer: int) -> None:
        """What DLPack asks for: the consumer's stream waits for the producer's."""
        if producer != consumer:
            self.queue("event", producer)
            if consumer == self.captured:
                raise CudaError("cudaErrorStreamCaptureIsolation: the captured stream waits for another")
            self.queue("wait", consumer)


GPU = Gpu()


class OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU. Its numbers are on the CPU."""

    device = torch.device("cuda:0")  # type: ignore[assignment]
    is_cuda = True

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def on_cuda(x: Any) -> Any:
    return torch.as_tensor(x).as_subclass(OnCuda) if isinstance(x, np.ndarray | torch.Tensor) else x


class OnDevice(np.ndarray[Any, Any]):
    """An array that has to be fetched, as CuPy's has."""

    def get(self) -> np.ndarray[Any, Any]:
        return np.asarray(self)


class Function:
    def __init__(self, module: "RawModule", name: str) -> None:
        self.module, self.name, self.max_dynamic_shared_size_bytes = module, name, 48 << 10

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], shared_mem: int) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes, "more shared memory than was opted in to"
        assert all(isinstance(x, OnDevice | np.generic) for x in args), "CuPy takes arrays and NumPy scalars"
        GPU.queue(self.name, GPU.of_cupy)
        text = gpu.KernelText(self.module.code, self.name, self.module.defines)
        device = emulator.Emulator()
        device.launch(text, grid, block, [None if isinstance(x, np.uint64) else x for x in args], shared_mem)


class RawModule:
    made: list["RawModule"] = []  # noqa: RUF012

    def __init__(self, code: str, options: tuple[str, ...], backend: str, name_expressions: tuple[str, ...] | None) -> None:
        assert backend == "nvrtc"
        assert "#include" not in code, "NVRTC finds no header"
        assert options[0] == "--std=c++17"
        self.names = name_expressions
        self.code, self.defines = code, tuple(tuple(flag[2:].split("=")) for flag in options[1:])
        RawModule.made.append(self)

    def get_function(self, name: str) -> Function:
        assert 'extern "C"' in self.code or name in (self.names or ()), "C++ has mangled the name"
        return Function(self, name)


@contextmanager
def device(index: int = 0) -> Iterator[Any]:
    yield SimpleNamespace(attributes={"MaxSharedMemoryPerBlockOptin": 227 << 10}, mem_info=(0, 1 << 30))


@contextmanager
def external_stream(stream: Any) -> Iterator[Any]:
    """torch's stream as CuPy's own."""
    before, GPU.of_cupy = GPU.of_cupy, stream.__cuda_stream__()[1]
    yield SimpleNamespace(ptr=GPU.of_cupy)
    GPU.of_cupy = before


@contextmanager
def using_allocator(allocate: Any) -> Iterator[None]:
    before, GPU.allocator = GPU.allocator, allocate
    yield
    GPU.allocator = before


def memory(size: int) -> Any:
    return np.zeros(size, np.uint8) if GPU.allocator is None else GPU.allocator(size).cpu().numpy()


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=int))
    return memory(size)[:size].view(dtype).reshape(shape).view(OnDevice)


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    GPU.queue("memset", GPU.of_cupy)
    made = empty(shape, dtype)
    made[...] = 0
    return made


def to_cupy(x: torch.Tensor) -> Any:
    GPU.hand_over(producer=GPU.of_torch, consumer=GPU.of_cupy)
    return x.cpu().numpy().view(OnDevice)


def to_torch(x: Any) -> Any:
    GPU.hand_over(producer=GPU.of_cupy, consumer=GPU.of_torch)
    return on_cuda(np.asarray(x))


def stand_in() -> ModuleType:
    cupy = ModuleType("cupy")
    vars(cupy).update(
        {name: getattr(np, name) for name in ("broadcast_to", "isnan", "where")},
        ndarray=OnDevice,
        asarray=lambda x: np.array(x).view(OnDevice),
        ascontiguousarray=lambda x: np.ascontiguousarray(x).view(OnDevice),
        empty=empty,
        zeros=zeros,
        from_dlpack=to_cupy,
        RawModule=RawModule,
        cuda=SimpleNamespace(
            Device=lambda index=None: type("Device", (), {"id": 0}) if index is None else device(index),
            Stream=SimpleNamespace(from_external=external_stream),
            get_current_stream=lambda: SimpleNamespace(ptr=GPU.of_cupy),
            using_allocator=using_allocator,
            UnownedMemory=lambda pointer, size, owner, index: owner,
            MemoryPointer=lambda memory, offset: memory,
        ),
    )
    return cupy


def give_torch_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    make = torch.empty

    def on_its_device(*size: Any, device: Any = None, **options: Any) -> Any:
        made = make(*size, **options)
        return made if device is None else on_cuda(made)

    monkeypatch.setattr(torch, "empty", on_its_device)
    monkeypatch.setattr(torch, "from_dlpack", to_torch)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=GPU.of_torch))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", on_cuda)


@pytest.fixture(autouse=True)
def with_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    support.need("emulated")
    found = {where: backends.missing(where) for where in backends.BACKENDS} | {"cupy": None, "numba_cuda": "not in this test"}
    monkeypatch.setattr(backends, "missing", found.get)
    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    give_torch_a_gpu(monkeypatch)
    monkeypatch.setitem(globals(), "GPU", Gpu())
    RawModule.made.clear()
    caches = (cuda._limits, cuda._module, cuda._function)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


each_row = pytest.mark.parametrize("kernel", ROWS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")


def case_of(kernel: registry.Kernel) -> Case:
    return replace(CASE, hash_code_len=5, oversample=2) if kernel.op == "smooth_table" else CASE


def arrays_for(kernel: registry.Kernel) -> dict[str, Any]:
    return {name: support.as_dtype(x, "float32") for name, x in build(kernel.op, case_of(kernel)).items()}


@each_row
def test_numpy_arrays_go_there_and_back(kernel: registry.Kernel) -> None:
    case = case_of(kernel)
    with gpu.launches() as made:
        outs = support.as_tuple(getattr(yoso_core, kernel.op)(**arrays_for(kernel), variant=kernel.name))
    assert all(type(out) is np.ndarray for out in outs)
    check_values(kernel.op, [support.as_float64(out) for out in outs], case)
    assert {launch.where for launch in made if launch.where != "emulated"} == {"cupy"}
    assert {launch.kernel for launch in made} <= set(kernel.kernels)


@each_row
def test_a_cuda_graph_captures_every_launch_and_no_wait(kernel: registry.Kernel) -> None:
    """For tensors on the caller's stream nothing is queued on another, and no stream waits."""
    given = {name: on_cuda(x) for name, x in arrays_for(kernel).items()}
    GPU.of_torch = GPU.captured = 7
    outs = support.as_tuple(getattr(yoso_core, kernel.op)(**given, variant=kernel.name))
    assert all(isinstance(out, OnCuda) for out in outs)
    check_values(kernel.op, [support.as_float64(out.cpu()) for out in outs], case_of(kernel))
    assert {what for what, _ in GPU.queued} <= {*kernel.kernels, "memset"}
    assert {stream for _, stream in GPU.queued} == {7}


@each_row
def test_the_check_of_the_registry_takes_bfloat16(kernel: registry.Kernel) -> None:
    """Which is there as tensors alone: they have to be on the GPU."""
    support.check_variant(kernel.op, kernel.name, replace(case_of(kernel), dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_check_of_the_registry_sees_what_no_thread_writes(dtype: str) -> None:
    """On a GPU fresh memory holds anything, often what the call before has written there."""
    launcher = next(row for row in ROWS if row.name == "cupy:sorted_buckets").load()

    def lsh_cumulation(device: Any, *args: Any, **masks: Any) -> Any:
        right = launcher(device, *args, **masks)
        out = device.empty(right.shape, right.dtype)
        out[..., :-1, :] = right[..., :-1, :]
        return out

    case = replace(CASE, n_k=0, dtype=dtype)  # all zeros: fresh memory may well hold that
    mine = registry.register("lsh_cumulation", "mine", gpu.CudaVariant(lsh_cumulation), where="cupy")
    with mine, pytest.raises(AssertionError, match="an element was not written"):
        support.check_variant("lsh_cumulation", "mine", case)


def test_the_stand_in_knows_what_a_capture_forbids() -> None:
    """A result that is handed over after the caller's stream was left: the fault itself."""
    GPU.of_torch = 7
    to_torch(np.zeros(3))
    assert GPU.queued == [("event", 0), ("wait", 7)], "the side stream waits for the default stream"
    GPU.captured = 7
    with pytest.raises(CudaError, match="StreamCaptureImplicit"):
        to_torch(np.zeros(3))
    GPU.of_cupy = 3
    with pytest.raises(CudaError, match="StreamCaptureIsolation"):
        to_torch(np.zeros(3))


@pytest.mark.parametrize("n", [4096, 16384])
def test_a_sampled_backward_makes_few_launches(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the host some 40 microseconds. Nothing runs: the sizes are those of a model."""
    monkeypatch.setattr(Function, "__call__", lambda self, *launch, **shared: GPU.queue(self.name, GPU.of_cupy))
    of_heads = {"grad_out": 64, "query": 64, "key": 64, "value": 64, "query_hash_code": 32, "key_hash_code": 32}
    dtypes = {name: np.int32 if name.endswith("code") else np.float16 for name in of_heads}
    given = {name: np.zeros((1, 12, n, last), dtypes[name]) for name, last in of_heads.items()}
    with gpu.launches() as made:
        yoso_core.lsh_attention_backward(**given, hash_code_len=8, validate=False, variant="cupy:outer_products")
    kernels = [launch.kernel for launch in made]
    assert len(kernels) <= 20
    assert kernels.count("outer_products") == 2


SANITIZER = """#!{python}
import os, subprocess, sys
print(os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"], *sys.argv[1:-3], flush=True)
sys.exit(subprocess.run(sys.argv[-3:]).returncode and 9)
"""


def test_the_sanitizer_is_told_what_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for NVIDIA's sanitizer runs the program, as that does."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=sys.executable), "utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    done = test_gpu.under_the_sanitizer("racecheck", "import pathlib; print(pathlib.Path('test_gpu.py').exists())")
    assert done.stdout.splitlines() == ["1 --tool racecheck --report-api-errors no --error-exitcode 9", "True"]
    assert done.returncode == 0
    assert test_gpu.under_the_sanitizer("memcheck", "raise ValueError").returncode == 9
    rows = {(kernel.op, kernel.name) for kernel in registry.KERNELS}
    assert len(test_gpu.SANITIZED) == 6
    assert set(test_gpu.SANITIZED) <= rows
    compile(test_gpu.RUN_SANITIZED, "sanitized", "exec")


def test_a_kernel_is_compiled_once_for_each_set_of_macros_and_alone(caplog: pytest.LogCaptureFixture) -> None:
    given = {name: support.as_dtype(x, "float32") for name, x in build("lsh_cumulation", CASE).items()}
    for _ in range(3):
        yoso_core.lsh_cumulation(**given, variant="cupy:sorted_buckets")
    assert [source.KERNEL.findall(made.code) for made in RawModule.made] == [
        ["transpose_codes"],
        ["sort_codes"],
        ["sum_buckets"],
        ["gather_buckets"],
    ]
    with caplog.at_level("INFO", logger="yoso_core"):
        yoso_core.lsh_cumulation(**{**given, "value": given["value"].astype(np.float16)}, variant="cupy:sorted_buckets")
    assert len(RawModule.made) == 6
    assert [message.partition(": compiled")[0] for message in caplog.messages] == [
        f"{name} of cumulation.cu (VALUE=float16 OUT=float16)" for name in ("sum_buckets", "gather_buckets")
    ]


def test_cpu_tensors_are_not_copied_in_silence() -> None:
    given = {name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for name, x in build("fast_hash", CASE).items()}
    with pytest.raises(ValueError, match=r"^variant: cupy:warp_per_vector of fast_hash runs on the cuda, the arrays are on cpu$"):
        yoso_core.fast_hash(**given, variant="cupy:warp_per_vector")


def test_unnamed_numpy_arrays_stay_on_the_cpu() -> None:
    with gpu.launches() as made:
        yoso_core.fast_hash(**build("fast_hash", CASE))
    assert made == []


SCALED = """
#include "common.cuh"
__global__ void scaled(const VALUE* x, VALUE* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = narrow<VALUE>(widen(x[i]) * ACC(FACTOR));
}
"""


@pytest.mark.parametrize("linkage", ["", 'extern "C" '], ids=["mangled", "extern-C"])
def test_a_text_is_launched_beside_the_files(linkage: str) -> None:
    device = cuda.CupyDevice(0, 0)
    x, y = device.xp.asarray(np.arange(5, dtype=np.float32)), device.empty((5,), np.float32)
    text = SCALED.replace("__global__", linkage + "__global__")
    for factor in (3, 3, -2):
        kernel = gpu.KernelText(text, "scaled", (("VALUE", "float"), ("FACTOR", factor)))
        with gpu.launches() as made:
            device.launch(kernel, (1,), (32,), (x, y, np.int32(5)), 64)
        np.testing.assert_array_equal(y, factor * x)
        assert gpu.Launch("cupy", "scaled", (1,), (32,), 64) in made
    assert len(RawModule.made) == 2, "one for each set of macros"
    named = {"x": x, "y": y, "n": np.int32(5)}
    device.launch(kernel, (1,), (32,), named)
    with pytest.raises(TypeError, match=r"^args: scaled has the parameters x, y, n, got n, y, x$"):
        device.launch(kernel, (1,), (32,), dict(reversed(named.items())))
