"""How far the Hadamard hash is from its ideal: the suite ``bias``.

With Gaussian hyperplanes, codes collide with probability ``(1 - theta / pi)**tau`` exactly. With
three rounds of random signs and a Hadamard transform they do so only in the limit of a large
dimension ``D``. This suite measures the difference.
"""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

import yoso_core
from yoso_core.files import written
from yoso_core.reference import expected_weight

Result = dict[str, Any]
Array = np.ndarray[Any, Any]

DIMS = (1, 2, 4, 8, 16, 32, 64, 128)
CODE_LENS = (1, 2, 4, 8, 9)
ANGLES = 15
"""Angles pi/16, 2 pi/16, ... 15 pi/16. In one dimension there are only two, 0 and pi."""
NUM_HASH = 32
BOUND = 0.01
"""The tests hold that no difference is larger where D >= 64 and tau <= 9, for vectors in random
directions.
"""
DRAWS = 4096
"""Independent draws of the signs. The standard error comes from their spread, since codes of one
draw depend on each other.
"""
PAIRS = 4
"""Pairs of vectors, in random directions, at every angle of every draw."""


def pairs_at_angles(dim: int, rng: np.random.Generator, draws: int, pairs: int) -> tuple[Array, Array]:
    """Angles ``(a,)``, and unit vectors ``(draws, pairs, 1 + a, dim)``: a first one, and one at
    each angle from it.
    """
    if dim == 1:
        first = rng.choice([-1.0, 1.0], size=(draws, pairs, 1, 1))
        return np.array([0.0, np.pi]), np.concatenate([first, first, -first], axis=2).astype(np.float32)
    theta = np.pi * np.arange(1, ANGLES + 1) / (ANGLES + 1)
    first = rng.standard_normal((draws, pairs, 1, dim))
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    other = rng.standard_normal((draws, pairs, ANGLES, dim))
    other -= np.sum(other * first, axis=-1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    turned = np.cos(theta)[:, None] * first + np.sin(theta)[:, None] * other
    return theta, np.concatenate([first, turned], axis=2).astype(np.float32)


def measure(dim: int, hash_code_len: int, *, draws: int = DRAWS, pairs: int = PAIRS, variant: str | None = None) -> Result:
    """The largest difference over the angles between the measured probability of a collision and
    its ideal, with its standard error.
    """
    rng = np.random.default_rng([dim, hash_code_len])
    theta, vectors = pairs_at_angles(dim, rng, draws, pairs)
    signs = yoso_core.sample_signs(NUM_HASH, hash_code_len, dim, batch_shape=(draws,), rng=rng)
    code = yoso_core.fast_hash(vectors.reshape(draws, -1, dim), signs, NUM_HASH, hash_code_len, variant=variant)
    code = code.reshape(draws, pairs, 1 + len(theta), NUM_HASH)
    rate = (code[:, :, 1:] == code[:, :, :1]).mean(axis=(1, 3))  # (draws, angles)
    bias = rate.mean(axis=0) - expected_weight(theta, hash_code_len)
    error = rate.std(axis=0, ddof=1) / np.sqrt(draws)
    worst = int(np.argmax(np.abs(bias)))
    return {
        "dim": dim,
        "hash_code_len": hash_code_len,
        "angles": theta.tolist(),
        "bias": bias.tolist(),
        "standard_error": error.tolist(),
        "largest": float(np.abs(bias[worst])),
        "largest_standard_error": float(error[worst]),
        "largest_angle": float(theta[worst]),
    }


def run_bias(output: Path, *, progress: bool = True) -> Path:
    """Measure every dimension and code length, always from the same seeds. Print the table, and
    write ``hadamard_bias.json``, whose path is returned.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

    cells = [(dim, tau) for dim in DIMS for tau in CODE_LENS]
    results: Result = {
        "suite": "bias",
        "settings": {"num_hash": NUM_HASH, "draws": DRAWS, "pairs": PAIRS, "python": platform.python_version(), "numpy": np.__version__},
        "cells": [measure(dim, tau) for dim, tau in track(cells, "bias", disable=not progress, transient=True)],
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / "hadamard_bias.json"
    with written(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    Console().print(Markdown(bias_table(results)))
    return path


def bias_table(results: Result) -> str:
    """The largest differences with their standard errors, in Markdown: a row for every D, a column
    for every tau.
    """
    cells = {(cell["dim"], cell["hash_code_len"]): cell for cell in results["cells"]}
    taus = sorted({tau for _, tau in cells})
    lines = [["D", *(f"tau = {tau}" for tau in taus)], ["---:"] * (1 + len(taus))]
    for dim in sorted({dim for dim, _ in cells}):
        found = [cells[dim, tau] for tau in taus]
        lines.append([str(dim), *(f"{cell['largest']:.4f} ± {cell['largest_standard_error']:.4f}" for cell in found)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
