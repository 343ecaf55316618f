"""Reducers: from the losses of the base and the unlearned model, under the same draws, to one score an image.

All of them sum over draws in float64 in bank order, so that blocks do not change the bits. Where an image has several
scores (AbU takes the larger of the image's and its mirror image's), reduce each and combine the results.
"""

from collections.abc import Callable

from torch import Tensor

from mucs_cli.attribution.skew import mean_over_draws, mean_skew, skew


def ratio_of_means(base_loss: Tensor, unlearned_loss: Tensor, epsilon: float) -> Tensor:
    """(mean u - mean t)/(mean u + mean t + epsilon): the skew of the mean losses, where draws with large losses count
    most."""
    t, u = mean_over_draws(base_loss), mean_over_draws(unlearned_loss)
    return (u - t) / (u + t + epsilon)


def difference(base_loss: Tensor, unlearned_loss: Tensor, epsilon: float) -> Tensor:
    """mean u - mean t; epsilon plays no part. Forward-INF and AbU."""
    return mean_over_draws(unlearned_loss) - mean_over_draws(base_loss)


def absolute_difference(base_loss: Tensor, unlearned_loss: Tensor, epsilon: float) -> Tensor:
    """|mean u - mean t|; epsilon plays no part."""
    return difference(base_loss, unlearned_loss, epsilon).abs()


REDUCERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "skew": mean_skew,
    "ratio_of_means": ratio_of_means,
    "difference": difference,
    "absolute_difference": absolute_difference,
}
"""name -> (base_loss t [B, n], unlearned_loss u [B, n], epsilon) -> [B], float64, higher means more influential."""

PER_DRAW: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "skew": skew,
    "difference": lambda base_loss, unlearned_loss, epsilon: unlearned_loss.double() - base_loss.double(),
}
"""The reducers that are the mean over draws of a value of each draw: name -> (t, u, epsilon) -> values, float64."""


def reduce(name: str, base_loss: Tensor, unlearned_loss: Tensor, epsilon: float = 1e-3) -> Tensor:
    """One score an image.

    Args:
        name: a key of ``REDUCERS``; "skew" is the mean of ratios, the score of MUCS.
        base_loss: t, losses of the base model; [B, n], >= 0, dimensionless.
        unlearned_loss: u, same images and draws, unlearned model; [B, n].
        epsilon: added to the denominators of the ratios, >= 0.
    Returns:
        [B], float64.
    Raises:
        ValueError: an unknown name, or the shapes differ.
    """
    if name not in REDUCERS:
        raise ValueError(f"unknown reducer {name!r}: expected one of {', '.join(REDUCERS)}")
    if base_loss.shape != unlearned_loss.shape:
        raise ValueError(f"losses of shapes {tuple(base_loss.shape)} and {tuple(unlearned_loss.shape)}")
    return REDUCERS[name](base_loss, unlearned_loss, epsilon)
