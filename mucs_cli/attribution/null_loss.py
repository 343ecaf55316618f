"""The null loss: what a network that knows nothing is expected to lose. It bounds the unlearning of MUCS."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.rng import generator

MAX_BATCHES = 200
BATCH_SIZE = 100


@torch.inference_mode()
def monte_carlo_null_loss(
    fresh: Denoiser,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    seed: int,
    device: torch.device,
    sums: tuple[float, int] = (0.0, 0),
    on_batch: Callable[[float, int], None] | None = None,
) -> float:
    """Mean loss of a freshly initialised network over training batches, one (sigma, noise) an image.

    Args:
        fresh: a denoiser whose network has its initial weights, in evaluation mode.
        batches: (image [B, C, H, W], condition or None), at most one pass over the training images.
        seed: of the noise; batch i draws from the stream ("null_loss", i).
        device: where the network is.
        sums: of an interrupted attempt, as ``on_batch`` was told; its batches, of ``BATCH_SIZE``, are left out.
        on_batch: told of the sum of the losses and of how many images it holds, after every batch.
    Returns:
        The mean over images, dimensionless.
    """
    total, count = sums
    for index, (image, condition) in enumerate(batches, start=math.ceil(count / BATCH_SIZE)):
        if index == MAX_BATCHES:
            break
        source = generator(seed, "null_loss", index)
        sigma = fresh.training_sigma(len(image), source).to(device)
        noise = torch.randn(image.shape, generator=source).to(device)
        condition = None if condition is None else condition.to(device)
        total += float(fresh.loss(image.to(device), noise, sigma, condition).double().sum())
        count += len(image)
        if on_batch is not None:
            on_batch(total, count)
    if count == 0:
        raise ValueError("no batches")
    return total / count
