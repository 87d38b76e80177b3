"""What the CPU kernels promise beyond being right: repeatable bits, machine code kept and never
stale, threads and forks that work.
"""

import json
import os
import shutil
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import yoso_core
from yoso_core import cpu, reference
from yoso_core.cpu import expectation, rounds, rows, sampled_gradients, scratch, spans, threads, weights

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def attention_inputs(rng, n=9000, heads=1, dim=64):
    query, key, value = (rng.standard_normal((heads, n, dim), dtype=np.float32) for _ in range(3))
    return query, key, value, yoso_core.sample_signs(32, 8, dim, rng=0)


@pytest.mark.parametrize("heads", [1, 5], ids=["one-head-keys-split", "five-heads"])
@pytest.mark.parametrize("use_expectation", [False, True], ids=["sampled", "expected"])
def test_bits_do_not_depend_on_the_number_of_threads(heads, use_expectation):
    query, key, value, signs = attention_inputs(np.random.default_rng(1), n=9000 if not use_expectation else 300, heads=heads)
    results = [
        cpu.yoso_attention(query, key, value, signs=signs, use_expectation=use_expectation, num_threads=count) for count in (1, 2, 3, 7)
    ]
    for other in results[1:]:
        assert results[0].tobytes() == other.tobytes()


def test_bits_of_the_cumulations_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(2)
    query_code, key_code = (rng.integers(0, 64, (2, n, 33), dtype=np.int32) for n in (700, 9000))
    query_weight, key_weight, value = (rng.standard_normal((2, n, 20), dtype=np.float32) for n in (700, 9000, 9000))
    for count in (2, 5):
        one, many = (cpu.lsh_cumulation(query_code, key_code, value, 64, num_threads=k) for k in (1, count))
        assert one.tobytes() == many.tobytes()
        one, many = (
            cpu.lsh_weighted_cumulation(query_code, query_weight, key_code, key_weight, value, 64, num_threads=k) for k in (1, count)
        )
        assert one.tobytes() == many.tobytes()


def test_work_really_is_shared_between_threads(monkeypatch):
    seen = set()
    original = threads.share

    def share(tasks, work, *, num_threads, **costs):
        def noted(first, last):
            seen.add(threads.threading.get_ident())
            return work(first, last)

        original(tasks, noted, num_threads=num_threads, **costs)

    monkeypatch.setattr(rounds, "share", share)
    query, key, value, signs = attention_inputs(np.random.default_rng(3), n=4096, heads=4)
    for _ in range(5):
        cpu.yoso_attention(query, key, value, signs=signs, num_threads=2)
    assert len(seen) >= 2
    seen.clear()
    cpu.yoso_attention(query, key, value, signs=signs, num_threads=1)
    assert seen == {threads.threading.get_ident()}


def test_torch_thread_count_is_respected(monkeypatch):
    torch = pytest.importorskip("torch")
    asked = []
    original = threads.share

    def share(tasks, work, *, num_threads, **costs):
        asked.append(num_threads)
        original(tasks, work, num_threads=num_threads, **costs)

    monkeypatch.setattr(rounds, "share", share)
    query = torch.randn(2, 600, 16)
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            yoso_core.yoso_attention(query, query, query, num_hash=8, hash_code_len=4, rng=0)
            assert asked
            assert set(asked) == {count}
            asked.clear()
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_task_is_raised_by_the_caller():
    def work(first, last):
        if first <= 3 < last:
            raise ZeroDivisionError("task 3")

    with pytest.raises(ZeroDivisionError, match="task 3"):
        threads.share(64, work, num_threads=4, cost=1e9)


def test_every_task_is_done_exactly_once():
    done = np.zeros(1000, int)

    def work(first, last):
        done[first:last] += 1

    threads.share(1000, work, num_threads=4, cost=1e9)
    assert (done == 1).all()


def test_calls_from_several_python_threads_agree():
    result = run_python(
        """
        import threading
        import numpy as np, yoso_core
        x = np.random.default_rng(0).standard_normal((4, 2000, 16), dtype=np.float32)
        call = lambda: yoso_core.yoso_attention(x, x, x, num_hash=8, hash_code_len=4, rng=0, variant="cpu:fused")
        expected, results = call(), []
        workers = [threading.Thread(target=lambda: results.extend(call() for _ in range(5))) for _ in range(6)]
        for w in workers: w.start()
        for w in workers: w.join()
        assert len(results) == 30 and all(r.tobytes() == expected.tobytes() for r in results)
        print("agree")
        """
    )
    assert result.stdout.strip() == "agree", result.stderr


def test_a_child_forked_after_a_call_can_call():
    result = run_python(
        """
        import multiprocessing, warnings
        import numpy as np, yoso_core
        warnings.simplefilter("ignore")  # newer Pythons warn about any fork of a process with threads
        x = np.random.default_rng(0).standard_normal((4, 2000, 16), dtype=np.float32)
        call = lambda: yoso_core.yoso_attention(x, x, x, num_hash=8, hash_code_len=4, rng=0, variant="cpu:fused")
        expected = call()
        def child(queue): queue.put(call().tobytes())
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        children = [context.Process(target=child, args=(queue,)) for _ in range(2)]
        for c in children: c.start()
        answers = [queue.get(timeout=120) for _ in children]
        for c in children: c.join(60)
        assert [c.exitcode for c in children] == [0, 0]
        assert answers == [expected.tobytes()] * 2 and call().tobytes() == expected.tobytes()
        print("agree")
        """
    )
    assert result.stdout.strip() == "agree", result.stderr


@pytest.mark.slow
def test_torch_data_loader_workers_can_call():
    pytest.importorskip("torch")
    result = run_python(
        """
        import warnings
        import numpy as np, torch, yoso_core
        warnings.simplefilter("ignore")
        x = torch.randn(4, 600, 16)
        signs = torch.from_numpy(yoso_core.sample_signs(8, 4, 16, rng=0))
        class Data(torch.utils.data.Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return yoso_core.yoso_attention(x, x, x, num_hash=8, hash_code_len=4, signs=signs)[i]
        expected = torch.stack([Data()[i] for i in range(4)])
        got = torch.cat(list(torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")))
        assert torch.equal(got, expected)
        print("agree")
        """
    )
    assert result.stdout.strip() == "agree", result.stderr


CALL_AND_COUNT = """
    import json
    import numpy as np
    from numba.core.dispatcher import Dispatcher
    compiled = []
    original = Dispatcher.compile
    def compile(self, signature):
        entry = original(self, signature)
        if self.stats.cache_misses:
            compiled.append(self.py_func.__name__)
        return entry
    Dispatcher.compile = compile
    from yoso_core import cpu
    codes = np.zeros((20, 3), np.int32)
    total = float(cpu.lsh_cumulation(codes, codes, np.ones((20, 32)), 4)[0, 0])
    print(json.dumps({"compiled": sorted(set(compiled)), "total": total}))
"""


@pytest.mark.slow
def test_machine_code_is_kept_between_processes_and_never_served_stale(tmp_path):
    """A copy of the package is called twice; its `lanes.py` learns to multiply where it added; it
    is called again, `cumulation.py` untouched.
    """
    package, kept = tmp_path / "yoso_core", tmp_path / "kept"
    shutil.copytree(ROOT / "yoso_core", package, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(CALL_AND_COUNT)

    def call():
        done = run_python(code, NUMBA_CACHE_DIR=str(kept))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first = call()
    assert {"gather", "scatter"} <= set(first["compiled"])
    assert first["total"] == 20.0
    assert any(kept.rglob("*.nbc"))
    assert call() == {"compiled": [], "total": 20.0}
    lanes = package / "cpu" / "lanes.py"
    addition = '_add, _sub, _mul, _or = _lanewise("fadd", "add")'
    assert addition in lanes.read_text("utf-8")
    lanes.write_text(lanes.read_text("utf-8").replace(addition, '_add, _sub, _mul, _or = _lanewise("fmul", "mul")'), "utf-8")
    tables = package / "cpu" / "cumulation.py"
    before = tables.read_text("utf-8")
    third = call()
    assert {"gather", "scatter"} <= set(third["compiled"])
    assert third["total"] == 0.0
    assert tables.read_text("utf-8") == before


def test_memory_follows_the_keys_not_the_buckets():
    """2**30 buckets of 64 floats would be 256 GiB."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 30, (50, 4), dtype=np.int32)
    value = rng.standard_normal((50, 64), dtype=np.float32)
    out = cpu.lsh_cumulation(codes, codes, value, 1 << 30)
    np.testing.assert_allclose(out, reference.lsh_cumulation_pairs(codes, codes, value, 1 << 30), rtol=1e-6)


def test_groups_of_heads_and_parts_change_no_bit(monkeypatch):
    """Little memory for tables means more groups, never another sum."""
    query, key, value, signs = attention_inputs(np.random.default_rng(4), n=600, heads=3)
    expected = cpu.yoso_attention(query, key, value, signs=signs)
    for kilobytes in (600, 1100):
        monkeypatch.setattr(rounds, "TABLE_BYTES", kilobytes << 10)
        assert cpu.yoso_attention(query, key, value, signs=signs).tobytes() == expected.tobytes()


def test_codes_that_are_stored_give_what_codes_on_the_fly_give():
    query, key, value, signs = attention_inputs(np.random.default_rng(5), n=700, heads=2)
    codes = [cpu.fast_hash(x, signs, 32, 8) for x in (query, key)]
    stored = cpu.lsh_cumulation(*codes, value, 256)
    fused = cpu.yoso_attention(query, key, value, signs=signs, normalize_output=False)
    assert stored.tobytes() == fused.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_polynomials_are_as_close_as_their_docstring_says(dtype):
    limit = {"float32": 1.4e-9, "float64": 1.3e-15}[dtype]
    for_moderate, for_all = {str(k): v for k, v in weights.POLYNOMIALS.items()}[dtype]
    cosine = np.linspace(0, 0.99, 100_001)
    value = np.polyval(for_all, 2 * cosine - 1) * np.sqrt(1 - cosine)
    assert np.abs(value - np.arccos(cosine) / np.pi).max() < limit
    cosine = np.linspace(-weights.MODERATE, weights.MODERATE, 100_001)
    assert np.abs(cosine * np.polyval(for_moderate, cosine**2) - np.arcsin(cosine) / np.pi).max() < limit


def vectors_at(cosines):
    """Queries and keys of 20 coordinates: every key has the cosine ``cosines[j]`` with the first
    query, and 0 with the others.
    """
    query, key = np.zeros((2, 20)), np.zeros((len(cosines), 20))
    query[0, 0] = query[1, 1] = 1
    key[:, 0], key[:, 2] = cosines, np.sqrt(1 - np.square(cosines))
    return query, key


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("largest", [0.3, 0.6499, 0.6501, 0.89, 0.91, 0.9899, 0.9901, 1.0])
def test_every_way_to_a_weight_is_right_and_all_agree(largest, dtype):
    """Small cosines, those up to the steep ones, and steep ones: which way is taken depends on the
    largest of a key, here the query's.
    """
    cosines = np.array([-largest, -0.2, 0.0, 0.2, largest])
    vectors = vectors_at(cosines)
    value, grad_out = np.eye(5), np.random.default_rng(0).standard_normal((2, 5))
    tolerance = {"float32": 2e-6, "float64": 4e-15}[dtype]
    query, key, low_value, low_grad = (x.astype(dtype) for x in (*vectors, value, grad_out))
    for q, k in ((query, key), (key, query)):
        got = cpu.expectation_attention(q, k, np.eye(len(k), dtype=dtype), 7)
        exact = q.astype(np.float64) @ k.T.astype(np.float64)
        assert np.abs(got - (1 - np.arccos(np.clip(exact, -1, 1)) / np.pi) ** 7).max() < (tolerance if largest < 1 else 1e-3)
    for grad in ("lower_bound", "exact"):
        got = cpu.expectation_attention_backward(low_grad, query, key, low_value, 7, grad=grad)
        expected = reference.expectation_attention_backward(grad_out, *(x.astype(np.float64) for x in (query, key)), value, 7, grad=grad)
        for x, y in zip(got, expected, strict=True):
            if largest < 1 or grad == "lower_bound":
                assert np.abs(x - y).max() < 20 * tolerance * max(1, np.abs(y).max())
            assert np.isfinite(x).all()
    by_bound, exactly = (
        cpu.expectation_attention_backward(low_grad, query, key, low_value, 7, grad=grad)[2] for grad in ("lower_bound", "exact")
    )
    assert by_bound.tobytes() == exactly.tobytes()


@pytest.mark.parametrize("d", [7, 64])
def test_how_many_queries_meet_a_key_at_a_time_changes_no_bit(monkeypatch, d):
    rng = np.random.default_rng(9)
    grad_out, query, key, value = (rng.standard_normal((2, n, d), dtype=np.float32) for n in (330, 330, 210, 210))

    def results():
        return cpu.expectation_attention(query, key, value, 5), *cpu.expectation_attention_backward(grad_out, query, key, value, 5)

    expected = results()
    for span_bytes in (1, 200 << 10, 1 << 30):
        monkeypatch.setattr(spans, "SPAN_BYTES", span_bytes)
        monkeypatch.setattr(expectation, "ENOUGH_TASKS", 1)
        for x, y in zip(results(), expected, strict=True):
            assert x.tobytes() == y.tobytes()


def test_where_an_array_starts_changes_no_bit():
    """Rows that begin within a cache line are copied, since vectors that straddle two are slow."""
    rng = np.random.default_rng(10)
    arrays = [rng.standard_normal((2, 100, 32), dtype=np.float32) for _ in range(4)]
    results = []
    for offset in (0, 1, 4):
        shifted = []
        for x in arrays:
            flat = scratch.aligned_empty(x.size + 16, np.float32)[offset : offset + x.size]
            flat[:] = x.reshape(-1)
            shifted.append(flat.reshape(x.shape))
        _, query, key, value = shifted
        results.append((cpu.expectation_attention(query, key, value, 5), *cpu.expectation_attention_backward(*shifted, 5)))
        packed = rows.packed_rows(value[None], np.float32, 1)
        assert packed.ctypes.data % 64 == 0
        assert np.shares_memory(packed, value) == (offset == 0)
        np.testing.assert_array_equal(packed, arrays[3].reshape(-1))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("op", ["expectation_attention_backward", "lsh_attention_backward"])
@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
def test_bits_of_the_gradients_do_not_depend_on_the_number_of_threads(op, grad):
    args, kwargs = yoso_core.example_inputs(op, n=300, n_key=200, heads=3, dim=20, num_hash=9, hash_code_len=5)
    one, many = (getattr(cpu, op)(*args, grad=grad, **kwargs, num_threads=count) for count in (1, 3))
    for x, y in zip(one, many, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("share_of_keys", [1, 3, 2000], ids=["pairs", "between", "outer-products"])
def test_weighted_cumulation_by_pairs_and_by_outer_products(share_of_keys):
    """Buckets from nearly empty to very full reach both ways of adding up."""
    rng = np.random.default_rng(6)
    capacity = max(1, 2000 // share_of_keys)
    query_code, key_code = (rng.integers(0, capacity, (n, 3), dtype=np.int32) for n in (137, 2000))
    query_weight, key_weight, value = (rng.standard_normal((n, d)) for n, d in ((137, 33), (2000, 33), (2000, 70)))
    arguments = (query_code, query_weight, key_code, key_weight, value, capacity)
    np.testing.assert_allclose(
        cpu.lsh_weighted_cumulation(*arguments), reference.lsh_weighted_cumulation_pairs(*arguments), rtol=1e-9, atol=1e-9
    )


def sampled_problem(rng, n_q, n_k, d, d_v, capacity, heads=2, num_hash=5):
    """``grad_out``, query, key, value and codes."""
    vectors = [rng.standard_normal((heads, n, dim)) for n, dim in ((n_q, d_v), (n_q, d), (n_k, d), (n_k, d_v))]
    return [*vectors, *(rng.integers(0, capacity, (heads, n, num_hash), dtype=np.int32) for n in (n_q, n_k))]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("heads", [1, 7])
def test_threads_that_share_a_head_change_no_bit(monkeypatch, heads, threads):
    """Sampled gradients: a head to a thread, or all threads at the buckets of one head."""
    rng = np.random.default_rng(7)
    arrays = [x.astype(np.float32) if x.dtype == np.float64 else x for x in sampled_problem(rng, 900, 1100, 20, 33, 64, heads)]
    masks = {"query_mask": rng.random((heads, 900)) > 0.2, "key_mask": rng.random((heads, 1100)) > 0.2}
    results = []
    for cache_bytes in (1 << 40, 1):
        monkeypatch.setattr(sampled_gradients, "CACHE_BYTES", cache_bytes)
        results.append(cpu.lsh_attention_backward(*arrays, 6, **masks, num_threads=threads))
    for x, y in zip(*results, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("d", "d_v"), [(64, 64), (20, 33), (33, 20), (130, 7)])
@pytest.mark.parametrize("hash_code_len", [1, 2, 4, 6, 9, 20], ids=lambda tau: f"tau{tau}")
def test_sampled_gradients_by_pairs_and_by_outer_products(hash_code_len, d, d_v, dtype):
    """From one bucket for all to more buckets than vectors: outer products, tiles of pairs, pairs
    one by one, and numbered buckets.
    """
    rng = np.random.default_rng(8)
    exact = sampled_problem(rng, 300, 470, d, d_v, 1 << hash_code_len)
    exact[-2][:] = rng.permutation(exact[-1].reshape(-1))[: exact[-2].size].reshape(exact[-2].shape)  # so that they meet at 20 bits, too
    arrays = [x.astype(dtype) if x.dtype == np.float64 else x for x in exact]
    masks = {"query_mask": rng.random((2, 300)) > 0.2, "key_mask": rng.random((2, 470)) > 0.2}
    got = cpu.lsh_attention_backward(*arrays, hash_code_len, **masks)
    expected = reference.lsh_attention_backward(*(x.astype(np.float64) if x.dtype == dtype else x for x in arrays), hash_code_len, **masks)
    for x, y in zip(got, expected, strict=True):
        assert np.abs(x - y).max() <= {"float32": 2e-6, "float64": 4e-15}[dtype] * np.abs(y).max()


@pytest.mark.slow
def test_memory_of_sampled_gradients_is_that_of_one_head():
    """Beyond the gradients: scratch of one large head, or tables for the value gradient, never
    copies of all heads.
    """
    args, kwargs = yoso_core.example_inputs("lsh_attention_backward", n=16384, heads=6, dim=64, num_hash=4, hash_code_len=8)
    cpu.lsh_attention_backward(*[x[..., :64, :] if isinstance(x, np.ndarray) else x for x in args])  # compiled, threads started
    tracemalloc.start()
    gradients = cpu.lsh_attention_backward(*args, **kwargs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    scratch = 2 * 16384 * 3 * 64 * 4
    assert peak - sum(x.nbytes for x in gradients) < 2 * scratch


@pytest.mark.long
def test_no_piece_that_counts_no_references_makes_or_returns_an_array(tmp_path: Path) -> None:
    """Such an array would be freed while its caller still uses it. Every family of kernels is
    compiled anew, for Numba to say what its pieces return.
    """
    code = """
    import pkgutil, importlib
    from numba import types
    from numba.core.dispatcher import Dispatcher
    from yoso_core import cpu
    from yoso_core.cpu import compiling, scratch, spans
    from yoso_core.cpu.warmup import all_kernels

    compiling.KernelCache.load_overload = lambda self, signature, target: None
    WANTED = ("relabel", "smoothing", "weighted", "rows", "expectation", "gradient", "units", "squares", "checked", "hash, chained, uint8")
    for name, make in all_kernels([32], ["float32"]):
        if any(part in name for part in WANTED):
            make()

    def holds_array(kind):
        return isinstance(kind, types.Array) or isinstance(kind, types.BaseTuple) and any(map(holds_array, kind))

    modules = [importlib.import_module(f"yoso_core.cpu.{module.name}") for module in pkgutil.iter_modules(cpu.__path__)]
    pieces = {found for module in modules for found in vars(module).values() if isinstance(found, Dispatcher)}
    careless = {piece for piece in pieces if piece.targetoptions["_nrt"] is False}
    compiled = [(piece, made.signature.return_type) for piece in careless for made in piece.overloads.values()]
    assert len(compiled) > 40, len(compiled)
    assert not [piece for piece, kind in compiled if holds_array(kind)]
    counting = scratch.aligned, spans.list_kept
    assert all(holds_array(made.signature.return_type) for piece in counting for made in piece.overloads.values())
    """
    result = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
