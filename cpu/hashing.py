"""Hash codes: the fast Hadamard projection and Gaussian hyperplanes, sixteen vectors to a tile."""

from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types

from yoso_core.cpu.compiling import helper, kernel
from yoso_core.cpu.lanes import LANES, fill, fill_from, load, multiply_add, store, weight_where_positive
from yoso_core.cpu.threads import share
from yoso_core.cpu.tiles import MAX_DIM, aligned, hadamard, load_rotated, load_tile, pack, tame_tile
from yoso_core.cpu.views import Array, heads, input_array, output_array, rows, working_dtype
from yoso_core.reference.hashing import hash_layout

BLOCK = 64
"""Vectors to a task: 4 tiles."""


def check_dim(name: str, padded_dim: int) -> None:
    """The kernels exist up to `MAX_DIM`; the reference has no such limit."""
    if padded_dim > MAX_DIM:
        raise ValueError(
            f"{name}: the CPU kernels take up to {MAX_DIM} dims, got {padded_dim} after padding; variant='numpy:...' takes more"
        )


@helper
def store_rows(x, tile, dim, b, h, i):
    """A tile back to up to 16 rows of ``x[b, h, i:]``."""
    for t in range(min(LANES, x.shape[2] - i)):
        for j in range(dim):
            x[b, h, i + t, j] = tile[j * LANES + t]


@cache
def _hadamard_kernel(dim: int, dtype: Any) -> Any:
    """The transform of a block of vectors for each task. Moves 2 n D entries at least;
    ``n D log2 D`` additions.
    """

    @kernel(types.void(types.intp, types.intp, input_array(dtype, 4), output_array(dtype, 4)))
    def transform(first, last, x, out):
        tile = aligned(dim * LANES, x.dtype)
        no_signs = np.empty((0, 0, 0, 0, 0), x.dtype)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head, block = divmod(task, blocks)
            b, h = divmod(head, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                load_tile(tile, dim, x, b, h, i)
                hadamard(tile, dim, False, no_signs, b, h, 0, 0)
                store_rows(out, tile, dim, b, h, i)

    return transform


def hadamard_transform(x: Array, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.hadamard_transform`; the same bits."""
    vectors = rows(np.atleast_2d(x), working_dtype(x))
    batch, num_heads, n, dim = vectors.shape
    check_dim("x", dim)
    out = np.empty((batch, num_heads, n, dim), vectors.dtype)
    run = _hadamard_kernel(dim, from_dtype(vectors.dtype))
    share(
        batch * num_heads * -(-n // BLOCK),
        lambda first, last: run(first, last, vectors, out),
        num_threads=num_threads,
        cost=out.size * dim.bit_length() / 4,
    )
    return out.reshape(x.shape).astype(x.dtype, copy=False)


@cache
def _fast_hash_kernel(dim: int, dtype: Any) -> Any:
    """Codes of a block of vectors for each task: every part rotates the same tile of 16. Reads each
    vector once per part, from cache.
    """

    @kernel(types.void(types.intp, types.intp, input_array(dtype, 4), input_array(dtype, 5), output_array(types.int32, 4), types.intp))
    def hash_block(first, last, x, signs, codes, hash_code_len):
        num_hash, parts = codes.shape[3], signs.shape[3]
        per = dim // hash_code_len
        tile = aligned(dim * LANES, x.dtype)
        packed = aligned(max(per, num_hash) * LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head, block = divmod(task, blocks)
            b, h = divmod(head, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if per == 0:
                    packed[:] = 0
                for part in range(parts):
                    load_rotated(tile, dim, finite, x, signs, b, h, i, part)
                    if per > 0:
                        count = min(per, num_hash - part * per)
                        pack(tile, packed, count, hash_code_len)
                        store_codes(codes, packed, b, h, i, part * per, count)
                    else:
                        add_stream_bits(tile, dim, packed, part * dim, num_hash, hash_code_len)
                if per == 0:
                    store_codes(codes, packed, b, h, i, 0, num_hash)

    return hash_block


@helper
def store_codes(codes, packed, b, h, i, hash0, count):
    """``count`` codes of up to 16 rows, from ``packed[c * 16 + t]`` to
    ``codes (batch, heads, n, m)``, from hash ``hash0`` on.
    """
    for t in range(min(LANES, codes.shape[2] - i)):
        for c in range(count):
            codes[b, h, i + t, hash0 + c] = packed[c * LANES + t]


@helper
def add_stream_bits(tile, dim, packed, start, num_hash, hash_code_len):
    """``tau > D``: coordinate ``j`` of this part is bit ``start + j`` of one stream, which is cut
    every ``tau`` bits.
    """
    for j in range(dim):
        c, b = divmod(start + j, hash_code_len)
        if c < num_hash:
            bit = weight_where_positive(load(tile, j * LANES), types.int32(1 << b))
            store(packed, c * LANES, load(packed, c * LANES) | bit)


def spread_signs(signs: Array, leading: tuple[int, ...], dtype: Any) -> Array:
    """Signs as floats, one draw for each head (by strides of zero where they share one)."""
    return heads(np.broadcast_to(signs.astype(dtype, order="C"), (*leading, *signs.shape[-3:])), tail=3)


def fast_hash(vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.fast_hash`; the same bits."""
    dtype = working_dtype(vectors)
    x = rows(vectors, dtype)
    batch, num_heads, n, _ = x.shape
    layout = hash_layout(num_hash, hash_code_len, x.shape[-1])
    check_dim("vectors", layout.padded_dim)
    codes = np.empty((batch, num_heads, n, num_hash), np.int32)
    spread = spread_signs(signs, vectors.shape[:-2], dtype)
    run = _fast_hash_kernel(layout.padded_dim, from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * -(-n // BLOCK),
        lambda first, last: run(first, last, x, spread, codes, hash_code_len),
        num_threads=num_threads,
        cost=batch * num_heads * n * layout.parts * layout.padded_dim * layout.padded_dim.bit_length(),
    )
    return codes.reshape(*vectors.shape[:-1], num_hash)


@cache
def _hyperplane_kernel(dtype: Any) -> Any:
    """Codes of a block of vectors for each task: every plane against a tile of 16. ``n d m tau``
    multiplications.
    """

    @kernel(types.void(types.intp, types.intp, input_array(dtype, 4), input_array(dtype, 4), output_array(types.int32, 4), types.intp))
    def hash_block(first, last, x, planes, codes, hash_code_len):
        d = x.shape[3]
        tile = aligned(d * LANES, x.dtype)
        code_lanes = aligned(LANES, np.int32)
        finite = np.ones(LANES, np.uint8)
        blocks = (x.shape[2] + BLOCK - 1) // BLOCK
        for task in range(first, last):
            head, block = divmod(task, blocks)
            b, h = divmod(head, x.shape[1])
            for i in range(block * BLOCK, min((block + 1) * BLOCK, x.shape[2]), LANES):
                if not load_tile(tile, d, x, b, h, i):
                    tame_tile(tile, d, finite)
                for c in range(codes.shape[3]):
                    code = fill(types.int32(0))
                    for bit in range(hash_code_len):
                        projection = fill(x.dtype.type(0))
                        for j in range(d):
                            plane = fill_from(planes, (b, h, c * hash_code_len + bit, j))
                            projection = multiply_add(load(tile, j * LANES), plane, projection)
                        code = code | weight_where_positive(projection, types.int32(1 << bit))
                    store(code_lanes, 0, code)
                    store_codes(codes, code_lanes, b, h, i, c, 1)

    return hash_block


def hyperplane_hash(vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, num_threads: int | None = None) -> Array:
    """See `yoso_core.reference.hyperplane_hash`."""
    dtype = working_dtype(vectors)
    x = rows(vectors, dtype)
    batch, num_heads, n, d = x.shape
    codes = np.empty((batch, num_heads, n, num_hash), np.int32)
    normals = np.ascontiguousarray(np.swapaxes(planes.astype(dtype, copy=False), -1, -2))  # a plane's entries next to each other
    spread = heads(np.broadcast_to(normals, (*vectors.shape[:-2], *normals.shape[-2:])))
    run = _hyperplane_kernel(from_dtype(np.dtype(dtype)))
    share(
        batch * num_heads * -(-n // BLOCK),
        lambda first, last: run(first, last, x, spread, codes, hash_code_len),
        num_threads=num_threads,
        cost=batch * num_heads * n * d * num_hash * hash_code_len,
    )
    return codes.reshape(*vectors.shape[:-1], num_hash)
