"""Racing over draws: which images can still be among the k highest scores, after some of the draws.

A score is a mean over the bank's n draws, so that after m of them an image's mean misses it by the error of a sample
from a finite population. All images share the draws: what a draw does to all of them alike is taken out first.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FIRST_DRAWS = 4
"""Draws of the first round, at least: variances of fewer say little."""
PRIOR_DRAWS = 4
"""How many draws' worth the images' pooled variance counts beside an image's own, which few draws estimate badly."""


def race_rounds(num_draws: int) -> list[int]:
    """Draws an image has after each round, doubling: 4, 8, 16, 32, 64, 100 for ``num_draws`` = 100.

    Raises:
        ValueError: no draws.
    """
    if num_draws < 1:
        raise ValueError("a bank needs at least one draw")
    rounds = [max(FIRST_DRAWS, math.ceil(num_draws / 25))]
    while rounds[-1] < num_draws:
        rounds.append(2 * rounds[-1])
    return [*rounds[:-1], num_draws]


def bounds(
    values: NDArray[np.float64], num_draws: int, confidence: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intervals of the images' means over all draws, up to a constant that all of them share.

    mean -+ t s sqrt(1/m - 1/n), with s^2 the variance over draws of an image's values less each draw's mean over the
    images, shrunk towards the images' mean variance, and t the quantile of Student's distribution.

    Args:
        values: of the images that race, under the first m draws; [B, m], m >= 2.
        num_draws: n, the draws of the whole bank.
        confidence: of each interval, in (0, 1).
    Returns:
        Lower and upper ends, [B] each.
    """
    m = values.shape[1]
    own = values - values.mean(axis=0)
    variance = own.var(axis=1, ddof=1)
    freedom = PRIOR_DRAWS + m - 1
    variance = (PRIOR_DRAWS * variance.mean() + (m - 1) * variance) / freedom
    radius = stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance * (1 / m - 1 / num_draws))
    mean = own.mean(axis=1)
    return mean - radius, mean + radius


def margins(values: NDArray[np.float64], num_draws: int, k: int, confidence: float) -> NDArray[np.float64]:
    """How far each image's interval reaches above the k-th highest lower end; below 0 it cannot be among the k highest.

    Args:
        values, num_draws, confidence: as in ``bounds``.
        k: places, from 1 to B.
    Returns:
        [B], in units of the score.
    """
    lower, upper = bounds(values, num_draws, confidence)
    reached: NDArray[np.float64] = upper - np.partition(lower, -k)[-k]
    return reached
