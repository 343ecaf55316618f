"""progress.jsonl: what a line holds, when it is written, and what a crash leaves of it; TensorBoard."""

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from commands import fails, mucs

from mucs_cli import runtime, tracking
from mucs_cli.rehearsal import rehearsing
from mucs_cli.runtime import Progress, stage_log

TRAIN = ["experiment=digits", "device=cpu", "data.limit=32", "training.num_steps=6", "training.batch_size=8"]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]


def loop(done: int, total: int) -> None:
    with Progress("count", total, "units", done) as progress:
        for number in range(done, total):
            progress.advance(numbers={"loss": number / 2, "retain_loss": None})


def test_a_line_has_the_time_the_pace_and_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    with stage_log(tmp_path):
        loop(1, 4)
    lines = lines_of(tmp_path)
    assert [line["done"] for line in lines] == [2, 3, 4]
    last = lines[-1]
    assert last.pop("rate") > 0
    assert datetime.fromisoformat(last.pop("time")).utcoffset() is not None
    assert last == {
        "title": "count",
        "total": 4,
        "done": 4,
        "unit": "units",
        "seconds_left": 0.0,
        "loss": 1.5,
        "retain_loss": None,
    }
    assert lines[0]["seconds_left"] >= 0


def test_between_two_log_lines_only_the_end_is_written_and_attempts_append(tmp_path: Path) -> None:
    for done in (0, 2):
        with stage_log(tmp_path):
            loop(done, 3)
            loop(3, 3)  # nothing to do, nothing to say
    with rehearsing(), stage_log(tmp_path):
        loop(0, 3)
    loop(0, 3)  # in no stage
    assert [line["done"] for line in lines_of(tmp_path)] == [3, 3]


def test_an_interrupted_loop_says_how_far_it_came(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stage_log(tmp_path), Progress("unlearn", 3, "queries") as progress:
        progress.advance(0, {"query": 0, "step": 7})
        raise KeyboardInterrupt
    assert [(line["done"], line["step"]) for line in lines_of(tmp_path)] == [(0, 7)]


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    assert tracking.last_line(tmp_path) == {}
    with stage_log(tmp_path):
        loop(0, 3)
    whole = (tmp_path / "progress.jsonl").read_bytes()
    (tmp_path / "progress.jsonl").write_bytes(whole + whole[:20])
    assert tracking.last_line(tmp_path)["done"] == 3
    with stage_log(tmp_path):
        loop(3, 5)
    first, cut, last = (tmp_path / "progress.jsonl").read_bytes().splitlines(keepends=True)
    assert (first, cut) == (whole, whole[:20] + b"\n")
    assert json.loads(last) == tracking.last_line(tmp_path)
    assert tracking.last_line(tmp_path)["done"] == 5


def test_a_folder_that_takes_no_line_stops_nothing(tmp_path: Path) -> None:
    with tracking.in_folder(tmp_path / "missing"):
        loop(0, 2)
    assert not (tmp_path / "missing").exists()


def test_the_rate_is_null_before_the_first_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    with stage_log(tmp_path), Progress("unlearn", 3, "queries", 1) as progress:
        progress.advance(0, {"query": 1})
        progress.advance(1)
    first, second = lines_of(tmp_path)
    assert first["rate"] is None and first["seconds_left"] is None
    assert second["rate"] > 0


def test_nothing_is_written_through_a_link_and_a_full_disk_stops_no_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    victim, folder = tmp_path / "victim", tmp_path / "train"
    folder.mkdir()
    victim.write_text("precious")
    (folder / "progress.jsonl").symlink_to(victim)
    monkeypatch.setattr(tracking, "_tracker", "tensorboard")
    monkeypatch.setattr(tracking.ProgressFolder, "_add_scalars", full)
    with tracking.in_folder(folder):
        loop(0, 2)
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    monkeypatch.setattr(tracking, "_tracker", "tensorboard")
    (tmp_path / "elsewhere").mkdir()
    (folder / "tensorboard").symlink_to(tmp_path / "elsewhere")
    with tracking.in_folder(folder):
        loop(0, 2)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_line_nested_beyond_measure_is_no_line(tmp_path: Path) -> None:
    (tmp_path / "progress.jsonl").write_text('{"done": 1}\n' + "[" * 100_000 + "\n")
    assert tracking.last_line(tmp_path) == {"done": 1}


def test_training_leaves_its_loss_and_the_status_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "digits"
    mucs("train", *TRAIN, f"run={run}")
    (line,) = lines_of(run / "train")
    assert (line["title"], line["done"], line["total"], line["unit"]) == ("train", 6, 6, "steps")
    rows = (run / "train" / "metrics.csv").read_text().splitlines()
    assert line["loss"] == pytest.approx(float(rows[-1].split(",")[1]), rel=1e-5)
    manifest = json.loads((run / "train" / "manifest.json").read_text())
    assert not {"progress.jsonl", "log.txt"} & manifest["outputs"].keys()
    (run / "train" / "manifest.json").rename(run / "train" / "state.json")
    capsys.readouterr()
    mucs("status", f"run={run}")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train ")]
    assert "unfinished, 6 of 6 steps" in row


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = fails(capsys, "train", *TRAIN, f"run={tmp_path / 'digits'}", "tracker=tensorboard")
    assert line.startswith("mucs: error: tracker: got tensorboard, which cannot be imported")
    assert "pip install 'mucs[tensorboard]'" in line
    assert not (tmp_path / "digits" / "train").exists()


def test_tensorboard_gets_the_same_numbers_and_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(runtime, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(tracking, "_tracker", "none")  # as it was, for the tests that follow
    plain, tracked = tmp_path / "plain", tmp_path / "tracked"
    mucs("train", *TRAIN, f"run={plain}")
    mucs("train", *TRAIN, f"run={tracked}", "tracker=tensorboard")
    assert not (plain / "train" / "tensorboard").exists()
    events = EventAccumulator(str(tracked / "train" / "tensorboard"))
    events.Reload()
    found = {event.step: event.value for event in events.Scalars("train/loss")}
    assert found == {line["done"]: pytest.approx(line["loss"]) for line in lines_of(tracked / "train")}
    assert len(found) == 6
    model = "train/model/diffusion_pytorch_model.safetensors"
    assert (plain / model).read_bytes() == (tracked / model).read_bytes()
    assert "tracker" not in json.loads((tracked / "run.json").read_text())["config"]
