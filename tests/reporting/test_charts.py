"""Charts: what is drawn stands where the numbers say, can be read, and is the same every time."""

import itertools
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Tick, XTick
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image
from scipy.stats import gaussian_kde

from mucs_cli.reporting.charts import (
    SMALL,
    Bars,
    Similarities,
    densities,
    density,
    elided,
    heat_map,
    image_pairs,
    interval_bars,
    short_names,
    write_chart,
)
from mucs_cli.reporting.tables import Estimate

NAMES = [
    "mucs",
    *[f"mucs__unlearning.forget_weight-{weight}__score.reducer-median" for weight in (0.2, 0.5, 1)],
    *["pixel__method.similarity-euclidean", "abu", "das", "dtrak", "trak", "journey_trak", "tracin", "relative_if"],
    *["forward_inf", "costs $1 or $2", "random"],
]
METRICS = ["SSIM", "1 - MAE", "cosine", "1 - LPIPS", "CLIP", "DINO", "SSCD"]


def similarities(num_methods: int, num_metrics: int) -> dict[str, dict[str, Similarities]]:
    draw = np.random.default_rng(0)
    methods = [*NAMES[: num_methods - 1], "random"]
    return {
        metric: {name: Similarities(draw.normal(0.4, 0.1, 20), draw.normal(0.8, 0.1, 9)) for name in methods}
        for metric in METRICS[:num_metrics]
    }


def bars_of(num_methods: int, num_panels: int, *series: str) -> list[Bars]:
    estimates = [Estimate(0.7 - 0.01 * i, 0.6 - 0.01 * i, 0.75) for i in range(num_methods)]
    return [Bars(metric, dict.fromkeys(series, estimates)) for metric in METRICS[:num_panels]]


def symmetric(size: int) -> np.ndarray:
    values = np.random.default_rng(1).uniform(size=(size, size))
    return (values + values.T) / 2


def drawn(figure: Figure) -> Figure:
    """The figure after a layout, so that its texts and axes have their places."""
    FigureCanvasAgg(figure).draw()
    return figure


def shown_texts(figure: Figure) -> list[Text]:
    def walk(artist: Artist) -> list[Text]:
        if not artist.get_visible() or (isinstance(artist, Axes) and not artist.axison):
            return []
        if isinstance(artist, Tick) and not is_in_view(artist):
            return []
        own = [artist] if isinstance(artist, Text) and artist.get_text() else []
        return own + [text for child in artist.get_children() for text in walk(child)]

    return walk(figure)


def is_in_view(tick: Tick) -> bool:
    """Whether a tick is drawn: locators give some beyond the ends as well."""
    ends = tick.axes.get_xlim() if isinstance(tick, XTick) else tick.axes.get_ylim()
    return min(ends) <= tick.get_loc() <= max(ends)


def luminance(colour: object) -> float:
    """Relative luminance of sRGB, in [0, 1] (WCAG 2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


# --- files -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from mucs_cli.reporting.charts import Bars, interval_bars, write_chart
from mucs_cli.reporting.tables import Estimate
assert "matplotlib" not in sys.modules
bars = Bars("SSIM", {"targets": [Estimate(0.7, 0.6, 0.8)], "controls": [Estimate(0.5, None, None)]})
write_chart(interval_bars(["a"], [bars], "AUC", 0.5), Path(sys.argv[1]), "chart")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_chart_has_the_same_bytes_in_another_process_and_under_other_settings(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "other"], check=True, timeout=120)
    bars = Bars("SSIM", {"targets": [Estimate(0.7, 0.6, 0.8)], "controls": [Estimate(0.5, None, None)]})
    with matplotlib.rc_context({"font.size": 31, "svg.hashsalt": "x", "savefig.dpi": 20, "savefig.bbox": "tight"}):
        paths = write_chart(interval_bars(["a"], [bars], "AUC", 0.5), tmp_path / "new" / "folder", "chart")
        assert matplotlib.rcParams["font.size"] == 31
    assert [path.name for path in paths] == ["chart.svg", "chart.png"]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()
    assert b"<dc:date>" not in paths[0].read_bytes()
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["chart.png", "chart.svg"]


def test_only_pairs_of_pictures_put_pictures_into_an_svg(tmp_path: Path) -> None:
    pictures = image_pairs(["query 0"], ["before"], [[PICTURE]])
    others = {
        "map": heat_map(["a", "b"], symmetric(2), "overlap", 0, 1),
        "bars": interval_bars(["a"], bars_of(1, 1, ""), "LDS"),
        "densities": densities(similarities(2, 1), "similarity"),
    }
    assert "<image" in write_chart(pictures, tmp_path, "pictures")[0].read_text()
    for name, figure in others.items():
        assert "<image" not in write_chart(figure, tmp_path, name)[0].read_text()


def test_pngs_have_150_dots_an_inch(tmp_path: Path) -> None:
    figure = heat_map(["a", "b"], symmetric(2), "overlap", 0, 1)
    _, png = write_chart(figure, tmp_path, "chart")
    with Image.open(png) as picture:
        assert picture.size == pytest.approx(figure.get_size_inches() * 150, abs=1)
        assert picture.info["dpi"] == pytest.approx((150, 150), abs=0.1)


# --- all charts ------------------------------------------------------------------------------------------------------

PICTURE = np.zeros((1, 8, 8), np.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: densities(similarities(1, 1), "similarity"),
        lambda: densities(similarities(4, 3), "similarity", "random"),
        lambda: densities(similarities(15, 1), "similarity", "random"),
        lambda: interval_bars(NAMES[:1], bars_of(1, 1, ""), "LDS"),
        lambda: interval_bars(NAMES, bars_of(15, 7, "targets", "controls"), "AUC", 0.5),
        lambda: heat_map(NAMES[:2], symmetric(2), "a title of many words " * 5, 0, 1),
        lambda: heat_map(NAMES, symmetric(15), "overlap", 0, 1),
        lambda: image_pairs(["query 0"], ["before"], [[PICTURE]]),
        lambda: image_pairs(NAMES, ["before", f"without {NAMES[1]}'s", "after"], [[PICTURE, None, PICTURE]] * 15),
    ],
)
def test_every_text_is_at_least_8_points_and_inside_the_figure(make) -> None:
    figure = drawn(make())
    texts = shown_texts(figure)
    assert len(texts) > 1
    assert min(text.get_fontsize() for text in texts) >= SMALL == 8
    edge = figure.bbox.padded(1)
    for text in texts:
        box = text.get_window_extent()
        assert edge.contains(box.x0, box.y0) and edge.contains(box.x1, box.y1), text


# --- densities -------------------------------------------------------------------------------------------------------


def test_a_density_is_the_gaussian_kernels_one_with_its_peak_at_one() -> None:
    values = np.array([0.1, 0.2, 0.25, np.nan, 0.6, np.inf])
    x, y = density(values, 0.0, 1.0)
    plain = gaussian_kde([0.1, 0.2, 0.25, 0.6])(x)
    assert (x[0], x[-1], y.max()) == (0.0, 1.0, 1.0)
    np.testing.assert_allclose(y, plain / plain.max())


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5], [0.5, 0.5 + 1e-12]])
def test_equal_values_are_a_step_at_their_place(values: list[float]) -> None:
    x, y = density(np.array(values), 0.0, 1.0)
    assert y.max() == 1 and y[0] == y[-1] == 0
    assert 0.45 < x[y == 1].min() < 0.5 < x[y == 1].max() < 0.55


def test_nothing_is_drawn_of_no_values() -> None:
    none = Similarities(np.array([np.nan]), np.empty(0))
    assert len(density(none.targets, 0, 1)[0]) == 0
    drawn(densities({"SSIM": {"a": none, "random": none}}, "similarity", "random"))


def test_targets_are_solid_over_their_ticks_and_controls_dashed_over_their_crosses() -> None:
    metrics = similarities(3, 2)
    figure = drawn(densities(metrics, "similarity", "random"))
    panel = figure.axes[1]  # of the first metric and the second method
    of_method = metrics["SSIM"][NAMES[1]]
    controls, crosses, targets, ticks = panel.lines
    assert (targets.get_linestyle(), ticks.get_marker()) == ("-", "|")
    assert (controls.get_linestyle(), crosses.get_marker()) == ("--", "x")
    np.testing.assert_array_equal(ticks.get_xdata(), of_method.targets)
    np.testing.assert_array_equal(crosses.get_xdata(), of_method.controls)
    np.testing.assert_array_equal(targets.get_ydata(), density(of_method.targets, *panel.get_xlim())[1])
    shade = panel.collections[0].get_paths()[0].vertices
    x, y = density(metrics["SSIM"]["random"].targets, *panel.get_xlim())
    assert shade[:, 1].max() == y.max()
    assert shade[shade[:, 1].argmax(), 0] == x[y.argmax()]


def test_panels_of_a_metric_share_their_axis_which_holds_all_values() -> None:
    metrics = similarities(3, 2)
    metrics["1 - MAE"]["random"].targets[0] = 7.0
    figure = densities(metrics, "similarity")
    limits = [axes.get_xlim() for axes in figure.axes]
    assert limits[0] == limits[1] == limits[2] != limits[3] == limits[4] == limits[5]
    assert limits[3][1] > 7 > limits[0][1]


def test_methods_that_do_not_fit_a_line_go_on_in_the_next_under_names_that_do_not_meet() -> None:
    figure = drawn(densities(similarities(7, 1), "similarity"))
    used = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_subplotspec().rowspan.start for axes in used] == [0] * 4 + [1] * 3
    assert len(figure.axes) == 8
    boxes = [axes.title.get_window_extent() for axes in used]
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


# --- bars ------------------------------------------------------------------------------------------------------------


def test_bars_run_from_the_reference_to_the_value_with_the_interval_as_whisker_in_the_given_order() -> None:
    estimates = [Estimate(0.7, 0.6, 0.85), Estimate(0.4, 0.3, 0.55), Estimate(0.6, None, None)]
    figure = drawn(interval_bars(["b", "a", "c"], [Bars("SSIM", {"": estimates})], "AUC", 0.5))
    (axes,) = figure.axes
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert ends == [pytest.approx((0.5, 0.7)), pytest.approx((0.5, 0.4)), pytest.approx((0.5, 0.6))]
    whiskers = [bars.get_segments()[0][:, 0] for bars in axes.collections if isinstance(bars, LineCollection)]
    np.testing.assert_allclose(whiskers, [[0.6, 0.85], [0.3, 0.55]])
    heights = [patch.get_window_extent().y0 for patch in axes.patches]
    assert heights == sorted(heights, reverse=True)
    labels = axes.get_yticklabels()
    assert [label.get_text() for label in labels] == ["b", "a", "c"]
    assert [text.get_text() for text in axes.texts] == ["0.700", "0.400", "0.600"]
    assert figure.legends == []


def test_what_has_no_value_has_a_dash_and_no_bar() -> None:
    figure = interval_bars(["a", "b"], [Bars("", {"": [Estimate(None, None, None), Estimate(0.1, 0, 1)]})], "LDS")
    assert len(figure.axes[0].patches) == 1
    assert [text.get_text() for text in figure.axes[0].texts] == ["–", "0.100"]


def test_series_differ_in_hatching_and_have_a_legend() -> None:
    figure = interval_bars(["a"], bars_of(1, 2, "targets", "controls", "held out"), "AUC", 0.5)
    for axes in figure.axes:
        assert len({patch.get_hatch() for patch in axes.patches}) == 3
        tops = [patch.get_y() for patch in axes.patches]
        assert tops == sorted(tops) and min(np.diff(tops)) > axes.patches[0].get_height()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["targets", "controls", "held out"]


def test_the_ceiling_is_a_band_over_its_interval_with_a_line_at_its_value() -> None:
    bars = Bars("", {"": [Estimate(0.1, 0, 0.2)]}, Estimate(0.6, 0.5, 0.65))
    (axes,) = interval_bars(["a"], [bars], "LDS").axes
    band = next(patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_x() == 0.5)
    assert band.get_width() == pytest.approx(0.15)
    assert [0.6, 0.6] in [list(line.get_xdata()) for line in axes.lines]


# --- heat map --------------------------------------------------------------------------------------------------------


def test_cells_hold_their_numbers_lighter_where_higher_and_readable_in_grey() -> None:
    values = np.linspace(-1, 1, 64).reshape(8, 8)
    values[3, 3] = np.nan
    figure = drawn(heat_map(NAMES[:8], values, "correlation", -1, 1))
    axes = figure.axes[0]
    texts = np.array([text.get_text() for text in axes.texts]).reshape(8, 8)
    assert texts[3, 3] == "–"
    assert texts[0, 0] == "-1.00" and texts[7, 7] == "1.00" and texts[0, 1] == f"{values[0, 1]:.2f}"
    (mesh,) = [found for found in axes.collections if isinstance(found, QuadMesh)]
    light = np.array([luminance(colour[:3]) for colour in mesh.get_facecolor().reshape(-1, 4)])
    known = np.isfinite(values.ravel())
    assert (np.diff(light[known]) > 0).all()
    for text, cell in zip(itertools.compress(axes.texts, known), light[known], strict=True):
        darker, lighter = sorted((cell, luminance(text.get_color())))
        assert (lighter + 0.05) / (darker + 0.05) >= 4


def test_rows_and_columns_run_from_the_top_left() -> None:
    axes = drawn(heat_map(["a", "b"], np.array([[0.1, 0.2], [0.3, 0.4]]), "", 0, 1)).axes[0]
    places = {text.get_text(): text.get_window_extent().get_points().mean(0) for text in axes.texts}
    assert places["0.20"][0] > places["0.10"][0] and places["0.30"][1] < places["0.10"][1]


# --- pictures --------------------------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_whole_pixels_whatever_their_kind() -> None:
    gray = np.array([[[-1, 1, 0], [1, -1, 1]]], np.float32)
    colours = np.random.default_rng(0).integers(0, 256, (3, 2, 3), np.uint8)
    first, second = drawn(image_pairs(["a"], ["b", "c"], [[gray, colours]])).axes[0].images
    scale = 150 // 3
    np.testing.assert_array_equal(
        first.get_array(), np.kron([[0, 255, 128], [255, 0, 255]], np.ones((scale, scale), int))
    )
    np.testing.assert_array_equal(
        second.get_array(), colours.transpose(1, 2, 0).repeat(scale, axis=0).repeat(scale, axis=1)
    )
    width, height = np.ptp(first.get_extent()[:2]), np.ptp(first.get_extent()[2:])
    assert width / height == pytest.approx(3 / 2)


def test_large_pictures_are_reduced_and_a_missing_one_is_a_dash() -> None:
    large = np.zeros((3, 600, 300), np.float32)
    axes = image_pairs(["a", "b"], ["c"], [[large], [None]]).axes[0]
    assert axes.images[0].get_array().shape == (150, 75, 3)
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [("–", (0, 1))]


# --- names -----------------------------------------------------------------------------------------------------------


def test_long_names_lose_their_middle() -> None:
    assert elided("mucs", 4) == "mucs"
    assert elided("abcdefghij", 7) == "abc…hij"
    assert [len(elided("x" * 50, length)) for length in (6, 7, 30)] == [6, 7, 30]


def test_names_that_differ_in_the_middle_keep_what_tells_them_apart() -> None:
    assert short_names(NAMES[1:4] * 2, 18) == ["mucs…eight-0.2__s…", "mucs…eight-0.5__s…", "mucs…eight-1__sco…"] * 2
    assert short_names(["mucs", NAMES[1]], 12) == ["mucs", elided(NAMES[1], 12)]
    names = [f"{'a' * 20}{i}{'b' * 20}{j}{'c' * 20}" for i, j in itertools.product(range(2), range(3))]
    assert len(set(short_names(names, 8))) == 6
