"""From a text to token vectors, by counting alone: words, co-occurrence, PPMI, a truncated SVD.

Nothing is downloaded and nothing is trained. Words that keep the same company end up with similar
vectors, which is what attention needs.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from yoso_core.arrays import Array

MAX_CHARACTERS = 5_000_000
"""More of a file is not used: the statistics have settled long before."""

MIN_TOKENS, MIN_WORDS = 512, 64
"""Below this a text has too little to say: tokens left to use, and different words among them."""

MIN_COUNT, MAX_WORDS = 5, 4096
"""The vocabulary: words seen at least so often, and at most so many of them."""

WINDOW = 5
"""Words this far apart, or nearer, count as company."""

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
POSSESSIVE = re.compile(r"'s\b")


def read_text(path: Path | None) -> tuple[str, str]:
    """``(name, text)`` of the user's UTF-8 file, or of the language reference that every CPython
    carries for its ``help()``.

    Raises ``ValueError`` for a file that cannot be read, is empty, or is no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "Python's own help topics", "\n\n".join(topics.values())
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if "\0" in text:
        raise ValueError(f"text: {path} is not text: it holds NUL characters")
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    name = path.name if len(text) <= MAX_CHARACTERS else f"the first {MAX_CHARACTERS:,} characters of {path.name}"
    return name, text[:MAX_CHARACTERS]


def prose(text: str) -> str:
    """The paragraphs that are prose, each once: at least 85% letters, which leaves out code, tables
    and rulers; spaces do not count.
    """

    def is_prose(paragraph: str) -> bool:
        characters = "".join(paragraph.split())
        return sum(map(str.isalpha, characters)) >= 0.85 * max(len(characters), 1)

    paragraphs = dict.fromkeys(paragraph.strip() for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(filter(is_prose, paragraphs))


def tokenize(text: str) -> list[str]:
    """Lower-cased words. Digits, punctuation and the 's of "Ann's" are dropped.

    >>> tokenize("Don't wait: at 3 o'clock Ann’s train leaves.")
    ["don't", 'wait', 'at', "o'clock", 'ann', 'train', 'leaves']
    """
    return WORD.findall(POSSESSIVE.sub("", text.lower().replace("’", "'")))


def cooccurrence(ids: Array, num_words: int, window: int) -> Array:
    """``counts[a, b]``: how often words ``a`` and ``b`` stand at most ``window`` places apart.
    Symmetric, float32 ``(V, V)``.
    """
    flat = np.zeros(num_words**2, np.float32)
    for distance in range(1, window + 1):
        flat += np.bincount(ids[:-distance] * num_words + ids[distance:], minlength=num_words**2)
    counts: Array = flat.reshape(num_words, num_words)
    return counts + counts.T


def ppmi(counts: Array, smoothing: float = 0.75) -> Array:
    """Positive pointwise mutual information: ``max(0, log(p(a, b) / (p(a) p'(b))))``, with
    ``p'(b)`` proportional to ``p(b)**smoothing``.

    How much more often than by chance two words meet. The smoothing raises rare contexts, which
    chance would otherwise favor (Levy, Goldberg and Dagan 2015, "Improving distributional
    similarity with lessons learned from word embeddings").
    """
    word = counts.sum(axis=1) / counts.sum()
    context = word**smoothing / np.sum(word**smoothing)
    chance = word[:, None] * context
    ratio = np.divide(counts / counts.sum(), chance, out=np.zeros_like(counts), where=chance > 0)
    return np.log(np.maximum(ratio, 1))


def truncated_svd(matrix: Array, rank: int, rng: np.random.Generator, power_steps: int = 4) -> tuple[Array, Array, Array]:
    """``U (n, rank)``, ``s (rank,)``, ``Vt (rank, n)`` with ``U diag(s) Vt`` close to the best
    approximation of that rank.

    A random projection finds the space of the largest singular vectors, power steps sharpen it, and
    a small exact SVD finishes (Halko, Martinsson and Tropp 2011, "Finding structure with
    randomness").
    """
    sketch = matrix @ rng.standard_normal((matrix.shape[1], min(rank + 16, matrix.shape[1])), dtype=np.float32)
    basis = np.linalg.qr(sketch)[0]
    for _ in range(power_steps):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], vt[:rank]


def unit(x: Array) -> Array:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def word_vectors(ids: Array, num_words: int, dim: int, rng: np.random.Generator) -> Array:
    """One unit vector ``(V, dim)`` to a word: the leading singular vectors of the PPMI matrix, each
    times the root of its singular value.

    Centerd on the text's average word, so that words without anything in common are at right
    angles, not all in one corner.
    """
    u, s, _ = truncated_svd(ppmi(cooccurrence(ids, num_words, WINDOW)), dim, rng)
    vectors = u * np.sqrt(s)
    return unit(vectors - vectors[ids].mean(axis=0))


def token_vectors(vectors: Array, ids: Array, reach: int = 3) -> Array:
    """One unit vector ``(n, dim)`` to a token: its word's vector plus the mean of those of its
    neighbors, centerd again.

    So the same word in two places has two vectors, near each other where the places speak of the
    same thing.
    """
    own = vectors[ids]
    around = np.zeros_like(own)
    for distance in range(1, reach + 1):
        around[distance:] += own[:-distance]
        around[:-distance] += own[distance:]
    mixed = own + around / (2 * reach)
    return unit(mixed - mixed.mean(axis=0)).astype(np.float32)


@dataclass(frozen=True)
class Passage:
    """A run of tokens: which word each is, and its vector."""

    words: list[str]
    ids: Array
    """int ``(n,)``: token ``i`` is ``words[ids[i]]``."""
    vectors: Array
    """float32 ``(n, dim)``, of unit length."""

    def __len__(self) -> int:
        return len(self.ids)

    def middle(self, length: int) -> "Passage":
        """The ``length`` tokens around the middle, or all if there are fewer, with only the words
        that occur in them.
        """
        start = max(0, (len(self) - length) // 2)
        present, ids = np.unique(self.ids[start : start + length], return_inverse=True)
        return Passage([self.words[i] for i in present], ids, self.vectors[start : start + length])


def embed(text: str, dim: int, rng: np.random.Generator) -> Passage:
    """The whole text as a passage: its frequent words in their order, rarer ones left out.

    Raises ``ValueError`` when too little is left.
    """
    tokens = tokenize(prose(text))
    words = [word for word, count in Counter(tokens).most_common(MAX_WORDS) if count >= MIN_COUNT]
    number = {word: i for i, word in enumerate(words)}
    ids = np.array([number[token] for token in tokens if token in number], np.int64)
    if len(ids) < MIN_TOKENS or len(words) < MIN_WORDS:
        raise ValueError(
            f"text: too short: need at least {MIN_TOKENS} words of running prose, of {MIN_WORDS} different kinds that occur "
            f"{MIN_COUNT} times or more; found {len(ids)} of {len(words)} kinds"
        )
    return Passage(words, ids, token_vectors(word_vectors(ids, len(words), dim, rng), ids))
