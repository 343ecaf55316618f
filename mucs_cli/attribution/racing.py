"""Racing over draws: which images can still be among the k highest scores, after some of the draws.

A score is a mean over the bank's n draws, so that after m of them an image's mean misses it by the error of a sample
from a finite population. All images share the draws: what a draw does to all of them alike is taken out first.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

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


def means(values: NDArray[np.float64], num_draws: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The images' means over all draws as far as some draws tell, up to a constant that all of them share.

    The variance of a mean is s^2 (1/m - 1/n), with s^2 the variance over draws of an image's values less each draw's
    mean over the images, shrunk towards the images' mean variance.

    Args:
        values: of the images that race, under the first m draws; [B, m], m >= 2.
        num_draws: n, the draws of the whole bank.
    Returns:
        Estimates and their variances, [B] each.
    """
    m = values.shape[1]
    own = values - values.mean(axis=0)
    variance = own.var(axis=1, ddof=1)
    variance = (PRIOR_DRAWS * variance.mean() + (m - 1) * variance) / freedom(m)
    return own.mean(axis=1), variance * (1 / m - 1 / num_draws)


def freedom(num_seen: int) -> int:
    """Degrees of freedom of a variance that ``num_seen`` draws and the images' pooled variance estimate."""
    return PRIOR_DRAWS + num_seen - 1


def margins(values: NDArray[np.float64], num_draws: int, k: int, confidence: float) -> NDArray[np.float64]:
    """How far each image can still come above the k-th place; below 0 it is not among the k highest.

    mean - place + t sqrt(v + w), where place is the k-th highest mean, v the variance of the image's own mean, w the
    mean variance of the k highest ones, and t the one-sided quantile of Student's distribution. Never below 0 for the k
    highest.

    Args:
        values, num_draws: as in ``means``.
        k: places, from 1 to B.
        confidence: of each comparison, in (0.5, 1).
    Returns:
        [B], in units of the score.
    """
    mean, variance = means(values, num_draws)
    highest = np.argpartition(mean, -k)[-k:]
    quantile = stdtrit(freedom(values.shape[1]), confidence)
    reached: NDArray[np.float64] = mean - mean[highest].min() + quantile * np.sqrt(variance + variance[highest].mean())
    return reached
