"""CUDA kernels in Python: shared memory, barriers and atomics, and no warp intrinsics, so that a
simulator can step through them.
"""
