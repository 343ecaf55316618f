"""What is taken away in a counterfactual evaluation: the images that are removed, and what queries are compared with.

For each training seed some queries are targets, whose top K images are removed, and some are controls, for which
nothing is. Removing for all targets at once, the union of their sets, costs one retraining a method; its size depends
on how much the sets overlap, so that a method whose sets are alike removes less. ``random_matched`` removes as many at
random as a method did.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mucs_cli.attribution.ranks import top

Ids = NDArray[np.int64]
NUM_ROLLS = 10


# --- queries ---------------------------------------------------------------------------------------------------------


def reference_partners(num_queries: int, num_rolls: int = NUM_ROLLS) -> Ids:
    """For each roll, the other query that each is compared with: how alike are pictures of different queries?

    Roll r compares q with q + r, cyclically; at most Q - 1 rolls, so that none is compared with itself. The reference
    of query q is the mean of the metric over its column.

    Returns:
        [rolls, Q].
    """
    rolls = np.arange(1, min(num_rolls, num_queries - 1) + 1, dtype=np.int64)
    partners: Ids = (np.arange(num_queries, dtype=np.int64) + rolls[:, None]) % num_queries
    return partners


# --- removed images --------------------------------------------------------------------------------------------------


def default_count(num_examples: int) -> int:
    """K: two times 1 % of the training images, at least 1; 1000 of 50,000 as in MUCS (arXiv 2605.17938)."""
    return max(1, 2 * round(num_examples / 100))


def top_ids(scores: NDArray[np.floating], example_ids: ArrayLike, k: int) -> Ids:
    """Each query's K highest-scored images, highest first; what is removed for it.

    Args:
        scores: [Q, N]; what is not a number comes last.
        example_ids: of the columns; [N].
        k: in 1..N.
    Returns:
        [Q, K].
    Raises:
        ValueError: k is out of range, or shapes differ.
    """
    ids = np.asarray(example_ids, dtype=np.int64)
    if scores.ndim != 2 or scores.shape[1] != len(ids) or not 1 <= k <= len(ids):
        raise ValueError(f"the top {k} of scores of shape {scores.shape} and {len(ids)} example ids")
    return ids[np.array([top(of_query, k) for of_query in scores]).reshape(len(scores), k).astype(np.int64)]


def union(sets: Sequence[Ids] | Ids) -> Ids:
    """What is removed for all targets at once: every id that is in some set, once, sorted."""
    nothing = np.zeros(0, dtype=np.int64)
    return np.unique(np.concatenate([nothing, *(np.asarray(ids, dtype=np.int64) for ids in sets)]))


def random_matched(example_ids: ArrayLike, size: int, generator: torch.Generator) -> Ids:
    """As many random images as a method's union has: the removal that differs from it in which, not in how many.

    Returns:
        [size], sorted.
    Raises:
        ValueError: there are not so many.
    """
    ids = np.asarray(example_ids, dtype=np.int64)
    if not 0 <= size <= len(ids):
        raise ValueError(f"{size} of {len(ids)} images")
    return np.sort(ids[torch.randperm(len(ids), generator=generator)[:size].numpy()])


def expected_union(num_examples: int, k: int, num_targets: int) -> float:
    """Size of the union of Q independent random K-sets, in the mean: N (1 - (1 - K / N)^Q)."""
    return float(num_examples * (1 - (1 - k / num_examples) ** num_targets))


def own_and_others(similarity: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """In a removal for one query at a time: each query under its own removal, and under those for the others.

    The two differ in whose images are gone, not in how many nor in which query is looked at; a method that finds causes
    lowers the first alone.

    Args:
        similarity: of query j before and after the removal for query i; [Q, Q], rows i, columns j.
    Returns:
        own [Q]; others [Q], the mean over i != j (NaN for a single query, and where one of them is NaN).
    Raises:
        ValueError: not square.
    """
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarities of shape {matrix.shape}; expected [Q, Q]")
    num_queries = len(matrix)
    own = matrix.diagonal().copy()
    if num_queries < 2:
        return own, np.full(num_queries, np.nan)
    off_diagonal = np.where(np.eye(num_queries, dtype=bool), 0.0, matrix)
    others: NDArray[np.float64] = off_diagonal.sum(axis=0) / (num_queries - 1)
    return own, others
