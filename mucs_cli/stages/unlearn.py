"""``mucs unlearn``: fine-tunes one model a query that has unlearned it, and saves the tensors that changed."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mucs_cli import processes
from mucs_cli.artifacts import link_or_copy, write_tensors, write_text
from mucs_cli.attribution.unlearning import UnlearningResult
from mucs_cli.runtime import Progress, log
from mucs_cli.stage_folder import Stage, facts_of
from mucs_cli.stages.checkpoints import QueryCheckpoints
from mucs_cli.stages.context import Context
from mucs_cli.stages.slices import fill
from mucs_cli.stages.unlearned import query_file
from mucs_cli.stages.unlearner import Unlearner
from mucs_cli.stages.work import Work

LOSSES = "log.jsonl"
REHEARSED_SECONDS = 20.0
"""How long a rehearsal unlearns: queries differ in their updates, so that a few are better than one."""


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
    )
    if not fill(context, stage, lambda stage: unlearn_queries(stage, work, unlearner), add):
        log.info("unlearn: up to date (%s)", folder)


def unlearn_queries(stage: Stage, work: Work, unlearner: Unlearner) -> None:
    """Unlearns the stage's queries, into its folder."""
    folder = stage.folder
    unlearner.checkpoints = QueryCheckpoints(folder / "checkpoint", work.config.checkpoint.every_seconds)
    unlearner.prepare()
    results = {record["query"]: record for record in processes.on_first(lambda: finished_results(stage))}
    todo = [query for query in stage.queries or () if query not in results]
    typical = median([record["num_steps"] for record in results.values()]) if results else 0
    total = len(stage.queries or ())
    done = total - len(todo)
    with unlearner.checkpoints, Progress("unlearn", total, "queries", done, REHEARSED_SECONDS) as progress:
        unlearner.on_step = lambda query, step: progress.advance(
            0,
            {"query": query, **asdict(step)},
            unlearner.num_at_once * (min(1.0, (step.step + 1) / typical) if typical else unlearner.share_done(step)),
        )

        def unlearned(some: Sequence[int]) -> Iterator[dict[str, Any]]:
            for query, result in unlearner.results(some):
                write_tensors(query_file(folder, query), result.tensors)
                summary = result.summary()
                yield {
                    "query": query,
                    "summary": summary,
                    "log": log_lines(query, result),
                    "text": describe(result),
                }

        stacks = processes.on_first(lambda: list(unlearner.stacks(todo)))
        for _, told in processes.share_out(stacks, unlearned):
            query, summary = told["query"], told["summary"]
            with (folder / LOSSES).open("a") as file:
                file.write(told["log"])
            results[query] = {"query": query, **summary}
            stage.save_progress(stage.progress | {str(query): summary})
            progress.advance(
                numbers={"query": query, "step": summary["num_steps"], "query_loss": summary["query_loss"]}
            )
            log.info("unlearn: query %d, %s", query, told["text"])
            if summary["reached_bound"] is False:
                log.warning(
                    "query %d did not reach its bound in unlearning.max_steps=%d updates; it is kept as it is. "
                    "Raise unlearning.learning_rate (%g now) or unlearning.max_steps",
                    query,
                    summary["num_steps"],
                    unlearner.facts()["learning_rate"],
                )
    if processes.is_first():  # which has been told that all are done
        shutil.rmtree(unlearner.checkpoints.folder, ignore_errors=True)
    facts = {
        "device": str(work.inputs.device),
        **unlearner.facts(),
        "trainable": unlearner.trainable,
        "processes": processes.count(),
        "counts": {"trainable_tensors": len(unlearner.trainable)},
    }
    finish(stage, results, facts)


def add(stage: Stage, slice_folder: Path, manifest: Mapping[str, Any]) -> None:
    """Adds the unlearned models of a slice, see ``slices.fill``."""
    results = {record["query"]: record for record in finished_results(stage)}
    added = {record["query"]: record for record in manifest["results"]}
    for query in added:
        name = query_file(slice_folder, query).name
        link_or_copy(slice_folder / name, stage.folder / name)
    lines = [line for folder in (stage.folder, slice_folder) for line in (folder / LOSSES).read_text().splitlines(True)]
    write_text(stage.folder / LOSSES, "".join(sorted(lines, key=lambda line: json.loads(line)["query"])))
    finish(stage, results | added, facts_of(manifest), manifest["seconds"])


def finish(
    stage: Stage, results: Mapping[int, dict[str, Any]], facts: dict[str, Any], earlier_seconds: float = 0.0
) -> None:
    """Writes the manifest.

    Args:
        results: of all queries that the folder has models of, those of earlier commands and attempts included.
        facts: what else it is to record.
        earlier_seconds: see ``Stage.finish``.
    """
    queries = sorted(results)
    known = stage.known_queries() | stage.attempted
    stage.queries = {query: known[query] for query in queries if query in known}
    facts |= {"counts": facts["counts"] | {"queries": len(queries)}, "results": [results[query] for query in queries]}
    outputs = [*(query_file(stage.folder, query) for query in queries), stage.folder / LOSSES]
    stage.finish(facts, outputs, earlier_seconds)


def describe(result: UnlearningResult) -> str:
    end = {True: "bound reached", False: "bound NOT reached", None: "exact step count"}[result.reached_bound]
    last = f", forget loss {result.log[-1].forget_loss:.3f}" if result.log else ""
    probe = f", query loss {result.base_query_loss:.3f} to {result.query_loss:.3f}"
    return f"{result.num_steps} steps, {end}{last}{probe}"


def finished_results(stage: Stage) -> list[dict[str, Any]]:
    """Records of the queries that the folder has models of; drops what an interrupted attempt logged of others."""
    known = stage.known_queries()
    results = {record["query"]: record for record in stage.previous.get("results", []) if record["query"] in known}
    results |= {
        int(query): {"query": int(query), **summary}
        for query, summary in stage.progress.items()
        if query_file(stage.folder, int(query)).exists()
    }
    keep_log_of(stage.folder / LOSSES, set(results))
    return list(results.values())


def log_lines(query: int, result: UnlearningResult) -> str:
    """The losses of every step."""
    records = [
        {"query": query, "step": entry.step, "retain_loss": entry.retain_loss, "forget_loss": entry.forget_loss}
        for entry in result.log
    ]
    return "".join(json.dumps(record) + "\n" for record in records)


def keep_log_of(path: Path, queries: set[int]) -> None:
    """Drops lines of queries that an interrupted attempt did not finish."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["query"] in queries:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # cut short by a crash, or damaged
            continue
    write_text(path, "".join(lines))
