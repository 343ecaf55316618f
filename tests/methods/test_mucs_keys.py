"""Every key of MUCS through the command line: none is dead, and none changes more than it says."""

import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import mucs
from safetensors.torch import load_file
from torch import Tensor
from unlearning_runs import attribute, make_run, manifest_of, scores_in, unlearned_of

from mucs_cli.methods.mucs import MUCSConfig
from mucs_cli.schemas import NoiseBankConfig, UnlearningConfig

SMALL = [
    "unlearning.max_steps=3",
    "unlearning.null_loss=5",  # out of reach: by default every run takes all its steps
    "unlearning.retain_batch_size=8",
    "unlearning.forget_batch_size=8",
    "noise_bank.num_draws=3",
    "score.batch_size=48",
]
TWO = "unlearning.num_steps=2"
LAST = "unlearning.trainable=last_blocks"
CHOSEN = "unlearning.trainable=patterns"
CHANGES: dict[str, list[tuple[list[str], list[str]]]] = {
    "unlearning.forget_weight": [([], ["unlearning.forget_weight=0.5"])],
    "unlearning.learning_rate": [([], ["unlearning.learning_rate=1e-3"])],
    "unlearning.optimizer": [
        ([], ["unlearning.optimizer=sgd"]),
        (["unlearning.weight_decay=0.5"], ["unlearning.weight_decay=0.5", "unlearning.optimizer=adam"]),
    ],
    "unlearning.weight_decay": [([], ["unlearning.weight_decay=0.5"])],
    "unlearning.retain_batch_size": [([], ["unlearning.retain_batch_size=12"])],
    "unlearning.forget_batch_size": [([], ["unlearning.forget_batch_size=12"])],
    "unlearning.null_loss": [
        *(([TWO], [TWO, f"unlearning.null_loss={bound}"]) for bound in ("auto", "closed_form", "monte_carlo")),
        ([TWO, "unlearning.null_loss=auto"], [TWO, "unlearning.null_loss=none"]),
    ],
    "unlearning.tolerance": [([], ["unlearning.tolerance=0.01"])],
    "unlearning.max_steps": [([], ["unlearning.max_steps=2"])],
    "unlearning.num_steps": [([], ["unlearning.num_steps=4"])],
    "unlearning.trainable": [
        ([], ["unlearning.trainable=attention"]),
        (["unlearning.trainable=all"], ["unlearning.trainable=all_but_bias"]),
    ],
    "unlearning.num_blocks": [([LAST, "unlearning.num_blocks=1"], [LAST, "unlearning.num_blocks=2"])],
    "unlearning.patterns": [
        ([CHOSEN, "unlearning.patterns=[proj_out.weight]"], [CHOSEN, "unlearning.patterns=[patch_embed.weight]"])
    ],
    "unlearning.schedule": [([], ["unlearning.schedule=grid"])],
    "unlearning.same_noise": [([], ["unlearning.same_noise=true"])],
    "unlearning.horizontal_flip": [([], ["unlearning.horizontal_flip=true"])],
    "unlearning.augmentation": [([], ["unlearning.augmentation=0.5"])],
    "unlearning.similarity_weight": [([], ["unlearning.similarity_weight=3"])],
    "unlearning.seed": [([], ["unlearning.seed=5"])],
    "noise_bank.num_draws": [([], ["noise_bank.num_draws=4"])],
    "noise_bank.grid": [([], [f"noise_bank.grid={grid}"]) for grid in ("exact", "full", "even")],
    "noise_bank.sigma_min": [([], ["noise_bank.sigma_min=0.1"])],
    "noise_bank.sigma_max": [([], ["noise_bank.sigma_max=40"])],
    "noise_bank.rho": [([], ["noise_bank.rho=5"])],
    "noise_bank.consistent": [([], ["noise_bank.consistent=false"])],
    "noise_bank.antithetic": [([], ["noise_bank.antithetic=true"])],
    "noise_bank.seed": [([], ["noise_bank.seed=5"])],
    "method.reducer": [
        ([], [f"method.reducer={name}"]) for name in ("ratio_of_means", "difference", "absolute_difference")
    ],
    "method.epsilon": [([], ["method.epsilon=0.1"])],
}
"""Key -> pairs of settings that differ in it alone; the first of a pair is the default where it is empty."""
WITHOUT_EFFECT = ("unlearning.micro_batch_size", "unlearning.stack_size", "method.name")
"""The other keys: the first two must not change anything, the last selects the method."""
SECTIONS: dict[str, type[Any]] = {"unlearning": UnlearningConfig, "noise_bank": NoiseBankConfig, "method": MUCSConfig}


class Runs:
    """Variants of one run, each made once."""

    def __init__(self, run: Path):
        self.run = run
        self.made: dict[tuple[str, ...], Path] = {}

    def variant(self, *keys: str) -> Path:
        if keys not in self.made:
            self.made[keys] = attribute(self.run, *dict.fromkeys([*without(SMALL, keys), *keys]))
        return self.made[keys]


def without(settings: list[str], keys: tuple[str, ...]) -> list[str]:
    """The settings that ``keys`` do not set again."""
    again = {key.partition("=")[0] for key in keys}
    return [setting for setting in settings if setting.partition("=")[0] not in again]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with one query."""
    return make_run(tmp_path_factory.mktemp("runs") / "digits", num_queries=1)


@pytest.fixture(scope="module")
def runs(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(Path(shutil.copytree(finished, tmp_path_factory.mktemp("shared") / "digits")))


def unlearned(folder: Path) -> dict[str, Tensor]:
    return load_file(unlearned_of(folder) / "query_0000.safetensors")


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() != second.keys() or any(not torch.equal(first[name], second[name]) for name in first)


def test_the_list_of_keys_is_complete() -> None:
    every = {f"{section}.{entry.name}" for section, schema in SECTIONS.items() for entry in fields(schema)}
    assert {*CHANGES, *WITHOUT_EFFECT} == every
    silent = {
        f"{section}.{entry.name}"
        for section, schema in SECTIONS.items()
        for entry in fields(schema)
        if not entry.metadata["affects_result"]
    }
    assert silent == {"unlearning.micro_batch_size", "unlearning.stack_size"}


@pytest.mark.parametrize("key", CHANGES)
def test_changing_the_key_changes_unlearned_models_and_scores_or_scores_alone(key: str, runs: Runs) -> None:
    for before, after in CHANGES[key]:
        first, second = runs.variant(*before), runs.variant(*after)
        assert not torch.equal(scores_in(first), scores_in(second)), after
        if key.startswith("unlearning."):
            assert unlearned_of(first) != unlearned_of(second)
            assert differ(unlearned(first), unlearned(second)), after
        else:
            assert unlearned_of(first) == unlearned_of(second)


def test_the_monte_carlo_bound_is_near_the_closed_form_and_not_the_same(runs: Runs) -> None:
    closed, drawn = (
        manifest_of(unlearned_of(runs.variant(TWO, f"unlearning.null_loss={bound}")))
        for bound in ("closed_form", "monte_carlo")
    )
    assert closed["null_loss"] != drawn["null_loss"]
    assert drawn["null_loss"] == pytest.approx(closed["null_loss"], rel=0.1)
    assert manifest_of(unlearned_of(runs.variant(TWO, "unlearning.null_loss=none")))["null_loss"] is None


def test_on_the_grid_the_noise_bank_makes_other_unlearned_models(runs: Runs) -> None:
    first = runs.variant("unlearning.schedule=grid")
    second = runs.variant("unlearning.schedule=grid", "noise_bank.num_draws=4")
    assert unlearned_of(first) != unlearned_of(second)
    assert differ(unlearned(first), unlearned(second))


def test_sizes_of_forward_passes_and_what_is_kept_leave_the_scores_as_they_are(
    runs: Runs, finished: Path, tmp_path: Path
) -> None:
    keys = ["unlearning.optimizer=sgd", "unlearning.learning_rate=0.1"]  # a step of Adam is the gradient's sign
    whole = runs.variant(*keys)
    again = Path(shutil.copytree(finished, tmp_path / "digits"))
    sizes = [
        "unlearning.micro_batch_size=3",
        "unlearning.stack_size=2",
        "score.batch_size=16",
        "score.memory_budget=1e-9",
        "score.keep_losses=true",
    ]
    parts = attribute(again, *without(SMALL, ("score.batch_size=16",)), *keys, *sizes)
    assert parts.name == whole.name
    for name, tensor in unlearned(whole).items():
        torch.testing.assert_close(unlearned(parts)[name], tensor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores_in(parts), scores_in(whole), rtol=1e-3, atol=1e-5)
    assert float(scores_in(whole).std()) > 1e-3
    assert manifest_of(parts)["block_size"] == 16


def test_the_variant_of_a_noise_bank_key_reuses_the_unlearned_models(runs: Runs) -> None:
    folder = unlearned_of(runs.variant())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    mucs(
        "run",
        f"run={runs.run}",
        "stages=[unlearn,score]",
        *without(SMALL, ("noise_bank.num_draws=6",)),
        "noise_bank.num_draws=6",
    )
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
