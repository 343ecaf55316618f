"""The noise bank: one frozen, ordered set of draws (sigma, noise) under which models are compared.

Every image, query and model sees the same draws, so that a difference of losses is a difference of models (MUCS,
arXiv 2605.17938). The bank depends on its settings and the image shape only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mucs_cli.diffusion.sampler import karras_sigmas
from mucs_cli.rng import generator

TRUNCATION = 0.7
"""Share of the Karras grid, from the noisy end, that the method's release draws from."""


@dataclass(frozen=True, eq=False)
class NoiseBank:
    """sigma: [n], float32, > 0; noise: [n, C, H, W], float32, unit variance."""

    sigma: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.sigma)

    def to(self, device: torch.device) -> "NoiseBank":
        return NoiseBank(self.sigma.to(device), self.noise.to(device))


def grid_positions(num_draws: int, grid: str) -> Tensor:
    """Positions on the Karras grid, 0 at sigma_max and 1 at sigma_min, in grid order; [n], float64.

    ``truncated`` is the release's: the first n of a grid of m = floor(n/0.7) levels, s_j = j/(m - 1). Its end depends
    on n (0.702 of the way at n = 100, all of it at n = 2). ``exact`` ends at 0.7 for every n, ``full`` at 1.

    Raises:
        ValueError: another grid name, or no draws.
    """
    if num_draws < 1:
        raise ValueError("a bank needs at least one draw")
    if grid == "truncated":
        levels = math.floor(num_draws / TRUNCATION)
        return torch.arange(num_draws, dtype=torch.float64) / max(levels - 1, 1)
    if grid in ("exact", "full"):
        return torch.linspace(0, TRUNCATION if grid == "exact" else 1.0, num_draws, dtype=torch.float64)
    raise ValueError(f"unknown grid {grid!r}")


def spanning_order(count: int) -> list[int]:
    """0..count-1 in van der Corput (bit-reversed) order, of which every prefix is spread over the whole range."""
    bits = max(count - 1, 1).bit_length()
    reversed_bits = (int(f"{j:0{bits}b}"[::-1], 2) for j in range(2**bits))
    return [j for j in reversed_bits if j < count]


def draw_noise_bank(
    num_draws: int,
    image_shape: tuple[int, int, int],
    *,
    grid: str = "truncated",
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    seed: int = 0,
    antithetic: bool = False,
    nearest_sigma: Callable[[Tensor], Tensor] | None = None,
    even_sigma: Callable[[int], Tensor] | None = None,
) -> NoiseBank:
    """Draws a bank on the CPU.

    Args:
        num_draws: n.
        image_shape: (C, H, W).
        grid, sigma_min, sigma_max, rho: noise levels, see ``grid_positions`` and ``karras_sigmas``.
        seed: the noise of grid index j comes from the stream ("noise", j), whatever n and the order are.
        antithetic: grid indices 2i and 2i + 1 share the noise of 2i, the second with the opposite sign: what is odd in
            the noise nearly cancels in the mean of two losses.
        nearest_sigma: the denoiser's own; maps the grid to levels the model can take, so that several draws may share
            one. None for a model that takes every level.
        even_sigma: the denoiser's own; gives the levels of the grid ``even``, to which the other settings do not apply.
    Raises:
        ValueError: an unknown grid, or ``even`` without ``even_sigma``.
    """
    if grid == "even" and even_sigma is not None:
        sigma = even_sigma(num_draws)
    else:
        sigma = karras_sigmas(grid_positions(num_draws, grid), sigma_min, sigma_max, rho)
        if nearest_sigma is not None:
            sigma = nearest_sigma(sigma)
        sigma = sigma.float()
    if antithetic:  # the two of a pair one after the other: a prefix of the bank has whole pairs
        order = [j for i in spanning_order(math.ceil(num_draws / 2)) for j in (2 * i, 2 * i + 1) if j < num_draws]
    else:
        order = spanning_order(num_draws)

    def noise_of(j: int) -> Tensor:
        if antithetic and j % 2:
            return -noise_of(j - 1)
        return torch.randn(image_shape, generator=generator(seed, "noise", j))

    return NoiseBank(sigma[order], torch.stack([noise_of(j) for j in order]))
