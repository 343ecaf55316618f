"""unlearning.stack_size through the command line: the same models, saved as they stop, measured once a run."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import fails, mucs
from safetensors.torch import load_file
from torch import Tensor
from unlearning_runs import make_run, manifest_of

from mucs_cli.cli import main
from mucs_cli.stages import mirrored
from mucs_cli.stages import unlearn as unlearn_stage

NUM_QUERIES = 3
KEYS = [
    "unlearning.optimizer=sgd",  # a step of Adam is the gradient's sign, which rounding can turn
    "unlearning.learning_rate=0.02",
    "unlearning.forget_weight=3",
    "unlearning.null_loss=3",
    "unlearning.tolerance=0.7",
    "unlearning.max_steps=60",
    "unlearning.retain_batch_size=12",
    "unlearning.forget_batch_size=12",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, and its queries unlearned one at a time; no test changes it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "digits", num_queries=NUM_QUERIES)
    mucs("unlearn", f"run={run}", *KEYS)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy in which nothing is unlearned yet."""
    copied = Path(shutil.copytree(trained, tmp_path / "digits"))
    shutil.rmtree(copied / "unlearn")
    return copied


def unlearned_in(run: Path) -> Path:
    (folder,) = (run / "unlearn").iterdir()
    return folder


def log_of(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """query -> its lines, as they stand in the file."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {query: [line for line in lines if line["query"] == query] for query in range(NUM_QUERIES)}


def weights_of(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"query_{query:04d}.safetensors") for query in range(NUM_QUERIES)]


def assert_same_models(run: Path, trained: Path) -> None:
    mine, alone = unlearned_in(run), unlearned_in(trained)
    assert mine.name == alone.name
    records, expected = manifest_of(mine)["results"], manifest_of(alone)["results"]
    assert [r["query"] for r in records] == [0, 1, 2]
    for record, other in zip(records, expected, strict=True):
        assert (record["num_steps"], record["reached_bound"]) == (other["num_steps"], other["reached_bound"])
        assert record["query_loss"] == pytest.approx(other["query_loss"], rel=1e-3)
    for ours, theirs in zip(weights_of(mine), weights_of(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-5)
    for query, lines in log_of(alone).items():
        assert [line["step"] for line in log_of(mine)[query]] == [line["step"] for line in lines]
        for line, other in zip(log_of(mine)[query], lines, strict=True):
            assert line["forget_loss"] == pytest.approx(other["forget_loss"], rel=1e-3)
            assert line["retain_loss"] == pytest.approx(other["retain_loss"], rel=1e-3)


def test_the_queries_of_the_fixture_stop_at_different_steps(trained: Path) -> None:
    records = manifest_of(unlearned_in(trained))["results"]
    assert len({record["num_steps"] for record in records}) == NUM_QUERIES
    assert all(record["reached_bound"] for record in records)
    base = load_file(trained / "train" / "model" / "diffusion_pytorch_model.safetensors")
    for tensors in weights_of(unlearned_in(trained)):
        assert max(float((tensor - base[name]).abs().max()) for name, tensor in tensors.items()) > 1e-3


@pytest.mark.parametrize("size", [2, 3, 50])
def test_a_stack_leaves_the_same_models_under_the_same_name(
    size: int, run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("unlearn", f"run={run}", *KEYS, f"unlearning.stack_size={size}")
    assert_same_models(run, trained)
    assert manifest_of(unlearned_in(run))["stack_size"] == size
    capsys.readouterr()
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=1")
    assert "unlearn: up to date" in capsys.readouterr().err


def test_an_interruption_loses_only_the_queries_that_have_not_stopped(
    run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = min(manifest_of(unlearned_in(trained))["results"], key=lambda record: record["num_steps"])["query"]
    with monkeypatch.context() as patched:
        write = unlearn_stage.write_tensors
        written: list[Path] = []

        def interrupted(path: Path, tensors: dict[str, Tensor]) -> None:
            if written:
                raise KeyboardInterrupt
            written.append(path)
            write(path, tensors)

        patched.setattr(unlearn_stage, "write_tensors", interrupted)
        assert main(["unlearn", f"run={run}", *KEYS, "unlearning.stack_size=3"]) == 130
    kept = unlearned_in(run) / f"query_{first:04d}.safetensors"
    assert list(unlearned_in(run).glob("query_*")) == [kept]
    before = kept.stat().st_mtime_ns
    asked: list[int] = []
    whole = mirrored.MirroredUnlearner.source
    monkeypatch.setattr(
        mirrored.MirroredUnlearner, "source", lambda self, query: (asked.append(query), whole(self, query))[1]
    )
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=3")
    assert asked == [query for query in range(NUM_QUERIES) if query != first]
    assert kept.stat().st_mtime_ns == before
    assert_same_models(run, trained)


def test_a_stack_that_does_not_fit_is_halved(
    run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mirrored.unlearn_stacked

    def starved(denoiser: Any, trainable: Any, sources: Sequence[Any], *rest: Any, **keywords: Any) -> Any:
        if len(sources) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(denoiser, trainable, sources, *rest, **keywords)

    monkeypatch.setattr(mirrored, "unlearn_stacked", starved)
    capsys.readouterr()
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=4")
    assert "out of memory at unlearning.stack_size=4: going on with 2" in capsys.readouterr().err
    assert manifest_of(unlearned_in(run))["stack_size"] == 2
    assert_same_models(run, trained)


@pytest.mark.parametrize(("stacked_seconds", "chosen"), [(0.001, 3), (0.05, 1)])
def test_left_open_it_is_measured_once_and_kept_in_the_run(
    stacked_seconds: float, chosen: int, run: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []

    def seconds(denoiser: Any, trainable: Any, sources: Sequence[Any], settings: Any) -> float:
        measured.append(len(sources))
        return 0.01 if len(sources) == 1 else stacked_seconds

    monkeypatch.setattr(mirrored, "step_seconds", seconds)
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=null")
    assert measured == [1, 3]
    assert list(json.loads((run / "machine.json").read_text())["unlearning_stack_size"].values()) == [chosen]
    assert manifest_of(unlearned_in(run))["stack_size"] == chosen
    assert_same_models(run, trained)
    shutil.rmtree(run / "unlearn")
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=null")
    assert measured == [1, 3]


def test_measuring_for_real_changes_no_model(run: Path, trained: Path) -> None:
    mucs("unlearn", f"run={run}", *KEYS, "unlearning.stack_size=null")
    assert_same_models(run, trained)


def test_a_diverging_stack_names_the_query_and_the_learning_rate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "unlearn", f"run={run}", *KEYS, "unlearning.learning_rate=1e25", "unlearning.stack_size=3")
    assert line.startswith("mucs: error: unlearning.learning_rate: got a non-finite loss")
    assert " of query " in line
    assert "unlearning.stack_size: got 0" in fails(capsys, "unlearn", f"run={run}", "unlearning.stack_size=0")
