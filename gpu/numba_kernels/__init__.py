"""CUDA kernels in Python. They use shared memory, barriers and atomics, and no warp intrinsics, so
that a simulator can step through them.
"""
