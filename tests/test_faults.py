"""Faults that need no finished run: a worker that dies, a path that is too long, a share that cannot be told."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import fails

from mucs_cli.attribution.unlearning import UnlearningStep
from mucs_cli.data.metadata import read_metadata
from mucs_cli.errors import UserError
from mucs_cli.locks import lock_path, locked
from mucs_cli.stages.unlearner import Unlearner


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def has_open(pid: int, path: Path) -> bool:
    try:
        return any(os.readlink(link) == str(path) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


def test_a_worker_of_a_sweep_that_is_killed_ends_the_sweep_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra joblib")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    command = [sys.executable, "-m", "mucs_cli", "train", "-m", "experiment=digits", "run=a,b", *launcher]
    with locked(tmp_path / "a" / "data"):  # for which a job waits
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (
            workers := [pid for pid in descendants(process.pid) if has_open(pid, lock_path(tmp_path / "a" / "data"))]
        ):
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(workers[0], signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith("mucs: error: ")]
    assert line.startswith("mucs: error: hydra.launcher: a worker process has died")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "experiment=digits", "run=r", f"data=image_folder data.path={'x' * 300}"],
        ["train", "experiment=digits", f"run={'x' * 300}"],
        ["status", f"run={'x' * 300}"],
        ["show", f"run={'x/' * 3000}"],
    ],
)
def test_a_path_that_is_too_long_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, *[word for argument in arguments for word in argument.split(" ")])
    assert "x" * 300 in line or "x/x/x" in line
    assert list(tmp_path.iterdir()) == [] or [path.name for path in tmp_path.iterdir()] == ["r"]


def test_a_row_that_names_a_picture_longer_than_names_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(f"file_name\n{'x' * 5000}.png\n")
    with pytest.raises(UserError, match="which does not exist"):
        read_metadata(tmp_path, ["a.png"])


def test_the_share_of_a_query_that_began_beside_one_at_its_bound_is_told() -> None:
    """Side by side, queries report their steps in turn; the last one may have met its bound at once."""
    settings = SimpleNamespace(num_steps=None, bound=1.0, tolerance=0.95, max_steps=100)
    unlearner = SimpleNamespace(settings=settings, _first_gap=0.0)

    def share(step: int, forget_loss: float) -> float:
        return Unlearner.share_done(unlearner, UnlearningStep(step, None, forget_loss))  # type: ignore[arg-type]

    for first in (1.0, 0.95, 0.9501):
        assert share(0, 0.2) < 0.05
        share(0, first)
        assert 0 < share(1, 0.3) <= 1
