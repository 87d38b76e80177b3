"""YOSO attention on a real text, end to end, in a minute: what ``yoso demo`` runs.

1. `words`: a text becomes token vectors, by counting alone.
2. `measure`: self-attention over a passage by softmax, by YOSO's exact expectation, and by sampling
   with more and more hashes.
3. `language`: a small YOSO masked language model is trained on the text and fills masks in a part
   held out (needs PyTorch).
4. `tables` and `figure`: what came out, on the terminal and as one picture.

Each part watches a `clock` and does less where the machine is slow or busy; the tables, the picture
and the result say what was left out.

In 2, queries, keys and values are all the token vectors of `words.token_vectors`: one head, nothing
learned. So tokens attend to tokens of similar meaning. Softmax gets the scale at which it is as
sharp as YOSO on average (equal entropy), which makes them comparable.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yoso_core import checks
from yoso_core.demo.ahead import compiled, compiling_ahead
from yoso_core.demo.clock import Clock
from yoso_core.demo.words import embed, read_text

if TYPE_CHECKING:
    from yoso_core.comparison import Comparison
    from yoso_core.demo.language import Language
    from yoso_core.demo.measure import AttentionTimes, SamplingError, WordAttention

BUDGET = 60.0
"""Seconds that a run may take."""

WORDS, ERROR, COMPILING, AGREEMENT, TIMES = 0.3, 0.1, 0.4, 0.1, 0.2
"""What each part may use of the time that the ones before it have left."""

ENOUGH_TO_TRAIN = 0.2
"""Without so much of the budget the language model is left out."""


@dataclass(frozen=True)
class LanguageSizes:
    """The masked language model and its training."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    length: int = 128
    """Bytes of a passage."""
    num_hash: int = 16
    """Hashes in training."""
    hash_code_len: int = 8
    conv_window: int = 7
    """YOSO-C: the neighbors of a byte matter so much that the model would take far longer without.
    """
    masked: float = 0.25
    """Share of the bytes."""
    batch: int = 8
    steps: int = 1000
    """At most: training lasts as long as there is time."""
    learning_rate: float = 3e-3
    windows: int = 64
    """Passages held out for the scores."""
    nums_hash: tuple[int, ...] = (1, 4, 16, 64)
    """The trained model is run with so many hashes, beside the expectation."""
    fills: int = 8
    """Passages with a mask to fill."""


@dataclass(frozen=True)
class Sizes:
    """How much to measure; smaller sizes make a quick run."""

    passage: int = 4096
    dim: int = 64
    hash_code_len: int = 8
    words: int = 4
    num_hash: int = 32
    """Hashes where one number stands for the sampled method."""
    nums_hash: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    hashes: int = 512
    """Hashes for the error at each ``m``, in ``hashes / m`` draws."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    repeats: int = 5
    agreement: int = 512
    """Tokens on which every variant is compared, the slow definitions among them."""
    language: LanguageSizes = field(default_factory=LanguageSizes)


@dataclass(frozen=True)
class Measured:
    """What was measured of attention, in the order of the tables."""

    text_tokens: int
    """Tokens of the text that are used."""
    passage_tokens: int
    """Fewer than ``sizes.passage`` where the text is shorter."""
    softmax_scale: float
    words: "list[WordAttention]"
    """The word with the strongest preference for another comes first."""
    error: "SamplingError"
    times: "AttentionTimes"
    agreement: "list[Comparison]"

    @property
    def agrees(self) -> bool:
        """Every variant that can run here agrees with the definition."""
        return all(comparison.agrees for comparison in self.agreement)


@dataclass(frozen=True)
class DemoResult(Measured):
    """Everything that came out."""

    sizes: Sizes
    source: str
    language: "Language | None"
    """The trained model; ``None`` where it was not asked for, or ``not_trained`` says what is
    missing, or ``left_out`` that there was no time.
    """
    not_trained: str | None
    budget: float
    """The seconds that were allowed."""
    left_out: list[str]
    """What was not done, to stay within them."""
    elapsed: float
    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            **{name: getattr(self, name) for name in ("source", "text_tokens", "passage_tokens", "softmax_scale", "agrees")},
            "sizes": asdict(self.sizes),
            "words": [
                {"word": word.word, "others": word.others, "lift": {name: lift.tolist() for name, lift in word.lift.items()}}
                for word in self.words
            ],
            "error": asdict(self.error),
            "times": asdict(self.times),
            "agreement": [comparison.to_dict() for comparison in self.agreement],
            "language": None if self.language is None else self.language.to_dict(),
            "not_trained": self.not_trained,
            "budget": self.budget if math.isfinite(self.budget) else None,
            "left_out": self.left_out,
            "elapsed": self.elapsed,
            "output": str(self.output),
        }


def missing_for_training() -> str | None:
    """What the language model needs and this Python does not have."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    return f"needs {' and '.join(missing)}: pip install 'yoso-core[model]'" if missing else None


def run(
    text: Path | None = None,
    output: Path = Path("yoso_demo.png"),
    seed: int = 0,
    *,
    training: bool = True,
    show: bool = True,
    budget: float = BUDGET,
    sizes: Sizes | None = None,
    ahead: bool = True,
) -> DemoResult:
    """Run the demo: print its tables, write its picture to ``output``, return the numbers.

    Parameters
    ----------
    text : a UTF-8 text file, or ``None`` for the help topics that come with Python.
    output : the picture to write; its folder must exist.
    seed : of every random draw. How much is drawn depends on the time; the result of a given
        number of draws and of training steps does not.
    training : train the language model too, where PyTorch and transformers are installed; the
        tables say so where they are not.
    show : print the tables, and a progress bar if stderr is a terminal.
    budget : the seconds that the run may take, ``math.inf`` for no limit. What it cannot shorten,
        such as compiling on a slow machine, may exceed it.
    sizes : how much to measure.
    ahead : let a second process compile what the training needs, in the meantime.

    Raises
    ------
    ValueError : the text cannot be read, is no text or is too short; the output's folder does not
        exist; the seed is negative; the budget is not positive.
    ImportError : matplotlib is not installed.
    """
    checks.integer("seed", seed, 0)
    if not output.parent.is_dir():
        raise ValueError(f"output: the folder {output.parent} does not exist")
    if not budget > 0:
        raise ValueError(f"budget: need a positive number of seconds, got {budget:g}")
    from yoso_core.demo.figure import save_figure
    from yoso_core.demo.tables import print_tables

    sizes, clock = sizes or Sizes(), Clock(budget, show=show)
    not_trained = missing_for_training() if training else None
    training = training and not_trained is None
    with clock, compiling_ahead(training and ahead) as helper:
        source, content = read_text(text)
        measured = _measure(content, sizes, seed, clock, lambda: compiled(helper, clock.share(COMPILING)()))
        language = None
        if training and clock.left() > (ENOUGH_TO_TRAIN * budget if math.isfinite(budget) else 0):
            from yoso_core.demo.language import learn

            language = learn(content, sizes.language, seed, clock)
        elif training:
            clock.left_out.append("the language model: no time was left to train it")
        clock.doing("drawing the picture")
        result = DemoResult(
            **vars(measured),
            sizes=sizes,
            source=source,
            language=language,
            not_trained=not_trained,
            budget=budget,
            left_out=clock.left_out,
            elapsed=clock.elapsed,
            output=output,
        )
        save_figure(result, output)
        result = replace(result, elapsed=clock.elapsed)
    if show:
        print_tables(result)
    return result


def _measure(content: str, sizes: Sizes, seed: int, clock: Clock, ready: Callable[[], object]) -> Measured:
    """Attention, measured. ``ready()`` waits until nothing else keeps the machine busy: times come
    after it.
    """
    from yoso_core.demo import measure

    m, tau = sizes.num_hash, sizes.hash_code_len
    clock.doing("counting words")
    whole = embed(content, sizes.dim, np.random.default_rng(seed))
    passage = whole.middle(sizes.passage)
    x = passage.vectors
    scale = measure.softmax_scale(x, tau)

    clock.doing("who attends to whom")
    wanted, left = measure.prominent_words(passage, sizes.words), clock.share(WORDS)
    words: list[WordAttention] = []
    for word in wanted:
        if not words or left() > 0:
            words.append(measure.attention_by_word(passage, word, num_hash=m, hash_code_len=tau, scale=scale, seed=seed))
    if len(words) < len(wanted):
        clock.left_out.append(f"words: {len(words)} of {len(wanted)}")
    words.sort(key=lambda attention: -attention.lift[measure.EXPECTATION][0])

    clock.doing("error against hashes")
    error = measure.sampling_error(x, list(sizes.nums_hash), tau, sizes.hashes, seed, clock.share(ERROR))
    if sum(error.draws) < sum(max(1, sizes.hashes // hashes) for hashes in error.num_hash):
        most = "one draw" if max(error.draws) == 1 else f"{max(error.draws)} draws"
        clock.left_out.append(f"error against hashes: no more than {most} for each m")

    ready()
    clock.doing("agreement of the variants")
    agreement = measure.variant_agreement(passage.middle(sizes.agreement).vectors, m, tau, seed, clock.share(AGREEMENT))
    if len(agreement) < len(measure.COMPARED):
        clock.left_out.append("agreement: " + ", ".join(measure.COMPARED[len(agreement) :]))

    clock.doing("time against tokens")
    lengths = [n for n in sizes.lengths if n <= len(whole)]
    methods = measure.attention_methods(m, tau, scale, seed)
    times = measure.attention_times(whole, lengths, methods, sizes.repeats, clock.share(TIMES))
    if skipped := lengths[len(times.lengths) :]:
        clock.left_out.append("time against tokens: n = " + " and ".join(f"{n:,}" for n in skipped))
    if times.runs < sizes.repeats:
        clock.left_out.append(f"time against tokens: {times.runs} of {sizes.repeats} runs")
    return Measured(len(whole), len(passage), scale, words, error, times, agreement)
