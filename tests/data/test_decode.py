"""Each kind of picture file becomes the pixels that it shows."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mucs_cli.data.decode import Reading, crop_to_square, decode, parse_color, read_header
from mucs_cli.errors import UserError
from mucs_cli.schemas import ImageFolderConfig

Crop = Callable[..., np.ndarray]
WHITE = (255, 255, 255)


def pixels(path: Path, channels: int = 3, background: tuple[int, int, int] = WHITE) -> np.ndarray:
    """[H, W, 3] or [H, W], as integers that can be subtracted."""
    decoded = decode(path, str(path), Reading(channels, None, background, 10**6))
    assert decoded.dtype == np.uint8
    return (decoded[0] if channels == 1 else decoded.transpose(1, 2, 0)).astype(int)


def off_by(path: Path, expected: np.ndarray, **keys: object) -> int:
    return int(np.abs(pixels(path, **keys) - expected.astype(int)).max())


# --- formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
        ("a.bmp", {}),
        ("a.tiff", {}),
        ("a.tif", {"compression": "tiff_lzw"}),
        ("a.tiff", {"compression": "tiff_deflate"}),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, crop: Crop, name: str, keys: dict, mode: str) -> None:
    image = Image.fromarray(crop(0)).convert(mode)
    image.save(tmp_path / name, **keys)
    assert off_by(tmp_path / name, np.asarray(image), channels=1 if mode == "L" else 3) == 0


@pytest.mark.parametrize(("name", "mean_bound"), [("a.jpg", 2), ("a.jfif", 2), ("a.webp", 4)])  # WebP halves colour
def test_lossy_formats_are_close(tmp_path: Path, photographs: list[np.ndarray], name: str, mean_bound: float) -> None:
    smooth = np.asarray(Image.fromarray(photographs[1][:256, :256]).resize((32, 32), Image.Resampling.LANCZOS))
    Image.fromarray(smooth).save(
        tmp_path / name, quality=98, **({"subsampling": 0, "format": "JPEG"} if "j" in name else {})
    )
    assert np.abs(pixels(tmp_path / name) - smooth.astype(int)).mean() < mean_bound


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.tiff", "a.png"])
def test_the_first_frame_counts(tmp_path: Path, crop: Crop, name: str) -> None:
    frames = [Image.fromarray(crop(index)).quantize(64) for index in (0, 1)]
    if name != "a.gif":
        frames = [frame.convert("RGB") for frame in frames]
    keys = {"lossless": True} if name == "a.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **keys)
    with Image.open(tmp_path / name) as stored:
        assert stored.n_frames == 2
    assert off_by(tmp_path / name, np.asarray(frames[0].convert("RGB"))) == 0


def test_bytes_are_read_like_a_file(tmp_path: Path, crop: Crop) -> None:
    Image.fromarray(crop(0)).save(tmp_path / "a.png")
    reading = Reading(3, None, WHITE, 10**6)
    assert np.array_equal(decode((tmp_path / "a.png").read_bytes(), "row 0", reading).transpose(1, 2, 0), crop(0))
    with pytest.raises(UserError, match=r"^row 0: cannot be read"):
        decode(b"hello", "row 0", reading)


# --- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grayscale_is_scaled_over_its_whole_range(tmp_path: Path, name: str) -> None:
    values = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 257)
    assert off_by(tmp_path / name, expected, channels=1) == 0 and expected.min() == 0 and expected.max() == 255
    assert off_by(tmp_path / name, np.repeat(expected[:, :, None], 3, axis=2)) == 0
    assert read_header(tmp_path / name, name, Reading(None, None, WHITE, 10**6)) == (16, 16, True)


def test_16_bit_colour_is_within_one_level_of_its_scaled_value(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(png_16_bit(values))
    assert off_by(tmp_path / "a.png", np.round(values / 257)) <= 1


def png_16_bit(values: np.ndarray) -> bytes:
    """A PNG file of 16-bit RGB, which Pillow reads but cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("name", ["a.tiff", "a.jpg"])
def test_cmyk_becomes_the_rgb_that_its_inks_leave(tmp_path: Path, name: str) -> None:
    # One flat colour a 16x16 tile, so that JPEG's compression keeps it.
    inks = np.array([[255, 0, 0, 0], [0, 128, 0, 0], [0, 0, 255, 64], [10, 20, 30, 40]], dtype=np.uint8)
    image = Image.fromarray(np.repeat(np.repeat(inks[None], 16, axis=0), 16, axis=1), mode="CMYK")
    image.save(tmp_path / name, **({"quality": 100} if name == "a.jpg" else {}))
    left = inks.astype(float)
    expected = (255 - left[:, :3]) * (255 - left[:, 3:]) / 255
    assert np.abs(pixels(tmp_path / name)[8, 8::16] - expected).max() <= (1 if name == "a.tiff" else 3)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tiff"])
@pytest.mark.parametrize("background", [WHITE, (0, 0, 0), (200, 30, 90)])
def test_transparent_pixels_are_laid_on_the_background_and_opaque_ones_stay(
    tmp_path: Path, crop: Crop, name: str, background: tuple[int, int, int]
) -> None:
    alpha = np.full((16, 16, 1), 255, dtype=np.uint8)
    alpha[:8] = 0
    alpha[8:12] = 128
    image = Image.fromarray(np.concatenate([crop(0), alpha], axis=2))
    image.save(tmp_path / name, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    found = pixels(tmp_path / name, background=background)
    assert (found[:8] == background).all()
    assert np.array_equal(found[12:], crop(0)[12:])
    blended = crop(0)[8:12] * (128 / 255) + np.array(background) * (127 / 255)
    assert np.abs(found[8:12] - blended).max() <= 1


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_grayscale_value_that_stands_for_transparent_becomes_the_background(tmp_path: Path, mode: str) -> None:
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * (257 if mode == "I;16" else 1)
    image = Image.fromarray(values if mode == "I;16" else values.astype(np.uint8))
    image.save(tmp_path / "a.png", transparency=int(values[3, 4]))
    found = pixels(tmp_path / "a.png", background=(200, 30, 90))
    assert tuple(found[3, 4]) == (200, 30, 90) and (np.delete(found[:, :, 0].ravel(), 52) != 200).sum() >= 254
    assert found[15, 15].tolist() == [255] * 3


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_a_palette_becomes_its_colours_and_its_transparent_entry_the_background(
    tmp_path: Path, crop: Crop, name: str
) -> None:
    palette = Image.fromarray(crop(0)).quantize(8)
    palette.save(tmp_path / name)
    palette.save(tmp_path / f"b{name}", transparency=0)
    expected, entry = np.asarray(palette.convert("RGB")), np.asarray(palette)
    assert off_by(tmp_path / name, expected) == 0
    found = pixels(tmp_path / f"b{name}", background=(1, 2, 3))
    assert (entry == 0).any() and (found[entry == 0] == (1, 2, 3)).all()
    assert np.array_equal(found[entry != 0], expected[entry != 0])


def test_black_and_white_becomes_0_and_255(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).random((16, 16)) < 0.5
    for name in ("a.png", "a.tiff", "a.bmp", "a.gif"):
        Image.fromarray(bits).save(tmp_path / name)
        assert off_by(tmp_path / name, bits * 255, channels=1) == 0


@pytest.mark.parametrize("values", [np.ones((8, 8), np.float32), np.full((8, 8), 70_000, np.int32)])
def test_pixels_without_a_fixed_range_are_refused_by_their_mode(tmp_path: Path, values: np.ndarray) -> None:
    Image.fromarray(values).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: got pixels of mode [FI];"):
        pixels(tmp_path / "a.tiff")


# --- orientation, size, background -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path: Path, crop: Crop, orientation: int, name: str) -> None:
    upright = crop(0, 16, 24) if name != "a.jpg" else np.kron(crop(0, 2, 3), np.ones((8, 8, 1), dtype=np.uint8))
    # How each orientation is stored: the camera's pixels from the upright ones (Exif 2.3, tag 274).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    keys = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.webp": {"lossless": True}}.get(name, {})
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **keys)
    assert off_by(tmp_path / name, upright) <= (3 if name == "a.jpg" else 0)


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    shrunk = np.asarray(crop_to_square(Image.fromarray(stripes), 16))
    assert np.abs(shrunk.astype(int) - 127).max() < 32  # nearest or bilinear sampling would keep 0 or 255


def test_a_long_strip_is_cropped_before_it_is_scaled() -> None:
    strip = Image.fromarray(np.arange(40_000, dtype=np.uint16).astype(np.uint8)[None])
    assert np.asarray(crop_to_square(strip, 512)).shape == (512, 512)  # scaled first, it would have 10^10 pixels


def test_a_picture_of_the_right_height_is_cropped_without_being_resampled(crop: Crop) -> None:
    cropped = np.asarray(crop_to_square(Image.fromarray(crop(0, 16, 21)), 16))
    assert np.array_equal(cropped, crop(0, 16, 21)[:, 2:18])


@pytest.mark.parametrize(("text", "color"), [("white", WHITE), ("black", (0, 0, 0)), ("#ff8000", (255, 128, 0))])
def test_a_background_is_a_colour(text: str, color: tuple[int, int, int]) -> None:
    assert parse_color(text) == color


@pytest.mark.parametrize("text", ["#ff80", "#gg0000", "red", "", "#ff800000"])
def test_a_background_that_is_no_colour_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^data\.background: got"):
        Reading.of(ImageFolderConfig(background=text))


def test_gray_with_alpha_counts_as_grayscale_only_on_a_gray_background(tmp_path: Path, crop: Crop) -> None:
    Image.fromarray(crop(0)).convert("LA").save(tmp_path / "a.png")
    for background, is_grayscale in ((WHITE, True), ((9, 9, 9), True), ((200, 30, 90), False)):
        assert read_header(tmp_path / "a.png", "a", Reading(None, None, background, 10**6))[2] is is_grayscale


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("name", "keys"),
    [("a.webp", {}), ("a.bmp", {}), ("a.gif", {}), ("a.tiff", {}), ("a.tiff", {"compression": "tiff_lzw"})],
)
@pytest.mark.parametrize("kept", [0, 4, 30, 0.5])
def test_a_truncated_file_is_refused_whatever_its_format(
    tmp_path: Path, photographs: list[np.ndarray], name: str, keys: dict, kept: float
) -> None:
    path = tmp_path / name
    Image.fromarray(photographs[0][:64, :64]).save(path, **keys)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept == 0.5 else int(kept)])
    with pytest.raises(UserError, match=r"cannot be read") as error:
        pixels(path)
    assert error.value.subject == str(path)
