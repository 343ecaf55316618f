"""How every benchmark reports: one JSON object on stdout for programs, a table on stderr for people."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_result(result: Mapping[str, Any]) -> None:
    table = Table("figure", "value")
    for key, value in result.items():
        table.add_row(key, str(value))
    Console(stderr=True).print(table)
    print(json.dumps(result), file=sys.stdout)
