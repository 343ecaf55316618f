"""Locks: one holder at a time, named to whoever waits, and free again when its process ends, however that ends."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mucs_cli import locks
from mucs_cli.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from mucs_cli import locks
locks.command = "mucs train run=r"
with locks.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
COUNT = """
import sys
from pathlib import Path
from mucs_cli import locks
folder = Path(sys.argv[1])
for _ in range(30):
    with locks.locked(folder):
        counter = folder / "counter"
        counter.write_text(str(int(counter.read_text()) + 1))
"""


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    yield
    locks.release_all()


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("mucs"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that holds the folder's lock."""
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_who_waits_is_told_of_process_host_command_and_time_and_goes_on_when_it_is_done(
    tmp_path: Path, heard: pytest.LogCaptureFixture
) -> None:
    process = holder(tmp_path / "train", 0.3)
    with locks.locked(tmp_path / "train") as is_held:
        assert is_held and process.wait(10) == 0
    (line,) = heard.messages
    year = time.strftime("%Y")
    assert f"waiting for process {process.pid} on {os.uname().nodename} (mucs train run=r, since {year}-" in line
    assert line.endswith(f"which is at {tmp_path}/train")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_free_when_its_process_was_killed(tmp_path: Path, heard: pytest.LogCaptureFixture) -> None:
    process = holder(tmp_path / "train", 60)
    with locks.locked(tmp_path / "train", wait=False) as is_held:
        assert not is_held
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((tmp_path / ".train.lock").read_text())["process"] == process.pid  # it could not tidy up
    with locks.locked(tmp_path / "train", wait=False) as is_held:
        assert is_held
        assert json.loads((tmp_path / ".train.lock").read_text())["process"] == os.getpid()
    assert not heard.messages


def test_what_another_process_is_writing_is_not_overwritten(tmp_path: Path) -> None:
    process = holder(tmp_path / "train", 60)
    with pytest.raises(
        UserError, match=rf"^overwrite: got true, and process {process.pid} on .* is at {tmp_path}/train"
    ):
        locks.hold(tmp_path / "train", wait=False)
    process.kill()
    process.wait()
    locks.hold(tmp_path / "train", wait=False)


def test_a_lock_holds_though_its_folder_is_deleted_and_made_again(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    process = holder(tmp_path / "train", 60)
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with locks.locked(tmp_path / "train", wait=False) as is_held:
        assert not is_held
    process.kill()
    process.wait()


def test_a_process_that_has_a_lock_takes_it_again_and_keeps_it_to_the_outer_end(tmp_path: Path) -> None:
    locks.hold(tmp_path / "train", wait=True)
    with locks.locked(tmp_path / "train", wait=False) as is_held:
        assert is_held
    assert (tmp_path / ".train.lock").exists()
    locks.release(tmp_path / "train")
    assert not (tmp_path / ".train.lock").exists()


def test_many_processes_count_without_losing_one(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    assert (tmp_path / "counter").read_text() == "120"


def test_a_lock_is_no_way_to_write_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".train.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="train: cannot be written"), locks.locked(tmp_path / "train"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_file_system_without_locks_is_said_once(
    tmp_path: Path, heard: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    locks.warn_of_no_locks.cache_clear()
    for name in "ab":
        with locks.locked(tmp_path / name) as is_ours:
            assert is_ours
    assert [record.levelname for record in heard.records] == ["WARNING"]
    assert "the run's file system has no locks (No locks available)" in heard.text
