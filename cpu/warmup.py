"""Every kernel of this package, to be compiled before it is needed: for images and classrooms."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu import (
    buckets,
    cumulation,
    expectation,
    finishing,
    gradients,
    hashing,
    neighbors,
    precision,
    relabeling,
    rounds,
    rows,
    smoothing,
)
from yoso_core.cpu.lanes import float_type
from yoso_core.cpu.sampled_gradients import _backward_kernel
from yoso_core.cpu.weights import POLYNOMIALS


class Kept(NamedTuple):
    """A kernel on disk."""

    files: list[Path]
    fresh: bool
    """It was compiled now."""


KEPT_CODES = ((types.int32, False), (types.uint8, True), (types.uint16, True), (types.int32, True))
"""Integer types of the codes that a hash makes: for the caller, and, one hash after the other, for
attention.
"""


CODES = ((types.int32, True), (types.uint8, False), (types.uint16, False), (types.int32, False))
"""Integer types of the codes that a cumulation reads, and whether it checks them."""

HALVES = {"float16": types.int16, "bfloat16": types.uint16}
"""What kernels see of half precision: see `yoso_core.cpu.lanes.read`."""


def all_kernels(dims: Sequence[int], dtypes: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every kernel, and what compiles it or loads it from disk.

    ``dims`` are powers of two, to which the last dimension of what is hashed is rounded up. Half
    precision is computed in float32, by kernels that read it as it is, and by those of float32.
    """
    yield "relabel", relabeling._relabel_kernel
    for name in dict.fromkeys("float32" if name in HALVES else name for name in dtypes):
        dtype = from_dtype(np.dtype(name))
        for kernel, make in _computing(dtype).items():
            yield f"{kernel} {name}", partial(make, dtype)
        for dim in dims:
            yield f"hadamard transform {name} {dim}", partial(hashing._hadamard_kernel, dim, dtype)
    for name in dict.fromkeys(dtypes):
        stored = HALVES.get(name) or from_dtype(np.dtype(name))
        dtype = float_type(stored)
        if name in HALVES:
            yield f"widen {name}", partial(precision._widen_kernel, stored)
            yield f"round {name}", partial(precision._round_kernel, stored)
        for kernel, make in _reading().items():
            yield f"{kernel} {name}", partial(make, dtype, stored)
        yield f"gradient, sampled {name}", partial(_backward_kernel, dtype, stored, stored)
        for code, by_hash in KEPT_CODES:
            for layout, make_hash in (("chained", hashing._chain_kernel), ("paper", hashing._triples_kernel)):
                for dim in dims:
                    hash = f"fast hash, {layout}, {code}{', by hash' if by_hash else ''} {name} {dim}"
                    yield hash, partial(make_hash, dim, dtype, stored, code, by_hash)


def _computing(dtype: Any) -> dict[str, Callable[..., Any]]:
    """Those that compute in ``dtype``, whatever comes in."""
    found: dict[str, Callable[..., Any]] = {
        "cumulation, merge": rounds._merge_kernel,
        "cumulation, squares of rows": cumulation._squares_kernel,
        "smoothing": smoothing._smooth_kernel,
        "smoothing by neighbors": neighbors._neighbors_kernel,
        "weighted cumulation": buckets._buckets_kernel,
        "finish": finishing._finish_kernel,
        "expectation": partial(expectation._expectation_kernel, polynomials=POLYNOMIALS[dtype]),
        "gradient, finish": gradients._finish_kernel,
    }
    for code, stored in CODES:
        for spread in (False, True):
            gather = f"cumulation, gather{' with errors' if spread else ''}, {code}, {'checked' if stored else 'trusted'}"
            found[gather] = partial(cumulation._gather_kernel, code=code, stored=stored, spread=spread)
    for kind, exact, sampled in (("lower bound", False, False), ("exact", True, False), ("sampled, exact", True, True)):
        found[f"gradient by pairs, {kind}"] = partial(
            gradients._gradient_kernel, polynomials=POLYNOMIALS[dtype], exact=exact, sampled=sampled
        )
    return found


def _reading() -> dict[str, Callable[..., Any]]:
    """Those that read what comes in: by the type that computes, and the type that is stored."""
    found: dict[str, Callable[..., Any]] = {
        "units": finishing._units_kernel,
        "rows": partial(rows._rows_kernel, unit=False),
        "unit rows": partial(rows._rows_kernel, unit=True),
    }
    for code, stored in CODES:
        scatter = f"cumulation, scatter, {code}, {'checked' if stored else 'trusted'}"
        found[scatter] = partial(cumulation._scatter_kernel, code=code, stored=stored)
    for code, by_hash in KEPT_CODES:
        found[f"hyperplane hash, {code}{', by hash' if by_hash else ''}"] = partial(hashing._hyperplane_kernel, code=code, by_hash=by_hash)
    return found


def warm(make: Callable[[], Any]) -> Kept:
    """Compile a kernel of `all_kernels`, or load it from disk."""
    compiled = make()
    return Kept(compiled._cache.files, bool(compiled.stats.cache_misses))
