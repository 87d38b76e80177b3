"""Kernels with the bugs that people write. Run as a program, it launches each of them in one
process, one after the other, and after each a sound one.
"""

import re
from typing import Any

import numpy as np

from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator, KernelFault, checked

# name -> the body of k(float* x, float* o, int* c, int n, float* null), and what its fault says.
# x, o and c have n = 100 entries, x of 0 to 99, o and c of zeros. There are 4 blocks of 32 threads:
# i is the index in the grid, t that in the block.
BROKEN: dict[str, tuple[str, str]] = {
    # Indices
    "no guard": ("o[i] = x[i];", r"x\[100\] read, x has 100 entries"),
    "a guard that is off by one": ("if (i <= n) o[i] = x[i];", r"x\[100\] read, x has 100 entries"),
    "one too far": ("if (i < n) o[i] = x[i + 1];", r"x\[100\] read, x has 100 entries"),
    "one before": ("if (i < n) o[i] = x[i - 1];", r"x\[-1\] read, x has 100 entries"),
    "one before, unsigned": ("if (i < n) o[i] = x[threadIdx.x - 1];", r"x\[4294967295\] read, .*the index is -1, as an unsigned number"),
    "far beyond": ("o[i * 100000] = 1;", r"o\[100000\] written, o has 100 entries"),
    "far before": ("o[i * -100000 - 1] = 1;", r"o\[-1\] written"),
    "rows and columns exchanged": (
        "const int row = t, column = blockIdx.x; if (row < 4 && column < 25) o[column * 1000 + row] = 1;",
        r"o\[1000\] written",
    ),
    "bytes for entries": ("o[i * sizeof(float)] = 1;", r"o\[100\] written"),
    "an index that overflows": ("o[i * 100000 * 100000] = 1;", r"o\[1410065408\] written|100000 \* 100000 overflows 'int'"),
    "a negative size": ("for (int j = 0; j < n; ++j) o[j - 2 * n] = 1;", r"o\[-200\] written"),
    "an index from data": ("o[c[i]] = 1;", r"c\[100\] read"),
    "an index from NaN": ("o[int(x[t] / 0.f * 0.f) - 1] = 1;", r"o\[-1\] written"),
    "an atomic beyond": ("atomicAdd(&o[n + t], 1.f);", r"o\[100\] (read|updated)"),
    "a vector beyond": ("reinterpret_cast<float4*>(o)[t] = make_float4(0, 0, 0, 0);", r"o\[100(\.\.103)?\] written, o has 100 entries"),
    "a wild pointer": (
        "*reinterpret_cast<float*>(0x123456789abcull + t) = 1;",
        "memory is written at 0x123456789abc, far from every array",
    ),
    "a pointer that is no address": (
        "*reinterpret_cast<float*>(0x8000000000000000ull + 4 * t) = 1;",
        "memory is written at 0x8000000000000000, far from every array",
    ),
    "a pointer to code": ("*reinterpret_cast<char*>(&lock) = 1;", r"memory is written at 0x\w+, far from every array"),
    "an uninitialized pointer": ("float* p; *p = x[t];", "memory is written through a null pointer"),
    "a null pointer": ("null[i] = 1;", r"memory is written through a null pointer \(None was passed for null\)"),
    "a null pointer, read": ("o[t] = null[t];", "memory is read through a null pointer"),
    "vectors at odd addresses": (
        "*reinterpret_cast<float4*>(o) = *reinterpret_cast<const float4*>(x + 1);",
        "16 bytes are read at an address that is no multiple of 16",
    ),
    "doubles at odd addresses": ("*reinterpret_cast<double*>(o + 1) = 1;", "8 bytes are written at an address that is no multiple of 8"),
    "a misaligned atomic": (
        "atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(c) + 1), 1);",
        "4 bytes are updated at an address that is no multiple of 4",
    ),
    # Memory of a block, of a thread, of the program
    "past shared memory": ("__shared__ float s[32]; s[t + 1] = 1; o[t] = s[t];", r"s\[32\] is used, s has 32 entries"),
    "past one of two": (
        "__shared__ float a[32], b[32]; b[t] = 5; __syncthreads(); a[t + 1] = 1; __syncthreads(); o[t] = b[t];",
        r"a\[32\] is used, a has 32 entries",
    ),
    "past a row": ("__shared__ float s[4][8]; s[0][t] = 1; o[t] = s[0][t % 8];", r"s\[0\]\[8\] is used, s\[0\] has 8 entries"),
    "far past shared memory": ("__shared__ float s[32]; s[t * 1000000] = 1;", r"s\[1000000\] is used, s has 32 entries"),
    "before shared memory": (
        "__shared__ float s[32]; (&s[0])[-1 - t * 1000] = 1;",
        r"s\[-1\] written, s has 32 entries|memory is written at",
    ),
    "dynamic shared memory that nobody asked for": (
        "extern __shared__ float s[]; s[t] = 1; __syncthreads(); o[t] = s[31 - t];",
        "shared memory is written, but the launch gives it none",
    ),
    "far past dynamic shared memory": (
        "extern __shared__ float s[]; s[t * 10000000] = 1;",
        "shared memory is written, but the launch gives it none|memory is written at",
    ),
    "too much shared memory": ("__shared__ float s[20000]; s[t] = 1; o[t] = s[t];", "80000 bytes of static shared memory with s"),
    "past a local array": ("float a[4]; for (int j = 0; j <= 4; ++j) a[j] = j; o[t] = a[t % 4];", r"a\[4\] is used, a has 4 entries"),
    "far past a local array": ("float a[4]; a[n * 100000] = 1; o[t] = a[t % 4];", r"a\[10000000\] is used, a has 4 entries"),
    "past a local array by a pointer": (
        "float a[4]; float* p = a; for (int j = 0; j < n * 1000; ++j) p[j] = j; o[t] = a[t % 4];",
        "a local array is written far past its end",
    ),
    "before a local array by a pointer": (
        "float a[4]; float* p = a; for (int j = 0; j < n * 10000; ++j) p[-j] = j; o[t] = a[t % 4];",
        "local memory overflows",
    ),
    "a big local array": (
        "float a[10000000]; for (int j = 0; j < n; ++j) a[j * 99999] = j; o[t] = a[t];",
        "local memory overflows: a thread has 512 KiB",
    ),
    "endless recursion": ("o[t] = depth(t);", "local memory overflows"),
    "past a variable": ("table[n] = 1;", r"table\[100\] is used, table has 8 entries"),
    "far past a variable": ("table[n * 1000000] = 1;", r"table\[100000000\] is used"),
    "past a constant": ("o[t] = weights[n];", r"weights\[100\] is used, weights has 3 entries"),
    # Threads that wait, or do not
    "an endless loop": ("for (int j = t; j < n; j += n - 100) o[0] = 1;", "never ends: the thread goes round and round"),
    "an endless loop of nothing": ("for (;;) {}", "never ends"),
    "a flag that nobody sets": ("volatile int* flag = c; while (*flag == 0) {}", "never ends"),
    "a flag of a later block": (
        "if (blockIdx.x == 0) { while (atomicAdd(c, 0) == 0) {} } else { atomicExch(c, 1); }",
        "never ends: .*here blocks run one after another",
    ),
    "a lock that is not given back": ("while (atomicCAS(c, 0, 1) != 0) {} o[0] += 1;", "never ends"),
    "a lock that is taken twice": ("lock(c); lock(c); o[0] += 1;", "never ends"),
    "a barrier in a branch": (
        "if (t < 16) { o[t] = 1; __syncthreads(); }",
        r"divergent barrier: thread \(0,0,0\) waits in __syncthreads at kernel.cu:9, and thread \(16,0,0\) has ended without it",
    ),
    "barriers in both branches": (
        "if (t < 16) { __syncthreads(); } else { __syncthreads(); }",
        "divergent barrier: .*another barrier of that line",
    ),
    "a return before a barrier": (
        "if (i >= n) return; __syncthreads(); o[i] = x[i];",
        r"divergent barrier: .* thread \(4,0,0\) has ended without it",
    ),
    "a barrier in a loop": (
        "for (int j = 0; j < t; ++j) __syncthreads();",
        r"divergent barrier: .* thread \(0,0,0\) has ended without it",
    ),
    "a barrier with a lock": ("lock(c); __syncthreads(); atomicExch(c, 0);", "never ends"),
    "a shuffle in a branch": ("if (t < 16) o[t] = __shfl_down_sync(~0u, x[t], 1);", r"__shfl_down_sync names thread \(16,0,0\)"),
    "a shuffle against a barrier": ("if (t < 16) o[t] = __shfl_sync(~0u, x[t], 0); else __syncthreads();", "deadlock"),
    "a lane that is not in the mask": ("o[t] = __shfl_sync(1u, x[t], 0);", "the calling lane 1 is not in its own mask"),
    "a vote of the exited": ("if (t >= 8) return; o[t] = __any_sync(~0u, 1);", "__any_sync names thread"),
    # The rest
    "division by zero": ("c[i % n] = n / (i - 5);", "integer division by zero"),
    "remainder by zero": ("c[i % n] = n % (i - 5);", "integer division by zero"),
    "the least integer by -1": ("c[0] = (c[0] - 2147483647 - 1) / (t - 1);", "integer division by zero, or the least integer by -1"),
    "an assertion": ("assert(i < 3);", "assertion failed: i < 3"),
    "a trap": ("__trap();", r"__trap\(\)"),
    "printf of a number as a text": ('printf("%s", t + 1);', "printf was given an address for a %s at which there is no text"),
    "printf without end": ('for (;;) printf("again\\n");', "has not ended in 1 s"),
    "printf of very much": ('for (int j = 0; j < 20000; ++j) printf("%1000d\\n", j); o[1000] = 1;', r"o\[1000\] written"),
    "no return": ("x[i % n] = missing(t);", "a function with a result ends without return"),
}

ONLY_CHECKED = {
    *("one before", "doubles at odd addresses", "a misaligned atomic", "dynamic shared memory that nobody asked for"),
    *("a barrier in a branch", "a return before a barrier", "a barrier in a loop"),
}
"""Without `checked` these run to their end."""

HEAD = """
__device__ int table[8];
__constant__ float weights[3];
__device__ int depth(int n) { volatile int pad[64] = {n}; return n < 0 ? 0 : depth(n + 1) + pad[n % 64]; }
__device__ void lock(int* m) { while (atomicCAS(m, 0, 1) != 0) {} }
__device__ float missing(int t) { if (t > 100) return 1; }
extern "C" __global__ void k(float* x, float* o, int* c, int n, float* null) {
  const int t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
"""
SOUND = KernelText(
    'extern "C" __global__ void sound(float* x) { x[threadIdx.x] = __shfl_sync(~0u, float(threadIdx.x), threadIdx.x ^ 1); }', "sound"
)


def outcome(body: str) -> str:
    """What a broken kernel does: its fault, or that it ran."""
    x, o, c = np.arange(100, dtype=np.float32), np.zeros(100, np.float32), np.zeros(100, np.int32)
    arguments: dict[str, Any] = {"x": x, "o": o, "c": c, "n": np.int32(100), "null": None}
    try:
        Emulator(timeout=1 if body.startswith("for (;;) printf") else 60).launch(KernelText(f"{HEAD}{body}\n}}", "k"), 4, 32, arguments)
    except KernelFault as fault:
        assert not o.any(), "after a fault the arrays are as they were"
        return str(fault)
    return "ran"


def main() -> None:
    for number, (name, (body, words)) in enumerate(BROKEN.items()):
        found = outcome(body)
        assert re.match("ran" if name in ONLY_CHECKED else f"k: .*({words})", found), f"{name}: {found}"
        if name in ONLY_CHECKED or number % 5 == 0:
            with checked():
                found = outcome(body)
            assert re.match(f"k: .*({words})", found), f"{name}, checked: {found}"
        x = np.zeros(32, np.float32)
        Emulator().launch(SOUND, 1, 32, (x,))
        assert (x == np.arange(32) ^ 1).all()
    print(len(BROKEN), "broken kernels, one sound process")


if __name__ == "__main__":
    main()
