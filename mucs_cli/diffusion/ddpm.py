"""The discrete preconditioning: a network trained with a DDPM-like scheduler of diffusers.

Ho et al., arXiv 2006.11239 (epsilon); Salimans and Ho, arXiv 2202.00512 (v); Lin et al., arXiv 2305.08891 (zero
terminal signal-to-noise ratio, SNR).

With abar the cumulative product of 1 - beta, level t has a = sqrt(abar), b = sqrt(1 - abar) and sigma = b/a, and the
network sees a x_sigma = a image + b noise. That form stays finite at sigma = infinity (a = 0, b = 1), which is the last
level of a schedule with zero terminal SNR.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from mucs_cli.diffusion.networks import Network

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(eq=False)
class DDPMDenoiser:
    """A network with the noise levels of a discrete schedule, and the quantity it predicts.

    Args:
        network: called as ``network(sample, timestep, condition, augmentation)``, timestep an int64 in 0..T-1.
        num_train_timesteps: T.
        beta_schedule: as in diffusers: linear, scaled_linear, squaredcos_cap_v2, sigmoid.
        beta_start, beta_end: first and last beta of the schedules that have a choice.
        trained_betas: T betas in (0, 1], which replace the schedule.
        prediction_type: ``epsilon`` (noise), ``v_prediction`` (a noise - b image) or ``sample`` (image).
        rescale_betas_zero_snr: rescale the schedule so that its last level is pure noise, sigma = infinity.
        clip_sample_range: sampling clips predicted images to this range on both sides; None not to clip.
    Raises:
        ValueError: an unknown schedule or prediction type, betas out of range, or ``epsilon`` with zero terminal SNR
            (where the network's input is the noise it should predict, and says nothing about the image).
    """

    timestep_scale: ClassVar[float] = 1.0

    network: Network
    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    trained_betas: list[float] | None = None
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    clip_sample_range: float | None = 1.0
    levels: Tensor = field(init=False, repr=False)
    """[4, T], float64, on the CPU: a, b, sigma, and the boundary in log sigma above which the next level is nearer."""

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
        signal_share = self._alphas_cumprod()
        ends_in_noise = bool(signal_share[-1] == 0)
        if ends_in_noise and self.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type=epsilon with zero terminal SNR (rescale_betas_zero_snr, or a last beta of 1): "
                "pure noise says nothing about the image; expected v_prediction or sample"
            )
        sigma = ((1 - signal_share) / signal_share).sqrt()
        log_sigma = sigma.log()
        above = torch.cat([(log_sigma[1:] + log_sigma[:-1]) / 2, log_sigma.new_tensor([torch.inf])])
        self.levels = torch.stack([signal_share.sqrt(), (1 - signal_share).sqrt(), sigma, above])
        self._num_finite = len(sigma) - ends_in_noise
        self._by_device = {self.levels.device: self.levels}

    def _alphas_cumprod(self) -> Tensor:
        """abar, as diffusers rounds it; [T], float64, strictly positive but for a last zero."""
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps={self.num_train_timesteps}: expected at least 2")
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas has {len(self.trained_betas)} values: expected num_train_timesteps="
                f"{self.num_train_timesteps}"
            )
        try:
            scheduler = DDPMScheduler(
                num_train_timesteps=self.num_train_timesteps,
                beta_start=self.beta_start,
                beta_end=self.beta_end,
                beta_schedule=self.beta_schedule,
                trained_betas=self.trained_betas,
                rescale_betas_zero_snr=self.rescale_betas_zero_snr,
            )
        except NotImplementedError as error:
            raise ValueError(
                f"beta_schedule={self.beta_schedule!r}: expected linear, scaled_linear, squaredcos_cap_v2 or sigmoid"
            ) from error
        betas = scheduler.betas
        if not (bool((betas > 0).all()) and bool((betas[:-1] < 1).all()) and bool(betas[-1] <= 1)):
            raise ValueError("the betas must lie between 0 and 1 (the last may be 1)")
        signal_share: Tensor = scheduler.alphas_cumprod.double()
        if not bool((signal_share[:-1] > 0).all()):
            raise ValueError("the betas leave no signal before the last level")
        return signal_share

    def _levels_on(self, device: torch.device) -> Tensor:
        if device not in self._by_device:
            self._by_device[device] = self.levels.to(device)
        return self._by_device[device]

    @property
    def sigma_min(self) -> float:
        return float(self.levels[2, 0])

    @property
    def sigma_max(self) -> float:
        return float(self.levels[2, self._num_finite - 1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """The level nearest in log sigma; [B], int64. Only sigma = infinity is nearest to a level at infinity."""
        boundaries = self._levels_on(sigma.device)[3, :-1].contiguous()
        return torch.bucketize(sigma.double().log(), boundaries, right=True)

    def scales(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of levels, each [B, 1, 1, 1] in the dtype and on the device of ``like``."""
        a, b = self._levels_on(like.device)[:2, timestep].to(like.dtype)
        return a.view(-1, 1, 1, 1), b.view(-1, 1, 1, 1)

    def predict(self, scaled: Tensor, timestep: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The image and the noise that the network sees in ``scaled`` = a image + b noise; each [B, C, H, W].

        Args:
            scaled: unit-variance input; [B, C, H, W].
            timestep: levels, int64; [B] or [1].
            condition: passed to the network.
        """
        a, b = self.scales(timestep, scaled)
        output: Tensor = self.network(scaled, timestep, condition)
        if self.prediction_type == "epsilon":
            return (scaled - b * output) / a, output
        if self.prediction_type == "v_prediction":
            return a * scaled - b * output, b * scaled + a * output
        return output, (scaled - a * output) / b

    def __call__(self, noised: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """D: x - sigma F for epsilon, a^2 x - b F for v, F for sample, with a, b of the given sigma.

        Args:
            noised: image + sigma noise; at sigma = infinity, where that has no value, the unit-variance noise itself.
            sigma: noise levels, infinity included; [B] or [1]. The network is told the nearest level.
            condition: passed to the network.
        """
        s = sigma.view(-1, 1, 1, 1)
        a = (s**2 + 1).rsqrt()  # 0 at infinity
        scaled = torch.where(s.isinf(), noised, noised * a)
        output: Tensor = self.network(scaled, self.timestep(sigma), condition)
        if self.prediction_type == "epsilon":
            return noised - s * output
        if self.prediction_type == "v_prediction":
            return a * scaled - torch.where(s.isinf(), torch.ones_like(s), s * a) * output
        return output

    def loss(
        self,
        image: Tensor,
        noise: Tensor,
        sigma: Tensor,
        condition: Tensor | None = None,
        augmentation: Tensor | None = None,
    ) -> Tensor:
        """mean((F - target)^2), the plain error of what the network predicts: noise, a noise - b image, or image.

        For epsilon this is mean((D - image)^2)/sigma^2, for v (1 + 1/sigma^2) times mean((D - image)^2).

        Args:
            image: clean images in [-1, 1]; [B, C, H, W].
            noise: unit-variance noise; [B, C, H, W], or [1, C, H, W] shared by the batch.
            sigma: noise levels, > 0, infinity included; [B], or [1] shared by the batch. The loss is that of the
                nearest level of the schedule.
            condition, augmentation: passed to the network.
        Returns:
            [B], dimensionless, finite at every level.
        """
        timestep = self.timestep(sigma)
        a, b = self.scales(timestep, image)
        output = self.network(a * image + b * noise, timestep, condition, augmentation)
        if self.prediction_type == "v_prediction":
            target = a * noise - b * image
        else:
            target = noise if self.prediction_type == "epsilon" else image
        return (output - target).square().mean(dim=(1, 2, 3))

    def training_sigma(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels at uniform timesteps; [count], float32; infinity is among them at zero terminal SNR."""
        timestep = torch.randint(self.num_train_timesteps, (count,), generator=generator)
        return self.levels[2, timestep].float()

    def even_sigma(self, count: int) -> Tensor:
        """The levels of timesteps 0, T/count, 2T/count, ... rounded down, as in the release of D-TRAK.

        A level at infinity gives way to the highest finite one; with ``count`` above T, levels repeat.
        """
        if count < 1:
            raise ValueError(f"count={count}: expected at least 1")
        timestep = torch.arange(count) * self.num_train_timesteps // count
        return self.levels[2, timestep.clamp(max=self._num_finite - 1)].float()

    def nearest_sigma(self, sigma: Tensor) -> Tensor:
        timestep = self.timestep(sigma).clamp(max=self._num_finite - 1)
        return self._levels_on(sigma.device)[2, timestep].to(sigma.dtype)

    def null_loss(self, mean_square: float) -> float:
        """1 for epsilon, the mean over timesteps of abar + (1 - abar) m2 for v, m2 for sample.

        Args:
            mean_square: m2, the mean squared pixel of the training images (latents, in a latent model).
        """
        if self.prediction_type == "epsilon":
            return 1.0
        if self.prediction_type == "sample":
            return mean_square
        noise_share = float(self.levels[1].square().mean())
        return 1 + noise_share * (mean_square - 1)

    def facts(self) -> dict[str, Any]:
        """The schedule as the config of diffusers' DDPMScheduler."""
        return {
            "preconditioning": "ddpm",
            "scheduler": {
                "_class_name": "DDPMScheduler",
                "num_train_timesteps": self.num_train_timesteps,
                "beta_schedule": self.beta_schedule,
                "beta_start": self.beta_start,
                "beta_end": self.beta_end,
                "trained_betas": None if self.trained_betas is None else [float(beta) for beta in self.trained_betas],
                "prediction_type": self.prediction_type,
                "rescale_betas_zero_snr": self.rescale_betas_zero_snr,
                "clip_sample": self.clip_sample_range is not None,
                "clip_sample_range": 1.0 if self.clip_sample_range is None else self.clip_sample_range,
            },
        }

    @classmethod
    def from_facts(cls, network: Network, facts: Mapping[str, Any]) -> Self:
        """From ``facts``, or from the config of any diffusers scheduler with betas, under the key ``scheduler``."""
        scheduler = facts["scheduler"]
        names = (
            "num_train_timesteps",
            "beta_schedule",
            "beta_start",
            "beta_end",
            "trained_betas",
            "prediction_type",
            "rescale_betas_zero_snr",
        )
        clips = scheduler.get("clip_sample", False)
        return cls(
            network,
            **{name: scheduler[name] for name in names if name in scheduler},
            clip_sample_range=scheduler.get("clip_sample_range", 1.0) if clips else None,
        )
