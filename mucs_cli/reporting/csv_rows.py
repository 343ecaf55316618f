"""CSV files of a run, read back."""

import csv
from pathlib import Path

from mucs_cli.errors import UserError
from mucs_cli.text import csv_cells


def read_rows(path: Path, command: str) -> list[dict[str, str]]:
    """The rows below the header, each as column -> value.

    Args:
        path: the file.
        command: the command that writes it, for the message.

    Raises:
        UserError: the file cannot be read, or a row has not as many values as the header.
    """
    try:
        header, *rows = csv_cells(path.read_bytes().decode())
        return [dict(zip(header, row, strict=True)) for row in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(str(path), f"cannot be read ({error}). Rerun mucs {command} with overwrite=true.") from error
