import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mucs_cli.data import images, pictures
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.decode import Reading
from mucs_cli.errors import UserError
from mucs_cli.schemas import ImageFolderConfig

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


def test_only_visible_pictures_count_at_any_depth_and_in_any_case_and_others_are_said(
    tmp_path: Path, crop: Crop, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "images"
    for name in ("a.png", "b.JPG", "x/y/c.JPeG", ".hidden.png", ".git/d.png", "x/.thumbs/e.png", "f.gif", "g.ppm"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop(0)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    with caplog.at_level("INFO", "mucs"):
        assert load(folder).file == ["a.png", "b.JPG", "f.gif", "x/y/c.JPeG"]
    assert "left out 2 files that are not pictures read here (1 .ppm, 1 .txt)" in caplog.text.replace(
        "1 .txt, 1 .ppm", "1 .ppm, 1 .txt"
    )


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


def test_a_limit_numbers_the_classes_as_the_whole_folder_does(photo_folder: Path) -> None:
    dataset = load(photo_folder, labels="folder", limit=2)
    assert dataset.class_names == ["china", "flower"] and dataset.labels([0, 1]).tolist() == [0, 0]
    (photo_folder / "later").mkdir()
    (photo_folder / "flower/deep/1.png").rename(photo_folder / "later/1.png")
    assert load(photo_folder, labels="folder", limit=2).class_names == ["china", "flower", "later"]


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
    wide = Image.fromarray(crop(1, 40, 64)[:, 12:52]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(raw[1], np.asarray(wide).transpose(2, 0, 1))


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("kept", [0, 10, 200])
def test_a_truncated_file_is_named(photo_folder: Path, photographs: list[np.ndarray], suffix: str, kept: int) -> None:
    path = photo_folder / "china" / f"cut.{suffix}"
    Image.fromarray(photographs[0][:16, :16]).save(path)
    path.write_bytes(path.read_bytes()[:kept])
    error = refusal(photo_folder)
    assert error.subject == str(path) and "cannot be read" in error.message


def test_the_content_and_not_the_name_says_the_format_and_what_is_no_picture_is_refused(
    photo_folder: Path, crop: Crop
) -> None:
    path = photo_folder / "china" / "a.png"
    path.write_text("hello")
    assert refusal(photo_folder).subject == str(path)
    Image.fromarray(crop(0)).save(path, format="PPM")
    assert refusal(photo_folder).subject == str(path)
    Image.fromarray(crop(9)).save(path, format="WEBP", lossless=True)
    assert np.array_equal(load(photo_folder).raw[0], crop(9).transpose(2, 0, 1))


def bomb(path: Path, side: int) -> None:
    """A PNG file of a few bytes that says it has side x side pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_before_it_is_decoded(photo_folder: Path) -> None:
    path = photo_folder / "china" / "bomb.png"
    bomb(path, 60_000)
    error = refusal(photo_folder, image_size=16)
    assert error.subject == str(path) and "decompression bomb" in error.message
    bomb(path, 10_000)
    error = refusal(photo_folder, image_size=16, max_pixels=99_999_999)
    assert error.subject == str(path) and "got 10000x10000 pixels; expected at most 99999999" in error.message


# --- skipping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged_folder(photo_folder: Path, crop: Crop) -> Path:
    """``photo_folder`` with three files that cannot be read, each for another reason, and found at another moment."""
    (photo_folder / "china/deep/1.png").write_text("hello")
    bomb(photo_folder / "china/deep/3.png", 20_000)
    content = (photo_folder / "flower/deep/3.png").read_bytes()
    (photo_folder / "flower/deep/3.png").write_bytes(content[: len(content) // 2])
    return photo_folder


def test_skipped_files_get_no_id_and_are_listed_with_their_reasons(
    damaged_folder: Path, crop: Crop, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "mucs"):
        dataset = load(damaged_folder, on_error="skip", labels="folder", holdout=2)
    assert dataset.file == [f"china/deep/{i}.png" for i in (0, 2, 4)] + [f"flower/deep/{i}.png" for i in (1, 5)]
    assert np.array_equal(dataset.raw, [crop(index).transpose(2, 0, 1) for index in (0, 2, 4, 1, 5)])
    assert dataset.labels(range(5)).tolist() == [0, 0, 0, 1, 1] and len(dataset.training) == 3
    assert len(set(dataset.sha256)) == 5
    manifest = json.loads((damaged_folder.parent / "run/data/manifest.json").read_text())
    assert (manifest["num_images"], manifest["num_skipped"]) == (5, 3)
    skipped = {entry["file"]: entry["reason"] for entry in manifest["skipped"]}
    assert list(skipped) == ["china/deep/1.png", "china/deep/3.png", "flower/deep/3.png"]
    assert "cannot be read" in skipped["china/deep/1.png"] and "truncated" in skipped["flower/deep/3.png"]
    assert "skipped 3 pictures that cannot be read: china/deep/1.png, china/deep/3.png" in caplog.text


def test_a_second_load_knows_what_was_skipped_and_a_mended_file_counts_as_a_change(
    damaged_folder: Path, crop: Crop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(damaged_folder, on_error="skip")
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode", None)
        again = load(damaged_folder, on_error="skip")
    assert (again.file, again.fingerprint) == (first.file, first.fingerprint)
    (damaged_folder.parent / "run/data/images.safetensors").unlink()
    cleaned = load(damaged_folder, on_error="skip")
    assert cleaned.fingerprint == first.fingerprint and np.array_equal(cleaned.raw, first.raw)
    Image.fromarray(crop(3)).save(damaged_folder / "flower/deep/3.png")
    error = refusal(damaged_folder, on_error="skip")
    assert error.subject == str(damaged_folder / "flower/deep/3.png") and error.message.startswith("has changed")


def test_an_interrupted_decoding_remembers_what_could_not_be_read(
    damaged_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 3 * 16 * 16)  # one image a block
    monkeypatch.setattr(pictures, "NUM_THREADS", 1)
    original = pictures.decode

    def stop_at_the_last(content: Path, name: str, reading: Reading) -> np.ndarray:
        if name.endswith("5.png"):
            raise KeyboardInterrupt
        return original(content, name, reading)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pictures, "decode", stop_at_the_last)
        load(damaged_folder, on_error="skip")
    dataset = load(damaged_folder, on_error="skip")
    assert len(dataset) == 5 and "flower/deep/3.png" not in dataset.file and dataset.raw.any(axis=(1, 2, 3)).all()


def test_skip_changes_nothing_where_everything_can_be_read_and_does_not_hide_sizes_that_differ(
    photo_folder: Path, tmp_path: Path, crop: Crop
) -> None:
    stopped = load(photo_folder)
    config = ImageFolderConfig(seed=0, path=str(photo_folder), on_error="skip")
    assert load_dataset(config, tmp_path / "other").fingerprint == stopped.fingerprint
    Image.fromarray(crop(6, 20, 20)).save(photo_folder / "flower/odd.png")
    with pytest.raises(UserError, match="got 20x20 pixels"):
        load_dataset(config, tmp_path / "third")


def test_a_folder_without_one_readable_picture_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg"):
        (tmp_path / "images" / name).write_text("hello")
    error = refusal(tmp_path / "images", on_error="skip")
    assert error.subject == "data.on_error" and "none of 2 pictures can be read; the first is a.png" in error.message


def test_errors_are_the_first_files_whatever_the_threads_do(photo_folder: Path) -> None:
    for name in ("china/deep/2.png", "flower/deep/3.png"):
        content = (photo_folder / name).read_bytes()
        (photo_folder / name).write_bytes(content[: len(content) // 2])
    assert refusal(photo_folder).subject == str(photo_folder / "china/deep/2.png")
