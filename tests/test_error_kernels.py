"""Errors of rows from CUDA kernels, beyond the cases of the registry: hashes that take turns, room
for their own rows, values of any size, what is not finite, and rows that keep every bit.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import support
from support import Case, as_dtype, build

import yoso_core
from yoso_core.gpu.cupy_kernels.attention import yoso_attention_shared_table, yoso_attention_sorted_buckets
from yoso_core.gpu.cupy_kernels.cumulation import own_rows_layout
from yoso_core.gpu.device import launches
from yoso_core.gpu.emulator import Emulator
from yoso_core.reference.arrays import Array
from yoso_core.truth import errors_of, tolerance, truth

VARIANTS = tuple(v.name for v in support.on_the_cpu("yoso_attention") if not v.definition)
CUDA = ("emulated:shared_table", "emulated:sorted_buckets")
PLAIN = Case(20, 33, 8, 7, 5, 3, mask="masked", layout="chained", return_error=True)
SMOOTHED = replace(PLAIN, oversample=2)


@pytest.fixture(autouse=True)
def needs_the_emulator() -> None:
    support.need("emulated")


def arguments(case: Case) -> dict[str, Any]:
    """As a launcher takes them, in float64."""
    return {"use_expectation": False, "planes": None, **build("yoso_attention", case)}


def assert_right(found: tuple[Array, ...], given: dict[str, Any]) -> None:
    right = truth("yoso_attention", (), given)
    for got, exact, allowed in zip(found, right, tolerance("yoso_attention", (), given, true=right), strict=True):
        assert (errors_of(got, exact) <= allowed).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "case",
    [
        PLAIN,
        SMOOTHED,
        replace(PLAIN, dtype="bfloat16", normalize_output=False),
        replace(SMOOTHED, dtype="float64", n_q=65, d_v=140, num_hash=33),
        replace(SMOOTHED, hash_code_len=9, d_v=40, num_hash=33),
    ],
    ids=str,
)
def test_rows_keep_every_bit(variant: str, case: Case) -> None:
    given = {name: as_dtype(x, case.dtype) for name, x in build("yoso_attention", case).items()}
    out, _ = yoso_core.yoso_attention(**given, variant=variant)
    plain = yoso_core.yoso_attention(**given | {"return_error": False}, variant=variant)
    assert out.any()
    np.testing.assert_array_equal(support.as_float64(out), support.as_float64(plain))


@pytest.mark.parametrize("max_shared", [400, 2000, 227 << 10])
@pytest.mark.parametrize("case", [PLAIN, replace(SMOOTHED, hash_code_len=1)], ids=str)
def test_the_shared_table_takes_hashes_in_turn(max_shared: int, case: Case) -> None:
    given = arguments(case)
    assert_right(yoso_attention_shared_table(Emulator(max_shared), **given), given)


@pytest.mark.parametrize("case", [replace(PLAIN, d_v=40), replace(SMOOTHED, d_v=40)], ids=str)
def test_the_sorted_buckets_take_hashes_in_turn(case: Case) -> None:
    given = arguments(case)
    with launches() as made:
        assert_right(yoso_attention_sorted_buckets(Emulator(max_table=33 * 40 * 8 * 2), **given), given)
    assert sum(launch.kernel == "sum_buckets" for launch in made) == 2 * 3


@pytest.mark.parametrize(
    ("num_hash", "layouts"),
    [
        (5, [(4, 4)]),  # 4 queries in a block, 4 dims in a lane
        (9, [(4, 2)]),  # 64 of the 96 dims, then 32
        (40, [(1, 1)]),
        (73, [(1, 1), (8, 4)]),  # there is room for 72 hashes
    ],
)
def test_the_rows_of_the_hashes_find_room(num_hash: int, layouts: list[tuple[int, int]]) -> None:
    """Where shared memory is small; the rows keep every bit as long as it holds all hashes."""
    given, device = arguments(replace(SMOOTHED, n_q=9, n_k=17, d_v=96, leading=(), num_hash=num_hash)), Emulator(18 << 10)
    groups = [num_hash] if len(layouts) == 1 else [72, 1]
    with launches() as made:
        found = yoso_attention_sorted_buckets(device, **given)
    assert [own_rows_layout(group, 96, 18 << 10, 8)[:2] for group in groups] == layouts
    assert [launch.block for launch in made if launch.kernel == "gather_neighbors"] == [(32, rows, 1) for rows, _ in layouts]
    assert_right(found, given)
    plain = yoso_attention_sorted_buckets(device, **given | {"return_error": False})
    np.testing.assert_allclose(found[0], plain, rtol=0 if len(groups) == 1 else 1e-12)


@pytest.mark.parametrize("variant", CUDA)
@pytest.mark.parametrize(("dtype", "exponents"), [("float32", (-120, 100)), ("float64", (-1000, 900))])
def test_the_size_of_the_values_does_not_matter(variant: str, dtype: str, exponents: tuple[int, int]) -> None:
    given = {name: as_dtype(x, dtype) for name, x in build("yoso_attention", replace(PLAIN, mask="none", normalize_output=False)).items()}
    _, error = yoso_core.yoso_attention(**given, variant=variant)
    for exponent in exponents:
        scaled = given | {"value": np.ldexp(given["value"], exponent)}
        np.testing.assert_allclose(yoso_core.yoso_attention(**scaled, variant=variant)[1], error, rtol=1e-4)


@pytest.mark.parametrize("variant", CUDA)
@pytest.mark.parametrize("oversample", [0, 2])
def test_other_heads_and_masked_keys_set_no_unit(variant: str, oversample: int) -> None:
    given = build("yoso_attention", replace(PLAIN, mask="none", oversample=oversample))
    given = {name: as_dtype(x, "float32") for name, x in given.items()}
    given["key_mask"] = np.arange(33)[None] % 4 > 0
    _, error = yoso_core.yoso_attention(**given, variant=variant)
    value = given["value"].copy()
    value[0] *= np.float32(2.0**100)
    value[0, ::4], value[1, ::4] = np.inf, 1e30
    np.testing.assert_array_equal(yoso_core.yoso_attention(**given | {"value": value}, variant=variant)[1], error)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_too_short_for_its_squares_has_no_error(variant: str) -> None:
    """Its head has a value 1e30 times as large: NaN, not the zero that vanished squares would
    give.
    """
    query = np.array([[1.0, 1, 1, 1], [-1.0, -1, -1, -1]], np.float32)
    given: dict[str, Any] = {"query": query, "key": query, "num_hash": 4, "hash_code_len": 2, "return_error": True, "rng": 0}
    value = np.array([[1e30], [1.0]], np.float32)
    _, error = yoso_core.yoso_attention(value=value, variant=variant, **given)
    np.testing.assert_array_equal(error, [0, np.nan])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("oversample", [0, 2])
@pytest.mark.parametrize("strange", ["query", "key", "value"])
def test_what_is_not_finite_has_no_finite_error(variant: str, oversample: int, strange: str) -> None:
    given = build("yoso_attention", replace(PLAIN, mask="none", oversample=oversample))
    given = {name: as_dtype(x, "float32") for name, x in given.items()}
    given["query_mask"] = np.arange(20)[None] > 2
    given[strange][1, 5, 3] = np.inf if strange == "value" else np.nan
    found = yoso_core.yoso_attention(**given, variant=variant)
    right = yoso_core.yoso_attention(**given, variant=support.definition_of("yoso_attention").name)
    assert np.isnan(right[1]).any()
    assert (found[1][:, :3] == 0).all()
    for got, exact in zip(found, right, strict=True):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(exact))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_without_columns(variant: str) -> None:
    x = np.ones((2, 3, 4), np.float32)
    keep = np.array([True, False, True])
    given: dict[str, Any] = {"num_hash": 4, "return_error": True, "rng": 0, "query_mask": keep[None]}
    out, error = yoso_core.yoso_attention(x, x, x[..., :0], variant=variant, **given)
    assert out.shape == (2, 3, 0)
    np.testing.assert_array_equal(error, [[np.inf, 0, np.inf]] * 2)
