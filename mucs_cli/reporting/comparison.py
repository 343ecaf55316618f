"""How variants differ: in their configuration, and in the rankings they give."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mucs_cli.artifacts import flatten
from mucs_cli.attribution.ranks import average_ranks
from mucs_cli.reporting.results import Ranked, Variant


def variant_config(variant: Variant) -> dict[str, Any]:
    """The dotted keys that made a variant: its unlearning's and its scoring's."""
    return flatten(variant.unlearn.get("config", {})) | flatten(variant.manifest.get("config", {}))


def differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of ``configs``, in the order in which they first appear."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs)]


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
