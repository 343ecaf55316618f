"""The attribution score of MUCS: how far unlearning the query moved the loss of a training image."""

import torch
from torch import Tensor


def skew(base_loss: Tensor, unlearned_loss: Tensor, epsilon: float = 1e-3) -> Tensor:
    """Normalised skew of the unlearned model's loss against the base model's, per draw.

    s = (u - t) / (u + t + epsilon). MUCS, arXiv 2605.17938.

    Args:
        base_loss: t, losses of the base model, >= 0, dimensionless; any shape.
        unlearned_loss: u, same images and draws, unlearned model; same shape.
        epsilon: added to the denominator, >= 0.
    Returns:
        Same shape, float64, in (-1, 1); higher means that unlearning the query hurt this image more.
    Raises:
        ValueError: the shapes differ.
    """
    if base_loss.shape != unlearned_loss.shape:
        raise ValueError(f"losses of shapes {tuple(base_loss.shape)} and {tuple(unlearned_loss.shape)}")
    t, u = base_loss.double(), unlearned_loss.double()
    return (u - t) / (u + t + epsilon)


def mean_skew(base_loss: Tensor, unlearned_loss: Tensor, epsilon: float = 1e-3) -> Tensor:
    """The attribution score: the skew's mean over draws, skew first and mean second.

    Args:
        base_loss, unlearned_loss: [B, n].
    Returns:
        [B], float64.
    """
    return mean_over_draws(skew(base_loss, unlearned_loss, epsilon))


def mean_over_draws(values: Tensor) -> Tensor:
    """Mean over draws, summed in float64 in bank order: it does not depend on how a library blocks its reductions.

    Args:
        values: [B, n].
    Returns:
        [B], float64.
    """
    total = torch.zeros(values.shape[0], dtype=torch.float64, device=values.device)
    for draw in values.unbind(dim=1):
        total += draw
    return total / values.shape[1]
