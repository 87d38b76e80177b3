"""Fast Hadamard hashing: ``tau`` sign bits of ``H D3 H D2 H D1 x`` to a code. The equation stands
in `yoso_core.reference.fast_hash`.

``H`` is ``log2(D)`` stages of butterflies: at stride ``s`` the entries ``i`` and ``i + s`` become
their sum and their difference. The stages run from the largest stride to the smallest, as the
definition says, so that every sum is the same float and every code the same number.
"""

import numpy as np
from numba import cuda

from yoso_core.gpu import layout
from yoso_core.gpu.device import Array, Device, DoesNotFit
from yoso_core.gpu.numba_kernels import arrays
from yoso_core.reference import hash_layout
from yoso_core.reference.hashing import HUGE

_MAX_THREADS = 512
"""A power of two."""


@cuda.jit
def hash_vectors(vectors, signs, codes, vectors_per_head, hash_code_len, shrink):
    """One block hashes one vector, part after part.

    vectors ``(vectors, d)``, signs ``(heads, 3, parts, D)``, codes ``(vectors, num_hash)``;
    ``shrink`` is a power of two.

    *Shared memory*: the vector as it is rotated, ``D`` entries. *A thread*, of ``D / 2`` (or of any
    smaller power of two), does one butterfly of each stage. It alone reads and writes these two
    entries, so one barrier between stages is enough. Work is dealt out in turn: of the pairs,
    entries and codes, thread ``t`` takes ``t``, ``t + threads``, ... *Bytes*: each vector once for
    each part (from cache, but for the first), ``3 D`` signs for each part, 4 bytes for each code.
    *Deterministic*: yes, and the same codes as the reference.
    """
    entry = cuda.shared.array(0, vectors.dtype)
    vector, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    dim, num_hash = vectors.shape[1], codes.shape[1]
    parts, padded_dim = signs.shape[2], signs.shape[3]
    head = vector // vectors_per_head

    # Codes are cut from a stream of bits. A part gives as many as make whole codes; if not even one
    # fits in, all, and codes span parts.
    bits_per_part = padded_dim
    if hash_code_len <= padded_dim:
        bits_per_part -= padded_dim % hash_code_len

    # Sums of huge entries would overflow. A sign does not see a scale, and a power of two is exact.
    huge_entries = 0
    for i in range(thread, dim, threads):
        if abs(vectors[vector, i]) > HUGE:
            huge_entries += 1
    any_is_huge = cuda.syncthreads_or(huge_entries)  # a barrier that asks every thread

    for part in range(parts):
        for i in range(thread, padded_dim, threads):
            if i < dim:
                entry[i] = vectors[vector, i]
                if any_is_huge != 0:
                    entry[i] *= shrink
            else:
                entry[i] = 0

        for diagonal in range(3):
            for i in range(thread, padded_dim, threads):
                if signs[head, diagonal, part, i] < 0:
                    entry[i] = -entry[i]
            # No barrier: the first butterflies take entries i and i + D / 2, and one thread has
            # dealt with both of them.
            stride = padded_dim // 2
            while stride > 0:
                for pair in range(thread, padded_dim // 2, threads):
                    offset = pair & (stride - 1)  # pair % stride, quicker
                    i = 2 * pair - offset  # in blocks of 2 * stride entries, the first half meets the second
                    a, b = entry[i], entry[i + stride]
                    entry[i], entry[i + stride] = a + b, a - b
                cuda.syncthreads()
                stride //= 2

        first_bit = part * bits_per_part
        last_bit = first_bit + bits_per_part - 1
        for h in range(first_bit // hash_code_len + thread, min(last_bit // hash_code_len + 1, num_hash), threads):
            code = 0
            if h * hash_code_len < first_bit:
                code = codes[vector, h]  # it began in an earlier part
            for b in range(hash_code_len):
                i = h * hash_code_len + b - first_bit
                if 0 <= i < bits_per_part and entry[i] > 0:
                    code |= 1 << b
            codes[vector, h] = code
        cuda.syncthreads()


def fast_hash_shared_memory(device: Device, vectors: Array, signs: Array, num_hash: int, hash_code_len: int) -> Array:
    """One block for each vector, which is rotated in shared memory: `hash_vectors`. Raises
    `DoesNotFit` for a vector too long for it.
    """
    hashed = hash_layout(num_hash, hash_code_len, vectors.shape[-1])
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    x = arrays.computed(device, vectors)
    shared = hashed.padded_dim * x.dtype.itemsize
    if shared > device.max_shared:
        raise DoesNotFit(
            f"vectors: d = {vectors.shape[-1]}, padded to {hashed.padded_dim}, takes {shared:,} bytes of shared memory, a block here has "
            f"{device.max_shared:,}; the variant warp_per_vector of the CUDA C++ kernels takes more"
        )
    head_signs = layout.heads(device, device.xp.broadcast_to(signs, (*rows[:-1], *signs.shape[-3:])), tail=3)
    # Huge entries end up in the middle of the range: far from overflow, and small entries beside
    # them far from zero.
    shrink = x.dtype.type(2.0**-960 if x.dtype == np.float64 else 2.0**-64)
    device.launch(
        hash_vectors,
        (layout.count(rows),),
        (min(max(hashed.padded_dim // 2, 1), _MAX_THREADS),),
        (x.reshape(-1, x.shape[-1]), head_signs, codes.reshape(-1, num_hash), np.int64(rows[-1]), np.int64(hash_code_len), shrink),
        shared=shared,
    )
    return codes
