"""A query and what each variant says of it, ready for the page."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mucs_cli.evaluation.measures.standing_out import StandingOut, standing_out
from mucs_cli.reporting.facts import value_text
from mucs_cli.reporting.group_views import GroupTable, RunGroups
from mucs_cli.reporting.pictures import PictureKey
from mucs_cli.reporting.plots import histogram
from mucs_cli.reporting.results import Ranked, RunResults, Variant
from mucs_cli.schemas import ReportConfig


@dataclass(frozen=True)
class Row:
    """One variant's answer for one query; lowest, median and highest are of all its scores."""

    variant: str
    ranked: list[Ranked]
    histogram: Markup
    lowest: float
    median: float
    highest: float
    standing: StandingOut
    unlearning: dict[str, Any]
    groups: list[GroupTable]


@dataclass(frozen=True)
class Nearest:
    """The training image nearest to the query; ``own_distance`` as in ``NearDuplicates``."""

    example_id: int
    file: str
    distance: float
    own_distance: float | None
    is_near: bool


@dataclass(frozen=True)
class QueryView:
    """A query and what each variant says of it."""

    query: int
    is_held_out: bool
    facts: Sequence[tuple[str, str]]
    num_copies: int
    nearest: Nearest | None
    rows: list[Row]

    @property
    def standing_out(self) -> list[str]:
        """The variants whose highest score stands out."""
        return [row.variant for row in self.rows if row.standing.stands_out]

    def pictures(self) -> Iterator[PictureKey]:
        """Everything of it that is shown as a picture."""
        yield "query", self.query
        if self.nearest is not None:
            yield "training", self.nearest.example_id
        for row in self.rows:
            yield from (("training", item.example_id) for item in row.ranked)


def query_view(results: RunResults, query: int, settings: ReportConfig, groups: RunGroups) -> QueryView:
    """One query.

    Raises:
        UserError: ``report.k`` is more than there is to rank.
    """
    rows = [
        row(results, variant, query, settings, groups) for variant in results.variants if query in variant.query_ids
    ]
    file = results.query_file(query)
    facts = [] if file is None else [("file", file)]
    facts += [(name, value) for name, value in results.query_metadata(query).items() if value]
    facts += [
        (name, value_text(results.samples[name][query].tolist()))
        for name in ("condition", "seed")
        if name in results.samples
    ]
    is_held_out = results.is_held_out(query)
    return QueryView(query, is_held_out, facts, len(results.exact_copies[query]), nearest_of(results, query), rows)


def row(results: RunResults, variant: Variant, query: int, settings: ReportConfig, groups: RunGroups) -> Row:
    exclude = settings.exclude_exact
    ranked = results.ranking(variant, query, settings.k, exclude_exact=exclude, key="report.k")
    scores = variant.scores_of(query)
    ranking = scores[~np.isin(variant.example_ids, results.exact_copies[query])] if exclude else scores
    return Row(
        variant.name,
        ranked,
        histogram(scores, [item.score for item in ranked]),
        float(scores.min()),
        float(np.median(scores)),
        float(scores.max()),
        standing_out(ranking),
        variant.unlearning_of(query),
        groups.of_query(variant.name, query),
    )


def nearest_of(results: RunResults, query: int) -> Nearest | None:
    found = results.near_duplicates
    if found is None:
        return None
    example_id = int(found.example_id[query])
    return Nearest(
        example_id,
        results.index[example_id]["file"],
        float(found.distance[query]),
        found.own_distance,
        bool(found.is_near[query]),
    )
