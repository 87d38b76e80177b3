"""How many hashes: what a choice of ``num_hash``, ``hash_code_len`` and ``oversample`` will give on
these vectors, before it is used.

Three parts. The first two moments of a row come from formulas: the expected weights, the variance
of a pair, and the covariance between two keys of a query, which fall into its bucket together. A
pilot of a few real hashes corrects what two moments cannot say where collisions are rare. The cost
is counted, and three short calls on the caller's arrays give the seconds of each count. The
derivations are in ``docs/error.md``.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import comb, log2
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yoso_core import backends, checks, ops
from yoso_core.arrays import Array, Caller, one_caller
from yoso_core.reference.arrays import full_mask
from yoso_core.reference.hashing import Seed, signs_shape
from yoso_core.reference.normalize import l2_normalize
from yoso_core.reference.smoothing import count_bits, smoothing_additions, smoothing_weights

Floats = NDArray[np.float64]

NUM_HASHES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
OVERSAMPLES = (0, 1, 2, 3, 4)
"""The choices where the caller names none."""

MOST_ROWS, LEAST_ROWS = 512, 16
MOST_ROW_KEYS = 1 << 19
"""Rows that are looked at: so many that rows times keys stay below this, within the two limits."""
MOST_MOMENT_ROWS = 64
"""Of those, rows whose two moments are computed; the pilot looks at all."""
MOST_PAIR_KEYS = 256
"""Keys of a row whose pairs are all taken; of more keys, so many are drawn."""
MOST_HEADS = 4
"""Heads, of all batches, that rows are taken from."""
PILOT_HASHES = 64
LEAST_DRAWS, MOST_DRAWS = 2, 8
MOST_DRAWN = 1 << 21
"""Draws of the pilot: so many that draws times rows times keys stay below this, within the two
limits.
"""
TIMED_ROWS = 4096


class Shortfall(NamedTuple):
    """Two moments of one hash for one row, relative to the squared length of its expectation."""

    variance: float
    """``(E |y|**2 - |E y|**2) / |E y|**2``."""
    along: float
    """The part of it along the expectation."""


@dataclass(frozen=True)
class Choice:
    """What one choice of hashes will give."""

    num_hash: int
    hash_code_len: int
    oversample: int
    cosine: float
    """Predicted mean cosine of a row with its expectation."""
    standard_error: float
    """Of that number: rows, keys and hashes were sampled."""
    error: float
    """Predicted mean of what ``return_error`` gives."""
    seconds: float
    """Predicted time of a call with the arrays that were given."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `yoso_core.yoso_attention`."""
        numbers = {name: getattr(self, name) for name in ("num_hash", "hash_code_len", "oversample")}
        return {**numbers, "layout": "chained"}


@dataclass(frozen=True)
class Plan:
    """Choices of hashes, the cheapest first, and the one to take."""

    cosine: float
    """What was wanted."""
    rows: int
    """Rows that were looked at."""
    choices: tuple[Choice, ...]

    @property
    def best(self) -> Choice | None:
        """The cheapest that reaches the cosine; ``None`` where none does."""
        return next((choice for choice in self.choices if choice.cosine >= self.cosine), None)

    @property
    def shortlist(self) -> tuple[Choice, ...]:
        """For each ``hash_code_len`` and ``oversample`` the cheapest that reaches the cosine, or
        the nearest to it.
        """
        kinds = sorted({(choice.hash_code_len, choice.oversample) for choice in self.choices})
        listed = []
        for kind in kinds:
            alike = [choice for choice in self.choices if (choice.hash_code_len, choice.oversample) == kind]
            listed.append(next((c for c in alike if c.cosine >= self.cosine), max(alike, key=lambda c: c.cosine)))
        return tuple(listed)

    def __str__(self) -> str:
        lines = [f"tau {c.hash_code_len}, s {c.oversample}, m {c.num_hash}: {_said(c)}" for c in self.shortlist]
        best = self.best
        taken = f"none reaches a cosine of {self.cosine:g}" if best is None else f"take {best.options}"
        return "\n".join([*lines, taken])

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers."""
        best = self.best
        chosen = None if best is None else {**asdict(best), "options": best.options}
        return {"cosine": self.cosine, "rows": self.rows, "best": chosen, "choices": [asdict(choice) for choice in self.choices]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def _said(choice: Choice) -> str:
    return f"cosine {choice.cosine:.3f} +- {choice.standard_error:.3f}, error {choice.error:.3f}, {1e3 * choice.seconds:.3g} ms"


def plan(
    query: Array,
    key: Array,
    value: Array,
    *,
    cosine: float = 0.95,
    hash_code_len: int | Sequence[int] = 8,
    num_hash: int | Sequence[int] = NUM_HASHES,
    oversample: int | Sequence[int] = OVERSAMPLES,
    query_mask: Array | None = None,
    key_mask: Array | None = None,
    rng: Seed = None,
) -> Plan:
    """Predict how near sampled attention comes to its expectation on these arrays, and what it
    costs, for every choice of hashes; recommend the cheapest that is near enough.

    For one hash, ``E |y|**2 = sum_jk (v_j . v_k) E[W_j W_k]`` with
    ``E[W_j W_k] = sum_l C(tau, l) C(s, l) / C(tau + s, tau) A_jk**(tau - l) (p_j p_k)**l``, where
    ``p = 1 - theta / pi`` and ``A_jk = 1 - (theta_ij + theta_ik + theta_jk) / (2 pi)`` is the
    probability that one bit is the same for the query and both keys. Mean cosine, error and time
    follow from it as ``docs/error.md`` says. There is no bias: the choices are for chains of
    rotations (``layout="chained"``) and hold for Gaussian planes.

    Parameters
    ----------
    query, key, value, query_mask, key_mask : those of `yoso_core.yoso_attention`, or a part of the
        batch. All keys of a head belong to the question: with half of the keys the noise is not the
        same.
    cosine : what is wanted, above 0 and below 1: the mean over rows of the cosine between a row
        and its expectation.
    hash_code_len : ``tau``, or several. It is part of *what* is computed, the sharpness of the
        weights, not of how well: give several only where the model does not care.
    num_hash, oversample : ``m`` and ``s`` to choose from.
    rng : chooses rows and keys, and draws the pilot's hashes: a `numpy.random.Generator`, an int
        seed, or ``None`` for fresh entropy.

    Returns
    -------
    A `Plan`: ``best`` is the choice to take and ``best.options`` its keyword arguments. Predicted
    cosines carry their standard error. Times are those of hashing and cumulation as three short
    calls measure them here and now; one that fuses the two is faster.

    At most 512 rows, from 4 heads, are looked at, fewer where there are many keys; and of 64 rows,
    256 keys in pairs. What grows with the number of keys is one pass for each of 16 rows.

    Raises
    ------
    ValueError, TypeError : as `yoso_core.yoso_attention`; and where no row is kept that has an
        expectation, or a kept number is not finite.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((512, 64), dtype=np.float32)
    >>> found = plan(x, x, x, cosine=0.9, oversample=0, rng=0)
    >>> found.best.num_hash
    12
    """
    wanted = checks.positive("cosine", cosine, 1)
    draw = checks.generator("rng", rng)
    caller = one_caller({"query": query, "key": key, "value": value}, query_mask=query_mask, key_mask=key_mask)
    ops.check_attention(query, key, value, query_mask, key_mask)
    taus = _several("hash_code_len", hash_code_len, 1, checks.MAX_CODE_LEN)
    kinds = [(tau, s) for tau in taus for s in _several("oversample", oversample, 0, checks.MAX_CODE_LEN - max(taus))]
    numbers = _several("num_hash", num_hash, 1, None)
    rows = list(_sampled_rows(caller, query, key, value, query_mask, key_mask, draw))
    seconds = _clock(caller, query, key, value)
    choices = []
    for tau, s in kinds:
        known = [row for row in rows if row.expectation(tau).any()]
        moments = np.array([row.moments(tau, s) for row in known if row.pairs is not None])
        if not len(moments):
            raise ValueError("value: no row that is kept has an expectation other than zero")
        variance, along = moments.T
        pilot = _pilot(known, tau, s, draw)
        for m in numbers:
            near, standard_error = _predicted(m, variance, along, pilot)
            relative = variance / m
            error = float(np.mean(np.sqrt(relative / (1 + relative))))
            choices.append(Choice(m, tau, s, near, standard_error, error, seconds(m, tau, s)))
    return Plan(wanted, len(rows), tuple(sorted(choices, key=lambda choice: choice.seconds)))


def _several(name: str, given: int | Sequence[int], low: int, high: int | None) -> list[int]:
    listed = list(given) if isinstance(given, Sequence) else [given]
    if not listed:
        raise ValueError(f"{name}: need at least one number, got none")
    return [checks.integer(name, x, low, high) for x in listed]


# The rows that are looked at


class _Pairs(NamedTuple):
    """Pairs of the keys of one query."""

    keys: NDArray[np.intp]
    weight: Floats
    """What each pair counts in a sum over all pairs of two keys; zero for a key with itself."""
    together: Floats
    """``A_jk``, the probability that a bit of the query and of both keys is the same."""


@dataclass
class _Row:
    """A query, and the keys and values that it may meet."""

    head: tuple[int, ...]
    query: Floats
    """``(d,)``, of unit length."""
    key: Floats
    """``(n_k, d)``, of unit length."""
    value: Floats
    pairs: _Pairs | None = None

    @cached_property
    def agree(self) -> Floats:
        """``p_j``, the probability that a bit of the query and of key ``j`` are the same."""
        found: Floats = 1 - np.arccos(np.clip(self.key @ self.query, -1, 1)) / np.pi
        return found

    def expectation(self, tau: int) -> Floats:
        found: Floats = self.agree**tau @ self.value
        return found

    def moments(self, tau: int, s: int) -> Shortfall:
        """For a row with pairs whose expectation is not zero."""
        assert self.pairs is not None
        mean = self.expectation(tau)
        squared = float(mean @ mean)
        p, along = self.agree, self.value @ mean / squared
        shares = overlap_shares(tau, s)
        own = sum(share * p ** (tau + left) for left, share in enumerate(shares)) - p ** (2 * tau)
        variance, part = float(np.sum(self.value**2, axis=1) @ own) / squared, float(along**2 @ own)
        some, q = self.value[self.pairs.keys], p[self.pairs.keys]
        covariance = (mean_product(self.pairs.together, np.outer(q, q), tau, s) - np.outer(q**tau, q**tau)) * self.pairs.weight
        variance += float(np.sum(covariance * (some @ some.T))) / squared
        part += float(along[self.pairs.keys] @ covariance @ along[self.pairs.keys])
        part = max(part, 0.0)  # sampled keys may leave less than nothing
        return Shortfall(max(variance, part), part)


def mean_product(together: Floats, product: Floats, tau: int, s: int) -> Floats:
    """``E[W_j W_k]`` of two keys: ``sum_l share_l A**(tau - l) (p_j p_k)**l`` for ``A = together``
    and ``p_j p_k = product``, by Horner's rule.

    >>> mean_product(np.array([0.25]), np.array([0.25]), 2, 0)
    array([0.0625])
    """
    shares = overlap_shares(tau, s)
    total, power = np.full_like(together, shares[0]), np.ones_like(product)
    for share in shares[1:]:
        power = power * product
        total = total * together + share * power
    for _ in range(tau - len(shares) + 1):
        total = total * together
    return total


def overlap_shares(tau: int, s: int) -> list[float]:
    """``C(tau, l) C(s, l) / C(tau + s, tau)`` for ``l = 0 ... min(s, tau)``: the share of pairs of
    choices of ``tau`` out of ``tau + s`` bits that have all but ``l`` bits in common.

    >>> overlap_shares(2, 1)
    [0.3333333333333333, 0.6666666666666666]
    """
    return [comb(tau, left) * comb(s, left) / comb(tau + s, tau) for left in range(min(tau, s) + 1)]


def _sampled_rows(
    caller: Caller, query: Array, key: Array, value: Array, query_mask: Array | None, key_mask: Array | None, rng: np.random.Generator
) -> Iterator[_Row]:
    """Rows from a few heads, as many from each."""
    masks = [None if x is None else caller.to_numpy(x) for x in (query_mask, key_mask)]
    keep_query, keep_key = full_mask(masks[0], tuple(query.shape[:-1])), full_mask(masks[1], tuple(key.shape[:-1]))
    heads = [head for head in np.ndindex(*query.shape[:-2]) if keep_query[head].any() and keep_key[head].any()]
    if not heads:
        raise ValueError("query: no row is kept that has a key to meet")
    heads = [heads[i] for i in sorted(rng.permutation(len(heads))[:MOST_HEADS])]
    most = max(LEAST_ROWS, min(MOST_ROWS, MOST_ROW_KEYS // key.shape[-2]))
    for head in heads:
        q, k, v = (caller.to_numpy(x[head]).astype(np.float64)[keep] for x, keep in _kept(query, key, value, keep_query, keep_key, head))
        for name, x in (("query", q), ("key", k), ("value", v)):
            if not np.isfinite(x).all():
                raise ValueError(f"{name}: a row that is kept holds a number that is not finite")
        unit_key = l2_normalize(k)
        for number, i in enumerate(rng.permutation(len(q))[: max(1, most // len(heads))]):
            row = _Row(head, l2_normalize(q[i : i + 1])[0], unit_key, v)
            yield with_pairs(row, rng) if number < MOST_MOMENT_ROWS // len(heads) else row


def _kept(
    query: Array, key: Array, value: Array, keep_query: NDArray[np.bool_], keep_key: NDArray[np.bool_], head: tuple[int, ...]
) -> list[tuple[Array, NDArray[np.bool_]]]:
    return [(query, keep_query[head]), (key, keep_key[head]), (value, keep_key[head])]


def with_pairs(row: _Row, rng: np.random.Generator) -> _Row:
    """The row with pairs of its keys: all of them, or some that are drawn."""
    keys, weight = _drawn_keys(row.agree, row.value, rng)
    some, angle = row.key[keys], np.pi * (1 - row.agree[keys])
    between = np.arccos(np.clip(some @ some.T, -1, 1))
    together = np.clip(1 - (angle[:, None] + angle + between) / (2 * np.pi), 0, None)
    return replace(row, pairs=_Pairs(keys, np.outer(weight, weight) * (keys[:, None] != keys), together))


def _drawn_keys(agree: Floats, value: Floats, rng: np.random.Generator) -> tuple[NDArray[np.intp], Floats]:
    """Keys, and weights whose products make sums over their pairs those over all pairs of keys, on
    average. A key is drawn as often as its share of the row's standard deviations, at 4 and at 12
    bits.
    """
    if len(agree) <= MOST_PAIR_KEYS:
        return np.arange(len(agree)), np.ones(len(agree))
    size = np.linalg.norm(value, axis=1)
    if not size.any():
        return np.arange(0), np.ones(0)
    spreads = [size * agree ** (tau / 2) for tau in (4, 12)]
    chance = np.mean([spread / spread.sum() for spread in spreads if spread.any()], axis=0)
    drawn = rng.choice(len(agree), size=MOST_PAIR_KEYS, p=chance / chance.sum())
    return drawn, 1 / (chance[drawn] * np.sqrt(MOST_PAIR_KEYS * (MOST_PAIR_KEYS - 1)))


# From the moments to a cosine


def cosine_of(variance: Floats, along: Floats) -> Floats:
    """The expected cosine of each row, for a mean over hashes with these relative variances.

    Along the expectation the row is ``g`` times it, with mean 1 and variance ``along``; the square
    across it is ``across g`` on average, since both grow with the number of collisions. So the
    cosine is ``sqrt(g / (g + across))``, and to second order in ``g - 1``
    ``(1 + across)**-1/2 - along across (4 + across) / (8 (1 + across)**5/2)``.

    >>> cosine_of(np.array([0.0, 1.0]), np.array([0.0, 0.0])).round(3)
    array([1.   , 0.707])
    """
    across = variance - along
    second = along * across * (4 + across) / (8 * (1 + across) ** 2.5)
    return np.clip((1 + across) ** -0.5 - second, 0, 1)


def _predicted(num_hash: int, variance: Floats, along: Floats, pilot: dict[int, tuple[Floats, float]]) -> tuple[float, float]:
    """Mean cosine and its standard error: by the two moments, plus what the pilot differs from them
    at as many hashes. Beyond the pilot's numbers the difference falls with ``num_hash``, as the
    noise does.
    """
    nearest = max((m for m in pilot if m <= num_hash), default=min(pilot))
    seen, noise = pilot[nearest]
    fades = min(1.0, nearest / num_hash)
    by_moments = cosine_of(variance / num_hash, along / num_hash) - fades * cosine_of(variance / nearest, along / nearest)
    errors = [fades * noise, _error_of_mean(by_moments), fades * _error_of_mean(seen)]
    return float(np.clip(np.mean(by_moments) + fades * np.mean(seen), 0, 1)), float(np.linalg.norm(errors))


def _error_of_mean(each: Floats) -> float:
    return float(np.std(each, ddof=1) / np.sqrt(len(each))) if len(each) > 1 else 0.0


def _pilot(rows: list[_Row], tau: int, s: int, rng: np.random.Generator) -> dict[int, tuple[Floats, float]]:
    """For 1, 2, 4 ... hashes, the mean cosine of every row with its expectation, over groups of so
    many of the pilot's hashes; and the standard error of its mean over rows, from the spread of the
    groups. A group is of one draw: hashes of one chain differ from each other a little more than
    independent ones, and so their mean is nearer.
    """
    number = max(LEAST_DRAWS, min(MOST_DRAWS, MOST_DRAWN // sum(len(row.key) for row in rows)))
    draws = [np.concatenate([_hashed(alike, tau, s, rng) for alike in _by_head(rows)]) for _ in range(number)]
    sampled = np.concatenate(draws, axis=1)  # (rows, draws * hashes, d_v)
    means = np.stack([row.expectation(tau) for row in rows])
    unit_means = l2_normalize(means)
    found = {}
    m = 1
    while m <= PILOT_HASHES:
        groups = sampled.reshape(len(rows), -1, m, sampled.shape[-1]).mean(axis=2)
        near = np.einsum("rgc,rc->rg", l2_normalize(groups), unit_means)
        found[m] = near.mean(axis=1), float(np.std(near.mean(axis=0), ddof=1) / np.sqrt(near.shape[1]))
        m *= 2
    return found


def _by_head(rows: list[_Row]) -> list[list[_Row]]:
    return [[row for row in rows if row.head == head] for head in dict.fromkeys(row.head for row in rows)]


def _hashed(rows: list[_Row], tau: int, s: int, rng: np.random.Generator) -> Floats:
    """The rows of every single hash of the pilot, ``(rows, hashes, d_v)``, for queries of one
    head.
    """
    key, value = rows[0].key.astype(np.float32), rows[0].value
    signs = ops.sample_signs(PILOT_HASHES, tau + s, key.shape[-1], layout="chained", rng=rng)
    vectors = np.concatenate([np.stack([row.query for row in rows]).astype(np.float32), key])
    codes = ops.fast_hash(vectors, signs, PILOT_HASHES, tau + s, layout="chained")
    weigh = weigher(tau, s)
    of_hashes = [weigh(codes[: len(rows), hash, None] ^ codes[len(rows) :, hash]) @ value for hash in range(PILOT_HASHES)]
    found: Floats = np.stack(of_hashes, axis=1)
    return found


def weigher(tau: int, s: int) -> Callable[[Any], Any]:
    """``a_r`` of the bits in which two codes of ``tau + s`` bits differ, ``code xor code``; by a
    table where that is small.

    >>> weigher(1, 1)(np.array([0, 1, 2, 3]))
    array([1. , 0.5, 0.5, 0. ])
    """
    weights = np.zeros(tau + s + 1)
    weights[: s + 1] = smoothing_weights(tau, s)
    if tau + s > 16:
        return lambda differing: weights[count_bits(differing)]
    table = weights[count_bits(np.arange(1 << (tau + s)))]
    return lambda differing: table[differing]


# What it costs


def counted(num_hash: int, tau: int, s: int, *, heads: int, n_q: int, n_k: int, dim: int, value_dim: int) -> tuple[int, int, int]:
    """Additions of a call: to hash, to fill and read plain tables, and to smooth.

    ``(n_q + n_k) (P + 3) D log2 D``; ``m (n_q + n_k) d_v``; and for smoothing
    ``m s (tau + s) 2**(tau + s) d_v``, or the reads of neighbors where those are fewer. All times
    the number of heads.

    >>> counted(2, 2, 0, heads=1, n_q=3, n_k=5, dim=4, value_dim=4)
    (320, 64, 0)
    """
    bits = tau + s
    rounds, padded = signs_shape(num_hash, bits, dim, "chained")
    return (
        heads * (n_q + n_k) * rounds * padded * max(1, round(log2(padded))),
        heads * num_hash * (n_q + n_k) * value_dim,
        heads * num_hash * smoothing_additions(bits, s, n_q) * value_dim,
    )


def _clock(caller: Caller, query: Array, key: Array, value: Array) -> Callable[[int, int, int], float]:
    """Seconds of a call with these arrays for ``(m, tau, s)``: the additions of each kind, times
    what one takes.
    """
    heads = int(np.prod(query.shape[:-2]))
    sizes = {"heads": heads, "n_q": query.shape[-2], "n_k": key.shape[-2], "dim": query.shape[-1], "value_dim": value.shape[-1]}
    rates = measured_rates(caller, key, value)
    return lambda m, tau, s: sum(rate * number for rate, number in zip(rates, counted(m, tau, s, **sizes), strict=True))


def measured_rates(caller: Caller, key: Array, value: Array) -> tuple[float, ...]:
    """Seconds of one addition of each kind, from three calls on the first keys of the first head,
    with the variants that the library chooses for them. Each call is timed three times.
    """
    m, tau, s = 16, 8, 2
    first = (0,) * (key.ndim - 2)
    x, v = key[first][:TIMED_ROWS], value[first][:TIMED_ROWS]
    sizes = {"heads": 1, "n_q": x.shape[0], "n_k": x.shape[0], "dim": x.shape[1], "value_dim": v.shape[1]}

    def hashed(bits: int) -> Array:
        signs = caller.from_numpy(ops.sample_signs(m, bits, x.shape[1], layout="chained", rng=0))
        return ops.fast_hash(x, signs, m, bits, layout="chained")

    def cumulated(codes: Array, more: int) -> Array:
        return ops.lsh_cumulation(codes, codes, v, 1 << (tau + more), oversample=more, validate=False)

    hashing = 2 * _timed(caller, partial(hashed, tau))  # queries and keys
    plain, smooth = (_timed(caller, partial(cumulated, hashed(tau + more), more)) for more in (0, s))
    additions = *counted(m, tau, 0, **sizes)[:2], counted(m, tau, s, **sizes)[2]
    return tuple(spent / max(count, 1) for spent, count in zip((hashing, plain, max(smooth - plain, 0.0)), additions, strict=True))


def _timed(caller: Caller, call: Callable[[], Any]) -> float:
    where = "cupy" if caller.kind == "cuda" else "cpu"
    call()
    found = []
    for _ in range(3):
        backends.wait(caller, where)
        start = time.perf_counter()
        call()
        backends.wait(caller, where)
        found.append(time.perf_counter() - start)
    return median(found)
