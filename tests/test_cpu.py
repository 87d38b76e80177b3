"""What the CPU kernels promise beyond being right: repeatable bits, machine code kept and never stale, threads and forks that work."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

import yoso_core
from yoso_core import cpu, reference
from yoso_core.cpu import attention, cumulation, expectation, threads

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

    def share(tasks, work, *, num_threads, cost):
        def noted(first, last):
            seen.add(threads.threading.get_ident())
            return work(first, last)

        original(tasks, noted, num_threads=num_threads, cost=cost)

    monkeypatch.setattr(cumulation, "share", share)
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

    def share(tasks, work, *, num_threads, cost):
        asked.append(num_threads)
        original(tasks, work, num_threads=num_threads, cost=cost)

    monkeypatch.setattr(cumulation, "share", share)
    query = torch.randn(2, 600, 16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yoso_core.yoso_attention(query, query, query, num_hash=8, hash_code_len=4, rng=0)
    finally:
        torch.set_num_threads(before)
    assert asked
    assert set(asked) == {1}


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


def test_machine_code_is_kept_between_processes(tmp_path):
    first = run_python(CALL_AND_COUNT, NUMBA_CACHE_DIR=str(tmp_path))
    second = run_python(CALL_AND_COUNT, NUMBA_CACHE_DIR=str(tmp_path))
    assert {"gather", "merge", "scatter"} <= set(json.loads(first.stdout)["compiled"]), first.stderr
    assert json.loads(second.stdout) == {"compiled": [], "total": 20.0}, second.stderr


def test_an_edit_of_a_helper_in_another_file_is_never_served_stale(tmp_path):
    """A copy of the package is called; its `lanes.py` learns to multiply where it added; it is called again, `cumulation.py` untouched."""
    package = tmp_path / "yoso_core"
    shutil.copytree(ROOT / "yoso_core", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("cpu", "reference"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + textwrap.dedent(CALL_AND_COUNT)
    first = run_python(code)
    assert json.loads(first.stdout)["total"] == 20.0, first.stderr
    assert json.loads(run_python(code).stdout)["compiled"] == []
    lanes = package / "cpu" / "lanes.py"
    addition = '_add, _sub, _mul, _or = _lanewise("fadd", "add")'
    assert addition in lanes.read_text()
    lanes.write_text(lanes.read_text().replace(addition, '_add, _sub, _mul, _or = _lanewise("fmul", "mul")'))
    tables = package / "cpu" / "cumulation.py"
    before = tables.read_text()
    third = json.loads(run_python(code).stdout)
    assert {"gather", "merge", "scatter"} <= set(third["compiled"])
    assert third["total"] == 0.0
    assert tables.read_text() == before


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
        monkeypatch.setattr(cumulation, "TABLE_BYTES", kilobytes << 10)
        monkeypatch.setattr(attention, "TABLE_BYTES", kilobytes << 10)
        assert cpu.yoso_attention(query, key, value, signs=signs).tobytes() == expected.tobytes()


def test_codes_that_are_stored_give_what_codes_on_the_fly_give():
    query, key, value, signs = attention_inputs(np.random.default_rng(5), n=700, heads=2)
    codes = [cpu.fast_hash(x, signs, 32, 8) for x in (query, key)]
    stored = cpu.lsh_cumulation(*codes, value, 256)
    fused = cpu.yoso_attention(query, key, value, signs=signs, normalize_output=False)
    assert stored.tobytes() == fused.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_arccos_polynomial_is_as_close_as_its_docstring_says(dtype):
    coefficients = {str(k): v for k, v in expectation.POLYNOMIAL.items()}[dtype]
    cosine = np.linspace(0, 0.99, 100_001)
    value = np.polyval(coefficients, 2 * cosine - 1) * np.sqrt(1 - cosine)
    assert np.abs(value - np.arccos(cosine) / np.pi).max() < {"float32": 1.4e-9, "float64": 1.3e-15}[dtype]


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
