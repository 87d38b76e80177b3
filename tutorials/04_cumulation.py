# %% [markdown]
# # 4. Cumulation
#
# **You will be able to** compute sampled attention with hash tables in time linear in the length of
# the text, by hand and in ten lines of NumPy, and say what the number of hashes, the length of the
# codes and a real text do to its error and its cost.
#
# **Time:** 40 minutes, and 25 for the exercises.
#
# **You need:** NumPy, and tutorials 1 to 3.
#
# **Source:** [`yoso_core.reference.cumulation`](../reference/cumulation.py) and
# [`yoso_core.reference.attention`](../reference/attention.py); algorithm 1 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import time
from collections import Counter

import numpy as np

import yoso_core
from yoso_core import draw
from yoso_core.demo.words import embed, read_text
from yoso_core.reference import collision_rate, l2_normalize

draw.use_look()
rng = np.random.default_rng(4)

# %% [markdown]
# ## Add first, look up later
#
# Every query and every key has a code for each of $m$ hashes. Sampled attention lets query $i$ add
# up the values of the keys that share its code, and takes the mean over the hashes:
#
# $$\mathrm{out}_i = \frac{1}{m} \sum_h \sum_j [\,\mathrm{code}_h(q_i)
# = \mathrm{code}_h(k_j)\,]\; v_j .$$
#
# Read as it stands, that is a question to each of $n_q n_k$ pairs. But look at the inner sum. It
# depends on the query through its *code* alone. All queries with one code get the same sum, the one
# over the keys with this code. So add up each code's values once, in a table with a row for each of
# the $2^\tau$ codes, and let every query look up its row:
#
# $$\mathrm{table}_h[c] = \sum_{j\,:\,\mathrm{code}_h(k_j) = c} v_j, \qquad
# \mathrm{out}_i = \frac{1}{m} \sum_h \mathrm{table}_h[\mathrm{code}_h(q_i)].$$
#
# Adding to the table is called *scatter*, reading it *gather*. The paper calls the whole a
# Bernoulli *cumulation*. One step for each key, one for each query, no pairs.
#
# ## By hand
#
# Eight tokens, $m = 2$ hashes of $\tau = 2$ bits, so two tables of four rows. The codes are made
# up. The values are the powers of two, one number each: then every sum tells which keys are in it.

# %%
key_hash_code = np.array([[0, 3], [1, 3], [0, 2], [2, 0], [2, 2], [0, 3], [1, 0], [2, 2]], np.int32)
query_hash_code = np.array([[0, 3], [1, 0], [3, 2], [2, 2], [3, 1], [0, 2], [1, 3], [2, 0]], np.int32)
value = 2.0 ** np.arange(8)[:, None]
n, m, tau = 8, 2, 2

tables = [
    [1 + 4 + 32, 2 + 64, 8 + 16 + 128, 0],  # hash 0: nobody has code 3
    [8 + 64, 0, 4 + 16 + 128, 1 + 2 + 32],  # hash 1: nobody has code 1
]
reads = np.array([[37, 35], [66, 72], [0, 148], [152, 148], [0, 0], [37, 148], [66, 35], [152, 72]])
by_hand = np.array([36, 69, 74, 150, 0, 92.5, 50.5, 112])

for h in range(m):
    table = np.zeros(2**tau)
    for j in range(n):
        table[key_hash_code[j, h]] += value[j, 0]  # scatter
    assert table.tolist() == tables[h]
    assert table.sum() == 255, "every value is in one row of every table"
    assert [table[query_hash_code[i, h]] for i in range(n)] == reads[:, h].tolist()  # gather
assert np.array_equal(reads.mean(axis=1), by_hand)


# %%
def sum_of(terms):
    """``37 = 1+4+32``, or ``0`` for an empty row."""
    total = f"{sum(terms):g}"
    return f"{total} = {'+'.join(f'{term:g}' for term in terms)}" if len(terms) > 1 else total


figure, axes = draw.picture(rows=2, width=6.6, height=7.6)
for h, panel in enumerate(axes):
    draw.scatter_gather(
        panel,
        key_hash_code[:, h],
        query_hash_code[:, h],
        2**tau,
        keys=[f"$k_{j}$: {value[j, 0]:g}" for j in range(n)],
        table=[sum_of(value[key_hash_code[:, h] == code, 0]) for code in range(2**tau)],
        queries=[f"$q_{i}$: {reads[i, h]}" for i in range(n)],
    )
    panel.set_title(f"hash {h}")
figure

# %% [markdown]
# Follow $q_0$. Hash 0 puts it into row 00, with keys 0, 2 and 5: it reads 37. Hash 1 puts it into
# row 11, with keys 0, 1 and 5, whose sum is $35$. Its output is the mean, 36. Key 0 was met twice,
# so it counts in full; key 1 was met once, so it counts half.
#
# And $q_4$ meets nobody, in neither hash. Its output is zero.
#
# Now the definition, as two nested loops over pairs, and the library's function. All three agree,
# number by number.


# %%
def cumulate_pairs(query_hash_code, key_hash_code, value):
    """The definition, a question to each pair."""
    m = query_hash_code.shape[1]
    out = np.zeros((len(query_hash_code), value.shape[1]))
    for i in range(len(query_hash_code)):
        for j in range(len(key_hash_code)):
            out[i] += np.count_nonzero(query_hash_code[i] == key_hash_code[j]) / m * value[j]
    return out


assert np.array_equal(cumulate_pairs(query_hash_code, key_hash_code, value)[:, 0], by_hand)
assert np.array_equal(yoso_core.lsh_cumulation(query_hash_code, key_hash_code, value, 2**tau)[:, 0], by_hand)

# %% [markdown]
# In NumPy, scatter is `np.add.at`. It is tempting to write `table[codes] += value` in its place,
# and it is wrong: where a code occurs twice, NumPy reads the row, adds and writes back, *for both
# at once*, and one of the two is lost. Remember this. On a GPU the same mistake is a race between
# two threads, and the cure is an atomic addition (tutorials 5 to 7).


# %%
def cumulate(query_hash_code, key_hash_code, value, hashtable_capacity):
    """With tables: one step for each key, one for each query."""
    m = query_hash_code.shape[1]
    out = np.zeros((len(query_hash_code), value.shape[1]))
    for h in range(m):
        table = np.zeros((hashtable_capacity, value.shape[1]))
        np.add.at(table, key_hash_code[:, h], value)  # scatter
        out += table[query_hash_code[:, h]]  # gather
    return out / m


assert np.array_equal(cumulate(query_hash_code, key_hash_code, value, 2**tau)[:, 0], by_hand)

careless = np.zeros((2**tau, 1))
careless[key_hash_code[:, 0]] += value
assert careless[:, 0].tolist() == [32, 64, 128, 0], "the last key of every row is left"

# %% [markdown]
# ## Linear cost
#
# Pairs cost $m\, n_q n_k$ comparisons. Tables cost $m\,(n_q + n_k)$ rows of values added, and $m\,
# 2^\tau$ rows set to zero first. Double the text, and pairs cost four times as much, tables twice
# as much. The library has both, under the names of variants. Their times are drawn and not claimed.

# %%
m, tau, dim = 16, 8, 32
lengths = np.array([256, 512, 1024, 2048])
longer = np.array([256, 512, 1024, 2048, 4096, 8192, 16384])
steps = {"pairs": m * lengths**2, "tables": m * (2 * longer + 2**tau)}
assert np.all(steps["pairs"][1:] == 4 * steps["pairs"][:-1])
assert np.all(steps["tables"][1:] < 2 * steps["tables"][:-1])

times = {}
for variant, shown in (("numpy:pairs", lengths), ("numpy:tables", longer), (None, longer)):
    best = []
    for length in shown.tolist():
        codes = rng.integers(2**tau, size=(2, length, m)).astype(np.int32)
        values = rng.standard_normal((length, dim), dtype=np.float32)
        taken = []
        while len(taken) < 4 or sum(taken) < 0.05:
            start = time.perf_counter()
            out = yoso_core.lsh_cumulation(*codes, values, 2**tau, variant=variant)
            taken.append(time.perf_counter() - start)
        best.append(1000 * min(taken))
        if length == 256:
            assert np.allclose(out, cumulate(*codes, values, 2**tau), atol=1e-4)
    times[variant or "the best here"] = shown, best

figure, (left, right) = draw.picture(2, height=3.6)
for number, (name, shown) in enumerate((("pairs", lengths), ("tables", longer))):
    left.plot(shown, steps[name], marker=draw.MARKERS[number], color=draw.PALETTE[number], markersize=6, linewidth=1.2, label=name)
for number, (name, (shown, best)) in enumerate(times.items()):
    right.plot(shown, best, marker=draw.MARKERS[number], color=draw.PALETTE[number], markersize=6, linewidth=1.2, label=name)
left.set(title="Steps, counted", ylabel=f"steps, m = {m}, $\\tau$ = {tau}")
right.set(title="Time, on the machine that built this", ylabel="milliseconds")
for panel in (left, right):
    panel.set(xscale="log", yscale="log", xlabel="tokens n")
    panel.set_xticks(longer[::2], [f"{length:,}" for length in longer[::2]])
    panel.minorticks_off()
    panel.grid(True)
    draw.legend_under_title(panel)
figure

# %% [markdown]
# ## A real passage
#
# Random codes are a kind assumption. Let us take a text: Python's own help topics, which every
# installation carries. The demo of this project makes a vector for every word from the company it
# keeps (no training, see [`yoso_core.demo.words`](../yoso_core/demo/words.py)), and mixes in the
# neighbors, so each *token* has a vector of 64 numbers. Query, key and value are all this vector.

# %%
source, text = read_text(None)
passage = embed(text, 64, np.random.default_rng(0)).middle(4096)
x = passage.vectors
word_of = np.array(passage.words)[passage.ids]
assert np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
print(f"{len(passage):,} tokens from the middle of {source} (rare words left out), {len(passage.words)} different words:")
print(*word_of[:16])

m, tau = 32, 8
planes = yoso_core.sample_planes(m, tau, 64, rng=0)
code = yoso_core.hyperplane_hash(x, planes, m, tau)
print("\nWho shares a row? Some rows of the first table:")
for row in np.argsort(-np.bincount(code[:, 0], minlength=2**tau), kind="stable")[[0, 1, 5, 20]].tolist():
    inside = Counter(word_of[code[:, 0] == row].tolist()).most_common(5)
    print(f"  row {row:3}, {np.sum(code[:, 0] == row):3} tokens:", ", ".join(f"{word} {count}x" for word, count in inside))

# %% [markdown]
# Tokens of one word fall into one row, mostly, and words of similar use join them. So a query that
# reads its row reads the company that it keeps. To *see* the weights, a trick: let the value of a
# token be a vector with a 1 at its own word and 0 elsewhere. Then the output is a list of weights,
# one to a word. Here it is for the most frequent long word, sampled and exact.

# %%
counts = np.bincount(passage.ids)
chosen = max((i for i, word in enumerate(passage.words) if len(word) >= 6), key=lambda i: counts[i])
mine = passage.ids == chosen
one_hot = np.eye(len(passage.words), dtype=np.float32)[passage.ids]

sampled = yoso_core.lsh_cumulation(code[mine], code, one_hot, 2**tau).mean(axis=0)
exact = yoso_core.expectation_attention(x[mine], x, one_hot, tau).mean(axis=0)
assert np.isclose(sampled.sum(), collision_rate(code[mine], code).sum(axis=1).mean(), rtol=1e-4)

top = np.argsort(-exact, kind="stable")[:9]
figure, axes = draw.picture(width=7, height=3.4)
axes.barh(np.arange(9) - 0.2, exact[top], height=0.38, color=draw.GRAY, label="exact")
axes.barh(np.arange(9) + 0.2, sampled[top], height=0.38, color=draw.BLUE, hatch="///", edgecolor="white", label=f"sampled, m = {m}")
axes.set_yticks(range(9), [passage.words[i] for i in top])
axes.invert_yaxis()
axes.set(title=f'What "{passage.words[chosen]}" attends to', xlabel="weight of all tokens of the word")
axes.legend(loc="lower right")
assert top[0] == chosen
figure

# %% [markdown]
# ## Error against m
#
# With Gaussian planes, each hash is an independent, unbiased estimate, and the output is the mean
# of $m$ of them. So the mean is right, and the error falls as $1/\sqrt{m}$. To measure it, one half
# of a passage asks and the other half answers, so that nobody meets itself. The error is the
# distance to the exact output, relative to its length, over all queries.

# %%
query, key = passage.middle(1024).vectors[:512], passage.middle(1024).vectors[512:]


def mean_square(vectors):
    """The mean squared length of vectors on the last axis."""
    return np.mean(np.sum(vectors**2, axis=-1))


def samples(repeats, num_hash, hash_code_len, **more):
    """Sampled attention of ``query`` to ``key``, with fresh planes each time:
    ``(repeats, 512, 64)``.
    """
    return np.array(
        [
            yoso_core.yoso_attention(
                query,
                key,
                key,
                num_hash=num_hash,
                hash_code_len=hash_code_len,
                planes=yoso_core.sample_planes(num_hash, hash_code_len, 64, rng=rng),
                **more,
            )
            for _ in range(repeats)
        ]
    )


tau = 8
exact = yoso_core.expectation_attention(query, key, key, tau)
nums_hash = np.array([2, 8, 32, 128, 512])
error = []
for m in nums_hash.tolist():
    found = samples(40 if m < 100 else 12, m, tau, normalize_output=False)
    error.append(np.sqrt(mean_square(found - exact) / mean_square(exact)))
    along = np.sum(found * exact, axis=(1, 2)) / np.sum(exact**2)  # of each draw: 1 is the exact output
    assert abs(along.mean() - 1) < 5 * along.std(ddof=1) / np.sqrt(len(along)), "the mean is right"

figure, axes = draw.picture()
slope = draw.error_curve(axes, nums_hash, error)
axes.set(title="Error of sampled attention, real text", xlabel="hashes m", ylabel="relative RMS error")
axes.legend()
assert abs(slope + 0.5) < 0.05
figure

# %% [markdown]
# Tutorial 1 had the same line for made-up words. A real text changes its height, not its slope.
#
# ## Error against tau
#
# The length of the codes is another matter: it changes *what* is estimated. Suppose that you want
# the softmax attention of tutorial 1, with $\beta = 8$, its outputs scaled to length 1 like YOSO's.
# With few bits, rows are large and a query averages over half of the text: far from what you want,
# but with little noise. With many bits a query meets only its nearest kin, and seldom, so it all
# depends on luck. The mean squared distance is the sum of both, exactly:
#
# $$\mathbb{E}\,|\mathrm{out} - \mathrm{target}|^2 = |\bar{\mathrm{out}} - \mathrm{target}|^2 +
# \mathbb{E}\,|\mathrm{out} - \bar{\mathrm{out}}|^2, \qquad \text{error} = \text{bias} +
# \text{noise},$$
#
# with the mean over the draws for $\mathbb{E}$, and $\bar{\mathrm{out}}$ for the mean output.

# %%
target = l2_normalize(np.exp(8 * (query @ key.T - 1)) @ key)
taus, m = np.array([1, 2, 4, 6, 8, 10, 12, 14, 16]), 32
bias, noise, total, lonely = [], [], [], []
for tau in taus.tolist():
    found = samples(30, m, tau)
    middle = found.mean(axis=0)
    bias.append(mean_square(middle - target))
    noise.append(mean_square(found - middle))
    total.append(mean_square(found - target))
    lonely.append(np.mean(~found.any(axis=-1)))
assert np.allclose(total, np.add(bias, noise), rtol=1e-4)

best = int(np.argmin(total))
figure, axes = draw.picture(width=6.6, height=3.6)
for number, (name, line) in enumerate({"bias": bias, "noise": noise, "error, their sum": total}.items()):
    axes.plot(taus, line, marker=draw.MARKERS[number], color=draw.PALETTE[number], label=name, linewidth=1.4, markersize=6)
axes.axvline(taus[best], color=draw.INK, linestyle=draw.DASHES, linewidth=1)
axes.set(title=f"How many bits? m = {m}", xlabel=r"bits of a code, $\tau$", ylabel="mean squared distance", ylim=(0, None))
axes.set_xticks(taus)
axes.grid(True)
axes.legend()

assert 0 < best < len(taus) - 1, "neither the fewest nor the most bits"
assert bias[0] > 5 * noise[0], "few bits: all bias"
assert noise[best] > 5 * noise[0], "more bits, more noise"
figure

# %% [markdown]
# There is a best $\tau$, and where it lies depends on $m$ and on what you want. (On the far right
# the bias rises again: an output made of one or two values points anywhere, and the mean of vectors
# that point anywhere is short.) A weight $p$ needs about $1/p$ hashes before it is met once, so a
# more selective attention needs more of them.
#
# How many rows do the codes really use? At most $2^\tau$, at most one for each token, and in a real
# text fewer than either. On the right, the memory of one table for 64 numbers to a row, beside that
# of the whole $n \times n$ matrix which is not needed.

# %%
rows = {"this text": [], "random vectors": []}
even = rng.standard_normal(x.shape).astype(np.float32)
for tau in taus.tolist():
    planes = yoso_core.sample_planes(4, tau, 64, rng=1)
    for name, vectors in (("this text", x), ("random vectors", even)):
        codes = yoso_core.hyperplane_hash(vectors, planes, 4, tau)
        rows[name].append(np.mean([len(np.unique(codes[:, h])) for h in range(4)]))
    assert max(rows["this text"][-1], rows["random vectors"][-1]) <= min(2**tau, len(x))

figure, (left, right) = draw.picture(2, height=3.4)
left.plot(taus, np.minimum(2.0**taus, len(x)), color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=r"smaller of $2^\tau$ and n")
for number, (name, line) in enumerate(rows.items()):
    left.plot(taus, line, draw.MARKERS[number], color=draw.PALETTE[number], label=name, markersize=6)
left.set(title=f"Rows in use, n = {len(x):,}", xlabel=r"bits of a code, $\tau$", ylabel="rows", yscale="log")
left.set_yticks([1, 10, 100, 1000, 4096], ["1", "10", "100", "1,000", "4,096"])
right.plot(taus, 4 * 64 * 2.0**taus / 1e6, marker="o", color=draw.BLUE, label="one table", linewidth=1.2, markersize=6)
right.axhline(4 * len(x) ** 2 / 1e6, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="n by n weights")
right.set(title="Memory in float32", xlabel=r"bits of a code, $\tau$", ylabel="megabytes", yscale="log")
right.set_yticks([0.001, 0.01, 0.1, 1, 10, 100], ["0.001", "0.01", "0.1", "1", "10", "100"])
for panel in (left, right):
    panel.set_xticks(taus[1:])
    panel.minorticks_off()
    panel.grid(True)
    panel.legend(loc="lower right")
right.set_ylim(3e-4, 200)

assert rows["this text"][-1] < rows["random vectors"][-1]
assert 4 * 64 * 2 ** taus.max() < 4 * len(x) ** 2
figure

# %% [markdown]
# ## Skewed rows
#
# If all directions were alike, each row would get the share $2^{-\tau}$ of the keys. In a real text
# a few words are everywhere, their tokens look alike, and they land together. It does not make the
# result wrong, they *should* meet. And the number of steps stays the same, for the table does not
# care where a key goes. But a kernel might.

# %%
m, tau = 32, 8
planes = yoso_core.sample_planes(m, tau, 64, rng=0)
inputs = {"this text": x, "its tokens, shuffled": x[rng.permutation(len(x))], "random vectors": even}
codes = {name: yoso_core.hyperplane_hash(vectors, planes, m, tau) for name, vectors in inputs.items()}
largest = {name: np.mean([np.bincount(c[:, h]).max() for h in range(m)]) / len(x) for name, c in codes.items()}
fullest = np.bincount(codes["this text"][:, 0]).argmax()
most, times_there = Counter(word_of[codes["this text"][:, 0] == fullest].tolist()).most_common(1)[0]
print(f"{counts.max() / len(x):.0%} of the tokens are {passage.words[counts.argmax()]!r}.")
print(f"The fullest row of a table holds {largest['this text']:.1%} of this text, {largest['random vectors']:.1%} of random vectors;")
print(f"even rows would hold {2**-tau:.1%}. In the first table it has {times_there} tokens of {most!r}.")

assert largest["this text"] > 2 * largest["random vectors"]
assert np.isclose(largest["this text"], largest["its tokens, shuffled"])


# %% [markdown]
# Kernels with atomics add many keys at the same time. Additions to different rows go side by side,
# those to one row must take turns. Say that 32 neighboring keys are under way together: then the
# fullest row among them is the queue that all wait for. We count its length.


# %%
def mean_queue(code, together=32):
    """How many of ``together`` keys in a row go to one bucket, in the fullest: the mean over the
    text.
    """
    groups = code[: len(code) // together * together].reshape(-1, together)
    return np.mean([np.bincount(group).max() for group in groups])


figure, (left, right) = draw.picture(2, height=3.6)
for number, name in enumerate(("this text", "random vectors")):
    size = np.mean([np.sort(np.bincount(codes[name][:, h], minlength=2**tau))[::-1] for h in range(m)], axis=0)
    left.plot(range(1, 2**tau + 1), size, color=draw.PALETTE[2 * number], linestyle=("-", "-.")[number], linewidth=2, label=name)
left.axhline(len(x) / 2**tau, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="even")
left.set(
    title=f"Keys to a row, $\\tau$ = {tau}", xlabel="row, the fullest first", ylabel=f"keys, of {len(x):,}", xscale="log", yscale="log"
)
left.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
left.set_yticks([1, 10, 100], ["1", "10", "100"])
left.minorticks_off()
left.set_ylim(0.5, 300)

bits = np.array([4, 6, 8, 10])
queue = {name: [] for name in inputs}
for number, (name, vectors) in enumerate(inputs.items()):
    for b in bits.tolist():
        c = yoso_core.hyperplane_hash(vectors, yoso_core.sample_planes(4, b, 64, rng=2), 4, b)
        queue[name].append(np.mean([mean_queue(c[:, h]) for h in range(4)]))
    right.bar(
        np.arange(4) + 0.27 * (number - 1),
        queue[name],
        width=0.25,
        color=(draw.BLUE, draw.SKY, draw.GREEN)[number],
        hatch=("", "///", "..")[number],
        edgecolor="white",
        label=name,
    )
right.set(title="Longest queue among 32 keys", xlabel=r"bits of a code, $\tau$", ylabel="keys that wait for one row")
right.set_xticks(range(4), [f"{b}" for b in bits])
for panel in (left, right):
    panel.grid(True, axis="both" if panel is left else "y")
    panel.legend()

for in_text, shuffled, random in zip(*queue.values(), strict=True):
    assert in_text > shuffled > random
    assert in_text - shuffled > shuffled - random, "most of it is the neighbors'"
    assert 1.4 < in_text / random < 3.5, "twice, or so"
figure

# %% [markdown]
# Twice the queue, or so, and most of it because *neighbors* are alike: the same tokens, shuffled,
# fare much better. A benchmark with random vectors flatters such a kernel. There are two ways out,
# and the library takes both. In `shared_table` every entry of the table belongs to one thread,
# which needs no atomics, so it does not care who goes where. And `sorted_buckets` sorts the keys by
# code first, so that a row is a run of neighbors that are added up in order: that also makes the
# sum the same on every run. Tutorial 6 takes [the kernels](../gpu/cupy_kernels/cumulation.cu)
# apart.
#
# ## Rows that meet nobody
#
# A query that meets no key in any hash gets zero. In a long text that is rare. In a short one, with
# $n$ keys in directions that have nothing to do with the query's, a key is missed by one hash with
# probability $1 - 2^{-\tau}$, and all of them by all hashes with
#
# $$(1 - 2^{-\tau})^{\,n m}.$$
#
# The fast hash comes very near to this. The rows of one rotation are at right angles, so for
# vectors that point everywhere alike its bits are fair coins that know nothing of each other; only
# different parts see the same angle.

# %%
m, tau, repeats = 32, 8, 400
few = np.array([1, 2, 4, 8, 16, 32, 64])
alone, spread = [], []
for n in few.tolist():
    vectors = rng.standard_normal((2, repeats, n, 64), dtype=np.float32)
    signs = yoso_core.sample_signs(m, tau, 64, batch_shape=(repeats,), rng=n)
    met = yoso_core.lsh_cumulation(*(yoso_core.fast_hash(v, signs, m, tau) for v in vectors), np.ones((repeats, n, 1), np.float32), 2**tau)
    share = np.mean(met == 0, axis=(1, 2))
    alone.append(share.mean())
    spread.append(share.std(ddof=1) / np.sqrt(repeats))
formula = (1 - 2.0**-tau) ** (few * m)
assert np.all(np.abs(np.array(alone) - formula) < 5 * np.array(spread) + 0.01)

figure, axes = draw.picture(width=5.6)
axes.plot(few, formula, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=r"$(1 - 2^{-\tau})^{nm}$")
axes.plot(few, alone, "o", color=draw.BLUE, markersize=7, label="measured")
axes.set(
    title=f"Queries that meet nobody, m = {m}, $\\tau$ = {tau}", xlabel="keys n", ylabel="share of the queries", xscale="log", ylim=(0, 1)
)
axes.set_xticks(few, [f"{n}" for n in few])
axes.minorticks_off()
axes.grid(True)
axes.legend()
figure

# %% [markdown]
# In self-attention a token whose query is close to its own key meets at least itself. Elsewhere,
# and with few keys, take fewer bits or more hashes.
#
# ## Masks
#
# A key that is masked is left out of the scatter, a query that is masked does not gather and gets
# zero. *Left out*, not multiplied by zero: whatever stands in a masked row, even NaN, cannot leak.
# So a padded text gives what the text alone gives, to the last bit.

# %%
m, tau, n, padded = 8, 5, 100, 137
codes = rng.integers(2**tau, size=(2, padded, m)).astype(np.int32)
values = rng.standard_normal((padded, 16), dtype=np.float32)
values[n:] = np.nan
mask = np.arange(padded) < n

out = yoso_core.lsh_cumulation(*codes, values, 2**tau, query_mask=mask, key_mask=mask)
assert np.array_equal(out[:n], yoso_core.lsh_cumulation(*codes[:, :n], values[:n], 2**tau))
assert np.all(out[n:] == 0)
assert not np.all(np.isfinite(values * mask[:, None])), "zero times NaN is NaN: multiplying is no mask"


# %% [markdown]
# ## Batches, heads, and any n
#
# Attention runs for a whole batch and many heads. Each of them has tables of its own, and that is
# all: make the number of the table part of the address, and one scatter serves them all. Nothing
# here knows about blocks of 32 or powers of two, so $n$ may be anything, and queries and keys may
# differ in number. Values are only ever added, so they may have any dimension.


# %%
def cumulate_all(query_hash_code, key_hash_code, value, hashtable_capacity):
    """Any leading dims: one table for each of them and each hash, all in one array."""
    *leading, n_k, m = key_hash_code.shape
    heads, dim = int(np.prod(leading)), value.shape[-1]
    first_row = hashtable_capacity * np.arange(heads * m).reshape(heads, 1, m)
    write = first_row + key_hash_code.reshape(heads, n_k, m)
    read = first_row + query_hash_code.reshape(heads, -1, m)
    table = np.zeros((heads * m * hashtable_capacity, dim))
    np.add.at(table, write, value.reshape(heads, n_k, 1, dim))
    return table[read].mean(axis=2).reshape(*leading, -1, dim)


for leading, n_q, n_k, dim in (((), 8, 8, 1), ((3,), 0, 5, 2), ((2, 3), 7, 137, 20), ((2, 1, 4), 63, 1, 33)):
    read = rng.integers(2**tau, size=(*leading, n_q, m)).astype(np.int32)
    write = rng.integers(2**tau, size=(*leading, n_k, m)).astype(np.int32)
    values = rng.standard_normal((*leading, n_k, dim))
    found = cumulate_all(read, write, values, 2**tau)
    assert found.shape == (*leading, n_q, dim)
    assert np.allclose(found, yoso_core.lsh_cumulation(read, write, values, 2**tau), atol=1e-12)

# %% [markdown]
# Because it is a sum, three things hold that make cumulation easy to cut into pieces. The order of
# the keys does not matter; keys may come in portions, whose outputs add up; and twice the values
# give twice the output. (With whole numbers there is no rounding, so the checks are exact.)

# %%
codes = rng.integers(2**tau, size=(2, 137, m)).astype(np.int32)
values = rng.integers(-9, 10, size=(137, 4)).astype(float)
whole = yoso_core.lsh_cumulation(*codes, values, 2**tau)
order = rng.permutation(137)
portions = [yoso_core.lsh_cumulation(codes[0], codes[1, part], values[part], 2**tau) for part in (slice(50), slice(50, None))]

assert np.array_equal(yoso_core.lsh_cumulation(codes[0], codes[1, order], values[order], 2**tau), whole)
assert np.array_equal(sum(portions), whole)
assert np.array_equal(yoso_core.lsh_cumulation(*codes, 2 * values, 2**tau), 2 * whole)


# %% [markdown]
# ## The whole attention
#
# Everything is on the table now. Hash queries and keys with the fast hash of tutorial 3, cumulate,
# scale the outputs to length 1. A hash sees no lengths, so normalizing queries and keys first
# changes no code; it is what the exact weights need. That is `yoso_core.yoso_attention`.


# %%
def attention(query, key, value, signs, m, tau, mask):
    """Sampled YOSO attention, ``(..., n, d)`` each, from the pieces of tutorials 3 and 4."""
    query_hash_code, key_hash_code = (yoso_core.fast_hash(l2_normalize(v), signs, m, tau) for v in (query, key))
    out = yoso_core.lsh_cumulation(query_hash_code, key_hash_code, value, 2**tau, query_mask=mask, key_mask=mask)
    return l2_normalize(out)


batch, heads, n, dim, m, tau = 2, 4, 333, 48, 32, 7
query, key, value = rng.standard_normal((3, batch, heads, n, dim), dtype=np.float32)
lengths = np.array([333, 200])
mask = (np.arange(n) < lengths[:, None])[:, None]  # (batch, 1, n): the same for every head
signs = yoso_core.sample_signs(m, tau, dim, batch_shape=(heads,), rng=0)

ours = attention(query, key, value, signs, m, tau, mask)
theirs = yoso_core.yoso_attention(query, key, value, num_hash=m, hash_code_len=tau, signs=signs, query_mask=mask, key_mask=mask)
assert ours.shape == (batch, heads, n, dim)
assert np.allclose(ours, theirs, atol=1e-6)
assert np.allclose(np.linalg.norm(ours[0], axis=-1), 1, atol=1e-5)
assert np.all(ours[1, :, 200:] == 0)

# %% [markdown]
# ## What to keep
#
# - All queries with one code want one sum. Scatter the values into a table, gather from it: time
#   grows with the number of tokens, not of pairs.
# - More hashes, less noise, as $1/\sqrt{m}$. More bits, a pickier attention and more noise: there
#   is a best $\tau$ for a given $m$.
# - Real text fills some rows far more than others, and neighbors crowd. It costs kernels with
#   atomics time, and nothing else.
# - It is a sum: any order, any portions, any leading dims, any $n$; what is masked is left out.
#
# Next: [5. Your first kernel in Python](05_first_kernel_in_python.ipynb), where a thread does each
# scatter.
#
# ## Exercise 1: an average, not a sum
#
# YOSO scales its outputs to length 1. Softmax instead divides by the sum of its weights. Do so
# here: return the sum of the values met, divided by the sum of their weights, $\sum_j C_{ij} v_j /
# \sum_j C_{ij}$, and zero for a query that met nobody. Still in linear time: call
# `yoso_core.lsh_cumulation` *once*.


# %% tags=["exercise-1"]
def average_of_met(query_hash_code, key_hash_code, value, hashtable_capacity):
    """``(n_q, d_v)``: the weighted mean of the values met, zeros where there are none."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
generator = np.random.default_rng(1)
for n_q, n_k, m, tau in ((50, 40, 6, 3), (40, 6, 2, 4), (1, 1, 1, 1)):
    codes = [generator.integers(2**tau, size=(n, m)).astype(np.int32) for n in (n_q, n_k)]
    values = generator.standard_normal((n_k, 3)) + 5
    found = np.asarray(average_of_met(*codes, values, 2**tau))
    assert found.shape == (n_q, 3), f"{n_q} queries and values of 3 numbers: the shape should be {(n_q, 3)}, got {found.shape}"
    weight = collision_rate(*codes)
    nobody = weight.sum(axis=1) == 0
    assert np.all(np.isfinite(found)), f"{nobody.sum()} queries meet nobody: they should get zeros, not {found[~np.isfinite(found)][0]}"
    assert np.all(found[nobody] == 0), "queries that meet nobody should get zeros"
    wanted = weight[~nobody] @ values / weight[~nobody].sum(axis=1, keepdims=True)
    assert np.allclose(found[~nobody], wanted), (
        f"the averages are off: values lie around 5, yours around {found[~nobody].mean():.2f}, right is {wanted.mean():.2f}"
    )
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: no atomics
#
# Write one hash's scatter without `np.add.at` and without a loop over keys: sort the keys by code,
# so that a row's keys are neighbors, and add up each run. (`np.argsort`, `np.cumsum`,
# `np.add.reduceat` and `np.searchsorted` may help. Mind rows that nobody writes to.)


# %% tags=["exercise-2"]
def table_by_sorting(code, value, hashtable_capacity):
    """``table[c] = sum of value[j] over code[j] == c``: codes ``(n,)``, values ``(n, d)``, table
    ``(hashtable_capacity, d)``.
    """
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
generator = np.random.default_rng(2)
for n, capacity, low, high in ((8, 4, 0, 4), (100, 16, 0, 16), (20, 64, 0, 64), (30, 8, 2, 4), (30, 8, 5, 8), (0, 4, 0, 4)):
    code = generator.integers(low, high, size=n)
    values = generator.integers(-9, 10, size=(n, 3)).astype(float)
    wanted = np.zeros((capacity, 3))
    np.add.at(wanted, code, values)
    found = np.asarray(table_by_sorting(code, values, capacity))
    assert found.shape == (capacity, 3), f"{capacity} rows of 3 numbers, please, got shape {found.shape}"
    wrong = np.flatnonzero((found != wanted).any(axis=1))
    assert not len(wrong), (
        f"{n} keys with codes {low} to {high - 1}, {capacity} rows: row {wrong[0]} should be {wanted[wrong[0]]}, it is {found[wrong[0]]}"
    )
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: how many bits?
#
# You are given the angles between one query and all keys, and $m$. The keys within `near` radians
# matter. With few bits the others drown them, with many bits they are never met. Return the
# *largest* $\tau$ with which the query meets at least `meetings` near keys on average, over all $m$
# hashes together, counting a key once for each hash in which it is met. There is one: $\tau = 1$
# will do at least.


# %% tags=["exercise-3"]
def most_bits(angles, near, m, meetings):
    """The largest tau whose expected number of meetings with keys nearer than ``near``, summed
    over ``m`` hashes, is >= ``meetings``.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
generator = np.random.default_rng(3)
for n, near, m, meetings in ((100, 1.0, 16, 10), (1000, 0.8, 32, 30), (1000, 0.5, 8, 300), (50, 1.3, 64, 5)):
    angles = generator.uniform(0.2, 2.8, size=n)
    tau = most_bits(angles, near, m, meetings)
    met = [m * np.sum((1 - angles[angles < near] / np.pi) ** bits) for bits in (tau, tau + 1)]
    assert met[0] >= meetings, (
        f"{n} keys, m = {m}: with {tau} bits there are {met[0]:.1f} meetings with near keys, {meetings} were asked for"
    )
    assert met[1] < meetings, f"{n} keys, m = {m}: {tau + 1} bits would still give {met[1]:.1f} meetings, {meetings} were asked for"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** Give each value a last entry of 1. The sum of the ones is the sum of the weights.


# %% tags=["solution-1"]
def average_of_met(query_hash_code, key_hash_code, value, hashtable_capacity):
    with_ones = np.concatenate([value, np.ones((len(value), 1))], axis=1)
    out = yoso_core.lsh_cumulation(query_hash_code, key_hash_code, with_ones, hashtable_capacity)
    weight = out[:, -1:]
    return np.divide(out[:, :-1], weight, out=np.zeros_like(out[:, :-1]), where=weight > 0)


# %% [markdown]
# **Exercise 2.** After sorting, row $c$ is the run between the first place with a code of at least
# $c$ and the first with a code of at least $c + 1$. Running totals, one at each end of the run,
# give its sum as a difference. (With floats that loses digits; the library's `sorted_buckets` adds
# within the run.)


# %% tags=["solution-2"]
def table_by_sorting(code, value, hashtable_capacity):
    order = np.argsort(code, kind="stable")
    total = np.concatenate([np.zeros((1, value.shape[1])), np.cumsum(value[order], axis=0)])
    ends = np.searchsorted(code[order], np.arange(hashtable_capacity + 1))
    return total[ends[1:]] - total[ends[:-1]]


# %% [markdown]
# **Exercise 3.** A key at angle $\theta$ is met $m (1 - \theta/\pi)^\tau$ times on average. The sum
# falls with every bit, so go on while one more bit still leaves enough.


# %% tags=["solution-3"]
def most_bits(angles, near, m, meetings):
    agree = 1 - angles[angles < near] / np.pi
    tau = 1
    while m * np.sum(agree ** (tau + 1)) >= meetings:
        tau += 1
    return tau


# %% tags=["wrong-1"]
def average_of_met(query_hash_code, key_hash_code, value, hashtable_capacity):
    out = yoso_core.lsh_cumulation(query_hash_code, key_hash_code, value, hashtable_capacity)
    return out / len(value)  # the mean over all keys, met or not


# %% tags=["wrong-1"]
def average_of_met(query_hash_code, key_hash_code, value, hashtable_capacity):
    with_ones = np.concatenate([value, np.ones((len(value), 1))], axis=1)
    out = yoso_core.lsh_cumulation(query_hash_code, key_hash_code, with_ones, hashtable_capacity)
    with np.errstate(invalid="ignore"):
        return out[:, :-1] / out[:, -1:]  # 0 / 0 for a query that met nobody


# %% tags=["wrong-2"]
def table_by_sorting(code, value, hashtable_capacity):
    table = np.zeros((hashtable_capacity, value.shape[1]))
    order = np.argsort(code, kind="stable")
    table[code[order]] += value[order]  # sorted or not, only the last key of a row is kept
    return table


# %% tags=["wrong-2"]
def table_by_sorting(code, value, hashtable_capacity):
    order = np.argsort(code, kind="stable")
    starts = np.searchsorted(code[order], np.arange(hashtable_capacity))
    padded = np.concatenate([value[order], np.zeros((1, value.shape[1]))])
    return np.add.reduceat(padded, starts)  # for an empty run reduceat gives the number that stands there, not 0


# %% tags=["wrong-3"]
def most_bits(angles, near, m, meetings):
    agree = 1 - angles / np.pi  # far keys are counted too
    tau = 1
    while m * np.sum(agree ** (tau + 1)) >= meetings:
        tau += 1
    return tau


# %% tags=["wrong-3"]
def most_bits(angles, near, m, meetings):
    agree = 1 - angles[angles < near] / np.pi
    tau = 1
    while np.sum(agree ** (tau + 1)) >= meetings:  # in one hash, not in all m
        tau += 1
    return tau
