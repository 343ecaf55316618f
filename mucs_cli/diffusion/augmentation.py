"""Non-leaking geometric augmentation: the network is told what was done to each image, in sampling that nothing was.

Karras et al., arXiv 2206.00364, appendix F.2; resampled bilinearly with reflected borders.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mucs_cli.diffusion.networks import AUGMENTATION_DIM

SCALE_STD = 0.2  # of log2 of the zoom, isotropic and anisotropic
TRANSLATION_STD = 0.125  # of the shift, in image sides


def augment(image: Tensor, probability: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Applies each of six transformations with ``probability``, independently per image.

    Mirror left-right (always drawn, probability 1/2) and up-down, zoom, rotation, stretch in a random direction, shift.

    Args:
        image: [B, C, H, W], square.
        probability: of each transformation, in [0, 1].
        generator: CPU generator.
    Returns:
        The images, [B, C, H, W], and what was done to each, [B, 9], all zeros where nothing was.
    """
    count = len(image)

    def chosen(share: float) -> Tensor:
        return (torch.rand(count, generator=generator) < share).float()

    def normal(on: Tensor) -> Tensor:
        return torch.randn(count, generator=generator) * on

    def angle(on: Tensor) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * math.pi * on

    mirror_x = chosen(0.5)
    mirror_y = chosen(0.5) * chosen(probability)
    zoom = normal(chosen(probability))
    turn = angle(chosen(probability))
    stretches = chosen(probability)
    stretch, direction = normal(stretches), angle(stretches)
    shifts = chosen(probability)
    shift_x, shift_y = normal(shifts), normal(shifts)

    # the map from output to input coordinates, in [-1, 1]; its inverse is what happens to the picture
    matrix = torch.diag_embed(torch.stack([1 - 2 * mirror_x, 1 - 2 * mirror_y], dim=1))
    matrix = matrix @ torch.diag_embed(torch.exp2(-SCALE_STD * zoom)[:, None].expand(-1, 2))
    matrix = matrix @ _rotation(-turn)
    along = torch.diag_embed(torch.stack([torch.exp2(-SCALE_STD * stretch), torch.exp2(SCALE_STD * stretch)], dim=1))
    matrix = matrix @ _rotation(direction) @ along @ _rotation(-direction)
    offset = -2 * TRANSLATION_STD * torch.stack([shift_x, shift_y], dim=1)
    theta = torch.cat([matrix, offset[:, :, None]], dim=2).to(image)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    label = torch.stack(
        [
            mirror_x,
            mirror_y,
            zoom,
            turn.cos() - 1,
            turn.sin(),
            stretch * direction.cos(),
            stretch * direction.sin(),
            shift_x,
            shift_y,
        ],
        dim=1,
    )
    assert label.shape[1] == AUGMENTATION_DIM
    return moved, label.to(image)


def _rotation(angle: Tensor) -> Tensor:
    """[B, 2, 2] rotation matrices."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
