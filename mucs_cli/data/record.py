"""What a run's ``data/`` folder says about its images: ``index.csv`` and ``manifest.json``."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mucs_cli.artifacts import read_json, sha256_file, write_text
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError

ADVICE = "Use another run=, or overwrite=true to take the data as they are now."


class MismatchError(UserError):
    """The images, or the run's own files, are not what the run's manifest says; ``overwrite`` starts afresh."""


def write_index(path: Path, source: Source, sha256: list[str], training: np.ndarray) -> None:
    """Writes a row an image: example_id, file, sha256, split, then the metadata columns."""
    is_training = np.zeros(len(source.files), dtype=bool)
    is_training[training] = True
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["example_id", "file", "sha256", "split", *source.metadata])
    for example_id, file in enumerate(source.files):
        part = "training" if is_training[example_id] else "holdout"
        columns = [column[example_id] for column in source.metadata.values()]
        writer.writerow([example_id, file, sha256[example_id], part, *columns])
    write_text(path, text.getvalue())


@dataclass(eq=False)
class Record:
    """The data set a run was started with.

    Attributes:
        folder: the run's ``data/`` folder.
        manifest: its manifest.
        file, sha256: N names and hashes of raw pixels.
        training: int64, sorted example_ids that are not held out.
    """

    folder: Path
    manifest: dict[str, Any]
    file: list[str]
    sha256: list[str]
    training: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """Raises MismatchError where ``index.csv`` is not the one that was written."""
        manifest = read_json(folder / "manifest.json")
        check_output(folder, manifest, "index.csv")
        with (folder / "index.csv").open(encoding="utf-8", newline="") as table:
            rows = list(csv.DictReader(table))
        training = [index for index, row in enumerate(rows) if row["split"] == "training"]
        return cls(
            folder,
            manifest,
            [row["file"] for row in rows],
            [row["sha256"] for row in rows],
            np.array(training, dtype=np.int64),
        )

    def check_cache(self) -> None:
        """Raises MismatchError where ``images.safetensors`` is not the one that was written."""
        check_output(self.folder, self.manifest, "images.safetensors")

    def check_files(self, source: Source) -> None:
        """Raises MismatchError for the first image that came or went."""
        if source.files == self.file:
            return
        before, now = set(self.file), set(source.files)
        for file in sorted(before ^ now):
            raise self.changed(source, file, "is gone" if file in before else "is new")

    def check_images(self, source: Source, sha256: list[str]) -> None:
        """Raises MismatchError for the first image whose pixels have changed."""
        for file, now, before in zip(source.files, sha256, self.sha256, strict=True):
            if now != before:
                raise self.changed(source, file, "has changed")

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raises MismatchError where files and pixels are the same but labels or levels are not."""
        if fingerprint != self.manifest["fingerprint"]:
            raise MismatchError(
                "data", f"got labels or levels other than {self.folder / 'manifest.json'} has. {ADVICE}"
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
    path = folder / name
    if not path.exists() or sha256_file(path) != manifest["outputs"][name]["sha256"]:
        raise MismatchError(
            str(path),
            "is missing or not the file its manifest names (SHA-256 differs). Use overwrite=true to make it again.",
        )
