"""``mucs score``: scores every training image for every query, by the method that the configuration names."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mucs_cli import locks, processes
from mucs_cli.artifacts import fingerprint, write_text
from mucs_cli.attribution.scoring import Block
from mucs_cli.block_file import map_tensors
from mucs_cli.data.images import ImageDataset
from mucs_cli.reporting.group_files import write_groups
from mucs_cli.reporting.groups import choose_groupings, choose_k
from mucs_cli.runtime import Progress, log
from mucs_cli.stage_folder import Stage, facts_of, recorded_file, require_manifest
from mucs_cli.stages.blocks import Arrays, BlockWork, fill_file
from mucs_cli.stages.context import Context
from mucs_cli.stages.finished import SCORES, map_scores
from mucs_cli.stages.loading import num_settled, refuse_unsettled
from mucs_cli.stages.loss_comparison import LossComparison
from mucs_cli.stages.races import RACES, Races, Row
from mucs_cli.stages.scorer import Scorer
from mucs_cli.stages.slices import fill
from mucs_cli.stages.work import Work
from mucs_cli.text import csv_text, inert

TOP_ROWS = 100
"""Rows a query in top.csv; the whole ranking is in scores.safetensors."""


def run(context: Context) -> None:
    """Writes ``score/<variant>/``, and what the method keeps beside it for other variants (``score/_base/``, ...)."""
    warn_of_unused_keys(context)
    work = Work.load(context)
    data = work.inputs.pixels
    columns = {name: [cells[i] for i in data.training] for name, cells in data.metadata.items()}
    groupings = choose_groupings(context.config.score.group_by, columns, "score.group_by")
    group_k = choose_k(context.config.score.group_k, work.num_images, "score.group_k")
    scorer = context.method.scorer(work)
    folder = context.folder("score", context.score_variant())
    stage = context.stage(
        folder,
        "score",
        sections=context.score_sections,
        inputs={"dataset": data.fingerprint, "model": work.inputs.model.fingerprint, **scorer.inputs},
        queries=work.queries.wanted,
        spent=(RACES,),
    )
    k = num_settled(context.config.score.top_k, work.num_images) if context.races else None
    if k is not None:
        refuse_unsettled(context.config.score.group_k, k, "score.group_k")
        group_k = min(group_k, k)
    compute_into = partial(compute, work=work, scorer=scorer, folder=folder)
    if not fill(context, stage, compute_into, partial(add, work=work, scorer=scorer)):
        log.info("score: up to date (%s)", folder)
    if processes.is_first():
        # other slices replace the scores while they have the lock
        with locks.locked(folder, wait=context.config.queries.index is not None):
            sha256 = require_manifest(folder, "score")["outputs"][SCORES]["sha256"]
            found = map_scores(folder / SCORES, sha256, N=work.num_images)
            write_groups(folder / "groups.csv", groupings, found["score"], found["query_id"].tolist(), group_k)


def compute(stage: Stage, work: Work, scorer: Scorer, folder: Path) -> None:
    """Scores the stage's queries, into its folder; ``folder`` is the variant's, of which the stage may be a slice."""
    finished = finished_scores(stage, work)
    processes.on_first(lambda: stage.keep_aside(SCORES) if finished else None)
    new = [query for query in stage.queries or () if query not in finished]
    races = races_of(stage, work, scorer)
    races.prepare() if races is not None else scorer.prepare()
    facts = write_scores(stage, work, scorer, races, new, finished)
    facts |= {"device": str(work.inputs.device), "processes": processes.count(), **scorer.facts()}
    processes.on_first(lambda: finish(stage, work, scorer, sorted({*new, *finished}), facts))
    log.info("score: %d queries x %d training images in %s", len(new), work.num_images, folder)


def add(stage: Stage, slice_folder: Path, manifest: Mapping[str, Any], work: Work, scorer: Scorer) -> None:
    """Adds the scores of a slice, see ``slices.fill``."""
    added = map_scores(slice_folder / SCORES, manifest["outputs"][SCORES]["sha256"], N=work.num_images)
    old = finished_scores(stage, work)
    if old:
        stage.keep_aside(SCORES)
    finished = rows_of(added) | old
    facts = facts_of(manifest)
    facts |= write_scores(stage, work, scorer, races_of(stage, work, scorer), [], finished, manifest.get("races", {}))
    finish(stage, work, scorer, sorted(finished), facts, manifest["seconds"])


def races_of(stage: Stage, work: Work, scorer: Scorer) -> Races | None:
    """What settles the scores by races; None where they are exact."""
    return Races(work, scorer, stage) if work.context.races and isinstance(scorer, LossComparison) else None


def write_scores(
    stage: Stage,
    work: Work,
    scorer: Scorer,
    races: Races | None,
    new: Sequence[int],
    finished: Mapping[int, Row],
    raced: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the score file: new queries, for which scorer or races are prepared, and finished ones.

    Args:
        raced: what a slice's manifest says of its races, by query.
    Returns:
        What the manifest is to record.
    """
    path = stage.folder / SCORES
    if races is not None:
        facts = races.write(path, new, finished)
        return facts | {"races": {**stage.previous.get("races", {}), **(raced or {}), **facts["races"]}}
    scores = Scores(work, scorer, new, finished)
    fill_file(path, fingerprint(stage.identity, scores.query_ids), scores)
    return {}


def finish(
    stage: Stage,
    work: Work,
    scorer: Scorer,
    query_ids: Sequence[int],
    facts: Mapping[str, Any],
    seconds: float | None = None,
) -> None:
    """Writes what stands beside the scores, and the manifest.

    Args:
        query_ids: of all scores.
        facts: what else it is to record.
        seconds: see ``Stage.finish``.
    """
    num_rows = min(TOP_ROWS, facts.get("top_k", TOP_ROWS))
    scores = map_tensors(stage.folder / SCORES, ["score", "query_id"])
    write_top(stage.folder / "top.csv", scores, work.inputs.pixels, num_rows)
    outputs = [stage.folder / SCORES, stage.folder / "top.csv", *scorer.write_files(stage.folder, query_ids)]
    counts = {"queries": len(query_ids), "training_images": work.num_images}
    stage.finish({**facts, "counts": counts}, outputs, seconds)


def warn_of_unused_keys(context: Context) -> None:
    """A sweep over methods may hold keys of one of them only, so that this is no error."""
    for key in context.typed:
        section = key.partition(".")[0]
        if section in ("unlearning", "noise_bank") and section not in context.method.sections:
            log.warning("%s has no effect with method=%s", key, context.method.name)
    if context.config.score.mode == "adaptive" and not context.races:
        log.warning("score.mode=adaptive has no effect with method=%s, whose scores are exact", context.method.name)
    if "score.precision" in context.typed and "noise_bank" not in context.method.sections:
        log.warning("score.precision has no effect with method=%s, which compares no losses", context.method.name)
    of_another_mode = ("keep_losses", "memory_budget") if context.races else ("top_k", "confidence")
    for key in (f"score.{name}" for name in of_another_mode):
        if key in context.typed:
            log.warning("%s has no effect with score.mode=%s", key, context.config.score.mode)


def finished_scores(stage: Stage, work: Work) -> dict[int, Row]:
    """Of a finished stage that lacks some queries, those that it has; empty without one."""
    if not stage.previous:
        return {}
    path = recorded_file(stage.folder, stage.previous, SCORES)
    return rows_of(map_scores(path, stage.previous["outputs"][SCORES]["sha256"], N=work.num_images))


def rows_of(tensors: Mapping[str, np.memmap]) -> dict[int, Row]:
    """The rows of a score file, memory-mapped."""
    names = [name for name in ("score", "draws") if name in tensors]
    return {
        query: {name: tensors[name][row] for name in names} for row, query in enumerate(tensors["query_id"].tolist())
    }


class Scores(BlockWork):
    """``scores.safetensors``: finished rows as they are, the others as the scorer gives them.

    Args:
        work: what to score.
        scorer: the method's, prepared.
        new: the queries to score.
        finished: rows of others that are there already.
    """

    title = "score"
    tells_progress = True

    def __init__(self, work: Work, scorer: Scorer, new: Sequence[int], finished: Mapping[int, Row]):
        self.work, self.scorer, self.finished = work, scorer, finished
        self.unit, self.is_long = scorer.unit, scorer.is_long
        self.query_ids = sorted({*new, *finished})
        self.row = {query: row for row, query in enumerate(self.query_ids)}
        self.passes = scorer.passes(new) if new else []
        self.tensors = {
            "score": ("float32", (len(self.query_ids), work.num_images)),
            "query_id": ("int64", (len(self.query_ids),)),
            "example_id": ("int64", (work.num_images,)),
        }

    def blocks(self) -> list[Block]:
        return self.scorer.blocks()

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return self.scorer.cost(block, part)

    def begin(self, arrays: Arrays) -> None:
        arrays["query_id"][:] = self.query_ids
        arrays["example_id"][:] = self.work.inputs.data.training
        for query, row in self.finished.items():
            arrays["score"][self.row[query]] = row["score"]

    def load(self, part: Sequence[int]) -> Any:
        return self.scorer.load(part)

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        return self.scorer.scores(part, loaded, block, progress).float().cpu()

    def places(self, arrays: Arrays, block: Block, part: Sequence[int]) -> list[np.ndarray]:
        return [arrays["score"][self.row[query], block.start : block.stop] for query in part]

    def shrink(self, error: RuntimeError) -> None:
        self.scorer.shrink(error)


def write_top(path: Path, scores: Mapping[str, np.memmap], data: ImageDataset, count: int) -> None:
    """``query,rank,example_id,file,score`` and the metadata columns, of the highest scores; ties by example_id."""
    rows: list[list[Any]] = [["query", "rank", "example_id", "file", "score", *data.metadata]]
    for query, row in zip(scores["query_id"].tolist(), scores["score"], strict=True):
        for rank, position in enumerate(np.argsort(-row, kind="stable")[:count], start=1):
            example = int(data.training[position])
            metadata = [column[example] for column in data.metadata.values()]
            rows.append([query, rank, example, data.file[example], f"{row[position]:.9g}", *metadata])
    write_text(path, csv_text([inert(cell) for cell in row] for row in rows))
