"""score.keep_losses: variants that differ in scoring only need no forward pass, and get the same bits."""

import shutil
from pathlib import Path

import pytest
import torch
from commands import mucs
from unlearning_runs import attribute, make_run, scores_in

from mucs_cli.diffusion.networks import TransformerBlock
from mucs_cli.stages import engine

MUCS = ["unlearning.num_steps=2", "noise_bank.num_draws=3", "score.batch_size=16"]
ABU = [
    "method=abu",
    "method.num_batches=1",
    "method.forget_batch_size=8",
    "method.fisher_passes=1",
    "method.num_draws=3",
    "score.batch_size=16",
]
KEEP = "score.keep_losses=true"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every block of images that goes through a model."""
    whole, calls = engine.bank_losses, []

    def counted(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "bank_losses", counted)
    return calls


@pytest.mark.parametrize("keys", [[*MUCS], [*MUCS, "noise_bank.consistent=false"], ABU])
def test_kept_losses_give_the_scores_of_a_fresh_computation_bit_for_bit(
    keys: list[str], run: Path, tmp_path: Path
) -> None:
    fresh = Path(shutil.copytree(run, tmp_path / "fresh"))
    kept = attribute(run, *keys, KEEP)
    plain = attribute(fresh, *keys)
    assert kept.name == plain.name  # keeping them is no part of what the scores are
    assert (kept / "scores.safetensors").read_bytes() == (plain / "scores.safetensors").read_bytes()
    assert (run / "score" / "_losses").is_dir()
    assert not (fresh / "score" / "_losses").exists()


@pytest.mark.parametrize("again", [[], [KEEP]])
def test_another_reducer_needs_no_forward_pass(
    again: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Path(shutil.copytree(run, tmp_path / "fresh"))
    first = attribute(run, *MUCS, KEEP)
    calls = count_passes(monkeypatch)
    reduced = attribute(run, *MUCS, "method.reducer=difference", *again)
    damped = attribute(run, *MUCS, "method.epsilon=0.5", *again)
    assert not calls
    anew = attribute(fresh, *MUCS, "method.reducer=difference")
    assert len(calls) == 2 * 3  # blocks of the base model; a block is one call for both queries
    assert torch.equal(scores_in(reduced), scores_in(anew))
    assert not torch.equal(scores_in(reduced), scores_in(first))
    assert not torch.equal(scores_in(damped), scores_in(first))


def test_queries_that_share_the_frozen_part_of_the_network_score_as_each_alone(run: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    last = [*MUCS, "unlearning.trainable=last_blocks", "unlearning.num_blocks=1"]
    mucs("run", f"run={run}", "stages=[unlearn]", *last)
    mucs("run", f"run={alone}", "stages=[unlearn]", *last)
    blocks, whole = [], TransformerBlock.forward

    def counted(self: TransformerBlock, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        blocks.append(len(x))
        return whole(self, x, embedding)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TransformerBlock, "forward", counted)
        together = attribute(run, *last)
        num_shared = blocks.count(16)
        blocks.clear()
        one_by_one = attribute(alone, *last, "score.memory_budget=1e-9")
    assert torch.equal(scores_in(together), scores_in(one_by_one))
    assert num_shared == 3 * 3 * (
        2 + 1 + 2
    )  # blocks of images, draws; the base model's 2, the first one, the last twice
    assert blocks.count(16) == 3 * 3 * (2 + 2 + 2)


def test_the_mirror_images_of_abu_are_kept_as_well(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute(run, *ABU, KEEP)
    calls = count_passes(monkeypatch)
    attribute(run, *ABU, "method.flip=false")
    assert not calls


def test_other_unlearned_models_and_another_bank_do_not_share_them(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attribute(run, *MUCS, KEEP)
    calls = count_passes(monkeypatch)
    attribute(run, *MUCS, "unlearning.forget_weight=0.5")
    assert len(calls) == 3  # the base model's losses are there
    attribute(run, *MUCS, "noise_bank.seed=4")
    assert len(calls) == 3 + 6


def test_a_query_without_kept_losses_is_computed_beside_those_with(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Path(shutil.copytree(run, tmp_path / "fresh"))
    mucs("run", f"run={run}", "stages=[unlearn,score]", *MUCS, KEEP, "queries.index=1")
    calls = count_passes(monkeypatch)
    both = attribute(run, *MUCS, "method.reducer=difference")
    assert len(calls) == 3  # for query 0
    assert torch.equal(scores_in(both), scores_in(attribute(fresh, *MUCS, "method.reducer=difference")))


def test_damaged_kept_losses_are_computed_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scores_in(attribute(run, *MUCS, KEEP))
    paths = sorted((run / "score" / "_losses").glob("*/losses.safetensors"))
    assert len(paths) == 2
    paths[0].write_bytes(paths[0].read_bytes()[:-4])
    calls = count_passes(monkeypatch)
    attribute(run, *MUCS, "method.reducer=difference")
    assert len(calls) == 3
    again = attribute(run, *MUCS, "method.epsilon=0.001001")
    torch.testing.assert_close(scores_in(again), first, rtol=1e-3, atol=1e-6)
