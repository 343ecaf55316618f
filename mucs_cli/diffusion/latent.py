"""Latent diffusion: the autoencoder between pixels and the space a latent model works in."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


class LatentCodec:
    """An ``AutoencoderKL`` with the scaling its diffusion model was trained with.

    latent = (posterior mean - shift_factor) scaling_factor; Rombach et al., arXiv 2112.10752, section 4.3.2 and D.1.

    Args:
        autoencoder: frozen by this, and put into evaluation mode.
    """

    def __init__(self, autoencoder: AutoencoderKL):
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.scaling_factor = float(autoencoder.config.scaling_factor)
        self.shift_factor = float(autoencoder.config.shift_factor or 0.0)
        self.channels = int(autoencoder.config.in_channels)
        self.latent_channels = int(autoencoder.config.latent_channels)
        self.factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
        """Pixels a latent pixel's side."""

    def to(self, device: torch.device) -> "LatentCodec":
        """Moves the autoencoder; returns itself."""
        self.autoencoder.to(device)
        return self

    @torch.inference_mode()
    def encode(self, image: Tensor) -> Tensor:
        """The latent of images: the posterior's mean, so that nothing is drawn.

        Args:
            image: [B, C, H, W] in [-1, 1], on the codec's device; H and W multiples of ``factor``.
        Returns:
            [B, latent_channels, H/factor, W/factor].
        Raises:
            ValueError: another number of channels, or a side that ``factor`` does not divide.
        """
        if image.shape[1] != self.channels or image.shape[2] % self.factor or image.shape[3] % self.factor:
            raise ValueError(
                f"images of shape {tuple(image.shape)}: expected {self.channels} channels and sides that are "
                f"multiples of {self.factor}"
            )
        mean = self.autoencoder.encode(image).latent_dist.mean
        return (mean - self.shift_factor) * self.scaling_factor

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> Tensor:
        """Images of latents, about [-1, 1], not clipped; [B, C, H factor, W factor] from [B, latent_channels, H, W]."""
        image: Tensor = self.autoencoder.decode(latent / self.scaling_factor + self.shift_factor, return_dict=False)[0]
        return image
