"""How far the error bar and the plan are from what happens: the suite ``error``.

Three measurements. The variance of a single hash on pairs of vectors, beside its closed form. The
coverage of the error bar: how often the expectation lies within as many standard errors as
Student's distribution says. And the mean cosine of rows with their expectation, beside what
`yoso_core.plan` predicts. Each number has its standard error over draws of the hashes.
"""

import importlib.util
import math
import platform
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import yoso_core
from yoso_core.benchmarks.directions import MINILM, pairs_at_cosine
from yoso_core.benchmarks.equal_error import LENGTHS, equal_error_cells, equal_error_table
from yoso_core.benchmarks.machines import where
from yoso_core.benchmarks.tables import markdown
from yoso_core.demo import words
from yoso_core.files import write_json
from yoso_core.planning import overlap_shares, plan, weigher
from yoso_core.reference import expectation_attention, expected_weight, l2_normalize

Result = dict[str, Any]
Array = np.ndarray[Any, Any]
Track = Callable[[list[Any]], Iterable[Any]]

DRAWS = 30
"""Of the hashes, independent of each other, for every number about whole rows."""
NUM_VECTORS, DIM = 1024, 64
ROWS = 128
"""Of a head, spread over it, are looked at."""


# Six kinds of input: query, key and value, float32 (heads, n, d)


def _normal(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Query, key and value are the same vectors in random directions."""
    x = rng.standard_normal((1, NUM_VECTORS, DIM))
    return x, x, x


def _clusters(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Sixteen centers; a value is that of its key's center, plus noise."""
    centers, at = rng.standard_normal((16, DIM)), rng.integers(16, size=(2, NUM_VECTORS))
    query, key = centers[at] + 0.4 * rng.standard_normal((2, NUM_VECTORS, DIM))
    return query[None], key[None], (centers[at[1]] + rng.standard_normal((NUM_VECTORS, DIM)))[None]


def _cone(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """All queries and keys about one axis, and values that have nothing in common."""
    axis = rng.standard_normal(DIM)
    query, key = axis + rng.standard_normal((2, NUM_VECTORS, DIM))
    return query[None], key[None], rng.standard_normal((1, NUM_VECTORS, DIM))


def _walk(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Each vector shares seven of eight steps with the one before it, as neighbors in a text."""
    steps = np.cumsum(rng.standard_normal((NUM_VECTORS + 8, DIM)), axis=0)
    x = (steps[8:] - steps[:-8])[None]
    return x, x, x


def _words(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Word vectors of a real text, those of `yoso_core.demo`."""
    x = words.embed(words.read_text(None)[1], DIM, rng).middle(NUM_VECTORS).vectors[None]
    return x, x, x


def encoder_missing() -> str | None:
    """Why there is no trained encoder here; ``None`` where there is one."""
    missing = [name for name in (MINILM, "torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def _encoder(rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Query, key and value of 4 heads of 32 dims, in the fourth layer of MiniLM, over 512 tokens of
    the same text.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(importlib.import_module(MINILM).get_model_path())
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    attention = model.encoder.layer[3].attention.self
    found: dict[str, Array] = {}

    def keep(name: str, module: Any, inputs: Any, output: Any) -> None:
        found[name] = output[0].reshape(len(output[0]), 12, -1).transpose(0, 1)[::3].numpy()

    for name in ("query", "key", "value"):
        getattr(attention, name).register_forward_hook(partial(keep, name))
    tokens = tokenizer(words.prose(words.read_text(None)[1])[:20_000], return_tensors="pt", truncation=True, max_length=512)
    with torch.no_grad():
        model(**tokens)
    return found["query"], found["key"], found["value"]


KINDS: dict[str, Callable[[np.random.Generator], tuple[Array, Array, Array]]] = {
    "normal": _normal,
    "clusters": _clusters,
    "cone": _cone,
    "walk": _walk,
    "words": _words,
    "encoder": _encoder,
}


def inputs(kind: str) -> tuple[Array, Array, Array]:
    """Query, key and value of that kind, float32, always the same."""
    query, key, value = KINDS[kind](np.random.default_rng(0))
    return query.astype(np.float32), key.astype(np.float32), value.astype(np.float32)


# (a) The variance of a single hash

TAUS, OVERSAMPLES, HASHES = (4, 8, 12), (0, 1, 2, 3, 4), ("chained", "planes")
PAIR_COSINES = (0.5, 0.8)
PAIRS, PAIR_HASHES, PAIR_DRAWS = 1500, 32, 60


def pair_variance(tau: int, s: int, cosine: float) -> float:
    """``sum_l C(tau, l) C(s, l) / C(tau + s, tau) p**(tau + l) - p**(2 tau)``: of the weight of one
    pair in one hash.
    """
    p = 1 - math.acos(cosine) / math.pi
    return float(sum(share * p ** (tau + left) for left, share in enumerate(overlap_shares(tau, s))) - p ** (2 * tau))


def measured_pair_variance(
    hash: str, tau: int, s: int, cosine: float, *, draws: int = PAIR_DRAWS, pairs: int = PAIRS
) -> tuple[float, float]:
    """The mean square of ``W - p**tau`` over pairs and hashes, with its standard error over
    draws.
    """
    rng = np.random.default_rng([tau, s, round(100 * cosine)])
    mean, weigh = expected_weight(np.arccos(cosine), tau), weigher(tau, s)
    found = []
    for _ in range(draws):
        vectors = pairs_at_cosine("Gaussian", cosine, pairs, DIM, rng)
        if hash == "planes":
            codes = yoso_core.hyperplane_hash(vectors, yoso_core.sample_planes(PAIR_HASHES, tau + s, DIM, rng=rng), PAIR_HASHES, tau + s)
        else:
            signs = yoso_core.sample_signs(PAIR_HASHES, tau + s, DIM, layout="chained", rng=rng)
            codes = yoso_core.fast_hash(vectors, signs, PAIR_HASHES, tau + s, layout="chained")
        found.append(float(np.mean((weigh(codes[0] ^ codes[1]) - mean) ** 2)))
    return float(np.mean(found)), _standard_error(found)


def variance_cells(track: Track, *, draws: int = PAIR_DRAWS) -> list[Result]:
    cells = []
    for hash, tau, s, cosine in track(list(product(HASHES, TAUS, OVERSAMPLES, PAIR_COSINES))):
        form = pair_variance(tau, s, cosine)
        variance, error = measured_pair_variance(hash, tau, s, cosine, draws=draws)
        cells.append(
            {
                "hash": hash,
                "hash_code_len": tau,
                "oversample": s,
                "cosine": cosine,
                "closed_form": form,
                "ratio": variance / form,
                "standard_error": error / form,
            }
        )
    return cells


def _standard_error(found: Iterable[float]) -> float:
    listed = np.array(list(found))
    return float(listed.std(ddof=1) / np.sqrt(len(listed)))


# (b) Coverage, and (c) the cosine, of whole rows

CHOICES = ((8, 0, 16), (8, 0, 32), (8, 2, 16), (8, 2, 64), (12, 0, 16), (12, 0, 64), (12, 2, 64))
"""``tau``, ``s`` and ``m``."""

STUDENT = {16: 2.13145, 32: 2.03951, 64: 1.99834}
"""The 0.975 quantile of Student's distribution with ``m - 1`` degrees of freedom."""


class Rows:
    """Rows of one kind of input with their expectations, and what hashes make of them."""

    def __init__(self, kind: str, tau: int) -> None:
        self.query, self.key, self.value = inputs(kind)
        self.at = np.linspace(0, self.query.shape[1] - 1, ROWS).astype(int)
        chosen = self.query[:, self.at].astype(np.float64)
        self.mean = expectation_attention(chosen, self.key.astype(np.float64), self.value.astype(np.float64), tau)
        self.unit = l2_normalize(self.mean)
        self.length = np.linalg.norm(self.mean, axis=-1)
        self.along = np.einsum("hrc,hkc->hrk", self.unit, self.value)

    def drawn(self, tau: int, s: int, m: int, rng: np.random.Generator) -> Result:
        """One draw of ``m`` hashes: the mean rows, and the mean and standard error of their
        projections on the expectation; and the relative squared error, real and as the spread of
        the hashes has it.
        """
        heads, dim = len(self.key), self.key.shape[-1]
        signs = yoso_core.sample_signs(m, tau + s, dim, batch_shape=(heads,), layout="chained", rng=rng)
        codes = [yoso_core.fast_hash(x, signs, m, tau + s, layout="chained") for x in (self.query[:, self.at], self.key)]
        weigh, rows, projected = weigher(tau, s), np.zeros((*self.mean.shape, m)), np.zeros((*self.length.shape, m))
        for head, hash in product(range(heads), range(m)):
            weight = weigh(codes[0][head, :, hash, None] ^ codes[1][head, :, hash])
            rows[head, ..., hash] = weight @ self.value[head]
            projected[head, :, hash] = np.sum(weight * self.along[head], axis=-1)
        mean = rows.mean(axis=-1)
        return {
            "mean": mean,
            "met": np.any(mean != 0, axis=-1),
            "projection": projected.mean(axis=-1),
            "standard_error": projected.std(axis=-1, ddof=1) / np.sqrt(m),
            "real": np.sum((mean - self.mean) ** 2, axis=-1) / self.length**2,
            "claimed": np.sum(rows.var(axis=-1, ddof=1), axis=-1) / m / self.length**2,
        }


def row_cell(kind: str, tau: int, s: int, m: int, *, draws: int = DRAWS) -> Result:
    """Coverage, cosine, the shape of the mean output, and rows of zeros, over draws."""
    rows, rng = Rows(kind, tau), np.random.default_rng([tau, s, m])
    covered, near, zeros, real, claimed, units = [], [], [], [], [], []
    for _ in range(draws):
        drawn = rows.drawn(tau, s, m, rng)
        inside = np.abs(drawn["projection"] - rows.length) <= STUDENT[m] * drawn["standard_error"]
        covered.append(float(np.mean(inside[drawn["met"]])))
        zeros.append(float(1 - np.mean(drawn["met"])))
        units.append(l2_normalize(drawn["mean"]))
        near.append(float(np.mean(np.sum(units[-1] * rows.unit, axis=-1))))
        real.append(float(np.mean(drawn["real"])))
        claimed.append(float(np.mean(drawn["claimed"])))
    found: Result = {"kind": kind, "hash_code_len": tau, "oversample": s, "num_hash": m}
    for name, listed in (("coverage", covered), ("cosine", near), ("zeros", zeros)):
        found |= {name: float(np.mean(listed)), f"{name}_standard_error": _standard_error(listed)}
    ratio = np.mean(real) / np.mean(claimed)
    error = ratio * np.hypot(_standard_error(real) / np.mean(real), _standard_error(claimed) / np.mean(claimed))
    found |= {"squared_error_ratio": float(ratio), "squared_error_ratio_standard_error": float(error)}
    return found | {"across": _mean_across(np.stack(units), rows.unit)}


def _mean_across(outputs: Array, unit: Array) -> float:
    """The root mean square, over rows, of the part of the mean output that is across the
    expectation, for outputs ``(draws, ..., n, d_v)``: without what is left of their noise.
    """
    across = outputs - np.sum(outputs * unit, axis=-1, keepdims=True) * unit
    number = len(outputs)
    noise = np.sum(across.var(axis=0, ddof=1), axis=-1) / number
    return float(np.sqrt(max(0.0, np.mean(np.sum(across.mean(axis=0) ** 2, axis=-1) - noise))))


def row_cells(track: Track, *, draws: int = DRAWS) -> list[Result]:
    """Every kind that is there, at every choice, with what the plan predicts."""
    cells = []
    kinds = [kind for kind in KINDS if kind != "encoder" or encoder_missing() is None]
    for kind, tau in track(list(product(kinds, sorted({tau for tau, _, _ in CHOICES})))):
        alike = [(s, m) for t, s, m in CHOICES if t == tau]
        planned = plan(
            *inputs(kind), hash_code_len=tau, num_hash=sorted({m for _, m in alike}), oversample=sorted({s for s, _ in alike}), rng=0
        )
        for s, m in alike:
            (choice,) = (c for c in planned.choices if (c.oversample, c.num_hash) == (s, m))
            cells.append(
                row_cell(kind, tau, s, m, draws=draws) | {"predicted": choice.cosine, "predicted_standard_error": choice.standard_error}
            )
    return cells


# The suite


def run_error(output: Path, *, quick: bool = False, progress: bool = True) -> Path:
    """Measure, always from the same seeds. Print the tables, and write ``error.json``, whose path
    is returned. Without the package of the trained encoder that kind of input is left out, and the
    file says so.

    ``quick``: with two draws and short sequences, to see that the benchmark works, into
    ``error-quick.json``.
    """
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import track

    tracked = partial(track, disable=not progress, transient=True)
    draws, pair_draws, lengths = (2, 2, (256,)) if quick else (DRAWS, PAIR_DRAWS, LENGTHS)
    settings = {"draws": draws, "vectors": NUM_VECTORS, "rows": ROWS, "pairs": PAIRS, "pair_hashes": PAIR_HASHES, "pair_draws": pair_draws}
    results: Result = {
        "suite": "error",
        "quick": quick,
        "settings": {**settings, "python": platform.python_version(), "numpy": np.__version__, "encoder": encoder_missing() or MINILM},
        "equal_error": equal_error_cells(partial(tracked, description="equal error"), lengths=lengths, draws=draws),
        "variance": variance_cells(partial(tracked, description="variance of pairs"), draws=pair_draws),
        "rows": row_cells(partial(tracked, description="whole rows"), draws=draws),
        "environment": where("cpu"),
    }
    path = output / f"error{'-quick' if quick else ''}.json"
    write_json(path, results)
    Console().print(*(Markdown(table(results)) for table in (variance_table, coverage_table, cosine_table, equal_error_table)))
    return path


def variance_table(results: Result) -> str:
    """Measured over closed form, in Markdown: a row for each hash, tau and cosine, a column for
    each s.
    """
    cells = {(c["hash"], c["hash_code_len"], c["cosine"], c["oversample"]): c for c in results["variance"]}
    oversamples = sorted({s for *_, s in cells})
    lines = []
    for hash, tau, cosine in dict.fromkeys(key[:3] for key in cells):
        found = [cells[hash, tau, cosine, s] for s in oversamples]
        lines.append([hash, tau, f"{cosine:g}", *(f"{c['ratio']:.3f} ± {c['standard_error']:.3f}" for c in found)])
    return markdown(["hash", "tau", "cosine", *(f"s = {s}" for s in oversamples)], lines, left=1)


def _choice(cell: Result) -> list[Any]:
    return [cell[name] for name in ("kind", "hash_code_len", "oversample", "num_hash")]


def coverage_table(results: Result) -> str:
    """Coverage in percent, rows of zeros, and the real squared error over the claimed one, in
    Markdown.
    """
    lines = [
        [
            *_choice(cell),
            f"{100 * cell['coverage']:.1f} ± {100 * cell['coverage_standard_error']:.1f}%",
            f"{100 * cell['zeros']:.1f}%",
            f"{cell['squared_error_ratio']:.2f} ± {cell['squared_error_ratio_standard_error']:.2f}",
        ]
        for cell in results["rows"]
    ]
    return markdown(["vectors", "tau", "s", "m", "coverage", "rows of zeros", "squared error, real / claimed"], lines, left=1)


def cosine_table(results: Result) -> str:
    """Predicted and measured cosines, in Markdown."""
    lines = [
        [
            *_choice(cell),
            f"{cell['predicted']:.3f} ± {cell['predicted_standard_error']:.3f}",
            f"{cell['cosine']:.3f} ± {cell['cosine_standard_error']:.3f}",
            f"{cell['predicted'] - cell['cosine']:+.3f}",
            f"{cell['across']:.3f}",
        ]
        for cell in results["rows"]
    ]
    header = ["vectors", "tau", "s", "m", "predicted cosine", "measured", "difference", "mean output across"]
    return markdown(header, lines, left=1)
