# %% [markdown]
# # 1. Attention as sampling
#
# **You will be able to** say what YOSO attention computes, why zeros and ones drawn at random can
# stand for attention weights, and how far off an average of such draws is.
#
# **Time:** 30 minutes, and 15 for the exercises.
#
# **You need:** NumPy, and to have seen softmax attention once.
#
# **Source:** [`yoso_core.reference.expectation`](../reference/expectation.py) and
# [`yoso_core.reference.cumulation`](../reference/cumulation.py); section 3.1 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import numpy as np

import yoso_core
from yoso_core import draw
from yoso_core.reference import angles, collision_rate, expected_weight, l2_normalize

draw.use_look()
rng = np.random.default_rng(1)

# %% [markdown]
# ## Eight words that attend to each other
#
# Attention starts with three lists of vectors. Every token has a *query* $q_i$ (what it looks for),
# a *key* $k_j$ (what it offers) and a *value* $v_j$ (what it says). We make up eight tokens in
# three groups: words of one group get keys that point roughly the same way. All queries and keys
# have length 1, so $q_i \cdot k_j$ is the cosine of the angle between them.

# %%
words = ["cat", "dog", "horse", "red", "green", "blue", "one", "two"]
group = np.array([0, 0, 0, 1, 1, 1, 2, 2])
n, dim = len(words), 16

center = rng.standard_normal((3, dim))
key = l2_normalize(center[group] + 0.35 * rng.standard_normal((n, dim)))
query = l2_normalize(key + 0.06 * rng.standard_normal((n, dim)))
value = rng.standard_normal((n, 2))  # two numbers each, so that we can draw them

assert np.allclose(np.linalg.norm(query, axis=1), 1)
assert np.allclose(np.linalg.norm(key, axis=1), 1)

# %% [markdown]
# Softmax attention, as you know it, gives token $i$ the average of all values, weighted by
# similarity:
#
# $$\mathrm{out}_i = \sum_j W_{ij} v_j, \qquad W_{ij}
# = \frac{\exp(\beta\, q_i \cdot k_j)}{\sum_l \exp(\beta\, q_i \cdot k_l)}.$$
#
# The scale $\beta$ says how picky it is. In a transformer it hides in the lengths of $q$ and $k$;
# here it stands in the open.

# %%
tau = 8
cosine = query @ key.T
softmax = np.exp(tau * cosine)
softmax /= softmax.sum(axis=1, keepdims=True)

# %% [markdown]
# ## Another way to say "similar"
#
# YOSO keeps the sum and changes the weight. Let $\theta_{ij}$ be the angle between $q_i$ and $k_j$.
# Then
#
# $$E_{ij} = \left(1 - \frac{\theta_{ij}}{\pi}\right)^{\tau}.$$
#
# It is 1 for vectors that point the same way and 0 for opposite ones, and the whole number $\tau$
# says how picky it is. Here are both weights, for the same eight words.

# %%
theta = np.stack([angles(q, key) for q in query])
weight = expected_weight(theta, tau)

assert np.allclose(np.cos(theta), cosine)
assert np.allclose(weight, (1 - np.arccos(cosine) / np.pi) ** tau)

draw.matrices({"softmax": softmax, f"$(1 - \\theta / \\pi)^{{{tau}}}$": weight}, rows=words, columns=words, numbers=".2f", height=4.2)

# %% [markdown]
# The same words find each other. One thing differs: a row of softmax sums to 1, a row of the new
# weights does not. YOSO needs no denominator: after the sum it scales every output to length 1
# instead.

# %%
assert np.allclose(softmax.sum(axis=1), 1)
assert not np.allclose(weight.sum(axis=1), 1)

# %% [markdown]
# How alike are the two as functions of the cosine? Without its denominator, and scaled to be 1 at
# cosine 1, softmax is $\exp(\beta (\cos\theta - 1))$.

# %%
line = np.linspace(-1, 1, 400)
figure, axes = draw.picture(2, sharey=True)
for panel, strength in zip(axes, (4, 8), strict=True):
    panel.plot(line, np.exp(strength * (line - 1)), color=draw.GRAY, linewidth=3, label="softmax")
    panel.plot(line, (1 - np.arccos(line) / np.pi) ** strength, color=draw.BLUE, linewidth=2, label="collision")
    panel.set(title=f"$\\beta = \\tau = {strength}$", xlabel="cosine of query and key")
    panel.grid(True)
    panel.legend(loc="upper left")
axes[0].set_ylabel("weight")

collision = (1 - np.arccos(line) / np.pi) ** tau
assert np.all(np.diff(collision) > 0), "a larger cosine always has a larger weight"
assert collision[0] == 0
assert collision[-1] == 1
figure

# %% [markdown]
# Both rise from almost nothing to 1, and both rise late. They are not equal, and YOSO does not
# claim to compute softmax. It claims to be an attention that does the same job, with a weight that
# has one property softmax lacks: *it is a probability that we know how to draw*.
#
# ## A probability can play a weight
#
# Take a coin that shows 1 with probability $p$ and 0 otherwise: a *Bernoulli* draw $B$. Its mean is
#
# $$\mathbb{E}[B] = 1 \cdot p + 0 \cdot (1 - p) = p.$$
#
# So wherever a sum wants the weight $E_{ij}$, we may put a coin that shows 1 with probability
# $E_{ij}$, and *on average* the sum is right:
#
# $$\mathbb{E}\Big[\sum_j B_{ij} v_j\Big] = \sum_j \mathbb{E}[B_{ij}]\, v_j = \sum_j E_{ij} v_j .$$
#
# That is the whole trick. A single draw looks nothing like the weights. The mean of many does.

# %%
draws = (rng.random((10_000, n, n)) < weight).astype(float)  # 10,000 times a matrix of coins
mean = draws.mean(axis=0)

draw.matrices({"one draw": draws[0], "mean of 64": draws[:64].mean(axis=0), "the weights": weight}, rows=words, columns=words, height=3.3)

# %% [markdown]
# How near must the mean of 10,000 draws be? Theory, in the next section, says: its standard
# deviation is $\sqrt{p (1 - p) / 10{,}000}$. We ask for five of those, for every pair.

# %%
deviation = np.sqrt(weight * (1 - weight) / len(draws))
assert np.all(np.abs(mean - weight) <= 5 * deviation + 1e-12)

# %% [markdown]
# ## How wrong is one draw, and how wrong are m?
#
# The square of 0 is 0 and the square of 1 is 1, so $B^2 = B$, and the variance comes out in one
# line:
#
# $$\mathrm{Var}[B] = \mathbb{E}[B^2] - \mathbb{E}[B]^2 = p - p^2 = p\,(1 - p).$$
#
# Now average $m$ independent draws. Variances of independent draws add, and dividing by $m$ divides
# the variance by $m^2$:
#
# $$\mathrm{Var}\Big[\frac{1}{m} \sum_{h=1}^m B_h\Big] = \frac{m \cdot p (1-p)}{m^2}
# = \frac{p\,(1 - p)}{m}.$$
#
# The curve is the formula. Each dot is measured: the variance of 4,000 averages.


# %%
def averages(p, m, repeats):
    """``repeats`` averages of ``m`` coins that show 1 with probability ``p``."""
    return rng.binomial(m, p, size=repeats) / m


repeats = 4000
probability = np.linspace(0, 1, 21)
figure, (left, right) = draw.picture(2)
fine = np.linspace(0, 1, 200)
for number, m in enumerate((1, 2, 4)):
    measured = np.array([averages(p, m, repeats).var() for p in probability])
    left.plot(fine, fine * (1 - fine) / m, color=draw.PALETTE[number], linewidth=1.5)
    left.plot(probability, measured, draw.MARKERS[number], color=draw.PALETTE[number], markersize=6, label=f"m = {m}")
    assert np.allclose(measured, probability * (1 - probability) / m, atol=0.02 / m)
left.set(title="Variance of an average", xlabel="probability p", ylabel="variance", ylim=(0, 0.36))
left.legend(ncols=3, loc="upper center")
left.grid(True)

nums_hash = np.array([1, 4, 16, 64, 256])
p = 0.3
error = np.array([averages(p, m, repeats).std() for m in nums_hash])
slope = draw.error_curve(right, nums_hash, error)
right.set(title=f"Error, p = {p}", xlabel="draws m", ylabel="standard deviation")
right.legend()

assert np.allclose(error, np.sqrt(p * (1 - p) / nums_hash), rtol=0.05)
assert abs(slope + 0.5) < 0.02
figure

# %% [markdown]
# Read the right picture as a price list: **four times the draws, half the error.** It is the price
# of every sampling method, and the reason why YOSO is an estimate that you can make better, never
# an exact answer.
#
# Two things in the left picture are worth keeping in mind. The variance is 0 at both ends: a pair
# that always meets, or never, costs no error at all. And far from the ends it does not depend on
# how long the text is.
#
# ## The output is a cloud around the right answer
#
# Replace every weight by an average of $m$ coins, and the output of a token becomes a random point.
# Its mean is the exact output. When all coins are independent, coordinate $c$ of it has the
# variance
#
# $$\mathrm{Var}[\mathrm{out}_{ic}] = \frac{1}{m} \sum_j v_{jc}^2\, E_{ij} (1 - E_{ij}).$$

# %%
i = words.index("dog")
exact = weight[i] @ value
figure, axes = draw.picture(3, sharex=True, sharey=True, height=3.4)
for panel, m in zip(axes, (4, 32, 256), strict=True):
    coins = rng.binomial(m, weight[i], size=(2000, n)) / m
    cloud = coins @ value
    panel.plot(*cloud[:500].T, ".", color=draw.SKY, markersize=4, label="500 estimates")
    panel.plot(*exact, "D", color=draw.ORANGE, markeredgecolor=draw.INK, markersize=8, label="exact output")
    panel.set(title=f"m = {m}", xlabel="first coordinate")
    panel.grid(True)

    variance = (value**2 * (weight[i] * (1 - weight[i]))[:, None]).sum(axis=0) / m
    assert np.all(np.abs(cloud.mean(axis=0) - exact) < 5 * np.sqrt(variance / len(cloud)))
    assert np.allclose(cloud.var(axis=0), variance, rtol=0.15)
axes[0].set_ylabel("second coordinate")
axes[-1].legend(loc="upper left")
figure

# %% [markdown]
# ## You only sample (almost) once
#
# So far we have gained nothing: a coin for each of the $n^2$ pairs costs as much as a weight for
# each pair. Here is the idea that gives the method its name. **Draw one random hash function, hash
# every query and every key with it once, and let "same bucket" be the coin.** That is $2n$ hashes
# in place of $n^2$ coins, and every pair has its coin.
#
# Which hash meets with probability exactly $(1 - \theta/\pi)^\tau$? That is tutorial 2. Here we
# only use it: `hyperplane_hash` takes random planes and returns a bucket number, the *hash code*,
# for each vector and each of $m$ hashes.

# %%
m = 32
planes = yoso_core.sample_planes(m, tau, dim, rng=0)
query_hash_code = yoso_core.hyperplane_hash(query, planes, m, tau)
key_hash_code = yoso_core.hyperplane_hash(key, planes, m, tau)
assert query_hash_code.shape == key_hash_code.shape == (n, m)

coins = query_hash_code[:, None, :] == key_hash_code[None, :, :]  # one for each query, key and hash
assert np.array_equal(coins.mean(axis=-1), collision_rate(query_hash_code, key_hash_code))

draw.matrices(
    {"one hash": coins[..., 0].astype(float), f"mean of {m} hashes": coins.mean(axis=-1), "the weights": weight},
    rows=words,
    columns=words,
    height=3.3,
)

# %% [markdown]
# Is a mean over hashes still right? A mean does not care whether coins depend on each other, so
# nothing changes: over many hash functions, each pair meets in the share $E_{ij}$ of them. And seen
# one pair at a time, the coins of different hashes are independent, so the variance of each weight
# is still $E_{ij}(1 - E_{ij})/m$. We check both over 1,500 fresh sets of hashes.

# %%
m, repeats = 8, 1500
rates = np.empty((repeats, n, n))
for r in range(repeats):
    planes = yoso_core.sample_planes(m, tau, dim, rng=r)
    rates[r] = collision_rate(*(yoso_core.hyperplane_hash(x, planes, m, tau) for x in (query, key)))

variance = weight * (1 - weight) / m
assert np.all(np.abs(rates.mean(axis=0) - weight) < 5 * np.sqrt(variance / repeats) + 1e-12)

figure, (left, right) = draw.picture(2)
left.plot([0, 1], [0, 1], color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="equal")
left.plot(weight.ravel(), rates.mean(axis=0).ravel(), "o", color=draw.BLUE, markersize=5, label="a pair")
left.set(title="The mean is right", xlabel="weight $E_{ij}$", ylabel=f"mean over {repeats:,} draws")
right.plot(fine, fine * (1 - fine) / m, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=f"p (1 $-$ p) / {m}")
right.plot(weight.ravel(), rates.var(axis=0).ravel(), "D", color=draw.ORANGE, markersize=5, label="a pair")
right.set(title="So is the variance", xlabel="weight $E_{ij}$", ylabel="variance of the rate")
for panel in (left, right):
    panel.grid(True)
    panel.legend(loc="lower right" if panel is left else "lower center")

assert np.allclose(rates.var(axis=0), variance, rtol=0.25, atol=5e-4)
figure

# %% [markdown]
# What *does* change is a sum of several coins. Two keys that are near each other tend to fall into
# one bucket together, so their coins come up together. Below is the covariance of the coins that
# "dog" flips with each word. Independent coins would show the diagonal alone.
#
# Take the plainest sum, the number of words that "dog" meets in one hash. Its mean is $\sum_j
# E_{ij}$ either way, but its variance now holds the covariances too, $\mathrm{Var} = \sum_{jl}
# \mathrm{Cov}[B_{ij}, B_{il}]$, and is larger. This is the price of hashing once.

# %%
covariance = m * np.cov(rates[:, i, :].T, bias=True)  # of one hash: a rate is the mean of m
figure, axes = draw.picture(width=5.6, height=4.2)
image = draw.heat_map(axes, covariance, rows=words, columns=words, numbers=".2f", signed=True)
axes.set(title='Covariance of the coins of "dog"', xlabel="key l", ylabel="key j")
figure.colorbar(image, shrink=0.85)

met = rates[:, i, :].sum(axis=1)
independent = m * variance[i].sum()
assert np.isclose(m * met.var(), covariance.sum())
assert abs(met.mean() - weight[i].sum()) < 5 * met.std() / np.sqrt(repeats)
assert m * met.var() > 1.2 * independent
print(f"variance of the number of words met: {m * met.var():.2f} with shared hashes, {independent:.2f} with independent coins")
figure

# %% [markdown]
# ## The whole thing in one call
#
# `yoso_core.yoso_attention` normalizes, hashes, adds up and scales the outputs to length 1. With
# `use_expectation=True` it uses the exact weights $E_{ij}$, in time $n^2$; without, it samples. The
# more hashes, the nearer the two.

# %%
expectation = yoso_core.yoso_attention(query, key, value, hash_code_len=tau, use_expectation=True)
assert np.allclose(expectation, l2_normalize(weight @ value), atol=1e-6)

nums_hash = np.array([32, 128, 512, 2048])
error = []
for m in nums_hash:
    samples = [
        yoso_core.yoso_attention(
            query, key, value, num_hash=int(m), hash_code_len=tau, planes=yoso_core.sample_planes(int(m), tau, dim, rng=seed)
        )
        for seed in range(40)
    ]
    error.append(np.sqrt(np.mean((np.array(samples) - expectation) ** 2)))

figure, axes = draw.picture()
slope = draw.error_curve(axes, nums_hash, error)
axes.set(title="Sampled attention nears its expectation", xlabel="hashes m", ylabel="RMS error of the output")
axes.legend()
assert -0.65 < slope < -0.4
figure

# %% [markdown]
# ## What to keep
#
# - YOSO's weight $E_{ij} = (1 - \theta_{ij}/\pi)^\tau$ is a probability, so a coin can stand for
#   it.
# - The estimate has the right mean. The variance of a weight is $E_{ij}(1 - E_{ij})/m$, so the
#   error falls as $1/\sqrt{m}$.
# - One hash function flips the coins of all pairs at once. That leaves the mean of the sum as it
#   is, and couples the coins of similar keys.
#
# Next: [2. Hashing with hyperplanes](02_hashing_with_hyperplanes.ipynb), where the coins come from.
#
# ## Exercise 1: how many hashes?
#
# A weight $p$ is estimated by $m$ draws. Which is the smallest $m$ for which the standard deviation
# of the estimate is at most the share `relative_error` of $p$ itself? (Small weights need many
# hashes. The formula shows how many.)


# %% tags=["exercise-1"]
def hashes_needed(p, relative_error):
    """The smallest m with standard deviation <= relative_error * p, as an int."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
for p in (0.01, 0.2, 0.5, 0.9):
    for relative_error in (0.05, 0.3):
        m = hashes_needed(p, relative_error)
        reached = np.sqrt(p * (1 - p) / np.array([m, max(m - 1, 0.5)])) / p
        assert reached[0] <= relative_error * (1 + 1e-9), f"p = {p}: {m} hashes leave a relative error of {reached[0]:.3f}"
        assert reached[1] > relative_error, f"p = {p}: {m} hashes are more than needed for a relative error of {relative_error}"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: attention from coins
#
# Write the estimator of this tutorial: given the weights, return $\frac{1}{m} \sum_h \sum_j
# B^{(h)}_{ij} v_j$ with independent coins, fresh for every $h$, $i$ and $j$. The checker looks at
# the mean *and* at the variance.


# %% tags=["exercise-2"]
def sampled_attention(weight, value, m, rng):
    """Estimate ``weight @ value`` from ``m`` matrices of zeros and ones, drawn from ``rng``."""
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
for m in (1, 16):
    found = np.array([sampled_attention(weight, value, m, np.random.default_rng(seed)) for seed in range(2000)])
    assert found.shape == (2000, n, 2), f"an output should have shape {(n, 2)}, got {found.shape[1:]}"
    wanted = (weight * (1 - weight)) @ value**2 / m
    far = np.abs(found.mean(axis=0) - weight @ value) / np.sqrt(wanted / 2000)
    assert far.max() < 5, f"m = {m}: the mean is off by {far.max():.0f} standard deviations"
    ratio = found.var(axis=0).sum() / wanted.sum()
    assert 0.9 < ratio < 1.1, f"m = {m}: the variance should be {wanted.sum():.2f} in all, it is {ratio:.1f} times that"
print("Exercise 2: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** The standard deviation is $\sqrt{p(1-p)/m}$. It is at most $\varepsilon p$ when $m
# \ge (1 - p) / (p\, \varepsilon^2)$: a weight ten times smaller needs ten times as many hashes.


# %% tags=["solution-1"]
def hashes_needed(p, relative_error):
    return int(np.ceil((1 - p) / (p * relative_error**2) - 1e-9))


# %% [markdown]
# **Exercise 2.** A comparison of uniform numbers with the weights flips all coins at once.


# %% tags=["solution-2"]
def sampled_attention(weight, value, m, rng):
    coins = rng.random((m, *weight.shape)) < weight
    return coins.mean(axis=0) @ value


# %% tags=["wrong-1"]
def hashes_needed(p, relative_error):
    return int(np.ceil(p * (1 - p) / relative_error**2))  # the error is absolute, not a share of p


# %% tags=["wrong-2"]
def sampled_attention(weight, value, m, rng):
    coins = rng.random(weight.shape) < weight  # one draw, used m times: the right mean, but the variance does not fall
    return sum(coins @ value for _ in range(m)) / m


# %% tags=["wrong-2"]
def sampled_attention(weight, value, m, rng):
    return (rng.random((m, *weight.shape)) < weight).sum(axis=0) @ value  # the 1/m is missing
