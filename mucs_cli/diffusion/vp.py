"""The variance-preserving preconditioning: score-SDE's VP in the form that EDM gives it.

Song et al., arXiv 2011.13456; Karras et al., arXiv 2206.00364, table 1, column VP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from mucs_cli.diffusion.denoiser import mid_quantiles
from mucs_cli.diffusion.networks import Network


@dataclass(eq=False)
class VPDenoiser:
    """VP preconditioning of a network that predicts the noise.

    D(x; sigma) = x - sigma F(x/sqrt(sigma^2 + 1), (M - 1) t), with sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1).

    Args:
        network: called as ``network(sample, timestep, condition, augmentation)``.
        beta_d, beta_min: slope and start of the noise rate beta(t) = beta_d t + beta_min, t in [0, 1].
        num_timesteps: M, the range of the network's timestep.
        epsilon_s: shortest training time, in (0, 1).
    Raises:
        ValueError: a number is out of its range.
    """

    timestep_scale: ClassVar[float] = 1.0

    network: Network
    beta_d: float = 19.9
    beta_min: float = 0.1
    num_timesteps: int = 1000
    epsilon_s: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.beta_d > 0 and self.beta_min > 0 and self.num_timesteps > 1 and 0 < self.epsilon_s < 1):
            raise ValueError(f"impossible numbers {self.facts()}")

    def sigma_at(self, time: Tensor) -> Tensor:
        """Noise level at ``time`` in [0, 1]; same shape."""
        return (self.beta_d * time**2 / 2 + self.beta_min * time).expm1().sqrt()

    def time_at(self, sigma: Tensor) -> Tensor:
        """The inverse of ``sigma_at``, written so that no digits cancel at small sigma."""
        exponent = (sigma**2).log1p()
        return 2 * exponent / ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() + self.beta_min)

    @property
    def sigma_min(self) -> float:
        return float(self.sigma_at(torch.tensor(self.epsilon_s, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma_at(torch.tensor(1.0, dtype=torch.float64)))

    def _predicted_noise(
        self, noised: Tensor, sigma: Tensor, condition: Tensor | None, augmentation: Tensor | None = None
    ) -> Tensor:
        scale = (sigma.view(-1, 1, 1, 1) ** 2 + 1).rsqrt()
        timestep = (self.num_timesteps - 1) * self.time_at(sigma)
        output: Tensor = self.network(noised * scale, timestep, condition, augmentation)
        return output

    def __call__(self, noised: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        return noised - sigma.view(-1, 1, 1, 1) * self._predicted_noise(noised, sigma, condition)

    def loss(
        self,
        image: Tensor,
        noise: Tensor,
        sigma: Tensor,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """mean((D - image)^2)/sigma^2, which is mean((F - noise)^2); table 1 of the EDM paper, weight 1/sigma^2.

        Args:
            image: clean images in [-1, 1]; [B, C, H, W].
            noise: unit-variance noise; [B, C, H, W], or [1, C, H, W] shared by the batch.
            sigma: noise levels, > 0 and finite; [B], or [1] shared by the batch.
            condition, augmentation: passed to the network.
        Returns:
            [B], dimensionless; 1 for a network whose output is zero.
        """
        noised = image + sigma.view(-1, 1, 1, 1) * noise
        output = self._predicted_noise(noised, sigma, condition, augmentation)
        return (output - noise).square().mean(dim=(1, 2, 3))

    def training_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels at times uniform in (epsilon_s, 1); [count], float32."""
        time = torch.rand(count, generator=generator) * (1 - self.epsilon_s) + self.epsilon_s
        return self.sigma_at(time)

    def even_sigma(self, count: int) -> Tensor:
        """The levels at the quantiles (i + 1/2)/count of the training times."""
        return self.sigma_at(self.epsilon_s + (1 - self.epsilon_s) * mid_quantiles(count)).float()

    def nearest_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def null_loss(self, mean_square: float) -> float:
        """1 whatever the images are: the mean square of unit noise."""
        return 1.0

    def facts(self) -> dict[str, Any]:
        return {
            "preconditioning": "vp",
            "beta_d": self.beta_d,
            "beta_min": self.beta_min,
            "num_timesteps": self.num_timesteps,
            "epsilon_s": self.epsilon_s,
        }

    @classmethod
    def from_facts(cls, network: Network, facts: Mapping[str, Any]) -> Self:
        return cls(network, **{name: value for name, value in facts.items() if name != "preconditioning"})
