"""Time to the same error: the last part of the suite ``error``.

What 32 plain hashes in the paper's layout leave of relative squared error is the mark. How many
hashes does a chain need to get there, with how many bits beyond ``tau``, and in how much time? The
error is that of rows before they are scaled to unit length, noise and bias together.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks.tables import markdown

Result = dict[str, Any]
Array = np.ndarray[Any, Any]
Track = Callable[[list[Any]], Iterable[Any]]

LENGTHS = (4_096, 16_384, 65_536)
DIM, HEADS, TAU, MARK = 64, 12, 8, 32
PROBES, DRAWS, REPEATS = 256, 30, 5
OVERSAMPLE = (0, 1, 2, 3)


def _normal(rng: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """Query, key and value have nothing to do with each other."""
    query, key, value = rng.standard_normal((3, 1, n, DIM), dtype=np.float32)
    return query, key, value


def _clusters(rng: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """Queries and keys about sixteen centers; values that have nothing to do with them."""
    centers, at = rng.standard_normal((16, DIM)), rng.integers(16, size=(2, n))
    query, key = (centers[at] + 0.4 * rng.standard_normal((2, n, DIM))).astype(np.float32)
    return query[None], key[None], rng.standard_normal((1, n, DIM), dtype=np.float32)


def _one_set(rng: np.random.Generator, n: int) -> tuple[Array, Array, Array]:
    """Query, key and value are the same vectors in random directions: keys that fall into a bucket
    together have values that point the same way.
    """
    x = rng.standard_normal((1, n, DIM), dtype=np.float32)
    return x, x, x


KINDS = {"normal": _normal, "clusters": _clusters, "normal, one set": _one_set}


def squared_error(inputs: tuple[Array, Array, Array], exact: Array, options: Mapping[str, Any], draws: int) -> tuple[float, float]:
    """``mean |y - E y|**2 / mean |E y|**2`` over the probes, and its standard error over draws."""
    found = []
    for draw in range(draws):
        y = yoso_core.yoso_attention(*inputs, hash_code_len=TAU, normalize_output=False, rng=draw, **options)
        found.append(float(np.sum((y - exact) ** 2, dtype=np.float64) / np.sum(exact**2, dtype=np.float64)))
    return float(np.mean(found)), float(np.std(found, ddof=1) / np.sqrt(draws))


def equal_hashes(inputs: tuple[Array, Array, Array], exact: Array, mark: float, oversample: int, draws: int) -> tuple[int, float, float]:
    """Hashes of a chain that do not pass the mark, as few as may be, the error that they leave, and
    its standard error: guessed by ``1 / m`` from a few, measured, and guessed again.
    """
    m, left, uncertain = 16, np.inf, np.inf
    for _ in range(3):
        left, uncertain = squared_error(inputs, exact, {"num_hash": m, "oversample": oversample}, draws)
        needed = max(1, int(np.ceil(m * left / mark)))
        if needed == m:
            break
        m, left = needed, left * m / needed
    return m, left, uncertain


def seconds_in_turns(calls: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Each call's times, all of them in turns, after one that does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                found.append(time.perf_counter() - start)
    return times


def measure_equal_error(kind: str, n: int, *, draws: int = DRAWS, repeats: int = REPEATS) -> list[Result]:
    """A row for the mark, and one for a chain with each ``s``."""
    rng = np.random.default_rng(n)
    query, key, value = KINDS[kind](rng, n)
    probes = (query[:, rng.choice(n, min(PROBES, n), replace=False)], key, value)
    exact = yoso_core.expectation_attention(*probes, TAU)
    paper = {"num_hash": MARK, "layout": "paper"}
    mark, uncertain = squared_error(probes, exact, paper, draws)
    rows: list[Result] = [{"layout": "paper", "oversample": 0, "num_hash": MARK, "error": mark, "standard_error": uncertain}]
    options: list[dict[str, Any]] = [paper]
    for s in OVERSAMPLE:
        m, left, uncertain = equal_hashes(probes, exact, mark, s, draws)
        rows.append({"layout": "chained", "oversample": s, "num_hash": m, "error": left, "standard_error": uncertain})
        options.append({"num_hash": m, "oversample": s})
    whole = [np.repeat(x, HEADS, axis=0) for x in (query, key, value)]

    def timed(chosen: dict[str, Any]) -> Callable[[], Any]:
        return lambda: yoso_core.yoso_attention(*whole, hash_code_len=TAU, rng=0, **chosen)

    for row, seconds in zip(rows, seconds_in_turns([timed(chosen) for chosen in options], repeats), strict=True):
        row |= {"kind": kind, "n": n, "seconds": seconds}
    return rows


def equal_error_cells(track: Track, *, lengths: Iterable[int] = LENGTHS, draws: int = DRAWS, repeats: int = REPEATS) -> list[Result]:
    """Every kind of input at every length."""
    wanted = [(kind, n) for kind in KINDS for n in lengths]
    return [row for kind, n in track(wanted) for row in measure_equal_error(kind, n, draws=draws, repeats=repeats)]


def equal_error_table(results: Result) -> str:
    """In Markdown: a row for each kind and length, a column for each choice: its hashes, and how
    many times faster than the mark it is, by medians.
    """
    rows = results["equal_error"]
    chains = sorted({row["oversample"] for row in rows})
    header = ["vectors", "n", "squared error", f"paper, m = {MARK}", *(f"chain, s = {s}" for s in chains)]
    lines = []
    for kind, n in dict.fromkeys((row["kind"], row["n"]) for row in rows):
        here = [row for row in rows if (row["kind"], row["n"]) == (kind, n)]
        first, *others = here
        base = median(first["seconds"])
        cells = [f"m = {row['num_hash']}: {base / median(row['seconds']):.2f}x" for row in others]
        lines.append([kind, f"{n:,}", f"{first['error']:.3f} ± {first['standard_error']:.3f}", f"{1e3 * base:.0f} ms", *cells])
    return markdown(header, lines, left=1)
