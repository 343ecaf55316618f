"""How every benchmark and check reports: one JSON object on stdout for programs, a table on stderr for people."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_result(result: Mapping[str, Any], table: Table | None = None) -> None:
    """``table``: for people, in place of one with a row a figure."""
    if table is None:
        table = Table("figure", "value")
        for key, value in result.items():
            table.add_row(key, "\n".join(map(str, value)) if isinstance(value, list) else str(value))
    Console(stderr=True).print(table)
    print(json.dumps(result), file=sys.stdout)
