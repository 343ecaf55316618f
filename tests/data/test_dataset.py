import csv
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from mucs_cli.data import digits as digits_source
from mucs_cli.data import image_folder, images, pictures
from mucs_cli.data.dataset import ImageDataset, dataset_fingerprint, load_dataset
from mucs_cli.data.decode import Reading
from mucs_cli.errors import UserError
from mucs_cli.schemas import DigitsConfig, ImageFolderConfig

Crop = Callable[..., np.ndarray]


def digits(**keys: int) -> DigitsConfig:
    return DigitsConfig(**{"seed": 0, **keys})


def photos(folder: Path, **keys: object) -> ImageFolderConfig:
    return ImageFolderConfig(**{"seed": 0, "path": str(folder), **keys})


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, decoding a file fails."""

    def refuse(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(pictures, "decode", refuse)
    monkeypatch.setattr(pictures, "read_header", refuse)
    monkeypatch.setattr(image_folder.ImageFolderSource, "open", refuse)


# --- values ----------------------------------------------------------------------------------------------------------


def test_digits_are_read_through_scikit_learn_where_its_file_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    table = digits_source.read_digits()
    monkeypatch.setattr(digits_source, "find_spec", lambda name: None)
    assert np.array_equal(digits_source.read_digits(), table) and table.shape == (1797, 65)


def test_digits_are_scikit_learns_images_labels_and_order(tmp_path: Path) -> None:
    bundle = load_digits()
    dataset = load_dataset(digits(), tmp_path)
    assert dataset.raw.shape == (1797, 1, 8, 8)
    assert np.array_equal(dataset.raw[:, 0], bundle.images)
    assert np.array_equal(dataset.label, bundle.target)
    assert dataset.metadata == {"label": [str(label) for label in bundle.target]}
    assert (dataset.num_classes, dataset.file[17], len(dataset.training)) == (10, "digits[17]", 1797)
    assert (dataset.channels, dataset.height, dataset.width, dataset.folder) == (1, 8, 8, None)
    assert "CC BY 4.0" in dataset.facts["licence"] and "Alpaydin" in dataset.facts["citation"]


@pytest.mark.parametrize("levels", [1, 16, 255])
def test_pixels_are_exactly_minus_one_and_one_at_the_ends(levels: int) -> None:
    raw = np.array([0, levels], dtype=np.uint8)
    assert images.to_pixels(raw, levels).tolist() == [-1.0, 1.0]


def test_images_are_the_stored_pixels_scaled_and_keep_the_order_asked_for(tmp_path: Path) -> None:
    dataset = load_dataset(digits(), tmp_path)
    bundle = load_digits()
    for ids in ([5, 0, 5], np.array([5, 0, 5]), torch.tensor([5, 0, 5])):
        images = dataset.images(ids)
        assert images.dtype == torch.float32 and images.shape == (3, 1, 8, 8)
        assert np.allclose(images[:, 0].numpy(), bundle.images[[5, 0, 5]] / 8 - 1, atol=1e-7)
        assert dataset.labels(ids).tolist() == bundle.target[[5, 0, 5]].tolist()


def test_pixels_cannot_be_written_through_the_dataset(tmp_path: Path) -> None:
    dataset = load_dataset(digits(), tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        dataset.raw[0] = 0
    dataset.images([0]).zero_()
    assert dataset.raw[0].any()


def test_moments_are_those_of_the_training_images_whatever_the_block_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 1000)
    dataset = load_dataset(digits(holdout=1000), tmp_path)
    pixels = load_digits().images[dataset.training] / 8 - 1
    assert dataset.mean_square == pytest.approx((pixels**2).mean(), rel=1e-12)
    assert dataset.std == pytest.approx(pixels.std(), rel=1e-12)
    assert dataset.std != pytest.approx((load_digits().images / 8 - 1).std(), rel=1e-6)


# --- ids, split, fingerprint -----------------------------------------------------------------------------------------


def test_ids_follow_the_sorted_paths_whatever_order_the_files_were_made_in(tmp_path: Path, crop: Crop) -> None:
    names = ["b/2.png", "a.png", "b/10.PNG", "B.jpg", "c/d/e.jpeg"]
    found = []
    for run, order in enumerate((names, names[::-1])):
        folder = tmp_path / str(run) / "images"
        for name in order:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop(names.index(name))).save(folder / name)
        found.append(load_dataset(photos(folder), tmp_path / f"run{run}"))
    assert found[0].file == ["B.jpg", "a.png", "b/10.PNG", "b/2.png", "c/d/e.jpeg"]
    assert found[1].file == found[0].file and found[1].fingerprint == found[0].fingerprint
    assert np.array_equal(found[0].raw[1], crop(1).transpose(2, 0, 1))


def test_held_out_images_are_drawn_by_seed_and_the_rest_is_trained_on(tmp_path: Path) -> None:
    sets = [load_dataset(digits(holdout=500, seed=seed), tmp_path / str(i)) for i, seed in enumerate((0, 0, 1))]
    training = sets[0].training
    assert training.dtype == np.int64 and len(training) == 1297 and np.array_equal(training, np.unique(training))
    assert np.array_equal(training, sets[1].training) and not np.array_equal(training, sets[2].training)
    assert training.max() >= 1297  # not merely the first ones
    with (tmp_path / "0/data/index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["example_id"]) for row in rows if row["split"] == "training"] == training.tolist()
    assert list(rows[3]) == ["example_id", "file", "sha256", "split", "label"] and rows[3]["label"] == "3"


def test_limit_takes_the_first_images_before_any_is_held_out(tmp_path: Path) -> None:
    dataset = load_dataset(digits(limit=20, holdout=5), tmp_path)
    assert len(dataset) == 20 and len(dataset.training) == 15 and dataset.training.max() < 20
    assert np.array_equal(dataset.raw[:, 0], load_digits().images[:20])


def test_the_fingerprint_depends_on_pixels_levels_names_labels_split_and_conditions_and_on_nothing_else() -> None:
    base = {
        "levels": 16,
        "file": ["a", "b"],
        "sha256": ["0", "1"],
        "label": np.array([0, 1]),
        "training": np.array([0, 1]),
        "condition_sha256": None,
    }
    changes = [
        {"levels": 255},
        {"file": ["a", "c"]},
        {"sha256": ["0", "2"]},
        {"label": np.array([1, 1])},
        {"label": None},
        {"training": np.array([0])},
        {"condition_sha256": "0"},
    ]
    assert dataset_fingerprint(**base) == dataset_fingerprint(**{**base, "file": ["a", "b"]})
    assert len({dataset_fingerprint(**{**base, **change}) for change in [{}, *changes]}) == len(changes) + 1


def test_one_changed_pixel_or_name_changes_the_fingerprint_and_moving_the_folder_does_not(
    tmp_path: Path, photo_folder: Path
) -> None:
    def fingerprint(folder: Path, run: str) -> str:
        return load_dataset(photos(folder), tmp_path / run).fingerprint

    before = fingerprint(photo_folder, "before")
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(photo_folder, moved)
    assert fingerprint(moved, "moved") == before
    (moved / "china/deep/0.png").rename(moved / "china/deep/00.png")
    assert fingerprint(moved, "renamed") != before
    (moved / "china/deep/00.png").rename(moved / "china/deep/0.png")
    nudge_pixel(moved / "china/deep/0.png")
    assert fingerprint(moved, "nudged") != before


def test_exact_copies_are_counted(tmp_path: Path, photo_folder: Path, crop: Crop) -> None:
    assert load_dataset(photos(photo_folder), tmp_path / "run").num_duplicates == 0
    for name in ("copy.png", "copy2.png"):
        Image.fromarray(crop(3)).save(photo_folder / name)
    dataset = load_dataset(photos(photo_folder), tmp_path / "run2")
    assert dataset.num_duplicates == 2
    assert dataset.sha256[dataset.file.index("copy.png")] == dataset.sha256[dataset.file.index("flower/deep/3.png")]


# --- the cache -------------------------------------------------------------------------------------------------------


def nudge_pixel(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)


def same(left: ImageDataset, right: ImageDataset) -> bool:
    return (
        left.fingerprint == right.fingerprint
        and (left.file, left.sha256, left.metadata, left.facts)
        == (right.file, right.sha256, right.metadata, right.facts)
        and np.array_equal(left.raw, right.raw)
        and np.array_equal(left.training, right.training)
    )


def test_a_second_load_reads_the_cache_and_decodes_nothing(
    tmp_path: Path, photo_folder: Path, request: pytest.FixtureRequest
) -> None:
    config = photos(photo_folder, holdout=2, labels="folder")
    first = load_dataset(config, tmp_path / "run")
    request.getfixturevalue("no_decoding")
    assert same(load_dataset(config, tmp_path / "run"), first)
    with pytest.raises(AssertionError, match="decoded"):
        load_dataset(config, tmp_path / "another")


def test_a_cleaned_cache_is_made_again_to_the_byte(tmp_path: Path, photo_folder: Path) -> None:
    config = photos(photo_folder, holdout=1)
    first = load_dataset(config, tmp_path)
    cache = tmp_path / "data/images.safetensors"
    content = cache.read_bytes()
    cache.unlink()
    assert same(load_dataset(config, tmp_path), first)
    assert cache.read_bytes() == content


def test_a_touched_or_moved_folder_with_the_same_pixels_is_the_same_data(
    tmp_path: Path, photo_folder: Path, request: pytest.FixtureRequest
) -> None:
    first = load_dataset(photos(photo_folder), tmp_path / "run")
    os.utime(photo_folder / "china/deep/0.png", ns=(0, 0))
    assert load_dataset(photos(photo_folder), tmp_path / "run").fingerprint == first.fingerprint
    moved = photo_folder.rename(tmp_path / "moved")
    request.getfixturevalue("no_decoding")
    again = load_dataset(photos(moved), tmp_path / "run")
    assert again.fingerprint == first.fingerprint and again.folder == moved


@pytest.mark.parametrize("change", ["pixel", "new", "gone"])
def test_a_changed_folder_is_refused_by_the_changed_files_name_until_overwritten(
    tmp_path: Path, photo_folder: Path, crop: Crop, change: str
) -> None:
    config, run = photos(photo_folder), tmp_path / "run"
    first = load_dataset(config, run)
    path = photo_folder / "flower/deep/3.png"
    if change == "pixel":
        nudge_pixel(path)
    elif change == "gone":
        path.unlink()
    else:
        path = photo_folder / "flower/new.png"
        Image.fromarray(crop(9)).save(path)
    with pytest.raises(UserError, match=r"overwrite=true") as error:
        load_dataset(config, run)
    said = {"pixel": "has changed", "new": "is new", "gone": "is gone"}[change]
    assert error.value.subject == str(path) and error.value.message.startswith(said)
    names = ["images.safetensors", "index.csv", "manifest.json", "progress.jsonl"]
    assert sorted(p.name for p in (run / "data").iterdir()) == names
    second = load_dataset(config, run, overwrite=True)
    assert second.fingerprint != first.fingerprint
    assert same(load_dataset(config, run), second)


def test_another_folder_with_other_images_is_refused_by_the_key(tmp_path: Path, photo_folder: Path) -> None:
    load_dataset(photos(photo_folder), tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(photo_folder, other)
    nudge_pixel(other / "china/deep/0.png")
    with pytest.raises(UserError, match=r"^data\.path: got .*other; .*china/deep/0\.png has changed"):
        load_dataset(photos(other), tmp_path / "run")


def test_verify_finds_a_change_that_kept_size_and_time(tmp_path: Path, photo_folder: Path, crop: Crop) -> None:
    path = photo_folder / "china/deep/0.png"
    Image.fromarray(crop(0)).save(path, compress_level=0)  # as large for any pixels
    first = load_dataset(photos(photo_folder), tmp_path / "run")
    before = path.stat()
    Image.fromarray(crop(8)).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert load_dataset(photos(photo_folder), tmp_path / "run").fingerprint == first.fingerprint
    with pytest.raises(UserError, match="has changed"):
        load_dataset(photos(photo_folder, verify=True), tmp_path / "run")


@pytest.mark.parametrize(("key", "value"), [("holdout", 3), ("limit", 100), ("holdout", 0)])
def test_another_configuration_is_refused_by_the_differing_key_until_overwritten(
    tmp_path: Path, key: str, value: int
) -> None:
    load_dataset(digits(holdout=2), tmp_path)
    changed = digits(**{"holdout": 2, key: value})
    with pytest.raises(UserError, match=rf"^data\.{key}: got {value}; .*overwrite=true"):
        load_dataset(changed, tmp_path)
    assert load_dataset(changed, tmp_path, overwrite=True).fingerprint == load_dataset(changed, tmp_path).fingerprint


def test_the_seed_counts_only_where_something_is_held_out(tmp_path: Path) -> None:
    load_dataset(digits(), tmp_path / "all")
    load_dataset(digits(seed=1), tmp_path / "all")
    load_dataset(digits(holdout=1), tmp_path / "some")
    with pytest.raises(UserError, match=r"^data\.seed: got 1"):
        load_dataset(digits(holdout=1, seed=1), tmp_path / "some")


@pytest.mark.parametrize("name", ["images.safetensors", "index.csv"])
def test_a_damaged_file_of_the_run_is_named_and_overwrite_mends_it(tmp_path: Path, name: str) -> None:
    first = load_dataset(digits(), tmp_path)
    path = tmp_path / "data" / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-7])
    with pytest.raises(UserError, match="SHA-256 differs") as error:
        load_dataset(digits(), tmp_path)
    assert error.value.subject == str(path)
    assert same(load_dataset(digits(), tmp_path, overwrite=True), first)


def test_an_interrupted_decoding_goes_on_where_it_stopped(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "BLOCK_BYTES", 2 * 3 * 16 * 16)  # two images a block
    monkeypatch.setattr(pictures, "NUM_THREADS", 1)
    original, decoded, stop_at = pictures.decode, [], "1.png"

    def decode_or_stop(path: Path, name: str, reading: Reading) -> np.ndarray:
        if path.name == stop_at:
            raise KeyboardInterrupt
        decoded.append(path.name)
        return original(path, name, reading)

    monkeypatch.setattr(pictures, "decode", decode_or_stop)
    with pytest.raises(KeyboardInterrupt):
        load_dataset(photos(photo_folder), tmp_path / "run")
    assert decoded == ["0.png", "2.png", "4.png"]
    stop_at = ""
    decoded.clear()
    resumed = load_dataset(photos(photo_folder), tmp_path / "run")
    assert decoded == ["4.png", "1.png", "3.png", "5.png"]
    monkeypatch.setattr(pictures, "decode", original)
    assert same(resumed, load_dataset(photos(photo_folder), tmp_path / "whole"))


def test_loads_at_the_same_time_decode_once(
    tmp_path: Path, photo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, decoded = pictures.decode, []

    def decode_and_count(path: Path, name: str, reading: Reading) -> np.ndarray:
        decoded.append(path.name)
        return original(path, name, reading)

    monkeypatch.setattr(pictures, "decode", decode_and_count)
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: load_dataset(photos(photo_folder), tmp_path / "run"), range(4)))
    assert len(decoded) == 6
    assert all(same(other, sets[0]) for other in sets[1:])


# --- errors ----------------------------------------------------------------------------------------------------------


def test_holding_out_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"^data\.holdout: got 1797; the data set has 1797 images; expected at most 1796"
    ):
        load_dataset(digits(holdout=1797), tmp_path)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/data: cannot be written"):
        load_dataset(digits(), tmp_path / "file")
