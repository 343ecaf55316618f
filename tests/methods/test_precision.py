"""``score.precision``: what it rounds, what it leaves alone, and where it is refused or of no effect."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import fails, mucs
from unlearning_runs import attribute, make_run, manifest_of, score, scores_in, unlearned_of, variants

from mucs_cli.runtime import matmul_precision, pick_device

KEYS = ["unlearning.num_steps=6", "unlearning.learning_rate=1e-3", "noise_bank.num_draws=6", "score.batch_size=16"]
ROUNDED = "score.precision=bfloat16"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def exact(run: Path) -> Path:
    return attribute(run, *KEYS)


@pytest.fixture(scope="module")
def rounded(run: Path, exact: Path) -> Path:
    return attribute(run, *KEYS, ROUNDED)


def test_bfloat16_is_a_variant_of_the_same_unlearned_models_with_nearly_the_same_scores(
    exact: Path, rounded: Path
) -> None:
    assert rounded.name == f"{exact.name}__precision-bfloat16"
    assert unlearned_of(rounded) == unlearned_of(exact)
    scores, near = scores_in(exact), scores_in(rounded)
    assert not torch.equal(scores, near)
    assert torch.corrcoef(torch.stack([scores.flatten(), near.flatten()]))[0, 1] > 0.99
    assert len(list((exact.parent / "_base").glob("*/losses.safetensors"))) == 2


def test_rounded_scores_do_not_depend_on_what_shares_a_pass(rounded: Path, run: Path, tmp_path: Path) -> None:
    """Casts of one model's weights must not be taken for another's."""
    again = Path(shutil.copytree(run, tmp_path / "digits"))
    shutil.rmtree(again / "score")
    apart = score(again, *KEYS, ROUNDED, "score.memory_budget=1e-9")
    assert torch.equal(apart, scores_in(rounded))


def test_a_race_ends_with_the_scores_of_its_precision(rounded: Path, run: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(run, tmp_path / "digits"))
    raced = attribute(again, *KEYS, ROUNDED, "score.mode=adaptive", "score.top_k=3", "score.group_k=3")
    assert "precision-bfloat16" in raced.name and "mode-adaptive" in raced.name
    for whole, found in zip(scores_in(rounded), scores_in(raced), strict=True):
        places = whole.argsort(descending=True, stable=True)[:3]
        assert found.argsort(descending=True, stable=True)[:3].tolist() == places.tolist()
        torch.testing.assert_close(found[places], whole[places], rtol=1e-5, atol=1e-5)


def test_a_later_command_without_the_key_is_of_float32(exact: Path, rounded: Path, run: Path) -> None:
    before = variants(run, "score")
    mucs("score", f"run={run}", *KEYS)
    assert variants(run, "score") == before
    assert "score" not in manifest_of(exact)["config"]


def test_tf32_is_refused_on_a_cpu_before_anything_is_computed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "score", f"run={run}", "noise_bank.num_draws=5", "score.precision=tf32", *KEYS[:2])
    assert line.endswith("score.precision: got tf32 on a CPU; only CUDA devices have it. Use float32 or bfloat16.")
    assert not any("tf32" in name for name in variants(run, "score"))


def test_a_method_that_compares_no_losses_says_that_it_has_no_effect(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("score", f"run={run}", "method=pixel", ROUNDED)
    assert "score.precision has no effect with method=pixel, which compares no losses" in capsys.readouterr().err
    assert "pixel" in variants(run, "score")


def test_convolutions_and_products_are_of_full_precision_unless_asked() -> None:

    device = pick_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    product = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with matmul_precision(device, "bfloat16"):
        assert (product @ product).dtype == torch.bfloat16
    with matmul_precision(device, "tf32"):
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
        assert (product @ product).dtype == torch.float32
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
