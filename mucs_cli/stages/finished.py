"""Finished score files of a run, read again: members of an ensemble, and what evaluations compare."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import check_hash, fingerprint
from mucs_cli.block_file import map_tensors
from mucs_cli.errors import DamagedError, UserError, did_you_mean
from mucs_cli.reporting.results import variant_order
from mucs_cli.runtime import log
from mucs_cli.stage_folder import command_hint, require_manifest
from mucs_cli.tensor_forms import SCORE_FORMS, require_scores

SCORES = "scores.safetensors"


def map_scores(path: Path, sha256: str, **sizes: int) -> dict[str, np.memmap]:
    """The tensors of a score file, memory-mapped: all of them may be more than the memory holds.

    Args:
        path: the file.
        sha256: that its manifest has.
        sizes: see ``require_scores``.
    Raises:
        UserError: it is not there, damaged, or no score file.
    """
    check_hash(path, sha256)
    found = map_tensors(path, list(SCORE_FORMS))
    require_scores(path, found, **sizes)
    return found


@dataclass(frozen=True)
class FinishedScores:
    """The scores of one variant.

    Args:
        name: the folder's name below ``score/``.
        path: the file.
        manifest: the folder's.
        score: float32 [Q, N], memory-mapped, higher = more influential.
        query_ids: Q ids, one a row.
        example_ids: int64 [N], one a column.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    score: np.memmap
    query_ids: list[int]
    example_ids: np.ndarray

    @cached_property
    def place(self) -> dict[int, int]:
        """Query -> its row."""
        return {query: row for row, query in enumerate(self.query_ids)}

    def row(self, query: int) -> np.ndarray:
        """A query's scores, [N]; checked to be finite.

        Raises:
            UserError: they are not.
        """
        row = np.array(self.score[self.place[query]])
        if not np.isfinite(row).all():
            raise UserError(
                str(self.path),
                f"has scores of query {query} that are not finite. Rerun mucs score with overwrite=true.",
            )
        return row

    def rows(self, queries: Sequence[int]) -> Tensor:
        """Scores of some queries, [len(queries), N]."""
        return torch.from_numpy(np.stack([self.row(query) for query in queries]))

    def fingerprints(self, queries: Iterable[int]) -> dict[int, str]:
        """id -> fingerprint of each query's scores."""
        return {query: fingerprint(self.row(query)) for query in queries}

    def require_settled(self, k: int, key: str) -> None:
        """Raises UserError, naming ``key``, where the ``k`` highest scores of a query are not all settled."""
        settled = self.manifest.get("top_k")
        if settled is not None and k > settled:
            raise UserError(
                key,
                f"got {k}; score.mode=adaptive has settled the {settled} highest scores of {self.name} only. Choose "
                "fewer, or score again with a larger score.top_k.",
            )

    def require(self, queries: Sequence[int], key: str) -> None:
        """Raises UserError, naming ``key``, where a query has no scores."""
        missing = [query for query in queries if query not in self.place]
        if missing:
            raise UserError(
                key,
                f"got {self.name}, which has no scores of query {missing[0]} ({len(missing)} of {len(queries)} are "
                f"missing). Score them first ({command_hint(self.path, 'score')}), or choose others by queries.index.",
            )


class ScoreFiles:
    """The finished score files of a run.

    Args:
        run: the run's folder.
        key: the configuration key that names variants, for errors.
    Attributes:
        names: of all finished variants; ``mucs`` first, then by name.
        num_images: N.
        queries: id -> fingerprint of the run's queries.
    Raises:
        UserError: the run has no data or no queries.
    """

    def __init__(self, run: Path, key: str):
        self.run, self.key = run, key
        data, sample = require_manifest(run / "data", "train"), require_manifest(run / "sample", "sample")
        self.num_images = int(data["num_training"])
        self.queries = {int(query): print_ for query, print_ in sample["queries"].items()}
        self.dataset, self.model = data["fingerprint"], sample["inputs"]["model"]
        folders = [path.parent.name for path in (run / "score").glob("*/manifest.json")]
        self.names = sorted((name for name in folders if not name.startswith("_")), key=variant_order)

    def method_of(self, name: str) -> str:
        """The method that a variant's scores come from."""
        method: str = require_manifest(self.run / "score" / name, "score")["config"]["method"]["name"]
        return method

    def choose_exact(self, asked: Sequence[str] | None, but: Iterable[str] = ()) -> list[str]:
        """As ``choose``, of those whose scores all rest on the same draws.

        Raises:
            UserError: one that is asked for was scored with ``score.mode=adaptive``, or as in ``choose``.
        """
        mixed = [name for name in self.names if "top_k" in require_manifest(self.run / "score" / name, "score")]
        for name in mixed:
            if name in (asked or ()):
                raise UserError(
                    self.key,
                    f"got {name}, whose scores rest on different numbers of draws (score.mode=adaptive); expected "
                    "exact ones. Score with score.mode=exact, or leave it out.",
                )
            if asked is None and name not in but:
                log.warning("%s is left out: its scores rest on different numbers of draws (score.mode=adaptive)", name)
        return self.choose(asked, [*but, *mixed])

    def choose(self, asked: Sequence[str] | None, but: Iterable[str] = ()) -> list[str]:
        """The variants that are asked for; all finished ones, ``but`` for some, where none are.

        Raises:
            UserError: one does not exist or has not finished, or is named twice.
        """
        if asked is None:
            return [name for name in self.names if name not in set(but)]
        for name in asked:
            if name not in self.names:
                is_begun = not name.startswith("_") and (self.run / "score" / name / "state.json").exists()
                got = f"{name!r}, which has not finished" if is_begun else repr(name)
                known = f"expected some of {', '.join(self.names)}" if self.names else "no scores have finished"
                raise UserError(self.key, f"got {got}; {known}.{did_you_mean(name, self.names)} Run mucs score first.")
        twice = [name for name in asked if list(asked).count(name) > 1]
        if twice:
            raise UserError(self.key, f"got {twice[0]} twice; expected each variant once. Leave one out.")
        return list(asked)

    def read(self, name: str) -> FinishedScores:
        """The scores of a finished variant.

        Raises:
            UserError: the file is damaged, or of other images, another model or other queries than the run has now.
        """
        folder = self.run / "score" / name
        path, manifest = folder / SCORES, require_manifest(folder, "score")
        known = {int(query): print_ for query, print_ in manifest["queries"].items()}
        inputs = manifest["inputs"]
        compared = [("data", self.dataset, inputs.get("dataset")), ("model", self.model, inputs.get("model"))]
        compared += [(f"query {query}", self.queries.get(query), scored) for query, scored in known.items()]
        for what, ours, scored in compared:
            if ours != scored:
                raise UserError(
                    str(folder / "manifest.json"),
                    f"got scores of another {what} ({str(scored)[:16]}) than the run has ({str(ours)[:16]}). "
                    "Rerun mucs score with overwrite=true.",
                )
        found = map_scores(path, manifest["outputs"][SCORES]["sha256"], Q=len(known), N=self.num_images)
        if found["query_id"].tolist() != sorted(known):
            raise DamagedError(
                str(path), "has scores of other queries than its manifest names. Rerun mucs score with overwrite=true."
            )
        return FinishedScores(
            name, path, manifest, found["score"], found["query_id"].tolist(), np.array(found["example_id"])
        )
