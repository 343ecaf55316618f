"""Ensembles of a run: their members, and how much these agree."""

import itertools
from dataclasses import dataclass
from typing import Any

from mucs_cli.artifacts import check_file
from mucs_cli.errors import DamagedError
from mucs_cli.records import is_text_list, read_json
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
        folder = results.run / "score" / variant.name
        check_file(folder, variant.manifest, MEMBERS)
        found = read_json(folder / MEMBERS)
        if not is_diversity(found):
            raise DamagedError(
                str(folder / MEMBERS), "is not as mucs writes it. Rerun mucs score method=ensemble with overwrite=true."
            )
        names = found["members"]
        views.append(
            EnsembleView(
                variant.name,
                str(variant.manifest["config"]["method"].get("combine", "")),
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


def is_diversity(found: Any) -> bool:
    """Whether a JSON value is a ``members.json``."""
    if not isinstance(found, dict) or not is_text_list(found.get("members")):
        return False
    count = len(found["members"])
    return (
        is_row(found.get("weights"), count)
        and isinstance(found.get("queries"), list)
        and type(found.get("k")) is int
        and is_number(found.get("expected_top_k_overlap"))
        and all(is_square(found.get(name), count) for name in ("spearman", "top_k_overlap"))
    )


def is_square(value: Any, count: int) -> bool:
    """Whether a value has a row of numbers a member, a number or None each."""
    return isinstance(value, list) and len(value) == count and all(is_row(row, count, or_none=True) for row in value)


def is_row(value: Any, count: int, or_none: bool = False) -> bool:
    allowed = isinstance(value, list) and all(is_number(item) or (or_none and item is None) for item in value)
    return allowed and len(value) == count


def is_number(value: Any) -> bool:
    return type(value) in (int, float)
