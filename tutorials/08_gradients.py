# %% [markdown]
# # 8. Gradients
#
# **You will be able to** differentiate YOSO attention by hand, say why the paper trains with
# something that is not the derivative, and compute every gradient in linear time.
#
# **Time:** 50 minutes, and 25 for the exercises.
#
# **You need:** tutorials 1 and 4; a little PyTorch for the last section.
#
# **Source:** [`yoso_core.reference.expectation`](../reference/expectation.py),
# [`yoso_core.cpu.sampled_gradients`](../cpu/sampled_gradients.py) and
# [`yoso_core.model.attention`](../model/attention.py); section 3.3 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714).

# %%
import numpy as np
import torch
from torch import nn

import yoso_core
from yoso_core import draw
from yoso_core.model import yoso_attention
from yoso_core.reference import angles, collision_rate, expected_weight, gradient_factor, l2_normalize, l2_normalize_backward

draw.use_look()
rng = np.random.default_rng(8)
torch.set_num_threads(2)

# %% [markdown]
# ## The slope of the weight
#
# To train a network, we must know how its loss changes when a query or a key turns a little. All of
# that goes through one function, the weight of a pair with the cosine $x = q \cdot k$, or the angle
# $\theta = \arccos x$:
#
# $$E(x) = \left(1 - \frac{\arccos x}{\pi}\right)^{\tau}.$$
#
# The derivative of $\arccos x$ is $-1/\sqrt{1 - x^2} = -1/\sin\theta$. So the chain rule gives
#
# $$\frac{dE}{dx} = \tau \left(1 - \frac{\theta}{\pi}\right)^{\tau - 1} \frac{1}{\pi \sin\theta} =
# E \cdot w, \qquad
# w = \frac{\tau}{(\pi - \theta) \sin\theta}.$$
#
# The second form is the one to remember: the slope is *the weight itself, times a factor* $w$. A
# formula is quickly wrong by a factor of $\pi$, so we hold it against a slope measured by finite
# differences.


# %%
def weight(x, tau):
    return (1 - np.arccos(x) / np.pi) ** tau


def slope(x, tau):
    theta = np.arccos(x)
    return weight(x, tau) * tau / ((np.pi - theta) * np.sin(theta))


tau = 8
inside = np.linspace(-0.99, 0.99, 199)
for number_of_bits in (1, 2, 8, 20):
    step = 1e-6
    measured = (weight(inside + step, number_of_bits) - weight(inside - step, number_of_bits)) / (2 * step)
    assert np.allclose(slope(inside, number_of_bits), measured, rtol=1e-5, atol=1e-8)

theta = np.arccos(inside)
assert np.allclose(weight(inside, tau), expected_weight(theta, tau))
assert np.allclose(slope(inside, tau), expected_weight(theta, tau) * gradient_factor(theta, tau, "exact")), (
    "the library's factor is the same"
)

# %% [markdown]
# ## Where it blows up
#
# The factor has $\sin\theta$ below the line, and that is 0 where query and key point the same way:
# just where the weight is largest. Near $x = 1$, $\sin\theta \approx \sqrt{2 (1 - x)}$, so the
# slope grows like $\tau / (\pi \sqrt{2 (1 - x)})$, without any limit.

# %%
figure, (left, right) = draw.picture(2, width=8.2, height=3.2)
fine = np.linspace(-1, 1, 801)
left.plot(fine, weight(fine, tau), color=draw.BLUE, linewidth=2, label="weight E")
left.plot(fine[1:-1], slope(fine[1:-1], tau), color=draw.VERMILION, linewidth=2, linestyle=draw.DASHES, label="slope dE/dx")
left.set(title=f"Weight and slope, {tau} bits", xlabel="cosine x", ylabel="weight, slope", ylim=(-0.2, 8), xticks=[-1, -0.5, 0, 0.5, 1])
left.legend(loc="upper left")
left.grid(True)

gap = 10.0 ** np.arange(-8, -2)
measured_slope = draw.error_curve(right, gap, slope(1 - gap, tau), label="dE/dx")
right.set(title="Near equal vectors", xlabel="distance from the end, 1 $-$ x", ylabel="slope")
right.set_xticks(gap[::2], [f"$10^{{{power}}}$" for power in range(-8, -2, 2)])
right.legend()

assert abs(measured_slope + 0.5) < 0.02
assert np.allclose(slope(1 - 1e-8, tau), tau / (np.pi * np.sqrt(2e-8)), rtol=1e-3)
figure

# %% [markdown]
# The other end is tamer. Near opposite vectors the factor grows even faster, but the weight
# vanishes faster still: with $\varphi = \pi - \theta$ the slope is about $\tau \varphi^{\tau - 2} /
# \pi^\tau$. It goes to 0 from three bits on, to $2 / \pi^2$ with two, and only with one bit to
# infinity.

# %%
nearly_opposite = -np.cos(1e-3)
assert slope(nearly_opposite, 1) > 300
assert np.isclose(slope(nearly_opposite, 2), 2 / np.pi**2, rtol=1e-3)
assert slope(nearly_opposite, 3) < 1e-3

# %% [markdown]
# ## It is a cusp
#
# Infinite by $x$ does not mean infinite for the network. Queries and keys have unit length, so a
# query can only *turn*, and $x$ hardly moves when a query turns that already points at the key. By
# the angle, the slope is
#
# $$\frac{dE}{d\theta} = -\frac{\tau}{\pi} \left(1 - \frac{\theta}{\pi}\right)^{\tau - 1},$$
#
# never steeper than $\tau / \pi$. What remains of the infinity is a *cusp*: turn the query through
# the key, and the slope jumps from $+\tau/\pi$ to $-\tau/\pi$. At the tip there is no derivative at
# all.

# %%
turn = np.pi / 400 * np.arange(-200, 201)  # the angle from key to query, with a sign
at = np.abs(turn)
exact_pull = -np.sign(turn) * tau / np.pi * (1 - at / np.pi) ** (tau - 1)
bounded_pull = -np.sin(turn) * expected_weight(at, tau) * tau / 2

figure, (left, right) = draw.picture(2, width=8.2, height=3.2)
degrees = np.degrees(turn)
left.plot(degrees, expected_weight(at, tau), color=draw.BLUE, linewidth=2)
left.set(title="The weight, by angle", xlabel="angle from key to query (degrees)", ylabel="weight E")
exact_drawn = np.where(turn == 0, np.nan, exact_pull)
right.plot(degrees, exact_drawn, color=draw.VERMILION, linewidth=2, linestyle=draw.DASHES, label="derivative")
right.plot(degrees, bounded_pull, color=draw.BLUE, linewidth=2, label="lower bound")
right.set(title="Its slope", xlabel="angle from key to query (degrees)", ylabel="slope by angle", ylim=(-3, 3.9))
right.legend(loc="upper right", ncols=2)
for panel in (left, right):
    panel.set_xticks(range(-90, 91, 45))
    panel.grid(True)

measured = np.gradient(expected_weight(at, tau), turn)
assert np.allclose(exact_pull[abs(turn) > 0.02], measured[abs(turn) > 0.02], atol=2e-3)
assert np.isclose(np.abs(exact_pull).max(), tau / np.pi, rtol=0.02)
assert np.abs(bounded_pull).max() < 1
assert bounded_pull[turn == 0] == 0
figure

# %% [markdown]
# A computer that follows the chain rule literally multiplies an infinite factor by a turn of length
# zero. Ask PyTorch:

# %%
same = torch.tensor([2.0, 0.0], requires_grad=True)
((1 - torch.arccos(same / same.norm() @ torch.tensor([1.0, 0.0])) / torch.pi) ** tau).backward()
print("gradient of a query that points at its key:", same.grad.tolist())
assert same.grad.isnan().any()

# %% [markdown]
# One such pair, and the whole network is NaN. The library's `gradient_factor(..., "exact")` keeps
# both factors of the denominator at $10^{-3}$ or more: finite everywhere, and the derivative
# everywhere but within a thousandth of a radian of the ends.

# %%
one_key = np.array([[1.0, 0.0]])
for pointing in (one_key, -one_key):
    for grad in ("exact", "lower_bound"):
        finite = yoso_core.expectation_attention_backward(np.ones((1, 1)), pointing, one_key, np.ones((1, 1)), tau, grad=grad)
        assert all(np.isfinite(gradient).all() for gradient in finite)

# %% [markdown]
# ## The lower bound
#
# The paper (section 3.3) does not train with $w$. It replaces $w$ by the constant
#
# $$w = \frac{\tau}{2},$$
#
# which is a *lower bound*: $(\pi - \theta) \sin\theta$ stays below 1.83, so $\tau / ((\pi - \theta)
# \sin\theta)$ is always more than $\tau / 2$. For one pair it has the right sign and a length that
# is too short, by the ratio $(\pi - \theta) \sin\theta / 2$. It is the blue curve in the picture
# above: no jump, nothing infinite. A query that points at its key is left in peace.

# %%
theta = np.linspace(0.01, np.pi - 0.01, 2000)
exact_factor, bound = gradient_factor(theta, tau, "exact"), gradient_factor(theta, tau, "lower_bound")
ratio = bound / exact_factor
best = theta[ratio.argmax()]

figure, (left, right) = draw.picture(2, width=8.2, height=3.2)
left.plot(np.degrees(theta), exact_factor, color=draw.VERMILION, linewidth=2, linestyle=draw.DASHES, label="derivative")
left.plot(np.degrees(theta), bound, color=draw.BLUE, linewidth=2, label="lower bound $\\tau / 2$")
left.set(title="The factor w", xlabel="angle (degrees)", ylabel="w", yscale="log", ylim=(1, 1000))
left.legend(loc="upper center")
right.plot(np.degrees(theta), ratio, color=draw.BLUE, linewidth=2)
right.plot(np.degrees(best), ratio.max(), "D", color=draw.ORANGE, markeredgecolor=draw.INK, markersize=8)
right.text(np.degrees(best) + 7, ratio.max(), f"{ratio.max():.2f} at {np.degrees(best):.0f}°", va="center")
right.set(title="Lower bound over derivative", xlabel="angle (degrees)", ylabel="ratio", ylim=(0, 1.05))
for panel in (left, right):
    panel.set_xticks(range(0, 181, 45))
    panel.grid(True)

assert np.all(bound < exact_factor)
assert np.allclose(ratio, (np.pi - theta) * np.sin(theta) / 2)
assert np.isclose(ratio.max(), 0.910, atol=1e-3)
assert ((np.pi - theta) * np.sin(theta)).max() < 1.83
assert ratio[theta < np.radians(6)].max() < 0.17, "at less than 6 degrees, not a sixth of it is left"
figure

# %% [markdown]
# ## The gradients of attention
#
# Now the whole thing. The output of query $i$ is $\sum_j E_{ij} v_j$. Let $g_i$ be the gradient of
# the loss by that output, which comes in from above. Turning $q_i$ toward $k_j$ raises $E_{ij}$ by
# $E_{ij} w_{ij}$, and that raises the loss by $g_i \cdot v_j$ for each unit. So
#
# $$dq_i = \sum_j E_{ij} w_{ij} (g_i \cdot v_j)\, k_j, \qquad dk_j
# = \sum_i E_{ij} w_{ij} (g_i \cdot v_j)\, q_i, \qquad
# dv_j = \sum_i E_{ij}\, g_i.$$
#
# The queries of a network do not come with unit length; they are scaled to it first. A query can
# turn but not grow, so that step takes away from $dq_i$ the part along $q_i$. Written down for a
# handful of vectors, with `exact` or `lower_bound` in place of $w$:

# %%
n_q, n_k, d, d_v = 5, 7, 4, 3
key = rng.standard_normal((n_k, d))
query = 3 * (key[:n_q] + 0.5 * rng.standard_normal((n_q, d)))  # near their keys, and of any length
value, grad_out = rng.standard_normal((n_k, d_v)), rng.standard_normal((n_q, d_v))


def gradients_by_hand(weights, factor, query, key):
    """The three sums, from all weights ``C`` and factors ``w`` of the pairs, and back through
    the normalization.
    """
    q, k = l2_normalize(query), l2_normalize(key)
    grad_cosine = weights * factor * (grad_out @ value.T)
    return l2_normalize_backward(grad_cosine @ k, query), l2_normalize_backward(grad_cosine.T @ q, key), weights.T @ grad_out


theta = np.stack([angles(q, l2_normalize(key)) for q in l2_normalize(query)])
assert np.abs(np.cos(theta)).max() < 0.99, "no pair is at the cusp"

for grad in ("exact", "lower_bound"):
    by_hand = gradients_by_hand(expected_weight(theta, tau), gradient_factor(theta, tau, grad), query, key)
    by_library = yoso_core.expectation_attention_backward(grad_out, query, key, value, tau, grad=grad)
    for mine, theirs in zip(by_hand, by_library, strict=True):
        assert np.allclose(mine, theirs)
    assert np.allclose((by_hand[0] * query).sum(axis=1), 0), "no query is told to grow"

# %% [markdown]
# And is it the gradient? Ask the expectation itself: move one number of one query up and down by a
# millionth, and see what the loss does.


# %%
def loss(query, key, value):
    return np.sum(grad_out * yoso_core.expectation_attention(query, key, value, tau))


def by_finite_differences(arrays, step=1e-6):
    found = []
    for which, array in enumerate(arrays):
        gradient = np.empty_like(array)
        for place in np.ndindex(*array.shape):
            ends = []
            for sign in (1, -1):
                moved = [x.copy() for x in arrays]
                moved[which][place] += sign * step
                ends.append(loss(*moved))
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(gradient)
    return found


measured = by_finite_differences([query, key, value])
exact = yoso_core.expectation_attention_backward(grad_out, query, key, value, tau, grad="exact")
lower = yoso_core.expectation_attention_backward(grad_out, query, key, value, tau, grad="lower_bound")
for found, right_one in zip(exact, measured, strict=True):
    assert np.allclose(found, right_one, rtol=1e-5, atol=1e-8)
assert not np.allclose(lower[0], measured[0], rtol=0.1)
assert not np.allclose(lower[1], measured[1], rtol=0.1)
assert np.array_equal(lower[2], exact[2]), "the gradient of the values needs no factor"

figure, axes = draw.picture(3, width=8.6, height=3.2)
for place, (panel, name) in enumerate(zip(axes, ("query", "key", "value"), strict=True)):
    ends = np.array([-1, 1]) * np.abs(measured[place]).max()
    panel.plot(ends, ends, color=draw.INK, linewidth=1, linestyle=draw.DASHES, label="equal")
    panel.plot(measured[place].ravel(), exact[place].ravel(), "o", color=draw.ORANGE, markeredgecolor=draw.INK, markersize=6, label="exact")
    panel.plot(measured[place].ravel(), lower[place].ravel(), "D", color=draw.BLUE, markersize=4, label="lower bound")
    panel.set(title=name, xlabel="by finite differences")
    panel.grid(True)
axes[0].set_ylabel("entry of the gradient")
axes[0].legend(loc="upper left")
figure

# %% [markdown]
# ### How far off is the lower bound in a sum?
#
# For one pair it is a matter of length. In a sum over many keys, near pairs are shortened more than
# far ones, which can turn the sum as well. We let 64 queries stand at a given angle from the key
# that they belong to, and compare the two gradients: their directions by the cosine between them,
# and their lengths.

# %%
apart = np.array([5, 15, 30, 45, 60, 75])
alike, length = [], []
keys = l2_normalize(rng.standard_normal((64, 32)))
values, incoming = rng.standard_normal((64, 32)), rng.standard_normal((64, 32))
sideways = rng.standard_normal((64, 32))
sideways = l2_normalize(sideways - (sideways * keys).sum(axis=1, keepdims=True) * keys)
for angle in np.radians(apart):
    queries = np.cos(angle) * keys + np.sin(angle) * sideways
    both = [
        yoso_core.expectation_attention_backward(incoming, queries, keys, values, tau, grad=grad)[0] for grad in ("lower_bound", "exact")
    ]
    norms = [np.linalg.norm(gradient) for gradient in both]
    alike.append(np.sum(both[0] * both[1]) / (norms[0] * norms[1]))
    length.append(norms[0] / norms[1])

figure, axes = draw.picture(width=6.5, height=3.4)
axes.plot(apart, alike, "o-", color=draw.BLUE, label="cosine between the two")
axes.plot(apart, length, "D--", color=draw.ORANGE, markeredgecolor=draw.INK, label="length, lower bound over exact")
axes.set(
    title="The gradient of the queries", xlabel="angle between a query and its key (degrees)", ylabel="ratio", ylim=(0, 1.05), xticks=apart
)
axes.legend(loc="lower right")
axes.grid(True)
print("cosine:", np.round(alike, 2), " length:", np.round(length, 2))

assert np.all(np.diff(length[:4]) > 0), "the nearer, the shorter"
assert length[0] < 0.2
assert min(alike) > 0.8
assert min(alike[1:]) > 0.97
assert max(length) < ratio.max()
figure

# %% [markdown]
# The direction hardly suffers: from 15 degrees on, the cosine is 0.97 or more. The length does: the
# better a query has found its key, the shorter the lower bound, down to a sixth at 5 degrees. It
# moves far pairs nearly as the derivative does, and near ones hardly. It is *not* the derivative of
# the forward pass, though, and no test that compares it with finite differences can ever pass.
#
# ## Weighted cumulation: the shape of every gradient
#
# In sampled attention $E_{ij}$ becomes $C_{ij}$, the share of the $m$ hashes in which the two meet,
# and the constant $w = \tau/2$ can be pulled out of the sums. Look at what remains:
#
# $$dq_i = \frac{\tau}{2} \cdot \frac{1}{m} \sum_h \sum_{j \text{ in the bucket of } i} (g_i \cdot
# v_j)\, k_j .$$
#
# It is the cumulation of tutorial 4, with every term times a dot product of something of the query
# and something of the key: a *weighted cumulation*. All three gradients have this shape.
#
# | gradient | who asks | weight | what is added up |
# |---|---|---|---|
# | $dq_i$ | query $i$ | $g_i \cdot v_j$ | $k_j$ |
# | $dk_j$ | key $j$ | $v_j \cdot g_i$ | $q_i$ |
# | $dv_j$ | key $j$ | 1 | $g_i$ |

# %%
m, tau = 6, 2
planes = yoso_core.sample_planes(m, tau, d, rng=3)
query_code, key_code = (yoso_core.hyperplane_hash(x.astype(np.float32), planes, m, tau) for x in (query, key))
q, k = l2_normalize(query), l2_normalize(key)

dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(value)  # the definition: every query, every key, every hash
for i in range(n_q):
    for j in range(n_k):
        for h in range(m):
            if query_code[i, h] == key_code[j, h]:
                dq[i] += tau / 2 * (grad_out[i] @ value[j]) * k[j] / m
                dk[j] += tau / 2 * (grad_out[i] @ value[j]) * q[i] / m
                dv[j] += grad_out[i] / m

capacity = 2**tau
assert np.allclose(dq, tau / 2 * yoso_core.lsh_weighted_cumulation(query_code, grad_out, key_code, value, k, capacity))
assert np.allclose(dk, tau / 2 * yoso_core.lsh_weighted_cumulation(key_code, value, query_code, grad_out, q, capacity))
assert np.allclose(dv, yoso_core.lsh_cumulation(key_code, query_code, grad_out, capacity)), "keys ask, queries answer"

library = yoso_core.lsh_attention_backward(grad_out, query, key, value, query_code, key_code, tau)
for mine, theirs in zip((l2_normalize_backward(dq, query), l2_normalize_backward(dk, key), dv), library, strict=True):
    assert np.allclose(mine, theirs), "the library does this, and goes back through the normalization"

# %% [markdown]
# In pictures: the share of hashes in which a pair meets, times the dot product. But for the factor
# $\tau/2$ it is the gradient of the loss by the cosine of the pair.

# %%
rate = collision_rate(query_code, key_code)
product = grad_out @ value.T
assert np.allclose(dq, tau / 2 * (rate * product) @ k)
figure, axes = draw.picture(3, width=8.6, height=2.9, sharey=True)
shown = {"$C_{ij}$: share of hashes": rate, "$g_i \\cdot v_j$": product, "$C_{ij}\\, (g_i \\cdot v_j)$": rate * product}
for panel, (title, matrix) in zip(axes, shown.items(), strict=True):
    draw.heat_map(panel, matrix, title=title, numbers=".1f", signed=True, limits=(-1, 1) if matrix is rate else (-4, 4))
    panel.set(xlabel="key j", xticks=range(n_k), yticks=range(n_q))
axes[0].set_ylabel("query i")
figure

# %% [markdown]
# And the exact factor? $w_{ij}$ depends on the angle of the pair, and cannot be split into a part
# of the query and a part of the key. So `grad="exact"` needs every pair, also when sampled: its
# cost is quadratic. This is the second reason for the lower bound, and the better one. If $w_{ij}$
# were a dot product of $r$ numbers of the query and $r$ of the key, its matrix would have rank $r$.
# It has full rank:

# %%
wide = np.stack([angles(one, keys) for one in queries])  # 64 queries and 64 keys, from the section before
assert np.linalg.matrix_rank(gradient_factor(wide, tau, "exact")) == 64
assert np.linalg.matrix_rank(gradient_factor(wide, tau, "lower_bound")) == 1

# %% [markdown]
# ## Right on average
#
# The forward pass is right on average. So is the backward pass: the codes are random, their mean
# collision is $E_{ij}$, and the gradient is linear in them. We draw 1,000 sets of planes, and
# compare the mean of the sampled gradients with the gradient of the expectation. The yardstick is
# the standard error of that mean.

# %%
draws, m, tau = 1000, 4, 3
planes = yoso_core.sample_planes(m, tau, d, batch_shape=(draws,), rng=5)


def many(x):
    return np.broadcast_to(x, (draws, *x.shape)).copy()


def sampled_gradients(planes, grad="lower_bound", bits=tau):
    """One set of gradients for each draw; ``bits`` go into a code, and the factor is that of
    ``tau``.
    """
    codes = [yoso_core.hyperplane_hash(many(x), planes, m, bits) for x in (query, key)]
    return yoso_core.lsh_attention_backward(many(grad_out), many(query), many(key), many(value), *codes, tau, grad=grad)


def deviations(sampled, right):
    """How far the means over the draws are from ``right``, in standard errors."""
    pairs = zip(sampled, right, strict=True)
    return np.concatenate([((x.mean(axis=0) - y) / (x.std(axis=0) / np.sqrt(len(x)))).ravel() for x, y in pairs])


for grad in ("lower_bound", "exact"):
    right_gradients = yoso_core.expectation_attention_backward(grad_out, query, key, value, tau, grad=grad)
    found = deviations(sampled_gradients(planes, grad), right_gradients)
    assert np.abs(found).max() < 5
    assert np.mean(found**2) < 2, f"deviations of {grad} should be about 1"

# %% [markdown]
# Would this test notice a mistake? A test that cannot fail proves nothing, so we give it a biased
# twin, with one bit too few in every code.

# %%
right_gradients = yoso_core.expectation_attention_backward(grad_out, query, key, value, tau)
sampled = sampled_gradients(planes)
biased = sampled_gradients(yoso_core.sample_planes(m, tau - 1, d, batch_shape=(draws,), rng=5), bits=tau - 1)
fair, unfair = deviations(sampled, right_gradients), deviations(biased, right_gradients)
assert np.abs(unfair).max() > 10

figure, (left, right) = draw.picture(2, width=8.2, height=3.2)
edge = 1.5 * np.ceil(np.abs(unfair).max() / 1.5)
bins = np.arange(-edge, edge + 1, 1.5)
left.hist(unfair, bins, color=draw.ORANGE, edgecolor=draw.INK, hatch="///", label="one bit too few")
left.hist(fair, bins, color=draw.BLUE, edgecolor=draw.INK, alpha=0.85, label="sampled gradient")
left.set(title=f"All entries, mean of {draws:,}", xlabel="off the expectation (standard errors)", ylabel="entries")
left.legend(loc="upper left")

counts = np.array([1, 4, 16, 64])
errors = []
for count in counts:
    means = [sampled[0][start : start + count].mean(axis=0) for start in range(0, draws - count + 1, count)]
    errors.append(np.sqrt(np.mean((np.array(means) - right_gradients[0]) ** 2)))
rate_of_fall = draw.error_curve(right, counts, errors)
right.set(title="Gradient of the queries", xlabel="draws in a mean", ylabel="RMS error")
right.legend()
assert abs(rate_of_fall + 0.5) < 0.06
figure

# %% [markdown]
# ## Linear attention inside a bucket
#
# How much does a weighted cumulation cost? Take one bucket with $a$ queries and $b$ keys. Pair by
# pair, each of the $ab$ pairs takes a dot product of length $d_v$ and adds a vector of length $d$.
# If a bucket holds a tenth of the text, that is quadratic again. But a dot product is a matrix
# product of a row and a column, and sums may be done in any order:
#
# $$\sum_j (g_i \cdot v_j)\, k_j = \sum_j k_j \big(v_j^{\top} g_i\big)
# = \Big(\sum_j k_j v_j^{\top}\Big)\, g_i .$$
#
# The matrix in brackets, $d \times d_v$, is the same for every query of the bucket. Build it once,
# then multiply it with each $g_i$. Those who know *linear attention* recognize it: a bucket of
# YOSO's backward pass is linear attention among the vectors in it.


# %%
def bucket_by_pairs(g, v, k):
    """``sum_j (g_i . v_j) k_j`` for every ``i``, and the multiply-adds that it took."""
    out, count = np.zeros((len(g), k.shape[1])), 0
    for i in range(len(g)):
        for j in range(len(k)):
            out[i] += (g[i] @ v[j]) * k[j]
            count += v.shape[1] + k.shape[1]
    return out, count


def bucket_by_outer_products(g, v, k):
    """The same, by the matrix of the bucket."""
    matrix, out, count = np.zeros((k.shape[1], v.shape[1])), np.zeros((len(g), k.shape[1])), 0
    for j in range(len(k)):
        matrix += np.outer(k[j], v[j])
        count += matrix.size
    for i in range(len(g)):
        out[i] = matrix @ g[i]
        count += matrix.size
    return out, count


dim = 16
sizes = np.array([1, 2, 4, 8, 16, 32, 64, 128])
cost = {"pairs": [], "outer products": []}
for size in sizes:
    g, v, k = (rng.standard_normal((size, dim)) for _ in range(3))
    (by_pairs, pairs_count), (by_outer, outer_count) = bucket_by_pairs(g, v, k), bucket_by_outer_products(g, v, k)
    assert np.allclose(by_pairs, by_outer), "the same sums in another order"
    assert pairs_count == size * size * (dim + dim)
    assert outer_count == (size + size) * dim * dim
    cost["pairs"].append(pairs_count)
    cost["outer products"].append(outer_count)

# %% [markdown]
# Counted, not timed: $ab(d + d_v)$ against $(a + b)\, d\, d_v$. With as many queries as keys and $d
# = d_v$ the two are equal at buckets of exactly $d$. Small buckets want pairs, large ones want
# outer products, and *choosing per bucket* gets the better of both.
#
# That choice is what makes training linear. In a text, buckets are skewed: frequent words crowd
# into a few. Below, tokens are drawn as in a text, word number $r$ with a probability like $1/r$,
# and hashed with 6 bits.

# %%
lengths = 2 ** np.arange(8, 16)
dims = 64
words = l2_normalize(rng.standard_normal((5000, dims)))
frequency = 1 / np.arange(1, 5001)
tokens = rng.choice(5000, size=lengths[-1], p=frequency / frequency.sum())
vectors = (words[tokens] + 0.05 * rng.standard_normal((lengths[-1], dims))).astype(np.float32)
codes = yoso_core.hyperplane_hash(vectors, yoso_core.sample_planes(1, 6, dims, rng=0), 1, 6)[:, 0]

total = {"all by pairs": [], "all by outer products": [], "the cheaper in each bucket": []}
for n in lengths:
    count = np.bincount(codes[:n], minlength=64)  # queries are the keys here: a = b
    pairs, outer = count * count * (dims + dims), (count + count) * dims * dims
    for name, one in zip(total, (pairs, outer, np.minimum(pairs, outer)), strict=True):
        total[name].append(one.sum())

figure, (left, right) = draw.picture(2, width=8.4, height=3.5)
for number, (name, counted) in enumerate(cost.items()):
    left.plot(sizes, counted, draw.MARKERS[number] + "-", color=draw.PALETTE[number], markeredgecolor=draw.INK, label=name)
left.axvline(dim, color=draw.INK, linewidth=1, linestyle=draw.DASHES)
left.text(dim * 1.1, 60, f"a = b = d = {dim}")
left.set(title="One bucket", xlabel="queries, and keys, in the bucket", ylabel="multiply-adds", xscale="log", yscale="log")
left.set_xticks(sizes, [str(size) for size in sizes])
left.minorticks_off()
left.legend(loc="upper left")
for number, (name, counted) in enumerate(total.items()):
    line = "--" if number < 2 else "-"
    right.plot(lengths, counted, draw.MARKERS[number] + line, color=draw.PALETTE[number], markeredgecolor=draw.INK, label=name)
right.set(title=f"All buckets of a hash, d = {dims}", xlabel="tokens n", xscale="log", yscale="log", ylim=(1e5, 1e11))
right.set_xticks(lengths, [f"{n:,}" for n in lengths], rotation=45)
right.minorticks_off()
right.legend(loc="upper left")
for panel in (left, right):
    panel.grid(True)

crossing = sizes[np.equal(cost["pairs"], cost["outer products"])]
assert crossing.tolist() == [dim]
assert np.all(np.array(total["the cheaper in each bucket"]) <= 2 * lengths * dims * dims), "a straight line bounds it, however skewed"
growth = {name: np.diff(np.log2(counted))[-1] for name, counted in total.items()}
print("one doubling of n, at the end, multiplies the cost by", {name: round(float(2**power), 1) for name, power in growth.items()})
assert growth["all by pairs"] > 1.8
assert abs(growth["all by outer products"] - 1) < 0.01
assert growth["the cheaper in each bucket"] < 1.3
figure

# %% [markdown]
# The library's backward pass on a CPU does just that, bucket by bucket, for all three gradients at
# once: [`cpu/sampled_gradients.py`](../cpu/sampled_gradients.py). On a GPU it takes outer products
# throughout (`outer_products` in [`weighted.cu`](../gpu/cupy_kernels/weighted.cu)): the orange
# line, which is straight too.
#
# ## Do they train?
#
# A gradient is worth what a network learns from it. So here is a task that *cannot* be learned
# without attention. The model is shown eight pairs of a key and a value, shuffled anew each time,
# and one of the keys again, with another embedding; it has to name that key's value. There are four
# values, so guessing is right one time in four. Whoever ignores the context can do no better.
#
# First, PyTorch gives the gradients that we have come to know:

# %%
tensors = [torch.from_numpy(x).requires_grad_() for x in (query, key, value)]
out = yoso_attention(*tensors, num_hash=m, hash_code_len=tau, planes=torch.from_numpy(planes[0]), normalize_output=False)
out.backward(torch.from_numpy(grad_out))
for tensor, one_draw in zip(tensors, sampled, strict=True):
    assert np.allclose(tensor.grad, one_draw[0]), "loss.backward() is the weighted cumulation"

# %%
KEYS, VALUES = 8, 4


class Retriever(nn.Module):
    """One layer of attention between embeddings and a linear head."""

    def __init__(self, use_context=True, **attention):
        super().__init__()
        self.asked, self.keys, self.values = nn.Embedding(KEYS, 16), nn.Embedding(KEYS, 16), nn.Embedding(VALUES, 16)
        self.head = nn.Linear(16, VALUES)
        self.use_context, self.attention = use_context, attention

    def forward(self, keys, values, asked):
        query, key, value = self.asked(asked)[:, None, None], self.keys(keys)[:, None], self.values(values)[:, None]
        context = yoso_attention(query, key, value, num_hash=16, hash_code_len=4, **self.attention)[:, 0, 0]
        return self.head(context if self.use_context else 0 * context)


def examples(count):
    keys, values = torch.rand(count, KEYS).argsort(-1), torch.randint(VALUES, (count, KEYS))
    each, place = torch.arange(count), torch.randint(KEYS, (count,))
    return (keys, values, keys[each, place]), values[each, place]


def train(steps=150, frozen=False, **options):
    """The loss of every step, and the accuracy on fresh examples afterwards; ``frozen`` leaves
    queries and keys as they were drawn.
    """
    torch.manual_seed(0)
    model, losses = Retriever(**options).double(), []  # float64, as everything here
    model.asked.requires_grad_(not frozen)
    model.keys.requires_grad_(not frozen)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        shown, answer = examples(64)
        optimizer.zero_grad()
        cost = nn.functional.cross_entropy(model(*shown), answer)
        cost.backward()
        optimizer.step()
        losses.append(cost.item())
    with torch.no_grad():
        shown, answer = examples(1000)
        return losses, (model(*shown).argmax(-1) == answer).double().mean().item()


torch.set_num_threads(1)  # the steps are tiny
runs = {
    "no context": train(use_context=False),
    "queries and keys frozen": train(use_expectation=True, frozen=True),
    "expectation, exact": train(use_expectation=True, grad="exact"),
    "expectation, lower bound": train(use_expectation=True),
    "sampled, exact": train(grad="exact"),
    "sampled, lower bound": train(),
}

figure, axes = draw.picture(width=7.6, height=4)
colors = (draw.GRAY, draw.PURPLE, draw.ORANGE, draw.BLUE, draw.YELLOW, draw.GREEN)
for number, (name, (losses, accuracy)) in enumerate(runs.items()):
    smooth = np.convolve(losses, np.ones(10) / 10, "valid")
    broad = 5 if "exact" in name else 1.8  # the pairs lie on each other
    marks = {"marker": draw.MARKERS[number], "markersize": 6, "markeredgecolor": draw.INK, "markevery": (4 * number, 25)}
    axes.plot(smooth, color=colors[number], linewidth=broad, label=f"{name}: {accuracy:.0%} right", **marks)
axes.axhline(np.log(VALUES), color=draw.INK, linewidth=1, linestyle=draw.DASHES)
axes.text(149, np.log(VALUES) + 0.02, "guessing", ha="right", va="bottom", fontsize=9)
axes.set(title="Learning to retrieve", xlabel="step", ylabel="loss, mean of ten steps", ylim=(0, 1.6))
axes.legend(loc="center right", bbox_to_anchor=(1, 0.34))
axes.grid(True)

assert abs(runs["no context"][1] - 1 / VALUES) < 0.07
assert runs["queries and keys frozen"][1] < 0.7
trained = {name: accuracy for name, (_, accuracy) in runs.items() if "exact" in name or "bound" in name}
assert len(trained) == 4
assert min(trained.values()) > 0.95
for kind in ("expectation", "sampled"):
    apart = np.subtract(runs[f"{kind}, exact"][0], runs[f"{kind}, lower bound"][0])
    assert np.abs(np.convolve(apart, np.ones(10) / 10, "valid")).max() < 0.1, "the curves lie on each other"
figure

# %% [markdown]
# Without context the model guesses. With queries and keys as they were drawn it gets about half:
# the values and the head learn, but nobody teaches a query where its key is. That takes the
# gradients of this tutorial, and all four get there. The constant $\tau / 2$ does it as quickly as
# the derivative, the curves lie on each other; sampling is a few steps behind the expectation. So
# the choice is one of cost: `grad="lower_bound"` is linear, and it is the default here as in the
# paper.
#
# ## What to keep
#
# - The derivative of the weight is $E \cdot w$ with $w = \tau / ((\pi - \theta) \sin\theta)$. By
#   the cosine it is infinite for equal vectors; by the angle it is a cusp.
# - The paper trains with $w = \tau / 2$: always shorter, at best 91 % of the derivative, finite
#   everywhere, and no derivative. The gradient of the values is the same for both.
# - Every gradient is a weighted cumulation. Inside a bucket, take pairs or outer products,
#   whichever is cheaper, and the cost stays linear.
#
# Next: [9. The model](09_the_model.ipynb).
#
# ## Exercise 1: another hash
#
# Someone invents a hash whose collision probability is $\exp(-\lambda \theta)$. Write the factor
# $w$ with which its slope by the cosine is *probability times* $w$, for angles strictly between 0
# and $\pi$.


# %% tags=["exercise-1"]
def factor_of_the_new_hash(theta, rate):
    """``w`` with ``d exp(-rate * theta) / d cos(theta) = exp(-rate * theta) * w``."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
for rate1 in (0.5, 3.0):
    x1 = np.linspace(-0.9, 0.9, 37)
    slope1 = (np.exp(-rate1 * np.arccos(x1 + 1e-6)) - np.exp(-rate1 * np.arccos(x1 - 1e-6))) / 2e-6
    got1 = np.exp(-rate1 * np.arccos(x1)) * factor_of_the_new_hash(np.arccos(x1), rate1)
    worst1 = np.abs(got1 / slope1 - 1).argmax()
    assert np.allclose(got1, slope1, rtol=1e-5), (
        f"rate {rate1}, cosine {x1[worst1]:.2f}: the slope is {slope1[worst1]:.4f}, yours {got1[worst1]:.4f}"
    )
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: the gradient of the keys
#
# Compute $dk$ for unit vectors (no normalization) with one call of
# `yoso_core.lsh_weighted_cumulation`, and the lower bound. Its arguments are, in this order: the
# codes and weights of those who ask, the codes and weights of those who answer, what is added up,
# the number of buckets.


# %% tags=["exercise-2"]
def gradient_of_keys(grad_out, q, value, query_code, key_code, hash_code_len):
    """``dk_j = tau / 2 * sum_i C_ij (g_i . v_j) q_i``."""
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
rng2 = np.random.default_rng(2)
g2, q2, v2 = rng2.standard_normal((9, 3)), rng2.standard_normal((9, 5)), rng2.standard_normal((9, 3))
codes2 = [rng2.integers(0, 8, (9, 4), dtype=np.int32) for _ in range(2)]
expected2 = 1.5 * (collision_rate(*codes2) * (g2 @ v2.T)).T @ q2
got2 = gradient_of_keys(g2, q2, v2, *codes2, 3)
assert np.shape(got2) == (9, 5), f"should have the shape (9, 5), has {np.shape(got2)}"
assert np.allclose(got2, expected2), (
    f"off by up to {np.abs(got2 - expected2).max():.3g}; all pairs give, for the first key, {expected2[0].round(2)}"
)
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: the cheaper way
#
# Decide for a bucket whether `bucket_by_pairs` or `bucket_by_outer_products` is cheaper, from the
# sizes alone, and return what that function returns. The numbers of queries and keys may differ,
# and so may $d$ and $d_v$. The checker counts.


# %% tags=["exercise-3"]
def cheaper_bucket(g, v, k):
    """``(sums, multiply-adds)`` by the cheaper of the two ways. ``g (a, d_v)``, ``v (b, d_v)``,
    ``k (b, d)``.
    """
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
rng3 = np.random.default_rng(3)
for a3, b3, d3, dv3 in ((3, 3, 8, 8), (20, 20, 8, 8), (1, 60, 8, 8), (60, 1, 8, 8), (12, 12, 32, 4), (6, 6, 32, 4), (4, 40, 4, 16)):
    g3, v3, k3 = rng3.standard_normal((a3, dv3)), rng3.standard_normal((b3, dv3)), rng3.standard_normal((b3, d3))
    ways3 = [bucket_by_pairs(g3, v3, k3), bucket_by_outer_products(g3, v3, k3)]
    sums3, count3 = cheaper_bucket(g3, v3, k3)
    least3 = min(count for _, count in ways3)
    assert np.allclose(sums3, ways3[0][0]), "the sums are wrong"
    assert count3 == least3, f"{a3} queries, {b3} keys, d = {d3}, d_v = {dv3}: {count3} multiply-adds, {least3} would do"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** By the angle, the slope is $-\lambda \exp(-\lambda\theta)$, and $d\theta /
# d\cos\theta = -1/\sin\theta$. It has the same cusp: no weight that falls from the first degree on
# can do without.


# %% tags=["solution-1"]
def factor_of_the_new_hash(theta, rate):
    return rate / np.sin(theta)


# %% [markdown]
# **Exercise 2.** Keys ask and queries answer, so all pairs of arguments change places.


# %% tags=["solution-2"]
def gradient_of_keys(grad_out, q, value, query_code, key_code, hash_code_len):
    return hash_code_len / 2 * yoso_core.lsh_weighted_cumulation(key_code, value, query_code, grad_out, q, 2**hash_code_len)


# %% [markdown]
# **Exercise 3.** Compare $ab(d + d_v)$ with $(a + b)\, d\, d_v$.


# %% tags=["solution-3"]
def cheaper_bucket(g, v, k):
    a, b, dim, value_dim = len(g), len(k), k.shape[1], v.shape[1]
    way = bucket_by_pairs if a * b * (dim + value_dim) <= (a + b) * dim * value_dim else bucket_by_outer_products
    return way(g, v, k)


# %% tags=["wrong-1"]
def factor_of_the_new_hash(theta, rate):
    return -rate / np.sin(theta)  # the slope by the angle falls, but the cosine falls too


# %% tags=["wrong-1"]
def factor_of_the_new_hash(theta, rate):
    return rate / ((np.pi - theta) * np.sin(theta))  # the factor of YOSO's weight


# %% tags=["wrong-2"]
def gradient_of_keys(grad_out, q, value, query_code, key_code, hash_code_len):
    cumulated = yoso_core.lsh_weighted_cumulation(query_code, grad_out, key_code, value, q, 2**hash_code_len)  # queries ask
    return hash_code_len / 2 * cumulated


# %% tags=["wrong-2"]
def gradient_of_keys(grad_out, q, value, query_code, key_code, hash_code_len):
    return yoso_core.lsh_weighted_cumulation(key_code, value, query_code, grad_out, q, 2**hash_code_len)  # tau / 2 is missing


# %% tags=["wrong-3"]
def cheaper_bucket(g, v, k):
    way = bucket_by_pairs if len(k) <= k.shape[1] else bucket_by_outer_products  # right only for a = b and d = d_v
    return way(g, v, k)


# %% tags=["wrong-3"]
def cheaper_bucket(g, v, k):
    return bucket_by_outer_products(g, v, k)  # linear, but dear for small buckets
