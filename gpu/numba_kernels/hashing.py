"""Fast Hadamard hashing: a code is ``tau`` sign bits of rotations ``H D``. The equations are in
`yoso_core.reference.fast_hash`.

``H`` is ``log2(D)`` stages of butterflies. At stride ``s``, the entries ``i`` and ``i + s`` become
their sum and their difference. The stages run from the largest stride to the smallest, as in the
definition, so every sum is the same float and every code the same number.
"""

import numpy as np
from numba import cuda

from yoso_core.gpu import layout as gpu_layout
from yoso_core.gpu.device import Array, Device, DoesNotFit
from yoso_core.gpu.numba_kernels import arrays
from yoso_core.reference.hashing import HUGE, WARM_UP, Layout, chain_factor

_MAX_THREADS = 512
"""A power of two."""


@cuda.jit
def hash_vectors(vectors, signs, codes, vectors_per_head, hash_code_len, shrink):
    """One block hashes one vector, part after part.

    vectors ``(vectors, d)``, signs ``(heads, 3, parts, D)``, codes ``(vectors, num_hash)``;
    ``shrink`` is a power of two.

    *Shared memory*: the rotated vector, ``D`` entries. *A thread*, of ``D / 2`` (or of any smaller
    power of two), does one butterfly of each stage. No other thread reads or writes its two
    entries, so one barrier between stages is enough. Of all pairs, entries and codes, thread ``t``
    takes ``t``, ``t + threads``, ... *Bytes*: each vector once for each part (from cache, except
    for the first), ``3 D`` signs for each part, 4 bytes for each code. *Deterministic*: yes, with
    the same codes as the reference.
    """
    entry = cuda.shared.array(0, vectors.dtype)
    vector, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    dim, num_hash = vectors.shape[1], codes.shape[1]
    parts, padded_dim = signs.shape[2], signs.shape[3]
    head = vector // vectors_per_head

    # Codes are cut from a stream of bits. A part gives the bits of its whole codes. If not even one
    # code fits into a part, it gives all its bits, and codes span parts.
    bits_per_part = padded_dim
    if hash_code_len <= padded_dim:
        bits_per_part -= padded_dim % hash_code_len

    # Sums of huge entries would overflow. Scaling by a power of two is exact and changes no sign.
    huge_entries = 0
    for i in range(thread, dim, threads):
        if abs(vectors[vector, i]) > HUGE:
            huge_entries += 1
    any_is_huge = cuda.syncthreads_or(huge_entries)  # a barrier that combines the answers of all threads

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
            # written both of them.
            stride = padded_dim // 2
            while stride > 0:
                for pair in range(thread, padded_dim // 2, threads):
                    offset = pair & (stride - 1)  # pair % stride, but faster
                    i = 2 * pair - offset  # in blocks of 2 * stride entries, the first half meets the second
                    a, b = entry[i], entry[i + stride]
                    entry[i], entry[i + stride] = a + b, a - b
                cuda.syncthreads()
                stride //= 2

        first_bit = part * bits_per_part
        last_bit = first_bit + bits_per_part - 1
        for hash in range(first_bit // hash_code_len + thread, min(last_bit // hash_code_len + 1, num_hash), threads):
            code = 0
            if hash * hash_code_len < first_bit:
                code = codes[vector, hash]  # it began in an earlier part
            for bit in range(hash_code_len):
                i = hash * hash_code_len + bit - first_bit
                if 0 <= i < bits_per_part and entry[i] > 0:
                    code |= 1 << bit
            codes[vector, hash] = code
        cuda.syncthreads()


@cuda.jit
def hash_by_chain(vectors, signs, codes, vectors_per_head, hash_code_len, shrink, apart):
    """One block takes one vector through the whole chain of rotations.

    vectors ``(vectors, d)``, signs ``(heads, rounds, D)``, already times the exact factor of their
    round; codes ``(vectors, num_hash)``, zero at first; ``shrink`` is a power of two.

    *Shared memory* and *a thread*'s butterflies are those of `hash_vectors`. From the fourth round
    on, entry ``c`` of rotation ``p`` is position ``p D + c`` of one stream, and position
    ``b * apart + h`` is bit ``b`` of code ``h``. A thread makes the codes ``t``, ``t + threads``,
    ...: of each it adds the bits that this round holds. *Bytes*: each vector and ``rounds D`` signs
    once, each code once for every round. *Deterministic*: yes, with the same codes as the
    reference.
    """
    entry = cuda.shared.array(0, vectors.dtype)
    vector, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    dim, num_hash = vectors.shape[1], codes.shape[1]
    rounds, padded_dim = signs.shape[1], signs.shape[2]
    head = vector // vectors_per_head

    huge_entries = 0
    for i in range(thread, dim, threads):
        if abs(vectors[vector, i]) > HUGE:
            huge_entries += 1
    any_is_huge = cuda.syncthreads_or(huge_entries)
    for i in range(thread, padded_dim, threads):
        entry[i] = 0
        if i < dim:
            entry[i] = vectors[vector, i]
            if any_is_huge != 0:
                entry[i] *= shrink

    for round in range(rounds):
        for i in range(thread, padded_dim, threads):
            entry[i] *= signs[head, round, i]
        # No barrier: the first butterflies take entries i and i + D / 2, and one thread has
        # written both of them.
        stride = padded_dim // 2
        while stride > 0:
            for pair in range(thread, padded_dim // 2, threads):
                offset = pair & (stride - 1)
                i = 2 * pair - offset
                a, b = entry[i], entry[i + stride]
                entry[i], entry[i + stride] = a + b, a - b
            cuda.syncthreads()
            stride //= 2

        start = (round - WARM_UP) * padded_dim
        if start >= 0:
            for hash in range(thread, num_hash, threads):
                code = codes[vector, hash]
                bit = max(0, (start - hash + apart - 1) // apart)  # the first of its bits that stands in this round
                while bit < hash_code_len and bit * apart + hash < start + padded_dim:
                    if entry[bit * apart + hash - start] > 0:
                        code |= 1 << bit
                    bit += 1
                codes[vector, hash] = code
        cuda.syncthreads()


def fast_hash_shared_memory(
    device: Device, vectors: Array, signs: Array, num_hash: int, hash_code_len: int, *, layout: Layout = "chained"
) -> Array:
    """One block for each vector, which it rotates in shared memory: the kernel `hash_vectors`, or
    `hash_by_chain` for a chain. Raises `DoesNotFit` for a vector that is too long for shared
    memory.
    """
    padded_dim = signs.shape[-1]
    rows = vectors.shape[:-1]
    codes = device.empty((*rows, num_hash), np.int32)
    if codes.size == 0:
        return codes
    x = arrays.computed(device, vectors)
    shared = padded_dim * x.dtype.itemsize
    if shared > device.max_shared:
        raise DoesNotFit(
            f"vectors: d = {vectors.shape[-1]}, padded to {padded_dim}, takes {shared:,} bytes of shared memory, a block here has "
            f"{device.max_shared:,}; the variant warp_per_vector of the CUDA C++ kernels takes more"
        )
    chained = layout == "chained"
    tail = 2 if chained else 3
    head_signs = gpu_layout.heads(device, device.xp.broadcast_to(signs, (*rows[:-1], *signs.shape[-tail:])), tail=tail)
    # This moves huge entries to the middle of the range: far from overflow, while the small entries
    # beside them stay far from zero.
    shrink = x.dtype.type(2.0**-960 if x.dtype == np.float64 else 2.0**-64)
    args = {
        "vectors": x.reshape(-1, x.shape[-1]),
        "signs": head_signs,
        "codes": codes.reshape(-1, num_hash),
        "vectors_per_head": np.int64(rows[-1]),
        "hash_code_len": np.int64(hash_code_len),
        "shrink": shrink,
    }
    if chained:
        codes[...] = 0  # every round adds its bits
        factors = device.xp.asarray([chain_factor(round, padded_dim) for round in range(1, signs.shape[-2] + 1)], dtype=x.dtype)
        args["signs"] = head_signs.astype(x.dtype) * factors[:, None]
        args["apart"] = np.int64((signs.shape[-2] - WARM_UP) * padded_dim // hash_code_len)
    device.launch(
        hash_by_chain if chained else hash_vectors,
        grid=(gpu_layout.count(rows),),
        block=(min(max(padded_dim // 2, 1), _MAX_THREADS),),
        args=args,
        shared=shared,
    )
    return codes
