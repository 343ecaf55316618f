"""The groups of a finished run's scores, as ``mucs show`` and the report show them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mucs_cli.reporting.groups import (
    Grouping,
    GroupScore,
    choose_groupings,
    choose_k,
    group_scores,
    mean_groups,
)
from mucs_cli.reporting.results import RunResults, Variant

SHOWN_GROUPS = 10
"""Groups of a table in the report; it says how many more there are."""


@dataclass(frozen=True)
class GroupTable:
    """One query's groups by one column, the first of them; ``scale`` is the largest share of the table."""

    column: str
    rows: list[GroupScore]
    num_more: int
    scale: float


@dataclass(frozen=True)
class OverallRow:
    """A group over all queries; ``shares`` of the top are one a variant."""

    group: str
    num_images: int
    share_of_images: float
    shares: list[float]


@dataclass(frozen=True)
class OverallTable:
    """The groups of one column over all queries, the first of them; ``scale`` is the largest share of the table."""

    column: str
    rows: list[OverallRow]
    num_more: int
    scale: float


def columns_of(results: RunResults, variant: Variant) -> dict[str, list[str]]:
    """Metadata column -> its cell for each image that the variant scored, in the order of its scores."""
    rows = [results.metadata(int(example_id)) for example_id in variant.example_ids]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def query_groups(
    results: RunResults, variant: Variant, query: int, grouping: Grouping, k: int, exclude_exact: bool
) -> list[GroupScore]:
    """The groups of one query, ranked as its images are: equal scores by example_id, exact copies left out if asked.

    Args:
        results, variant, query: whose scores.
        grouping: of the variant's images, in the order of its scores.
        k: how many of the highest scores are the top; all where fewer are left.
        exclude_exact: leave exact copies of the query out.

    Raises:
        UserError: the variant has no such query.
    """
    scores = variant.scores_of(query)
    kept = np.argsort(variant.example_ids, kind="stable")
    if exclude_exact:
        kept = kept[~np.isin(variant.example_ids[kept], results.exact_copies[query])]
    if not len(kept):
        return []
    return group_scores(scores[kept], Grouping(grouping.names, grouping.index[kept]), min(k, len(kept)))


class RunGroups:
    """The groups of all queries of all variants, for the report.

    Args:
        results: a finished run.
        group_by: metadata columns; None: those worth it, see ``choose_groupings``.
        group_k: highest scores that are a query's top; None: see ``choose_k``.
        exclude_exact: leave exact copies of a query out.

    Raises:
        UserError: there is no such column, or ``group_k`` is more than the images scored.
    """

    def __init__(self, results: RunResults, group_by: Sequence[str] | None, group_k: int | None, exclude_exact: bool):
        first = results.variants[0]
        self.k = choose_k(group_k, len(first.example_ids), "report.group_k")
        if group_k is None:
            self.k = min(self.k, *(variant.num_settled or self.k for variant in results.variants))
        self.columns = list(choose_groupings(group_by, columns_of(results, first), "report.group_by"))
        self.variant_names = results.variant_names
        self.scores: dict[tuple[str, str, int], list[GroupScore]] = {}
        """(variant, column, query) -> its groups."""
        for variant in results.variants:
            copies = max((len(results.exact_copies[query]) for query in variant.query_ids), default=0)
            variant.require_settled(self.k, "report.group_k", copies if exclude_exact else 0)
            groupings = choose_groupings(self.columns, columns_of(results, variant), "report.group_by")
            for column, grouping in groupings.items():
                for query in variant.query_ids:
                    self.scores[variant.name, column, query] = query_groups(
                        results, variant, query, grouping, self.k, exclude_exact
                    )

    def of_query(self, variant: str, query: int) -> list[GroupTable]:
        """A table a column."""
        tables = []
        for column in self.columns:
            groups = self.scores[variant, column, query]
            rows = groups[:SHOWN_GROUPS]
            shares = [share for row in rows for share in (row.share_of_top_k, row.share_of_images)]
            tables.append(GroupTable(column, rows, len(groups) - len(rows), max(shares, default=1.0)))
        return tables

    def overall(self) -> list[OverallTable]:
        """A table a column: means over the queries that each variant scored, in the order of the first variant."""
        return [self._overall(column) for column in self.columns]

    def _overall(self, column: str) -> OverallTable:
        means = [
            mean_groups([groups for (variant, by, _), groups in self.scores.items() if (variant, by) == (name, column)])
            for name in self.variant_names
        ]
        shares = [{mean.group: mean.share_of_top_k for mean in groups} for groups in means]
        rows = [
            OverallRow(
                mean.group, mean.num_images, mean.share_of_images, [share.get(mean.group, 0.0) for share in shares]
            )
            for mean in means[0][:SHOWN_GROUPS]
        ]
        scale = max((share for row in rows for share in (row.share_of_images, *row.shares)), default=1.0)
        return OverallTable(column, rows, len(means[0]) - len(rows), scale)


def share_text(share: float) -> str:
    """A share in per cent, with a space that does not break."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"
