"""YOSO attention on a real text, end to end, in about a minute: what ``yoso demo`` runs.

1. `words`: a text becomes token vectors, by counting alone.
2. `measure`: self-attention over a passage by softmax, by YOSO's exact expectation, and by sampling
   with more and more hashes.
3. `language`: a small YOSO masked language model is trained on the text and fills masks in a part
   held out (needs PyTorch).
4. `tables` and `figure`: what came out, on the terminal and as one picture.

In 2, queries, keys and values are all the token vectors of `words.token_vectors`: one head, nothing
learned. So tokens attend to tokens of similar meaning. Softmax gets the scale at which it is as
sharp as YOSO on average (equal entropy), which makes them comparable.
"""

import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from yoso_core.demo.words import embed, read_text

if TYPE_CHECKING:
    from yoso_core.comparison import Comparison
    from yoso_core.demo.language import Language
    from yoso_core.demo.measure import SamplingError, WordAttention

T = TypeVar("T")


@dataclass(frozen=True)
class LanguageSizes:
    """The masked language model and its training: about half a minute on two cores."""

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
    learning_rate: float = 3e-3
    checks: int = 8
    """How often the loss on the text held out is taken in training."""
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
    """Hashes spent on the error at each ``m``, in ``hashes / m`` draws."""
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    repeats: int = 5
    agreement: int = 512
    """Tokens on which every variant is compared, the slow definitions among them."""
    language: LanguageSizes = field(default_factory=LanguageSizes)


@dataclass(frozen=True)
class DemoResult:
    """Everything that was measured, in the order of the tables."""

    sizes: Sizes
    source: str
    text_tokens: int
    """Tokens of the text that are used."""
    passage_tokens: int
    """Fewer than ``sizes.passage`` where the text is shorter."""
    softmax_scale: float
    words: "list[WordAttention]"
    """The word with the strongest preference for another comes first."""
    error: "SamplingError"
    lengths: list[int]
    seconds: dict[str, list[float]]
    """For each method, the median time at each of ``lengths``."""
    agreement: "list[Comparison]"
    language: "Language | None"
    """The trained model; ``None`` where it was not asked for, or ``not_trained`` says what is
    missing.
    """
    not_trained: str | None
    elapsed: float
    output: Path

    @property
    def agrees(self) -> bool:
        """Every variant that can run here agrees with the definition."""
        return all(comparison.agrees for comparison in self.agreement)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        return {
            **{name: getattr(self, name) for name in ("source", "text_tokens", "passage_tokens", "softmax_scale", "lengths", "seconds")},
            "agrees": self.agrees,
            "sizes": asdict(self.sizes),
            "words": [
                {"word": word.word, "others": word.others, "lift": {name: lift.tolist() for name, lift in word.lift.items()}}
                for word in self.words
            ],
            "error": asdict(self.error),
            "agreement": [comparison.to_dict() for comparison in self.agreement],
            "language": None if self.language is None else self.language.to_dict(),
            "not_trained": self.not_trained,
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
    sizes: Sizes | None = None,
) -> DemoResult:
    """Run the demo: print its tables, write its picture to ``output``, return the numbers.

    Parameters
    ----------
    text : a UTF-8 text file, or ``None`` for the help topics that come with Python.
    output : the picture to write; its folder must exist.
    seed : of every random draw.
    training : train the language model too, where PyTorch and transformers are installed; the
        tables say so where they are not.
    show : print the tables, and progress bars on a terminal.
    sizes : how much to measure.

    Raises
    ------
    ValueError : the text cannot be read, is no text or is too short; the output's folder does not
        exist.
    ImportError : matplotlib is not installed.
    """
    if not output.parent.is_dir():
        raise ValueError(f"output: the folder {output.parent} does not exist")
    from tqdm import tqdm

    from yoso_core.demo import measure
    from yoso_core.demo.figure import save_figure
    from yoso_core.demo.tables import print_tables

    sizes, start = sizes or Sizes(), time.perf_counter()
    m, tau = sizes.num_hash, sizes.hash_code_len
    source, content = read_text(text)
    with tqdm(total=5, bar_format="{desc:<28}{bar:30} {n}/{total}", leave=False, disable=None if show else True) as progress:

        def stage(title: str, work: Callable[[], T]) -> T:
            progress.set_description_str(title)
            done = work()
            progress.update()
            return done

        whole = stage("counting words", lambda: embed(content, sizes.dim, np.random.default_rng(seed)))
        passage = whole.middle(sizes.passage)
        x = passage.vectors
        scale = measure.softmax_scale(x, tau)

        def attention_of(word: int) -> "WordAttention":
            return measure.attention_by_word(passage, word, num_hash=m, hash_code_len=tau, scale=scale, seed=seed)

        words = stage("who attends to whom", lambda: list(map(attention_of, measure.prominent_words(passage, sizes.words))))
        words.sort(key=lambda attention: -attention.lift[measure.EXPECTATION][0])
        rng = np.random.default_rng(seed)
        error = stage("error against hashes", lambda: measure.sampling_error(x, list(sizes.nums_hash), tau, sizes.hashes, rng))
        lengths = [n for n in sizes.lengths if n <= len(whole)]
        methods = measure.attention_methods(m, tau, scale, seed)
        seconds = stage("time against tokens", lambda: measure.attention_times(whole, lengths, methods, sizes.repeats))
        part = passage.middle(sizes.agreement).vectors
        agreement = stage("agreement of the variants", lambda: measure.variant_agreement(part, m, tau, seed))
    not_trained = missing_for_training() if training else None
    language = None
    if training and not_trained is None:
        from yoso_core.demo.language import learn

        language = learn(content, sizes.language, seed, show=show)
    result = DemoResult(
        sizes=sizes,
        source=source,
        text_tokens=len(whole),
        passage_tokens=len(passage),
        softmax_scale=scale,
        words=words,
        error=error,
        lengths=lengths,
        seconds=seconds,
        agreement=agreement,
        language=language,
        not_trained=not_trained,
        elapsed=time.perf_counter() - start,
        output=output,
    )
    save_figure(result, output)
    if show:
        print_tables(result)
    return result
