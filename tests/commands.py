"""What tests of the command line share: commands that work, commands that fail, and the scores they leave."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mucs_cli.cli import main


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
