"""Safetensors files that are filled block by block, and tensors that are memory-mapped instead of loaded."""

import contextlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import REDO, sync
from mucs_cli.errors import UserError
from mucs_cli.rehearsal import current_rehearsal
from mucs_cli.runtime import log

SAFETENSORS_DTYPE = {
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "uint8": "U8",
}
NUMPY_DTYPE = {code: name for name, code in SAFETENSORS_DTYPE.items()}
TENSOR_ENTRY = ("dtype", "shape", "data_offsets")
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, by the format's own definition."""


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


class BlockFile:
    """A safetensors file that is filled block by block and survives an interruption.

    The file is preallocated as ``<name>.partial`` and memory-mapped; ``<name>.journal`` lists the finished blocks with
    a checksum of each, a line each, appended after the block's bytes are durable. ``finish`` renames the file into
    place. A journal that is still there then says that the file is whole, though no manifest names it yet.

    Args:
        path: the finished file.
        tensors: name -> (dtype, shape), dtype one of ``SAFETENSORS_DTYPE``.
        identity: what is being written; a partial file of another identity is started afresh.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], identity: str):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = journal_of(path)
        offset = 0
        header: dict[str, dict[str, Any]] = {}
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": SAFETENSORS_DTYPE[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.identity = identity
        start = 8 + len(encoded)
        self._checksums = self._finished_blocks(start + offset)
        try:
            if not self._checksums:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The journal first: what it lists is not in the new file. Either may be a link, and written through.
                for old in (self.journal, self.partial):
                    old.unlink(missing_ok=True)
                with self.partial.open("wb") as file:
                    file.write(len(encoded).to_bytes(8, "little") + encoded)
                    os.posix_fallocate(file.fileno(), 0, 8 + len(encoded) + max(offset, 1))
                    file.truncate(8 + len(encoded) + offset)
                self.journal.write_text(json.dumps({"identity": identity}) + "\n")
        except OSError as error:
            raise UserError(
                str(path), f"cannot be written ({error}). Choose another run=, or free the disk."
            ) from error
        self.arrays: dict[str, np.memmap] = {
            name: np.memmap(self.partial, dtype, "r+", start + header[name]["data_offsets"][0], shape)
            for name, (dtype, shape) in tensors.items()
        }

    def _finished_blocks(self, size: int) -> dict[int, int]:
        """The blocks of an interrupted attempt, with checksums; none of one whose file is not of this size any more."""
        if not self.journal.is_file() or self.journal.is_symlink():
            return {}
        first, *lines = self.journal.read_text(errors="replace").splitlines() or [""]
        if first != json.dumps({"identity": self.identity}):
            return {}
        if not self.partial.exists() and self.path.is_file():
            self.path.replace(self.partial)  # an interruption came just after it was put in place
        if not self.partial.is_file() or self.partial.is_symlink() or self.partial.stat().st_size != size:
            return {}
        found = {}
        for line in lines:
            # A line that a crash cut short, or that was damaged, is not the line of its numbers: its block is redone.
            numbers = re.match(r'{"block": (\d{1,18}), "data": (\d{1,10}),', line)
            if numbers and line == self._line(block := int(numbers[1]), checksum := int(numbers[2])):
                found[block] = checksum
        return found

    def _line(self, block: int, checksum: int) -> str:
        """A block's line in the journal; with a check, as a digit that flips would name another block."""
        check = zlib.crc32(f"{self.identity} {block} {checksum}".encode())
        return json.dumps({"block": block, "data": checksum, "check": check})

    def holds(self, block: int, *values: np.ndarray) -> bool:
        """Whether an attempt has finished a block, and left it as it was.

        Args:
            block: its number.
            values: what ``commit`` was given, as it is in the file now.
        """
        if block not in self._checksums:
            return False
        if current_rehearsal() is not None or self._checksums[block] == checksum_of(values):
            return True  # a rehearsal's copy of the file has no data
        log.warning("%s: a part of it is damaged; computed again", self.partial)
        return False

    def commit(self, block: int, *values: np.ndarray) -> None:
        """Makes the arrays durable, then records a block as finished.

        Args:
            block: its number.
            values: what it has put into the arrays.
        """
        for array in self.arrays.values():
            array.flush()
        checksum = checksum_of(values)
        with self.journal.open("a") as file:
            # whatever the last line was cut short to stays a line of its own
            file.write(f"\n{self._line(block, checksum)}\n")
            file.flush()
            os.fsync(file.fileno())
        self._checksums[block] = checksum

    def finish(self, keep_journal: bool = False) -> None:
        """Renames the file into place and removes the journal.

        Args:
            keep_journal: until ``Stage.finish`` has recorded the file: an interruption before that loses nothing.
        """
        for array in self.arrays.values():
            array.flush()
        self.arrays.clear()
        sync(self.partial)
        self.partial.replace(self.path)
        sync(self.path.parent)
        if not keep_journal:
            self.journal.unlink()

    def discard(self) -> None:
        """Removes what was written: it has been used."""
        self.arrays.clear()
        self.journal.unlink()
        self.partial.unlink()


def checksum_of(arrays: Sequence[np.ndarray]) -> int:
    """CRC-32 of the bytes of arrays, one after the other."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).data, found)
    return found


def map_tensor(path: Path, name: str, writable: bool = False) -> np.memmap:
    """A memory map of one tensor of a safetensors file, read-only unless it is to be ``writable``.

    Raises:
        UserError: the file is missing or truncated, or has no such tensor.
    """
    try:
        dtype, start, shape = locate(path, name)
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        return np.memmap(path, dtype, mode, start, shape)
    except (OSError, ValueError, KeyError) as error:
        reason = error.args[0] if isinstance(error, ValueError) else repr(error)
        raise UserError(
            str(path), f"cannot be read ({reason}); expected a safetensors file with {name!r}. {REDO}"
        ) from error


def map_tensors(path: Path, names: Sequence[str]) -> dict[str, np.memmap]:
    """``map_tensor`` of several; of a name that ends with ``?`` where the file has it."""
    found = {}
    for key in names:
        name = key.removesuffix("?")
        if name != key:
            with contextlib.suppress(OSError, ValueError):  # which mapping the others tells
                if name not in header_of(path)[0]:
                    continue
        found[name] = map_tensor(path, name)
    return found


def locate(path: Path, name: str) -> tuple[str, int, tuple[int, ...]]:
    """NumPy dtype, position in bytes, and shape of one tensor of a safetensors file.

    Raises:
        ValueError, KeyError: the file is truncated or no safetensors file, or has no such tensor.
    """
    header, data = header_of(path)
    entry = header[name]
    values: list[Any] = [entry.get(key) if isinstance(entry, dict) else None for key in TENSOR_ENTRY]
    dtype, shape, offsets = values
    if not (isinstance(dtype, str) and dtype in NUMPY_DTYPE and are_counts(shape) and are_counts(offsets)):
        raise ValueError(f"its header describes {name!r} in no known way")
    start, end = (data + offset for offset in offsets) if len(offsets) == 2 else (0, -1)
    if end - start != math.prod(shape) * np.dtype(NUMPY_DTYPE[dtype]).itemsize or end > path.stat().st_size:
        raise ValueError("it is truncated, or its header is wrong")
    return NUMPY_DTYPE[dtype], start, tuple(shape)


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and the position in bytes at which its data begin.

    Raises:
        ValueError: the file is truncated or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("it is truncated")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    return header, 8 + length


def are_counts(values: Any) -> bool:
    """Whether a JSON value is a list of whole numbers, none of them negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values."""
    return torch.from_numpy(np.array(array))
