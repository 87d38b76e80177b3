"""CUDA C++ kernels and their launchers.

The `.cu` files hold the kernels: `hashing` and `hyperplanes` the two hashes, `cumulation` and
`weighted` the two cumulations, `sort` what the sorted ones share, `expectation` the exact weights,
`gradients` those of both kinds of attention, `attention` what stands around them. A launcher in the
`.py` file of the same name takes the device first, then the arguments of the reference. `source`
makes one text of a file and its headers, `cuda` launches it on a GPU through CuPy;
`yoso_core.gpu.emulator` runs the same text on the CPU.
"""

from yoso_core.gpu.cupy_kernels.attention import yoso_attention_shared_table, yoso_attention_sorted_buckets
from yoso_core.gpu.cupy_kernels.cumulation import (
    lsh_cumulation_global_table,
    lsh_cumulation_shared_table,
    lsh_cumulation_sorted_buckets,
)
from yoso_core.gpu.cupy_kernels.expectation import expectation_attention_blocked
from yoso_core.gpu.cupy_kernels.gradients import expectation_attention_backward_blocked, lsh_attention_backward_outer_products
from yoso_core.gpu.cupy_kernels.hashing import (
    fast_hash_block_per_part,
    fast_hash_warp_per_vector,
    hyperplane_hash_thread_per_code,
)
from yoso_core.gpu.cupy_kernels.weighted import (
    lsh_weighted_cumulation_outer_products,
    lsh_weighted_cumulation_sorted_pairs,
    lsh_weighted_cumulation_weight_by_weight,
)

__all__ = [
    "expectation_attention_backward_blocked",
    "expectation_attention_blocked",
    "fast_hash_block_per_part",
    "fast_hash_warp_per_vector",
    "hyperplane_hash_thread_per_code",
    "lsh_attention_backward_outer_products",
    "lsh_cumulation_global_table",
    "lsh_cumulation_shared_table",
    "lsh_cumulation_sorted_buckets",
    "lsh_weighted_cumulation_outer_products",
    "lsh_weighted_cumulation_sorted_pairs",
    "lsh_weighted_cumulation_weight_by_weight",
    "yoso_attention_shared_table",
    "yoso_attention_sorted_buckets",
]
