"""A small YOSO masked language model over bytes: trained on the demo's text, tested on a part held
out, asked to fill masks there.

A token is a byte, so nothing has to be counted first, and every UTF-8 text will do. Some bytes are
replaced by a mask, and the model has to say which they were. It trains with sampled attention, at
linear cost, as the paper does; the same weights then run with the expectation and with fewer or
more hashes. The training lasts as long as its `Clock` allows.

Training runs on one core: with matrices so small a second one brings little, and on a busy machine
the two would mostly wait for each other.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from yoso_core.arrays import Array
from yoso_core.demo.clock import Clock
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

TRAINING, SCORES = 0.8, 0.7
"""The shares of the time left for training, and after it for scores and fills."""

CONTEXT_GAIN = 3.0
"""How much larger the weights that take the context in start than the others."""

RISE, FEWEST_STEPS, FIRST_CHECK = 50, 8, 25
"""The learning rate rises over so many steps. So many steps are always made. The loss on the text
held out is taken after so many steps, after twice as many, and so on.
"""

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
    falls_from: int
    """The learning rate falls after this step. It follows from the number of steps, unless training
    was stopped in the middle of the fall; together with the seed it makes the training repeatable.
    """
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
    spent: Callable[[], float],
    report: Callable[[int, float, float], None],
) -> tuple[list[float], list[tuple[int, float]], int]:
    """AdamW. The learning rate rises over the first `RISE` steps, stays, and falls to zero over the
    last quarter of the steps. The hashes are new in every step.

    ``spent()`` is the share of the time that is over. The fall begins after three quarters of
    ``sizes.steps``, or of the time if that comes first, and takes a third of the steps before it:
    so the number of steps alone says what each of them does. Training stops when the time is
    exceeded by a fifth, in the middle of the fall if need be, but not before `FEWEST_STEPS`.

    Returns the loss of every step; ``(step, check())`` at the start, at steps 25, 50, 100 and so
    on, and at the end; and the step after which the rate falls. ``report(step, loss, loss held
    out)`` is called after every step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, betas=(0.9, 0.98))
    length = model.config.max_position_embeddings
    losses: list[float] = []
    checks = [(0, check())]
    model.train()
    falls_from, last = 3 * sizes.steps // 4, sizes.steps
    for step in range(1, sizes.steps + 1):
        if step > last or (step > FEWEST_STEPS and spent() > 1.2):
            break
        if 3 * FEWEST_STEPS // 4 < step <= falls_from and spent() >= 0.75:
            falls_from, last = step - 1, math.ceil((step - 1) * 4 / 3)
        rate = min(step / RISE, 1.0, (last - step + 1) / max(1, last - falls_from))
        optimizer.param_groups[0]["lr"] = rate * sizes.learning_rate
        starts = torch.randint(len(data) - length + 1, (sizes.batch,), generator=generator)
        input_ids, labels = masked_batch(windows_at(data, starts, length), sizes.masked, generator)
        loss = model(input_ids=input_ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % FIRST_CHECK == 0 and (step // FIRST_CHECK).bit_count() == 1:
            checks.append((step, check()))
        report(step, float(np.mean(losses[-20:])), checks[-1][1])
    if losses and checks[-1][0] != len(losses):
        checks.append((len(losses), check()))
    return losses, checks, falls_from


def fill(model: YosoForMaskedLM, input_ids: Tensor, positions: Sequence[int], num_hash: int | None, beams: int = 16) -> list[Fill]:
    """The likeliest bytes for the masks at ``positions`` of ``input_ids (n,)``, from left to right,
    the likeliest first.

    ``p(b_1 ... b_k) = prod_i p(b_i | the text, b_1 ... b_(i-1))``, each factor from the model's
    softmax with the later masks still there. Of the beginnings the ``beams`` likeliest are kept.
    Bytes that are no character at all are left out at the end.
    """
    rows, log_p = input_ids[None], torch.zeros(1)
    with attention_of(model, num_hash):
        for position in positions:
            following = log_p[:, None] + model(input_ids=rows).logits[:, position].log_softmax(dim=-1)[:, :MASK]
            log_p, best = following.flatten().topk(beams)
            rows = rows[best // MASK]
            rows[:, position] = best % MASK
    found = []
    for row, p in zip(rows[:, list(positions)].tolist(), log_p.exp().tolist(), strict=True):
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
    positions = range(first, first + length)
    return FilledMask(before, masked, after, {m: fill(model, input_ids, positions, m)[:number] for m in nums_hash})


def compile_kernels(sizes: "LanguageSizes") -> None:
    """Do once what training and evaluation do, so that Numba compiles it and keeps it."""
    torch.set_num_threads(1)
    model = new_model(sizes)
    input_ids = torch.zeros(sizes.batch, sizes.length, dtype=torch.long)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    for num_hash in (None, sizes.num_hash):
        score(model, input_ids, input_ids, num_hash)


def learn(text: str, sizes: "LanguageSizes", seed: int, clock: Clock | None = None) -> Language:
    """Train on nine tenths of the text, then score and fill masks on the rest, within the time of
    the clock. Random numbers of others, and PyTorch's number of threads, are left as they are.
    """
    clock = clock or Clock()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            return _learn(text, sizes, seed, clock)
    finally:
        torch.set_num_threads(threads)


def _learn(text: str, sizes: "LanguageSizes", seed: int, clock: Clock) -> Language:
    bytes_to_train, held_out_text = split(text)
    data, held_out = (torch.from_numpy(x.astype(np.int64)) for x in (bytes_to_train, as_bytes(held_out_text)))
    length = min(sizes.length, len(held_out))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.arange(0, len(held_out) - length + 1, length)
    starts = starts[torch.linspace(0, len(starts) - 1, min(sizes.windows, len(starts))).long()]
    input_ids, labels = masked_batch(windows_at(held_out, starts, length), sizes.masked, generator)
    torch.manual_seed(seed)
    clock.doing("training a language model")
    model = new_model(sizes)
    untrained = score(model, input_ids, labels, sizes.num_hash)
    start, left = clock.elapsed, clock.share(TRAINING)
    allowed = left()

    def check() -> float:
        return score(model, input_ids, labels, sizes.num_hash).loss

    def spent() -> float:
        return 0.0 if math.isinf(allowed) else 1 - left() / allowed

    def report(step: int, loss: float, loss_held_out: float) -> None:
        clock.doing(f"training a language model: step {step:,}, loss {loss:.2f}, on text held out {loss_held_out:.2f}")

    losses, checks, falls_from = train(model, data, sizes, generator, check, spent, report)
    seconds = clock.elapsed - start
    if len(losses) < sizes.steps:
        clock.left_out.append(f"training: {len(losses):,} of {sizes.steps:,} steps in {seconds:.0f} s")
    chosen = choose_masks(held_out_text, length, sizes.fills, np.random.default_rng(seed))
    trained, masks = evaluate(model, input_ids, labels, sizes.nums_hash, chosen, clock)
    return Language(
        parameters=model.num_parameters(),
        train_bytes=len(data),
        held_out_bytes=len(held_out),
        seconds=seconds,
        losses=losses,
        falls_from=falls_from,
        held_out=checks,
        frequencies=frequency_score(data, labels),
        untrained=untrained,
        trained=trained,
        masks=masks,
    )


def evaluate(
    model: YosoForMaskedLM, input_ids: Tensor, labels: Tensor, nums_hash: Sequence[int], chosen: list[tuple[str, str, str]], clock: Clock
) -> tuple[dict[int | None, Score], list[FilledMask]]:
    """The scores of the trained model with the expectation and with every number of hashes, and the
    masks filled in the same ways; fewer where the time is short, but at least one of each.
    """
    clock.doing("filling masks")
    left, ways = clock.share(SCORES), (None, *nums_hash)
    trained: dict[int | None, Score] = {}
    for m in ways:
        if not trained or left() > 0:
            trained[m] = score(model, input_ids, labels, m)
    if len(trained) < len(ways):
        clock.left_out.append("scores with " + " and ".join(f"m = {m}" for m in ways if m not in trained))
    masks: list[FilledMask] = []
    for passage in chosen:
        if not masks or left() > 0:
            masks.append(fill_passage(model, *passage, tuple(trained)))
    if len(masks) < len(chosen):
        clock.left_out.append(f"masks to fill: {len(masks)} of {len(chosen)}")
    return trained, masks
