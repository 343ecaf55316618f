"""CSV files of a run, read back."""

import csv
import io
from pathlib import Path

from mucs_cli.errors import UserError


def read_rows(path: Path, command: str) -> list[dict[str, str]]:
    """The rows below the header, each as column -> value.

    Args:
        path: the file.
        command: the command that writes it, for the message.

    Raises:
        UserError: the file cannot be read, or a row has not as many values as the header.
    """
    previous = csv.field_size_limit()
    try:
        text = path.read_bytes().decode()
        csv.field_size_limit(max(len(text), previous))  # a caption may be of any length
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        return [dict(zip(header, row, strict=True)) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(str(path), f"cannot be read ({error}). Rerun mucs {command} with overwrite=true.") from error
    finally:
        csv.field_size_limit(previous)
