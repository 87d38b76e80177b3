"""The kernels that a variant names are those that run, and one wrong line in a copy of any kernel
turns the registry's check red.
"""

import importlib.util
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import support
from support import Case, build, check_variant

import yoso_core
from yoso_core import gpu, registry
from yoso_core.gpu.catalog import NUMBA_FOLDER, catalog
from yoso_core.gpu.cupy_kernels import source
from yoso_core.operations import OPERATIONS

SMALL = Case(9, 11, 20, 12, 5, 3, mask="masked")
SMOOTHED = replace(SMALL, oversample=2)
ERRORS = replace(SMALL, return_error=True)
SMOOTHED_ERRORS = replace(SMOOTHED, return_error=True)
TIES = Case(3, 9, 8, 4, 5, 3, kind="quantized")


@dataclass(frozen=True)
class Fault:
    """One line of a kernel, and a plausible mistake in it."""

    kernel: str
    op: str
    variant: str
    line: str
    wrong: str
    case: Case = SMALL

    def __str__(self) -> str:
        return self.kernel


CUDA = (
    Fault(
        "block_per_part",
        "fast_hash",
        "emulated:block_per_part",
        "buffer[i ^ stride], i & stride)",
        "buffer[i ^ stride], false)",
        replace(SMALL, d=64),
    ),
    Fault(
        "warp_per_vector",
        "fast_hash",
        "emulated:warp_per_vector",
        "if (vector >= num_vectors) return;",
        "if (vector + 1 >= num_vectors) return;",
    ),
    Fault(
        "warp_per_chain",
        "fast_hash",
        "emulated:warp_per_vector",
        "const int bit = position / apart, hash = position % apart;",
        "const int hash = position / hash_code_len, bit = position % hash_code_len;",
        replace(SMALL, layout="chained"),
    ),
    Fault("thread_per_code", "hyperplane_hash", "emulated:thread_per_code", "projection[bit] > ACC(0)", "projection[bit] >= ACC(0)", TIES),
    Fault("shared_table", "lsh_cumulation", "emulated:shared_table", "code[earlier] == code[b] ? sum[earlier] : sum[b]", "sum[b]"),
    Fault(
        "shared_table",
        "lsh_cumulation",
        "emulated:shared_table",
        "if (ends) at(0, row) = smoothing.of(sphere);",
        "at(0, row) = smoothing.of(sphere);",
        SMOOTHED,
    ),
    Fault("smooth_spheres", "smooth_table", "emulated:spheres", "if (first_bit + bit < done) continue;", "", SMOOTHED),
    Fault("smooth_spheres", "lsh_cumulation", "emulated:global_table", "ACC(bits - r + 1)", "ACC(bits - r)", SMOOTHED),
    Fault("global_table_scatter", "lsh_cumulation", "emulated:global_table", "|| !kept(key_mask, row)", ""),
    Fault("global_table_gather", "lsh_cumulation", "emulated:global_table", "if (kept(query_mask, row)) {", "{"),
    Fault(
        "transpose_codes",
        "lsh_cumulation",
        "emulated:sorted_buckets",
        "kept(mask, head * n + row) && in_range(code, capacity) ? code : capacity;",
        "code;",
    ),
    Fault(
        "sort_codes",
        "lsh_cumulation",
        "emulated:sorted_buckets",
        "order_out[base + to] = order[base + i];",
        "order_out[base + to] = i;",
        replace(SMALL, hash_code_len=9),
    ),
    Fault(
        "sum_buckets",
        "lsh_cumulation",
        "emulated:sorted_buckets",
        "if (i > first && code[i] != code[i - 1])",
        "if (i > first + 1 && code[i] != code[i - 1])",
    ),
    Fault(
        "join_stretches",
        "lsh_cumulation",
        "emulated:sorted_buckets",
        "if (code[i] != code[i - 1]) continue;",
        "continue;",
        Case(3, 137, 4, 3, 1, 1),
    ),
    Fault(
        "gather_buckets",
        "lsh_cumulation",
        "emulated:sorted_buckets",
        "if (found < n_k && codes[found] == code) start = found;",
        "if (found < n_k) start = found;",
    ),
    Fault("gather_neighbors", "lsh_cumulation", "emulated:sorted_buckets", "ACC(bits - distance)", "ACC(bits)", SMOOTHED),
    Fault(
        "mark_nonfinite_heads", "yoso_attention", "emulated:shared_table", "row_nonfinite[first + i] && kept", "row_nonfinite[i] && kept"
    ),
    Fault("finish_attention", "yoso_attention", "emulated:shared_table", "x[i] / largest / length", "x[i] / length"),
    Fault("finish_attention", "yoso_attention", "emulated:shared_table", "slice < slices;", "slice < 1;", replace(ERRORS, d_v=70)),
    Fault("finish_attention", "yoso_attention", "emulated:sorted_buckets", "ACC(num_hash - 1)", "ACC(num_hash)", ERRORS),
    Fault(
        "scan_exponents",
        "yoso_attention",
        "emulated:shared_table",
        "if (is_finite(size)) largest = larger(largest, size);",
        "largest = smaller(largest, size);",
        replace(ERRORS, size=1e25),
    ),
    Fault("shared_table", "yoso_attention", "emulated:shared_table", "d = 0; d < dims; ++d", "d = 0; d < 1; ++d", ERRORS),
    Fault(
        "shared_table",
        "yoso_attention",
        "emulated:shared_table",
        "? lane < side_by_side && hash < num_hash : live",
        "? lane < side_by_side : live",
        replace(ERRORS, n_k=137, num_hash=33),  # in two turns, of 17 and 16 hashes
    ),
    Fault("gather_buckets", "yoso_attention", "emulated:sorted_buckets", "(bucket * unit) * (bucket * unit)", "bucket * unit", ERRORS),
    Fault("gather_neighbors", "yoso_attention", "emulated:sorted_buckets", "own * ratio", "own", SMOOTHED_ERRORS),
    Fault("normalize_rows", "expectation_attention", "emulated:blocked", "/ scale / length", "/ scale"),
    Fault(
        "expectation",
        "expectation_attention",
        "emulated:blocked",
        "unsigned(ACC(fabs(x[e])) > STEEP) << e",
        "0u",
        Case(9, 11, 20, 12, 5, 8, kind="repeated"),
    ),
    Fault(
        "weight_by_weight_scatter",
        "lsh_weighted_cumulation",
        "emulated:weight_by_weight",
        "key_weight[row * weight_dim + coordinate]",
        "key_weight[row * weight_dim]",
    ),
    Fault("weight_by_weight_gather", "lsh_weighted_cumulation", "emulated:weight_by_weight", "* sum;", "+ sum;"),
    Fault("finish_rows", "lsh_weighted_cumulation", "emulated:outer_products", "+ dim] / ACC(num_hash)", "+ dim]"),
    Fault(
        "sorted_pairs",
        "lsh_weighted_cumulation",
        "emulated:sorted_pairs",
        "const bool nonfinite = keep && !finite_row(query_weights, weight_dim, lane);",
        "const bool nonfinite = false;",
    ),
    Fault(
        "outer_products",
        "lsh_weighted_cumulation",
        "emulated:outer_products",
        "if (next > 0 && next < last && key_codes[next] == key_codes[next - 1]) {",
        "if (false) {",
        Case(9, 137, 20, 12, 5, 1),
    ),
    Fault(
        "gradient_rows",
        "expectation_attention_backward",
        "emulated:blocked",
        "narrow<VALUE>(keep ? companion_sum[i].at[u] : ACC(0))",
        "narrow<VALUE>(companion_sum[i].at[u])",
    ),
    Fault(
        "gradient_rows",
        "lsh_attention_backward",
        "emulated:outer_products",
        "at[u] == b[e % MY_OTHERS].at[u]",
        "at[u] == b[e % MY_OTHERS].at[0]",
        replace(SMALL, grad="exact"),
    ),
    Fault(
        "scan_nonfinite_heads",
        "lsh_attention_backward",
        "emulated:outer_products",
        "if (row >= num_rows || !kept(mask, row)) return;",
        "if (row >= num_rows) return;",
    ),
    Fault(
        "l2_normalize_backward",
        "expectation_attention_backward",
        "emulated:blocked",
        "g[i] - along * size.unit(x[i])",
        "g[i]",
    ),
)

# Here `variant` is the module and the launcher.
NUMBA = (
    Fault(
        "add_keys_to_table",
        "lsh_cumulation",
        "cumulation:lsh_cumulation_global_table",
        "or keep_key[head, key] == 0:",
        ":",
    ),
    Fault(
        "read_table",
        "lsh_cumulation",
        "cumulation:lsh_cumulation_global_table",
        "total += table[head, hash, code, offset]",
        "total = table[head, hash, code, offset]",
    ),
    Fault(
        "cumulate_in_shared_table",
        "lsh_cumulation",
        "cumulation:lsh_cumulation_shared_table",
        "table[code * columns + column] += value",
        "table[code * columns + column] = value",
    ),
    Fault(
        "cross_bit",
        "smooth_table",
        "smoothing:smooth_table_spheres",
        "range(spheres.shape[0] - 1, 0, -1)",
        "range(1, spheres.shape[0])",
        SMOOTHED,
    ),
    Fault("weigh_spheres", "smooth_table", "smoothing:smooth_table_spheres", "number(bits - r + 1)", "number(bits - r)", SMOOTHED),
    Fault("hash_vectors", "fast_hash", "hashing:fast_hash_shared_memory", "entry[i] = -entry[i]", "entry[i] = entry[i]"),
    Fault(
        "hash_by_chain",
        "fast_hash",
        "hashing:fast_hash_shared_memory",
        "start = (round - WARM_UP) * padded_dim",
        "start = (round - WARM_UP + 1) * padded_dim",
        replace(SMALL, layout="chained"),
    ),
    Fault(
        "add_weighted_keys_to_table",
        "lsh_weighted_cumulation",
        "weighted:lsh_weighted_cumulation_weight_by_weight",
        "key_weight[head, key, coordinate] *",
        "key_weight[head, key, 0] *",
    ),
    Fault(
        "read_weighted_table",
        "lsh_weighted_cumulation",
        "weighted:lsh_weighted_cumulation_weight_by_weight",
        "total = out[head, query, dim] + query_weight",
        "total = query_weight",
    ),
)


@pytest.fixture(autouse=True)
def needs_the_emulators() -> None:
    support.need("emulated", "stepped")


def test_every_kernel_has_a_fault() -> None:
    names = {(text.language, text.name) for text in catalog()}
    planted = {("CUDA C++", fault.kernel) for fault in CUDA} | {("Numba CUDA", fault.kernel) for fault in NUMBA}
    assert planted == names


def check_nonfinite(op: str, variant: str) -> None:
    """Check a kept query and a kept key that are non-finite: the cases of the registry's test have
    none.
    """
    given = {name: support.as_dtype(x, "float32") for name, x in build(op, replace(SMALL, mask="none")).items()}
    query, key = ("query", "key") if "query" in given else ("query_weight", "key_weight")
    given[query][1, 2, 3], given[key][1, 4, 5] = np.nan, np.inf
    if op == "lsh_weighted_cumulation":  # a query that meets no key, and is NaN nevertheless
        given["query_hash_code"][1, 2] = given["hashtable_capacity"]
        given["hashtable_capacity"] *= 2
    out = getattr(yoso_core, op)(**given, variant=variant)
    expected = getattr(yoso_core, op)(**given, variant=support.definition_of(op).name)
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))


def check(op: str, variant: str, case: Case) -> None:
    check_variant(op, variant, case)
    if op in ("yoso_attention", "expectation_attention", "lsh_weighted_cumulation"):
        check_nonfinite(op, variant)


@pytest.mark.parametrize("fault", CUDA, ids=lambda fault: f"{fault.op}-{fault.kernel}")
def test_a_wrong_line_of_cuda_turns_the_check_red(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    check(fault.op, fault.variant, fault.case)
    (file,) = (text.file for text in catalog() if (text.language, text.name) == ("CUDA C++", fault.kernel))
    right = source.source

    def faulty(name: str) -> str:
        text = right(name)
        if name == file:
            assert text.count(fault.line) == 1, f"{text.count(fault.line)} lines with {fault.line!r}"
            text = text.replace(fault.line, fault.wrong)
        return text

    monkeypatch.setattr(source, "source", faulty)
    with pytest.raises((AssertionError, gpu.emulator.KernelFault)):
        check(fault.op, fault.variant, fault.case)


@pytest.mark.parametrize("fault", NUMBA, ids=str)
def test_a_wrong_line_of_python_turns_the_check_red(fault: Fault, tmp_path: Path) -> None:
    file, _, launcher = fault.variant.partition(":")
    text = (NUMBA_FOLDER / f"{file}.py").read_text("utf-8")
    assert text.count(fault.line) == 1, f"{text.count(fault.line)} lines with {fault.line!r}"
    with ExitStack() as registrations:
        for written, name in ((text, "sound"), (text.replace(fault.line, fault.wrong), "faulty")):
            (tmp_path / f"{name}.py").write_text(written, "utf-8")
            spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            own = gpu.NumbaCudaVariant(getattr(module, launcher))
            registrations.enter_context(registry.register(fault.op, name, own, where="stepped", deterministic=False))
        check(fault.op, "sound", fault.case)
        with pytest.raises((AssertionError, gpu.emulator.KernelFault, IndexError)):
            check(fault.op, "faulty", fault.case)


LAUNCHED = [kernel for kernel in registry.KERNELS if kernel.where in ("emulated", "stepped")]


@pytest.mark.parametrize("kernel", LAUNCHED, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_the_kernel_named_is_the_kernel_that_ran(kernel: registry.Kernel) -> None:
    """Over small cases, a variant launches every kernel that its row names, and no other."""
    modes = [SMALL]
    if kernel.op == "yoso_attention":
        modes += [ERRORS, *(replace(SMALL, mode=mode) for mode in ("planes", "expectation"))]
    if "layout" in OPERATIONS[kernel.op].keywords and not kernel.name.endswith(":block_per_part"):
        modes.append(replace(SMALL, layout="chained"))
    if kernel.op == "lsh_attention_backward":  # a code of 16 bits has no table in shared memory
        modes += [replace(SMALL, grad="exact"), *(Case(70, 3, 4, 3, 1, 16 - s, oversample=s) for s in (0, 2))]
    elif {"gather_neighbors", "smooth_spheres", "cross_bit"} & set(kernel.kernels):
        modes.append(SMOOTHED)
    with gpu.launches() as made:
        for case in (*modes, Case(3, 137, 4, 3, 1, 1)):
            given = {name: support.as_dtype(x, "float32") for name, x in build(kernel.op, case).items()}
            getattr(yoso_core, kernel.op)(**given, variant=kernel.name)
    assert {launch.where for launch in made} == {kernel.where}
    assert {launch.kernel for launch in made} == set(kernel.kernels)
