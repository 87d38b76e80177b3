# %% [markdown]
# # 6. Kernels in CUDA C++
#
# **You will be able to** read and write a kernel in CUDA C++, launch it with CuPy, use what a warp
# can do without shared memory, and judge kernels by the memory traffic that they cause.
#
# **Time:** 60 minutes, and 40 for the exercises.
#
# **You need:** tutorial 5, and Linux with `g++`. No GPU, and no C++: its few words come as we go.
#
# **Source:** [`hashing.cu`](../gpu/cupy_kernels/hashing.cu),
# [`cumulation.cu`](../gpu/cupy_kernels/cumulation.cu) and
# [`yoso_core.gpu.emulator`](../gpu/emulator/__init__.py); section 3.2 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import math

import numpy as np
from matplotlib.patches import Rectangle

import yoso_core
from yoso_core import draw
from yoso_core.gpu import CudaVariant, KernelText
from yoso_core.gpu.catalog import CUDA_FOLDER, catalog
from yoso_core.gpu.emulator import Emulator, checked, count_traffic, order
from yoso_core.gpu.emulator.build import missing_for_counting

if missing_for_counting():
    raise RuntimeError(missing_for_counting())
draw.use_look()
rng = np.random.default_rng(6)

# %% [markdown]
# ## The same kernel, twice
#
# This is the guarded addition of tutorial 5. In Python:
#
# ```python
# @cuda.jit
# def add(x, y, out):
#     i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
#     if i < out.shape[0]:
#         out[i] = x[i] + y[i]
# ```
#
# And in CUDA C++, as a text in Python:

# %%
ADD = """
extern "C" __global__ void add(const float* x, const float* y, float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = x[i] + y[i];
}
"""

# %% [markdown]
# What is new is quickly said.
#
# | | |
# |---|---|
# | `extern "C" __global__ void` | this function is a kernel, and keeps its plain name |
# | `float* out` | a *pointer*: an address where floats lie. It knows no shape and no length |
# | `const float* x` | the same, and we promise only to read |
# | `int n` | so the length must come as an argument of its own |
# | `const int i = ...;` | a variable with its type; it will not change |
# | `{ }` and `;` | what indentation and line ends are in Python |
#
# A matrix is one long row, too: entry `(i, c)` of an `n` by `d` matrix is `x[i * d + c]`.
#
# With CuPy, a text becomes a kernel by `RawKernel`. This function is all it takes to run one on a
# GPU; it is here to be read, and used below if you have one.


# %%
def launch_on_gpu(text, name, grid, block, args, shared=0):
    """Copy the arguments to the GPU, run the kernel there, and return the arguments as they are
    afterwards.
    """
    import cupy

    kernel = cupy.RawKernel(text, name)  # compiled at its first launch
    on_gpu = [cupy.asarray(x) if isinstance(x, np.ndarray) else x for x in args]
    kernel(grid, block, tuple(on_gpu), shared_mem=shared)
    return [x.get() if isinstance(x, cupy.ndarray) else x for x in on_gpu]


gpu_missing = next(variant.reason for variant in yoso_core.variants("lsh_cumulation") if variant.name == "cupy:global_table")
print("A GPU runs along." if gpu_missing is None else "No GPU can be used here: the emulator runs every kernel.")

# %% [markdown]
# Without a GPU we use the library's *emulator*. It compiles the very same text with `g++` and runs
# its threads on the CPU, in an order that we choose, and reports what a kernel does wrong. `run`
# below uses it for every kernel of this tutorial, in three orders; where a GPU is found, it must
# agree.

# %%
emulator = Emulator()


def run(text, name, grid, block, args, shared=0):
    """Run a kernel in the emulator, in three orders that must agree. The arrays among the
    arguments change as they would on a GPU.
    """
    results = []
    for chosen in ("reverse", 1, "forward"):
        copies = [x.copy() for x in args]
        with order(chosen):
            emulator.launch(KernelText(text, name), grid, block, copies, shared)
        results.append(copies)
    if gpu_missing is None:
        results.append(launch_on_gpu(text, name, grid, block, args, shared))
    for array, *found in zip(args, *results, strict=True):
        assert all(np.allclose(x, found[0], rtol=1e-5, atol=1e-6) for x in found)
        if isinstance(array, np.ndarray):
            array[...] = found[2]


def unwritten(*shape):
    """New memory, full of NaN: what no thread writes stays visible."""
    return np.full(shape, np.nan, np.float32)


x, y, out = np.arange(100, dtype=np.float32), np.full(100, 1000, np.float32), unwritten(100)
run(ADD, "add", (4,), (32,), (x, y, out, np.int32(100)))
assert np.array_equal(out, x + y)

# %% [markdown]
# One thing is stricter than in Python: a kernel reads the bytes of its arguments as the types that
# it declares. An `int` is four bytes, so it must be an `np.int32`. A GPU reads the four bytes that
# it expects, whatever was passed, and says nothing. The emulator asks.

# %%
try:
    run(ADD, "add", (4,), (32,), (x, y, out, np.int64(100)))
except TypeError as found:
    refused = found
print(refused)
assert "got a int64 scalar, must be int32" in str(refused)

# %% [markdown]
# ## A warp moves memory together
#
# Tutorial 5 left out one level. 32 threads with neighboring numbers form a *warp*. A warp does each
# instruction *together*: when one of its threads, called *lanes*, reads memory, all 32 read. (Where
# an `if` parts them, one side waits for the other.) And memory is handed out in pieces of 32 bytes,
# called *sectors*: eight floats.
#
# So what a read costs depends on where the lanes look. Here are eight lanes that read
# `x[i * stride]`; dashed lines are the borders of sectors.

# %%
STRIDED = """
extern "C" __global__ void copy_strided(const float* x, float* out, int stride) {
  const int i = threadIdx.x;
  out[i] = x[i * stride];
}
"""


def sectors_read(threads, stride):
    """Counted by the emulator: the sectors that a block of these threads touches to read."""
    x, out = np.arange(1024, dtype=np.float32), unwritten(threads)
    with count_traffic() as counted:
        emulator.launch(KernelText(STRIDED, "copy_strided"), (1,), (threads,), (x, out, np.int32(stride)))
    assert np.array_equal(out, x[::stride][:threads])
    return counted.total.global_sectors - threads // 8  # the writes lie side by side


figure, panels = draw.picture(2, width=9, height=2.7, sharey=True)
for axes, stride in zip(panels, (1, 4), strict=True):
    draw.traffic(axes, [(i, i * stride, "read") for i in range(8)], threads=8, addresses=32, line=8)
    touched = len({i * stride // 8 for i in range(8)})
    assert sectors_read(8, stride) == touched
    axes.set(title=f"stride {stride}: {touched} sector{'s' if touched > 1 else ''}", xlabel="float in memory")
    axes.set_ylabel("lane" if stride == 1 else "")
figure

# %% [markdown]
# Both read the same eight numbers' worth of data; the right one makes the memory hand out four
# times as much. Neighboring threads should read neighboring addresses. It has a name: the accesses
# are *coalesced*.
#
# Shared memory has a rule of its own. It has 32 *banks*, and float number $a$ lies in bank $a \bmod
# 32$. In one turn, each bank serves one address. Lanes that want different floats of one bank wait
# for each other: a *bank conflict*.

# %%
BANKS = """
extern "C" __global__ void read_shared(float* out, int stride) {
  __shared__ float buffer[33 * 32];
  for (int i = threadIdx.x; i < 33 * 32; i += 32) buffer[i] = i;
  __syncthreads();
  out[threadIdx.x] = buffer[threadIdx.x * stride];
}
"""


def turns(stride):
    """Counted by the emulator: how many turns the banks take for one read by a warp."""
    out = unwritten(32)
    with count_traffic() as counted:
        emulator.launch(KernelText(BANKS, "read_shared"), (1,), (32,), (out, np.int32(stride)))
    assert np.array_equal(out, np.arange(32) * stride)
    return counted.total.shared_wavefronts - 33  # filling the buffer takes a turn for each 32 floats


strides = np.arange(1, 34)
global_sectors = [sectors_read(32, int(stride)) for stride in strides if stride <= 32]
bank_turns = [turns(int(stride)) for stride in strides]
assert global_sectors == [min(4 * stride, 32) for stride in strides[:32]]
assert bank_turns == [math.gcd(stride, 32) for stride in strides]

figure, (left, right) = draw.picture(2, width=9, height=3.2)
left.plot(strides[:32], global_sectors, "o", color=draw.BLUE, markersize=5)
left.set(title="Global memory: sectors for a warp", xlabel="stride", ylabel="sectors", ylim=(0, 35))
right.bar(strides, bank_turns, color=draw.ORANGE, edgecolor=draw.INK, linewidth=0.5)
right.set(title="Shared memory: turns for a warp", xlabel="stride", ylabel="turns", xticks=[1, 8, 16, 24, 33])
left.set_xticks([1, 8, 16, 24, 32])
for axes in (left, right):
    axes.grid(True, axis="y")
figure

# %% [markdown]
# Left: the price rises with the stride until every lane has a sector of its own. Right: only what
# the stride has in common with 32 counts, $\gcd(s, 32)$ turns. A column of a 32 by 32 matrix,
# stride 32, takes 32 turns; make each row one float longer, stride 33, and it takes one. The
# library does so where it transposes codes, in [`sort.cu`](../gpu/cupy_kernels/sort.cu).
#
# ## Shuffles: butterflies without shared memory
#
# Lanes of a warp can read each other's variables. `__shfl_xor_sync(mask, x, stride)` gives a lane
# the `x` of the lane whose number differs in the bit `stride` ("xor"). The mask names the lanes
# that take part, one bit each; `0xffffffff` is all 32.
#
# That is a butterfly's partner. Five shuffles connect all 32 lanes:

# %%
PARTNERS = """
extern "C" __global__ void partners(int* out) {
  const int lane = threadIdx.x;
  for (int stage = 0; stage < 5; ++stage) {
    out[stage * 32 + lane] = __shfl_xor_sync(0xffffffffu, lane, 16 >> stage);
  }
}
"""
partner = np.full((5, 32), -1, np.int32)
run(PARTNERS, "partners", (1,), (32,), (partner,))

figure, panels = draw.picture(5, width=9, height=2.5, sharey=True)
for axes, stage in zip(panels, range(5), strict=True):
    assert np.array_equal(partner[stage], np.arange(32) ^ (16 >> stage))
    axes.plot(partner[stage], np.arange(32), "o", color=draw.BLUE, markersize=3)
    axes.set(
        title=f"stride {16 >> stage}", xlabel="reads lane", xlim=(-1, 32), ylim=(32, -1), xticks=[0, 16, 31], yticks=[0, 8, 16, 24, 31]
    )
    axes.set_aspect("equal")
    axes.grid(True)
panels[0].set_ylabel("lane")
figure

# %% [markdown]
# So here is the Hadamard transform of 32 numbers twice: once through shared memory, as in tutorial
# 5, and once by shuffles. The upper partner takes lower minus upper. `a ? b : c` is C++ for
# `b if a else c`, and `lane & stride` is not 0 where that bit of the lane is set.

# %%
HADAMARD = """
extern "C" __global__ void through_shared_memory(float* vectors) {
  __shared__ float entry[32];
  const int lane = threadIdx.x;
  float x = vectors[blockIdx.x * 32 + lane];
  for (int stride = 16; stride > 0; stride /= 2) {
    __syncthreads();   // the stage before has been read
    entry[lane] = x;
    __syncthreads();   // this one has been written
    const float other = entry[lane ^ stride];
    x = lane & stride ? other - x : x + other;
  }
  vectors[blockIdx.x * 32 + lane] = x;
}

extern "C" __global__ void by_shuffles(float* vectors) {
  const int lane = threadIdx.x;
  float x = vectors[blockIdx.x * 32 + lane];
  for (int stride = 16; stride > 0; stride /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, x, stride);
    x = lane & stride ? other - x : x + other;
  }
  vectors[blockIdx.x * 32 + lane] = x;
}
"""
vectors = rng.standard_normal((10, 32), dtype=np.float32)
for name in ("through_shared_memory", "by_shuffles"):
    transformed = vectors.copy()
    run(HADAMARD, name, (10,), (32,), (transformed,))
    assert np.array_equal(transformed, yoso_core.hadamard_transform(vectors)), "the same float, bit by bit"

with count_traffic() as counted:
    for name in ("through_shared_memory", "by_shuffles"):
        emulator.launch(KernelText(HADAMARD, name), (10,), (32,), (vectors.copy(),))
print(counted)
through_shared, by_shuffles = counted.kernels
assert (through_shared.barriers, through_shared.shared_accesses, through_shared.shuffles) == (100, 100, 0)
assert (by_shuffles.barriers, by_shuffles.shared_accesses, by_shuffles.shuffles) == (0, 0, 50)

# %% [markdown]
# `count_traffic` counts what every launch in its body moves. For ten vectors, a hundred barriers
# and a hundred accesses to shared memory have become fifty shuffles. A lane's numbers stay in its
# registers, the nearest memory there is.
#
# ## Ballots: 32 signs in one instruction
#
# Hashing needs only the *signs* of the rotated vector. `__ballot_sync(mask, condition)` asks all
# lanes a yes-or-no question and gives each of them the answers as one number of 32 bits: bit $l$ is
# what lane $l$ said.
#
# That makes a whole hash for vectors of 32 dims, in the paper's layout, whose codes stand next to
# each other: three times signs and butterflies, one ballot, and the word cut into codes of 8 bits.
# Blocks are four warps of 32 lanes, `(32, 4)`, each warp with a vector of its own. `a >> b` drops
# the lowest b bits.

# %%
HASH = """
extern "C" __global__ void hash_vectors(const float* vectors, const signed char* signs, int* codes, int n) {
  const int lane = threadIdx.x;
  const int vector = blockIdx.x * blockDim.y + threadIdx.y;
  if (vector >= n) return;                        // the whole warp leaves
  float x = vectors[vector * 32 + lane];
  for (int round = 0; round < 3; ++round) {
    x *= signs[round * 32 + lane];
    for (int stride = 16; stride > 0; stride /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, x, stride);
      x = lane & stride ? other - x : x + other;
    }
  }
  const unsigned word = __ballot_sync(0xffffffffu, x > 0);
  if (lane < 4) codes[vector * 4 + lane] = word >> (8 * lane) & 255;
}
"""
signs = yoso_core.sample_signs(4, 8, 32, layout="paper", rng=0)  # (3 rounds, 1 part, 32)
codes = np.full((10, 4), -1, np.int32)
run(HASH, "hash_vectors", (3,), (32, 4), (vectors, signs, codes, np.int32(10)))
assert np.array_equal(codes, yoso_core.fast_hash(vectors, signs, 4, 8, layout="paper"))

rotated = vectors[0]
for diagonal in signs[:, 0]:
    rotated = yoso_core.hadamard_transform(rotated * diagonal)
bits = rotated > 0
assert [sum(int(bit) << b for b, bit in enumerate(bits[8 * c : 8 * c + 8])) for c in range(4)] == codes[0].tolist()

figure, (top, bottom) = draw.picture(rows=2, width=9, height=3.6, height_ratios=(2, 1), sharex=True)
lane = np.arange(32)
top.bar(lane[bits], rotated[bits], color=draw.BLUE, edgecolor=draw.INK, linewidth=0.5, label="positive: 1")
top.bar(lane[~bits], rotated[~bits], color=draw.ORANGE, edgecolor=draw.INK, linewidth=0.5, hatch="//", label="not: 0")
top.axhline(0, color=draw.INK, linewidth=0.8)
top.set(title="A vector, rotated: one number in each lane", ylabel="value")
draw.legend_under_title(top)
for i, bit in enumerate(bits):
    bottom.add_patch(Rectangle((i - 0.45, 0), 0.9, 1, facecolor=draw.PALETTE[2 + i // 8], alpha=0.35, edgecolor=draw.INK, linewidth=0.6))
    bottom.text(i, 0.5, str(int(bit)), ha="center", va="center")
for c, code in enumerate(codes[0]):
    bottom.text(8 * c + 3.5, 1.45, f"code {c} = {code}", ha="center", va="center", fontsize=9)
bottom.set(ylim=(0, 1.9), xlim=(-0.7, 31.7), xlabel="lane; the first of a code is its lowest bit", yticks=[], xticks=range(0, 32, 2))
bottom.spines["left"].set_visible(False)
figure

# %% [markdown]
# You can now read the library's hash. `warp_per_vector` in
# [`hashing.cu`](../gpu/cupy_kernels/hashing.cu) is this kernel for any dim: a lane holds several
# entries, so that wide strides are between its own registers, and codes are cut from several words.
# Beside it stands `block_per_part`, which gives every entry a thread and goes through shared memory
# where a stride leaves the warp.
#
# Both can be called by name; `emulated:` runs them here. 64 vectors of 64 dims, 32 codes of 8 bits,
# in the paper's layout still.

# %%
x = rng.standard_normal((64, 64), dtype=np.float32)
signs = yoso_core.sample_signs(32, 8, 64, layout="paper", rng=1)  # 4 parts: each gives 8 codes
codes = yoso_core.fast_hash(x, signs, 32, 8, layout="paper")
with count_traffic() as counted:
    for name in ("emulated:warp_per_vector", "emulated:block_per_part"):
        assert np.array_equal(yoso_core.fast_hash(x, signs, 32, 8, layout="paper", variant=name), codes)
by_warp, by_block = counted.kernels
assert by_warp.barriers == 0
assert by_warp.global_read_bytes == 64 * (64 * 4 + 4 * 3 * 64), "each vector once, and a byte for each sign"
assert by_block.global_read_bytes == 64 * 4 * (64 * 4 + 3 * 64), "each vector once for each part"

figure, panels = draw.picture(4, width=9, height=2.7)
measures = {"kB read": "global_read_bytes", "barriers": "barriers", "shared accesses": "shared_accesses", "shuffles": "shuffles"}
for axes, (title, field) in zip(panels, measures.items(), strict=True):
    heights = [getattr(kernel, field) / (1000 if title == "kB read" else 1) for kernel in (by_warp, by_block)]
    for place, (height, color, hatch) in enumerate(zip(heights, (draw.BLUE, draw.ORANGE), ("", "//"), strict=True)):
        bar = axes.bar(place, height, 0.7, color=color, hatch=hatch, edgecolor=draw.INK)
        axes.bar_label(bar, fmt="{:,.0f}", fontsize=8.5)
    axes.set(title=title, ylim=(0, 1.18 * max(heights)), yticks=[])
    axes.set_xticks([0, 1], ["warp per\nvector", "block per\npart"])
    axes.spines["left"].set_visible(False)
figure

# %% [markdown]
# The warp reads less, never waits, and shuffles less. It is what the library picks on a GPU, and
# this picture is why.
#
# The library's default layout, one chain of rotations, has a kernel of its own, `warp_per_chain`.
# It keeps the vector in registers through the whole chain. It has no use for ballots: neighboring
# lanes hold bits of neighboring *codes* there (tutorial 3), so each lane puts its bits into the
# codes, by an atomic in shared memory. A chain takes fewer rounds for as many codes, so it shuffles
# less again:

# %%
signs = yoso_core.sample_signs(32, 8, 64, rng=1)  # a chain: 4 rotations from 7 rounds
with count_traffic() as counted:
    codes = yoso_core.fast_hash(x, signs, 32, 8, variant="emulated:warp_per_vector")
assert np.array_equal(codes, yoso_core.fast_hash(x, signs, 32, 8, variant="numpy:formula"))
(by_chain,) = counted.kernels
assert by_chain.global_read_bytes == 64 * (64 * 4 + 7 * 64), "each vector once, and a byte for each sign"
assert by_warp.shuffles == 64 * (12 * 10 + 5), "12 rounds, two entries to a lane; and five to look for huge entries"
assert by_chain.shuffles == 64 * (7 * 10 + 5), "7 rounds"
print(f"{by_warp.shuffles:,} shuffles in the paper's layout, {by_chain.shuffles:,} in a chain")

# %% [markdown]
# ## Three ways to cumulate
#
# The sum over buckets of tutorial 4 leaves more freedom. This library has three kernels for it,
# which agree on the result and differ in where the table stands.
#
# **1. A table in global memory** is the paper's way, and your scatter of tutorial 5. There the
# neighbors in a block shared a key and took different dims. Does it matter? Here is the other way
# round, a lane for each key, beside it.

# %%
SCATTER = """
extern "C" __global__ void a_lane_per_key(const int* code, const float* value, float* table, int n, int d) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  for (int dim = 0; dim < d; ++dim) atomicAdd(&table[code[key] * d + dim], value[key * d + dim]);
}

extern "C" __global__ void a_lane_per_dim(const int* code, const float* value, float* table, int n, int d) {
  const int key = blockIdx.x * blockDim.y + threadIdx.y, dim = threadIdx.x;
  if (key < n && dim < d) atomicAdd(&table[code[key] * d + dim], value[key * d + dim]);
}
"""
n, d, buckets = 256, 32, 64
skews = (0, 0.2, 0.4, 0.6, 0.8)
value = rng.integers(-9, 10, size=(n, d)).astype(np.float32)
sectors, colliding = {}, {}
for name, grid, block in (("a_lane_per_key", (n // 32,), (32,)), ("a_lane_per_dim", (n // 8,), (32, 8))):
    moved = []
    for skew in skews:  # this share of the keys has code 0, the rest any
        code = np.where(np.arange(n) % 10 < 10 * skew, 0, rng.integers(0, buckets, size=n)).astype(np.int32)
        table = np.zeros((buckets, d), np.float32)
        with count_traffic() as counted:
            emulator.launch(KernelText(SCATTER, name), grid, block, (code, value, table, np.int32(n), np.int32(d)))
        expected = np.zeros_like(table)
        np.add.at(expected, code, value)
        assert np.array_equal(table, expected)
        moved.append(counted.total)
    sectors[name] = moved[0].global_sectors
    colliding[name] = [traffic.global_atomic_collisions / traffic.global_atomics for traffic in moved]

assert sectors["a_lane_per_dim"] == n * (1 + 4 + 4), "for each key one code, 32 values, 32 sums"
assert sectors["a_lane_per_key"] > 6 * sectors["a_lane_per_dim"]
assert colliding["a_lane_per_dim"] == [0] * 5
assert np.all(np.diff(colliding["a_lane_per_key"]) > 0)

figure, (left, right) = draw.picture(2, width=9, height=3)
for number, name in enumerate(sectors):
    bar = left.barh(number, sectors[name], 0.6, color=draw.PALETTE[number], hatch=("//", "")[number], edgecolor=draw.INK)
    left.bar_label(bar, fmt="{:,.0f}", padding=3, fontsize=8.5)
    right.plot(skews, colliding[name], color=draw.PALETTE[number], marker=draw.MARKERS[number], label=name)
left.set_yticks([0, 1], list(sectors))
left.set(title="Sectors, 256 keys", xlim=(0, 1.2 * max(sectors.values())), ylim=(1.5, -0.5))
left.set_xticks(range(0, 20_000, 5000))
left.xaxis.set_major_formatter("{x:,.0f}")
right.set(title="Colliding share of the additions", xlabel="share of the keys in one bucket", ylabel="share", ylim=(-0.05, 1))
right.legend(loc="upper left")
right.grid(True)
figure

# %% [markdown]
# With a lane per key, each lane walks through a row of its own, and each atomic of a warp goes to
# up to 32 far places. Worse, where lanes have keys with one code, their additions *collide*: they
# are for one address in one instruction, and go one after the other. With a lane per dim neither
# can happen.
#
# Here is the library's. `ACC` and `VALUE` stand for `float`, `long long` is an int of 8 bytes;
# `kept` asks the mask, `in_range` guards the code, `widen` makes a float of a half, and
# `__restrict__` promises that these arrays do not overlap. A lane takes one of 32 value dims.

# %%
print(next(kernel.text for kernel in catalog() if kernel.name == "global_table_scatter"))

# %% [markdown]
# **2. A table in shared memory** can do without atomics. Cut the table into *columns*, one for each
# pair of a hash and a value dim, and give each column to *one* thread. It adds all keys to its
# column itself, in order, so nobody can interfere. Columns lie side by side, so neighboring threads
# are in neighboring banks, whatever the codes. And since a column's reader is its writer, not even
# a barrier is needed.
#
# With 32 hashes a warp holds all columns of one value dim, and the sum over the hashes is five
# shuffles. It fits on half a page. The library's
# [`shared_table`](../gpu/cupy_kernels/cumulation.cu) is this idea with more work in flight.

# %%
COLUMNS = """
// A block takes one value dim, lane h takes hash h of 32. Codes (n, 32), value and out (n, d).
extern "C" __global__ void a_column_each(const int* query_code, const int* key_code, const float* value, float* out,
                                         int n, int d, int buckets) {
  extern __shared__ float table[];   // as many bytes as the launch asks for: `buckets` rows of 32 columns
  const int lane = threadIdx.x, dim = blockIdx.x;
  for (int bucket = 0; bucket < buckets; ++bucket) table[bucket * 32 + lane] = 0;
  for (int key = 0; key < n; ++key) table[key_code[key * 32 + lane] * 32 + lane] += value[key * d + dim];
  for (int query = 0; query < n; ++query) {
    float sum = table[query_code[query * 32 + lane] * 32 + lane];
    for (int stride = 16; stride > 0; stride /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, stride);
    if (lane == 0) out[query * d + dim] = sum / 32;
  }
}
"""
n, m, tau, d = 100, 32, 6, 5
query_code, key_code = rng.integers(0, 2**tau, size=(2, n, m)).astype(np.int32)
value, out = rng.standard_normal((n, d), dtype=np.float32), unwritten(n, d)
arguments = (query_code, key_code, value, out, np.int32(n), np.int32(d), np.int32(2**tau))
run(COLUMNS, "a_column_each", (d,), (32,), arguments, shared=2**tau * 32 * 4)
assert np.allclose(out, yoso_core.lsh_cumulation(query_code, key_code, value, 2**tau), atol=1e-5)

with count_traffic() as counted, checked():
    emulator.launch(KernelText(COLUMNS, "a_column_each"), (d,), (32,), arguments, 2**tau * 32 * 4)
columns = counted.total
assert (columns.global_atomics, columns.shared_atomics, columns.bank_conflicts, columns.barriers) == (0, 0, 0, 0)

# %% [markdown]
# `checked()` watched every access of that launch: an access outside an array, a race between two
# threads, or a read of memory that nobody has written would have been a fault, whatever the order.
#
# Is it as exact as the library's? `compare` takes it beside them. A *launcher* is given the device
# and the arguments of `yoso_core.lsh_cumulation`; it makes room, launches, and returns the result.


# %%
def half_a_page(device, query_code, key_code, value, buckets):
    n, d = value.shape
    out = device.empty((n, d), value.dtype)
    sizes = (np.int32(n), np.int32(d), np.int32(buckets))
    device.launch(KernelText(COLUMNS, "a_column_each"), (d,), (32,), (query_code, key_code, value, out, *sizes), buckets * 32 * 4)
    return out


names = ["numpy:pairs", "cpu:tables", *(f"emulated:{name}" for name in ("shared_table", "sorted_buckets", "global_table"))]
own = {"half_a_page": CudaVariant(half_a_page)}
compared = yoso_core.compare("lsh_cumulation", query_code, key_code, value, 2**tau, variants=names, also=own, emulate=True, repeats=1)
print(compared)
assert compared.agrees
assert {row.variant: row.verdict for row in compared.rows}["emulated:half_a_page"] == "agrees"

# %% [markdown]
# **3. Sorted buckets** do without a table. Sort the keys by their codes, and a bucket is a *run* of
# neighbors. Its sum needs no atomic, and a query finds its run by bisection. Below, for one hash:
# the keys as they come, and sorted.

# %%
code = rng.integers(0, 6, size=24)
by_code = np.argsort(code, kind="stable")
starts = np.flatnonzero(np.diff(code[by_code], prepend=-1))
numbers = rng.standard_normal(24)
assert np.allclose(np.add.reduceat(numbers[by_code], starts), np.bincount(code, numbers, minlength=6)[code[by_code][starts]])

figure, panels = draw.picture(rows=2, width=9, height=2.3)
for axes, title, keys in zip(panels, ("Keys as they come", "Sorted by code: buckets are runs"), (np.arange(24), by_code), strict=True):
    for place, key in enumerate(keys):
        color = draw.PALETTE[code[key]]
        axes.add_patch(Rectangle((place + 0.04, 0), 0.92, 1, facecolor=color, alpha=0.35, edgecolor=draw.INK, linewidth=0.6))
        axes.text(place + 0.5, 0.72, str(key), ha="center", va="center", fontsize=9)
        axes.text(place + 0.5, 0.28, str(code[key]), ha="center", va="center", fontsize=9, fontweight="bold")
    axes.text(-0.2, 0.72, "key", ha="right", va="center", fontsize=9)
    axes.text(-0.2, 0.28, "code", ha="right", va="center", fontsize=9, fontweight="bold")
    if title.startswith("Sorted"):
        for start in starts:
            axes.axvline(start, color=draw.INK, linewidth=2.5)
    axes.set(title=title, xlim=(-1.3, 24.1), ylim=(-0.05, 1.05))
    axes.axis("off")
figure

# %% [markdown]
# ## Compared by what they move
#
# Now the library's own three, on the same input: one head, 256 queries and keys, 16 hashes of 6
# bits, 32 value dims.

# %%
VARIANTS = ("global_table", "shared_table", "sorted_buckets")


def counted_cumulation(n, m, tau, d, skew=0.0):
    """The traffic of the three variants. A share ``skew`` of all codes is 0, the rest is drawn
    evenly.
    """
    draws = np.random.default_rng(0)
    query_code, key_code = np.where(draws.random((2, n, m)) < skew, 0, draws.integers(0, 2**tau, size=(2, n, m))).astype(np.int32)
    value = draws.standard_normal((n, d), dtype=np.float32)
    expected = yoso_core.lsh_cumulation(query_code, key_code, value, 2**tau)
    found = {}
    for name in VARIANTS:
        with count_traffic() as counted:
            out = yoso_core.lsh_cumulation(query_code, key_code, value, 2**tau, variant=f"emulated:{name}")
        assert np.allclose(out, expected, rtol=1e-4, atol=1e-4)
        found[name] = counted
    return found


n, m, tau, d = 256, 16, 6, 32
logs = counted_cumulation(n, m, tau, d)
for log in logs.values():
    print(log, end="\n\n")
global_table, shared_table, sorted_buckets = (logs[name].total for name in VARIANTS)

# %% [markdown]
# A kernel that you understand has no surprising numbers. For the global table we can predict them.
# A warp has one key: it reads its 32 values, which are 4 sectors, and for each hash one code (1
# sector) and adds 32 sums (4 sectors). Gathering is the same in the other direction.

# %%
assert global_table.global_sectors == 2 * n * (4 + m * (1 + 4))
assert global_table.global_atomics == n * m * d
assert global_table.coalescing == 1
assert global_table.global_atomic_collisions == 0, "the lanes of a warp add to neighbors, never to the same entry"

assert (shared_table.global_atomics, shared_table.shared_atomics, shared_table.bank_conflicts, shared_table.barriers) == (0, 0, 0, 0)
assert (sorted_buckets.global_atomics, sorted_buckets.shared_atomics) == (0, 0)
assert sorted_buckets.bank_conflicts == 0 < sorted_buckets.shared_wavefronts
assert shared_table.global_sectors < global_table.global_sectors < sorted_buckets.global_sectors

totals = (global_table, shared_table, sorted_buckets)
measures = {  # title: what is counted, and a part of it
    "Bytes asked for": ("global_bytes", "global_atomic_bytes", "by atomics"),
    "Sectors moved": ("global_sectors", None, None),
    "Atomic additions": ("global_atomics", "global_atomics_contended", "contended"),
    "Turns of shared memory": ("shared_wavefronts", None, None),
}
figure, panels = draw.picture(2, rows=2, width=9, height=5.1, sharey=True)
figure.suptitle(f"One head: n = {n} queries and keys, m = {m}, $\\tau$ = {tau}, d = {d}", fontsize=10)
for axes, (title, (whole, part, label)) in zip(panels.flat, measures.items(), strict=True):
    numbers = [getattr(total, whole) / 1000 for total in totals]
    bars = axes.barh(range(3), numbers, 0.62, color=draw.SKY, edgecolor=draw.INK, label="all")
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8.5)
    if part:
        shares = [getattr(total, part) / 1000 for total in totals]
        axes.barh(range(3), shares, 0.62, color=draw.ORANGE, edgecolor=draw.INK, hatch="//", label=label)
        axes.legend(loc="upper right" if title.startswith(("Bytes", "Turns")) else "lower right")
    axes.set(title=title, xlim=(0, 1.2 * max(numbers)), ylim=(2.5, -0.5), xlabel="thousands")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_yticks(range(3), VARIANTS)
figure

# %% [markdown]
# Bytes are what threads ask for, sectors what their accesses touch: 32 lanes that read the same
# code ask for 128 bytes, and touch one sector. (Which sectors come from a cache and which from far
# away, the emulator does not know.)
#
# - The **global table** moves every sum through the memory system twice, once for a key and once
#   for a query, and adds atomically. Before that, its table must be filled with zeros, which no
#   kernel here does and no number here counts: $m\, 2^\tau d$ floats for each head.
# - The **shared table** keeps the sums in shared memory. What is left is reading codes and values.
# - **Sorted buckets** move the most: sorting, sums, bisection. But they have no table, so they take
#   any number of buckets.
#
# None of them has a bank conflict, not even the sort, where every thread adds up counters that lie
# in a row. The counters know that line.

# %%
sort_lines = (CUDA_FOLDER / "sort.cu").read_text(encoding="utf-8").splitlines()
adds_up = next(line for line in sorted_buckets.lines if line.file == "sort.cu" and "sum += mine[i]" in sort_lines[line.line - 1])
print(f"sort.cu:{adds_up.line} reads shared memory {adds_up.shared_accesses:,} times, with {adds_up.bank_conflicts} conflicts:")
print(sort_lines[adds_up.line - 1])
assert adds_up.shared_accesses > 0 == adds_up.bank_conflicts
assert (bank_turns[16 - 1], bank_turns[17 - 1]) == (16, 1)

# %% [markdown]
# Four bits have sixteen values. With sixteen counters for each thread, neighbors would read at
# stride 16, and the banks would take 16 turns. There are seventeen, one more for masked rows, and
# at stride 17 it is one turn: an odd stride meets every bank.
#
# Which numbers grow, and with what? On the left, sectors *per token* as the text grows: what stays
# flat is linear in $n$. On the right, codes that crowd into one bucket, as in real text (tutorial
# 4): additions that find their entry touched by another thread of the block since the last barrier.

# %%
lengths = (64, 128, 256, 512, 1024)

per_token = {name: [] for name in VARIANTS}
of_kernel = {}
for length in lengths:
    for name, log in counted_cumulation(length, m, tau, d).items():
        per_token[name].append(log.total.global_sectors / length)
        if name == "sorted_buckets":
            for kernel in log.kernels:
                of_kernel.setdefault(kernel.kernel, []).append(kernel.global_sectors / length)
contended = []
for skew in skews:
    logs = counted_cumulation(256, m, tau, d, skew)
    contended.append(logs["global_table"].total.global_atomics_contended / logs["global_table"].total.global_atomics)
    assert logs["shared_table"].total.global_sectors == shared_table.global_sectors
    assert logs["shared_table"].total.bank_conflicts == 0

figure, (left, right) = draw.picture(2, width=9, height=3.4)
for number, (name, sectors) in enumerate(per_token.items()):
    left.plot(lengths, sectors, draw.MARKERS[number], color=draw.PALETTE[number], linestyle="-", label=name)
left.set(title="Sectors per token", xlabel="tokens n", ylabel="sectors", xscale="log", ylim=(0, 600))
left.set_xticks(lengths, [f"{length:,}" for length in lengths])
left.minorticks_off()
left.legend(loc="upper left")
right.plot(skews, contended, "o-", color=draw.BLUE, label="global_table")
right.plot(skews, np.zeros(5), "D-", color=draw.ORANGE, label="shared_table: no atomics")
right.set(title="Contended share of the additions", xlabel="share of all codes in one bucket", ylabel="share", ylim=(-0.05, 1))
right.legend(loc="upper left")
for axes in (left, right):
    axes.grid(True)

assert per_token["global_table"] == [2 * (4 + m * 5)] * 5
assert per_token["shared_table"] == [96 + 384 / length for length in lengths], "flat, but for a batch of keys beyond the last"
assert all(np.all(np.diff(of_kernel[name]) > 0) for name in ("gather_buckets", "sort_codes")), "what grows"
assert all(np.all(np.diff(of_kernel[name]) <= 0) for name in ("sum_buckets", "transpose_codes")), "what does not"
assert np.all(np.diff(contended) > 0)
figure

# %% [markdown]
# Sorted buckets grow slowly. With each doubling of the text their bisection takes one more look,
# and the threads that sort read further apart. In exchange they never refuse. A column of the
# shared table must fit into a block's shared memory, 227 KiB on an H100:

# %%
try:
    yoso_core.lsh_cumulation(
        np.zeros((4, 1), np.int32), np.zeros((4, 1), np.int32), np.ones((4, 1), np.float32), 2**17, variant="emulated:shared_table"
    )
except ValueError as found:
    refused = found
print(refused)
assert "524,292 bytes of shared memory" in str(refused)

# %% [markdown]
# ## And by time
#
# The emulator counts. It cannot know time: how much of this traffic a real GPU hides behind other
# work only a GPU can say. If there is one in your machine, here are its times, 8 heads of 4,096
# tokens. `compare` also checks every result against the definition.

# %%
if gpu_missing is None:
    query_code, key_code = rng.integers(0, 256, size=(2, 8, 4096, 32)).astype(np.int32)
    value = rng.standard_normal((8, 4096, 64), dtype=np.float32)
    names = [f"cupy:{name}" for name in VARIANTS]
    measured = yoso_core.compare("lsh_cumulation", query_code, key_code, value, 256, variants=names)
    assert measured.agrees
    print(measured)
else:
    print("No GPU can be used here, so there is no time to show.")

# %% [markdown]
# ## What to keep
#
# - CUDA C++ is the kernel of tutorial 5 with types, pointers, and lengths passed along.
# - A warp's 32 lanes move together: neighbors should read neighbors. They can shuffle and vote
#   without shared memory and without barriers.
# - The best way to avoid contention is to give every entry one owner. The shared table does; the
#   global table needs atomics.
# - Predict what a kernel moves, then count. A number that surprises you is a bug in the kernel or
#   in your head.
#
# Next: [7. When kernels go wrong](07_when_kernels_go_wrong.ipynb).
#
# ## Exercises
#
# The checkers run your kernel in three orders and watch every access. A race, a read beyond the end
# or a deadlock is a wrong answer, even if the numbers happen to be right.


# %%
def answers(text, name, grid, block, args):
    """``(order, arguments after the launch, traffic)`` for three orders, every access watched. A
    fault is a wrong answer.
    """
    found = []
    for chosen in ("forward", "reverse", 1):
        copies = [x.copy() for x in args]
        try:
            with order(chosen), checked(), count_traffic() as counted:
                emulator.launch(KernelText(text, name), grid, block, copies)
        except RuntimeError as problem:  # a KernelFault, or what the compiler says
            raise AssertionError(f"order {chosen}: {problem}") from problem
        found.append((chosen, copies, counted.total))
    return found


# %% [markdown]
# ## Exercise 1: row sums, coalesced
#
# Add up each row of a matrix `(rows, width)`, one warp for each row, blocks of `(32, 4)`. Lanes
# must read neighbors, and the 32 partial sums meet by shuffles. The checker counts sectors, and
# allows no shared memory.

# %% tags=["exercise-1"]
ROW_SUMS = """
extern "C" __global__ void row_sums(const float* x, float* out, int rows, int width) {
  const int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
  // exercise 1 is waiting for you
}
"""


# %% tags=["check-1"]
for rows, width in ((8, 32), (5, 96), (3, 50), (6, 7)):
    x = np.random.default_rng(width).integers(-9, 10, size=(rows, width)).astype(np.float32)
    arguments = (x, unwritten(rows), np.int32(rows), np.int32(width))
    for chosen, (_, out, *_), moved in answers(ROW_SUMS, "row_sums", (-(-rows // 4),), (32, 4), arguments):
        assert np.array_equal(out, x.sum(axis=1)), f"{rows} rows of {width}, order {chosen}: got {out}, need {x.sum(axis=1)}"
        assert moved.shared_accesses == 0, "shared memory is used: shuffles can do without"
        most = rows * (width // 8 + 2 + -(-width // 32)) + rows  # a row may begin and end, and be cut into warps, within a sector
        assert moved.global_sectors <= most, f"rows of {width}: {moved.global_sectors} sectors are touched, {most} are enough"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: how full are the buckets?
#
# Count the keys in each of 16 buckets. A block of 64 threads counts its keys in *shared* memory
# first, by `atomicAdd(&counts[code], 1)`, and then adds its counts to those in global memory: at
# most 16 atomics for each block there, however many keys it has.
#
# Such counts are a cumulation, too: with one hash and values that are all 1, a query gets the
# number of keys in its bucket. At last the checker puts your kernel into the table of `compare`.

# %% tags=["exercise-2"]
BUCKET_COUNTS = """
extern "C" __global__ void bucket_counts(const int* code, int* count, int n) {
  __shared__ int counts[16];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  // exercise 2 is waiting for you
}
"""


# %% tags=["check-2"]
for n in (64, 300, 10):
    code = np.random.default_rng(n).integers(0, 16, size=n).astype(np.int32)
    blocks = -(-n // 64)
    for chosen, (_, count, _), moved in answers(
        BUCKET_COUNTS, "bucket_counts", (blocks,), (64,), (code, np.zeros(16, np.int32), np.int32(n))
    ):
        assert np.array_equal(count, np.bincount(code, minlength=16)), f"n = {n}, order {chosen}: got {count}"
        assert moved.global_atomics <= 16 * blocks, f"{moved.global_atomics} atomics in global memory, {16 * blocks} are enough"


def cumulation_of_ones(device, query_code, key_code, ones, buckets):
    count, n = device.zeros((buckets,), np.int32), key_code.shape[0]
    device.launch(KernelText(BUCKET_COUNTS, "bucket_counts"), (-(-n // 64),), (64,), (key_code, count, np.int32(n)))
    return count[query_code].astype(ones.dtype)


codes = rng.integers(0, 16, size=(2, 300, 1)).astype(np.int32)
names, own = ["numpy:pairs", "cpu:tables", "emulated:shared_table"], {"yours": CudaVariant(cumulation_of_ones)}
compared = yoso_core.compare("lsh_cumulation", *codes, np.ones((300, 1), np.float32), 16, variants=names, also=own, emulate=True, repeats=1)
assert compared.agrees, f"beside the library's kernels:\n{compared}"
print(compared)
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: a ballot at the edge
#
# `count[w]` is the number of codes in the w-th group of 32 that equal `wanted`. One warp for each
# group, one ballot for each warp; `__popc(word)` counts the ones in a word. `n` is rarely a
# multiple of 32. What may a lane beyond the end do, and what may it not?

# %% tags=["exercise-3"]
MATCHES = """
extern "C" __global__ void matches(const int* code, int* count, int wanted, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  // exercise 3 is waiting for you
}
"""


# %% tags=["check-3"]
for n in (64, 70, 5):
    code = np.random.default_rng(n).integers(0, 3, size=n).astype(np.int32)
    warps = -(-n // 32)
    wanted_counts = [int(np.sum(code[32 * w : 32 * w + 32] == 1)) for w in range(warps)]
    arguments = (code, np.full(warps, -1, np.int32), np.int32(1), np.int32(n))
    for chosen, (_, count, *_), moved in answers(MATCHES, "matches", (warps,), (32,), arguments):
        assert count.tolist() == wanted_counts, f"n = {n}, order {chosen}: got {count.tolist()}, need {wanted_counts}"
        assert moved.votes == warps, f"{moved.votes} votes for {warps} warps: one ballot each is enough"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** Lane `l` takes the entries `l`, `l + 32`, ... of the row. After five shuffles
# every lane has the whole sum; one writes it. A row is a whole warp's, so the whole warp leaves
# where there is no row.

# %% tags=["solution-1"]
ROW_SUMS = """
extern "C" __global__ void row_sums(const float* x, float* out, int rows, int width) {
  const int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  float sum = 0;
  for (int i = lane; i < width; i += 32) sum += x[row * width + i];
  for (int stride = 16; stride > 0; stride /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, stride);
  if (lane == 0) out[row] = sum;
}
"""

# %% [markdown]
# **Exercise 2.** Two barriers: nobody counts before the counts are cleared, nobody adds them up
# before all have counted. Threads beyond the end stay, since they are needed at the barriers.

# %% tags=["solution-2"]
BUCKET_COUNTS = """
extern "C" __global__ void bucket_counts(const int* code, int* count, int n) {
  __shared__ int counts[16];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 16) counts[threadIdx.x] = 0;
  __syncthreads();
  if (i < n) atomicAdd(&counts[code[i]], 1);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&count[threadIdx.x], counts[threadIdx.x]);
}
"""

# %% [markdown]
# **Exercise 3.** A lane beyond the end must not read, and must not leave: the ballot waits for all
# that its mask names. It stays, and says no. `a && b` looks at b only where a holds.

# %% tags=["solution-3"]
MATCHES = """
extern "C" __global__ void matches(const int* code, int* count, int wanted, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const unsigned word = __ballot_sync(0xffffffffu, i < n && code[i] == wanted);
  if (threadIdx.x == 0) count[blockIdx.x] = __popc(word);
}
"""

# %% tags=["wrong-1"]
# The right sums, but a thread walks a row of its own: neighbors read far apart.
ROW_SUMS = """
extern "C" __global__ void row_sums(const float* x, float* out, int rows, int width) {
  const int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows || lane > 0) return;
  float sum = 0;
  for (int i = 0; i < width; ++i) sum += x[row * width + i];
  out[row] = sum;
}
"""

# %% tags=["wrong-1"]
# One shuffle is missing: half of the lanes are left out.
ROW_SUMS = """
extern "C" __global__ void row_sums(const float* x, float* out, int rows, int width) {
  const int lane = threadIdx.x, row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  float sum = 0;
  for (int i = lane; i < width; i += 32) sum += x[row * width + i];
  for (int stride = 8; stride > 0; stride /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, stride);
  if (lane == 0) out[row] = sum;
}
"""

# %% tags=["wrong-2"]
# The additions in shared memory are not atomic.
BUCKET_COUNTS = """
extern "C" __global__ void bucket_counts(const int* code, int* count, int n) {
  __shared__ int counts[16];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 16) counts[threadIdx.x] = 0;
  __syncthreads();
  if (i < n) ++counts[code[i]];
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(&count[threadIdx.x], counts[threadIdx.x]);
}
"""

# %% tags=["wrong-2"]
# Straight to global memory: the right counts, and an atomic there for every key.
BUCKET_COUNTS = """
extern "C" __global__ void bucket_counts(const int* code, int* count, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&count[code[i]], 1);
}
"""

# %% tags=["wrong-3"]
# Lanes beyond the end leave, though the ballot's mask names them.
MATCHES = """
extern "C" __global__ void matches(const int* code, int* count, int wanted, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  if (i >= n) return;
  const unsigned word = __ballot_sync(0xffffffffu, code[i] == wanted);
  if (threadIdx.x == 0) count[blockIdx.x] = __popc(word);
}
"""

# %% tags=["wrong-3"]
# No guard: lanes beyond the end read what is not theirs.
MATCHES = """
extern "C" __global__ void matches(const int* code, int* count, int wanted, int n) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const unsigned word = __ballot_sync(0xffffffffu, code[i] == wanted);
  if (threadIdx.x == 0) count[blockIdx.x] = __popc(word);
}
"""
