"""Several processes at one command, started by torchrun on the CPU, against one process."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, mucs
from safetensors.torch import load_file
from torch import Tensor

from mucs_cli import processes
from mucs_cli.cli import main
from mucs_cli.diffusion.training import Trainer

REPOSITORY = Path(__file__).parents[2]
NUM_QUERIES = 4
TRAINING = [
    "device=cpu",
    "data=digits",
    "data.limit=72",
    "model=dit",
    "model.dropout=0",
    "model.width=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.conditional=true",
    "diffusion=edm_auto",
    "training.batch_size=25",
    "training.num_steps=20",
    "training.warmup_steps=4",
    "training.learning_rate=4e-3",
    "checkpoint.every_seconds=1e-6",
]
UNLEARN = ["unlearning.num_steps=12", "unlearning.retain_batch_size=24", "unlearning.forget_batch_size=24"]
BLOCKS = ["score.batch_size=16", "score.memory_budget=0.01"]
SWEEP = [*UNLEARN, *BLOCKS, "noise_bank.num_draws=20", "score.top_k=3", "method=mucs,das", "score.mode=exact,adaptive"]
"""Exact scores, races, and gradient features, of which the last mode changes nothing."""
LDS = [
    *UNLEARN,
    *BLOCKS,
    "noise_bank.num_draws=6",
    "score.keep_losses=true",
    "evaluation=lds",
    "evaluation.num_subsets=4",
    "evaluation.num_draws=8",
    "evaluation.num_resamples=100",
]
TIMEOUT = 300


def start(count: int, *arguments: str) -> "subprocess.Popen[str]":
    """The command in that many processes of torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen(
        [*launcher, "-m", "mucs_cli", *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_by(count: int, *arguments: str) -> None:
    """The same, to its end; it says how many processes there are."""
    process = start(count, *arguments)
    _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, err
    assert f"{count} processes" in err.splitlines()


def worker(process: "subprocess.Popen[str]", rank: int) -> int:
    """The process id of one of torchrun's processes."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no process {rank}")


def tensors_in(run: Path) -> dict[tuple[str, str], tuple[torch.dtype, torch.Size, bytes]]:
    """The bits of all results below a folder, by file and name of the tensor; files' metadata are in no order."""
    return {
        (path.relative_to(run).as_posix(), name): (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
        for path in sorted(run.rglob("*.safetensors"))
        if "checkpoint" not in path.parts
        for name, tensor in load_file(path).items()
    }


def manifest_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return record


def copy(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained by one process, and its queries; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "base"
    mucs("run", *TRAINING, f"queries.num={NUM_QUERIES}", "sampler.num_steps=4", "stages=[train,sample]", f"run={run}")
    return run


@pytest.fixture(scope="module")
def shared(base: Path) -> tuple[Path, Path, int, str]:
    """A sweep by one process and by three, whose last unlearning diverges; exit code and stderr of the latter."""
    one, three = copy(base, base.parent / "one"), copy(base, base.parent / "three")
    command = ["run", "-m", "unlearning.learning_rate=null,1e30", "stages=[unlearn,score]", *SWEEP]
    assert main([*command, f"run={one}"]) == 2
    process = start(3, *command, f"run={three}")
    _, err = process.communicate(timeout=TIMEOUT)
    return one, three, process.returncode, err


def test_scores_races_and_features_of_three_processes_are_those_of_one_to_the_bit(
    shared: tuple[Path, Path, int, str],
) -> None:
    one, three, _, err = shared
    assert "3 processes" in err.splitlines()
    assert tensors_in(three) == tensors_in(one)
    scored = {path.parent.name: manifest_of(path.parent) for path in (three / "score").glob("*/scores.safetensors")}
    assert len(scored) == 3 and all(manifest["processes"] == 3 for manifest in scored.values())
    (races,) = [manifest["races"].values() for manifest in scored.values() if "races" in manifest]
    assert any(not race["is_exact"] for race in races)
    (unlearned,) = (three / "unlearn").glob("*/manifest.json")
    assert manifest_of(unlearned.parent)["processes"] == 3
    assert (unlearned.parent / "log.jsonl").read_text().count("\n") == NUM_QUERIES * 12
    (features,) = (three / "score" / "_features").glob("*/features.safetensors")
    assert load_file(features)["feature"].abs().amax(dim=1).min() > 0  # every block was computed


def test_an_error_of_one_process_ends_all_of_them_with_one_line(shared: tuple[Path, Path, int, str]) -> None:
    _, _, code, err = shared
    (line,) = [line for line in err.splitlines() if line.startswith("mucs: ")]
    assert line.startswith("mucs: error: unlearning.learning_rate: got a non-finite loss")
    assert "exitcode  : 2" in err and code == 1  # ours, and torchrun's own


def test_what_three_processes_began_until_one_was_killed_two_finish_to_the_bits_of_one(
    base: Path, tmp_path: Path
) -> None:
    one, several = copy(base, tmp_path / "one"), copy(base, tmp_path / "several")
    command = ["run", "stages=[unlearn,score,evaluate]", *LDS]
    mucs(*command, f"run={one}")
    killed = start(3, *command, f"run={several}")
    deadline = time.monotonic() + TIMEOUT
    while not list(several.glob("unlearn/*/query_*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(worker(killed, 1), signal.SIGKILL)
    killed.communicate(timeout=TIMEOUT)
    assert killed.returncode != 0
    assert not (several / "evaluate" / "lds" / "manifest.json").exists()

    run_by(2, *command, f"run={several}")
    assert tensors_in(several) == tensors_in(one)
    results = [(run / "evaluate" / "lds" / "results.json").read_text() for run in (one, several)]
    assert results[0] == results[1]
    assert len(list((several / "retrain").glob("*/manifest.json"))) == 4
    for folder in (several / "evaluate" / "lds", *(several / "score").glob("mucs*")):
        assert manifest_of(folder)["processes"] == 2


def losses_of(run: Path) -> list[float]:
    with (run / "train" / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_two_processes_train_as_one_does_from_the_start_and_from_its_checkpoint_and_so_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer.update

    def interrupted(trainer: Trainer, image: Tensor, condition: Tensor | None) -> float:
        if trainer.step == 10:
            raise KeyboardInterrupt
        return update(trainer, image, condition)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        assert main(["train", *TRAINING, f"run={tmp_path / 'resumed-0.0'}"]) == 130
    runs = ",".join(f"{tmp_path / name}-${{model.dropout}}" for name in ("fresh", "again", "resumed"))
    run_by(2, "train", "-m", *TRAINING, f"run={runs}", "model.dropout=0,0.3")
    for name, step in (("fresh", 0), ("resumed", 10)):
        run = tmp_path / f"{name}-0.0"
        assert manifest_of(run / "train")["processes"] == 2
        assert losses_of(run) == pytest.approx(losses_of(base), abs=1e-4)
        assert losses_of(run)[:step] == losses_of(base)[:step]
        assert losses_of(run)[step:] != losses_of(base)[step:]  # sums in another order: it is no copy
    assert "going on from step 10" in (tmp_path / "resumed-0.0" / "train" / "log.txt").read_text()
    for dropout in ("0.0", "0.3"):
        fresh, again = (tensors_in(tmp_path / f"{name}-{dropout}" / "train" / "model") for name in ("fresh", "again"))
        assert again == fresh
    assert losses_of(tmp_path / "fresh-0.3") != losses_of(tmp_path / "fresh-0.0")


@pytest.mark.parametrize("length", [0, 1, 5, 24, 25])
def test_the_parts_of_a_batch_are_the_whole_batch_in_order(length: int) -> None:
    parts = []
    for rank in range(3):
        with processes.seeing(processes.View(3, rank)):
            parts.append(list(range(length))[processes.part_of(length)])
    assert [row for part in parts for row in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'; expected how many processes there are."),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR: is not set, with WORLD_SIZE=2."),
    ],
)
def test_a_launcher_that_says_nonsense_is_named(
    variables: dict[str, str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert line in fails(capsys, "train", *TRAINING, f"run={tmp_path / 'run'}")


def test_accelerates_launcher_starts_the_command_and_what_it_starts_is_said(base: Path, tmp_path: Path) -> None:
    run = copy(base, tmp_path / "run")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
            *("-m", "mucs_cli", "score", f"run={run}", "method=random"),
        ],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count = manifest_of(run / "score" / "random")["processes"]
    assert count in (1, 2)  # accelerate 1.15 makes one on CPUs
    said = "1 process: its launcher was asked for one, or makes no more on CPUs" if count == 1 else "2 processes"
    assert said in done.stderr
