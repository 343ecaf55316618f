"""Queries from a folder of pictures, read exactly as the training images are."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.conditions import INDEX_COLUMN, ConditionFile, find_file
from mucs_cli.data.decode import Reading, decode, read_header
from mucs_cli.data.image_folder import first_folder, list_images
from mucs_cli.data.images import ImageDataset, to_pixels
from mucs_cli.data.labels import label_of
from mucs_cli.data.metadata import read_metadata
from mucs_cli.data.pictures import NUM_THREADS
from mucs_cli.errors import UserError
from mucs_cli.files import user_path
from mucs_cli.runtime import log
from mucs_cli.schemas import DataConfig, PictureConfig

LEVELS = 255
LABEL_COLUMN = "label"


@dataclass(frozen=True, eq=False)
class FolderQueries:
    """Q pictures in the order of their relative POSIX paths.

    Attributes:
        image: float32 [Q, C, H, W] in [-1, 1], of the training images' size and channels.
        file: Q relative POSIX paths.
        sha256: Q hashes of the 8-bit pixels as read; equal to a training image's for an exact copy of it.
        metadata: columns of Q strings, from the folder's metadata file.
        condition: class labels of the training data, int64 [Q]; or vectors, float32 [Q, d]; or None.
    """

    image: Tensor
    file: list[str]
    sha256: list[str]
    metadata: dict[str, list[str]]
    condition: Tensor | None

    def __len__(self) -> int:
        return len(self.file)


def load_query_folder(
    path: str, dataset: ImageDataset, config: DataConfig, condition_file: str | None = None, key: str = "queries.path"
) -> FolderQueries:
    """Reads every picture below a folder as a query.

    A picture of another size than the training images is cropped to its centre square and scaled, as they are with
    ``data.image_size``. Where the training data have classes, a query's is the column ``data.label_column``, or
    ``label``, of the folder's metadata file, or else the first folder that it lies in; a class is named, or given by
    its number.

    Args:
        path: the folder.
        dataset: the training images.
        config: their configuration; background and largest size are taken from it.
        condition_file: where the training data have vectors: the queries' (the first of each), matched to pictures as
            ``data.condition_file`` is; None: the queries have no condition.
        key: the configuration key that errors about the folder name.
    Raises:
        UserError: the folder holds no picture, one cannot be read, its metadata cannot be used, it has no class though
            others have, its class is none of the training data's, or vectors do not fit.
    """
    settings = config if isinstance(config, PictureConfig) else PictureConfig()
    reading = replace(Reading.of(settings), channels=dataset.channels, image_size=dataset.height)
    folder = Path(os.path.abspath(user_path(path)))
    listing = list_images(folder, key)
    files = [file for file, _, _ in listing.images]
    metadata = read_metadata(folder, files, listing.linked)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        headers = list(pool.map(lambda file: read_header(folder / file, str(folder / file), reading), files))
        raw = list(pool.map(lambda file: decode(folder / file, str(folder / file), reading), files))
    others = sum((width, height) != (dataset.width, dataset.height) for width, height, _ in headers)
    if others:
        log.info(
            "queries: %d of %d pictures are of another size than the training images (%dx%d); cropped and scaled",
            others,
            len(files),
            dataset.width,
            dataset.height,
        )
    return FolderQueries(
        to_pixels(np.stack(raw), LEVELS),
        files,
        [fingerprint(image) for image in raw],
        metadata,
        query_conditions(folder, files, metadata, dataset, config, condition_file),
    )


def query_conditions(
    folder: Path,
    files: list[str],
    metadata: dict[str, list[str]],
    dataset: ImageDataset,
    config: DataConfig,
    condition_file: str | None,
) -> Tensor | None:
    """The ``condition`` of ``FolderQueries``."""
    if dataset.condition is not None:
        if condition_file is None:
            return None
        path = find_file(condition_file, folder, "queries.condition_file")
        vectors = ConditionFile(path, files, metadata.get(INDEX_COLUMN))
        if vectors.shape[1] != dataset.condition_dim:
            raise UserError(
                str(vectors.path),
                f"got vectors of length {vectors.shape[1]}; expected {dataset.condition_dim}, as the training data "
                "have. Make them with the same encoder.",
            )
        return torch.from_numpy(vectors.read(range(len(files)))[:, 0].copy())
    if dataset.label is None:
        return None
    own_column = getattr(config, "label_column", None) or LABEL_COLUMN
    column = own_column if own_column in metadata else LABEL_COLUMN
    texts = metadata.get(column, [""] * len(files))
    if not any(texts):
        texts = [first_folder(file) for file in files]
        if not set(texts) & set(dataset.class_names):
            return None
    for file, text in zip(files, texts, strict=True):
        if not text:
            raise UserError(
                str(folder / file),
                f"got no class, though other queries have one. Give it a {column}, or remove it.",
            )
    return torch.tensor(
        [label_of(text, dataset.class_names, str(folder / file)) for file, text in zip(files, texts, strict=True)]
    )
