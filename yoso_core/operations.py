"""What there is to compute: one record for each operation, with every fact that others ask of it.

This is the only file that names operations one by one. The face (`yoso_core.ops`) adds a typed
signature and the checks of its arguments, `yoso_core.registry` the rows of kernels. Whatever tests,
compares, times or documents an operation reads its record here and works for all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, signature
from math import log2
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from yoso_core import checks, reference
from yoso_core.arrays import Array, one_caller
from yoso_core.reference.arrays import full_mask
from yoso_core.reference.expectation import Grad
from yoso_core.reference.hashing import signs_shape

Arrays = tuple[NDArray[Any], ...]
"""One array for each output of an operation."""

Arguments = Mapping[str, Any]
"""The arguments of a call, by name."""


class Ingredients(Protocol):
    """What example inputs are made of: vectors, codes and numbers that belong together.

    Arrays of floats are of any dtype; whoever asks for inputs rounds them to the one it wants.
    """

    @property
    def num_hash(self) -> int: ...

    @property
    def hash_code_len(self) -> int: ...

    @property
    def oversample(self) -> int:
        """Bits of a code beyond ``hash_code_len``."""
        ...

    @property
    def query(self) -> Array:
        """``(..., n_q, d)``."""
        ...

    @property
    def key(self) -> Array:
        """``(..., n_k, d)``."""
        ...

    @property
    def value(self) -> Array:
        """``(..., n_k, d_v)``."""
        ...

    @property
    def grad_out(self) -> Array:
        """``(..., n_q, d_v)``."""
        ...

    @property
    def vectors(self) -> Array:
        """``(..., n, d)``, to be hashed or transformed."""
        ...

    @property
    def signs(self) -> Array: ...

    @property
    def planes(self) -> Array: ...

    @property
    def table(self) -> Array:
        """``(..., 2**(tau + s), d_v)``."""
        ...

    @property
    def query_hash_code(self) -> Array: ...

    @property
    def key_hash_code(self) -> Array: ...

    @property
    def masks(self) -> Mapping[str, Array | None]:
        """``query_mask`` and ``key_mask``, or neither."""
        ...

    @property
    def draw(self) -> Mapping[str, Any]:
        """How attention gets its weights: by ``signs``, ``planes``, or ``use_expectation``."""
        ...


class Sizes(NamedTuple):
    """The shapes of a call, as far as its cost depends on them; ``d`` and ``d_v`` are alike."""

    rows: int
    """Queries of all batches and heads together; as many keys."""
    n: int
    """Queries of one head."""
    dim: int
    num_hash: int
    hash_code_len: int
    item_size: int
    """Bytes of a float."""
    oversample: int = 0
    backward_num_hash: int | None = None

    @property
    def share_backward(self) -> float:
        """Of the hashes, those that the gradients of query and key are made from."""
        return 1.0 if self.backward_num_hash is None else self.backward_num_hash / self.num_hash

    @property
    def vectors(self) -> int:
        """Bytes of the vectors of all rows."""
        return self.rows * self.dim * self.item_size

    @property
    def codes(self) -> int:
        """Bytes of the hash codes of all rows."""
        return 4 * self.rows * self.num_hash

    @property
    def table(self) -> int:
        """Entries of the tables of one hash of every head."""
        return self.rows // max(self.n, 1) * self.dim << (self.hash_code_len + self.oversample)

    @property
    def colliding_pairs(self) -> int:
        """Pairs of a query and a key in one bucket, over all hashes, for codes of ``hash_code_len``
        bits spread evenly.
        """
        return self.rows * self.num_hash * self.n >> self.hash_code_len

    @property
    def hash_additions(self) -> int:
        """Additions to hash a vector by a chain: a Hadamard transform, ``D log2 D``, each round."""
        rounds, padded_dim = signs_shape(self.num_hash, self.hash_code_len + self.oversample, self.dim, "chained")
        return rounds * padded_dim * round(log2(padded_dim))


Shape = tuple[int, ...]


class Output(NamedTuple):
    """One result of an operation."""

    name: str
    dtype_of: str | None
    """The argument whose dtype it has; ``None`` for hash codes, which are int32, for what keeps the
    precision of the sums, and for what has a dtype of its own.
    """
    shape: Callable[[Arguments], Shape]
    """Its shape, given the arguments."""
    asked_by: str | None = None
    """The argument that asks for it; ``None`` for what every call returns."""
    dtype: str | None = None
    """Its own, whatever the arguments have."""


def _rows(of: str, columns: str) -> Callable[[Arguments], Shape]:
    """``(..., n, d)``: a row for each row of one argument, as long as those of another."""
    return lambda arguments: (*arguments[of].shape[:-1], arguments[columns].shape[-1])


def _codes(arguments: Arguments) -> Shape:
    return (*arguments["vectors"].shape[:-1], arguments["num_hash"])


def _nothing(arguments: Arguments) -> tuple[str, ...]:
    return ()


def _as_given(arguments: Arguments) -> dict[str, Any]:
    return dict(arguments)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One operation: its facts, all in one place.

    >>> LSH_CUMULATION.definition, LSH_CUMULATION.positional
    ('numpy:pairs', ('query_hash_code', 'key_hash_code', 'value', 'hashtable_capacity'))
    """

    name: str
    """That of the function which computes it."""
    module: str = "yoso_core.ops"
    """Where that function stands."""
    definition: str
    """The variant that says what is right; `compare` and the tests measure the others against it,
    in float64.
    """
    outputs: tuple[Output, ...]
    exact: bool = False
    """Every variant has the definition's own bits: the order of additions is part of it."""
    codes_may_differ: float = 0.0
    """Share of hash codes that may differ from the definition's, where the order of a sum is
    free.
    """
    power_of_two: bool = False
    """The last dimension of its input must be a power of two."""
    oversample: int = 0
    """``s`` of its example inputs, where nobody says."""
    example_inputs: Callable[[Ingredients], dict[str, Any]]
    """Arguments by name, for a call that runs."""
    complete: Callable[[Arguments], dict[str, Any]] = _as_given
    """The arguments with what a call would draw at random, so that every variant gets the same."""
    hashed: Callable[[Arguments], tuple[str, ...]] = _nothing
    """Float arguments that are hashed inside. The truth keeps their dtype: a code is a matter of
    rounding.
    """
    terms: Callable[[Arguments, float], Arrays] | None = None
    """``1/m sum |terms|`` of each output in float64, given float64 arguments and the ulp of a
    cosine: what a rounding error is relative to. Hashes have none.
    """
    projections: Callable[[Arguments], tuple[NDArray[Any], NDArray[Any]]] | None = None
    """For hashes that are not exact: the numbers whose signs are the bits, in float64 and in the
    order of the bits, and ``sum |terms|`` of each.
    """
    multiply_adds: Callable[[Sizes], int]
    """Additions or multiply-adds that it cannot do without."""
    least_bytes: Callable[[Sizes], int]
    """Bytes of every input and output, each moved once; signs and masks, which are few, left
    out.
    """

    @property
    def is_hash(self) -> bool:
        return all(output.dtype_of is None for output in self.outputs_of({}))

    def outputs_of(self, arguments: Arguments) -> tuple[Output, ...]:
        """What a call with these arguments returns, in order."""
        return tuple(output for output in self.outputs if output.asked_by is None or arguments.get(output.asked_by))

    @property
    def function(self) -> Callable[..., Any]:
        """The checked function of the face, without gradients."""
        found: Callable[..., Any] = getattr(import_module(self.module), self.name)
        return found

    @property
    def positional(self) -> tuple[str, ...]:
        """Arguments that come by position; the others come by keyword."""
        return _parameters(self.function)[0]

    @property
    def keywords(self) -> tuple[str, ...]:
        return _parameters(self.function)[1]

    @property
    def takes_masks(self) -> bool:
        return "key_mask" in self.keywords


@cache
def _parameters(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    parameters = signature(function).parameters.values()
    keywords = tuple(p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in parameters if p.name not in keywords), keywords


# What a rounding error is relative to: the sums of an operation, every term by its absolute value.


def _terms_of_definition(define: Callable[..., Any], *summed: str) -> Callable[[Arguments, float], Arrays]:
    """The definition itself, with the arguments ``summed`` replaced by their absolute values."""

    def terms(arguments: Arguments, cosine_ulp: float) -> Arrays:
        return (define(**{**arguments, **{name: np.abs(arguments[name]) for name in summed}}),)

    return terms


def _transform_terms(arguments: Arguments, cosine_ulp: float) -> Arrays:
    x = arguments["x"]
    return (np.broadcast_to(np.sum(np.abs(x), axis=-1, keepdims=True), x.shape),)


def _expected_weight_terms(unit_query: NDArray[Any], unit_key: NDArray[Any], hash_code_len: int, cosine_ulp: float) -> NDArray[Any]:
    """The expected weight, plus ``cosine_ulp`` times how far it moves with the cosine.

    A variant may take ``arccos`` of a cosine up to 0.99. What rounding the cosine costs is then no
    fault of its own: one ulp moves the weight by
    ``tau / pi (1 - theta / pi)**(tau - 1) / sin(theta)`` ulp. Nearer to 1 it must do better, and
    gets no such allowance.
    """
    cosine = unit_query @ unit_key.T
    theta = np.arccos(np.clip(cosine, -1, 1))
    slope = hash_code_len / np.pi * (1 - theta / np.pi) ** (hash_code_len - 1) / np.maximum(np.sin(theta), np.sqrt(1 - 0.99**2))
    return reference.expected_weight(theta, hash_code_len) + np.where(cosine < 0.991, cosine_ulp * slope, 0)


def _expectation_terms(arguments: Arguments, cosine_ulp: float) -> Arrays:
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    keep_query, keep_key = (full_mask(arguments.get(f"{side}_mask"), arguments[side].shape[:-1]) for side in ("query", "key"))
    unit_query, unit_key = reference.l2_normalize(query), reference.l2_normalize(key)
    sums = np.zeros((*query.shape[:-1], value.shape[-1]))
    for head in np.ndindex(query.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        weight = _expected_weight_terms(unit_query[head][queries], unit_key[head][keys], arguments.get("hash_code_len", 8), cosine_ulp)
        sums[head][queries] = weight @ np.abs(value[head][keys])
    return (sums,)


def _attention_terms(arguments: Arguments, cosine_ulp: float) -> Arrays:
    """For rows scaled to unit length, over the row's length before: 1 where nothing cancels."""
    plain = {**arguments, "normalize_output": False}
    if arguments.get("use_expectation"):
        (terms,) = _expectation_terms(arguments, cosine_ulp)
    else:
        (terms,) = _terms_of_definition(reference.yoso_attention, "value")(plain | {"return_error": False}, cosine_ulp)
    if not (arguments.get("normalize_output", True) or arguments.get("return_error")):
        return (terms,)
    found = reference.yoso_attention(**plain)
    rows, *asked = found if isinstance(found, tuple) else (found,)
    size, length = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (terms, rows))
    if arguments.get("normalize_output", True):
        terms = np.broadcast_to(size / length, terms.shape)
    if not arguments.get("return_error"):
        return (terms,)
    return terms, _error_terms(asked[-1], (size / length)[..., 0], arguments.get("num_hash", 32))


def _error_terms(error: NDArray[Any], condition: NDArray[Any], num_hash: int) -> NDArray[Any]:
    """For a relative standard error: itself, and what an ulp of the sums moves it by, over an ulp.

    ``error**2 = (sum_h |r_h|**2 / (m |y|**2) - 1) / (m - 1)``, and an ulp of the ratio, more where
    the row is shorter than its terms, moves the square by
    ``K = condition (error**2 + 1 / (m - 1))`` ulp. The root moves by ``K / (2 error)`` ulp, and by
    no more than ``sqrt(K ulp)``.
    """
    ulp = float(np.finfo(np.float32).eps)
    of_square = condition * (error**2 + 1 / (num_hash - 1))
    moved = np.minimum(of_square / (2 * error), np.sqrt(of_square / ulp))
    return np.where(np.isfinite(error), error + moved, np.where(condition > 0, np.inf, 0))


def _gradient_terms(arguments: Arguments, cosine_ulp: float) -> Arrays:
    """The sums of the backward definitions with every term by its absolute value; the angles are
    those of the signed vectors.
    """
    grad_out, query, key, value = (arguments[name] for name in ("grad_out", "query", "key", "value"))
    grad: Grad = arguments.get("grad", "lower_bound")
    keep_query, keep_key = (full_mask(arguments.get(f"{side}_mask"), arguments[side].shape[:-1]) for side in ("query", "key"))
    unit_query, unit_key = reference.l2_normalize(query), reference.l2_normalize(key)
    sums = grad_query, grad_key, grad_value = np.zeros(query.shape), np.zeros(key.shape), np.zeros(value.shape)
    for head in np.ndindex(query.shape[:-2]):
        queries, keys = keep_query[head], keep_key[head]
        q, k, g, v = unit_query[head][queries], unit_key[head][keys], np.abs(grad_out[head][queries]), np.abs(value[head][keys])
        if "query_hash_code" in arguments:
            codes = arguments["query_hash_code"][(*head, queries)], arguments["key_hash_code"][(*head, keys)]
            tau, oversample, few = arguments["hash_code_len"], arguments.get("oversample", 0), arguments.get("backward_num_hash")
            of_value, of_vectors = reference.backward_rates(*codes, tau, oversample, few)
        else:
            of_value = of_vectors = _expected_weight_terms(q, k, arguments["hash_code_len"], cosine_ulp)
        theta = np.arccos(np.clip(q @ k.T, -1, 1))
        grad_cosine = of_vectors * reference.gradient_factor(theta, arguments["hash_code_len"], grad) * (g @ v.T)
        grad_query[head][queries] = grad_cosine @ np.abs(k)
        grad_key[head][keys] = grad_cosine.T @ np.abs(q)
        grad_value[head][keys] = of_value.T @ g
    for total, x, unit in ((grad_query, query, unit_query), (grad_key, key, unit_key)):  # the tangent, by absolute values too
        along = np.sum(total * np.abs(unit), axis=-1, keepdims=True)
        total[...] = np.nan_to_num((total + along * np.abs(unit)) / np.linalg.norm(x, axis=-1, keepdims=True), nan=0, posinf=0)
    return sums


def _plane_projections(arguments: Arguments) -> tuple[NDArray[Any], NDArray[Any]]:
    vectors, planes = (np.asarray(arguments[name], np.float64) for name in ("vectors", "planes"))
    return vectors @ planes, np.abs(vectors) @ np.abs(planes)


# Sampled attention draws its signs, unless it is given them.


def _with_signs(arguments: Arguments) -> dict[str, Any]:
    """Signs drawn as `sample_signs` does, where neither signs nor planes are given; without
    ``rng``.

    One draw for each index of the last leading dim (the heads), shared over the dims before it, so
    that a result does not depend on its neighbors in a batch.
    """
    completed = {name: x for name, x in arguments.items() if name not in ("rng", "rotations")}
    if arguments.get("use_expectation") or arguments.get("signs") is not None or arguments.get("planes") is not None:
        return completed
    query = arguments["query"]
    caller = one_caller({"query": query})
    checks.vectors("query", query)
    num_hash, hash_code_len = checks.hash_numbers(arguments.get("num_hash", 32), arguments.get("hash_code_len", 8))
    numbers = num_hash, hash_code_len + checks.oversample(arguments.get("oversample", 0), hash_code_len), query.shape[-1]
    layout = arguments.get("layout", "chained")
    signs = reference.sample_signs(
        *numbers,
        batch_shape=tuple(query.shape[-3:-2]),
        layout=layout,
        rotations=checks.rotations("layout", layout, arguments.get("rotations"), reference.least_rotations(*numbers)),
        rng=checks.generator("rng", arguments.get("rng")),
    )
    return completed | {"signs": caller.from_numpy(signs)}


def _hashed_inside(arguments: Arguments) -> tuple[str, ...]:
    return () if arguments.get("use_expectation") else ("query", "key", "planes")


def _hash_numbers(given: Ingredients) -> dict[str, int]:
    return {"num_hash": given.num_hash, "hash_code_len": given.hash_code_len + given.oversample}


def _cumulation_additions(sizes: Sizes) -> int:
    """Into the tables and out of them, and what smoothing adds."""
    heads, bits = sizes.rows // max(sizes.n, 1), sizes.hash_code_len + sizes.oversample
    smoothing = heads * reference.smoothing_additions(bits, sizes.oversample, sizes.n)
    return sizes.num_hash * sizes.dim * (2 * sizes.rows + smoothing)


def _coded(given: Ingredients) -> dict[str, Any]:
    """Codes, the values that they stand for, and how many buckets there are."""
    return {
        "query_hash_code": given.query_hash_code,
        "key_hash_code": given.key_hash_code,
        "value": given.value,
        "hashtable_capacity": 1 << (given.hash_code_len + given.oversample),
        **given.masks,
    }


HADAMARD_TRANSFORM = Operation(
    name="hadamard_transform",
    definition="numpy:butterflies",
    outputs=(Output("out", "x", _rows("x", "x")),),
    exact=True,
    power_of_two=True,
    example_inputs=lambda given: {"x": given.vectors},
    terms=_transform_terms,
    multiply_adds=lambda sizes: sizes.rows * sizes.dim * round(log2(sizes.dim)),
    least_bytes=lambda sizes: 2 * sizes.vectors,
)

FAST_HASH = Operation(
    name="fast_hash",
    definition="numpy:formula",
    outputs=(Output("hash_code", None, _codes),),
    exact=True,
    example_inputs=lambda given: {"vectors": given.vectors, "signs": given.signs, **_hash_numbers(given)},
    multiply_adds=lambda sizes: sizes.rows * sizes.hash_additions,
    least_bytes=lambda sizes: sizes.vectors + sizes.codes,
)

HYPERPLANE_HASH = Operation(
    name="hyperplane_hash",
    definition="numpy:formula",
    outputs=(Output("hash_code", None, _codes),),
    codes_may_differ=1e-3,
    projections=_plane_projections,
    example_inputs=lambda given: {"vectors": given.vectors, "planes": given.planes, **_hash_numbers(given)},
    multiply_adds=lambda sizes: sizes.rows * sizes.dim * sizes.num_hash * sizes.hash_code_len,
    least_bytes=lambda sizes: sizes.vectors + sizes.codes,
)

LSH_CUMULATION = Operation(
    name="lsh_cumulation",
    definition="numpy:pairs",
    outputs=(Output("out", "value", _rows("query_hash_code", "value")),),
    example_inputs=lambda given: {**_coded(given), "oversample": given.oversample},
    terms=_terms_of_definition(reference.lsh_cumulation_pairs, "value"),
    multiply_adds=_cumulation_additions,
    least_bytes=lambda sizes: 2 * sizes.codes + 2 * sizes.vectors,
)

SMOOTH_TABLE = Operation(
    name="smooth_table",
    definition="numpy:pairs",
    outputs=(Output("out", "table", _rows("table", "table")),),
    oversample=2,
    example_inputs=lambda given: {"table": given.table, "oversample": given.oversample},
    terms=_terms_of_definition(reference.smooth_table_pairs, "table"),
    # Of one hash of every head, by spheres.
    multiply_adds=lambda sizes: sizes.table * max(1, sizes.oversample * (sizes.hash_code_len + sizes.oversample)),
    least_bytes=lambda sizes: 2 * sizes.table * sizes.item_size,
)

LSH_WEIGHTED_CUMULATION = Operation(
    name="lsh_weighted_cumulation",
    definition="numpy:pairs",
    outputs=(Output("out", "value", _rows("query_hash_code", "value")),),
    example_inputs=lambda given: {**_coded(given), "query_weight": given.query, "key_weight": given.key},
    terms=_terms_of_definition(reference.lsh_weighted_cumulation_pairs, "value", "query_weight", "key_weight"),
    # Pairs or outer products, whichever is less.
    multiply_adds=lambda sizes: min(2 * sizes.rows * sizes.num_hash * sizes.dim**2, sizes.colliding_pairs * 2 * sizes.dim),
    least_bytes=lambda sizes: 2 * sizes.codes + 4 * sizes.vectors,
)

EXPECTATION_ATTENTION = Operation(
    name="expectation_attention",
    definition="numpy:formula",
    outputs=(Output("out", "value", _rows("query", "value")),),
    example_inputs=lambda given: {
        "query": given.query,
        "key": given.key,
        "value": given.value,
        "hash_code_len": given.hash_code_len,
        **given.masks,
    },
    terms=_expectation_terms,
    # Two matrix products.
    multiply_adds=lambda sizes: sizes.rows * sizes.n * 2 * sizes.dim,
    least_bytes=lambda sizes: 4 * sizes.vectors,
)

_GRADIENTS = tuple(Output(f"grad_{name}", name, _rows(name, name)) for name in ("query", "key", "value"))

EXPECTATION_ATTENTION_BACKWARD = Operation(
    name="expectation_attention_backward",
    definition="numpy:formula",
    outputs=_GRADIENTS,
    example_inputs=lambda given: {"grad_out": given.grad_out, **EXPECTATION_ATTENTION.example_inputs(given)},
    terms=_gradient_terms,
    # What the forward pass has not made already: g . v, which queries and keys share, and the three
    # sums.
    multiply_adds=lambda sizes: sizes.rows * sizes.n * 4 * sizes.dim,
    # The gradient that comes in and the three that go out, beside what the forward pass has moved.
    least_bytes=lambda sizes: 4 * sizes.vectors,
)

LSH_ATTENTION_BACKWARD = Operation(
    name="lsh_attention_backward",
    definition="numpy:pairs",
    outputs=_GRADIENTS,
    example_inputs=lambda given: {
        "query_hash_code": given.query_hash_code,
        "key_hash_code": given.key_hash_code,
        "oversample": given.oversample,
        **EXPECTATION_ATTENTION_BACKWARD.example_inputs(given),
    },
    terms=_gradient_terms,
    multiply_adds=lambda sizes: (
        round(sizes.share_backward * min(4 * sizes.rows * sizes.num_hash * sizes.dim**2, sizes.colliding_pairs * 3 * sizes.dim))
        + _cumulation_additions(sizes)
    ),
    least_bytes=lambda sizes: 4 * sizes.vectors,
)

YOSO_ATTENTION = Operation(
    name="yoso_attention",
    definition="numpy:formula",
    outputs=(
        Output("out", "value", _rows("query", "value")),
        Output("length", None, lambda arguments: (*arguments["query"].shape[:-1], 1), asked_by="return_length"),
        Output("error", None, lambda arguments: tuple(arguments["query"].shape[:-1]), asked_by="return_error", dtype="float32"),
    ),
    example_inputs=lambda given: {
        "query": given.query,
        "key": given.key,
        "value": given.value,
        "num_hash": given.num_hash,
        "hash_code_len": given.hash_code_len,
        "oversample": given.oversample,
        **given.draw,
        **given.masks,
    },
    complete=_with_signs,
    hashed=_hashed_inside,
    terms=_attention_terms,
    # Both sides hashed, then into the tables and out of them.
    multiply_adds=lambda sizes: sizes.rows * 2 * sizes.hash_additions + _cumulation_additions(sizes),
    least_bytes=lambda sizes: 4 * sizes.vectors,
)

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        HADAMARD_TRANSFORM,
        FAST_HASH,
        HYPERPLANE_HASH,
        LSH_CUMULATION,
        SMOOTH_TABLE,
        LSH_WEIGHTED_CUMULATION,
        EXPECTATION_ATTENTION,
        EXPECTATION_ATTENTION_BACKWARD,
        LSH_ATTENTION_BACKWARD,
        YOSO_ATTENTION,
    )
}


def operation_of(op: str | Callable[..., Any]) -> Operation:
    """The record of an operation, by its function or by its name. Raises ``ValueError`` where there
    is none.

    >>> [output.name for output in operation_of("lsh_attention_backward").outputs]
    ['grad_query', 'grad_key', 'grad_value']
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in OPERATIONS:
        raise ValueError(f"op: no operation {name!r}; there are {', '.join(OPERATIONS)}")
    return OPERATIONS[name]
