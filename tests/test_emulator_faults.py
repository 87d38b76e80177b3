"""Nothing that a kernel does in the emulator ends or freezes the process: arrays stand between
pages that are not there, a Ctrl-C or a time limit ends any loop, threads that wait for each other
are told from threads that wait for ever. And what `checked` says about barriers, atomics and
fences.
"""

import os
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator, KernelFault, checked, missing, order
from yoso_core.gpu.emulator import build as building
from yoso_core.reference.arrays import Array

needs_compiler = pytest.mark.skipif(missing() is not None, reason=missing() or "")
needs_counting = pytest.mark.skipif(building.missing_for_counting() is not None, reason=building.missing_for_counting() or "")
needs_linux_on_x86 = pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="needs Linux on x86-64")

ORDERS = ("forward", "reverse", 3)
HEAD = 'extern "C" __global__ void k'
COPY = f"{HEAD}(const float* x, float* o) {{ const int i = blockIdx.x * blockDim.x + threadIdx.x; o[i] = x[i]; }}"


def run(text: str, *args: Any, grid: int = 1, block: int = 64, shared: int = 0, **options: Any) -> None:
    Emulator(**options).launch(KernelText(textwrap.dedent(text), "k"), grid, block, args, shared)


def fault_of(text: str, *args: Any, **sizes: Any) -> str:
    with pytest.raises(KernelFault) as caught:
        run(text, *args, **sizes)
    return str(caught.value)


def floats(n: int) -> Array:
    return np.arange(n, dtype=np.float32)


def ints(n: int = 64) -> Array:
    return np.zeros(n, np.int32)


# Many bugs, one process


@pytest.mark.slow
@needs_counting
@needs_linux_on_x86
def test_no_broken_kernel_ends_the_process() -> None:
    program = Path(__file__).with_name("broken_kernels.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "broken kernels, one sound process" in done.stdout


# Arrays


@needs_counting
@pytest.mark.parametrize("n", [1, 2, 3, 31, 97, 100, 1001, 1023, 1024, 4095])
def test_the_first_entry_that_is_not_there_is_named(n: int) -> None:
    """In the plain build; also in the few bytes between the end of an array and of its page."""
    x, o = floats(n), np.zeros(n, np.float32)
    blocks = -(-(n + 1) // 32)
    fault = fault_of(COPY, x, o, grid=blocks, block=32)
    entries = "1 entry" if n == 1 else f"{n} entries"
    assert fault.startswith(f"k: x[{n}] read, x has {entries} (block ({n // 32}, 0, 0), thread ({n % 32}, 0, 0), kernel.cu:1)")
    assert not o.any()
    written = fault_of(f"{HEAD}(float* o) {{ o[blockIdx.x * blockDim.x + threadIdx.x] = 1; }}", o, grid=blocks, block=32)
    assert written.startswith(f"k: o[{n}] written, o has {entries} ")


@needs_counting
def test_a_write_before_an_array() -> None:
    assert fault_of(f"{HEAD}(float* o) {{ o[int(threadIdx.x) - 1] = 1; }}", floats(100)).startswith("k: o[-1] written, o has 100 entries")


@needs_compiler
def test_each_type_counts_its_own_entries() -> None:
    assert "v[16..16]" not in (found := fault_of(f"{HEAD}(float4* v) {{ v[threadIdx.x] = make_float4(0, 0, 0, 0); }}", floats(64)))
    assert "v[16] written, v has 16 entries" in found
    assert "x[0] read, x has 0 entries" in fault_of(COPY, floats(0), floats(64))
    assert "x[64] read, x has 64 entries" in fault_of(COPY.replace("float", "double"), np.zeros((8, 8)), np.zeros(99), block=99)


@needs_compiler
def test_arrays_go_back_when_a_launch_ended_well() -> None:
    memory = np.zeros(192, np.float32)
    x, o = memory[:64], memory[64:128]  # neighbors: each ends where its own array does
    x[:] = floats(64)
    run(COPY, x, o)
    np.testing.assert_array_equal(memory, np.concatenate([floats(64), floats(64), np.zeros(64)]))
    assert "x[64] read" in fault_of(COPY, x, o, block=65)
    shift = f"{HEAD}(float* x, float* o) {{ const float v = x[threadIdx.x]; __syncthreads(); o[threadIdx.x] = v; }}"
    run(shift, memory[:64], memory[1:65])  # two views of the same memory stay two views of the same memory
    np.testing.assert_array_equal(memory[:65], [0, *range(64)])


@needs_compiler
def test_an_array_that_is_read_only() -> None:
    x, o = floats(64), np.zeros(64, np.float32)
    x.flags.writeable = False
    run(COPY, x, o)
    np.testing.assert_array_equal(o, x)
    assert "o was written, but the array that was passed is read-only" in fault_of(COPY, o[::-1].copy(), x)
    np.testing.assert_array_equal(x, floats(64))


@needs_compiler
def test_a_process_with_few_addresses() -> None:
    resource = pytest.importorskip("resource")
    code = f"""
        import resource
        import numpy as np
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        o = np.zeros(64, np.float32)
        Emulator().launch(KernelText({COPY!r}, "k"), 1, 64, (np.ones(64, np.float32), o))
        assert o.all()
    """
    assert resource
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


# Loops without end

ENDLESS = f"{HEAD}(unsigned* x) {{\n  for (volatile unsigned* count = x;;)\n    *count = *count + 1;\n}}"


@needs_compiler
def test_a_time_limit() -> None:
    fault_of(f"{HEAD}(int* x) {{ atomicAdd(x + 1000000, 1); }}", ints())  # a fault in the midst of an atomic is forgotten
    began = time.monotonic()
    x = np.ones(1, np.uint32)
    with pytest.raises(KernelFault, match=r"^k: has not ended in 0.3 s \(block \(0, 0, 0\), thread \(\d+, 0, 0\)") as caught:
        run(ENDLESS, x, timeout=0.3)
    assert time.monotonic() - began < 10
    assert caught.value.line in (2, 3)
    assert x[0] == 1
    run(COPY, floats(64), floats(64), timeout=60)
    with pytest.raises(ValueError, match="timeout: got 0, must be a positive number of seconds"):
        Emulator(timeout=0)


@needs_compiler
@pytest.mark.parametrize("watched", [False, pytest.param(True, marks=needs_counting)])
def test_a_ctrl_c(watched: bool) -> None:
    """The real signal, in a process of its own."""
    code = f"""
        import os, signal, threading, time
        import numpy as np
        from contextlib import nullcontext
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator, checked
        x, o = np.zeros(64, np.uint32), np.zeros(64, np.float32)
        def interrupt():
            global sent
            sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGINT)
        with checked() if {watched} else nullcontext():
            Emulator().launch(KernelText({COPY!r}, "k"), 1, 64, (np.ones(64, np.float32), o))
            threading.Timer(1.5, interrupt).start()
            try:
                Emulator().launch(KernelText({ENDLESS!r}, "k"), 1, 1, (x,))
            except KeyboardInterrupt as stopped:
                assert time.monotonic() - sent < 1, time.monotonic() - sent
                print(stopped.__notes__)
            o[:] = 0
            Emulator().launch(KernelText({COPY!r}, "k"), 1, 64, (np.ones(64, np.float32), o))
        assert o.all() and not x.any()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "k: was stopped (block (0, 0, 0), thread (0, 0, 0), kernel.cu:" in done.stdout


@needs_compiler
def test_a_time_limit_in_another_thread() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(fault_of(ENDLESS, np.zeros(1, np.uint32), block=1, timeout=0.3)))
    thread.start()
    thread.join(60)
    assert "has not ended in 0.3 s" in found[0]


# Threads that wait for others: the body, and what entry 1 of x is when all have ended

WAITS = {
    "a flag, read atomically": ("if (t == 0) { while (atomicAdd(x, 0) == 0) {} x[1] = 7; } else if (t == 63) atomicExch(x, 1);", 7),
    "a flag in volatile memory": (
        "if (t == 0) { while (*(volatile int*)x == 0) {} x[1] = 7; } else if (t == 40) *(volatile int*)x = 1;",
        7,
    ),
    "a lock": ("while (atomicCAS(x, 0, 1) != 0) {} x[1] += 1; atomicExch(x, 0);", 64),
    "one after another": ("while (atomicAdd(x, 0) != t) {} x[1] = 2 * x[1] % 1000 + t; atomicAdd(x, 1);", None),
    "a lock that is held at a barrier of its warp": (
        "if (t % 32 == 0) while (atomicCAS(x, 0, 1) != 0) {} __syncwarp(); atomicAdd(x + 1, 1); __syncwarp();\n"
        "if (t % 32 == 0) atomicExch(x, 0);",
        64,
    ),
    "long, and not waiting": ("for (int j = 0; j < 50000000; ++j) atomicMax(x, t); x[1] = 7;", 7),
}


@needs_compiler
@needs_linux_on_x86
@pytest.mark.parametrize("name", WAITS)
def test_threads_wait_for_each_other(name: str) -> None:
    body, expected = WAITS[name]
    if expected is None:
        expected = 0
        for t in range(64):
            expected = 2 * expected % 1000 + t
    for chosen in ORDERS[: 1 if "long" in name else 3]:
        x = ints()
        with order(chosen):
            run(f"{HEAD}(int* x) {{ const int t = threadIdx.x;\n{body} }}", x, block=1 if "long" in name else 64)
        assert x[1] == expected


# What a kernel prints


@needs_compiler
def test_printf_comes_in_order_and_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    text = f'{HEAD}(int* x) {{ printf("thread %d of %s: %.1f\\n", threadIdx.x, "two", 0.5f); if (x) x[threadIdx.x * 1000000] = 1; }}'
    print("before")
    run(text, None, block=2)
    print("between")
    fault_of(text, ints(), block=2)
    print("after")
    lines = "thread 0 of two: 0.5\nthread 1 of two: 0.5\n"
    assert capsys.readouterr().out == f"before\n{lines}between\n{lines}after\n"
    run(f'{HEAD}(int n) {{ for (int i = 0; i < n; ++i) printf("%1000d\\n", i); }}', np.int32(3000), block=1)
    out = capsys.readouterr().out
    assert len(out) < 1_100_000
    assert out.endswith("more calls of printf]\n")


# Barriers

BARRIERS = {
    "under an if": ("if (t < 32)\n__syncthreads();", True),
    "after a return": ("if (t >= 40) return;\n__syncthreads();", True),
    "in a loop whose count differs": ("for (int j = 0; j <= t % 2; ++j)\n__syncthreads();", True),
    "both in one line": ("if (t < 32) __syncthreads(); else __syncthreads();", False),
    "both in a macro": ("#define BOTH if (t < 32) { __syncthreads(); } else { __syncthreads_or(1); }\nBOTH", False),
    "of one function, in two branches": ("if (t < 32) meet(); else meet();", None),
    "for all": ("__syncthreads();\nif (t < 32) x[t] = 1;", None),
}


@needs_counting
@pytest.mark.parametrize("name", BARRIERS)
def test_barriers_that_not_all_threads_meet(name: str) -> None:
    """On hardware a thread that has ended is not waited for. So a launch runs on; `checked` reports
    it.
    """
    body, ends_without_check = BARRIERS[name]
    text = f"__device__ void meet() {{ __syncthreads(); }}\n{HEAD}(int* x) {{ const int t = threadIdx.x;\n{body}\n}}"
    for chosen in ORDERS:
        with order(chosen):
            if ends_without_check is False:
                assert "another barrier of that line" in fault_of(text, ints()) or "macro" in name
            else:
                run(text, ints())
            with checked(early_exit=False):
                if ends_without_check is not False:
                    run(text, ints())
            with checked():
                if ends_without_check is None:
                    run(text, ints())
                else:
                    fault = fault_of(text, ints())
                    assert fault.startswith("k: divergent barrier: thread (")
                    assert ("has ended without it; hardware lets it go" in fault) == ends_without_check


# Atomics and fences: name -> kernel of x, y and flag, and what `checked` says; None for nothing

ADD_BY_CAS = """
__device__ float add(float* a, float v) {
  int* p = (int*)a; int old = *p, assumed;
  do { assumed = old; old = atomicCAS(p, assumed, __float_as_int(v + __int_as_float(assumed))); } while (assumed != old);
  return __int_as_float(old);
}
"""
LOCK = """
__device__ void lock(int* m) { while (atomicCAS(m, 0, 1) != 0) {} __threadfence(); }
__device__ void unlock(int* m) { __threadfence(); atomicExch(m, 0); }
"""
LAST_BLOCK = """
  __shared__ float s[64]; __shared__ bool last;
  s[t] = x[t]; __syncthreads();
  for (int d = 32; d; d /= 2) { if (t < d) s[t] += s[t + d]; __syncthreads(); }
  if (t == 0) { y[blockIdx.x] = s[0]; __threadfence(); last = atomicAdd(flag, 1) == gridDim.x - 1; }
  __syncthreads();
  if (last && t < gridDim.x) atomicAdd(y + 8, y[t]);"""
MESSAGE = """
  if (blockIdx.x + t == 0) { y[0] = 5; __threadfence(); *(volatile int*)flag = 1; }
  else if (*(volatile int*)flag) { __threadfence(); x[1 + blockIdx.x] = y[0]; }"""

ATOMICS: dict[str, tuple[str, str | None]] = {
    "a loop of compare-and-swap": (f"{ADD_BY_CAS}|add(y, x[t]);", None),
    "a maximum that looks first": ("|if (flag[1] < t) atomicMax(flag + 1, t); else atomicMax(flag + 1, -1);", None),
    "a lock": (f"{LOCK}|lock(flag); y[0] += 1; unlock(flag);", None),
    "a lock without fences": (
        f"{LOCK.replace('__threadfence();', '')}|lock(flag); y[0] += 1; unlock(flag);",
        r"y\[0\] read, and no barrier",
    ),
    "a lock without a fence behind": (
        f"{LOCK.replace('{ __threadfence();', '{')}|lock(flag); y[0] += 1; unlock(flag);",
        r"y\[0\] read, and no barrier",
    ),
    "a lock whose fence is of its block": (
        f"{LOCK.replace('fence', 'fence_block')}|lock(flag); y[0] += 1; unlock(flag);",
        r"y\[0\] read, and no barrier orders that after thread .* of block \(0,0,0\)",
    ),
    "the last block": (f"|{LAST_BLOCK}", None),
    "the last block without a fence": (f"|{LAST_BLOCK.replace('__threadfence();', '')}", r"y\[0\] read, and no barrier orders"),
    "a message": (f"|if (t == 0) {{ {MESSAGE} }}", None),
    "a message without a fence": (f"|if (t == 0) {{ {MESSAGE.replace('__threadfence();', '')} }}", r"y\[0\] read, and no barrier orders"),
    "a plain read of what is updated": (
        "|if (t == 0) atomicAdd(flag, 1); else y[t] = flag[0];",
        r"flag\[0\] read beside an atomic \(read it by atomicAdd\(p, 0\) or as volatile, or put a barrier between\), and no barrier "
        r"orders that after thread \(0,0,0\) of block \(0,0,0\) updated it",
    ),
    "a volatile read of what is updated": ("|if (t == 0) atomicAdd(flag, 1); else if (*(volatile int*)flag == 77) x[t] = 1;", None),
    "a plain write beside an atomic": (
        "|if (t == 0) atomicAdd(flag, 1); else if (t == 1) flag[0] = 0;",
        r"flag\[0\] written beside an atomic \(write",
    ),
    "volatile in shared memory is no barrier": (
        "|__shared__ volatile float s[64]; s[t] = x[t]; __syncthreads(); if (t < 16) s[t] += s[t + 16]; if (t < 8) s[t] += s[t + 8];",
        r"s\[\d+\] (read|written), and no barrier orders",
    ),
}


@needs_counting
@pytest.mark.parametrize("name", ATOMICS)
def test_what_atomics_and_fences_order(name: str) -> None:
    code, words = ATOMICS[name]
    functions, _, body = code.partition("|")
    text = f"{functions}{HEAD}(float* x, float* y, int* flag) {{ const int t = threadIdx.x;\n{body}\n}}"
    for chosen in ORDERS:
        arguments = floats(64), np.zeros(64, np.float32), ints()
        with order(chosen), checked():
            if words is None:
                run(text, *arguments, grid=3)
            elif chosen == "forward":
                with pytest.raises(KernelFault, match=words):
                    run(text, *arguments, grid=3)
            elif "message" not in name and "updated" not in name:  # whose reader must come second
                fault_of(text, *arguments, grid=3)


# Results that C++ leaves open

NUMBERS = [1e10, -1e10, np.nan, -1.5, -0.5, 300.0, -300.0, 5e9, 1e19, 2e19, np.inf, -np.inf, 70000.0, -70000.0, 9.3e18, 1e38, 1.5]
TYPES = {
    "signed char": np.int8,
    "unsigned char": np.uint8,
    "short": np.int16,
    "unsigned short": np.uint16,
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
}


def as_ptx(value: float, is_double: bool, dtype: Any) -> int:
    """``cvt.rzi``, as the PTX manual has it; numbers of 8 bits are the low bits of those of 16."""
    wide = np.iinfo({np.int8: np.int16, np.uint8: np.uint16}.get(dtype, dtype))
    if np.isnan(value):
        made = 1 << (wide.bits - 1) if is_double or wide.bits == 64 else 0
    else:
        made = int(min(max(np.trunc(value), wide.min), wide.max)) if abs(value) < 1e30 else wide.max if value > 0 else wide.min
    bits = np.iinfo(dtype).bits
    made &= (1 << bits) - 1
    return made - (1 << bits) if np.iinfo(dtype).min and made >> (bits - 1) else made


@needs_compiler
@needs_linux_on_x86
@pytest.mark.parametrize("source", ["float", "double"])
@pytest.mark.parametrize("target", TYPES)
def test_conversions_out_of_range_are_those_of_ptx(source: str, target: str) -> None:
    dtype = TYPES[target]
    x = np.array(NUMBERS, {"float": np.float32, "double": np.float64}[source])
    expected = [as_ptx(float(value), source == "double", dtype) for value in x]
    text = f"""
        {HEAD}(const {source}* x, {target}* o, int n) {{
          const int i = threadIdx.x;
          o[i] = x[i];
          o[n + i] = ({target})x[i];
          {target} sum = 0;
          for (int j = 0; j < 2; ++j) sum = static_cast<{target}>(x[i]);
          o[2 * n + i] = sum;
        }}"""
    for watched in (False, building.missing_for_counting() is None):
        o = np.zeros(3 * len(x), dtype)
        if watched:
            with checked():
                run(text, x, o, np.int32(len(x)), block=len(x))
        else:
            run(text, x, o, np.int32(len(x)), block=len(x))
        assert o.reshape(3, -1).tolist() == [expected] * 3


@needs_compiler
@needs_linux_on_x86
@pytest.mark.parametrize("target", list(TYPES)[4:])
def test_shifts_by_too_much_are_those_of_ptx(target: str) -> None:
    dtype = TYPES[target]
    width, amounts = np.iinfo(dtype).bits, [0, 1, 31, 32, 33, 63, 64, 65, -1, 1000]
    text = f"""
        {HEAD}(const {target}* x, const int* n, {target}* o) {{
          const int i = threadIdx.x;
          o[i] = x[0] << n[i];
          o[10 + i] = x[0] >> n[i];
          if (x[0] >> n[i] & 1) o[20 + i] = 7;
          o[30 + i] = x[0];
          o[30 + i] <<= n[i];
        }}"""
    for value in (1, -5):
        x, o = np.array([value]).astype(dtype), np.zeros(40, dtype)
        number = int(x[0])
        run(text, x, np.array(amounts, np.int32), o, block=10)
        in_range = [0 <= amount < width for amount in amounts]
        left = np.array([(number << amount) % 2**width if good else 0 for amount, good in zip(amounts, in_range, strict=True)], np.uint64)
        left = left.astype(dtype).tolist()
        right = [number >> amount if good else -(number < 0) for amount, good in zip(amounts, in_range, strict=True)]
        assert o.tolist() == left + right + [7 * (x & 1) for x in right] + left


@needs_compiler
def test_least_and_largest_beside_nan() -> None:
    o = np.zeros(6, np.float32)
    results = "o[0] = min(nan, 1.f), o[1] = max(nan, 1.f), o[2] = fminf(1.f, nan), o[3] = fmax(1., double(nan));"
    text = f"{HEAD}(float* o, float nan) {{ {results} }}"
    run(text, o, np.float32(np.nan), block=1)
    assert o.tolist() == [1, 1, 1, 1, 0, 0]


@needs_counting
def test_an_overflow_of_int_is_reported_by_the_check() -> None:
    text = f"{HEAD}(int* x) {{\n  x[1] = x[0] * 100000;\n}}"
    x = np.full(2, 100000, np.int32)
    with checked(), pytest.raises(KernelFault, match=r"100000 \* 100000 overflows 'int' \(block .* kernel.cu:2\)"):
        run(text, x, block=1)
    with checked():
        run(text.replace("int*", "unsigned*"), x.view(np.uint32), block=1)


# Constant memory


@needs_compiler
@pytest.mark.parametrize("watched", [False, pytest.param(True, marks=needs_counting)])
def test_constants(watched: bool) -> None:
    text = f"""
        __constant__ float coefficients[2][3], bias;
        static __constant__ int known[2] = {{5, 6}};
        {HEAD}(float* o) {{ const int t = threadIdx.x;
          o[t] = coefficients[t / 3][t % 3] + known[1];
          if (blockIdx.x == 1) o[t] += bias; }}"""
    kernel, o = KernelText(textwrap.dedent(text), "k"), np.zeros(6, np.float32)
    given = floats(6).reshape(2, 3)
    with checked() if watched else nullcontext():
        Emulator().launch(kernel, 1, 6, (o,), constants={"coefficients": given})
        np.testing.assert_array_equal(o, floats(6) + 6)
        with pytest.raises(KernelFault, match=r"coefficients\[0\]\[0\] read, but coefficients was never set: launch\(.* kernel.cu:5\)"):
            Emulator().launch(kernel, 1, 6, (o,))
        Emulator().launch(kernel, 1, 6, (o,), constants={"coefficients": given + 1, "bias": np.float32(2)})
        np.testing.assert_array_equal(o, floats(6) + 7)
    with pytest.raises(ValueError, match=r"constants: k has no __constant__ 'coefficient' without a value; it has bias, coefficients"):
        Emulator().launch(kernel, 1, 6, (o,), constants={"coefficient": given})
    for wrong in (given.astype(np.float64), given[:1]):
        with pytest.raises(TypeError, match=r"constants: coefficients is 6 of float32, got an array of float(64|32) of shape"):
            Emulator().launch(kernel, 1, 6, (o,), constants={"coefficients": wrong})


# Names


@needs_counting
def test_every_array_of_a_declaration_is_its_own() -> None:
    text = f"""{HEAD}(float* o) {{
      __shared__ float a[16], b[16], *c, d; b[threadIdx.x] = 5; __syncthreads();
      float* p = a; p[threadIdx.x + 1] = 1; }}"""
    with checked():
        assert "a[16] written, a has 16 entries (block (0, 0, 0), thread (15, 0, 0), kernel.cu:3)" in fault_of(text, floats(16), block=16)
    tiles = f"{HEAD}(float* o) {{ __shared__ float As[16][17], Bs[16][17]; float* p = As[0];\np[17 * threadIdx.x] = 1; }}"
    with checked():
        assert "As[16][0] written, As is 16 x 17" in fault_of(tiles, floats(16), block=17)


@needs_compiler
def test_a_wrong_name_lists_the_kernels_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"kernel.cu has no kernel 'copy' when compiled with no macros; it has k"):
        Emulator().launch(KernelText(COPY, "copy"), 1, 1, ())
    for name in ("sums", "sums<128>"):
        with pytest.raises(ValueError, match=r'^kernel: sums is a template: write an extern "C" kernel that calls'):
            Emulator().launch(KernelText("template <int N> __global__ void sums(float* x) {}", name), 1, 1, ())
