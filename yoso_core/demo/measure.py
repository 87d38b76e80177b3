"""What the demo measures: who attends to whom, how the error falls, how the time grows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from yoso_core.arrays import Array
from yoso_core.comparison import Comparison, compare
from yoso_core.demo.words import Passage
from yoso_core.ops import expectation_attention, fast_hash, lsh_cumulation, sample_signs, yoso_attention

SOFTMAX, EXPECTATION, SAMPLED = METHODS = ("softmax", "expectation", "sampled")

Attention = Callable[[Array, Array, Array], Array]
"""``(query, key, value) -> out``, one head."""


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


def attention_methods(num_hash: int, hash_code_len: int, scale: float, seed: int) -> dict[str, Attention]:
    """The three ways to attend, by name; YOSO's outputs are normalized as in a model."""
    return {
        SOFTMAX: lambda q, k, v: softmax_attention(q, k, v, scale),
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
    slope: float
    """Of ``log rms`` against ``log m``: -1/2 for an average of independent, unbiased hashes."""


def sampling_error(x: Array, nums_hash: list[int], hash_code_len: int, hashes: int, rng: np.random.Generator) -> SamplingError:
    """RMS error of self-attention over ``x (n, d)`` relative to the expectation, for every number
    of hashes ``m``.

    Each ``m`` is given ``hashes / m`` independent draws. The outputs are not normalized: it is the
    plain sum that sampling estimates without bias, and whose error falls as ``1 / sqrt(m)``.
    """
    exact = yoso_attention(x, x, x, hash_code_len=hash_code_len, use_expectation=True, normalize_output=False)
    rms = []
    for m in nums_hash:
        squares = [
            np.mean((yoso_attention(x, x, x, num_hash=m, hash_code_len=hash_code_len, rng=rng, normalize_output=False) - exact) ** 2)
            for _ in range(max(1, hashes // m))
        ]
        rms.append(float(np.sqrt(np.mean(squares) / np.mean(exact**2))))
    return SamplingError(nums_hash, rms, float(np.polyfit(np.log(nums_hash), np.log(rms), 1)[0]))


def attention_times(passage: Passage, lengths: list[int], methods: dict[str, Attention], repeats: int) -> dict[str, list[float]]:
    """Median seconds of self-attention over the ``n`` tokens in the middle, for each method and
    each length.

    One call of each warms up, then all take turns, so that a busy moment of the machine does not
    fall on one alone.
    """
    samples: dict[str, list[list[float]]] = {name: [[] for _ in lengths] for name in methods}
    inputs = [passage.middle(n).vectors for n in lengths]
    for attend in methods.values():
        attend(inputs[0], inputs[0], inputs[0])
    for _ in range(repeats):
        for i, x in enumerate(inputs):
            for name, attend in methods.items():
                start = time.perf_counter()
                attend(x, x, x)
                samples[name][i].append(time.perf_counter() - start)
    return {name: [median(times) for times in rows] for name, rows in samples.items()}


def variant_agreement(x: Array, num_hash: int, hash_code_len: int, seed: int) -> list[Comparison]:
    """Every variant of the operations that the demo rests on, against the definition in float64, on
    the tokens ``x (n, d)``.
    """
    signs = sample_signs(num_hash, hash_code_len, x.shape[1], rng=seed)
    codes = fast_hash(x, signs, num_hash, hash_code_len)
    return [
        compare("fast_hash", x, signs, num_hash, hash_code_len),
        compare("lsh_cumulation", codes, codes, x, 1 << hash_code_len),
        compare("expectation_attention", x, x, x, hash_code_len),
        compare("yoso_attention", x, x, x, num_hash=num_hash, hash_code_len=hash_code_len, signs=signs),
    ]
