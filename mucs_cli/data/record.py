"""What a run's ``data/`` folder says about its images: ``index.csv`` and ``manifest.json``."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mucs_cli.artifacts import is_intact, write_text
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError
from mucs_cli.records import read_manifest
from mucs_cli.text import csv_cells, csv_text

INDEX = "index.csv"
CACHE = "images.safetensors"
CONDITIONS = "conditions.safetensors"
COLUMNS = ("example_id", "file", "sha256", "split")
ADVICE = "Use another run=, or overwrite=true to take the data as they are now."


class MismatchError(UserError):
    """The images, or the run's own files, are not what the run's manifest says; ``overwrite`` starts afresh."""


def write_index(path: Path, source: Source, sha256: list[str], training: np.ndarray) -> None:
    """Writes a row an image: example_id, file, sha256, split, then the metadata columns."""
    is_training = np.zeros(len(source.files), dtype=bool)
    is_training[training] = True
    rows: list[list[Any]] = [[*COLUMNS, *source.metadata]]
    for example_id, file in enumerate(source.files):
        part = "training" if is_training[example_id] else "holdout"
        columns = [column[example_id] for column in source.metadata.values()]
        rows.append([example_id, file, sha256[example_id], part, *columns])
    write_text(path, csv_text(rows))


def read_index(path: Path) -> dict[str, list[str]]:
    """The columns of ``index.csv``, ``COLUMNS`` first; cell i is of example_id i.

    Raises:
        UserError: it is no such file.
    """
    try:
        header, *rows = csv_cells(path.read_bytes().decode())
    except (OSError, csv.Error, ValueError) as error:
        raise UserError(str(path), f"cannot be read ({error}). {ADVICE}") from error
    if header[: len(COLUMNS)] != list(COLUMNS) or any(len(row) != len(header) for row in rows):
        raise UserError(str(path), f"got other columns than {', '.join(COLUMNS)} and metadata. {ADVICE}")
    if any(row[0] != str(position) for position, row in enumerate(rows)):
        raise UserError(str(path), f"expected example_id 0, 1, 2, ... in order. {ADVICE}")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


@dataclass(eq=False)
class Record:
    """The data set a run was started with.

    Attributes:
        folder: the run's ``data/`` folder.
        manifest: its manifest.
        file, sha256: N names and hashes of raw pixels.
        metadata: columns of N strings.
        training: int64, sorted example_ids that are not held out.
    """

    folder: Path
    manifest: dict[str, Any]
    file: list[str]
    sha256: list[str]
    metadata: dict[str, list[str]]
    training: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises MismatchError where ``index.csv`` is not the one that was written, UserError where it is no index."""
        manifest = read_manifest(folder / "manifest.json")
        check_output(folder, manifest, INDEX)
        columns = read_index(folder / INDEX)
        training = [index for index, part in enumerate(columns["split"]) if part == "training"]
        return cls(
            folder,
            manifest,
            columns["file"],
            columns["sha256"],
            {name: column for name, column in columns.items() if name not in COLUMNS},
            np.array(training, dtype=np.int64),
        )

    @property
    def class_names(self) -> list[str]:
        return self.manifest["class_names"]

    @property
    def label(self) -> np.ndarray | None:
        """int64 [N]: the number of each image's class name; None without labels."""
        column = self.manifest["label_column"]
        if column is None:
            return None
        number = {name: index for index, name in enumerate(self.class_names)}
        return np.array([number[name] for name in self.metadata[column]], dtype=np.int64)

    @property
    def skipped(self) -> list[str]:
        """Files that were left out because they cannot be read."""
        return [entry["file"] for entry in self.manifest["skipped"]]

    @property
    def has_conditions(self) -> bool:
        return CONDITIONS in self.manifest["outputs"]

    def holds_conditions(self, source: Source) -> bool:
        """Whether the run's file of condition vectors is whole and still what ``source`` would give."""
        return (
            self.has_conditions
            and is_intact(self.folder, self.manifest, CONDITIONS)
            and self.manifest["source"]["condition_state"] == source.condition_state
            and self.file == source.files
        )

    def check_caches(self) -> None:
        """Raises MismatchError where a memory-mapped file is not the one that was written."""
        for name in (CACHE, CONDITIONS):
            if name in self.manifest["outputs"]:
                check_output(self.folder, self.manifest, name)

    def check_listing(self, source: Source) -> None:
        """Raises MismatchError for the first image that came or went, readable or not."""
        before, now = {*self.file, *self.skipped}, set(source.files)
        for file in sorted(before ^ now):
            raise self.changed(source, file, "is gone" if file in before else "is new")

    def check_images(self, source: Source, sha256: list[str]) -> None:
        """Raises MismatchError for the first image that can be read no more, can be read now, or has other pixels."""
        before, now = dict(zip(self.file, self.sha256, strict=True)), dict(zip(source.files, sha256, strict=True))
        for file in sorted(before.keys() | now.keys()):
            if before.get(file) != now.get(file):
                raise self.changed(source, file, "has changed")

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises MismatchError where files and pixels are the same but labels, conditions or levels are not."""
        if fingerprint != self.manifest["fingerprint"]:
            raise MismatchError(
                "data", f"got labels, conditions or levels other than {self.folder / 'manifest.json'} has. {ADVICE}"
            )

    def changed(self, source: Source, file: str, what: str) -> MismatchError:
        """The error that ``file`` is not what this record holds."""
        path, before = self.folder / "manifest.json", self.manifest["source"]["folder"]
        if source.folder is None:
            return MismatchError(file, f"{what}; expected the data of {path}. {ADVICE}")
        if str(source.folder) != before:
            return MismatchError("data.path", f"got {source.folder}; {path} has {before}, and {file} {what}. {ADVICE}")
        return MismatchError(str(source.folder / file), f"{what}; expected the data of {path}. {ADVICE}")


def check_output(folder: Path, manifest: dict[str, Any], name: str) -> None:
    if not is_intact(folder, manifest, name):
        raise MismatchError(
            str(folder / name),
            "is missing or not the file its manifest names (SHA-256 differs). Use overwrite=true to make it again.",
        )
