"""The linear datamodeling score: do sums of attribution scores predict what a model trained on part of the data does?

M models are trained, each on a subset S_m of the N training images; y_m(q) is the measured loss of query q under model
m. Scores s_qi (higher: training on i lowers the loss of q) predict it up to a constant as

    p_m(q) = - sum over i in S_m of s_qi,

since a subset that holds the images that q needs has a low loss. LDS = mean over queries of Spearman's correlation of
p_m(q) and y_m(q) over m. Park et al. 2023 (TRAK, arXiv 2303.14186), where y and p carry the other sign. Which of two
subsets is better for a query is all that counts: scores may be shifted by a constant for each query (all subsets have
one size) and y may be mapped by any increasing function.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from mucs_cli.evaluation.measures.statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Estimate,
    Floats,
    coverage_limit,
    divide,
    interval,
    resampled_counts,
)
from mucs_cli.rng import generator as named_generator

SUBSET_STREAM = "lds_subset"
Resampled = Literal["subsets", "queries", "both"]


# --- subsets ---------------------------------------------------------------------------------------------------------


def subset_masks(
    num_examples: int, num_subsets: int, share: float, seed: int, labels: ArrayLike | None = None
) -> NDArray[np.bool_]:
    """Random subsets of one size, in which every training image is as likely as any other.

    With labels, every class has its share of every subset, up to less than one image; which classes get the image more
    is drawn for each subset, in proportion to what they lack. Subset m is drawn from its own stream: asking for more
    subsets leaves the first ones as they were.

    Args:
        num_examples: N, of the training images.
        num_subsets: M.
        share: alpha, in (0, 1); the size is round(alpha N).
        seed: names the streams, with "lds_subset" and m.
        labels: a class for each training image; [N], any values.
    Returns:
        [M, N], True for the images of the subset.
    Raises:
        ValueError: the size is 0 or N, or the labels are not N.
    """
    size = round(share * num_examples)
    if not 0 < size < num_examples:
        raise ValueError(f"subsets of {size} of {num_examples} images (alpha {share})")
    of = np.zeros(num_examples, dtype=np.int64) if labels is None else np.asarray(labels)
    if of.shape != (num_examples,):
        raise ValueError(f"labels of shape {of.shape}; expected [{num_examples}]")
    _, classes = np.unique(of, return_inverse=True)
    members = [np.flatnonzero(classes == label) for label in range(classes.max() + 1)]
    masks = np.zeros((num_subsets, num_examples), dtype=bool)
    for subset, mask in enumerate(masks):
        source = named_generator(seed, SUBSET_STREAM, subset)
        quotas = class_quotas([len(images) for images in members], size, source)
        for images, quota in zip(members, quotas, strict=True):
            mask[images[torch.randperm(len(images), generator=source)[:quota].numpy()]] = True
    return masks


def class_quotas(class_sizes: list[int], size: int, generator: torch.Generator) -> list[int]:
    """How many images of each class make up ``size`` of them: the share of each class, rounded down or up at random.

    Systematic sampling in whole numbers: the classes in random order, cumulative shares in N-ths of an image, and one
    random offset. A class is rounded up with the probability of its fraction, and the sum is always ``size``.
    """
    num_examples = sum(class_sizes)
    order = torch.randperm(len(class_sizes), generator=generator).tolist()
    reached = int(torch.randint(num_examples, (1,), generator=generator))
    quotas = [0] * len(class_sizes)
    for label in order:
        before = reached // num_examples
        reached += size * class_sizes[label]
        quotas[label] = reached // num_examples - before
    return quotas


def split_halves(count: int, generator: torch.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint random halves of 0..count-1: one to choose settings on, the other to report.

    Used for subsets and for queries, so that a setting is never reported on what it was chosen on.

    Returns:
        selection and report, both sorted; the report has the odd one.
    """
    order = torch.randperm(count, generator=generator).numpy()
    return np.sort(order[: count // 2]), np.sort(order[count // 2 :])


# --- score -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Lds:
    """mean: over queries, an undefined one counted as 0; per_query: [Q], NaN where undefined; num_undefined: those."""

    mean: float
    per_query: Floats
    num_undefined: int


def lds(predictions: ArrayLike, measured: ArrayLike) -> Lds:
    """Mean Spearman correlation over queries of predicted and measured losses.

    A query whose predictions are all equal (constant scores) or not finite, or whose measured losses are all equal, has
    no correlation; it counts as 0, which is what it knows, and is reported.

    Args:
        predictions: p_m(q); [Q, M].
        measured: y_m(q), a loss: lower is better; [Q, M].
    Raises:
        ValueError: shapes differ, a measured loss is not finite, no query, or fewer than three subsets.
    """
    per_query = spearman(predictions, measured)
    undefined = int(np.isnan(per_query).sum())
    return Lds(float(np.nan_to_num(per_query).mean()), per_query, undefined)


def predictions(masks: ArrayLike, scores: NDArray[np.floating]) -> Floats:
    """p_m(q) = - sum over i in S_m of s_qi, so that a high score predicts a low loss of the subsets that hold i.

    Scores become multiples of a power of two, about 2^-(52 - log2 N) of the query's largest deviation from its median,
    before they are summed: the sums are exact then, the same in whatever order they are made, and subsets that score
    equally (all of them do where scores depend on the class alone and subsets are stratified) are equal to the bit.

    Args:
        masks: [M, N], bool.
        scores: higher is more influential; [Q, N], may be memory-mapped; one row is in memory as float64 at a time.
    Returns:
        [Q, M]; NaN for a query with scores that are not finite.
    Raises:
        ValueError: another number of images.
    """
    member = np.asarray(masks, dtype=np.float64)
    if scores.ndim != 2 or member.ndim != 2 or scores.shape[1] != member.shape[1]:
        raise ValueError(f"masks of shape {member.shape}, scores of shape {scores.shape}; expected [M, N], [Q, N]")
    bits = 52 - member.shape[1].bit_length()
    result = np.full((len(scores), len(member)), np.nan)
    for row, of_query in zip(result, scores, strict=True):
        score = np.asarray(of_query, dtype=np.float64)
        if not np.isfinite(score).all():
            continue
        centre = np.median(score)
        deviation = score - centre
        exponent = int(np.frexp(np.abs(deviation).max())[1]) - bits
        unit = np.ldexp(1.0, max(exponent, -1074))  # the smallest power of two that float64 has
        row[:] = -(member @ np.rint(deviation / unit) * unit + centre * member.sum(axis=1))
    return result


def spearman(first: ArrayLike, second: ArrayLike) -> Floats:
    """Spearman's rank correlation of each row; ties share the mean of their ranks.

    Args:
        first: [Q, M].
        second: [Q, M], finite.
    Returns:
        [Q] in [-1, 1]; NaN where a row is constant, or where the first is not finite.
    Raises:
        ValueError: shapes differ, the second is not finite, no row, or fewer than three columns.
    """
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if left.ndim != 2 or left.shape != right.shape or not len(left) or left.shape[1] < 3:
        raise ValueError(f"shapes {left.shape} and {right.shape}; expected two of [Q, M], Q >= 1, M >= 3")
    if not np.isfinite(right).all():
        raise ValueError("measured losses that are not finite")
    usable = np.isfinite(left).all(axis=1, keepdims=True)
    ranks = [rankdata(rows, axis=1) for rows in (np.where(usable, left, 0.0), right)]
    x, y = (of_rows - of_rows.mean(axis=1, keepdims=True) for of_rows in ranks)
    return divide((x * y).sum(axis=1), np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1)))


# --- intervals -------------------------------------------------------------------------------------------------------


def resampled_lds(
    predicted: Mapping[str, Floats],
    measured: ArrayLike,
    generator: torch.Generator,
    over: Resampled = "both",
    num_resamples: int = NUM_RESAMPLES,
) -> dict[str, Floats]:
    """The LDS of every method, recomputed in resamples of subsets, of queries, or of both, the same for all methods.

    Subsets are what the number depends on most: one draw of M retrained models serves all queries. A subset that is
    drawn several times ties with itself.

    Args:
        predicted: method -> p_m(q); [Q, M] each.
        measured: [Q, M].
        generator: draws the resamples.
        over: what is drawn with replacement.
        num_resamples: R.
    Returns:
        method -> [R].
    Raises:
        ValueError: as ``lds``.
    """
    losses = np.asarray(measured, dtype=np.float64)
    per_query = {method: np.nan_to_num(spearman(rows, losses)) for method, rows in predicted.items()}
    num_queries, num_subsets = losses.shape
    subsets = resampled_counts(num_subsets, num_resamples, generator) if over != "queries" else None
    queries = resampled_counts(num_queries, num_resamples, generator) if over != "subsets" else None
    if queries is None:
        queries = np.ones((num_resamples, num_queries))
    if subsets is None:
        return {method: queries @ rho / num_queries for method, rho in per_query.items()}
    total = {method: np.zeros(num_resamples) for method in predicted}
    for query in range(num_queries):
        loss_ranks = resampled_ranks(losses[query], subsets)
        for method, rows in predicted.items():
            if np.isfinite(rows[query]).all():
                ranks = resampled_ranks(np.asarray(rows[query], dtype=np.float64), subsets)
                total[method] += queries[:, query] * weighted_correlation(ranks, loss_ranks, subsets)
    return {method: summed / num_queries for method, summed in total.items()}


def resampled_ranks(values: Floats, counts: Floats) -> Floats:
    """Average ranks of values [M] in samples that hold them ``counts`` [R, M] times; centred, so that the mean is 0."""
    below = np.less.outer(values, values) + 0.5 * np.equal.outer(values, values)
    centred: Floats = counts @ below - counts.sum(axis=1, keepdims=True) / 2
    return centred


def weighted_correlation(x: Floats, y: Floats, counts: Floats) -> Floats:
    """Correlation of each two rows of centred values, taken ``counts`` times; [R, M] each; 0 where one is constant."""
    product, left, right = ((counts * a * b).sum(axis=1) for a, b in ((x, y), (x, x), (y, y)))
    return np.nan_to_num(divide(product, np.sqrt(left * right)))


def lds_estimates(
    runs: Sequence[tuple[Mapping[str, Floats], ArrayLike]],
    generator: torch.Generator,
    over: Resampled = "both",
    num_resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> tuple[dict[str, Estimate], dict[tuple[str, str], Estimate]]:
    """The LDS of every method with its interval, and the difference of every two methods with its own, paired.

    Several runs, a base model each, are pooled: the mean over all their queries, and resamples of each run's own
    subsets and queries. The intervals hold for these base models.

    Args:
        runs: predictions, method -> [Q, M], and measured losses [Q, M] of each run; the same methods in all.
        generator, over, num_resamples: as ``resampled_lds``; confidence: of the intervals.
    Returns:
        method -> LDS; (a, b) -> LDS of a minus LDS of b, for a before b. ``num_clusters`` is that of the smallest run.
    """
    counts = [len(np.asarray(losses)) for _, losses in runs]
    names = list(runs[0][0])
    found = [resampled_lds(predicted, losses, generator, over, num_resamples) for predicted, losses in runs]
    value = {m: weighted_mean([lds(predicted[m], losses).mean for predicted, losses in runs], counts) for m in names}
    resampled = {m: np.average([of_run[m] for of_run in found], axis=0, weights=counts) for m in names}
    units = min(
        {"subsets": num_subsets, "queries": num_queries, "both": min(num_subsets, num_queries)}[over]
        for num_queries, num_subsets in (np.asarray(losses).shape for _, losses in runs)
    )

    def estimate(number: float, values: Floats) -> Estimate:
        low, high = interval(values, confidence) if units >= 3 else (None, None)
        return Estimate(number, low, high, sum(counts), units, coverage_limit(units))

    differences = {
        (a, b): estimate(value[a] - value[b], resampled[a] - resampled[b])
        for place, a in enumerate(names)
        for b in names[place + 1 :]
    }
    return {name: estimate(value[name], resampled[name]) for name in names}, differences


def weighted_mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """The mean over all queries of means over each run's."""
    return float(np.average(values, weights=counts))


# --- what can be reached, and what chance reaches --------------------------------------------------------------------


def averaged(measured: ArrayLike) -> Floats:
    """y_m(q): the mean over training seeds of [S, Q, M]; raises ValueError where a measurement is missing."""
    losses = np.asarray(measured, dtype=np.float64)
    if losses.ndim != 3 or not len(losses) or not np.isfinite(losses).all():
        raise ValueError(f"measured losses of shape {losses.shape}; expected finite ones, [S, Q, M] with S >= 1")
    mean: Floats = losses.mean(axis=0)
    return mean


def ceiling(measured: ArrayLike) -> float | None:
    """What retraining itself reaches: Spearman of one training seed's losses with the mean of the others', averaged.

    Over seeds and over queries; an undefined query counts as 0. It says how much of a measured loss is the subset and
    how much the training seed. Scores are compared with the mean of all seeds, a less noisy target, so that perfect
    ones may come out above it.

    Args:
        measured: a loss for each training seed; [S, Q, M].
    Returns:
        None with fewer than two seeds.
    """
    losses = np.asarray(measured, dtype=np.float64)
    mean = averaged(losses)
    if len(losses) < 2:
        return None
    others = (len(losses) * mean - losses) / (len(losses) - 1)
    return float(np.mean([lds(one, rest).mean for one, rest in zip(losses, others, strict=True)]))


@dataclass(frozen=True)
class NoiseFloor:
    """The LDS that a method has when its predictions are of other subsets than were measured.

    deviation: standard deviation of such LDS values, whose mean is 0.
    upper: what 97.5 % of them stay below.
    p_value: the share of them that reach the method's own, one-sided, counting that itself.
    """

    deviation: float
    upper: float
    p_value: float


def noise_floor(
    runs: Sequence[tuple[ArrayLike, ArrayLike]], generator: torch.Generator, num_permutations: int = NUM_RESAMPLES
) -> NoiseFloor:
    """The distribution of the LDS when the measured subsets are shuffled, in the same way for all queries of a run.

    A single query's correlation then has the standard deviation 1 / sqrt(M - 1). Queries share the retrained models, so
    that the mean over queries is noisier than independent ones would make it; shuffling them together keeps that.

    Args:
        runs: predicted and measured losses of each run, [Q, M].
        generator: draws the permutations.
        num_permutations: R.
    Raises:
        ValueError: as ``lds``.
    """
    counts = [len(np.asarray(measured)) for _, measured in runs]
    own = weighted_mean([lds(predicted, measured).mean for predicted, measured in runs], counts)
    of_runs = [shuffled_lds(predicted, measured, generator, num_permutations) for predicted, measured in runs]
    shuffled = np.average(of_runs, axis=0, weights=counts)
    reached = int((shuffled >= own - 1e-12).sum())
    return NoiseFloor(
        float(np.sqrt(np.mean(shuffled**2))),
        float(np.quantile(shuffled, 0.975)),
        (1 + reached) / (1 + num_permutations),
    )


def shuffled_lds(predicted: ArrayLike, measured: ArrayLike, generator: torch.Generator, count: int) -> Floats:
    """The LDS for ``count`` random orders of the measured subsets."""
    losses, rows = np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    defined = ~np.isnan(spearman(rows, losses))
    x, y = (unit_ranks(values[defined]) for values in (rows, losses))
    shared = x.T @ y / len(rows)  # [M, M]: what subset i predicted beside subset j measured adds to the LDS
    place = np.arange(shared.shape[0])
    return np.array([shared[place, order].sum() for order in permutations(len(place), count, generator)])


def unit_ranks(rows: Floats) -> Floats:
    """Average ranks of each row that is not constant, centred and of length 1; [Q, M]."""
    ranks = rankdata(rows, axis=1)
    centred: Floats = ranks - ranks.mean(axis=1, keepdims=True)
    unit: Floats = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return unit


def permutations(length: int, count: int, generator: torch.Generator) -> NDArray[np.int64]:
    """[count, length], each row a uniform permutation."""
    return torch.rand(count, length, generator=generator, dtype=torch.float64).argsort(dim=1).numpy()
