"""vp and ddpm against closed forms for Gaussian data, and against diffusers' own schedulers; all three on disk."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import nn

from mucs_cli.diffusion.checkpoint import load_denoiser, precondition, save_denoiser
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.sampler import sample, sample_ddim, sample_heun
from mucs_cli.diffusion.training import Trainer, TrainingSettings
from mucs_cli.diffusion.unet import UNet
from mucs_cli.diffusion.vp import VPDenoiser
from mucs_cli.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
    "trained betas": {"trained_betas": [0.001 * 1.02**i for i in range(100)], "num_train_timesteps": 100},
}
POSSIBLE = [(s, p) for s in SCHEDULES for p in PREDICTIONS if (s, p) != ("zero terminal SNR", "epsilon")]


def draws(count, shape=(1, 2, 2), seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Zero(nn.Module):
    def forward(self, sample, timestep, condition=None, augmentation=None):
        return torch.zeros_like(sample)


class Linear(nn.Module):
    """Some function of the input and the timestep, which records the timestep it was given."""

    def forward(self, sample, timestep, condition=None, augmentation=None):
        self.timestep = timestep
        return 0.3 * sample + 0.1 + timestep.view(-1, 1, 1, 1) * 1e-3


class Gaussian(nn.Module):
    """The best network for independent N(mean, std^2) pixels, from the posterior of image and noise given the input.

    ``levels`` maps a timestep to (a, b) of the input a image + b noise.
    """

    def __init__(self, levels, prediction_type="epsilon", mean=0.3, std=0.4):
        super().__init__()
        self.levels, self.prediction_type, self.mean, self.std = levels, prediction_type, mean, std

    def forward(self, sample, timestep, condition=None, augmentation=None):
        a, b = (x.view(-1, 1, 1, 1) for x in self.levels(timestep))
        excess = (sample - a * self.mean) / (a**2 * self.std**2 + b**2)
        image, noise = self.mean + a * self.std**2 * excess, b * excess
        return {"epsilon": noise, "v_prediction": a * noise - b * image, "sample": image}[self.prediction_type]


def gaussian_ddpm(prediction_type, **schedule):
    denoiser = DDPMDenoiser(Zero(), prediction_type=prediction_type, clip_sample_range=None, **schedule)
    denoiser.network = Gaussian(lambda t: denoiser.levels[:2, t], prediction_type)
    return denoiser


def gaussian_vp():
    denoiser = VPDenoiser(Zero())

    def levels(timestep):
        sigma = denoiser.sigma_at(timestep / 999)
        return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()

    denoiser.network = Gaussian(levels)
    return denoiser


# --- vp --------------------------------------------------------------------------------------------------------------


def test_vp_noise_level_and_its_time_are_the_formulas_of_the_edm_paper_and_inverses():
    denoiser = VPDenoiser(Zero())
    time = torch.tensor([1e-5, 1e-3, 0.1, 0.5, 1.0], dtype=torch.float64)
    expected = [math.sqrt(math.exp(19.9 * t * t / 2 + 0.1 * t) - 1) for t in time.tolist()]
    assert denoiser.sigma_at(time).tolist() == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(denoiser.time_at(denoiser.sigma_at(time)), time, rtol=1e-12, atol=0)
    torch.testing.assert_close(denoiser.time_at(denoiser.sigma_at(time).float()), time.float(), rtol=1e-5, atol=0)
    assert denoiser.sigma_max == pytest.approx(math.sqrt(math.exp(10.05) - 1))
    clipped = denoiser.nearest_sigma(torch.tensor([1e-9, 1.0, 1e9]))
    torch.testing.assert_close(clipped, torch.tensor([denoiser.sigma_min, 1.0, denoiser.sigma_max]))


def test_vp_loss_is_the_denoising_error_over_the_squared_noise_level_with_the_network_written_out():
    network = Linear()
    denoiser = VPDenoiser(network)
    image, noise = draws(4), draws(4, seed=1)
    sigma = torch.tensor([0.01, 0.5, 3.0, 100.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    noised = image + s * noise
    timestep = 999 * (torch.sqrt(0.1**2 + 2 * 19.9 * torch.log(1 + sigma**2)) - 0.1) / 19.9
    denoised = noised - s * (0.3 * noised / torch.sqrt(s**2 + 1) + 0.1 + timestep.view(-1, 1, 1, 1) * 1e-3)
    torch.testing.assert_close(denoiser(noised, sigma), denoised)
    torch.testing.assert_close(network.timestep, timestep)
    expected = (denoised - image).square().mean(dim=(1, 2, 3)) / sigma**2
    torch.testing.assert_close(denoiser.loss(image, noise, sigma), expected, rtol=1e-8, atol=0)


def test_vp_training_times_are_uniform_and_a_zero_output_loses_one():
    denoiser = VPDenoiser(Zero())
    sigma = denoiser.training_sigma(20_000, torch.Generator().manual_seed(0)).double()
    time = denoiser.time_at(sigma)
    assert float(time.min()) >= 1e-5
    assert float(time.max()) <= 1
    deciles = torch.quantile(time, torch.linspace(0.1, 0.9, 9, dtype=torch.float64))
    torch.testing.assert_close(deciles, torch.linspace(0.1, 0.9, 9, dtype=torch.float64), rtol=0, atol=0.015)
    loss = denoiser.loss(5 * draws(20_000), draws(20_000, seed=1), sigma)
    assert float(loss.mean()) == pytest.approx(1, abs=0.02)
    assert denoiser.null_loss(25.0) == 1


# --- ddpm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "prediction_type"), POSSIBLE)
def test_ddpm_loss_is_the_plain_error_that_diffusers_own_scheduler_gives(schedule, prediction_type):
    options = {"num_train_timesteps": 1000} | SCHEDULES[schedule]
    scheduler = DDPMScheduler(prediction_type=prediction_type, **options)
    network = Linear()
    denoiser = DDPMDenoiser(network, prediction_type=prediction_type, **options)
    last = options["num_train_timesteps"] - 1
    timestep = torch.tensor([0, 1, last // 2, last - 1, last])
    image, noise = draws(5).float(), draws(5, seed=1).float()
    noisy = scheduler.add_noise(image, noise, timestep)
    target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(image, noise, timestep), "sample": image}
    expected = (network(noisy, timestep) - target[prediction_type]).square().mean(dim=(1, 2, 3))
    sigma = denoiser.levels[2, timestep].float()
    assert bool(sigma[-1].isinf()) == (schedule == "zero terminal SNR")
    loss = denoiser.loss(image, noise, sigma)
    assert torch.equal(network.timestep, timestep)
    assert network.timestep.dtype == torch.int64
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert bool(loss.isfinite().all())


@pytest.mark.parametrize(("schedule", "prediction_type"), POSSIBLE)
def test_ddpm_denoiser_gives_the_image_that_diffusers_own_scheduler_predicts(schedule, prediction_type):
    options = {"num_train_timesteps": 1000} | SCHEDULES[schedule]
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, **options)
    network = Linear()
    denoiser = DDPMDenoiser(network, prediction_type=prediction_type, **options)
    z, last = draws(1), options["num_train_timesteps"] - 1
    for t in (3, last // 2, last):
        timestep = torch.tensor([t])
        expected = scheduler.step(network(z, timestep), t, z, generator=torch.Generator()).pred_original_sample
        a, b, sigma, _ = denoiser.levels[:, t]
        image, noise = denoiser.predict(z, timestep)
        torch.testing.assert_close(image, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a * image + b * noise, z)
        noised = z if a == 0 else z / a
        torch.testing.assert_close(denoiser(noised, sigma.view(1)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("schedule", "prediction_type"), POSSIBLE)
def test_ddpm_null_loss_of_a_zero_output_is_the_mean_over_the_timesteps(schedule, prediction_type):
    denoiser = DDPMDenoiser(Zero(), prediction_type=prediction_type, **SCHEDULES[schedule])
    image = draws(20_000).clamp(-1, 1) * 0.9 + 0.1
    sigma = denoiser.training_sigma(len(image), torch.Generator().manual_seed(3))
    loss = denoiser.loss(image, draws(20_000, seed=4), sigma)
    error = float(loss.std()) / math.sqrt(len(loss))
    assert error < 0.01
    assert denoiser.null_loss(float(image.square().mean())) == pytest.approx(float(loss.mean()), abs=4 * error)
    if prediction_type == "v_prediction":
        finite = denoiser.levels[2][denoiser.levels[2].isfinite()]
        plain = ((1 + finite**2 * 0.2) / (1 + finite**2)).sum() + 0.2 * denoiser.levels[2].isinf().sum()
        assert denoiser.null_loss(0.2) == pytest.approx(float(plain) / denoiser.num_train_timesteps)


def test_ddpm_training_levels_are_uniform_over_the_timesteps_with_infinity_among_them():
    denoiser = DDPMDenoiser(Zero(), 10, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    sigma = denoiser.training_sigma(5000, torch.Generator().manual_seed(0))
    counts = denoiser.timestep(sigma).bincount(minlength=10)
    assert int(counts.min()) > 420
    assert int(counts.max()) < 580
    assert int(sigma.isinf().sum()) == int(counts[9])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_level_finds_its_own_timestep_in_float32_and_others_the_nearest_in_log_sigma(schedule):
    denoiser = DDPMDenoiser(Zero(), prediction_type="sample", **SCHEDULES[schedule])
    levels = denoiser.levels[2]
    assert torch.equal(denoiser.timestep(levels.float()), torch.arange(len(levels)))
    sigma = (torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 14 - 7).exp()
    finite = levels[levels.isfinite()]
    nearest = (sigma.log()[:, None] - finite.log()[None]).abs().argmin(dim=1)
    assert torch.equal(denoiser.timestep(sigma), nearest)
    torch.testing.assert_close(denoiser.nearest_sigma(sigma), finite[nearest])
    assert float(denoiser.nearest_sigma(torch.tensor([torch.inf]))) == pytest.approx(float(finite[-1]))
    assert (denoiser.sigma_min, denoiser.sigma_max) == (float(finite[0]), float(finite[-1]))


def test_a_noise_bank_of_a_discrete_schedule_holds_its_finite_levels_nearest_to_the_grid():
    denoiser = DDPMDenoiser(Zero(), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    plain = draw_noise_bank(40, (1, 2, 2), grid="full")
    bank = draw_noise_bank(40, (1, 2, 2), grid="full", nearest_sigma=denoiser.nearest_sigma)
    assert torch.equal(bank.noise, plain.noise)
    assert bool(torch.isin(bank.sigma, denoiser.levels[2, :-1].float()).all())
    inside = (plain.sigma > denoiser.sigma_min) & (plain.sigma < denoiser.sigma_max)
    assert 20 < int(inside.sum()) < 40
    torch.testing.assert_close(bank.sigma[inside].log(), plain.sigma[inside].log(), rtol=0, atol=0.15)
    assert float(bank.sigma.min()) == pytest.approx(denoiser.sigma_min)


def test_zero_terminal_snr_is_refused_for_epsilon_however_it_is_asked_for():
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDPMDenoiser(Zero(), rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DDPMDenoiser(Zero(), 2, trained_betas=[0.5, 1.0])


# --- even levels ------------------------------------------------------------------------------------------------------


def test_even_levels_of_ddpm_are_those_of_evenly_spaced_timesteps_and_finite():
    denoiser = DDPMDenoiser(Zero())
    for count, expected in ((10, list(range(0, 1000, 100))), (3, [0, 333, 666]), (1, [0])):
        sigma = denoiser.even_sigma(count)
        assert sigma.dtype == torch.float32
        assert denoiser.timestep(sigma).tolist() == expected
        assert torch.equal(sigma, denoiser.levels[2, expected].float())
    ends_in_noise = DDPMDenoiser(Zero(), 10, prediction_type="sample", rescale_betas_zero_snr=True)
    assert ends_in_noise.timestep(ends_in_noise.even_sigma(10)).tolist() == [*range(9), 8]
    assert ends_in_noise.timestep(ends_in_noise.even_sigma(20)).tolist() == [*sorted([*range(9)] * 2), 8, 8]


def test_even_levels_of_edm_and_vp_are_the_middle_quantiles_of_what_they_train_with():
    edm, vp = EDMDenoiser(Zero(), p_mean=-0.5, p_std=1.1), VPDenoiser(Zero(), epsilon_s=0.1)
    for denoiser in (edm, vp):
        even = denoiser.even_sigma(5)
        assert even.dtype == torch.float32
        drawn = denoiser.training_sigma(40_000, torch.Generator().manual_seed(0))
        below = (drawn[None] < even[:, None]).double().mean(dim=1)
        torch.testing.assert_close(below, torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).double(), rtol=0, atol=0.01)
        assert bool(denoiser.even_sigma(100_000).isfinite().all())
    assert float(edm.even_sigma(1)) == pytest.approx(math.exp(-0.5))
    assert vp.time_at(vp.even_sigma(3)).tolist() == pytest.approx([0.25, 0.55, 0.85], rel=1e-5)


@pytest.mark.parametrize("denoiser", [EDMDenoiser(Zero()), VPDenoiser(Zero()), DDPMDenoiser(Zero())])
def test_no_levels_are_refused(denoiser):
    with pytest.raises(ValueError, match="count=0"):
        denoiser.even_sigma(0)


# --- Gaussian data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.7, 20.0])
def test_the_optimal_denoiser_of_gaussian_data_and_its_loss_have_their_closed_forms(sigma):
    mean, std = 0.3, 0.4
    image, noise = mean + std * draws(4000, (1, 4, 4)), draws(4000, (1, 4, 4), 1)
    models = [(gaussian_vp(), sigma, 1 / sigma**2)]
    for prediction_type in PREDICTIONS:
        denoiser = gaussian_ddpm(prediction_type)
        level = float(denoiser.nearest_sigma(torch.tensor([sigma], dtype=torch.float64)))
        weight = {"epsilon": 1 / level**2, "v_prediction": 1 + 1 / level**2, "sample": 1.0}[prediction_type]
        models.append((denoiser, level, weight))
    for denoiser, level, weight in models:
        levels = torch.full((4000,), level, dtype=torch.float64)
        noised = image + level * noise
        best = (std**2 * noised + level**2 * mean) / (std**2 + level**2)
        torch.testing.assert_close(denoiser(noised, levels), best, rtol=1e-6, atol=1e-6)
        variance = std**2 * level**2 / (std**2 + level**2)
        assert float(denoiser.loss(image, noise, levels).mean()) == pytest.approx(weight * variance, rel=0.02)


def test_at_infinite_noise_the_optimal_denoiser_is_the_mean_and_the_v_loss_the_variance():
    image, noise = 0.3 + 0.4 * draws(4000, (1, 4, 4)), draws(4000, (1, 4, 4), 1)
    for prediction_type in ("v_prediction", "sample"):
        denoiser = gaussian_ddpm(prediction_type, rescale_betas_zero_snr=True)
        sigma = torch.tensor([torch.inf], dtype=torch.float64)
        torch.testing.assert_close(denoiser(noise, sigma), torch.full_like(noise, 0.3))
        assert float(denoiser.loss(image, noise, sigma).mean()) == pytest.approx(0.16, rel=0.02)


def test_heun_on_vp_follows_the_exact_flow_of_gaussian_data_from_the_highest_level_the_model_has():
    denoiser, noise = gaussian_vp(), draws(64)
    image = sample(denoiser, noise, num_steps=128, sigma_max=1e4)
    high = denoiser.sigma_max
    exact = 0.3 + 0.4 / math.sqrt(0.16 + high**2) * (high * noise - 0.3)
    torch.testing.assert_close(image, exact, rtol=0, atol=3e-3)
    assert torch.equal(image, sample_heun(denoiser, noise, num_steps=128, sigma_max=high))


@pytest.mark.parametrize(("schedule", "prediction_type"), [p for p in POSSIBLE if p[0] != "trained betas"])
def test_ddim_follows_the_exact_flow_of_gaussian_data(schedule, prediction_type):
    denoiser, noise = gaussian_ddpm(prediction_type, **SCHEDULES[schedule]), draws(16)
    image = sample(denoiser, noise, num_steps=1000)
    a, b = denoiser.levels[:2, -1]
    exact = 0.3 + 0.4 * (noise - a * 0.3) / (a**2 * 0.16 + b**2).sqrt()
    torch.testing.assert_close(image, exact, rtol=0, atol=0.02)
    rough = sample(denoiser, noise, num_steps=20)
    assert 1e-3 < float((rough - exact).abs().max()) < 0.4


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize(("schedule", "prediction_type"), POSSIBLE)
def test_ddim_over_every_timestep_is_that_of_diffusers(schedule, prediction_type, clips):
    options = SCHEDULES[schedule] | {"num_train_timesteps": 100}
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=clips, clip_sample_range=0.8, **options)
    scheduler.set_timesteps(100)
    network, z = Linear(), draws(3)
    denoiser = DDPMDenoiser(
        network, prediction_type=prediction_type, clip_sample_range=0.8 if clips else None, **options
    )
    ours = sample(denoiser, z, num_steps=500)
    for t in scheduler.timesteps:
        z = scheduler.step(network(z, t.view(1)), t, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)
    assert float(ours.abs().max()) <= 0.8 or not clips


def test_guidance_of_ddim_moves_both_predictions_away_from_the_null_condition():
    class Labelled(nn.Module):
        def forward(self, sample, timestep, condition=None, augmentation=None):
            return condition.view(-1, 1, 1, 1).expand_as(sample)

    denoiser = DDPMDenoiser(Labelled(), 10, prediction_type="sample", clip_sample_range=None)
    noise, condition = draws(3), torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    null = torch.zeros_like(condition)
    torch.testing.assert_close(sample(denoiser, noise, condition, num_steps=4)[:, 0, 0, 0], condition)
    guided = sample(denoiser, noise, condition, null_condition=null, guidance=2.0, num_steps=4)
    torch.testing.assert_close(guided[:, 0, 0, 0], 2 * condition)
    with pytest.raises(ValueError, match="null condition"):
        sample_ddim(denoiser, noise, condition, guidance=2.0)


# --- on disk, and in training ----------------------------------------------------------------------------------------


def all_three(network):
    return [
        EDMDenoiser(network, 0.75, -0.8, 1.1, "v_prediction", 0.01, 50.0),
        EDMDenoiser(network),
        VPDenoiser(network, 18.0, 0.2, 500, 1e-4),
        DDPMDenoiser(network, 50, "squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True),
        DDPMDenoiser(network, 3, trained_betas=[0.1, 0.2, 0.3], clip_sample_range=None),
    ]


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_every_preconditioning_comes_back_from_disk_with_the_same_losses(kind, index, tmp_path):
    torch.manual_seed(0)
    if kind == "dit":
        network = DiT(8, 1, 2, 16, 1, 2, timestep_scale=1.0)
        nn.init.normal_(network.proj_out.weight)
    else:
        network = UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8, timestep_scale=1.0)
    denoiser = all_three(network.eval())[index]
    save_denoiser(tmp_path, denoiser, dict(network.named_parameters()))
    back = load_denoiser(tmp_path)
    image, noise = draws(3, (1, 8, 8)).float(), draws(3, (1, 8, 8), 1).float()
    sigma = denoiser.training_sigma(3, torch.Generator().manual_seed(0))
    assert type(back) is type(denoiser)
    assert back.facts() == denoiser.facts() == json.loads((tmp_path / "denoiser.json").read_text())
    assert torch.equal(back.loss(image, noise, sigma), denoiser.loss(image, noise, sigma))
    assert back.network.config.timestep_scale == 1.0
    shared = denoiser.loss(image, noise[:1], sigma[:1])
    expanded = denoiser.loss(image, noise[:1].expand(3, -1, -1, -1), sigma[:1].expand(3))
    torch.testing.assert_close(shared, expanded)


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"preconditioning": "ve"}, "'ve'; expected one of edm, vp, ddpm"),
        ({}, "None; expected one of"),
        ({"preconditioning": "edm", "sigma_data": -1}, "sigma_data=-1"),
        ({"preconditioning": "edm", "sigma_dta": 1}, "sigma_dta"),
        ({"preconditioning": "edm", "sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min"),
        ({"preconditioning": "vp", "beta_d": 0}, "beta_d"),
        ({"preconditioning": "ddpm"}, "scheduler"),
        ({"preconditioning": "ddpm", "scheduler": {"num_train_timesteps": 1}}, "at least 2"),
        ({"preconditioning": "ddpm", "scheduler": {"rescale_betas_zero_snr": True}}, "zero terminal SNR"),
    ],
)
def test_impossible_preconditionings_are_one_line_that_names_the_key(facts, match):
    with pytest.raises(UserError, match=match) as caught:
        precondition(Zero(), facts, "diffusion")
    assert str(caught.value).startswith("diffusion: ")


@pytest.mark.parametrize("name", ["vp", "ddpm"])
def test_our_own_training_lowers_the_loss_of_every_preconditioning(name):
    torch.manual_seed(0)
    network = DiT(4, 1, 2, 16, 1, 2, dropout=0.0, timestep_scale=1.0)
    denoiser = VPDenoiser(network) if name == "vp" else DDPMDenoiser(network, 100, prediction_type="v_prediction")
    trainer = Trainer(denoiser, TrainingSettings(num_steps=50, batch_size=64, learning_rate=1e-2))
    image = 0.5 + 0.05 * draws(64, (1, 4, 4)).float()
    losses = [trainer.update(image, None) for _ in range(50)]
    assert losses[0] == pytest.approx(denoiser.null_loss(float(image.square().mean())), rel=0.25)
    assert sum(losses[-10:]) / 10 < 0.6 * losses[0]
