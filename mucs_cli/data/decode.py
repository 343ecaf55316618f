"""One PNG or JPEG file to uint8 pixels."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mucs_cli.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg")
GRAYSCALE_MODES = ("1", "L", "LA")
COLOR_MODES = ("RGB", "RGBA", "P")
PIL_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An open image whose header has been read and whose mode is one we convert.

    Raises:
        UserError: the file cannot be read or decoded (inside the ``with`` block too), or its mode is not supported.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode not in GRAYSCALE_MODES + COLOR_MODES:
                raise UserError(
                    str(path),
                    f"got pixels of mode {image.mode}; expected 8-bit grayscale, RGB or palette, alpha or not. "
                    "Convert the file, or remove it from the folder.",
                )
            yield image
    except PIL_ERRORS as error:
        raise UserError(
            str(path),
            f"cannot be read ({error}); expected a PNG or JPEG image. Replace the file, or remove it from the folder.",
        ) from error


def read_header(path: Path) -> tuple[int, int, bool]:
    """(width, height, is grayscale) as stored, without decoding the pixels."""
    with opened(path) as image:
        return image.width, image.height, image.mode in GRAYSCALE_MODES


def decode(path: Path, channels: int, image_size: int | None) -> np.ndarray:
    """The pixels of one file, upright, on white where transparent.

    Args:
        path: a PNG or JPEG file.
        channels: 1 for grayscale (ITU-R 601 luma of a colour file), 3 for RGB.
        image_size: side in pixels after scaling (shorter side, Lanczos) and centre crop; None: as it is.
    Returns:
        uint8 [C, H, W], 0 to 255.
    Raises:
        UserError: the file cannot be read.
    """
    with opened(path) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        image = image.convert("L" if channels == 1 else "RGB")
        if image_size is not None:
            image = crop_to_square(image, image_size)
        pixels = np.asarray(image)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """Scales the shorter side to ``side`` pixels (Lanczos, antialiased) and cuts out the centre square."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
