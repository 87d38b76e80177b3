"""Every implementation of every operation, what it needs, and whether it can run here.

One table. The face picks from it, `compare` walks it, and one parametrised test checks every row
against the reference.
"""

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from yoso_core import backends, checks, own_kernel
from yoso_core.arrays import Caller
from yoso_core.backends import BACKENDS, Backend
from yoso_core.gpu.device import CudaVariant, DoesNotFit, NumbaCudaVariant
from yoso_core.operations import OPERATIONS, Operation, operation_of

log = logging.getLogger("yoso_core")


@dataclass(frozen=True)
class Kernel:
    """One row: an implementation, named by where it runs and what it does, and found only when it
    is first called.
    """

    op: str
    name: str
    """``<where>:<algorithm>``; any name for a reader's own."""
    target: str | Callable[..., Any]
    """``module:function``, or the function itself."""
    summary: str
    deterministic: bool = True
    kernels: tuple[str, ...] = ()
    """The CUDA kernels that it launches, by name."""
    registered_on: str | None = None
    """The backend of a reader's own kernel; ``None`` for the library's."""

    @property
    def where(self) -> str:
        return self.registered_on or self.name.partition(":")[0]

    @property
    def backend(self) -> Backend:
        return BACKENDS[self.where]

    @property
    def definition(self) -> bool:
        """The one that says what is right."""
        return self.name == OPERATIONS[self.op].definition

    @property
    def automatic(self) -> bool:
        """May be chosen where the caller names no variant; a reader's own never is."""
        return self.registered_on is None and self.backend.automatic

    def load(self) -> Callable[..., Any]:
        if not isinstance(self.target, str):
            return self.target
        module, function = self.target.split(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found

    def call(self, caller: Caller, arguments: Mapping[str, Any]) -> Any:
        """Call it with the caller's arrays, by name; each output in its dtype and as the caller's
        kind of array, in a tuple where there are several.
        """
        function = self.load()
        if self.registered_on is not None:
            function = own_kernel.adapted(OPERATIONS[self.op], function)
        outputs = OPERATIONS[self.op].outputs_of(arguments)
        likes = [None if output.dtype_of is None else arguments[output.dtype_of] for output in outputs]
        found = self.backend.call(function, caller, arguments, likes)
        return found[0] if len(found) == 1 else found


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


_AROUND = "warp_per_vector warp_per_chain thread_per_code normalize_rows expectation mark_nonfinite_heads scan_exponents finish_attention"
"""Kernels of every attention: both hashes, the expectation, and what comes before and after."""

# In order of preference on each device: the first that can run on the caller's device, and has
# room, is the automatic choice.
KERNELS: tuple[Kernel, ...] = (
    Kernel("hadamard_transform", "cpu:tiles", "yoso_core.cpu:hadamard_transform", "16 vectors to a tile, radix-8 butterflies"),
    Kernel("hadamard_transform", "numpy:butterflies", "yoso_core.reference:hadamard_transform", "one stage at a time"),
    Kernel("fast_hash", "cpu:tiles", "yoso_core.cpu:fast_hash", "16 vectors to a tile, signs and butterflies in cache"),
    Kernel("fast_hash", "numpy:formula", "yoso_core.reference:fast_hash", "sign bits of rotations H D x"),
    *_cuda(
        "fast_hash",
        "warp_per_vector",
        "a warp for each vector, butterflies between registers and by shuffle",
        "warp_per_vector warp_per_chain",
    ),
    *_cuda("fast_hash", "block_per_part", "a block for each vector and part, butterflies through shared memory", "block_per_part"),
    *_numba_cuda(
        "hashing", "fast_hash", "shared_memory", "a block for each vector, butterflies in shared memory", "hash_vectors hash_by_chain"
    ),
    Kernel("hyperplane_hash", "cpu:tiles", "yoso_core.cpu:hyperplane_hash", "16 vectors to a tile against every plane"),
    Kernel("hyperplane_hash", "numpy:formula", "yoso_core.reference:hyperplane_hash", "one matrix product"),
    *_cuda("hyperplane_hash", "thread_per_code", "a thread for each code, its projections in registers", "thread_per_code"),
    Kernel("lsh_cumulation", "cpu:tables", "yoso_core.cpu:lsh_cumulation", "a table per hash, in cache"),
    Kernel("lsh_cumulation", "numpy:tables", "yoso_core.reference:lsh_cumulation_tables", "np.add.at into a table per hash"),
    Kernel("lsh_cumulation", "numpy:pairs", "yoso_core.reference:lsh_cumulation_pairs", "every pair of codes"),
    *_cuda("lsh_cumulation", "shared_table", "tables in shared memory, a column to a thread: no atomics", "shared_table"),
    *_cuda(
        "lsh_cumulation",
        "sorted_buckets",
        "keys sorted by code, buckets are runs: any capacity, no float atomics",
        "transpose_codes sort_codes sum_buckets join_stretches gather_buckets gather_neighbors",
    ),
    *_cuda(
        "lsh_cumulation",
        "global_table",
        "tables in global memory, 32 value dims at a time, as in the paper",
        "global_table_scatter smooth_spheres global_table_gather",
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
        "add_keys_to_table cross_bit weigh_spheres read_table",
        deterministic=False,
    ),
    Kernel("smooth_table", "cpu:recurrence", "yoso_core.cpu:smooth_table", "a polynomial in flips of a bit, 16 columns at a time"),
    Kernel("smooth_table", "numpy:spheres", "yoso_core.reference:smooth_table", "neighbors by distance, bit by bit"),
    Kernel("smooth_table", "numpy:pairs", "yoso_core.reference:smooth_table_pairs", "every pair of codes"),
    *_cuda("smooth_table", "spheres", "neighbors by distance, rows in registers and shared memory", "smooth_spheres"),
    *_numba_cuda("smoothing", "smooth_table", "spheres", "neighbors by distance, bit by bit in global memory", "cross_bit weigh_spheres"),
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
    ),
    *_cuda(
        "lsh_attention_backward",
        "outer_products",
        "lower bound: cumulations by outer products; exact: all pairs, blocked",
        "normalize_rows transpose_codes sort_codes outer_products finish_rows shared_table sum_buckets join_stretches gather_buckets "
        "gather_neighbors scan_nonfinite_heads gradient_rows l2_normalize_backward",
    ),
    Kernel("yoso_attention", "cpu:fused", "yoso_core.cpu:yoso_attention", "hash, cumulate and normalize, head by head"),
    Kernel("yoso_attention", "numpy:formula", "yoso_core.reference:yoso_attention", "hash, cumulate by tables, normalize"),
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
        f"{_AROUND} transpose_codes sort_codes sum_buckets join_stretches gather_buckets gather_neighbors",
    ),
)


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


def variants(op: str | Callable[..., Any]) -> list[Variant]:
    """Every implementation of an operation, the automatic choice first, with the reason where one
    cannot run here. A reader's own stand last.

    ``op`` is the function or its name. Raises ``ValueError`` for an operation that does not exist.

    >>> [v.name for v in variants("fast_hash") if v.definition]
    ['numpy:formula']
    """
    return list(_listed(operation_of(op).name))


_registered: tuple[Kernel, ...] = ()
"""What readers have added, in order."""

# Every call of an operation asks, so the answer is kept, for as long as the rows are the same.
_kept: dict[str, tuple[object, object, tuple[Variant, ...]]] = {}


def _listed(op: str) -> tuple[Variant, ...]:
    kept = _kept.get(op)
    if kept is None or kept[0] is not _registered or kept[1] is not backends.missing:
        found = []
        for kernel in (*KERNELS, *_registered):
            if kernel.op == op:
                reason = backends.missing(kernel.where)
                found.append(
                    Variant(op, kernel.name, reason is None, reason, kernel.summary, kernel.deterministic, kernel.definition, kernel)
                )
        kept = _kept[op] = _registered, backends.missing, tuple(found)
    return kept[2]


class Registration:
    """A reader's kernel in the registry. Leave its ``with`` block, or call `unregister`, to take it
    out again.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def name(self) -> str:
        return self.kernel.name

    def unregister(self) -> None:
        """Take the kernel out; nothing happens where it is out already."""
        global _registered
        _registered = tuple(row for row in _registered if row is not self.kernel)

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *error: object) -> None:
        self.unregister()

    def __repr__(self) -> str:
        return f"<{self.kernel.op} {self.name!r} on {self.kernel.where}>"


def register(
    op: str | Callable[..., Any],
    name: str,
    target: str | Callable[..., Any] | CudaVariant | NumbaCudaVariant,
    *,
    where: str = "numpy",
    deterministic: bool = True,
) -> Registration:
    """Add a kernel of your own to an operation: `variants` lists it, ``variant=name`` runs it,
    `compare` measures it. It is never chosen where the caller names no variant.

    Parameters
    ----------
    op : the operation, by its function or its name.
    name : any name that no variant of the library has. A kernel of yours with that name is
        replaced.
    target : a function, or its place as ``"module:function"``. It is called like the public
        function: the same arguments by position, the others by keyword and only where they are
        given, never ``variant``, ``validate`` or ``rng`` (sampled attention gets its ``signs``).
        Where a caller asks for ``layout``, ``oversample`` or ``return_error``, which plain calls
        leave out, and the function does not take it, the call is refused.
        Arrays are fresh, writable, C-contiguous NumPy copies; half-precision tensors arrive as
        float32. It returns one array, or a tuple of them, in shape and dtype as the definition.
        A CUDA kernel is a `yoso_core.gpu.CudaVariant` or a `yoso_core.gpu.NumbaCudaVariant`.
    where : the backend it runs on. ``"numpy"`` or ``"cpu"`` for a function; ``"cupy"`` or
        ``"emulated"`` for a `CudaVariant`; ``"numba_cuda"`` or ``"stepped"`` for a
        `NumbaCudaVariant`.
    deterministic : the same input gives the same bits. `compare` checks the promise.

    Returns
    -------
    A `Registration`: a context manager that takes the kernel out again.

    Raises
    ------
    ValueError, TypeError : no such operation or backend, a name that is taken, or a target that
        does not run on that backend. When it is called: a result of wrong shape or dtype, or an
        argument that was overwritten.

    >>> import numpy as np, yoso_core
    >>> def negated(x):
    ...     return -yoso_core.reference.hadamard_transform(-x)
    >>> with yoso_core.register("hadamard_transform", "negated", negated):
    ...     yoso_core.hadamard_transform(np.array([1.0, 2.0]), variant="negated")
    array([ 3., -1.])
    """
    global _registered
    kernel = own_row(operation_of(op).name, name, target, where=where, deterministic=deterministic)
    _registered = (*(row for row in _registered if (row.op, row.name) != (kernel.op, kernel.name)), kernel)
    return Registration(kernel)


def own_row(op: str, name: object, target: object, *, where: str, deterministic: bool) -> Kernel:
    """The row of a reader's kernel, its arguments checked as `register` says."""
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"name: need a name for the kernel, got {name!r}")
    if any((row.op, row.name) == (op, name) for row in KERNELS):
        raise ValueError(f"name: {op} has a variant {name!r} of its own; take another name")
    checks.one_of("where", where, tuple(BACKENDS))
    if isinstance(target, str):
        target = Kernel(op, name, target, "").load()
    own_kernel.check_target(target, where)
    summary = (getattr(target, "__doc__", None) or "").strip().partition("\n")[0] if callable(target) else ""
    return Kernel(op, name, target, summary or "your own", deterministic=deterministic, registered_on=where)  # type: ignore[arg-type]


@cache
def _announce(op: str, name: str) -> None:
    log.info("%s: %s was chosen (pin another with variant=...; yoso_core.variants lists them)", op, name)


def run(operation: Operation, variant: str | None, caller: Caller, arguments: Mapping[str, Any]) -> Any:
    """Call the variant named, or the best that can run on the caller's device and has room for
    these sizes.

    Raises
    ------
    ValueError : no variant has that name, it cannot run here (with the reason), it does not fit, or
        none runs on the caller's device.
    """
    op = operation.name
    if variant is not None:
        return _named(op, variant, caller).call(caller, arguments)
    refused: list[str] = []
    for candidate in _listed(op):
        kernel = candidate.kernel
        if not kernel.automatic or kernel.backend.device != caller.kind:
            continue
        if not candidate.available:
            refused.append(f"{candidate.name}: {candidate.reason}")
        else:
            try:
                result = kernel.call(caller, arguments)
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
            if not variant.kernel.backend.takes(caller):
                raise ValueError(f"variant: {name} of {op} runs on the {variant.kernel.backend.device}, the arrays are on {caller.device}")
            return variant.kernel
    raise ValueError(f"variant: {op} has no variant {name!r}; it has {', '.join(v.name for v in listed)}")


def definition_of(op: str | Callable[..., Any]) -> Kernel:
    """The row that says what is right."""
    return next(variant.kernel for variant in variants(op) if variant.definition)


def automatic(op: str | Callable[..., Any], device: str) -> Variant | None:
    """The first choice on a device (``"cpu"`` or ``"cuda"``) where the caller names none; ``None``
    where nothing runs.
    """
    found = (v for v in variants(op) if v.available and v.kernel.automatic and v.kernel.backend.device == device)
    return next(found, None)
