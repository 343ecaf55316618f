"""The score engine: losses of many models over all training images under one noise bank.

The unit of computation is a block of images of one fixed size (the last one is padded), all under the same draw. Its
bits do not depend on which models or queries share a pass, nor on how many blocks there are. Models that differ in
late modules only share what comes before them; see ``shared_prefix.py``.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mucs_cli.attribution.shared_prefix import PrefixCall, find_prefix, shared_prefix
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.noise_bank import NoiseBank
from mucs_cli.rng import generator

GRANULE = 16
"""Blocks are multiples of this many images: matrix kernels treat such rows alike wherever they stand in the batch."""


@dataclass(frozen=True)
class Block:
    """Block ``index`` covers the training rows ``start`` to ``stop`` and is computed with ``size`` rows."""

    index: int
    start: int
    stop: int
    size: int

    def rows(self) -> Tensor:
        """The block's row numbers, padded to its size with the last row; [size], int64."""
        return torch.arange(self.start, self.start + self.size).clamp(max=self.stop - 1)

    def __len__(self) -> int:
        return self.stop - self.start


def blocks_of(num_images: int, size: int) -> list[Block]:
    """Cuts ``num_images`` rows into blocks of ``size``."""
    return [
        Block(index, start, min(start + size, num_images), size)
        for index, start in enumerate(range(0, num_images, size))
    ]


@contextmanager
def replaced_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Points those of a network's parameters that ``tensors`` names at these, without copying, in the context."""
    before = {name: parameters[name].data for name in tensors}
    try:
        for name, tensor in tensors.items():
            parameters[name].data = tensor
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data = tensor


@torch.no_grad()
def bank_losses(
    denoiser: Denoiser,
    image: Tensor,
    condition: Tensor | None,
    bank: NoiseBank,
    models: Sequence[Mapping[str, Tensor]] = ({},),
    on_forward: Callable[[int], None] | None = None,
    noise: Callable[[int, int], Tensor] | None = None,
) -> Tensor:
    """Losses of every model on every image under every draw.

    Args:
        denoiser: the base model, in evaluation mode, float32.
        image: [B, C, H, W] in [-1, 1], on the model's device.
        condition: each image's own condition, or None.
        bank: n draws, on the model's device.
        models: for each model the tensors that differ from the base model; an empty mapping is the base model.
            Where all these lie in late modules, the modules before them are computed once a draw.
        on_forward: called with the number of images after each forward pass.
        noise: (index of the model, index of the draw) -> [B, C, H, W], in place of the bank's noise at the bank's
            levels; see ``independent_noise``. None: the bank's, the same for all images and models.
    Returns:
        [M, B, n], float32, on the CPU.
    """
    losses = torch.empty(len(models), len(bank), len(image), device=image.device)
    parameters = dict(denoiser.network.named_parameters())
    calls = [] if noise is not None else _shared_calls(denoiser, image, condition, bank, models)
    # what is shared is guarded by the tensors' version counts, which inference tensors lack
    with torch.inference_mode(not calls), shared_prefix(denoiser.network, calls) as prefix:
        for n in range(len(bank)):
            prefix.forget()
            for m, tensors in enumerate(models):
                drawn = bank.noise[n : n + 1] if noise is None else noise(m, n)
                compute = partial(denoiser.loss, image, drawn, bank.sigma[n : n + 1], condition)
                with replaced_parameters(parameters, tensors):
                    losses[m, n] = prefix.run(compute)
                if on_forward is not None:
                    on_forward(len(image))
    return losses.transpose(1, 2).contiguous().cpu()


def _shared_calls(
    denoiser: Denoiser,
    image: Tensor,
    condition: Tensor | None,
    bank: NoiseBank,
    models: Sequence[Mapping[str, Tensor]],
) -> list[PrefixCall]:
    """The network's calls that do the same for all models; seen on two images, under the first draw."""
    if len(models) < 2:
        return []
    few = slice(0, 2)

    def run() -> None:
        denoiser.loss(image[few], bank.noise[:1], bank.sigma[:1], None if condition is None else condition[few])

    return find_prefix(denoiser.network, set().union(*models), run)


def independent_noise(seed: int, model_id: int, example_ids: Sequence[int], draw: int, like: Tensor) -> Tensor:
    """Noise that no two images, models or draws share: what the noise bank is compared with in MUCS's design study.

    Args:
        seed: of the noise; each image draws from the stream ("independent_noise", model_id, example_id, draw).
        model_id: -1 for the base model, else the query's number, so that it does not matter which models share a pass.
        example_ids: the images' ids, [B].
        draw: index in the bank.
        like: the images, [B, C, H, W], for shape, dtype and device.
    Returns:
        [B, C, H, W], unit variance.
    """
    sources = (generator(seed, "independent_noise", model_id, int(i), draw) for i in example_ids)
    return torch.stack([torch.randn(like.shape[1:], generator=source) for source in sources]).to(like)


def choose_block_size(
    denoiser: Denoiser,
    image: Tensor,
    condition: Tensor | None,
    bank: NoiseBank,
    num_images: int,
    candidates: Sequence[int] = (64, 128, 256, 384, 512, 768, 1024),
    smaller: Sequence[int] = (32, 16),
    seconds: float = 0.25,
) -> int:
    """Times forward passes of a few block sizes and returns the one that gets through ``num_images`` fastest.

    Each candidate is fitted to the number of images, so that padding is counted as the cost that it is. Where a pass
    takes long, larger ones win nothing, as what a call costs apart from its images no longer counts, and smaller ones
    may fit a cache.

    Args:
        denoiser: the base model.
        image: any images, [B, C, H, W], repeated to fill a block.
        condition: their conditions.
        bank: a noise bank; its first draws are used.
        num_images: how many images will be scored.
        candidates: block sizes to try, in ascending order, until a pass takes four times ``seconds``.
        smaller: others to try where a pass of the first one takes more than ``seconds``.
        seconds: time spent on each, at least one pass.
    """

    def pass_seconds(size: int) -> float:
        rows = torch.arange(size) % len(image)
        block, block_condition = image[rows], None if condition is None else condition[rows]
        fastest, spent = math.inf, 0.0
        draw = NoiseBank(bank.sigma[:1], bank.noise[:1])
        bank_losses(denoiser, block, block_condition, draw)  # warm up: allocations, kernel choice
        while spent < seconds:
            start = time.perf_counter()
            bank_losses(denoiser, block, block_condition, draw)
            took = time.perf_counter() - start
            fastest, spent = min(fastest, took), spent + took
        return fastest

    found: dict[int, float] = {}
    for size in dict.fromkeys(fitted_block_size(num_images, candidate) for candidate in candidates):
        found[size] = pass_seconds(size)
        if found[size] > 4 * seconds:
            break
    first = next(iter(found))
    if found[first] > seconds:
        found |= {size: pass_seconds(size) for size in smaller if size < first}
    return min(found, key=lambda size: found[size] * math.ceil(num_images / size))


def fitted_block_size(num_images: int, candidate: int) -> int:
    """The multiple of 16 that cuts ``num_images`` into about ``candidate``-sized blocks with least padding."""
    blocks = max(1, round(num_images / candidate))
    return math.ceil(num_images / blocks / GRANULE) * GRANULE
