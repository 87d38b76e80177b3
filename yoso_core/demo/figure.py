"""The demo's picture: three panels side by side, or four in a square where a model was trained."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from yoso_core.demo.measure import EXPECTATION, METHODS, SAMPLED, SOFTMAX, AttentionTimes, SamplingError, WordAttention
from yoso_core.demo.tables import LABELS, time_label
from yoso_core.draw import BLUE, DASHES, FAINT, GRAY, INK, ORANGE, legend_under_title, look
from yoso_core.files import written

if TYPE_CHECKING:
    from yoso_core.demo import DemoResult
    from yoso_core.demo.language import Language

# They stay apart in black and white too: a light gray, a dark blue, hatching.
COLOR = {SOFTMAX: GRAY, EXPECTATION: BLUE, SAMPLED: ORANGE}
MARKER = {SOFTMAX: "s", EXPECTATION: "o", SAMPLED: "D"}


def save_figure(result: "DemoResult", path: Path) -> None:
    """Draw the panels and write them to ``path``: 1800 by 630 pixels, or 1560 by 1200 with the
    language model.
    """
    sizes, language = result.sizes, result.language
    rows, columns, size, ratios = (1, 3, (12, 4.2), [1.05, 0.95, 1.1]) if language is None else (2, 2, (10.4, 8), [1, 1.05])
    with look():
        figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03))
        panels = figure.subplots(rows, columns, width_ratios=ratios).flat
        draw_words(panels[0], result.words[0])
        draw_error(panels[1], result.error)
        draw_times(panels[2], result.times)
        if language is not None:
            draw_learning(panels[3], language, sizes.language.num_hash)
        caption = (
            f"Self-attention over {result.passage_tokens:,} words of {result.source}. d = {sizes.dim}, tau = {sizes.hash_code_len}, "
            f"m = {sizes.num_hash} where no axis says otherwise."
        )
        if language is not None:
            caption += f" The model: {language.parameters:,} parameters, trained on {language.train_bytes:,} bytes of the same text."
        figure.supxlabel(textwrap.fill(caption, round(13.3 * size[0])), fontsize=8.5, color="#666666", parse_math=False)
        with written(path) as part:
            figure.savefig(part)


def draw_words(axes: Axes, attention: WordAttention, number: int = 8) -> None:
    """Bars: the words that one word attends to most, side by side under each method."""
    rows = np.arange(len(attention.others[:number]))
    for place, name in enumerate(METHODS):
        lift, hatch = attention.lift[name][:number], "/////" if name == SAMPLED else None
        bars = rows + (place - 1) * 0.27
        axes.barh(bars, lift, 0.25, color=COLOR[name], label=LABELS[name], linewidth=0, edgecolor="white", hatch=hatch)
    axes.axvline(1, color=INK, linewidth=0.9, linestyle=DASHES)
    axes.set_yticks(rows, attention.others[:number])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_title(f"What “{attention.word}” attends to")
    axes.set_xlabel("attention, as a multiple of an even share (dashed)")
    legend_under_title(axes)


def draw_error(axes: Axes, error: SamplingError) -> None:
    """Log-log: error against the number of hashes, beside a line of slope -1/2."""
    m, rms = np.array(error.num_hash), np.array(error.rms)
    level = np.exp(np.mean(np.log(rms * np.sqrt(m))))
    slope = f"measured, slope {error.slope:.2f}".replace("-", "\N{MINUS SIGN}")
    axes.plot(m, rms, MARKER[SAMPLED], color=COLOR[SAMPLED], markeredgecolor=INK, markersize=7, label=slope, zorder=3)
    axes.plot(m, level / np.sqrt(m), color=INK, linewidth=1, linestyle=DASHES, label=r"$1/\sqrt{m}$")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(m, [str(i) for i in m])
    axes.set_yticks([t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if rms.min() / 1.5 <= t <= rms.max() * 1.5])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.minorticks_off()
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_title("More hashes, less error")
    axes.set_xlabel("number of hashes m")
    axes.set_ylabel("RMS error relative to the expectation")
    legend_under_title(axes)


def draw_times(axes: Axes, times: AttentionTimes) -> None:
    """Log-log: time against the number of tokens, and how far apart softmax and sampling are at the
    last.
    """
    lengths, seconds = times.lengths, times.seconds
    for name in METHODS:
        label = time_label(name, times.softmax_library)
        axes.plot(lengths, np.array(seconds[name]) * 1e3, color=COLOR[name], marker=MARKER[name], label=label, linewidth=2)
    slow, fast = seconds[SOFTMAX][-1] * 1e3, seconds[SAMPLED][-1] * 1e3
    arrow = {"arrowstyle": "<->", "color": INK, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (lengths[-1] * 1.2, slow), (lengths[-1] * 1.2, fast), arrowprops=arrow)
    axes.text(lengths[-1] * 1.3, np.sqrt(slow * fast), f"{slow / fast:,.3g}×", va="center", fontweight="bold")
    axes.set(xscale="log", yscale="log")
    axes.set_xlim(right=lengths[-1] * 2.6)
    axes.set_xticks(lengths, [f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}" for n in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.minorticks_off()
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_title("Time against tokens")
    axes.set_xlabel("tokens n (1K = 1,024)")
    axes.set_ylabel("time of one head, milliseconds")
    legend_under_title(axes)


def draw_learning(axes: Axes, language: "Language", num_hash: int, window: int = 20) -> None:
    """The loss of the language model over the training steps, beside that of guessing by the
    frequencies of the bytes.
    """
    losses = np.array(language.losses)
    window = min(window, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), "valid")
    steps, held_out = zip(*language.held_out, strict=True)
    axes.plot(np.arange(len(smooth)) + (window + 1) / 2, smooth, color=GRAY, linewidth=2, label="in training")
    axes.plot(steps, held_out, MARKER[SAMPLED], color=ORANGE, markeredgecolor=INK, markersize=7, label="text held out", zorder=3)
    axes.axhline(language.frequencies.loss, color=INK, linewidth=0.9, linestyle=DASHES, label="byte frequencies")
    axes.annotate(
        f"{held_out[-1]:.2f}", (steps[-1], held_out[-1]), (0, -8), textcoords="offset points", ha="center", va="top", fontweight="bold"
    )
    axes.margins(y=0.12)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_title(f"A masked language model, {len(losses):,} steps")
    axes.set_xlabel(f"training step, sampled with m = {num_hash}")
    axes.set_ylabel("loss, nats a masked byte")
    legend_under_title(axes)
