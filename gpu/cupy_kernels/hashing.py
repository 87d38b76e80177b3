"""Launchers of both hashes. The equations stand in `yoso_core.reference.hashing`, the kernels in
`hashing.cu` and `hyperplanes.cu`.
"""

import numpy as np

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit
from yoso_core.reference import hash_layout

_WARPS = 4
_THREADS = 128
_MAX_THREADS = 1024


def _draws(device: Device, draw: Array, leading: tuple[int, ...], tail: int) -> Array:
    """Signs or planes as contiguous ``(sets, *tail)``, such that head ``i`` takes set
    ``i % sets``.
    """
    batch = draw.shape[: draw.ndim - tail]
    while batch and batch[0] == 1:
        batch = batch[1:]
    if batch != leading[len(leading) - len(batch) :]:  # a dim of 1 further in
        batch = leading
    shape = draw.shape[draw.ndim - tail :]
    sets = device.xp.broadcast_to(draw.reshape(*draw.shape[draw.ndim - tail - len(batch) : draw.ndim - tail], *shape), (*batch, *shape))
    return layout.heads(device, sets, tail)


def _kernel(name: str, vectors: Array, padded_dim: int) -> CudaKernel:
    return CudaKernel("hashing.cu", name, (*layout.value_define(vectors), ("D", padded_dim)))


def fast_hash_block_per_part(device: Device, vectors: Array, signs: Array, num_hash: int, hash_code_len: int) -> Array:
    """One block for each vector and part: `block_per_part`. Raises `DoesNotFit` for vectors of more
    than 1024 entries.
    """
    hashed = hash_layout(num_hash, hash_code_len, vectors.shape[-1])
    if hashed.padded_dim > _MAX_THREADS:
        raise DoesNotFit(
            f"vectors: d = {vectors.shape[-1]} needs {hashed.padded_dim} threads to a block, which has {_MAX_THREADS} at most; "
            "use the variant warp_per_vector"
        )
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    if not hashed.codes_per_part:
        codes[...] = 0  # the blocks of several parts add their bits to one code
    sets, flat = _draws(device, signs, rows[:-1], 3), layout.heads(device, vectors)
    numbers = (np.int64(rows[-1]), np.int32(sets.shape[0]), np.int32(vectors.shape[-1]), np.int32(num_hash), np.int32(hash_code_len))
    device.launch(
        _kernel("block_per_part", vectors, hashed.padded_dim),
        (layout.count(rows), hashed.parts),
        (max(hashed.padded_dim, 32),),
        (flat, sets, codes, *numbers),
    )
    return codes


def fast_hash_warp_per_vector(
    device: Device, vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, spoiled: Array | None = None
) -> Array:
    """One warp for each vector, all parts in turn: `warp_per_vector`.

    ``spoiled``: uint8 with an entry for each vector, set to 1 for one that is not finite and to 0
    for the others.
    """
    hashed = hash_layout(num_hash, hash_code_len, vectors.shape[-1])
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    sets, flat = _draws(device, signs, rows[:-1], 3), layout.heads(device, vectors)
    numbers = (np.int32(x) for x in (sets.shape[0], hashed.parts, vectors.shape[-1], num_hash, hash_code_len))
    device.launch(
        _kernel("warp_per_vector", vectors, hashed.padded_dim),
        (layout.ceil_div(layout.count(rows), _WARPS),),
        (32 * _WARPS,),
        (flat, sets, codes, spoiled, np.int64(layout.count(rows)), np.int64(rows[-1]), *numbers),
    )
    return codes


def hyperplane_hash_thread_per_code(
    device: Device, vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, spoiled: Array | None = None
) -> Array:
    """One thread for each code: `thread_per_code`. ``spoiled`` as in
    `fast_hash_warp_per_vector`.
    """
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    flat = layout.heads(device, vectors)
    sets = _draws(device, layout.widened(planes).astype(layout.accumulator(vectors), copy=False), rows[:-1], 2)
    numbers = (np.int32(x) for x in (sets.shape[0], vectors.shape[-1], num_hash, hash_code_len))
    device.launch(
        CudaKernel("hyperplanes.cu", "thread_per_code", layout.value_define(vectors)),
        (layout.ceil_div(codes.size, _THREADS),),
        (_THREADS,),
        (flat, sets, codes, spoiled, np.int64(codes.size), np.int64(rows[-1]), *numbers),
    )
    return codes
