"""Smoothing on CUDA kernels, beyond the cases of the registry: tables that need several launches,
zeros that stay zeros, numbers that are not finite, codes that are out of range, fewer hashes for
the gradients.
"""

from typing import Any

import numpy as np
import pytest
import support
from support import Case, build

import yoso_core
from yoso_core import reference
from yoso_core.gpu.cupy_kernels.cumulation import lsh_cumulation_shared_table, lsh_cumulation_sorted_buckets
from yoso_core.gpu.cupy_kernels.smoothing import smooth_table_spheres
from yoso_core.gpu.device import CudaKernel, DoesNotFit, launches
from yoso_core.gpu.emulator import Emulator, count_traffic
from yoso_core.gpu.emulator import build as building
from yoso_core.reference.arrays import Array
from yoso_core.reference.smoothing import count_bits

TABLES = ("emulated:spheres", "stepped:spheres")
CUMULATIONS = ("emulated:shared_table", "emulated:sorted_buckets", "emulated:global_table", "stepped:global_table")
SMALL = Case(20, 33, 5, 7, 3, 3, oversample=2)


@pytest.fixture(autouse=True)
def needs_the_emulators() -> None:
    support.need("emulated", "stepped")


def distances(codes: Array, code: int) -> Array:
    return count_bits(codes ^ code)


@pytest.mark.parametrize(
    ("bits", "oversample", "max_shared", "max_table", "threads_of_launches"),
    [
        (9, 2, 227 << 10, 1 << 20, [256]),  # 7 columns are 8 side by side, and 2**4 rows are in registers
        (9, 2, 2000, 1 << 20, [8, 4]),  # 5 bits, then 4
        (9, 2, 2000, 12_400, [8, 4] * 6),  # T_1 and T_2 of three columns of one table at a time
        (9, 2, 0, 1 << 20, [8] * 3),  # 3 bits at a time never leave the registers
    ],
)
def test_tables_are_smoothed_with_any_memory(
    bits: int, oversample: int, max_shared: int, max_table: int, threads_of_launches: list[int]
) -> None:
    table = np.random.default_rng(0).standard_normal((2, 1 << bits, 7)).astype(np.float32)
    exact = reference.smooth_table_pairs(table.astype(np.float64), oversample)
    with launches() as made:
        out = smooth_table_spheres(Emulator(max_shared, max_table), table, oversample)
    assert [launch.block[0] for launch in made] == threads_of_launches
    np.testing.assert_allclose(out, exact, rtol=0, atol=2e-6)


@pytest.mark.skipif(building.missing_for_counting() is not None, reason=building.missing_for_counting() or "")
@pytest.mark.parametrize(("max_shared", "moved"), [(227 << 10, 2), (14_000, 2 * 2 + 3)])
def test_a_table_moves_what_the_note_of_the_kernel_says(max_shared: int, moved: int) -> None:
    """In whole sectors, without bank conflicts: ``2 N`` numbers in one launch, ``(2 s + 3) N`` in
    two.
    """
    table = np.ones((1, 512, 16), np.float32)
    with count_traffic() as counted:
        smooth_table_spheres(Emulator(max_shared), table, 2)
    total = counted.total
    assert (total.global_bytes, total.global_sectors, total.bank_conflicts) == (moved * table.nbytes, moved * table.nbytes // 32, 0)


def test_a_column_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(
        DoesNotFit, match=r"^oversample: sums over 2 distances for a column of 512 rows take 4,096 bytes, more than the 4,095"
    ):
        smooth_table_spheres(Emulator(2000, 4095), np.zeros((512, 7), np.float32), 2)
    given = build("lsh_cumulation", SMALL)
    with pytest.raises(
        DoesNotFit,
        match=r"^hashtable_capacity: one column of 32 buckets, smoothed with oversample=2, takes 776 bytes .* the variant sorted_",
    ):
        lsh_cumulation_shared_table(Emulator(775), **given)


@pytest.mark.parametrize("max_shared", [776, 2000, 227 << 10])
def test_the_shared_table_takes_hashes_in_turn(max_shared: int) -> None:
    given = build("lsh_cumulation", SMALL)
    out = lsh_cumulation_shared_table(Emulator(max_shared), **given)
    np.testing.assert_allclose(out, reference.lsh_cumulation_pairs(**given), rtol=1e-12)


def test_the_sorted_buckets_take_hashes_in_turn() -> None:
    given = build("lsh_cumulation", Case(9, 33, 5, 140, 3, 3, oversample=2))
    out = lsh_cumulation_sorted_buckets(Emulator(max_table=33 * 140 * 8), **given)
    np.testing.assert_allclose(out, reference.lsh_cumulation_pairs(**given), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("variant", TABLES)
@pytest.mark.parametrize("strange", [np.nan, -np.inf])
def test_what_is_not_finite_reaches_its_neighbors_and_no_other(variant: str, strange: float) -> None:
    table = np.zeros((64, 3), np.float32)
    table[5, 1], table[5, 2] = strange, 7
    out = yoso_core.smooth_table(table, 2, variant=variant)
    near = distances(np.arange(64), 5) <= 2
    np.testing.assert_array_equal(np.isnan(out[:, 1]), near)
    np.testing.assert_array_equal(out[:, 2] > 0, near)
    assert not out[~near].any(), "zeros stay zeros"
    assert not out[:, 0].any()


@pytest.mark.parametrize("variant", TABLES)
def test_without_oversampling_any_number_of_rows_comes_back(variant: str) -> None:
    table = np.array([[1.0, np.inf], [2.0, 3.0], [-np.inf, 4.0]], np.float16)
    np.testing.assert_array_equal(yoso_core.smooth_table(table, 0, variant=variant), np.where(np.isfinite(table), table, np.nan))


@pytest.mark.parametrize("variant", CUMULATIONS)
def test_a_query_far_from_every_key_reads_zeros(variant: str) -> None:
    """Exactly, since a row of zeros must not be scaled to unit length; and the others meet what is
    not finite.
    """
    query_code, key_code = np.arange(64, dtype=np.int32)[:, None], np.full((2, 1), 5, np.int32)
    value = np.array([[0.1, 0.2], [np.inf, 0.3]], np.float32)
    out = yoso_core.lsh_cumulation(query_code, key_code, value, 64, oversample=2, variant=variant)
    near = distances(np.arange(64), 5) <= 2
    assert not out[~near].any()
    np.testing.assert_array_equal(np.isnan(out), near[:, None] & [True, False])


def strangers(given: dict[str, Any], capacity: int) -> tuple[dict[str, Array], dict[str, Array]]:
    """Codes of which two thirds are out of range, and masks that leave out just these."""
    wild, masks = {}, {}
    for side in ("query", "key"):
        code = given[f"{side}_hash_code"].copy()
        code[:, ::3], code[:, 1::3] = (-1, capacity) if side == "query" else (np.iinfo(np.int32).min, np.iinfo(np.int32).max)
        wild[f"{side}_hash_code"] = code
        masks[f"{side}_mask"] = np.arange(code.shape[-2])[None] % 3 == 2
    return wild, masks


@pytest.mark.parametrize("variant", CUMULATIONS)
def test_codes_out_of_range_meet_nobody(variant: str) -> None:
    given = build("lsh_cumulation", SMALL)
    wild, masks = strangers(given, 32)
    out = yoso_core.lsh_cumulation(**given | wild, validate=False, variant=variant)
    assert out.any()
    np.testing.assert_allclose(out, reference.lsh_cumulation_pairs(**given | masks), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("grad", ["lower_bound", "exact"])
@pytest.mark.parametrize(("oversample", "few"), [(0, 2), (2, None), (2, 2)])
def test_gradients_from_fewer_hashes(grad: str, oversample: int, few: int | None) -> None:
    given = build("lsh_attention_backward", Case(20, 33, 5, 7, 3, 3, oversample=oversample, grad=grad))
    given["backward_num_hash"] = few
    wild, masks = strangers(given, 8 << oversample)
    for codes, kept in (({}, {}), (wild, masks)):
        found = yoso_core.lsh_attention_backward(**given | codes, validate=False, variant="emulated:outer_products")
        for x, exact in zip(found, reference.lsh_attention_backward(**given | kept), strict=True):
            np.testing.assert_allclose(x, exact, rtol=1e-9, atol=1e-12)


class Listening(Emulator):
    """An emulator that remembers the kernels, with their macros."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[CudaKernel] = []

    def launch(self, kernel: Any, *args: Any, **options: Any) -> None:
        self.kernels.append(kernel)
        super().launch(kernel, *args, **options)


def test_without_oversampling_the_kernels_know_nothing_of_it() -> None:
    for oversample, expected in ((0, {"VALUE", "OUT", "LANES"}), (2, {"VALUE", "OUT", "LANES", "OVERSAMPLE", "HELD_BITS"})):
        device = Listening()
        lsh_cumulation_shared_table(device, **build("lsh_cumulation", SMALL) | {"oversample": oversample})
        (kernel,) = device.kernels
        assert {name for name, _ in kernel.defines} == expected
