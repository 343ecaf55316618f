"""Jobs that share the queries of one variant out by ``queries.index``: files as one job leaves them."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import mucs
from interrupted import Killed, assert_same_files, calls_of, stop, stop_after

from mucs_cli import locks
from mucs_cli.artifacts import write_record
from mucs_cli.stage_folder import Stage
from mucs_cli.stages import engine, mirrored

REPOSITORY = Path(__file__).parents[2]
NUM_QUERIES = 4
TRAIN = [
    "experiment=digits",
    "device=cpu",
    "data.limit=64",
    "data.holdout=0",
    "model.width=16",
    "training.num_steps=40",
    "training.batch_size=16",
    "training.warmup_steps=5",
    "sampler.num_steps=2",
    f"queries.num={NUM_QUERIES}",
    "stages=[train,sample]",
]
UNLEARN = ["unlearning.num_steps=3", "unlearning.retain_batch_size=8", "unlearning.forget_batch_size=8"]
SCORE = [*UNLEARN, "noise_bank.num_draws=8", "score.batch_size=16"]
BOTH = [*SCORE, "stages=[unlearn,score]"]
RACE = ["score.mode=adaptive", "score.top_k=3"]
FIRST, SECOND = "queries.index=0:2", "queries.index=2:4"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and queries; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "base"
    mucs("run", f"run={run}", *TRAIN)
    return run


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All queries by one job, exactly and by races; no test changes it."""
    run = Path(shutil.copytree(base, tmp_path_factory.mktemp("runs") / "whole"))
    mucs("run", f"run={run}", *BOTH)
    mucs("score", f"run={run}", *SCORE, *RACE)
    return run


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


def assert_whole(run: Path, whole: Path, *folders: str) -> None:
    """As one job leaves it, and no slice is left."""
    for folder in folders:
        variants = [path.parent.relative_to(run) for path in run.glob(f"{folder}/[!_]*/manifest.json")]
        assert variants
        assert not list((run / folder).glob("_slices/*"))
        for variant in variants:
            assert_same_files(run, whole, str(variant))
            ours, theirs = (json.loads((place / variant / "manifest.json").read_text()) for place in (run, whole))
            assert ours.keys() == theirs.keys()
            assert ours["queries"] == theirs["queries"] and ours["counts"] == theirs["counts"]
            assert ours["outputs"].keys() == theirs["outputs"].keys()


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "mucs_cli", *arguments]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_slices_that_are_jobs_of_a_sweep_leave_what_one_job_leaves(launcher: str, run: Path, whole: Path) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher", reason="needs an extra")
    mode = RACE if launcher == "joblib" else []
    jobs = ["-m", "queries.index=0:2,2:4", f"hydra/launcher={launcher}"]
    sweep = start("run", f"run={run}", *BOTH, *mode, *jobs)
    _, said = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, said
    assert_whole(run, whole, "unlearn", "score")


@pytest.mark.parametrize("command", [["unlearn", *UNLEARN], ["score", *SCORE]])
def test_a_slice_is_computed_while_another_job_is_at_the_variant(
    command: list[str], run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command[0] == "score":
        mucs("unlearn", f"run={run}", *UNLEARN)
    (variant,) = [path.name for path in (whole / command[0]).glob("mucs*") if "adaptive" not in path.name]
    folder = run / command[0] / variant
    with locks.locked(folder):
        job = start(command[0], f"run={run}", *command[1:], FIRST)
        while not list(folder.parent.glob("_slices/*/manifest.json")):
            assert job.poll() is None
            time.sleep(0.02)
        assert not (folder / "manifest.json").exists()
    _, said = job.communicate(timeout=300)
    assert job.returncode == 0, said
    mucs(command[0], f"run={run}", *command[1:], SECOND)
    assert_whole(run, whole, command[0])


@pytest.mark.parametrize("mode", [[], RACE])
def test_a_slice_that_was_killed_goes_on_though_another_was_added_meanwhile(
    mode: list[str], run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, mirrored, "unlearn", 1, Killed)
        stop(Killed, "unlearn", f"run={run}", *UNLEARN, FIRST)
    mucs("unlearn", f"run={run}", *UNLEARN, SECOND)
    unlearned = calls_of(monkeypatch, mirrored, "unlearn")
    mucs("unlearn", f"run={run}", *UNLEARN, FIRST)
    assert len(unlearned) == 1

    name = "pair_losses" if mode else "losses"
    passes = calls_of(monkeypatch, engine.Engine, name)
    mucs("score", f"run={Path(shutil.copytree(run, run.parent / 'other'))}", *SCORE, *mode, FIRST)
    total = len(passes)
    with monkeypatch.context() as patched:
        stop_after(patched, engine.Engine, name, total - 2, Killed)
        stop(Killed, "score", f"run={run}", *SCORE, *mode, FIRST)
    passes.clear()
    mucs("score", f"run={run}", *SCORE, *mode, SECOND)
    passes.clear()
    mucs("score", f"run={run}", *SCORE, *mode, FIRST)
    assert 0 < len(passes) < total / 2
    assert_whole(run, whole, "unlearn", "score")


@pytest.mark.parametrize(("owner", "name", "calls"), [(Stage, "_finish", 1), (locks, "give_back", 1)])
def test_a_kill_while_a_slice_is_added_loses_nothing(
    owner: object, name: str, calls: int, run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["unlearn", *UNLEARN], ["score", *SCORE]):
        mucs(command[0], f"run={run}", *command[1:], SECOND)
        with monkeypatch.context() as patched:
            stop_after(patched, owner, name, calls, Killed)
            stop(Killed, command[0], f"run={run}", *command[1:], FIRST)
        locks.release_all()
        assert list((run / command[0]).glob("_slices/*/manifest.json"))
        mucs(command[0], f"run={run}", *command[1:], SECOND)  # which is there, though its files were being replaced
        with monkeypatch.context() as patched:
            stop_after(patched, mirrored, "unlearn", 0, Killed)
            stop_after(patched, engine.Engine, "losses", 0, Killed)
            mucs(command[0], f"run={run}", *command[1:], FIRST)
    assert_whole(run, whole, "unlearn", "score")


def test_slices_that_overwrite_keep_each_other(run: Path, whole: Path) -> None:
    mucs("run", f"run={run}", *BOTH, "queries.index=0")
    mucs("run", f"run={run}", "stages=[train,sample]", "training.learning_rate=1e-4", "overwrite=true")
    other = Path(shutil.copytree(run, run.parent / "other"))
    mucs("run", f"run={other}", *BOTH, "overwrite=true")
    for index in (FIRST, SECOND):
        mucs("run", f"run={run}", *BOTH, index, "overwrite=true")
    assert_whole(run, other, "unlearn", "score")


def test_a_slice_that_was_given_up_can_be_cleaned_once_the_variant_has_its_queries(
    run: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        stop_after(patched, mirrored, "unlearn", 1, Killed)
        stop(Killed, "unlearn", f"run={run}", *UNLEARN, FIRST)
    locks.release_all()
    mucs("status", f"run={run}", "clean=true")
    (left,) = (run / "unlearn" / "_slices").glob("[!.]*")
    assert (left / "state.json").exists()
    mucs("run", f"run={run}", *BOTH)
    mucs("status", f"run={run}", "clean=true")
    assert "that can be computed again" in capsys.readouterr().out
    assert not left.exists()
    assert_whole(run, whole, "unlearn")


def test_a_slice_of_another_model_or_that_a_command_is_at_is_not_cleaned(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def left() -> list[Path]:
        return list((run / "unlearn" / "_slices").glob("[!.]*"))

    mucs("unlearn", f"run={run}", *UNLEARN)
    mucs("run", f"run={run}", "stages=[train,sample]", "training.learning_rate=1e-4", "overwrite=true")
    manifest = next((run / "unlearn").glob("*/manifest.json"))
    with monkeypatch.context() as patched:
        stop_after(patched, mirrored, "unlearn", 1, Killed)
        stop(Killed, "unlearn", f"run={run}", *UNLEARN, FIRST, "overwrite=true")
    locks.release_all()
    # pictures of the two models can be equal: what they are of decides
    record, state = json.loads(manifest.read_text()), json.loads((left()[0] / "state.json").read_text())
    write_record(manifest, record | {"queries": record["queries"] | state["queries"]})
    mucs("status", f"run={run}", "clean=true")
    assert left()
    write_record(manifest, record | {key: state[key] for key in ("config", "inputs", "queries")})
    other = threading.Thread(target=locks.hold, args=(left()[0], False))
    other.start()
    other.join()
    mucs("status", f"run={run}", "clean=true")  # which ends by giving back all locks of this process
    assert left() and f"{left()[0]} is left: process" in capsys.readouterr().err
    mucs("status", f"run={run}", "clean=true")
    assert not left()
