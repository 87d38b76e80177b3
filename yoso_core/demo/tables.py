"""The demo's numbers on the terminal."""

import sys
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yoso_core.comparison_view import duration
from yoso_core.demo.measure import EXPECTATION, METHODS, SAMPLED, SOFTMAX

if TYPE_CHECKING:
    from yoso_core.demo import DemoResult
    from yoso_core.demo.language import Fill, FilledMask, Language, Score

LABELS = {SOFTMAX: "softmax", EXPECTATION: "YOSO expected", SAMPLED: "YOSO sampled"}


def print_tables(result: "DemoResult") -> None:
    """Four tables, and two more on the language model, each with a sentence or two on what it
    shows.
    """
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, highlight=False)
    n, sizes = result.passage_tokens, result.sizes
    console.print(
        f"Self-attention over {n:,} words from the middle of {result.source} ({result.text_tokens:,} words of prose whose statistics are "
        f"known); d = {sizes.dim}, tau = {sizes.hash_code_len}, m = {sizes.num_hash} where nothing else is said."
    )
    if n < sizes.passage:
        console.print(f"The text is shorter than {sizes.passage:,} such words, so all of it is used.")
    for show in (words_table, error_table, time_table, agreement_table):
        console.print()
        console.print(show(result))
    if result.language is not None:
        console.print()
        console.print(learning_table(result.language, result.sizes.language.num_hash))
        if result.language.masks:
            console.print()
            console.print(fills_table(result.language))
    elif result.not_trained is not None:
        console.print(f"\nNot here: a masked language model trained on this text, which {result.not_trained}")
    if result.left_out:
        console.print(f"\nLeft out, to end in about {result.budget:.0f} s (--budget gives more): {'; '.join(result.left_out)}.")
    console.print(f"\nPicture: {result.output}    Time in all: {result.elapsed:.0f} s")


def _table(title: str, caption: str) -> Table:
    return Table(title=title, caption=caption, title_justify="left", caption_justify="left", title_style="bold", caption_style="dim")


def words_table(result: "DemoResult", number: int = 5) -> Table:
    table = _table(
        "1. The words that a word attends to",
        "Times an even share: 5.0 is five times the attention that the word would get if every token got the same. Softmax runs at scale "
        f"{result.softmax_scale:.1f}, where it is as sharp as YOSO on average; sampled is one draw of {result.sizes.num_hash} hashes.",
    )
    for column in ("word", "method", "attends to, beside itself"):
        table.add_column(column, no_wrap=column == "method")
    for attention in result.words:
        for name in METHODS:
            top = ", ".join(f"{word} {lift:.1f}" for word, lift in attention.strongest(name, number))
            table.add_row(attention.word if name == METHODS[0] else "", LABELS[name], top, end_section=name == METHODS[-1])
    return table


def error_table(result: "DemoResult") -> Table:
    table = _table(
        f"2. The error of sampling falls as 1 / sqrt(m): fitted slope {result.error.slope:.2f}",
        "RMS error of the attention's output, relative to the exact expectation, before the output is normalized. Four times the hashes "
        "halve it.",
    )
    table.add_column("hashes m")
    for m in result.error.num_hash:
        table.add_column(str(m), justify="right")
    table.add_row("error", *(f"{rms:.1%}" for rms in result.error.rms))
    return table


def time_label(name: str, softmax_library: str) -> str:
    """A method's name beside its time: softmax says whose it is."""
    return f"{LABELS[name]}, {softmax_library}" if name == SOFTMAX else LABELS[name]


def time_table(result: "DemoResult") -> Table:
    lengths, seconds, softmax = result.times.lengths, result.times.seconds, result.times.softmax_library
    n, m, buckets, runs = lengths[-1], result.sizes.num_hash, 1 << result.sizes.hash_code_len, result.times.runs
    ratio = seconds[SOFTMAX][-1] / seconds[SAMPLED][-1]
    whose = {
        "PyTorch": "PyTorch's scaled_dot_product_attention",
        "NumPy": "Softmax in NumPy (PyTorch, whose softmax is compiled, is missing)",
    }
    table = _table(
        "3. Time of one head against the number of tokens n",
        f"At n = {n:,} softmax and the expectation weigh {n * n / 1e6:,.0f} million pairs of tokens. Sampling weighs none: each token is "
        f"added to one of {buckets} buckets and reads one, {m} times over. {whose[softmax]} takes {ratio:,.3g} times as long as sampling "
        f"here. {'One run' if runs == 1 else f'Medians of {runs} runs'}.",
    )
    table.add_column("method", no_wrap=True)
    for length in lengths:
        table.add_column(f"{length:,}", justify="right", no_wrap=True)
    table.add_column("grows as", justify="right")
    for name in METHODS:
        table.add_row(time_label(name, softmax), *map(duration, seconds[name]), _growth(lengths, seconds[name], runs))
    return table


def _growth(lengths: list[int], seconds: list[float], runs: int) -> str:
    """The power of n that the last three times follow; times of too few runs say none."""
    if len(lengths) < 3 or runs < 3:
        return "-"
    return f"n^{np.polyfit(np.log(lengths[-3:]), np.log(seconds[-3:]), 1)[0]:.1f}"


def agreement_table(result: "DemoResult") -> Table:
    n = min(result.sizes.agreement, result.passage_tokens)
    table = _table(
        "4. Every variant gives the same answer: " + ("all agree" if result.agrees else "NOT ALL AGREE"),
        f"On {n:,} tokens of the passage, against the definition in float64. Hash codes must be equal bit for bit; sums may differ by "
        "rounding.",
    )
    for column in ("operation", "variant", "verdict", "difference", "time"):
        table.add_column(column, justify="right" if column in ("difference", "time") else "left", no_wrap=True)
    for comparison in result.agreement:
        for i, row in enumerate(comparison.rows):
            ran = row.median_seconds is not None
            table.add_row(
                comparison.op if i == 0 else "",
                row.variant,
                row.verdict,
                "-" if not ran else f"{row.codes_differing} codes" if row.rms_error is None else f"{row.rms_error:.1e} RMS",
                "-" if row.median_seconds is None else duration(row.median_seconds),
                style=None if row.verdict == "agrees" else "dim" if row.verdict == "cannot run" else "bold red",
                end_section=i == len(comparison.rows) - 1,
            )
    return table


def attention_label(num_hash: int | None) -> str:
    return LABELS[EXPECTATION] if num_hash is None else f"{LABELS[SAMPLED]}, m = {num_hash}"


def learning_table(language: "Language", num_hash: int) -> Table:
    steps, start, end = len(language.losses), language.untrained.loss, language.trained[None].loss
    table = _table(
        f"5. A masked language model, {steps:,} training steps: {start:.2f} nats at the start, {end:.2f} at the end",
        f"YOSO with {language.parameters:,} parameters over bytes, trained on {language.train_bytes:,} of them for {steps:,} steps in "
        f"{language.seconds:.0f} s on one core, sampled with m = {num_hash}; how far it comes depends on the time. Tested on masked bytes "
        f"of {language.held_out_bytes:,} others. The rows at the end have the same weights. Beside the attention stands a convolution over "
        "the neighbors (YOSO-C), which is the same whatever m.",
    )
    table.add_column("guessing by", no_wrap=True)
    for column in ("loss, nats a byte", "bytes right"):
        table.add_column(column, justify="right", no_wrap=True)

    def row(label: str, score: "Score", end_section: bool = False) -> None:
        table.add_row(label, f"{score.loss:.3f}", f"{score.right:.1%}", end_section=end_section)

    row("the frequencies of the bytes alone", language.frequencies)
    row("the model at the start", language.untrained, end_section=True)
    for m, score in language.trained.items():
        row(f"at the end, {attention_label(m)}", score)
    return table


def fills_table(language: "Language") -> Table:
    table = _table(
        "6. What it fills a mask with, in text that it has not seen",
        "The likeliest fill, letter by letter, and its probability; * is what stands in the text. Same weights in every column.",
    )
    table.add_column("masked", ratio=1)
    table.add_column("text", no_wrap=True)
    ways = list(language.trained)
    for m in ways:
        table.add_column("expected" if m is None else f"m = {m}", no_wrap=True)
    for mask in language.masks:
        shown = Text.assemble(mask.before, ("_" * len(mask.masked), "bold"), mask.after)
        table.add_row(shown, Text(mask.masked), *(_likeliest(mask, mask.fills[m]) for m in ways))
    return table


def _likeliest(mask: "FilledMask", fills: "list[Fill]") -> Text:
    if not fills:
        return Text("no text")
    right = fills[0].text == mask.masked
    text = fills[0].text if fills[0].text.isprintable() else repr(fills[0].text)
    return Text(f"{text}{'*' * right} {fills[0].probability:.0%}", "bold" if right else "")
