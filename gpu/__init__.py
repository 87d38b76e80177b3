"""CUDA kernels, and the means to run and to study them on a machine without a GPU.

`cupy_kernels` holds every operation in CUDA C++, in `.cu` files with their launchers.
`numba_kernels` holds some of them in Python. `emulator` runs both on a CPU. `device` and `layout`
are shared: a launcher is written once and runs on any `Device`.
"""

from yoso_core.gpu.device import (
    CudaKernel,
    CudaVariant,
    Device,
    DoesNotFit,
    KernelText,
    Launch,
    NumbaCudaVariant,
    launches,
)

__all__ = [
    "CudaKernel",
    "CudaVariant",
    "Device",
    "DoesNotFit",
    "KernelText",
    "Launch",
    "NumbaCudaVariant",
    "launches",
]
