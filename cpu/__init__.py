"""Numba kernels for the CPU: the default on a machine without a GPU.

`lanes` is the vector type they are written in, `tiles` the Hadamard rotation of sixteen vectors at
a time, `cumulation` the two rounds over hash tables, `attention` the whole of sampled attention in
one go, `buckets` the weighted cumulation, `expectation` the exact weights, `gradients` those of
both kinds of attention by tiles of pairs, `sampled_gradients` the lower bound bucket by bucket;
`products` multiplies small matrices for them, `rows` packs and scales their rows. `compiling` keeps
machine code on disk, `threads` deals out the work.
"""

from yoso_core.cpu.attention import yoso_attention
from yoso_core.cpu.buckets import lsh_weighted_cumulation
from yoso_core.cpu.cumulation import lsh_cumulation
from yoso_core.cpu.expectation import expectation_attention
from yoso_core.cpu.gradients import expectation_attention_backward, lsh_attention_backward
from yoso_core.cpu.hashing import fast_hash, hadamard_transform, hyperplane_hash

__all__ = [
    "expectation_attention",
    "expectation_attention_backward",
    "fast_hash",
    "hadamard_transform",
    "hyperplane_hash",
    "lsh_attention_backward",
    "lsh_cumulation",
    "lsh_weighted_cumulation",
    "yoso_attention",
]
