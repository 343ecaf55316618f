"""Text from outside (file names, metadata, messages that quote them) made safe for where it goes."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

FORMULA = re.compile("[=+\\-@\t\r＝＋－＠]")
"""What a spreadsheet takes a cell that begins with it for a formula; full-width characters as well."""


def printable(text: str) -> str:
    """Every character that could steer a terminal is spelled out (``\\x1b``); line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def inert(cell: Any) -> Any:
    """A cell that a spreadsheet shows and does not compute: a text that begins like a formula gets ``'`` before it.

    Numbers stay as they are, negative ones and those that come as text among them.
    """
    if not isinstance(cell, str) or not FORMULA.match(cell) or is_number(cell):
        return cell
    return f"'{cell}"


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """The rows as CSV, lines ending in "\\n"; ``csv.reader`` gives the same cells back, as strings.

    A lone carriage return ends a row for a reader, but not every version of ``csv`` quotes it.
    """
    text = io.StringIO()
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        writer = quoted if any(isinstance(cell, str) and "\r" in cell for cell in row) else plain
        writer.writerow(row)
    return text.getvalue()


def csv_cells(text: str) -> list[list[str]]:
    """The rows of a CSV text, blank ones left out; a cell may be of any length.

    Raises:
        csv.Error: it is no CSV.
    """
    previous = csv.field_size_limit(max(len(text), 131_072))
    try:
        return [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
    finally:
        csv.field_size_limit(previous)
