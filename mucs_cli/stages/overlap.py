"""Overlap of top images: of queries under one variant, and of variants on one query, beside that of random sets."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mucs_cli.attribution.ranks import top
from mucs_cli.evaluation.measures.overlap import Ids, Overlap, common_ids, id_overlap
from mucs_cli.evaluation.measures.statistics import CONFIDENCE
from mucs_cli.reporting.charts import heat_map
from mucs_cli.reporting.tables import Estimate, Table
from mucs_cli.rng import generator
from mucs_cli.stages.finished import FinishedScores
from mucs_cli.stages.top_evaluator import TopEvaluator

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class OverlapEvaluator(TopEvaluator):
    """Overlaps of the highest scores. A query whose scores are all the same has no top, and is left out and counted."""

    def evaluate(self) -> dict[str, Any]:
        tops = {variant.name: self._tops(variant) for variant in self.variants}
        return {
            "k": self.k,
            "num_images": self.num_images,
            "num_resamples": self.config.num_resamples,
            "confidence": CONFIDENCE,
            "seed": self.config.seed,
            "across_queries": [self._within(name, tops[name]) for name in tops],
            "same_query": [self._between(pair, tops) for pair in itertools.combinations(tops, 2)],
        }

    def _tops(self, variant: FinishedScores) -> dict[int, Ids | None]:
        """Query -> example ids of its highest scores; None where all are the same."""
        found: dict[int, Ids | None] = {}
        for query in self.queries_of(variant):
            row = variant.row(query)
            found[query] = variant.example_ids[top(row, self.k)] if row.max() > row.min() else None
        return found

    def _within(self, name: str, tops: dict[int, Ids | None]) -> dict[str, Any]:
        sets = [ids for ids in tops.values() if ids is not None]
        found = common_ids(sets, *self._settings()) if len(sets) > 1 else None
        return {
            "variant": name,
            "num_queries": len(sets),
            "num_constant_queries": len(tops) - len(sets),
            **self._numbers(found),
        }

    def _between(self, pair: Sequence[str], tops: dict[str, dict[int, Ids | None]]) -> dict[str, Any]:
        first, second = (tops[name] for name in pair)
        sets = [
            (ids, other) for query, ids in first.items() if ids is not None and (other := second.get(query)) is not None
        ]
        found = id_overlap([a for a, _ in sets], [b for _, b in sets], *self._settings()) if sets else None
        return {"variants": list(pair), "num_queries": len(sets), **self._numbers(found)}

    def _settings(self) -> tuple[Any, ...]:
        # one stream for all: every variant is judged on the same resamples of the queries
        return self.num_images, generator(self.config.seed, "overlap_resamples"), self.config.num_resamples

    def _numbers(self, found: Overlap | None) -> dict[str, Any]:
        if found is None:
            return {"overlap": None, "low": None, "high": None, "expected": self.k / self.num_images}
        return {"overlap": found.mean, "low": found.low, "high": found.high, "expected": found.expected}

    def table(self, results: dict[str, Any]) -> Table:
        rows = [("across queries", entry["variant"], "", entry) for entry in results["across_queries"]]
        rows += [("same query", *entry["variants"], entry) for entry in results["same_query"]]
        return Table(
            f"overlap of the {results['k']} highest of {results['num_images']} scores, "
            f"{results['confidence']:.0%} interval over queries; expected: of random sets",
            ("comparison", "variant", "other_variant", "queries", "overlap", "expected"),
            [
                (
                    comparison,
                    variant,
                    other,
                    entry["num_queries"],
                    Estimate(entry["overlap"], entry["low"], entry["high"]),
                    entry["expected"],
                )
                for comparison, variant, other, entry in rows
            ],
        )

    def charts(self, results: dict[str, Any]) -> "dict[str, Figure]":
        names = [entry["variant"] for entry in results["across_queries"]]
        pairs = results["same_query"]
        if not pairs:
            return {}
        values = np.full((len(names), len(names)), np.nan)
        for entry in pairs:
            if entry["overlap"] is not None:
                first, second = (names.index(name) for name in entry["variants"])
                values[first, second] = values[second, first] = entry["overlap"]
        title = (
            f"overlap of the {results['k']} highest of {results['num_images']} scores of the same query, mean over "
            f"queries; of random sets: {pairs[0]['expected']:.3f}"
        )
        return {"same_query": heat_map(names, values, title, 0, 1)}
