"""Ensembles of a run: their members, and how much these agree."""

import itertools
import json
from dataclasses import dataclass

from mucs_cli.artifacts import read_file
from mucs_cli.reporting.results import RunResults

MEMBERS = "members.json"


@dataclass(frozen=True)
class Pair:
    """Two members; means over the queries, None where they are not defined."""

    first: str
    second: str
    spearman: float | None
    top_k_overlap: float | None


@dataclass(frozen=True)
class EnsembleView:
    """One ensemble.

    Args:
        variant: its name.
        combine: how scores are combined.
        members: name and weight.
        num_queries: that the means are over.
        k: scores of a top.
        expected: overlap of two random tops.
        pairs: every two members.
    """

    variant: str
    combine: str
    members: list[tuple[str, float]]
    num_queries: int
    k: int
    expected: float
    pairs: list[Pair]


def ensemble_views(results: RunResults) -> list[EnsembleView]:
    """The ensembles among the run's variants.

    Raises:
        UserError: ``members.json`` is damaged.
    """
    views = []
    for variant in results.variants:
        if MEMBERS not in variant.manifest["outputs"]:
            continue
        found = json.loads(read_file(results.run / "score" / variant.name, variant.manifest, MEMBERS))
        names = found["members"]
        views.append(
            EnsembleView(
                variant.name,
                variant.manifest["config"]["method"].get("combine", ""),
                list(zip(names, found["weights"], strict=True)),
                len(found["queries"]),
                found["k"],
                found["expected_top_k_overlap"],
                [
                    Pair(names[i], names[j], found["spearman"][i][j], found["top_k_overlap"][i][j])
                    for i, j in itertools.combinations(range(len(names)), 2)
                ],
            )
        )
    return views
