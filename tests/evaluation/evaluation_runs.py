"""What the tests of evaluations share: the sizes of the run in conftest.py, and commands and files of a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from mucs_cli.cli import main

NUM_IMAGES, NUM_QUERIES = 120, 12


def mucs(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mucs: error: ")]
    return line


def scores_of(run: Path, variant: str) -> np.ndarray:
    """[Q, N], of a run without held-out images."""
    return load_file(run / "score" / variant / "scores.safetensors")["score"].numpy()


def results_of(run: Path, evaluation: str) -> dict[str, Any]:
    return json.loads((run / "evaluate" / evaluation / "results.json").read_text())


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
