"""What only a GPU can show: arrays without copies, streams, graphs, repeatability, and NVIDIA's own
sanitizer.

That every variant is right there is in test_registry.py, with the others.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import Case, as_dtype, as_float64, as_tuple, build, check_values

import yoso_core
from yoso_core import backends, gpu, registry
from yoso_core.arrays import Caller

pytestmark = pytest.mark.gpu

CASE = Case(137, 63, 64, 48, 7, 8, mask="masked", leading=(2, 3))
KERNELS = [kernel for kernel in registry.KERNELS if kernel.backend.device == "cuda"]
DETERMINISTIC = [kernel for kernel in KERNELS if kernel.deterministic]


def each(kernels: list[registry.Kernel]) -> Any:
    return pytest.mark.parametrize("kernel", kernels, ids=lambda kernel: f"{kernel.op}-{kernel.name}")


@pytest.fixture(autouse=True)
def needs_a_gpu(request: pytest.FixtureRequest) -> None:
    kernel = request.node.callspec.params.get("kernel") if hasattr(request.node, "callspec") else None
    if reason := backends.missing(kernel.where if kernel else "cupy"):
        pytest.skip(reason)
    if not torch.cuda.is_available():
        pytest.skip("this build of torch has no CUDA")


def on_gpu(op: str, case: Case = CASE, dtype: str = "float32") -> dict[str, Any]:
    def tensor(x: Any) -> Any:
        x = as_dtype(x, dtype)
        return torch.as_tensor(x).cuda() if isinstance(x, np.ndarray | torch.Tensor) else x

    unchecked = {"validate": False} if op.startswith("lsh_") else {}
    return {name: tensor(x) for name, x in build(op, replace(case, dtype=dtype)).items()} | unchecked


def check(op: str, out: Any, case: Case = CASE, dtype: str = "float32") -> None:
    check_values(op, [as_float64(x.cpu()) for x in as_tuple(out)], replace(case, dtype=dtype))


@each(KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_stay_on_the_gpu(kernel: registry.Kernel, dtype: str) -> None:
    given = on_gpu(kernel.op, dtype=dtype)
    out = getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
    assert all(isinstance(x, torch.Tensor) and x.is_cuda for x in as_tuple(out))
    case = Case(**{**vars(CASE), "dtype": dtype})
    check(kernel.op, out, case, dtype)


@each(KERNELS)
def test_cupy_arrays_come_back(kernel: registry.Kernel) -> None:
    import cupy

    given = {name: cupy.from_dlpack(x.view(torch.uint8) if x.dtype == torch.bool else x) if isinstance(x, torch.Tensor) else x
             for name, x in on_gpu(kernel.op).items()}  # fmt: skip
    out = getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
    assert all(isinstance(x, cupy.ndarray) for x in as_tuple(out))
    check(kernel.op, tuple(map(torch.from_dlpack, as_tuple(out))))


@each(KERNELS)
def test_numpy_arrays_are_copied_there_and_back(kernel: registry.Kernel) -> None:
    given = {name: as_dtype(x, "float32") for name, x in build(kernel.op, CASE).items()}
    out = getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
    assert all(isinstance(x, np.ndarray) for x in as_tuple(out))
    check(kernel.op, tuple(map(torch.from_numpy, as_tuple(out))))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dlpack_shares_memory_both_ways(dtype: str) -> None:
    x = torch.ones(3, 4, dtype=getattr(torch, dtype), device="cuda")
    caller = Caller("torch", str(x.device))
    view = backends._cupy_view(caller)(x)
    assert view.data.ptr == x.data_ptr()
    assert backends._back_from_cupy(caller, view, None).data_ptr() == x.data_ptr()


@each(DETERMINISTIC)
def test_the_same_bits_every_time(kernel: registry.Kernel) -> None:
    case = Case(4097, 4097, 64, 64, 7, 8, mask="masked", kind="repeated")
    given = on_gpu(kernel.op, case)
    first = getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
    for _ in range(5):
        again = getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
        for x, y in zip(as_tuple(again), as_tuple(first), strict=True):
            assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@each(KERNELS)
def test_a_graph_replays_with_new_numbers(kernel: registry.Kernel) -> None:
    given, run = on_gpu(kernel.op), getattr(yoso_core, kernel.op)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run(**given, variant=kernel.name)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = run(**given, variant=kernel.name)
    for name in ("value", "vectors"):
        if name in given:
            given[name].mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    expected = run(**given, variant=kernel.name)
    torch.testing.assert_close(out, expected, equal_nan=True)


@each(KERNELS)
def test_two_streams_do_not_mix(kernel: registry.Kernel) -> None:
    given, run = on_gpu(kernel.op), getattr(yoso_core, kernel.op)
    outs = []
    torch.cuda.synchronize()
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            outs.append(run(**given, variant=kernel.name))
    torch.cuda.synchronize()
    for out in outs:
        check(kernel.op, out)


@each(KERNELS)
def test_the_kernel_named_is_the_kernel_that_ran(kernel: registry.Kernel) -> None:
    with gpu.launches() as made:
        getattr(yoso_core, kernel.op)(**on_gpu(kernel.op), variant=kernel.name)
    assert {launch.where for launch in made} == {kernel.where}
    assert {launch.kernel for launch in made} <= set(kernel.kernels)


def test_unnamed_the_gpu_does_it() -> None:
    given = on_gpu("yoso_attention")
    with gpu.launches() as made:
        out = yoso_core.yoso_attention(**given)
    assert out.is_cuda
    assert {launch.where for launch in made} == {"cupy"}


def test_a_launch_error_is_raised_at_the_call() -> None:
    from yoso_core.gpu.cupy_kernels.cuda import CupyDevice

    device = CupyDevice(0, 0)
    with pytest.raises(Exception, match=r"INVALID_VALUE|invalid argument"):
        device.launch(gpu.CudaKernel("sort.cu", "sort_codes"), (1,), (4096,), (None, None, None, None, *[np.int32(0)] * 3))


def test_a_text_of_ones_own_runs() -> None:
    import cupy

    from yoso_core.gpu.cupy_kernels.cuda import CupyDevice

    text = "__global__ void scale(float* x) { x[threadIdx.x] *= FACTOR; }"
    for linkage in ("", 'extern "C" '):
        x = cupy.arange(32, dtype=np.float32)
        CupyDevice(0, 0).launch(gpu.KernelText(linkage + text, "scale", (("FACTOR", 3),)), (1,), (32,), (x,))
        np.testing.assert_array_equal(x.get(), 3 * np.arange(32))


def test_devices_do_not_mix() -> None:
    given = on_gpu("lsh_cumulation")
    with pytest.raises(ValueError, match=r"^value: on cpu, but query_hash_code is on cuda:0"):
        yoso_core.lsh_cumulation(**{**given, "value": given["value"].cpu()})
    with pytest.raises(ValueError, match=r"^variant: cpu:tables of lsh_cumulation runs on the cpu, the arrays are on cuda:0"):
        yoso_core.lsh_cumulation(**given, variant="cpu:tables")


SANITIZED = (
    ("fast_hash", "cupy:warp_per_vector"),  # shuffles, and bits collected in shared memory
    ("lsh_cumulation", "cupy:shared_table"),  # a column to a thread, without a barrier
    ("lsh_cumulation", "cupy:sorted_buckets"),  # the sort, and buckets across blocks
    ("lsh_cumulation", "numba_cuda:shared_table"),
    ("lsh_attention_backward", "cupy:outer_products"),  # blocks that wait for each other, tiles between barriers
    ("expectation_attention_backward", "cupy:blocked"),  # tiles for pairs
)
"""One variant of each way in which threads work together: every process under a tool takes half a
minute to start, so all of them share one.
"""

RUN_SANITIZED = """
import test_gpu, yoso_core
from yoso_core import backends
for op, name in test_gpu.SANITIZED:
    if not backends.missing(name.partition(":")[0]):
        print(op, name, flush=True)
        test_gpu.check(op, getattr(yoso_core, op)(**test_gpu.on_gpu(op), variant=name))
"""


def under_the_sanitizer(tool: str, program: str = RUN_SANITIZED) -> subprocess.CompletedProcess[str]:
    """The program under a tool of NVIDIA's sanitizer; exit status 9 if that finds something.

    Errors of the API are none of the kernels': CuPy and torch ask on purpose for what may not be
    there. Every tensor is an allocation of its own: within a block of torch's cache nothing is out
    of bounds.
    """
    command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", program]
    alone = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, env=alone, timeout=900)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_compute_sanitizer_finds_nothing(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not installed")
    done = under_the_sanitizer(tool)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(name in done.stdout for _, name in SANITIZED if not backends.missing(name.partition(":")[0]))
