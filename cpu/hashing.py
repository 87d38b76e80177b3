"""Hash codes: the fast Hadamard projection and Gaussian hyperplanes, sixteen vectors to a tile."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, multiply_add, store, weight_where_positive
from yoso_core.cpu.precision import rounded, rows, stored_rows, working_dtype
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import MAX_DIM, hadamard, load_tile, pack, rotate, tame_tile
from yoso_core.cpu.views import Array, heads, input_array, output_array
from yoso_core.reference.hashing import WARM_UP, Layout, chain_factor

BLOCK = 64
"""Vectors to a task: 4 tiles."""


def check_dim(name: str, padded_dim: int) -> None:
    """The kernels exist up to `MAX_DIM`; the reference has no such limit."""
    if padded_dim > MAX_DIM:
        raise ValueError(
            f"{name}: the CPU kernels take up to {MAX_DIM} dims, got {padded_dim} after padding; variant='numpy:...' takes more"
        )


@helper
def store_rows(x, tile, dim, head, i):
    """A tile back to up to 16 rows of ``x``, from ``x[*head, i]`` on."""
    for t in range(min(LANES, x.shape[2] - i)):
        for c in range(dim):
            x[(*head, i + t, c)] = tile[c * LANES + t]


@cache
def _hadamard_kernel(dim: int, dtype: Any) -> Any:
    """The transform of a block of vectors for each task. Moves at least ``2 n D`` entries;
    ``n D log2 D`` additions.
    """

    @kernel(x=input_array(dtype, 4), out=output_array(dtype, 4))
    def transform(first, last, x, out):
        tile = aligned(dim * LANES, x.dtype)
        no_signs = np.empty((0, 0, 0, 0, 0), x.dtype)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head = divmod(head_index, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                load_tile(tile, dim, x, head, i)
                hadamard(tile, dim, False, no_signs, (0, 0, 0, 0))
                store_rows(out, tile, dim, head, i)

    return transform


def hadamard_transform(x: Array, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.hadamard_transform`; the same bits."""
    vectors = rows(np.atleast_2d(x), working_dtype(x), num_threads)
    batch, num_heads, n, dim = vectors.shape
    check_dim("x", dim)
    out = np.empty((batch, num_heads, n, dim), vectors.dtype)
    share(
        batch * num_heads * -(-n // BLOCK),
        partial(_hadamard_kernel(dim, from_dtype(vectors.dtype)), x=vectors, out=out),
        num_threads=num_threads,
        cost=out.size * dim.bit_length() / 4,
    )
    return rounded(out.reshape(x.shape), x.dtype, num_threads)


# The kernels of the hashes. A task is a block of vectors of one head; ``head0`` is the number of
# the first head. ``by_hash``, a constant, says how the codes lie: as ``codes (heads, m, n)``, for
# the cumulation to read, or as ``(heads, n, m)``. ``nonfinite (heads, n)``, where it is not empty,
# gets a 1 for each vector that is not finite.


@helper
def load_marked(tile, dim, finite, x, head, i, nonfinite, slot):
    """`load_tile`, whatever the vectors hold; those that are not finite are marked."""
    if load_tile(tile, dim, x, head, i):
        return
    tame_tile(tile, dim, finite)
    if len(nonfinite):
        for t in range(min(LANES, x.shape[2] - i)):
            nonfinite[slot, i + t] = 1 - finite[t]


@helper
def store_codes(codes, packed, by_hash, slot, i, hash0, count):
    """``count`` codes of up to 16 vectors, from ``packed[hash * 16 + t]`` to ``codes``; the first
    is that of hash ``hash0``.
    """
    if by_hash:
        tail = min(LANES, codes.shape[2] - i)
        for hash in range(count):
            if tail == LANES:
                store(codes, (slot, hash0 + hash, i), load(packed, hash * LANES))
            else:
                for t in range(tail):
                    codes[slot, hash0 + hash, i + t] = packed[hash * LANES + t]
    else:
        for t in range(min(LANES, codes.shape[1] - i)):
            for hash in range(count):
                codes[slot, i + t, hash0 + hash] = packed[hash * LANES + t]


@cache
def _chain_kernel(dim: int, dtype: Any, stored: Any, code: Any, by_hash: bool) -> Any:
    """A tile of 16 vectors goes through the whole chain, and the bits of every round are or-ed into
    the codes as it goes by. ``n R D log2 D`` additions for ``R`` rounds; reads each vector once.
    """

    @kernel(
        x=input_array(stored, 4),
        signs=input_array(dtype, 4),
        codes=output_array(code, 3),
        nonfinite=types.Array(types.uint8, 2, "A"),
        head0=types.intp,
        hash_code_len=types.intp,
    )
    def hash_block(first, last, x, signs, codes, nonfinite, head0, hash_code_len):
        num_hash, rounds = codes.shape[1 if by_hash else 2], signs.shape[2]
        apart = (rounds - WARM_UP) * dim // hash_code_len
        tile, packed = aligned(dim * LANES, signs.dtype), aligned(num_hash * LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            slot, block = divmod(task, blocks)
            head = divmod(head0 + slot, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                load_marked(tile, dim, finite, x, head, i, nonfinite, slot)
                packed[:] = 0
                for round in range(rounds):
                    hadamard(tile, dim, True, signs, (*head, round))
                    if round >= WARM_UP:
                        add_rotation_bits(tile, dim, packed, (round - WARM_UP) * dim, apart, num_hash, hash_code_len)
                store_codes(codes, packed, by_hash, slot, i, 0, num_hash)

    return hash_block


@helper
def add_rotation_bits(tile, dim, packed, start, apart, num_hash, hash_code_len):
    """Coordinate ``c`` of this rotation stands at ``start + c`` of the stream, and position
    ``b * apart + h`` is bit ``b`` of code ``h``: neighboring coordinates are neighboring hashes.
    """
    position = start
    while position < start + dim:
        bit, hash = divmod(position, apart)
        run = min(apart - hash, start + dim - position)
        if bit < hash_code_len:
            weight = types.int32(1 << bit)
            for k in range(min(run, num_hash - hash)):
                found = weight_where_positive(load(tile, (position - start + k) * LANES), weight)
                store(packed, (hash + k) * LANES, load(packed, (hash + k) * LANES) | found)
        position += run


@cache
def _triples_kernel(dim: int, dtype: Any, stored: Any, code: Any, by_hash: bool) -> Any:
    """The paper's layout: every part rotates the same tile of 16 vectors, from cache."""

    @kernel(
        x=input_array(stored, 4),
        signs=input_array(dtype, 5),
        codes=output_array(code, 3),
        nonfinite=types.Array(types.uint8, 2, "A"),
        head0=types.intp,
        hash_code_len=types.intp,
    )
    def hash_block(first, last, x, signs, codes, nonfinite, head0, hash_code_len):
        num_hash, parts = codes.shape[1 if by_hash else 2], signs.shape[3]
        per = dim // hash_code_len
        tile = aligned(dim * LANES, signs.dtype)
        packed = aligned(max(per, num_hash) * LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            slot, block = divmod(task, blocks)
            head = divmod(head0 + slot, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if per == 0:
                    packed[:] = 0
                for part in range(parts):
                    load_marked(tile, dim, finite, x, head, i, nonfinite, slot)
                    rotate(tile, dim, signs, head, part)
                    if per > 0:
                        count = min(per, num_hash - part * per)
                        pack(tile, packed, count, hash_code_len)
                        store_codes(codes, packed, by_hash, slot, i, part * per, count)
                    else:
                        add_stream_bits(tile, dim, packed, part * dim, num_hash, hash_code_len)
                if per == 0:
                    store_codes(codes, packed, by_hash, slot, i, 0, num_hash)

    return hash_block


@helper
def add_stream_bits(tile, dim, packed, start, num_hash, hash_code_len):
    """``tau > D``: coordinate ``c`` of this part is bit ``start + c`` of one stream, which is cut
    every ``tau`` bits.
    """
    for c in range(dim):
        hash, place = divmod(start + c, hash_code_len)
        if hash < num_hash:
            bit = weight_where_positive(load(tile, c * LANES), types.int32(1 << place))
            store(packed, hash * LANES, load(packed, hash * LANES) | bit)


@cache
def _hyperplane_kernel(dtype: Any, stored: Any, code: Any, by_hash: bool) -> Any:
    """Every plane against a tile of 16 vectors. ``n d m tau`` multiplications."""

    @kernel(
        x=input_array(stored, 4),
        planes=input_array(dtype, 4),
        codes=output_array(code, 3),
        nonfinite=types.Array(types.uint8, 2, "A"),
        head0=types.intp,
        hash_code_len=types.intp,
    )
    def hash_block(first, last, x, planes, codes, nonfinite, head0, hash_code_len):
        d = x.shape[3]
        tile = aligned(d * LANES, planes.dtype)
        packed = aligned(LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            slot, block = divmod(task, blocks)
            head = divmod(head0 + slot, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                load_marked(tile, d, finite, x, head, i, nonfinite, slot)
                for hash in range(codes.shape[1 if by_hash else 2]):
                    found = fill(types.int32(0))
                    for bit in range(hash_code_len):
                        projection = fill(planes.dtype.type(0))
                        for c in range(d):
                            plane = fill_from(planes, (*head, hash * hash_code_len + bit, c))
                            projection = multiply_add(load(tile, c * LANES), plane, projection)
                        found = found | weight_where_positive(projection, types.int32(1 << bit))
                    store(packed, 0, found)
                    store_codes(codes, packed, by_hash, slot, i, hash, 1)

    return hash_block


@dataclass(frozen=True)
class Hash:
    """A draw of ``num_hash`` hashes, ready for the vectors of some heads."""

    work: Callable[..., None]
    """``work(first, last, x=, codes=, nonfinite=, head0=)``, `BLOCK` vectors to a task."""
    num_hash: int
    cost: float
    """Of a vector."""


def narrowest(hash_code_len: int) -> Any:
    """The integer type that the library keeps codes of so many bits in."""
    return np.uint8 if hash_code_len <= 8 else np.uint16 if hash_code_len <= 16 else np.int32


def _spread(draw: Array, leading: tuple[int, ...], tail: int) -> Array:
    """One draw for each head; heads that share a draw share its memory, by strides of zero."""
    return heads(np.broadcast_to(draw, (*leading, *draw.shape[-tail:])), tail=tail)


def hash_by_signs(
    signs: Array,
    num_hash: int,
    hash_code_len: int,
    layout: Layout,
    *,
    leading: tuple[int, ...],
    dtype: Any,
    stored: Any,
    code: Any,
    by_hash: bool,
) -> Hash:
    """By fast rotations, for vectors of these leading dims, stored in one type (see
    `yoso_core.cpu.precision`) and computed in ``dtype``.
    """
    floats, dim = signs.astype(dtype, order="C"), signs.shape[-1]
    if layout == "chained":  # every diagonal with the exact factor of its round
        factors = [chain_factor(round, dim) for round in range(1, signs.shape[-2] + 1)]
        spread = _spread(floats * np.array(factors, dtype)[:, None], leading, 2)
    else:
        spread = _spread(floats, leading, 3)
    make = _chain_kernel if layout == "chained" else _triples_kernel
    kernel = make(dim, *(from_dtype(np.dtype(kind)) for kind in (dtype, stored, code)), by_hash)
    work = partial(kernel, signs=spread, hash_code_len=hash_code_len)
    return Hash(work, num_hash, cost=math.prod(spread.shape[2:]) * dim.bit_length() / 3)


def hash_by_planes(
    planes: Array, num_hash: int, hash_code_len: int, *, leading: tuple[int, ...], dtype: Any, stored: Any, code: Any, by_hash: bool
) -> Hash:
    """By hyperplanes, likewise."""
    floats = rows(planes, dtype, None).reshape(planes.shape)
    normals = np.ascontiguousarray(np.swapaxes(floats, -1, -2))  # a plane's entries next to each other
    kernel = _hyperplane_kernel(*(from_dtype(np.dtype(kind)) for kind in (dtype, stored, code)), by_hash)
    return Hash(
        partial(kernel, planes=_spread(normals, leading, 2), hash_code_len=hash_code_len),
        num_hash,
        cost=float(math.prod(planes.shape[-2:])),
    )


def hash_maker(signs: Array | None, planes: Array | None, num_hash: int, hash_code_len: int, layout: Layout) -> Callable[..., Hash]:
    """`hash_by_signs` or `hash_by_planes`, for the draw that is there."""
    if signs is not None:
        return partial(hash_by_signs, signs, num_hash, hash_code_len, layout)
    assert planes is not None  # the face draws signs where neither is given
    return partial(hash_by_planes, planes, num_hash, hash_code_len)


def all_codes(vectors: Array, make: Callable[..., Hash], num_threads: int | None) -> Array:
    """Every code by a `hash_maker`, as the caller gets them: int32 ``(..., n, m)``."""
    dtype = working_dtype(vectors)
    x = stored_rows(vectors, dtype)
    hash = make(leading=vectors.shape[:-2], dtype=dtype, stored=x.dtype, code=np.int32, by_hash=False)
    batch, num_heads, n, _ = x.shape
    codes = np.empty((batch * num_heads, n, hash.num_hash), np.int32)
    share(
        len(codes) * -(-n // BLOCK),
        partial(hash.work, x=x, codes=codes, nonfinite=np.empty((0, 0), np.uint8), head0=0),
        num_threads=num_threads,
        cost=len(codes) * n * hash.cost,
    )
    return codes.reshape(*vectors.shape[:-1], hash.num_hash)


def fast_hash(
    vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "chained", num_threads: int | None = None
) -> Array:
    """See `yoso_core.reference.fast_hash`; the same bits."""
    check_dim("vectors", signs.shape[-1])
    return all_codes(vectors, hash_maker(signs, None, num_hash, hash_code_len, layout), num_threads)


def hyperplane_hash(vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.hyperplane_hash`."""
    return all_codes(vectors, partial(hash_by_planes, planes, num_hash, hash_code_len), num_threads)
