"""``data=image_folder``: pictures below a folder, with or without a metadata file."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.conditions import INDEX_COLUMN, ConditionFile, find_file
from mucs_cli.data.decode import SUFFIXES
from mucs_cli.data.labels import number_classes
from mucs_cli.data.metadata import column_values, metadata_file, read_metadata
from mucs_cli.data.pictures import PictureSource, select
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.files import user_path
from mucs_cli.runtime import log
from mucs_cli.schemas import ImageFolderConfig


class ImageFolderSource(PictureSource):
    """The pictures below ``data.path``, in the order of their relative POSIX paths.

    Hidden files and folders are left out; links are followed, to files and to folders, but never in a circle. With
    ``data.on_error=skip`` the example_id is the position among the pictures that can be read.

    Raises:
        UserError: no such folder, no pictures in it, no such condition file.
    """

    folder: Path

    def __init__(self, config: ImageFolderConfig):
        super().__init__(config)
        self.config = config
        self.folder = Path(os.path.abspath(user_path(config.path)))
        self.listing = list_images(self.folder)
        self.condition_path = config.condition_file and find_file(config.condition_file, self.folder)
        self.condition_state = stamp(self.condition_path) if self.condition_path else ""
        self.metadata_path = metadata_file(self.folder)
        metadata_state = self.metadata_path and stamp(self.metadata_path)
        parts: list[object] = [self.listing.images[: config.limit], metadata_state, self.condition_state]
        if config.labels == "folder" and config.limit is not None:
            parts.append(sorted(self._folders()))
        self.state = fingerprint(*parts)
        self.facts = {
            "name": f"images in {self.folder.name}",
            "source": str(self.folder),
            "licence": "not stated",
            "citation": "not stated",
        }

    def open(self, scratch: Path) -> None:
        all_files = [file for file, _, _ in self.listing.images]
        self.rows = list(range(len(all_files[: self.config.limit])))
        self.files = all_files[: self.config.limit]
        self._all_files = all_files
        columns = read_metadata(self.folder, all_files, self.listing.linked)
        self.condition = None
        if self.condition_path:
            self.condition = ConditionFile(self.condition_path, all_files, columns.get(INDEX_COLUMN))
            self.condition_shape = self.condition.shape
        self.metadata = select(columns, self.rows)
        self.class_names = []
        if self.config.labels == "folder":
            self._label_by_folder()
        elif self.config.labels == "metadata":
            self._label_by_column(columns)
        if self.listing.others:
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in self.listing.others.most_common(5))
            log.info("data: left out %d files that are not pictures read here (%s)", self.listing.others.total(), kinds)

    def _folders(self) -> set[str]:
        """The folders directly below ``data.path`` that pictures lie in, those beyond ``data.limit`` included."""
        return {first_folder(file) for file, _, _ in self.listing.images} - {""}

    def _label_by_folder(self) -> None:
        names = []
        for file in self.files:
            folder = first_folder(file)
            if not folder:
                raise UserError(
                    self.name(file),
                    "got no class: the file is directly in data.path; expected it in a folder named after its class. "
                    "Move it, or set data.labels=none.",
                )
            names.append(folder)
        self.label, self.class_names = number_classes(
            names, self.config.num_classes, "data.num_classes", self._folders()
        )
        self.label_column = "label"
        columns = {"metadata_label" if name == "label" else name: column for name, column in self.metadata.items()}
        self.metadata = {"label": names, **columns}

    def _label_by_column(self, columns: dict[str, list[str]]) -> None:
        column = self.config.label_column
        if column not in self.metadata:
            names = ", ".join(self.metadata) or "no column but file_name"
            got = f"{self.metadata_path} has {names}" if self.metadata_path else "there is no metadata file"
            raise UserError(
                "data.label_column",
                f"got {column}; {got}.{did_you_mean(column, self.metadata)} Set it to the column of "
                "the classes, or set data.labels=none.",
            )
        for file, value in zip(self.files, self.metadata[column], strict=True):
            if not value:
                raise UserError(
                    self.name(file),
                    f"got no class: {self.metadata_path} gives it no {column}. Add it, or set data.labels=none.",
                )
        self.label_column = column
        self.label, self.class_names = number_classes(
            self.metadata[column], self.config.num_classes, "data.num_classes", set(columns[column]) - {""}
        )

    def content(self, row: int) -> Path:
        return self.folder / self._all_files[row]

    def name(self, file: str) -> str:
        return str(self.folder / file)

    def read_conditions(self, start: int, stop: int) -> np.ndarray:
        assert self.condition is not None
        return self.condition.read(self.rows[start:stop])


def class_texts(config: ImageFolderConfig) -> set[str]:
    """The distinct class names, or numbers, that folders or metadata give the pictures; no picture is opened."""
    folder = Path(os.path.abspath(user_path(config.path)))
    if config.labels == "metadata":
        return column_values(folder, config.label_column) - {""}
    if config.labels == "folder":
        return {first_folder(file) for file, _, _ in list_images(folder).images} - {""}
    return set()


def first_folder(file: str) -> str:
    """The folder directly below the data's that a relative path leads into; an empty string for a file in neither."""
    return file.partition("/")[0] if "/" in file else ""


def stamp(path: Path) -> str:
    """Size and modification time of a file, as one string."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


# --- listing ---------------------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        images: (relative POSIX path, size in bytes, modification time in ns), sorted.
        linked: those paths that were reached through a link.
        others: how many other files there are, by suffix.
    """

    images: list[tuple[str, int, int]] = field(default_factory=list)
    linked: set[str] = field(default_factory=set)
    others: Counter[str] = field(default_factory=Counter)


def list_images(folder: Path, key: str = "data.path") -> Listing:
    """Everything below ``folder``; ``key`` is what an error names.

    Raises:
        UserError: the folder does not exist, cannot be listed, or holds no picture.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError(key, f"got {folder}: {got}; expected a folder of images. Set {key} to one.")
    listing = Listing()
    for relative, status, is_linked in walk(folder, "", frozenset(), False):
        if relative.lower().endswith(SUFFIXES):
            listing.images.append((relative, status.st_size, status.st_mtime_ns))
            if is_linked:
                listing.linked.add(relative)
        elif PurePosixPath(relative).suffix.lower() not in (".csv", ".json", ".jsonl", ".safetensors"):
            listing.others[PurePosixPath(relative).suffix.lower() or "without suffix"] += 1
    if not listing.images:
        raise UserError(
            key,
            f"got {folder}, which holds no image; expected files ending in {', '.join(SUFFIXES)}, in any case "
            f"(hidden ones do not count). Set {key} to a folder of images.",
        )
    listing.images.sort()
    return listing


def walk(
    folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]], is_linked: bool
) -> Iterator[tuple[str, os.stat_result, bool]]:
    """(relative POSIX path, status, reached through a link) of every visible regular file.

    ``ancestors`` are the folders (device, inode) that this one lies in.

    Raises:
        UserError: a folder cannot be listed, a link leads nowhere, or a picture's name is not UTF-8.
    """
    path = folder / prefix
    try:
        status = path.stat()
        here = (status.st_dev, status.st_ino)
        if here in ancestors:
            return
        for entry in list(os.scandir(path)):
            relative = prefix + entry.name
            path = folder / relative
            if entry.name.startswith("."):
                continue
            through_link = is_linked or entry.is_symlink()
            if entry.is_dir():
                yield from walk(folder, relative + "/", ancestors | {here}, through_link)
                continue
            if entry.name.lower().endswith(SUFFIXES):
                relative.encode()
                status = entry.stat()
            elif entry.is_file():
                status = entry.stat()
            else:
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe would block the reader
                yield relative, status, through_link
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror}). Make it readable, or remove it.") from error
    except UnicodeEncodeError as error:
        raise UserError(ascii(str(path)), "got a name that is not UTF-8. Rename the file.") from error
