"""The batches of unlearning: which images, under which noise, augmented and weighted how.

Retain images (training images) come first, if there are any, then noisy copies of the query.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mucs_cli.diffusion.augmentation import augment
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.rng import generator

RetainBatch = Callable[[int], tuple[Tensor, Tensor | None]]
"""Batch number -> (image [R, C, H, W], condition [R], [R, d] or None)."""

InstanceWeight = Callable[[int], Tensor]
"""Batch number -> weights of the training images of that batch; [R], >= 0, of any scale."""


@dataclass(frozen=True, eq=False)
class UnlearningBatch:
    """image, noise: [B, C, H, W]; sigma: [B]; condition: [B], [B, d] or None; augmentation: [B, 9] or None.

    The first ``num_retain`` rows are training images, the others copies of the query. retain_weight: [num_retain], of
    mean 1, or None where every training image counts the same.
    """

    image: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Tensor | None
    num_retain: int
    augmentation: Tensor | None = None
    retain_weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True, eq=False)
class BatchSource:
    """The batches of one unlearning run, each a function of its place alone.

    Args:
        denoiser: its training distribution gives the noise levels, its network takes augmentations or does not.
        query: [C, H, W].
        query_condition: [1], [1, d] or None.
        retain_batch: the training images of a batch; None for batches of the query alone.
        seed, query_id: batch k of step i draws from the streams ("unlearning", query_id, i) for k = 0 and
            ("unlearning", query_id, i, k) for others, and its augmentation from "unlearning_augmentation" likewise.
        num_copies: copies of the query in a batch.
        num_batches: batches of a step.
        noise_levels: levels to draw from uniformly, [L]; None for the training distribution.
        same_noise: row i of both parts gets the same level and noise; else all rows are independent.
        horizontal_flip: mirror each image with probability 1/2.
        augmentation: probability of each of ``augment``'s transformations; 0 for none of them.
        instance_weight: weights of the training images of a batch; None where all count the same.
    Raises:
        ValueError: instance weights without a retain term; ``batch``: weights that ``normalised_weight`` refuses.
    """

    denoiser: Denoiser
    query: Tensor
    query_condition: Tensor | None
    retain_batch: RetainBatch | None
    seed: int
    query_id: int
    num_copies: int
    num_batches: int = 1
    noise_levels: Tensor | None = None
    same_noise: bool = False
    horizontal_flip: bool = False
    augmentation: float = 0.0
    instance_weight: InstanceWeight | None = None

    def __post_init__(self) -> None:
        if self.instance_weight is not None and self.retain_batch is None:
            raise ValueError("instance weights need a retain term")

    def batch(self, step: int, index: int) -> UnlearningBatch:
        """Batch ``index`` of a step, which is batch ``step * num_batches + index`` of the run."""
        number = step * self.num_batches + index
        place = (self.query_id, step, index) if index else (self.query_id, step)
        retain = None if self.retain_batch is None else self.retain_batch(number)
        batch = self._draw(retain, generator(self.seed, "unlearning", *place))
        if self.horizontal_flip or self.augmentation:
            source = generator(self.seed, "unlearning_augmentation", *place)
            batch = augmented(batch, self.denoiser, self.horizontal_flip, self.augmentation, source)
        if self.instance_weight is not None:
            weight = normalised_weight(self.instance_weight(number), batch.num_retain)
            batch = replace(batch, retain_weight=weight.to(batch.sigma))
        return batch

    def probe(self) -> UnlearningBatch:
        """Copies of the query, not augmented, under draws that no step uses: stream ("query_loss", query_id)."""
        return self._draw(None, generator(self.seed, "query_loss", self.query_id))

    def _draw(self, retain: tuple[Tensor, Tensor | None] | None, source: torch.Generator) -> UnlearningBatch:
        """Images with their noise levels and noise."""
        copies, condition = self.num_copies, self.query_condition
        image = self.query.expand(copies, *self.query.shape)
        if condition is not None:
            condition = condition.expand(copies, *condition.shape[1:])
        num_retain = 0
        if retain is not None:
            num_retain = len(retain[0])
            image = torch.cat([retain[0], image])
            if condition is not None and retain[1] is not None:
                condition = torch.cat([retain[1], condition])
        if self.same_noise:
            rows = torch.cat([torch.arange(num_retain), torch.arange(copies)])
            sigma = self._levels(max(num_retain, copies), source)[rows]
            noise = torch.randn(max(num_retain, copies), *self.query.shape, generator=source)[rows]
        else:
            sigma = torch.cat([self._levels(num_retain, source), self._levels(copies, source)])
            noise = torch.randn(num_retain + copies, *self.query.shape, generator=source)
        return UnlearningBatch(image, noise.to(self.query), sigma.to(self.query), condition, num_retain)

    def _levels(self, count: int, source: torch.Generator) -> Tensor:
        if self.noise_levels is None:
            return self.denoiser.training_sigma(count, source)
        return self.noise_levels.cpu()[torch.randint(len(self.noise_levels), (count,), generator=source)]


def augmented(
    batch: UnlearningBatch, denoiser: Denoiser, horizontal_flip: bool, probability: float, source: torch.Generator
) -> UnlearningBatch:
    """The batch with every image, training image or copy of the query, augmented on its own, as in training.

    A network that was trained with augmentation is told what was done; another one sees the augmented picture alone.

    Args:
        batch: drawn before, so that its noise does not depend on the augmentation.
        denoiser: its network is asked whether it takes augmentations.
        horizontal_flip: mirror each image with probability 1/2.
        probability: of each of ``augment``'s transformations; 0 for none of them.
        source: CPU generator.
    """
    image, label = batch.image, None
    if horizontal_flip:
        flips = (torch.rand(len(image), generator=source) < 0.5).to(image.device)
        image = torch.where(flips.view(-1, 1, 1, 1), image.flip(3), image)
    if probability:
        image, label = augment(image, probability, source)
        if getattr(denoiser.network, "augmentation_embed", None) is None:
            label = None
    return replace(batch, image=image, augmentation=label)


def normalised_weight(weight: Tensor, count: int) -> Tensor:
    """Instance weights of one batch, scaled to mean 1, so that they shift emphasis and not the retain term's size.

    Raises:
        ValueError: not [count], negative or not finite, or all zero.
    """
    if weight.shape != (count,):
        raise ValueError(f"instance weights of shape {tuple(weight.shape)} for {count} training images")
    if not bool(torch.isfinite(weight).all()) or bool((weight < 0).any()) or not bool(weight.any()):
        raise ValueError("instance weights must be finite, not negative, and not all zero")
    return weight.double() / weight.double().mean()


def similarity_weight(image: Tensor, query: Tensor, sharpness: float) -> Tensor:
    """Instance weights by likeness to the query: exp(sharpness * cosine of the pixels).

    Args:
        image: training images, [B, C, H, W].
        query: [C, H, W].
        sharpness: 0 weighs all the same; positive holds on to what is like the query, negative to what is not.
    Returns:
        [B], > 0, not yet of mean 1.
    """
    cosine = F.cosine_similarity(image.flatten(1), query.flatten()[None], dim=1)
    return (sharpness * cosine).exp()
