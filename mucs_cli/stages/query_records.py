"""What an unfinished stage has finished, query by query: a record each.

The process that did it writes it, before it lets go of what it would need to do it again. So nothing is done twice,
whichever process of a command is killed.
"""

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mucs_cli.artifacts import write_record
from mucs_cli.errors import UserError
from mucs_cli.records import read_record
from mucs_cli.runtime import log


class QueryRecords:
    """The records of one stage.

    Args:
        folder: holds them; may hold other files.
        form: whether a record is one that this stage writes.
    """

    def __init__(self, folder: Path, form: Callable[[dict[str, Any]], bool]):
        self.folder, self.form = folder, form

    def write(self, query: int, record: Mapping[str, Any]) -> None:
        """Says that a query is done.

        Raises:
            UserError: it cannot be written.
        """
        write_record(self._path(query), record)

    def forget(self, query: int) -> None:
        """Says that a query is not done."""
        self._path(query).unlink(missing_ok=True)

    def read(self) -> dict[int, dict[str, Any]]:
        """By query; one that is damaged is left out, as if its query had not been done."""
        found = {}
        for path in sorted(self.folder.glob("query_*.json")):
            number = re.fullmatch(r"query_(\d{4,9})", path.stem)
            if number is None:
                continue
            with contextlib.suppress(UserError):
                record = read_record(path)
                if self.form(record):
                    found[int(number.group(1))] = record
                    continue
            log.warning("%s is damaged; doing its query again", path)
        return found

    def _path(self, query: int) -> Path:
        return self.folder / f"query_{query:04d}.json"
