"""One encoded picture (PNG, JPEG, WebP, BMP, TIFF or GIF) to uint8 pixels.

What the pixels are, for every kind of file: the first frame, upright (EXIF orientation), transparent parts laid on the
background, CMYK by Pillow's plain conversion (colour profiles are not applied), 16 bits scaled to 8.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageOps

from mucs_cli.errors import UserError
from mucs_cli.schemas import PictureConfig

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif")
GRAYSCALE_8_BIT = ("1", "L", "LA")
GRAYSCALE_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
COLOR_MODES = ("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr")

# Pillow warns from half of the size that it refuses; data.max_pixels is the limit here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Reading:
    """How pictures become pixels.

    Attributes:
        channels: 1 for grayscale (ITU-R 601 luma of a colour picture), 3 for RGB; None: not decided yet.
        image_size: side in pixels after centre crop and scaling (Lanczos); None: as stored.
        background: (red, green, blue), 0 to 255, behind transparent pixels.
        max_pixels: width times height, as stored, above which a picture is refused before it is decoded.
    """

    channels: int | None
    image_size: int | None
    background: tuple[int, int, int]
    max_pixels: int

    @classmethod
    def of(cls, config: PictureConfig) -> "Reading":
        """Raises UserError for a background that is no colour."""
        return cls(None, config.image_size, parse_color(config.background), config.max_pixels)


def parse_color(text: str) -> tuple[int, int, int]:
    """(red, green, blue) of ``white``, ``black`` or ``#rrggbb``.

    Raises:
        UserError: it is none of them.
    """
    if text in ("white", "black") or (len(text) == 7 and text.startswith("#")):
        try:
            red, green, blue = ImageColor.getrgb(text)[:3]
            return red, green, blue
        except ValueError:
            pass
    raise UserError(
        "data.background",
        f"got {text!r}; expected white, black or #rrggbb. For a colour write 'data.background=\"#808080\"'.",
    )


@contextmanager
def opened(content: Path | bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """An open picture whose header has been read and whose size and mode are ones we take.

    Raises:
        UserError: the file cannot be read, is too large, or its mode is not supported.
    """
    with said(name):
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content, formats=FORMATS)
    with image:
        if image.width * image.height > max_pixels:
            raise UserError(
                name,
                f"got {image.width}x{image.height} pixels; expected at most {max_pixels} in all. Shrink or remove "
                "the picture, or raise data.max_pixels.",
            )
        if not is_grayscale_mode(image) and image.mode not in COLOR_MODES:
            raise UserError(
                name,
                f"got pixels of mode {image.mode}; expected grayscale of 8 or 16 bits, RGB, palette or CMYK. "
                "Convert or remove the picture.",
            )
        yield image


@contextmanager
def said(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises over a damaged file into a UserError. Only Pillow's own reading goes inside.

    Every exception counts: its plugins meet damaged files with KeyError, TypeError, struct.error and others.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(
            name,
            f"cannot be read ({error}); expected a PNG, JPEG, WebP, BMP, TIFF or GIF picture. Replace or remove it.",
        ) from error


def is_16_bit(image: Image.Image) -> bool:
    """True for 16-bit grayscale. Before Pillow 11, a PNG of that kind has mode I; a TIFF of mode I has 32 bits."""
    return image.mode in GRAYSCALE_16_BIT or (image.mode == "I" and image.format == "PNG")


def is_grayscale_mode(image: Image.Image) -> bool:
    return image.mode in GRAYSCALE_8_BIT or is_16_bit(image)


def read_header(content: Path | bytes, name: str, reading: Reading) -> tuple[int, int, bool]:
    """(width, height, is grayscale) as stored, without decoding the pixels."""
    with opened(content, name, reading.max_pixels) as image:
        on_gray = len(set(reading.background)) == 1 or not image.has_transparency_data
        return image.width, image.height, is_grayscale_mode(image) and on_gray


def decode(content: Path | bytes, name: str, reading: Reading) -> np.ndarray:
    """The pixels of one picture.

    16-bit grayscale v becomes round(v / 257), so that 65535 is 255. Pillow reads 16-bit colour as its high byte, which
    is within one level of that.

    Args:
        content: a file's path, or its bytes.
        name: what an error calls it.
        reading: its ``channels`` must be set.
    Returns:
        uint8 [C, H, W], 0 to 255.
    Raises:
        UserError: the picture cannot be read.
    """
    with opened(content, name, reading.max_pixels) as stored:
        with said(name):
            stored.load()
            image = ImageOps.exif_transpose(stored)
        if is_16_bit(stored):
            image = to_8_bit(image)
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            ground = Image.new("RGBA", layer.size, (*reading.background, 255))
            image = Image.alpha_composite(ground, layer).convert("RGB")
        image = image.convert("L" if reading.channels == 1 else "RGB")
        if reading.image_size is not None:
            image = crop_to_square(image, reading.image_size)
        pixels = np.asarray(image)
    return pixels[None] if reading.channels == 1 else pixels.transpose(2, 0, 1)


def to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit grayscale as mode L, or LA where one of its values stands for transparent."""
    values = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def crop_to_square(image: Image.Image, side: int) -> Image.Image:
    """The centre square, scaled to ``side`` pixels (Lanczos, antialiased); cropped first, so a strip stays cheap."""
    shorter = min(image.size)
    left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
    if image.size != (shorter, shorter):
        image = image.crop((left, top, left + shorter, top + shorter))
    return image if shorter == side else image.resize((side, side), Image.Resampling.LANCZOS)
