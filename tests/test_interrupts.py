"""A Ctrl-C, an exception in one thread, a signal handler or a finalizer in the midst of a call: the
call ends soon, and the next one is right.

How soon is counted in batches of work that begin afterwards; the clock has one bound, a generous
one.
"""

import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import support

import yoso_core
from yoso_core.cpu import buckets, gradients, rounds, sampled_gradients, spans, threads
from yoso_core.cpu import expectation as expectation_kernels
from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs the signals of POSIX")]

LATE = 20.0
"""Seconds in which an interrupted call has ended, however busy the machine."""


class Interrupted(KeyboardInterrupt):
    """Not pytest's own."""


@pytest.fixture
def interrupt() -> Iterator[Callable[..., float]]:
    """``interrupt(call)`` runs it, interrupts it after a moment, and returns when that was."""
    at: list[float] = []

    def handler(number: int, frame: object) -> None:
        at.append(time.perf_counter())
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)

    def run(call: Callable[[], object], *, after: float = 0.3) -> float:
        signal.setitimer(signal.ITIMER_REAL, after)
        with pytest.raises(Interrupted):
            call()
        assert time.perf_counter() - at[0] < LATE
        return at[0]

    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- the sharing itself


@pytest.mark.parametrize("num_threads", [1, 3])
def test_after_an_exception_no_thread_begins_another_batch(num_threads: int) -> None:
    begun: list[int] = []
    failed = threading.Event()

    def work(first: int, last: int) -> None:
        begun.append(first)
        if len(begun) == 5:
            failed.set()
            raise ZeroDivisionError("the fifth batch")
        if len(begun) > 5:
            failed.wait(LATE)

    with pytest.raises(ZeroDivisionError, match="fifth"):
        threads.share(10**6, work, num_threads=num_threads, cost=1e14)
    assert len(begun) <= 5 + num_threads
    done = []
    threads.share(100, lambda first, last: done.extend(range(first, last)), num_threads=num_threads, cost=1e9)
    assert sorted(done) == list(range(100)), "the next call does all of its work"


@pytest.mark.parametrize("num_threads", [1, 3])
def test_after_an_exception_no_thread_begins_another_piece(num_threads: int) -> None:
    begun: list[int] = []

    def work(first: int, last: int) -> Iterator[None]:
        for _ in range(10**6):
            begun.append(first)
            if len(begun) >= 100 and threading.current_thread() is threading.main_thread():
                raise ZeroDivisionError
            time.sleep(0)
            yield

    with pytest.raises(ZeroDivisionError):
        threads.share(num_threads, work, num_threads=num_threads, cost=1e9)
    after = len(begun)
    time.sleep(0.05)
    assert len(begun) == after < 10**5


def test_every_piece_is_done_though_the_caller_is_through_first() -> None:
    """A helper that is still at its last batch when the caller finds none goes on to its end."""
    done: list[tuple[int, int]] = []

    def work(first: int, last: int) -> Iterator[None]:
        for piece in range(20):
            if threading.current_thread() is not threading.main_thread():
                time.sleep(0.001)
            done.append((first, piece))
            yield

    for _ in range(5):
        done.clear()
        threads.share(4, work, num_threads=3, cost=1e9)
        assert sorted(done) == [(task, piece) for task in range(4) for piece in range(20)]


def test_a_second_interrupt_leaves_no_helper_running(interrupt: Callable[..., float]) -> None:
    """The first comes while the caller works, the second while it waits for a helper's batch."""
    begun: list[int] = []
    slow = threading.Event()

    def work(first: int, last: int) -> None:
        begun.append(first)
        if threading.current_thread() is threading.main_thread():
            if len(begun) > 1:
                raise ZeroDivisionError
            time.sleep(0.01)
        else:
            slow.wait(1)

    interrupt(lambda: threads.share(1000, work, num_threads=3, cost=1e12))
    after = len(begun)
    slow.set()
    time.sleep(0.1)
    assert len(begun) == after <= 6


def test_batches_are_bounded_by_cost_and_by_bytes() -> None:
    sizes: list[int] = []
    threads.share(1000, lambda first, last: sizes.append(last - first), num_threads=1, cost=10.0 * threads.BATCH_COST)
    threads.share(1000, lambda first, last: sizes.append(last - first), num_threads=1, cost=1e6, moved=4.0 * threads.BATCH_BYTES)
    assert sizes == [100] * 10 + [250] * 4
    steps: list[tuple[int, int, int]] = []

    def work(first: int, last: int, *, step0: int, step1: int) -> None:
        steps.append((first, step0, step1))

    threads.share(2, threads.in_steps(work, 5, 2.5 * threads.BATCH_COST), num_threads=1, cost=5.0 * threads.BATCH_COST)
    assert steps == [(task, step, min(step + 2, 5)) for task in (0, 1) for step in (0, 2, 4)]


# ---------------------------------------------------------------- the operations


def vectors(n: int, heads: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal((heads, n, 16), dtype=np.float32)


def codes(x: np.ndarray[Any, Any], num_hash: int) -> np.ndarray[Any, Any]:
    return yoso_core.fast_hash(x, yoso_core.sample_signs(num_hash, 4, 16, rng=0), num_hash, 4)


Made = Callable[[], Any]


def forward(x: np.ndarray[Any, Any]) -> Made:
    signs = yoso_core.sample_signs(16_384, 4, 16, rng=0)
    return lambda: yoso_core.yoso_attention(x, x, x, num_hash=16_384, hash_code_len=4, signs=signs)


def backward(x: np.ndarray[Any, Any]) -> Made:
    of_x = codes(x, 512)
    return lambda: yoso_core.lsh_attention_backward(x, x, x, x, of_x, of_x, 4)


def weighted(x: np.ndarray[Any, Any]) -> Made:
    of_x = codes(x, 256)
    return lambda: yoso_core.lsh_weighted_cumulation(of_x, x, of_x, x, x, 16)


def expectation(x: np.ndarray[Any, Any]) -> Made:
    return lambda: yoso_core.expectation_attention(x, x, x, 4)


def expectation_backward(x: np.ndarray[Any, Any]) -> Made:
    return lambda: yoso_core.expectation_attention_backward(x, x, x, x, 4)


class Counted(threads._Tasks):
    """Notes when each batch, or piece, begins, and interrupts the third."""

    begun: ClassVar[list[float]] = []

    def __init__(self, tasks: int, batch: int, work: threads.Work) -> None:
        def noted(first: int, last: int) -> Iterator[None]:
            self.note()
            for _ in work(first, last) or ():
                yield
                self.note()

        super().__init__(tasks, batch, noted)

    def note(self) -> None:
        self.begun.append(time.perf_counter())
        if len(self.begun) == 3:
            signal.setitimer(signal.ITIMER_REAL, 0.01)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("make", [forward, backward, weighted, expectation, expectation_backward])
def test_an_interrupt_ends_a_call_and_the_next_is_right(
    monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., float], make: Callable[..., Made], num_threads: int
) -> None:
    """A call that would take many seconds."""
    support.need("cpu")
    small, large = make(vectors(40)), make(vectors(100_000))
    before = support.as_tuple(small())
    monkeypatch.setattr(threads, "default_threads", lambda: num_threads)
    monkeypatch.setattr(threads, "_Tasks", Counted)
    Counted.begun.clear()
    at = interrupt(large, after=0)
    assert sum(begin > at for begin in Counted.begun) <= num_threads
    for x, y in zip(support.as_tuple(small()), before, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("heads", [1, 8])
def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch, heads: int, num_threads: int) -> None:
    """The smallest batches there are, beside batches that hold all."""
    support.need("cpu")
    rng = np.random.default_rng(1)
    q, k, v, g = (rng.standard_normal((heads, 700, 16), dtype=np.float32) for _ in range(4))
    masks = {"query_mask": rng.random((heads, 700)) < 0.7, "key_mask": rng.random((heads, 700)) < 0.7}
    signs = yoso_core.sample_signs(20, 4, 16, rng=0)
    of_q, of_k = (yoso_core.fast_hash(x, signs, 20, 4) for x in (q, k))
    calls: list[Callable[[], Any]] = [
        lambda: yoso_core.yoso_attention(q, k, v, num_hash=20, hash_code_len=4, signs=signs, **masks),
        lambda: yoso_core.lsh_cumulation(of_q, of_k, v, 1 << 20, **masks),
        lambda: yoso_core.expectation_attention(q, k, v, 4, **masks),
        lambda: yoso_core.expectation_attention_backward(g, q, k, v, 4, **masks),
        lambda: yoso_core.lsh_attention_backward(g, q, k, v, of_q, of_k, 4, grad="exact", **masks),
        lambda: yoso_core.lsh_attention_backward(g, q, k, v, of_q, of_k, 4, **masks),
        lambda: yoso_core.lsh_weighted_cumulation(of_q, g, of_k, v, k, 16, **masks),
    ]

    def results(cost: int, bytes_: int) -> list[Any]:
        for module in (threads, rounds, spans, buckets, sampled_gradients):
            for name, bound in (("BATCH_COST", cost), ("BATCH_BYTES", bytes_)):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, bound)
        return [x for call in calls for x in support.as_tuple(call())]

    monkeypatch.setattr(threads, "default_threads", lambda: num_threads)
    monkeypatch.setattr(spans, "SPAN_BYTES", 1 << 30)  # a span of many tiles, to be cut
    monkeypatch.setattr(buckets, "RANGE_BATCHES", 1)
    for module in (expectation_kernels, gradients):
        monkeypatch.setattr(module, "ENOUGH_TASKS", 1)
    for x, y in zip(results(1000, 1000), results(10**15, 10**15), strict=True):
        np.testing.assert_array_equal(x, y)


def run_python(code: str) -> None:
    """In a process of its own, since what is tested here may hang."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_signal_handlers_and_finalizers_may_call_the_library() -> None:
    support.need("cpu")
    run_python(
        """
        import gc, signal
        import numpy as np
        from yoso_core import cpu
        from yoso_core.cpu import threads
        threads.default_threads = lambda: 3
        x = np.random.default_rng(0).standard_normal((4, 2000, 16), dtype=np.float32)
        call = lambda x: cpu.expectation_attention(x, x, x, 4)
        few, many, calls = call(x[:, :300]), call(x), {"handler": 0, "finalizer": 0}
        def nested(who):
            calls[who] += 1
            assert (call(x[:, :300]) == few).all()
        class Ends:
            def __init__(self): self.me = self
            def __del__(self): nested("finalizer")
        signal.signal(signal.SIGALRM, lambda *_: nested("handler"))
        signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
        while min(calls.values()) < 20:
            Ends(); gc.collect(0)
            assert (call(x) == many).all()
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("right")
        """
    )


def test_comparison_and_benchmark_pass_an_interrupt_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: object) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        yoso_core.compare("fast_hash", variants=["numpy:formula"], also={"mine": stopped}, repeats=1)
    from yoso_core.benchmarks import cases, runner

    monkeypatch.setattr(runner, "_seconds", lambda *given, **how: stopped())
    case = next(case for case in cases.SUITES["cpu"].cases if case.quick and case.measure not in runner.MEMORY)
    with pytest.raises(Interrupted):
        runner.run_case(case, repeats=1, checks={})


def test_an_interrupt_goes_through_torch(monkeypatch: pytest.MonkeyPatch, interrupt: Callable[..., float]) -> None:
    """Forward, and backward in torch's own engine."""
    support.need("cpu")
    torch = pytest.importorskip("torch")
    from yoso_core.model import yoso_attention

    x = torch.from_numpy(vectors(60_000))[None].requires_grad_()
    how: dict[str, Any] = {"num_hash": 512, "hash_code_len": 4, "rng": 0}
    few = x[:, :, :100]
    before = yoso_attention(few, few, few, **how)
    interrupt(lambda: yoso_attention(x, x, x, use_expectation=True, hash_code_len=4))
    out = yoso_attention(x, x, x, **how).sum()
    interrupt(out.backward)
    assert torch.equal(yoso_attention(few, few, few, **how), before)


# ---------------------------------------------------------------- the emulator

COUNT_BLOCKS = KernelText('extern "C" __global__ void count(int* x) { if (threadIdx.x == 0) x[blockIdx.x] = 1; }', "count")


def test_an_interrupt_ends_a_launch_in_the_emulator(interrupt: Callable[..., float]) -> None:
    support.need("emulated")
    emulator = Emulator()
    x = np.zeros(1 << 25, np.int32)

    def launch(blocks: int) -> None:
        emulator.launch(COUNT_BLOCKS, grid=(blocks,), block=(32,), args=(x,))

    launch(1)
    interrupt(lambda: launch(x.size))
    time.sleep(0.05)
    assert int(x.sum()) == 1, "the arrays are as they were, and no thread goes on"
    x[:] = 0
    launch(100)
    assert int(x.sum()) == 100


def test_a_signal_handler_may_launch_in_the_emulator() -> None:
    support.need("emulated")
    run_python(
        """
        import signal
        import numpy as np
        from yoso_core.gpu import KernelText
        from yoso_core.gpu.emulator import Emulator
        kernel = KernelText('extern "C" __global__ void count(int* x) { if (threadIdx.x == 0) x[blockIdx.x] = 1; }', "count")
        def launch(blocks):
            x = np.zeros(blocks, np.int32)
            Emulator().launch(kernel, grid=(blocks,), block=(32,), args=(x,))
            assert x.all()
        calls = []
        def handler(*_):
            calls.append(launch(10))
        launch(1)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        while len(calls) < 3:
            launch(200_000)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("right")
        """
    )
