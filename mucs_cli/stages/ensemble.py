"""Scores of an ensemble: finished scores of its members, combined query by query."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mucs_cli.artifacts import write_json
from mucs_cli.attribution.ensemble import borda, rank_correlations, rank_mean, top_overlaps, z_mean
from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.overlap import expected_overlap
from mucs_cli.reporting.groups import choose_k
from mucs_cli.stages.finished import FinishedScores, ScoreFiles
from mucs_cli.stages.similarity import WholeRowScorer
from mucs_cli.stages.work import Work

MEMBERS = "members.json"


class EnsembleScorer(WholeRowScorer):
    """The combined scores, and ``members.json``: how much the members differ.

    Raises:
        UserError: fewer than two members, one that cannot be used or lacks a query, or weights that do not fit.
    """

    def __init__(self, work: Work):
        super().__init__(work)
        self.config = work.config.method
        self.k = choose_k(self.config.k, work.num_images, "method.k")
        files = ScoreFiles(work.context.run, "method.members")
        ensembles = [name for name in files.names if files.method_of(name) == "ensemble"]
        names = files.choose_exact(self.config.members, but=ensembles)
        if len(names) < 2:
            raise UserError(
                "method.members",
                f"got {', '.join(names) or 'none'}; an ensemble needs two. Run mucs score with other methods first.",
            )
        self.weights = self._weights(names)
        self.members: list[FinishedScores] = [files.read(name) for name in names]
        for member in self.members:
            member.require(work.queries.selected, "method.members")
        self.inputs = {
            "members": names,
            **{f"scores of {member.name}": member.fingerprints(work.queries.selected) for member in self.members},
        }

    def _weights(self, names: Sequence[str]) -> list[float] | None:
        weights: list[float] | None = self.config.weights
        if weights is None:
            return None
        if self.config.members is None:
            raise UserError(
                "method.weights", f"got {weights} without method.members, whose order they follow. Name the members."
            )
        if len(weights) != len(names):
            raise UserError(
                "method.weights",
                f"got {len(weights)} of them for {len(names)} members; expected one a member. Add all.",
            )
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise UserError("method.weights", f"got {weights}; expected numbers >= 0, not all 0. Correct them.")
        return weights

    def row(self, query: int) -> Tensor:
        members = self._members_rows(query)
        if self.config.combine == "borda":
            return borda(members, self.k, self.weights)[0]
        return {"rank_mean": rank_mean, "z_mean": z_mean}[self.config.combine](members, self.weights)[0]

    def _members_rows(self, query: int) -> Tensor:
        """[M, 1, N]."""
        return torch.stack([member.rows([query]) for member in self.members])

    def write_files(self, folder: Path, query_ids: Sequence[int]) -> list[Path]:
        """``members.json``: Spearman's correlation and top-k overlap of every two members, mean over the queries."""
        queries = [query for query in query_ids if all(query in member.place for member in self.members)]
        correlations, overlaps = Means(len(self.members)), Means(len(self.members))
        for query in queries:
            rows = self._members_rows(query)
            correlations.add(rank_correlations(rows))
            overlaps.add(top_overlaps(rows, self.k))
        diversity = {
            "members": [member.name for member in self.members],
            "weights": self.weights or [1.0] * len(self.members),
            "queries": queries,
            "spearman": correlations.values(),
            "k": self.k,
            "top_k_overlap": overlaps.values(),
            "expected_top_k_overlap": expected_overlap(self.k, self.k, self.work.num_images),
        }
        write_json(folder / MEMBERS, diversity)
        return [folder / MEMBERS]

    def facts(self) -> dict[str, Any]:
        return {"members": [member.name for member in self.members], "k": self.k}


class Means:
    """Mean matrices of which single queries' entries may be missing (NaN)."""

    def __init__(self, size: int):
        self.total = torch.zeros(size, size, dtype=torch.float64)
        self.count = torch.zeros(size, size, dtype=torch.float64)

    def add(self, matrix: Tensor) -> None:
        self.total += matrix.nan_to_num(0.0)
        self.count += ~matrix.isnan()

    def values(self) -> list[list[float | None]]:
        """With nine digits; None where every query's entry was missing."""
        return [
            [round(float(total / count), 9) if count else None for total, count in zip(totals, counts, strict=True)]
            for totals, counts in zip(self.total, self.count, strict=True)
        ]
