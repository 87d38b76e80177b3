# %% [markdown]
# # 5. Your first kernel in Python
#
# **You will be able to** write a CUDA kernel in Python, say which thread does what, keep thousands
# of threads out of each other's way, and read this library's own Numba kernels.
#
# **Time:** 45 minutes, and 30 for the exercises.
#
# **You need:** tutorials 3 and 4. No GPU: every kernel is stepped through on the CPU.
#
# **Source:** [`yoso_core.gpu.numba_kernels`](../gpu/numba_kernels/cumulation.py) and
# [`yoso_core.gpu.emulator.stepper`](../gpu/emulator/stepper.py); section 3.2 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import inspect
import sys

import numpy as np
from matplotlib.patches import Rectangle
from numba import cuda, float32

import yoso_core
from yoso_core import draw
from yoso_core.gpu import NumbaCudaVariant
from yoso_core.gpu.emulator import KernelFault, order
from yoso_core.gpu.emulator.stepper import Stepper, missing

if missing():
    raise RuntimeError(missing())
draw.use_look()
rng = np.random.default_rng(5)

# %% [markdown]
# ## One function, many threads
#
# A CPU runs a loop: one worker, who takes entry 0, then entry 1, then entry 2. A GPU has no loop.
# It starts one *thread* for every entry, and all of them run **the same function**, called a
# *kernel*. So the first question of every thread is: *which one am I?*
#
# Threads come in teams. A *block* is a team of up to 1024 threads that can talk to each other; a
# *grid* is all the blocks of one launch. A thread finds its number within the team in
# `cuda.threadIdx.x`, the number of its team in `cuda.blockIdx.x`, and the size of a team in
# `cuda.blockDim.x`. That is enough for a number that nobody else has.


# %%
@cuda.jit
def who_am_i(block, thread):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    block[i] = cuda.blockIdx.x
    thread[i] = cuda.threadIdx.x


# %% [markdown]
# `@cuda.jit` is Numba's: it compiles this Python function for a GPU. We have none, so we hand the
# kernel to a `Stepper`, which runs the very same function on the CPU, thread by thread, and watches
# every step. A launch names the grid (3 blocks), the block (4 threads) and the arguments. A kernel
# returns nothing: it writes into arrays that it is given.

# %%
gpu = Stepper()
block, thread = gpu.empty((12,), np.int32), gpu.empty((12,), np.int32)
gpu.launch(who_am_i, (3,), (4,), (block, thread))

assert block.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
assert thread.tolist() == [0, 1, 2, 3] * 3
assert np.array_equal(4 * block + thread, np.arange(12))

figure, axes = draw.picture(width=9, height=1.5)
for i in range(12):
    axes.add_patch(Rectangle((i + 0.04, 0), 0.92, 1, facecolor=draw.PALETTE[block[i]], alpha=0.35, edgecolor=draw.INK))
    axes.text(i + 0.5, 0.5, f"block {block[i]}\nthread {thread[i]}", ha="center", va="center", fontsize=8.5)
    axes.text(i + 0.5, -0.22, f"i = {i}", ha="center", va="center", fontsize=8.5)
axes.set(xlim=(0, 12), ylim=(-0.4, 1.05), title="What 12 threads wrote: who they are")
axes.axis("off")
figure

# %% [markdown]
# With a GPU and CuPy the same launch is one line, with the grid and the block in square brackets.
# Nothing else in this tutorial changes.
#
# ```python
# import cupy
# block, thread = cupy.empty(12, cupy.int32), cupy.empty(12, cupy.int32)
# who_am_i[(3,), (4,)](block, thread)
# ```
#
# ## A grid that does not fit
#
# Now something useful: add two vectors of 10 numbers, with blocks of 4. How many blocks? Two, which
# is `10 // 4`, leave out the last two entries. Our stepper fills new memory with NaN, so what
# nobody wrote stays visible.


# %%
@cuda.jit
def add_without_a_guard(x, y, out):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    out[i] = x[i] + y[i]


x = np.arange(10, dtype=np.float32)
y = np.full(10, 100, np.float32)
too_short = gpu.empty((10,), np.float32)
gpu.launch(add_without_a_guard, (10 // 4,), (4,), (x, y, too_short))
print(too_short)
assert np.isnan(too_short).tolist() == [False] * 8 + [True] * 2

# %% [markdown]
# Three blocks are too many: they have 12 threads, and threads 10 and 11 have no entry. On a GPU
# these two would write *somewhere*, into memory that belongs to something else, and mostly nobody
# would notice. The stepper refuses, and says who did it and where.

# %%
try:
    gpu.launch(add_without_a_guard, (3,), (4,), (x, y, gpu.empty((10,), np.float32)))
except KernelFault as found:
    fault = found
print(fault)
assert (fault.block, fault.thread) == ((2, 0, 0), (2, 0, 0))

# %% [markdown]
# So the rule has two halves, and every kernel in this library follows it: **round the number of
# blocks up, and let each thread ask whether there is work for it.** The question is called a
# *guard*. In the picture, a square says that this thread wrote this entry.


# %%
@cuda.jit
def add(x, y, out):
    i = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if i < out.shape[0]:
        out[i] = x[i] + y[i]


def ceil_div(a, b):
    return -(-a // b)


out = gpu.empty((10,), np.float32)
gpu.launch(add, (ceil_div(10, 4),), (4,), (x, y, out))
assert ceil_div(10, 4) == 3
assert np.array_equal(out, x + y)

figure, panels = draw.picture(2, height=3.4, sharey=True)
for axes, blocks, title in zip(panels, (10 // 4, ceil_div(10, 4)), ("10 // 4 blocks", "rounded up, with a guard"), strict=True):
    written = gpu.empty((10,), np.float32)
    gpu.launch(add, (blocks,), (4,), (x, y, written))
    entries = np.flatnonzero(~np.isnan(written)).tolist()
    draw.traffic(axes, [(i, i, "write") for i in entries], threads=12, addresses=10, block=4)
    axes.set(title=title, xlabel="entry of out")
    if blocks == 2:
        axes.text(8.5, 5.2, "nobody", ha="center", fontsize=9)
        axes.axvspan(7.5, 9.5, color=draw.FAINT, zorder=0)
        axes.text(2.0, 9.7, "no such block", ha="center", fontsize=9)
    else:
        axes.text(4.5, 10.7, "these two return", ha="center", fontsize=9)
panels[1].set_ylabel("")
figure

# %% [markdown]
# ## Step by step
#
# `trace` launches as `launch` does and tells what happened: every line that a thread was about to
# run, in the order in which it happened. Let us watch 6 threads add 5 numbers. The picture has a
# row for each thread and a column for each moment.


# %%
def draw_steps(axes, steps, title):
    """Who ran which line when: a column for each moment, a row for each thread; a dashed line is
    a barrier.
    """
    rows = sorted({(step.block, step.thread) for step in steps if step.thread})
    lines = {step.line: step.text for step in steps if step.thread}
    for number, (line, text) in enumerate(sorted(lines.items())):
        where = [(at, rows.index((s.block, s.thread))) for at, s in enumerate(steps) if s.thread and s.line == line]
        axes.plot(*zip(*where, strict=True), draw.MARKERS[number], color=draw.PALETTE[number], markersize=6.5, label=text)
    for at, step in enumerate(steps):
        if step.thread is None:
            axes.axvline(at, color=draw.INK, linestyle=draw.DASHES, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"block {block[0]}, thread {thread[0]}" for block, thread in rows])
    axes.set(title=title, ylim=(len(rows) - 0.4, -0.6), xlim=(-1, len(steps)))
    axes.grid(axis="y")


def legend_of_lines(axes, columns):
    look = {"prop": {"family": "DejaVu Sans Mono", "size": 8}, "columnspacing": 1.2, "handletextpad": 0.3}
    axes.legend(ncols=columns, loc="upper left", bbox_to_anchor=(-0.16, -0.3), **look)


figure, panels = draw.picture(rows=2, width=9, height=4.8, sharex=True)
for axes, chosen in zip(panels, ("forward", 5), strict=True):
    out = gpu.empty((5,), np.float32)
    with order(chosen):
        steps = gpu.trace(add, (3,), (2,), (x[:5], y[:5], out))
    assert np.array_equal(out, x[:5] + y[:5])
    draw_steps(axes, steps, "In order" if chosen == "forward" else "In an order drawn by chance")
panels[1].set_xlabel("moment")
legend_of_lines(panels[1], 3)
figure

# %% [markdown]
# Thread 1 of block 2 asks its question and stops: the guard at work.
#
# Look at the lower picture too. **Nobody promises an order.** A GPU starts blocks as it has room
# for them, and within a block the threads advance as the hardware likes. The stepper lets one
# thread run at a time, in an order that we choose: `"forward"`, `"reverse"`, or drawn from a seed.
# A kernel is right when it is right in *every* order, so from here on we always run several.

# %%
ORDERS = ("forward", "reverse", 1, 2, 3)


def in_every_order(kernel, grid, block, args, shared=0):
    """Launch on fresh copies of the arguments, once for each order; return the copies."""
    results = []
    for chosen in ORDERS:
        copies = tuple(x.copy() for x in args)
        with order(chosen):
            gpu.launch(kernel, grid, block, copies, shared)
        results.append(copies)
    return results


for _, _, out in in_every_order(add, (3,), (4,), (x, y, gpu.empty((10,), np.float32))):
    assert np.array_equal(out, x + y)

# %% [markdown]
# ## Shared memory: the butterflies of tutorial 3
#
# Adding vectors is easy because no thread needs another. A Hadamard transform is not like that:
# every output depends on every input. In tutorial 3 it was $\log_2 D$ stages of *butterflies*. At
# stride $s$, the entries $i$ and $i + s$ become their sum and their difference.
#
# We give each vector a block, and each butterfly of a stage a thread: $D / 2$ threads. The vector
# lies in *shared memory*, a small and quick piece of memory (48 KiB to a block are always there)
# that the threads of one block share and no other block sees.
#
# Which two entries does thread $t$ take? It counts the pairs of a stage: pair $t$ begins at
# $i = 2t - (t \bmod s)$. In the picture, a square says that this thread reads and writes this
# entry.

# %%
D = 8
HALF = D // 2
strides = [4, 2, 1]

figure, panels = draw.picture(3, width=9, height=2.6, sharey=True)
for axes, stride in zip(panels, strides, strict=True):
    t = np.arange(HALF)
    i = 2 * t - t % stride
    assert sorted([*i, *(i + stride)]) == list(range(D)), "each entry belongs to one thread"
    touches = [(int(thread), int(entry), "write") for first in (i, i + stride) for thread, entry in zip(t, first, strict=True)]
    draw.traffic(axes, touches, threads=HALF, addresses=D)
    axes.set(title=f"stride {stride}", xlabel="entry", ylabel="thread" if stride == 4 else "")
figure

# %% [markdown]
# Within a stage nobody meets anybody: each entry has one thread, which reads it and writes it. But
# from one stage to the next the entries change hands. At stride 2, thread 0 needs entry 2, which at
# stride 4 was the work of thread 2. It must not look before thread 2 is done.
#
# That is what a *barrier* is for. At `cuda.syncthreads()` a thread waits until all threads of its
# block have arrived.


# %%
@cuda.jit
def hadamard(vectors):
    entry = cuda.shared.array(D, float32)
    vector, t = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(t, D, HALF):
        entry[i] = vectors[vector, i]
    cuda.syncthreads()
    stride = D // 2
    while stride > 0:
        i = 2 * t - t % stride
        a, b = entry[i], entry[i + stride]
        entry[i], entry[i + stride] = a + b, a - b
        cuda.syncthreads()
        stride //= 2
    for i in range(t, D, HALF):
        vectors[vector, i] = entry[i]


vectors = rng.integers(-4, 5, size=(3, D)).astype(np.float32)
for (out,) in in_every_order(hadamard, (len(vectors),), (HALF,), (vectors,)):
    assert np.array_equal(out, yoso_core.hadamard_transform(vectors))

# %% [markdown]
# `cuda.shared.array(D, float32)` does not give each thread an array: it gives *the block* one, and
# every thread of the block gets the same. At a barrier `trace` keeps a copy of it, so we can look
# into shared memory between the stages.

# %%
steps = gpu.trace(hadamard, (1,), (HALF,), (vectors[:1].copy(),))
stages = [step.shared["entry"] for step in steps if step.thread is None]
assert len(stages) == 1 + len(strides)
assert np.array_equal(stages[0], vectors[0])
assert np.array_equal(stages[-1], yoso_core.hadamard_transform(vectors[0]))

figure, axes = draw.picture(width=7, height=3.4)
draw.butterflies(axes, stages, strides=strides)
axes.set_title("Shared memory of block 0, as found at its four barriers")
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
figure

# %% [markdown]
# And here is the same run in time, with only the lines that touch shared memory. Between two
# barriers the threads come in any order; no thread is ever on the other side of a barrier than the
# rest.


# %%
def touching_memory(steps):
    return [step for step in steps if step.thread is None or "entry[" in step.text]


figure, panels = draw.picture(rows=2, width=9, height=4.6, sharex=True)
for axes, chosen in zip(panels, ("forward", 6), strict=True):
    with order(chosen):
        steps = touching_memory(gpu.trace(hadamard, (1,), (HALF,), (vectors[:1].copy(),)))
    draw_steps(axes, steps, "In order" if chosen == "forward" else "In an order drawn by chance")
panels[1].set_xlabel("moment; a dashed line is a barrier")
legend_of_lines(panels[1], 2)
figure

# %% [markdown]
# What if we forget one? Here is the kernel without the barrier in its loop. It is wrong in every
# order, and not always in the same way: some thread reads an entry that another has not written
# yet.


# %%
@cuda.jit
def hadamard_without_a_barrier(vectors):
    entry = cuda.shared.array(D, float32)
    vector, t = cuda.blockIdx.x, cuda.threadIdx.x
    for i in range(t, D, HALF):
        entry[i] = vectors[vector, i]
    cuda.syncthreads()
    stride = D // 2
    while stride > 0:
        i = 2 * t - t % stride
        a, b = entry[i], entry[i + stride]
        entry[i], entry[i + stride] = a + b, a - b
        stride //= 2
    for i in range(t, D, HALF):
        vectors[vector, i] = entry[i]


found = [out[0] for (out,) in in_every_order(hadamard_without_a_barrier, (1,), (HALF,), (vectors[:1],))]
right = yoso_core.hadamard_transform(vectors[0])
assert not any(np.array_equal(x, right) for x in found)
assert len({x.tobytes() for x in found}) > 1

figure, axes = draw.picture(width=7, height=3)
names = [f"order {chosen}" if isinstance(chosen, int) else chosen for chosen in ORDERS]
draw.heat_map(axes, np.array([right, *found]), rows=["right", *names], columns=list("01234567"), numbers=".0f", signed=True)
axes.axhline(0.5, color=draw.INK, linewidth=1.5)
axes.set(title="Without the barrier", xlabel="entry")
figure

# %% [markdown]
# On a GPU this bug is worse than here. Neighboring threads mostly advance together, so the kernel
# may be right a thousand times, and wrong when the machine is busy. The stepper lets threads get as
# far ahead of each other as they may. That is why it finds in milliseconds what a GPU hides.
#
# One more rule of barriers: **all** threads of a block must reach **the same** one. If some leave
# early, older GPUs let the rest wait forever. Newer ones wait only for the threads that are left,
# and what the others were to bring is missing. Keep `return` and `if` away from `syncthreads`.


# %%
@cuda.jit
def some_leave_early(x):
    buffer = cuda.shared.array(8, float32)
    i = cuda.threadIdx.x
    if i >= x.shape[0]:
        return
    buffer[i] = x[i]
    cuda.syncthreads()
    x[i] = buffer[x.shape[0] - 1 - i]


gpu.launch(some_leave_early, (1,), (8,), (np.zeros(8, np.float32),))  # nobody leaves: all is well
try:
    gpu.launch(some_leave_early, (1,), (8,), (np.zeros(5, np.float32),))
except KernelFault as found:
    fault = found
print(fault)
assert "every thread of a block should meet the same barriers" in str(fault)

# %% [markdown]
# ## Atomics: the table of tutorial 4
#
# Cumulation adds each value to a bucket, and the bucket is named by a hash code. Here no numbering
# helps: two keys with one code go to one bucket, and we cannot know beforehand which.
#
# `table[c] += v` looks like one action. It is three: read the entry, add, write it back. If another
# thread writes between our read and our write, its addition is lost. Our stepper never stops a
# thread within a line, so it would not show that. (Tutorial 7 has a tool that does.) We put the gap
# there ourselves, with a barrier where a GPU *may* switch.


# %%
@cuda.jit
def add_with_a_gap(code, value, table):
    i = cuda.threadIdx.x
    old = table[code[i]]
    cuda.syncthreads()  # the others have their turn
    table[code[i]] = old + value[i]


@cuda.jit
def add_without_a_gap(code, value, table):
    i = cuda.threadIdx.x
    table[code[i]] += value[i]  # as wrong, but the stepper is too polite to interrupt it


@cuda.jit
def add_atomically(code, value, table):
    i = cuda.threadIdx.x
    cuda.atomic.add(table, code[i], value[i])


code = np.array([0, 1, 2, 1, 3, 2, 1, 0], np.int32)
value = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)
table = np.zeros(4, np.float32)
right = np.bincount(code, value)

lost = [result[2] for result in in_every_order(add_with_a_gap, (1,), (8,), (code, value, table))]
assert not any(np.array_equal(x, right) for x in lost)
assert all(x[3] == right[3] for x in lost), "bucket 3 has one key: nothing can be lost"
for kernel in (add_without_a_gap, add_atomically):
    for _, _, out in in_every_order(kernel, (1,), (8,), (code, value, table)):
        assert np.array_equal(out, right)

figure, axes = draw.picture(width=7)
for number, (name, sums) in enumerate({"atomic, in every order": right, "with a gap, forward": lost[0], "reverse": lost[1]}.items()):
    hatch = ("", "//", "..")[number]
    bars = axes.bar(np.arange(4) + 0.27 * (number - 1), sums, 0.25, color=draw.PALETTE[number], hatch=hatch, edgecolor=draw.INK, label=name)
    axes.bar_label(bars, fmt="%g", fontsize=8.5)
axes.set(title="Eight threads add to four buckets", xlabel="bucket", ylabel="sum found", ylim=(0, 15.5))
axes.set_xticks(range(4))
axes.legend(ncols=3, loc="upper center")
figure

# %% [markdown]
# In each bucket the last to write wins, and the additions of the others are gone. `cuda.atomic.add`
# does the three actions as one, and the hardware lets threads that want the same entry wait for
# each other.
#
# Atomics keep every addend. They do not keep the *order* of the additions, and a float sum depends
# on it: that is why such a kernel is not repeatable to the last bit. Usually it is only the last
# bit. With numbers picked for the purpose it is everything:

# %%
one_bucket = np.zeros(4, np.int32)
picked = np.array([1e8, -1e8, 1, 1], np.float32)
sums = [float(result[2][0]) for result in in_every_order(add_atomically, (1,), (4,), (one_bucket, picked, np.zeros(1, np.float32)))]
print(dict(zip(ORDERS, sums, strict=True)))
assert (sums[0], sums[1]) == (2, 0)

# %% [markdown]
# ## The cumulation, whole
#
# Now all of it: $m$ hashes, values with several dims, and tables `(num_hash, buckets, dims)`. Keys
# *scatter*, queries *gather*:
#
# $$T_h[c] = \sum_{j:\, h(k_j) = c} v_j, \qquad \mathrm{out}_i = \frac{1}{m} \sum_h T_h[h(q_i)].$$
#
# A block is a rectangle this time: `threadIdx.x` counts value dims, `threadIdx.y` counts tokens.
# Neighbors in x are the ones that the hardware runs side by side, so they get neighboring
# addresses. Tutorial 6 measures what that saves.


# %%
@cuda.jit
def scatter(key_hash_code, value, table):
    c = cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if key < value.shape[0] and c < value.shape[1]:
        for h in range(table.shape[0]):
            cuda.atomic.add(table, (h, key_hash_code[key, h], c), value[key, c])


@cuda.jit
def gather(query_hash_code, table, out):
    c = cuda.threadIdx.x
    query = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if query < out.shape[0] and c < out.shape[1]:
        total = float32(0)
        for h in range(table.shape[0]):
            total += table[h, query_hash_code[query, h], c]
        out[query, c] = total / float32(table.shape[0])


n, dim, value_dim, m, tau = 18, 16, 4, 8, 3
key = np.repeat(rng.standard_normal((6, dim), dtype=np.float32), 3, axis=0) + 0.7 * rng.standard_normal((n, dim), dtype=np.float32)
query = key + 0.2 * rng.standard_normal((n, dim), dtype=np.float32)
value = rng.standard_normal((n, value_dim), dtype=np.float32)
signs = yoso_core.sample_signs(m, tau, dim, rng=0)
query_hash_code, key_hash_code = (yoso_core.fast_hash(x, signs, m, tau) for x in (query, key))

blocks = (ceil_div(n, 4),)
expected = yoso_core.lsh_cumulation(query_hash_code, key_hash_code, value, 2**tau)
empty = np.zeros((m, 2**tau, value_dim), np.float32)
for _, _, table in in_every_order(scatter, blocks, (value_dim, 4), (key_hash_code, value, empty)):
    for _, _, out in in_every_order(gather, blocks, (value_dim, 4), (query_hash_code, table, gpu.empty((n, value_dim), np.float32))):
        assert np.allclose(out, expected, atol=1e-6)

# %% [markdown]
# On the left, the first hash of the scatter: which key adds to which bucket. A dark edge marks a
# bucket that several threads add to: there the atomics earn their keep. On the right, the sums that
# these keys leave.

# %%
first = key_hash_code[:, 0]
assert np.allclose(table[0], [value[first == c].sum(axis=0) for c in range(2**tau)], atol=1e-6)

figure, (left, right) = draw.picture(2, height=4.2)
draw.traffic(left, [(key, int(first[key]), "write") for key in range(n)], threads=n, addresses=2**tau, block=4)
left.set_yticks(range(0, n, 2))
left.set(title="Who adds where, hash 0", xlabel="bucket", ylabel="key")
draw.legend_under_title(left)
draw.heat_map(right, table[0], rows=list("01234567"), columns=list("0123"), numbers=".1f", signed=True)
right.set_aspect("auto")
right.set(xlabel="value dim", ylabel="bucket")
right.set_title("Table of hash 0", pad=26)
figure

# %% [markdown]
# ## Now read a real one
#
# You know everything that the library's own Numba kernel uses. Here it is, as it runs on GPUs. It
# has two things that ours lacks: a second grid axis for the heads, and a mask that says which keys
# take part.

# %%
from yoso_core.gpu.numba_kernels import cumulation, hashing

print(inspect.getsource(cumulation.add_keys_to_table.py_func))

# %% [markdown]
# `yoso kernel` lists all kernels of the library, and `yoso kernel hash_by_chain` prints the
# Hadamard hash: your butterflies, round after round, with signs in between, and from the fourth
# round on bits put into codes. Its shared memory has size 0 in the source: that means as many bytes
# as the launch asks for.
#
# Every kernel can be called by name as a *variant*; `stepped:` is the one that runs in the stepper.
# All must agree with the definition.

# %%
assert "cuda.shared.array(0, vectors.dtype)" in inspect.getsource(hashing.hash_by_chain.py_func)
assert np.array_equal(yoso_core.fast_hash(key, signs, m, tau, variant="stepped:shared_memory"), key_hash_code)

# %% [markdown]
# And yours? `compare` puts a kernel of your own beside the library's. It asks for a *launcher*: a
# function that is given the device and the arguments of `yoso_core.lsh_cumulation`, makes room,
# launches the kernels, and returns the result. `NumbaCudaVariant` says what kind of kernel it is.


# %%
def own_cumulation(device, query_hash_code, key_hash_code, value, hashtable_capacity):
    n, value_dim = value.shape
    grid, block = (ceil_div(n, 4),), (value_dim, 4)
    table = device.zeros((key_hash_code.shape[1], hashtable_capacity, value_dim), value.dtype)
    out = device.empty((query_hash_code.shape[0], value_dim), value.dtype)
    device.launch(scatter, grid, block, (key_hash_code, value, table))
    device.launch(gather, grid, block, (query_hash_code, table, out))
    return out


def compared_with_ours(launcher, **masks):
    """A launcher's kernels as ``stepped:yours``, beside four variants of the library."""
    names = ["numpy:pairs", "cpu:tables", "stepped:global_table", "stepped:shared_table"]
    own = {"yours": NumbaCudaVariant(launcher)}
    return yoso_core.compare(
        "lsh_cumulation", query_hash_code, key_hash_code, value, 2**tau, variants=names, also=own, emulate=True, repeats=1, **masks
    )


compared = compared_with_ours(own_cumulation)
print(compared)
assert compared.agrees
assert {row.variant: row.verdict for row in compared.rows}["stepped:yours"] == "agrees"

# %% [markdown]
# If there is a GPU in your machine, this cell runs your own kernels on it.

# %%
gpu_missing = next(variant.reason for variant in yoso_core.variants("lsh_cumulation") if variant.name == "numba_cuda:global_table")
if gpu_missing is None:
    import cupy

    table = cupy.zeros((m, 2**tau, value_dim), cupy.float32)
    out = cupy.empty((n, value_dim), cupy.float32)
    scatter_launch, gather_launch = (kernel[blocks, (value_dim, 4)] for kernel in (scatter, gather))
    scatter_launch(cupy.asarray(key_hash_code), cupy.asarray(value), table)
    gather_launch(cupy.asarray(query_hash_code), table, out)
    assert np.allclose(out.get(), expected, atol=1e-6)
    print("Your kernels ran on the GPU, and agree.")
else:
    print("No GPU can be used here: the stepper has run everything.")

# %% [markdown]
# ## What to keep
#
# - A kernel is one function for many threads; each finds its work from `blockIdx` and `threadIdx`.
#   Round the grid up, and guard.
# - Threads of a block share memory. What one writes and another reads needs a barrier in between,
#   and every thread must reach it.
# - Where two threads may add to one entry, add atomically. Float sums then depend on the order, in
#   their last bits.
# - A kernel is right when it is right in every order. Try several.
#
# Next: [6. Kernels in CUDA C++](06_kernels_in_cuda_cpp.ipynb), the same again in the language of
# the hardware, with its traffic counted.
#
# ## Exercises
#
# The checkers run your kernel in every order of `ORDERS`. A kernel that is right in some of them is
# wrong.


# %%
def answers(kernel, grid, block, args):
    """What a kernel makes of its arguments, in every order. A fault is a wrong answer."""
    try:
        return in_every_order(kernel, grid, block, args)
    except KernelFault as fault:
        raise AssertionError(f"grid {grid} of blocks {block}: {fault}") from fault


# %% [markdown]
# ## Exercise 1: any grid will do
#
# Write `out = a * x + y` so that it is right for *every* grid, even one thread for a thousand
# entries. The trick is called a grid-stride loop: a thread takes entry `i`, then the entry one
# whole grid further, and so on. `cuda.grid(1)` is the `i` that you know, `cuda.gridsize(1)` is the
# number of threads in the grid.


# %% tags=["exercise-1"]
@cuda.jit
def axpy(a, x, y, out):
    """``out[i] = a * x[i] + y[i]`` for every i, in any grid."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
for n in (1, 7, 33):
    a, x, y = np.float32(2), np.arange(n, dtype=np.float32), np.full(n, 100, np.float32)
    for grid, block in (((1,), (1,)), ((1,), (8,)), ((5,), (8,)), ((3,), (2,))):
        for chosen, (*_, out) in zip(ORDERS, answers(axpy, grid, block, (a, x, y, gpu.empty((n,), np.float32))), strict=True):
            where = f"n = {n}, grid {grid} of blocks {block}, order {chosen}"
            assert not np.isnan(out).any(), f"{where}: entry {np.flatnonzero(np.isnan(out))[0]} was not written"
            assert np.array_equal(out, a * x + y), f"{where}: got {out}, need {a * x + y}"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: the sum of a block
#
# Each block adds up its 16 entries of `x` and writes one number to `out`. Put them into shared
# memory, then halve: 8 threads add the entry 8 further on to their own, then 4 threads the entry 4
# further on, then 2, then 1. Where do barriers have to stand? And what becomes of the threads
# beyond the end of `x`?

# %%
THREADS = 16


# %% tags=["exercise-2"]
@cuda.jit
def block_sums(x, out):
    """``out[b]`` is the sum of the entries ``16 b`` to ``16 b + 15`` of x, as far as there are
    any.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
for n in (16, 64, 41, 3):
    x = np.random.default_rng(n).integers(1, 9, size=n).astype(np.float32)
    blocks = ceil_div(n, THREADS)
    wanted = np.pad(x, (0, blocks * THREADS - n)).reshape(blocks, THREADS).sum(axis=1)
    for chosen, (_, out) in zip(ORDERS, answers(block_sums, (blocks,), (THREADS,), (x, gpu.empty((blocks,), np.float32))), strict=True):
        assert np.array_equal(out, wanted), f"n = {n}, order {chosen}: got {out}, need {wanted}"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: a scatter with a mask
#
# Write the scatter of this tutorial with a mask: key `j` takes part where `keep[j]` is not 0. The
# block is `(dims, keys)` as above. The table in the checker remembers who writes into it: an
# addition that is not atomic is refused, though the stepper alone would let it pass. At last it
# puts your scatter, with the gather from above, into the table of `compare`.


# %% tags=["exercise-3"]
@cuda.jit
def masked_scatter(key_hash_code, value, keep, table):
    """``table[h, code, c] += value[j, c]`` for every kept key j and hash h."""
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
class WatchedTable(np.ndarray):
    """A table that refuses to be written by a kernel itself. Atomics are the stepper's own code,
    so they may.
    """

    def __setitem__(self, index, new):
        writer = sys._getframe(2)  # behind the stepper's check of the index
        assert writer.f_globals["__name__"] == Stepper.__module__, f"line {writer.f_lineno}: an addition to the table that is not atomic"
        super().__setitem__(index, new)


for n, dims, rows in ((18, 4, 4), (5, 3, 2), (7, 4, 8)):
    draws = np.random.default_rng(n)
    codes = draws.integers(0, 8, size=(n, 3)).astype(np.int32)
    values = draws.integers(1, 9, size=(n, dims)).astype(np.float32)
    keep = (draws.random(n) < 0.6).astype(np.uint8)
    wanted = np.zeros((3, 8, dims), np.float32)
    for h in range(3):
        np.add.at(wanted[h], codes[keep != 0, h], values[keep != 0])
    for chosen in ORDERS:
        table = np.zeros_like(wanted).view(WatchedTable)
        try:
            with order(chosen):
                gpu.launch(masked_scatter, (ceil_div(n, rows),), (4, rows), (codes, values, keep, table))
        except KernelFault as fault:
            raise AssertionError(f"n = {n}, {dims} dims, order {chosen}: {fault}") from fault
        assert np.array_equal(table, wanted), f"n = {n}, {dims} dims, order {chosen}: the sums differ in {np.sum(table != wanted)} places"


def masked_cumulation(device, query_hash_code, key_hash_code, value, hashtable_capacity, *, key_mask):
    n, value_dim = value.shape
    grid, block = (ceil_div(n, 4),), (value_dim, 4)
    table = device.zeros((key_hash_code.shape[1], hashtable_capacity, value_dim), value.dtype)
    out = device.empty((query_hash_code.shape[0], value_dim), value.dtype)
    device.launch(masked_scatter, grid, block, (key_hash_code, value, key_mask.astype(np.uint8), table))
    device.launch(gather, grid, block, (query_hash_code, table, out))
    return out


compared = compared_with_ours(masked_cumulation, key_mask=np.arange(value.shape[0]) % 3 > 0)
assert compared.agrees, f"beside the library's kernels:\n{compared}"
print(compared)
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** The loop is its own guard: a thread that begins beyond the end does not enter it.


# %% tags=["solution-1"]
@cuda.jit
def axpy(a, x, y, out):
    for i in range(cuda.grid(1), out.shape[0], cuda.gridsize(1)):
        out[i] = a * x[i] + y[i]


# %% [markdown]
# **Exercise 2.** A thread beyond the end puts 0 into shared memory, and stays: the barriers need
# it. The barrier stands in the loop and outside the `if`, so that every thread meets it in every
# round.


# %% tags=["solution-2"]
@cuda.jit
def block_sums(x, out):
    partial = cuda.shared.array(THREADS, float32)
    t, i = cuda.threadIdx.x, cuda.grid(1)
    partial[t] = x[i] if i < x.shape[0] else 0
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            partial[t] += partial[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        out[cuda.blockIdx.x] = partial[0]


# %% [markdown]
# **Exercise 3.** The mask joins the guard. No barrier follows, so a thread that has nothing to do
# may leave.


# %% tags=["solution-3"]
@cuda.jit
def masked_scatter(key_hash_code, value, keep, table):
    c = cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if key >= value.shape[0] or c >= value.shape[1] or keep[key] == 0:
        return
    for h in range(table.shape[0]):
        cuda.atomic.add(table, (h, key_hash_code[key, h], c), value[key, c])


# %% tags=["wrong-1"]
@cuda.jit
def axpy(a, x, y, out):
    i = cuda.grid(1)
    if i < out.shape[0]:  # a guard, but no loop: a small grid drops the tail
        out[i] = a * x[i] + y[i]


# %% tags=["wrong-1"]
@cuda.jit
def axpy(a, x, y, out):
    for i in range(cuda.grid(1), out.shape[0] + 1, cuda.gridsize(1)):  # one entry too many
        out[i] = a * x[i] + y[i]


# %% tags=["wrong-2"]
@cuda.jit
def block_sums(x, out):
    partial = cuda.shared.array(THREADS, float32)
    t, i = cuda.threadIdx.x, cuda.grid(1)
    partial[t] = x[i] if i < x.shape[0] else 0
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            partial[t] += partial[t + half]  # no barrier in the loop: this may read what another has not added up yet
        half //= 2
    if t == 0:
        out[cuda.blockIdx.x] = partial[0]


# %% tags=["wrong-2"]
@cuda.jit
def block_sums(x, out):
    partial = cuda.shared.array(THREADS, float32)
    t, i = cuda.threadIdx.x, cuda.grid(1)
    if i >= x.shape[0]:
        return  # leaves the others at the barrier
    partial[t] = x[i]
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            partial[t] += partial[t + half]
        cuda.syncthreads()
        half //= 2
    if t == 0:
        out[cuda.blockIdx.x] = partial[0]


# %% tags=["wrong-3"]
@cuda.jit
def masked_scatter(key_hash_code, value, keep, table):
    c = cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if key >= value.shape[0] or c >= value.shape[1] or keep[key] == 0:
        return
    for h in range(table.shape[0]):
        table[h, key_hash_code[key, h], c] += value[key, c]  # not atomic


# %% tags=["wrong-3"]
@cuda.jit
def masked_scatter(key_hash_code, value, keep, table):
    c = cuda.threadIdx.x
    key = cuda.blockIdx.x * cuda.blockDim.y + cuda.threadIdx.y
    if key >= value.shape[0] or keep[key] == 0:  # no guard for the dims
        return
    for h in range(table.shape[0]):
        cuda.atomic.add(table, (h, key_hash_code[key, h], c), value[key, c])
