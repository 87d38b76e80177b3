"""The drawing helpers: what they draw is what the library computes, nothing is cut off, and the
same picture has the same bytes.
"""

import io

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from yoso_core import draw, reference


@pytest.fixture(autouse=True)
def look():
    with draw.look():
        yield


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_picture_shows_itself_in_the_same_bytes():
    def shown():
        figure, axes = draw.picture()
        axes.plot([1, 2, 3], color=draw.BLUE)
        axes.set_title("a line")
        return figure._repr_png_()

    (data, size), again = shown(), shown()
    assert (data, size) == again
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    assert image.size == (750, 480)
    assert size == {"width": 480, "height": 307}
    assert len(data) < 20_000


def test_use_look():
    with mpl.rc_context():
        mpl.rcdefaults()
        draw.use_look()
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["axes.prop_cycle"].by_key()["color"][0] == draw.BLUE


HOSTILE = {
    "font.size": 30,
    "figure.dpi": 30,
    "figure.facecolor": "black",
    "axes.facecolor": "black",
    "lines.linewidth": 9,
    "axes.unicode_minus": False,
    "axes.grid": True,
    "savefig.bbox": "tight",
    "savefig.dpi": 20,
}
"""A matplotlibrc that a reader may have."""


def test_the_look_does_not_depend_on_the_readers_settings():
    def shown(path):
        with draw.look():
            figure, axes = draw.picture()
            axes.plot([-1, 0, 1], label="a line")
            axes.legend()
        figure.savefig(path)
        return figure._repr_png_()[0], Image.open(path).size

    with mpl.rc_context():
        mpl.rcdefaults()
        plain = shown(io.BytesIO())
    with mpl.rc_context(HOSTILE):
        assert shown(io.BytesIO()) == plain
        draw.use_look()
        assert mpl.rcParams["font.size"] == draw.STYLE["font.size"]
        assert mpl.rcParams["axes.facecolor"] == "white"


FAULTS = {
    "beyond the edge": (lambda figure, axes: figure.text(0.97, 0.5, "far right"), "'far right' reaches beyond the figure"),
    "at the edge": (lambda figure, axes: figure.text(0.5, 0.998, "high up", va="top"), "something reaches the edge"),
    "too small": (lambda figure, axes: axes.text(0.5, 0.5, "tiny", fontsize=5), "'tiny' is set in 5 points"),
    "overlapping labels": (
        lambda figure, axes: axes.set_xticks([0.50, 0.52], ["one label", "another"]),
        "'one label' and 'another' overlap",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_clipped_finds(fault):
    figure, axes = draw.picture()
    assert draw.clipped(figure) == []
    FAULTS[fault][0](figure, axes)
    assert any(found.startswith(FAULTS[fault][1]) for found in draw.clipped(figure))


def test_what_is_not_drawn_is_not_clipped():
    figure, axes = draw.picture()
    axes.set_xticks([0, 1, 50], ["0", "1", "far outside of what the axis shows"])
    axes.set_xlim(0, 1)
    axes.text(3, 3, "hidden").set_visible(False)
    assert draw.clipped(figure) == []


def test_error_curve_measures_the_slope():
    figure, axes = draw.picture()
    m = np.array([1, 4, 16, 64])
    assert draw.error_curve(axes, m, 3 * m**-0.5) == pytest.approx(-0.5)
    assert draw.error_curve(axes, m, 2 * m**-1.0, slope=None, label="other", number=1) == pytest.approx(-1)
    dots, expected, others = axes.lines
    np.testing.assert_allclose(expected.get_ydata(), dots.get_ydata())
    assert dots.get_marker() != others.get_marker()
    axes.legend()
    assert draw.clipped(figure) == []


def test_matrices_share_one_scale_and_write_their_numbers():
    shown = {"small": np.array([[0.1, -0.2], [-0.001, 0.4]]), "large": np.array([[1.0, -2.0], [3.0, 4.0]])}
    figure = draw.matrices(shown, numbers=".2f", signed=True, rows=["a", "b"], columns=["word", "other"])
    small, large = figure.axes[:2]
    assert texts(small) == ["0.10", "−0.20", "0.00", "0.40"]
    assert small.images[0].get_clim() == large.images[0].get_clim() == (-4, 4)
    assert draw.clipped(figure) == []
    places = [axes.get_window_extent().bounds for axes in figure.axes]
    figure.pixels()
    np.testing.assert_allclose([axes.get_window_extent().bounds for axes in figure.axes], places, atol=1, err_msg="the layout has settled")


def test_the_circles_arcs_have_the_codes_that_the_hash_gives():
    planes = reference.sample_planes(1, 3, 2, rng=4)
    figure, axes = draw.picture(width=4, height=4)
    draw.bucket_circle(axes, planes, points=np.array([[1.0, 0], [0, 2]]), names=["a", "b"])
    outside = [text for text in axes.texts if np.hypot(*text.get_position()) == pytest.approx(1.22)]
    assert len(outside) == 6, "three lines through the center cut a circle into six"
    for text in outside:
        (code,) = reference.hyperplane_hash(np.array([text.get_position()]), planes, 1, 3)[0]
        assert text.get_text() == draw.bits_text(code, 3)
    assert draw.clipped(figure) == []


def test_the_spheres_patches_have_the_codes_that_the_hash_gives():
    planes = reference.sample_planes(1, 2, 3, rng=0)
    figure, axes = draw.picture(width=4, height=4)
    draw.bucket_sphere(axes, planes, points=np.array([[0, 1.0, 0], [0, -1, 0]]), pixels=80)
    assert len(axes.texts) >= 2
    for text in axes.texts:
        x, z = text.get_position()
        (code,) = reference.hyperplane_hash(np.array([[x, np.sqrt(1 - x * x - z * z), z]]), planes, 1, 2)[0]
        assert text.get_text() == draw.bits_text(code, 2)
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    assert dots.get_xydata().tolist() == [[0, 0]], "the point at the back is not seen"
    assert draw.clipped(figure) == []


def test_butterflies_show_every_stage_and_subtract_where_the_transform_does():
    stages = [np.array([1.0, 2, 3, 4]), np.array([4.0, 6, -2, -2]), np.array([10.0, -2, -4, 0])]
    np.testing.assert_array_equal(reference.hadamard_transform(stages[0]), stages[-1])
    figure, axes = draw.picture()
    draw.butterflies(axes, stages, strides=[2, 1])
    assert texts(axes)[2:] == ["1", "2", "3", "4", "4", "6", "−2", "−2", "10", "−2", "−4", "0"]
    added, subtracted = axes.collections[:2]
    for step in range(2):
        wires = axes.collections[2 * step : 2 * step + 2]
        found = np.zeros((4, 4))
        for collection, sign in zip(wires, (1, -1), strict=True):
            for (_, i), (_, j) in collection.get_segments():
                found[int(j), int(i)] = sign
        np.testing.assert_array_equal(found @ stages[step], stages[step + 1])
    assert len(added.get_segments()) == 6
    assert len(subtracted.get_segments()) == 2
    assert draw.clipped(figure) == []


def test_scatter_and_gather_lead_to_the_buckets_of_the_codes():
    figure, axes = draw.picture(width=7, height=4)
    draw.scatter_gather(
        axes, np.array([0, 3, 0]), np.array([3, 1]), 4, keys=["a", "b", "c"], table=["a + c", "", "", "b"], queries=["q0", "q1"]
    )
    arrows = [text for text in axes.texts if text.get_text() == "" and hasattr(text, "arrow_patch")]
    assert [arrow.xy[1] for arrow in arrows[:3]] == [0.5, 3.5, 0.5], "writes end at their bucket's row"
    assert [arrow.get_position()[1] for arrow in arrows[3:]] == [3.5, 1.5], "reads begin there"
    assert draw.clipped(figure) == []


def test_traffic_marks_addresses_that_several_threads_write():
    figure, axes = draw.picture()
    touches = [(0, 0, "read"), (0, 5, "write"), (1, 5, "write"), (2, 6, "write"), (2, 6, "write")]
    draw.traffic(axes, touches, threads=4, addresses=8, block=2, line=4)
    places = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if not line.get_label().startswith("_")}
    assert places == {"read": [[0, 0]], "write": [[6, 2]], "write, by several threads": [[5, 0], [5, 1]]}
    assert draw.clipped(figure) == []


def test_legend_under_title():
    figure, axes = draw.picture()
    axes.plot([1, 2], label="a line")
    axes.set_title("title")
    draw.legend_under_title(axes)
    assert draw.clipped(figure) == []
    assert axes.get_legend().get_window_extent().y0 >= axes.bbox.y1 - 1
