"""Numba kernels for the CPU: the default on a machine without a GPU.

How they are written: `compiling` keeps machine code on disk; `lanes` is their vector type;
`scratch` and `views` are their memory and how they see the caller's; `threads` deals out the work.

What they do, from the hash to the gradients:

- `hashing`: codes, with `tiles`, the Hadamard rotation of sixteen vectors at a time.
- `cumulation`: tables of the buckets, in two `rounds` over `tables`, and `attention`: the whole of
  sampled attention. `codes` are stored ones, or made for the heads at hand; `smoothing` averages
  tables over their neighbors, and `neighbors` reads those where the tables would be large.
  `relabeling` numbers the buckets anew where there are too many, and `finishing` gives output rows
  their last touch.
- `buckets`: the weighted cumulation, of rows that are `sorting` by bucket.
- `expectation`: the exact weights, by `spans` of queries and tiles of pairs, with `weights`.
- `gradients`: those of both kinds of attention by tiles of pairs, and `sampled_gradients`: the
  lower bound bucket by bucket. `products` multiplies small matrices for them, `rows` packs and
  scales their rows.

Short names mean the same in every file. ``head`` is the pair (batch, head), and ``x[(*head, i)]``
a row of it; ``head_index`` counts heads through all batches. ``i`` is a query or any row, ``j`` a
key, ``c`` a coordinate; ``t`` and ``u`` are rows of a tile. An *offset* is where a row begins in a
flat array. ``keep`` is a mask, ``nonfinite`` marks what holds an infinity or NaN.
"""

from yoso_core.cpu.attention import yoso_attention
from yoso_core.cpu.buckets import lsh_weighted_cumulation
from yoso_core.cpu.cumulation import lsh_cumulation
from yoso_core.cpu.expectation import expectation_attention
from yoso_core.cpu.gradients import expectation_attention_backward, lsh_attention_backward
from yoso_core.cpu.hashing import fast_hash, hadamard_transform, hyperplane_hash
from yoso_core.cpu.smoothing import smooth_table

__all__ = [
    "expectation_attention",
    "expectation_attention_backward",
    "fast_hash",
    "hadamard_transform",
    "hyperplane_hash",
    "lsh_attention_backward",
    "lsh_cumulation",
    "lsh_weighted_cumulation",
    "smooth_table",
    "yoso_attention",
]
