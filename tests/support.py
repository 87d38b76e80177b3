"""What the test modules share: cases with readable names, inputs made from them, and the check of
one variant against its definition.
"""

import codecs
import locale
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import yoso_core
from yoso_core import backends, reference, registry, truth
from yoso_core.operations import OPERATIONS, Operation
from yoso_core.reference.arrays import Array


@dataclass(frozen=True)
class Case:
    """One set of inputs, as data."""

    n_q: int
    n_k: int
    d: int
    d_v: int
    num_hash: int
    hash_code_len: int
    dtype: str = "float32"
    mask: str = "none"
    """``none``; ``masked``: about a third, hiding NaN and infinity; ``fully``: all keys of the
    first head; ``broadcast``: dims of 1.
    """
    kind: str = "clusters"
    """Of the vectors: ``clusters`` (so that codes meet), ``repeated`` (few, so that many are
    equal), ``quantized`` and ``onehot`` (many projections are exactly zero), or a magnitude.
    """
    leading: tuple[int, ...] = (2,)
    mode: str = "signs"
    """Of `yoso_attention`: ``signs``, ``planes`` or ``expectation``."""
    normalize_output: bool = True
    grad: str = "lower_bound"
    """Of the backward functions."""
    layout: str = "paper"
    """Of the signs."""
    rotations: int | None = None
    """Of a chain; with fewer than ``hash_code_len`` a rotation gives several bits of one code."""
    oversample: int = 0
    """Bits of a code beyond ``hash_code_len``."""
    size: float = 1.0
    """Of the values, about."""
    return_error: bool = False

    def __str__(self) -> str:
        n = f"n{self.n_q}" if self.n_q == self.n_k else f"q{self.n_q}-k{self.n_k}"
        parts = [n, f"d{self.d}-v{self.d_v}-m{self.num_hash}-tau{self.hash_code_len}", self.dtype]
        parts += [self.mask] * (self.mask != "none") + [self.kind] * (self.kind != "clusters") + [self.mode] * (self.mode != "signs")
        parts += ["raw"] * (not self.normalize_output) + [self.grad] * (self.grad != "lower_bound")
        parts += [self.layout] * (self.layout != "paper") + [f"P{self.rotations}"] * (self.rotations is not None)
        parts += [f"s{self.oversample}"] * (self.oversample > 0)
        parts += [f"size{self.size:g}"] * (self.size != 1) + ["error"] * self.return_error
        parts += ["lead" + "x".join(map(str, self.leading))] * (self.leading != (2,))
        return "-".join(parts)


def draw_vectors(rng: np.random.Generator, shape: tuple[int, ...], kind: str) -> Array:
    if kind == "onehot":
        return np.eye(shape[-1])[rng.integers(shape[-1], size=shape[:-1])]
    if kind == "quantized":
        return rng.integers(-2, 3, size=shape).astype(float)
    centers = np.random.default_rng(7).standard_normal((4, shape[-1]))
    near = centers[rng.integers(4, size=shape[:-1])]
    if kind == "repeated":
        return near
    near = near + 0.2 * rng.standard_normal(shape)
    return near if kind == "clusters" else near * float(kind)


def draw_codes(rng: np.random.Generator, shape: tuple[int, ...], capacity: int) -> Array:
    """Codes from a pool of at most 16, so that they meet however large the range is; its ends and
    neighbors are among them.
    """
    few = np.append(np.random.default_rng(7).integers(capacity, size=6), [0, capacity - 1])
    return rng.choice(np.append(few, few ^ 1), size=shape).astype(np.int32)


def draw_mask(rng: np.random.Generator, mask: str, shape: tuple[int, ...]) -> Array | None:
    if mask == "none":
        return None
    if mask == "broadcast":
        return rng.random((*[1] * (len(shape) - 1), shape[-1])) > 0.3
    keep = rng.random(shape) > 0.3
    if mask == "fully":
        keep[0] = False
        return keep.astype(np.int64) * 3
    return keep


def hide(x: Array, keep: Array | None, mask: str, poison: float) -> Array:
    """Whatever is masked holds no number at all."""
    if mask == "masked" and keep is not None:
        x[~keep] = poison
    return x


@dataclass(frozen=True)
class Hostile:
    """`yoso_core.operations.Ingredients` for a case: codes from a small pool, numbers hidden behind
    masks.
    """

    num_hash: int
    hash_code_len: int
    oversample: int
    query: Array
    key: Array
    value: Array
    grad_out: Array
    vectors: Array
    signs: Array
    planes: Array
    query_hash_code: Array
    key_hash_code: Array
    masks: Mapping[str, Array | None]
    draw: Mapping[str, Any]

    @property
    def table(self) -> Array:
        shape = (*self.value.shape[:-2], 1 << (self.hash_code_len + self.oversample), self.value.shape[-1])
        return np.random.default_rng(2).standard_normal(shape)


def ingredients(case: Case, dim: int) -> Hostile:
    rng = np.random.default_rng(0)
    m, bits = case.num_hash, case.hash_code_len + case.oversample
    capacity = 1 << bits
    query_rows, key_rows = (*case.leading, case.n_q), (*case.leading, case.n_k)
    keep_query, keep_key = draw_mask(rng, case.mask, query_rows), draw_mask(rng, case.mask, key_rows)
    query = hide(draw_vectors(rng, (*query_rows, dim), case.kind), keep_query, case.mask, np.inf)
    key = hide(draw_vectors(rng, (*key_rows, dim), case.kind), keep_key, case.mask, np.nan)
    value = hide(case.size * rng.standard_normal((*key_rows, case.d_v)), keep_key, case.mask, np.nan)
    query_hash_code, key_hash_code = (draw_codes(rng, (*rows, m), capacity) for rows in (query_rows, key_rows))
    signs = reference.sample_signs(m, bits, dim, batch_shape=case.leading[-1:], layout=case.layout, rotations=case.rotations, rng=1)
    # Whole numbers against whole numbers: every product and sum is exact, so a plane's side does
    # not depend on the order of a sum.
    planes = rng.integers(-8, 9, size=(*case.leading[-1:], dim, m * bits)).astype(np.float32)
    vectors = draw_vectors(rng, (*key_rows, dim), case.kind)
    grad_out = hide(rng.standard_normal((*query_rows, case.d_v)), keep_query, case.mask, np.nan)
    return Hostile(
        num_hash=m,
        hash_code_len=case.hash_code_len,
        oversample=case.oversample,
        query=query,
        key=key,
        value=value,
        grad_out=grad_out,
        vectors=vectors,
        signs=signs,
        planes=planes,
        query_hash_code=query_hash_code,
        key_hash_code=key_hash_code,
        masks={"query_mask": keep_query, "key_mask": keep_key},
        draw={"signs": {"signs": signs}, "planes": {"planes": planes}, "expectation": {"use_expectation": True}}[case.mode],
    )


def build(op: str, case: Case) -> dict[str, Any]:
    """Keyword arguments for the face's function of that name, as NumPy arrays; floats are float64
    holding values of the case's dtype.
    """
    operation = OPERATIONS[op]
    dim = 1 << (case.d - 1).bit_length() if operation.power_of_two else case.d
    options = {
        "grad": case.grad,
        "normalize_output": case.normalize_output,
        "layout": case.layout,
        "return_error": case.return_error,
    }
    made = operation.example_inputs(ingredients(case, dim))
    made |= {name: x for name, x in options.items() if name in operation.keywords}

    def rounded(x: Any) -> Any:
        return as_float64(as_dtype(x, case.dtype)) if isinstance(x, np.ndarray) and x.dtype == np.float64 else x

    return {name: rounded(x) for name, x in made.items()}


def as_dtype(x: Any, dtype: str) -> Any:
    """A float64 array as the caller's: NumPy, or torch for bfloat16, which NumPy lacks. What is no
    float array keeps its dtype.
    """
    is_float = isinstance(x, np.ndarray) and x.dtype == np.float64
    if dtype != "bfloat16":
        return x.astype(dtype) if is_float else x
    if not isinstance(x, np.ndarray):
        return x
    return torch.from_numpy(x).to(torch.bfloat16) if is_float else torch.from_numpy(x)


def as_float64(x: Any) -> Array:
    return x.double().numpy() if isinstance(x, torch.Tensor) else x.astype(np.float64)


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """``np.empty`` and CuPy's hand out NaN (integers: -1), so that an element nobody writes
    shows.
    """

    def poisoned(allocate: Any) -> Any:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> Array:
            fresh: Array = allocate(*args, **kwargs)
            if fresh.dtype.kind in "fiu":
                fresh.fill(np.nan if fresh.dtype.kind == "f" else np.array(-1).astype(fresh.dtype))
            return fresh

        return allocate_and_fill

    with ExitStack() as patches:
        for library in (np, sys.modules.get("cupy")):
            for name in ("empty", "empty_like"):
                if hasattr(library, name):
                    patches.enter_context(mock.patch.object(library, name, poisoned(getattr(library, name))))
        yield


needs_torch_compiler = pytest.mark.skipif(
    codecs.lookup(locale.getencoding()).name == "ascii", reason="torch reads sources of its compiler in the locale's encoding, here ASCII"
)


def need(*wheres: str) -> None:
    """Skip the test, with the reason, where kernels cannot run on one of these backends."""
    for where in wheres:
        if reason := backends.missing(where):
            pytest.skip(reason)


def on_the_cpu(op: str) -> list[yoso_core.Variant]:
    """The variants that take CPU arrays and can run here; the emulated and the stepped are among
    them.
    """
    return [v for v in yoso_core.variants(op) if v.available and v.kernel.backend.device == "cpu"]


def definition_of(op: str) -> yoso_core.Variant:
    (definition,) = (v for v in yoso_core.variants(op) if v.definition)
    return definition


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The outputs of an operation: gradients come in threes."""
    return result if isinstance(result, tuple) else (result,)


def with_every_kernel(kernel: registry.Kernel, case: Case) -> list[Case]:
    """The case, and others where the variant has kernels that this one does not launch, or launches
    otherwise: a backward operation has a second gradient, a hash a second layout, what reads
    buckets may smooth them, and attention may tell errors.
    """
    if "warp_per_chain" in kernel.kernels:
        few = reference.least_rotations(case.num_hash, case.hash_code_len, case.d)  # so that the bits of a code are in several lanes
        cases = [case, replace(case, layout="chained", rotations=few)]
        if kernel.op == "yoso_attention":
            told = replace(case, hash_code_len=min(4, case.hash_code_len), return_error=True)
            cases += [told, replace(told, oversample=2)]
        return cases
    cases = [case, replace(case, grad="exact")] if kernel.op.endswith("_backward") else [case]
    if kernel.op in ("lsh_cumulation", "smooth_table") and case.dtype == "float32":
        cases.append(replace(case, hash_code_len=min(4, case.hash_code_len), oversample=2))
    return cases


def check_variant(op: str, name: str, case: Case) -> None:
    """Assert that a variant does what its definition does: kind, shape and dtype; codes exactly;
    sums within the derived tolerance.
    """
    (variant,) = (v for v in yoso_core.variants(op) if v.name == name)
    device = variant.kernel.backend.device
    inputs = {name: on_device(x, device) for name, x in inputs_of(op, case).items()}

    def outputs() -> tuple[Any, ...]:
        found = as_tuple(getattr(yoso_core, op)(**inputs, variant=name))
        assert all(x.device.type == device for x in found if isinstance(x, torch.Tensor))
        return tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in found)

    got = outputs()
    with poisoned_allocations():  # after a first call, since a compiler does not know the replacement
        again = outputs()
    for x, like in zip(got, defined(op, case), strict=True):
        assert type(x) is type(like)
        assert (x.dtype, x.shape) == (like.dtype, like.shape)
    if variant.deterministic:
        for x, y in zip(again, got, strict=True):
            np.testing.assert_array_equal(as_float64(x), as_float64(y), "the second call differs, or an element was not written")
    else:
        check_values(op, [as_float64(x) for x in again], case)
    check_values(op, [as_float64(x) for x in got], case)


def on_device(x: Any, device: str) -> Any:
    """A tensor where its kernel runs. NumPy arrays are copied there by the library."""
    if not isinstance(x, torch.Tensor) or device == "cpu":
        return x
    if not torch.cuda.is_available():
        pytest.skip("this build of torch has no CUDA")
    return x.cuda()


def inputs_of(op: str, case: Case) -> dict[str, Any]:
    """`build`, in the case's dtype."""
    return {name: as_dtype(x, case.dtype) for name, x in build(op, case).items()}


@cache
def defined(op: str, case: Case) -> tuple[Any, ...]:
    """The definition's outputs in the case's dtype, the same for all variants."""
    return as_tuple(OPERATIONS[op].function(**inputs_of(op, case), variant=OPERATIONS[op].definition))


@cache
def right_sums(op: str, case: Case) -> tuple[tuple[Array, Array], ...]:
    """What is right in each output, and how far a variant may be from it: the same for all
    variants.
    """
    inputs = inputs_of(op, case)
    true = truth.truth(op, (), inputs)
    return tuple(zip(true, truth.tolerance(op, (), inputs, true=true), strict=True))


def check_values(op: str, got: list[Array], case: Case) -> None:
    """Codes and transforms are the definition's, bit for bit; sums lie within the tolerance of its
    result in float64.
    """
    operation = OPERATIONS[op]
    if operation.projections is not None and case.kind not in ("quantized", "onehot"):
        check_sides(operation, got[0].astype(np.int64), case)
    elif operation.exact or operation.is_hash:
        np.testing.assert_array_equal(got[0], as_float64(defined(op, case)[0]))
    else:
        for x, (exact, allowed) in zip(got, right_sums(op, case), strict=True):
            np.testing.assert_array_equal(np.isnan(x), np.isnan(exact))
            error = truth.errors_of(x, exact)
            over = error > allowed
            worst = np.max((error - allowed)[over], initial=0)
            assert not over.any(), f"{over.sum()} of {over.size} off, the worst by {worst:.3g} beyond its tolerance"


def check_sides(operation: Operation, codes: Array, case: Case) -> None:
    """Every bit is the side of its plane, unless the vector is so near that the order of the sum
    decides.
    """
    assert operation.projections is not None
    projection, terms = operation.projections(build(operation.name, case))
    bits = (codes[..., None] >> np.arange(case.hash_code_len + case.oversample) & 1).reshape(projection.shape)
    eps = np.finfo(np.float64 if case.dtype == "float64" else np.float32).eps
    clear = np.abs(projection) > case.d * eps * terms
    np.testing.assert_array_equal(bits[clear], projection[clear] > 0)
