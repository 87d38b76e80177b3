"""The way to a GPU and back, walked on the CPU: a stand-in for CuPy, whose kernels the emulator
runs.

It shows what is handed to CuPy: text, flags, arguments, shared memory, device and stream. What CuPy
makes of it only a GPU can show.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import support
from support import Case, build, check_values

import yoso_core
from yoso_core import backends, gpu, registry
from yoso_core.gpu import emulator
from yoso_core.gpu.cupy_kernels import cuda

CASE = Case(9, 11, 20, 12, 5, 8, mask="masked")
ROWS = [kernel for kernel in registry.KERNELS if kernel.where == "cupy"]


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


def stand_in() -> ModuleType:
    cupy = ModuleType("cupy")
    vars(cupy).update(
        {name: getattr(np, name) for name in ("ascontiguousarray", "broadcast_to", "isnan", "where")},
        ndarray=OnDevice,
        asarray=lambda x: np.array(x).view(OnDevice),
        ascontiguousarray=lambda x: np.ascontiguousarray(x).view(OnDevice),
        empty=lambda shape, dtype: np.empty(shape, dtype).view(OnDevice),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(OnDevice),
        RawModule=RawModule,
    )
    stream = SimpleNamespace(ptr=0)
    here = type("Device", (), {"id": 0})
    cupy.cuda = SimpleNamespace(Device=lambda index=None: here if index is None else device(index), get_current_stream=lambda: stream)  # type: ignore[attr-defined]
    return cupy


@pytest.fixture(autouse=True)
def with_the_stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    support.need("emulated")
    found = {where: backends.missing(where) for where in backends.BACKENDS} | {"cupy": None, "numba_cuda": "not in this test"}
    monkeypatch.setattr(backends, "missing", found.get)
    monkeypatch.setitem(sys.modules, "cupy", stand_in())
    RawModule.made.clear()
    caches = (cuda._limits, cuda._module, cuda._function)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("kernel", ROWS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_numpy_arrays_go_there_and_back(kernel: registry.Kernel) -> None:
    case = replace(CASE, hash_code_len=5, oversample=2) if kernel.op == "smooth_table" else CASE
    given = {name: support.as_dtype(x, "float32") for name, x in build(kernel.op, case).items()}
    with gpu.launches() as made:
        outs = support.as_tuple(getattr(yoso_core, kernel.op)(**given, variant=kernel.name))
    assert all(type(out) is np.ndarray for out in outs)
    check_values(kernel.op, [support.as_float64(out) for out in outs], case)
    assert {launch.where for launch in made if launch.where != "emulated"} == {"cupy"}
    assert {launch.kernel for launch in made} <= set(kernel.kernels)


def test_a_file_is_compiled_once_for_each_set_of_macros() -> None:
    given = {name: support.as_dtype(x, "float32") for name, x in build("lsh_cumulation", CASE).items()}
    for _ in range(3):
        yoso_core.lsh_cumulation(**given, variant="cupy:sorted_buckets")
    assert len(RawModule.made) == 2, "sort.cu and cumulation.cu"
    yoso_core.lsh_cumulation(**{**given, "value": given["value"].astype(np.float16)}, variant="cupy:sorted_buckets")
    assert len(RawModule.made) == 3


def test_cpu_tensors_are_not_copied_in_silence() -> None:
    import torch

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
