"""The definition of every operation, in NumPy alone: read it to know what is right.

Functions here trust their arguments. The public functions of `yoso_core` check theirs first.
"""

from yoso_core.reference.attention import yoso_attention
from yoso_core.reference.cumulation import (
    backward_rates,
    collision_rate,
    lsh_cumulation_pairs,
    lsh_cumulation_tables,
    lsh_weighted_cumulation_pairs,
    lsh_weighted_cumulation_tables,
)
from yoso_core.reference.expectation import (
    angles,
    expectation_attention,
    expectation_attention_backward,
    expected_weight,
    gradient_factor,
    lsh_attention_backward,
)
from yoso_core.reference.hadamard import hadamard_transform
from yoso_core.reference.hashing import (
    HashLayout,
    Layout,
    fast_hash,
    hash_layout,
    hyperplane_hash,
    least_rotations,
    sample_planes,
    sample_signs,
)
from yoso_core.reference.normalize import TINY_NORM, l2_normalize, l2_normalize_backward
from yoso_core.reference.smoothing import smooth_table, smooth_table_pairs, smoothing_additions, smoothing_weights

__all__ = [
    "TINY_NORM",
    "HashLayout",
    "Layout",
    "angles",
    "backward_rates",
    "collision_rate",
    "expectation_attention",
    "expectation_attention_backward",
    "expected_weight",
    "fast_hash",
    "gradient_factor",
    "hadamard_transform",
    "hash_layout",
    "hyperplane_hash",
    "l2_normalize",
    "l2_normalize_backward",
    "least_rotations",
    "lsh_attention_backward",
    "lsh_cumulation_pairs",
    "lsh_cumulation_tables",
    "lsh_weighted_cumulation_pairs",
    "lsh_weighted_cumulation_tables",
    "sample_planes",
    "sample_signs",
    "smooth_table",
    "smooth_table_pairs",
    "smoothing_additions",
    "smoothing_weights",
    "yoso_attention",
]
