"""The training images of a run: decoded once into a memory-mapped cache, indexed, split and fingerprinted.

``<run>/data/`` holds ``index.csv`` (example_id, file, sha256, split, metadata columns), ``images.safetensors`` (uint8
[N, C, H, W]) and ``manifest.json``. A later load maps the cache where the source still is what the manifest says. Where
it may have changed, or the cache was cleaned, the images are decoded again and each is held against the index.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import BlockFile, Stage, fingerprint, map_tensor
from mucs_cli.config import DataConfig, DigitsConfig, ImageFolderConfig, result_config
from mucs_cli.data.record import MismatchError, Record, write_index
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError
from mucs_cli.rng import generator
from mucs_cli.runtime import Progress, log

CACHE = "images.safetensors"
BLOCK_BYTES = 16 * 2**20
"""Raw pixels decoded, or read back for statistics, at once."""


def open_source(config: DataConfig) -> Source:
    """The source that ``config.name`` stands for. A new data set is one file with a ``Source``, and one entry here."""
    if isinstance(config, DigitsConfig):
        from mucs_cli.data.digits import DigitsSource

        return DigitsSource(config)
    if isinstance(config, ImageFolderConfig):
        from mucs_cli.data.image_folder import ImageFolderSource

        return ImageFolderSource(config)
    raise ValueError(f"no data set is called {config.name!r}")


# --- in memory -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class ImageDataset:
    """Images with stable ids; ``example_id`` is the position along the first axis of ``raw``.

    Attributes:
        raw: uint8 [N, C, H, W], memory-mapped, read-only; pixel = 2 * raw / levels - 1.
        levels: largest raw value (255 for 8-bit files, 16 for the digits).
        file: N relative POSIX paths, or names such as "digits[17]".
        sha256: N hashes of the raw pixels with their shape; equal for exact copies.
        label: int64 [N]; None without labels.
        num_classes: 0 without labels.
        class_names: the name of each label value.
        metadata: further columns of N strings, shown in scores and report.
        training: int64, sorted example_ids that are trained on and scored: all but the held-out ones.
        facts: name, source, licence, citation.
        fingerprint: SHA-256 of pixels, levels, ids, files, labels and split; not of where the folder lies.
        folder: where the original files are; None where there are none.
    """

    raw: np.ndarray
    levels: int
    file: list[str]
    sha256: list[str]
    label: np.ndarray | None
    num_classes: int
    class_names: list[str]
    metadata: dict[str, list[str]]
    training: np.ndarray
    facts: dict[str, str]
    fingerprint: str
    folder: Path | None

    def __len__(self) -> int:
        return len(self.raw)

    def images(self, example_ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """float32 [B, C, H, W] in [-1, 1], exactly -1 for raw 0 and 1 for raw ``levels``."""
        return to_pixels(np.asarray(self.raw[np.asarray(example_ids)]), self.levels)

    def labels(self, example_ids: Sequence[int] | np.ndarray | Tensor) -> Tensor | None:
        """int64 [B]; None without labels."""
        return None if self.label is None else torch.from_numpy(self.label[np.asarray(example_ids)])

    @property
    def channels(self) -> int:
        return int(self.raw.shape[1])

    @property
    def height(self) -> int:
        return int(self.raw.shape[2])

    @property
    def width(self) -> int:
        return int(self.raw.shape[3])

    @property
    def num_duplicates(self) -> int:
        """How many images are exact copies of an earlier one."""
        return len(self.sha256) - len(set(self.sha256))

    @cached_property
    def _raw_counts(self) -> np.ndarray:
        """int64 [levels + 1]: how often each raw value occurs in the training images."""
        counts = np.zeros(self.levels + 1, dtype=np.int64)
        size = block_size(self.raw.shape[1:])
        for start in range(0, len(self.training), size):
            block = self.raw[self.training[start : start + size]]
            counts += np.bincount(block.ravel(), minlength=self.levels + 1)
        return counts

    @property
    def mean_square(self) -> float:
        """m2 of the null loss: mean of pixel^2 over the training images, pixels in [-1, 1], in float64."""
        pixel = 2 * np.arange(self.levels + 1) / self.levels - 1
        return float(np.average(pixel**2, weights=self._raw_counts))

    @property
    def std(self) -> float:
        """Standard deviation over all pixels of the training images, in [-1, 1], in float64."""
        pixel = 2 * np.arange(self.levels + 1) / self.levels - 1
        mean = np.average(pixel, weights=self._raw_counts)
        return float(np.sqrt(np.average((pixel - mean) ** 2, weights=self._raw_counts)))


def to_pixels(raw: np.ndarray, levels: int) -> Tensor:
    """float32 pixels, 2 * raw / levels - 1, of uint8 raw values of any shape."""
    # Multiplied before divided: 2 * levels / levels is exactly 2, a reciprocal need not be.
    return torch.from_numpy(raw).float().mul_(2).div_(levels).sub_(1)


def block_size(shape: Sequence[int]) -> int:
    """How many uint8 images of ``shape`` are handled at once."""
    return max(1, BLOCK_BYTES // int(np.prod(shape)))


def draw_training(num_images: int, holdout: int, seed: int) -> np.ndarray:
    """Sorted ids of the training images: all but ``holdout`` ones drawn from stream "holdout".

    Raises:
        UserError: no image is left to train on.
    """
    if holdout >= num_images:
        raise UserError(
            "data.holdout",
            f"got {holdout}; the data set has {num_images} images; expected at most {num_images - 1}. "
            "Hold out fewer, or use more images.",
        )
    order = torch.randperm(num_images, generator=generator(seed, "holdout")).numpy()
    return np.sort(order[holdout:])


def dataset_fingerprint(
    levels: int, file: Sequence[str], sha256: Sequence[str], label: np.ndarray | None, training: np.ndarray
) -> str:
    """SHA-256 of what a data set is: raw values and their scale, ids, names, labels and split."""
    return fingerprint(
        "image dataset", levels, list(file), list(sha256), "no labels" if label is None else label, training
    )


# --- on disk ---------------------------------------------------------------------------------------------------------


def load_dataset(config: DataConfig, run: Path, overwrite: bool = False) -> ImageDataset:
    """The data set of a run: mapped from its cache where that still holds, decoded otherwise.

    Args:
        config: the ``data`` section.
        run: the run's folder; ``data/`` below it is read, and written where need be.
        overwrite: where the configuration or the images differ from the run's, take them as they are now.
    Raises:
        UserError: the data cannot be used; or, without ``overwrite``, they differ from the run's.
    """
    source = open_source(config)
    stage = Stage(run / "data", "data", {"config": {"data": identity(config)}}, overwrite)
    with locked(stage.folder):
        dataset = None
        if stage.is_done():
            try:
                dataset = load_known(config, source, stage)
            except MismatchError:
                if not overwrite:
                    raise
                shutil.rmtree(stage.folder)
        if dataset is None:
            # No state.json: an attempt that failed here has computed nothing that another configuration would lose.
            training = draw_training(len(source.files), config.holdout, config.seed)
            dataset = decode_all(source, stage, training, None)
    if dataset.num_duplicates:
        log.info("data: %d of %d images are exact copies of an earlier one", dataset.num_duplicates, len(dataset))
    return dataset


def identity(config: DataConfig) -> dict[str, Any]:
    """The keys that decide the data set. Not the folder's path: what is in it counts, and is compared by itself."""
    values = result_config(config)
    values.pop("path", None)
    if config.holdout == 0:
        values.pop("seed")
    return values


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds off other processes (the jobs of a parallel sweep) that would fill the same folder.

    Raises:
        UserError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror}). Choose another run=.") from error
    try:
        with suppress(OSError):  # some network file systems have no locks; a single process needs none
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def load_known(config: DataConfig, source: Source, stage: Stage) -> ImageDataset:
    """The data set of the run's manifest; decoded again where the cache is gone or the source looks changed.

    Raises:
        MismatchError: the images differ from the run's, or a file of the run is damaged.
    """
    record = Record.read(stage.folder)
    record.check_files(source)
    looks_changed = record.manifest["source"]["state"] != source.state
    is_cached = (stage.folder / CACHE).exists()
    if is_cached and not looks_changed and not (isinstance(config, ImageFolderConfig) and config.verify):
        record.check_cache()
        return assemble(source, stage.folder, record.sha256, record.training)
    if looks_changed:
        log.info("data: sizes or times of the files are not those recorded; checking the pixels")
    elif not is_cached:
        log.info("data: the decoded images were cleaned; decoding them again")
    return decode_all(source, stage, record.training, record)


def decode_all(source: Source, stage: Stage, training: np.ndarray, record: Record | None) -> ImageDataset:
    """Decodes every image into the cache, a block at a time, and writes index and manifest.

    Args:
        training: int64, sorted example_ids that are not held out.
        record: what the run already holds, which the images must equal; None for a new run.
    Raises:
        MismatchError: an image differs from the record; the run's files are as before then.
        UserError: an image cannot be read, or the disk is full.
    """
    num_images, shape = len(source.files), source.shape()
    cache = BlockFile(
        stage.folder / CACHE,
        {"image": ("uint8", (num_images, *shape))},
        fingerprint(stage.identity, source.state, shape),
    )
    raw = cache.arrays["image"]
    sha256: list[str] = []
    with Progress("decode images", num_images, "images") as progress:
        for block, start in enumerate(range(0, num_images, block_size(shape))):
            stop = min(start + block_size(shape), num_images)
            if block not in cache.done:
                for example_id, image in enumerate(source.read(start, stop), start):
                    raw[example_id] = image
                    progress.advance()
                cache.commit(block)
            sha256 += [fingerprint(image) for image in raw[start:stop]]
    if record is not None:
        try:
            record.check_images(source, sha256)
            record.check_fingerprint(dataset_fingerprint(source.levels, source.files, sha256, source.label, training))
        except MismatchError:
            cache.partial.unlink()
            cache.journal.unlink()
            raise
    cache.finish()
    write_index(stage.folder / "index.csv", source, sha256, training)
    dataset = assemble(source, stage.folder, sha256, training)
    stage.finish(
        {
            "source": {"folder": source.folder and str(source.folder), "state": source.state},
            "fingerprint": dataset.fingerprint,
            "facts": source.facts,
            "shape": list(shape),
            "levels": source.levels,
            "num_images": num_images,
            "num_training": len(training),
            "num_classes": dataset.num_classes,
            "num_duplicates": dataset.num_duplicates,
        },
        [stage.folder / "index.csv", stage.folder / CACHE],
    )
    return dataset


def assemble(source: Source, folder: Path, sha256: list[str], training: np.ndarray) -> ImageDataset:
    """The data set of a source whose decoded images are in ``folder``."""
    return ImageDataset(
        raw=map_tensor(folder / CACHE, "image"),
        levels=source.levels,
        file=source.files,
        sha256=sha256,
        label=source.label,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        metadata=source.metadata,
        training=training,
        facts=source.facts,
        fingerprint=dataset_fingerprint(source.levels, source.files, sha256, source.label, training),
        folder=source.folder,
    )
