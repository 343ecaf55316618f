"""How two samples of similarities differ, how sure that is, and what many such tests are worth together.

Symbols: ``method`` and ``random`` are similarities (higher is more alike) of P pictures before and after a retraining,
once without the images that a method named and once without random ones. A lower ``method`` is better for the method.

Every statistic that has an interval is a function of *counts*: how often each of the P observations is taken, [R, P].
Ones give its value; the counts of R resamples give its bootstrap distribution, all R at once. Several statistics, or
several methods, under the same counts are compared pair by pair.

What is not finite is left out, and every result says how many observations it is of. Where a sample is too small to say
anything the result is None.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]
Alternative = Literal["less", "two-sided"]
Statistic = Callable[[Floats], Floats]
"""Counts [R, P] -> values [R]; NaN where the statistic is not defined for such counts."""

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
SMALLEST_REFERENCE = 0.01
"""Of the ratio's divisor, so that a median near 0 does not blow it up."""
HIT_MARGIN = 0.05
MIN_CLUSTERS = 3
"""Two clusters have three resamples; their interval would cover the truth half the time."""
MAX_ENUMERATED = 20_000
"""Splits of two small samples with ties that are counted one by one."""


# --- bootstrap -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its percentile bootstrap interval.

    value: None where it is not defined.
    low, high: None where there are fewer than three clusters, or where most resamples leave it undefined.
    count: how many observations it is of.
    num_clusters: how many independent units were resampled.
    coverage_limit: about the most that such an interval covers, 1 - 2^(1 - num_clusters): it hardly leaves the range of
        the clusters, and the truth lies outside with 2 * 2^-num_clusters. Below 0.95 with fewer than six.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    num_clusters: int
    coverage_limit: float


def bootstrap(
    statistic: Statistic,
    clusters: ArrayLike,
    generator: torch.Generator,
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Estimate:
    """A statistic with its percentile interval over whole clusters drawn with replacement.

    Pictures of one training seed share a model, so that they are no independent observations: with the seed as cluster,
    all that belongs to a drawn seed is taken as often as the seed is drawn. With a cluster of its own for each
    observation this is the ordinary bootstrap.

    Args:
        statistic: of counts [R, P].
        clusters: which cluster each observation belongs to; [P], any values.
        generator: draws the resamples.
        num_resamples: R.
        confidence: of the interval, in (0, 1).
    """
    _, codes = np.unique(np.asarray(clusters), return_inverse=True)
    count = len(codes)
    num_clusters = int(codes.max()) + 1 if count else 0
    value = number(statistic(np.ones((1, count)))[0]) if count else None
    low = high = None
    if value is not None and num_clusters >= MIN_CLUSTERS:
        low, high = interval(statistic(resampled_counts(num_clusters, num_resamples, generator)[:, codes]), confidence)
    return Estimate(value, low, high, count, num_clusters, coverage_limit(num_clusters))


def resampled_counts(num_clusters: int, num_resamples: int, generator: torch.Generator) -> Floats:
    """How often each of C clusters is in each of R resamples with replacement; [R, C], rows sum to C."""
    drawn = torch.randint(num_clusters, (num_resamples, num_clusters), generator=generator)
    counts = torch.zeros(num_resamples, num_clusters, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts)).numpy()


def interval(resampled: Floats, confidence: float = CONFIDENCE) -> tuple[float | None, float | None]:
    """Percentile interval of resampled values [R]; None, None where fewer than half are defined."""
    defined = resampled[np.isfinite(resampled)]
    if not len(defined) or 2 * len(defined) < len(resampled):
        return None, None
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def coverage_limit(num_clusters: int) -> float:
    return 1 - 2.0 ** (1 - num_clusters) if num_clusters else 0.0


def number(value: float) -> float | None:
    """A finite value as a float; None for any other."""
    return float(value) if math.isfinite(value) else None


# --- statistics of counts --------------------------------------------------------------------------------------------


def weighted_mean(values: Floats) -> Statistic:
    """The mean of values [P]."""

    def statistic(counts: Floats) -> Floats:
        return divide(counts @ values, counts.sum(axis=1))

    return statistic


def weighted_auc(method: Floats, random: Floats) -> Statistic:
    """``auc`` of two samples whose p-th members belong together, [P] each, and are taken equally often."""
    above = np.greater.outer(random, method) + 0.5 * np.equal.outer(random, method)

    def statistic(counts: Floats) -> Floats:
        return divide(((counts @ above) * counts).sum(axis=1), counts.sum(axis=1) ** 2)

    return statistic


def weighted_ratio(method: Floats, random: Floats, lower_median: bool = False) -> Statistic:
    """``ratio`` of two samples whose p-th members belong together, [P] each; the median is resampled as well."""
    order = np.argsort(random, kind="stable")

    def statistic(counts: Floats) -> Floats:
        up_to = counts[:, order].cumsum(axis=1)
        size = up_to[:, -1:]
        # The sorted multiset's members at (n - 1) // 2 and n // 2, which are the same one for odd n.
        lower, upper = ((up_to > place).argmax(axis=1) for place in ((size - 1) // 2, size // 2))
        median = random[order[lower]]
        if not lower_median:
            median = (median + random[order[upper]]) / 2
        mean = divide(counts @ method, counts.sum(axis=1))
        return 100 * (mean / np.maximum(median, SMALLEST_REFERENCE) - 1)

    return statistic


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Element by element, NaN where the denominator is 0 (nothing was drawn)."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)


# --- two samples -----------------------------------------------------------------------------------------------------


def auc(method: ArrayLike, random: ArrayLike) -> float | None:
    """P(random > method) + P(random = method) / 2 over all pairs, which is Mann-Whitney's U of ``random`` over n1 n2.

    Above 0.5 the method's similarities are the lower ones. The samples may have unlike sizes.

    Returns:
        in [0, 1]; None where a sample is empty.
    """
    lower, upper = finite(method), finite(random)
    if not len(lower) or not len(upper):
        return None
    lower.sort()
    twice = np.searchsorted(lower, upper, "left") + np.searchsorted(lower, upper, "right")
    return float(twice.sum() / (2 * len(lower) * len(upper)))


def ratio(method: ArrayLike, random: ArrayLike, lower_median: bool = False) -> float | None:
    """100 * mean(method / max(median random, 0.01) - 1), in percent; negative is better for the method.

    Args:
        method, random: similarities, of which 0 means nothing in common (a distance has no such ratio).
        lower_median: of an even number take the lower of the two middle ones, as ``torch.median`` and with it the
            authors' release does. Otherwise, and by default, their mean.
    Returns:
        None where a sample is empty.
    """
    lower, upper = finite(method), np.sort(finite(random))
    if not len(lower) or not len(upper):
        return None
    median = upper[(len(upper) - 1) // 2] if lower_median else np.median(upper)
    return float(100 * (lower.mean() / max(median, SMALLEST_REFERENCE) - 1))


def hit_rate(method: ArrayLike, random: ArrayLike, margin: float = HIT_MARGIN) -> float | None:
    """The share of pictures whose similarity is below 0.95 of the random removal's of the same picture.

    "Below" is by 5 % of the absolute value, so that equal negative similarities are no hit.

    Args:
        method, random: pair by pair; [P] each.
    Raises:
        ValueError: the lengths differ.
    """
    lower, upper = finite_pairs(method, random)
    return float(np.mean(lower < upper - margin * np.abs(upper))) if len(lower) else None


def mann_whitney(method: ArrayLike, random: ArrayLike, alternative: Alternative) -> float | None:
    """p-value of the rank-sum test that ``method`` tends to be lower (targets), or only different (controls).

    Exact for up to 8 values in one of the samples without ties, and for small samples with ties by going through all
    splits; else the normal approximation with tie and continuity correction. It takes all values for independent, which
    pictures of one model are not: see it beside an interval that resamples training seeds.

    Returns:
        in [0, 1]; None where a sample is empty.
    """
    lower, upper = finite(method), finite(random)
    if not len(lower) or not len(upper):
        return None
    pooled = np.concatenate([lower, upper])
    tied = len(np.unique(pooled)) < len(pooled)
    few = math.comb(len(pooled), len(lower)) <= MAX_ENUMERATED
    how = stats.PermutationMethod(n_resamples=MAX_ENUMERATED) if tied and few else "auto"
    return number(stats.mannwhitneyu(lower, upper, alternative=alternative, method=how).pvalue)


def wilcoxon(method: ArrayLike, random: ArrayLike, alternative: Alternative) -> float | None:
    """p-value of the signed-rank test of the differences method - random, picture by picture.

    Differences of 0 say nothing and are left out (Wilcoxon's own rule); where all are 0 the p-value is 1. Exact for up
    to 50 differences without ties and up to 13 with ties, else the normal approximation.

    Args:
        method, random: pair by pair; [P] each.
    Returns:
        in [0, 1]; None without a pair.
    Raises:
        ValueError: the lengths differ.
    """
    lower, upper = finite_pairs(method, random)
    difference = lower - upper
    if not len(difference):
        return None
    if not difference.any():
        return 1.0
    return number(stats.wilcoxon(difference[difference != 0], alternative=alternative).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values adjusted for a family of tests: whichever are true, the chance of any false alarm at a is at most a.

    The i-th smallest of m is multiplied by m - i + 1; then none may be below a smaller one's, nor above 1. Holm 1979.

    Args:
        p_values: of the whole family; None for a test that could not be made, which does not count.
    Returns:
        in the same order, None where it was None.
    """
    made = [(p, place) for place, p in enumerate(p_values) if p is not None]
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for step, (p, place) in enumerate(sorted(made)):
        largest = max(largest, min(1.0, (len(made) - step) * p))
        adjusted[place] = largest
    return adjusted


def finite(values: ArrayLike) -> Floats:
    """The finite ones of the values, as float64; one axis."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def finite_pairs(first: ArrayLike, second: ArrayLike) -> tuple[Floats, Floats]:
    """The pairs of which both are finite; raises ValueError where the lengths differ."""
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"pairs of shapes {left.shape} and {right.shape}; expected [P] and [P]")
    kept = np.isfinite(left) & np.isfinite(right)
    return left[kept], right[kept]
