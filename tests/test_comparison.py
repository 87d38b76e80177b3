"""`compare`, and the two functions that every other test measures with: `truth` and `tolerance`."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support
import torch

import yoso_core
from yoso_core import backends, reference, registry
from yoso_core.comparison import Comparison, Row, compare
from yoso_core.inputs import example_inputs
from yoso_core.operations import OPERATIONS
from yoso_core.truth import tolerance, truth

SMALL = {"n": 33, "n_key": 41, "dim": 16, "value_dim": 20, "num_hash": 7, "hash_code_len": 5}


def numpy_variants(op: str) -> list[str]:
    return [variant.name for variant in yoso_core.variants(op) if variant.name.startswith("numpy:")]


def row(comparison: Comparison, name: str) -> Row:
    return next(row for row in comparison.rows if row.variant == name)


# ---------------------------------------------------------------- inputs


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("op", OPERATIONS)
def test_example_inputs_run_and_repeat(op: str, masked: bool) -> None:
    if masked and not OPERATIONS[op].takes_masks:
        with pytest.raises(ValueError, match=rf"masked: {op} takes no masks"):
            example_inputs(op, masked=True)
        return
    args, kwargs = example_inputs(op, masked=masked, **SMALL)
    definition = next(variant.name for variant in yoso_core.variants(op) if variant.definition)
    out = getattr(yoso_core, op)(*args, **kwargs, variant=definition)
    assert np.all(np.isfinite(out[0] if isinstance(out, tuple) else out))
    again, _ = example_inputs(op, masked=masked, **SMALL)
    other, _ = example_inputs(op, masked=masked, seed=1, **SMALL)
    assert all(np.array_equal(x, y) for x, y in zip(args, again, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(args, other, strict=True))


def test_example_inputs_meet() -> None:
    """Most queries share some bucket with the key that they were made from; strangers would in one
    of 256.
    """
    (query_code, key_code, _, _), _ = example_inputs("lsh_cumulation")
    assert 0.15 < np.mean(query_code == key_code) < 0.45


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n: need an integer at least 0, got -1"),
        ({"dim": 0}, "dim: need an integer at least 1, got 0"),
        ({"heads": 1.5}, "heads: need an integer, got float 1.5"),
        ({"hash_code_len": 31}, "hash_code_len: need an integer between 1 and 30, got 31"),
        ({"dtype": "bfloat16"}, "dtype: need one of 'float16', 'float32', 'float64', got 'bfloat16'"),
        ({"library": "jax"}, "library: need one of 'numpy', 'torch', got 'jax'"),
        ({"op": "softmax"}, "op: no operation 'softmax'"),
        ({"op": "hadamard_transform", "dim": 20}, "dim: hadamard_transform needs a power of two, got 20"),
    ],
)
def test_example_inputs_refuse(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        example_inputs(**({"op": "fast_hash"} | options))  # type: ignore[arg-type]


# ---------------------------------------------------------------- truth and tolerance


def test_truth_of_a_sampled_attention_keeps_the_codes_of_its_dtype() -> None:
    (query, key, value), kwargs = example_inputs("yoso_attention", dtype="float16", **SMALL)
    codes = [reference.fast_hash(x, kwargs["signs"], 7, 5) for x in (query, key)]
    summed = reference.lsh_cumulation_pairs(*codes, value.astype(np.float64), 32)
    (right,) = truth("yoso_attention", (query, key, value), kwargs)
    assert right.dtype == np.float64
    np.testing.assert_allclose(right, reference.l2_normalize(summed), rtol=1e-12, atol=1e-15)


def test_tolerance_of_a_cumulation_by_hand() -> None:
    """One bucket, integer values: the definition is exact, so 4 ulp of 1/m sum |terms| are left,
    although the sum is 0.
    """
    codes = np.zeros((2, 1), np.int32)
    value = np.array([[3.0, 1.0], [-3.0, 0.0]], np.float32)
    (allowed,) = tolerance("lsh_cumulation", (codes, codes, value, 2), {})
    np.testing.assert_allclose(allowed, 4 * 2.0**-23 * np.array([[6, 1], [6, 1]]), rtol=1e-12)


def test_tolerance_is_zero_where_no_term_is_added() -> None:
    query_code, key_code = np.array([[0], [1]], np.int32), np.array([[0]], np.int32)
    (allowed,) = tolerance("lsh_cumulation", (query_code, key_code, np.ones((1, 3), np.float32), 2), {})
    assert np.all(allowed[0] > 0)
    assert np.all(allowed[1] == 0)


@pytest.mark.parametrize("op", [op for op in OPERATIONS if OPERATIONS[op].takes_masks])
def test_tolerance_is_tight(op: str) -> None:
    """No more than 1e-4 of the largest entry in float32, and some 2**29 times less in float64."""
    sizes = {}
    for dtype in ("float32", "float64"):
        args, kwargs = example_inputs(op, dtype=dtype, **SMALL)
        right, allowed = truth(op, args, kwargs), tolerance(op, args, kwargs)
        sizes[dtype] = [np.max(a) / np.max(np.abs(x)) for a, x in zip(allowed, right, strict=True)]
        assert all(np.min(a) > 0 for a in allowed)
    assert max(sizes["float32"]) < 1e-4
    np.testing.assert_allclose(sizes["float64"], np.array(sizes["float32"]) * 2.0**-29, rtol=0.5)


def test_tolerance_allows_a_rounded_cosine_only_where_arccos_may_be_taken() -> None:
    """At cosine 0.98 an arccos in float32 passes; at 1 - 1e-6, where it loses three digits, it does
    not.
    """

    def share_of_tolerance(cosine: float) -> float:
        query = np.array([[1.0, 0.0]], np.float32)
        key = np.array([[cosine, np.sqrt(1 - cosine**2)]], np.float32)
        value = np.ones((1, 1), np.float32)
        weight = (1 - np.arccos(np.float32(query[0] @ key[0])) / np.float32(np.pi)) ** 8
        (right,), (allowed,) = (f("expectation_attention", (query, key, value, 8), {}) for f in (truth, tolerance))
        return float(np.abs(weight - right[0, 0]) / allowed[0, 0])

    assert share_of_tolerance(0.98) < 1
    assert share_of_tolerance(1 - 1e-6) > 5


# ---------------------------------------------------------------- the comparison


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", OPERATIONS)
def test_the_reference_agrees_with_itself(op: str, dtype: str) -> None:
    library = "torch" if dtype == "bfloat16" else "numpy"
    args, kwargs = example_inputs(op, dtype=dtype, library=library, **SMALL)  # type: ignore[arg-type]
    found = compare(op, *args, repeats=1, variants=numpy_variants(op), **kwargs)
    assert [r.verdict for r in found.rows] == ["agrees"] * len(found.rows), str(found)
    assert all(r.repeatable and (r.tolerance_used or 0) <= 1 for r in found.rows)


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_variant_is_listed(op: str) -> None:
    args, kwargs = example_inputs(op, **SMALL)
    found = compare(op, *args, repeats=1, **kwargs)
    assert [r.variant for r in found.rows] == [variant.name for variant in yoso_core.variants(op) if variant.kernel.automatic]
    assert found.agrees, str(found)


def test_empty_inputs() -> None:
    for op in OPERATIONS:
        args, kwargs = example_inputs(op, **(SMALL | {"n": 0, "n_key": 0}))
        assert compare(op, *args, repeats=1, variants=numpy_variants(op), **kwargs).agrees


def compare_planted(fault: Callable[..., Any], op: str = "lsh_cumulation", **options: Any) -> tuple[Comparison, Row]:
    """The NumPy variants beside one more, ``planted``, whose function is ``fault``."""
    args, kwargs = example_inputs(op, **SMALL)
    with registry.register(op, "planted", fault, **options):
        found = compare(op, *args, repeats=3, variants=[*numpy_variants(op), "planted"], **kwargs)
    assert all(r.verdict == "agrees" for r in found.rows if r.variant != "planted"), "one bad variant must not spoil the others"
    return found, row(found, "planted")


def test_a_planted_error_is_found() -> None:
    found, planted = compare_planted(lambda *args, **kwargs: reference.lsh_cumulation_tables(*args, **kwargs) + np.float32(1e-3))
    assert planted.verdict == "disagrees"
    assert planted.max_error == pytest.approx(1e-3, rel=1e-2)
    assert planted.tolerance_used is not None
    assert planted.tolerance_used > 100
    assert not found.agrees


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_error_in_any_gradient_is_found(place: int) -> None:
    def off(*args: object, **kwargs: object) -> tuple[object, ...]:
        grads = list(reference.expectation_attention_backward(*args, **kwargs))  # type: ignore[arg-type]
        grads[place][0, 1, 2, 3] += np.float32(1e-3)
        return tuple(grads)

    _, planted = compare_planted(off, "expectation_attention_backward")
    assert planted.verdict == "disagrees"
    assert planted.max_error == pytest.approx(1e-3, rel=1e-2)


def test_one_wrong_code_is_found() -> None:
    def off(*args: object, **kwargs: object) -> np.ndarray:
        codes = reference.fast_hash(*args, **kwargs)  # type: ignore[arg-type]
        codes[0, 0, 0, 0] ^= 1
        return codes

    _, planted = compare_planted(off, "fast_hash")
    assert (planted.verdict, planted.codes_differing) == ("disagrees", 1)
    assert planted.codes_share == pytest.approx(1 / (2 * 33 * 7))


def test_a_variant_wrong_only_once_is_found() -> None:
    calls = []

    def sometimes(*args: object, **kwargs: object) -> np.ndarray:
        calls.append(None)
        out = reference.lsh_cumulation_tables(*args, **kwargs)  # type: ignore[arg-type]
        return out * 2 if len(calls) == 3 else out

    _, planted = compare_planted(sometimes)
    assert len(calls) == 1 + planted.runs, "a warm-up and those that count"
    assert planted.runs >= 3
    assert (planted.verdict, planted.repeatable) == ("disagrees", False)


@pytest.mark.parametrize(("deterministic", "verdict"), [(True, "not repeatable"), (False, "agrees")])
def test_bits_that_change_are_found(deterministic: bool, verdict: str) -> None:
    calls = []

    def restless(*args: object, **kwargs: object) -> np.ndarray:
        calls.append(None)
        out = reference.lsh_cumulation_tables(*args, **kwargs)  # type: ignore[arg-type]
        out[0, 0, 0, 0] = np.nextafter(out[0, 0, 0, 0], np.float32(np.inf)) if len(calls) == 2 else out[0, 0, 0, 0]
        return out

    found, planted = compare_planted(restless, deterministic=deterministic)
    assert (planted.agrees, planted.repeatable, planted.verdict) == (True, False, verdict)
    assert found.agrees == (verdict == "agrees")


def test_nan_is_the_same_bits_and_must_be_where_the_truth_has_it() -> None:
    def hides_nan(*args: object, **kwargs: object) -> np.ndarray:
        return np.nan_to_num(reference.lsh_cumulation_tables(*args, **kwargs))  # type: ignore[arg-type]

    (query_code, key_code, value, capacity), _ = example_inputs("lsh_cumulation", **SMALL)
    value[0, 0, 0] = np.nan
    found = compare("lsh_cumulation", query_code, key_code, value, capacity, repeats=2, also={"planted": hides_nan})
    assert row(found, "numpy:pairs").verdict == row(found, "numpy:tables").verdict == "agrees"
    planted = row(found, "planted")
    assert (planted.verdict, planted.max_error) == ("disagrees", np.inf)
    assert next(r for r in json.loads(found.to_json())["rows"] if r["variant"] == "planted")["max_error"] == "inf"


def test_a_variant_that_raises_is_listed() -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of [luck]")

    found, planted = compare_planted(broken)
    assert (planted.verdict, planted.failure, planted.max_error) == ("failed", "RuntimeError: out of [luck]", None)
    assert not found.agrees
    assert "planted failed: RuntimeError: out of [luck]" in str(found)


def test_a_wrong_shape_is_a_failure() -> None:
    _, planted = compare_planted(lambda *args, **kwargs: np.zeros((1, 1), np.float32))
    assert planted.failure == "returned shape (1, 1), need (1, 2, 33, 20)"


def test_a_variant_that_cannot_run_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda where: "no such luck" if where != "numpy" else None)
    found = compare("fast_hash", *example_inputs("fast_hash", **SMALL)[0], repeats=1)
    assert (row(found, "cpu:tiles").verdict, row(found, "cpu:tiles").reason) == ("cannot run", "no such luck")
    assert found.agrees, "what cannot run here is no fault"


def test_signs_are_drawn_once_for_all() -> None:
    (query, key, value), _ = example_inputs("yoso_attention", **SMALL)
    found = compare("yoso_attention", query, key, value, num_hash=7, hash_code_len=5, repeats=2)
    assert found.agrees, str(found)
    assert found.inputs["signs"] == "int8 (2, 8, 16)"


def test_the_callers_tensors() -> None:
    args, kwargs = example_inputs("lsh_cumulation", library="torch", **SMALL)
    assert isinstance(args[2], torch.Tensor)
    assert compare("lsh_cumulation", *args, repeats=1, **kwargs).inputs["value"] == "float32 (1, 2, 41, 20)"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "op: no operation 'softmax'", lambda x: compare("softmax", x)),
        (
            ValueError,
            "variants: hadamard_transform has no variant 'cpu:best'",
            lambda x: compare("hadamard_transform", x, variants=["cpu:best"]),
        ),
        (TypeError, "variants: need a list", lambda x: compare("hadamard_transform", x, variants="cpu:tiles")),
        (ValueError, "repeats: need an integer at least 1", lambda x: compare("hadamard_transform", x, repeats=0)),
        (TypeError, "variant: every variant runs; choose with variants=", lambda x: compare("hadamard_transform", x, variant="cpu:tiles")),
        (TypeError, "x: need one of float16", lambda x: compare("hadamard_transform", x.astype(int))),
        (TypeError, "x: need a NumPy array", lambda x: compare("hadamard_transform", x.tolist())),
        (TypeError, "query: need a NumPy array", lambda x: compare("yoso_attention", x.tolist(), x, x)),
        (TypeError, "missing a required argument: 'signs'", lambda x: compare("fast_hash", x)),
    ],
)
def test_wrong_input_raises(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message):
        call(np.ones((3, 4), np.float32))  # type: ignore[operator]


# ---------------------------------------------------------------- what is shown


def test_json_and_text() -> None:
    found = compare("lsh_cumulation", *example_inputs("lsh_cumulation", **SMALL)[0], repeats=2, variants=numpy_variants("lsh_cumulation"))
    read = json.loads(found.to_json())
    assert read == found.to_dict()
    assert read["op"] == "lsh_cumulation"
    assert read["environment"]["versions"]["numpy"] == np.__version__
    assert [r["variant"] for r in read["rows"]] == ["numpy:tables", "numpy:pairs"]
    assert all(0 < r["min_seconds"] <= r["median_seconds"] <= r["max_seconds"] for r in read["rows"])
    lines = str(found).splitlines()
    assert lines[0].startswith("lsh_cumulation(query_hash_code: int32 (1, 2, 33, 7)")
    assert [line.split()[0] for line in lines[1:4]] == ["variant", "numpy:tables", "numpy:pairs"]
    assert " ".join(lines[5:]) == " ".join(found.notes)
    assert max(map(len, lines[5:])) <= 100
    assert found.table().row_count == 2


@pytest.mark.parametrize("op", ["lsh_cumulation", "fast_hash"])
def test_plot(tmp_path: Path, op: str) -> None:
    from matplotlib.image import imread

    figure = compare(op, *example_inputs(op, **SMALL)[0], repeats=2).plot(tmp_path / "plot.png")
    height, width, _ = imread(tmp_path / "plot.png").shape
    assert 1000 < width < 3000
    assert 300 < height < 2000
    errors, times = figure.axes
    assert [label.get_text().split()[0] for label in errors.get_yticklabels()] == [
        variant.name for variant in support.on_the_cpu(op) if variant.kernel.automatic
    ]
    assert times.get_xscale() == "log"


# ---------------------------------------------------------------- the table answers "which should I
# use?"


def shown(op: str = "lsh_cumulation", **options: Any) -> tuple[Comparison, list[str]]:
    args, kwargs = example_inputs(op, **SMALL)
    found = compare(op, *args, repeats=1, **{"variants": numpy_variants(op), **kwargs, **options})
    return found, str(found).splitlines()


def test_it_ends_with_the_answer() -> None:
    """Which variant, how exact, how many times faster than the definition."""
    found, _ = shown(variants=["cpu:tables", "numpy:pairs"])
    assert re.fullmatch(
        r"The fastest that agrees is (cpu:tables, what the library takes by itself, exact to rounding, [\d.e+]+ times as fast as the "
        r"definition|numpy:pairs, the definition itself)\.",
        found.notes[-1],
    )


def test_the_one_that_the_library_takes_and_the_definition_are_marked() -> None:
    found, lines = shown(variants=["cpu:tables", "numpy:tables", "numpy:pairs"])
    assert [line.split("  ")[0] for line in lines[2:5]] == ["cpu:tables *", "numpy:tables", "numpy:pairs ="]
    assert [r.automatic for r in found.rows] == [True, False, False]
    assert found.notes[0].startswith("* is what the library takes by itself here; = is the definition.")


def test_a_range_has_its_units() -> None:
    _, lines = shown()
    assert all(re.search(r"\d (µs|ms|s) - [\d.e+]+ (µs|ms|s)", line) for line in lines[2:4])


def test_short_calls_are_timed_until_their_times_agree() -> None:
    found, _ = shown("hadamard_transform")
    assert all(5 <= r.runs <= 50 for r in found.rows)


@pytest.mark.parametrize(
    ("value", "verdict", "last"),
    [
        (0.0, "all zero", "There is nothing to compare: the output is all zero, by the definition and by every variant that agrees."),
        (np.nan, "all NaN", "There is nothing to compare: the output is all NaN, by the definition and by every variant that agrees."),
    ],
)
def test_an_empty_comparison_says_so(value: float, verdict: str, last: str) -> None:
    codes = np.zeros((9, 3), np.int32)
    found = compare("lsh_cumulation", codes, codes, np.full((9, 4), value, np.float32), 4, repeats=1)
    assert all(r.content == verdict for r in found.rows if r.verdict == "agrees")
    assert re.search(rf"^numpy:pairs = +{verdict} ", str(found), re.MULTILINE)
    assert found.notes[-1] == last


def test_a_few_nan_are_counted() -> None:
    codes = np.arange(6, dtype=np.int32)[:, None]
    value = np.ones((6, 4), np.float32)
    value[2, 1] = np.nan
    found = compare("lsh_cumulation", codes, codes, value, 8, repeats=1, variants=["numpy:pairs"])
    assert "agrees, 1 of 24 NaN" in str(found)


def test_float16_that_overflows_is_infinite_and_warns_of_nothing() -> None:
    codes = np.zeros((9, 1), np.int32)
    found = compare(
        "lsh_cumulation", codes, codes, np.full((9, 2), 6e4, np.float16), 2, repeats=1, variants=numpy_variants("lsh_cumulation")
    )
    assert [(r.verdict, r.content) for r in found.rows] == [("agrees", "all infinite")] * 2


def test_float64_has_no_error_to_show_for_the_definition() -> None:
    args, kwargs = example_inputs("lsh_cumulation", dtype="float64", **SMALL)
    found = compare("lsh_cumulation", *args, repeats=1, variants=numpy_variants("lsh_cumulation"), **kwargs)
    assert re.search(r"numpy:pairs = +agrees +truth +truth +truth", str(found))


def test_emulated_times_stand_apart() -> None:
    support.need("emulated")
    args, kwargs = example_inputs("lsh_cumulation", n=7, heads=1, dim=4, num_hash=2, hash_code_len=3)
    found = compare("lsh_cumulation", *args, repeats=1, variants=["emulated:shared_table", "numpy:pairs"], **kwargs)
    header, *rows = str(found).splitlines()[1:4]
    definition, emulated = sorted(rows, reverse=True)
    assert header.split()[-1] == "emulated"
    assert re.search(r"- +- +- +[\d.]+ (µs|ms|s)$", emulated)
    assert re.search(r"1x +-$", definition)
    assert any("their time is not a GPU's" in note for note in found.notes)


def test_what_cannot_run_is_one_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "missing", lambda where: None if where == "numpy" else "no such luck")
    found, lines = shown(variants=None)
    assert not any(line.startswith(("cpu:", "cupy:")) for line in lines[2:])
    (note,) = (note for note in found.notes if note.startswith("Cannot run here: "))
    assert note.endswith("(no such luck).")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_gets_fewer_columns_and_no_ellipsis(width: int) -> None:
    from rich.console import Console

    found, _ = shown()
    console = Console(width=max(width, 40), record=True, file=io.StringIO())
    console.print(found.table(console.width))
    text = console.export_text()
    assert "…" not in text
    assert "numpy:pairs =" in text
    assert ("from" in text) == (width == 200)
