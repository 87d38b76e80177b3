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

**Nothing that a kernel does ends or freezes the process.** A kernel works on copies of its arrays,
between pages that are not there, and they go back when the launch has ended well. A fault is a
`KernelFault` that names kernel, block, thread, file, line and index (``x[1000] read, x has 1000
entries``); the next launch works. A Ctrl-C, or ``Emulator(timeout=...)``, ends a kernel within a
second, and says where it was.

**Every launch reports**

- accesses past the end of an array, and writes before it; an index outside an array of known size,
  shared, local or a variable; null pointers; local memory that overflows; ``__constant__``
  variables that were never set;
- threads of a block that meet different barriers; an exited thread in the mask of a shuffle or
  vote; a lane that is not in its own mask, or reads one that is not; lanes that do one operation at
  different lines; deadlocks;
- threads that never end: a thread that waits for another one, by reading or by an atomic, lets the
  others go first, and it is a fault if none of the block can go on (on x86-64; elsewhere only if it
  waits by an atomic);
- too much shared memory, and launches that a GPU would refuse;
- failed assertions, traps, integer division by zero, and functions that end without their result.

Shared memory begins every block as NaN (integers: -1); so does what is read before an array.

**Special builds report more.** They are up to fifty times slower for kernels that do little but
move data.

- `checked`: any access outside every array, at its first entry; vectors at addresses that are not a
  multiple of their size; reads of shared memory that no thread has written; overflows of int;
  barriers that a thread has ended without, which hardware lets pass; races in shared and global
  memory, whether or not the order of turns lets them show. `__syncthreads` orders the threads of a
  block, and `__syncwarp` the lanes in its mask. Shuffles and votes order nothing. What a thread did
  before a fence is ordered before what another one does, behind its own fence or barrier, after it
  has read an atomic, or a volatile in global memory, that the first wrote after its fence. A plain
  read beside an atomic is reported unless an atomic of the same thread follows on the same place,
  as in a loop of `atomicCAS`.
- `count_traffic`: bytes, 32-byte sectors, bank conflicts, colliding atomics, barriers and shuffles,
  for each launch and each line.
- `sanitized`: AddressSanitizer and ThreadSanitizer, in a child process.

**What C++ leaves open and PTX defines is as in PTX**: conversions of floats out of the range of an
integer, shifts by more than there are bits, the least and largest of NaN and a number. (On other
processors than x86-64, such a shift is a fault.)

**It cannot show** time, occupancy and registers; the weak order of memory, and threads that really
run together; that `-ftz=true` flushes subnormal floats to zero; the last bit of `expf` and the
like, which differs from the device's, and of products and sums that the device's compiler fuses.
`checked` does not look for races on `__device__` variables. A kernel does not compile here if it
uses `__activemask`, inline PTX, textures, cooperative groups or dynamic parallelism. Blocks run one
after another, so none can wait for a later one. A pointer that a kernel makes up from a number may
hit Python's own memory: only `checked` stops that.

The copies and the checks of every launch take up to half as long again as a kernel by itself that
does little but move data or update atomically, a quarter for one that sorts, and a tenth for those
that mostly compute.

It needs Linux or macOS and a C++17 compiler (``$CXX``, g++ or clang++); `missing` gives the reason
if it cannot run. The special builds need Linux and g++, which the tests use, too. Libraries are
kept in ``$YOSO_CORE_CACHE``, or ``~/.cache/yoso_core``; the folder may be deleted at any time. One
launch runs at a time.
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
