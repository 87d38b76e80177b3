"""Launchers of both hashes. The kernels are in `hashing.cu` and `hyperplanes.cu`, the equations are
in `yoso_core.reference.hashing`.
"""

import numpy as np

from yoso_core.gpu import layout as gpu_layout
from yoso_core.gpu.device import Array, CudaKernel, Device, DoesNotFit
from yoso_core.reference import hash_layout
from yoso_core.reference.hashing import Layout

_WARPS = 4
_THREADS = 128
_MAX_THREADS = 1024


def _draws(device: Device, draw: Array, leading: tuple[int, ...], tail: int) -> Array:
    """Signs or planes as contiguous ``(sets, *tail)``; head ``i`` takes set ``i % sets``."""
    batch = draw.shape[: draw.ndim - tail]
    while batch and batch[0] == 1:
        batch = batch[1:]
    if batch != leading[len(leading) - len(batch) :]:  # one of the other dims is 1
        batch = leading
    shape = draw.shape[draw.ndim - tail :]
    sets = device.xp.broadcast_to(draw.reshape(*draw.shape[draw.ndim - tail - len(batch) : draw.ndim - tail], *shape), (*batch, *shape))
    return gpu_layout.heads(device, sets, tail)


def _kernel(name: str, vectors: Array, padded_dim: int) -> CudaKernel:
    return CudaKernel("hashing.cu", name, (*gpu_layout.value_define(vectors), ("D", padded_dim)))


def fast_hash_block_per_part(
    device: Device, vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "chained"
) -> Array:
    """One block for each vector and part: the kernel `block_per_part`. Raises `DoesNotFit` for
    vectors of more than 1024 entries, and for a chain, which has no parts.
    """
    if layout != "paper":
        raise DoesNotFit(f"layout: block_per_part rotates by the parts of layout='paper', got {layout!r}; use the variant warp_per_vector")
    hashed = hash_layout(num_hash, hash_code_len, vectors.shape[-1])
    if hashed.padded_dim > _MAX_THREADS:
        raise DoesNotFit(
            f"vectors: d = {vectors.shape[-1]} needs {hashed.padded_dim} threads in a block, the limit is {_MAX_THREADS}; "
            "use the variant warp_per_vector"
        )
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    if not hashed.codes_per_part:
        codes[...] = 0  # the blocks of several parts add their bits to one code
    sets = _draws(device, signs, rows[:-1], 3)
    flat = gpu_layout.heads(device, vectors)
    for part in gpu_layout.grid_slices(hashed.parts):
        sizes = {"sign_sets": sets.shape[0], "parts": hashed.parts, "first_part": part.start}
        sizes |= {"dim": vectors.shape[-1], "num_hash": num_hash, "hash_code_len": hash_code_len}
        device.launch(
            _kernel("block_per_part", vectors, hashed.padded_dim),
            grid=(gpu_layout.count(rows), part.stop - part.start),
            block=(max(hashed.padded_dim, 32),),
            args={
                "vectors": flat,
                "signs": sets,
                "codes": codes,
                "vectors_per_head": np.int64(rows[-1]),
                **gpu_layout.int32s(**sizes),
            },
        )
    return codes


def fast_hash_warp_per_vector(
    device: Device,
    vectors: Array,
    signs: Array,
    num_hash: int,
    hash_code_len: int,
    *,
    layout: Layout = "chained",
    nonfinite: Array | None = None,
) -> Array:
    """One warp for each vector, all its rotations in turn: the kernel `warp_per_vector`, or
    `warp_per_chain` for a chain.

    ``nonfinite`` : uint8 with one entry for each vector, which is set to 1 for a non-finite vector
    and to 0 for the others.
    """
    rows, padded_dim = vectors.shape[:-1], signs.shape[-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    chained, shared = layout == "chained", 0
    sets = _draws(device, signs, rows[:-1], 2 if chained else 3)
    sizes = {"sign_sets": sets.shape[0], "rounds" if chained else "parts": sets.shape[-2]}
    sizes |= {"dim": vectors.shape[-1], "num_hash": num_hash, "hash_code_len": hash_code_len}
    if chained:
        in_shared = 4 * _WARPS * num_hash <= device.max_shared
        shared = 4 * _WARPS * num_hash if in_shared else 0
        sizes["in_shared"] = int(in_shared)
        if not in_shared:
            codes[...] = 0  # bits are added to it
    device.launch(
        _kernel("warp_per_chain" if chained else "warp_per_vector", vectors, padded_dim),
        grid=(gpu_layout.ceil_div(gpu_layout.count(rows), _WARPS),),
        block=(32 * _WARPS,),
        args={
            "vectors": gpu_layout.heads(device, vectors),
            "signs": sets,
            "codes": codes,
            "nonfinite": nonfinite,
            "num_vectors": np.int64(gpu_layout.count(rows)),
            "vectors_per_head": np.int64(rows[-1]),
            **gpu_layout.int32s(**sizes),
        },
        shared=shared,
    )
    return codes


def hyperplane_hash_thread_per_code(
    device: Device, vectors: Array, planes: Array, num_hash: int, hash_code_len: int, *, nonfinite: Array | None = None
) -> Array:
    """One thread for each code: the kernel `thread_per_code`. ``nonfinite`` as in
    `fast_hash_warp_per_vector`.
    """
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    sets = _draws(device, gpu_layout.widened(planes).astype(gpu_layout.accumulator(vectors), copy=False), rows[:-1], 2)
    device.launch(
        CudaKernel("hyperplanes.cu", "thread_per_code", gpu_layout.value_define(vectors)),
        grid=(gpu_layout.ceil_div(codes.size, _THREADS),),
        block=(_THREADS,),
        args={
            "vectors": gpu_layout.heads(device, vectors),
            "planes": sets,
            "codes": codes,
            "nonfinite": nonfinite,
            "num_codes": np.int64(codes.size),
            "vectors_per_head": np.int64(rows[-1]),
            **gpu_layout.int32s(plane_sets=sets.shape[0], dim=vectors.shape[-1], num_hash=num_hash, hash_code_len=hash_code_len),
        },
    )
    return codes
