"""``mucs unlearn``: fine-tunes one model a query that has unlearned it, and saves the tensors that changed."""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mucs_cli import processes
from mucs_cli.artifacts import entry_of, link_or_copy, write_tensors, write_text
from mucs_cli.attribution.unlearning import UnlearningResult
from mucs_cli.records import are_outputs, are_results, is_text_list
from mucs_cli.runtime import LONG_REHEARSAL, Progress, log
from mucs_cli.stage_folder import Stage, facts_of
from mucs_cli.stages.checkpoints import QueryCheckpoints
from mucs_cli.stages.context import Context
from mucs_cli.stages.query_records import QueryRecords
from mucs_cli.stages.slices import fill
from mucs_cli.stages.unlearned import query_file
from mucs_cli.stages.unlearner import Unlearner
from mucs_cli.stages.work import Work

LOSSES = "log.jsonl"
CHECKPOINT = "checkpoint"
DONE = "done"


def run(context: Context) -> None:
    """Writes ``unlearn/<variant>/``: ``query_<i>.safetensors``, ``log.jsonl`` and the manifest.

    Several processes share the queries out; each saves the models of its own, the first one all else.
    """
    sections = context.method.unlearning_sections(context.config)
    if not sections:
        log.info("unlearn: nothing to do for method=%s", context.method.name)
        return
    work = Work.load(context)
    unlearner = context.method.unlearner(work)
    folder = context.folder("unlearn", context.unlearn_variant())
    queries, model = work.queries, work.inputs.model
    stage = context.stage(
        folder,
        "unlearn",
        sections=sections,
        inputs={"dataset": work.inputs.data.fingerprint, "model": model.fingerprint, **unlearner.inputs},
        queries=queries.wanted,
        scores_only=False,
        file_of=lambda query: query_file(folder, query).name,
        spent=(CHECKPOINT, DONE),
    )
    if not fill(context, stage, lambda stage: unlearn_queries(stage, work, unlearner), add):
        log.info("unlearn: up to date (%s)", folder)


def unlearn_queries(stage: Stage, work: Work, unlearner: Unlearner) -> None:
    """Unlearns the stage's queries, into its folder."""
    folder, records = stage.folder, records_of(stage)
    unlearner.checkpoints = QueryCheckpoints(folder / CHECKPOINT, work.config.checkpoint.every_seconds)
    unlearner.prepare()
    num_steps = dict(
        processes.on_first(
            lambda: [(query, done.summary["num_steps"]) for query, done in finished_queries(stage).items()]
        )
    )
    todo = [query for query in stage.queries or () if query not in num_steps]
    typical = median(num_steps.values()) if num_steps else 0
    total = len(stage.queries or ())
    with unlearner.checkpoints, Progress("unlearn", total, "queries", total - len(todo), LONG_REHEARSAL) as progress:
        unlearner.on_step = lambda query, step: progress.advance(
            0,
            {"query": query, **asdict(step)},
            unlearner.num_at_once * (min(1.0, (step.step + 1) / typical) if typical else unlearner.share_done(step)),
        )

        def unlearned(some: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], str]]:
            for query, result in unlearner.results(some):
                path = query_file(folder, query)
                records.forget(query)  # one that is there is of other tensors
                write_tensors(path, result.tensors)
                done = DoneQuery(result.summary(), log_lines(query, result), entry_of(path))
                records.write(query, asdict(done))
                yield query, result.summary(), describe(result)

        stacks = processes.on_first(lambda: list(unlearner.stacks(todo)))
        for _, (query, summary, text) in processes.share_out(stacks, unlearned):
            progress.advance(
                numbers={"query": query, "step": summary["num_steps"], "query_loss": summary["query_loss"]}
            )
            log.info("unlearn: query %d, %s", query, text)
            if summary["reached_bound"] is False:
                log.warning(
                    "query %d did not reach its bound in unlearning.max_steps=%d updates; it is kept as it is. "
                    "Raise unlearning.learning_rate (%g now) or unlearning.max_steps",
                    query,
                    summary["num_steps"],
                    unlearner.facts()["learning_rate"],
                )
    facts = {
        "device": str(work.inputs.device),
        **unlearner.facts(),
        "trainable": unlearner.trainable,
        "processes": processes.count(),
        "counts": {"trainable_tensors": len(unlearner.trainable)},
    }
    processes.on_first(lambda: finish(stage, finished_queries(stage), facts))


def add(stage: Stage, slice_folder: Path, manifest: Mapping[str, Any]) -> None:
    """Adds the unlearned models of a slice, see ``slices.fill``."""
    done = finished_queries(stage)
    added = {query: entry for query, entry in recorded(slice_folder, manifest).items() if query not in done}
    for query in added:
        name = query_file(slice_folder, query).name
        link_or_copy(slice_folder / name, stage.folder / name)
    finish(stage, done | added, facts_of(manifest), manifest["seconds"])


def finish(
    stage: Stage,
    done: Mapping[int, "DoneQuery"],
    facts: Mapping[str, Any],
    seconds: float | None = None,
) -> None:
    """Writes the losses and the manifest.

    Args:
        done: all queries that the folder has models of, those of earlier commands and attempts included.
        facts: what else the manifest is to record.
        seconds: see ``Stage.finish``.
    """
    queries = sorted(done)
    known = stage.known_queries() | stage.attempted
    stage.queries = {query: known[query] for query in queries if query in known}
    write_text(stage.folder / LOSSES, "".join(line for query in queries for line in done[query].losses))
    counts = {**facts["counts"], "queries": len(queries)}
    results = [{"query": query, **done[query].summary} for query in queries]
    files = {query: query_file(stage.folder, query) for query in queries}
    entries = {files[query].name: done[query].file for query in queries}
    facts = {**facts, "counts": counts, "results": results}
    stage.finish(facts, [*files.values(), stage.folder / LOSSES], seconds, entries)


# --- what is done ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DoneQuery:
    """What is told of an unlearned query.

    summary: for the manifest. losses: of its steps, a line of JSON each. file: size and hash of its tensors' file.
    """

    summary: dict[str, Any]
    losses: list[str]
    file: dict[str, Any]


def records_of(stage: Stage) -> QueryRecords:
    """Of queries that no manifest names yet."""
    return QueryRecords(stage.folder / DONE, is_done_query)


def is_done_query(record: dict[str, Any]) -> bool:
    """Whether a record is a ``DoneQuery``."""
    return (
        are_results([{"query": 0, **record["summary"]}] if isinstance(record.get("summary"), dict) else None)
        and type(record["summary"].get("num_steps")) is int
        and is_text_list(record.get("losses"))
        and are_outputs({"file": record.get("file")})
    )


def finished_queries(stage: Stage) -> dict[int, DoneQuery]:
    """The queries that the folder has models of: those of the finished stage, and of an unfinished attempt."""
    done = recorded(stage.folder, stage.previous)
    for query, record in records_of(stage).read().items():
        path = query_file(stage.folder, query)
        if query not in done and path.is_file() and path.stat().st_size == record["file"]["bytes"]:
            done[query] = DoneQuery(record["summary"], record["losses"], record["file"])
    return done


def recorded(folder: Path, manifest: Mapping[str, Any]) -> dict[int, DoneQuery]:
    """The queries that a manifest names."""
    known = {int(query) for query in manifest.get("queries", {})}
    losses = losses_in(folder / LOSSES, known)
    return {
        record["query"]: DoneQuery(
            {key: value for key, value in record.items() if key != "query"},
            losses[record["query"]],
            manifest["outputs"][query_file(folder, record["query"]).name],
        )
        for record in manifest.get("results", [])
        if record["query"] in known
    }


def describe(result: UnlearningResult) -> str:
    end = {True: "bound reached", False: "bound NOT reached", None: "exact step count"}[result.reached_bound]
    last = f", forget loss {result.log[-1].forget_loss:.3f}" if result.log else ""
    probe = f", query loss {result.base_query_loss:.3f} to {result.query_loss:.3f}"
    return f"{result.num_steps} steps, {end}{last}{probe}"


def log_lines(query: int, result: UnlearningResult) -> list[str]:
    """The losses of every step."""
    records = [
        {"query": query, "step": entry.step, "retain_loss": entry.retain_loss, "forget_loss": entry.forget_loss}
        for entry in result.log
    ]
    return [json.dumps(record) + "\n" for record in records]


def losses_in(path: Path, queries: Collection[int]) -> dict[int, list[str]]:
    """The lines of each of these queries; without what is damaged."""
    found: dict[int, list[str]] = {query: [] for query in queries}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            found[json.loads(line)["query"]].append(line + "\n")
    return found
