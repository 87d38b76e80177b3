# %% [markdown]
# # 2. Hashing with hyperplanes
#
# **You will be able to** turn vectors into bucket numbers with random planes, and say exactly how
# often two vectors at a given angle share a bucket, and why.
#
# **Time:** 30 minutes, and 20 for the exercises.
#
# **You need:** NumPy, and tutorial 1.
#
# **Source:** [`yoso_core.reference.hashing`](../reference/hashing.py); section 3.1 of [Zeng et al.
# 2021](https://arxiv.org/abs/2111.09714), after Charikar 2002, "Similarity estimation techniques
# from rounding algorithms".

# %%
from math import comb

import numpy as np

import yoso_core
from yoso_core import draw

draw.use_look()
rng = np.random.default_rng(2)

# %% [markdown]
# Tutorial 1 ended with a debt. It needed coins that show 1 with probability $(1 -
# \theta/\pi)^\tau$, where $\theta$ is the angle between a query and a key, and it took them from a
# function called `hyperplane_hash`. Now we build that function, one bit at a time.
#
# ## One plane, one bit
#
# A plane through the origin cuts space in two halves. Name the plane by its normal, a vector $w$ at
# right angles to it. Which half does $x$ lie in? Look at the sign of $w \cdot x$:
#
# $$\mathrm{bit}(x) = [\,w \cdot x > 0\,].$$
#
# In two dimensions a "plane" is a line. Here are two lines and the same two vectors: one line keeps
# $q$ and $k$ together, one parts them.


# %%
def at_angle(*theta):
    """Unit vectors in two dimensions at the given angles, one to a row."""
    return np.stack([np.cos(theta), np.sin(theta)], axis=-1)


q, k = at_angle(0.3, 1.2)
together, parting = at_angle(0.5, 2.2)
figure, axes = draw.picture(2, height=3.9)
for panel, w, title in zip(axes, (together, parting), ("Same side", "Parted"), strict=True):
    draw.bucket_circle(panel, w[:, None], points=np.stack([q, k]), names=["q", "k"])
    panel.set_title(title)

assert (w @ q > 0) != (w @ k > 0)
assert (together @ q > 0) == (together @ k > 0)
figure

# %% [markdown]
# ## How often does a random line part two vectors?
#
# Let the line turn to a random direction, all directions alike. It parts $q$ and $k$ exactly when
# it falls *between* them, into the angle $\theta$ that they span, or into the same angle on the
# other side (a line has two ends). A line can turn by $\pi$ before it is itself again, and $\theta$
# of that is bad:
#
# $$\Pr[\text{parted}] = \frac{\theta}{\pi}, \qquad \Pr[\text{same bit}] = 1 - \frac{\theta}{\pi}.$$
#
# Below are 60 random lines, and then the count for many angles. Each dot is the share of 4,000
# random lines that keep two vectors together.

# %%
figure, (left, right) = draw.picture(2, height=3.7)
for turn in rng.uniform(0, np.pi, size=60):
    along = at_angle(turn)[0]
    parts = (along[0] * q[1] > along[1] * q[0]) != (along[0] * k[1] > along[1] * k[0])  # which side of the line is each on?
    ends = np.stack([-along, along])
    left.plot(*ends.T, color=draw.VERMILION if parts else draw.GRAY, linewidth=1.4 if parts else 0.8, linestyle="--" if parts else "-")
for name, vector in (("q", q), ("k", k)):
    left.annotate("", vector, (0, 0), arrowprops={"arrowstyle": "-|>", "color": draw.INK, "linewidth": 2, "shrinkA": 0, "shrinkB": 0})
    left.text(*(1.12 * vector), name, ha="center", va="center", fontweight="bold")
left.set(aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.2, 1.2), title="Dashed: the lines that part q and k")
left.axis("off")

count = 4000
theta = np.linspace(0, np.pi, 25)
normals = at_angle(*rng.uniform(0, 2 * np.pi, size=count))
first = normals @ at_angle(0.7)[0] > 0
kept = np.array([np.mean(first == (normals @ at_angle(0.7 + angle)[0] > 0)) for angle in theta])
right.plot(theta, 1 - theta / np.pi, color=draw.INK, linestyle=draw.DASHES, label=r"$1 - \theta / \pi$")
right.plot(theta, kept, "o", color=draw.BLUE, label="measured")
right.set(title="Share that keeps both on one side", xlabel=r"angle $\theta$, radians", ylabel="share of lines")
right.set_xticks([0, np.pi / 2, np.pi], ["0", r"$\pi/2$", r"$\pi$"])
right.grid(True)
right.legend()

p = 1 - theta / np.pi
assert np.all(np.abs(kept - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1e-12)
figure

# %% [markdown]
# ## In any dimension: Gaussian normals
#
# Real queries have 64 numbers, not two. Still only one flat sheet matters: the one that $q$ and $k$
# span. A plane in 64 dimensions meets that sheet in a line, and the line parts $q$ and $k$ or does
# not. So all we need is that *this line* has a random direction, all alike, whatever sheet we
# happen to look at.
#
# Draw every entry of $w$ from a normal distribution, and that is so. The density of such a vector
# depends on its length alone,
#
# $$\prod_c e^{-w_c^2/2} = e^{-|w|^2/2},$$
#
# so no direction is preferred, in the whole space or in any sheet of it. Other distributions do
# prefer some. Entries that are uniform in $[-1, 1]$ fill a square, and a square has corners:

# %%
count = 40_000
gaussian = rng.standard_normal((count, 2))
uniform = rng.uniform(-1, 1, size=(count, 2))

figure, axes = draw.picture(2, sharey=True)
bins = np.linspace(-np.pi, np.pi, 49)
heights = {}
for panel, (name, drawn) in zip(axes, {"Gaussian entries": gaussian, "Uniform entries": uniform}.items(), strict=True):
    direction = np.arctan2(drawn[:, 1], drawn[:, 0])
    heights[name], *_ = panel.hist(direction, bins=bins, color=draw.SKY, edgecolor="white", linewidth=0.5)
    panel.axhline(count / 48, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label="all directions alike")
    panel.set(title=name, xlabel="direction of the normal, radians", ylim=(0, 1500))
    panel.set_xticks([-np.pi, -np.pi / 2, 0, np.pi / 2, np.pi], [r"$-\pi$", r"$-\pi/2$", "0", r"$\pi/2$", r"$\pi$"])
axes[0].set_ylabel(f"normals, of {count:,}")
axes[0].legend()

deviation = np.sqrt(count / 48)
assert np.all(np.abs(heights["Gaussian entries"] - count / 48) < 5 * deviation)
assert np.any(np.abs(heights["Uniform entries"] - count / 48) > 5 * deviation)
figure

# %% [markdown]
# Now pairs in 2, 16 and 64 dimensions at the same angles, with Gaussian normals. The dimension
# plays no part.


# %%
def pair_at_angle(dim, theta):
    """Two random unit vectors with exactly this angle between them: ``(2, dim)``."""
    basis, _ = np.linalg.qr(rng.standard_normal((dim, 2)))  # an orthonormal basis of a random sheet
    return np.stack([basis[:, 0], np.cos(theta) * basis[:, 0] + np.sin(theta) * basis[:, 1]])


count = 4000
theta = np.linspace(0.1, 3.0, 12)
figure, axes = draw.picture()
axes.plot(theta, 1 - theta / np.pi, color=draw.INK, linestyle=draw.DASHES, label=r"$1 - \theta / \pi$")
for number, dim in enumerate((2, 16, 64)):
    planes = rng.standard_normal((dim, count))
    pairs = [pair_at_angle(dim, angle) for angle in theta]
    assert np.allclose([first @ second for first, second in pairs], np.cos(theta))
    kept = np.array([np.mean((first @ planes > 0) == (second @ planes > 0)) for first, second in pairs])
    p = 1 - theta / np.pi
    assert np.all(np.abs(kept - p) < 5 * np.sqrt(p * (1 - p) / count))
    axes.plot(theta, kept, draw.MARKERS[number], color=draw.PALETTE[number], label=f"{dim} dimensions", markersize=7 - number)
axes.set(title="Two vectors agree on one bit", xlabel=r"angle $\theta$, radians", ylabel=f"share of {count:,} planes")
axes.grid(True)
axes.legend()
figure

# %% [markdown]
# ## From bits to a code
#
# One bit makes two buckets, and in each you find half of the text. To be pickier, take $\tau$
# planes and ask that *all* bits agree. The planes are independent, so probabilities multiply, and
# there is the weight of tutorial 1:
#
# $$\Pr[\text{all } \tau \text{ bits agree}] = \left(1 - \frac{\theta}{\pi}\right)^{\tau}.$$
#
# The bits, read as a binary number, are the *hash code*: bit $b$ is worth $2^b$. Two vectors agree
# on all bits exactly when their codes are equal numbers, and numbers are good names for buckets.


# %%
def hash_code(x, planes):
    """Codes ``(n,)`` of vectors ``(n, d)`` under planes ``(d, tau)``."""
    bits = x @ planes > 0
    return (bits * 2 ** np.arange(planes.shape[1])).sum(axis=-1)


planes = rng.standard_normal((2, 3))
names = ["a", "b", "c", "d"]
points = at_angle(0.2, 0.5, 2.1, 4.0)
codes = hash_code(points, planes)
for name, bits, code in zip(names, points @ planes > 0, codes, strict=True):
    print(f"{name}: bits 0, 1, 2 are {bits.astype(int)}, so the code is {code}, in binary {code:03b}")

figure, axes = draw.picture(width=4.6, height=4.2)
draw.bucket_circle(axes, planes, points=points, names=names)
axes.set_title("Three planes")

around = hash_code(at_angle(*np.linspace(0, 2 * np.pi, 3600)), planes)
steps = np.diff(around)
assert all(abs(step) in (1, 2, 4) for step in steps[steps != 0]), "from sector to sector one bit changes"
assert np.count_nonzero(steps) + (around[0] != around[-1]) == 6
assert np.array_equal(codes, yoso_core.hyperplane_hash(points, planes, num_hash=1, hash_code_len=3)[:, 0])
figure

# %% [markdown]
# The library's function gives the same codes. In the picture every sector has its code, written in
# binary, the last bit first as always. From one of the six sectors to the next a single line is
# crossed, so a single bit changes.
#
# And the count, for several $\tau$ in 16 dimensions. More bits, and only near vectors meet.

# %%
count = 4000
theta = np.linspace(0.02, 3.1, 14)
fine = np.linspace(0, np.pi, 200)
pairs = [pair_at_angle(16, angle) for angle in theta]
figure, axes = draw.picture(width=6.5, height=3.5)
for number, tau in enumerate((1, 2, 4, 8)):
    planes = yoso_core.sample_planes(count, tau, 16, rng=tau)  # for `count` hashes of tau bits
    met = [np.mean(np.equal(*yoso_core.hyperplane_hash(pair, planes, count, tau))) for pair in pairs]
    p = (1 - theta / np.pi) ** tau
    assert np.all(np.abs(met - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1 / count)
    color = draw.PALETTE[number]
    axes.plot(fine, (1 - fine / np.pi) ** tau, color=color, linewidth=1.5)
    axes.plot(theta, met, draw.MARKERS[number], color=color, markersize=6, label=rf"$\tau$ = {tau}")
axes.set(title="Two vectors share a bucket", xlabel=r"angle $\theta$, radians", ylabel="share of 4,000 hashes")
axes.set_xticks([0, np.pi / 4, np.pi / 2, 3 * np.pi / 4, np.pi], ["0", r"$\pi/4$", r"$\pi/2$", r"$3\pi/4$", r"$\pi$"])
axes.grid(True)
axes.legend(title="dots measured,\nlines expected")
figure

# %% [markdown]
# Independent planes are essential. With *one* plane used for all $\tau$ bits the code has $\tau$
# equal bits, and two vectors meet with probability $1 - \theta/\pi$, whatever $\tau$ says. Bits
# must not know of each other. Keep that in mind for tutorial 3, where we save work on exactly this
# point.
#
# ## One hash is coarse, many are fine
#
# A bucket has hard walls. Two vectors that almost touch may stand on two sides of one, and then
# this hash gives them nothing in common. That is why YOSO takes $m$ hashes and averages: here are
# three for the same six points. Watch a and b, 0.2 radians apart.

# %%
points = at_angle(1.3, 1.5, 1.9, 3.4, 4.9, 6.0)
tau, m = 3, 3
planes = yoso_core.sample_planes(m, tau, 2, rng=239)
codes = yoso_core.hyperplane_hash(points, planes, m, tau)
assert codes.shape == (6, m)
figure, axes = draw.picture(m, height=3.3)
for h, panel in enumerate(axes):
    draw.bucket_circle(panel, planes[:, h * tau : (h + 1) * tau], points=points, names="abcdef")
    panel.set_title(f"hash {h}")
    assert np.array_equal(hash_code(points, planes[:, h * tau : (h + 1) * tau]), codes[:, h])
assert (codes[0] == codes[1]).tolist() == [True, True, False], "a and b share a bucket in two hashes of three"
print("codes, a row to a point:\n", codes)
figure

# %% [markdown]
# The layout is part of the definition: bit $b$ of hash $h$ uses column $h\tau + b$ of the planes.
# That is what the slice above says, and every variant of the library follows it.
#
# In three dimensions the planes cut a sphere into patches, like a badly peeled orange. This is the
# front of one, with 60 points on it.

# %%
points = rng.standard_normal((60, 3))
figure, axes = draw.picture(2, height=4)
for panel, tau, seed in zip(axes, (2, 4), (190, 108), strict=True):
    draw.bucket_sphere(panel, yoso_core.sample_planes(1, tau, 3, rng=seed), points=points)
    panel.set_title(rf"$\tau$ = {tau}")
figure

# %% [markdown]
# ## How many buckets are there?
#
# $\tau$ bits can name $2^\tau$ buckets, but few dimensions do not have room for all. In two
# dimensions $\tau$ lines through the center make $2\tau$ sectors, and that is that. In $d$
# dimensions, planes in general position make
#
# $$2 \sum_{i=0}^{d-1} \binom{\tau - 1}{i}$$
#
# regions (Schläfli; see Cover 1965). From $d = \tau$ on that is all $2^\tau$. We count them by
# hashing many random points. (A thin sliver of a region could hide from random points. With these
# planes none does.)

# %%
tau = 5
found, expected = [], []
for dim in range(1, 8):
    planes = yoso_core.sample_planes(1, tau, dim, rng=10 + dim)
    found.append(len(np.unique(yoso_core.hyperplane_hash(rng.standard_normal((200_000, dim)), planes, 1, tau))))
    expected.append(2 * sum(comb(tau - 1, i) for i in range(dim)))
assert found == expected
assert expected[tau - 1] == 2**tau
print("dimensions:", *range(1, 8), "\nbuckets:   ", *found)

# %% [markdown]
# So in 64 dimensions every code can occur. Do they occur equally often? For vectors that point
# everywhere alike, each bucket waits for the share $2^{-\tau}$ of them, on the average over planes.
# Real vectors come in groups, and a group falls into few buckets:

# %%
n, dim, tau = 4096, 64, 6
spread = rng.standard_normal((n, dim))
centers = rng.standard_normal((10, dim))
grouped = centers[rng.integers(10, size=n)] + 0.3 * rng.standard_normal((n, dim))
planes = yoso_core.sample_planes(1, tau, dim, rng=0)

figure, axes = draw.picture(2, sharey=True)
largest = {}
for panel, (title, vectors) in zip(axes, {"Directions alike": spread, "Ten groups": grouped}.items(), strict=True):
    codes = yoso_core.hyperplane_hash(vectors, planes, 1, tau)[:, 0]
    size = np.bincount(codes, minlength=2**tau)
    assert size.sum() == n
    largest[title] = size.max()
    panel.bar(range(2**tau), size, color=draw.BLUE, width=1, edgecolor="white", linewidth=0.3)
    panel.axhline(n / 2**tau, color=draw.INK, linestyle=draw.DASHES, linewidth=1, label=f"even: {n // 2**tau}")
    panel.set(title=title, xlabel="hash code")
axes[0].set_ylabel(f"vectors, of {n:,}")
axes[0].legend()

assert largest["Directions alike"] < 3 * n / 2**tau
assert largest["Ten groups"] > 3 * n / 2**tau
figure

# %% [markdown]
# Uneven buckets are not a fault. Vectors of a group *should* meet. But they decide how fast a
# kernel is, and tutorials 4 and 6 come back to it.
#
# ## Three things that follow at once
#
# - **Length does not matter.** A positive factor changes no sign. This is why YOSO speaks of angles
#   only.
# - **Opposites never meet.** All bits of $-x$ are the other ones, so the codes of $x$ and $-x$ add
#   up to $2^\tau - 1$.
# - **A zero vector has code 0**, since $0 > 0$ is false for every plane.

# %%
x = rng.standard_normal((100, 64))
planes = yoso_core.sample_planes(4, 8, 64, rng=3)
codes = yoso_core.hyperplane_hash(x, planes, 4, 8)

assert np.array_equal(yoso_core.hyperplane_hash(1000 * x, planes, 4, 8), codes)
assert np.all(codes + yoso_core.hyperplane_hash(-x, planes, 4, 8) == 2**8 - 1)
assert np.all(yoso_core.hyperplane_hash(np.zeros((1, 64)), planes, 4, 8) == 0)

# %% [markdown]
# ## What to keep
#
# - A random plane keeps two vectors together with probability $1 - \theta/\pi$, in any dimension,
#   if its normal is Gaussian.
# - $\tau$ independent planes give a code of $\tau$ bits; codes are equal with probability $(1 -
#   \theta/\pi)^\tau$. That is YOSO's weight.
# - Hashing a vector costs $d \cdot m \cdot \tau$ multiplications: 16,384 for $d = 64$, $m = 32$,
#   $\tau = 8$. Tutorial 3 does it with additions, and fewer of them.
#
# Next: [3. The fast Hadamard transform](03_fast_hadamard_transform.ipynb).
#
# ## Exercise 1: all codes at once
#
# Write the whole hash for $m$ hashes in NumPy, without calling the library: vectors `(n, d)` and
# planes `(d, m * tau)` in, codes `(n, m)` out. Bit $b$ of hash $h$ is column $h\tau + b$ and is
# worth $2^b$.


# %% tags=["exercise-1"]
def all_codes(vectors, planes, m, tau):
    """Integer codes ``(n, m)``."""
    raise NotImplementedError("exercise 1 is waiting for you")


# %% tags=["check-1"]
x, planes = np.random.default_rng(0).standard_normal((50, 16)), yoso_core.sample_planes(7, 5, 16, rng=0)
wanted = yoso_core.hyperplane_hash(x, planes, 7, 5)
found = np.asarray(all_codes(x, planes, 7, 5))
assert found.shape == (50, 7), f"50 vectors and 7 hashes make codes of shape (50, 7), got {found.shape}"
assert found.min() >= 0, "a code is never negative"
assert found.max() < 2**5, f"5 bits make codes below 32, got {found.max()}"
wrong = np.argwhere(found != wanted)
assert not len(wrong), (
    f"{len(wrong)} of {wanted.size} codes differ, such as vector and hash {wrong[0]}: "
    f"{found[tuple(wrong[0])]}, it should be {wanted[tuple(wrong[0])]}"
)
print("Exercise 1: right.")

# %% [markdown]
# ## Exercise 2: read the angle back
#
# You are given only the codes of two vectors, `(m,)` each, for many hashes of `tau` bits. Estimate
# the angle between the vectors. (Turn the formula of this tutorial around.)


# %% tags=["exercise-2"]
def estimate_angle(first_code, second_code, tau):
    """The angle in radians."""
    raise NotImplementedError("exercise 2 is waiting for you")


# %% tags=["check-2"]
for tau in (1, 4):
    planes = yoso_core.sample_planes(20_000, tau, 16, rng=tau)
    for angle in (0.3, 0.8, 1.5):
        first, second = yoso_core.hyperplane_hash(pair_at_angle(16, angle), planes, 20_000, tau)
        estimate = estimate_angle(first, second, tau)
        assert abs(estimate - angle) < 0.1, f"tau = {tau}: the vectors are at {angle} radians, you say {estimate:.2f}"
print("Exercise 2: right.")

# %% [markdown]
# ## Exercise 3: choose tau
#
# Related tokens are about `near` radians apart, unrelated ones about `far`. How many bits does it
# take, at least, until a related pair meets `times` as often as an unrelated one?


# %% tags=["exercise-3"]
def bits_needed(near, far, times):
    """The smallest tau, an int, with (1 - near/pi)**tau >= times * (1 - far/pi)**tau."""
    raise NotImplementedError("exercise 3 is waiting for you")


# %% tags=["check-3"]
for near, far, times in ((0.5, 1.5, 10), (0.5, 1.5, 1000), (0.2, np.pi / 2, 100), (0.9, 1.2, 2)):
    tau = bits_needed(near, far, times)
    assert tau >= 1, f"tau is at least 1, got {tau}"
    ratio = (np.pi - near) / (np.pi - far)
    assert ratio**tau >= times, f"near {near}, far {far}: with {tau} bits near pairs meet {ratio**tau:.1f} times as often, not {times}"
    assert ratio ** (tau - 1) < times, f"near {near}, far {far}: {tau} bits are more than it takes for {times}"
print("Exercise 3: right.")

# %% [markdown]
# ## Solutions
#
# Folded in a notebook: unfold a cell when you have tried.

# %% [markdown]
# **Exercise 1.** One matrix product for all bits, then the last axis is split into hash and bit.


# %% tags=["solution-1"]
def all_codes(vectors, planes, m, tau):
    bits = (vectors @ planes > 0).reshape(len(vectors), m, tau)
    return bits @ 2 ** np.arange(tau)


# %% [markdown]
# **Exercise 2.** The share of equal codes estimates $(1 - \theta/\pi)^\tau$, so $\theta \approx \pi
# (1 - \mathrm{share}^{1/\tau})$.


# %% tags=["solution-2"]
def estimate_angle(first_code, second_code, tau):
    share = np.mean(first_code == second_code)
    return np.pi * (1 - share ** (1 / tau))


# %% [markdown]
# **Exercise 3.** The ratio of the two probabilities grows by the factor $(\pi - \mathrm{near}) /
# (\pi - \mathrm{far})$ with every bit, so the answer is a quotient of logarithms, rounded up. Each
# bit also makes related pairs meet less often: more hashes are needed then.


# %% tags=["solution-3"]
def bits_needed(near, far, times):
    return int(np.ceil(np.log(times) / np.log((np.pi - near) / (np.pi - far))))


# %% tags=["wrong-1"]
def all_codes(vectors, planes, m, tau):
    bits = (vectors @ planes > 0).reshape(len(vectors), m, tau)
    return bits @ 2 ** np.arange(tau)[::-1]  # the first bit is worth most


# %% tags=["wrong-1"]
def all_codes(vectors, planes, m, tau):
    bits = (vectors @ planes > 0).reshape(len(vectors), tau, m)  # the columns of a hash are not next to each other
    return (bits * 2 ** np.arange(tau)[:, None]).sum(axis=1)


# %% tags=["wrong-2"]
def estimate_angle(first_code, second_code, tau):
    return np.pi * (1 - np.mean(first_code == second_code))  # right for one bit only


# %% tags=["wrong-3"]
def bits_needed(near, far, times):
    return int(np.ceil(times / ((np.pi - near) / (np.pi - far))))  # as if bits added up instead of multiplying
