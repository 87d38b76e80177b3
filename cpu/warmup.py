"""Every kernel of this package, to be compiled before it is needed: for images and classrooms."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu import buckets, cumulation, expectation, finishing, gradients, hashing, neighbors, relabeling, rounds, rows, smoothing
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


def all_kernels(dims: Sequence[int], dtypes: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every kernel, and what compiles it or loads it from disk.

    ``dims`` are powers of two, to which the last dimension of what is hashed is rounded up. Half
    precision is computed in float32.
    """
    yield "relabel", relabeling._relabel_kernel
    for name in dtypes:
        dtype = from_dtype(np.dtype(name))
        of_dtype: dict[str, Callable[..., Any]] = {
            "cumulation, merge": rounds._merge_kernel,
            "cumulation, squares of rows": cumulation._squares_kernel,
            "smoothing": smoothing._smooth_kernel,
            "smoothing by neighbors": neighbors._neighbors_kernel,
            "weighted cumulation": buckets._buckets_kernel,
            "finish": finishing._finish_kernel,
            "units": finishing._units_kernel,
            "rows": partial(rows._rows_kernel, unit=False),
            "unit rows": partial(rows._rows_kernel, unit=True),
            "expectation": partial(expectation._expectation_kernel, polynomials=POLYNOMIALS[dtype]),
            "gradient, sampled": _backward_kernel,
            "gradient, finish": gradients._finish_kernel,
        }
        for code, stored in ((types.int32, True), (types.uint8, False), (types.uint16, False), (types.int32, False)):
            kept_in = f"{code}, {'checked' if stored else 'trusted'}"
            of_dtype[f"cumulation, scatter, {kept_in}"] = partial(cumulation._scatter_kernel, code=code, stored=stored)
            for spread in (False, True):
                gather = f"cumulation, gather{' with errors' if spread else ''}, {kept_in}"
                of_dtype[gather] = partial(cumulation._gather_kernel, code=code, stored=stored, spread=spread)
        for code, by_hash in KEPT_CODES:
            by_planes = partial(hashing._hyperplane_kernel, code=code, by_hash=by_hash)
            of_dtype[f"hyperplane hash, {code}{', by hash' if by_hash else ''}"] = by_planes
        for kind, exact, sampled in (("lower bound", False, False), ("exact", True, False), ("sampled, exact", True, True)):
            pairs = partial(gradients._gradient_kernel, polynomials=POLYNOMIALS[dtype], exact=exact, sampled=sampled)
            of_dtype[f"gradient by pairs, {kind}"] = pairs
        for kernel, make in of_dtype.items():
            yield f"{kernel} {name}", partial(make, dtype)
        of_dim: dict[str, Callable[..., Any]] = {
            "hadamard transform": hashing._hadamard_kernel,
        }
        for code, by_hash in KEPT_CODES:
            for layout, make_hash in (("chained", hashing._chain_kernel), ("paper", hashing._triples_kernel)):
                of_dim[f"fast hash, {layout}, {code}{', by hash' if by_hash else ''}"] = partial(make_hash, code=code, by_hash=by_hash)
        for dim in dims:
            for kernel, make in of_dim.items():
                yield f"{kernel} {name} {dim}", partial(make, dim, dtype)


def warm(make: Callable[[], Any]) -> Kept:
    """Compile a kernel of `all_kernels`, or load it from disk."""
    compiled = make()
    return Kept(compiled._cache.files, bool(compiled.stats.cache_misses))
