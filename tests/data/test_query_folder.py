"""Queries from a folder are read as the training images are."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.query_folder import FolderQueries, load_query_folder
from mucs_cli.errors import UserError
from mucs_cli.schemas import DigitsConfig, ImageFolderConfig

Crop = Callable[..., np.ndarray]


@pytest.fixture
def config(photo_folder: Path) -> ImageFolderConfig:
    return ImageFolderConfig(seed=0, path=str(photo_folder), image_size=8, labels="folder", background="black")


@pytest.fixture
def dataset(config: ImageFolderConfig, tmp_path: Path) -> ImageDataset:
    return load_dataset(config, tmp_path / "run")


@pytest.fixture
def queries(tmp_path: Path, crop: Crop) -> Path:
    """Three pictures: a copy of training image 3 (of its original size), a transparent one, a wide gray one."""
    folder = tmp_path / "queries"
    folder.mkdir()
    Image.fromarray(crop(3)).save(folder / "copy.png")
    alpha = np.concatenate([crop(4), np.zeros((16, 16, 1), np.uint8)], axis=2)
    Image.fromarray(alpha).save(folder / "clear.png")
    Image.fromarray(crop(5, 16, 40)).convert("L").save(folder / "wide.tiff")
    return folder


def test_a_copy_of_a_training_image_is_the_same_to_the_bit_and_by_its_hash(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "mucs"):
        found = load_query_folder(str(queries), dataset, config)
    assert found.file == ["clear.png", "copy.png", "wide.tiff"] and len(found) == 3
    assert found.image.dtype == torch.float32 and found.image.shape == (3, 3, 8, 8)
    position = dataset.file.index("flower/deep/3.png")
    assert torch.equal(found.image[1], dataset.images([position])[0])
    assert [sha in dataset.sha256 for sha in found.sha256] == [False, True, False]
    assert found.sha256[1] == dataset.sha256[position]
    assert (found.image[0] == -1).all()  # the training data's background
    assert torch.equal(found.image[2, 0], found.image[2, 1]) and found.condition is None
    assert "3 of 3 pictures are of another size than the training images (8x8)" in caplog.text


def test_queries_for_grayscale_images_become_grayscale(queries: Path, tmp_path: Path) -> None:
    digits = DigitsConfig(seed=0)
    found = load_query_folder(str(queries), load_dataset(digits, tmp_path / "digits"), digits)
    assert found.image.shape == (3, 1, 8, 8) and found.image.min() >= -1 and found.image.max() <= 1
    assert (found.image[0] == 1).all()  # white, the default


def labelled(folder: Path, dataset: ImageDataset, config: ImageFolderConfig, text: str) -> FolderQueries:
    (folder / "metadata.csv").write_text(text)
    return load_query_folder(str(folder), dataset, config)


def test_classes_come_from_the_metadata_by_name_or_number_in_the_training_datas_own_numbering(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig
) -> None:
    found = labelled(
        queries, dataset, config, "file_name,label,prompt\nwide.tiff,china,p\ncopy.png,1,q\nclear.png,flower,\n"
    )
    assert found.condition.dtype == torch.int64 and found.condition.tolist() == [1, 1, 0]
    assert found.metadata["prompt"] == ["", "q", "p"]


def test_classes_may_be_in_the_column_that_the_training_datas_are_in(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig
) -> None:
    config = replace(config, label_column="style")
    text = "file_name,style\nwide.tiff,china\ncopy.png,flower\nclear.png,china\n"
    assert labelled(queries, dataset, config, text).condition.tolist() == [0, 1, 0]


def test_classes_come_from_the_folder_else(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig, crop: Crop
) -> None:
    for name in ("clear.png", "copy.png", "wide.tiff"):
        (queries / "flower").mkdir(exist_ok=True)
        (queries / name).rename(queries / "flower" / name)
    assert load_query_folder(str(queries), dataset, config).condition.tolist() == [1, 1, 1]
    (queries / "chin").mkdir()
    Image.fromarray(crop(0)).save(queries / "chin" / "a.png")
    with pytest.raises(
        UserError, match=r"chin/a\.png: got class 'chin'; expected one of the training data's 2 \(china, "
    ):
        load_query_folder(str(queries), dataset, config)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file_name,label\nwide.tiff,roof\ncopy.png,china\nclear.png,china\n", "got class 'roof'"),
        ("file_name,label\nwide.tiff,2\ncopy.png,china\nclear.png,china\n", "got class '2'"),
        ("file_name,label\ncopy.png,china\n", r"clear\.png: got no class, though other queries have one"),
        ("file_name,label\n../run/x.png,china\n", "leads out of"),
    ],
)
def test_classes_that_do_not_fit_are_refused(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig, text: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        labelled(queries, dataset, config, text)


def test_vectors_are_matched_and_must_be_as_long_as_the_training_datas(
    queries: Path, photo_folder: Path, tmp_path: Path
) -> None:
    save_file({"condition": np.ones((6, 4), np.float32)}, photo_folder / "c.safetensors")
    config = ImageFolderConfig(seed=0, path=str(photo_folder), image_size=8, condition_file="c.safetensors")
    dataset = load_dataset(config, tmp_path / "vectors")
    assert load_query_folder(str(queries), dataset, config).condition is None
    given = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    save_file({"condition": given}, queries / "q.safetensors")
    found = load_query_folder(str(queries), dataset, config, "q.safetensors").condition
    assert np.array_equal(found, given[:, 0])
    save_file({"condition": given[:, :, :3].copy()}, queries / "q.safetensors")
    with pytest.raises(UserError, match="got vectors of length 3; expected 4"):
        load_query_folder(str(queries), dataset, config, "q.safetensors")


def test_a_missing_or_empty_folder_and_an_unreadable_picture_are_refused(
    queries: Path, dataset: ImageDataset, config: ImageFolderConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"^queries\.path: got .*nowhere: no such folder"):
        load_query_folder(str(tmp_path / "nowhere"), dataset, config)
    (queries / "copy.png").write_text("hello")
    with pytest.raises(UserError, match=r"copy\.png: cannot be read"):
        load_query_folder(str(queries), dataset, config)
