# %% [markdown]
# # 11. Long sequences
#
# **You will be able to** measure what attention costs as a text grows, run it over a million tokens
# on a laptop, choose the number of hashes and of bits for a length, read the error bar of a row,
# and say when YOSO is the wrong choice.
#
# **Time:** 45 minutes, and 25 for the exercises.
#
# **You need:** tutorials 1 and 4; PyTorch, for its softmax attention to compare with.
#
# **Source:** [`yoso_core.cpu.attention`](../cpu/attention.py),
# [`yoso_core.benchmarks.memory`](../benchmarks/memory.py),
# [`yoso_core.planning`](../yoso_core/planning.py) and [all measured
# numbers](../benchmarks/README.md); sections 3.2 and 4 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import json
import os
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import torch

import yoso_core
from yoso_core import draw
from yoso_core.reference import collision_rate, expected_weight, l2_normalize

draw.use_look()
torch.set_num_threads(1)

# %% [markdown]
# ## Counting first
#
# Exact attention looks at every pair of tokens, once to compare $d$ numbers and once to add $d$
# numbers. Sampled attention does two things with each token and each hash: add a value of $d$
# numbers to a table as a key, and read one as a query. Before that it hashes query and key, by a
# chain of $P$ rotations, which takes $P + 3$ Hadamard transforms (tutorial 3). In additions and
# multiply-adds for one head:
#
# $$\mathrm{exact} = 2 n^2 d, \qquad \mathrm{sampled}
# = 2 n m d + 2 n\, (P + 3)\, D \log_2 D.$$

# %%
m, tau, d = 32, 8, 64


def exact_steps(n):
    return 2 * n * n * d


def sampled_steps(n):
    rounds, padded_dim = yoso_core.sample_signs(m, tau, d).shape
    return 2 * n * m * d + 2 * n * rounds * padded_dim * int(np.log2(padded_dim))


assert yoso_core.sample_signs(m, tau, d).shape == (4 + 3, 64), "four rotations"
assert exact_steps(2000) == 4 * exact_steps(1000)
assert sampled_steps(2000) == 2 * sampled_steps(1000)
crossing = sampled_steps(1) / (2 * d)
assert np.isclose(exact_steps(crossing), sampled_steps(crossing))
print(f"the same number of steps at n = {crossing:.0f}")
print(f"at n = 16,384 exact attention takes {exact_steps(16384) / sampled_steps(16384):.0f} times as many")

# %% [markdown]
# Steps are not seconds. The exact ones are matrix products, which a processor does fastest of all;
# the sampled ones jump about in a table. So the lines will cross later than at that $n$. How late?
# That only a clock can tell.
#
# ## Measured here
#
# One head of 64 dims, in float32: sampling, its exact expectation, and PyTorch's softmax attention
# (`scaled_dot_product_attention`). The clock is that of the processor: the time that all threads of
# this process together worked. What else the machine does meanwhile hardly counts.


# %%
def processor_seconds(call, repeats=3, at_least=0.02):
    """Median processor time of a call; short calls are repeated until a sample lasts
    ``at_least`` seconds.
    """
    start = time.process_time()
    call()
    once = time.process_time() - start
    rounds = max(1, int(at_least / max(once, 1e-5)))
    samples = []
    for _ in range(repeats if once < 0.5 else 1):
        start = time.process_time()
        for _ in range(rounds):
            call()
        samples.append((time.process_time() - start) / rounds)
    return float(np.median(samples))


def normals(n, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((n, d), dtype=np.float32) for _ in range(3))


def sampled(x):
    return yoso_core.yoso_attention(*x, num_hash=m, hash_code_len=tau, rng=0)


def expectation(x):
    return yoso_core.yoso_attention(*x, hash_code_len=tau, use_expectation=True)


def softmax(x):
    query, key, value = (torch.from_numpy(part)[None, None] for part in x)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)


ways = {
    "softmax (torch)": (softmax, [256, 1024, 4096, 16384]),
    "exact expectation": (expectation, [256, 1024, 4096, 16384]),
    "sampled": (sampled, [256, 1024, 4096, 16384, 65536, 262144]),
}
seconds = {}
for name, (way, sizes) in ways.items():
    way(normals(64))  # compiles or loads
    inputs = {n: normals(n) for n in sizes}
    seconds[name] = {n: processor_seconds(lambda way=way, x=x: way(x)) for n, x in inputs.items()}

# %%
figure, (left, right) = draw.picture(2, height=4, width=9)
for number, (name, times) in enumerate(seconds.items()):
    n, taken = np.array(list(times)), np.array(list(times.values()))
    slope = np.polyfit(np.log(n[n >= 1024]), np.log(taken[n >= 1024]), 1)[0]
    look = {"color": draw.PALETTE[number], "marker": draw.MARKERS[number], "markeredgecolor": draw.INK}
    left.plot(n, 1000 * taken, label=f"{name}, slope {slope:.2f}", **look)
    right.plot(n, 1e6 * taken / n, label=name, **look)
    assert 0.6 < slope < 1.4 if name == "sampled" else slope > 1.4, f"{name}: {slope}"
left.set(title="Time", ylabel="milliseconds of one core")
right.set(title="Time per token", ylabel="microseconds of one core")
for panel in (left, right):
    panel.set(xscale="log", yscale="log", xlabel="tokens n")
    panel.set_xticks([256, 1024, 4096, 16384, 65536, 262144], ["256", "1k", "4k", "16k", "64k", "256k"])
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.minorticks_off()
    panel.grid(True)
right.set_yticks([0.5, 1, 2, 5, 10, 20, 50])
left.legend(loc="lower right")
figure

# %% [markdown]
# A slope of 1 on these axes means: twice the text, twice the time. A slope of 2: twice the text,
# four times the time. On the right the same times, for each token: level for sampling, and rising
# without end for both that look at all pairs.

# %%
shared = [n for n in seconds["sampled"] if n in seconds["softmax (torch)"]]
ratio = {n: seconds["softmax (torch)"][n] / seconds["sampled"][n] for n in shared}
for n in shared:
    over_exact = seconds["exact expectation"][n] / seconds["sampled"][n]
    print(f"n = {n:6,}: softmax takes {ratio[n]:5.1f} times as long as sampling, the expectation {over_exact:5.1f} times")
assert ratio[16384] > ratio[1024], "the longer the text, the larger the gain"

# %% [markdown]
# On a quiet machine, with 12 heads on two cores, the benchmark of this library finds about 3 times
# at $n = 512$, 25 times at 4,096 and 90 times at 16,384
# ([table](../benchmarks/README.md#yoso-bench-cpu)).
#
# ## Memory
#
# What does a call need beyond its inputs and its output? `tracemalloc` does not say: it sees what
# Python and NumPy ask for, and not what compiled code takes. So ask the system. Linux keeps the
# peak of a process' memory in `/proc/self/status`, and lets it start again. We run the calls in a
# process of their own, in which freed memory goes back at once;
# [`benchmarks/memory.py`](../benchmarks/memory.py) does the same.

# %%
CHILD = """
import contextlib, json, sys
import numpy as np, yoso_core

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def all_weights(query, key, value):
    weight = np.exp(query @ key.T / 8)
    weight /= weight.sum(axis=1, keepdims=True)
    return weight @ value

def call(name, n, tau):
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((n, 64), dtype=np.float32) for _ in range(3)]
    if name == "all":
        return lambda: all_weights(*x)
    return lambda: yoso_core.yoso_attention(*x, hash_code_len=tau, use_expectation=name == "expectation", rng=0)

for name, n, tau in json.loads(sys.argv[1]):
    call(name, 64, tau)()
    ready = call(name, n, tau)
    with contextlib.suppress(PermissionError), open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")
    before = status("VmRSS")
    out = ready()
    print(max(0, status("VmHWM") - before - out.nbytes))
    del ready, out
"""


def working_memory(calls):
    """Bytes that each call takes at its peak, beyond inputs and output."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(calls)], env=environment, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


plans = {
    "softmax, all weights at once": [("all", n, 8) for n in (1024, 2048, 4096)],
    "exact expectation": [("expectation", n, 8) for n in (1024, 4096, 16384)],
    "sampled, 8 bits": [("sampled", n, 8) for n in (1024, 4096, 16384, 65536, 262144, 1048576)],
    "sampled, log2 n bits": [("sampled", n, int(np.log2(n))) for n in (1024, 4096, 16384, 65536, 262144)],
}
measured = iter(working_memory([call for calls in plans.values() for call in calls]))
memory = {name: {n: next(measured) for _, n, _ in calls} for name, calls in plans.items()}

figure, axes = draw.picture(width=7, height=4)
for number, (name, taken) in enumerate(memory.items()):
    shown = np.maximum(np.array(list(taken.values())) / 1e6, 0.6)
    axes.plot(list(taken), shown, color=draw.PALETTE[number], marker=draw.MARKERS[number], markeredgecolor=draw.INK, label=name)
axes.set(xscale="log", yscale="log", xlabel="tokens n", ylabel="megabytes beyond inputs and output", title="Working memory of one head")
axes.set_xticks([1024, 4096, 16384, 65536, 262144, 1048576], ["1k", "4k", "16k", "64k", "256k", "1M"])
axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
axes.minorticks_off()
axes.grid(True)
axes.set_ylim(0.5, 9000)
axes.legend(loc="upper left", ncols=2)

MEGA = 1e6
assert memory["softmax, all weights at once"][4096] > 0.9 * 4 * 4096**2, "a number of 4 bytes for every pair"
for n, taken in memory["sampled, 8 bits"].items():
    assert taken < 48 * MEGA + 1.2 * m * n, "tables of one size, whatever the length, and the codes of all keys: a byte for each hash"
assert memory["exact expectation"][16384] < 64 * MEGA, "its time is quadratic, its memory is not"
assert memory["sampled, log2 n bits"][262144] > 0.9 * 2**18 * 4 * d, "the table of one hash, at least"
figure

# %% [markdown]
# Three things to see.
#
# - With a fixed $\tau$, the tables take the same few megabytes **whatever the length**: a table has
#   $2^\tau$ rows, not $n$. What grows are the codes, which are kept in as few bytes as they need:
#   32 bytes for each key here, where query, key and value have 768.
# - Quadratic time does not force quadratic memory. The exact expectation takes its pairs in blocks
#   and forgets them; exercise 2 does too.
# - With a $\tau$ that grows as $\log_2 n$ the table grows with the text. From some length on it
#   fits into no cache, and that costs time as well.
#
# ## A million tokens
#
# One head, 1,048,576 tokens. Softmax would need $2^{40}$ weights; a row of them alone would fill 4
# MB. We make up a text with something in it to find: 4,096 topics of about 256 tokens each, spread
# over the whole text. Queries and keys of a topic point roughly the same way, and the values of a
# topic have a direction in common, *what the topic says*.


# %%
def text(n, topics, seed=0, dim=d, cosine=0.9):
    """Queries, keys, values, and what the topic of each token says. ``cosine`` is that of a
    query or a key with its topic.
    """
    rng = np.random.default_rng(seed)
    topic = rng.integers(topics, size=n)
    center, says = (l2_normalize(rng.standard_normal((topics, dim), dtype=np.float32)) for _ in range(2))
    spread = np.float32(np.sqrt((1 / cosine**2 - 1) / dim))
    query, key = (center[topic] + spread * rng.standard_normal((n, dim), dtype=np.float32) for _ in range(2))
    value = says[topic] + rng.standard_normal((n, dim), dtype=np.float32) / np.float32(np.sqrt(dim))
    return query, key, value, says[topic]


def found(out, says):
    """How well the outputs say what the topic says: their mean cosine with it. Rows of zeros
    count 0.
    """
    return float((out * says).sum(axis=1).mean())


million = 1 << 20
query, key, value, says = text(million, topics=4096)
signs = {bits: yoso_core.sample_signs(m, bits, d, rng=bits) for bits in (8, 12)}
outputs = {}
for bits in signs:
    wall, work = time.perf_counter(), time.process_time()
    outputs[bits] = yoso_core.yoso_attention(query, key, value, num_hash=m, hash_code_len=bits, signs=signs[bits])
    wall, work = time.perf_counter() - wall, time.process_time() - work
    print(f"{million:,} tokens, {bits:2} bits: {1000 * wall:,.0f} ms by the wall clock, {1000 * work:,.0f} ms of one core")
    assert np.isfinite(outputs[bits]).all()

# %% [markdown]
# Is it right? For a few rows we can afford the definition: hash all keys, and count for each of
# them in how many of the 32 hashes it met the query. The sum of the values with these shares is the
# output, up to rounding.

# %%
rows = np.linspace(0, million - 1, 32).astype(int)
for bits, out in outputs.items():
    query_hash_code = yoso_core.fast_hash(query, signs[bits], m, bits)
    key_hash_code = yoso_core.fast_hash(key, signs[bits], m, bits)
    for row in rows[::16]:
        share = collision_rate(query_hash_code[row : row + 1], key_hash_code)[0]
        by_definition = l2_normalize(share @ value.astype(np.float64))
        assert np.abs(out[row] - by_definition).max() < 1e-4
    exact = l2_normalize(yoso_core.expectation_attention(query[rows], key, value, bits))
    print(
        f"{bits:2} bits: says what its topic says, sampled {found(out, says):.2f}, exact {found(exact, says[rows]):.2f};"
        f" sampled beside exact, {(out[rows] * exact).sum(axis=1).mean():.2f} on {len(rows)} rows"
    )
few_bits, many_bits = (found(outputs[bits], says) for bits in (8, 12))
assert many_bits > few_bits + 0.2

# %% [markdown]
# So it runs, and it is what the definition says. (The wall clock depends on who else is at work. On
# two quiet cores the benchmark takes about two thirds of a second for 12 heads of 262,144 tokens,
# three times as many in all.)
#
# The numbers also say that running is not enough. With 8 bits even the *exact* expectation is at a
# cosine below one half with what the topic says: a million keys share $2^8$ buckets, so each query
# sums some 4,000 keys that have nothing to do with it. A long text wants more bits.
#
# ## Choosing the bits and the hashes
#
# Three things go wrong in a sampled row, and each wants another remedy.
#
# - **Drowned**: unrelated keys weigh about $2^{-\tau}$ each, and there are $n$ of them. More bits
#   help. This is no sampling error: the exact expectation has it too.
# - **Sampling noise**: it falls as $1/\sqrt{m}$ (tutorial 1). More hashes help, and cost time in
#   proportion.
# - **Met nobody**: with too many bits even a related key shares no bucket with its query, in any of
#   the $m$ hashes. The row is zeros. Fewer bits help, or more hashes.
#
# A single key at angle $\theta$ is missed with probability $(1 - (1 - \theta/\pi)^\tau)^m$. The
# picture on the left checks this: 2,000 queries, each with one key at 37 degrees, the dots counted
# and the lines from the formula.

# %%
bits_tried = np.array([4, 6, 8, 10, 12, 14, 16, 18, 20])
cosine = 0.8
angle = np.arccos(cosine)
pairs = 2000
rng = np.random.default_rng(11)
a, b = (rng.standard_normal((pairs, d), dtype=np.float32) for _ in range(2))
a = l2_normalize(a)
b = l2_normalize(b - (a * b).sum(axis=1, keepdims=True) * a)
one_query, one_key = a, cosine * a + np.sqrt(1 - cosine**2) * b
assert np.allclose((one_query * one_key).sum(axis=1), cosine, atol=1e-5)

figure, (left, right) = draw.picture(2, height=4, width=9, width_ratios=(1, 1.15))
for number, hashes in enumerate((8, 32, 128)):
    missed = []
    for bits in bits_tried:
        planes = yoso_core.sample_planes(hashes, int(bits), d, rng=int(bits))
        codes = [yoso_core.hyperplane_hash(x, planes, hashes, int(bits)) for x in (one_query, one_key)]
        missed.append(1 - np.mean((codes[0] == codes[1]).any(axis=1)))
    expected = (1 - expected_weight(angle, bits_tried)) ** hashes
    left.plot(bits_tried, expected, color=draw.PALETTE[number], linewidth=1.5, label="line: theory" if number == 0 else None)
    left.plot(bits_tried, missed, draw.MARKERS[number], color=draw.PALETTE[number], markeredgecolor=draw.INK, label=f"m = {hashes}")
    assert np.allclose(missed, expected, atol=0.06)
left.set(title="Its one key is missed", xlabel=r"bits $\tau$", ylabel="share of queries", ylim=(-0.03, 1.03), xticks=bits_tried)
left.legend()
left.grid(True)

hashes_tried = [8, 32, 128, 512]
n = 4096
signal = text(n, topics=n // 16, cosine=0.85)
grid, empty = np.zeros((2, len(hashes_tried), len(bits_tried)))
for row, hashes in enumerate(hashes_tried):
    for column, bits in enumerate(bits_tried):
        out = yoso_core.yoso_attention(*signal[:3], num_hash=hashes, hash_code_len=int(bits), rng=1)
        grid[row, column], empty[row, column] = found(out, signal[3]), (out == 0).all(axis=1).mean()
exact = [found(yoso_core.yoso_attention(*signal[:3], hash_code_len=int(bits), use_expectation=True), signal[3]) for bits in bits_tried]
names = [*(f"m = {hashes}" for hashes in hashes_tried), "exact"]
draw.heat_map(right, np.array([*grid, exact]), rows=names, columns=[str(bits) for bits in bits_tried], numbers=".2f", limits=(0, 1))
right.axhline(len(hashes_tried) - 0.5, color=draw.INK, linewidth=1.5)
right.set(title=f"Cosine of a row with its topic, n = {n:,}", xlabel=r"bits $\tau$", aspect="auto")

assert (grid < np.array(exact) + 0.01).all(), "no number of hashes beats the expectation"
assert (np.diff(grid, axis=0) > -0.02).all(), "more hashes never hurt"
assert (np.diff(exact) > -0.02).all(), "nor do more bits, when nothing is sampled"
assert grid[1].argmax() not in (0, len(bits_tried) - 1), "too few bits, and too many"
for hashes, shares in zip(hashes_tried, empty, strict=True):
    print(
        f"rows that met no key, m = {hashes:3}: "
        + ", ".join(f"{shares[bits_tried == bits][0]:.1%} with {bits} bits" for bits in (12, 16, 20))
    )
assert empty[0, -1] > 0.2, "many bits, few hashes"
assert empty[-1, -1] < 0.02
figure

# %% [markdown]
# Read the right picture by rows. With 32 hashes a few bits drown the topic, many bits miss it, and
# the best lies between. The more hashes you can pay for, the more bits are worth having. In the
# last row, with no sampling at all, more bits never do harm here, and no number of hashes beats it.
# The printed shares are those of rows that met no key at all, related or not, and are zeros: a
# warning that is easy to watch for in a model of your own.
#
# **The rule**: $\tau = \log_2 n$. Then a table has as many buckets as there are keys, and a query
# meets about one unrelated key in each hash. The authors keep to it in the [settings of their
# experiments](https://github.com/mlpen/YOSO/blob/03c96a9/LRA/models/yoso-v1-32/config.json): 10
# bits for 1,024 tokens, 11 for 2,000, 12 for 4,000. Does the best $\tau$ move with $n$?

# %%
figure, axes = draw.picture(width=7, height=3.9)
best = {}
for number, n in enumerate((1024, 4096, 16384)):
    signal = text(n, topics=n // 16, cosine=0.85)
    scores = [found(yoso_core.yoso_attention(*signal[:3], num_hash=m, hash_code_len=int(bits), rng=1), signal[3]) for bits in bits_tried]
    best[n] = int(bits_tried[np.argmax(scores)])
    rule = int(np.log2(n))
    look = {"color": draw.PALETTE[number], "marker": draw.MARKERS[number], "markeredgecolor": draw.INK}
    axes.plot(bits_tried, scores, label=f"n = {n:,}: log2 n = {rule}, best {best[n]}", **look)
    at_rule = scores[bits_tried.tolist().index(rule)]
    axes.plot([rule], [at_rule], "o", markersize=15, markerfacecolor="none", markeredgecolor=draw.PALETTE[number], markeredgewidth=2)
    assert at_rule > 0.8 * max(scores), "the rule is close to the best"
axes.set(
    title=f"The best number of bits grows with the text, m = {m}", xlabel=r"bits $\tau$ (ring: $\log_2 n$)", ylabel="cosine with the topic"
)
axes.set_ylim(0, 1.08)
axes.grid(True)
axes.legend(loc="lower right")
assert best[1024] <= best[4096] <= best[16384]
figure

# %% [markdown]
# It does, and the rule stays near the best: it errs toward too few bits, which keeps rows from
# being empty. It is a start, no law: what is best depends on how near related keys are. Begin with
# $\tau = \log_2 n$ and $m = 32$, double $m$ until the result stops getting better, and only then
# move $\tau$ by one or two.
#
# For a model that is trained, $\tau$ is given: it is part of what the model has learned. What is
# left to choose is how well it is computed, and for that there is no need to try.
#
# ## An error bar
#
# Each hash alone would give a row, and the result is their mean. The hashes are drawn alike, so
# their spread tells how far the mean is off. `return_error=True` returns that as well: for each row
# its standard error over its length, before it is scaled to length 1. A row of error $e$ has a
# cosine of about $\sqrt{1 - e^2}$ with its expectation. Here are 16,384 tokens, 8 bits and 32
# hashes.

# %%
n, bits = 16384, 8
query, key, value, _ = text(n, topics=n // 16, cosine=0.85)
rows = np.linspace(0, n - 1, 512).astype(int)
exact = l2_normalize(yoso_core.expectation_attention(query[rows], key, value, bits))


def likeness_of(out):
    """The cosine of each of the rows with its expectation."""
    return (out[rows] * exact).sum(axis=1)


plain, error = yoso_core.yoso_attention(query, key, value, num_hash=32, hash_code_len=bits, rng=1, return_error=True)
promised = np.sqrt(1 - np.minimum(error, 1) ** 2)
print(f"m = 32: errors of {np.quantile(error, 0.1):.2f} to {np.quantile(error, 0.9):.2f}, but for a tenth at either end")
print(f"so cosines of {promised.mean():.2f} on average; measured on {len(rows)} rows, {likeness_of(plain).mean():.2f}")
assert error.shape == (n,)
assert abs(promised[rows].mean() - likeness_of(plain).mean()) < 0.06

# %% [markdown]
# An error of 0.7: more than half of the length of such a row is noise. How many hashes would make
# it good? `target_error` adds hashes, 16 at a time here, until a share `quantile` of the rows is
# good enough, and says how many it took.

# %%
goal = {"target_error": 0.5, "quantile": 0.9, "max_num_hash": 256}
_, error, used = yoso_core.yoso_attention(query, key, value, num_hash=16, hash_code_len=bits, rng=1, **goal)
print(f"{used} hashes: {(error <= 0.5).mean():.1%} of the rows have an error of at most 0.5")
assert used % 16 == 0
assert used > 32
assert (error <= 0.5).mean() >= 0.9

# %% [markdown]
# ## A plan
#
# More hashes are one remedy, smoothing is the other (tutorial 4). Which is cheaper depends on the
# lengths, on the vectors, and on the machine. `yoso_core.plan` looks at some rows of your arrays,
# computes the variance of a row from its formula ([docs/error.md](../docs/error.md)), draws a few
# hashes, times three short calls, and predicts cosine and time for each choice of $m$ and $s$. We
# ask for a cosine of 0.9.

# %%
plan = yoso_core.plan(query, key, value, cosine=0.9, hash_code_len=bits, oversample=(0, 2), rng=0)
print(plan)
best = plan.best
options = {"m = 32, s = 0": {"num_hash": 32, "hash_code_len": bits}, "the plan's choice": best.options}
measured = {}
for name, chosen in options.items():
    measured[name] = likeness_of(yoso_core.yoso_attention(query, key, value, rng=2, **chosen)).mean()
    taken = processor_seconds(lambda chosen=chosen: yoso_core.yoso_attention(query, key, value, rng=2, **chosen))
    print(f"{name}: cosine {measured[name]:.3f}, {1000 * taken:.0f} ms of one core")
assert best.cosine >= 0.9
assert abs(measured["the plan's choice"] - best.cosine) < 0.03
assert measured["the plan's choice"] > measured["m = 32, s = 0"] + 0.05

figure, (left, right) = draw.picture(2, height=3.5, width=8.4)
for number, s in enumerate((0, 2)):
    line = sorted((choice.num_hash, choice.cosine) for choice in plan.choices if choice.oversample == s)
    look = {"color": draw.PALETTE[number], "marker": draw.MARKERS[number]}
    left.plot(*np.transpose(line), color=draw.PALETTE[number], linewidth=1.2, label=f"s = {s}, predicted")
    called = [
        (h, likeness_of(yoso_core.yoso_attention(query, key, value, num_hash=h, hash_code_len=bits, oversample=s, rng=3)).mean())
        for h in (8, 32, 96)
    ]
    left.plot(*np.transpose(called), linestyle="", markeredgecolor=draw.INK, markersize=7, label=f"s = {s}, called", **look)
    assert np.allclose([cosine for _, cosine in called], [dict(line)[h] for h, _ in called], atol=0.03)
left.axhline(0.9, color=draw.INK, linestyle=draw.DASHES, linewidth=1)
left.set(title="Planned, and called", xlabel="hashes m", ylabel="mean cosine with the expectation", xscale="log", ylim=(0.3, 1))
left.set_xticks([4, 8, 16, 32, 64, 128, 256], ["4", "8", "16", "32", "64", "128", "256"])
left.minorticks_off()
left.legend(loc="lower right")
order = np.array_split(np.argsort(promised[rows]), 8)
right.plot([0.5, 0.9], [0.5, 0.9], color=draw.INK, linestyle=draw.DASHES, linewidth=1)
told, came = np.array([[promised[rows][part].mean(), likeness_of(plain)[part].mean()] for part in order]).T
right.plot(told, came, "o", color=draw.BLUE, markeredgecolor=draw.INK, markersize=7)
right.set(title="Error bars, m = 32", xlabel=r"$\sqrt{1 - e^2}$, mean of 64 rows", ylabel="their cosine", xlim=(0.5, 0.9), ylim=(0.5, 0.9))
for panel in (left, right):
    panel.grid(True)
assert np.corrcoef(told, came)[0, 1] > 0.8, "rows that claim to be better are better"
figure

# %% [markdown]
# The lines were predicted before the calls that the dots show. What is cheapest on your machine is
# in the plan's table, and `plan.best.options` go into the call as they are. On the right, rows
# sorted by their error bar, 64 to a dot: those that say that they are good are good. (`yoso plan
# file.npz` does the same on the command line.)
#
# ## When not to use YOSO
#
# Four cases, each with a number from this run.

# %%
figure, grid = draw.picture(2, rows=2, width=9, height=6.8)
(short, flat), (few, small) = grid

times = np.array([[seconds["sampled"][n], seconds["softmax (torch)"][n]] for n in shared])
short.plot(shared, times[:, 1] / times[:, 0], color=draw.BLUE, marker="o", markeredgecolor=draw.INK)
short.axhline(1, color=draw.INK, linestyle=draw.DASHES, linewidth=1)
short.set(title="1. Short texts", xlabel="tokens n", ylabel="time of softmax / sampled", xscale="log", yscale="log")
short.set_xticks(shared, [f"{n:,}" for n in shared])
short.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
short.minorticks_off()

hashes_tried = [8, 32, 128, 512]
flat_text, topical = normals(4096, seed=3), text(4096, topics=64)[:3]
likeness = {}
for number, (name, x) in enumerate({"topics of 64 tokens": topical, "unrelated vectors": flat_text}.items()):
    whole = yoso_core.yoso_attention(*x, hash_code_len=12, use_expectation=True)
    likeness[name] = [
        float((yoso_core.yoso_attention(*x, num_hash=hashes, hash_code_len=12, rng=2) * whole).sum(axis=1).mean())
        for hashes in hashes_tried
    ]
    flat.plot(hashes_tried, likeness[name], color=draw.PALETTE[number], marker=draw.MARKERS[number], markeredgecolor=draw.INK, label=name)
flat.set(title="2. Flat attention", xlabel="hashes m", ylabel="cosine, sampled and exact", xscale="log", ylim=(0, 1.05))
flat.set_xticks(hashes_tried, [str(hashes) for hashes in hashes_tried])
flat.minorticks_off()
flat.legend(loc="lower right")
assert likeness["unrelated vectors"][1] < likeness["topics of 64 tokens"][1] - 0.2


def bias(dim, hash_with, draws=400, bits=8):
    """Largest error of the mean collision rate over angles, of vectors in random directions."""
    rng = np.random.default_rng(dim)
    angles = np.linspace(0.2, 1.4, 7)
    a, b = (rng.standard_normal((draws, len(angles), dim)) for _ in range(2))
    a = l2_normalize(a)
    b = l2_normalize(b - (a * b).sum(axis=-1, keepdims=True) * a)
    other = np.cos(angles)[:, None] * a + np.sin(angles)[:, None] * b
    layout = {} if hash_with == "planes" else {"layout": hash_with}
    sample, hashes = (yoso_core.sample_signs, yoso_core.fast_hash) if layout else (yoso_core.sample_planes, yoso_core.hyperplane_hash)
    drawn = sample(m, bits, dim, batch_shape=(draws,), rng=dim, **layout)
    codes = [hashes(x.astype(np.float32), drawn, m, bits, **layout) for x in (a, other)]
    return float(np.abs((codes[0] == codes[1]).mean(axis=(0, 2)) - expected_weight(angles, bits)).max())


dims = [4, 8, 16, 32, 64]
for number, (hash_with, name) in enumerate(
    {"paper": "paper's layout", "chained": "chain, the default", "planes": "Gaussian planes"}.items()
):
    errors = [bias(dim, hash_with) for dim in dims]
    few.plot(dims, errors, color=draw.PALETTE[number], marker=draw.MARKERS[number], markeredgecolor=draw.INK, label=name)
    assert errors[-1] < 0.025
    assert hash_with == "planes" or errors[0] > 0.03
    assert (errors[1] > 0.025) == (hash_with == "paper")
few.set(title="3. Few dims", xlabel="dims d of a head", ylabel="error of a weight", xscale="log", ylim=(0, None))
few.set_xticks(dims, [str(dim) for dim in dims])
few.minorticks_off()
few.legend(loc="upper right")

weights = np.array([0.001, 0.01, 0.1, 0.5])
needed = (1 - weights) / weights / 0.1**2
small.plot(weights, needed, color=draw.VERMILION, marker="^", markeredgecolor=draw.INK)
for weight, hashes in zip(weights, needed, strict=True):
    small.text(weight * 1.15, hashes * 1.25, f"{hashes:,.0f}", fontsize=9)
small.set(
    title="4. Exact weights", xlabel="weight of a pair", ylabel="hashes for an error of 10%", xscale="log", yscale="log", ylim=(50, 6e5)
)
small.set_xlim(6e-4, 1.6)
small.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
small.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
small.minorticks_off()
for panel in grid.flat:
    panel.grid(True)
assert np.allclose(np.sqrt(weights * (1 - weights) / needed), 0.1 * weights)
figure

# %% [markdown]
# 1. **Short texts.** Near the dashed line there is nothing to gain, and below it something to lose;
#    and the result is an estimate besides. Below some hundred tokens take exact attention: softmax,
#    or YOSO with `use_expectation=True`.
# 2. **Flat attention.** Where a query has no favorites, its output is a sum over thousands of small
#    weights, and sampling sees few of them. With 32 hashes the direction is mostly noise. Tokens
#    that all attend to everything (averages, counts) are better served by a mean.
# 3. **Few dims.** In 4 dims there are not many rotations to be had by turning signs and adding, and
#    a chain soon comes back to where it was: its weights are off, however many hashes you take.
#    From 8 dims on it is right. The paper's layout takes 64 dims to come as near as this
#    ([table](../benchmarks/README.md#yoso-bench-bias)). Gaussian planes, `planes=`, are right in
#    any, and cost more.
# 4. **Exact weights.** To know a weight of 0.01 to a tenth takes about 9,900 hashes. If you want to
#    *look at* attention, or copy one token faithfully, or rank two similar keys, compute the
#    expectation, or do not use YOSO.
#
# And one that no picture shows: **a trained softmax model.** Its weights are not YOSO's. Put YOSO
# in its place and it has to be tuned again; that is tutorial 10.
#
# ## What to keep
#
# - Sampled attention takes time in proportion to $n$, and with fixed $\tau$ tables of the same few
#   megabytes whatever the length.
# - Begin with $\tau = \log_2 n$, $m = 32$. Bits fight unrelated keys, hashes fight noise; too many
#   bits leave rows that meet nobody.
# - `return_error` says how good a row is, `target_error` adds hashes until most are, and
#   `yoso_core.plan` says beforehand which $m$ and $s$ are the cheapest.
# - It pays from about a thousand tokens on, where attention is peaked and heads have 64 dims or so.
#
# Next: [12. The paper's experiment](12_listops.ipynb), where models are trained with it.
#
# ## Exercise 1: enough hashes
#
# A query and its one key stand at angle `angle`, and hashes have `bits` bits. Which is the smallest
# number of hashes for which the two meet at least once with probability `1 - miss` or more?


# %% tags=["exercise-1"]
def hashes_to_meet(angle, bits, miss):
    """The smallest m that misses the key with probability at most ``miss``, as an int."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
for angle, bits, miss in ((0.3, 8, 0.01), (0.65, 12, 0.01), (0.65, 12, 0.2), (1.2, 10, 0.05)):
    hashes = hashes_to_meet(angle, bits, miss)
    missed = [(1 - expected_weight(angle, bits)) ** count for count in (hashes, hashes - 1)]
    case = f"angle {angle}, {bits} bits, miss {miss}: {hashes} hashes"
    assert missed[0] <= miss * (1 + 1e-9), f"{case} miss the key with probability {missed[0]:.3g}"
    assert missed[1] > miss * (1 - 1e-9), f"{case} are more than needed, {hashes - 1} would do"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: quadratic time in linear memory
#
# Write the exact expectation, `weight @ value` with $E_{ij} = (1 - \theta_{ij}/\pi)^\tau$, for
# `block` queries at a time, in NumPy. The checker compares with the library and watches NumPy's
# memory: never may all weights be there at once. Queries and keys have length 1.


# %% tags=["exercise-2"]
def expectation_in_blocks(query, key, value, tau, block):
    """``(n_q, d_v)``: the expectation, not normalized, from at most ``block * n_k`` weights at a
    time.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
for n_q, n_k, block in ((1500, 1024, 64), (77, 300, 16), (5, 9, 8)):
    draws = np.random.default_rng(n_q)
    q, k = (l2_normalize(draws.standard_normal((count, 16))) for count in (n_q, n_k))
    v = draws.standard_normal((n_k, 8))
    tracemalloc.start()
    out = expectation_in_blocks(q, k, v, 6, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wanted = yoso_core.expectation_attention(q, k, v, 6)
    assert out.shape == wanted.shape, f"the shape should be {wanted.shape}, it is {out.shape}"
    wrong = np.flatnonzero(~np.isclose(out, wanted, atol=1e-6).all(axis=1))
    assert not len(wrong), f"n_q = {n_q}, block = {block}: {len(wrong)} rows are wrong, the first is row {wrong[0]}"
    if n_q > 1000:
        assert peak < 0.7 * 8 * n_q * n_k, f"{peak / 1e6:.1f} MB at the peak: all {n_q} x {n_k} weights take {8e-6 * n_q * n_k:.1f} MB"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: a text that arrives in pieces
#
# A bucket is a plain sum, so keys and values may come one piece after the other and be forgotten.
# Write the cumulation of tutorial 4 for an iterator of pieces `(key_hash_code, value)`:
# $\mathrm{out}_i = \frac{1}{m} \sum_h T_h[\mathrm{code}_h(q_i)]$. The iterator can be gone through
# only once.


# %% tags=["exercise-3"]
def cumulate_pieces(query_hash_code, pieces, capacity, dims):
    """``(n_q, dims)``: what `yoso_core.lsh_cumulation` gives for all pieces joined. Codes are
    ``(n, m)``, values ``(n, dims)``.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
for sizes in ((7,), (100, 1, 50), (64, 0, 64, 3)):
    draws = np.random.default_rng(sum(sizes))
    codes = draws.integers(0, 8, size=(sum(sizes), 5)).astype(np.int32)
    values = draws.standard_normal((sum(sizes), 3))
    asked = draws.integers(0, 8, size=(20, 5)).astype(np.int32)
    ends = np.cumsum(sizes)
    pieces = ((codes[end - size : end], values[end - size : end]) for size, end in zip(sizes, ends, strict=True))
    out = cumulate_pieces(asked, pieces, 8, 3)
    wanted = yoso_core.lsh_cumulation(asked, codes, values, 8)
    assert out.shape == wanted.shape, f"the shape should be {wanted.shape}, it is {out.shape}"
    assert np.allclose(out, wanted), f"pieces of {sizes} keys: off by up to {np.abs(out - wanted).max():.2g}"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** $(1 - p)^m \le \varepsilon$ when $m \ge \log \varepsilon / \log(1 - p)$, with $p =
# (1 - \theta/\pi)^\tau$.


# %% tags=["solution-1"]
def hashes_to_meet(angle, bits, miss):
    p = expected_weight(angle, bits)
    return int(np.ceil(np.log(miss) / np.log1p(-p) - 1e-9))


# %% [markdown]
# **Exercise 2.** A slice may reach beyond the end: the last block is simply shorter.


# %% tags=["solution-2"]
def expectation_in_blocks(query, key, value, tau, block):
    out = np.empty((len(query), value.shape[1]))
    for start in range(0, len(query), block):
        cosine = np.clip(query[start : start + block] @ key.T, -1, 1)
        out[start : start + block] = (1 - np.arccos(cosine) / np.pi) ** tau @ value
    return out


# %% [markdown]
# **Exercise 3.** All that is kept from piece to piece is $m$ tables. They do not grow.


# %% tags=["solution-3"]
def cumulate_pieces(query_hash_code, pieces, capacity, dims):
    hashes = np.arange(query_hash_code.shape[1])
    table = np.zeros((len(hashes), capacity, dims))
    for key_hash_code, value in pieces:
        np.add.at(table, (hashes, key_hash_code), value[:, None, :])
    return table[hashes, query_hash_code].mean(axis=1)


# %% tags=["wrong-1"]
def hashes_to_meet(angle, bits, miss):
    return int(np.ceil(1 / expected_weight(angle, bits)))  # they meet once on average, which leaves a third that never do


# %% tags=["wrong-1"]
def hashes_to_meet(angle, bits, miss):
    p = (1 - angle / np.pi) * bits  # bits are factors, not terms
    return int(np.ceil(np.log(miss) / np.log1p(-min(p, 0.999))))


# %% tags=["wrong-2"]
def expectation_in_blocks(query, key, value, tau, block):
    cosine = np.clip(query @ key.T, -1, 1)  # every pair at once
    return (1 - np.arccos(cosine) / np.pi) ** tau @ value


# %% tags=["wrong-2"]
def expectation_in_blocks(query, key, value, tau, block):
    out = np.zeros((len(query), value.shape[1]))
    for number in range(len(query) // block):  # the tail is dropped
        rows = slice(number * block, (number + 1) * block)
        out[rows] = (1 - np.arccos(np.clip(query[rows] @ key.T, -1, 1)) / np.pi) ** tau @ value
    return out


# %% tags=["wrong-3"]
def cumulate_pieces(query_hash_code, pieces, capacity, dims):
    results = [yoso_core.lsh_cumulation(query_hash_code, *piece, capacity) for piece in pieces]
    return np.mean(results, axis=0)  # pieces are added up, not averaged


# %% tags=["wrong-3"]
def cumulate_pieces(query_hash_code, pieces, capacity, dims):
    hashes = np.arange(query_hash_code.shape[1])
    table = np.zeros((len(hashes), capacity, dims))
    for key_hash_code, value in pieces:
        table[hashes, key_hash_code] += value[:, None, :]  # keys of one bucket overwrite each other
    return table[hashes, query_hash_code].mean(axis=1)
