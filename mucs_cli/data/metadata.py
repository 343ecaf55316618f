"""``metadata.csv`` or ``metadata.jsonl`` of a folder: a row a picture, ``file_name`` and other columns, as strings."""

import csv
import io
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mucs_cli.errors import UserError, did_you_mean

NAMES = ("metadata.csv", "metadata.jsonl")
FILE_NAME = "file_name"
RESERVED = ("example_id", "file", "sha256", "split", "query", "rank", "score", "exact_copy")
"""Columns that our own tables have; a metadata column of such a name gets ``metadata_`` before it."""


def metadata_file(folder: Path) -> Path | None:
    """The folder's metadata file, if it has one.

    Raises:
        UserError: it has both kinds.
    """
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise UserError(str(folder), f"got both {' and '.join(NAMES)}; expected one of them. Remove the other.")
    return found[0] if found else None


def has_column(folder: str, name: str) -> bool:
    """Whether the first row of the folder's metadata file has a column; false without such a file."""
    path = metadata_file(Path(folder))
    if path is None:
        return False
    rows = (csv_rows if path.suffix == ".csv" else json_rows)(path)
    return any(name in row for _, row in itertools.islice(rows, 1))


def column_values(folder: Path, name: str) -> set[str]:
    """The distinct values of a column of the folder's metadata file; empty without such a file or column."""
    path = metadata_file(folder)
    if path is None:
        return set()
    rows = (csv_rows if path.suffix == ".csv" else json_rows)(path)
    return {row[name] for _, row in rows if name in row}


def read_metadata(folder: Path, files: list[str], linked: Collection[str] = ()) -> dict[str, list[str]]:
    """The columns of the folder's metadata file, a string for each of ``files``; no columns without such a file.

    A picture that no row names has empty strings. Values of a JSON line that are no strings are kept as JSON text, and
    null as an empty string.

    Args:
        folder: where the metadata file is, and what its file names are relative to.
        files: relative POSIX paths of the pictures.
        linked: those of ``files`` that were reached through a link.
    Raises:
        UserError: naming file and line, where a row cannot be read, names no picture, names one twice, or leaves the
            folder (by "..", by an absolute path, or through a link).
    """
    path = metadata_file(folder)
    if path is None:
        return {}
    position = {file: index for index, file in enumerate(files)}
    columns: dict[str, list[str]] = {}
    line_of: dict[str, int] = {}
    names: dict[str, str] = {}
    for line, row in (csv_rows if path.suffix == ".csv" else json_rows)(path):
        place = f"{path}, line {line}"
        file = checked_name(row.pop(FILE_NAME, ""), place, folder, position, linked)
        if file in line_of:
            raise UserError(place, f"got {file!r} again; line {line_of[file]} has it. Remove one of the two.")
        line_of[file] = line
        for name, value in row.items():
            if name not in names:
                names[name] = shown_name(name, place, names.values())
                columns[names[name]] = [""] * len(files)
            columns[names[name]][position[file]] = as_text(value)
    if not line_of:
        raise UserError(str(path), f"got no row; expected one a picture, with {FILE_NAME}. Fill or remove it.")
    return columns


def checked_name(name: str, place: str, folder: Path, files: Collection[str], linked: Collection[str]) -> str:
    """The relative POSIX path that a row means, one of ``files``."""
    if not name:
        raise UserError(
            place, f"got no {FILE_NAME}; expected a path relative to the folder. Add it, or remove the row."
        )
    path = PurePosixPath(name)
    file = str(path)
    if path.is_absolute() or ".." in path.parts or (file in linked and leaves(folder, file)):
        raise UserError(
            place, f"got {name!r}, which leads out of {folder}; expected a path in it. Move the picture, or correct it."
        )
    if file not in files:
        got = "is not a picture that is read" if is_there(folder / file) else "does not exist"
        raise UserError(place, f"got {name!r}, which {got}.{did_you_mean(file, files)} Correct the row, or remove it.")
    return file


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that is longer than names can be, or that no file can have
        return False


def leaves(folder: Path, file: str) -> bool:
    return not (folder / file).resolve().is_relative_to(folder.resolve())


def shown_name(name: str, place: str, taken: Collection[str]) -> str:
    """The name under which a column is kept."""
    shown = f"metadata_{name}" if name in RESERVED else name
    if not name.strip() or shown in taken:
        raise UserError(
            place, f"got a column named {name!r}; expected names that are distinct and not empty. Rename it."
        )
    return shown


def read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror}). Make it readable, or remove it.") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}", "got text that is not UTF-8. Save the file as UTF-8.") from error


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> value) of every row but empty ones."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            place = f"{path}, line {reader.line_num}"
            if not header:
                header = [as_text(cell) for cell in cells]
                if FILE_NAME not in header:
                    raise UserError(
                        place, f"got columns {', '.join(header)}; expected one called {FILE_NAME}. Name it so."
                    )
                if len(set(header)) < len(header):
                    raise UserError(place, "got a column name twice; expected distinct names. Rename one.")
            elif len(cells) != len(header):
                raise UserError(
                    place,
                    f"got {len(cells)} values; expected {len(header)}, as the header has. Quote values with commas.",
                )
            else:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}", f"is not CSV ({error}). Correct the line.") from error


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, key -> value) of every line but empty ones."""
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
            texts = {as_text(key): as_text(value) for key, value in row.items()} if isinstance(row, dict) else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {line}", f"is not JSON ({error}). Correct the line.") from error
        if not isinstance(row, dict) or not isinstance(row.get(FILE_NAME), str):
            raise UserError(
                f"{path}, line {line}",
                f"got {text[:60]!r}; expected a JSON object with a string {FILE_NAME}. Correct it.",
            )
        yield line, texts | {FILE_NAME: row[FILE_NAME]}


def as_text(value: Any) -> str:
    """A metadata value as a string: strings as they are, null as an empty one, everything else as JSON.

    Line ends become "\\n": csv does not quote a lone carriage return. Half a character (a surrogate, which JSON can
    spell but no file can hold) becomes "?".
    """
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.replace("\r\n", "\n").replace("\r", "\n").encode("utf-8", "replace").decode()
