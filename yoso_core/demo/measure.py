"""What the demo measures: who attends to whom, how the error falls, how the time grows.

A function that may have to stop early asks ``left()``, the seconds that remain. It always does the
smallest amount of work that has a meaning, and its result says how much was done.
"""

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from yoso_core.arrays import Array
from yoso_core.comparison import Comparison, compare
from yoso_core.demo.words import Passage
from yoso_core.ops import expectation_attention, fast_hash, lsh_cumulation, sample_signs, yoso_attention

SOFTMAX, EXPECTATION, SAMPLED = METHODS = ("softmax", "expectation", "sampled")

COMPARED = ("fast_hash", "lsh_cumulation", "expectation_attention", "yoso_attention")
"""The operations that the demo rests on."""

Attention = Callable[[Array, Array, Array], Array]
"""``(query, key, value) -> out``, one head."""

Left = Callable[[], float]
"""The seconds that remain."""


def no_limit() -> float:
    return math.inf


def softmax_attention(query: Array, key: Array, value: Array, scale: float, block: int = 256) -> Array:
    """``out_i = sum_j exp(scale q_i . k_j) v_j / sum_j exp(scale q_i . k_j)``, a block of queries
    at a time so that memory stays linear.
    """
    out = np.empty((len(query), value.shape[1]), value.dtype)
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        weight = query[rows] @ key.T
        weight -= weight.max(axis=1, keepdims=True)
        weight *= scale
        np.exp(weight, out=weight)
        out[rows] = weight @ value / weight.sum(axis=1, keepdims=True)
    return out


def mean_entropy(weight: Array) -> float:
    """Average over the queries (rows) of the entropy of their shares of attention, in nats."""
    share = weight / weight.sum(axis=1, keepdims=True)
    return float(-np.sum(share * np.log(np.maximum(share, 1e-30))) / len(share))


def softmax_scale(vectors: Array, hash_code_len: int, queries: int = 256) -> float:
    """The scale at which softmax is as sharp as YOSO on these unit vectors: equal mean entropy over
    some queries, found by bisection.
    """
    cosine = np.clip(vectors[:: max(1, len(vectors) // queries)] @ vectors.T, -1, 1).astype(np.float64)
    target = mean_entropy((1 - np.arccos(cosine) / np.pi) ** hash_code_len)
    low, high = 0.0, 100.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(np.exp(middle * (cosine - 1))) > target else (low, middle)
    return (low + high) / 2


def softmax_of_torch(query: Array, key: Array, value: Array, scale: float) -> Array:
    """`softmax_attention` by PyTorch's ``scaled_dot_product_attention``: compiled, on all cores. It
    is the softmax that a user would otherwise take.
    """
    import torch

    q, k, v = (torch.from_numpy(x)[None, None] for x in (query, key, value))
    with torch.no_grad():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)[0, 0].numpy()


def softmax_library() -> str:
    """Whose softmax is timed: ``"PyTorch"`` where it is installed, else ``"NumPy"``."""
    return "PyTorch" if importlib.util.find_spec("torch") is not None else "NumPy"


def attention_methods(num_hash: int, hash_code_len: int, scale: float, seed: int) -> dict[str, Attention]:
    """The three ways to attend that are timed, by name; YOSO's outputs are normalized as in a
    model. Softmax is that of `softmax_library`.
    """
    softmax = softmax_of_torch if softmax_library() == "PyTorch" else softmax_attention
    return {
        SOFTMAX: lambda q, k, v: softmax(q, k, v, scale),
        EXPECTATION: lambda q, k, v: yoso_attention(q, k, v, hash_code_len=hash_code_len, use_expectation=True),
        SAMPLED: lambda q, k, v: yoso_attention(q, k, v, num_hash=num_hash, hash_code_len=hash_code_len, rng=seed),
    }


def prominent_words(passage: Passage, number: int, parts: int = 32, letters: int = 4) -> list[int]:
    """Frequent words that the passage is *about*: those that crowd together instead of spreading
    evenly as "the" does.

    With ``c_p`` the word's count in part ``p`` and ``c`` its mean over the parts, the score is
    ``sum_p c_p log(c_p / c)``. Short words (fewer than ``letters``) come last. Returns positions in
    ``passage.words``.
    """
    counts = np.zeros((len(passage.words), parts))
    np.add.at(counts, (passage.ids, np.arange(len(passage)) * parts // len(passage)), 1)
    even = counts.mean(axis=1, keepdims=True)
    score = np.sum(counts * np.log(np.where(counts > 0, counts, even) / even), axis=1)
    return sorted(range(len(passage.words)), key=lambda i: (len(passage.words[i]) < letters, -score[i]))[:number]


@dataclass(frozen=True)
class WordAttention:
    """What one word attends to."""

    word: str
    others: list[str]
    """The other words, those that it attends to most by the expectation first."""
    lift: dict[str, Array]
    """For each method and other word: its share of the attention over its share of the passage. 1
    is what an even spread would give.
    """

    def strongest(self, method: str, number: int) -> list[tuple[str, float]]:
        """The words that a method attends to most, with their lift."""
        order = np.argsort(-self.lift[method], kind="stable")[:number]
        return [(self.others[i], float(self.lift[method][i])) for i in order]


def attention_by_word(
    passage: Passage, word: int, *, num_hash: int, hash_code_len: int, scale: float, seed: int, min_count: int = 3
) -> WordAttention:
    """Where the attention of a word goes, summed over the tokens of every other word and averaged
    over the word's own occurrences.

    Attention with one-hot values adds up weights: ``value[j, w] = [token j is word w]`` gives
    ``out[i, w]``, the weight of all tokens of word ``w`` for query ``i``. Words that occur fewer
    than ``min_count`` times are left out: a share of one or two tokens says little.
    """
    x, tau = passage.vectors, hash_code_len
    query = x[passage.ids == word]
    one_hot = np.eye(len(passage.words), dtype=np.float32)[passage.ids]
    signs = sample_signs(num_hash, tau, x.shape[1], rng=seed)
    query_code, key_code = (fast_hash(vectors, signs, num_hash, tau) for vectors in (query, x))
    weight = {
        SOFTMAX: softmax_attention(query, x, one_hot, scale),
        EXPECTATION: expectation_attention(query, x, one_hot, tau),
        SAMPLED: lsh_cumulation(query_code, key_code, one_hot, 1 << tau),
    }
    count = np.bincount(passage.ids)
    share = {name: np.mean(w / w.sum(axis=1, keepdims=True), axis=0) for name, w in weight.items()}
    shown = np.flatnonzero((count >= min_count) & (np.arange(len(count)) != word))
    lift = {name: s[shown] * len(passage) / count[shown] for name, s in share.items()}
    order = np.argsort(-lift[EXPECTATION], kind="stable")
    others = [passage.words[i] for i in shown[order]]
    return WordAttention(passage.words[word], others, {name: values[order] for name, values in lift.items()})


@dataclass(frozen=True)
class SamplingError:
    """The error of sampling against the expectation, by number of hashes."""

    num_hash: list[int]
    rms: list[float]
    """``sqrt(mean |sampled - expected|^2 / mean |expected|^2)``."""
    draws: list[int]
    """How many independent draws of ``m`` hashes each error is the mean of."""
    slope: float
    """Of ``log rms`` against ``log m``: -1/2 for an average of independent, unbiased hashes."""


def sampling_error(x: Array, nums_hash: list[int], hash_code_len: int, hashes: int, seed: int, left: Left = no_limit) -> SamplingError:
    """RMS error of self-attention over ``x (n, d)`` relative to the expectation, for every number
    of hashes ``m``.

    Each ``m`` gets ``hashes / m`` independent draws, or fewer where the time is short, but at least
    one. A draw depends on ``seed``, ``m`` and its own number alone. The outputs are not normalized:
    it is the plain sum that sampling estimates without bias, and whose error falls as
    ``1 / sqrt(m)``.
    """
    exact = yoso_attention(x, x, x, hash_code_len=hash_code_len, use_expectation=True, normalize_output=False)
    wanted = [max(1, hashes // m) for m in nums_hash]
    squares: list[list[float]] = [[] for _ in nums_hash]
    for number in range(max(wanted)):
        if number > 0 and left() <= 0:
            break
        for m, draws, found in zip(nums_hash, wanted, squares, strict=True):
            if number < draws:
                rng = np.random.default_rng((seed, m, number))
                sampled = yoso_attention(x, x, x, num_hash=m, hash_code_len=hash_code_len, rng=rng, normalize_output=False)
                found.append(float(np.mean((sampled - exact) ** 2)))
    rms = [float(np.sqrt(np.mean(found) / np.mean(exact**2))) for found in squares]
    slope = float(np.polyfit(np.log(nums_hash), np.log(rms), 1)[0])
    return SamplingError(nums_hash, rms, list(map(len, squares)), slope)


@dataclass(frozen=True)
class AttentionTimes:
    """How long each method takes, by number of tokens."""

    lengths: list[int]
    seconds: dict[str, list[float]]
    """For each method, the median time at each of ``lengths``."""
    runs: int
    """What the medians are taken over, at the least."""
    softmax_library: str
    """Whose softmax it is, see `softmax_library`."""


def attention_times(
    passage: Passage, lengths: list[int], methods: dict[str, Attention], repeats: int, left: Left = no_limit, always: int = 3
) -> AttentionTimes:
    """Median seconds of self-attention over the ``n`` tokens in the middle, for each method and
    each length.

    One call of each warms up, then all take turns, so that a busy moment of the machine does not
    fall on one alone. The first ``always`` lengths are always measured; a longer one is measured
    where the time suffices for the square of what the one before took. After that all lengths are
    repeated while there is time.
    """
    inputs = [passage.middle(n).vectors for n in lengths]
    samples: dict[str, list[list[float]]] = {name: [[] for _ in lengths] for name in methods}

    def measure(i: int) -> float:
        for name, attend in methods.items():
            start = time.perf_counter()
            attend(inputs[i], inputs[i], inputs[i])
            samples[name][i].append(time.perf_counter() - start)
        return sum(rows[i][-1] for rows in samples.values())

    for attend in methods.values():
        attend(inputs[0], inputs[0], inputs[0])
    last, round_seconds, used = 0.0, 0.0, 0
    for i, n in enumerate(lengths):
        if i >= always and last * (n / lengths[i - 1]) ** 2 > left():
            break
        last = measure(i)
        round_seconds, used = round_seconds + last, i + 1
    runs = 1
    while runs < repeats and round_seconds <= left():
        round_seconds, runs = sum(measure(i) for i in range(used)), runs + 1
    seconds = {name: [median(times) for times in rows[:used]] for name, rows in samples.items()}
    return AttentionTimes(lengths[:used], seconds, runs, softmax_library())


def variant_agreement(x: Array, num_hash: int, hash_code_len: int, seed: int, left: Left = no_limit) -> list[Comparison]:
    """Every variant of the operations `COMPARED`, against the definition in float64, on the tokens
    ``x (n, d)``. The first operation is always compared, the others while there is time.
    """
    signs = sample_signs(num_hash, hash_code_len, x.shape[1], rng=seed)
    codes = fast_hash(x, signs, num_hash, hash_code_len)
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "fast_hash": ((x, signs, num_hash, hash_code_len), {}),
        "lsh_cumulation": ((codes, codes, x, 1 << hash_code_len), {}),
        "expectation_attention": ((x, x, x, hash_code_len), {}),
        "yoso_attention": ((x, x, x), {"num_hash": num_hash, "hash_code_len": hash_code_len, "signs": signs}),
    }
    found: list[Comparison] = []
    for operation in COMPARED:
        if found and left() <= 0:
            break
        args, options = inputs[operation]
        found.append(compare(operation, *args, **options))
    return found
