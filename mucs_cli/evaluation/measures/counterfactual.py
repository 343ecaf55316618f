"""Are the pictures less like themselves after a retraining without what a method named than without random images?

Each picture is generated before (*pre*) and after (*post*) a retraining, from one and the same seed, and the two are
compared: the similarity. A row of the table sets one method beside one baseline under one metric, on targets (whose
images were removed: lower is better) and on controls (for which nothing was removed: a method that finds causes leaves
them as the baseline does, AUC near 0.5). MUCS, arXiv 2605.17938, with what it lacks: pairs, intervals, corrections, the
size of what was removed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mucs_cli.evaluation.measures import statistics
from mucs_cli.evaluation.measures.statistics import CONFIDENCE, NUM_RESAMPLES, Estimate, Floats, bootstrap
from mucs_cli.rng import generator

BOOTSTRAP_STREAM = "counterfactual_bootstrap"


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Similarities:
    """Similarities of pre and post pictures.

    seed: training seed; [P], int64.
    query: item id, which makes the picture's own seed; [P], int64; no (seed, query) twice.
    value: higher is more alike; [P], float64; NaN where a picture could not be compared.

    Raises:
        ValueError: lengths differ, or a picture is there twice.
    """

    seed: NDArray[np.int64]
    query: NDArray[np.int64]
    value: Floats

    def __post_init__(self) -> None:
        if not self.seed.ndim == 1 or not self.seed.shape == self.query.shape == self.value.shape:
            raise ValueError(f"shapes {self.seed.shape}, {self.query.shape} and {self.value.shape}; expected [P] each")
        if len(self.keys()) != len(self.seed):
            raise ValueError("a query of a training seed is there twice")

    def keys(self) -> dict[tuple[int, int], int]:
        """(seed, query) -> position."""
        return {key: place for place, key in enumerate(zip(self.seed.tolist(), self.query.tolist(), strict=True))}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Similarities of the same pictures after two retrainings, pair by pair, [P] each, all finite.

    num_undefined: pairs left out since one of them is not finite.
    """

    seed: NDArray[np.int64]
    method: Floats
    baseline: Floats
    num_undefined: int


def pair(method: Similarities, baseline: Similarities) -> Pairs:
    """Puts the same pictures side by side, in whatever order they come.

    Raises:
        ValueError: they are not of the same pictures.
    """
    ours, theirs = method.keys(), baseline.keys()
    if ours.keys() != theirs.keys():
        odd = sorted(ours.keys() ^ theirs.keys())[:3]
        raise ValueError(f"pictures (training seed, query) {odd} are on one side only")
    order = np.array([theirs[key] for key in ours], dtype=np.int64)
    values = baseline.value[order]
    kept = np.isfinite(method.value) & np.isfinite(values)
    return Pairs(method.seed[kept], method.value[kept], values[kept], int((~kept).sum()))


@dataclass(frozen=True, eq=False)
class Contrast:
    """One method beside one baseline under one metric.

    method, baseline, metric: names. The baseline may be ``random``, or another method.
    targets, controls: similarities under the method; None without controls.
    baseline_targets, baseline_controls: of the same pictures under the baseline.
    num_removed, baseline_num_removed: how many images each retraining did without; one number a training seed.
    tested: False for a reference, which has no p-values and does not count in their correction.
    """

    method: str
    baseline: str
    metric: str
    targets: Similarities
    baseline_targets: Similarities
    num_removed: Sequence[int]
    baseline_num_removed: Sequence[int]
    controls: Similarities | None = None
    baseline_controls: Similarities | None = None
    tested: bool = True


# --- a row of the table ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """Targets, or controls, of one row; every field is of the same pairs.

    count, num_undefined: pairs, and pairs left out since a similarity is not finite.
    mean, baseline_mean: similarities.
    difference: mean of method - baseline, paired.
    auc: P(baseline > method) + P(equal) / 2.
    ratio: 100 * mean(method / max(median baseline, 0.01) - 1), percent.
    hit_rate: share of pairs with method < 0.95 baseline.
    mann_whitney, wilcoxon: p-values, one-sided "less" for targets, two-sided for controls.
    mann_whitney_holm, wilcoxon_holm: corrected over all rows of the table, targets and controls each for themselves.
    """

    count: int
    num_undefined: int
    mean: float | None
    baseline_mean: float | None
    difference: Estimate
    auc: Estimate
    ratio: Estimate
    hit_rate: float | None
    mann_whitney: float | None
    wilcoxon: float | None
    mann_whitney_holm: float | None = None
    wilcoxon_holm: float | None = None


@dataclass(frozen=True)
class Row:
    """One method beside one baseline under one metric.

    separation: AUC of the targets minus AUC of the controls; 0 for a method that harms all pictures alike.
    num_removed, baseline_num_removed: images removed, for each training seed.
    removed_share, baseline_removed_share: their mean, over the number of training images.
    """

    method: str
    baseline: str
    metric: str
    targets: Side
    controls: Side | None
    separation: Estimate | None
    num_removed: list[int]
    baseline_num_removed: list[int]
    removed_share: float | None
    baseline_removed_share: float | None


@dataclass(frozen=True)
class Settings:
    """How intervals are made.

    clusters: draw whole training seeds, or pictures as if each were independent (for a run of fewer than three seeds:
        such an interval holds for these retrainings alone, not for others).
    seed: of the resamples; all rows have the same ones.
    lower_median: in the ratio, see ``statistics.ratio``.
    """

    clusters: str = "seed"
    seed: int = 0
    num_resamples: int = NUM_RESAMPLES
    confidence: float = CONFIDENCE
    lower_median: bool = False

    def __post_init__(self) -> None:
        if self.clusters not in ("seed", "picture"):
            raise ValueError(f"clusters {self.clusters!r}; expected seed or picture")


def table(contrasts: Sequence[Contrast], num_examples: int, settings: Settings) -> list[Row]:
    """A row for each contrast, in order, with p-values corrected over all of them.

    Args:
        contrasts: the family: every method and metric that is looked at.
        num_examples: N, of training images.
        settings: of the intervals.
    Raises:
        ValueError: method and baseline are not of the same pictures, or a picture is target and control.
    """
    return corrected([row_of(contrast, num_examples, settings) for contrast in contrasts])


def row_of(contrast: Contrast, num_examples: int, settings: Settings) -> Row:
    """One row, p-values not yet corrected. As ``table``."""
    targets = pair(contrast.targets, contrast.baseline_targets)
    controls = separation = None
    if contrast.controls is not None and contrast.baseline_controls is not None:
        if contrast.controls.keys().keys() & contrast.targets.keys().keys():
            raise ValueError(f"{contrast.method}: a picture is both target and control")
        pairs = pair(contrast.controls, contrast.baseline_controls)
        controls = side_of(pairs, "two-sided", settings, contrast.tested)
        separation = separation_of(targets, pairs, settings)
    return Row(
        method=contrast.method,
        baseline=contrast.baseline,
        metric=contrast.metric,
        targets=side_of(targets, "less", settings, contrast.tested),
        controls=controls,
        separation=separation,
        num_removed=list(contrast.num_removed),
        baseline_num_removed=list(contrast.baseline_num_removed),
        removed_share=share(contrast.num_removed, num_examples),
        baseline_removed_share=share(contrast.baseline_num_removed, num_examples),
    )


def side_of(pairs: Pairs, alternative: statistics.Alternative, settings: Settings, tested: bool) -> Side:
    method, baseline = pairs.method, pairs.baseline
    clusters = clusters_of([pairs], settings)

    def estimate(statistic: statistics.Statistic) -> Estimate:
        return resample(statistic, clusters, settings)

    return Side(
        count=len(method),
        num_undefined=pairs.num_undefined,
        mean=float(method.mean()) if len(method) else None,
        baseline_mean=float(baseline.mean()) if len(method) else None,
        difference=estimate(statistics.weighted_mean(method - baseline)),
        auc=estimate(statistics.weighted_auc(method, baseline)),
        ratio=estimate(statistics.weighted_ratio(method, baseline, settings.lower_median)),
        hit_rate=statistics.hit_rate(method, baseline),
        mann_whitney=statistics.mann_whitney(method, baseline, alternative) if tested else None,
        wilcoxon=statistics.wilcoxon(method, baseline, alternative) if tested else None,
    )


def separation_of(targets: Pairs, controls: Pairs, settings: Settings) -> Estimate:
    """AUC of the targets minus AUC of the controls; a drawn seed brings both."""
    of_targets = statistics.weighted_auc(targets.method, targets.baseline)
    of_controls = statistics.weighted_auc(controls.method, controls.baseline)
    num_targets = len(targets.method)

    def statistic(counts: Floats) -> Floats:
        return of_targets(counts[:, :num_targets]) - of_controls(counts[:, num_targets:])

    return resample(statistic, clusters_of([targets, controls], settings), settings)


def clusters_of(sides: Sequence[Pairs], settings: Settings) -> ArrayLike:
    seeds = np.concatenate([pairs.seed for pairs in sides])
    return seeds if settings.clusters == "seed" else np.arange(len(seeds))


def resample(statistic: statistics.Statistic, clusters: ArrayLike, settings: Settings) -> Estimate:
    source = generator(settings.seed, BOOTSTRAP_STREAM)
    return bootstrap(statistic, clusters, source, settings.num_resamples, settings.confidence)


def share(sizes: Sequence[int], num_examples: int) -> float | None:
    return float(np.mean(sizes) / num_examples) if len(sizes) else None


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's correction: one family for each test, of the targets and of the controls."""
    targets = corrected_sides([row.targets for row in rows])
    controls = iter(corrected_sides([row.controls for row in rows if row.controls is not None]))
    return [
        replace(row, targets=of_targets, controls=None if row.controls is None else next(controls))
        for row, of_targets in zip(rows, targets, strict=True)
    ]


def corrected_sides(sides: Sequence[Side]) -> list[Side]:
    rank_sum = statistics.holm([side.mann_whitney for side in sides])
    signed_rank = statistics.holm([side.wilcoxon for side in sides])
    return [
        replace(side, mann_whitney_holm=first, wilcoxon_holm=second)
        for side, first, second in zip(sides, rank_sum, signed_rank, strict=True)
    ]
