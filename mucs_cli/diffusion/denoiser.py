"""The denoiser: what every preconditioned model offers, and EDM's own preconditioning.

Karras et al., arXiv 2206.00364, table 1 and section 5. ``noise`` has unit variance, ``noised = image + sigma * noise``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from mucs_cli.diffusion.networks import Network


class Denoiser(Protocol):
    """What every model offers to samplers, unlearning and scoring."""

    network: Network

    timestep_scale: ClassVar[float]
    """What a network of ours multiplies this preconditioning's ``c_noise`` with: its ``timestep_scale``."""

    @property
    def sigma_min(self) -> float:
        """Lowest noise level the model was made for; 0 where there is no limit."""
        ...

    @property
    def sigma_max(self) -> float:
        """Highest finite noise level the model was made for; infinity where there is no limit."""
        ...

    def __call__(self, noised: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """D(noised; sigma, condition): [B, C, H, W] from noised [B, C, H, W], sigma [B] or [1]."""
        ...

    def loss(
        self,
        image: Tensor,
        noise: Tensor,
        sigma: Tensor,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """Weighted pixel-mean squared error per example, [B]; noise and sigma are given, never drawn inside."""
        ...

    def training_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` noise levels from the distribution the model is trained with; [count], float32, on the CPU."""
        ...

    def even_sigma(self, count: int) -> Tensor:
        """``count`` finite noise levels spread evenly through that distribution, lowest first.

        Returns:
            [count], float32, on the CPU.
        Raises:
            ValueError: ``count`` is below 1.
        """
        ...

    def nearest_sigma(self, sigma: Tensor) -> Tensor:
        """The finite noise levels nearest to ``sigma``, in log sigma, that the model can take; same shape and dtype."""
        ...

    def null_loss(self, mean_square: float) -> float:
        """Expected loss, over training noise levels, of a network whose output is zero."""
        ...

    def facts(self) -> dict[str, Any]:
        """The preconditioning as JSON values; ``preconditioning`` names it."""
        ...

    @classmethod
    def from_facts(cls, network: Network, facts: Mapping[str, Any]) -> Self:
        """The denoiser that ``facts`` describes; raises ValueError or TypeError where they describe none."""
        ...


def mid_quantiles(count: int) -> Tensor:
    """(i + 1/2)/count for i in 0..count-1: the middles of equal parts of (0, 1); [count], float64.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count={count}: expected at least 1")
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@dataclass(eq=False)
class EDMDenoiser:
    """EDM preconditioning of a network.

    D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), with c_skip = sd^2/(sigma^2 + sd^2),
    c_out = sigma sd/sqrt(sigma^2 + sd^2), c_in = 1/sqrt(sigma^2 + sd^2), c_noise = ln(sigma)/4.

    Args:
        network: called as ``network(sample, timestep, condition, augmentation)``.
        sigma_data: standard deviation sd of the training pixels, > 0.
        p_mean, p_std: training noise levels are log-normal, ln sigma ~ N(p_mean, p_std^2).
        prediction_type: ``epsilon`` as above; ``v_prediction`` for a network whose output has the opposite sign, which
            is what diffusers' EDM schedulers mean by it.
        sigma_min, sigma_max: noise levels the network was made for.
    Raises:
        ValueError: sigma_data or p_std is not positive, or another prediction type.
    """

    timestep_scale: ClassVar[float] = 250.0
    """c_noise spans about 2.6; sinusoids made for timesteps 0..1000 need a comparable range to resolve it."""

    network: Network
    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    prediction_type: str = "epsilon"
    sigma_min: float = 0.0
    sigma_max: float = math.inf

    def __post_init__(self) -> None:
        if not (self.sigma_data > 0 and self.p_std > 0):
            raise ValueError(f"sigma_data={self.sigma_data}, p_std={self.p_std}: both must be positive")
        if not 0 <= self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} must be below sigma_max={self.sigma_max}, and not negative")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type={self.prediction_type!r}: expected epsilon or v_prediction")

    def _output(self, *arguments: Tensor | None) -> Tensor:
        """F, with the sign of equation 7 of the EDM paper."""
        output: Tensor = self.network(*arguments)
        return output if self.prediction_type == "epsilon" else -output

    def __call__(self, noised: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        s = sigma.view(-1, 1, 1, 1)
        variance = s**2 + self.sigma_data**2
        output = self._output(noised * variance.rsqrt(), sigma.log() / 4, condition)
        return noised * (self.sigma_data**2 / variance) + output * (s * self.sigma_data * variance.rsqrt())

    def loss(
        self,
        image: Tensor,
        noise: Tensor,
        sigma: Tensor,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """w mean((D - image)^2) with w = (sigma^2 + sd^2)/(sigma sd)^2; equation 8 of the EDM paper.

        As w c_out^2 = 1, this is mean((F - target)^2) with target = (sigma image/sd - sd noise)/sqrt(sigma^2 + sd^2).
        That form loses no digits at small sigma, where D - image is a difference of nearly equal numbers.

        Args:
            image: clean images in [-1, 1]; [B, C, H, W].
            noise: unit-variance noise; [B, C, H, W], or [1, C, H, W] shared by the batch.
            sigma: noise levels, > 0 and finite; [B], or [1] shared by the batch.
            condition, augmentation: passed to the network.
        Returns:
            [B], dimensionless; about 1 for an untrained network when sd is the pixels' standard deviation.
        """
        s = sigma.view(-1, 1, 1, 1)
        scale = (s**2 + self.sigma_data**2).rsqrt()
        output = self._output((image + s * noise) * scale, sigma.log() / 4, condition, augmentation)
        target = image * (s * scale / self.sigma_data) - noise * (self.sigma_data * scale)
        return (output - target).square().mean(dim=(1, 2, 3))

    def training_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        return (torch.randn(count, generator=generator) * self.p_std + self.p_mean).exp()

    def even_sigma(self, count: int) -> Tensor:
        """The quantiles (i + 1/2)/count of the log-normal distribution."""
        return (torch.special.ndtri(mid_quantiles(count)) * self.p_std + self.p_mean).exp().float()

    def nearest_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self.sigma_min, self.sigma_max)

    def facts(self) -> dict[str, Any]:
        return {
            "preconditioning": "edm",
            "sigma_data": self.sigma_data,
            "p_mean": self.p_mean,
            "p_std": self.p_std,
            "prediction_type": self.prediction_type,
            "sigma_min": self.sigma_min,
            "sigma_max": None if math.isinf(self.sigma_max) else self.sigma_max,  # JSON has no infinity
        }

    @classmethod
    def from_facts(cls, network: Network, facts: Mapping[str, Any]) -> Self:
        values = {name: value for name, value in facts.items() if name != "preconditioning" and value is not None}
        return cls(network, **values)

    def null_loss(self, mean_square: float) -> float:
        """E over ln sigma ~ N(p_mean, p_std^2) of (sigma^2 m2/sd^2 + sd^2)/(sigma^2 + sd^2), which F = 0 has.

        Args:
            mean_square: m2, the mean squared pixel of the training images in [-1, 1].
        """
        return 1 + self._mean_noise_share() * (mean_square / self.sigma_data**2 - 1)

    def _mean_noise_share(self) -> float:
        """E[sigma^2/(sigma^2 + sd^2)] by the trapezoidal rule over +-8 standard deviations (exact to 1e-12)."""
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        share = torch.sigmoid(2 * (self.p_mean + self.p_std * z - math.log(self.sigma_data)))
        return float(torch.trapezoid(density * share, z))
