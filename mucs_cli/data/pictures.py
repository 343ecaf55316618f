"""What all data sets of encoded pictures share: sizes, colours, decoding on threads, skipping what is unreadable."""

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mucs_cli.data.decode import Reading, decode, read_header
from mucs_cli.data.source import Source
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress
from mucs_cli.schemas import PictureConfig

Result = TypeVar("Result")
NUM_THREADS = min(8, os.cpu_count() or 1)
"""Pillow decodes and scales without holding Python's lock."""
HEADERS_AT_ONCE = 4096


class PictureSource(Source):
    """Pictures that are files or rows; a subclass lists them and hands out their encoded bytes.

    Attributes:
        rows: where each image is in the subclass's own order; ``drop`` narrows it along with ``files``.
    """

    rows: list[int]

    def __init__(self, config: PictureConfig):
        self.reading = Reading.of(config)
        self.color = config.color
        self.skips = config.on_error == "skip"
        self._skipped: dict[str, str] = {}

    @abstractmethod
    def content(self, row: int) -> Path | bytes:
        """The path or the encoded bytes of one picture; called from several threads."""

    def name(self, file: str) -> str:
        """What an error calls an image."""
        return file

    @property
    def skipped(self) -> dict[str, str]:
        return self._skipped

    def drop(self, reasons: dict[int, str]) -> None:
        self._skipped |= {self.files[index]: reason for index, reason in reasons.items()}
        self.rows = [row for index, row in enumerate(self.rows) if index not in reasons]
        super().drop(reasons)
        if not self.files:
            file, reason = next(iter(self._skipped.items()))
            raise UserError(
                "data.on_error",
                f"got skip, and none of {len(self._skipped)} pictures can be read; the first is {file}: {reason}",
            )

    def shape(self) -> tuple[int, int, int]:
        first: tuple[int, int, str] | None = None
        all_grayscale, unreadable = True, {}
        with Progress("read image headers", len(self.files), "images") as progress:
            for start in range(0, len(self.files), HEADERS_AT_ONCE):
                stop = min(start + HEADERS_AT_ONCE, len(self.files))
                for index, header in enumerate(self._map(read_header, start, stop), start):
                    progress.advance()
                    if isinstance(header, UserError):
                        unreadable[index] = header.message
                        continue
                    width, height, is_grayscale = header
                    all_grayscale = all_grayscale and is_grayscale
                    first = first or (width, height, self.files[index])
                    if self.reading.image_size is None:
                        self._check_size(index, (width, height), first)
        if unreadable:
            self.drop(unreadable)
        assert first is not None
        is_grayscale = all_grayscale if self.color == "auto" else self.color == "grayscale"
        self.reading = replace(self.reading, channels=1 if is_grayscale else 3)
        side = self.reading.image_size or first[0]
        return (1 if is_grayscale else 3), side, side

    def _check_size(self, index: int, size: tuple[int, int], first: tuple[int, int, str]) -> None:
        if size == first[:2] and size[0] == size[1]:
            return
        expected = "a square image" if size == first[:2] else f"{first[0]}x{first[1]} as {first[2]} has"
        raise UserError(
            self.name(self.files[index]),
            f"got {size[0]}x{size[1]} pixels; expected {expected}. Set data.image_size to crop and resize.",
        )

    def read(self, start: int, stop: int) -> Iterator[np.ndarray | UserError]:
        yield from self._map(decode, start, stop)

    def _map(
        self, function: Callable[[Path | bytes, str, Reading], Result], start: int, stop: int
    ) -> Iterator[Result | UserError]:
        """``function`` of images ``start`` to ``stop - 1``, on a few threads, in order; errors as in ``read``."""

        def call(index: int) -> Result | UserError:
            try:
                return function(self.content(self.rows[index]), self.name(self.files[index]), self.reading)
            except UserError as error:
                if self.skips:
                    return error
                raise UserError(error.subject, f"{error.message} Or leave it out: data.on_error=skip.") from error

        with ThreadPoolExecutor(NUM_THREADS) as pool:
            yield from pool.map(call, range(start, stop))


def select(columns: dict[str, list[str]], rows: Sequence[int]) -> dict[str, list[str]]:
    """The given rows of each column."""
    return {name: [column[row] for row in rows] for name, column in columns.items()}
