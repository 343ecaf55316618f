import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mucs_cli.config import ImageFolderConfig
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.decode import crop_to_square, decode
from mucs_cli.errors import UserError

Crop = Callable[..., np.ndarray]


def load(folder: Path, **keys: object) -> ImageDataset:
    return load_dataset(ImageFolderConfig(**{"seed": 0, "path": str(folder), **keys}), folder.parent / "run")


def refusal(folder: Path, **keys: object) -> UserError:
    """The error that loading ``folder`` gives."""
    with pytest.raises(UserError) as caught:
        load(folder, **keys)
    assert "\n" not in str(caught.value)
    return caught.value


# --- which files -----------------------------------------------------------------------------------------------------


def test_only_visible_png_and_jpeg_files_count_at_any_depth_and_in_any_case(tmp_path: Path, crop: Crop) -> None:
    folder = tmp_path / "images"
    for name in ("a.png", "b.JPG", "x/y/c.JPeG", ".hidden.png", ".git/d.png", "x/.thumbs/e.png", "f.gif"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop(0)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    assert load(folder).file == ["a.png", "b.JPG", "x/y/c.JPeG"]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path, photo_folder: Path, crop: Crop) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.fromarray(crop(7)).save(outside / "far.png")
    (photo_folder / "linked").symlink_to(outside)
    (photo_folder / "file.png").symlink_to(outside / "far.png")
    (photo_folder / "china" / "round").symlink_to(photo_folder)
    (outside / "back").symlink_to(outside)
    files = load(photo_folder).file
    assert files[-2:] == ["flower/deep/5.png", "linked/far.png"] and "file.png" in files and len(files) == 8


def test_a_link_to_nowhere_is_named(photo_folder: Path) -> None:
    (photo_folder / "lost.png").symlink_to(photo_folder / "nowhere.png")
    assert refusal(photo_folder).subject == str(photo_folder / "lost.png")


def test_a_missing_folder_a_file_and_a_folder_without_images_are_refused(tmp_path: Path) -> None:
    assert "no such folder" in str(refusal(tmp_path / "missing"))
    (tmp_path / "file.png").touch()
    assert "a file; expected a folder" in str(refusal(tmp_path / "file.png"))
    (tmp_path / "empty").mkdir()
    error = refusal(tmp_path / "empty")
    assert error.subject == "data.path" and ".png, .jpg, .jpeg" in error.message


def test_a_name_that_is_not_utf8_is_refused(photo_folder: Path) -> None:
    source = photo_folder / "china/deep/0.png"
    bad = bytes(photo_folder) + b"/\xff.png"
    with open(bad, "wb") as file:
        file.write(source.read_bytes())
    error = refusal(photo_folder)
    assert "not UTF-8" in error.message and str(error).encode()


# --- labels ----------------------------------------------------------------------------------------------------------


def test_the_first_folder_is_the_class_and_classes_are_numbered_by_name(photo_folder: Path) -> None:
    dataset = load(photo_folder, labels="folder")
    assert dataset.class_names == ["china", "flower"] and dataset.num_classes == 2
    assert dataset.labels([0, 5, 1]).tolist() == [0, 1, 0]
    assert dataset.metadata == {"label": ["china"] * 3 + ["flower"] * 3}
    index = (photo_folder.parent / "run/data/index.csv").read_text().splitlines()
    assert index[0].endswith(",split,label") and index[-1].endswith(",training,flower")


def test_without_labels_there_are_none(photo_folder: Path) -> None:
    dataset = load(photo_folder)
    assert dataset.label is None and dataset.labels([0]) is None and dataset.num_classes == 0 and dataset.metadata == {}


def test_a_file_without_a_class_folder_is_refused(photo_folder: Path, crop: Crop) -> None:
    Image.fromarray(crop(8)).save(photo_folder / "loose.png")
    error = refusal(photo_folder, labels="folder")
    assert error.subject == str(photo_folder / "loose.png") and "data.labels=none" in error.message


# --- sizes and colours -----------------------------------------------------------------------------------------------


def test_colour_pixels_are_the_files_pixels(photo_folder: Path, crop: Crop) -> None:
    dataset = load(photo_folder)
    assert dataset.raw.shape == (6, 3, 16, 16) and dataset.levels == 255
    for example_id, index in enumerate((0, 2, 4, 1, 3, 5)):
        assert np.array_equal(dataset.raw[example_id], crop(index).transpose(2, 0, 1))
    assert dataset.folder == photo_folder and dataset.facts["name"] == "images in photos"


def test_auto_is_grayscale_only_if_every_file_is(tmp_path: Path, crop: Crop) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    gray = [Image.fromarray(crop(index)).convert("L") for index in range(3)]
    gray[0].save(folder / "0.png")
    gray[1].convert("LA").save(folder / "1.png")
    gray[2].save(folder / "2.jpg")
    dataset = load(folder)
    assert (
        dataset.channels == 1
        and np.array_equal(dataset.raw[0, 0], gray[0])
        and np.array_equal(dataset.raw[1, 0], gray[1])
    )


@pytest.mark.parametrize(("color", "channels"), [("auto", 3), ("rgb", 3), ("grayscale", 1)])
def test_one_colour_file_makes_all_of_them_rgb_unless_grayscale_is_asked_for(
    tmp_path: Path, crop: Crop, color: str, channels: int
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    gray = Image.fromarray(crop(0)).convert("L")
    gray.save(folder / "0.png")
    Image.fromarray(crop(1)).save(folder / "1.png")
    raw = load(folder, color=color).raw
    assert raw.shape == (2, channels, 16, 16)
    assert all(np.array_equal(channel, gray) for channel in raw[0])
    luma = crop(1) @ [0.299, 0.587, 0.114]
    assert np.abs(raw[1].mean(0) - (luma if channels == 1 else crop(1).mean(-1))).max() <= 0.51


def test_sizes_that_differ_are_refused_with_both_sizes(photo_folder: Path, crop: Crop) -> None:
    Image.fromarray(crop(6, 20, 20)).save(photo_folder / "flower/odd.png")
    error = refusal(photo_folder)
    assert error.subject == str(photo_folder / "flower/odd.png")
    assert "got 20x20 pixels; expected 16x16 as china/deep/0.png has. Set data.image_size" in error.message


def test_images_that_are_not_square_are_refused(tmp_path: Path, crop: Crop) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(crop(0, 16, 24)).save(folder / "0.png")
    assert "got 24x16 pixels; expected a square image. Set data.image_size" in refusal(folder).message


def test_after_a_refusal_the_advised_setting_works_in_the_same_run(photo_folder: Path, crop: Crop) -> None:
    Image.fromarray(crop(6, 20, 20)).save(photo_folder / "flower/odd.png")
    assert "Set data.image_size" in refusal(photo_folder).message
    (photo_folder / "flower/bad.png").write_bytes((photo_folder / "flower/odd.png").read_bytes()[:100])
    assert "bad.png" in refusal(photo_folder, image_size=16).subject
    (photo_folder / "flower/bad.png").unlink()
    assert load(photo_folder, image_size=8).raw.shape == (7, 3, 8, 8)


def test_image_size_resizes_and_crops_files_of_any_size(tmp_path: Path, crop: Crop) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, (height, width) in enumerate([(16, 16), (40, 64), (64, 31), (8, 8)]):
        Image.fromarray(crop(index, height, width)).save(folder / f"{index}.png")
    raw = load(folder, image_size=16).raw
    assert raw.shape == (4, 3, 16, 16)
    assert np.array_equal(raw[0], crop(0).transpose(2, 0, 1))  # already of that size: untouched
    wide = Image.fromarray(crop(1, 40, 64)).resize((26, 16), Image.Resampling.LANCZOS).crop((5, 0, 21, 16))
    assert np.array_equal(raw[1], np.asarray(wide).transpose(2, 0, 1))


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    shrunk = np.asarray(crop_to_square(Image.fromarray(stripes), 16))
    assert np.abs(shrunk.astype(int) - 127).max() < 32  # nearest or bilinear sampling would keep 0 or 255


# --- modes and orientation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, crop: Crop, orientation: int) -> None:
    upright = crop(0, 16, 24)
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
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png", 3, None).transpose(1, 2, 0), upright)


def test_transparent_pixels_are_laid_on_white_and_opaque_ones_stay(tmp_path: Path, crop: Crop) -> None:
    alpha = np.full((16, 16, 1), 255, dtype=np.uint8)
    alpha[:8] = 0
    alpha[8:12] = 128
    Image.fromarray(np.concatenate([crop(0), alpha], axis=2)).save(tmp_path / "a.png")
    pixels = decode(tmp_path / "a.png", 3, None).transpose(1, 2, 0)
    assert (pixels[:8] == 255).all()
    assert np.array_equal(pixels[12:], crop(0)[12:])
    blended = crop(0)[8:12] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(pixels[8:12] - blended).max() <= 1


def test_a_palette_becomes_its_colours_and_its_transparent_entry_white(tmp_path: Path, crop: Crop) -> None:
    palette = Image.fromarray(crop(0)).quantize(8)
    palette.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=0)
    expected = np.asarray(palette.convert("RGB"))
    entry = np.asarray(palette)
    assert np.array_equal(decode(tmp_path / "a.png", 3, None).transpose(1, 2, 0), expected)
    pixels = decode(tmp_path / "b.png", 3, None).transpose(1, 2, 0)
    assert (entry == 0).any() and (pixels[entry == 0] == 255).all()
    assert np.array_equal(pixels[entry != 0], expected[entry != 0])


@pytest.mark.parametrize("mode", ["CMYK", "I;16"])
def test_modes_that_are_not_supported_are_named(photo_folder: Path, crop: Crop, mode: str) -> None:
    path = photo_folder / ("flower/deep/z.jpg" if mode == "CMYK" else "flower/deep/z.png")
    if mode == "CMYK":
        Image.fromarray(crop(0)).convert("CMYK").save(path)
    else:
        Image.fromarray(crop(0)[:, :, 0].astype(np.uint16) * 257).save(path)
    error = refusal(photo_folder)
    assert error.subject == str(path) and f"got pixels of mode {mode}" in error.message


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0, 10, 200])
def test_a_truncated_file_is_named(photo_folder: Path, photographs: list[np.ndarray], suffix: str, kept: int) -> None:
    path = photo_folder / "china" / f"cut.{suffix}"
    Image.fromarray(photographs[0][:16, :16]).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(photo_folder)
    assert error.subject == str(path) and "cannot be read" in error.message


def test_a_text_file_and_another_format_under_an_image_name_are_refused(photo_folder: Path, crop: Crop) -> None:
    path = photo_folder / "china" / "a.png"
    path.write_text("hello")
    assert refusal(photo_folder).subject == str(path)
    Image.fromarray(crop(0)).save(path, format="BMP")
    assert refusal(photo_folder).subject == str(path)


def test_a_decompression_bomb_is_refused(photo_folder: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = photo_folder / "china" / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    error = refusal(photo_folder, image_size=16)
    assert error.subject == str(path) and "decompression bomb" in error.message


def test_errors_are_the_first_files_whatever_the_threads_do(photo_folder: Path) -> None:
    for name in ("china/deep/2.png", "flower/deep/3.png"):
        content = (photo_folder / name).read_bytes()
        (photo_folder / name).write_bytes(content[: len(content) // 2])
    assert refusal(photo_folder).subject == str(photo_folder / "china/deep/2.png")
