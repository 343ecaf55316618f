"""What the tests of evaluations share: the sizes of the run in conftest.py, and commands and files of a run."""

import json
from pathlib import Path
from typing import Any

NUM_IMAGES, NUM_QUERIES = 120, 12


def results_of(run: Path, evaluation: str) -> dict[str, Any]:
    return json.loads((run / "evaluate" / evaluation / "results.json").read_text())


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
