"""Karras noise levels and the deterministic Heun sampler (Karras et al., arXiv 2206.00364, equation 5, algorithm 1)."""

import torch
from torch import Tensor

from mucs_cli.diffusion.denoiser import Denoiser


def karras_sigmas(position: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Noise levels at ``position`` in [0, 1], from sigma_max at 0 to sigma_min at 1; same shape, float64.

    sigma = (sigma_max^(1/rho) + position (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho.
    """
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + position.double() * (low - high)) ** rho


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
        slope = (x - denoised(x, sigma)) / sigma
        if i + 1 == num_steps:
            return x - sigma * slope
        step = levels[i + 1] - levels[i]
        predicted = x + step * slope
        next_sigma = levels[i + 1 : i + 2]
        next_slope = (predicted - denoised(predicted, next_sigma)) / next_sigma
        x = x + step * (slope + next_slope) / 2
    raise AssertionError("unreachable: num_steps >= 1")
