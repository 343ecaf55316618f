"""``data=image_folder``: PNG and JPEG files below a folder."""

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np

from mucs_cli.artifacts import fingerprint
from mucs_cli.config import ImageFolderConfig
from mucs_cli.data.decode import SUFFIXES, decode, read_header
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress

Result = TypeVar("Result")
NUM_THREADS = min(8, os.cpu_count() or 1)
HEADERS_AT_ONCE = 4096


class ImageFolderSource(Source):
    """The images below ``data.path``, in the order of their relative POSIX paths.

    Hidden files and folders are left out; links are followed, to files and to folders, but never in a circle.

    Raises:
        UserError: no such folder, no images in it, or a file without a class with ``data.labels=folder``.
    """

    levels = 255

    def __init__(self, config: ImageFolderConfig):
        self.config = config
        self.folder = Path(os.path.abspath(os.path.expanduser(config.path)))
        found = sorted(list_images(self.folder))[: config.limit]
        self.files = [file for file, _, _ in found]
        self.state = fingerprint(found)
        self.class_names, self.metadata = [], {}
        if config.labels == "folder":
            self._read_labels()
        self.facts = {
            "name": f"images in {self.folder.name}",
            "source": str(self.folder),
            "licence": "not stated",
            "citation": "not stated",
        }

    def _read_labels(self) -> None:
        names = []
        for file in self.files:
            parts = PurePosixPath(file).parts
            if len(parts) == 1:
                raise UserError(
                    self._path(file),
                    "got no class: the file is directly in data.path; expected it in a folder named after its class. "
                    "Move it, or set data.labels=none.",
                )
            names.append(parts[0])
        self.class_names = sorted(set(names))
        number = {name: index for index, name in enumerate(self.class_names)}
        self.label = np.array([number[name] for name in names], dtype=np.int64)
        self.metadata = {"label": names}

    def shape(self) -> tuple[int, int, int]:
        size: tuple[int, int] | None = None
        all_grayscale = True
        with Progress("read image headers", len(self.files), "images") as progress:
            for start in range(0, len(self.files), HEADERS_AT_ONCE):
                files = self.files[start : start + HEADERS_AT_ONCE]
                for file, (width, height, is_grayscale) in zip(files, self._map(read_header, files), strict=True):
                    size = size or (width, height)
                    all_grayscale = all_grayscale and is_grayscale
                    if self.config.image_size is None:
                        self._check_size(file, (width, height), size)
                    progress.advance()
        assert size is not None
        is_grayscale = all_grayscale if self.config.color == "auto" else self.config.color == "grayscale"
        self.channels = 1 if is_grayscale else 3
        side = self.config.image_size or size[0]
        return self.channels, side, side

    def _check_size(self, file: str, size: tuple[int, int], first: tuple[int, int]) -> None:
        if size == first and size[0] == size[1]:
            return
        expected = "a square image" if size == first else f"{first[0]}x{first[1]} as {self.files[0]} has"
        raise UserError(
            self._path(file),
            f"got {size[0]}x{size[1]} pixels; expected {expected}. Set data.image_size to resize and crop.",
        )

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        yield from self._map(lambda path: decode(path, self.channels, self.config.image_size), self.files[start:stop])

    def _map(self, function: Callable[[Path], Result], files: list[str]) -> Iterator[Result]:
        """``function`` of each file's path, on a few threads, results in the order of ``files``."""
        assert self.folder is not None
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(function, [self.folder / file for file in files])

    def _path(self, file: str) -> str:
        assert self.folder is not None
        return str(self.folder / file)


def list_images(folder: Path) -> list[tuple[str, int, int]]:
    """(relative POSIX path, size in bytes, modification time in ns) of every image below ``folder``, in no fixed order.

    Raises:
        UserError: the folder does not exist, cannot be listed, or holds no image.
    """
    if not folder.is_dir():
        got = "a file" if folder.exists() else "no such folder"
        raise UserError("data.path", f"got {folder}: {got}; expected a folder of images. Set data.path to one.")
    found = list(walk(folder, "", frozenset()))
    if not found:
        raise UserError(
            "data.path",
            f"got {folder}, which holds no image; expected files ending in {', '.join(SUFFIXES)}, in any case "
            "(hidden ones do not count). Set data.path to a folder of images.",
        )
    return found


def walk(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """What ``list_images`` returns, for one folder; ``ancestors`` are the folders (device, inode) it lies in."""
    path = folder / prefix
    try:
        status = path.stat()
        here = (status.st_dev, status.st_ino)
        if here in ancestors:
            return
        entries = list(os.scandir(path))
        for entry in entries:
            relative = prefix + entry.name
            path = folder / relative
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from walk(folder, relative + "/", ancestors | {here})
            elif entry.name.lower().endswith(SUFFIXES):
                relative.encode()
                status = entry.stat()
                if stat.S_ISREG(status.st_mode):  # a pipe would block the reader
                    yield relative, status.st_size, status.st_mtime_ns
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror}). Make it readable, or remove it.") from error
    except UnicodeEncodeError as error:
        raise UserError(ascii(str(path)), "got a name that is not UTF-8. Rename the file.") from error
