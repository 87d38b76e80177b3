"""CUDA kernels, and the means to run and to study them on a machine without a GPU.

`cupy_kernels` holds the CUDA C++ of every operation in `.cu` files with their launchers,
`numba_kernels` the same ideas in Python, `emulator` runs both on the CPU. `device` is what they
have in common: a launcher is written once and runs on any `Device`.
"""

from yoso_core.gpu.device import CudaKernel, Device, DoesNotFit, Launch, launches

__all__ = ["CudaKernel", "Device", "DoesNotFit", "Launch", "launches"]
