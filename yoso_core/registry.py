"""Every implementation of every operation, what it needs, and whether it can run here.

One table. The face picks from it, `compare` walks it, and one parametrised test checks every row against the reference.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from yoso_core.arrays import Caller

log = logging.getLogger("yoso_core")


@dataclass(frozen=True)
class Kernel:
    """One row: an implementation, named by where it runs and what it does, and found only when it is first called."""

    op: str
    name: str
    """``<where>:<algorithm>``."""
    target: str
    """``module:function``."""
    summary: str
    deterministic: bool = True
    definition: bool = False
    """The one that says what is right; `compare` and the tests measure the others against it, in float64."""

    @property
    def where(self) -> str:
        return self.name.partition(":")[0]

    def load(self) -> Callable[..., Any]:
        module, function = self.target.split(":")
        return getattr(importlib.import_module(module), function)

    def run(self, caller: Caller, *args: Any, **kwargs: Any) -> Any:
        """Call it on NumPy views of the caller's arrays, with the caller's thread count where it matters."""
        threads = {"num_threads": caller.num_threads} if self.where == "cpu" else {}
        return self.load()(*args, **kwargs, **threads)


# In order of preference: the first that can run on the caller's device is the automatic choice.
KERNELS: tuple[Kernel, ...] = (
    Kernel("hadamard_transform", "cpu:tiles", "yoso_core.cpu:hadamard_transform", "16 vectors to a tile, radix-8 butterflies"),
    Kernel("hadamard_transform", "numpy:butterflies", "yoso_core.reference:hadamard_transform", "one stage at a time", definition=True),
    Kernel("fast_hash", "cpu:tiles", "yoso_core.cpu:fast_hash", "16 vectors to a tile, signs and butterflies in cache"),
    Kernel("fast_hash", "numpy:formula", "yoso_core.reference:fast_hash", "sign bits of H D3 H D2 H D1 x", definition=True),
    Kernel("hyperplane_hash", "cpu:tiles", "yoso_core.cpu:hyperplane_hash", "16 vectors to a tile against every plane"),
    Kernel("hyperplane_hash", "numpy:formula", "yoso_core.reference:hyperplane_hash", "one matrix product", definition=True),
    Kernel("lsh_cumulation", "cpu:tables", "yoso_core.cpu:lsh_cumulation", "a table per hash, in cache"),
    Kernel("lsh_cumulation", "numpy:tables", "yoso_core.reference:lsh_cumulation_tables", "np.add.at into a table per hash"),
    Kernel("lsh_cumulation", "numpy:pairs", "yoso_core.reference:lsh_cumulation_pairs", "every pair of codes", definition=True),
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
    Kernel(
        "expectation_attention_backward",
        "cpu:blocked",
        "yoso_core.cpu:expectation_attention_backward",
        "32 rows by 4 in registers, once by query and once by key",
    ),
    Kernel(
        "expectation_attention_backward",
        "numpy:formula",
        "yoso_core.reference:expectation_attention_backward",
        "one query at a time",
        definition=True,
    ),
    Kernel(
        "lsh_attention_backward",
        "cpu:buckets",
        "yoso_core.cpu:lsh_attention_backward",
        "lower bound: weighted cumulations; exact: all pairs, blocked",
    ),
    Kernel(
        "lsh_attention_backward",
        "numpy:pairs",
        "yoso_core.reference:lsh_attention_backward",
        "every pair of codes",
        definition=True,
    ),
    Kernel("yoso_attention", "cpu:fused", "yoso_core.cpu:yoso_attention", "hash, cumulate and normalise tile by tile, codes never stored"),
    Kernel("yoso_attention", "numpy:formula", "yoso_core.reference:yoso_attention", "hash, cumulate by tables, normalise", definition=True),
)

OPERATIONS: tuple[str, ...] = tuple(dict.fromkeys(kernel.op for kernel in KERNELS))

_DEVICE = {"numpy": "cpu", "cpu": "cpu"}
_PACKAGE = {"numpy": "numpy", "cpu": "numba"}
_REMEDY = {"numba": "pip install numba"}


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


def op_name(op: str | Callable[..., Any]) -> str:
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPERATIONS:
        raise ValueError(f"op: no operation {name!r}; there are {', '.join(OPERATIONS)}")
    return name


@cache
def _missing(where: str) -> str | None:
    package = _PACKAGE[where]
    if importlib.util.find_spec(package) is None:
        return f"the package {package!r} is not installed: {_REMEDY[package]}"
    return None


def variants(op: str | Callable[..., Any]) -> list[Variant]:
    """Every implementation of an operation, the automatic choice first, with the reason where one cannot run here.

    ``op`` is the function or its name. Raises ``ValueError`` for an operation that does not exist.

    >>> [v.name for v in variants("fast_hash") if v.definition]
    ['numpy:formula']
    """
    found, name = [], op_name(op)
    for kernel in KERNELS:
        if kernel.op == name:
            reason = _missing(kernel.where)
            found.append(
                Variant(kernel.op, kernel.name, reason is None, reason, kernel.summary, kernel.deterministic, kernel.definition, kernel)
            )
    return found


@cache
def _announce(op: str, name: str) -> None:
    log.info("%s: %s was chosen (pin another with variant=...; yoso_core.variants lists them)", op, name)


def choose(op: str, name: str | None, caller: Caller) -> Kernel:
    """The kernel for a call: the one named, or the best that can run on the caller's device.

    Raises
    ------
    ValueError : no variant has that name, it cannot run here (with the reason), or none runs on the caller's device.
    """
    listed = variants(op)
    device = caller.device.partition(":")[0]
    if name is not None:
        for variant in listed:
            if variant.name == name:
                if not variant.available:
                    raise ValueError(f"variant: {name} of {op} cannot run here: {variant.reason}")
                if _DEVICE[variant.kernel.where] != device:
                    raise ValueError(f"variant: {name} of {op} runs on the {_DEVICE[variant.kernel.where]}, the arrays are on {device}")
                return variant.kernel
        raise ValueError(f"variant: {op} has no variant {name!r}; it has {', '.join(v.name for v in listed)}")
    for variant in listed:
        if variant.available and _DEVICE[variant.kernel.where] == device:
            _announce(op, variant.name)
            return variant.kernel
    raise ValueError(
        f"{op}: no variant here runs on {caller.device}: this version has kernels for the CPU only, its CUDA kernels are still to come; "
        "move the arrays to the CPU"
    )
