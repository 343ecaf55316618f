"""Deterministic samplers: Heun's for continuous noise levels, DDIM for discrete ones.

Karras et al., arXiv 2206.00364, equation 5 and algorithm 1; Song et al., arXiv 2010.02502, equation 12 with eta = 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import Denoiser

OnStep = Callable[[Tensor, Tensor], None]
"""Told at every step: its noise level, [1], infinity included, and the predicted images, [B, C, H, W]."""


def karras_sigmas(position: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels at ``position`` in [0, 1], from sigma_max at 0 to sigma_min at 1; same shape, float64.

    sigma = (sigma_max^(1/rho) + position (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + position.double() * (low - high)) ** rho


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Tensor | None = None,
    *,
    null_condition: Tensor | None = None,
    guidance: float = 1.0,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Images from ``noise`` by the sampler that fits the model: ``sample_ddim`` for ddpm, else ``sample_heun``.

    The Karras grid is cut to the noise levels the model was made for; DDIM takes the schedule's own levels, so that
    sigma_min, sigma_max and rho have no effect there. Arguments, return value and errors as in ``sample_heun``.
    """
    guided = {"null_condition": null_condition, "guidance": guidance, "num_steps": num_steps, "on_step": on_step}
    if isinstance(denoiser, DDPMDenoiser):
        return sample_ddim(denoiser, noise, condition, **guided)  # type: ignore[arg-type]
    low, high = max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)
    return sample_heun(denoiser, noise, condition, **guided, sigma_min=low, sigma_max=high, rho=rho)  # type: ignore[arg-type]


@torch.inference_mode()
def sample_heun(
    denoiser: Denoiser,
    noise: Tensor,
    condition: Tensor | None = None,
    *,
    null_condition: Tensor | None = None,
    guidance: float = 1.0,
    num_steps: int = 32,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Solves the probability-flow equation from ``noise`` by Heun's second-order method, without added noise.

    Args:
        denoiser: D(x; sigma, condition).
        noise: unit-variance starting noise; [B, C, H, W].
        condition: the network's condition for every image, or None.
        null_condition: the "no condition" input; needed when guidance differs from 1.
        guidance: classifier-free guidance weight (arXiv 2207.12598); 1 for none.
        num_steps: noise levels, >= 1; costs 2 num_steps - 1 evaluations (twice that with guidance).
        sigma_min, sigma_max, rho: the Karras grid.
        on_step: told of every step's level and of D there, guidance included; what it is given is for inference only.
    Returns:
        Images in about [-1, 1]; [B, C, H, W], not clipped.
    Raises:
        ValueError: guidance without a null condition.
    """
    if guidance != 1 and null_condition is None:
        raise ValueError("guidance needs a null condition")

    def denoised(x: Tensor, sigma: Tensor) -> Tensor:
        conditional = denoiser(x, sigma, condition)
        if guidance == 1:
            return conditional
        return torch.lerp(denoiser(x, sigma, null_condition), conditional, guidance)

    position = torch.linspace(0, 1, num_steps, dtype=torch.float64) if num_steps > 1 else torch.zeros(1)
    levels = karras_sigmas(position, sigma_min, sigma_max, rho).to(noise)
    x = noise * levels[0]
    for i in range(num_steps):
        sigma = levels[i : i + 1]
        image = denoised(x, sigma)
        if on_step is not None:
            on_step(sigma, image)
        slope = (x - image) / sigma
        if i + 1 == num_steps:
            return x - sigma * slope
        step = levels[i + 1] - levels[i]
        predicted = x + step * slope
        next_sigma = levels[i + 1 : i + 2]
        next_slope = (predicted - denoised(predicted, next_sigma)) / next_sigma
        x = x + step * (slope + next_slope) / 2
    raise AssertionError("unreachable: num_steps >= 1")


@torch.inference_mode()
def sample_ddim(
    denoiser: DDPMDenoiser,
    noise: Tensor,
    condition: Tensor | None = None,
    *,
    null_condition: Tensor | None = None,
    guidance: float = 1.0,
    num_steps: int = 32,
    on_step: OnStep | None = None,
) -> Tensor:
    """Follows the schedule from its last level to its first without added noise, then takes the predicted image.

    z' = a' x0 + b' n, with x0 and n the predicted image and noise. Predicted images are clipped to the denoiser's
    ``clip_sample_range``. Starting at the last level is right for zero terminal SNR too, where x0 = -v or the sample.

    Args:
        denoiser: with a discrete schedule.
        noise: unit-variance starting noise; [B, C, H, W].
        condition, null_condition, guidance: as in ``sample_heun``.
        num_steps: evenly spaced timesteps, both ends included, >= 1; at most all of the schedule are taken.
        on_step: as in ``sample_heun``; the predicted images are those after clipping.
    Returns:
        Images in about [-1, 1]; [B, C, H, W].
    Raises:
        ValueError: guidance without a null condition.
    """
    if guidance != 1 and null_condition is None:
        raise ValueError("guidance needs a null condition")
    last = denoiser.num_train_timesteps - 1
    timesteps = torch.linspace(last, 0, min(num_steps, last + 1), dtype=torch.float64).round().long().to(noise.device)
    z = noise
    for i in range(len(timesteps)):
        image, predicted = denoiser.predict(z, timesteps[i : i + 1], condition)
        if guidance != 1:
            null_image, null_predicted = denoiser.predict(z, timesteps[i : i + 1], null_condition)
            image = torch.lerp(null_image, image, guidance)
            predicted = torch.lerp(null_predicted, predicted, guidance)
        if denoiser.clip_sample_range is not None:
            image = image.clamp(-denoiser.clip_sample_range, denoiser.clip_sample_range)
        if on_step is not None:
            on_step(denoiser.levels[2, timesteps[i : i + 1].cpu()].to(z), image)
        if i + 1 == len(timesteps):
            return image
        a, b = denoiser.scales(timesteps[i + 1 : i + 2], z)
        z = a * image + b * predicted
    raise AssertionError("unreachable: num_steps >= 1")
