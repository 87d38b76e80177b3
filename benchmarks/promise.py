"""What the default rotations of a chain promise, measured: part of the suite ``bias``.

For every dimension and code length of the promise: the mean collision weight relative to the
expected one, of the first 8 hashes and of as many as the rotations have room for. Besides, one-hot
pairs near 45 degrees, which are outside of the promise, and the sizes at which a
chain takes more rounds than the paper's layout.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

import yoso_core
from yoso_core.benchmarks.directions import kinds_here, pairs_at_cosine
from yoso_core.benchmarks.tables import markdown
from yoso_core.reference import expected_weight
from yoso_core.reference.hashing import LAYOUTS, ROTATIONS, WARM_UP, Layout, signs_shape

Result = dict[str, Any]
Array = np.ndarray[Any, Any]
Track = Callable[[list[Any]], Iterable[Any]]

BOUNDS = {0.0: 0.04, 0.5: 0.015, 0.6: 0.015, 0.7: 0.015, 0.8: 0.015, 0.9: 0.015}
"""The promise: the largest relative bias at a cosine."""
ENDS = (0.0, 0.5, 0.9)
"""The cosines of the promise for vectors of few entries, which the cosine itself distinguishes."""
FEW = 8
"""The fewest hashes of the promise."""
SHARE = 1 / 5
"""Trials are as many as make the standard error of 8 hashes this share of the bound."""
PAIRS = 16
"""Pairs of vectors that share a draw of the signs."""
DRAWS = 32
"""Draws of the signs for each group of pairs."""
LEAST_GROUPS = 128
BLOCK = 256
"""Groups that are hashed in one call."""
NEAR = (0.70, 0.71)
"""Cosines on both sides of 45 degrees."""
NEAR_ERROR = 0.003
"""The standard error of the relative bias to aim at there."""
TABLE_HASHES = (8, 16, 32, 64, 128)

Hash = Layout | Literal["planes"]


@dataclass(frozen=True)
class Setting:
    """Sizes of a hash."""

    dim: int
    hash_code_len: int
    num_hash: int
    rotations: int | None = None
    """Of a chain; ``None``: as many as `sample_signs` takes."""

    def rounds(self, layout: Layout) -> int:
        """Rounds of signs and a transform for one vector."""
        rotations = self.rotations if layout == "chained" else None
        return math.prod(signs_shape(self.num_hash, self.hash_code_len, self.dim, layout, rotations)[:-1])


PROMISED = tuple(
    Setting(dim, tau, rotations * dim // tau, rotations) for dim, row in sorted(ROTATIONS.items()) for tau, rotations in sorted(row.items())
)
"""Every row of `ROTATIONS`, with as many hashes as its rotations have room for."""


def cosines(kind: str) -> tuple[float, ...]:
    return ENDS if kind in ("one-hot", "sparse") else tuple(BOUNDS)


def groups_for(setting: Setting, cosine: float, error: float, *, num_hash: int, least: int = LEAST_GROUPS) -> int:
    """So many groups of pairs that ``num_hash`` hashes, were they independent, have this relative
    standard error.
    """
    weight = expected_weight(np.arccos(cosine), setting.hash_code_len)
    return max(least, math.ceil((1 - weight) / (weight * num_hash * error**2) / (PAIRS * DRAWS)))


def drawn_codes(hash: Hash, setting: Setting, vectors: Array, rng: np.random.Generator) -> Array:
    """Codes of ``(groups, n, dim)`` vectors, with a draw for each group."""
    numbers = setting.num_hash, setting.hash_code_len, setting.dim
    batch_shape = vectors.shape[:1]
    if hash == "planes":
        planes = yoso_core.sample_planes(*numbers, batch_shape=batch_shape, rng=rng)
        return yoso_core.hyperplane_hash(vectors, planes, *numbers[:2])
    rotations = setting.rotations if hash == "chained" else None
    signs = yoso_core.sample_signs(*numbers, batch_shape=batch_shape, layout=hash, rotations=rotations, rng=rng)
    return yoso_core.fast_hash(vectors, signs, *numbers[:2], layout=hash)


def collisions(hash: Hash, kind: str, setting: Setting, cosine: float, *, groups: int) -> Array:
    """For every group of pairs, of which each has vectors and draws of its own, the means over its
    pairs and draws of: the collision rate of the first 8 hashes, that of all, and the square of the
    rate of all. ``(groups, 3)``, always from the same seed.
    """
    tau, dim = setting.hash_code_len, setting.dim
    rng = np.random.default_rng([*hash.encode(), dim, tau, setting.num_hash, round(100 * cosine), *kind.encode()])
    found = []
    for start in range(0, groups, BLOCK):
        count = min(BLOCK, groups - start)
        pairs = pairs_at_cosine(kind, cosine, count * PAIRS, dim, rng).reshape(2, count, PAIRS, dim)
        vectors = np.concatenate([pairs[0], pairs[1]], axis=1)
        sums = np.zeros((count, 3))
        for _ in range(DRAWS):
            codes = drawn_codes(hash, setting, vectors, rng)
            meet = codes[:, :PAIRS] == codes[:, PAIRS:]  # (count, PAIRS, m)
            rate = np.count_nonzero(meet, axis=-1) / setting.num_hash
            few = np.count_nonzero(meet[..., :FEW], axis=-1) / FEW
            sums += np.stack([few.mean(axis=1), rate.mean(axis=1), np.mean(rate**2, axis=1)], axis=1)
        found.append(sums / DRAWS)
    return np.concatenate(found)


def relative(rates: Array, cosine: float, hash_code_len: int) -> tuple[float, float]:
    """``mean collision rate / expected weight - 1``, and its standard error over the groups."""
    ratio = rates / expected_weight(np.arccos(cosine), hash_code_len)
    return float(ratio.mean() - 1), float(ratio.std(ddof=1) / np.sqrt(len(ratio)))


def variance_ratio(rates: Array, num_hash: int) -> tuple[float, float]:
    """The variance of the mean over ``num_hash`` hashes, times ``num_hash``, over that of a single
    hash: 1 for independent hashes. The second number is its standard error, by leaving out each of
    the groups in turn.
    """
    groups = len(rates)
    mean, square = ((rates.sum(axis=0) - rates) / (groups - 1)).T[1:]  # without each group
    without = (square - mean**2) * num_hash / (mean * (1 - mean))
    error = np.sqrt((groups - 1) * np.var(without))
    mean, square = rates.mean(axis=0)[1:]
    return float((square - mean**2) * num_hash / (mean * (1 - mean))), float(error)


def promise_cells(track: Track, *, scale: float = 1.0, least: int = LEAST_GROUPS) -> list[Result]:
    """Every row of the table of rotations, on every kind of vectors at each of its cosines, for 8
    hashes and for all.
    """
    cells = []
    for setting, kind in track(list(product(PROMISED, kinds_here()))):
        for cosine in cosines(kind):
            groups = groups_for(setting, cosine, scale * SHARE * BOUNDS[cosine], num_hash=FEW, least=least)
            found = collisions("chained", kind, setting, cosine, groups=groups)
            few, every = (relative(found[:, i], cosine, setting.hash_code_len) for i in (0, 1))
            for num_hash, (bias, error) in ((FEW, few), (setting.num_hash, every)):
                cell = {**asdict(setting), "num_hash": num_hash, "kind": kind, "cosine": cosine, "bound": BOUNDS[cosine]}
                cells.append(cell | {"bias": bias, "standard_error": error, "trials": groups * PAIRS * DRAWS})
    return cells


def near_cells(track: Track, *, scale: float = 1.0, least: int = LEAST_GROUPS) -> list[Result]:
    """One-hot pairs on both sides of 45 degrees, in both layouts."""
    cells = []
    for setting, layout in track(list(product(PROMISED, LAYOUTS))):
        for cosine in NEAR:
            groups = groups_for(setting, cosine, scale * NEAR_ERROR, num_hash=setting.num_hash, least=least)
            found = collisions(layout, "one-hot", setting, cosine, groups=groups)
            bias, spread = relative(found[:, 1], cosine, setting.hash_code_len)
            cell = {**asdict(setting), "layout": layout, "rounds": setting.rounds(layout), "cosine": cosine}
            cells.append(cell | {"bias": bias, "standard_error": spread})
    return cells


def shared_pairs(setting: Setting) -> float:
    """How many pairs of bits of a code come from one rotation of a chain, on average over the
    hashes.

    >>> shared_pairs(Setting(64, 8, 32, rotations=4)), shared_pairs(Setting(64, 8, 64))
    (4.0, 0.0)
    """
    tau, dim = setting.hash_code_len, setting.dim
    rotations = setting.rounds("chained") - WARM_UP
    position = np.arange(tau)[:, None] * (rotations * dim // tau) + np.arange(setting.num_hash)
    rotation = position // dim
    same = np.sum(rotation[:, None] == rotation, axis=(0, 1)) - tau  # every pair twice
    return float(np.mean(same) / 2)


def predicted(setting: Setting, cosine: float) -> float:
    """The relative bias of a chain on vectors in random directions, to first order in ``1 / D``.

    Two bits of one rotation agree together less often than independent ones, by the factor
    ``1 - (sin theta / (pi - theta))**2 / (D - 1)``; docs/hashing.md derives it.

    >>> round(predicted(Setting(64, 8, 32, rotations=4), 0.0), 4)
    -0.0254
    """
    theta = np.arccos(cosine)
    return float(np.expm1(-shared_pairs(setting) * (np.sin(theta) / (np.pi - theta)) ** 2 / (setting.dim - 1)))


def percent(cell: Result) -> str:
    return f"{100 * cell['bias']:+.1f} ± {100 * cell['standard_error']:.1f}%"


def promise_table(results: Result) -> str:
    """For every row of the table of rotations and number of hashes, the cell of each kind that is
    largest beside its bound, in Markdown.
    """
    cells = results["promise"]
    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    lines: list[list[Any]] = []
    for dim, tau, rotations, m in dict.fromkeys((c["dim"], c["hash_code_len"], c["rotations"], c["num_hash"]) for c in cells):
        row = [c for c in cells if (c["dim"], c["hash_code_len"], c["num_hash"]) == (dim, tau, m)]
        worst = [max((c for c in row if c["kind"] == kind), key=beside_bound) for kind in kinds]
        shown = [f"{percent(cell)} at {cell['cosine']:g}" for cell in worst]
        lines.append([f"{dim}, {tau}", rotations, m, *shown, f"{max(map(beside_bound, worst)):.2f}"])
    return markdown(["d, tau", "rotations", "m", *kinds, "largest / bound"], lines, left=1)


def kept_table(results: Result) -> str:
    """For every row of the table of rotations: the bits that share one, what follows for vectors in
    random directions, and the largest bias that was measured over all kinds and cosines, in
    Markdown.
    """
    header = ["d, tau", "rotations", "room for m", "pairs of bits", "predicted at 0", "at 0.5", "largest measured at 0", "at 0.5 to 0.9"]
    lines: list[list[Any]] = []
    for setting in PROMISED:
        cells = [c for c in results["promise"] if (c["dim"], c["hash_code_len"]) == (setting.dim, setting.hash_code_len)]
        right, nearer = ([c for c in cells if c["num_hash"] != FEW and (c["cosine"] == 0) == at_0] for at_0 in (True, False))
        biases = [f"{100 * predicted(setting, cosine):+.1f}%" for cosine in (0.0, 0.5)]
        worst = [percent(max(some, key=beside_bound)) for some in (right, nearer)]
        sizes = f"{setting.dim}, {setting.hash_code_len}", setting.rotations, setting.num_hash
        lines.append([*sizes, f"{shared_pairs(setting):.1f}", *biases, *worst])
    return markdown(header, lines, left=1)


def beside_bound(cell: Result) -> float:
    """How much of its bound the bias of a cell is."""
    return float(abs(cell["bias"]) / cell["bound"])


def near_table(results: Result) -> str:
    """One-hot pairs on both sides of 45 degrees, in Markdown."""
    header = ["d, tau, m", *(f"{layout}: {what}" for layout in LAYOUTS for what in ("rounds", *(f"cosine {c:.2f}" for c in NEAR)))]
    lines: list[list[Any]] = []
    cells = {(c["dim"], c["hash_code_len"], c["num_hash"], c["layout"], c["cosine"]): c for c in results["near"]}
    for sizes in dict.fromkeys(key[:3] for key in cells):
        line: list[Any] = [", ".join(map(str, sizes))]
        for layout in LAYOUTS:
            found = [cells[*sizes, layout, cosine] for cosine in NEAR]
            line += [found[0]["rounds"], *map(percent, found)]
        lines.append(line)
    return markdown(header, lines, left=1)


def rounds_table() -> str:
    """The sizes at which a chain takes more rounds for a vector than the paper's layout, in
    Markdown; empty where it takes no more.
    """
    lines: list[list[Any]] = []
    for dim, tau in product(ROTATIONS, ROTATIONS[32]):
        line: list[Any] = [f"{dim}, {tau}"]
        for m in TABLE_HASHES:
            chained, paper = (Setting(dim, tau, m).rounds(layout) for layout in ("chained", "paper"))
            line.append(f"{chained} > {paper}" if chained > paper else "")
        if any(line[1:]):
            lines.append(line)
    return markdown(["d, tau", *(f"m = {m}" for m in TABLE_HASHES)], lines, left=1)
