"""trak, dtrak, das, tracin and relative_if through the command line, against dense computations and by their limits."""

import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import mucs
from gradient_runs import (
    GRADIENT_METHODS,
    NUM_COPIES,
    NUM_DRAWS,
    NUM_IMAGES,
    NUM_QUERIES,
    QUICK,
    digits,
    make_planted_run,
    make_run,
    ranked_files,
    score,
    variants,
)
from safetensors.torch import load_file
from torch import Tensor

from mucs_cli.cli import main
from mucs_cli.composition import compose
from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.methods import METHODS
from mucs_cli.rng import generator
from mucs_cli.stages import feature_scorer
from mucs_cli.stages.context import Context
from mucs_cli.stages.work import Work

FEW = ["proj_out.weight", "proj_out.bias", "transformer_blocks.1.attn.to_out.weight"]
FEW_KEYS = ["method.trainable=patterns", "method.patterns=[proj_out.*,transformer_blocks.1.attn.to_out.weight]"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with queries, and no scores."""
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_run(tmp_path_factory.mktemp("planted"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command ends with."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mucs: error: ")]
    return line


# --- dense computations ----------------------------------------------------------------------------------------------


class Plain:
    """Gradients of one image under one draw at a time, in float64, from the files of a run."""

    def __init__(self, run: Path):
        self.denoiser = load_denoiser(run / "train" / "model")
        self.denoiser.network.double()
        named = dict(self.denoiser.network.named_parameters())
        self.parameters = [named[name] for name in named if name in FEW]
        quantiles = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
        levels = torch.distributions.Normal(self.denoiser.p_mean, self.denoiser.p_std).icdf(quantiles).exp()
        noise = [torch.randn(1, 8, 8, generator=generator(0, "feature_noise", t)) for t in range(NUM_DRAWS)]
        self.draws = [(level, eps.double()) for level, eps in zip(levels, noise, strict=True)]
        samples = load_file(run / "sample" / "samples.safetensors")
        self.queries = samples["image"].double(), samples["condition"]
        self.images = digits(NUM_IMAGES)

    def predictions(self, image: Tensor, label: Tensor) -> list[tuple[Tensor, Tensor]]:
        """eps_hat and the noise, of every draw."""
        found = []
        for level, noise in self.draws:
            noised = (image + level * noise)[None]
            denoised = self.denoiser(noised, level[None], label[None])
            found.append((((noised - denoised) / level)[0], noise))
        return found

    def features(
        self, of: tuple[Tensor, Tensor], value: Callable[[Tensor, Tensor], Tensor], unit: bool = False
    ) -> Tensor:
        rows = []
        for image, label in zip(*of, strict=True):
            row = torch.zeros(())
            for eps_hat, noise in self.predictions(image, label):
                parts = torch.autograd.grad(value(eps_hat, noise), self.parameters)
                gradient = torch.cat([part.flatten() for part in parts])
                row = row + (gradient / gradient.norm() if unit else gradient) / NUM_DRAWS
            rows.append(row)
        return torch.stack(rows)

    def residual(self) -> Tensor:
        with torch.no_grad():
            errors = [
                [(eps_hat - noise).square().mean() for eps_hat, noise in self.predictions(image, label)]
                for image, label in zip(*self.images, strict=True)
            ]
        return torch.tensor(errors).mean(dim=1).sqrt()


@pytest.fixture(scope="module")
def plain(finished: Path) -> Plain:
    return Plain(finished)


def inverse_kernel(phi: Tensor, damping: float) -> Tensor:
    """(Phi^T Phi + lambda I)^-1, [P, P], with lambda in units of the mean eigenvalue."""
    kernel = phi.T @ phi
    return torch.linalg.inv(kernel + damping * kernel.trace() / len(kernel) * torch.eye(len(kernel)))


LOSS: Callable[[Tensor, Tensor], Tensor] = lambda eps_hat, noise: (eps_hat - noise).square().mean()  # noqa: E731
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "trak": LOSS,
    "dtrak": lambda eps_hat, noise: eps_hat.square().mean(),
    "das": lambda eps_hat, noise: eps_hat.mean(),
    "tracin": LOSS,
    "relative_if": LOSS,
}


@pytest.mark.parametrize("method", VALUES)
def test_scores_equal_a_dense_computation_from_the_files_on_disk(method: str, run: Path, plain: Plain) -> None:
    value, unit, damping = VALUES[method], method == "das", 0.5
    phi, of_queries = plain.features(plain.images, value, unit), plain.features(plain.queries, value, unit)
    inverse = inverse_kernel(phi, damping)
    products = of_queries @ inverse @ phi.T
    if method == "das":
        leverage = (phi @ inverse * phi).sum(dim=1)
        expected = (products * plain.residual() / (1 - leverage)) ** 2
    elif method == "tracin":
        expected = of_queries @ phi.T
    else:
        expected = products / (inverse @ phi.T).norm(dim=0) if method == "relative_if" else products

    keys = [*FEW_KEYS, f"method.num_draws={NUM_DRAWS}"]  # so few parameters that nothing is projected
    found = score(run, method, *keys, *([] if method == "tracin" else [f"method.damping={damping}"])).double()
    assert found.shape == (NUM_QUERIES, NUM_IMAGES)
    assert float((found - expected).abs().max()) < 2e-4 * float(expected.abs().max())
    assert float(expected.std()) > 0


# --- every key -------------------------------------------------------------------------------------------------------

PAIRS: dict[str, tuple[list[str], list[str]]] = {
    "num_draws": ([], ["method.num_draws=2"]),
    "projection": ([], ["method.projection=gaussian"]),
    "num_projections": ([], ["method.num_projections=65"]),
    "nonzeros": ([], ["method.nonzeros=3"]),
    "trainable": ([], ["method.trainable=mlp"]),
    "num_blocks": (
        ["method.trainable=last_blocks", "method.num_blocks=1"],
        ["method.trainable=last_blocks", "method.num_blocks=2"],
    ),
    "patterns": (FEW_KEYS, ["method.trainable=patterns", "method.patterns=[proj_out.*]"]),
    "raw_output": ([], ["method.raw_output=true"]),
    "seed": ([], ["method.seed=1"]),
    "damping": ([], ["method.damping=0.2"]),
    "normalise": ([], ["method.normalise=false"]),
    "square": ([], ["method.square=false"]),
    "leverage": ([], ["method.leverage=false"]),
    "residual": ([], ["method.residual=none"]),
    "num_journey_steps": ([], ["method.num_journey_steps=2"]),
}
"""Settings that differ in one key alone."""
OF_DAS = {"raw_output": (["method.normalise=false"], ["method.normalise=false", "method.raw_output=true"])}


def pairs_of(method: str) -> dict[str, tuple[list[str], list[str]]]:
    """The pairs of all keys of a method that may change its scores."""
    keys = {f.name for f in fields(METHODS[method].schema) if f.metadata["affects_result"]} - {"name"}
    assert keys <= PAIRS.keys()
    return {key: (PAIRS | (OF_DAS if method == "das" else {}))[key] for key in sorted(keys)}


def differ(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) > 1e-3 * float(first.abs().max())


def test_no_pair_is_of_a_key_that_is_gone() -> None:
    assert PAIRS.keys() == {key for method in GRADIENT_METHODS for key in pairs_of(method)}


def test_every_key_of_trak_changes_its_scores(run: Path) -> None:
    scored: dict[tuple[str, ...], Tensor] = {}
    for key, pair in pairs_of("trak").items():
        for overrides in map(tuple, pair):
            if overrides not in scored:
                scored[overrides] = score(run, "trak", *QUICK, *overrides)
        assert differ(*(scored[tuple(overrides)] for overrides in pair)), key


@pytest.mark.parametrize("method", [m for m in GRADIENT_METHODS if m != "trak"])
def test_every_key_of_the_other_methods_changes_their_scores(method: str, run: Path) -> None:
    """Without composing the configuration anew for every key, which takes longer than the scores."""
    overrides = [f"run={run}", f"method={method}", "device=cpu", *QUICK]
    work = Work.load(Context.create("score", compose("score", overrides), overrides, run))

    def scores_with(keys: list[str]) -> Tensor:
        values = {key.removeprefix("method."): value for key, _, value in (text.partition("=") for text in keys)}
        given = {name: yaml.safe_load(value) for name, value in values.items()}
        config = replace(work.config, method=replace(work.config.method, **given))
        scorer = METHODS[method].scorer(replace(work, context=replace(work.context, config=config)))
        scorer.prepare()
        return scorer.load(work.queries.selected)

    for key, (first, second) in pairs_of(method).items():
        assert differ(scores_with(first), scores_with(second)), key


@pytest.mark.parametrize("residual", ["none", "code"])
def test_each_kind_of_residual_is_a_factor_of_the_training_image(residual: str, run: Path) -> None:
    keys = [*QUICK, "method.square=false"]
    ratio = score(run, "das", *keys) / score(run, "das", *keys, f"method.residual={residual}")
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    assert float(ratio[0].std()) > 1e-3


def test_the_micro_batch_size_changes_the_rounding_only(run: Path) -> None:
    whole = score(run, "trak", *QUICK)
    shutil.rmtree(run / "score")
    parts = score(run, "trak", *QUICK, "method.micro_batch_size=2")
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


# --- limits ----------------------------------------------------------------------------------------------------------


def test_much_damping_makes_trak_proportional_to_tracin(run: Path) -> None:
    damped = score(run, "trak", *QUICK, "method.damping=1e7").double()
    dots = score(run, "tracin", *QUICK).double()
    factor = (damped * dots).sum() / dots.square().sum()
    torch.testing.assert_close(damped, factor * dots, rtol=0, atol=1e-4 * float(damped.abs().max()))


@pytest.mark.parametrize("method", [m for m in GRADIENT_METHODS if m != "journey_trak"])
def test_copies_of_the_query_in_the_training_data_rank_first(method: str, planted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(planted, tmp_path / "run"))
    score(run, method, "method.num_projections=1024")
    ranked = ranked_files(run)
    assert len(ranked) == 60 + NUM_COPIES
    assert set(ranked[:NUM_COPIES]) == {f"copy_{i}.png" for i in range(NUM_COPIES)}


def test_a_unet_with_a_discrete_schedule_is_scored(tmp_path: Path) -> None:
    run = tmp_path / "unet"
    mucs(
        "run",
        "data=digits",
        "data.limit=40",
        "model=unet",
        "model.size=tiny",
        "diffusion=ddpm",
        "training.num_steps=20",
        "training.batch_size=16",
        "sampler.num_steps=3",
        "queries.num=2",
        "device=cpu",
        "stages=[train,sample]",
        f"run={run}",
    )
    for method in GRADIENT_METHODS:
        found = score(run, method, *QUICK)
        assert found.shape == (2, 40)
        assert float(found.std(dim=1).min()) > 0


# --- errors and warnings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["method.patterns=[nothing.*]", "method.trainable=patterns"], "method.patterns: got ['nothing.*']"),
        (["method.patterns=[proj_out.*]"], "method.patterns: got ['proj_out.*'] with method.trainable=all"),
        (["method.trainable=last_blocks"], "method.num_blocks: got None with method.trainable=last_blocks"),
        (["method.trainable=last_blocks", "method.num_blocks=3"], "method.num_blocks: got 3"),
        (["method.num_draws=0"], "method.num_draws: got 0; expected at least 1"),
        (["method.damping=-1"], "method.damping: got -1"),
    ],
)
def test_a_wrong_key_is_named_before_anything_is_computed(
    keys: list[str], expected: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in fails(capsys, "score", f"run={run}", "method=trak", *keys)
    assert not (run / "score").exists()


def test_a_kernel_that_does_not_fit_into_memory_is_refused_before_anything_is_computed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = feature_scorer.kernel_bytes(NUM_IMAGES, 64)
    monkeypatch.setattr(feature_scorer, "free_memory", lambda device: needed - 1)
    line = fails(capsys, "score", f"run={run}", "method=trak", *QUICK)
    assert "method.num_projections: got 64 dimensions for 40 training images" in line
    assert "Set at most 39," in line
    assert not (run / "score").exists()
    mucs("score", f"run={run}", "method=tracin", *QUICK)  # which has no kernel
    mucs("score", f"run={run}", "method=trak", f"method.num_draws={NUM_DRAWS}", "method.num_projections=39")


def test_a_singular_kernel_names_the_damping_and_leaves_the_features(
    planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(planted, tmp_path / "run"))  # with copies, features are linearly dependent
    keys = ["score", f"run={run}", "method=trak", "method.num_projections=1024"]
    line = fails(capsys, *keys, "method.damping=0")
    assert line.startswith("mucs: error: method.damping: got 0")
    features = next((run / "score" / "_features").rglob("features.safetensors"))
    before = features.stat().st_mtime_ns
    mucs(*keys, "method.damping=0.1")
    assert features.stat().st_mtime_ns == before


def test_leverages_close_to_one_are_counted_in_a_warning(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    score(run, "das", *QUICK, "method.num_projections=2048", "method.damping=1e-6")
    assert (
        f"warning: {NUM_IMAGES} of {NUM_IMAGES} training images have a leverage above 0.999" in capsys.readouterr().err
    )


def test_keys_without_effect_are_said_to_have_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    mucs("score", f"run={run}", "method=das", "method.projection=identity", "method.num_projections=5")
    assert "method.num_projections has no effect with method.projection=identity" in capsys.readouterr().err
    normalised = score(run, "das", *QUICK, "method.raw_output=true")
    assert "method.raw_output has no effect with method.normalise=true" in capsys.readouterr().err
    scale = float(normalised.abs().max())
    torch.testing.assert_close(score(run, "das", *QUICK), normalised, rtol=0, atol=1e-4 * scale)


def test_the_pictures_of_a_folder_have_no_trajectory(planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "score", f"run={planted}", "method=journey_trak")
    assert line.startswith("mucs: error: method: got journey_trak with queries from a folder")
    assert not variants(planted)
