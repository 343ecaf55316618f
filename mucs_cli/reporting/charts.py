"""Charts of evaluations, for print and screen: densities, bars with intervals, heat maps, pairs of pictures.

What is told apart has its own line style, hatching or lightness as well as its colour (Okabe-Ito, cividis), so that it
is read with any colour vision and in grey. Lengths are inches, font sizes points. Every function gives a figure;
``write_chart`` makes its files. matplotlib is imported inside the functions: most commands draw nothing.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mucs_cli.artifacts import write_atomic
from mucs_cli.reporting.pictures import BLUE, INK, MUTED, PAPER, RULE, VERMILION, to_picture
from mucs_cli.reporting.tables import MISSING, Estimate, cell_text

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
FONT_SIZE = 9
SMALL = 8
"""The smallest font: of ticks, names and the numbers in cells."""
CHARACTER = 0.075
"""About the width of a character of the smallest font."""
STYLE = {
    "font.size": FONT_SIZE,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "axes.unicode_minus": False,  # as in the cells
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.8,
    "text.parse_math": False,  # names of variants may hold dollar signs
    "image.composite_image": False,  # an SVG keeps the pixels of each picture
    "svg.hashsalt": "mucs",  # the same chart, the same bytes
}
SERIES = ((BLUE, ""), (VERMILION, "////"), ("#009e73", "...."))
"""Fill and hatching of up to three series of bars."""
GREY, LIGHT_GREY = "#c3c9d0", "#e6e9ed"

PANELS_PER_LINE = 6
FEW_VALUES = 0.01
"""Of a panel's range: values within so little are drawn as a step, as the peak of their density would vanish."""
TILE = 150
"""Longest side of a picture in pixels, an inch on disk."""


@contextmanager
def styled() -> Iterator[None]:
    """Drawing with matplotlib's defaults and ``STYLE``, whatever the user's own settings."""
    from matplotlib import style

    with style.context(["default", STYLE], after_reset=True):
        yield


@styled()
def write_chart(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Writes ``name.svg`` and ``name.png``, at 150 dpi; the same chart always gives the same bytes.

    Raises:
        UserError: they cannot be written.
    """
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    write_atomic(svg, partial(figure.savefig, format="svg", metadata={"Date": None, "Creator": None}))
    write_atomic(png, partial(figure.savefig, format="png", metadata={"Software": None}, dpi=DPI))
    return [svg, png]


# --- densities -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Similarities:
    """Of one method's pictures by one metric; [T] and [C], of any length. What is not finite is left out."""

    targets: NDArray[np.float64]
    controls: NDArray[np.float64]


@styled()
def densities(metrics: Mapping[str, Mapping[str, Similarities]], axis: str, reference: str | None = None) -> "Figure":
    """How similar pictures stay under each method: a row of small panels a metric, a panel a method.

    Targets are a solid line, controls a dashed one (Gaussian kernels, Scott's bandwidth), the values below as ticks and
    crosses. Curves are scaled to the same height, so that their shapes compare.

    Args:
        metrics: metric -> method -> similarities; the same methods in each.
        axis: what the values are.
        reference: the method whose targets lie shaded behind those of the others, such as ``random``.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    methods = list(next(iter(metrics.values())))
    num_lines = -(-len(methods) // PANELS_PER_LINE)
    num_columns = -(-len(methods) // num_lines)
    num_rows = num_lines * len(metrics)
    width = max(1.35 * num_columns + 0.5, 4.6)
    title_height = 0.2 * (num_rows if num_lines > 1 else 1)
    figure = Figure((width, 0.95 * num_rows + title_height + 0.75), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    names = short_names(methods, int((width - 0.5) / num_columns / CHARACTER))
    for row, (metric, of_methods) in enumerate(metrics.items()):
        low, high = padded_range([values for of in of_methods.values() for values in (of.targets, of.controls)])
        of_metric = panels[row * num_lines : (row + 1) * num_lines].ravel()
        for panel in of_metric[len(methods) :]:
            panel.set_axis_off()
        for panel, method, name in zip(of_metric, methods, names, strict=False):
            if reference is not None:
                curve = density(of_methods[reference].targets, low, high)
                panel.fill_between(*curve, color=GREY, linewidth=0)
            for values, colour, dashes, marker, place in (
                (of_methods[method].controls, VERMILION, (0, (4, 2)), "x", -0.24),
                (of_methods[method].targets, BLUE, "solid", "|", -0.1),
            ):
                panel.plot(*density(values, low, high), color=colour, linestyle=dashes, linewidth=1.3)
                found = finite(values)
                panel.plot(found, [place] * len(found), marker, color=colour, markersize=4, markeredgewidth=0.7)
            panel.set(xlim=(low, high), ylim=(-0.34, 1.08), yticks=[])
            panel.xaxis.set_major_locator(MaxNLocator(2))  # up to three labels, which may have three decimals
            panel.spines["left"].set_visible(False)
            if row == 0 or num_lines > 1:
                panel.set_title(name, fontsize=SMALL)
        for line in range(num_lines):
            panels[row * num_lines + line, 0].set_ylabel(metric)
    figure.supxlabel(axis, fontsize=FONT_SIZE)
    handles: list[Artist] = [Line2D([], [], color=BLUE, marker="|", label="targets")]
    if any(len(of.controls) for of_methods in metrics.values() for of in of_methods.values()):
        handles.append(
            Line2D([], [], color=VERMILION, linestyle=(0, (4, 2)), marker="x", markersize=4, label="controls")
        )
    if reference is not None:
        handles.append(Patch(color=GREY, label=f"targets of {elided(reference, 24)}"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def density(values: NDArray[np.float64], low: float, high: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and y of a curve over values, its peak 1: a step where all are (nearly) equal, empty where there are none."""
    from scipy.stats import gaussian_kde

    known = finite(values)
    if not len(known):
        return np.empty(0), np.empty(0)
    if np.ptp(known) < FEW_VALUES * (high - low):
        half, middle = FEW_VALUES * (high - low), known.mean()
        x = np.array([low, middle - half, middle - half, middle + half, middle + half, high])
        return x, np.array([0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    x = np.linspace(low, high, 100)
    y = gaussian_kde(known)(x)
    return x, y / y.max()


def padded_range(samples: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """From the smallest to the largest finite value, and more at either end, where densities fade out."""
    values = np.concatenate([finite(sample) for sample in samples])
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    pad = 0.15 * (high - low) or 0.05
    return low - pad, high + pad


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


# --- bars ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bars:
    """One panel of bars.

    Args:
        title: above it, such as the metric; may be empty.
        series: name -> an estimate a method; one to three series, of the same names in every panel.
        ceiling: what could be reached at most, as a band.
    """

    title: str
    series: Mapping[str, Sequence[Estimate]]
    ceiling: Estimate | None = None


@styled()
def interval_bars(methods: Sequence[str], panels: Sequence[Bars], axis: str, reference: float = 0.0) -> "Figure":
    """Horizontal bars with their intervals, methods from top to bottom as given; up to three panels beside each other.

    Args:
        methods: names.
        panels: what is drawn of them.
        axis: what the numbers are, and the intervals.
        reference: where bars begin: what a method without information gets, 0 for a correlation, 0.5 for an AUC.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = short_names(methods, 30)
    series = list(panels[0].series)
    thickness = 0.8 / len(series)
    num_columns = min(len(panels), 3)
    num_lines = -(-len(panels) // num_columns)
    width = CHARACTER * max(map(len, names)) + (4.8 if num_columns == 1 else 2.6 * num_columns) + 0.3
    height = len(methods) * (0.1 + 0.17 * len(series)) + (0.5 if panels[0].title else 0.25)
    figure = Figure((width, height * num_lines + 0.75), layout="constrained")
    drawn = figure.subplots(num_lines, num_columns, sharex=True, sharey=True, squeeze=False)
    for axes in drawn.ravel()[len(panels) :]:
        axes.set_axis_off()
    for axes, bars in zip(drawn.ravel(), panels, strict=False):
        if bars.ceiling is not None:
            draw_ceiling(axes, bars.ceiling)
        for place, (name, (colour, hatch)) in enumerate(zip(series, SERIES, strict=False)):
            offset = (place - (len(series) - 1) / 2) * thickness
            for row, estimate in enumerate(bars.series[name]):
                draw_bar(axes, row + offset, estimate, reference, thickness, colour, hatch)
        axes.axvline(reference, color=INK, linewidth=0.8)
        axes.set_title(bars.title, loc="left")
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", labelbottom=True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    drawn[0, 0].set(yticks=range(len(methods)), yticklabels=names, ylim=(len(methods) - 0.45, -0.55))
    figure.supxlabel(axis, fontsize=FONT_SIZE)
    handles: list[Artist] = []
    if len(series) > 1:
        for name, (colour, hatch) in zip(series, SERIES, strict=False):
            handles.append(Patch(facecolor=colour, edgecolor=PAPER, hatch=hatch, label=name))
    if any(bars.ceiling is not None for bars in panels):
        handles.append(Line2D([], [], color=INK, linestyle="dotted", label="ceiling"))
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def draw_bar(
    axes: "Axes", y: float, estimate: Estimate, reference: float, thickness: float, colour: str, hatch: str
) -> None:
    """A bar from the reference to the value, its interval as a whisker, the value in figures at the right."""
    if estimate.value is not None:
        length = estimate.value - reference
        axes.barh(y, length, thickness * 0.88, reference, color=colour, edgecolor=PAPER, hatch=hatch, linewidth=0)
        if estimate.low is not None and estimate.high is not None:
            ends = [[estimate.value - estimate.low], [estimate.high - estimate.value]]
            axes.errorbar(estimate.value, y, xerr=ends, color=INK, linewidth=1.1, capsize=2.5)
    axes.text(1.02, y, cell_text(estimate.value), fontsize=SMALL, va="center", transform=axes.get_yaxis_transform())


def draw_ceiling(axes: "Axes", ceiling: Estimate) -> None:
    if ceiling.low is not None and ceiling.high is not None:
        axes.axvspan(ceiling.low, ceiling.high, color=LIGHT_GREY, linewidth=0, zorder=0.4)
    if ceiling.value is not None:
        axes.axvline(ceiling.value, color=INK, linestyle="dotted", linewidth=1.4)


# --- heat map --------------------------------------------------------------------------------------------------------


@styled()
def heat_map(names: Sequence[str], values: NDArray[np.float64], title: str, low: float, high: float) -> "Figure":
    """What every two variants have in common: the number in each cell, darker where it is lower.

    Args:
        names: of V variants.
        values: [V, V] in [low, high]; NaN where there is no number, such as on the diagonal.
        title: what the numbers are.
        low, high: ends of the colours, the same in charts that are to be compared.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shown = short_names(names, 28)
    side = 0.5 * len(names)
    room = CHARACTER * max(map(len, shown))
    width = max(side + room + 0.9, 4.2)
    lines = textwrap.wrap(title, int(width / CHARACTER))
    figure = Figure((width, side + 0.8 * room + 0.3 + 0.16 * len(lines)), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["cividis"].with_extremes(bad=RULE)
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=colours, vmin=low, vmax=high, edgecolors=PAPER, linewidth=1.5
    )
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        background = (value - low) / (high - low)  # cividis is about as light as this
        text, ink = (f"{value:.2f}", PAPER if background < 0.5 else INK) if np.isfinite(value) else (MISSING, MUTED)
        axes.text(column + 0.5, row + 0.5, text, color=ink, fontsize=SMALL, ha="center", va="center")
    places = np.arange(len(names)) + 0.5
    axes.set(aspect="equal", ylim=(len(names), 0), xticks=places, yticks=places, yticklabels=shown)
    axes.set_xticklabels(shown, rotation=45, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9, aspect=18, pad=0.02)
    bar.outline.set_visible(False)
    assert bar.solids is not None  # a bar of filled colours
    bar.solids.set_rasterized(False)  # no picture in the SVG: a report without pictures may keep it
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=FONT_SIZE)
    return figure


# --- pictures --------------------------------------------------------------------------------------------------------


@styled()
def image_pairs(rows: Sequence[str], columns: Sequence[str], images: Sequence[Sequence[NDArray | None]]) -> "Figure":
    """A grid of pictures, such as queries before and after the training without some images.

    Args:
        rows: names of the queries.
        columns: what each column shows.
        images: a picture, or None for one that is missing, a row and column; [C, H, W], C is 1 (grayscale) or 3 (RGB),
            float in [-1, 1] or uint8. Small ones are enlarged by whole pixels.
    """
    from matplotlib.figure import Figure

    names = short_names(rows, 20)
    headings = ["\n".join(textwrap.wrap(elided(name, 36), 13)) for name in columns]
    width = len(columns) + CHARACTER * max(map(len, names)) + 0.15
    num_lines = max(len(heading.splitlines()) for heading in headings)
    figure = Figure((width, len(rows) + 0.15 * num_lines + 0.2), layout="constrained")
    axes = figure.subplots()
    for row, of_row in enumerate(images):
        for column, image in enumerate(of_row):
            if image is None:
                axes.text(column, row, MISSING, ha="center", va="center", color=MUTED)
                continue
            pixels = np.asarray(tile(image))
            half_height, half_width = (0.47 * side / max(pixels.shape[:2]) for side in pixels.shape[:2])
            extent = (column - half_width, column + half_width, row + half_height, row - half_height)
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="none")
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect="equal", anchor="NE")
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)), xticklabels=headings, yticklabels=names)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    return figure


def tile(image: NDArray) -> Image.Image:
    """A picture as large as a tile, at most: large ones are reduced, small ones enlarged by whole pixels."""
    values = image.astype(np.float32)
    picture = to_picture(values / 127.5 - 1 if image.dtype == np.uint8 else values)
    picture.thumbnail((TILE, TILE), Image.Resampling.LANCZOS)
    scale = TILE // max(picture.size)
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


# --- names -----------------------------------------------------------------------------------------------------------


def elided(name: str, length: int) -> str:
    """A name of at most ``length`` characters: a long one loses its middle, as variants differ at their ends."""
    if len(name) <= length:
        return name
    end = length // 2
    return f"{name[: length - 1 - end]}…{name[len(name) - end :]}"


def short_names(names: Sequence[str], length: int) -> list[str]:
    """Names elided to ``length`` characters so that they can be told apart; to more only where that takes more."""
    short = {name: elided(name, length) for name in names}
    twins: dict[str, list[str]] = {}
    for name, text in short.items():
        twins.setdefault(text, []).append(name)
    for same in twins.values():
        if len(same) > 1:
            place = next((i for i, letters in enumerate(zip(*same, strict=False)) if len(set(letters)) > 1), length)
            short |= {name: elided_around(name, length, place) for name in same}
    return [short[name] for name in names] if len(set(short.values())) == len(short) else short_names(names, length + 1)


def elided_around(name: str, length: int, place: int) -> str:
    """A name's beginning and what stands around a place further on; ``length`` characters."""
    start = length // 4
    window = length - start - 2
    first = max(start, place - window // 2)
    return f"{name[:start]}…{name[first : first + window]}…"
