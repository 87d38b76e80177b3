# %% [markdown]
# # 3. The fast Hadamard transform
#
# **You will be able to** turn a vector by a random rotation with additions alone, say why it takes
# three rounds and what they cost, and read where every bit of a hash code comes from.
#
# **Time:** 35 minutes, and 25 for the exercises.
#
# **You need:** NumPy, and tutorial 2.
#
# **Source:** [`yoso_core.reference.hadamard`](../reference/hadamard.py) and
# [`yoso_core.reference.hashing`](../reference/hashing.py); section 3.2 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714), after [Andoni et al.
# 2015](https://arxiv.org/abs/1509.02897).

# %%
import time

import numpy as np
from matplotlib.ticker import LogLocator

import yoso_core
from yoso_core import draw
from yoso_core.reference import expected_weight, hash_layout

draw.use_look()
rng = np.random.default_rng(3)

# %% [markdown]
# Tutorial 2 hashed a vector with $m \tau$ random planes. Each plane is a dot product, so one vector
# of 64 numbers costs $64 \cdot 32 \cdot 8 = 16{,}384$ multiplications when $m = 32$ and $\tau = 8$.
# Here is a way that multiplies by nothing but $+1$ and $-1$.
#
# ## A matrix of signs
#
# Start from the number 1, and double: put four copies side by side, and turn the sign of the last
# one.
#
# $$H_1 = [1], \qquad H_{2D} = \begin{bmatrix} H_D & H_D \\ H_D & -H_D \end{bmatrix}.$$
#
# This is Sylvester's matrix (1867). $H_D x$ is the *Hadamard transform* of $x$, or Walsh-Hadamard
# transform.


# %%
def sylvester(dim):
    """The matrix ``H`` of size ``dim``, a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


figure, axes = draw.picture(3, height=3.2)
for panel, dim in zip(axes, (2, 4, 8), strict=True):
    draw.heat_map(panel, sylvester(dim), title=f"$H_{{{dim}}}$", signed=True, numbers="+.0f" if dim < 8 else None)
    panel.set(xticks=[], yticks=[])
for (k, j), entry in np.ndenumerate(sylvester(8)):
    axes[2].text(j, k, "+" if entry > 0 else "\N{MINUS SIGN}", ha="center", va="center", color="white", fontsize=11)
figure

# %% [markdown]
# Three things make it useful. The entry in row $k$ and column $j$ is $-1$ exactly when $j$ and $k$,
# as binary numbers, have an odd number of ones in common. Any two rows are at right angles. And all
# rows have the same length, $\sqrt{D}$. So $H_D / \sqrt{D}$ keeps every length and every angle, and
# to undo the transform you transform again and divide by $D$.

# %%
D = 64
H = sylvester(D)
assert all(H[k, j] == (-1) ** (j & k).bit_count() for k in range(D) for j in range(D))
assert np.array_equal(H @ H.T, D * np.eye(D))

x = rng.integers(-9, 10, size=D).astype(np.float32)
assert np.array_equal(yoso_core.hadamard_transform(x), H @ x)
assert np.array_equal(yoso_core.hadamard_transform(yoso_core.hadamard_transform(x)) / D, x)

# %% [markdown]
# ## Butterflies
#
# A product with $H_8$ is eight rows of seven additions or subtractions, 56. But look at its upper
# half: $[H_4\ H_4]$. It does the same to the first four numbers as to the last four, and adds. So
# add first, and transform once:
#
# $$H_8 \begin{bmatrix} u \\ l \end{bmatrix}
# = \begin{bmatrix} H_4 (u + l) \\ H_4 (u - l) \end{bmatrix}.$$
#
# One pair of numbers goes in, their sum and their difference come out: a *butterfly*, from the
# shape of its wires. Four butterflies between entries four apart leave two problems of size four.
# Do it again with entries two apart, then one apart, and nothing is left to do.


# %%
def butterflies(x):
    """The Hadamard transform of a list: the numbers before every step, and the result. Largest
    stride first.
    """
    stages, stride = [list(x)], len(x) // 2
    while stride:
        y = stages[-1]
        stages.append([y[i ^ stride] - y[i] if i & stride else y[i] + y[i ^ stride] for i in range(len(y))])
        stride //= 2
    return stages


by_hand = [
    [3, 1, 4, 1, 5, 9, 2, 6],
    [8, 10, 6, 7, -2, -8, 2, -5],  # 3 + 5, 1 + 9, 4 + 2, 1 + 6, then 3 - 5, 1 - 9, 4 - 2, 1 - 6
    [14, 17, 2, 3, 0, -13, -4, -3],  # 8 + 6, 10 + 7, 8 - 6, 10 - 7, and the same below
    [31, -3, 5, -1, -13, 13, -7, -1],  # 14 + 17, 14 - 17, and so on
]
assert butterflies(by_hand[0]) == by_hand
assert np.array_equal(sylvester(8) @ by_hand[0], by_hand[-1])

figure, axes = draw.picture(width=5.8, height=3.5)
draw.butterflies(axes, by_hand, strides=(4, 2, 1))
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2)
figure

# %% [markdown]
# The partner of entry $i$ at stride $s$ is $i$ with one bit turned, `i ^ s` in Python. The sum goes
# to the place without that bit, upper minus lower to the place with it. That is the whole
# algorithm, and a GPU thread finds its partner by the same expression.
#
# ## n log n against n squared
#
# Every step makes $D$ numbers with one addition each, and there are $\log_2 D$ steps. So the
# transform takes $D \log_2 D$ additions, where the matrix product takes $D (D - 1)$. We count them,
# with numbers that count.


# %%
class Counted:
    """A number that counts every addition and every subtraction."""

    additions = 0

    def __init__(self, number):
        self.number = number

    def __add__(self, other):
        Counted.additions += 1
        return Counted(self.number + other.number)

    def __sub__(self, other):
        Counted.additions += 1
        return Counted(self.number - other.number)


def product_with_signs(x):
    """``H x`` row by row, a sum of ``D`` numbers each."""
    result = []
    for row in sylvester(len(x)):
        total = x[0]
        for sign, number in zip(row[1:], x[1:], strict=True):
            total = total + number if sign > 0 else total - number
        result.append(total)
    return result


dims = 2 ** np.arange(2, 9)
counted = {"butterflies": [], "matrix product": []}
for dim in dims.tolist():
    numbers = [Counted(number) for number in rng.integers(-9, 10, size=dim).tolist()]
    results = []
    for name, transform in (("butterflies", lambda x: butterflies(x)[-1]), ("matrix product", product_with_signs)):
        Counted.additions = 0
        results.append([y.number for y in transform(numbers)])
        counted[name].append(Counted.additions)
    assert results[0] == results[1]
assert np.array_equal(counted["butterflies"], dims * np.log2(dims))
assert np.array_equal(counted["matrix product"], dims * (dims - 1))


# %% [markdown]
# And the time? We transform $2^{16}$ numbers, cut into vectors of $D$. The butterflies are
# `yoso_core.hadamard_transform`, which runs on all cores where Numba is installed; the product is
# NumPy's, which is as fast as matrix products get on this machine. Seconds differ from machine to
# machine, so they are drawn and nothing is claimed about them.


# %%
def seconds(call):
    """The shortest of the calls that fit into a tenth of a second, after one that warms up."""
    call()
    taken = []
    while len(taken) < 3 or sum(taken) < 0.1:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


timed_dims = np.array([16, 64, 256])
timed = {"butterflies": [], "matrix product": []}
for dim in timed_dims.tolist():
    vectors = rng.standard_normal((2**16 // dim, dim), dtype=np.float32)
    matrix = sylvester(dim).astype(np.float32)
    timed["butterflies"].append(seconds(lambda vectors=vectors: yoso_core.hadamard_transform(vectors)))
    timed["matrix product"].append(seconds(lambda vectors=vectors, matrix=matrix: vectors @ matrix))

figure, (left, right) = draw.picture(2, height=3.6)
for number, name in enumerate(counted):
    look = {"color": draw.PALETTE[number], "marker": draw.MARKERS[number], "markersize": 6, "linewidth": 1.2, "label": name}
    left.plot(dims, counted[name], **look)
    right.plot(timed_dims, 1e6 * np.array(timed[name]) / (2**16 / timed_dims), **look)
left.set(title="Additions, counted", ylabel="additions for a vector")
right.set(title="Time, on the machine that built this", ylabel="microseconds for a vector")
for panel, shown in ((left, dims[::2]), (right, timed_dims)):
    panel.set(xscale="log", yscale="log", xlabel="dimension D")
    panel.set_xticks(shown, [f"{dim}" for dim in shown])
    panel.minorticks_off()
    panel.grid(True)
    panel.legend()
figure

# %% [markdown]
# On the left the gap opens with the dimension: the product does $(D - 1) / \log_2 D$ times the
# work. On the right, how much of that reaches the clock depends on the machine: a product is what
# processors are built to do, and small matrices stay in their fastest memory.
#
# ## Largest stride first
#
# In exact arithmetic the strides may come in any order. In floating point they may not, if you want
# the same bits, because sums are rounded, and $(a + c) + (b + d)$ need not equal $(a + b) + (c +
# d)$. Here is a vector of four tenths that add up to zero.


# %%
def transform(x, *, largest_first=True):
    """The transform over the last axis, in the dtype of ``x``, with the strides in either order."""
    y, place = x, np.arange(x.shape[-1])
    strides = [1 << step for step in range(len(place).bit_length() - 1)]
    for stride in reversed(strides) if largest_first else strides:
        partner = y[..., place ^ stride]
        y = np.where(place & stride, partner - y, y + partner)
    return y


whole = rng.integers(-9, 10, size=(100, 64)).astype(float)
assert np.array_equal(transform(whole), transform(whole, largest_first=False)), "whole numbers are added up exactly"

four = np.array([0.1, 0.2, 0.4, -0.7], dtype=np.float32)
first, second = transform(four)[0], transform(four, largest_first=False)[0]
assert first == 0
assert second > 0
print(f"largest stride first: {first:g}, smallest first: {second:g}")

# %% [markdown]
# A difference in the eighth digit would not matter, but a hash keeps the *sign* only: 0 gives bit
# 0, and $10^{-8}$ gives bit 1. How often does it happen? Hardly ever with smooth random numbers,
# which seldom come so near zero. But real activations are often rounded, to tenths, to a few
# levels, to half precision, and then many projections are exactly zero, up to rounding.

# %%
smooth = rng.standard_normal((4000, 64)).astype(np.float32)
inputs = {"smooth": smooth, "rounded to tenths": np.round(smooth, 1)}

differ = {}
figure, (left, right) = draw.picture(2, height=3.3)
bins = np.linspace(-8.5, 2, 43)
for number, (name, vectors) in enumerate(inputs.items()):
    one, other = transform(vectors), transform(vectors, largest_first=False)
    assert np.any(one != other), "the rounding differs"
    differ[name] = np.mean((one > 0) != (other > 0))
    height, _ = np.histogram(np.log10(np.maximum(np.abs(one), 1e-8)), bins)
    style = {"color": draw.SKY, "fill": True} if number == 0 else {"color": draw.VERMILION, "linewidth": 1.6}
    left.stairs(height, bins, label=name, **style)
    bar = right.bar(number, 1e6 * differ[name], width=0.6, color=style["color"])
    right.bar_label(bar, fmt="{:,.0f}")
left.set(title="How near zero do they come?", xlabel="size of a transformed number", ylabel="numbers", yscale="log", ylim=(0.7, 1e6))
left.set_xticks([-8, -6, -4, -2, 0, 2], ["0", "$10^{-6}$", "$10^{-4}$", "$10^{-2}$", "1", "100"])
left.legend(loc="upper left")
right.set(title="Bits that depend on the order", ylabel="of a million bits", xlim=(-0.7, 1.7))
right.set_xticks([0, 1], list(inputs))
right.margins(y=0.15)

assert differ["smooth"] < 1e-4
assert differ["rounded to tenths"] > 1e-3
figure

# %% [markdown]
# That is why **the tree of additions is part of the definition**: largest stride first, every
# number a sum of two. Who keeps to it gets the same bits, on any machine, in any language.
# Multiplying by $\pm 1$ rounds nothing, so no other choice is left to an implementation. Ours, a
# few lines of NumPy above, and every one of the library's that runs here agree on each bit.

# %%
for variant in yoso_core.variants("hadamard_transform"):
    if variant.available:
        for vectors in inputs.values():
            assert np.array_equal(yoso_core.hadamard_transform(vectors, variant=variant.name), transform(vectors))
        print(variant.name, "gives the same bits")

# %% [markdown]
# ## From signs to a rotation
#
# The rows of $H$ are $D$ directions at right angles. They could serve as the normals of $D$ planes,
# but they are always the same ones, and a hash must be random. So turn random signs of the vector
# first. Written as a matrix, that is a diagonal $D_1$ of fair $\pm 1$, and $H D_1 x$ is one
# *round*.
#
# One round is not enough. Watch a vector with a single entry, 1 in place 5. Whatever the signs, it
# becomes plus or minus column 5 of $H$: all its projections have the same size, and there are only
# two outcomes. Two rounds more, with fresh signs $D_2$ and $D_3$, and it looks like anything.


# %%
def rounds(x, signs):
    """``H D_r ... H D_1 x`` scaled to keep lengths: ``signs (r, ..., D)`` of +1 and -1, the
    first applied first.
    """
    for diagonal in signs:
        x = transform(x * diagonal) / np.sqrt(x.shape[-1])
    return x


D = 64
one_hot = np.eye(D)[5]
signs = rng.choice([-1.0, 1.0], size=(3, D))
figure, axes = draw.picture(3, height=3.0, sharey=True)
for r, panel in enumerate(axes, 1):
    projection = rounds(one_hot, signs[:r]) * np.sqrt(D)
    colors = [draw.BLUE if number > 0 else draw.ORANGE for number in projection]
    panel.vlines(range(D), 0, projection, colors=colors, linewidth=1.5)
    panel.axhline(0, color=draw.INK, linewidth=0.8)
    panel.set(title=f"after {r} round{'s' if r > 1 else ''}", xlabel="coordinate")
    assert np.isclose(np.sum(projection**2), D)
    assert (len(np.unique(np.round(np.abs(projection), 9))) == 1) == (r == 1)
axes[0].set_ylabel(r"projection, times $\sqrt{D}$")

column = sylvester(D)[:, 5]
assert np.allclose(rounds(one_hot, signs[:1]) * np.sqrt(D), signs[0, 5] * column)
figure

# %% [markdown]
# Each round keeps lengths and angles, since $H / \sqrt{D}$ does and signs do. So do three, and the
# whole is a rotation (or a rotation with a reflection):
#
# $$R = \frac{H D_3\, H D_2\, H D_1}{D^{3/2}}, \qquad R^\top R = I.$$
#
# All angles survive. What changes is how the vectors lie to the coordinate planes, and those are
# our hyperplanes now: the sign of coordinate $c$ of $Rx$ says on which side of the plane with
# normal "row $c$ of $R$" the vector lies.

# %%
D = 16
signs = rng.choice([-1.0, 1.0], size=(3, D))
rotations = {f"{r} round{'s' if r > 1 else ''}": rounds(np.eye(D), signs[:r, None]).T for r in (1, 2, 3)}
for rotation in rotations.values():
    assert np.allclose(rotation.T @ rotation, np.eye(D))

x, y = rng.standard_normal((2, D))
R = rotations["3 rounds"]
matrices = [sylvester(D) @ np.diag(diagonal) for diagonal in signs]
assert np.allclose(R, matrices[2] @ matrices[1] @ matrices[0] / D**1.5)
assert np.isclose((R @ x) @ (R @ y), x @ y)

draw.matrices(rotations, signed=True, x="coordinate of x", y="row: a plane's normal", height=3.3)

# %% [markdown]
# After one round every entry of $R$ is $\pm 1/4$; the rows are corners of a cube. After three they
# look like rows of a Gaussian matrix, the ones that tutorial 2 asked for.
#
# ## Why three?
#
# Looks can deceive. What counts is how often two vectors share a code. Take vectors with a single
# entry, in places $i$ and $j$. They are at right angles, so codes of $\tau = 8$ bits should be
# equal with probability $(1/2)^8 = 0.0039$. Because of the symmetry of $H$ only the places where
# $i$ and $j$ differ in binary matter, the number `i ^ j`. We draw 1,000 rotations with $D = 64$ and
# look at all pairs.

# %%
D, tau, draws = 64, 8, 1000
ideal = expected_weight(np.pi / 2, tau)
places = np.arange(D)
shared = {}
for r in (1, 2, 3):
    signs = rng.choice(np.array([-1, 1], np.float32), size=(r, draws, 1, D))
    bits = rounds(np.eye(D, dtype=np.float32), signs) > 0  # (draws, D vectors, D bits)
    codes = (bits.reshape(draws, D, D // tau, tau) * 2 ** np.arange(tau)).sum(axis=-1)
    shared[r] = np.array([np.mean(codes == codes[:, places ^ difference]) for difference in range(1, D)])

figure, axes = draw.picture(width=8, height=3.6)
floor = 5e-4
for r, size in zip(shared, (5, 5.5, 5), strict=True):
    shown = np.maximum(shared[r], floor)
    label = f"{r} round{'s' if r > 1 else ''}"
    axes.plot(places[1:], shown, draw.MARKERS[r], color=draw.PALETTE[r - 1], markersize=size, label=label, linestyle="")
axes.axhline(ideal, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="Gaussian planes")
axes.set(title="Two vectors of one entry each", xlabel="i ^ j", ylabel="share of equal codes", yscale="log", ylim=(floor / 1.4, 1))
axes.set_yticks([floor, 0.001, 0.01, 0.1, 0.5], ["0", "0.001", "0.01", "0.1", "0.5"])
axes.set_xticks(range(0, D, 8))
axes.minorticks_off()
axes.grid(True)
draw.legend_under_title(axes, columns=4)

whole_codes = places[1:] % tau == 0  # no difference within a code: i ^ j is 8, 16, 24, ...
assert np.all(shared[1][~whole_codes] == 0)
assert np.all(np.abs(shared[1][whole_codes] - 1 / 2) < 5 * 0.5 / np.sqrt(draws))
assert np.all(np.abs(shared[2][: tau - 1] / ideal - 13) < 2)
assert np.all(np.abs(shared[3] - ideal) < 0.005)
assert np.all(shared[3][whole_codes] > 1.3 * ideal)
figure

# %% [markdown]
# - **One round** knows all or nothing. Two columns of $H$ agree on all eight bits of a code, or on
#   none, or on four. So the vectors share a code half of the time, or never.
# - **Two rounds** fool the eye but not the count. When $i$ and $j$ differ in the last three binary
#   places only, the two vectors get *the same numbers in another order*, and share a code 13 times
#   as often as they should.
# - **Three rounds** bring all pairs near the ideal. Not quite onto it: where `i ^ j` is a multiple
#   of 8 a trace is left.
#
# The claim about two rounds is easy to check: the projections of the vector in place $j$ are those
# of place $i$, with coordinate $c$ moved to `c ^ i ^ j`, and perhaps all signs turned.

# %%
signs = rng.choice([-1.0, 1.0], size=(2, D))
first, second = rounds(np.eye(D)[5], signs), rounds(np.eye(D)[6], signs)
assert np.allclose(first, signs[0, 5] * signs[0, 6] * second[places ^ 5 ^ 6])

# %% [markdown]
# ## From projections to codes
#
# One rotation of a vector padded with zeros to $D$ numbers, a power of two, yields $D$ sign bits.
# Each code takes $\tau$ of them, so one rotation makes $\lfloor D / \tau \rfloor$ codes, and what
# is left over stays unused. For more codes take more rotations, each with its own signs. The
# library calls a rotation a *part*. This is how the paper's kernels do it, and `layout="paper"`
# here. The library's default takes its bits elsewhere. That comes at the end, for it mends a fault
# of what comes first.
#
# When a code is longer than a rotation ($\tau > D$), the bits of all parts form one stream, which
# is cut every $\tau$ bits. Both cases, small enough to draw:


# %%
def bit_of(h, b, dim, tau):
    """``(part, coordinate)`` that yields bit ``b`` of code ``h``."""
    per = dim // tau
    if per:
        return h // per, (h % per) * tau + b
    return divmod(h * tau + b, dim)


cases = {"D = 16, m = 7, $\\tau$ = 5": (16, 7, 5), "D = 4, m = 3, $\\tau$ = 6": (4, 3, 6)}
figure, axes = draw.picture(2, width=8.6, height=2.5, width_ratios=(16, 5))
for panel, (title, (dim, m, tau)) in zip(axes, cases.items(), strict=True):
    layout = hash_layout(m, tau, dim)
    owner = np.full((layout.parts, dim), -1)
    for h in range(m):
        for b in range(tau):
            part, coordinate = bit_of(h, b, dim, tau)
            assert owner[part, coordinate] == -1, "no bit is used twice"
            owner[part, coordinate] = h
            panel.text(coordinate, part, f"{h}.{b}", ha="center", va="center", fontsize=9)
    for (part, coordinate), h in np.ndenumerate(owner):
        look = {"facecolor": draw.PALETTE[h], "alpha": 0.35} if h >= 0 else {"facecolor": "white", "hatch": "////"}
        panel.fill_between([coordinate - 0.5, coordinate + 0.5], part - 0.5, part + 0.5, edgecolor=draw.GRAY, linewidth=0.7, **look)
    panel.set(
        title=title,
        xlabel="coordinate of the rotated vector" if dim > 4 else "coordinate",
        ylim=(layout.parts - 0.5, -0.5),
        xlim=(-0.5, dim - 0.5),
    )
    panel.set_xticks(range(dim))
    panel.set_yticks(range(layout.parts), [f"part {part}" for part in range(layout.parts)])
    panel.tick_params(length=0)

assert hash_layout(7, 5, 16).parts == 3
assert hash_layout(7, 5, 16).codes_per_part == 3
assert hash_layout(3, 6, 4).parts == 5
figure

# %% [markdown]
# Written 6.4 is bit 4 of code 6; hatched bits stay unused. Bit $b$ is worth $2^b$, and is 1 where
# the projection is above zero. That is all there is to `yoso_core.fast_hash` in this layout. Our
# own, with the loops in the open, gives the same codes.


# %%
def slow_fast_hash(vectors, signs, m, tau):
    """Codes ``(n, m)`` of vectors ``(n, d)``; signs ``(3, parts, D)``."""
    dim = signs.shape[-1]
    codes = np.zeros((len(vectors), m), np.int32)
    for i, vector in enumerate(vectors):
        padded = np.zeros(dim, vectors.dtype)
        padded[: len(vector)] = vector
        projection = [transform(transform(transform(padded * d1) * d2) * d3) for d1, d2, d3 in signs.swapaxes(0, 1)]
        for h in range(m):
            for b in range(tau):
                part, coordinate = bit_of(h, b, dim, tau)
                codes[i, h] += (projection[part][coordinate] > 0) * 2**b
    return codes


for d, m, tau in ((16, 7, 5), (4, 3, 6), (48, 9, 8)):
    vectors = rng.standard_normal((6, d)).astype(np.float32)
    signs = yoso_core.sample_signs(m, tau, d, layout="paper", rng=0)
    assert np.array_equal(slow_fast_hash(vectors, signs, m, tau), yoso_core.fast_hash(vectors, signs, m, tau, layout="paper"))
print("signs for d = 48, m = 9, tau = 8:", signs.shape, "is 3 diagonals, 2 parts, D = 64")

# %% [markdown]
# The scaling by $1/\sqrt{D}$ is left out, since it changes no sign. And the price, which we came
# for: a part takes three transforms, so a vector takes $3\, \mathrm{parts} \cdot D \log_2 D$
# additions. With 64 dimensions, $m = 32$ and $\tau = 8$ that is 4,608, in place of 16,384
# multiplications and as many additions. On the right, the time of this hash and of planes, again
# drawn and not claimed.


# %%
def additions(dim, m, tau):
    """For one vector of ``dim`` numbers, a power of two."""
    return 3 * hash_layout(m, tau, dim).parts * dim * int(np.log2(dim))


m, tau = 32, 8
assert additions(64, m, tau) == 4608
assert 64 * m * tau == 16_384
assert all(additions(2**k, m, tau) == 3 * m * tau * k for k in range(3, 9)), "up to D = 256"

hash_dims = np.array([16, 32, 64, 128])
work = {"fast_hash": [additions(int(dim), m, tau) for dim in hash_dims], "hyperplane_hash": (hash_dims * m * tau).tolist()}
hash_time = {"fast_hash": [], "hyperplane_hash": []}
for dim in hash_dims.tolist():
    vectors = rng.standard_normal((500, dim), dtype=np.float32)
    signs, planes = yoso_core.sample_signs(m, tau, dim, layout="paper", rng=0), yoso_core.sample_planes(m, tau, dim, rng=0)
    hash_time["fast_hash"].append(seconds(lambda x=vectors, signs=signs: yoso_core.fast_hash(x, signs, m, tau, layout="paper")) / 500)
    hash_time["hyperplane_hash"].append(seconds(lambda x=vectors, planes=planes: yoso_core.hyperplane_hash(x, planes, m, tau)) / 500)

figure, (left, right) = draw.picture(2, height=3.5)
for number, name in enumerate(work):
    look = {"color": draw.PALETTE[number], "marker": draw.MARKERS[number], "markersize": 6, "linewidth": 1.2, "label": name}
    left.plot(hash_dims, work[name], **look)
    right.plot(hash_dims, 1e6 * np.array(hash_time[name]), **look)
left.set(title=f"Work, m = {m}, $\\tau$ = {tau}", ylabel="additions for a vector")
right.set(title="Time, on the machine that built this", ylabel="microseconds for a vector")
for panel in (left, right):
    panel.set(xscale="log", yscale="log", xlabel="dimension d")
    panel.set_xticks(hash_dims, [f"{dim}" for dim in hash_dims])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    panel.minorticks_off()
    panel.grid(True)
    panel.legend()
figure

# %% [markdown]
# Up to $D = m \tau = 256$ the work for a vector grows with $\log D$ alone: twice the dimension is
# half the parts.
#
# ## What it costs: bias
#
# Gaussian planes are independent of each other. The rows of a rotation are not: they stand at right
# angles. In two dimensions, with two bits, this is no small thing. The two planes of a code are
# then always perpendicular, and cut the circle into four quarters, so two vectors more than a right
# angle apart *never* share a code, and nearer ones do with probability $1 - 2\theta/\pi$ when their
# direction is random. The ideal is $(1 - \theta/\pi)^2$.
#
# With more dimensions, $\tau$ rows of many at right angles are hardly different from $\tau$
# independent ones. We measure it: pairs of vectors in random directions, at 15 angles, each draw
# with fresh signs, and Gaussian planes treated the same way. The spread over the draws gives the
# standard error.


# %%
def pairs_at_angles(dim, draws, pairs=4):
    """15 angles, and unit vectors ``(draws, pairs, 16, dim)``: a first one and one at every
    angle from it.
    """
    theta = np.float32(np.pi / 16) * np.arange(1, 16, dtype=np.float32)
    first = rng.standard_normal((draws, pairs, 1, dim), dtype=np.float32)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    other = rng.standard_normal((draws, pairs, 15, dim), dtype=np.float32)
    other -= np.sum(other * first, axis=-1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    return theta, np.concatenate([first, np.cos(theta)[:, None] * first + np.sin(theta)[:, None] * other], axis=2)


def collisions(dim, tau, draws, kind, m=32):
    """Angles, measured probability of equal codes at each, and its standard error."""
    theta, vectors = pairs_at_angles(dim, draws)
    sample, hashes, layout = {
        "Hadamard": (yoso_core.sample_signs, yoso_core.fast_hash, {"layout": "paper"}),
        "Gaussian": (yoso_core.sample_planes, yoso_core.hyperplane_hash, {}),
    }[kind]
    flat = vectors.reshape(draws, -1, dim)
    drawn = sample(m, tau, dim, batch_shape=(draws,), rng=rng, **layout)
    codes = hashes(flat, drawn, m, tau, **layout).reshape(draws, 4, 16, m)
    rate = np.mean(codes[:, :, 1:] == codes[:, :, :1], axis=(1, 3))
    return theta, rate.mean(axis=0), rate.std(axis=0, ddof=1) / np.sqrt(draws)


fine = np.linspace(0, np.pi, 200)
figure, axes = draw.picture(3, height=3.2, sharey=True)
for panel, (dim, tau) in zip(axes, ((2, 2), (8, 4), (64, 8)), strict=True):
    panel.plot(fine, expected_weight(fine, tau), color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=r"$(1 - \theta/\pi)^\tau$")
    for number, kind in enumerate(("Gaussian", "Hadamard")):
        theta, rate, error = collisions(dim, tau, 1000, kind)
        panel.plot(theta, rate, draw.MARKERS[number], color=draw.PALETTE[number], markersize=(7, 5)[number], label=kind)
        if kind == "Gaussian":
            assert np.all(np.abs(rate - expected_weight(theta, tau)) < 5 * error + 1e-4)
        elif dim == 2:
            assert np.all(np.abs(rate - np.maximum(1 - 2 * theta / np.pi, 0)) < 5 * error + 1e-4)
    panel.set(title=f"D = {dim}, $\\tau$ = {tau}", xlabel=r"angle $\theta$, radians")
    panel.set_xticks([0, np.pi / 2, np.pi], ["0", r"$\pi/2$", r"$\pi$"])
    panel.grid(True)
axes[0].set_ylabel("share of equal codes")
axes[-1].legend()
figure

# %% [markdown]
# Now the largest difference over the angles, for more dimensions. It shrinks about as $1/D$, and it
# is visible, many standard errors wide, as long as $D$ is small. From 64 dimensions on it stays
# below 0.01. Under it, what the same measurement says of Gaussian planes, whose bias is zero: that
# is the noise.

# %%
bias_dims, taus, draws = np.array([4, 8, 16, 32, 64, 128]), (2, 4, 8), 1600
figure, axes = draw.picture(width=6.6, height=3.5)
largest = {}
for number, (tau, kind) in enumerate([*((tau, "Hadamard") for tau in taus), (8, "Gaussian")]):
    worst = []
    for dim in bias_dims.tolist():
        theta, rate, error = collisions(dim, tau, draws, kind)
        bias = np.abs(rate - expected_weight(theta, tau))
        at = bias.argmax()
        worst.append(bias[at])
        largest[kind, tau, dim] = bias[at], error[at]
        if kind == "Gaussian":
            assert np.all(bias < 5 * error + 1e-4)
    color = draw.PALETTE[number] if kind == "Hadamard" else draw.INK
    label = f"Hadamard, $\\tau$ = {tau}" if kind == "Hadamard" else "Gaussian planes: noise"
    line = "-" if kind == "Hadamard" else draw.DASHES
    axes.plot(bias_dims, worst, marker=draw.MARKERS[number], color=color, linestyle=line, linewidth=1.2, markersize=7, label=label)
axes.axhline(0.01, color=draw.GRAY, linewidth=1)
axes.set(title="Bias of the collision probability", xlabel="dimension D", ylabel="largest difference", xscale="log", yscale="log")
axes.set_xticks(bias_dims, [f"{dim}" for dim in bias_dims])
axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
axes.minorticks_off()
axes.grid(True)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

for tau in taus:
    for dim in bias_dims.tolist():
        bias, error = largest["Hadamard", tau, dim]
        assert dim > 16 or bias > 5 * error, "small dimensions: beyond doubt"
        assert dim < 64 or bias < 0.01 + 5 * error, "large ones: hardly"
slope = np.polyfit(np.log(bias_dims[1:]), np.log([largest["Hadamard", 8, dim][0] for dim in bias_dims[1:].tolist()]), 1)[0]
assert abs(slope + 1) < 0.3
print("tau = 8:", ", ".join(f"{largest['Hadamard', 8, dim][0]:.3f} at D = {dim}" for dim in bias_dims.tolist()))
figure

# %% [markdown]
# The project's own table, [`yoso bench bias`](../benchmarks/README.md), has 0.042, 0.019, 0.0086,
# 0.0040 and 0.0019 for $\tau = 8$ and $D$ from 8 to 128, from more draws. Ours agree.

# %%
for dim, known in zip((8, 16, 32, 64, 128), (0.0420, 0.0190, 0.0086, 0.0040, 0.0019), strict=True):
    bias, error = largest["Hadamard", 8, dim]
    assert abs(bias - known) < 5 * error + 0.0005

# %% [markdown]
# ## One chain of rotations
#
# 0.004 looks small. But most weights are small themselves: at a right angle and with 8 bits the
# weight is $2^{-8} = 0.0039$. So we divide by it. The rows of a rotation are orthonormal, so the
# products of both vectors' projections add up to $q \cdot k$. At a right angle that is zero: where
# some bits agree, others must differ. Bits of one rotation repel each other, and codes of such bits
# meet too seldom.
#
# Bits of *different* rotations do not. So the library's default, `layout="chained"`, makes one long
# chain
#
# $$y_0 = x, \qquad y_r = H D_r\, y_{r-1},$$
#
# and uses the coordinates of *every* round from the fourth on: each of these is a rotation. $P$
# rotations cost $P + 3$ rounds, where $P$ parts cost $3P$. Put the coordinates of all rotations in
# one row, a stream of $PD$ numbers. With $M = \lfloor PD / \tau \rfloor$, **bit $b$ of code $h$ is
# number $bM + h$ of the stream**. So the bits of one code lie far apart, in different rotations if
# there are $\tau$ of them, and neighbors in the stream belong to neighboring codes. (The library
# multiplies every round by a power of two besides, near $1/\sqrt{D}$. That changes no sign, and
# keeps the numbers of a long chain in range.)


# %%
def slow_chained_hash(vectors, signs, m, tau):
    """Codes ``(n, m)`` of vectors ``(n, d)``; signs ``(P + 3, D)``."""
    codes = np.zeros((len(vectors), m), np.int32)
    for i, vector in enumerate(vectors):
        y, stream = np.zeros(signs.shape[-1], vectors.dtype), []
        y[: len(vector)] = vector
        for r, diagonal in enumerate(signs, 1):
            y = transform(y * diagonal)
            if r > 3:
                stream.extend(y > 0)
        apart = len(stream) // tau
        for h in range(m):
            for b in range(tau):
                codes[i, h] += stream[b * apart + h] * 2**b
    return codes


for d, m, tau in ((16, 7, 5), (4, 3, 6), (48, 9, 8)):
    vectors = rng.standard_normal((6, d)).astype(np.float32)
    signs = yoso_core.sample_signs(m, tau, d, rng=0)
    assert np.array_equal(slow_chained_hash(vectors, signs, m, tau), yoso_core.fast_hash(vectors, signs, m, tau))

assert yoso_core.sample_signs(32, 8, 64).shape == (4 + 3, 64)
assert 7 * 64 * np.log2(64) == 2688, "additions for a vector, where the paper's layout takes 4,608"
dim, m, tau, P = 16, 7, 5, 3
apart = P * dim // tau
owner = {b * apart + h: f"{h}.{b}" for h in range(m) for b in range(tau)}
print(f"D = {dim}, m = {m}, tau = {tau}: {P} rotations, M = {apart}. Code and bit of every coordinate:")
for p in range(P):
    print(f"rotation {p}:", *(owner.get(p * dim + coordinate, "  -") for coordinate in range(dim)))

# %% [markdown]
# Follow code 0: its bits 0 and 1 come from rotation 0, at coordinates 0 and 9, bits 2 and 3 from
# rotation 1, bit 4 from rotation 2. In the layout of the paper all five come from one part.
#
# Now the bias of both layouts, relative to the weight. With 8 rotations each of the 8 bits has one
# of its own. With 4, which is what `sample_signs` takes here, two bits share one: a bias of that is
# left, within what [the documentation](../docs/hashing.md) promises and derives.


# %%
def relative_bias(cosine, layout, rotations=None, dim=64, tau=8, m=32, draws=300, pairs=200):
    """Share of equal codes over its ideal, minus 1, and the standard error over the draws."""
    first, other = rng.standard_normal((2, draws, pairs, dim), dtype=np.float32)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    other -= np.sum(other * first, axis=-1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    signs = yoso_core.sample_signs(m, tau, dim, batch_shape=(draws,), layout=layout, rotations=rotations, rng=rng)
    second = np.float32(cosine) * first + np.float32(np.sqrt(1 - cosine**2)) * other
    codes = [yoso_core.fast_hash(x, signs, m, tau, layout=layout) for x in (first, second)]
    ratio = np.mean(codes[0] == codes[1], axis=(1, 2)) / expected_weight(np.arccos(cosine), tau)
    return ratio.mean() - 1, ratio.std(ddof=1) / np.sqrt(draws)


cosines = np.array([0.0, 0.25, 0.5, 0.75, 0.9])
figure, axes = draw.picture(width=6, height=2.9)
axes.axhline(0, color=draw.GRAY, linewidth=1)
curves = {
    "the paper's layout, 12 rounds": ("paper", None),
    "one chain, 4 rotations, 7 rounds": ("chained", 4),
    "one chain, 8 rotations, 11 rounds": ("chained", 8),
}
for number, (label, (layout, rotations)) in enumerate(curves.items()):
    bias, error = np.array([relative_bias(cosine, layout, rotations) for cosine in cosines]).T
    axes.errorbar(
        cosines,
        100 * bias,
        300 * error,
        marker=draw.MARKERS[number],
        color=draw.PALETTE[number],
        linewidth=1.2,
        markersize=7,
        capsize=4,
        label=label,
    )
    print(f"{label}:", ", ".join(f"{100 * b:+.1f}% at {c:g}" for b, c in zip(bias, cosines, strict=True)))
    if layout == "paper":
        assert bias[0] < -0.1, "at a right angle"
        assert np.all(np.diff(bias[:3]) > 0), "nearer vectors suffer less"
    else:
        bound = np.where(cosines < 0.5, 0.04, 0.015) if rotations == 4 else 0
        assert np.all(np.abs(bias) < bound + 5 * error)
axes.set(
    title="Relative bias of a weight: D = 64, $\\tau$ = 8, m = 32",
    xlabel="cosine of the two vectors",
    ylabel="percent, ± 3 standard errors",
)
axes.grid(True)
axes.legend()
figure

# %% [markdown]
# The paper's layout is what the paper's kernels do, and what checkpoints trained by sampling have
# learned with: for them there is `layout="paper"`, or `config.hash_layout` of a model. The chain is
# the default, since its weights are right and many hashes cost fewer rounds; with 8 hashes or so it
# takes a few rounds more. Gaussian `planes=` are exact, at $D$ multiplications a bit.
#
# ## What to keep
#
# - A butterfly makes a sum and a difference. $\log_2 D$ steps of them are the Hadamard transform,
#   in $D \log_2 D$ additions. Largest stride first, always: then codes are the same bits
#   everywhere.
# - $H D_3 H D_2 H D_1$ is a random rotation. One round leaves sparse vectors bare, two leave them
#   related, three are enough.
# - In the paper's layout one rotation serves $\lfloor D/\tau \rfloor$ codes. Its planes are at
#   right angles, not independent, so their bits repel each other: a share of every weight is
#   missing.
# - Bits of different rotations do not. In a chain, the default, $P$ rotations take $P + 3$ rounds,
#   and bit $b$ of code $h$ is number $bM + h$ of all their coordinates.
#
# Next: [4. Cumulation](04_cumulation.ipynb), where the codes do their work.
#
# ## Exercise 1: the transform in place
#
# A kernel has no room for a second copy. Write the transform so that it works *inside* the list it
# is given, with $D \log_2 D$ additions, largest stride first. The checker hands you numbers that
# count, and then float32 numbers whose bits it looks at.


# %% tags=["exercise-1"]
def transform_in_place(y):
    """Replace the numbers in the list ``y``, whose length is a power of two, by their Hadamard
    transform.
    """
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
for dim in (1, 2, 8, 64):
    numbers = np.random.default_rng(dim).integers(-9, 10, size=dim).tolist()
    y = [Counted(number) for number in numbers]
    Counted.additions = 0
    transform_in_place(y)
    found, wanted = [number.number for number in y], (sylvester(dim) @ numbers).tolist()
    assert found == wanted, f"{dim} numbers: expected {wanted[:8]} ..., got {found[:8]} ..."
    allowed = dim * (dim.bit_length() - 1)
    assert Counted.additions == allowed, f"{dim} numbers take {allowed} additions, you made {Counted.additions}"
vectors = np.round(np.random.default_rng(0).standard_normal((50, 64)), 1).astype(np.float32)
for vector in vectors:
    y = list(vector)
    transform_in_place(y)
    assert np.array_equal(y, transform(vector)), "float32 numbers: right up to rounding, but other bits. In which order are the strides?"
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: turn back
#
# A rotation can be undone. Given `y`, which is $H D_3 H D_2 H D_1 x$ without any scaling, and the
# signs, return $x$. You may call `transform`.


# %% tags=["exercise-2"]
def turn_back(y, signs):
    """``x (D,)`` from ``y (D,)`` and signs ``(3, D)``, the first of which was applied first."""
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
for dim in (4, 64):
    generator = np.random.default_rng(dim)
    x, signs = generator.standard_normal(dim), generator.choice([-1.0, 1.0], size=(3, dim))
    y = transform(transform(transform(x * signs[0]) * signs[1]) * signs[2])
    found = np.asarray(turn_back(y, signs))
    assert found.shape == x.shape, f"{dim} numbers should come back, got shape {found.shape}"
    ratio = np.linalg.norm(found) / np.linalg.norm(x)
    assert np.isclose(ratio, 1), f"D = {dim}: your vector is {ratio:g} times as long as x"
    assert np.allclose(found, x), f"D = {dim}: the length is right, the direction is not; x starts with {x[:3]}, yours with {found[:3]}"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: who needs this bit?
#
# In the paper's layout, a thread on a GPU holds coordinate `coordinate` of part `part`. It must
# know for which code and which bit. Turn `bit_of` around, for both of its cases. Return `None` when
# nobody needs the coordinate.


# %% tags=["exercise-3"]
def wanted_by(part, coordinate, m, dim, tau):
    """``(h, b)``, or ``None``."""
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
for dim, m, tau in ((16, 7, 5), (4, 3, 6), (64, 32, 8), (8, 5, 3), (8, 5, 8), (2, 4, 5)):
    used = {bit_of(h, b, dim, tau): (h, b) for h in range(m) for b in range(tau)}
    for part in range(hash_layout(m, tau, dim).parts):
        for coordinate in range(dim):
            found, wanted = wanted_by(part, coordinate, m, dim, tau), used.get((part, coordinate))
            assert found == wanted, (
                f"D = {dim}, m = {m}, tau = {tau}: part {part}, coordinate {coordinate} is for {wanted}, you say {found}"
            )
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** Each butterfly is done by the upper of its two places. It reads both numbers
# before it writes either.


# %% tags=["solution-1"]
def transform_in_place(y):
    stride = len(y) // 2
    while stride:
        for i in range(len(y)):
            if not i & stride:
                y[i], y[i + stride] = y[i] + y[i + stride], y[i] - y[i + stride]
        stride //= 2


# %% [markdown]
# **Exercise 2.** Undo the last step first. $H$ is its own inverse up to $D$, and a sign is its own
# inverse.


# %% tags=["solution-2"]
def turn_back(y, signs):
    for diagonal in signs[::-1]:
        y = transform(y) / len(y) * diagonal
    return y


# %% [markdown]
# **Exercise 3.** Within a part, a coordinate beyond the last whole code is unused, and so is a code
# number that is too large.


# %% tags=["solution-3"]
def wanted_by(part, coordinate, m, dim, tau):
    per = dim // tau
    if per:
        h, b = part * per + coordinate // tau, coordinate % tau
        unused = coordinate >= per * tau
    else:
        h, b = divmod(part * dim + coordinate, tau)
        unused = False
    return None if unused or h >= m else (h, b)


# %% tags=["wrong-1"]
def transform_in_place(y):
    stride = 1
    while stride < len(y):  # smallest stride first: the same numbers, other bits
        for i in range(len(y)):
            if not i & stride:
                y[i], y[i + stride] = y[i] + y[i + stride], y[i] - y[i + stride]
        stride *= 2


# %% tags=["wrong-1"]
def transform_in_place(y):
    stride = len(y) // 2
    while stride:
        for i in range(len(y)):
            if not i & stride:
                y[i] = y[i] + y[i + stride]
                y[i + stride] = y[i] - y[i + stride]  # the upper number is no longer the old one
        stride //= 2


# %% tags=["wrong-1"]
def transform_in_place(y):
    y[:] = product_with_signs(y)  # right, but with D (D - 1) additions


# %% tags=["wrong-2"]
def turn_back(y, signs):
    for diagonal in signs:  # the diagonals in the order in which they were applied
        y = transform(y) / len(y) * diagonal
    return y


# %% tags=["wrong-2"]
def turn_back(y, signs):
    for diagonal in signs[::-1]:
        y = transform(y) / np.sqrt(len(y)) * diagonal  # right for scaled rounds, these were not
    return y


# %% tags=["wrong-3"]
def wanted_by(part, coordinate, m, dim, tau):
    h, b = divmod(part * dim + coordinate, tau)  # one stream always: a code would straddle two parts
    return (h, b) if h < m else None


# %% tags=["wrong-3"]
def wanted_by(part, coordinate, m, dim, tau):
    per = max(dim // tau, 1)
    return part * per + coordinate // tau, coordinate % tau  # the unused bits at the end of a part and of the last one
