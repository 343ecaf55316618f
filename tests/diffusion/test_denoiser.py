import math

import pytest
import torch
from torch import nn

from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.sampler import karras_sigmas, sample_heun
from mucs_cli.diffusion.unet import UNet


class Gaussian(nn.Module):
    """F of the best denoiser of independent N(mean, std^2) pixels, D = (std^2 x + sigma^2 mean)/(std^2 + sigma^2)."""

    def __init__(self, mean: float, std: float, sigma_data: float):
        super().__init__()
        self.mean, self.std, self.sigma_data = mean, std, sigma_data

    def forward(self, sample, timestep, condition=None, augmentation=None):
        sigma = (4 * timestep).exp().view(-1, 1, 1, 1)
        total = sigma**2 + self.sigma_data**2
        x = sample * total.sqrt()
        denoised = (self.std**2 * x + sigma**2 * self.mean) / (self.std**2 + sigma**2)
        return (denoised - self.sigma_data**2 / total * x) / (sigma * self.sigma_data / total.sqrt())


class Zero(nn.Module):
    def forward(self, sample, timestep, condition=None, augmentation=None):
        return torch.zeros_like(sample)


def draws(count, shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(count, *shape, generator=source, dtype=torch.float64)


def test_loss_is_the_edm_formula_with_weight_and_preconditioning_written_out():
    denoiser = EDMDenoiser(Gaussian(0.2, 0.4, 0.5), 0.5)
    image, noise = draws(6, (2, 4, 4)), draws(6, (2, 4, 4), 1)
    sigma = torch.tensor([0.002, 0.05, 0.5, 1.0, 10.0, 80.0], dtype=torch.float64)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    denoised = denoiser(image + sigma.view(-1, 1, 1, 1) * noise, sigma)
    expected = weight * (denoised - image).square().flatten(1).mean(1)
    torch.testing.assert_close(denoiser.loss(image, noise, sigma), expected, rtol=1e-9, atol=0)


def test_loss_of_the_optimal_denoiser_of_gaussian_data_has_its_closed_form():
    mean, std, sigma = 0.3, 0.4, 0.7
    image = mean + std * draws(4000, (1, 4, 4))
    loss = EDMDenoiser(Gaussian(mean, std, 0.5), 0.5).loss(
        image, draws(4000, (1, 4, 4), 1), torch.full((4000,), sigma, dtype=torch.float64)
    )
    posterior_variance = std**2 * sigma**2 / (std**2 + sigma**2)
    expected = (sigma**2 + 0.25) / (sigma * 0.5) ** 2 * posterior_variance
    assert float(loss.mean()) == pytest.approx(expected, rel=0.02)


def test_shared_noise_and_sigma_equal_the_same_ones_repeated_for_every_image():
    torch.manual_seed(0)
    network = DiT(8, 1, 2, 16, 1, 2).double().eval()
    nn.init.normal_(network.proj_out.weight)
    denoiser = EDMDenoiser(network, 0.5)
    image, noise, sigma = draws(5, (1, 8, 8)), draws(1, (1, 8, 8), 1), torch.tensor([0.4], dtype=torch.float64)
    shared = denoiser.loss(image, noise, sigma)
    repeated = denoiser.loss(image, noise.expand(5, -1, -1, -1), sigma.expand(5))
    torch.testing.assert_close(shared, repeated)
    assert shared.shape == (5,)
    assert shared.std() > 0


@pytest.mark.parametrize(("sigma_data", "p_mean"), [(0.5, -1.2), (0.75, -1.2 + math.log(1.5))])
def test_null_loss_of_a_zero_output_matches_monte_carlo(sigma_data, p_mean):
    denoiser = EDMDenoiser(Zero(), sigma_data, p_mean)
    image = draws(20_000, (1, 2, 2)).clamp(-1, 1) * 0.9 + 0.1
    mean_square = float(image.square().mean())
    sigma = denoiser.training_sigma(len(image), torch.Generator().manual_seed(3)).double()
    loss = denoiser.loss(image, draws(20_000, (1, 2, 2), 4), sigma)
    error = float(loss.std()) / math.sqrt(len(loss))
    assert denoiser.null_loss(mean_square) == pytest.approx(float(loss.mean()), abs=4 * error)
    assert error < 0.01


def test_null_loss_has_the_known_coefficient_and_is_one_where_the_pixels_have_sigma_data():
    denoiser = EDMDenoiser(Zero(), 0.5)
    assert denoiser.null_loss(0.25) == pytest.approx(1, abs=1e-12)
    assert denoiser.null_loss(0.5) == pytest.approx(1 + 0.3661, abs=1e-4)


def test_a_fresh_dit_has_the_closed_form_null_loss_and_a_fresh_unet_has_not():
    image, noise = draws(4, (1, 8, 8)).float(), draws(4, (1, 8, 8), 1).float()
    sigma = torch.full((4,), 0.5)
    zero = EDMDenoiser(Zero(), 0.5).loss(image, noise, sigma)
    dit = EDMDenoiser(DiT(8, 1, 2, 16, 1, 2).eval(), 0.5).loss(image, noise, sigma)
    unet_network = UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8).eval()
    unet = EDMDenoiser(unet_network, 0.5).loss(image, noise, sigma)
    torch.testing.assert_close(dit, zero)
    assert not torch.allclose(unet, zero, rtol=1e-3)
    assert DiT.zero_initialised_head
    assert not UNet.zero_initialised_head


def test_heun_sampler_maps_noise_to_gaussian_data_as_the_exact_flow_does():
    mean, std = 0.3, 0.4
    denoiser = EDMDenoiser(Gaussian(mean, std, 0.5), 0.5)
    noise = draws(64, (1, 4, 4))
    image = sample_heun(denoiser, noise, num_steps=128)
    scale = std / math.sqrt(std**2 + 80.0**2)
    exact = mean + scale * (80.0 * noise - mean)
    torch.testing.assert_close(image, exact, rtol=0, atol=3e-3)


def test_heun_converges_with_second_order():
    denoiser = EDMDenoiser(Gaussian(0.3, 0.4, 0.5), 0.5)
    noise = draws(16, (1, 4, 4))
    exact = 0.3 + 0.4 / math.sqrt(0.16 + 6400) * (80.0 * noise - 0.3)
    errors = [float((sample_heun(denoiser, noise, num_steps=n) - exact).abs().max()) for n in (16, 32)]
    assert errors[0] / errors[1] > 3


def test_guidance_of_one_needs_no_null_condition_and_two_extrapolates_away_from_it():
    class Constant(nn.Module):
        """Denoises everything to its condition."""

        def __call__(self, noised, sigma, condition):
            return condition.view(-1, 1, 1, 1).expand_as(noised)

    noise, condition = draws(3, (1, 2, 2)), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    plain = sample_heun(Constant(), noise, condition, num_steps=4)
    guided = sample_heun(
        Constant(), noise, condition, null_condition=torch.zeros(3).double(), guidance=2.0, num_steps=4
    )
    torch.testing.assert_close(plain[:, 0, 0, 0], condition)
    torch.testing.assert_close(guided[:, 0, 0, 0], 2 * condition)
    with pytest.raises(ValueError, match="null condition"):
        sample_heun(Constant(), noise, condition, guidance=2.0)


def test_karras_grid_runs_from_sigma_max_to_sigma_min():
    sigma = karras_sigmas(torch.linspace(0, 1, 18), 0.002, 80.0, 7.0)
    assert float(sigma[0]) == pytest.approx(80)
    assert float(sigma[-1]) == pytest.approx(0.002)
    assert (sigma.diff() < 0).all()
