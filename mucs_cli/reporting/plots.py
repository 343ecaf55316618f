"""Plots as SVG text: the score distribution of a query, and the training loss. Lengths are in SVG units."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from mucs_cli.reporting.results import score_text

LEFT, RIGHT, TOP, BOTTOM = 46, 22, 24, 28
"""Margins around the plotting area, for axis labels."""
NUM_BINS = 72
SMOOTHING = 0.02
"""Width of the loss curve's running mean, as a share of the points."""


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round values (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``."""
    if not high > low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A tick's label: no trailing zeros."""
    return f"{value:,.10g}" if value == 0 or abs(value) >= 1e-4 else f"{value:.0e}"


def histogram(scores: NDArray[np.float32], marked: Sequence[float], width: int = 900, height: int = 144) -> Markup:
    """A query's score distribution, with a triangle below the axis and a darker bar for each marked score.

    Counts are drawn on a square-root axis: the marked images are few, and would vanish beside the bulk on a linear one.

    Args:
        scores: [N], finite.
        marked: the scores of the top images.
    """
    low, high = float(scores.min()), float(scores.max())
    pad = (high - low) * 0.02 or 1e-6
    low, high = low - pad, high + pad
    counts, edges = np.histogram(scores.astype(np.float64), NUM_BINS, (low, high))
    top_counts = np.histogram(np.asarray(marked, np.float64), edges)[0]
    tallest = int(counts.max())

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (width - LEFT - RIGHT)

    def y(count: float) -> float:
        return height - BOTTOM - math.sqrt(count / tallest) * (height - TOP - BOTTOM)

    parts = [
        opening(
            width,
            height,
            f"Histogram of {len(scores):,} scores from {score_text(float(scores.min()))} to "
            f"{score_text(float(scores.max()))}; the top {len(marked)} begin at {score_text(min(marked))}.",
        )
    ]
    for count in sorted({1, *[v for v in (10, 100, 1000, 10_000, 100_000) if v < tallest * 0.7], tallest}):
        if count in (1, tallest) or y(count) - y(tallest) > 14:
            parts.append(horizontal_rule(y(count), width, f"{count:,}"))
    for count, marks, left, right in zip(counts, top_counts, edges[:-1], edges[1:], strict=True):
        for value, kind in ((count, "bar"), (min(marks, count), "bar-top")):
            if value:
                parts.append(
                    Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                        kind, x(left) + 0.5, y(value), x(right) - x(left) - 1, height - BOTTOM - y(value)
                    )
                )
    base = height - BOTTOM
    if low < 0 < high:
        parts.append(Markup('<path class="zero" d="M{0:.1f} {1}V{2}"/>').format(x(0), TOP, base))
    for score in marked:
        parts.append(Markup('<path class="mark" d="M{:.1f} {}l3.5 7h-7z"/>').format(x(score), base + 1.5))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, base, width - RIGHT))
    for value in nice_ticks(low, high, 8):
        parts.append(label(x(value), base + 20, number(value), "middle"))
    parts.append(label(LEFT - 7, base + 20, "score", "end"))
    parts.append(label(0, 11, "number of images (square-root scale)", "start"))
    return Markup("").join([*parts, Markup("</svg>")])


def loss_curve(steps: Sequence[float], losses: Sequence[float], width: int = 1100, height: int = 250) -> Markup:
    """The training loss by step on a logarithmic axis: the measured values and their running mean.

    Args:
        steps: increasing.
        losses: > 0, as long as ``steps``.
    """
    all_losses, all_steps = np.asarray(losses, np.float64), np.asarray(steps, np.float64)
    half = max(round(len(all_losses) * SMOOTHING / 2), 1)
    mean = np.array([all_losses[max(i - half, 0) : i + half + 1].mean() for i in range(len(all_losses))])
    low, high = math.log10(all_losses.min()), math.log10(all_losses.max())
    low, high = (low - 0.05, high + 0.05)

    def x(step: float) -> float:
        return LEFT + (step - all_steps[0]) / max(all_steps[-1] - all_steps[0], 1) * (width - LEFT - RIGHT)

    def y(loss: float) -> float:
        return height - BOTTOM - (math.log10(loss) - low) / (high - low) * (height - TOP - BOTTOM)

    parts = [
        opening(
            width,
            height,
            f"Training loss over {int(all_steps[-1]):,} steps, "
            f"from {all_losses[0]:.3g} to a running mean of {mean[-1]:.3g}.",
        )
    ]
    for value in log_ticks(10**low, 10**high):
        parts.append(horizontal_rule(y(value), width, number(value)))
    keep = np.unique(np.linspace(0, len(all_losses) - 1, min(len(all_losses), 450)).round().astype(int))
    for values, kind in ((all_losses, "curve-raw"), (mean, "curve")):
        points = " ".join(f"{x(all_steps[i]):.1f},{y(values[i]):.1f}" for i in keep)
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(kind, points))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(LEFT, height - BOTTOM, width - RIGHT))
    for value in nice_ticks(float(all_steps[0]), float(all_steps[-1]), 8):
        parts.append(label(x(value), height - BOTTOM + 18, number(value), "middle"))
    parts.append(label(LEFT - 7, height - BOTTOM + 18, "step", "end"))
    parts.append(label(0, 11, "loss (logarithmic scale)", "start"))
    return Markup("").join([*parts, Markup("</svg>")])


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between ``low`` and ``high``: 1, 2 and 5 times powers of ten, only powers over wide ranges."""
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    return [value for value in found if low <= value <= high]


# --- pieces ----------------------------------------------------------------------------------------------------------


def opening(width: int, height: int, description: str) -> Markup:
    return Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, height, description
    )


def label(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def horizontal_rule(y: float, width: int, text: str) -> Markup:
    """A grid line with its value at the left."""
    line = Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(LEFT, y, width - RIGHT)
    return line + label(LEFT - 7, y + 4, text, "end")
