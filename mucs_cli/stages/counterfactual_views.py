"""A counterfactual evaluation for the reader: the names of its rows, its table and its charts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mucs_cli.evaluation.measures import counterfactual as measures
from mucs_cli.evaluation.measures.statistics import coverage_limit
from mucs_cli.reporting.charts import Bars, Similarities, densities, interval_bars
from mucs_cli.reporting.tables import Estimate, Table, leaves_out_zero, marked
from mucs_cli.stages.pooled_runs import CONTROL, TARGET, Key

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM = "random removal"
"""The baseline: for each target as many images as for a method, drawn at random; others for each training seed."""
NO_REMOVAL = "no removal"
"""The noise floor: nothing is removed, another training seed."""
OTHER_PICTURES = "other pictures"
"""The reference: pictures of different queries, before any removal."""
MEAN = "mean"
"""The mean of all metrics, where there are several."""


def matched_to(method: str) -> str:
    """The baseline that removes as many images as a method's union has, at random."""
    return f"random, as many as {method}"


def others_of(method: str) -> str:
    """removal=per_query: pictures under the removals for the other targets."""
    return f"{method}, for other targets"


# --- table -----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "method",
    "baseline",
    "metric",
    "removed",
    "auc",
    "auc_controls",
    "separation",
    "ratio",
    "hit_rate",
    "p_mann_whitney",
    "p_wilcoxon",
    "removed_share",
    "baseline_removed",
)


def table(results: Mapping[str, Any], variants: Sequence[str]) -> Table:
    """A row a contrast and metric.

    Args:
        results: as ``results.json`` holds them.
        variants: that were evaluated.
    """
    same = results["retrained_with_the_same_seed"]
    rest = "" if same["identical"] else f"; retrained with the same seed: off by {same['largest_difference']:.2g}"
    return Table(
        f"similarity of pictures after training without images, {results['removal']} removal, {results['k']} of "
        f"{results['num_images']} images a target; auc above 0.5: targets are less alike than under the baseline; "
        f"ratio in percent; {intervals(results)}; p: Mann-Whitney and Wilcoxon, Holm{rest}",
        COLUMNS,
        [
            (
                row["method"],
                row["baseline"],
                row["metric"],
                float(np.mean(row["num_removed"])),
                auc,
                shown(row["controls"] and row["controls"]["auc"]),
                shown(row["separation"]),
                shown(row["targets"]["ratio"]),
                row["targets"]["hit_rate"],
                row["targets"]["mann_whitney_holm"],
                row["targets"]["wilcoxon_holm"],
                row["removed_share"],
                float(np.mean(row["baseline_num_removed"])),
            )
            for row, auc in zip(results["rows"], marked_auc(results, variants), strict=True)
        ],
    )


def intervals(results: Mapping[str, Any]) -> str:
    """What the intervals are over, and how far that can be trusted."""
    text = f"{results['confidence']:.0%} intervals over "
    if results["clusters"] == "picture":
        return text + "pictures as if independent, which hold for these models alone"
    limit = coverage_limit(results["num_clusters"])
    too_few = f" (so few that they cover {limit:.0%} at most)" if limit < results["confidence"] else ""
    return f"{text}{results['num_clusters']} training seeds{too_few}"


def marked_auc(results: Mapping[str, Any], variants: Sequence[str]) -> list[Estimate]:
    """The AUC of every row; of variants beside random removal, the best of each metric is marked."""
    rows = results["rows"]
    found = [shown(row["targets"]["auc"]) for row in rows]
    differs = {
        (entry["metric"], frozenset(entry["variants"])): leaves_out_zero(entry["low"], entry["high"])
        for entry in results["differences"]
    }
    for metric in dict.fromkeys(row["metric"] for row in rows):
        places = [
            place
            for place, row in enumerate(rows)
            if row["metric"] == metric and row["baseline"] == RANDOM and row["method"] in variants
        ]
        names = [rows[place]["method"] for place in places]

        def distinguishable(i: int, best: int, metric: str = metric, names: list[str] = names) -> bool:
            return differs[metric, frozenset((names[i], names[best]))]

        for place, estimate in zip(places, marked([found[p] for p in places], distinguishable), strict=True):
            found[place] = estimate
    return found


def shown(estimate: dict[str, Any] | None) -> Estimate:
    """A statistic, as it is on disk, for a table."""
    return (
        Estimate(None, None, None) if estimate is None else Estimate(*(estimate[k] for k in ("value", "low", "high")))
    )


# --- charts ----------------------------------------------------------------------------------------------------------


def charts(
    results: Mapping[str, Any], variants: Sequence[str], own: Mapping[Key, measures.Similarities]
) -> "dict[str, Figure]":
    """Densities of this run's similarities, and bars of the AUC beside random removal.

    Args:
        results, variants: as in ``table``.
        own: similarities of this run.
    """
    rows = {(row["method"], row["metric"]): row for row in results["rows"] if row["baseline"] == RANDOM}
    metrics = list(dict.fromkeys(metric for _, metric in rows))
    samples = {
        metric: {
            name: Similarities(own[name, metric, TARGET].value, own[name, metric, CONTROL].value)
            for name in [*variants, RANDOM, NO_REMOVAL]
        }
        for metric in metrics
        if metric != MEAN
    }
    compared = [*variants, NO_REMOVAL]
    panels = []
    for metric in metrics:
        of_metric = [rows[name, metric] for name in compared]
        series = {"targets": [shown(row["targets"]["auc"]) for row in of_metric]}
        if results["num_controls"]:
            series["controls"] = [shown(row["controls"]["auc"]) for row in of_metric]
        panels.append(Bars(metric, series))
    return {
        "similarities": densities(samples, "similarity to the picture before, higher is more alike", RANDOM),
        "auc": interval_bars(compared, panels, "AUC against random removal", reference=0.5),
    }
