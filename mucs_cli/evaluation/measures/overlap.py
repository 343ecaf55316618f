"""How alike the top training images are: of different queries under one method, of different methods on one query.

A method that gives every query the same images explains the data, not the query. Two sets overlap by
|A and B| / min(|A|, |B|); random sets overlap as well, so that their expectation stands beside every number.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mucs_cli.evaluation.measures.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Floats,
    bootstrap,
    divide,
    weighted_mean,
)

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """A mean overlap, in [0, 1], with its percentile bootstrap interval over queries.

    mean: over pairs of queries, or over queries.
    low, high: bounds of the interval; None where there are fewer than three queries.
    expected: the same mean for independent random sets of the same sizes.
    count: how many overlaps the mean is of.
    """

    mean: float
    low: float | None
    high: float | None
    expected: float
    count: int


def common_ids(
    sets: Sequence[Ids],
    num_examples: int,
    generator: torch.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Overlap:
    """The mean overlap of the top images of every two queries of one method.

    Pairs of queries are dependent, so queries are resampled, not pairs; a query that is drawn more than once makes no
    pair with itself. "Common IDs" of MUCS (arXiv 2605.17938), whose own interval takes the pairs for independent.

    Args:
        sets: each query's top example ids, in any order; Q arrays, none empty.
        num_examples: N, how many training images there are to choose from.
        generator: draws the resamples.
        num_resamples: R.
        confidence: of the interval, in (0, 1).
    Raises:
        ValueError: fewer than two queries, or sets that are empty, repeat an id, or are larger than N.
    """
    check(sets, num_examples)
    if len(sets) < 2:
        raise ValueError("one query makes no pair")
    ratio = overlaps(sets)
    sizes = [len(ids) for ids in sets]
    chance = np.maximum.outer(sizes, sizes) / num_examples
    for of_pairs in (ratio, chance):
        np.fill_diagonal(of_pairs, 0.0)
    num_pairs = len(sets) * (len(sets) - 1)

    def mean(counts: Floats) -> Floats:
        pairs = len(sets) ** 2 - np.square(counts).sum(axis=1)  # 0 where one query was drawn every time: no pair at all
        return divide(((counts @ ratio) * counts).sum(axis=1), pairs)

    found = bootstrap(mean, np.arange(len(sets)), generator, num_resamples, confidence)
    return Overlap(
        float(ratio.sum() / num_pairs), found.low, found.high, float(chance.sum() / num_pairs), count=num_pairs // 2
    )


def id_overlap(
    first: Sequence[Ids],
    second: Sequence[Ids],
    num_examples: int,
    generator: torch.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Overlap:
    """The mean overlap of two methods' top images of the same query.

    Args:
        first, second: each query's top example ids under one method, in the same order of queries; Q arrays each.
        num_examples, generator, num_resamples, confidence: as in ``common_ids``.
    Raises:
        ValueError: no query, unlike numbers of queries, or sets that are empty, repeat an id, or are larger than N.
    """
    check(first, num_examples)
    check(second, num_examples)
    if len(first) != len(second) or not first:
        raise ValueError(f"top images of {len(first)} and of {len(second)} queries")
    pairs = list(zip(first, second, strict=True))
    ratio = np.array([len(np.intersect1d(a, b)) / min(len(a), len(b)) for a, b in pairs])
    found = bootstrap(weighted_mean(ratio), np.arange(len(pairs)), generator, num_resamples, confidence)
    chance = float(np.mean([expected_overlap(len(a), len(b), num_examples) for a, b in pairs]))
    return Overlap(float(ratio.mean()), found.low, found.high, chance, len(pairs))


def expected_overlap(first_size: int, second_size: int, num_examples: int) -> float:
    """Of two independent uniform sets: (a b / N) / min(a, b) = max(a, b) / N, which is k / N for equal sizes."""
    return max(first_size, second_size) / num_examples


def overlaps(sets: Sequence[Ids]) -> NDArray[np.float64]:
    """|A and B| / min(|A|, |B|) of every two of Q sets, none empty; [Q, Q]."""
    _, place = np.unique(np.concatenate(sets), return_inverse=True)
    sizes = np.array([len(ids) for ids in sets])
    starts = np.cumsum(sizes) - sizes
    shared = np.empty((len(sets), len(sets)))
    for row, start, size in zip(shared, starts, sizes, strict=True):
        is_in = np.zeros(place.max() + 1)
        is_in[place[start : start + size]] = 1
        row[:] = np.add.reduceat(is_in[place], starts)
    ratio: NDArray[np.float64] = shared / np.minimum.outer(sizes, sizes)
    return ratio


def check(sets: Sequence[Ids], num_examples: int) -> None:
    for ids in sets:
        if ids.ndim != 1 or not 0 < len(ids) <= num_examples or len(np.unique(ids)) != len(ids):
            raise ValueError(f"top images {ids.tolist()[:5]}... of shape {ids.shape}, of {num_examples} examples")
