"""Every implementation of every operation, what it needs, and whether it can run here.

One table. The face picks from it, `compare` walks it, and one parametrised test checks every row
against the reference.
"""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from yoso_core import places
from yoso_core.arrays import Array, Caller
from yoso_core.gpu.device import DoesNotFit
from yoso_core.places import PLACES, Place

log = logging.getLogger("yoso_core")


@dataclass(frozen=True)
class Kernel:
    """One row: an implementation, named by where it runs and what it does, and found only when it
    is first called.
    """

    op: str
    name: str
    """``<where>:<algorithm>``."""
    target: str
    """``module:function``."""
    summary: str
    deterministic: bool = True
    kernels: tuple[str, ...] = ()
    """The CUDA kernels that it launches, by name."""
    definition: bool = False
    """The one that says what is right; `compare` and the tests measure the others against it, in
    float64.
    """

    @property
    def where(self) -> str:
        return self.name.partition(":")[0]

    def load(self) -> Callable[..., Any]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)

    @property
    def place(self) -> Place:
        return PLACES[self.where]

    def run(self, caller: Caller, likes: Sequence[Array | None], args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Call it with the caller's arrays. One result for each of ``likes``, in its dtype, as the
        caller's kind of array.
        """
        found = self.place.run(self.load(), caller, args, options)
        if len(likes) == 1:
            return self.place.back(caller, found, likes[0])
        return tuple(self.place.back(caller, x, like) for x, like in zip(found, likes, strict=True))


def _cuda(op: str, algorithm: str, summary: str, kernels: str, *, deterministic: bool = True) -> list[Kernel]:
    """CUDA C++: one launcher, on a GPU and in the emulator."""
    target = f"yoso_core.gpu.cupy_kernels:{op}_{algorithm}"
    names = tuple(kernels.split())
    return [Kernel(op, f"{where}:{algorithm}", target, summary, deterministic, names) for where in ("cupy", "emulated")]


def _numba_cuda(module: str, op: str, algorithm: str, summary: str, kernels: str, *, deterministic: bool = True) -> list[Kernel]:
    """Numba CUDA: one launcher, on a GPU and in the stepper."""
    target = f"yoso_core.gpu.numba_kernels.{module}:{op}_{algorithm}"
    names = tuple(kernels.split())
    return [Kernel(op, f"{where}:{algorithm}", target, summary, deterministic, names) for where in ("numba_cuda", "stepped")]


_AROUND = "warp_per_vector thread_per_code normalize_rows expectation mark_nonfinite_heads finish_attention"
"""Kernels of every attention: both hashes, the expectation, and what comes before and after."""

# In order of preference on each device: the first that can run on the caller's device, and has
# room, is the automatic choice.
KERNELS: tuple[Kernel, ...] = (
    Kernel("hadamard_transform", "cpu:tiles", "yoso_core.cpu:hadamard_transform", "16 vectors to a tile, radix-8 butterflies"),
    Kernel("hadamard_transform", "numpy:butterflies", "yoso_core.reference:hadamard_transform", "one stage at a time", definition=True),
    Kernel("fast_hash", "cpu:tiles", "yoso_core.cpu:fast_hash", "16 vectors to a tile, signs and butterflies in cache"),
    Kernel("fast_hash", "numpy:formula", "yoso_core.reference:fast_hash", "sign bits of H D3 H D2 H D1 x", definition=True),
    *_cuda("fast_hash", "warp_per_vector", "a warp for each vector, butterflies between registers and by shuffle", "warp_per_vector"),
    *_cuda("fast_hash", "block_per_part", "a block for each vector and part, butterflies through shared memory", "block_per_part"),
    *_numba_cuda("hashing", "fast_hash", "shared_memory", "a block for each vector, butterflies in shared memory", "hash_vectors"),
    Kernel("hyperplane_hash", "cpu:tiles", "yoso_core.cpu:hyperplane_hash", "16 vectors to a tile against every plane"),
    Kernel("hyperplane_hash", "numpy:formula", "yoso_core.reference:hyperplane_hash", "one matrix product", definition=True),
    *_cuda("hyperplane_hash", "thread_per_code", "a thread for each code, its projections in registers", "thread_per_code"),
    Kernel("lsh_cumulation", "cpu:tables", "yoso_core.cpu:lsh_cumulation", "a table per hash, in cache"),
    Kernel("lsh_cumulation", "numpy:tables", "yoso_core.reference:lsh_cumulation_tables", "np.add.at into a table per hash"),
    Kernel("lsh_cumulation", "numpy:pairs", "yoso_core.reference:lsh_cumulation_pairs", "every pair of codes", definition=True),
    *_cuda("lsh_cumulation", "shared_table", "tables in shared memory, a column to a thread: no atomics", "shared_table"),
    *_cuda(
        "lsh_cumulation",
        "sorted_buckets",
        "keys sorted by code, buckets are runs: any capacity, no float atomics",
        "transpose_codes sort_codes sum_buckets join_stretches gather_buckets",
    ),
    *_cuda(
        "lsh_cumulation",
        "global_table",
        "tables in global memory, 32 value dims at a time, as in the paper",
        "global_table_scatter global_table_gather",
        deterministic=False,
    ),
    *_numba_cuda(
        "cumulation", "lsh_cumulation", "shared_table", "tables in shared memory, a column to a thread", "cumulate_in_shared_table"
    ),
    *_numba_cuda(
        "cumulation",
        "lsh_cumulation",
        "global_table",
        "tables in global memory, as in the paper",
        "add_keys_to_table read_table",
        deterministic=False,
    ),
    Kernel(
        "lsh_weighted_cumulation",
        "cpu:buckets",
        "yoso_core.cpu:lsh_weighted_cumulation",
        "bucket by bucket, by pairs or by an outer product, whichever is cheaper",
    ),
    Kernel(
        "lsh_weighted_cumulation",
        "numpy:tables",
        "yoso_core.reference:lsh_weighted_cumulation_tables",
        "a table per hash and weight coordinate",
    ),
    Kernel(
        "lsh_weighted_cumulation",
        "numpy:pairs",
        "yoso_core.reference:lsh_weighted_cumulation_pairs",
        "every pair of codes",
        definition=True,
    ),
    *_cuda(
        "lsh_weighted_cumulation",
        "outer_products",
        "one outer product per bucket: linear attention inside it",
        "transpose_codes sort_codes outer_products finish_rows",
    ),
    *_cuda(
        "lsh_weighted_cumulation",
        "sorted_pairs",
        "a warp for each query, over the runs of its buckets",
        "transpose_codes sort_codes sorted_pairs",
    ),
    *_cuda(
        "lsh_weighted_cumulation",
        "weight_by_weight",
        "a table for each weight coordinate, as in the paper",
        "weight_by_weight_scatter weight_by_weight_gather finish_rows",
        deterministic=False,
    ),
    *_numba_cuda(
        "weighted",
        "lsh_weighted_cumulation",
        "weight_by_weight",
        "a table for each weight coordinate, as in the paper",
        "add_weighted_keys_to_table read_weighted_table",
        deterministic=False,
    ),
    Kernel(
        "expectation_attention",
        "cpu:blocked",
        "yoso_core.cpu:expectation_attention",
        "32 queries by 4 keys in registers, nothing stored",
    ),
    Kernel(
        "expectation_attention",
        "numpy:formula",
        "yoso_core.reference:expectation_attention",
        "one query at a time",
        definition=True,
    ),
    *_cuda("expectation_attention", "blocked", "tiles of queries by tiles of keys, nothing stored", "normalize_rows expectation"),
    Kernel(
        "expectation_attention_backward",
        "cpu:blocked",
        "yoso_core.cpu:expectation_attention_backward",
        "tiles of 64 by 64 pairs, all three gradients in one walk",
    ),
    Kernel(
        "expectation_attention_backward",
        "numpy:formula",
        "yoso_core.reference:expectation_attention_backward",
        "one query at a time",
        definition=True,
    ),
    *_cuda(
        "expectation_attention_backward",
        "blocked",
        "tiles of rows by tiles of others, once by query and once by key",
        "normalize_rows gradient_rows l2_normalize_backward",
    ),
    Kernel(
        "lsh_attention_backward",
        "cpu:buckets",
        "yoso_core.cpu:lsh_attention_backward",
        "lower bound: bucket by bucket, all three gradients at one visit; exact: all pairs, blocked",
    ),
    Kernel(
        "lsh_attention_backward",
        "numpy:pairs",
        "yoso_core.reference:lsh_attention_backward",
        "every pair of codes",
        definition=True,
    ),
    *_cuda(
        "lsh_attention_backward",
        "outer_products",
        "lower bound: cumulations by outer products; exact: all pairs, blocked",
        "normalize_rows transpose_codes sort_codes outer_products finish_rows shared_table sum_buckets join_stretches gather_buckets "
        "scan_nonfinite_heads gradient_rows l2_normalize_backward",
    ),
    Kernel("yoso_attention", "cpu:fused", "yoso_core.cpu:yoso_attention", "hash, cumulate and normalize tile by tile, codes never stored"),
    Kernel("yoso_attention", "numpy:formula", "yoso_core.reference:yoso_attention", "hash, cumulate by tables, normalize", definition=True),
    *_cuda(
        "yoso_attention",
        "shared_table",
        "warp_per_vector, shared_table, normalize",
        f"{_AROUND} shared_table",
    ),
    *_cuda(
        "yoso_attention",
        "sorted_buckets",
        "warp_per_vector, sorted_buckets, normalize: any hash_code_len",
        f"{_AROUND} transpose_codes sort_codes sum_buckets join_stretches gather_buckets",
    ),
)

OPERATIONS: tuple[str, ...] = tuple(dict.fromkeys(kernel.op for kernel in KERNELS))


@dataclass(frozen=True)
class Variant:
    """One implementation of an operation, as `variants` lists it."""

    op: str
    name: str
    available: bool
    reason: str | None
    """Why it cannot run here; ``None`` where it can."""
    summary: str
    deterministic: bool
    """The same input gives the same bits, whatever the number of threads."""
    definition: bool
    kernel: Kernel = field(repr=False, compare=False)

    @property
    def where(self) -> str:
        return self.kernel.where


def op_name(op: str | Callable[..., Any]) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPERATIONS:
        raise ValueError(f"op: no operation {name!r}; there are {', '.join(OPERATIONS)}")
    return name


def variants(op: str | Callable[..., Any]) -> list[Variant]:
    """Every implementation of an operation, the automatic choice first, with the reason where one
    cannot run here.

    ``op`` is the function or its name. Raises ``ValueError`` for an operation that does not exist.

    >>> [v.name for v in variants("fast_hash") if v.definition]
    ['numpy:formula']
    """
    return list(_listed(op_name(op)))


# Every call of an operation asks, so the answer is kept, for as long as the table is the same.
_kept: dict[str, tuple[object, object, tuple[Variant, ...]]] = {}


def _listed(op: str) -> tuple[Variant, ...]:
    kept = _kept.get(op)
    if kept is None or kept[0] is not KERNELS or kept[1] is not places.missing:
        found = []
        for kernel in KERNELS:
            if kernel.op == op:
                reason = places.missing(kernel.where)
                found.append(
                    Variant(op, kernel.name, reason is None, reason, kernel.summary, kernel.deterministic, kernel.definition, kernel)
                )
        kept = _kept[op] = KERNELS, places.missing, tuple(found)
    return kept[2]


@cache
def _announce(op: str, name: str) -> None:
    log.info("%s: %s was chosen (pin another with variant=...; yoso_core.variants lists them)", op, name)


def run(
    op: str, variant: str | None, caller: Caller, likes: Sequence[Array | None], args: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """Call the variant named, or the best that can run on the caller's device and has room for
    these sizes.

    Raises
    ------
    ValueError : no variant has that name, it cannot run here (with the reason), it does not fit, or
        none runs on the caller's device.
    """
    if variant is not None:
        return _named(op, variant, caller).run(caller, likes, args, options)
    refused: list[str] = []
    for candidate in _listed(op):
        place = candidate.kernel.place
        if not place.automatic or place.device != caller.kind:
            continue
        if not candidate.available:
            refused.append(f"{candidate.name}: {candidate.reason}")
        else:
            try:
                result = candidate.kernel.run(caller, likes, args, options)
            except DoesNotFit as error:
                refused.append(f"{candidate.name}: {error}")
                continue
            _announce(op, candidate.name)
            return result
    raise ValueError(
        f"{op}: no variant here runs on {caller.device} with these inputs ({'; '.join(refused) or 'there is none for that device'}); "
        "move the arrays to the CPU"
    )


def _named(op: str, name: str, caller: Caller) -> Kernel:
    listed = variants(op)
    for variant in listed:
        if variant.name == name:
            if not variant.available:
                raise ValueError(f"variant: {name} of {op} cannot run here: {variant.reason}")
            if not variant.kernel.place.takes(caller):
                raise ValueError(f"variant: {name} of {op} runs on the {variant.kernel.place.device}, the arrays are on {caller.device}")
            return variant.kernel
    raise ValueError(f"variant: {op} has no variant {name!r}; it has {', '.join(v.name for v in listed)}")


def automatic(op: str | Callable[..., Any], device: str) -> Variant | None:
    """The first choice on a device (``"cpu"`` or ``"cuda"``) where the caller names none; ``None``
    where nothing runs.
    """
    found = (v for v in variants(op) if v.available and v.kernel.place.automatic and v.kernel.place.device == device)
    return next(found, None)
