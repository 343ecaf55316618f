"""The training images of a run on disk: decoded once into a memory-mapped cache, indexed, split and fingerprinted.

``<run>/data/`` holds ``index.csv`` (example_id, file, sha256, split, metadata columns), ``images.safetensors`` (uint8
[N, C, H, W]), ``conditions.safetensors`` (float32 [N, k, d], where the data has vectors) and ``manifest.json``, which
lists what was skipped. A later load maps these files where the source's state is what the manifest says, and opens
nothing else. Where the source may have changed, or the cache was cleaned, the images are decoded again and each is held
against the index.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mucs_cli import tracking
from mucs_cli.artifacts import empty, fingerprint, sha256_file
from mucs_cli.block_file import BlockFile, map_tensor
from mucs_cli.config import result_config
from mucs_cli.data.images import ImageDataset, block_size
from mucs_cli.data.record import CACHE, CONDITIONS, INDEX, MismatchError, Record, write_index
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError
from mucs_cli.locks import locked
from mucs_cli.rng import generator
from mucs_cli.runtime import Progress, log
from mucs_cli.schemas import DataConfig, DigitsConfig, HuggingFaceConfig, ImageFolderConfig, PictureConfig
from mucs_cli.stage_folder import Stage

__all__ = ["ImageDataset", "dataset_fingerprint", "draw_training", "load_dataset", "open_source"]

CONDITIONS_AT_ONCE = 1024
"""Images whose vectors are read, or computed, at once."""
NAMED_AT_MOST = 5
"""Skipped files that the log names; the manifest has them all."""


def open_source(config: DataConfig) -> Source:
    """The source that ``config.name`` stands for. A new data set is one file with a ``Source``, and one entry here."""
    if isinstance(config, DigitsConfig):
        from mucs_cli.data.digits import DigitsSource

        return DigitsSource(config)
    if isinstance(config, ImageFolderConfig):
        from mucs_cli.data.image_folder import ImageFolderSource

        return ImageFolderSource(config)
    if isinstance(config, HuggingFaceConfig):
        from mucs_cli.data.huggingface import HuggingFaceSource

        return HuggingFaceSource(config)
    raise ValueError(f"no data set is called {config.name!r}")


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
    levels: int,
    file: Sequence[str],
    sha256: Sequence[str],
    label: np.ndarray | None,
    training: np.ndarray,
    condition_sha256: str | None = None,
) -> str:
    """SHA-256 of what a data set is: raw values and their scale, ids, names, labels, split, and conditions if any."""
    parts = ["image dataset", levels, list(file), list(sha256), "no labels" if label is None else label, training]
    return fingerprint(*parts, *([] if condition_sha256 is None else [condition_sha256]))


# --- loading ---------------------------------------------------------------------------------------------------------


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
    mended = (CACHE, INDEX, CONDITIONS)  # by decoding again, or with a word of their own
    stage = Stage(run / "data", "data", {"config": {"data": identity(config)}}, overwrite, cleanable=mended)
    with locked(stage.folder), tracking.in_folder(stage.folder):
        record, is_new = None, False
        if stage.is_done():
            try:
                record = load_known(config, source, stage)
            except MismatchError:
                if not overwrite:
                    raise
                empty(stage.folder)
        if record is None:
            # No state.json: an attempt that failed here has computed nothing that another configuration would lose.
            decode_all(config, source, stage, None)
            record = Record.read(stage.folder)
            is_new = True
        dataset = assemble(source, record)
    if is_new and dataset.num_duplicates:
        log.info("data: %d of %d images are exact copies of an earlier one", dataset.num_duplicates, len(dataset))
    if is_new and record.skipped:
        names = ", ".join(record.skipped[:NAMED_AT_MOST]) + (", ..." if len(record.skipped) > NAMED_AT_MOST else "")
        path = stage.folder / "manifest.json"
        log.info("data: skipped %d pictures that cannot be read: %s (all in %s)", len(record.skipped), names, path)
    return dataset


def identity(config: DataConfig) -> dict[str, Any]:
    """The keys that decide the data set. Not where it lies: what is in it counts, and is compared by itself."""
    values = result_config(config)
    for key in ("path", "condition_file", "text_encoder"):
        values.pop(key, None)
    if config.holdout == 0:
        values.pop("seed")
    return values


def load_known(config: DataConfig, source: Source, stage: Stage) -> Record:
    """The record of a finished run, its cache in place: decoded again where it was cleaned or the source looks changed.

    Raises:
        MismatchError: the images differ from the run's, or a file of the run is damaged.
    """
    record = Record.read(stage.folder)
    looks_changed = record.manifest["source"]["state"] != source.state
    is_cached = (stage.folder / CACHE).exists()
    if is_cached and not looks_changed and not (isinstance(config, PictureConfig) and config.verify):
        record.check_caches()
        return record
    if looks_changed:
        log.info("data: the files are not as old or as large as recorded; checking the pixels")
    elif not is_cached:
        log.info("data: the decoded images were cleaned; decoding them again")
    decode_all(config, source, stage, record)
    return Record.read(stage.folder)


def assemble(source: Source, record: Record) -> ImageDataset:
    """The data set of a record whose cache is in place; the folder is the source's, which may have been moved."""
    return ImageDataset(
        raw=map_tensor(record.folder / CACHE, "image"),
        levels=record.manifest["levels"],
        file=record.file,
        sha256=record.sha256,
        label=record.label,
        num_classes=len(record.class_names),
        class_names=record.class_names,
        metadata=record.metadata,
        training=record.training,
        facts={**record.manifest["facts"], "name": source.facts["name"], "source": source.facts["source"]},
        fingerprint=record.manifest["fingerprint"],
        folder=source.folder,
        condition=map_tensor(record.folder / CONDITIONS, "condition") if record.has_conditions else None,
    )


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_all(config: DataConfig, source: Source, stage: Stage, record: Record | None) -> None:
    """Decodes every image into the cache, a block at a time, and writes conditions, index and manifest.

    Args:
        record: what the run already holds, which the data must equal; None for a new run.
    Raises:
        MismatchError: the data differ from the record; the run's files are as before then.
        UserError: an image cannot be read, or the disk is full.
    """
    scratch = stage.folder / "scratch"
    try:
        source.open(scratch)
        if record is not None:
            record.check_listing(source)
        else:
            draw_training(len(source.files), config.holdout, config.seed)  # before anything long
        shape = source.shape()
        cache, sha256, unreadable = decode_blocks(source, stage, shape)
        kept = [index for index in range(len(sha256)) if index not in unreadable]
        if unreadable:
            source.drop(unreadable)
            sha256 = [sha256[index] for index in kept]
        training = record.training if record is not None else draw_training(len(sha256), config.holdout, config.seed)
        conditions = condition_blocks(source, stage, record)
        condition_sha256 = None if conditions is None else sha256_file(conditions.partial)
        found = dataset_fingerprint(source.levels, source.files, sha256, source.label, training, condition_sha256)
        if record is not None:
            try:
                record.check_images(source, sha256)
                record.check_fingerprint(found)
            except MismatchError:
                for file in (cache, conditions):
                    if file is not None:
                        file.discard()
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    cache.finish(keep_journal=True)
    if unreadable:
        close_gaps(stage.folder / CACHE, kept, shape)
    if conditions is not None:
        conditions.finish(keep_journal=True)
    write_index(stage.folder / INDEX, source, sha256, training)
    facts = {
        "source": {
            "folder": source.folder and str(source.folder),
            "state": source.state,
            "condition_state": source.condition_state,
        },
        "fingerprint": found,
        "facts": source.facts,
        "shape": list(shape),
        "levels": source.levels,
        "num_images": len(sha256),
        "num_training": len(training),
        "num_classes": len(source.class_names),
        "class_names": source.class_names,
        "label_column": source.label_column,
        "condition_shape": source.condition_shape and list(source.condition_shape),
        "num_duplicates": len(sha256) - len(set(sha256)),
        "num_skipped": len(source.skipped),
        "skipped": [{"file": file, "reason": reason} for file, reason in sorted(source.skipped.items())],
    }
    names = [INDEX, CACHE] + ([CONDITIONS] if conditions is not None else [])
    stage.finish(facts, [stage.folder / name for name in names])


def decode_blocks(
    source: Source, stage: Stage, shape: tuple[int, int, int]
) -> tuple[BlockFile, list[str], dict[int, str]]:
    """The filled cache, not yet in place; a hash for each image; and position -> reason of the unreadable ones.

    An unreadable image leaves a row of zeros, marked in the tensor ``readable``, so that an interrupted decoding that
    goes on does not take it for a black one.
    """
    num_images = len(source.files)
    cache = BlockFile(
        stage.folder / CACHE,
        {"readable": ("uint8", (num_images,)), "image": ("uint8", (num_images, *shape))},
        fingerprint(stage.identity, source.state, shape),
    )
    raw, readable = cache.arrays["image"], cache.arrays["readable"]
    sha256: list[str] = []
    unreadable: dict[int, str] = {}
    with Progress("decode images", num_images, "images") as progress:
        for block, start in enumerate(range(0, num_images, block_size(shape))):
            stop = min(start + block_size(shape), num_images)
            decoded = raw[start:stop], readable[start:stop]
            if not cache.holds(block, *decoded):
                for index, image in enumerate(source.read(start, stop), start):
                    if isinstance(image, UserError):
                        unreadable[index], readable[index] = image.message, 0
                    else:
                        raw[index], readable[index] = image, 1
                    progress.advance()
                cache.commit(block, *decoded)
            for offset in np.flatnonzero(readable[start:stop] == 0):
                unreadable.setdefault(start + int(offset), "cannot be read")  # found before an interruption
            sha256 += [fingerprint(image) for image in raw[start:stop]]
    return cache, sha256, unreadable


def close_gaps(path: Path, kept: list[int], shape: tuple[int, int, int]) -> None:
    """Writes a cache again with the kept rows only."""
    old = map_tensor(path, "image")
    new = BlockFile(
        path, {"readable": ("uint8", (len(kept),)), "image": ("uint8", (len(kept), *shape))}, fingerprint("gaps", kept)
    )
    size = block_size(shape)
    new.arrays["readable"][:] = 1
    for block, start in enumerate(range(0, len(kept), size)):
        new.arrays["image"][start : start + size] = old[kept[start : start + size]]
        new.commit(block, new.arrays["image"][start : start + size])
    new.finish()


def condition_blocks(source: Source, stage: Stage, record: Record | None) -> BlockFile | None:
    """The filled file of condition vectors, not yet in place; None for data without vectors.

    Vectors that the run already holds are copied where nothing they come from has changed: computing them may be long.
    """
    if source.condition_shape is None:
        return None
    num_images = len(source.files)
    path = stage.folder / CONDITIONS
    file = BlockFile(
        path,
        {"condition": ("float32", (num_images, *source.condition_shape))},
        fingerprint(stage.identity, source.condition_state, source.files),
    )
    known = map_tensor(path, "condition") if record is not None and record.holds_conditions(source) else None
    with Progress("read conditions", num_images, "images") as progress:
        for block, start in enumerate(range(0, num_images, CONDITIONS_AT_ONCE)):
            stop = min(start + CONDITIONS_AT_ONCE, num_images)
            place = file.arrays["condition"][start:stop]
            if not file.holds(block, place):
                vectors = source.read_conditions(start, stop) if known is None else known[start:stop]
                place[...] = vectors
                file.commit(block, place)
            progress.advance(stop - start)
    return file
