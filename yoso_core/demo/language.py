"""A small YOSO masked language model over bytes: trained on the demo's text, tested on a part held
out, asked to fill masks there.

A token is a byte, so nothing has to be counted first, and every UTF-8 text will do. Some bytes are
replaced by a mask, and the model has to say which they were. It trains with sampled attention, at
linear cost, as the paper does; the same weights then run with the expectation and with fewer or
more hashes. On the CPU always, so that a seed gives the same model everywhere.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from yoso_core.arrays import Array
from yoso_core.demo.words import prose
from yoso_core.model.configuration import YosoConfig
from yoso_core.model.heads import IGNORED, YosoForMaskedLM
from yoso_core.model.layers import YosoLayer

if TYPE_CHECKING:
    from yoso_core.demo import LanguageSizes

MASK = 256
"""The token after the 256 bytes."""

SPANS = (1, 1, 1, 2, 3, 5)
"""Lengths of masked runs, each as likely as the next. Many single bytes: their neighbors teach most
at first.
"""

BLOCKS, HELD_OUT_EVERY, LONGEST_BLOCK = 20, 10, 4096
"""The text falls into at least 20 blocks, of at most 4,096 characters each, and one in ten is held
out.
"""

CONTEXT_GAIN = 3.0
"""How much larger the weights that take the context in start than the others."""

WORD = re.compile(r"[^\W\d_]{2,}")
SENTENCE_END = re.compile(r"(?<=[.!?:;]) |\n")


@dataclass(frozen=True)
class Score:
    """How well masked bytes of the text held out are guessed."""

    loss: float
    """Mean of ``-log p(byte)``, in nats."""
    right: float
    """Share of the bytes where the likeliest is the right one."""


@dataclass(frozen=True)
class Fill:
    """What a mask is filled with, and how likely the model says that is."""

    text: str
    probability: float


@dataclass(frozen=True)
class FilledMask:
    """One masked passage of the text held out, filled with every kind of attention."""

    before: str
    masked: str
    """What stands there in the text."""
    after: str
    fills: dict[int | None, list[Fill]]
    """By the number of hashes, ``None`` for the expectation: the likeliest first."""


@dataclass(frozen=True)
class Language:
    """The trained model's numbers."""

    parameters: int
    train_bytes: int
    held_out_bytes: int
    seconds: float
    """Of the training."""
    losses: list[float]
    """On the masked bytes of each training step."""
    held_out: list[tuple[int, float]]
    """``(step, loss)`` on the text held out, with as many hashes as in training."""
    frequencies: Score
    """Guessing by the frequencies of the bytes alone, whatever stands around."""
    untrained: Score
    trained: dict[int | None, Score]
    """By the number of hashes, ``None`` for the expectation: the same weights in all."""
    masks: list[FilledMask]

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers; the expectation is called so."""

        def named(by_hashes: dict[int | None, Any]) -> dict[str, Any]:
            return {"expectation" if m is None else str(m): value for m, value in by_hashes.items()}

        found = asdict(self)
        return found | {
            "trained": named(found["trained"]),
            "masks": [mask | {"fills": named(mask["fills"])} for mask in found["masks"]],
        }


def split(text: str) -> tuple[Array, str]:
    """``(bytes to train on, text held out)``: the prose on one line a paragraph; every tenth block
    of it is held out.
    """
    whole = "\n".join(" ".join(paragraph.split()) for paragraph in prose(text).split("\n\n"))
    size = max(1, min(len(whole) // BLOCKS, LONGEST_BLOCK))
    blocks = [whole[start : start + size] for start in range(0, len(whole), size)]
    held_out = blocks[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    kept = [block for i, block in enumerate(blocks) if i % HELD_OUT_EVERY != HELD_OUT_EVERY // 2]
    return as_bytes("".join(kept)), "\n".join(held_out)


def as_bytes(text: str) -> Array:
    return np.frombuffer(text.encode(), np.uint8)


def span_mask(rows: int, length: int, share: float, generator: torch.Generator) -> Tensor:
    """Bool ``(rows, length)``: runs of the lengths `SPANS`, which together cover about ``share``;
    at least one token of every row.
    """
    lengths = torch.tensor(SPANS)[torch.randint(len(SPANS), (rows, length), generator=generator)]
    starts = torch.rand(rows, length, generator=generator) < share * len(SPANS) / sum(SPANS)
    starts[torch.arange(rows), torch.randint(length, (rows,), generator=generator)] = True
    masked = torch.zeros(rows, length, dtype=torch.bool)
    for distance in range(max(SPANS)):
        masked[:, distance:] |= (starts & (lengths > distance))[:, : length - distance]
    return masked


def masked_batch(windows: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``(input_ids, labels)`` of windows of bytes ``(batch, n)``: what is masked has a label, all
    else does not count.
    """
    rows, length = windows.shape
    masked = span_mask(rows, length, share, generator)
    return windows.masked_fill(masked, MASK), windows.masked_fill(~masked, IGNORED)


def windows_at(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return data[starts[:, None] + torch.arange(length)]


def new_model(sizes: "LanguageSizes") -> YosoForMaskedLM:
    """A model that learns in hundreds of steps; from the usual start of a large one it takes
    thousands to leave the byte frequencies.

    Weights of size ``1 / sqrt(hidden)`` keep the size of what they multiply. Positions start as
    sines of all wavelengths, so that near ones look alike (Vaswani et al. 2017), and keys start as
    queries, so that what is alike attends to each other. The context, which YOSO scales to length
    1, starts larger. The convolutions of the heads start different from each other.
    """
    model = YosoForMaskedLM(
        YosoConfig(
            vocab_size=MASK + 1,
            hidden_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            intermediate_size=2 * sizes.hidden,
            hidden_dropout_prob=0.0,  # less than a handful of rounds over the text: too few to learn it by heart
            max_position_embeddings=sizes.length,
            initializer_range=sizes.hidden**-0.5,
            use_expectation=False,
            num_hash=sizes.num_hash,
            hash_code_len=sizes.hash_code_len,
            conv_window=sizes.conv_window,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    with torch.no_grad():
        table = model.yoso.embeddings.position_embeddings.weight
        angle = torch.arange(table.shape[0])[:, None] * 1000.0 ** -torch.linspace(0, 1, sizes.hidden // 2)
        table.copy_(torch.cat([angle.sin(), angle.cos()], dim=1) * (2 / sizes.hidden) ** 0.5)
        for layer in cast(Iterable[YosoLayer], model.yoso.encoder.layer):
            own = layer.attention.self
            own.key.weight.copy_(own.query.weight)
            layer.attention.output.dense.weight.mul_(CONTEXT_GAIN)
            torch.nn.init.normal_(own.conv.weight, std=sizes.conv_window**-0.5 / CONTEXT_GAIN)
    return model


@contextmanager
def attention_of(model: YosoForMaskedLM, num_hash: int | None) -> Iterator[None]:
    """Evaluation with so many hashes, or with the expectation for ``None``; then training as
    before.
    """
    config, training = model.config, model.training
    before = config.use_expectation, config.num_hash
    config.use_expectation, config.num_hash = num_hash is None, num_hash or config.num_hash
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        config.use_expectation, config.num_hash = before
        model.train(training)


def score(model: YosoForMaskedLM, input_ids: Tensor, labels: Tensor, num_hash: int | None) -> Score:
    with attention_of(model, num_hash):
        logits = model(input_ids=input_ids).logits[labels != IGNORED]
    wanted = labels[labels != IGNORED]
    loss = torch.nn.functional.cross_entropy(logits, wanted)
    return Score(float(loss), float((logits.argmax(dim=1) == wanted).float().mean()))


def frequency_score(data: Tensor, labels: Tensor) -> Score:
    """Of the byte frequencies in ``data``, each byte counted once more than it occurs so that none
    is impossible.
    """
    counts = torch.bincount(data, minlength=MASK).double() + 1
    wanted = labels[labels != IGNORED]
    return Score(float(-(counts / counts.sum()).log()[wanted].mean()), float((wanted == counts.argmax()).double().mean()))


def train(
    model: YosoForMaskedLM,
    data: Tensor,
    sizes: "LanguageSizes",
    generator: torch.Generator,
    check: Callable[[], float],
    progress: "tqdm[None]",
) -> tuple[list[float], list[tuple[int, float]]]:
    """AdamW; the learning rate rises over a tenth of the steps and falls to nothing along a cosine.
    The hashes are new in every step.

    Returns the loss of every step, and ``(step, check())`` at a few of them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, sizes.learning_rate, total_steps=sizes.steps, pct_start=0.1)
    length = model.config.max_position_embeddings
    losses: list[float] = []
    checks = [(0, check())]
    model.train()
    for step in range(1, sizes.steps + 1):
        starts = torch.randint(len(data) - length + 1, (sizes.batch,), generator=generator)
        input_ids, labels = masked_batch(windows_at(data, starts, length), sizes.masked, generator)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step * sizes.checks // sizes.steps > (step - 1) * sizes.checks // sizes.steps:
            checks.append((step, check()))
        progress.set_postfix_str(f"loss {np.mean(losses[-20:]):.2f}, on text held out {checks[-1][1]:.2f}", refresh=False)
        progress.update()
    return losses, checks


def fill(model: YosoForMaskedLM, input_ids: Tensor, places: Sequence[int], num_hash: int | None, beams: int = 16) -> list[Fill]:
    """The likeliest bytes for the masks at ``places`` of ``input_ids (n,)``, from left to right,
    the likeliest first.

    ``p(b_1 ... b_k) = prod_i p(b_i | the text, b_1 ... b_(i-1))``, each factor from the model's
    softmax with the later masks still there. Of the beginnings the ``beams`` likeliest are kept.
    Bytes that are no character at all are left out at the end.
    """
    rows, log_p = input_ids[None], torch.zeros(1)
    with attention_of(model, num_hash):
        for place in places:
            following = log_p[:, None] + model(input_ids=rows).logits[:, place].log_softmax(dim=-1)[:, :MASK]
            log_p, best = following.flatten().topk(beams)
            rows = rows[best // MASK]
            rows[:, place] = best % MASK
    found = []
    for row, p in zip(rows[:, list(places)].tolist(), log_p.exp().tolist(), strict=True):
        try:
            found.append(Fill(bytes(row).decode(), p))
        except UnicodeDecodeError:
            continue
    return found


def passages(text: str, length: int) -> list[str]:
    """Sentences of at most ``length`` bytes; longer ones are cut at a space. Short ones say too
    little to fill a mask from.
    """
    found = []
    for sentence in SENTENCE_END.split(text):
        cut = sentence.encode()[:length].decode(errors="ignore")
        if len(cut) < len(sentence):
            cut = cut.rpartition(" ")[0]
        if len(cut.encode()) >= length // 3 and len(WORD.findall(cut)) >= 3:
            found.append(cut)
    return list(dict.fromkeys(found))


def choose_masks(text: str, length: int, number: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """``(before, masked, after)``: in passages over the whole text a word of two or three letters,
    or the last two of a longer one.
    """
    found = passages(text, length)
    chosen = []
    for i in sorted(rng.choice(len(found), min(number, len(found)), replace=False)) if found else []:
        words = list(WORD.finditer(found[i]))[1:]
        start, end = words[rng.integers(len(words))].span()
        start = start if end - start < 4 else end - 2
        chosen.append((found[i][:start], found[i][start:end], found[i][end:]))
    return chosen


def fill_passage(
    model: YosoForMaskedLM, before: str, masked: str, after: str, nums_hash: Sequence[int | None], number: int = 3
) -> FilledMask:
    first, length = len(before.encode()), len(masked.encode())
    input_ids = torch.tensor([*before.encode(), *[MASK] * length, *after.encode()])
    places = range(first, first + length)
    return FilledMask(before, masked, after, {m: fill(model, input_ids, places, m)[:number] for m in nums_hash})


def learn(text: str, sizes: "LanguageSizes", seed: int, *, show: bool = True) -> Language:
    """Train on nine tenths of the text, then score and fill masks on the rest. Random numbers of
    others are left as they are.
    """
    bytes_to_train, held_out_text = split(text)
    data, held_out = (torch.from_numpy(x.astype(np.int64)) for x in (bytes_to_train, as_bytes(held_out_text)))
    length = min(sizes.length, len(held_out))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(0, len(held_out) - length + 1, length)
    starts = starts[torch.linspace(0, len(starts) - 1, min(sizes.windows, len(starts))).long()]
    input_ids, labels = masked_batch(windows_at(held_out, starts, length), sizes.masked, generator)
    ways: tuple[int | None, ...] = (None, *sizes.nums_hash)
    bar = "{desc:<28}{bar:30} {n}/{total} {elapsed}{postfix}"
    with (
        torch.random.fork_rng(devices=[]),
        tqdm(total=sizes.steps, bar_format=bar, leave=False, disable=None if show else True) as progress,
    ):
        torch.manual_seed(seed)
        progress.set_description_str("training a language model")
        model = new_model(sizes)
        untrained = score(model, input_ids, labels, sizes.num_hash)
        start = time.perf_counter()
        losses, checks = train(model, data, sizes, generator, lambda: score(model, input_ids, labels, sizes.num_hash).loss, progress)
        seconds = time.perf_counter() - start
    chosen = choose_masks(held_out_text, length, sizes.fills, np.random.default_rng(seed))
    return Language(
        parameters=model.num_parameters(),
        train_bytes=len(data),
        held_out_bytes=len(held_out),
        seconds=seconds,
        losses=losses,
        held_out=checks,
        frequencies=frequency_score(data, labels),
        untrained=untrained,
        trained={m: score(model, input_ids, labels, m) for m in ways},
        masks=[fill_passage(model, *passage, ways) for passage in chosen],
    )
