"""Plots and thumbnails: what is drawn stands where the numbers say."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from mucs_cli.reporting.pictures import ENCODINGS, Encoding, thumbnail, thumbnails
from mucs_cli.reporting.plots import histogram, log_ticks, loss_curve, nice_ticks


def bars(svg: str, kind: str) -> list[tuple[float, float]]:
    """x and height of each bar."""
    found = re.findall(rf'class="{kind}" x="([\d.]+)" y="[\d.]+" width="[\d.]+" height="([\d.]+)"', svg)
    return [(float(x), float(height)) for x, height in found]


def test_bars_grow_with_the_square_root_of_the_count() -> None:
    svg = histogram(np.repeat(np.array([0.0, 1.0], np.float32), [4, 100]), [1.0])
    (few, many), (marked,) = bars(svg, "bar"), bars(svg, "bar-top")
    assert few[0] < many[0] == marked[0]
    assert many[1] / few[1] == pytest.approx(5, rel=0.02)
    assert many[1] / marked[1] == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("scores", [[0.0] * 5, [0.3] * 5, [1e-9, 2e-9], [-0.2], [-1.0, 1.0]])
def test_degenerate_distributions_are_drawn_with_finite_numbers(scores: list[float]) -> None:
    values = np.array(scores, np.float32)
    svg = histogram(values, values[:1].tolist())
    assert "nan" not in svg and "inf" not in svg
    assert len(bars(svg, "bar-top")) == 1


def test_a_flat_loss_is_drawn_with_finite_numbers() -> None:
    svg = loss_curve([10, 20, 30], [0.5, 0.5, 0.5])
    assert "nan" not in svg and svg.count("<polyline") == 2


def test_ticks_are_round_and_inside_the_range() -> None:
    assert nice_ticks(-0.155, 0.095, 8) == [-0.15, -0.1, -0.05, 0, 0.05]
    assert nice_ticks(0, 3000, 8) == [0, 500, 1000, 1500, 2000, 2500, 3000]
    assert log_ticks(0.15, 3) == pytest.approx([0.2, 0.5, 1, 2])
    assert log_ticks(0.005, 200) == pytest.approx([0.01, 0.1, 1, 10, 100])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_large_colour_images_are_reduced_and_keep_their_shape(encoding: Encoding) -> None:
    image = np.zeros((3, 300, 600), np.float32) + np.array([-1, 0, 1], np.float32)[:, None, None]
    small = thumbnail(image, encoding)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(small.uri.split(",")[1]))))
    assert picture.shape == (encoding.side // 2, encoding.side, 3) == (small.height, small.width, 3)
    assert not small.pixelated
    assert np.abs(picture.astype(int) - [0, 127.5, 255]).max() <= (1 if encoding.quality is None else 3)


def test_thumbnails_lose_quality_only_where_they_would_not_fit() -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (4, 3, 128, 128)).astype(np.float32)
    keys = [("training", i) for i in (0, 1, 2, 3, 1)]
    sizes = []
    for encoding in ENCODINGS:
        each = [len(thumbnail(image, encoding).uri) for image in images]
        found, chosen = thumbnails(keys, lambda key: images[key[1]], budget=sum(each))
        assert chosen == encoding and [len(small.uri) for small in found.values()] == each
        sizes.append(sum(each))
    assert sizes == sorted(sizes, reverse=True)
    assert thumbnails(keys, lambda key: images[key[1]], budget=1)[1] == ENCODINGS[-1]
