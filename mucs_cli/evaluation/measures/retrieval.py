"""Are the training images that should be found at the top of the ranking?

What should be found is known beforehand: planted copies of the query, images of its group or class. Images with equal
scores are in no order, so that every number here is its mean over all orders of the ties; nothing depends on where an
image stands in the data. A score that is not a number ranks last.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mucs_cli.evaluation.measures.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Estimate,
    Floats,
    bootstrap,
    number,
    weighted_mean,
)

Mask = NDArray[np.bool_]


# --- one query -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TieGroups:
    """Groups of equal scores, highest first: ``size`` [G] and how many of each are relevant, ``hits`` [G]."""

    size: Floats
    hits: Floats


def tie_groups(scores: ArrayLike, relevant: ArrayLike) -> TieGroups:
    """Raises ValueError where scores [N] and relevant [N] are not of one length, or empty."""
    score, is_relevant = np.array(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if score.ndim != 1 or score.shape != is_relevant.shape or not len(score):
        raise ValueError(f"scores of shape {score.shape}, relevant of shape {is_relevant.shape}; expected [N], N >= 1")
    score[np.isnan(score)] = -np.inf
    _, group, size = np.unique(-score, return_inverse=True, return_counts=True)
    return TieGroups(
        size.astype(np.float64), np.bincount(group, weights=is_relevant, minlength=len(size)).astype(np.float64)
    )


def hits_at(groups: TieGroups, k: int) -> float:
    """How many relevant images are among the top k, of a group that k cuts its share; raises ValueError unless
    1 <= k <= N."""
    if not 1 <= k <= groups.size.sum():
        raise ValueError(f"the top {k} of {groups.size.sum():.0f} images")
    before = np.cumsum(groups.size) - groups.size
    taken = np.clip(k - before, 0, groups.size)
    return float((taken * groups.hits / groups.size).sum())


def precision_at(scores: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Relevant images among the top k, over k; in [0, 1].

    Args:
        scores: of one query, higher is more influential; [N].
        relevant: which images should be found; bool [N].
        k: in 1..N.
    Raises:
        ValueError: shapes differ, or k is out of range.
    """
    return hits_at(tie_groups(scores, relevant), k) / k


def recall_at(scores: ArrayLike, relevant: ArrayLike, k: int) -> float:
    """Relevant images among the top k, over all relevant ones; NaN where there is none. As ``precision_at``."""
    groups = tie_groups(scores, relevant)
    found, total = hits_at(groups, k), groups.hits.sum()
    return float(found / total) if total else np.nan


def average_precision(scores: ArrayLike, relevant: ArrayLike) -> float:
    """The mean, over relevant images, of the precision at their rank; NaN where there is none.

    In a group of n equal scores of which r are relevant, after c images of which h are, the i-th place is relevant with
    r / n, and is then preceded in the group by (i - 1) (r - 1) / (n - 1) relevant ones in the mean (McSherry and
    Najork 2008).

    Args:
        scores, relevant: [N].
    Raises:
        ValueError: shapes differ.
    """
    groups = tie_groups(scores, relevant)
    total = groups.hits.sum()
    if not total:
        return np.nan
    sizes = groups.size.astype(np.int64)
    n, r = np.repeat(groups.size, sizes), np.repeat(groups.hits, sizes)
    h = np.repeat(np.cumsum(groups.hits) - groups.hits, sizes)
    rank = np.arange(1, len(n) + 1)
    inside = rank - 1 - np.repeat(np.cumsum(groups.size) - groups.size, sizes)  # i - 1
    hits = h + 1 + inside * (r - 1) / np.maximum(n - 1, 1)
    return float((r / n * hits / rank).sum() / total)


# --- what should be found --------------------------------------------------------------------------------------------


def relevant_by_id(sets: Sequence[ArrayLike], example_ids: ArrayLike) -> Mask:
    """Which columns are the images that each query should find, for example its planted copies.

    Args:
        sets: example ids for each of Q queries; may be empty.
        example_ids: of the columns of the scores; [N].
    Returns:
        [Q, N].
    Raises:
        ValueError: an id that no column has.
    """
    columns = np.asarray(example_ids)
    wanted = [np.asarray(ids, dtype=np.int64) for ids in sets]
    for ids in wanted:
        if not np.isin(ids, columns).all():
            raise ValueError(f"example ids {np.setdiff1d(ids, columns)[:5].tolist()} are not scored")
    return np.array([np.isin(columns, ids) for ids in wanted]).reshape(len(wanted), len(columns))


def relevant_by_value(query_values: Sequence[Collection[str]], values: Sequence[Collection[str]]) -> Mask:
    """Which images have a value of their class, group or other metadata in common with each query.

    Args:
        query_values: of each of Q queries, none or more.
        values: of the images; [N], likewise.
    Returns:
        [Q, N].
    """
    holders: dict[str, list[int]] = {}
    for column, own in enumerate(values):
        for value in own:
            holders.setdefault(value, []).append(column)
    found = np.zeros((len(query_values), len(values)), dtype=bool)
    for row, wanted in enumerate(query_values):
        for value in wanted:
            found[row, holders.get(value, [])] = True
    return found


# --- all queries -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries that have something to find, and what a random ranking would reach in the mean.

    k: how many top images count.
    precision, recall, average_precision: with intervals over queries; precision is the label agreement where relevant
        means "has the query's label".
    random_precision, random_recall, random_average_precision: r / N, k / N, and ``random_average_precision``'s mean.
    num_without: queries for which no image is relevant; left out.
    """

    k: int
    precision: Estimate
    recall: Estimate
    average_precision: Estimate
    random_precision: float | None
    random_recall: float | None
    random_average_precision: float | None
    num_without: int


def retrieval(
    scores: NDArray[np.floating],
    relevant: Mask,
    k: int,
    generator: torch.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Retrieval:
    """How well rankings find what is relevant, beside what chance finds.

    Args:
        scores: [Q, N], may be memory-mapped.
        relevant: [Q, N].
        k: in 1..N.
        generator: draws the resamples of queries for the intervals, the same for every number.
        num_resamples, confidence: of the intervals.
    Raises:
        ValueError: shapes differ, or k is out of range.
    """
    if scores.ndim != 2 or scores.shape != relevant.shape:
        raise ValueError(f"scores of shape {scores.shape}, relevant of shape {relevant.shape}; expected [Q, N] each")
    num_examples = scores.shape[1]
    has_any = np.flatnonzero(relevant.any(axis=1))
    pairs = [(scores[query], relevant[query]) for query in has_any]
    state = generator.get_state()

    def over_queries(column: list[float]) -> Estimate:
        generator.set_state(state)
        queries = np.arange(len(column))
        return bootstrap(weighted_mean(np.array(column)), queries, generator, num_resamples, confidence)

    num_relevant = [int(relevant[query].sum()) for query in has_any]
    by_chance = [random_average_precision(num_examples, count) for count in num_relevant]
    return Retrieval(
        k,
        precision=over_queries([precision_at(*pair, k) for pair in pairs]),
        recall=over_queries([recall_at(*pair, k) for pair in pairs]),
        average_precision=over_queries([average_precision(*pair) for pair in pairs]),
        random_precision=mean([count / num_examples for count in num_relevant]),
        random_recall=k / num_examples if num_relevant else None,
        random_average_precision=mean(by_chance),
        num_without=len(relevant) - len(has_any),
    )


def random_average_precision(num_examples: int, num_relevant: int) -> float:
    """Mean average precision of random rankings of N images of which r >= 1 are relevant.

    All scores equal is a random order: (H_N (N - r) / (N - 1) + N (r - 1) / (N - 1)) / N with H_N = sum of 1 / i.
    """
    if num_relevant == num_examples:
        return 1.0
    harmonic = float((1 / np.arange(1, num_examples + 1)).sum())
    share = (num_relevant - 1) / (num_examples - 1)
    return (harmonic * (1 - share) + num_examples * share) / num_examples


def mean(values: Sequence[float]) -> float | None:
    return number(float(np.mean(values))) if values else None
