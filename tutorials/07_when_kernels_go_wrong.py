# %% [markdown]
# # 7. When kernels go wrong
#
# **You will be able to** recognize the five faults that most broken kernels have, choose the tool
# that shows each of them, read what it says, and fix the kernel so that it is right in every order
# of its threads.
#
# **Time:** 40 minutes, and 25 for the exercises.
#
# **You need:** tutorials 5 and 6, and Linux with g++. No GPU.
#
# **Source:** [`yoso_core.gpu.emulator`](../gpu/emulator/__init__.py), [its
# tests](../tests/test_emulator.py), and [`cumulation.cu`](../gpu/cupy_kernels/cumulation.cu); the
# kernels under repair compute algorithm 1 of [Zeng et al. 2021](https://arxiv.org/abs/2111.09714).

# %%
import math
from contextlib import suppress

import numpy as np
from numba import cuda

import yoso_core
from yoso_core import draw
from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator, KernelFault, checked, missing, order, sanitized, sanitizers
from yoso_core.gpu.emulator.stepper import Stepper

draw.use_look()
rng = np.random.default_rng(7)
assert missing() is None, missing()

# %% [markdown]
# ## What a GPU hides
#
# A GPU runs thousands of threads at once, in an order that nobody promises, and it checks next to
# nothing. A kernel with a fault often gives the right answer: on your card, at your size, today. So
# the question of this tutorial is not "is the result right?" but **"could it be wrong?"**, and for
# that you need more than one run. These are the tools:
#
# | tool | what it does |
# |---|---|
# | comparison | runs the kernel beside a definition that is too simple to be wrong |
# | `order(...)` | runs threads and blocks forward, in reverse, or shuffled by a seed |
# | `checked()` | watches every single access, and stops at the first that breaks a rule |
# | sanitizers | the compiler's own watchdogs: AddressSanitizer and ThreadSanitizer |
# | `Stepper` | the same for kernels in Python; it checks every index |
#
# We plant five faults in kernels of a few lines, one at a time. The kernels do what a YOSO layer
# does all day: add values to a table of buckets, average them, transform vectors. Here are 61 keys,
# hashed to 8 buckets, with one number each to add up.

# %%
n, capacity = 61, 8
planes = yoso_core.sample_planes(1, 3, 16, rng=0)
key = rng.standard_normal((n, 16)).astype(np.float32)
code = yoso_core.hyperplane_hash(key, planes, 1, 3)[:, 0]
value = np.ones(n, np.float32)  # every key adds one: the table then counts the keys of each bucket


def right_table(code, value):
    """The definition: a query for every bucket, answered pair by pair."""
    every_bucket = np.arange(capacity, dtype=np.int32)[:, None]
    return yoso_core.lsh_cumulation(every_bucket, code[:, None], value[:, None], capacity, variant="numpy:pairs")[:, 0]


expected = right_table(code, value)
assert np.array_equal(expected, np.bincount(code, minlength=capacity))
expected

# %% [markdown]
# Some help for what follows: launch a kernel, print it with its line numbers, and collect what the
# check has to say.

# %%
ORDERS = ("forward", "reverse", 1, 2, 3, 4)


def launch(kernel, grid, block, *args):
    """Run a kernel in the emulator, on a grid of ``grid`` blocks with ``block`` threads each."""
    Emulator().launch(kernel, (grid,), (block,), args)


def show(kernel, *marked):
    """Print a kernel, with an arrow at the lines that hold one of the texts ``marked``."""
    for number, line in enumerate(kernel.text.splitlines(), 1):
        print("->" if any(text in line for text in marked) else "  ", f"{number:2}  {line}")


def line_of(kernel, text):
    """The number of the one line that holds ``text``."""
    (number,) = (number for number, line in enumerate(kernel.text.splitlines(), 1) if text in line)
    return number


def fault_in(run, *args):
    """The fault that `checked` reports for ``run(*args)``, or None."""
    try:
        with checked():
            run(*args)
    except KernelFault as fault:
        return fault
    return None


# %% [markdown]
# ## Fault 1: a grid that drops the tail
#
# The kernel below is fine. A thread takes one key and adds its value to the bucket. Threads beyond
# the last key do nothing.

# %%
scatter = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, float* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  atomicAdd(&table[code[key]], value[key]);
}
""".strip(),
    "scatter",
    file="scatter.cu",
)


def table_with_tail_dropped(code, value):
    table = np.zeros(capacity, np.float32)
    launch(scatter, len(code) // 8, 8, code, value, table, np.int32(len(code)))
    return table


found = table_with_tail_dropped(code, value)
print("keys in the table:", int(found.sum()), "of", n)
assert found.sum() == n - n % 8

# %% [markdown]
# The fault is outside the kernel: `len(code) // 8` blocks of 8 threads. With 61 keys that is 7
# blocks, 56 threads, and five keys that nobody takes. No warning: the result is a table, and it
# looks like one.
#
# This is no toy. The kernels that the paper's authors published, and that `transformers` carried
# along, [divide exactly like
# this](https://github.com/mlpen/YOSO/blob/main/encoders/backbones/efficient_attentions/yoso/yoso_v1/cuda/fast_lsh_cumulation.cu):
# eight keys to a block, and the last $n \bmod 8$ keys dropped. At lengths like 512, where people
# train, it does not show. Watch the error as $n$ grows:

# %%
lengths = np.arange(8, 65)
lost = []
for length in lengths:
    codes, ones = np.resize(code, length), np.ones(length, np.float32)
    lost.append(np.abs(table_with_tail_dropped(codes, ones) - right_table(codes, ones)).sum())
lost = np.array(lost)

figure, (left, right) = draw.picture(2, height=3.3, width=9)
bucket = np.arange(capacity)
left.bar(bucket - 0.2, expected, 0.4, color=draw.BLUE, label="definition")
left.bar(bucket + 0.2, found, 0.4, color=draw.ORANGE, edgecolor=draw.INK, hatch="///", label="kernel")
left.set(title="The table, n = 61", xlabel="bucket", ylabel="keys", xticks=bucket)
left.legend(loc="upper right")
left.set_ylim(0, 1.3 * expected.max())
right.plot(lengths, lost, color=draw.VERMILION, marker="o", markersize=3.5, linewidth=1)
right.plot(lengths[lengths % 8 == 0], lost[lengths % 8 == 0], "o", color=draw.GREEN, markersize=7, label="multiples of 8")
right.set(title="Keys lost", xlabel="number of keys n", ylabel="keys", xticks=range(8, 65, 8), ylim=(-0.4, 9))
right.legend(loc="upper left")
right.grid(True)

assert np.array_equal(lost, lengths % 8), "exactly the remainder is lost"
figure

# %% [markdown]
# **Which tool?** Every access of this kernel is legal, so a tool that watches accesses has nothing
# to say, and the order of threads is innocent. Only the comparison finds it, and only *at a length
# that is no multiple of 8*.

# %%
assert fault_in(table_with_tail_dropped, code, value) is None
for chosen in ORDERS:
    with order(chosen):
        assert np.array_equal(table_with_tail_dropped(code, value), found)

assert not np.array_equal(found, expected)
assert np.array_equal(table_with_tail_dropped(code[:56], value[:56]), right_table(code[:56], value[:56])), "at 56 it looks right"

# %% [markdown]
# **The fix:** round up, and let a guard in the kernel turn away the threads that are too many.
# `-(-n // 8)` is Python for rounding up. And **the habit**: test at 1, 7, 63 and 137, not at 64.


# %%
def table_of(code, value, kernel=scatter):
    table = np.zeros(capacity, np.float32)
    launch(kernel, -(-len(code) // 8), 8, code, value, table, np.int32(len(code)))
    return table


for length in (1, 7, 56, 61):
    for chosen in ORDERS:
        with order(chosen):
            assert np.array_equal(table_of(code[:length], value[:length]), right_table(code[:length], value[:length]))

# %% [markdown]
# What would 5 keys do to the faulty launch? `5 // 8` is a grid of no blocks at all. CUDA refuses it
# with an error code that a caller must ask for; a caller who does not ask gets the zeros that were
# there before. The emulator does not leave that to the caller.

# %%
try:
    table_with_tail_dropped(code[:5], value[:5])
    refused = None
except KernelFault as fault:
    refused = str(fault)
print(refused)
assert "invalid launch: grid (0,)" in refused

# %% [markdown]
# ## Fault 2: a write out of bounds
#
# Rounding up is half of the fix. Forget the guard, and the threads that are too many write
# where they must not. The next kernel divides sums by the number of hashes. To see what it does to
# others, we hand out memory as a GPU's allocator does, one array right behind another: `out` ends
# where `neighbor` begins. The kernel is given the whole of that memory, so that nothing stops it.

# %%
finish = KernelText(
    """
extern "C" __global__ void finish(const float* sum, float* out, int n, int num_hash) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = sum[i] / num_hash;
}
""".strip(),
    "finish",
    file="finish.cu",
)


def finish_beside_a_neighbor(kernel):
    """The sums, the result, and the array behind it."""
    total = np.arange(8, 72, dtype=np.float32)
    memory = np.full(72, -1, np.float32)
    out, neighbor = memory[:n], memory[n:]
    neighbor[:] = 7  # somebody else's numbers
    launch(kernel, -(-n // 8), 8, total, memory, np.int32(n), np.int32(8))
    return total[:n], out, neighbor


total, out, neighbor = finish_beside_a_neighbor(finish)
assert np.array_equal(out, total / 8), "the kernel's own result is right"

before = np.concatenate([out[-4:], np.full(len(neighbor), 7, np.float32)])
after = np.concatenate([out[-4:], neighbor])
figure, axes = draw.picture(width=9, height=2.4)
owner = np.where(np.arange(len(after)) < 4, 0.25, 0) * np.ones((2, 1))
draw.heat_map(axes, owner, rows=["as it should be", "after the kernel"], limits=(0, 1))
for (row, column), number in np.ndenumerate(np.stack([before, after])):
    overwritten = number != before[column]
    axes.text(column, row, f"{number:.1f}", ha="center", va="center", fontweight="bold" if overwritten else "normal")
    if overwritten:
        axes.plot(column, row, "s", markersize=27, markerfacecolor="none", markeredgecolor=draw.VERMILION, markeredgewidth=2.5)
axes.set_xticks(range(len(after)), range(n - 4, n + len(neighbor)))
axes.axvline(3.5, color=draw.INK, linewidth=2)
axes.text(3.3, -0.72, "out", ha="right", va="center")
axes.text(3.7, -0.72, "neighbor (framed: overwritten)", ha="left", va="center")
axes.set_xlabel("address, in floats from the start of out")
assert np.array_equal(neighbor != 7, np.arange(len(neighbor)) < 3), "three strangers' numbers are gone"
figure

# %% [markdown]
# The comparison is content: `out` is right. The damage is next door, and it will show up somewhere
# else, much later, as a mystery.
#
# **Which tool?** Give the emulator each array by itself. It keeps an array between pages of memory
# that are not there, works on copies, and gives them back when the launch has ended well. So it
# stops at the first wrong access, in any launch, and your arrays are as they were. It names the
# block, the thread, the line and the index. The read comes first: `sum` has only 61 entries too.


# %%
def finish_alone(kernel):
    total, out = np.arange(8, 8 + n, dtype=np.float32), np.zeros(n, np.float32)
    launch(kernel, -(-n // 8), 8, total, out, np.int32(n), np.int32(8))
    return out


try:
    finish_alone(finish)
    fault = None
except KernelFault as stopped:
    fault = stopped
print(fault)
show(finish, "sum[i] /")
assert str(fault).startswith("finish: sum[61] read, sum has 61 entries")
assert (fault.kernel, fault.file, fault.line) == ("finish", "finish.cu", line_of(finish, "sum[i] /"))
assert (fault.block, fault.thread) == ((7, 0, 0), (5, 0, 0))
assert fault.block[0] * 8 + fault.thread[0] == n, "the first thread that is too many"

# %% [markdown]
# There are limits, and you should know them. A read *before* an array finds NaN, and goes on: that
# is for `checked`, which watches every access. And a stray write that lands inside another array of
# the same launch is, for all that anybody can tell, meant. Kernels in Python do not have these
# limits. There an array carries its shape, and the stepper checks every index of every array.


# %%
@cuda.jit
def finish_in_python(total, out, num_hash):
    i = cuda.grid(1)
    out[i] = total[i] / num_hash


try:
    Stepper().launch(finish_in_python, (8,), (8,), (total, np.zeros(n, np.float32), np.int64(8)))
    stepped = None
except KernelFault as fault:
    stepped = fault
print(str(stepped).partition(" (block")[0], "in block", stepped.block, "thread", stepped.thread)
assert "total: index 61 is out of bounds for the shape (61,)" in str(stepped)
assert (stepped.block, stepped.thread) == ((7, 0, 0), (5, 0, 0))

# %% [markdown]
# **The fix** is one line, and no thread writes next door in any order.

# %%
finish_fixed = KernelText(finish.text.replace("  out[i]", "  if (i < n) out[i]"), "finish", file="finish.cu")
show(finish_fixed, "if (i < n)")
for chosen in ORDERS:
    with order(chosen), checked():
        total, out, neighbor = finish_beside_a_neighbor(finish_fixed)
        assert np.array_equal(out, total / 8)
        assert (neighbor == 7).all()
        assert np.array_equal(finish_alone(finish_fixed), total / 8)

# %% [markdown]
# ## Fault 3: a race
#
# Back to the table. `table[c] += v` is one line of C++ and three steps of a machine: read the
# entry, add, write it back. Two threads with keys of the same bucket may do this:
#
# | thread A | thread B | the entry |
# |---|---|---|
# | reads 4 | | 4 |
# | | reads 4 | 4 |
# | writes 5 | | 5 |
# | | writes 5 | 5, and should be 6 |
#
# An update is lost. Two threads touch one place, at least one of them writes, nothing orders the
# two, and they are not both atomic: that is the definition of a *data race*.

# %%
race = KernelText(
    scatter.text.replace("atomicAdd(&table[code[key]], value[key]);", "table[code[key]] += value[key];"), "scatter", file="race.cu"
)
show(race, "+=")
for chosen in ORDERS:
    with order(chosen):
        assert np.array_equal(table_of(code, value, race), expected), "right in every order?"

# %% [markdown]
# Right, in every order! The emulator runs a thread until it ends or meets a barrier, so nobody
# comes between a read and its write. On a GPU the 32 lanes of a warp *read together and write
# together*. We can make that happen: a barrier between the read and the write, and all threads of a
# block have read before the first one writes.

# %%
race_in_slow_motion = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, float* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  const float seen = table[code[key]];
  __syncthreads();
  table[code[key]] = seen + value[key];
}
""".strip(),
    "scatter",
    file="slow_motion.cu",
)
lossy = table_of(code, value, race_in_slow_motion)

figure, axes = draw.picture(width=6.5, height=3.2)
axes.bar(bucket - 0.2, expected, 0.4, color=draw.BLUE, label=f"definition: {expected.sum():.0f} keys")
axes.bar(bucket + 0.2, lossy, 0.4, color=draw.ORANGE, edgecolor=draw.INK, hatch="///", label=f"with the race: {lossy.sum():.0f} keys")
axes.set(title="Lost updates", xlabel="bucket", ylabel="keys", xticks=bucket, yticks=range(0, 13, 2), ylim=(0, 1.35 * expected.max()))
axes.legend(loc="upper right", ncols=2)

blocks = [np.unique(code[first : first + 8]) for first in range(0, n, 8)]
assert np.array_equal(lossy, np.bincount(np.concatenate(blocks), minlength=capacity)), (
    "a bucket gains 1 per block, however many keys it has"
)
figure

# %% [markdown]
# NumPy has the very same trap, by the way. `table[code] += value` reads all entries, adds, and
# writes all of them back; `np.add.at` does not lose any. Now you know why the reference uses it.

# %%
careless, careful = np.zeros(capacity), np.zeros(capacity)
careless[code] += value
np.add.at(careful, code, value)
assert np.array_equal(careless, np.minimum(expected, 1))
assert np.array_equal(careful, expected)

# %% [markdown]
# **Which tool?** `checked` does not wait for a wrong result. It remembers who touched what since
# the last barrier, and reports two accesses that nothing orders, even where this run got away with
# it. It names both sides: who, and where.

# %%
fault = fault_in(table_of, code, value, race)
print(fault)
assert (fault.file, fault.line) == ("race.cu", line_of(race, "+="))
assert "no barrier orders that" in str(fault)
assert f"wrote it at race.cu:{line_of(race, '+=')}" in str(fault)

# %% [markdown]
# **The fix:** `atomicAdd` does the three steps as one, which is what our first kernel did. Its
# threads still come in any order, but none is lost, and `checked` agrees.

# %%
assert fault_in(table_of, code, value, scatter) is None
for chosen in ORDERS:
    with order(chosen):
        assert np.array_equal(table_of(code, value, scatter), expected)

# %% [markdown]
# ## Fault 4: a missing barrier
#
# Threads of a block share memory, and pass numbers to each other through it. A barrier
# (`__syncthreads()`) says: nobody goes on before all have arrived. This kernel is the fast Hadamard
# transform of tutorial 3, a thread for each entry. In every step a thread reads its own entry and
# its partner's, and writes its own. There is a barrier before the reads. Can you see what is
# missing?

# %%
dim = 16
hadamard_racy = KernelText(
    """
extern "C" __global__ void hadamard(const float* x, float* y) {
  __shared__ float buffer[16];
  const int i = threadIdx.x;
  buffer[i] = x[i];
  for (int stride = 8; stride > 0; stride /= 2) {
    __syncthreads();
    const float mine = buffer[i], other = buffer[i ^ stride];
    buffer[i] = i & stride ? other - mine : mine + other;
  }
  y[i] = buffer[i];
}
""".strip(),
    "hadamard",
    file="hadamard.cu",
)


def transformed(kernel, x):
    y = np.zeros(dim, np.float32)
    launch(kernel, 1, dim, x, y)
    return y


x = rng.integers(-3, 4, dim).astype(np.float32)
right_transform = yoso_core.hadamard_transform(x)


def in_every_order(kernel):
    rows = []
    for chosen in ORDERS:
        with order(chosen):
            rows.append(transformed(kernel, x))
    return np.stack(rows)


racy = in_every_order(hadamard_racy)
names = [f"seed {chosen}" if isinstance(chosen, int) else chosen for chosen in ORDERS]
assert len({row.tobytes() for row in racy}) > 1, "another order, another result"
assert all(not np.array_equal(row, right_transform) for row in racy)

# %% [markdown]
# Between the reads and the writes, of course. A fast thread writes its new entry while a slow
# partner has yet to read the old one. With the second barrier in place, every order gives the bits
# of the definition.

# %%
second = "    const float mine = buffer[i], other = buffer[i ^ stride];\n"
hadamard_fixed = KernelText(hadamard_racy.text.replace(second, second + "    __syncthreads();\n"), "hadamard", file="hadamard.cu")
show(hadamard_fixed, "    __syncthreads")
fixed = in_every_order(hadamard_fixed)
assert all(np.array_equal(row, right_transform) for row in fixed)

shown = {"one barrier": np.vstack([racy, right_transform]), "two barriers": np.vstack([fixed, right_transform])}
figure, grid = draw.picture(2, height=3.5, width=9, sharey=True)
largest = 1.5 * np.abs(right_transform).max()  # wrong numbers beyond it take the colors of the ends
for axes, (title, matrix) in zip(grid, shown.items(), strict=True):
    image = draw.heat_map(axes, matrix, title=title, rows=[*names, "definition"], signed=True, limits=(-largest, largest))
    axes.axhline(len(ORDERS) - 0.5, color=draw.INK, linewidth=2)
    wrong = np.argwhere(matrix != right_transform)
    axes.plot(wrong[:, 1], wrong[:, 0], "x", color=draw.INK, markersize=5)
    axes.set(xlabel="entry of the transform (x: wrong)", xticks=range(0, dim, 3))
figure.colorbar(image, ax=grid.tolist(), shrink=0.85, pad=0.02, extend="both")
figure

# %% [markdown]
# **Which tool?** The orders disagree with each other, and that alone, without any definition, says
# that there is a race. `checked` says where: it names the line that writes and the line that reads,
# and the barrier belongs between them.

# %%
fault = fault_in(transformed, hadamard_racy, x)
print(fault)
show(hadamard_racy, "mine = buffer[i]", "buffer[i] = i & stride")
both = {line_of(hadamard_racy, "mine = buffer[i]"), line_of(hadamard_racy, "buffer[i] = i & stride")}
assert {fault.line, int(str(fault).split("hadamard.cu:")[1].split()[0])} == both, "the two lines, whichever came first"
assert fault_in(transformed, hadamard_fixed, x) is None

# %% [markdown]
# ### A barrier in the wrong place is worse
#
# Barriers are for *all* threads of a block. Put one into each branch of an `if`, and threads wait
# for each other at different places: a GPU hangs, or does whatever it likes. The emulator says so
# at once, without any special mode.

# %%
divergent = KernelText(
    """
extern "C" __global__ void hadamard(const float* x, float* y) {
  __shared__ float buffer[16];
  const int i = threadIdx.x;
  buffer[i] = x[i];
  if (i & 8) {
    __syncthreads();
    y[i] = buffer[i ^ 8] - buffer[i];
  } else {
    __syncthreads();
    y[i] = buffer[i] + buffer[i ^ 8];
  }
}
""".strip(),
    "hadamard",
    file="divergent.cu",
)
try:
    transformed(divergent, x)
    stuck = None
except KernelFault as fault:
    stuck = str(fault)
print(stuck)
barriers = [number for number, line in enumerate(divergent.text.splitlines(), 1) if "__syncthreads" in line]
assert "divergent barrier" in stuck
assert all(f"divergent.cu:{number}" in stuck for number in barriers)

# %% [markdown]
# With a barrier in *one* branch, the other threads run on, and may end. GPUs since 2017 do not wait
# for threads that have ended, so the launch ends, too, here as there: the barrier holds back only
# some. Whether the result is right is luck, and older GPUs hang. `checked` reports it, and so does
# the stepper.

# %%
one_sided = KernelText(
    """
extern "C" __global__ void sum_of_16(const float* x, float* y) {
  __shared__ float buffer[16];
  const int i = threadIdx.x;
  buffer[i] = x[i];
  __syncthreads();
  for (int stride = 8; stride > 0; stride /= 2) {
    if (i < stride) {
      buffer[i] += buffer[i + stride];
      __syncthreads();
    }
  }
  if (i == 0) y[0] = buffer[0];
}
""".strip(),
    "sum_of_16",
    file="one_sided.cu",
)
assert transformed(one_sided, x)[0] == x.sum(), "right, by luck"
fault = fault_in(transformed, one_sided, x)
print(fault)
assert "divergent barrier" in str(fault)
assert "has ended without it" in str(fault)

# %% [markdown]
# **The fix** is to take the barrier out of the branches: one for all, in front of the `if`, and in
# a loop behind it.

# %%
without = divergent.text.replace("    __syncthreads();\n", "")
together = KernelText(without.replace("  if (i & 8)", "  __syncthreads();\n  if (i & 8)"), "hadamard", file="together.cu")
show(together, "__syncthreads")
halves = np.concatenate([x[:8] + x[8:], x[:8] - x[8:]])
assert all(np.array_equal(row, halves) for row in in_every_order(together))
assert fault_in(transformed, together, x) is None

# %% [markdown]
# ## Fault 5: sums that do not repeat
#
# The last fault breaks no rule. Floats are rounded after every addition, so $(a + b) + c$ and $a +
# (b + c)$ differ in their last digits. Atomics add in the order in which threads happen to arrive.
# Let 1,000 keys of all sizes fall into one bucket, and try 200 orders:

# %%
crowd = 1000
crowd_code = np.zeros(crowd, np.int32)
crowd_value = (rng.standard_normal(crowd) * 10.0 ** rng.uniform(-3, 3, crowd)).astype(np.float32)
exact = math.fsum(crowd_value.astype(float))  # rounded once, at the end

sums = []
for seed in range(200):
    with order(seed):
        sums.append(table_of(crowd_code, crowd_value)[0])
sums = np.array(sums)
error = (sums - exact) / abs(exact)

figure, axes = draw.picture(width=6.5, height=3)
axes.hist(error * 1e6, bins=24, color=draw.SKY, edgecolor=draw.INK, linewidth=0.6)
axes.axvline(0, color=draw.VERMILION, linewidth=2, linestyle=draw.DASHES, label="exact sum")
axes.set(title=f"200 orders, {len(np.unique(sums))} different sums", xlabel="relative error, in millionths", ylabel="orders")
axes.legend()

assert len(np.unique(sums)) > 20
assert np.abs(sums - exact).max() < 1e-6 * np.abs(crowd_value).sum(), "none of them is wrong by more than rounding explains"
assert fault_in(table_of, crowd_code, crowd_value) is None, "and no rule is broken"
figure

# %% [markdown]
# None of these sums is wrong. But the runs do not agree, and that has a price. Two trainings from
# one seed drift apart. A test that fails once in ten runs cannot be told from noise. And when *all*
# results wobble, a real race hides among them.
#
# **The fix:** give every sum one owner, who adds in a fixed order. Here a thread owns a bucket
# and goes through all keys.

# %%
owned = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, float* table, int n) {
  const int bucket = blockIdx.x * blockDim.x + threadIdx.x;
  if (bucket >= 8) return;
  float sum = 0;
  for (int key = 0; key < n; ++key) {
    if (code[key] == bucket) sum += value[key];
  }
  table[bucket] = sum;
}
""".strip(),
    "scatter",
    file="owned.cu",
)
repeated = set()
for chosen in (*ORDERS, *range(5, 20)):
    with order(chosen):
        repeated.add(table_of(crowd_code, crowd_value, owned).tobytes())
        assert np.array_equal(table_of(code, value, owned), expected)
assert len(repeated) == 1, "the same bits in every order"
assert fault_in(table_of, crowd_code, crowd_value, owned) is None

# %% [markdown]
# Reading all keys for every bucket is slow, of course. The library's kernels have better owners:
# `shared_table` gives a thread a whole column of the table, `sorted_buckets` sorts the keys first.
# `variants` says what each of them promises. `compare` runs them side by side: "agrees" means
# within what rounding explains. We ask in several orders, and collect the bits.

# %%
queries, keys = (rng.integers(0, capacity, (96, 2), dtype=np.int32) for _ in range(2))
values = rng.standard_normal((96, 4)).astype(np.float32)

wanted = [
    "numpy:pairs",
    "emulated:global_table",
    "emulated:shared_table",
    "emulated:sorted_buckets",
    "stepped:global_table",
    "stepped:shared_table",
]
promise = {variant.name: variant.kernel.deterministic for variant in yoso_core.variants("lsh_cumulation")}
bits = {name: set() for name in wanted}
for chosen in ORDERS:
    with order(chosen):
        comparison = yoso_core.compare("lsh_cumulation", queries, keys, values, capacity, variants=wanted, repeats=1, emulate=True)
        assert comparison.agrees, "right in every order"
        for name in wanted:
            bits[name].add(yoso_core.lsh_cumulation(queries, keys, values, capacity, variant=name).tobytes())

figure, axes = draw.picture(width=7, height=3)
counts = [len(bits[name]) for name in wanted]
for kept, color, hatch, label in ((True, draw.BLUE, "", "promises the same bits"), (False, draw.ORANGE, "///", "promises nothing")):
    places = [place for place, name in enumerate(wanted) if promise[name] == kept]
    axes.barh(places, [counts[place] for place in places], 0.6, color=color, hatch=hatch, edgecolor=draw.INK, label=label)
axes.set_yticks(range(len(wanted)), wanted)
axes.invert_yaxis()
axes.set(title=f"Different results in {len(ORDERS)} orders", xlabel="results that differ in their bits", xticks=range(len(ORDERS) + 1))
axes.legend(loc="lower right")

for name, count in zip(wanted, counts, strict=True):
    assert (count == 1) == promise[name], name
figure

# %% [markdown]
# On a GPU, chance picks the order, and the column *same bits* of `compare` tells you after a few
# runs. In the emulator you pick it, and one call of `compare` stays in one order: change the order
# between calls, as above.
#
# ## Who finds what
#
# Let us put it all into one picture: every fault against every tool, each square filled by running
# it. The sanitizers need the compiler's libraries, and a process of their own that starts with them
# inside.


# %%
def dropped_tail(length, launch):
    table = np.zeros(capacity, np.float32)
    launch(scatter, length // 8, 8, code[:length], value[:length], table, np.int32(length))
    return table, right_table(code[:length], value[:length])


def out_of_bounds(length, launch):
    total, out = np.ones(length, np.float32), np.zeros(length, np.float32)
    launch(finish, -(-length // 8), 8, total, out, np.int32(length), np.int32(8))
    return out, total / 8


def plain_race(length, launch):
    table = np.zeros(capacity, np.float32)
    launch(race, -(-length // 8), 8, code[:length], value[:length], table, np.int32(length))
    return table, right_table(code[:length], value[:length])


def missing_barrier(length, launch):
    y = np.zeros(dim, np.float32)
    launch(hadamard_racy, 1, dim, x, y)
    return y, right_transform


def any_order(length, launch):
    table = np.zeros(capacity, np.float32)
    launch(scatter, crowd // 8, 8, crowd_code, crowd_value, table, np.int32(crowd))
    return table, right_table(crowd_code, crowd_value)


planted = {
    "dropped tail": dropped_tail,
    "out of bounds": out_of_bounds,
    "race": plain_race,
    "missing barrier": missing_barrier,
    "sum in any order": any_order,
}

# %%
IN_A_CHILD = """
from yoso_core.gpu import KernelText
from yoso_core.gpu.emulator import Emulator
for fault, text, name, grid, block, args in launches:
    Emulator().launch(KernelText(text, name, file=fault), (grid,), (block,), args)
"""
recorded = []
for fault, case in planted.items():
    case(n, lambda kernel, grid, block, *args, fault=fault: recorded.append((fault, kernel.text, kernel.name, grid, block, args)))
reports = {kind: sanitized(kind, IN_A_CHILD, launches=recorded) for kind in ("address", "thread") if sanitizers.missing(kind) is None}
for kind, made in reports.items():
    for report in made:
        print(f"{kind} sanitizer: {report.kind} in {report.file!r}, line {report.line}")

# %%
tools = ["comparison, n = 56", "comparison, n = 61", "orders", "checked", *(f"{kind} sanitizer" for kind in reports)]
table = []
for fault, case in planted.items():
    found_by = []
    for length in (56, 61):
        try:
            result, wanted_result = case(length, launch)
            found_by.append(np.abs(result - wanted_result).max() > 1e-6 * np.abs(crowd_value).sum())
        except KernelFault:  # nothing to compare: the launch stops, as any launch here does
            found_by.append(True)
    seen = set()
    for chosen in ORDERS:
        with order(chosen), suppress(KernelFault):
            seen.add(case(n, launch)[0].tobytes())
    found_by.append(len(seen) != 1)
    found_by.append(fault_in(case, n, launch) is not None)
    found_by += [any(report.file == fault for report in made) for made in reports.values()]
    table.append(found_by)
table = np.array(table)

figure, axes = draw.picture(width=8, height=3.6)
draw.heat_map(axes, 0.45 * table, rows=list(planted), limits=(0, 1))
for (row, column), yes in np.ndenumerate(table):
    axes.text(column, row, "found" if yes else "\N{EN DASH}", ha="center", va="center", fontweight="bold" if yes else "normal")
axes.set_xticks(range(len(tools)), [tool.replace(" ", "\n", 1) for tool in tools])
axes.xaxis.tick_top()
axes.set_aspect(0.6)

assert table.any(axis=1).all(), "every fault is found by some tool"
assert not table.all(axis=0).any(), "no tool finds every fault"
assert [fault for fault, yes in zip(planted, table[:, tools.index("checked")], strict=True) if yes] == [
    "out of bounds",
    "race",
    "missing barrier",
]
figure

# %% [markdown]
# Read it by columns. A comparison at a round length finds one fault of five. The tools that watch
# accesses find what breaks a rule, and know nothing of your intentions. Only a definition knows
# those. So the library's tests do all of it: every kernel, at odd lengths, against the definition,
# under `checked`, in several orders, under both sanitizers; and a test takes out every single
# barrier and demands that the check notices.
#
# ## What to keep
#
# - A result that is right proves little. Ask whether it could be wrong: other lengths, other
#   orders.
# - Comparison finds what a kernel should have done and did not. `checked` finds what it must not
#   do, and names the line.
# - A sum of floats in any order is right, and not repeatable. One owner for each sum, and it
#   repeats.
#
# Next: [8. Gradients](08_gradients.ipynb).
#
# ## Exercise 1: fix a kernel
#
# Each block of 16 threads should add up its 16 entries of `x`; the last block may have fewer. In
# shared memory, the upper half is added to the lower, then the second quarter to the first, and so
# on. There are three faults in it. Fix them. (The checker uses the stepper: several lengths, every
# order.)


# %% tags=["exercise-1"]
@cuda.jit
def block_sums(x, out):
    """``out[b] = x[16 b] + ... + x[16 b + 15]``, as far as there are entries."""
    buffer = cuda.shared.array(16, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    buffer[t] = x[i]
    step = 8
    while step > 0:
        if t < step:
            buffer[t] += buffer[t + step]
            cuda.syncthreads()
        step //= 2
    if t == 0:
        out[cuda.blockIdx.x] = buffer[0]


# %% tags=["check-1"]
for length in (16, 32, 1, 41):
    x1 = np.arange(1, length + 1, dtype=np.float32)
    sums1 = np.add.reduceat(x1, np.arange(0, length, 16))
    for chosen in ORDERS:
        out1 = np.full(len(sums1), -1, np.float32)
        try:
            with order(chosen):
                Stepper().launch(block_sums, (len(sums1),), (16,), (x1, out1))
        except KernelFault as fault:
            raise AssertionError(f"{length} entries, order {chosen}: {fault}") from fault
        assert np.array_equal(out1, sums1), f"{length} entries, order {chosen}: got {out1}, should be {sums1}"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: write the check
#
# Now you are the tool. `is_right` gets a function `cumulate(code, value)` that returns the table of
# 8 buckets (like `table_of`), and says whether it can be trusted. The checker gives you two good
# ones and four bad ones.


# %% tags=["exercise-2"]
def is_right(cumulate):
    """True if ``cumulate`` gives the right table at every length and in every order, and breaks
    no rule.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
def forgets_to_wait(code, value):
    """One block, whose first thread clears the table and then does not wait for the others, nor
    they for it.
    """
    text = scatter.text.replace("  if (key", "  if (key < 8) table[key] = 0;\n  if (key")
    result = np.zeros(capacity, np.float32)
    launch(KernelText(text, "scatter"), 1, 64, code, value, result, np.int32(len(code)))
    return result


suspects = {
    "the first kernel of this tutorial": (table_of, True),
    "a thread for each bucket": (lambda code, value: table_of(code, value, owned), True),
    "the launch that drops the tail": (table_with_tail_dropped, False),
    "the race": (lambda code, value: table_of(code, value, race), False),
    "the race in slow motion": (lambda code, value: table_of(code, value, race_in_slow_motion), False),
    "a kernel that clears the table and does not wait": (forgets_to_wait, False),
}
for suspect, (cumulate, good) in suspects.items():
    verdict = is_right(cumulate)
    assert isinstance(verdict, bool | np.bool_), f"is_right must return True or False, got {verdict!r}"
    assert verdict == good, f"{suspect}: is_right says {verdict}, it should say {good}"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: atomics that repeat
#
# Sums of *integers* do not depend on their order. So multiply every value by $2^{32}$, round to an
# integer, add integers, and divide at the end: *fixed point*. Write the missing statement. `table`
# holds 64-bit unsigned integers, since that is the width that `atomicAdd` takes; a negative number
# keeps its bits when it is converted by way of `(unsigned long long)(long long)`. Without that way
# a GPU makes it 0, and so does the emulator.

# %% tags=["exercise-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  const double scaled = value[key] * 4294967296.0;  // 2^32
  // exercise 3 is waiting for you
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)

# %% tags=["check-3"]
assert "waiting for you" not in fixed_point.text, "exercise 3 is waiting for you"
table3 = np.zeros(capacity, np.uint64)
fault3 = fault_in(launch, fixed_point, crowd // 8, 8, crowd_code, crowd_value, table3, np.int32(crowd))
assert fault3 is None, f"the check finds a fault: {fault3}"
results3 = set()
for chosen in (*ORDERS, *range(5, 20)):
    table3 = np.zeros(capacity, np.uint64)
    with order(chosen):
        launch(fixed_point, crowd // 8, 8, crowd_code, crowd_value, table3, np.int32(crowd))
    results3.add(table3.tobytes())
    off = abs(table3.view(np.int64)[0] / 2**32 - exact)
    assert off < 1e-5, f"order {chosen}: the sum is off by {off:.3g}"
assert len(results3) == 1, f"{len(results3)} different results in {len(ORDERS) + 15} orders"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** A thread without an entry brings a zero, and stays: it must not leave, since the
# barriers need it. The barrier stands where every thread meets it, in front of every step, so that
# the first step too waits until the buffer is full.


# %% tags=["solution-1"]
@cuda.jit
def block_sums(x, out):
    buffer = cuda.shared.array(16, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    buffer[t] = x[i] if i < x.size else 0
    step = 8
    while step > 0:
        cuda.syncthreads()
        if t < step:
            buffer[t] += buffer[t + step]
        step //= 2
    if t == 0:
        out[cuda.blockIdx.x] = buffer[0]


# %% [markdown]
# **Exercise 2.** Odd lengths for the tail, orders for what depends on them, and `checked` for the
# race that no order shows.


# %% tags=["solution-2"]
def is_right(cumulate):
    for length in (1, 7, 56, 61):
        codes, ones = code[:length], value[:length]
        for chosen in ORDERS:
            with order(chosen):
                try:
                    with checked():
                        result = cumulate(codes, ones)
                except KernelFault:
                    return False
            if not np.array_equal(result, right_table(codes, ones)):
                return False
    return True


# %% [markdown]
# **Exercise 3.** One atomic addition of integers. The price: a sum must stay below $2^{31}$, and
# what is smaller than $2^{-32}$ is lost.

# %% tags=["solution-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  const double scaled = value[key] * 4294967296.0;  // 2^32
  atomicAdd(&table[code[key]], (unsigned long long)(long long)scaled);
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)


# %% tags=["wrong-1"]
@cuda.jit
def block_sums(x, out):
    buffer = cuda.shared.array(16, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    if i >= x.size:
        return  # and never comes to the barriers that the others wait at
    buffer[t] = x[i]
    step = 8
    while step > 0:
        cuda.syncthreads()
        if t < step:
            buffer[t] += buffer[t + step]
        step //= 2
    if t == 0:
        out[cuda.blockIdx.x] = buffer[0]


# %% tags=["wrong-1"]
@cuda.jit
def block_sums(x, out):
    buffer = cuda.shared.array(16, np.float32)
    i, t = cuda.grid(1), cuda.threadIdx.x
    buffer[t] = x[i] if i < x.size else 0
    cuda.syncthreads()
    step = 8
    while step > 0:  # no barrier between the steps
        if t < step:
            buffer[t] += buffer[t + step]
        step //= 2
    if t == 0:
        out[cuda.blockIdx.x] = buffer[0]


# %% tags=["wrong-2"]
def is_right(cumulate):
    return bool(np.array_equal(cumulate(code[:56], value[:56]), right_table(code[:56], value[:56])))  # one round length, one order


# %% tags=["wrong-2"]
def is_right(cumulate):
    for length in (1, 7, 56, 61):
        for chosen in ORDERS:
            with order(chosen):
                try:
                    result = cumulate(code[:length], value[:length])  # unwatched: a race passes
                except KernelFault:
                    return False
            if not np.array_equal(result, right_table(code[:length], value[:length])):
                return False
    return True


# %% tags=["wrong-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  table[code[key]] += (unsigned long long)(long long)(value[key] * 4294967296.0);  // a race
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)

# %% tags=["wrong-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  atomicAdd(&table[code[key]], (unsigned long long)((long long)value[key] * 4294967296ll));  // rounded first, then scaled
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)

# %% tags=["wrong-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  atomicAdd(&table[code[key]], (unsigned long long)(value[key] * 4294967296.0));  // negative numbers become 0
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)

# %% tags=["wrong-3"]
fixed_point = KernelText(
    """
extern "C" __global__ void scatter(const int* code, const float* value, unsigned long long* table, int n) {
  const int key = blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= n) return;
  atomicAdd(&table[key], (unsigned long long)(long long)(value[key] * 4294967296.0));  // the key, and not its bucket
}
""".strip(),
    "scatter",
    file="fixed_point.cu",
)
