"""journey_trak: the query's gradients along its own trajectory."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gradient_runs import NUM_DRAWS, NUM_IMAGES, NUM_QUERIES, QUICK, digits, make_run, score
from safetensors.torch import load_file, save_file
from torch import Tensor

from mucs_cli.artifacts import sha256_file, write_record
from mucs_cli.cli import main
from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.sampler import sample
from mucs_cli.records import CHECKSUM
from mucs_cli.rng import generator
from mucs_cli.stages.journey import chosen_steps

KEYS = ["method.trainable=patterns", "method.patterns=[proj_out.*]", f"method.num_draws={NUM_DRAWS}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mucs: error: ")]
    return line


def test_scores_equal_a_dense_computation_along_a_trajectory_written_out(run: Path) -> None:
    """Heun's method from each query's seed; at each of its four levels the loss at the predicted image noised anew."""
    denoiser = load_denoiser(run / "train" / "model")
    denoiser.network.double()
    parameters = [p for name, p in denoiser.network.named_parameters() if name.startswith("proj_out.")]
    noise = [torch.randn(1, 8, 8, generator=generator(0, "feature_noise", t)).double() for t in range(NUM_DRAWS)]
    quantiles = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.5) / NUM_DRAWS
    even = torch.distributions.Normal(denoiser.p_mean, denoiser.p_std).icdf(quantiles).exp()

    def gradient(image: Tensor, label: Tensor, sigmas: Tensor) -> Tensor:
        """Mean over the draws, at their levels."""
        total = torch.zeros(())
        for sigma, eps in zip(sigmas, noise, strict=True):
            denoised = denoiser((image + sigma * eps)[None], sigma[None], label[None])
            parts = torch.autograd.grad(((image - denoised) / sigma).square().mean(), parameters)
            total = total + torch.cat([part.flatten() for part in parts]) / NUM_DRAWS
        return total

    samples = load_file(run / "sample" / "samples.safetensors")
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = (high + torch.linspace(0, 1, 4, dtype=torch.float64) * (low - high)) ** 7
    of_queries = []
    for query in range(NUM_QUERIES):
        label, source = samples["condition"][query], torch.Generator().manual_seed(int(samples["seed"][query]))
        x = 80 * torch.randn(1, 8, 8, generator=source).double()
        row = torch.zeros(())
        for i, sigma in enumerate(levels):
            with torch.no_grad():
                predicted = denoiser(x[None], sigma[None], label[None])[0]
            row = row + gradient(predicted, label, sigma.expand(NUM_DRAWS)) / 4
            slope = (x - predicted) / sigma
            if i < 3:
                there = x + (levels[i + 1] - sigma) * slope
                with torch.no_grad():
                    ahead = denoiser(there[None], levels[i + 1][None], label[None])[0]
                x = x + (levels[i + 1] - sigma) * (slope + (there - ahead) / levels[i + 1]) / 2
        torch.testing.assert_close(predicted.clamp(-1, 1).float(), samples["image"][query], rtol=0, atol=1e-3)
        of_queries.append(row)
    phi = torch.stack([gradient(image, label, even) for image, label in zip(*digits(NUM_IMAGES), strict=True)])
    kernel = phi.T @ phi
    kernel += 0.5 * kernel.trace() / len(kernel) * torch.eye(len(kernel))
    expected = torch.stack(of_queries) @ torch.linalg.inv(kernel) @ phi.T

    found = score(run, "journey_trak", *KEYS, "method.damping=0.5").double()
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    ordinary = score(run, "trak", *KEYS, "method.damping=0.5").double()
    assert float((found - ordinary).abs().max()) > 0.1 * float(ordinary.abs().max())


@pytest.mark.parametrize("discrete", [False, True], ids=["heun", "ddim"])
def test_watching_the_sampler_changes_nothing_and_ends_with_the_image(finished: Path, discrete: bool) -> None:
    denoiser = load_denoiser(finished / "train" / "model")
    if discrete:
        torch.manual_seed(0)
        network = DiT(8, 1, 2, 16, 1, 2, num_classes=10, dropout=0.0, timestep_scale=1.0)
        denoiser = DDPMDenoiser(network.eval(), 50, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    noise, label = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([1, 2])
    seen: list[tuple[Tensor, Tensor]] = []
    watched = sample(denoiser, noise, label, num_steps=5, on_step=lambda *step: seen.append(step))
    assert torch.equal(watched, sample(denoiser, noise, label, num_steps=5))
    assert len(seen) == 5
    levels = torch.cat([sigma for sigma, _ in seen])
    assert bool((levels.diff() < 0).all())
    assert bool(levels[0].isinf()) if discrete else float(levels[0]) == pytest.approx(80)
    torch.testing.assert_close(seen[-1][1], watched, rtol=0, atol=1e-6)


def test_chosen_steps_are_evenly_spread() -> None:
    assert chosen_steps(18, 18) == list(range(18))
    assert chosen_steps(18, 1) == [9]
    assert chosen_steps(18, 3) == [3, 9, 15]


def test_more_steps_than_the_sampler_takes_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "score", f"run={run}", "method=journey_trak", "method.num_journey_steps=5")
    assert "method.num_journey_steps: got 5; expected at most 4" in line
    assert not (run / "score").exists()


def test_queries_that_do_not_lie_at_the_end_of_their_trajectory_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, manifest = run / "sample" / "samples.safetensors", run / "sample" / "manifest.json"
    tensors, before = load_file(path), sha256_file(path)
    tensors["image"][1] *= 0.5
    save_file(tensors, path)
    record = json.loads(manifest.read_text().replace(before, sha256_file(path)))
    write_record(manifest, {key: value for key, value in record.items() if key != CHECKSUM})
    line = fails(capsys, "score", f"run={run}", "method=journey_trak", *QUICK)
    assert line.startswith("mucs: error: query 1: got a trajectory that ends")
