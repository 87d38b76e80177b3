# %% [markdown]
# # 4. Cumulation
#
# **You will be able to** compute sampled attention with hash tables in time linear in the length of
# the text, by hand and in ten lines of NumPy, say what the number of hashes, the length of the
# codes and a real text do to its error and its cost, and take noise away with a few bits more.
#
# **Time:** 50 minutes, and 25 for the exercises.
#
# **You need:** NumPy, and tutorials 1 to 3.
#
# **Source:** [`yoso_core.reference.cumulation`](../reference/cumulation.py),
# [`yoso_core.reference.smoothing`](../reference/smoothing.py) and
# [`yoso_core.reference.attention`](../reference/attention.py); algorithm 1 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import time
from collections import Counter
from itertools import combinations
from math import comb

import numpy as np

import yoso_core
from yoso_core import draw
from yoso_core.demo.words import embed, read_text
from yoso_core.reference import collision_rate, expected_weight, l2_normalize

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


figure, axes = draw.picture(rows=2, width=6, height=5.8)
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

figure, axes = draw.picture(width=5.4, height=3.2)
for number, (name, (shown, best)) in enumerate(times.items()):
    axes.plot(shown, best, marker=draw.MARKERS[number], color=draw.PALETTE[number], markersize=6, linewidth=1.2, label=name)
axes.set(title="Time, on the machine that built this", ylabel="milliseconds", xscale="log", yscale="log", xlabel="tokens n")
axes.set_xticks(longer[::2], [f"{length:,}" for length in longer[::2]])
axes.minorticks_off()
axes.grid(True)
draw.legend_under_title(axes)
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
figure, axes = draw.picture(width=6, height=3)
axes.barh(np.arange(9) - 0.2, exact[top], height=0.38, color=draw.GRAY, label="exact")
axes.barh(np.arange(9) + 0.2, sampled[top], height=0.38, color=draw.BLUE, label=f"sampled, m = {m}")
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


def samples(repeats, num_hash, hash_code_len, oversample=0, **more):
    """Sampled attention of ``query`` to ``key``, with fresh planes each time:
    ``(repeats, 512, 64)``. We come to ``oversample``.
    """
    return np.array(
        [
            yoso_core.yoso_attention(
                query,
                key,
                key,
                num_hash=num_hash,
                hash_code_len=hash_code_len,
                planes=yoso_core.sample_planes(num_hash, hash_code_len + oversample, 64, rng=rng),
                oversample=oversample,
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
figure, axes = draw.picture(width=5.6, height=3.2)
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
# text fewer than either. (With 64 numbers to a row, in float32, a table takes $256 \cdot 2^\tau$
# bytes: 17 MB at 16 bits. The whole $n \times n$ matrix, which is not needed, would take 67 MB.)

# %%
rows = {"this text": [], "random vectors": []}
even = rng.standard_normal(x.shape).astype(np.float32)
for tau in taus.tolist():
    planes = yoso_core.sample_planes(4, tau, 64, rng=1)
    for name, vectors in (("this text", x), ("random vectors", even)):
        codes = yoso_core.hyperplane_hash(vectors, planes, 4, tau)
        rows[name].append(np.mean([len(np.unique(codes[:, h])) for h in range(4)]))
    assert max(rows["this text"][-1], rows["random vectors"][-1]) <= min(2**tau, len(x))

figure, axes = draw.picture(width=5.4, height=3)
axes.plot(taus, np.minimum(2.0**taus, len(x)), color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=r"smaller of $2^\tau$ and n")
for number, (name, line) in enumerate(rows.items()):
    axes.plot(taus, line, draw.MARKERS[number], color=draw.PALETTE[number], label=name, markersize=6)
axes.set(title=f"Rows in use, n = {len(x):,}", xlabel=r"bits of a code, $\tau$", ylabel="rows", yscale="log")
axes.set_yticks([1, 10, 100, 1000, 4096], ["1", "10", "100", "1,000", "4,096"])
axes.set_xticks(taus[1:])
axes.minorticks_off()
axes.grid(True)
axes.legend(loc="lower right")

assert rows["this text"][-1] < rows["random vectors"][-1]
assert [round(number / 1e6) for number in (4 * 64 * 2 ** int(taus.max()), 4 * len(x) ** 2)] == [17, 67]
figure

# %% [markdown]
# ## Less noise from the same hashes: smoothing
#
# The noise is what is left of luck: two codes are equal or they are not. A near miss, all bits
# alike but one, counts as much as a stranger. Can we let it count?
#
# Hash with a few bits more, $\tau + s$ of them. Such a code holds many codes of $\tau$ bits, one
# for each choice of $\tau$ of its bits: $\binom{\tau + s}{\tau}$ hashes for the price of one. Each
# of them alone has the right expectation, so has the mean over them all, and it has less noise. Two
# codes that differ in $r$ bits agree in those choices that leave these $r$ out. So in the mean a
# key counts
#
# $$a_r = \binom{\tau + s - r}{\tau} \Big/ \binom{\tau + s}{\tau}, \qquad a_0 = 1, \qquad a_r = 0
# \ \text{ for } r > s.$$
#
# With $\tau = s = 2$ this is small enough to draw. A code has four bits, there are 16 codes, and
# those that differ in one bit are joined by a line: a hypercube. We draw it by the distance from
# the query's code 0110. Five keys lie on it.

# %%
tau, s = 2, 2
bits = tau + s
query_code = 0b0110
key_code = np.array([0b0110, 0b0111, 0b0100, 0b1010, 0b1000])
key_value = np.array([1.0, 2, 8, 24, 100])
a = [comb(bits - r, tau) / comb(bits, tau) for r in range(bits + 1)]
assert a == [1, 1 / 2, 1 / 6, 0, 0]

choices = list(combinations(range(bits), tau))
masks = [sum(1 << b for b in kept) for kept in choices]
agree = np.array([key_code & mask == query_code & mask for mask in masks])
distance = [int(query_code ^ code).bit_count() for code in key_code.tolist()]
assert distance == [0, 1, 1, 2, 3]
assert np.allclose(agree.mean(axis=0), [a[r] for r in distance])
assert np.allclose((agree @ key_value).tolist(), [25, 9, 9, 3, 3, 11]), "what each choice of bits alone would read"
assert np.isclose(np.mean(agree @ key_value), 1 + (2 + 8) / 2 + 24 / 6), "and their mean, 10"

levels = [[turned for turned in range(2**bits) if turned.bit_count() == r] for r in range(bits + 1)]
spot = {turned: (r, (len(level) - 1) / 2 - i) for r, level in enumerate(levels) for i, turned in enumerate(level)}


def hypercube(panel, shades, across=None, size=11):
    """The codes by the bits in which they differ from one of them, whose shade is ``shades[0]``.
    Lines along bit ``across`` are drawn strong.
    """
    for turned, start in spot.items():
        for b in range(bits):
            if not turned >> b & 1:
                strong = {"color": draw.VERMILION, "linewidth": 1.6} if b == across else {"color": draw.FAINT, "linewidth": 0.9}
                panel.plot(*zip(start, spot[turned | 1 << b], strict=True), zorder=1 + (b == across), **strong)
    for turned, (x, y) in spot.items():
        panel.plot(x, y, "o", color=shades[turned], markersize=size, markeredgecolor=draw.INK, markeredgewidth=0.8, zorder=3)
    panel.axis("off")


distances = np.array([turned.bit_count() for turned in range(2**bits)])
blues = [draw.WEIGHTS(0.85), draw.WEIGHTS(0.6), draw.WEIGHTS(0.25), "white", "white"]
figure, (left, right) = draw.picture(2, width=8, height=4, width_ratios=(1.7, 1))
hypercube(left, [blues[r] for r in distances])
for r, text in enumerate(("$a_0 = 1$", r"$a_1 = \frac{1}{2}$", r"$a_2 = \frac{1}{6}$", "$a_3 = 0$", "$a_4 = 0$")):
    left.text(r, 3.3, text, ha="center", va="center", fontsize=11)
for turned, (x_at, y_at) in spot.items():
    left.text(x_at, y_at - 0.36, draw.bits_text(query_code ^ turned, bits), ha="center", va="center", fontsize=8)
for j, code in enumerate(key_code.tolist()):
    x_at, y_at = spot[query_code ^ code]
    left.text(
        x_at, y_at + 0.38, f"$k_{j}$: {key_value[j]:g}", ha="center", va="center", fontsize=9.5, fontweight="bold", color=draw.VERMILION
    )
left.set(xlim=(-0.4, 4.4), ylim=(-3, 3.7))
left.set_title("What a key counts for the query 0110")
rows = [f"bits {low}, {high}: {total:g}" for (low, high), total in zip(choices, agree @ key_value, strict=True)] + ["mean: 10"]
draw.heat_map(right, np.vstack([agree, agree.mean(axis=0)]), rows=rows, columns=[f"$k_{j}$" for j in range(5)], numbers=".2g")
right.set_xticks(range(5), [f"$k_{j}$" for j in range(5)], rotation=0)
right.axhline(len(choices) - 0.5, color=draw.INK, linewidth=1.5)
right.set(title="Six choices of two bits")
right.set_aspect("auto")
figure

# %% [markdown]
# On the right, the six hashes of two bits that are in these four, a row each: which keys agree with
# the query in both bits, and the sum of their values. One reads 25 and two read 3. Their mean is
# what smoothing reads, 10, and a column's mean is $a_r$.
#
# ## Smoothing a table
#
# Looking at every choice, or at every pair of codes, would take long. But what a query reads again
# depends on its code alone. So scatter into a table of $2^{\tau + s}$ rows as before, then replace
# every row by the sum of all rows, each times $a_r$ for its distance, then gather as before.
#
# The sum over all rows at a distance of $r$ from $c$, the *sphere* $T_r[c]$, is built bit by bit. A
# row at distance $r$ that differs in bit $b$ is at distance $r - 1$ from the neighbor across bit
# $b$:
#
# $$T_0 = \mathrm{table}, \qquad T_r[c] \mathrel{+}= T_{r-1}[c \oplus 2^b] \quad
# \text{for } b = 0, 1, \ldots \text{ and } r = s, \ldots, 1.$$
#
# That is $s\,(\tau + s)$ additions for each entry of the table. Watch it with a single key in the
# table.


# %%
def smooth(table, s, stages=None):
    """``out[c] = sum_r a_r T_r[c]`` for a table ``(2**(tau + s), d)``."""
    bits, codes = len(table).bit_length() - 1, np.arange(len(table))
    spheres = [table] + [np.zeros_like(table)] * s
    for b in range(bits):
        for r in range(s, 0, -1):
            spheres[r] = spheres[r] + spheres[r - 1][codes ^ (1 << b)]
        if stages is not None:
            stages.append(np.stack(spheres))
    return sum(comb(bits - r, bits - s) / comb(bits, s) * sphere for r, sphere in enumerate(spheres))


single = np.zeros((2**bits, 1))
single[0] = 1
stages = [np.stack([single, 0 * single, 0 * single])]
smooth(single, s, stages)

figure, panels = draw.picture(bits + 1, width=7.5, height=2)
for b, (panel, spheres) in enumerate(zip(panels, stages, strict=True), -1):
    assert np.all(spheres.sum(axis=0) <= 1), "nobody is reached twice"
    reached = {turned: int(np.argmax(spheres[:, turned, 0])) for turned in range(2**bits) if spheres[:, turned, 0].any()}
    assert all(r == turned.bit_count() and turned < 2 ** (b + 1) for turned, r in reached.items())
    hypercube(panel, [blues[reached[turned]] if turned in reached else "white" for turned in range(2**bits)], across=b, size=8)
    panel.set_title("the table" if b < 0 else f"bit {b}", loc="center")
    panel.set(xlim=(-0.6, 4.6), ylim=(-3.1, 3.1))
assert set(reached) == {turned for turned in range(2**bits) if turned.bit_count() <= s}
figure

# %% [markdown]
# Each bit doubles the part of the cube that has heard of the key, but nobody hears from further
# away than $s$ bits. In the end a code at distance $r$ has it in $T_r$. Two things are worth
# knowing of the result. It is what all choices of $\tau$ bits say on average, exactly. And a column
# of the table sums to $2^s$ times what it was: a table of $2^\tau$ rows, for any one choice, is
# read through $2^{\tau + s}$ codes, so each of its rows appears $2^s$ times.


# %%
def mean_over_choices(query_code, key_code, value, bits, tau):
    """What the queries read with codes of ``tau`` bits, the mean over all choices of bits."""
    masks = [sum(1 << b for b in kept) for kept in combinations(range(bits), tau)]
    return np.mean([(query_code[:, None] & mask == key_code & mask) @ value for mask in masks], axis=0)


for tau, s in ((2, 2), (3, 0), (5, 1), (4, 3), (1, 3)):
    bits, n = tau + s, 100
    asked, stored = rng.integers(2**bits, size=(2, n))
    values = rng.standard_normal((n, 3))
    table = np.zeros((2**bits, 3))
    np.add.at(table, stored, values)
    smoothed = smooth(table, s)
    assert np.allclose(smoothed[asked], mean_over_choices(asked, stored, values, bits, tau))
    assert np.allclose(smoothed, yoso_core.smooth_table(table, s))
    assert np.allclose(smoothed.sum(axis=0), 2**s * table.sum(axis=0))
    codes = asked[:, None].astype(np.int32), stored[:, None].astype(np.int32)
    assert np.allclose(smoothed[asked], yoso_core.lsh_cumulation(*codes, values, 2**bits, oversample=s))


# %% [markdown]
# ## The other way, and why it is not taken
#
# The sum over all rows, with weights that depend on $c \oplus c'$ alone, is a convolution over bit
# strings, and the Hadamard transform of tutorial 3 turns it into a product, as a Fourier transform
# would: transform the columns, multiply the row whose number has $w$ set bits by $2^s
# \binom{\tau + s - w}{s} / \binom{\tau + s}{s}$, transform back. That takes $2\,(\tau + s)$
# additions for each entry, whatever $s$. With real numbers it would be the same. With float32:


# %%
def smooth_by_transform(table, s):
    bits = len(table).bit_length() - 1
    factor = np.array([2**s * comb(bits - row.bit_count(), s) / comb(bits, s) for row in range(len(table))], table.dtype)
    return yoso_core.hadamard_transform(factor * yoso_core.hadamard_transform(table.T)).T / len(table)


tau, s, n = 8, 2, 30
table = np.zeros((2 ** (tau + s), 4), np.float32)
np.add.at(table, rng.integers(len(table), size=n), rng.standard_normal((n, 4), dtype=np.float32))
ways = {"spheres": smooth(table, s), "transforms": smooth_by_transform(table, s)}
assert np.allclose(ways["spheres"], ways["transforms"], atol=1e-5)

out_of_reach = np.flatnonzero(~yoso_core.smooth_table((table != 0).astype(np.float32), s).any(axis=1))
assert len(out_of_reach) > 20
shown = out_of_reach[np.argmax(np.abs(ways["transforms"][out_of_reach]).sum(axis=1))]
print(f"{n} keys in {len(table):,} rows; {len(out_of_reach)} rows are more than {s} bits from every key. One of them, row {shown}:")
for name, smoothed in ways.items():
    print(f"{name:>10}:", *(f"{number:9.1e}" for number in smoothed[shown]), " of length 1:", l2_normalize(smoothed)[shown].round(2))
assert np.all(ways["spheres"][out_of_reach] == 0)
assert 0 < np.abs(ways["transforms"][out_of_reach]).max() < 1e-6
assert np.isclose(np.linalg.norm(l2_normalize(ways["transforms"])[shown]), 1, atol=1e-5)

# %% [markdown]
# The transform adds all keys into every row, and what cancels on the way back leaves a rounding
# error where there should be nothing. Small as it is: attention scales its rows to length 1, and
# makes an answer of it. Spheres never subtract. Nothing stays nothing.
#
# ## How much noise goes away
#
# Let $p = 1 - \theta/\pi$. Without smoothing a pair's weight is 1 with probability $p^\tau$, so its
# variance is $p^\tau - p^{2\tau}$. With it, take two choices of bits: if they have all but $l$ bits
# in common, both agree with probability $p^{\tau + l}$. Over all pairs of choices,
#
# $$\mathrm{Var} = \sum_{l=0}^{s} \frac{\binom{\tau}{l} \binom{s}{l}}{\binom{\tau + s}{\tau}}\,
# p^{\tau + l} - p^{2\tau}.$$
#
# We measure it: pairs at five angles, fresh planes for each draw, every weight $a_r$ of every hash.


# %%
def pair_variance(p, tau, s):
    shares = [comb(tau, left) * comb(s, left) / comb(tau + s, tau) for left in range(s + 1)]
    return sum(share * p ** (tau + left) for left, share in enumerate(shares)) - p ** (2 * tau)


def measured_variance(cosine, tau, s, m=32, draws=120, pairs=64, dim=32):
    """Variance of the weight of a pair in one hash, and its standard error over the draws."""
    first, other = (l2_normalize(v) for v in rng.standard_normal((2, draws, pairs, dim), dtype=np.float32))
    other = l2_normalize(other - np.sum(first * other, axis=-1, keepdims=True) * first)
    second = np.float32(cosine) * first + np.float32(np.sqrt(1 - cosine**2)) * other
    planes = yoso_core.sample_planes(m, tau + s, dim, batch_shape=(draws,), rng=rng)
    codes = [yoso_core.hyperplane_hash(v, planes, m, tau + s) for v in (first, second)]
    a = np.array([comb(tau + s - difference.bit_count(), tau) / comb(tau + s, tau) for difference in range(2 ** (tau + s))])
    weight = a[codes[0] ^ codes[1]]
    square = np.mean((weight - expected_weight(np.arccos(cosine), tau)) ** 2, axis=(1, 2))
    return square.mean(), square.std(ddof=1) / np.sqrt(draws)


tau, oversamples, cosines = 8, (0, 1, 2, 4), np.array([0, 0.25, 0.5, 0.75, 0.9])
fine = np.linspace(-0.03, 0.93, 100)
planned = {s: pair_variance(0.5, tau, 0) / pair_variance(0.5, tau, s) for s in oversamples}
assert [round(gain, 2) for gain in planned.values()] == [1, 1.81, 2.83, 5.51], "at a right angle"

exact = yoso_core.expectation_attention(query, key, key, tau)
text_error = [np.sqrt(mean_square(samples(12, 32, tau, s, normalize_output=False) - exact) / mean_square(exact)) for s in oversamples]

figure, (left, right) = draw.picture(2, height=2.9, width=7.5, width_ratios=(1.35, 1))
for number, s in enumerate(oversamples):
    size = expected_weight(np.arccos(fine), tau)
    left.plot(fine, pair_variance(1 - np.arccos(fine) / np.pi, tau, s) / size**2, color=draw.PALETTE[number], linewidth=1.2)
    found, error = np.array([measured_variance(cosine, tau, s) for cosine in cosines]).T
    wanted = pair_variance(1 - np.arccos(cosines) / np.pi, tau, s)
    assert np.all(np.abs(found - wanted) < 5 * error)
    scale = expected_weight(np.arccos(cosines), tau) ** 2
    left.plot(
        cosines, found / scale, draw.MARKERS[number], color=draw.PALETTE[number], markersize=7, markeredgecolor=draw.INK, label=f"s = {s}"
    )
    print(f"s = {s}: measured over formula", ", ".join(f"{f / w:.3f} ± {e / w:.3f}" for f, w, e in zip(found, wanted, error, strict=True)))
left.set(title="Variance of one pair, one hash", xlabel="cosine of query and key", ylabel="over the squared weight", yscale="log")
left.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
left.minorticks_off()
left.legend(loc="lower left")
bars = right.bar(range(4), text_error, color=draw.PALETTE[:4], edgecolor=draw.INK, width=0.65)
right.bar_label(bars, fmt="{:.2f}")
right.set(title="Error of attention, real text", xlabel="bits more, s", ylabel="relative RMS error, m = 32")
right.set_xticks(range(4), [str(s) for s in oversamples])
right.margins(y=0.12)
for panel in (left, right):
    panel.grid(True, axis="both" if panel is left else "y")
assert np.all(np.diff(text_error) < 0), "each time the error falls"
assert text_error[2] < 0.85 * text_error[0]
print(
    "as many hashes without smoothing:",
    ", ".join(f"{32 * (text_error[0] / error) ** 2:.0f} for s = {s}" for s, error in zip(oversamples, text_error, strict=True)),
)
figure

# %% [markdown]
# At a right angle $s$ of 1, 2 and 4 are worth 1.8, 2.8 and 5.5 times as many hashes; at near pairs
# less, for there is less luck in them. A text has both, and its neighbors fall into rows together,
# which smoothing helps less with.
#
# It is not free. For each hash, scatter and gather move $n_q + n_k$ rows; smoothing adds
# $s\,(\tau{+}s)\,2^{\tau+s}$, here 20,480 with $s = 2$, whatever $n$. So it pays for long texts:
# with 65,536 queries and keys, these are a sixth more. Tutorial 11 lets the library choose;
# [docs/smoothing.md](../docs/smoothing.md) says when a query looks up neighboring rows instead, as
# exercise 3 does, and [docs/error.md](../docs/error.md) has the variance of whole rows.
# `oversample` is 0 by default: that is YOSO as published.

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


figure, (left, right) = draw.picture(2, height=3.2)
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
        edgecolor=draw.INK,
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
# probability $1 - 2^{-\tau}$ or so, and all of them by all hashes with
#
# $$(1 - 2^{-\tau})^{\,n m}.$$
#
# That takes every key to be at a right angle. In 64 dims random vectors are at 90 degrees, give or
# take 7, and 7 degrees nearly double a weight of 8 bits, or halve it. All hashes see the same
# angle. So take the mean over angles, whose density is proportional to $\sin^{d-2} \theta$, of the
# probability that all hashes miss, and then the power of $n$. It is a little less.

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
theta = np.linspace(0, np.pi, 2001)
density = np.sin(theta) ** 62
missed = np.sum(density * (1 - expected_weight(theta, tau)) ** m) / np.sum(density)
by_angles, flat = missed**few, (1 - 2.0**-tau) ** (few * m)
assert np.all(np.abs(np.array(alone) - by_angles) < 5 * np.array(spread) + 0.01)
assert np.all(by_angles < flat)

figure, axes = draw.picture(width=5, height=2.7)
axes.plot(few, flat, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=r"$(1 - 2^{-\tau})^{nm}$")
axes.plot(few, by_angles, color=draw.BLUE, linewidth=1, label="mean over angles")
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
# and with few keys, take fewer bits or more hashes, or smooth: then a key within $s$ bits is
# enough.
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
# changes no code; it is what the exact weights need. That is `yoso_core.yoso_attention`, which
# takes `oversample=` as well.


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
# - Hash with $s$ bits more, count a key at a distance of $r$ bits $a_r$: the mean over all choices
#   of $\tau$ bits, the same expectation with a half or a third of the variance.
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
# ## Exercise 3: smooth for one query
#
# A table of a million rows costs more to smooth than a few queries need. Read for *one* query what
# the smoothed table would say, from the table as it was scattered: visit the rows within $s$ bits
# of its code, and no others. The checker poisons the others with NaN, so that it sees who looks
# there.


# %% tags=["exercise-3"]
def read_smoothed(code, table, s):
    """``(d,)``: row ``code`` of `yoso_core.smooth_table`, for a table ``(2**(tau + s), d)`` that
    is not smoothed.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
generator = np.random.default_rng(3)
for tau, s in ((2, 2), (3, 0), (5, 1), (4, 3), (1, 3)):
    table = generator.standard_normal((2 ** (tau + s), 2))
    code = int(generator.integers(len(table)))
    distances = np.array([(code ^ row).bit_count() for row in range(len(table))])
    wanted = yoso_core.smooth_table(table, s)[code]
    table[distances > s] = np.nan
    found = np.asarray(read_smoothed(code, table, s))
    assert found.shape == (2,), f"a row of 2 numbers, please, got shape {found.shape}"
    assert np.all(np.isfinite(found)), f"tau = {tau}, s = {s}: NaN, so you looked at rows that differ in more than {s} bits"
    assert np.allclose(found, wanted), f"tau = {tau}, s = {s}: the row should be {wanted}, it is {found}"
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
# **Exercise 3.** Turning the bits of each choice of $r$ over leads to each code at distance $r$,
# once. The library does this where a table would cost more.


# %% tags=["solution-3"]
def read_smoothed(code, table, s):
    bits = len(table).bit_length() - 1
    total = np.zeros(table.shape[1])
    for r in range(s + 1):
        for turned in combinations(range(bits), r):
            row = code ^ sum(1 << b for b in turned)
            total += comb(bits - r, bits - s) / comb(bits, s) * table[row]
    return total


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
def read_smoothed(code, table, s):
    bits = len(table).bit_length() - 1
    distance = np.array([(code ^ row).bit_count() for row in range(len(table))])
    weight = np.array([comb(bits - r, bits - s) / comb(bits, s) for r in distance.tolist()])
    return weight @ table  # zero times NaN is NaN: the far rows are multiplied, not left out


# %% tags=["wrong-3"]
def read_smoothed(code, table, s):
    bits = len(table).bit_length() - 1
    total = np.zeros(table.shape[1])
    for r in range(s + 1):
        for turned in combinations(range(bits), r):
            total += 2.0**-r * table[code ^ sum(1 << b for b in turned)]  # half for every bit, whatever the number of choices
    return total
