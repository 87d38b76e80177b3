"""Pictures with one look: Okabe and Ito's colors on white, readable in black-and-white print.

Nothing here touches `matplotlib.pyplot`: a `Picture` shows itself wherever a notebook displays it,
always in the same bytes. The helpers draw into matplotlib axes, so that a caller can add what is
special to it.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.style
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle, Wedge
from matplotlib.text import Text
from matplotlib.ticker import LogLocator
from PIL import Image

from yoso_core.arrays import Array
from yoso_core.reference.hashing import pack_bits

# Okabe and Ito's palette, told apart by every kind of color vision.
BLUE, ORANGE, GREEN, VERMILION = "#0072b2", "#e69f00", "#009e73", "#d55e00"
SKY, PURPLE, YELLOW, GRAY = "#56b4e9", "#cc79a7", "#f0e442", "#b3b3b3"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, SKY, PURPLE, YELLOW, GRAY)
INK, FAINT = "#333333", "#dddddd"
MARKERS = "oDs^vPX*"
DASHES = (0, (4, 3))

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=PALETTE),
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.8,
}

WEIGHTS: Colormap = LinearSegmentedColormap.from_list("weights", ["#ffffff", SKY, BLUE, "#08243a"])
"""From nothing to much; its lightness falls all the way, so it survives a black-and-white printer.
"""

SIGNED: Colormap = LinearSegmentedColormap.from_list("signed", [VERMILION, "#ffffff", BLUE])
"""Negative, zero, positive. Print cannot tell the ends apart: write the numbers too."""

DOTS_PER_INCH = 150
"""Of a displayed picture. It is shown at 96 to an inch, so it is sharp on a fine screen too."""


def look() -> AbstractContextManager[None]:
    """What is drawn inside has the look, whatever a reader's matplotlibrc says."""
    return mpl.style.context(["default", STYLE])


def use_look() -> None:
    """Make the look matplotlib's default in this process: the first line of a tutorial."""
    mpl.style.use(["default", STYLE])


class Picture(Figure):
    """A figure that a notebook displays by itself: a PNG of at most 256 colors, small, and the same
    bytes on every run.
    """

    def pixels(self) -> Array:
        """The drawn figure, uint8 ``(height, width, 4)``."""
        canvas = FigureCanvasAgg(self)
        self.set_dpi(DOTS_PER_INCH)
        with look():
            for _ in range(2):  # beside a color bar the layout settles in the second pass, and drawing makes but one
                self.draw_without_rendering()
            canvas.draw()
        return np.array(canvas.buffer_rgba())

    def savefig(self, *args: Any, **options: Any) -> None:
        with look():
            super().savefig(*args, **options)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        image = Image.fromarray(self.pixels()).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        file = io.BytesIO()
        image.save(file, "png", optimize=True)
        return file.getvalue(), {side: length * 96 // DOTS_PER_INCH for side, length in (("width", image.width), ("height", image.height))}


def picture(columns: int = 1, rows: int = 1, *, width: float | None = None, height: float = 3.2, **subplots: Any) -> tuple[Picture, Any]:
    """``(figure, axes)`` as `matplotlib.pyplot.subplots` gives them: ``axes`` is one, or an array
    of them.

    ``width`` and ``height`` in inches, of the whole figure. Without a width: 4 for a column, at
    least 5 and at most 9. ``subplots`` go to `Figure.subplots` (``width_ratios``, ``sharey``, ...).
    """
    figure = Picture(
        figsize=(min(9.0, max(5.0, 4.0 * columns)) if width is None else width, height),
        layout=ConstrainedLayoutEngine(compress=True, w_pad=0.08, h_pad=0.08),
    )
    return figure, figure.subplots(rows, columns, **subplots)


def clipped(figure: Picture) -> list[str]:
    """What is wrong with a figure's texts: beyond its edge, too small, tick labels over each other.
    Empty if it is fit to show.
    """
    pixels = figure.pixels()
    height, width = pixels.shape[:2]
    wrong = []
    if any((edge != pixels[0, 0]).any() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])):
        wrong.append("something reaches the edge of the figure")
    undrawn = set()  # the labels of ticks outside what an axis shows
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        slack = 1e-9 * (high - low)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
            if not axis.axes.axison or not low - slack <= tick.get_loc() <= high + slack:
                undrawn |= {tick.label1, tick.label2}
        level = [label for label in axis.get_ticklabels() if label not in undrawn and label.get_text() and not label.get_rotation()]
        for first, second in pairwise(level):
            if first.get_window_extent().overlaps(second.get_window_extent()):
                wrong.append(f"{first.get_text()!r} and {second.get_text()!r} overlap on an axis")
    for text in figure.findobj(Text):
        if text in undrawn or not (text.get_visible() and text.get_text().strip()):
            continue
        box = text.get_window_extent()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1:
            wrong.append(f"{text.get_text()!r} reaches beyond the figure")
        elif (points := float(text.get_fontsize())) < 7:
            wrong.append(f"{text.get_text()!r} is set in {points:g} points")
    return wrong


def legend_under_title(axes: Axes, columns: int = 3) -> None:
    """One row between title and axes, where no data can be hidden."""
    axes.set_title(axes.get_title(loc="left"), pad=26)
    legend = axes.legend(
        loc="lower left", bbox_to_anchor=(-0.03, 1), ncols=columns, columnspacing=1, handlelength=1.6, handletextpad=0.4, borderpad=0.2
    )
    legend.set_in_layout(False)  # its width shall not push the panels apart


def error_curve(
    axes: Axes,
    x: Sequence[float] | Array,
    error: Sequence[float] | Array,
    *,
    slope: float | None = -0.5,
    label: str = "measured",
    number: int = 0,
) -> float:
    """Dots on log-log axes, beside a dashed line of the slope that theory expects, through their
    middle. Returns the measured slope.

    ``number`` picks color and marker, for several curves in one figure.
    """
    x, error = np.asarray(x, float), np.asarray(error, float)
    measured = float(np.polyfit(np.log(x), np.log(error), 1)[0])
    shown = f"{label}, slope {measured:.2f}".replace("-", "\N{MINUS SIGN}")
    axes.plot(x, error, MARKERS[number], color=PALETTE[number], markeredgecolor=INK, markersize=7, label=shown, zorder=3)
    if slope is not None:
        level = np.exp(np.mean(np.log(error) - slope * np.log(x)))
        expected = f"slope {slope:g}".replace("-", "\N{MINUS SIGN}")
        axes.plot(x, level * x**slope, color=INK, linewidth=1, linestyle=DASHES, label=expected)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(x, [f"{value:,g}" for value in x])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    low, high = np.min(error), np.max(error)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.minorticks_off()
    axes.grid(True)
    return measured


def heat_map(
    axes: Axes,
    matrix: Array,
    *,
    title: str = "",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    numbers: str | None = None,
    limits: tuple[float, float] | None = None,
    signed: bool = False,
) -> Any:
    """A matrix as squares, row 0 on top. ``numbers`` is a format such as ``".2f"`` to write each
    value in its square.

    ``limits`` of the colors: by default 0 (or minus the largest, if ``signed``) to the largest.
    Returns the image, for a color bar.
    """
    largest = float(np.max(np.abs(matrix), initial=0)) or 1.0
    low, high = limits or (-largest if signed else 0.0, largest)
    image = axes.imshow(matrix, cmap=SIGNED if signed else WEIGHTS, vmin=low, vmax=high, interpolation="nearest")
    if numbers is not None:
        for (i, j), value in np.ndenumerate(matrix):
            shade = (value - low) / ((high - low) or 1)
            dark = shade > 0.5 if not signed else abs(2 * shade - 1) > 0.75
            text = format(value, numbers)
            text = text.lstrip("-") if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")
            axes.text(j, i, text, ha="center", va="center", fontsize=8.5, color="white" if dark else INK)
    if columns is not None:
        axes.set_xticks(range(matrix.shape[1]), columns, rotation=90 if max(map(len, columns)) > 2 else 0)
    if rows is not None:
        axes.set_yticks(range(matrix.shape[0]), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)
    axes.set_title(title)
    return image


def matrices(
    shown: Mapping[str, Array],
    *,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    x: str = "key j",
    y: str = "query i",
    numbers: str | None = None,
    limits: tuple[float, float] | None = None,
    signed: bool = False,
    height: float = 3.4,
) -> Picture:
    """Matrices of one shape side by side under their titles, in one scale of colors."""
    figure, grid = picture(len(shown), height=height, squeeze=False, sharey=True)
    largest = max(float(np.max(np.abs(matrix), initial=0)) for matrix in shown.values()) or 1.0
    scale = limits or (-largest if signed else 0.0, largest)
    for place, (axes, (title, matrix)) in enumerate(zip(grid[0], shown.items(), strict=True)):
        image = heat_map(axes, matrix, title=title, rows=rows, columns=columns, numbers=numbers, limits=scale, signed=signed)
        axes.set_xlabel(x)
        if place == 0:
            axes.set_ylabel(y)
    figure.colorbar(image, ax=grid[0].tolist(), shrink=0.85, pad=0.02)
    return figure


def bits_text(code: int, hash_code_len: int) -> str:
    """A code as its bits, the last bit first, as numbers are written: 6 with 3 bits is
    ``"110"``.
    """
    return format(int(code), f"0{hash_code_len}b")


def bucket_color(code: int) -> str:
    """The color of a bucket: that of the code below 8; above, buckets that differ in one bit still
    differ in color.
    """
    folded, rest = 0, int(code)
    while rest:
        folded, rest = folded ^ rest % 8, rest // 8
    return PALETTE[folded]


def bucket_circle(axes: Axes, planes: Array, *, points: Array | None = None, names: Sequence[str] | None = None) -> None:
    """The unit circle cut into buckets by planes ``(2, tau)`` (normals in columns), each labeled
    with its code, bits written.

    ``points (n, 2)`` are drawn as dots on the circle, named by ``names``.
    """
    tau = planes.shape[1]
    normal = np.arctan2(planes[1], planes[0])
    edges = np.sort(np.concatenate([normal + np.pi / 2, normal - np.pi / 2]) % (2 * np.pi))
    for start, end in zip(edges, [*edges[1:], edges[0] + 2 * np.pi], strict=True):
        middle = (start + end) / 2
        code = int(pack_bits(np.array([np.cos(middle), np.sin(middle)]) @ planes > 0))
        sector = Wedge((0, 0), 1, np.degrees(start), np.degrees(end), facecolor=bucket_color(code), alpha=0.35, edgecolor="none")
        axes.add_patch(sector)
        axes.text(1.22 * np.cos(middle), 1.22 * np.sin(middle), bits_text(code, tau), ha="center", va="center", fontsize=9)
    for b, angle in enumerate(normal):
        across = angle + np.pi / 2
        axes.plot([np.cos(across), -np.cos(across)], [np.sin(across), -np.sin(across)], color=INK, linewidth=1.2)
        tip = (0.55 * np.cos(angle), 0.55 * np.sin(angle))
        axes.annotate("", tip, (0, 0), arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 0, "shrinkB": 0})
        axes.text(1.2 * tip[0], 1.2 * tip[1], f"$w_{b}$", ha="center", va="center", fontsize=10)
    axes.add_patch(Wedge((0, 0), 1, 0, 360, facecolor="none", edgecolor=INK, linewidth=0.8))
    if points is not None:
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        axes.plot(unit[:, 0], unit[:, 1], "o", color=INK, markersize=6, zorder=4)
        for name, (x, y) in zip(names or [], unit, strict=False):
            axes.text(0.86 * x, 0.86 * y, name, ha="center", va="center", fontsize=9, fontweight="bold")
    axes.set(xlim=(-1.45, 1.45), ylim=(-1.4, 1.4), aspect="equal")
    axes.axis("off")


def bucket_sphere(axes: Axes, planes: Array, *, points: Array | None = None, pixels: int = 240) -> None:
    """The front half of the unit sphere, colored by bucket: planes ``(3, tau)``; seen along the
    second axis.

    ``points (n, 3)`` on the front are dots.
    """
    tau = planes.shape[1]
    x, z = np.meshgrid(np.linspace(-1.02, 1.02, pixels), np.linspace(1.02, -1.02, pixels))
    inside = x**2 + z**2 <= 1
    y = np.sqrt(np.where(inside, 1 - x**2 - z**2, 0))
    code = pack_bits(np.stack([x, y, z], -1) @ planes > 0)
    colors = np.array([to_rgb(bucket_color(c)) for c in range(1 << tau)])
    front_half = np.dstack([colors[code], 0.4 * inside])
    axes.imshow(front_half, extent=(-1.02, 1.02, -1.02, 1.02), interpolation="nearest")
    for b in range(tau):
        side = np.where(inside, np.stack([x, y, z], -1) @ planes[:, b], np.nan)
        axes.contour(x, z, side, levels=[0], colors=[INK], linewidths=1.2)
    for seen in np.unique(code[inside]):
        where = inside & (code == seen)
        if where.sum() > 0.02 * inside.sum():
            behind = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
            axes.text(x[where].mean(), z[where].mean(), bits_text(seen, tau), ha="center", va="center", fontsize=9, bbox=behind, zorder=5)
    axes.add_patch(Wedge((0, 0), 1, 0, 360, facecolor="none", edgecolor=INK, linewidth=0.8))
    if points is not None:
        unit = points / np.linalg.norm(points, axis=1, keepdims=True)
        front = unit[unit[:, 1] > 0]
        axes.plot(front[:, 0], front[:, 2], "o", color=INK, markersize=3.5)
    axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
    axes.axis("off")


def butterflies(axes: Axes, stages: Sequence[Array], *, strides: Sequence[int]) -> None:
    """The wires of a fast Hadamard transform, left to right: ``stages[s] (D,)`` are the numbers
    before step ``s``, the last the result.

    Step ``s`` pairs entries ``strides[s]`` apart: the upper gets the sum, the lower upper minus
    lower. A dashed wire is subtracted.
    """
    dim = len(stages[0])
    for step, stride in enumerate(strides):
        plus: list[list[tuple[float, float]]] = []
        minus: list[list[tuple[float, float]]] = []
        for i in range(dim):
            partner = i ^ stride
            plus.append([(step + 0.17, partner), (step + 0.83, i)])
            (minus if i & stride else plus).append([(step + 0.17, i), (step + 0.83, i)])
        axes.add_collection(LineCollection(plus, colors=BLUE, linewidths=1.3))
        axes.add_collection(LineCollection(minus, colors=VERMILION, linewidths=1.6, linestyles=[DASHES]))
        axes.text(step + 0.5, -0.75, f"stride {stride}", ha="center", va="center", fontsize=9)
    for step, values in enumerate(stages):
        for i, value in enumerate(values):
            axes.text(step, i, f"{value:g}".replace("-", "\N{MINUS SIGN}"), ha="center", va="center", fontsize=10)
    axes.plot([], [], color=BLUE, linewidth=1.3, label="added")
    axes.plot([], [], color=VERMILION, linewidth=1.6, linestyle=DASHES, label="subtracted")
    axes.set(xlim=(-0.3, len(strides) + 0.3), ylim=(dim - 0.5, -1.1))
    axes.axis("off")


def scatter_gather(
    axes: Axes,
    key_code: Array,
    query_code: Array,
    hashtable_capacity: int,
    *,
    keys: Sequence[str],
    table: Sequence[str],
    queries: Sequence[str],
) -> None:
    """One hash at work: keys on the left are added to their buckets in the middle, queries on the
    right read theirs.

    ``key_code (n_k,)`` and ``query_code (n_q,)``; the texts stand in the boxes, those of ``table``
    one to a bucket. An arrow has its bucket's color.
    """
    buckets = np.arange(hashtable_capacity)
    tall = max(len(key_code), len(query_code), hashtable_capacity)
    left, middle, right = ((tall - count) / 2 + np.arange(count) for count in (len(key_code), hashtable_capacity, len(query_code)))
    for x, width, heights, texts, codes in (
        (0.0, 1.0, left, keys, key_code),
        (2.2, 1.6, middle, table, buckets),
        (5.0, 1.0, right, queries, query_code),
    ):
        for y, text, code in zip(heights, texts, codes, strict=True):
            axes.add_patch(Rectangle((x, y + 0.08), width, 0.84, facecolor=bucket_color(code), alpha=0.35, edgecolor=INK, linewidth=0.7))
            axes.text(x + width / 2 + (0.15 if codes is buckets else 0), y + 0.5, text, ha="center", va="center", fontsize=9)
    tau = (hashtable_capacity - 1).bit_length()
    for code, y in enumerate(middle):
        axes.text(2.27, y + 0.5, bits_text(code, tau), ha="left", va="center", fontsize=7.5, fontweight="bold")
    for x, heights, codes, writes in ((1.02, left, key_code, True), (4.98, right, query_code, False)):
        for y, code in zip(heights, codes, strict=True):
            bucket = (2.18 if writes else 3.82, middle[int(code)] + 0.5)
            start, end = ((x, y + 0.5), bucket) if writes else (bucket, (x, y + 0.5))
            arrow = {"arrowstyle": "->", "color": bucket_color(code), "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", end, start, arrowprops=arrow)
    for x, text in ((0.5, "keys: scatter"), (3.0, "table"), (5.5, "queries: gather")):
        axes.text(x, -0.35, text, ha="center", va="center", fontweight="bold")
    axes.set(xlim=(-0.1, 6.1), ylim=(tall + 0.1, -0.7))
    axes.axis("off")


Touch = tuple[int, int, Literal["read", "write"]]
"""``(thread, address, kind)``"""


def traffic(
    axes: Axes, touches: Iterable[Touch], *, threads: int, addresses: int, block: int | None = None, line: int | None = None
) -> None:
    """Which thread touches which address: a row to a thread, a column to an address; circles read,
    squares write.

    ``block`` rules off every so many threads, ``line`` every so many addresses (a block of threads,
    a line of memory). A square in a column that another thread writes too is a race, or the work of
    an atomic: it gets a dark edge.
    """
    marks = list(dict.fromkeys(touches))
    writers: dict[int, set[int]] = {}
    for thread, address, kind in marks:
        if kind == "write":
            writers.setdefault(address, set()).add(thread)
    for kind, marker, color, size in (("write", "s", ORANGE, 7.5), ("read", "o", BLUE, 4.5)):
        for shared in (False, True):
            places = [(a, t) for t, a, k in marks if k == kind and (k == "write" and len(writers[a]) > 1) == shared]
            if places:
                label = f"{kind}, by several threads" if shared else kind
                edge = {"markeredgecolor": INK, "markeredgewidth": 1.8} if shared else {"markeredgecolor": "none"}
                axes.plot(*zip(*places, strict=True), marker, color=color, markersize=size, label=label, **edge)
    axes.set(xlim=(-0.7, addresses - 0.3), ylim=(threads - 0.3, -0.7), xlabel="address", ylabel="thread")
    for set_ticks, count in ((axes.set_xticks, addresses), (axes.set_yticks, threads)):
        set_ticks(range(0, count, 1 if count <= 16 else 4 if count <= 48 else 16))
    for every, count, rule in ((block, threads, axes.axhline), (line, addresses, axes.axvline)):
        for start in range(every, count, every) if every else ():
            rule(start - 0.5, color=INK, linewidth=0.8, linestyle=DASHES)
    axes.grid(True, linewidth=0.4)
