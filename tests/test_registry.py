"""Every variant of every operation against its definition: one parametrized test over the registry,
and the faults that it must catch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import support
from support import Case, check_variant, definition_of

from yoso_core import reference, registry
from yoso_core.gpu import emulator
from yoso_core.gpu.device import DoesNotFit
from yoso_core.operations import OPERATIONS
from yoso_core.reference.arrays import Array, full_mask

SIZES = (
    Case(0, 0, 48, 7, 7, 9),
    Case(0, 63, 48, 7, 7, 9),
    Case(7, 0, 48, 7, 7, 9),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 137, 20, 7, 33, 30),
    Case(7, 7, 7, 20, 7, 13),  # tau > D: a code spans several parts
    Case(63, 63, 1, 1, 7, 30),
    Case(63, 63, 4, 1, 33, 13, "float64"),
    Case(63, 63, 48, 48, 7, 9, mask="masked"),
    Case(63, 63, 48, 48, 7, 9, "float64", mask="masked"),
    Case(63, 63, 48, 48, 7, 9, "float16", mask="masked"),
    Case(63, 63, 48, 48, 7, 9, "bfloat16", mask="masked"),
    Case(63, 137, 64, 64, 33, 8, mask="fully"),
    Case(63, 137, 64, 64, 33, 8, "float64"),
    Case(137, 63, 80, 80, 33, 8, "float16"),
    Case(137, 137, 128, 128, 7, 13, "bfloat16", mask="fully"),
    Case(137, 137, 80, 20, 1, 1, mask="broadcast", leading=(2, 3)),
    Case(137, 137, 20, 64, 7, 9, kind="onehot"),
    Case(63, 63, 64, 7, 7, 8, kind="quantized", leading=()),
    Case(63, 63, 48, 48, 7, 9, kind="repeated"),
    Case(63, 63, 48, 48, 7, 30, "bfloat16", kind="repeated"),
    Case(63, 63, 64, 7, 7, 8, leading=(0, 2)),
    Case(7, 7, 1024, 1024, 7, 9, mask="masked"),
    Case(4097, 63, 20, 7, 7, 8, leading=()),
    Case(63, 4097, 20, 7, 7, 8, leading=()),
)

CHAINED = tuple(
    replace(case, layout="chained")
    for case in (
        Case(0, 63, 48, 7, 7, 9),
        Case(1, 1, 1, 1, 1, 1),
        Case(1, 137, 20, 7, 33, 30),
        Case(7, 7, 7, 20, 7, 13),
        Case(63, 63, 1, 1, 7, 30),
        Case(63, 63, 4, 1, 33, 13, "float64"),
        *(Case(63, 63, 48, 48, 7, 9, dtype, mask="masked") for dtype in ("float32", "float64", "float16", "bfloat16")),
        Case(63, 137, 64, 64, 33, 8, mask="fully"),
        Case(137, 137, 80, 20, 1, 1, mask="broadcast", leading=(2, 3)),
        Case(137, 137, 20, 64, 7, 9, kind="onehot"),
        Case(63, 63, 64, 7, 7, 8, kind="quantized", leading=()),
        Case(63, 63, 64, 7, 7, 8, leading=(0, 2)),
        Case(7, 7, 1024, 7, 7, 9),
        *(Case(1, 63, 48, 1, 33, 9, dtype, kind=kind) for dtype in ("float32", "float64") for kind in ("1e-15", "1e15", "1e35")),
        Case(63, 63, 20, 7, 7, 9, mask="masked", rotations=2),
        Case(7, 7, 64, 7, 33, 8, rotations=5),
        Case(7, 7, 4, 7, 3, 30, "float64", rotations=23),
    )
)

# Tables have 2**(tau + s) rows; only those variants that visit neighbors take 30 bits.
SMOOTHED = (
    Case(7, 0, 20, 7, 3, 3, oversample=2),
    Case(1, 1, 1, 1, 1, 1, oversample=1),
    Case(63, 137, 20, 7, 33, 3, mask="fully", oversample=1),
    *(Case(63, 63, 20, 33, 3, 4, dtype, mask="masked", oversample=2) for dtype in ("float32", "float64", "float16", "bfloat16")),
    Case(137, 63, 20, 7, 2, 4, mask="broadcast", oversample=4, leading=(2, 1)),
    Case(7, 63, 20, 40, 2, 28, oversample=2, leading=()),
)

SMOOTHED_TABLES = (
    Case(1, 0, 1, 7, 1, 3),
    Case(1, 0, 1, 1, 1, 1, oversample=1, leading=()),
    *(Case(1, 0, 1, 40, 1, 4, dtype, oversample=2) for dtype in ("float32", "float64", "float16", "bfloat16")),
    Case(1, 0, 1, 7, 1, 5, oversample=4, leading=(1, 2)),
    Case(1, 0, 1, 3, 1, 1, oversample=7),
    Case(1, 0, 1, 7, 1, 3, oversample=2, leading=(0, 2)),
)

MAGNITUDES = ("1e-15", "1e-8", "1e8", "1e15", "1e35")
HASHES = (
    *SIZES,
    *(Case(1, 63, 48, 1, 33, 9, dtype, kind=kind) for dtype in ("float32", "float64") for kind in ("quantized", "onehot", *MAGNITUDES)),
    *(Case(1, 63, d, 1, 7, tau, kind="quantized") for d, tau in ((1, 13), (7, 30), (20, 1), (128, 9), (1024, 30))),
    Case(1, 63, 48, 1, 33, 9, "float16", kind="quantized"),
    Case(1, 63, 128, 1, 33, 9, "bfloat16", kind="onehot"),
)

ATTENTIONS = (
    *SIZES,
    *(Case(63, 63, 48, 48, 7, 9, dtype, mask="masked", normalize_output=False) for dtype in ("float32", "float64", "float16", "bfloat16")),
    *(Case(63, 137, 48, 48, 7, 8, mask=mask, mode="expectation") for mask in ("masked", "fully")),
    Case(63, 63, 48, 48, 7, 9, mask="masked", mode="expectation", normalize_output=False),
    *(Case(63, 63, 20, 48, 7, 9, dtype, mask="fully", kind="quantized", mode="planes") for dtype in ("float32", "float64", "float16")),
    Case(63, 63, 20, 48, 33, 9, mask="broadcast", kind="onehot", mode="planes", leading=(2, 3), normalize_output=False),
    Case(63, 137, 64, 20, 7, 8, kind="1e35"),
    Case(63, 137, 64, 20, 7, 8, kind="1e-15", mode="expectation"),
)

ERRORS = tuple(
    replace(case, layout="chained", return_error=True)
    for case in (
        Case(0, 7, 20, 7, 7, 3),
        Case(7, 0, 20, 7, 7, 3),
        Case(1, 63, 20, 1, 2, 3, leading=()),
        Case(63, 63, 20, 40, 7, 4, mask="masked"),
        *(Case(20, 63, 20, 7, 7, 4, dtype, mask="masked", oversample=2) for dtype in ("float32", "float64", "float16", "bfloat16")),
        Case(20, 63, 20, 7, 7, 4, "float64", mask="fully", normalize_output=False),
        Case(20, 20, 20, 7, 33, 30, kind="repeated"),  # one hash is like another: no error, but for rounding
        Case(7, 63, 20, 40, 2, 28, oversample=2, leading=()),
        *(Case(20, 63, 20, 7, 7, 4, oversample=s, size=size) for s, size in ((0, 1e-25), (0, 1e25), (2, 1e25))),
        Case(20, 63, 20, 7, 7, 4, mode="planes", mask="broadcast"),
    )
)

GRADIENTS = (
    *SIZES,
    *(Case(63, 137, 48, 20, 7, 9, dtype, mask="masked", grad="exact") for dtype in ("float32", "float64", "float16", "bfloat16")),
    Case(137, 63, 20, 48, 33, 8, mask="fully", grad="exact"),
    Case(63, 63, 130, 7, 7, 8, grad="exact", leading=(2, 3)),
)

CASES = {
    "expectation_attention_backward": GRADIENTS,
    "lsh_attention_backward": (*GRADIENTS, *SMOOTHED, replace(SMOOTHED[3], grad="exact")),
    "hadamard_transform": HASHES,
    "fast_hash": HASHES + CHAINED,
    "hyperplane_hash": HASHES,
    "lsh_cumulation": SIZES + SMOOTHED,
    "smooth_table": SMOOTHED_TABLES,
    "yoso_attention": (*ATTENTIONS, *CHAINED, *(replace(case, layout="chained") for case in SMOOTHED), *ERRORS),
    "expectation_attention": (*SIZES, Case(63, 63, 48, 7, 7, 9, kind="1e15"), Case(63, 63, 48, 7, 7, 9, "float64", kind="1e35")),
}


# In the stepper every CUDA thread is a Python function: small, but every size that matters is
# there.
STEPPED = (
    Case(0, 7, 8, 7, 7, 9),
    Case(7, 0, 8, 7, 7, 9),
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 7, 20, 7, 7, 30, leading=()),
    Case(7, 7, 7, 20, 7, 13, leading=()),
    Case(63, 7, 8, 8, 1, 8, mask="masked"),
    Case(7, 63, 48, 48, 7, 9, mask="masked", leading=()),
    *(Case(7, 7, 48, 48, 7, 9, dtype, mask="masked") for dtype in ("float64", "float16", "bfloat16")),
    Case(137, 7, 64, 64, 1, 8, leading=()),
    Case(7, 137, 80, 20, 1, 1, mask="broadcast", leading=()),
    Case(7, 7, 128, 7, 33, 4, mask="fully", leading=(1, 2)),
    Case(7, 7, 20, 64, 7, 9, kind="onehot"),
    Case(7, 7, 64, 7, 7, 8, kind="quantized", leading=()),
    Case(7, 7, 64, 7, 7, 8, leading=(0, 2)),
    Case(1, 7, 48, 1, 7, 9, kind="1e15", leading=()),
)

STEPPED_AND_SMOOTHED = (Case(7, 20, 8, 7, 3, 2, mask="masked", oversample=2), Case(7, 7, 8, 5, 2, 2, "bfloat16", oversample=1, leading=()))

ORDERS: tuple[Any, ...] = ("forward", "reverse", 3)
IN_EVERY_ORDER = {Case(63, 63, 48, 48, 7, 9, mask="masked"), Case(7, 7, 48, 48, 7, 9, "float64", mask="masked")}
"""The other cases take turns."""


def cases_for(kernel: registry.Kernel) -> tuple[Case, ...]:
    if kernel.where == "stepped":
        # Weights are taken one coordinate after another, each with a table: a few show what many
        # do.
        if kernel.op == "fast_hash":
            chained = (replace(case, layout="chained") for case in STEPPED[2:])
            return *STEPPED, *chained, Case(1, 7, 20, 7, 7, 9, layout="chained", rotations=2)
        if kernel.op == "smooth_table":
            return tuple(replace(case, d_v=min(case.d_v, 5)) for case in SMOOTHED_TABLES if case.hash_code_len + case.oversample <= 6)
        if kernel.op == "lsh_cumulation":
            return STEPPED + STEPPED_AND_SMOOTHED
        return tuple(replace(case, d=min(case.d, 7)) for case in STEPPED) if kernel.op == "lsh_weighted_cumulation" else STEPPED
    cases = CASES.get(kernel.op, SIZES)
    if kernel.name.endswith(":block_per_part"):  # a chain has no parts
        cases = HASHES
    if kernel.where == "emulated":  # where every CUDA thread is a fiber
        if kernel.op in ("yoso_attention", "lsh_attention_backward"):  # which smooth as lsh_cumulation does
            cases = tuple(case for case in cases if case.return_error or not (case.oversample and case.dtype in ("float64", "bfloat16")))
        return tuple(case for case in cases if max(case.n_q, case.n_k) <= 137 and max(case.d, case.d_v) <= 128)
    return cases


def every_check() -> list[Any]:
    return [
        pytest.param(
            kernel,
            case,
            ORDERS if case in IN_EVERY_ORDER else ORDERS[turn % 3 :][:1],
            id=f"{kernel.op}-{kernel.name}-{case}",
            marks=[pytest.mark.gpu] if kernel.backend.device == "cuda" else [],
        )
        for kernel in registry.KERNELS
        if not kernel.definition
        for turn, case in enumerate(cases_for(kernel))
    ]


@pytest.mark.parametrize(("kernel", "case", "orders"), every_check())
def test_variant_does_what_its_definition_does(kernel: registry.Kernel, case: Case, orders: tuple[Any, ...]) -> None:
    support.need(kernel.where)
    for order in orders if kernel.where in ("emulated", "stepped") else orders[:1]:
        with emulator.order(order), expecting_room(kernel, case):
            check_variant(kernel.op, kernel.name, case)


def max_shared(where: str) -> int:
    if where == "emulated":
        return emulator.Emulator().max_shared
    if where == "stepped":
        from yoso_core.gpu.emulator.stepper import Stepper

        return Stepper().max_shared
    if where == "cupy":
        from yoso_core.gpu.cupy_kernels.cuda import CupyDevice

        return CupyDevice(0, 0).max_shared
    from yoso_core.gpu.numba_kernels.cuda import NumbaCuda

    return NumbaCuda(0, 0).max_shared


def expecting_room(kernel: registry.Kernel, case: Case) -> AbstractContextManager[Any]:
    """Tables of every bucket do not fit where there are very many: that must be said, with the way
    out, before anything runs.
    """
    if not kernel.kernels or case.mode == "expectation" or min(case.n_q, case.n_k, *case.leading) == 0:
        return nullcontext()
    if case.oversample and kernel.name.endswith(":shared_table") and kernel.where in ("numba_cuda", "stepped"):
        return pytest.raises(DoesNotFit, match=r"^oversample: .* the variant global_table")
    shared = kernel.name.endswith(":shared_table")
    bits = case.hash_code_len + case.oversample
    column = (1 << bits) * (8 if case.dtype == "float64" else 4)
    if (kernel.name.endswith((":global_table", ":weight_by_weight")) and bits == 30) or (shared and column >= max_shared(kernel.where)):
        return pytest.raises(DoesNotFit, match=r"^hashtable_capacity: .* bytes.* the variants? \w+")
    return nullcontext()


# Faults: each wraps the definition of an operation and spoils one line of it.

Fault = Callable[[Callable[..., Any], dict[str, Any]], Any]
KEY_SIDE = ("key", "value", "key_hash_code", "key_weight", "key_mask")


def drops_the_last_keys(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    n = call["value"].shape[-2] // 8 * 8
    cut = {k: x[..., :n] if k == "key_mask" else x[..., :n, :] for k, x in call.items() if k in KEY_SIDE and x is not None}
    return run(**{**call, **cut})


def drops_the_last_vectors(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    out = run(**call)
    out[..., out.shape[-2] // 8 * 8 :, :] = 0
    return out


def leaves_the_last_row_unwritten(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    right = run(**call)
    out = np.empty(right.shape, right.dtype)
    out[..., :-1, :] = right[..., :-1, :]
    return out


def reads_the_row_before(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return np.roll(run(**call), 1, axis=-2)


def forgets_the_chain_through_the_key(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The gradient by the unit vector, not by the key."""
    grad_query, grad_key, grad_value = run(**call)
    length = np.linalg.norm(np.nan_to_num(call["key"]), axis=-1, keepdims=True).astype(grad_key.dtype)
    return grad_query, grad_key * length, grad_value


def takes_the_other_gradient(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "grad": "exact" if call["grad"] == "lower_bound" else "lower_bound"})


def ignores_the_key_mask(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "key_mask": None})


def ignores_the_query_mask(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "query_mask": None})


def multiplies_by_the_mask(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """NaN times zero is NaN."""
    keep = call["key_mask"]
    return run(**{**call, "key_mask": None} | ({} if keep is None else {"value": call["value"] * keep[..., None]}))


def forgets_one_over_m(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    num_hash = call["num_hash"] if "num_hash" in call else call["query_hash_code"].shape[-1]
    return run(**call) * num_hash


def shifts_the_codes(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "query_hash_code": call["query_hash_code"] >> 1, "key_hash_code": call["key_hash_code"] >> 1})


def takes_one_bit_more(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "hash_code_len": call["hash_code_len"] + 1})


def starts_at_bit_one(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**call) << 1


def puts_the_first_bit_on_top(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    codes, tau = run(**call), call["hash_code_len"]
    return sum(((codes >> b & 1) << (tau - 1 - b) for b in range(tau)), np.zeros_like(codes))


def counts_zero_as_positive(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """``not (-projection > 0)`` is ``projection >= 0``."""
    return run(**{**call, "vectors": -call["vectors"]}) ^ np.int32((1 << call["hash_code_len"]) - 1)


def applies_the_diagonals_in_reverse(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "signs": call["signs"][..., ::-1, :, :]})


def uses_one_part_throughout(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    first = call["signs"][..., :1, :]
    return run(**{**call, "signs": np.broadcast_to(first, call["signs"].shape)})


def starts_with_the_smallest_stride(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The same transform, from another tree of additions: bit reversal turns one into the other."""
    dim = call["x"].shape[-1]
    width = dim.bit_length() - 1
    reversal = [int(f"{i:0{width}b}"[::-1], 2) if width else 0 for i in range(dim)]
    return run(call["x"][..., reversal])[..., reversal]


def forgets_to_normalize(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "normalize_output": False})


def forgets_a_head(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Every head gets the first head's draw."""
    return run(**{**call, "signs": call["signs"][:1]})


def uses_arccos(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """A cosine in single precision has lost the small angles."""
    q, k = (reference.l2_normalize(call[name]) for name in ("query", "key"))
    keep_query, keep_key = (full_mask(call[f"{side}_mask"], call[side].shape[:-1]) for side in ("query", "key"))
    q, k, v = (np.where(keep[..., None], x, 0) for x, keep in ((q, keep_query), (k, keep_key), (call["value"], keep_key)))
    weight: Array = (1 - np.arccos(np.clip(q @ k.swapaxes(-1, -2), -1, 1)) / np.pi) ** call["hash_code_len"]
    weight = weight * keep_query[..., None] * keep_key[..., None, :]
    return (weight @ v).astype(call["value"].dtype)


def divides_the_error_by_m(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The divisor of a variance, where m - 1 is meant."""
    out, error = run(**call)
    return out, error * np.float32(np.sqrt(1 - 1 / call["num_hash"]))


def forgets_one_over_m_of_the_error(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The spread of a single hash."""
    out, error = run(**call)
    return out, error * np.float32(np.sqrt(call["num_hash"]))


def doubts_masked_rows(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """They are zeros, but known to be."""
    out, error = run(**call)
    return out, np.where(full_mask(call["query_mask"], error.shape), error, np.float32(np.inf))


def trusts_rows_without_a_key(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    out, error = run(**call)
    return out, np.where(np.isinf(error), np.float32(0), error)


def forgets_to_smooth(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    return run(**{**call, "oversample": 0})


def leaves_out_the_farthest(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """A smaller ``s`` over the same bits."""
    return run(**{**call, "oversample": call["oversample"] - 1})


def weighs_as_if_there_were_a_bit_less(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The sums by distance are right, each ``a_r`` is that of ``tau - 1``."""
    return averaged(call["table"], call["oversample"], reference.smoothing_weights(tau_of(call) - 1, call["oversample"]))


def forgets_a_bit(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """Neighbors across the highest bit are not there."""
    weights = reference.smoothing_weights(tau_of(call), call["oversample"])
    halves = np.split(call["table"], 2, axis=-2)
    return np.concatenate([averaged(half, call["oversample"], weights) for half in halves], axis=-2)


def crosses_a_bit_twice(run: Callable[..., Any], call: dict[str, Any]) -> Any:
    """The distances in rising order: a row comes back to where it was."""
    return averaged(call["table"], call["oversample"], reference.smoothing_weights(tau_of(call), call["oversample"]), rising=True)


def tau_of(call: dict[str, Any]) -> int:
    return int(call["table"].shape[-2]).bit_length() - 1 - int(call["oversample"])


def averaged(table: Array, oversample: int, weights: tuple[float, ...], rising: bool = False) -> Array:
    """`smooth_table` by spheres, with any weights; or with its inner loop the wrong way round."""
    codes = np.arange(table.shape[-2])
    spheres = [table, *(np.zeros_like(table) for _ in range(oversample))]
    for bit in range(len(codes).bit_length() - 1):
        for r in range(1, oversample + 1) if rising else range(oversample, 0, -1):
            spheres[r] = spheres[r] + spheres[r - 1][..., codes ^ (1 << bit), :]
    return sum(table.dtype.type(weight) * sphere for weight, sphere in zip(weights, spheres, strict=True))


ON_SUMS = (drops_the_last_keys, leaves_the_last_row_unwritten, reads_the_row_before, ignores_the_key_mask, multiplies_by_the_mask)
ON_GRADIENTS = (ignores_the_key_mask, ignores_the_query_mask, forgets_the_chain_through_the_key, takes_the_other_gradient)
ON_ERRORS = (divides_the_error_by_m, forgets_one_over_m_of_the_error, doubts_masked_rows, trusts_rows_without_a_key)
ON_HASHES = (
    drops_the_last_vectors,
    leaves_the_last_row_unwritten,
    reads_the_row_before,
    starts_at_bit_one,
    puts_the_first_bit_on_top,
    counts_zero_as_positive,
)
FAULTS: dict[str, tuple[Fault, ...]] = {
    "hadamard_transform": (
        drops_the_last_vectors,
        leaves_the_last_row_unwritten,
        reads_the_row_before,
        starts_with_the_smallest_stride,
    ),
    "fast_hash": (*ON_HASHES, applies_the_diagonals_in_reverse, uses_one_part_throughout, forgets_a_head),
    "hyperplane_hash": ON_HASHES,
    "lsh_cumulation": (*ON_SUMS, ignores_the_query_mask, forgets_one_over_m, shifts_the_codes, forgets_to_smooth, leaves_out_the_farthest),
    "smooth_table": (
        leaves_the_last_row_unwritten,
        reads_the_row_before,
        forgets_to_smooth,
        leaves_out_the_farthest,
        weighs_as_if_there_were_a_bit_less,
        forgets_a_bit,
        crosses_a_bit_twice,
    ),
    "lsh_weighted_cumulation": (*ON_SUMS, ignores_the_query_mask, forgets_one_over_m, shifts_the_codes),
    "expectation_attention": (*ON_SUMS, ignores_the_query_mask, takes_one_bit_more, uses_arccos),
    "expectation_attention_backward": (*ON_GRADIENTS, takes_one_bit_more),
    "lsh_attention_backward": (*ON_GRADIENTS, shifts_the_codes, forgets_to_smooth),
    "yoso_attention": (
        *ON_SUMS,
        ignores_the_query_mask,
        forgets_one_over_m,
        forgets_to_normalize,
        applies_the_diagonals_in_reverse,
        *ON_ERRORS,
    ),
}

# The case that a fault is tried on: small, and of the sort that the fault is about.
PLAIN = Case(63, 63, 48, 48, 7, 9, mask="masked")
TRIED_ON: dict[Fault, Case] = {
    counts_zero_as_positive: Case(1, 63, 48, 1, 33, 9, kind="quantized"),
    uses_one_part_throughout: Case(1, 63, 48, 1, 33, 9),
    forgets_one_over_m: replace(PLAIN, normalize_output=False),
    uses_arccos: Case(63, 63, 48, 48, 7, 9, kind="repeated"),
    **dict.fromkeys(ON_ERRORS, replace(PLAIN, return_error=True)),
    trusts_rows_without_a_key: Case(7, 0, 48, 48, 7, 9, return_error=True),
    **dict.fromkeys(
        (forgets_to_smooth, leaves_out_the_farthest, weighs_as_if_there_were_a_bit_less, forgets_a_bit, crosses_a_bit_twice),
        Case(63, 63, 20, 20, 7, 4, mask="masked", oversample=2),
    ),
}
EVERY_FAULT = [pytest.param(op, fault, id=f"{op}-{fault.__name__}") for op, faults in FAULTS.items() for fault in faults]


@contextmanager
def spoiled(op: str, fault: Fault | None) -> Iterator[str]:
    """The definition, spoiled by a fault, as one more variant."""
    run, operation = definition_of(op).kernel.load(), OPERATIONS[op]
    masks = {"query_mask": None, "key_mask": None} if operation.takes_masks else {}

    def kernel(*args: Any, **options: Any) -> Any:
        call = {**dict(zip(operation.positional, args, strict=True)), **masks, **options}
        return fault(run, call) if fault else run(**call)

    with registry.register(op, "spoiled", kernel) as registration:
        yield registration.name


@pytest.mark.parametrize(("op", "fault"), EVERY_FAULT)
def test_the_check_catches(op: str, fault: Fault) -> None:
    with spoiled(op, fault) as name, pytest.raises(AssertionError):
        check_variant(op, name, TRIED_ON.get(fault, PLAIN))


@pytest.mark.parametrize("op", FAULTS)
@pytest.mark.parametrize("case", dict.fromkeys((PLAIN, *TRIED_ON.values())), ids=str)
def test_the_check_passes_a_definition_without_fault(op: str, case: Case) -> None:
    with spoiled(op, None) as name:
        check_variant(op, name, case)
