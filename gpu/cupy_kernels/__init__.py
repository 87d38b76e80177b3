"""CUDA C++ kernels and their launchers.

The kernels are in `.cu` files: `hashing` and `hyperplanes` for the two hashes, `cumulation` and
`weighted` for the two cumulations, `smoothing` for smoothed tables, `sort` for the sorted variants
of both cumulations, `expectation` for the expected weights, `gradients` for both kinds of
attention, and `attention` for the whole. Their launchers are in `.py` files of the same name,
except that `hashing.py` has both hashes and `sorting.py` launches `sort.cu`. A launcher takes the
device first, then the arguments of the reference.

`source` joins a file and its headers into one text. `cuda` compiles that text and launches it on a
GPU through CuPy. `yoso_core.gpu.emulator` runs the same text on a CPU.
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
from yoso_core.gpu.cupy_kernels.smoothing import smooth_table_spheres
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
    "smooth_table_spheres",
    "yoso_attention_shared_table",
    "yoso_attention_sorted_buckets",
]
