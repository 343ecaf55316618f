"""The latents of the training images: encoded once a run, kept beside the decoded pictures."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint
from mucs_cli.attribution.scoring import GRANULE, Block, blocks_of
from mucs_cli.data.images import ImageDataset, LatentDataset
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress
from mucs_cli.stages.blocks import BlockWork, kept_tensor
from mucs_cli.stages.context import Context

if TYPE_CHECKING:
    from mucs_cli.diffusion.latent import LatentCodec

BATCH_SIZE = GRANULE
"""Pictures encoded, or decoded, at once; fixed, so that an interrupted encoding goes on to the same bits."""


class Latents(BlockWork):
    """The latents of all pictures, float32 [N, c, h, w].

    Args:
        pixels: the pictures.
        codec: on ``device``.
        device: where to encode.
    """

    title = "encode images"
    unit = "images"
    passes = ((0,),)

    def __init__(self, pixels: ImageDataset, codec: "LatentCodec", device: torch.device):
        self.pixels, self.codec, self.device = pixels, codec, device
        shape = (codec.latent_channels, pixels.height // codec.factor, pixels.width // codec.factor)
        self.tensors = {"latent": ("float32", (len(pixels), *shape))}

    def blocks(self) -> list[Block]:
        return blocks_of(len(self.pixels), BATCH_SIZE)

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block)

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        latent = self.codec.encode(self.pixels.images(block.rows()).to(self.device)).cpu()[: len(block)]
        finite = latent.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            example = block.start + int((~finite).nonzero()[0])
            raise UserError(
                f"example {example} ({self.pixels.file[example]})",
                "got a latent that is not finite from the model's autoencoder. Check the image, or use an autoencoder "
                "that works in float32.",
            )
        return latent


def encode_dataset(
    context: Context, pixels: ImageDataset, codec: "LatentCodec", model_print: str, device: torch.device
) -> LatentDataset:
    """The data set in latent space, from ``<run>/data/latents/<fingerprint>/`` or encoded into it.

    Args:
        context: the command.
        pixels: the pictures.
        codec: on ``device``.
        model_print: fingerprint of the model, its autoencoder included.
        device: where to encode.
    Raises:
        UserError: a latent is not finite.
    """
    inputs = {"dataset": pixels.fingerprint, "model": model_print}
    path = context.folder("data", "latents", fingerprint(inputs)[:16], "latents.safetensors")
    latent = kept_tensor(path, "latent", inputs, Latents(pixels, codec, device), {"device": str(device)})
    return LatentDataset.of(pixels, latent)


def encode(codec: "LatentCodec", picture: Tensor, device: torch.device) -> Tensor:
    """Latents, on the CPU."""
    return torch.cat([codec.encode(part.to(device)).cpu() for part in picture.split(BATCH_SIZE)])


def decode(codec: "LatentCodec", latent: Tensor, device: torch.device) -> Tensor:
    """Pictures in [-1, 1], on the CPU."""
    parts = [codec.decode(part.to(device)).clamp(-1, 1).cpu() for part in latent.split(BATCH_SIZE)]
    return torch.cat(parts)
