"""method=forward_inf through the command line: its limits, against plain autograd, and what it finds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import fails, mucs
from safetensors.torch import load_file
from unlearning_runs import (
    NUM_IMAGES,
    UNET,
    attribute,
    bank_of,
    base_model,
    image_gradients,
    make_run,
    manifest_of,
    parameters_of,
    query_gradient,
    score,
    scores_in,
    unlearned_of,
)

from mucs_cli.attribution import unlearning_models

SMALL = ["method=forward_inf", "noise_bank.num_draws=3", "score.batch_size=48", "method.forget_batch_size=20"]
ONE_STEP = [*SMALL, "method.num_steps=1", "method.optimizer=sgd"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with two queries; every test adds variants of its own."""
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_small_plain_step_gives_the_dot_products_of_gradients(kind: str, run: Path, tmp_path: Path) -> None:
    if kind == "unet":
        run = make_run(tmp_path / "unet", UNET, num_steps=60)
    rate = 1e-4
    folder = attribute(run, *ONE_STEP, f"method.learning_rate={rate}")
    measured = scores_in(folder).double() / rate
    names = manifest_of(unlearned_of(folder))["trainable"]
    denoiser = base_model(run)
    parameters = parameters_of(denoiser, names)
    assert len(names) == len(list(denoiser.network.parameters()))
    of_images = image_gradients(denoiser, bank_of(folder), parameters)
    assert of_images.shape[0] == NUM_IMAGES
    for query in range(2):
        expected = of_images @ query_gradient(run, query, names, copies=20)
        torch.testing.assert_close(measured[query], expected, rtol=0.02, atol=0.01 * float(expected.abs().max()))
        assert float(expected.std()) > 0.1 * float(expected.abs().max())


def test_no_step_moves_no_loss(run: Path) -> None:
    assert torch.count_nonzero(score(run, *SMALL, "method.num_steps=0")) == 0


def test_it_equals_mucs_without_retain_term_and_bound_under_the_plain_difference(run: Path) -> None:
    """The retain term is weighed down to a millionth; with same_noise both methods draw the same for the query."""
    folder = attribute(run, *ONE_STEP, "method.learning_rate=1e-3")
    keys = {
        "same_noise": "true",
        "retain_batch_size": 16,
        "forget_batch_size": 20,
        "forget_weight": "1e6",
        "learning_rate": "1e-9",
        "optimizer": "sgd",
        "weight_decay": 0,
        "null_loss": "none",
        "num_steps": 1,
        "trainable": "all",
    }
    mirrored = score(
        run,
        *(f"unlearning.{key}={value}" for key, value in keys.items()),
        *SMALL[1:3],
        "method.reducer=difference",
    )
    own = scores_in(folder)
    torch.testing.assert_close(own, mirrored, rtol=1e-3, atol=1e-6)
    assert float(own.std()) > 1e-4


def test_the_query_loss_rises_and_is_on_record(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    folder = attribute(run, *SMALL, "method.num_steps=5")
    said = capsys.readouterr().err
    records = manifest_of(unlearned_of(folder))["results"]
    assert [record["query"] for record in records] == [0, 1]
    for record in records:
        assert record["query_loss"] > record["base_query_loss"] > 0
        assert f"query loss {record['base_query_loss']:.3f} to {record['query_loss']:.3f}" in said
        assert record["num_steps"] == 5
        assert record["reached_bound"] is None
    steps = [json.loads(line) for line in (unlearned_of(folder) / "log.jsonl").read_text().splitlines()]
    assert len(steps) == 10
    assert {step["retain_loss"] for step in steps} == {None}


def test_keys_of_scoring_share_the_unlearned_models_and_the_base_losses(run: Path) -> None:
    plain = attribute(run, *ONE_STEP, "method.learning_rate=1e-2")
    absolute, skewed, damped = (
        attribute(run, *ONE_STEP, "method.learning_rate=1e-2", *keys)
        for keys in (
            ["method.reducer=absolute_difference"],
            ["method.reducer=skew"],
            ["method.reducer=skew", "method.epsilon=0.5"],
        )
    )
    assert {unlearned_of(folder) for folder in (plain, absolute, skewed, damped)} == {unlearned_of(plain)}
    assert torch.equal(scores_in(absolute), scores_in(plain).abs())
    assert float(scores_in(plain).min()) < 0
    assert not torch.equal(scores_in(skewed), scores_in(plain))
    assert float(scores_in(damped).abs().sum()) < float(scores_in(skewed).abs().sum())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "1e-3"),
        ("num_steps", 3),
        ("optimizer", "sgd"),
        ("weight_decay", 0.5),
        ("forget_batch_size", 12),
        ("trainable", "mlp"),
        ("seed", 9),
    ],
)
def test_every_key_of_unlearning_changes_unlearned_models_and_scores(key: str, value: object, run: Path) -> None:
    base = [*SMALL[:3], "method.forget_batch_size=8", "method.num_steps=2"]
    default = run / "score" / "forward_inf__method.forget_batch_size-8__method.num_steps-2__num_draws-3"
    if not default.exists():
        assert attribute(run, *base) == default
    folder = attribute(run, *base, f"method.{key}={value}")
    assert unlearned_of(folder) != unlearned_of(default)
    old, new = (load_file(unlearned_of(f) / "query_0000.safetensors") for f in (default, folder))
    assert any(name not in new or not torch.equal(tensor, new[name]) for name, tensor in old.items())
    assert not torch.equal(scores_in(default), scores_in(folder))


def test_a_smaller_micro_batch_changes_nothing_but_rounding(run: Path) -> None:
    keys = ["method=forward_inf", "method.optimizer=sgd", "method.learning_rate=1e-2", "method.num_steps=2"]
    mucs("unlearn", f"run={run}", *keys, "method.seed=3")
    (folder,) = (run / "unlearn").glob("*method.seed-3*")
    whole = load_file(folder / "query_0001.safetensors")
    shutil.rmtree(folder)
    mucs("unlearn", f"run={run}", *keys, "method.seed=3", "method.micro_batch_size=7")
    parts = load_file(folder / "query_0001.safetensors")
    base = load_file(run / "train" / "model" / "diffusion_pytorch_model.safetensors")
    for name, tensor in parts.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(tensor, base[name], rtol=1e-4, atol=1e-5) for name, tensor in parts.items())


def test_the_report_shows_it(run: Path) -> None:
    folder = attribute(run, *SMALL, "method.num_steps=4")
    mucs("report", f"run={run}", "report.k=3")
    page = (run / "report" / "index.html").read_text()
    assert folder.name in page
    assert f"Unlearning of {folder.name}" in page


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["method.learning_rate=1e30", "method.optimizer=sgd"], "method.learning_rate: got a non-finite loss"),
        (["method.trainable=patterns", "method.patterns=[nothing]"], "method.patterns: got ['nothing']; no parameter"),
        (["method.patterns=[ff]"], "method.patterns: got ['ff'] with method.trainable=all; expected patterns exactly"),
        (["method.trainable=last_blocks"], "method.num_blocks: got None with method.trainable=last_blocks"),
        (["method.trainable=last_blocks", "method.num_blocks=9"], "method.num_blocks: got 9; num_blocks=9, and the"),
        (["method.num_steps=-1"], "method.num_steps: got -1; expected at least 0"),
        (["method.learning_rate=0"], "method.learning_rate: got 0.0; expected more than 0"),
    ],
)
def test_wrong_values_are_named(keys: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "unlearn", f"run={run}", SMALL[0], *keys).startswith(f"mucs: error: {message}")


def test_running_out_of_memory_names_the_methods_own_key(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starved(*arguments: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(unlearning_models, "batch_losses", starved)
    line = fails(capsys, "unlearn", f"run={run}", SMALL[0], "method.seed=78")
    assert line.startswith("mucs: error: method.micro_batch_size: got out of memory at 1, the smallest batch.")


def test_scoring_before_unlearning_names_the_missing_stage(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "score", f"run={run}", *SMALL, "method.seed=77")
    assert "no such stage; expected a finished `mucs unlearn`" in line
