"""What launchers of CUDA C++ ask a device for: grids that no GPU refuses, however large the sizes,
and no more rounds than the codes need.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import support
from support import Case, check_variant

from yoso_core import registry
from yoso_core.gpu import launches, layout
from yoso_core.gpu.cupy_kernels import cumulation, hashing, sorting, weighted
from yoso_core.gpu.device import CudaKernel
from yoso_core.gpu.emulator import Emulator, emulator
from yoso_core.gpu.emulator.common import launch_sizes
from yoso_core.reference.arrays import Array


class Refusing:
    """A device that runs nothing, and refuses the launches that a GPU would refuse."""

    xp: ModuleType = np
    max_shared, max_table = 227 << 10, 20 << 30

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def launch(self, kernel: Any, grid: Any, block: Any, args: Any, shared: int = 0) -> None:
        launch_sizes(kernel.name, grid, block, shared, self.max_shared)


def codes(num_hash: int) -> Array:
    return np.zeros((1, 2, num_hash), np.int32)


ONE = np.ones((1, 2, 1), np.float32)

MANY: dict[str, Callable[[Any], object]] = {
    "parts": lambda device: hashing.fast_hash_block_per_part(device, ONE, np.ones((3, 65_546, 1), np.int8), 5042, 13, layout="paper"),
    "hashes": lambda device: cumulation.lsh_cumulation_sorted_buckets(device, codes(70_000), codes(70_000), ONE, 2),
    "tiles of hashes": lambda device: sorting.sort_codes(device, codes(2_100_000), 2, None),
    "hashes of a weighted sum": lambda device: weighted.lsh_weighted_cumulation_outer_products(
        device, codes(70_000), ONE, codes(70_000), ONE, ONE, 2
    ),
}


@pytest.mark.parametrize("what", MANY)
def test_no_grid_is_beyond_the_limits(what: str) -> None:
    MANY[what](Refusing())


SMALL_GRIDS = [kernel for kernel in registry.KERNELS if kernel.where == "emulated"]


@pytest.mark.parametrize("kernel", SMALL_GRIDS, ids=lambda kernel: f"{kernel.op}-{kernel.name}")
def test_cut_grids_do_the_same(kernel: registry.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a GPU took no more than two blocks in the second and the third direction."""
    support.need("emulated")
    monkeypatch.setattr(layout, "MAX_GRID_YZ", 2)
    case = Case(9, 11, 20, 12, 7, 8, mask="masked", leading=(5,))
    with launches() as made:
        for variant in support.with_every_kernel(kernel, case):
            check_variant(kernel.op, kernel.name, variant)
    assert max(max(launch.grid[1:]) for launch in made) <= 2


@pytest.mark.parametrize("smoothing", [(), (("OVERSAMPLE", 2), ("HELD_BITS", 3))])
def test_the_largest_block_of_shared_table_is_what_it_is_compiled_for(smoothing: tuple[tuple[str, int], ...]) -> None:
    """Else a thread may take so many registers that no multiprocessor has room for the block."""
    support.need("emulated")
    kernel = CudaKernel("cumulation.cu", "shared_table", (("LANES", 32), *smoothing))
    compiled, _ = emulator._function(kernel, "plain")
    assert compiled.max_threads == (cumulation._MOST_THREADS_SMOOTHING if smoothing else cumulation._MOST_THREADS)
    lanes, _, width = cumulation.shared_table_layout(32, 48, 2, 227 << 10, 4, len(smoothing))
    assert lanes * width == compiled.max_threads


@pytest.mark.parametrize(("capacity", "rounds"), [(1, 1), (2, 1), (16, 1), (17, 2), (256, 2), (257, 3), (4096, 3), (1 << 30, 8)])
def test_codes_are_sorted_in_as_many_rounds_as_they_have_digits(capacity: int, rounds: int) -> None:
    """Four bits each; what marks a masked row takes no round of its own."""
    support.need("emulated")
    rng = np.random.default_rng(0)
    given = rng.choice([0, 1, capacity // 2, capacity - 1, capacity, -1], size=(2, 70, 3)).astype(np.int32)
    mask = rng.integers(2, size=(2, 70)).astype(np.uint8)
    with launches() as made:
        found = sorting.sort_codes(Emulator(), given, capacity, mask)
    assert [launch.kernel for launch in made].count("sort_codes") == rounds
    kept = np.where((mask[..., None] != 0) & (given >= 0) & (given < capacity), given, capacity).transpose(0, 2, 1)
    order = np.argsort(kept, axis=-1, kind="stable")
    np.testing.assert_array_equal(found.order, order)
    np.testing.assert_array_equal(found.code, np.take_along_axis(kept, order, axis=-1))
