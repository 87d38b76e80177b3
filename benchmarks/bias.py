"""How far the fast hashes are from their ideal: the suite ``bias``.

With Gaussian hyperplanes, codes collide with probability ``(1 - theta / pi)**tau`` exactly. With
random signs and Hadamard transforms they do so only nearly. Three measurements: the difference
itself of the paper's layout, by dimension and code length; for settings that people use, the
*relative* difference of both layouts and of planes, on several kinds of vectors; and what the
default rotations of a chain promise (`yoso_core.benchmarks.promise`). A weight of 0.0005 that is
half as large as it should be is 0.00025 off, and wrong by 50%.
"""

import json
import platform
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

import yoso_core
from yoso_core.benchmarks import promise
from yoso_core.benchmarks.directions import kinds_here, missing_words, pairs_at_cosine
from yoso_core.benchmarks.promise import Result, Setting, Track, setting_name
from yoso_core.files import written
from yoso_core.reference import expected_weight
from yoso_core.reference.hashing import Layout

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
    signs = yoso_core.sample_signs(NUM_HASH, hash_code_len, dim, batch_shape=(draws,), layout="paper", rng=rng)
    code = yoso_core.fast_hash(vectors.reshape(draws, -1, dim), signs, NUM_HASH, hash_code_len, layout="paper", variant=variant)
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


SETTINGS = (Setting(32, 11, 32), Setting(64, 9, 64), Setting(64, 8, 32), Setting(64, 8, 32, rotations=8), Setting(128, 12, 32))
"""The paper's own for the Long Range Arena and for BERT, and others."""

COSINES = (0.0, 0.5, 0.7, 0.9)
HASHES = ("paper", "chained", "planes")
RELATIVE_DRAWS = 600
RELATIVE_PAIRS = 1000
"""Pairs of vectors at one angle in a draw."""


def relative(
    hash: str, kind: str, setting: Setting, cosine: float, *, draws: int = RELATIVE_DRAWS, pairs: int = RELATIVE_PAIRS
) -> tuple[float, float]:
    """``mean collision rate / expected weight - 1`` over draws, and its standard error."""
    numbers = setting.num_hash, setting.hash_code_len, setting.dim
    rng = np.random.default_rng([setting.dim, setting.hash_code_len, round(100 * cosine)])
    rates = []
    for _ in range(draws):
        vectors = pairs_at_cosine(kind, cosine, pairs, setting.dim, rng)
        if hash == "planes":
            planes = yoso_core.sample_planes(*numbers, rng=rng)
            codes = yoso_core.hyperplane_hash(vectors, planes, *numbers[:2])
        else:
            layout = cast(Layout, hash)
            rotations = setting.rotations if layout == "chained" else None
            signs = yoso_core.sample_signs(*numbers, layout=layout, rotations=rotations, rng=rng)
            codes = yoso_core.fast_hash(vectors, signs, *numbers[:2], layout=layout)
        rates.append(np.mean(codes[0] == codes[1]))
    ratio = np.array(rates) / expected_weight(np.arccos(cosine), setting.hash_code_len)
    return float(ratio.mean() - 1), float(ratio.std(ddof=1) / np.sqrt(draws))


def rounds(hash: str, setting: Setting) -> int | None:
    """Rounds of signs and a Hadamard transform for a vector; planes have none."""
    return None if hash == "planes" else setting.rounds(cast(Layout, hash))


def relative_cells(track: Track, *, draws: int = RELATIVE_DRAWS) -> list[Result]:
    """Every setting, kind of vectors and hash, at every cosine."""
    cells = []
    for setting, kind, hash in track(list(product(SETTINGS, kinds_here(), HASHES))):
        found = [relative(hash, kind, setting, cosine, draws=draws) for cosine in COSINES]
        cell = {**asdict(setting), "kind": kind, "hash": hash, "rounds": rounds(hash, setting), "cosines": list(COSINES)}
        cells.append(cell | {"bias": [bias for bias, _ in found], "standard_error": [error for _, error in found]})
    return cells


def run_bias(output: Path, *, quick: bool = False, progress: bool = True) -> Path:
    """Measure every dimension and code length, every setting, and the promise, always from the same
    seeds. Print the tables, and write ``hadamard_bias.json``, whose path is returned.

    ``quick``: with few draws, to see that the benchmark works, into ``hadamard_bias-quick.json``.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

    console = Console()
    if reason := missing_words():
        console.print(f"words are left out: {reason}")
    tracked = partial(track, disable=not progress, transient=True)
    absolute, draws = (256, 10) if quick else (DRAWS, RELATIVE_DRAWS)
    few: dict[str, Any] = {"least": 2} if quick else {}
    results: Result = {
        "suite": "bias",
        "quick": quick,
        "left_out": missing_words(),
        "settings": {
            "num_hash": NUM_HASH,
            "draws": absolute,
            "pairs": PAIRS,
            "relative_draws": draws,
            "relative_pairs": RELATIVE_PAIRS,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "cells": [measure(dim, tau, draws=absolute) for dim, tau in tracked(list(product(DIMS, CODE_LENS)), description="bias")],
        "relative": relative_cells(partial(tracked, description="relative bias"), draws=draws),
        "promise": promise.promise_cells(partial(tracked, description="promise"), **few, share=3 if quick else promise.SHARE),
        "near": promise.near_cells(partial(tracked, description="one-hot near 45 degrees"), **few, error=0.1 if quick else 0.003),
        "variance": promise.variance_cells(SETTINGS, partial(tracked, description="variance"), **few, error=0.2 if quick else 0.01),
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"hadamard_bias{'-quick' if quick else ''}.json"
    with written(path) as part:
        part.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    tables = promise.promise_table, promise.near_table, promise.variance_table, relative_table, bias_table
    console.print(*(Markdown(table(results)) for table in tables), Markdown(promise.rounds_table()))
    return path


def relative_table(results: Result) -> str:
    """The relative differences in percent with their standard errors, in Markdown: a row for every
    setting, kind of vectors and hash, a column for every cosine.
    """
    first = results["relative"][0]
    header = ["d, tau, m", "vectors", "hash", "rounds", *(f"cosine {cosine:g}" for cosine in first["cosines"])]
    lines = [header, ["---"] * 3 + ["---:"] * (1 + len(first["cosines"]))]
    for cell in results["relative"]:
        percent = [f"{100 * bias:+.1f} ± {100 * error:.1f}%" for bias, error in zip(cell["bias"], cell["standard_error"], strict=True)]
        lines.append([setting_name(cell), cell["kind"], cell["hash"], "" if cell["rounds"] is None else str(cell["rounds"]), *percent])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
