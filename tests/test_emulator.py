"""The emulator of CUDA C++: what it computes, the faults that it must find (each beside a twin
without), and what it counts.
"""

import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Case, as_dtype, build, poisoned_allocations, with_every_kernel

import yoso_core
from yoso_core import reference, registry
from yoso_core.gpu import KernelText
from yoso_core.gpu.cupy_kernels import hashing, source
from yoso_core.gpu.device import CudaKernel, launches
from yoso_core.gpu.emulator import Emulator, KernelFault, Traffic, checked, count_traffic, missing, order
from yoso_core.gpu.emulator import build as building
from yoso_core.reference.arrays import Array

needs_compiler = pytest.mark.skipif(missing() is not None, reason=missing() or "")
needs_counting = pytest.mark.skipif(building.missing_for_counting() is not None, reason=building.missing_for_counting() or "")

ORDERS = ("forward", "reverse", 3)
HEAD = 'extern "C" __global__ void k'


def run(text: str, *args: Any, grid: Sequence[int] = (1,), block: Sequence[int] = (64,), shared: int = 0, **options: Any) -> None:
    """Launch the kernel ``k`` of a text."""
    Emulator(**options).launch(KernelText(textwrap.dedent(text), "k"), grid, block, args, shared)


def ints(count: int = 64) -> Array:
    return np.full(count, -1, np.int32)


# What kernels compute


@needs_compiler
def test_threads_know_where_they_are() -> None:
    shape = (2, 3, 4, 2, 3, 5)  # blocks z, y, x; threads z, y, x
    out = np.full((*shape, 6), -1, np.int32)
    text = f"""
        {HEAD}(int* out) {{
          const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
          const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
          int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
          mine[0] = blockIdx.z, mine[1] = blockIdx.y, mine[2] = blockIdx.x;
          mine[3] = threadIdx.z, mine[4] = threadIdx.y, mine[5] = threadIdx.x;
        }}"""
    run(text, out, grid=(4, 3, 2), block=(5, 3, 2))
    np.testing.assert_array_equal(np.moveaxis(out, -1, 0), np.indices(shape))


LANE = np.arange(32)

# An expression for each lane, of v = 10 * lane + 1, and what it must be.
WARP_OPERATIONS: dict[str, Any] = {
    "__shfl_sync(~0u, v, 5)": np.full(32, 51),
    "__shfl_sync(~0u, v, lane + 1)": 10 * ((LANE + 1) % 32) + 1,
    "__shfl_sync(~0u, v, 3, 8)": 10 * (LANE // 8 * 8 + 3) + 1,
    "__shfl_xor_sync(~0u, v, 16)": 10 * (LANE ^ 16) + 1,
    "__shfl_xor_sync(~0u, v, 8, 8)": 10 * np.where(LANE & 8, LANE ^ 8, LANE) + 1,  # a later group gives the lane's own
    "__shfl_up_sync(~0u, v, 3)": 10 * np.where(LANE >= 3, LANE - 3, LANE) + 1,
    "__shfl_up_sync(~0u, v, 3, 8)": 10 * np.where(LANE % 8 >= 3, LANE - 3, LANE) + 1,
    "__shfl_down_sync(~0u, v, 3)": 10 * np.where(LANE < 29, LANE + 3, LANE) + 1,
    "__shfl_down_sync(~0u, v, 3, 8)": 10 * np.where(LANE % 8 < 5, LANE + 3, LANE) + 1,
    "int(__shfl_xor_sync(~0u, 0.5 * v, 1) * 2)": 10 * (LANE ^ 1) + 1,
    "int(__shfl_xor_sync(~0u, (long long)v << 33, 1) >> 33)": 10 * (LANE ^ 1) + 1,
    "int(__shfl_xor_sync(~0u, (unsigned char)lane, 1))": LANE ^ 1,
    "int(__ballot_sync(~0u, lane % 3) >> 1)": np.full(32, sum(1 << i for i in range(32) if i % 3) >> 1),
    "__any_sync(~0u, lane == 7)": np.ones(32),
    "__any_sync(~0u, lane == 77)": np.zeros(32),
    "__all_sync(~0u, lane < 32)": np.ones(32),
    "__all_sync(~0u, lane != 7)": np.zeros(32),
    "int(__match_any_sync(~0u, lane % 4) >> 4)": [sum(1 << i for i in range(i % 4, 28, 4)) for i in range(32)],
    "(lane & 1 ? __shfl_sync(0xaaaaaaaau, v, 1) : v)": np.where(LANE & 1, 11, 10 * LANE + 1),
    "(lane < 5 ? __popc(__ballot_sync(31u, 1)) : 0)": np.where(LANE < 5, 5, 0),
    "__syncthreads_or(lane == 9)": np.ones(32),
    "__syncthreads_and(lane != 9)": np.zeros(32),
    "__syncthreads_count(lane % 2)": np.full(32, 16),
}
BITS: dict[str, Any] = {
    "__popc(0xf0f00001u)": 9,
    "__popcll(~0ull)": 64,
    "__ffs(8)": 4,
    "__ffs(0)": 0,
    "__clz(1)": 31,
    "__clz(0)": 32,
    "__clzll(1)": 63,
    "int(__brev(3u) >> 30)": 3,
    "int(__umulhi(1u << 31, 6u))": 3,
    "__float_as_int(1.f)": 0x3F800000,
    "int(__float_as_uint(2.f))": 0x40000000,
    "int(__int_as_float(0x40400000))": 3,
    "int(__uint_as_float(0x40400000u))": 3,
    "int(__double_as_longlong(1.0) >> 52)": 1023,
    "int(__longlong_as_double(1024ll << 52))": 2,
    "int(rsqrtf(0.25f) + rsqrt(0.25))": 4,
    "int(__fdividef(6.f, 2.f) * fmaf(2.f, 3.f, 1.f) + fma(2., 3., 1.))": 28,
    "min(2, 3) * 10 + max(2, 3)": 23,
    "int(min(2.f, 3.f) + max(2u, 3u) + min(2ll, 3ll) + max(2., 3.))": 10,
    "int(fminf(2.f, nanf) + max(nanf, 2.f))": 4,
    "ilogb(9.f) * 10 + ilogb(9.)": 33,
    "int(scalbn(1.f, 3) + scalbn(1., 2) + fabs(-1.f) + fabs(-2.) + abs(-3))": 18,
    "int(sizeof(fabs(1.f)) + 10 * sizeof(fabs(1.)) + 100 * sizeof(sqrt(1.f)))": 484,
    "int(sizeof(float4) + alignof(float4) * 100 + sizeof(float3) * 10000)": 121616,
    "make_int2(3, 4).y + make_uint4(1, 2, 3, 4).w + int(make_float2(5, 6).x + make_float4(1, 2, 3, 4).z)": 16,
    "__ldg(out + 31) * 0 + int(isnan(nanf)) + 2 * int(isfinite(nanf)) + int(isinf(1 / 0.f)) * 4": 5,
    "int(__fadd_rn(1.f, 2.f) * __fmul_rn(2.f, 2.f)) + __float2int_rn(2.5f) + __float2int_rz(-2.5f)": 12,
}


@needs_compiler
@pytest.mark.parametrize("chosen", ORDERS)
def test_operations_of_a_warp_and_bits(chosen: str | int) -> None:
    expressions = {**WARP_OPERATIONS, **BITS}
    lines = "\n".join(f"out[{32 * i} + lane] = {text};" for i, text in enumerate(expressions))
    out = ints(32 * len(expressions))
    with order(chosen):
        text = f"{HEAD}(int* out) {{ const int lane = threadIdx.x, v = 10 * lane + 1; const float nanf = __int_as_float(-1);\n{lines} }}"
        run(text, out, block=(32,))
    for i, (name, expected) in enumerate(expressions.items()):
        np.testing.assert_array_equal(out[32 * i : 32 * i + 32], np.broadcast_to(expected, 32), name)


@needs_compiler
@pytest.mark.parametrize(
    ("c_type", "dtype", "operations"),
    [
        ("int", np.int32, "Add Sub Max Min And Or Xor Exch"),
        ("unsigned", np.uint32, "Add Sub Max Min And Or Xor Exch"),
        ("unsigned long long", np.uint64, "Add Max Min And Or Xor Exch"),
        ("long long", np.int64, "Max Min And Or Xor"),
        ("float", np.float32, "Add Exch"),
        ("double", np.float64, "Add"),
    ],
)
def test_atomics(c_type: str, dtype: Any, operations: str) -> None:
    names = operations.split()
    start = {"And": 255, "Min": 99, "Exch": 7}
    lines = "\n".join(f"old[{64 * i} + i] = atomic{name}(&x[{i}], ({c_type})(3 * i + 1));" for i, name in enumerate(names))
    x = np.array([start.get(name, 1) for name in names], dtype)
    old = np.zeros(64 * len(names), dtype)
    run(f"{HEAD}({c_type}* x, {c_type}* old) {{ const int i = threadIdx.x;\n{lines} }}", x, old)
    values = 3 * np.arange(64) + 1
    with np.errstate(over="ignore"):
        expected = {
            "Add": 1 + values.sum(),
            "Sub": np.int64(1) - values.sum(),
            "Max": values.max(),
            "Min": 1,
            "And": np.bitwise_and.reduce(values) & 255,
            "Or": np.bitwise_or.reduce(values) | 1,
            "Xor": np.bitwise_xor.reduce(values) ^ 1,
            "Exch": values[-1],
        }
    np.testing.assert_array_equal(x, np.array([expected[name] for name in names]).astype(dtype))
    if "Add" in names:
        first = old[64 * names.index("Add") :][:64]
        np.testing.assert_array_equal(first, (1 + np.cumsum(values) - values).astype(dtype))


@needs_compiler
def test_compare_and_swap_makes_a_lock_free_maximum() -> None:
    x = np.zeros(1, np.int32)
    text = f"""
        {HEAD}(int* x) {{
          int seen = *x;
          while (seen < int(threadIdx.x)) {{
            const int before = atomicCAS(x, seen, int(threadIdx.x));
            if (before == seen) break;
            seen = before;
          }}
        }}"""
    run(text, x)
    assert x[0] == 63


@needs_compiler
@pytest.mark.parametrize("chosen", ORDERS)
def test_shared_memory_in_every_form(chosen: str | int) -> None:
    text = """
        // __shared__ in a comment; stays
        #define ROWS 2
        template <class A, class B> struct Pair { A first; B second; };
        template <int SIZE, class T> __device__ __forceinline__ T turned(T x) {
          __shared__ T buffer[SIZE < 64 ? 64 : SIZE];
          const int i = threadIdx.x;
          __syncthreads();
          buffer[i] = x;
          __syncthreads();
          return buffer[(i + 1) % SIZE];
        }
        extern "C" __global__ void __launch_bounds__(64)
        k(const int* __restrict__ x, int* __restrict__ out) {
          extern __shared__ __align__(16) unsigned char raw[];
          int* dynamic = reinterpret_cast<int*>(raw);
          __shared__ int first, table[ROWS][64];
          __shared__ Pair<int, float> pairs[64];
          __shared__ alignas(16) float4 vectors[
              64];
          const int i = threadIdx.x;
          if (i == 0) first = x[0];
          table[i % ROWS][i] = x[i];
          dynamic[i] = x[i] + 1;
          pairs[i].second = x[i];
          vectors[i] = make_float4(i, 0, 0, x[i]);
          __syncthreads();
          const int j = 63 - i;
          int sum = first;
        #pragma unroll
          for (int row = 0; row < 1; ++row) sum += table[j % ROWS][j] + dynamic[j] + int(pairs[j].second) + int(vectors[j].w);
          out[i] = sum + turned<64>(i) + int(turned<32>(float(i)));
        }"""
    x, out, i = np.arange(64, dtype=np.int32) ** 2, ints(), np.arange(64)
    with order(chosen):
        run(text, x, out, shared=256)
    np.testing.assert_array_equal(out, 4 * x[63 - i] + 1 + (i + 1) % 64 + (i + 1) % 32)


@needs_compiler
def test_helpers_of_the_package_and_macros() -> None:
    text = f"""
        #include "common.cuh"
        {HEAD}(const VALUE* x, VALUE* out, ACC* wide) {{
          wide[threadIdx.x] = widen(x[threadIdx.x]);
          out[threadIdx.x] = narrow<VALUE>(wide[threadIdx.x] * FACTOR);
        }}"""
    x = np.linspace(-2, 2, 64).astype(np.float16)
    out, wide = np.zeros_like(x), np.zeros(64, np.float32)
    Emulator().launch(KernelText(textwrap.dedent(text), "k", (("VALUE", "float16"), ("FACTOR", 3))), (1,), (64,), (x, out, wide))
    np.testing.assert_array_equal(wide, x)
    np.testing.assert_array_equal(out, (x.astype(np.float32) * 3).astype(np.float16))


@needs_compiler
@pytest.mark.parametrize("launcher", [hashing.fast_hash_block_per_part, hashing.fast_hash_warp_per_vector], ids=lambda f: f.__name__)
@pytest.mark.parametrize("chosen", ORDERS)
def test_a_launcher_runs_and_is_recorded(launcher: Any, chosen: str | int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 7, 20), dtype=np.float32)
    signs = reference.sample_signs(7, 9, 20, batch_shape=(2,), layout="paper", rng=1)
    with order(chosen), launches() as made, poisoned_allocations():
        codes = launcher(Emulator(), x, signs, 7, 9, layout="paper")
    np.testing.assert_array_equal(codes, reference.fast_hash(x, signs, 7, 9, layout="paper"))
    assert [launch.where for launch in made] == ["emulated"]
    assert made[0].kernel in ("block_per_part", "warp_per_vector")


@needs_compiler
def test_arrays_come_from_numpy() -> None:
    device = Emulator()
    with poisoned_allocations():
        assert np.isnan(device.empty((3,), np.float32)).all()
    assert not device.zeros((3,), np.int32).any()
    assert device.xp is np
    assert (device.max_shared, device.max_table) == (227 * 1024, 256 << 20)


@needs_compiler
def test_a_null_pointer_is_none() -> None:
    out = ints(1)
    run(f"{HEAD}(const float* mask, int* out) {{ *out = mask == nullptr; }}", None, out, block=(1,))
    assert out[0] == 1


@needs_compiler
def test_launches_from_two_threads() -> None:
    """One at a time, whoever asks."""
    outs = [ints(4096) for _ in range(4)]
    text = f"{HEAD}(int* out, int x) {{ const int i = blockIdx.x * blockDim.x + threadIdx.x; out[i] = __shfl_sync(~0u, x + i, 0); }}"
    run(text, outs[0], np.int32(0), grid=(64,))

    def many(i: int) -> None:
        for _ in range(20):
            run(text, outs[i], np.int32(i), grid=(64,))

    threads = [threading.Thread(target=many, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, out in enumerate(outs):
        np.testing.assert_array_equal(out, np.arange(4096) // 32 * 32 + i)


# Orders

RANK = f"{HEAD}(int* count, int* rank) {{ rank[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(count, 1); }}"


def ranks(**options: Any) -> Array:
    """The turn of each thread."""
    rank = ints(256)
    run(RANK, np.zeros(1, np.int32), rank, grid=(2,), block=(128,), **options)
    return rank


@needs_compiler
def test_orders() -> None:
    np.testing.assert_array_equal(ranks(), np.arange(256))
    np.testing.assert_array_equal(ranks(order="reverse"), np.arange(256)[::-1])
    with order("reverse"):
        np.testing.assert_array_equal(ranks(order=5), np.arange(256)[::-1])
        with order("forward"):
            np.testing.assert_array_equal(ranks(order=5), np.arange(256))
        seen = []
        thread = threading.Thread(target=lambda: seen.append(ranks()))  # another thread is another context
        thread.start()
        thread.join()
        np.testing.assert_array_equal(seen[0], np.arange(256))
    np.testing.assert_array_equal(np.sort(ranks(order=5)), np.arange(256))
    np.testing.assert_array_equal(ranks(order=5), ranks(order=5))
    assert any((ranks(order=5) != ranks(order=seed)).any() for seed in (6, 7))
    assert len({int(ranks(order=seed)[:128].min()) for seed in range(8)}) == 2, "blocks are never exchanged"


@pytest.mark.parametrize("wrong", ["backward", -1, True, 1.5, None])
def test_orders_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match="order: got"), order(wrong):
        pass
    with pytest.raises(ValueError, match="order: got"):
        Emulator(order=wrong)


# Faults that every build finds: name -> kernel, its twin without the fault, and what the message
# says.

FAULTS: dict[str, tuple[str, str, str]] = {
    "divergent barrier": (
        "if (i < 32) __syncthreads();\nelse\n__syncthreads(); out[i] = 1;",
        "if (i < 32) out[i] = 1;\n__syncthreads();",
        r"divergent barrier: thread \(0,0,0\) waits in __syncthreads at kernel.cu:2, and thread \(63,0,0\) .* kernel.cu:4",
    ),
    "exited thread in the mask": (
        "if (i % 32 >= 16) return;\nout[i] = __shfl_xor_sync(0xffffffffu, i, 1);",
        "if (i % 32 >= 16) return;\nout[i] = __shfl_xor_sync(0x0000ffffu, i, 1);",
        r"__shfl_xor_sync names thread \((16|48),0,0\) in its mask 0xffffffff, which has exited .*kernel.cu:3",
    ),
    "lane not in its own mask": (
        "out[i] = __ballot_sync(i % 32 < 16 ? 0xffffu : 0xffffu, 1);",
        "out[i] = __ballot_sync(i % 32 < 16 ? 0xffffu : 0xffff0000u, 1);",
        "__ballot_sync: the calling lane (16|31) is not in its own mask 0x0000ffff",
    ),
    "lane that is read is not in the mask": (
        "if (i % 32 < 16) out[i] = __shfl_down_sync(0xffffu, i, 1);",
        "if (i % 32 < 16) out[i] = __shfl_down_sync(0xffffu, i, 1, 16);",
        "__shfl_down_sync reads lane 16, which is not in the mask 0x0000ffff",
    ),
    "lanes at different lines": (
        "if (i & 1) out[i] = __shfl_xor_sync(~0u, i, 2);\nelse\nout[i] = __shfl_xor_sync(~0u, i, 2);",
        "out[i] = __shfl_xor_sync(~0u, i, i & 1 ? 2 : 2);",
        "the lanes of a __shfl_xor_sync stand at different lines: thread .* waits in __shfl_xor_sync at kernel.cu:[24]",
    ),
    "barrier against shuffle": (
        "if (i & 1) __syncthreads();\nelse\nout[i] = __shfl_xor_sync(~0u, i, 2);",
        "__syncthreads();\nout[i] = __shfl_xor_sync(~0u, i, 2);",
        "deadlock: thread .* waits in __shfl_xor_sync at kernel.cu:4 for the lanes 0xffffffff, and thread .* waits in __syncthreads",
    ),
    "two masks that wait for each other": (
        "if (i & 1) out[i] = __any_sync(~0u, 1);\nelse\nout[i] = __any_sync(0x7fffffffu, 1);",
        "if (i & 1) out[i] = __any_sync(0xaaaaaaaau, 1);\nelse\nout[i] = __any_sync(0x55555555u, 1);",
        "deadlock: .* waits in __any_sync",
    ),
    "too much static shared memory": (
        "__shared__ int table[13000]; table[i] = i; out[i] = table[i];",
        "__shared__ int table[12000]; table[i] = i; out[i] = table[i];",
        "52000 bytes of static shared memory with table: the compiler allows 49152, more must be dynamic",
    ),
    "trap": (
        "if (i == 9) __trap(); out[i] = 1;",
        "if (i == 99) __trap(); out[i] = 1;",
        r"__trap\(\) \(block \(0, 0, 0\), thread \(9, 0, 0\), kernel.cu:2\)",
    ),
    "assertion": (
        "assert(i < 63); out[i] = 1;",
        "assert(i < 64); out[i] = 1;",
        r"assertion failed: i < 63 \(block \(0, 0, 0\), thread \(63, 0, 0\), kernel.cu:2\)",
    ),
    "division by zero": (
        "out[i] = 64 / (i - n);",
        "out[i] = 64 / (i + n);",
        r"integer division by zero.*thread \(7, 0, 0\), kernel.cu:2",
    ),
    "null pointer": (
        "null[i] = 1;",
        "if (null != nullptr) null[i] = 1;",
        r"memory is written through a null pointer \(None was passed for null\).*kernel.cu:2",
    ),
    "far beyond an array": (
        "out[i + (long long)n * 300000000] = 1;",
        "out[i + (long long)n * 0] = 1;",
        r"out\[2100000000\] written, out has 64 entries .*kernel.cu:2",
    ),
    "endless recursion": (
        "out[i] = depth(n);",
        "out[i] = depth(-1);",
        "local memory overflows",
    ),
}
DEPTH = "__device__ int depth(int n) { volatile int pad[64] = {n}; return n < 0 ? 0 : depth(n + 1) + pad[n % 64]; }"


def fault_text(body: str) -> str:
    return f"{DEPTH if 'depth' in body else ''} {HEAD}(int* out, int n, int* null) {{ const int i = threadIdx.x;\n{body} }}"


@needs_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str) -> None:
    body, clean, message = FAULTS[name]
    for chosen in ORDERS:
        with order(chosen):
            with pytest.raises(KernelFault, match=f"^k: .*{message}" if chosen == "forward" else "^k: ") as caught:
                run(fault_text(body), ints(), np.int32(7), None)
            assert (caught.value.kernel, caught.value.block) == ("k", (0, 0, 0))
            assert caught.value.thread is not None
            run(fault_text(clean), ints(), np.int32(7), None)


@needs_compiler
def test_fault_names_the_block_and_the_first_to_fail() -> None:
    text = f"{HEAD}(int* out) {{\n  if (blockIdx.y == 2 && threadIdx.y == 1)\n    __trap();\n}}"
    with pytest.raises(KernelFault) as caught:
        run(text, ints(), grid=(2, 3), block=(4, 2))
    fault = caught.value
    assert (fault.kernel, fault.block, fault.thread, fault.file, fault.line) == ("k", (0, 2, 0), (0, 1, 0), "kernel.cu", 3)


@needs_compiler
def test_a_shuffle_reads_no_lane_that_the_block_lacks() -> None:
    text = f"{HEAD}(int* out) {{ out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 16); }}"
    with pytest.raises(KernelFault, match="reads lane 20, which this warp of 20 threads does not have"):
        run(text, ints(), block=(20,))
    out = ints()
    run(text.replace("16)", "1)"), out, block=(20,))  # the mask may name lanes that never were
    np.testing.assert_array_equal(out[:20], np.arange(20) ^ 1)


@needs_compiler
def test_exited_threads_do_not_hold_up_a_barrier() -> None:
    out = ints()
    run(f"{HEAD}(int* out) {{ if (threadIdx.x >= 40) return; __syncthreads(); out[threadIdx.x] = __syncthreads_count(1); }}", out)
    np.testing.assert_array_equal(out, np.where(np.arange(64) < 40, 40, -1))


@needs_compiler
def test_shared_memory_of_every_block_begins_as_nan() -> None:
    text = f"""
        {HEAD}(float* out, int* bits) {{
          extern __shared__ float dynamic[];
          __shared__ float fixed;
          out[2 * blockIdx.x] = dynamic[0], out[2 * blockIdx.x + 1] = fixed;
          bits[blockIdx.x] = __float_as_int(dynamic[3]);
          dynamic[0] = fixed = dynamic[3] = 1;
        }}"""
    out, bits = np.zeros(6, np.float32), np.zeros(3, np.int32)
    for _ in range(2):
        run(text, out, bits, grid=(3,), block=(1,), shared=16)
        assert np.isnan(out).all()
        assert (bits == -1).all()


RACES = {
    "a missing barrier": ("s[i] = x[i];\nout[i] = s[63 - i];", "s[i] = x[i];\n__syncthreads();\nout[i] = s[63 - i];"),
    "a second barrier missing": (
        "for (int h = 1; h < 64; h *= 2) { s[i] = i; __syncthreads(); s[i ^ h] += s[i]; }\nout[i] = s[i];",
        "for (int h = 1; h < 64; h *= 2) { s[i] = i; __syncthreads(); if (i & h) s[i ^ h] += s[i]; __syncthreads(); }\nout[i] = s[i];",
    ),
    "lanes that trust in running together": ("s[i] = x[i];\nout[i] = s[i ^ 1];", "s[i] = x[i];\n__syncwarp();\nout[i] = s[i ^ 1];"),
    "an addition that is not atomic": ("out[0] = 2 * out[0] + i;", "atomicAdd(&out[0], i);"),
}


def race_text(body: str) -> str:
    return f"{HEAD}(const int* x, int* out) {{ __shared__ int s[64]; const int i = threadIdx.x;\n{body} }}"


@needs_compiler
@pytest.mark.parametrize("name", RACES)
def test_races_depend_on_the_order(name: str) -> None:
    def results(body: str) -> list[tuple[int, ...]]:
        found = []
        for chosen in ORDERS:
            out = ints()
            with order(chosen):
                run(race_text(body), np.arange(64, dtype=np.int32), out)
            found.append(tuple(out.tolist()))
        return found

    racy, clean = RACES[name]
    assert len(set(results(racy))) > 1
    assert len(set(results(clean))) == 1


@needs_compiler
def test_the_emulator_goes_on_after_a_fault() -> None:
    with pytest.raises(KernelFault):
        run(f"{HEAD}(int* out) {{ if (threadIdx.x) __syncthreads(); else __shfl_sync(~0u, 1, 0); }}", ints())
    np.testing.assert_array_equal(ranks(), np.arange(256))


@needs_compiler
def test_crashes_outside_a_kernel_are_left_alone() -> None:
    code = """
        import ctypes, numpy as np
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator
        Emulator().launch(KernelText('extern "C" __global__ void k(int* x) { *x = 1; }', "k"), (1,), (1,), (np.zeros(1, np.int32),))
        ctypes.string_at(0)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, check=False)
    assert done.returncode == -signal.SIGSEGV


# Launches and arguments that are refused


@needs_compiler
@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((1,), (1025,), 0, r"block \(1025,\), where each size must be from 1 to \(1024, 1024, 64\)"),
        ((1,), (32, 33), 0, r"a block of \(32, 33, 1\) has 1056 threads, 1024 is the most that the kernel allows"),
        ((1,), (1, 1, 65), 0, "block"),
        ((1,), (0,), 0, "block"),
        ((0,), (1,), 0, r"grid \(0,\)"),
        ((1, 65536), (1,), 0, r"grid \(1, 65536\), where each size must be from 1 to \(2147483647, 65535, 65535\)"),
        ((1, 1, 65536), (1,), 0, "grid"),
        ((2**31,), (1,), 0, "grid"),
        ((), (1,), 0, "grid"),
        ((1,), (1,), 65 * 1024, "66560 bytes of dynamic shared memory, a block here has 65536"),
    ],
    ids=str,
)
def test_launch_is_refused(grid: Sequence[int], block: Sequence[int], shared: int, message: str) -> None:
    with pytest.raises(KernelFault, match=f"^k: invalid launch: .*{message}"):
        run(f"{HEAD}() {{}}", grid=grid, block=block, shared=shared, max_shared=64 * 1024)
    run(f"{HEAD}() {{}}", grid=(1, 65535), block=(1,), shared=64 * 1024, max_shared=64 * 1024)


@needs_compiler
@pytest.mark.parametrize(
    ("text", "bound"),
    [
        ('extern "C" __global__ void __launch_bounds__(64) k() {}', 64),
        ('extern "C" __global__ void __launch_bounds__(THREADS < 32 ? 32 : (THREADS), sizeof(int) == 4 ? 2 : 3)\nk() {}', 96),
        (f"// __launch_bounds__(7)\n{HEAD}() {{}}", 1024),
        ("__global__ void __launch_bounds__(64) k() {}", 64),
        ("__global__ __launch_bounds__(64) void k() {}", 64),
        ("__launch_bounds__(64, 2) __global__ void k() {}", 64),
        ('extern "C" __launch_bounds__(64) __global__ void k() {}', 64),
        ('extern "C" __global__ __launch_bounds__(64)\nvoid k() {}', 64),
        ("static __global__ void __launch_bounds__(64) k() {}", 64),
        ('extern "C" { __global__ void __launch_bounds__(64) k() {} }', 64),
        (f"template <int N> __global__ void __launch_bounds__(N) other() {{}}\n{HEAD}() {{}}", 1024),
    ],
    ids=["one", "two", "none", "guide", "before-void", "first", "extern-first", "extern-before-void", "static", "block", "template"],
)
def test_launch_bounds(text: str, bound: int) -> None:
    kernel = KernelText(text, "k", (("THREADS", 96),))
    Emulator().launch(kernel, (1,), (bound,), ())
    with pytest.raises(KernelFault, match="invalid launch: "):
        Emulator().launch(kernel, (1,), (bound + 1,), ())


@needs_compiler
def test_static_and_dynamic_shared_memory_share_the_room() -> None:
    text = f"{HEAD}(int* out) {{ __shared__ int s[256]; s[threadIdx.x] = 1; out[threadIdx.x] = s[threadIdx.x]; }}"
    with pytest.raises(KernelFault, match="2048 bytes of shared memory, 1024 static with s and 1024 dynamic: a block here has 2000"):
        run(text, ints(), shared=1024, max_shared=2000)
    run(text, ints(), shared=1024, max_shared=2048)


def test_more_shared_memory_than_there_is() -> None:
    with pytest.raises(ValueError, match="max_shared: got 99999999"):
        Emulator(max_shared=99_999_999)


ARGUMENTS = f"""
    struct bfloat16 {{ unsigned short bits; }};
    {HEAD}(const float* __restrict__ values, int* codes, const bfloat16* half, const float4* vectors,
           long long n, float scale, bool flag) {{}}"""
GOOD: dict[str, Any] = {
    "values": np.zeros(4, np.float32),
    "codes": np.zeros((2, 3), np.int32),
    "half": np.zeros(4, np.uint16),
    "vectors": np.zeros((4, 4), np.float32),
    "n": np.int64(4),
    "scale": np.float32(1),
    "flag": np.bool_(True),
}


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("values", np.zeros(4), TypeError, "argument 0, values: got an array of float64, must be float32"),
        ("values", np.zeros(4, np.int32), TypeError, "argument 0, values: got an array of int32"),
        ("values", np.float32(1), TypeError, "argument 0, values: got .*must be an array of float32, or None for a null pointer"),
        ("values", [1.0], TypeError, r"argument 0, values: got \[1.0\] \(list\)"),
        ("codes", np.zeros((3, 2), np.int32).T, ValueError, "argument 1, codes: the array is not C-contiguous"),
        ("codes", np.zeros(4, np.uint32), TypeError, "argument 1, codes: got an array of uint32, must be int32"),
        ("half", np.zeros(4, np.float32), TypeError, "argument 2, half: got an array of float32, must be float16 or uint16"),
        ("vectors", np.zeros(4, np.float64), TypeError, "argument 3, vectors: got an array of float64, must be float32 in vectors of 4"),
        ("vectors", np.zeros(9, np.float32)[1:5], ValueError, "argument 3, vectors: the array's address is no multiple of 16"),
        ("n", 4, TypeError, r"argument 4, n: got 4 \(int\), must be a NumPy scalar of type int64"),
        ("n", np.int32(4), TypeError, "argument 4, n: got a int32 scalar, must be int64"),
        ("n", np.zeros(1, np.int64), TypeError, "argument 4, n: got an array of int64, must be a NumPy scalar"),
        ("scale", np.float64(1), TypeError, "argument 5, scale: got a float64 scalar, must be float32"),
        ("scale", None, TypeError, "argument 5, scale: got None"),
        ("flag", np.int8(1), TypeError, "argument 6, flag: got a int8 scalar, must be bool"),
    ],
)
def test_argument_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^k: {message}"):
        run(ARGUMENTS, *{**GOOD, name: value}.values())


@needs_compiler
def test_arguments_that_fit() -> None:
    run(ARGUMENTS, *GOOD.values())
    run(ARGUMENTS, *{**GOOD, "half": np.zeros(4, np.float16), "values": None}.values())
    with pytest.raises(TypeError, match=r"^k takes 7 arguments, got 6"):
        run(ARGUMENTS, *list(GOOD.values())[1:])


@needs_compiler
def test_kernels_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"hashing.cu has no kernel 'nothing' when compiled with D=32"):
        Emulator().launch(CudaKernel("hashing.cu", "nothing", (("D", 32),)), (1,), (1,), ())
    only_with = KernelText(f"#ifdef WANTED\n{HEAD}() {{}}\n#endif\n", "k")
    with pytest.raises(ValueError, match=r"kernel.cu has no kernel 'k' when compiled with no macros"):
        Emulator().launch(only_with, (1,), (1,), ())
    Emulator().launch(KernelText(only_with.text, "k", (("WANTED", 1),)), (1,), (1,), ())


@needs_compiler
def test_arguments_go_by_the_names_of_the_parameters() -> None:
    kernel = KernelText(f"{HEAD}(int* x, int y) {{ *x = y; }}", "k")
    x = np.zeros(1, np.int32)
    Emulator().launch(kernel, grid=(1,), block=(1,), args={"x": x, "y": np.int32(7)})
    assert x[0] == 7
    for wrong, got in (({"y": np.int32(7), "x": x}, "y, x"), ({"x": x}, "x"), ({"x": x, "z": np.int32(7)}, "x, z")):
        with pytest.raises(TypeError, match=f"^args: k has the parameters x, y, got {got}$"):
            Emulator().launch(kernel, grid=(1,), block=(1,), args=wrong)


@needs_compiler
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}(int* x) {{\n  *x = y;\n}}", "kernel.cu:2:.*y"),
        (f"{HEAD}(int* x) {{\n  *x = __activemask();\n}}", "kernel.cu:2:.*deleted function.*__activemask"),
        (f"{HEAD}(long long* x) {{\n  atomicAdd(x, 1ll);\n}}", "CUDA has no atomicAdd for this type"),
        (
            f"{HEAD}(int* x) {{\n  __shared__ int (*f)(int);\n}}",
            "line 2: the emulator does not understand this declaration of shared memory",
        ),
        (
            f'#include "common.cuh"\n{HEAD}(int* x) {{\n  __shared__ int (*f)(int);\n}}',
            "line 3: the emulator does not understand this declaration of shared memory",
        ),
    ],
    ids=["undeclared", "activemask", "atomic", "shared", "shared-after-a-header"],
)
def test_kernels_that_do_not_compile(text: str, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"(?s){message}"):
        run(text, ints())


@needs_compiler
def test_what_textbooks_begin_with() -> None:
    text = """
        #include <cuda_runtime.h>
        #include "device_launch_parameters.h"
        #include <stdio.h>
        # include <math.h>  // fabsf
        #include <cstdint>
        #include <algorithm>
        __global__ void k(const float* x, uint32_t* o, int n) {
          const size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x;
          static __shared__ float s[64];
          volatile __shared__ int v[64];
          s[i] = min(fabsf(x[i]), INFINITY);
          v[i] = max(n, blockDim.x) + min(blockDim.x, n) + min(-1, 7u) - int(max(8ull, -1ll) == 18446744073709551615ull);
          if (i < min(n, 64u)) o[i] = uint32_t(s[i]) + int64_t(v[i]);
        }"""
    out = np.zeros(64, np.uint32)
    run(text, -np.arange(64, dtype=np.float32), out, np.int32(50))
    np.testing.assert_array_equal(out, np.where(np.arange(64) < 50, np.arange(64) + 64 + 50 + 7 - 1, 0))
    with pytest.raises(ValueError, match=r"^line 2: #include <cooperative_groups.h>: the emulator has no cooperative groups: use "):
        run(f"\n#include <cooperative_groups.h>\n{HEAD}() {{}}")


# The cache, and machines without a compiler


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for libraries, and a process that remembers none."""
    monkeypatch.setenv("YOSO_CORE_CACHE", str(tmp_path / "cache"))
    forget()
    return tmp_path / "cache" / "emulator"


def forget() -> None:
    building.load.cache_clear()


@needs_compiler
def test_fibers_of_other_machines(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On x86-64 the context switch is the emulator's own; elsewhere it is the system's."""
    monkeypatch.setenv("CXX", f"{' '.join(building.compiler().command)} -DCUDA_EMULATOR_UCONTEXT")
    for chosen in ORDERS:
        with order(chosen):
            out = ints()
            run(race_text(RACES["a missing barrier"][1]), np.arange(64, dtype=np.int32), out)
            np.testing.assert_array_equal(out, np.arange(64)[::-1])
            with pytest.raises(KernelFault, match="integer division by zero"):
                run(f"{HEAD}(int* out) {{ out[threadIdx.x] = 64 / out[threadIdx.x]; }}", ints() + 1)
    forget()


@needs_compiler
def test_what_is_compiled_is_kept(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks()
    made = sorted(fresh_cache.iterdir())
    assert [path.name.partition("-")[0] for path in made] == ["kernel", "runtime"]
    forget()
    with monkeypatch.context() as patched:
        patched.setattr(building, "_make", None)  # nothing is compiled again
        ranks()
    run(RANK.replace("1)", "2)"), np.zeros(1, np.int32), ints(), block=(1,))
    assert len(list(fresh_cache.iterdir())) == 3
    forget()


@needs_compiler
def test_one_library_serves_all_kernels_of_a_file(fresh_cache: Path) -> None:
    x = np.ones((1, 1, 32), np.float32)
    signs = reference.sample_signs(1, 8, 32, layout="paper", rng=1)
    for launcher in (hashing.fast_hash_block_per_part, hashing.fast_hash_warp_per_vector):
        launcher(Emulator(), x, signs, 1, 8, layout="paper")
    assert sorted(path.name.partition("-")[0] for path in fresh_cache.iterdir()) == ["hashing", "runtime"]
    forget()


@needs_compiler
def test_a_spoiled_library_is_made_again(fresh_cache: Path) -> None:
    ranks()
    forget()
    for path in fresh_cache.glob("kernel-*"):
        path.unlink()  # not overwritten: this process has it mapped
        path.write_bytes(b"spoiled")
    np.testing.assert_array_equal(ranks(), np.arange(256))
    forget()


@pytest.mark.slow
@needs_compiler
def test_processes_that_compile_at_once(fresh_cache: Path) -> None:
    code = f"""
        import numpy as np
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator
        rank = np.zeros(64, np.int32)
        Emulator().launch(KernelText({RANK!r}, "k"), (1,), (64,), (np.zeros(1, np.int32), rank))
        assert (rank == np.arange(64)).all()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.communicate()[1] == ""
        assert child.returncode == 0
    assert sorted(path.name.partition("-")[0] for path in fresh_cache.iterdir()) == ["kernel", "runtime"]


@needs_compiler
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("YOSO_CORE_CACHE", str(tmp_path / "file"))
    forget()
    with pytest.raises(RuntimeError, match=r"the emulator keeps what it compiles in .*name a folder in YOSO_CORE_CACHE"):
        ranks()
    forget()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("YOSO_CORE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr(sys, "platform", "linux")
    assert building.cache_folder() == Path("/somewhere/yoso_core/emulator")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert building.cache_folder() == Path.home() / "Library/Caches/yoso_core/emulator"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PATH": ""}, r"needs a C\+\+17 compiler: no C\+\+ compiler was found .* install one \(.*g\+\+.*\) or name one in CXX"),
        ({"CXX": "no-such-compiler"}, "CXX=no-such-compiler names no program"),
    ],
    ids=["path", "cxx"],
)
def test_no_compiler(changes: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    text = missing()
    assert text is not None
    assert "\n" not in text
    with pytest.raises(RuntimeError, match=reason):
        run(f"{HEAD}() {{ /* never compiled before */ }}")


def test_no_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    building._compiler_for.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "win32")
        assert missing() == "the emulator of CUDA kernels needs Linux or macOS, this is win32"
    building._compiler_for.cache_clear()


# Faults that the checking build finds

CHECKS: dict[str, tuple[str, str, str]] = {
    "write past the end": (
        "out[i + 1] = x[i];",
        "if (i < 63) out[i + 1] = x[i];",
        r"out\[64\] written, out has 64 entries \(block \(0, 0, 0\), thread \(63, 0, 0\), kernel.cu:2\)",
    ),
    "read before the start": (
        "out[i] = x[i - 2];",
        "out[i] = i >= 2 ? x[i - 2] : 0;",
        r"x\[-2\] read, x has 64 entries \(block \(0, 0, 0\), thread \(0, 0, 0\), kernel.cu:2\)",
    ),
    "half a vector past the end": (
        "out[i] = i < 32 ? int(reinterpret_cast<const long long*>(x + 2)[i]) : 0;",
        "out[i] = i < 31 ? int(reinterpret_cast<const long long*>(x + 2)[i]) : 0;",
        r"x\[64\.\.65\] read, x has 64 entries",
    ),
    "past the end of a view": (
        "out[i] = row[i];",
        "out[i] = i < 16 ? row[i] : 0;",
        r"row\[16\] read, row has 16 entries \(block \(0, 0, 0\), thread \(16, 0, 0\), kernel.cu:2\)",
    ),
    "static shared memory": (
        "s[i + 1] = x[i]; __syncthreads(); out[i] = x[i];",
        "s[i] = x[i]; __syncthreads(); out[i] = x[i];",
        r"s\[64\] is used, s has 64 entries \(block \(0, 0, 0\), thread \(63, 0, 0\), kernel.cu:2\)",
    ),
    "dynamic shared memory": (
        "dynamic[i + 1] = x[i]; __syncthreads(); out[i] = x[i];",
        "dynamic[i] = x[i]; __syncthreads(); out[i] = x[i];",
        r"dynamic\[64\] written, dynamic has 64 entries",
    ),
    "before shared memory": (
        "dynamic[i - 1] = x[i];",
        "dynamic[i] = x[i];",
        r"dynamic\[-1\] written, dynamic has 64 entries",
    ),
    "atomic past the end": (
        "atomicAdd(&out[i + 1], 1);",
        "atomicAdd(&out[i], 1);",
        r"out\[64\] updated, out has 64 entries .*kernel.cu:2",
    ),
    "vector at an odd address": (
        "*reinterpret_cast<long long*>(out + 1 + 2 * (i / 4)) = 0;",
        "if (i % 4 == 0) *reinterpret_cast<long long*>(out + 2 * (i / 4)) = 0;",
        "8 bytes are written at an address that is no multiple of 8",
    ),
    "never written": (
        "if (i < 63) s[i] = 1;\n__syncthreads();\nout[i] = s[i];",
        "s[i] = 1;\n__syncthreads();\nout[i] = s[i];",
        r"s\[63\] read, shared memory that no thread of the block has written so far .*kernel.cu:4",
    ),
    "atomic on what was never written": (
        "atomicAdd(&s[0], 1);",
        "if (i == 0) s[0] = 0;\n__syncthreads();\natomicAdd(&s[0], 1);",
        r"s\[0\] updated, shared memory that no thread of the block has written so far",
    ),
    "missing barrier": (
        "s[i] = x[i];\ns[63 - i] = x[i];\n",
        "s[i] = x[i];\n__syncthreads();\ns[63 - i] = x[i];\n",
        r"s\[32\] written, and no barrier orders that after thread \(31,0,0\) .* wrote it at kernel.cu:3 .*kernel.cu:2\)",
    ),
    "missing second barrier": (
        "int v = i;\nfor (int h = 1; h < 64; h *= 2) {\ns[i] = v;\n__syncthreads();\nv += s[i ^ h];\n} out[i] = v;",
        "int v = i;\nfor (int h = 1; h < 64; h *= 2) {\ns[i] = v;\n__syncthreads();\nv += s[i ^ h];\n__syncthreads(); } out[i] = v;",
        r"s\[\d+\] (read|written), and no barrier orders that after thread .* (wrote|read) it at kernel.cu:[46] .*kernel.cu:[46]",
    ),
    "a vote is no barrier": (
        "s[i] = x[i];\n__ballot_sync(~0u, 1);\nout[i] = s[i ^ 1];",
        "s[i] = x[i];\n__syncwarp();\nout[i] = s[i ^ 1];",
        "no barrier orders that",
    ),
    "a warp's barrier is for its lanes": (
        "s[i] = x[i];\n__syncwarp();\nout[i] = s[63 - i];",
        "s[i] = x[i];\n__syncwarp();\nout[i] = s[i ^ 31];",
        "no barrier orders that|no thread of the block has written",
    ),
    "a mask's barrier is for its lanes": (
        "s[i] = x[i];\n__syncwarp(i & 1 ? 0xaaaaaaaau : 0x55555555u);\nout[i] = s[i ^ 1];",
        "s[i] = x[i];\n__syncwarp(i & 1 ? 0xaaaaaaaau : 0x55555555u);\nout[i] = s[i ^ 2];",
        "no barrier orders that|no thread of the block has written",
    ),
    "everybody writes": (
        "s[i % 4] = i;",
        "if (i < 4) s[i] = i;",
        r"s\[0\] written, and no barrier orders that",
    ),
    "addition that is not atomic": (
        "out[i / 32] += x[i];",
        "atomicAdd(&out[i / 32], x[i]);",
        r"out\[0\] read, and no barrier orders that after thread \(0,0,0\) of block \(0,0,0\) wrote it at kernel.cu:2",
    ),
    "atomic beside a plain write": (
        "if (i == 5) out[0] = 1;\natomicAdd(&out[0], x[i]);",
        "if (i == 5) out[0] = 1;\n__syncthreads();\natomicAdd(&out[0], x[i]);",
        r"out\[0\] (written beside an atomic \(write it by atomicExch|updated beside a plain write).*no barrier orders that after "
        r"thread \(\d,0,0\) "
        r"of block \(0,0,0\) (updated|wrote) it at kernel.cu:[23]",
    ),
}


def checked_text(body: str) -> str:
    memory = "extern __shared__ int dynamic[]; __shared__ int s[64];"
    return f"{HEAD}(const int* x, const int* row, int* out) {{ {memory} const int i = threadIdx.x;\n{body} }}"


@needs_counting
@pytest.mark.parametrize("name", CHECKS)
def test_check_finds(name: str) -> None:
    body, clean, message = CHECKS[name]
    x, rows = np.arange(64, dtype=np.int32), np.zeros((4, 16), np.int32)
    for chosen in ORDERS:
        with order(chosen), checked():
            with pytest.raises(KernelFault, match=f"^k: .*{message}" if chosen == "forward" else "^k: "):
                run(checked_text(body), x, rows[1], ints(), shared=256)
            run(checked_text(clean), x, rows[1], ints(), shared=256)


@needs_counting
def test_check_finds_races_between_blocks() -> None:
    x, out = np.arange(64, dtype=np.int32), ints()
    racy = f"{HEAD}(const int* x, int* out) {{\n__syncthreads();\nout[threadIdx.x] += x[threadIdx.x]; }}"
    with checked(), pytest.raises(KernelFault, match=r"out\[0\] read, .* thread \(0,0,0\) of block \(0,0,0\) wrote it at kernel.cu:3"):
        run(racy, x, out, grid=(2,))
    with checked():
        run(racy, x, out, grid=(1,))
        run(racy, x, out, grid=(1,))  # one launch is ordered after another
        run(f"{HEAD}(const int* x, int* out) {{ out[threadIdx.x + 64 * blockIdx.x] += x[threadIdx.x]; }}", x, ints(128), grid=(2,))


@needs_counting
def test_check_without_uninitialized_reads() -> None:
    text = checked_text("out[i] = s[i];")
    rows = np.arange(64, dtype=np.int32).reshape(4, 16)
    with checked(uninitialized=False):
        run(text, rows, rows[0], ints(), shared=256)
    with count_traffic() as traffic:
        run(text, rows, rows[0], ints(), shared=256)
    assert traffic.total.uninitialized_reads == 64


# Traffic: tiny kernels counted by hand


def traffic_of(body: str, *, block: int = 64, grid: int = 1, size: int = 4096, shared: int = 0) -> Traffic:
    parameters = "const float* __restrict__ x, float* __restrict__ out"
    text = f"{HEAD}({parameters}) {{ extern __shared__ float s[]; const int i = threadIdx.x;\n{body} }}"
    with count_traffic() as traffic:
        run(text, np.ones(size, np.float32), np.zeros(size, np.float32), block=(block,), grid=(grid,), shared=shared)
    (launch,) = traffic.launches
    return launch


BYTES = {"global_read_bytes": 256, "global_written_bytes": 256, "global_accesses": 4}
SHARED = "for (int j = i; j < 2048; j += blockDim.x) s[j] = 0; __syncthreads(); "  # 2048 / 64 = 32 accesses for each of 2 warps

TRAFFIC: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("out[i] = x[i];", {**BYTES, "global_sectors": 16, "least_global_sectors": 16, "coalescing": 1.0}),
    "copy from an offset": ("out[i] = x[i + 1];", {**BYTES, "global_sectors": 8 + 2 * 5, "least_global_sectors": 16}),
    "stride 2": ("out[i] = x[2 * i];", {**BYTES, "global_sectors": 8 + 2 * 8, "least_global_sectors": 16}),
    "stride 32": ("out[i] = x[32 * i];", {**BYTES, "global_sectors": 8 + 2 * 32, "least_global_sectors": 16}),
    "reversed": ("out[i] = x[63 - i];", {**BYTES, "global_sectors": 16, "least_global_sectors": 16}),
    "broadcast": ("out[i] = x[7];", {**BYTES, "global_sectors": 8 + 2, "least_global_sectors": 8 + 2}),
    "one lane": ("if (i == 40) out[i] = x[i];", {"global_accesses": 2, "global_sectors": 2, "global_read_bytes": 4}),
    "a float4 to a thread": (
        "const float4 v = reinterpret_cast<const float4*>(x)[i];\nreinterpret_cast<float4*>(out)[i] = make_float4(v.w, v.z, v.y, v.x);",
        {"global_read_bytes": 1024, "global_written_bytes": 1024, "global_accesses": 4, "global_sectors": 64, "least_global_sectors": 64},
    ),
    "a float4 in four pieces": (
        "for (int j = 0; j < 4; ++j) out[4 * i + j] = x[4 * i + j];",
        {"global_read_bytes": 1024, "global_accesses": 16, "global_sectors": 256, "least_global_sectors": 64},
    ),
    "a float2": (
        "reinterpret_cast<float2*>(out)[i] = reinterpret_cast<const float2*>(x)[i];",
        {"global_read_bytes": 512, "global_accesses": 4, "global_sectors": 32, "least_global_sectors": 32},
    ),
    "bytes": (
        "reinterpret_cast<char*>(out)[i] = reinterpret_cast<const char*>(x)[i];",
        {"global_read_bytes": 64, "global_accesses": 4, "global_sectors": 4, "least_global_sectors": 4},
    ),
    "by __ldg": ("out[i] = __ldg(x + i) + __ldg(x + 64 + i);", {**BYTES, "global_read_bytes": 512, "global_accesses": 6}),
    "a loop that lanes leave early": (  # lane l of warp w reads ceil((100 - 32 w - l) / 64) times
        "float sum = 0;\nfor (int j = i; j < 100; j += 64) sum += x[j];\nout[i] = sum;",
        {"global_read_bytes": 400, "global_accesses": 2 + 2 + 2, "global_sectors": 8 + 4 + 4 + 4 + 1},
    ),
    "lanes that loop unlike times meet again at the shuffle": (
        """float sum = 0;
        for (int r = 0; r < 2; ++r) {
          for (int j = 0; j <= i % 2; ++j) sum += x[i + 64 * j + 128 * r];
          sum += __shfl_xor_sync(~0u, sum, 1);
        }
        out[i] = sum;""",
        {"global_read_bytes": 2 * 96 * 4, "global_accesses": 2 * 2 * 2 + 2, "global_sectors": 2 * 2 * 2 * 4 + 8, "shuffles": 4},
    ),
    "no bank conflict": (SHARED + "out[i] = s[i];", {"shared_accesses": 64 + 2, "shared_wavefronts": 64 + 2, "bank_conflicts": 0}),
    "same word": (SHARED + "out[i] = s[5];", {"shared_accesses": 64 + 2, "bank_conflicts": 0}),
    "stride 33": (SHARED + "out[i] = s[33 * (i % 32)];", {"bank_conflicts": 0}),
    "stride 2 in shared memory": (SHARED + "out[i] = s[2 * i];", {"bank_conflicts": 2 * 1}),
    "stride 32 in shared memory": (SHARED + "out[i] = s[32 * i];", {"bank_conflicts": 2 * 31, "shared_wavefronts": 64 + 64}),
    "float4 in shared memory": (
        SHARED + "const float4 v = reinterpret_cast<float4*>(s)[i]; out[i] = v.x + v.w;",
        {"shared_accesses": 64 + 2, "shared_wavefronts": 64 + 2 * 4, "least_shared_wavefronts": 64 + 2 * 4, "bank_conflicts": 0},
    ),
    "float2 in shared memory, stride 2": (
        SHARED + "const float2 v = reinterpret_cast<float2*>(s)[2 * i]; out[i] = v.x + v.y;",
        {"shared_accesses": 64 + 2, "shared_wavefronts": 64 + 2 * 2 * 2, "bank_conflicts": 2 * 2},
    ),
    "bytes of shared memory": (SHARED + "out[i] = reinterpret_cast<char*>(s)[i];", {"bank_conflicts": 0, "shared_read_bytes": 64}),
    "atomics apart": (
        "atomicAdd(&out[i], 1.f);",
        {
            "global_atomics": 64,
            "global_atomic_bytes": 256,
            "global_atomic_collisions": 0,
            "global_atomics_contended": 0,
            "global_sectors": 8,
        },
    ),
    "atomics in pairs": (
        "atomicAdd(&out[i / 2], 1.f);",
        {"global_atomics": 64, "global_atomic_collisions": 32, "global_atomics_contended": 32, "global_sectors": 4},
    ),
    "atomics on one": (
        "atomicAdd(&out[0], 1.f);",
        {"global_atomics": 64, "global_atomic_collisions": 2 * 31, "global_atomics_contended": 63, "global_sectors": 2},
    ),
    "atomics in shared memory": (
        SHARED + "atomicAdd(&s[i % 4], 1.f);\n__syncthreads();\natomicAdd(&s[i], 1.f);",
        {"shared_atomics": 128, "shared_atomic_collisions": 2 * 28, "shared_atomics_contended": 60, "barriers": 2, "global_atomics": 0},
    ),
    "barriers, votes, shuffles": (
        "__syncthreads(); __syncwarp(); out[i] = __ballot_sync(~0u, 1) + __shfl_sync(~0u, i, 0) + __syncthreads_or(i);",
        {"barriers": 2, "warp_syncs": 2, "votes": 2, "shuffles": 2},
    ),
    "local memory and constants": (
        """const int table[4] = {1, 2, 3, 4};
        volatile int local[4];
        for (int j = 0; j < 4; ++j) local[(j + i) % 4] = table[(i + j) % 4];
        out[i] = local[i % 4];""",
        {"global_read_bytes": 0, "global_written_bytes": 256, "shared_accesses": 0},
    ),
}


@needs_counting
@pytest.mark.parametrize("name", TRAFFIC)
def test_traffic(name: str) -> None:
    body, expected = TRAFFIC[name]
    for chosen in ORDERS:
        with order(chosen):
            found = traffic_of(body, shared=8192)
        assert {key: getattr(found, key) for key in expected} == expected
        assert (found.kernel, found.launches, found.blocks, found.threads) == ("k", 1, 1, 64)


@needs_counting
def test_traffic_by_line() -> None:
    found = traffic_of("const float v = x[i];\n\nout[2 * i] = v + x[i + 64];", grid=2)
    assert [(line.file, line.line, line.global_read_bytes, line.global_written_bytes, line.global_sectors) for line in found.lines] == [
        ("kernel.cu", 2, 512, 0, 16),
        ("kernel.cu", 4, 512, 512, 16 + 32),
    ]
    assert sum(line.global_accesses for line in found.lines) == found.global_accesses
    assert (found.blocks, found.threads) == (2, 128)


@needs_counting
def test_traffic_of_a_variant() -> None:
    x = np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)
    with count_traffic() as traffic:
        ranks()
        with count_traffic() as inner:
            signs = reference.sample_signs(8, 8, 64, layout="paper", rng=1)
            codes = yoso_core.fast_hash(x, signs, 8, 8, layout="paper", variant="emulated:block_per_part")
    ranks()
    assert [launch.kernel for launch in traffic.launches] == ["k", "block_per_part"]
    assert [launch.kernel for launch in inner.launches] == ["block_per_part"]
    hashed = inner.launches[0]
    assert hashed.global_written_bytes == codes.nbytes
    assert hashed.global_read_bytes == x.nbytes + 3 * 3 * 64  # the vector once, a byte for each sign
    assert hashed.shuffles == 3 * 2 * (5 + 3 * 5)  # 3 vectors, 2 warps: the largest entry, and 5 strides in each of 3 rounds
    assert traffic.total.launches == 2
    assert traffic.total.global_bytes == sum(launch.global_bytes for launch in traffic.launches)
    lines = str(traffic).splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "k", "block_per_part", "total"]
    assert len({len(line) for line in lines}) == 1


# Every kernel, through its launcher

EMULATED = [kernel for kernel in registry.KERNELS if kernel.where == "emulated"]
MASKED = Case(17, 137, 48, 20, 33, 8, mask="masked")
CROWDED = Case(137, 137, 64, 40, 3, 1, leading=())  # so many to a bucket that every loop over tiles goes round again
LONG_CODES = Case(7, 63, 7, 80, 7, 13, "float16", mask="fully", kind="repeated")


def run_checked(kernel: registry.Kernel, case: Case) -> None:
    inputs = {name: as_dtype(x, case.dtype) for name, x in build(kernel.op, case).items()}
    with checked():
        getattr(yoso_core, kernel.op)(**inputs, variant=kernel.name)


@needs_counting
@pytest.mark.parametrize("case", [MASKED, CROWDED, LONG_CODES], ids=str)
@pytest.mark.parametrize("kernel", EMULATED, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_kernels_pass_the_check(kernel: registry.Kernel, case: Case) -> None:
    for variant in with_every_kernel(kernel, case):
        run_checked(kernel, variant)


BARRIER = re.compile(r"__sync(?:threads|warp)\(\);(?!  // .* before other blocks are told$)", re.MULTILINE)
"""One that orders what a block does before what others do later is not tried: here blocks run one
after the other.
"""
BARRIERS = [
    pytest.param(file, found.start(), id=f"{file}:{text.count(chr(10), 0, found.start()) + 1}")
    for file in source.FILES
    for text in [(source.HERE / file).read_text("utf-8")]
    for found in BARRIER.finditer(text)
]


@pytest.mark.slow
@needs_counting
@pytest.mark.parametrize(("file", "at"), BARRIERS)
def test_every_barrier_is_needed(file: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without one of its barriers does not pass the check."""
    text, whole = (source.HERE / file).read_text("utf-8"), source.source(file)
    start = len(whole) - len(text) + at  # headers are put in above
    assert whole[start:] == text[at:]
    spoiled, real = whole[:start] + BARRIER.sub(";", whole[start:], count=1), source.source
    monkeypatch.setattr(source, "source", lambda name: spoiled if name == file else real(name))

    def run_all() -> None:
        for case in (CROWDED, MASKED, replace(MASKED, n_q=65)):  # the last: several groups of queries for hashes in two turns
            for kernel in EMULATED:
                if set(kernel.kernels) & set(source.kernels_in(file)):
                    for variant in with_every_kernel(kernel, case):
                        if kernel.op != "yoso_attention" or variant.return_error:  # its other kernels are those of other operations
                            run_checked(kernel, variant)

    with pytest.raises(KernelFault, match=r"no barrier orders that|no thread of the block has written"):
        run_all()
