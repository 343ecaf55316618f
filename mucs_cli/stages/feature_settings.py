"""Settings of gradient features from the configuration: projection, noise and block size."""

from typing import Any

import torch
from torch import Tensor

from mucs_cli.attribution.projection import Projection
from mucs_cli.attribution.scoring import GRANULE, fitted_block_size
from mucs_cli.methods.gradient_base import GradientConfig
from mucs_cli.rng import generator
from mucs_cli.runtime import log

IMAGES_AT_ONCE = {"sparse": 256, "identity": 256, "gaussian": 1024}
"""Training images a block at most, so that little is lost by an interruption. Each block of a Gaussian projection draws
the whole matrix again, which pays for many images only."""


def make_projection(config: GradientConfig, num_parameters: int) -> Projection:
    """The projection that the configuration asks for; none where it would not shorten the gradients."""
    kind, k = config.projection, config.num_projections
    if kind != "identity" and k >= num_parameters:
        log.info("score: gradients of %d parameters are kept as they are (num_projections=%d)", num_parameters, k)
        kind = "identity"
    if kind == "identity":
        k = num_parameters
    return Projection(kind, num_parameters, k, config.seed, config.nonzeros)


def projection_facts(projection: Projection) -> dict[str, Any]:
    """What decides the matrix, and no more."""
    facts: dict[str, Any] = {"kind": projection.kind, "k": projection.k}
    if projection.kind != "identity":
        facts["seed"] = projection.seed
    if projection.kind == "sparse":
        facts["nonzeros"] = min(projection.nonzeros, projection.k)
    return facts


def draw_noise(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise of the draws, from the streams ("feature_noise", draw); [count, C, H, W], unit variance, on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "feature_noise", t)) for t in range(count)])


def choose_block_size(budget: float, num_parameters: int, num_images: int, kind: str) -> int:
    """Training images a block: as many as the budget holds, with their gradients and as many again being added up.

    Args:
        budget: bytes.
        num_parameters: of a gradient.
        num_images: how many there are in all.
        kind: of the projection.
    """
    held = int(budget / (8 * num_parameters))
    if held < GRANULE:
        return max(1, held)
    return min(held // GRANULE * GRANULE, fitted_block_size(num_images, IMAGES_AT_ONCE[kind]))
