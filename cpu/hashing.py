"""Hash codes: the fast Hadamard projection and Gaussian hyperplanes, sixteen vectors to a tile."""

import math
from functools import cache, partial
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, multiply_add, store, weight_where_positive
from yoso_core.cpu.scratch import aligned
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import MAX_DIM, hadamard, load_rotated, load_tile, pack, tame_tile
from yoso_core.cpu.views import Array, heads, input_array, output_array, rows, working_dtype
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
    vectors = rows(np.atleast_2d(x), working_dtype(x))
    batch, num_heads, n, dim = vectors.shape
    check_dim("x", dim)
    out = np.empty((batch, num_heads, n, dim), vectors.dtype)
    share(
        batch * num_heads * -(-n // BLOCK),
        partial(_hadamard_kernel(dim, from_dtype(vectors.dtype)), x=vectors, out=out),
        num_threads=num_threads,
        cost=out.size * dim.bit_length() / 4,
    )
    return out.reshape(x.shape).astype(x.dtype, copy=False)


@cache
def _chain_kernel(dim: int, dtype: Any) -> Any:
    """Codes of a block of vectors for each task: a tile of 16 goes through the whole chain, and the
    bits of every round are or-ed into the codes as it goes by. ``n R D log2 D`` additions for ``R``
    rounds; reads each vector once.
    """

    @kernel(x=input_array(dtype, 4), signs=input_array(dtype, 4), codes=output_array(types.int32, 4), hash_code_len=types.intp)
    def hash_block(first, last, x, signs, codes, hash_code_len):
        num_hash, rounds = codes.shape[3], signs.shape[2]
        apart = (rounds - WARM_UP) * dim // hash_code_len
        tile, packed = aligned(dim * LANES, x.dtype), aligned(num_hash * LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head = divmod(head_index, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if not load_tile(tile, dim, x, head, i):
                    tame_tile(tile, dim, finite)
                packed[:] = 0
                for round in range(rounds):
                    hadamard(tile, dim, True, signs, (*head, round))
                    if round >= WARM_UP:
                        add_rotation_bits(tile, dim, packed, (round - WARM_UP) * dim, apart, num_hash, hash_code_len)
                store_codes(codes, packed, head, i, 0, num_hash)

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
def _triples_kernel(dim: int, dtype: Any) -> Any:
    """Codes of a block of vectors for each task: every part rotates the same tile of 16. Reads each
    vector once per part, from cache.
    """

    @kernel(x=input_array(dtype, 4), signs=input_array(dtype, 5), codes=output_array(types.int32, 4), hash_code_len=types.intp)
    def hash_block(first, last, x, signs, codes, hash_code_len):
        num_hash, parts = codes.shape[3], signs.shape[3]
        per = dim // hash_code_len
        tile = aligned(dim * LANES, x.dtype)
        packed = aligned(max(per, num_hash) * LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head = divmod(head_index, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if per == 0:
                    packed[:] = 0
                for part in range(parts):
                    load_rotated(tile=tile, dim=dim, finite=finite, x=x, signs=signs, head=head, i=i, part=part)
                    if per > 0:
                        count = min(per, num_hash - part * per)
                        pack(tile, packed, count, hash_code_len)
                        store_codes(codes, packed, head, i, part * per, count)
                    else:
                        add_stream_bits(tile, dim, packed, part * dim, num_hash, hash_code_len)
                if per == 0:
                    store_codes(codes, packed, head, i, 0, num_hash)

    return hash_block


@helper
def store_codes(codes, packed, head, i, hash0, count):
    """``count`` codes of up to 16 rows, from ``packed[hash * 16 + t]`` to
    ``codes (batch, heads, n, m)``, where the first goes to column ``hash0``.
    """
    for t in range(min(LANES, codes.shape[2] - i)):
        for hash in range(count):
            codes[(*head, i + t, hash0 + hash)] = packed[hash * LANES + t]


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


def spread_signs(signs: Array, leading: tuple[int, ...], dtype: Any) -> Array:
    """Signs as floats, one draw for each head; heads that share a draw share its memory, by strides
    of zero.
    """
    return heads(np.broadcast_to(signs.astype(dtype, order="C"), (*leading, *signs.shape[-3:])), tail=3)


def spread_chain(signs: Array, leading: tuple[int, ...], dtype: Any) -> Array:
    """The signs of a chain as floats times the exact factor of their round, one draw for each
    head, as in `spread_signs`.
    """
    rounds, dim = signs.shape[-2:]
    factors = np.array([chain_factor(round, dim) for round in range(1, rounds + 1)], dtype)
    return heads(np.broadcast_to(signs.astype(dtype, order="C") * factors[:, None], (*leading, rounds, dim)))


def fast_hash(
    vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "paper", num_threads: int | None = None
) -> Array:
    """See `yoso_core.reference.fast_hash`; the same bits."""
    dtype = working_dtype(vectors)
    x = rows(vectors, dtype)
    batch, num_heads, n, _ = x.shape
    dim = signs.shape[-1]
    check_dim("vectors", dim)
    codes = np.empty((batch, num_heads, n, num_hash), np.int32)
    chained = layout == "chained"
    spread = (spread_chain if chained else spread_signs)(signs, vectors.shape[:-2], dtype)
    hash_block = (_chain_kernel if chained else _triples_kernel)(dim, from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * -(-n // BLOCK),
        partial(hash_block, x=x, signs=spread, codes=codes, hash_code_len=hash_code_len),
        num_threads=num_threads,
        cost=batch * num_heads * n * math.prod(spread.shape[2:]) * dim.bit_length() / 3,
    )
    return codes.reshape(*vectors.shape[:-1], num_hash)


@cache
def _hyperplane_kernel(dtype: Any) -> Any:
    """Codes of a block of vectors for each task: every plane against a tile of 16. ``n d m tau``
    multiplications.
    """

    @kernel(x=input_array(dtype, 4), planes=input_array(dtype, 4), codes=output_array(types.int32, 4), hash_code_len=types.intp)
    def hash_block(first, last, x, planes, codes, hash_code_len):
        d = x.shape[3]
        tile = aligned(d * LANES, x.dtype)
        code_lanes = aligned(LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head_index, block = divmod(task, blocks)
            head = divmod(head_index, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if not load_tile(tile, d, x, head, i):
                    tame_tile(tile, d, finite)
                for hash in range(codes.shape[3]):
                    code = fill(types.int32(0))
                    for bit in range(hash_code_len):
                        projection = fill(x.dtype.type(0))
                        for c in range(d):
                            plane = fill_from(planes, (*head, hash * hash_code_len + bit, c))
                            projection = multiply_add(load(tile, c * LANES), plane, projection)
                        code = code | weight_where_positive(projection, types.int32(1 << bit))
                    store(code_lanes, 0, code)
                    store_codes(codes, code_lanes, head, i, hash, 1)

    return hash_block


def hyperplane_hash(vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.hyperplane_hash`."""
    dtype = working_dtype(vectors)
    x = rows(vectors, dtype)
    batch, num_heads, n, d = x.shape
    codes = np.empty((batch, num_heads, n, num_hash), np.int32)
    normals = np.ascontiguousarray(np.swapaxes(planes.astype(dtype, copy=False), -1, -2))  # a plane's entries next to each other
    spread = heads(np.broadcast_to(normals, (*vectors.shape[:-2], *normals.shape[-2:])))
    hash_block = _hyperplane_kernel(from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * -(-n // BLOCK),
        partial(hash_block, x=x, planes=spread, codes=codes, hash_code_len=hash_code_len),
        num_threads=num_threads,
        cost=batch * num_heads * n * d * num_hash * hash_code_len,
    )
    return codes.reshape(*vectors.shape[:-1], num_hash)
