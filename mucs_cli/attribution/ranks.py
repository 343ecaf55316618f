"""Ranks of scores, where equal scores share what their places are worth."""

import numpy as np
from numpy.typing import NDArray


def average_ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Ranks from 1 for the smallest; equal values share the mean of their ranks.

    Args:
        values: [N], without NaN.
    Returns:
        [N]; whole and half numbers, with the mean (N + 1) / 2.
    """
    return shared_worth(values, np.arange(1.0, len(values) + 1))


def shared_worth(values: NDArray[np.floating], worth: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each value's place, counted from the smallest, is worth; equal values share the mean of their places.

    Args:
        values: [N], without NaN.
        worth: of each place; [N].
    Returns:
        [N], with the sum of ``worth``.
    """
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    total = np.add.reduceat(worth, np.cumsum(counts) - counts) if len(values) else worth
    mean: NDArray[np.float64] = (total / counts)[group]
    return mean


def top(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """Places of the k highest scores, highest first; of equal ones the first come first, as in every ranking."""
    return np.argsort(-scores, kind="stable")[:k]
