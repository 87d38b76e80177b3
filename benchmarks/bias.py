"""How far the fast hashes are from their ideal: the suite ``bias``.

With Gaussian hyperplanes, codes collide with probability ``(1 - theta / pi)**tau`` exactly. With
random signs and Hadamard transforms they do so only nearly. Three measurements: the difference
itself of the paper's layout, by dimension and code length; for settings that people use, the
*relative* difference of both layouts and of planes, on several kinds of vectors; and what the
default rotations of a chain promise (`yoso_core.benchmarks.promise`). A weight of 0.0005 that is
half as large as it should be is 0.00025 off, and wrong by 50%.
"""

import platform
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks import promise
from yoso_core.benchmarks.directions import kinds_here, missing_words
from yoso_core.benchmarks.promise import (
    LEAST_GROUPS,
    Hash,
    Result,
    Setting,
    Track,
    collisions,
    groups_for,
    relative,
    variance_ratio,
)
from yoso_core.benchmarks.tables import markdown
from yoso_core.files import write_json
from yoso_core.reference import expected_weight

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

ERRORS = {0.0: 0.015, 0.5: 0.003, 0.7: 0.003, 0.9: 0.003}
"""The standard errors of the relative bias to aim at, by cosine."""
COSINES = tuple(ERRORS)
HASHES: tuple[Hash, ...] = ("paper", "chained", "planes")
VARIANCE_BOUND = 1.03
"""The tests hold that the variance of the mean over m hashes of a chain, times m, is at most so
many times that of a single hash.
"""


def rounds(hash: Hash, setting: Setting) -> int | None:
    """Rounds of signs and a Hadamard transform for a vector; planes have none."""
    return None if hash == "planes" else setting.rounds(hash)


def rows(kinds: list[str]) -> list[tuple[Setting, str, Hash]]:
    """Of the table of relative biases. Only a chain has rotations to choose. Whether Gaussian
    planes separate two vectors depends on their angle alone, so they are measured on one kind.
    """
    wanted: dict[Hash, Callable[[Setting, str], bool]] = {
        "paper": lambda setting, kind: setting.rotations is None,
        "chained": lambda setting, kind: True,
        "planes": lambda setting, kind: setting.rotations is None and kind == "Gaussian",
    }
    return [row for row in product(SETTINGS, kinds, HASHES) if wanted[row[2]](*row[:2])]


def relative_cells(track: Track, *, scale: float = 1.0, least: int = LEAST_GROUPS) -> list[Result]:
    """Every setting, kind of vectors and hash, at every cosine: the relative bias, and the variance
    of the mean over the hashes.
    """
    cells = []
    for setting, kind, hash in track(rows(kinds_here())):
        cell: Result = {**asdict(setting), "kind": kind, "hash": hash, "rounds": rounds(hash, setting), "cosines": list(COSINES)}
        columns: tuple[list[float], ...] = ([], [], [], [])
        for cosine in COSINES:
            groups = groups_for(setting, cosine, scale * ERRORS[cosine], num_hash=setting.num_hash, least=least)
            found = collisions(hash, kind, setting, cosine, groups=groups)
            numbers = *relative(found[:, 1], cosine, setting.hash_code_len), *variance_ratio(found, setting.num_hash)
            for column, number in zip(columns, numbers, strict=True):
                column.append(number)
        names = "bias", "standard_error", "variance", "variance_standard_error"
        cells.append(cell | dict(zip(names, columns, strict=True)))
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
    absolute, scale, least = (256, 20, 2) if quick else (DRAWS, 1, promise.LEAST_GROUPS)
    results: Result = {
        "suite": "bias",
        "quick": quick,
        "left_out": missing_words(),
        "settings": {
            "num_hash": NUM_HASH,
            "draws": absolute,
            "pairs": PAIRS,
            "relative_pairs": promise.PAIRS,
            "relative_draws": promise.DRAWS,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "cells": [measure(dim, tau, draws=absolute) for dim, tau in tracked(list(product(DIMS, CODE_LENS)), description="bias")],
        "relative": relative_cells(partial(tracked, description="relative bias"), scale=scale, least=least),
        "promise": promise.promise_cells(partial(tracked, description="promise"), scale=scale, least=least),
        "near": promise.near_cells(partial(tracked, description="one-hot near 45 degrees"), scale=scale, least=least),
    }
    path = output / f"hadamard_bias{'-quick' if quick else ''}.json"
    write_json(path, results)
    tables = promise.promise_table, promise.near_table, relative_table, variance_table, bias_table
    console.print(*(Markdown(table(results)) for table in tables), Markdown(promise.rounds_table()))
    return path


def setting_name(cell: Result) -> str:
    name = f"{cell['dim']}, {cell['hash_code_len']}, {cell['num_hash']}"
    return name if cell["rotations"] is None else f"{name}; {cell['rotations']} rotations"


def relative_table(results: Result) -> str:
    """The relative differences in percent with their standard errors, in Markdown: a row for every
    setting, kind of vectors and hash, a column for every cosine.
    """
    header = ["d, tau, m", "vectors", "hash", "rounds", *(f"cosine {cosine:g}" for cosine in results["relative"][0]["cosines"])]
    lines = []
    for cell in results["relative"]:
        percent = [f"{100 * bias:+.1f} ± {100 * error:.1f}%" for bias, error in zip(cell["bias"], cell["standard_error"], strict=True)]
        lines.append([setting_name(cell), cell["kind"], cell["hash"], "" if cell["rounds"] is None else cell["rounds"], *percent])
    return markdown(header, lines, left=3)


def variance_table(results: Result) -> str:
    """The smallest and the largest variance of a mean over the kinds and cosines, times the number
    of hashes, over that of a single hash, in Markdown: a row for every setting and hash.
    """
    found: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for cell in results["relative"]:
        columns = (cell[name] for name in ("variance", "variance_standard_error", "cosines"))
        shown = [(ratio, f"{ratio:.3f} ± {error:.3f}, {cell['kind']} at {cosine:g}") for ratio, error, cosine in zip(*columns, strict=True)]
        found.setdefault((setting_name(cell), cell["hash"]), []).extend(shown)
    lines = ([*key, min(ends)[1], max(ends)[1]] for key, ends in found.items())
    return markdown(["d, tau, m", "hash", "smallest", "largest"], lines, left=2)


def bias_table(results: Result) -> str:
    """The largest differences with their standard errors, in Markdown: a row for every D, a column
    for every tau.
    """
    cells = {(cell["dim"], cell["hash_code_len"]): cell for cell in results["cells"]}
    taus = sorted({tau for _, tau in cells})
    lines = []
    for dim in sorted({dim for dim, _ in cells}):
        found = [cells[dim, tau] for tau in taus]
        lines.append([dim, *(f"{cell['largest']:.4f} ± {cell['largest_standard_error']:.4f}" for cell in found)])
    return markdown(["D", *(f"tau = {tau}" for tau in taus)], lines, left=0)
