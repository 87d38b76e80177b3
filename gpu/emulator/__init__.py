"""Runs the CUDA C++ kernels of this project on a CPU, from the same source, so that they can be
tested and watched on any machine.

The host's compiler turns a `.cu` file into a library. The kernel's threads are fibers of one real
thread: each runs until it ends or meets a barrier or an operation of its warp, then another fiber
has its turn. The order of turns is chosen. So a run can be repeated bit by bit, and a result that
depends on the order shows under another one (`order`).

>>> import numpy as np
>>> from yoso_core.gpu import KernelText
>>> from yoso_core.gpu.emulator import Emulator
>>> twice = KernelText('''
... extern "C" __global__ void twice(const float* x, float* y, int n) {
...   const int i = blockIdx.x * blockDim.x + threadIdx.x;
...   if (i < n) y[i] = 2 * x[i];
... }''', "twice")
>>> x, y = np.arange(100, dtype=np.float32), np.empty(100, np.float32)
>>> Emulator().launch(twice, grid=(4,), block=(32,), args=(x, y, np.int32(100)))
>>> bool((y == 2 * x).all())
True

**Every launch reports** these faults, as a `KernelFault` that names kernel, block, thread, file and
line: threads of a block that meet barriers at different lines; an exited thread in the mask of a
shuffle or vote; a lane that is not in its own mask, or reads one that is not; lanes that do one
operation at different lines; deadlocks; too much shared memory, and launches that a GPU would
refuse; failed assertions, traps, integer division by zero, null pointers and other accesses that
the operating system stops. Shared memory begins every block as NaN (integers: -1).

**Special builds report more.** They are up to fifty times slower for kernels that do little but
move data.

- `checked`: any access outside every array, to the byte; vectors at addresses that are not a
  multiple of their size; reads of shared memory that no thread has written; races in shared and
  global memory, whether or not the order of turns lets them show. `__syncthreads` orders the
  threads of a block, and `__syncwarp` the lanes in its mask. Shuffles and votes order nothing,
  atomics order only themselves, fences order nothing.
- `count_traffic`: bytes, 32-byte sectors, bank conflicts, colliding atomics, barriers and shuffles,
  for each launch and each line.
- `sanitized`: AddressSanitizer and ThreadSanitizer, in a child process.

**It cannot show** time, occupancy and registers; the weak order of memory, and threads that really
run together; that `-ftz=true` flushes subnormal floats to zero; the last bit of `expf` and the
like, which differs from the device's, and of products and sums that the device's compiler fuses. A
kernel does not compile here if it uses `__activemask`, inline PTX, textures, cooperative groups or
dynamic parallelism. Two barriers in one line count as the same barrier. A thread that spins until
another has done something never ends. A kernel that writes outside every array, where nothing stops
it, may corrupt the process: use `checked` to find such writes.

It needs Linux or macOS and a C++17 compiler (``$CXX``, g++ or clang++); `missing` gives the reason
if it cannot run. The special builds need Linux and g++, which the tests use, too. Libraries are
kept in ``$YOSO_CORE_CACHE``, or ``~/.cache/yoso_core``; the folder may be deleted at any time. One
launch runs at a time; a Ctrl-C ends it as soon as no thread has its turn.
"""

from yoso_core.gpu.emulator.build import missing
from yoso_core.gpu.emulator.common import KernelFault, order
from yoso_core.gpu.emulator.emulator import Emulator
from yoso_core.gpu.emulator.sanitizers import Report, sanitized
from yoso_core.gpu.emulator.traffic import LineTraffic, Traffic, TrafficLog, checked, count_traffic

__all__ = [
    "Emulator",
    "KernelFault",
    "LineTraffic",
    "Report",
    "Traffic",
    "TrafficLog",
    "checked",
    "count_traffic",
    "missing",
    "order",
    "sanitized",
]
