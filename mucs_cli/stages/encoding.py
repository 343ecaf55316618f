"""The latents of the training images: encoded once a run, kept beside the decoded pictures."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mucs_cli.artifacts import BlockFile, fingerprint, map_tensor
from mucs_cli.attribution.scoring import GRANULE, blocks_of
from mucs_cli.data.images import ImageDataset, LatentDataset
from mucs_cli.runtime import REHEARSED_SECONDS, Progress, log
from mucs_cli.stages.context import Context

if TYPE_CHECKING:
    from mucs_cli.diffusion.latent import LatentCodec

BATCH_SIZE = GRANULE
"""Pictures encoded, or decoded, at once; fixed, so that an interrupted encoding goes on to the same bits."""


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
    """
    inputs = {"dataset": pixels.fingerprint, "model": model_print}
    folder = context.folder("data", "latents", fingerprint(inputs)[:16])
    stage = context.stage(folder, "sample", inputs=inputs)
    path = folder / "latents.safetensors"
    shape = (codec.latent_channels, pixels.height // codec.factor, pixels.width // codec.factor)
    if not (stage.is_done() and path.exists()):
        stage.begin()
        file = BlockFile(path, {"latent": ("float32", (len(pixels), *shape))}, fingerprint(inputs))
        blocks = blocks_of(len(pixels), BATCH_SIZE)
        done = sum(len(b) for b in blocks if b.index in file.done)
        with Progress("encode images", len(pixels), "images", done, REHEARSED_SECONDS) as progress:
            for block in blocks:
                if block.index in file.done:
                    continue
                latent = codec.encode(pixels.images(block.rows()).to(device)).cpu()
                file.arrays["latent"][block.start : block.stop] = latent[: len(block)].numpy()
                file.commit(block.index)
                progress.advance(len(block))
        file.finish()
        stage.finish({"device": str(device), "counts": {"images": len(pixels)}}, [path])
        log.info("data: %d images encoded, latents in %s", len(pixels), folder)
    return LatentDataset.of(pixels, map_tensor(path, "latent"))


def encode(codec: "LatentCodec", picture: Tensor, device: torch.device) -> Tensor:
    """Latents, on the CPU."""
    return torch.cat([codec.encode(part.to(device)).cpu() for part in picture.split(BATCH_SIZE)])


def decode(codec: "LatentCodec", latent: Tensor, device: torch.device) -> Tensor:
    """Pictures in [-1, 1], on the CPU."""
    parts = [codec.decode(part.to(device)).clamp(-1, 1).cpu() for part in latent.split(BATCH_SIZE)]
    return torch.cat(parts)
