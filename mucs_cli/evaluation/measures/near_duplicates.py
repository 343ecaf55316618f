"""Queries that nearly equal a training image: the model may have copied it, and a ranking led by it says little else.

The distance of two pictures is the root mean square difference of their pixels, scaled to [0, 1]. How small is
suspicious depends on the data: small pictures of one kind on one background are all alike. A query is near where it is
closer to a training image than nearly every training image is to another one, or, whatever the data, where the
difference can hardly be seen.

It is a warning, no proof. About one in a hundred pictures drawn like the training images is near by the first rule; a
blurred or nearly empty query is close to much; a copy that is shifted, mirrored, cropped or recoloured is not found.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

INVISIBLE = 0.02
"""Of 1, the range of a pixel: five of 255 levels."""
TAIL = 0.01
"""Share of training images that are closer to another one than the data's own distance."""
NUM_REFERENCES = 500
BLOCK_BYTES = 64 * 2**20
"""Of each of two blocks of pictures in float64, and of the distances between them."""


@dataclass(frozen=True)
class NearDuplicates:
    """The nearest training image of each query.

    example_id: int64 [Q].
    distance: root mean square pixel difference to it, in [0, 1]; 0, but for rounding, for an exact copy; [Q].
    own_distance: the ``TAIL`` quantile of the distances of training images to their nearest other one; None where
        there is but one training image.
    is_near: bool [Q]: distance < own_distance or distance < ``INVISIBLE``.
    """

    example_id: Ids
    distance: Floats
    own_distance: float | None
    is_near: NDArray[np.bool_]


def near_duplicates(
    queries: NDArray[np.float32],
    raw: NDArray[np.uint8],
    levels: int,
    training: Ids,
    generator: torch.Generator,
    num_references: int = NUM_REFERENCES,
) -> NearDuplicates:
    """The nearest training image of each query, and whether it is suspiciously near.

    Two passes over the training images, of which no more than a block is in memory.

    Args:
        queries: pictures in [-1, 1]; [Q, C, H, W].
        raw: all images, 0 to ``levels``, may be memory-mapped; [N, C, H, W].
        levels: raw value of white (255 for 8-bit files).
        training: example_ids, rows of ``raw``, that were trained on.
        generator: draws the training images whose distances to their nearest others are the data's own.
        num_references: how many at most.
    Raises:
        ValueError: pictures of another shape than the images, or no training image.
    """
    if queries.shape[1:] != raw.shape[1:] or not len(training):
        raise ValueError(f"queries of shape {queries.shape}, images of shape {raw.shape}, {len(training)} of training")
    example_id, distance = nearest((queries + 1) * (levels / 2), raw, training)
    drawn = training[torch.randperm(len(training), generator=generator)[:num_references].numpy()]
    own_distance = None
    if len(training) > 1:
        _, own = nearest(raw[drawn], raw, training, but=drawn)
        own_distance = float(np.quantile(own, TAIL)) / levels
    is_near = distance / levels < max(INVISIBLE, own_distance or 0.0)
    return NearDuplicates(example_id, distance / levels, own_distance, is_near)


def nearest(
    pictures: NDArray[np.generic], raw: NDArray[np.uint8], training: Ids, but: Ids | None = None
) -> tuple[Ids, Floats]:
    """A nearest training image of each picture, [P], and the root mean square difference to it, in levels, [P].

    Args:
        pictures: 0 to ``levels``; [P, C, H, W].
        raw, training: see ``near_duplicates``.
        but: an example_id for each picture that does not count; [P].
    """
    flat = pictures.reshape(len(pictures), -1)
    rows = max(1, BLOCK_BYTES // (8 * flat.shape[1]))
    example_id = np.zeros(len(flat), dtype=np.int64)
    smallest = np.full(len(flat), np.inf)
    for start in range(0, len(training), rows):
        ids = training[start : start + rows]
        images = raw[ids].reshape(len(ids), -1).astype(np.float64)
        for first in range(0, len(flat), rows):
            part = slice(first, first + rows)
            block = flat[part].astype(np.float64)
            # a difference of large squares, which float64 leaves 1e-8 of a level exact
            square = (block**2).sum(1)[:, None] - 2 * block @ images.T + (images**2).sum(1)
            if but is not None:
                square[but[part, None] == ids] = np.inf
            best = square.argmin(axis=1)
            value = square[np.arange(len(best)), best]
            closer = value < smallest[part]
            example_id[part][closer], smallest[part][closer] = ids[best[closer]], value[closer]
    pairs = zip(pictures, example_id, strict=True)
    return example_id, np.array([np.sqrt(((picture - raw[i].astype(np.float64)) ** 2).mean()) for picture, i in pairs])
