"""Images as PNG: thumbnails inside the report, and the one picture of every query beside its top training images."""

import base64
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mucs_cli.reporting.results import Ranked, RunResults, Variant, score_text


class Encoding(NamedTuple):
    """Longest side of a thumbnail, in pixels, and the quality of its JPEG, 1 to 95; None: PNG, which loses nothing."""

    side: int
    quality: int | None


ENCODINGS = (Encoding(128, None), Encoding(128, 85), Encoding(128, 70), Encoding(96, 70), Encoding(64, 60))
"""The best first; larger images are reduced to the side."""
PictureKey = tuple[str, int]
"""``("query", index)`` or ``("training", example_id)``."""
SHEET_BUDGET = 10_000_000
"""Characters that all thumbnails of a page may take: with tables and plots it stays below 15 MB."""
PICTURE_QUERIES = 10
"""Rows of the picture at most: it is an overview, the report has every query."""
PICTURE_COLUMNS = 10

INK, MUTED, RULE, PAPER = "#1b1f24", "#5b6470", "#d5dae0", "#ffffff"
BLUE, VERMILION = "#0072b2", "#d55e00"  # the Okabe-Ito palette: told apart with any colour vision

TILE, GAP, ARROW, MARGIN = 120, 16, 56, 48
"""The picture's measures, in pixels: side of a tile, space between, room for the arrow, outer margin."""
ROW, HEADER, FOOTER = TILE + 84, 150, 64


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data: URI with its size in pixels; ``pixelated`` where it has to be enlarged without blur."""

    uri: str
    width: int
    height: int
    pixelated: bool


def to_picture(image: NDArray[np.float32]) -> Image.Image:
    """An 8-bit picture of an image; [C, H, W] in [-1, 1], C is 1 (grayscale) or 3 (RGB)."""
    pixels = np.rint((image.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def thumbnail(image: NDArray[np.float32], encoding: Encoding) -> Thumbnail:
    """[C, H, W] in [-1, 1] inside a data: URI."""
    picture = to_picture(image)
    pixelated = max(picture.size) < encoding.side
    picture.thumbnail((encoding.side, encoding.side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if encoding.quality is None:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=encoding.quality, optimize=True)
    uri = f"data:image/{'png' if encoding.quality is None else 'jpeg'};base64,"
    return Thumbnail(uri + base64.b64encode(buffer.getvalue()).decode(), picture.width, picture.height, pixelated)


def thumbnails(
    keys: Iterable[PictureKey], image_of: Callable[[PictureKey], NDArray[np.float32]], budget: int = SHEET_BUDGET
) -> tuple[dict[PictureKey, Thumbnail], Encoding]:
    """One thumbnail a key, all in the best encoding that keeps within the budget, else in the last.

    Args:
        keys: of the images, each may come several times.
        image_of: gives the image of a key, [C, H, W] in [-1, 1].
        budget: characters that the data: URIs may take together.
    """
    wanted = list(dict.fromkeys(keys))
    for encoding in ENCODINGS[:-1]:
        found = {}
        size = 0
        for key in wanted:
            found[key] = thumbnail(image_of(key), encoding)
            size += len(found[key].uri)
            if size > budget:
                break
        else:
            return found, encoding
    return {key: thumbnail(image_of(key), ENCODINGS[-1]) for key in wanted}, ENCODINGS[-1]


# --- the picture -----------------------------------------------------------------------------------------------------


def top_picture(results: RunResults, variant: Variant, k: int, exclude_exact: bool) -> Image.Image:
    """Each query beside its top training images, with score, id and label.

    At most ``PICTURE_QUERIES`` queries and ``PICTURE_COLUMNS`` images each; the footer says when there are more.
    """
    queries, columns = variant.query_ids[:PICTURE_QUERIES], min(k, PICTURE_COLUMNS)
    width = max(2 * MARGIN + TILE + ARROW + columns * (TILE + GAP) - GAP, 860)
    canvas = Image.new("RGB", (width, HEADER + len(queries) * ROW + FOOTER), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text(
        (MARGIN, 36), "Which training images is each generated image attributed to?", INK, ImageFont.load_default(30)
    )
    first = MARGIN + TILE + ARROW
    draw.text((MARGIN, 108), "generated", BLUE, ImageFont.load_default(19))
    draw.text((first, 108), f"training images, highest {variant.name} score first", MUTED, ImageFont.load_default(19))
    for row, query in enumerate(queries):
        top = HEADER + row * ROW
        draw_query(canvas, results.queries[query], f"query {query}", top)
        ranked = results.ranking(variant, query, columns, exclude_exact=exclude_exact)
        for column, item in enumerate(ranked):
            left = first + column * (TILE + GAP)
            paste(canvas, results.training_image(item.example_id), left, top)
            draw.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=RULE)
            centred(draw, score_text(item.score), left, top + TILE + 9, INK, 19)
            centred(draw, under(item), left, top + TILE + 33, VERMILION if item.exact_copy else MUTED, 15)
            if item.exact_copy:
                draw.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), outline=VERMILION, width=3)
    draw.text((MARGIN, canvas.height - 46), footer(results, variant, len(queries)), MUTED, ImageFont.load_default(15))
    return canvas


def under(item: Ranked) -> str:
    """The second line under a tile."""
    label = item.metadata.get("label")
    words = [f"id {item.example_id}", "exact copy" if item.exact_copy else label and f"label {label}"]
    return " · ".join(word for word in words if word)


def draw_query(canvas: Image.Image, image: NDArray[np.float32], name: str, top: int) -> None:
    """The query in a blue frame, and the arrow to its training images."""
    draw = ImageDraw.Draw(canvas)
    paste(canvas, image, MARGIN, top)
    draw.rectangle((MARGIN - 5, top - 5, MARGIN + TILE + 4, top + TILE + 4), outline=BLUE, width=4)
    centred(draw, name, MARGIN, top + TILE + 9, BLUE, 19)
    middle, start, end = top + TILE // 2, MARGIN + TILE + 17, MARGIN + TILE + ARROW - 13
    draw.line((start, middle, end - 6, middle), fill=BLUE, width=2)
    draw.polygon([(end - 8, middle - 6), (end, middle), (end - 8, middle + 6)], fill=BLUE)


def paste(canvas: Image.Image, image: NDArray[np.float32], left: int, top: int) -> None:
    """The image fitted into a tile: small ones by whole pixels, so that what is seen is what the model sees."""
    picture = to_picture(image)
    scale = TILE / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1.5 else Image.Resampling.LANCZOS)
    canvas.paste(picture.convert("RGB"), (left + (TILE - size[0]) // 2, top + (TILE - size[1]) // 2))


def centred(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, colour: str, size: int) -> None:
    """One line of text centred under a tile, cut where it is too long."""
    font = ImageFont.load_default(size)
    while draw.textlength(text, font) > TILE + GAP - 4 and len(text) > 2:
        text = text[:-2] + "…"
    draw.text((left + (TILE - draw.textlength(text, font)) / 2, top), text, colour, font)


def footer(results: RunResults, variant: Variant, shown: int) -> str:
    source = results.data.get("facts", {}).get("name", "")
    text = f"{source}, {len(variant.example_ids):,} training images scored".removeprefix(", ")
    if shown < len(variant.query_ids):
        text += f"; the first {shown} of {len(variant.query_ids)} queries"
    return text + ". A score compares images within its row; it is no proof of copying."
