"""The demo's parts on texts and matrices small enough to check by hand, and the whole of it on a
small text.
"""

import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from typer.testing import CliRunner

from yoso_core import demo
from yoso_core.cli import app
from yoso_core.demo import LanguageSizes, Sizes, measure, missing_for_training, words
from yoso_core.demo.ahead import compiled, compiling_ahead
from yoso_core.demo.clock import Clock
from yoso_core.demo.measure import EXPECTATION, METHODS, SAMPLED, SOFTMAX
from yoso_core.reference.arrays import Array

if TYPE_CHECKING:
    from yoso_core.demo.language import Language

TINY = LanguageSizes(hidden=64, layers=1, heads=2, length=48, batch=4, steps=8, learning_rate=3e-2, windows=4, nums_hash=(1, 8), fills=3)
SMALL = Sizes(
    passage=600, dim=32, words=2, nums_hash=(1, 4, 16), hashes=32, lengths=(128, 256, 512), repeats=1, agreement=48, language=TINY
)
run = partial(demo.run, sizes=SMALL, ahead=False, budget=math.inf)
needs_torch = pytest.mark.skipif(missing_for_training() is not None, reason=f"the language model {missing_for_training()}")


def made_text(tokens: int, topics: int = 8, words_each: int = 12, seed: int = 0) -> str:
    """Paragraphs of one topic each; a topic has its own made-up words, and "the" is everywhere."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    paragraphs = []
    for _ in range(tokens // 50):
        topic = letters[rng.integers(topics)]
        drawn = (topic * 3 + letters[i] * 2 for i in rng.integers(words_each, size=40))
        paragraphs.append(" ".join(w + (" the" if i % 4 == 0 else "") for i, w in enumerate(drawn)) + ".")
    return "\n\n".join(paragraphs)


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """As if this module were not installed."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))


def small_passage(n: int = 400) -> words.Passage:
    return words.embed(made_text(4000), 32, np.random.default_rng(0)).middle(n)


def unit_vectors(n: int, d: int, seed: int = 0) -> Array:
    """Clustered, so that tokens have others to attend to."""
    rng = np.random.default_rng(seed)
    return words.unit(rng.standard_normal((8, d))[rng.integers(8, size=n)] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)


# ---------------------------------------------------------------- words


def test_prose_keeps_each_paragraph_once_and_leaves_out_code() -> None:
    assert (
        words.prose("Some plain words.\n\n>>> x = [1, 2, 3]\n\nMore of them.\n  \nSome plain words.")
        == "Some plain words.\n\nMore of them."
    )


def test_tokenize() -> None:
    found = words.tokenize("Don't wait: at 3 o'clock Ann’s naïve_train leaves.")
    assert found == ["don't", "wait", "at", "o'clock", "ann", "naïve", "train", "leaves"]


def test_cooccurrence_by_hand() -> None:
    ids = np.array([0, 1, 0, 2])
    np.testing.assert_array_equal(words.cooccurrence(ids, 3, window=1), [[0, 2, 1], [2, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(words.cooccurrence(ids, 3, window=2), [[2, 2, 1], [2, 0, 1], [1, 1, 0]])


def test_ppmi_by_hand() -> None:
    counts = np.array([[0, 3, 0], [3, 2, 0], [0, 0, 0]], np.float32)
    plain = [[0, np.log((3 / 8) / (3 / 8 * 5 / 8)), 0], [np.log((3 / 8) / (5 / 8 * 3 / 8)), 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(words.ppmi(counts, smoothing=1), plain, rtol=1e-6)
    first, second = np.array([3, 5]) ** 0.75 / np.sum(np.array([3, 5]) ** 0.75)
    smooth = [[0, np.log(1 / second), 0], [np.log(3 / 5 / first), 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(words.ppmi(counts), smooth, rtol=1e-6)


def test_truncated_svd_reconstructs_a_low_rank_matrix() -> None:
    rng = np.random.default_rng(0)
    matrix = (rng.standard_normal((120, 5)) @ rng.standard_normal((5, 80))).astype(np.float32)
    u, s, vt = words.truncated_svd(matrix, 5, rng)
    np.testing.assert_allclose((u * s) @ vt, matrix, atol=1e-4)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(s, np.linalg.svd(matrix, compute_uv=False)[:5], rtol=1e-4)


def test_truncated_svd_is_close_to_the_best_approximation() -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((120, 80)).astype(np.float32) / np.arange(1, 81, dtype=np.float32)
    u, s, vt = words.truncated_svd(matrix, 10, rng)
    best = np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[10:])
    assert np.linalg.norm(matrix - (u * s) @ vt) == pytest.approx(best, rel=1e-3)


def test_words_with_the_same_contexts_get_close_vectors() -> None:
    """ "aaabb" and "other" stand in the same places, where no word of another topic does: eight
    topics, eight dimensions.
    """
    rng = np.random.default_rng(1)
    tokens = words.tokenize(made_text(4000))
    tokens = ["other" if token == "aaabb" and rng.random() < 0.5 else token for token in tokens]
    kinds = sorted(set(tokens))
    vectors = words.word_vectors(np.array([kinds.index(token) for token in tokens]), len(kinds), 8, rng)
    cosine = vectors @ vectors[kinds.index("other")]
    same_topic = [cosine[i] for i, kind in enumerate(kinds) if kind.startswith("aaa")]
    different = [cosine[i] for i, kind in enumerate(kinds) if not kind.startswith("aaa") and kind not in ("the", "other")]
    assert cosine[kinds.index("aaabb")] > 0.8
    assert min(same_topic) > max(different)


def test_token_vectors_mix_in_their_neighbors() -> None:
    basis = np.eye(4)
    found = words.token_vectors(basis, np.array([0, 1, 2, 3]), reach=1)
    mixed = np.array([[1, 0.5, 0, 0], [0.5, 1, 0.5, 0], [0, 0.5, 1, 0.5], [0, 0, 0.5, 1]])
    np.testing.assert_allclose(found, words.unit(mixed - mixed.mean(axis=0)), atol=1e-6)


def test_the_middle_of_a_passage_keeps_its_words() -> None:
    passage = words.Passage(["a", "b", "c"], np.array([0, 1, 2, 2, 1]), np.arange(10.0).reshape(5, 2))
    part = passage.middle(3)
    assert [part.words[i] for i in part.ids] == ["b", "c", "c"]
    np.testing.assert_array_equal(part.vectors, passage.vectors[1:4])
    assert len(passage.middle(99)) == 5


def test_related_words_of_the_default_text_are_close() -> None:
    name, text = words.read_text(None)
    whole = words.embed(text, 64, np.random.default_rng(0))
    assert "Python" in name
    assert len(whole) > 16384
    vectors = words.word_vectors(whole.ids, len(whole.words), 64, np.random.default_rng(0))
    for word, related in (("import", "module"), ("exception", "raise"), ("class", "instance")):
        cosine = vectors @ vectors[whole.words.index(word)]
        assert cosine[whole.words.index(related)] > np.quantile(cosine, 0.97), (word, related)


# ---------------------------------------------------------------- measurements


def test_softmax_attention_is_the_formula_whatever_the_block() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((n, 5)) for n in (7, 9, 9))
    weight = np.exp(3 * query @ key.T)
    right = weight @ value / weight.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(measure.softmax_attention(query, key, value, 3, block=4), right)


def test_mean_entropy_by_hand() -> None:
    assert measure.mean_entropy(np.array([[2.0, 2.0], [5.0, 0.0]])) == pytest.approx(np.log(2) / 2)


def test_softmax_scale_makes_both_equally_sharp() -> None:
    x = unit_vectors(300, 32)
    cosine = np.clip(x.astype(np.float64) @ x.T, -1, 1)
    yoso = measure.mean_entropy((1 - np.arccos(cosine) / np.pi) ** 8)
    scale = measure.softmax_scale(x, 8, queries=300)
    assert measure.mean_entropy(np.exp(scale * cosine)) == pytest.approx(yoso, abs=1e-4)


def test_prominent_words_crowd_together_and_are_long_enough() -> None:
    ids = np.zeros(640, np.int64)
    ids[::8] = 1  # "often": evenly spread
    ids[100:130] = 2  # "burst"
    ids[300:340] = 3  # "ab": crowded even more, but short
    passage = words.Passage(["the", "often", "burst", "ab"], ids, np.zeros((640, 2)))
    assert measure.prominent_words(passage, 2) == [2, 1]
    assert measure.prominent_words(passage, 1, letters=2) == [3]


def test_attention_by_word_sums_the_weights_of_every_word() -> None:
    passage, scale, tau = small_passage(), 3.0, 6
    word = measure.prominent_words(passage, 1)[0]
    found = measure.attention_by_word(passage, word, num_hash=4096, hash_code_len=tau, scale=scale, seed=0)
    x = passage.vectors.astype(np.float64)
    cosine = np.clip(x[passage.ids == word] @ x.T, -1, 1)
    for name, weight, tolerance in (
        (SOFTMAX, np.exp(scale * cosine), 1e-4),
        (EXPECTATION, (1 - np.arccos(cosine) / np.pi) ** tau, 1e-4),
        (SAMPLED, (1 - np.arccos(cosine) / np.pi) ** tau, 0.1),
    ):
        share = np.mean(weight / weight.sum(axis=1, keepdims=True), axis=0)
        for other, lift in zip(found.others, found.lift[name], strict=True):
            tokens = passage.ids == passage.words.index(other)
            assert lift == pytest.approx(share[tokens].sum() / tokens.mean(), rel=tolerance, abs=tolerance), (name, other)
    assert found.word not in found.others
    assert list(found.lift[EXPECTATION]) == sorted(found.lift[EXPECTATION], reverse=True)
    assert all(other[:3] == found.word[:3] for other, _ in found.strongest(EXPECTATION, 3))  # its topic


def test_error_falls_with_slope_one_half() -> None:
    """Over draws the slope is -0.520 with a spread of 0.006; that of the biased twin below is
    -0.327.
    """
    error = measure.sampling_error(unit_vectors(256, 64), [1, 4, 16, 64], 8, 512, seed=0)
    assert error.draws == [512, 128, 32, 8]
    assert error.rms == sorted(error.rms, reverse=True)
    assert error.slope == pytest.approx(-0.5, abs=0.06)


def test_the_slope_tells_a_biased_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling with one bit too many has an error that more hashes do not cure."""
    right = measure.yoso_attention

    def biased(*args: Array, hash_code_len: int, use_expectation: bool = False, **options: object) -> Array:
        tau = hash_code_len if use_expectation else hash_code_len + 1
        return right(*args, hash_code_len=tau, use_expectation=use_expectation, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "yoso_attention", biased)
    error = measure.sampling_error(unit_vectors(256, 64), [1, 4, 16, 64], 8, 512, seed=0)
    assert error.slope > -0.5 + 0.06


def test_draws_are_left_out_where_the_time_is_short_and_the_others_stay_what_they_are() -> None:
    x = unit_vectors(64, 16)
    short = measure.sampling_error(x, [1, 4], 6, 64, seed=3, left=lambda: 0.0)
    assert short.draws == [1, 1]
    assert short == measure.sampling_error(x, [1, 4], 6, 1, seed=3)
    seconds = iter([1.0, 1.0, -1.0])
    assert measure.sampling_error(x, [1, 16], 6, 32, seed=3, left=lambda: next(seconds)).draws == [3, 2]


def sleepers(calls: list[tuple[str, int]]) -> dict[str, measure.Attention]:
    def method(name: str) -> measure.Attention:
        def attend(query: Array, key: Array, value: Array) -> Array:
            calls.append((name, len(query)))
            return value

        return attend

    return {name: method(name) for name in METHODS}


@pytest.mark.parametrize(
    ("left", "lengths", "runs"), [(1e9, [10, 20, 40, 80], 5), (0.0, [10, 20, 40], 1), (-1.0, [10, 20, 40], 1)], ids=["time", "none", "over"]
)
def test_long_texts_and_repetitions_are_timed_where_there_is_time(left: float, lengths: list[int], runs: int) -> None:
    calls: list[tuple[str, int]] = []
    found = measure.attention_times(small_passage(), [10, 20, 40, 80], sleepers(calls), 5, lambda: left)
    assert (found.lengths, found.runs) == (lengths, runs)
    assert calls == [(name, 10) for name in METHODS] + runs * [(name, n) for n in lengths for name in METHODS]
    assert all(len(found.seconds[name]) == len(lengths) for name in METHODS)


@pytest.mark.skipif(measure.softmax_library() != "PyTorch", reason="needs torch")
def test_the_softmax_of_torch_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 40, 8)).astype(np.float32)
    right = measure.softmax_attention(query, key, value, 3.0)
    np.testing.assert_allclose(measure.softmax_of_torch(query, key, value, 3.0), right, atol=1e-5)
    timed = measure.attention_methods(8, 4, 3.0, 0)[SOFTMAX](query, key, value)
    np.testing.assert_array_equal(timed, measure.softmax_of_torch(query, key, value, 3.0))


def test_softmax_is_timed_in_numpy_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    query, key, value = np.random.default_rng(0).standard_normal((3, 40, 8)).astype(np.float32)
    assert measure.softmax_library() == "NumPy"
    timed = measure.attention_methods(8, 4, 3.0, 0)[SOFTMAX](query, key, value)
    np.testing.assert_array_equal(timed, measure.softmax_attention(query, key, value, 3.0))


# ---------------------------------------------------------------- the clock


def test_a_share_is_of_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("yoso_core.demo.clock.time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(60)
    now += 10
    left = clock.share(0.4)
    assert (clock.elapsed, clock.left(), left()) == (10, 50, 20)
    now += 15
    assert left() == 5
    assert clock.share(0.2)() == 7
    now += 45
    assert (clock.left(), left(), clock.share(0.5)()) == (-10, -40, 0)
    assert Clock().share(0.1)() == math.inf


PROGRAM = """
import time
from yoso_core.demo.ahead import compiled, compiling_ahead
from yoso_core.demo.clock import Clock
with Clock(60, show=True) as clock:
    clock.doing("counting [bold]words[/]")
    time.sleep(0.3)
"""


def test_no_bar_in_a_pipe() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_bar_on_a_terminal_says_what_is_done_and_how_long_at_most() -> None:
    import pty

    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=terminal, stdout=subprocess.PIPE, env=environment) as process:
        os.close(terminal)
        shown = b""
        try:
            while part := os.read(controller, 1000):
                shown += part
        except OSError:  # Linux: the other side is closed
            pass
        assert process.stdout is not None
        assert process.stdout.read() == b""
    os.close(controller)
    assert b"counting [bold]words[/]" in shown
    assert re.search(rb"at most (60|59) s left", shown)


# ---------------------------------------------------------------- the language model


@needs_torch
def test_one_block_in_ten_is_held_out() -> None:
    from yoso_core.demo import language

    letters = "ABCDEFGHIJKLMNOPQRST"
    kept, held_out = language.split("\n\n".join(f"some   words {letter * 90}." for letter in letters))
    kept_text = kept.tobytes().decode()
    assert len(held_out) == pytest.approx(len(kept_text) / 9, rel=0.15)
    assert all(kept_text.count(letter) + held_out.count(letter) == 90 for letter in letters)
    assert [letter for letter in letters if held_out.count(letter) > 60] == ["F", "P"]  # the sixth block and the sixteenth
    assert "some words" in kept_text


@needs_torch
def test_span_masks_cover_the_share_and_every_row() -> None:
    import torch

    from yoso_core.demo import language

    masked = language.span_mask(400, 128, 0.25, torch.Generator().manual_seed(0))
    assert 0.2 < float(masked.float().mean()) < 0.27  # runs that overlap make it less
    assert language.span_mask(50, 7, 0.0, torch.Generator().manual_seed(0)).any(dim=1).all()


@needs_torch
def test_a_batch_hides_what_it_asks_for_and_nothing_else() -> None:
    import torch

    from yoso_core.demo import language

    windows = torch.arange(60).reshape(3, 20)
    input_ids, labels = language.masked_batch(windows, 0.25, torch.Generator().manual_seed(0))
    masked = input_ids == language.MASK
    assert masked.any()
    assert torch.equal(labels[masked], windows[masked])
    assert (labels[~masked] == language.IGNORED).all()
    assert torch.equal(input_ids[~masked], windows[~masked])


@needs_torch
def test_frequency_score_by_hand() -> None:
    import torch

    from yoso_core.demo import language

    data, labels = torch.tensor([5] * 7 + [9]), torch.tensor([5, language.IGNORED, 9, 9, 30])
    found = language.frequency_score(data, labels)
    p = np.array([8, 2, 2, 1]) / (8 + 256)
    assert found.loss == pytest.approx(-np.log(p).mean())
    assert found.right == 1 / 4


@needs_torch
def test_the_number_of_steps_says_what_each_does() -> None:
    """A training that the time ends is the same as one that is asked for as many steps."""
    import torch

    from yoso_core.demo import language

    data = torch.from_numpy(np.frombuffer(made_text(2000).encode(), np.uint8).astype(np.int64))

    def train(steps: int, share_per_step: float, jump: int = 10**9) -> tuple[list[float], list[tuple[int, float]], int]:
        torch.manual_seed(0)
        model = language.new_model(TINY)
        made: list[int] = []
        return language.train(
            model,
            data,
            replace(TINY, steps=steps),
            torch.Generator().manual_seed(0),
            lambda: 0.0,
            lambda: len(made) * share_per_step + (len(made) >= jump),
            lambda step, *_: made.append(step),
        )

    losses, checks, falls_from = train(1000, 0.75 / 21)
    assert (len(losses), checks, falls_from) == (28, [(0, 0.0), (25, 0.0), (28, 0.0)], 21)
    assert train(28, 0.0) == (losses, checks, falls_from)
    assert train(29, 0.0)[0] != losses
    stopped = train(1000, 0.75 / 21, jump=24)
    assert (len(stopped[0]), stopped[2]) == (24, 21)
    assert stopped[0] == losses[:24]
    assert len(train(1000, 1.0)[0]) == language.FEWEST_STEPS


@needs_torch
def test_the_learning_rate_rises_stays_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from yoso_core.demo import language

    rates: list[float] = []
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW) -> None:
        rates.append(self.param_groups[0]["lr"] / TINY.learning_rate)
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    monkeypatch.setattr(language, "RISE", 4)
    data = torch.zeros(200, dtype=torch.long)
    model = language.new_model(TINY)
    language.train(model, data, replace(TINY, steps=12), torch.Generator().manual_seed(0), lambda: 0.0, lambda: 0.0, lambda *_: None)
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])


@needs_torch
def test_scores_and_masks_are_left_out_where_the_time_is_short() -> None:
    import torch

    from yoso_core.demo import language

    model = language.new_model(TINY)
    ids = torch.full((1, 8), 65)
    clock = Clock(1e-9)
    trained, masks = language.evaluate(model, ids, ids, (1, 8), [("some words ", "of", " text"), ("and ", "more", ".")], clock)
    assert list(trained) == [None]
    assert [list(mask.fills) for mask in masks] == [[None]]
    assert clock.left_out == ["scores with m = 1 and m = 8", "masks to fill: 1 of 2"]


@pytest.mark.slow
@needs_torch
def test_what_is_compiled_ahead_is_what_training_needs() -> None:
    """Numba compiles nothing more in the training that follows."""
    program = """
import sys
import numba.core.event as events
from yoso_core.demo.language import compile_kernels, learn
from tests.test_demo import TINY, made_text
compile_kernels(TINY)
with events.install_recorder("numba:compile") as recorder:
    learn(made_text(2000), TINY, 0)
names = {event.data["dispatcher"].py_func.__qualname__ for _, event in recorder.buffer}
sys.exit(f"compiled only now: {names}" if names else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def learned(text: str | None = None, sizes: LanguageSizes = TINY, seed: int = 0) -> "Language":
    from yoso_core.demo.language import learn

    return learn(made_text(2000) if text is None else text, sizes, seed)


@needs_torch
def test_the_loss_falls_below_what_the_frequencies_say() -> None:
    """On a text where a byte's neighbors give it away."""
    text = "\n\n".join("abcdefgh " * 40 + letter for letter in "abcdefghijklmnopqrst")
    found = learned(text, replace(TINY, steps=60, learning_rate=1e-2))
    assert [step for step, _ in found.held_out] == [0, 25, 50, 60]
    assert found.held_out[0][1] == pytest.approx(found.untrained.loss, rel=1e-5)
    assert np.mean(found.losses[-5:]) < 0.7 * found.frequencies.loss
    for m, score in found.trained.items():
        assert score.loss < 0.7 * found.frequencies.loss < found.untrained.loss, m
        assert score.right > found.frequencies.right, m


@needs_torch
def test_a_seed_repeats_the_training_and_leaves_the_random_numbers_of_others() -> None:
    import torch

    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = learned(seed=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second, other = learned(seed=1), learned(seed=2)
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    assert first.losses != other.losses


@needs_torch
@pytest.mark.parametrize("num_hash", [None, 1, 8], ids=["expectation", "m1", "m8"])
def test_a_fill_has_the_probability_of_the_models_softmax(num_hash: int | None) -> None:
    """One byte: the softmax itself. Two: a factor each, the second with the first in its place."""
    import torch

    from yoso_core.demo import language

    torch.manual_seed(0)
    model = language.new_model(TINY).eval()
    model.config.use_expectation, model.config.num_hash = num_hash is None, num_hash or 1
    ids = torch.tensor([*b"some wor", language.MASK, language.MASK, *b"of text"])

    def softmax(at: int, row: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=row[None]).logits[0, at].softmax(dim=-1)

    one = ids.clone()
    one[9] = ord("s")
    p = softmax(8, one)
    by_text = {fill.text: fill.probability for fill in language.fill(model, one, [8], num_hash, beams=256)}
    assert len(by_text) == 128  # the other bytes are no character alone
    assert by_text == pytest.approx({chr(b): float(p[b]) for b in range(128)}, rel=1e-4)
    assert list(by_text.values()) == sorted(by_text.values(), reverse=True)

    found = language.fill(model, ids, [8, 9], num_hash, beams=256)
    assert found
    for candidate in found:
        first, second = candidate.text.encode()
        filled = ids.clone()
        filled[8] = first
        assert candidate.probability == pytest.approx(float(softmax(8, ids)[first] * softmax(9, filled)[second]), rel=1e-4)


@needs_torch
def test_scoring_with_another_attention_leaves_the_model_as_it_was() -> None:
    from yoso_core.demo import language

    model = language.new_model(TINY).train()
    before = model.config.to_dict()
    with language.attention_of(model, None):
        assert model.config.use_expectation
        assert not model.training
    assert model.config.to_dict() == before
    assert model.training


@needs_torch
def test_masks_stand_in_passages_of_the_text_held_out() -> None:
    from yoso_core.demo import language

    text = "The quick brown fox jumps over it. Ünïcode wörds are here too, and not a few of them. Short.\n" + "long words " * 40
    found = language.passages(text, 48)
    assert found[0] == "The quick brown fox jumps over it."
    assert all(len(passage.encode()) <= 48 and passage in text for passage in found)
    chosen = language.choose_masks(text, 48, 9, np.random.default_rng(0))
    assert len(chosen) == len(found)
    for passage, (before, masked, after) in zip(found, chosen, strict=True):
        assert before + masked + after == passage
        assert masked.isalpha()
        assert len(masked) in (2, 3)
    assert language.choose_masks("No.", 48, 9, np.random.default_rng(0)) == []


@needs_torch
def test_the_tables_show_the_fills_that_were_found() -> None:
    from rich.console import Console

    from yoso_core.demo.tables import fills_table, learning_table

    found = learned()
    printed = io.StringIO()
    Console(file=printed, width=200).print(fills_table(found), learning_table(found, TINY.num_hash))
    assert f"{found.trained[8].loss:.3f}" in printed.getvalue()
    assert f"{found.frequencies.loss:.3f}" in printed.getvalue()
    for mask in found.masks:
        for fills in mask.fills.values():
            assert f"{fills[0].probability:.0%}" in printed.getvalue()


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read .*No such file"),
        (b"", "is empty"),
        (b" \n\n\t", "is empty"),
        (b"\xff\xfe\x00abc", "not UTF-8 text"),
        (b"plain\0words", "NUL"),
        (b"Just a few words.", "need at least 512 words"),
        (b"the same word again and " * 500, "found 2500 of 5 kinds"),
        (b"1 2 3 4 5 6 7 8 9 " * 500, "found 0 of 0 kinds"),
    ],
    ids=["missing", "empty", "blank", "binary", "nul", "short", "monotonous", "digits"],
)
def test_bad_text(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^text: .*{says}"):
        run(path, tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^text: cannot read"):
        run(tmp_path, tmp_path / "out.png")


def test_a_long_text_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MAX_CHARACTERS", 4)
    text = tmp_path / "long.txt"
    text.write_text("abcdef")
    assert words.read_text(text) == ("the first 4 characters of long.txt", "abcd")


def test_the_output_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^output: the folder .* does not exist"):
        run(None, tmp_path / "nowhere" / "out.png")


def test_run_writes_the_picture_and_prints_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    letter = "é" if sys.getfilesystemencoding() == "utf-8" else "e"
    text, output = tmp_path / f"a [bold]$name$ {letter}.txt", tmp_path / "out.png"
    text.write_text("\ufeff" + made_text(4000), encoding="utf-8")
    result = run(text, output)
    assert output.read_bytes().startswith(b"\x89PNG")
    assert (result.passage_tokens, result.times.lengths, result.left_out) == (600, [128, 256, 512], [])
    assert result.text_tokens > 3000
    assert result.agrees
    assert len(result.words) == 2
    assert all(len(result.times.seconds[name]) == 3 and min(result.times.seconds[name]) > 0 for name in METHODS)
    assert result.error.rms[0] > result.error.rms[-1]
    printed = capsys.readouterr().out
    for part in (text.name, "YOSO sampled", f"slope {result.error.slope:.2f}", "lsh_cumulation", "all agree", result.words[0].word):
        assert part in printed
    assert "shorter than" not in printed
    assert "Left out" not in printed
    assert ("5. A masked language model" in printed) == (result.language is not None) == (missing_for_training() is None)


def test_what_is_missing_for_the_training_is_said_and_the_rest_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "torch")
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    result = run(text, tmp_path / "out.png")
    assert result.language is None
    assert result.agrees
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    printed = " ".join(capsys.readouterr().out.split())
    assert "all agree" in printed
    assert "Not here: a masked language model trained on this text, which needs torch: pip install 'yoso-core[model]'" in printed


def test_no_training_and_no_word_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    assert run(text, tmp_path / "out.png", training=False).language is None
    printed = capsys.readouterr().out
    assert "4. Every variant" in printed
    assert "language model" not in printed


def test_a_short_budget_leaves_out_what_it_must_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    sizes = replace(SMALL, lengths=(64, 128, 256, 512), repeats=2)
    result = run(text, tmp_path / "out.png", budget=1e-9, sizes=sizes)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert result.agrees
    assert result.language is None
    assert (len(result.words), result.error.draws, result.times.lengths) == (1, [1, 1, 1], [64, 128, 256])
    left_out = [
        "words: 1 of 2",
        "error against hashes: no more than one draw for each m",
        "agreement: lsh_cumulation, expectation_attention, yoso_attention",
        "time against tokens: n = 512",
        "time against tokens: 1 of 2 runs",
    ]
    assert result.left_out[:5] == left_out
    assert result.left_out[5:] == ["the language model: no time was left to train it"] * (missing_for_training() is None)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Left out, to end in about 0 s (--budget gives more): {'; '.join(result.left_out)}." in printed
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (found["left_out"], found["budget"]) == (result.left_out, 1e-9)


@pytest.mark.slow
@needs_torch
def test_a_training_that_the_time_ends_is_said_to_be_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = count()
    monkeypatch.setattr("yoso_core.demo.clock.time", SimpleNamespace(perf_counter=lambda: 0.01 * next(ticks)))  # every look takes 10 ms
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    result = run(text, tmp_path / "out.png", sizes=replace(SMALL, language=replace(TINY, steps=1000)), budget=3)
    assert result.language is not None
    steps = len(result.language.losses)
    assert 20 < steps < 200
    assert 1.5 < result.elapsed < 3
    assert result.left_out[-1:] == [f"training: {steps} of 1,000 steps in {result.language.seconds:.0f} s"]
    assert f"{steps} training steps" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["0", "-3", "nan"])
def test_a_budget_is_positive(budget: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "out.png"), "--budget", budget])
    assert result.exit_code == 2
    assert "--budget: need a positive number of seconds" in result.output


def test_the_second_process_is_waited_for_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with compiling_ahead(False) as process:
        assert process is None
        assert compiled(process, 0.0)
    popen = subprocess.Popen
    for program, done in (("import time; time.sleep(600)", False), ("raise SystemExit(1)", True)):
        monkeypatch.setattr(subprocess, "Popen", lambda _, program=program, **rest: popen([sys.executable, "-c", program], **rest))
        with compiling_ahead(True) as process:
            assert process is not None
            assert compiled(process, 0.1 if not done else math.inf) == done
        assert process.returncode == (1 if done else -9)


def test_everything_is_there_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    result = run(text, tmp_path / "out.png", show=False)
    assert capsys.readouterr().out == ""
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert set(found) == {*asdict(replace(result, agreement=[], language=None)), "agrees"}
    assert (found["left_out"], found["budget"]) == ([], None)
    assert found["sizes"]["language"]["steps"] == TINY.steps
    assert found["words"][0]["lift"][SAMPLED] == result.words[0].lift[SAMPLED].tolist()
    assert [row["op"] for row in found["agreement"]] == [comparison.op for comparison in result.agreement]
    if result.language is not None:
        assert found["language"]["losses"] == result.language.losses
        assert set(found["language"]["trained"]) == {"expectation", "1", "8"}
        assert found["language"]["masks"][0]["fills"]["8"][0]["text"] == result.language.masks[0].fills[8][0].text


@pytest.mark.parametrize("options", [[], ["--no-training"]], ids=["training", "no-training"])
def test_the_command_prints_json_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.setattr(demo, "run", lambda **options: run(**options | {"budget": math.inf}))
    text = tmp_path / "text.txt"
    text.write_text(made_text(2000), "utf-8")
    result = CliRunner().invoke(app, ["demo", "--text", str(text), "--output", str(tmp_path / "out.png"), "--json", *options])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["agrees"]
    assert (found["language"] is None) == (bool(options) or missing_for_training() is not None)


def test_a_text_shorter_than_the_passage_is_used_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "short.txt"
    text.write_text(made_text(1500), "utf-8")
    result = run(
        text, tmp_path / "out.png", sizes=Sizes(dim=32, words=1, nums_hash=(1, 4), hashes=4, repeats=1, agreement=16), training=False
    )
    assert result.passage_tokens == result.text_tokens < 1501
    assert result.times.lengths == [512, 1024]
    assert "shorter than 4,096" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(made_text(3000), "utf-8")
    first, second, other = (run(text, tmp_path / "out.png", seed=seed, training=False) for seed in (1, 1, 2))
    assert first.error == second.error != other.error
    assert first.words[0].strongest(SAMPLED, 5) == second.words[0].strongest(SAMPLED, 5)
