"""How variants differ: in their configuration, and in the rankings they give."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from mucs_cli.attribution.ranks import average_ranks
from mucs_cli.records import flatten
from mucs_cli.reporting.facts import duration, value_text
from mucs_cli.reporting.results import Ranked, RunResults, Variant


@dataclass(frozen=True)
class VariantView:
    """One line of the table of variants; overlap and Spearman are means over the queries shared with the first.

    ``settings``: see ``differing_settings``; keys and values as text.
    """

    name: str
    settings: list[tuple[str, str]]
    steps: str
    reached: str
    unlearn_seconds: str
    score_seconds: str
    overlap: str
    spearman: str


def variant_config(variant: Variant) -> dict[str, Any]:
    """The dotted keys that made a variant: its unlearning's and its scoring's."""
    return flatten(variant.unlearn.get("config", {})) | flatten(variant.manifest.get("config", {}))


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys with different values in the ``configs`` that have them, in the order in which they first appear."""
    values: dict[str, list[Any]] = {}
    for config in configs:
        for key, value in config.items():
            values.setdefault(key, []).append(value)
    return [key for key, found in values.items() if any(value != found[0] for value in found)]


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each variant's configuration what others have otherwise.

    A method's own keys are compared with those of the same method alone, as another's may mean something else by them.
    """

    def is_own(key: str) -> bool:
        return key.startswith("method.")

    shared = differing_keys([{key: config[key] for key in config if not is_own(key)} for config in configs])
    found = []
    for config in configs:
        same_method = [other for other in configs if other.get("method.name") == config.get("method.name")]
        own = [key for key in differing_keys(same_method) if is_own(key)]
        found.append({key: config[key] for key in [*shared, *own] if key in config})
    return found


def overlap(first: Sequence[Ranked], second: Sequence[Ranked]) -> int:
    """How many training images two rankings share, wherever they stand."""
    return len({item.example_id for item in first} & {item.example_id for item in second})


def spearman(first: Variant, second: Variant, query: int) -> float | None:
    """Spearman's rank correlation of two variants' scores of one query, over the images that both scored.

    None where it is undefined: fewer than two images, or one side gives all of them the same score.
    """
    _, left, right = np.intersect1d(first.example_ids, second.example_ids, return_indices=True)
    ours, theirs = average_ranks(first.scores_of(query)[left]), average_ranks(second.scores_of(query)[right])
    if len(ours) < 2 or ours.std() == 0 or theirs.std() == 0:
        return None
    return float(np.corrcoef(ours, theirs)[0, 1])


def variant_view(
    results: RunResults, variant: Variant, settings: Mapping[str, Any], k: int, exclude_exact: bool
) -> VariantView:
    records = variant.unlearn.get("results", [])
    steps = [record["num_steps"] for record in records if record.get("num_steps") is not None]
    reached = [record["reached_bound"] for record in records if record.get("reached_bound") is not None]
    first = results.variants[0]
    shared = [query for query in variant.query_ids if query in first.query_ids]
    overlaps, correlations = [], []
    for query in shared if variant is not first else []:
        ours, theirs = (
            results.ranking(v, query, k, exclude_exact=exclude_exact, key="report.k") for v in (variant, first)
        )
        overlaps.append(overlap(ours, theirs))
        correlations.append(spearman(first, variant, query))
    defined = [value for value in correlations if value is not None]
    return VariantView(
        name=variant.name,
        settings=[(key, value_text(value)) for key, value in settings.items()],
        steps=f"{median(steps):g} ({min(steps)} to {max(steps)})" if steps else "–",
        reached=f"{sum(reached)} of {len(reached)}" if reached else "–",
        unlearn_seconds=duration(variant.unlearn.get("seconds")),
        score_seconds=duration(variant.manifest.get("seconds")),
        overlap=f"{np.mean(overlaps):.1f} of {k}" if overlaps else "–",
        spearman=f"{np.mean(defined):.3f}" if defined else "–",
    )
