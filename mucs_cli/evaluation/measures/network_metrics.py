"""Similarities of pairs of pictures, computed batch by batch; higher is more alike."""

from collections.abc import Callable

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint
from mucs_cli.attribution.similarity import unit_vectors
from mucs_cli.evaluation.measures.image_metrics import check_shapes, unit_range


@torch.no_grad()
def in_batches(compare: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor, batch_size: int) -> Tensor:
    """``compare`` of at most ``batch_size`` pairs at a time.

    Args:
        compare: [B, C, H, W] and [B, C, H, W] -> [B].
        first, second: [B, C, H, W] in [-1, 1].
    Returns:
        [B], float64, on the CPU.
    Raises:
        ValueError: shapes differ, are not [B, C, H, W], or pixels are out of range.
    """
    x, y = checked_pairs(first, second)
    pairs = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([compare(*pair).double().cpu() for pair in pairs])


@torch.no_grad()
def embedding_cosine(encode: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, batch_size: int) -> Tensor:
    """Cosine of the angle between the pictures' embeddings; equal pictures are embedded once.

    Args:
        encode: [B, C, H, W] in [-1, 1] -> [B, d].
        first, second: [B, C, H, W] in [-1, 1].
        batch_size: most pictures that are embedded at a time.
    Returns:
        [B], float64, on the CPU, in [-1, 1]; 0 where an embedding is the zero vector.
    Raises:
        ValueError: as ``in_batches``.
    """
    images = torch.cat(checked_pairs(first, second))
    prints = [fingerprint(image) for image in images]
    place = {picture: i for i, picture in enumerate(prints)}
    row = {picture: i for i, picture in enumerate(place)}
    different = images[list(place.values())]
    embedding = torch.cat([encode(part).cpu() for part in different.split(batch_size)])
    x, y = unit_vectors(embedding)[[row[picture] for picture in prints]].split(len(first))
    return (x * y).sum(dim=1).clamp(-1, 1)


def checked_pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """As float32 in [-1, 1], as ``image_metrics`` allows and clips them."""
    check_shapes(first, second)
    x, y = (unit_range(images, -1, 1) * 2 - 1 for images in (first, second))
    return x.float(), y.float()
