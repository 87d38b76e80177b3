"""Every kernel of this package, to be compiled before it is needed: for images and classrooms."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype

from yoso_core.cpu import attention, buckets, cumulation, expectation, finishing, gradients, hashing, relabeling, rounds, rows
from yoso_core.cpu.sampled_gradients import _backward_kernel
from yoso_core.cpu.weights import POLYNOMIALS


class Kept(NamedTuple):
    """A kernel on disk."""

    files: list[Path]
    fresh: bool
    """It was compiled now."""


def all_kernels(dims: Sequence[int], dtypes: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The name of every kernel, and what compiles it or loads it from disk.

    ``dims`` are powers of two, to which the last dimension of what is hashed is rounded up. Half
    precision is computed in float32.
    """
    yield "relabel", relabeling._relabel_kernel
    for name in dtypes:
        dtype = from_dtype(np.dtype(name))
        of_dtype: dict[str, Callable[..., Any]] = {
            "cumulation, scatter": cumulation._scatter_kernel,
            "cumulation, gather": cumulation._gather_kernel,
            "cumulation, merge": rounds._merge_kernel,
            "weighted cumulation": buckets._buckets_kernel,
            "finish": finishing._finish_kernel,
            "hyperplane hash": hashing._hyperplane_kernel,
            "rows": partial(rows._rows_kernel, unit=False),
            "unit rows": partial(rows._rows_kernel, unit=True),
            "expectation": partial(expectation._expectation_kernel, polynomials=POLYNOMIALS[dtype]),
            "gradient, sampled": _backward_kernel,
            "gradient, finish": gradients._finish_kernel,
        }
        for kind, exact, sampled in (("lower bound", False, False), ("exact", True, False), ("sampled, exact", True, True)):
            pairs = partial(gradients._gradient_kernel, polynomials=POLYNOMIALS[dtype], exact=exact, sampled=sampled)
            of_dtype[f"gradient by pairs, {kind}"] = pairs
        for kernel, make in of_dtype.items():
            yield f"{kernel} {name}", partial(make, dtype)
        of_dim: dict[str, Callable[..., Any]] = {
            "hadamard transform": hashing._hadamard_kernel,
            "fast hash, chained": hashing._chain_kernel,
            "fast hash, paper": hashing._triples_kernel,
            "attention, scatter": attention._scatter_kernel,
            "attention, gather": attention._gather_kernel,
        }
        for dim in dims:
            for kernel, make in of_dim.items():
                yield f"{kernel} {name} {dim}", partial(make, dim, dtype)


def warm(make: Callable[[], Any]) -> Kept:
    """Compile a kernel of `all_kernels`, or load it from disk."""
    compiled = make()
    return Kept(compiled._cache.files, bool(compiled.stats.cache_misses))
