"""The cooperative stepper, by faults that it must report; and the Numba CUDA kernels: stepped,
simulated by Numba, and compiled to PTX.
"""

import importlib.metadata
import inspect
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numba import cuda, float32, int32
from support import Case, as_dtype, build, check_values

from yoso_core import reference
from yoso_core.gpu import emulator
from yoso_core.gpu.device import DoesNotFit, launches
from yoso_core.gpu.emulator import stepper
from yoso_core.gpu.emulator.stepper import Stepper
from yoso_core.gpu.numba_kernels import arrays, cumulation, hashing, smoothing, weighted
from yoso_core.gpu.numba_kernels.cumulation import lsh_cumulation_global_table, lsh_cumulation_shared_table
from yoso_core.gpu.numba_kernels.hashing import fast_hash_shared_memory
from yoso_core.gpu.numba_kernels.smoothing import smooth_table_spheres
from yoso_core.gpu.numba_kernels.weighted import lsh_weighted_cumulation_weight_by_weight
from yoso_core.reference.arrays import Array

pytestmark = pytest.mark.skipif(stepper.missing() is not None, reason=f"stepper: {stepper.missing()}")

ORDERS = ("forward", "reverse", 5)


def run(kernel: Any, x: Array, *, grid: tuple[int, ...] = (1,), block: tuple[int, ...] = (8,), shared: int = 24) -> Array:
    """What a kernel of one argument makes of an array."""
    x = x.copy()
    Stepper().launch(kernel, grid, block, (x,), shared)
    return x


# Small kernels with a fault, and their twins without it.


@cuda.jit
def reverses(x):
    buffer = cuda.shared.array(8, float32)
    i = cuda.threadIdx.x
    buffer[i] = x[i]
    cuda.syncthreads()
    x[i] = buffer[cuda.blockDim.x - 1 - i]


@cuda.jit
def reverses_without_a_barrier(x):
    buffer = cuda.shared.array(8, float32)
    i = cuda.threadIdx.x
    buffer[i] = x[i]
    x[i] = buffer[cuda.blockDim.x - 1 - i]


@cuda.jit
def sums_what_it_cleared(x):
    total = cuda.shared.array(1, x.dtype)
    if cuda.threadIdx.x == 0:
        total[0] = 0
    cuda.syncthreads()
    cuda.atomic.add(total, 0, x[cuda.threadIdx.x])
    cuda.syncthreads()
    x[cuda.threadIdx.x] = total[0]


@cuda.jit
def sums_what_it_did_not_clear(x):
    total = cuda.shared.array(1, x.dtype)
    cuda.atomic.add(total, 0, x[cuda.threadIdx.x])
    cuda.syncthreads()
    x[cuda.threadIdx.x] = total[0]


@cuda.jit
def sums_dynamic_memory_that_it_did_not_clear(x):
    total = cuda.shared.array(0, x.dtype)
    cuda.atomic.add(total, 0, x[cuda.threadIdx.x])
    cuda.syncthreads()
    x[cuda.threadIdx.x] = total[0]


@cuda.jit
def all_at_one_barrier(x):
    if cuda.blockIdx.x == 0:  # the whole block goes one way
        cuda.syncthreads()
    else:
        cuda.syncthreads()


@cuda.jit
def some_at_another_barrier(x):
    if cuda.threadIdx.x < 2:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


@cuda.jit
def one_ends_after_the_barrier(x):
    cuda.syncthreads()
    if cuda.threadIdx.x == 3:
        return
    x[0] = 1


@cuda.jit
def one_ends_before_the_barrier(x):
    if cuda.threadIdx.x == 3:
        return
    cuda.syncthreads()


@cuda.jit
def gives_the_lock_back(x):
    while cuda.atomic.cas(x, 0, 0, 1) != 0:
        pass
    cuda.atomic.exch(x, 0, 0)
    cuda.syncthreads()


@cuda.jit
def keeps_the_lock_at_a_barrier(x):
    while cuda.atomic.cas(x, 0, 0, 1) != 0:
        pass
    cuda.syncthreads()


@cuda.jit
def stays_inside(x):
    shared = cuda.shared.array(8, int32)
    dynamic = cuda.shared.array(0, int32)
    own = cuda.local.array((2, 2), int32)
    own[1, 1] = cuda.threadIdx.x
    shared[own[1, 1]] = x[7]
    dynamic[5] = 1


@cuda.jit
def index_minus_one(x):
    x[cuda.threadIdx.x - 1] = 1


@cuda.jit
def index_beyond_the_end(x):
    x[0] = x[cuda.threadIdx.x + 1]


@cuda.jit
def beyond_a_shared_array(x):
    shared = cuda.shared.array(7, int32)
    shared[cuda.threadIdx.x] = 1


@cuda.jit
def beyond_dynamic_shared_memory(x):
    dynamic = cuda.shared.array(0, int32)
    dynamic[6] = 1


@cuda.jit
def beyond_a_local_array(x):
    own = cuda.local.array((2, 2), int32)
    x[0] = own[1, 2]


@cuda.jit
def too_much_shared_memory(x):
    large = cuda.shared.array((100, 200), float32)
    large[0, 0] = 1


@cuda.jit
def divides_by_zero(x):
    x[0] = 1 // (cuda.threadIdx.x - 2)


@cuda.jit
def warp_intrinsic(x):
    x[0] = cuda.shfl_sync(-1, x[0], 0)


FAULTS: dict[Any, str] = {
    some_at_another_barrier: r"divergent barrier: thread \(\d, 0, 0\) waits at line \d+, and thread \(\d, 0, 0\) waits at line \d+",
    one_ends_before_the_barrier: r"divergent barrier: thread \(\d, 0, 0\) waits at line \d+, and thread \(\d, 0, 0\) has ended without it",
    keeps_the_lock_at_a_barrier: r"never ends: the compare-and-swap at line \d+ never succeeds, while thread .* waits at line \d+",
    index_minus_one: r"IndexError: x: index -1 is out of bounds for the shape \(8,\)",
    index_beyond_the_end: r"IndexError: x: index 8 is out of bounds for the shape \(8,\)",
    beyond_a_shared_array: r"IndexError: the shared array of line \d+: index 7 is out of bounds for the shape \(7,\)",
    beyond_dynamic_shared_memory: r"IndexError: the dynamic shared array of line \d+: index 6 is out of bounds for the shape \(6,\)",
    beyond_a_local_array: r"IndexError: a local array: index \(1, 2\) is out of bounds for the shape \(2, 2\)",
    too_much_shared_memory: r"80,024 bytes of shared memory are needed, a block here has 49,152",
    divides_by_zero: "ZeroDivisionError: integer division or modulo by zero",
    warp_intrinsic: "AttributeError: cuda.shfl_sync: the stepper has barriers, atomics",
}
WITHOUT_FAULT = (all_at_one_barrier, one_ends_after_the_barrier, gives_the_lock_back, stays_inside)


@pytest.mark.parametrize("chosen", ORDERS)
@pytest.mark.parametrize("kernel", FAULTS, ids=lambda kernel: kernel.__name__)
def test_a_fault_is_reported_with_its_place(kernel: Any, chosen: Any) -> None:
    place = r" \(block \(0, 0, 0\), thread \(\d, 0, 0\)(, test_numba_kernels\.py:\d+)?\)$"
    with emulator.order(chosen), pytest.raises(emulator.KernelFault, match=f"^{kernel.__name__}: {FAULTS[kernel]}.*{place}") as fault:
        run(kernel, np.zeros(8, np.int32))
    assert (fault.value.kernel, fault.value.block) == (kernel.__name__, (0, 0, 0))


@pytest.mark.parametrize("chosen", ORDERS)
@pytest.mark.parametrize("kernel", WITHOUT_FAULT, ids=lambda kernel: kernel.__name__)
def test_a_twin_without_fault_runs(kernel: Any, chosen: Any) -> None:
    with emulator.order(chosen):
        run(kernel, np.zeros(8, np.int32), grid=(2,))


def results_in_every_order(kernel: Any) -> list[list[float]]:
    results = []
    for chosen in ORDERS:
        with emulator.order(chosen):
            results.append(run(kernel, np.arange(8, dtype=np.float32)).tolist())
    return results


def test_a_missing_barrier_shows_itself_in_some_order() -> None:
    backwards = list(range(7, -1, -1))
    assert results_in_every_order(reverses) == [backwards] * 3
    assert all(result != backwards for result in results_in_every_order(reverses_without_a_barrier))


def test_shared_memory_that_was_not_initialized_is_nan_and_minus_one() -> None:
    assert results_in_every_order(sums_what_it_cleared) == [[28] * 8] * 3
    for kernel in (sums_what_it_did_not_clear, sums_dynamic_memory_that_it_did_not_clear):
        assert np.isnan(results_in_every_order(kernel)).all()
        assert run(kernel, np.arange(8, dtype=np.int32)).tolist() == [27] * 8


def test_orders_are_what_they_are_called() -> None:
    def notes_its_turn(x, turns):
        x[cuda.atomic.add(turns, 0, 1)] = cuda.grid(1)

    def turns() -> list[int]:
        x = np.empty(6, np.int32)
        Stepper().launch(notes_its_turn, (2,), (3,), (x, np.zeros(1, np.int32)))
        return x.tolist()

    assert turns() == [0, 1, 2, 3, 4, 5]
    with emulator.order("reverse"):
        assert turns() == [5, 4, 3, 2, 1, 0]
    drawn = []
    for seed in range(5):
        with emulator.order(seed):
            drawn.append(turns())
            assert turns() == drawn[-1]
    assert len({tuple(x) for x in drawn}) > 1
    assert all(sorted(x) == [0, 1, 2, 3, 4, 5] for x in drawn)
    with pytest.raises(ValueError, match="order: got 'backward'"), emulator.order("backward"):
        pass


@cuda.jit(device=True)
def doubled_and_synchronized(x):
    cuda.syncthreads()
    return 2 * x


def kernel_from_a_factory(shift: int) -> Any:
    @cuda.jit
    def kernel(x, out, votes):
        i, j = cuda.grid(2)
        n, m = cuda.gridsize(2)
        out[i, j] = doubled_and_synchronized(x[i, j]) + shift + n + m
        out[i][j] += len(x) * 1000
        me = cuda.threadIdx.x + cuda.threadIdx.y * cuda.blockDim.x
        votes[cuda.blockIdx.x, 0] = cuda.syncthreads_count(me < 3)
        votes[cuda.blockIdx.x, 1] = cuda.syncthreads_and(me < 3)
        votes[cuda.blockIdx.x, 2] = cuda.syncthreads_or(me == 3)
        cuda.threadfence()

    return kernel


@pytest.mark.parametrize("chosen", ORDERS)
def test_device_functions_closures_votes_and_grids(chosen: Any) -> None:
    x, out, votes = np.arange(24.0).reshape(4, 6), np.zeros((4, 6)), np.zeros((2, 3), np.int64)
    with emulator.order(chosen):
        Stepper().launch(kernel_from_a_factory(5), (2, 2), (2, 3), (x, out, votes))
    np.testing.assert_array_equal(out, 2 * x + 5 + 4 + 6 + 4000)
    assert votes.tolist() == [[3, 0, 1]] * 2


def test_atomics() -> None:
    def kernel(x, old):
        old[0] = cuda.atomic.add(x, 0, 5)
        old[1] = cuda.atomic.sub(x, 1, 5)
        old[2] = cuda.atomic.max(x, 2, 5)
        old[3] = cuda.atomic.min(x, 3, 5)
        old[4] = cuda.atomic.and_(x, 4, 5)
        old[5] = cuda.atomic.or_(x, 5, 5)
        old[6] = cuda.atomic.xor(x, 6, 5)
        old[7] = cuda.atomic.exch(x, 7, 5)
        old[8] = cuda.atomic.cas(x, 8, 3, 5)
        old[9] = cuda.atomic.compare_and_swap(x, 8, 1)  # of entry 0

    x, old = np.full(9, 3, np.int32), np.zeros(10, np.int32)
    Stepper().launch(kernel, (1,), (1,), (x, old))
    assert x.tolist() == [1, -2, 5, 3, 1, 7, 6, 5, 5]
    assert old.tolist() == [3] * 9 + [8]


def test_float32_stays_float32() -> None:
    def kernel(x, third):
        total = x.dtype.type(0)
        for i in range(x.shape[0]):
            total += x[i] * third
        x[0] = total

    x = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    expected = np.float32(0)
    for entry in x:
        expected += entry * np.float32(1 / 3)
    assert run_with(kernel, x, np.float32(1 / 3))[0] == expected
    assert np.isinf(run_with(kernel, np.full(100, 3e38, np.float32), np.float32(1))[0])  # and no warning


def run_with(kernel: Any, x: Array, *numbers: Any) -> Array:
    Stepper().launch(kernel, (1,), (1,), (x, *numbers))
    return x


def test_two_python_threads_step_at_once_and_globals_stay() -> None:
    results: dict[int, Array] = {}

    def work(i: int) -> None:
        for _ in range(20):
            results[i] = run(reverses, np.arange(8, dtype=np.float32) + i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert reverses.py_func.__globals__["cuda"] is cuda
        workers[0].join(0.001)
    for i, result in results.items():
        assert result.tolist() == [7 + i - j for j in range(8)]
    assert sorted(results) == [0, 1, 2, 3]


def test_a_launch_that_a_gpu_would_refuse_is_refused() -> None:
    x = np.zeros(8, np.float32)
    launch = Stepper().launch
    with pytest.raises(emulator.KernelFault, match=r"reverses: invalid launch: grid \(0,\)"):
        launch(reverses, (0,), (8,), (x,))
    with pytest.raises(emulator.KernelFault, match=r"invalid launch: grid \(1, 65536\)"):
        launch(reverses, (1, 65_536), (8,), (x,))
    with pytest.raises(emulator.KernelFault, match="1056 threads, 1024 is the most"):
        launch(reverses, (1,), (32, 33), (x,))
    with pytest.raises(emulator.KernelFault, match="49153 bytes of dynamic shared memory, a block here has 49152"):
        launch(reverses, (1,), (8,), (x,), 49_153)
    with pytest.raises(TypeError, match=r"^args: reverses has the parameters x, got y$"):
        Stepper().launch(reverses, (1,), (4,), {"y": np.zeros(4)})
    with pytest.raises(TypeError, match="args: reverses takes 1 arguments, got 2"):
        launch(reverses, (1,), (8,), (x, x))
    with pytest.raises(TypeError, match="x: a Numba kernel takes arrays and numbers, got NoneType"):
        launch(reverses, (1,), (8,), (None,))
    with launches() as made:
        launch(reverses, (1,), (8,), (x,), 16)
    assert [(launch.where, launch.kernel, launch.grid, launch.block, launch.shared) for launch in made] == [
        ("stepped", "reverses", (1, 1, 1), (8, 1, 1), 16)
    ]


def test_trace_tells_lines_and_shared_memory_at_barriers() -> None:
    x, before = np.arange(8, dtype=np.float32), sys.gettrace()
    steps = Stepper().trace(reverses, (1,), (8,), (x,))
    assert x.tolist() == list(range(7, -1, -1))
    assert sys.gettrace() is before
    (barrier,) = (i for i, step in enumerate(steps) if step.thread is None)
    assert steps[barrier].text == "cuda.syncthreads()"
    assert {name: values.tolist() for name, values in steps[barrier].shared.items()} == {"buffer": list(range(8))}
    assert [(step.thread, step.text) for step in steps[:5]] == [
        ((0, 0, 0), "buffer = cuda.shared.array(8, float32)"),
        ((0, 0, 0), "i = cuda.threadIdx.x"),
        ((0, 0, 0), "buffer[i] = x[i]"),
        ((0, 0, 0), "cuda.syncthreads()"),
        ((1, 0, 0), "buffer = cuda.shared.array(8, float32)"),
    ]
    assert [step.text for step in steps[barrier + 1 :]] == ["x[i] = buffer[cuda.blockDim.x - 1 - i]"] * 8


def test_missing_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stepper.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "greenlet" else object())
    assert stepper.missing() == "the package 'greenlet' is not installed: pip install greenlet"


# The kernels against the reference.


def as_device(x: Any) -> Any:
    """As a launcher gets it: bfloat16 as its bits."""
    if not isinstance(x, torch.Tensor):
        return x
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def check(launcher: Callable[..., Array], op: str, case: Case, device: Stepper | None = None) -> Array:
    """Assert that a launcher computes what the definition does; return what it computed, as a
    device has it.
    """
    inputs = {name: as_dtype(x, case.dtype) for name, x in build(op, case).items()}
    given = {name: as_device(x) for name, x in inputs.items()}
    kept = {name: x.copy() for name, x in given.items() if isinstance(x, np.ndarray)}
    got = launcher(device or Stepper(), **given)
    for name, x in kept.items():
        np.testing.assert_array_equal(given[name], x, f"{name} was changed")
    if op == "fast_hash":
        assert (got.dtype, got.shape) == (np.int32, (*given["vectors"].shape[:-1], case.num_hash))
    elif op == "smooth_table":
        assert (got.dtype, got.shape) == (given["table"].dtype, given["table"].shape)
    else:
        assert (got.dtype, got.shape) == (given["value"].dtype, (*given["query_hash_code"].shape[:-1], case.d_v))
    widened = (got.astype(np.uint32) << 16).view(np.float32) if got.dtype == np.uint16 else got
    check_values(op, [widened if op == "fast_hash" else widened.astype(np.float64)], case)
    return got


HASHES = (
    Case(1, 0, 48, 1, 7, 9),
    Case(1, 63, 48, 1, 7, 9),
    Case(1, 7, 48, 1, 33, 8, leading=(2, 3)),
    Case(1, 7, 1, 1, 7, 13),
    Case(1, 7, 7, 1, 7, 30),
    Case(1, 7, 4, 1, 33, 13, "float64"),
    Case(1, 7, 20, 1, 33, 9, "float64", kind="onehot"),
    Case(1, 7, 64, 1, 1, 1, "float16", kind="quantized"),
    Case(1, 7, 80, 1, 33, 13, "bfloat16"),
    Case(1, 7, 48, 1, 7, 8, kind="1e35"),
    Case(1, 7, 48, 1, 7, 8, "float64", kind="1e35"),
    Case(1, 7, 48, 1, 7, 8, "float64", kind="1e-15"),
    Case(1, 2, 1024, 1, 7, 30, kind="quantized", leading=()),
    Case(1, 1, 1500, 1, 70, 30, leading=()),
)
SUMS = (
    Case(0, 7, 8, 7, 7, 9),
    Case(7, 0, 8, 7, 7, 9),
    Case(1, 1, 1, 1, 1, 1),
    Case(7, 7, 7, 20, 7, 13),
    Case(7, 7, 8, 80, 1, 1, leading=(2, 3), mask="broadcast"),
    Case(63, 63, 8, 7, 7, 9, mask="masked"),
    Case(63, 63, 8, 7, 7, 9, "float64", mask="masked"),
    Case(63, 63, 8, 7, 7, 9, "float16", mask="masked"),
    Case(63, 63, 8, 7, 7, 9, "bfloat16", mask="masked"),
    Case(63, 137, 1, 48, 7, 8, mask="fully"),
    Case(137, 63, 1, 20, 33, 8, "float16"),
    Case(63, 63, 8, 7, 7, 9, kind="repeated", leading=()),
)
UNWEIGHTED = (*SUMS, Case(63, 137, 64, 128, 7, 8), Case(7, 7, 1, 1024, 7, 9, mask="masked"))
TABLES = (
    Case(1, 0, 1, 7, 1, 3),
    Case(1, 0, 1, 1, 1, 1, oversample=1, leading=()),
    Case(1, 0, 1, 40, 1, 1, "bfloat16", oversample=3, leading=()),
    Case(1, 0, 1, 3, 1, 3, "float16", oversample=2, leading=(1, 3)),
    Case(1, 0, 1, 3, 1, 3, "float64", oversample=1, leading=(0, 2)),
)
LAUNCHERS: dict[Callable[..., Array], tuple[str, tuple[Case, ...]]] = {
    fast_hash_shared_memory: ("fast_hash", HASHES),
    lsh_cumulation_global_table: ("lsh_cumulation", UNWEIGHTED),
    lsh_cumulation_shared_table: ("lsh_cumulation", UNWEIGHTED),
    lsh_weighted_cumulation_weight_by_weight: ("lsh_weighted_cumulation", SUMS),
    smooth_table_spheres: ("smooth_table", TABLES),
}


@pytest.mark.parametrize(
    ("launcher", "case"),
    [pytest.param(launcher, case, id=f"{launcher.__name__}-{case}") for launcher, (_, cases) in LAUNCHERS.items() for case in cases],
)
def test_a_kernel_does_what_the_definition_does(launcher: Callable[..., Array], case: Case) -> None:
    check(launcher, LAUNCHERS[launcher][0], case)


IN_EVERY_ORDER = {
    fast_hash_shared_memory: Case(1, 7, 48, 1, 33, 9),
    lsh_cumulation_global_table: Case(20, 33, 8, 40, 7, 4, mask="masked"),
    lsh_cumulation_shared_table: Case(20, 33, 8, 11, 7, 4, mask="masked"),
    lsh_weighted_cumulation_weight_by_weight: Case(20, 33, 5, 7, 3, 4, mask="masked"),
    smooth_table_spheres: Case(1, 0, 1, 7, 1, 2, oversample=2, leading=(2, 3)),
}


@pytest.mark.parametrize("chosen", ORDERS)
@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_a_kernel_is_right_in_every_order(launcher: Callable[..., Array], chosen: Any) -> None:
    with emulator.order(chosen):
        check(launcher, LAUNCHERS[launcher][0], IN_EVERY_ORDER[launcher], Stepper(max_shared=2048, max_table=8192))


def test_the_shared_table_gives_the_same_bits_however_much_memory_there_is() -> None:
    case, seen = Case(33, 63, 1, 11, 7, 4), set()
    for max_shared in (64, 1000, 48 << 10):
        for chosen in ORDERS:
            with emulator.order(chosen):
                seen.add(check(lsh_cumulation_shared_table, "lsh_cumulation", case, Stepper(max_shared=max_shared)).tobytes())
    assert len(seen) == 1


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda launcher: launcher.__name__)
def test_any_strides(launcher: Callable[..., Array]) -> None:
    op, case = LAUNCHERS[launcher][0], IN_EVERY_ORDER[launcher]
    given = build(op, case)
    strided = {name: x.repeat(2, axis=-2)[..., ::2, :] if isinstance(x, np.ndarray) and x.ndim > 2 else x for name, x in given.items()}
    np.testing.assert_array_equal(launcher(Stepper(), **strided), launcher(Stepper(), **given))


@pytest.mark.parametrize("launcher", list(LAUNCHERS)[1:4], ids=lambda launcher: launcher.__name__)
def test_codes_out_of_range_meet_nobody(launcher: Callable[..., Array]) -> None:
    given = build(LAUNCHERS[launcher][0], Case(20, 33, 5, 7, 3, 4))
    wild = {name: given[name].copy() for name in ("query_hash_code", "key_hash_code")}
    for codes, strange in zip(wild.values(), (-1, 16), strict=True):
        codes[:, ::3] = strange
        codes[:, 1::3] = np.iinfo(np.int32).min if strange < 0 else np.iinfo(np.int32).max
    masks = {f"{side}_mask": np.arange(n) % 3 == 2 for side, n in (("query", 20), ("key", 33))}
    masks = {name: mask[None] for name, mask in masks.items()}
    np.testing.assert_array_equal(launcher(Stepper(), **given | wild), launcher(Stepper(), **given | masks))


def test_values_and_weights_that_are_not_finite() -> None:
    rng = np.random.default_rng(0)
    codes = {f"{side}_hash_code": rng.integers(0, 8, size=(1, 20, 2)).astype(np.int32) for side in ("query", "key")}
    value, weight, key_weight = (rng.standard_normal((1, 20, 3)).astype(np.float32) for _ in range(3))
    value[0, 3, 1], value[0, 5] = np.inf, np.nan
    weight[0, 7, 0], key_weight[0, 9, 2] = np.inf, -np.inf
    codes["query_hash_code"][0, 7] = -1  # it meets nobody, and is NaN all the same
    weights = {"query_weight": weight, "key_weight": key_weight}
    for launcher in (lsh_cumulation_global_table, lsh_cumulation_shared_table):
        found = launcher(Stepper(), **codes, value=value, hashtable_capacity=8)
        np.testing.assert_allclose(found, reference.lsh_cumulation_pairs(**codes, value=value, hashtable_capacity=8), rtol=1e-5, atol=1e-6)
        assert not np.isinf(found).any()
        assert np.isnan(found).any()
    found = lsh_weighted_cumulation_weight_by_weight(Stepper(), **codes, **weights, value=value, hashtable_capacity=8)
    expected = reference.lsh_weighted_cumulation_pairs(**codes, **weights, value=value, hashtable_capacity=8)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(found[0, 7]).all()
    no_keys = {"key_hash_code": codes["key_hash_code"][:, :0], "key_weight": key_weight[:, :0], "value": value[:, :0]}
    alone = lsh_weighted_cumulation_weight_by_weight(Stepper(), **codes | weights | no_keys, hashtable_capacity=8)
    assert np.isnan(alone[0, 7]).all()
    assert not np.delete(alone[0], 7, axis=0).any()


def test_what_does_not_fit_is_refused_by_name() -> None:
    given = build("lsh_cumulation", Case(7, 7, 8, 7, 7, 14))
    with pytest.raises(DoesNotFit, match=r"a column of 16384 buckets takes 65,536 bytes of shared memory, a block here has 49,152; the"):
        lsh_cumulation_shared_table(Stepper(), **given | {"value": given["value"].astype(np.float32)})
    with pytest.raises(
        DoesNotFit, match=r"7 hashes of 16384 buckets take 917,504 bytes for one value dim of one head, more than the 1,000"
    ):
        lsh_cumulation_global_table(Stepper(max_table=1000), **given)
    given = build("lsh_weighted_cumulation", Case(7, 7, 8, 7, 7, 14))
    with pytest.raises(DoesNotFit, match="hashtable_capacity: 7 hashes of 16384 buckets"):
        lsh_weighted_cumulation_weight_by_weight(Stepper(max_table=1000), **given)
    given = build("lsh_cumulation", Case(7, 7, 8, 7, 7, 4, oversample=1))
    with pytest.raises(DoesNotFit, match=r"oversample: got 1, but this kernel .*; use the variant global_table"):
        lsh_cumulation_shared_table(Stepper(), **given)
    given = build("smooth_table", Case(1, 0, 1, 7, 1, 4, oversample=1))
    with pytest.raises(DoesNotFit, match=r"table: 2 of shape \(32, 7\), one for each distance, take 3,584 bytes, more than the 1,000"):
        smooth_table_spheres(Stepper(max_table=1000), **given)
    given = build("fast_hash", Case(7, 7, 48, 7, 7, 9))
    with pytest.raises(DoesNotFit, match=r"vectors: d = 48, padded to 64, takes 512 bytes of shared memory, a block here has 256"):
        fast_hash_shared_memory(Stepper(max_shared=256), **given)


def test_huge_and_small_entries_in_one_vector() -> None:
    rng = np.random.default_rng(0)
    for dtype, largest in ((np.float32, 126), (np.float64, 1000)):
        x = (rng.standard_normal((1, 30, 20)) * 2.0 ** rng.integers(-20, largest, size=(1, 30, 1))).astype(dtype)
        x[0, :, 3:] *= dtype(2.0**-20)
        signs = reference.sample_signs(33, 9, 20, rng=1)
        np.testing.assert_array_equal(fast_hash_shared_memory(Stepper(), x, signs, 33, 9), reference.fast_hash(x, signs, 33, 9))


def test_half_types_are_rounded_to_the_nearest_even() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.integers(0, 2**32, size=20_000, dtype=np.uint32), np.arange(0, 2**32, 1 << 15, dtype=np.uint64).astype(np.uint32)]
    )
    x = x.view(np.float32)
    bits = arrays.rounded(Stepper(), x, x.shape, np.uint16)
    found, expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16), torch.from_numpy(x).to(torch.bfloat16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))
    np.testing.assert_array_equal(arrays.rounded(Stepper(), x, x.shape, np.float16), torch.from_numpy(x).to(torch.float16).numpy())
    every = np.arange(2**16, dtype=np.uint16).reshape(1, -1, 1)
    widened = arrays.computed(Stepper(), every)
    np.testing.assert_array_equal(widened, torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy())


# One wrong line in a copy of a kernel: some order must show it.

BARRIER = "cuda.syncthreads()\n"
FAULTY = [
    (hashing, "hash_vectors", f"{BARRIER}                stride //= 2", "stride //= 2"),
    (hashing, "hash_vectors", f"codes[vector, hash] = code\n        {BARRIER}", "codes[vector, hash] = code\n"),
    (hashing, "hash_vectors", "stride = padded_dim // 2", "stride = padded_dim // 4"),
    (hashing, "hash_vectors", "entry[i] > 0", "entry[i] >= 0"),
    (hashing, "hash_vectors", "diagonal, part, i", "diagonal, 0, i"),
    (hashing, "hash_by_chain", f"{BARRIER}            stride //= 2", "stride //= 2"),
    (hashing, "hash_by_chain", f"codes[vector, hash] = code\n        {BARRIER}", "codes[vector, hash] = code\n"),
    (hashing, "hash_by_chain", "bit += 1", "bit += 2"),
    (hashing, "hash_by_chain", "> 0:\n                        code", ">= 0:\n                        code"),
    (cumulation, "add_keys_to_table", "or keep_key[head, key] == 0", ""),
    (cumulation, "add_keys_to_table", "cuda.atomic.add(table, (head, hash, code, offset), v)", "table[head, hash, code, offset] = v"),
    (cumulation, "read_table", "code = query_hash_code[head, query, hash]", "code = query_hash_code[head, query, 0]"),
    (cumulation, "cumulate_in_shared_table", f"table[i] = 0\n        {BARRIER}", "table[i] = 0\n"),
    (cumulation, "cumulate_in_shared_table", f"value[head, key, dim]\n        {BARRIER}", "value[head, key, dim]\n"),
    (cumulation, "cumulate_in_shared_table", f"first_dim + offset] = total\n        {BARRIER}", "first_dim + offset] = total\n"),
    (cumulation, "cumulate_in_shared_table", "keep_key[head, key] != 0 and", ""),
    (cumulation, "cumulate_in_shared_table", "table[i] = 0", "pass"),
    (smoothing, "cross_bit", "range(spheres.shape[0] - 1, 0, -1)", "range(1, spheres.shape[0])"),
    (smoothing, "cross_bit", "low = 2 * pair - pair % (1 << bit)", "low = pair"),
    (smoothing, "weigh_spheres", "number(bits - r + 1)", "number(bits - r)"),
    (weighted, "add_weighted_keys_to_table", "key_weight[head, key, coordinate]", "key_weight[head, key, 0]"),
    (weighted, "read_weighted_table", "query_weight[head, query, coordinate]", "query_weight[head, query, 0]"),
]
LAUNCHER_OF = {
    "hash_vectors": fast_hash_shared_memory,
    "hash_by_chain": fast_hash_shared_memory,
    "add_keys_to_table": lsh_cumulation_global_table,
    "read_table": lsh_cumulation_global_table,
    "cumulate_in_shared_table": lsh_cumulation_shared_table,
    "add_weighted_keys_to_table": lsh_weighted_cumulation_weight_by_weight,
    "read_weighted_table": lsh_weighted_cumulation_weight_by_weight,
    "cross_bit": smooth_table_spheres,
    "weigh_spheres": smooth_table_spheres,
}


def edited(module: ModuleType, kernel: str, old: str, new: str) -> Any:
    source = textwrap.dedent(inspect.getsource(getattr(module, kernel).py_func)).removeprefix("@cuda.jit\n")
    assert source.count(old) == 1
    names = dict(vars(module))
    exec(compile(source.replace(old, new), "an edited copy", "exec"), names)
    return names[kernel]


def right_in_every_order(kernel: str) -> bool:
    launcher = LAUNCHER_OF[kernel]
    hashed = Case(1, 3, 16, 1, 9, 3, kind="quantized")
    if kernel == "hash_by_chain":
        hashed = Case(1, 3, 16, 1, 5, 9, kind="quantized", layout="chained", rotations=3)
    case = hashed if launcher is fast_hash_shared_memory else IN_EVERY_ORDER[launcher]
    try:
        for chosen in ORDERS:
            with emulator.order(chosen):
                check(launcher, LAUNCHERS[launcher][0], case, Stepper(max_shared=2048))
    except (AssertionError, emulator.KernelFault):
        return False
    return True


@pytest.mark.parametrize(("module", "kernel", "old", "new"), FAULTY, ids=[f"{kernel}-{i}" for i, (_, kernel, _, _) in enumerate(FAULTY)])
def test_a_wrong_line_shows(module: ModuleType, kernel: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, faulty = edited(module, kernel, old, old), edited(module, kernel, old, new)
    monkeypatch.setattr(module, kernel, copy)
    assert right_in_every_order(kernel)
    monkeypatch.setattr(module, kernel, faulty)
    assert not right_in_every_order(kernel)


# Other processes: Numba's own simulator, the compiler, a plain import.


def python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


EVERY_LAUNCH = """
    import numpy as np
    from yoso_core import reference
    from yoso_core.gpu.numba_kernels import cumulation, hashing, smoothing, weighted

    rng = np.random.default_rng(0)
    query_code, key_code = (rng.integers(0, 4, size=(2, 3, 2)).astype(np.int32) for _ in range(2))
    value, a, b = (rng.standard_normal((2, 3, 2)) for _ in range(3))
    vectors, signs = rng.standard_normal((2, 3, 8)), reference.sample_signs(3, 3, 8, batch_shape=(2,), layout="paper", rng=1)
    chain = reference.sample_signs(3, 3, 8, batch_shape=(2,), layout="chained", rng=1)

    def every_launch(device, dtype):
        v, w, x = value.astype(dtype), (a.astype(dtype), b.astype(dtype)), vectors.astype(dtype)
        way = {"layout": "paper"}
        yield hashing.fast_hash_shared_memory(device, x, signs, 3, 3, **way), reference.fast_hash(x, signs, 3, 3, **way)
        way = {"layout": "chained"}
        yield hashing.fast_hash_shared_memory(device, x, chain, 3, 3, **way), reference.fast_hash(x, chain, 3, 3, **way)
        exact = reference.lsh_cumulation_pairs(query_code, key_code, v, 4)
        yield cumulation.lsh_cumulation_shared_table(device, query_code, key_code, v, 4), exact
        yield cumulation.lsh_cumulation_global_table(device, query_code, key_code, v, 4), exact
        exact = reference.lsh_weighted_cumulation_pairs(query_code, w[0], key_code, w[1], v, 4)
        yield weighted.lsh_weighted_cumulation_weight_by_weight(device, query_code, w[0], key_code, w[1], v, 4), exact
        exact = reference.smooth_table_pairs(x.swapaxes(1, 2), 2)
        yield smoothing.smooth_table_spheres(device, x.swapaxes(1, 2), 2), exact
        exact = reference.lsh_cumulation_pairs(query_code, key_code, v, 4, oversample=1)
        yield cumulation.lsh_cumulation_global_table(device, query_code, key_code, v, 4, oversample=1), exact
"""

SIMULATED = """
    import itertools
    from numba import config
    from yoso_core.gpu.emulator.stepper import Stepper

    class Simulator(Stepper):
        def launch(self, kernel, grid, block, args, shared=0):
            # It writes all arrays back.
            writable = (np.require(x, requirements="W") if isinstance(x, np.ndarray) else x for x in args.values())
            kernel[tuple(grid), tuple(block), 0, shared](*writable)

    assert config.ENABLE_CUDASIM
    for device, count in ((Simulator(), 3), (Stepper(), 7)):  # the simulator is slow
        for found, exact in itertools.islice(every_launch(device, np.float32), count):
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
            print(type(device).__name__)
"""


@pytest.mark.slow
def test_numbas_own_simulator_agrees_and_the_stepper_works_beside_it() -> None:
    done = python(textwrap.dedent(EVERY_LAUNCH) + textwrap.dedent(SIMULATED), NUMBA_ENABLE_CUDASIM="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Simulator"] * 3 + ["Stepper"] * 7


COMPILED = """
    from numba import cuda, types, typeof
    from yoso_core.gpu.emulator.stepper import Stepper

    ARCHITECTURES = (7, 5), (8, 0), (9, 0), (10, 0)

    class Compiler(Stepper):
        seen = set()

        def launch(self, kernel, grid, block, args, shared=0):
            signature = types.void(*(typeof(np.array(x) if isinstance(x, np.ndarray) else x) for x in args.values()))
            if (kernel, signature) not in self.seen:
                self.seen.add((kernel, signature))
                for major, minor in ARCHITECTURES:
                    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(major, minor))
                    assert f".target sm_{major}{minor}" in ptx
                    assert dtype is np.float64 or ".f64" not in ptx  # no float32 became a double on its way
                    print(kernel.py_func.__name__, dtype.__name__, major, minor)

    for dtype in (np.float32, np.float64):
        for _ in every_launch(Compiler(), dtype):
            pass
"""


@pytest.mark.long
def test_every_kernel_compiles_to_ptx() -> None:
    for package in ("numba-cuda", "nvidia-nvvm", "nvidia-cuda-nvrtc"):
        try:
            importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the compiler is not installed: pip install {package}")
    done = python(textwrap.dedent(EVERY_LAUNCH) + textwrap.dedent(COMPILED), NUMBA_ENABLE_CUDASIM="0")
    assert done.returncode == 0, done.stderr
    compiled = done.stdout.splitlines()
    assert len(compiled) == len(set(compiled)) == len(LAUNCHER_OF) * 2 * 4


def test_importing_the_kernels_needs_no_gpu() -> None:
    done = python("""
        import sys
        from yoso_core.gpu.numba_kernels import cuda, cumulation, hashing, smoothing, weighted
        from yoso_core.gpu.emulator import stepper
        print([name for name in ("cupy", "torch", "greenlet") if name in sys.modules])
    """)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_importing_the_kernels_loads_no_launcher_of_cuda_cpp() -> None:
    for kernels in ("cumulation", "hashing", "smoothing", "weighted"):
        done = python(f"""
            import sys
            import yoso_core.gpu.numba_kernels.{kernels}
            print([name for name in sys.modules if name.startswith("yoso_core.gpu.cupy_kernels")])
        """)
        assert (done.stdout.strip(), done.stderr) == ("[]", "")
