"""``mucs unlearn``: fine-tunes one model a query that has unlearned it, and saves the tensors that changed."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from mucs_cli import processes
from mucs_cli.artifacts import write_tensors, write_text
from mucs_cli.attribution.unlearning import UnlearningResult
from mucs_cli.runtime import Progress, log, stage_log
from mucs_cli.stage_folder import Stage
from mucs_cli.stages.context import Context
from mucs_cli.stages.unlearned import query_file
from mucs_cli.stages.work import Work

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
    if stage.is_done():
        log.info("unlearn: up to date (%s)", folder)
        return
    stage.begin()
    with stage_log(folder):
        unlearner.prepare()
        results = {record["query"]: record for record in processes.on_first(lambda: finished_results(stage))}
        todo = [query for query in queries.selected if query not in results]
        typical = median([record["num_steps"] for record in results.values()]) if results else 0
        total = len(queries.selected)
        done = total - len(todo)
        with unlearner.checkpoints, Progress("unlearn", total, "queries", done, REHEARSED_SECONDS) as progress:
            unlearner.on_step = lambda query, step: progress.advance(
                0,
                {"query": query, **asdict(step)},
                unlearner.num_at_once
                * (min(1.0, (step.step + 1) / typical) if typical else unlearner.share_done(step)),
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
                with (folder / "log.jsonl").open("a") as file:
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
        # what an interrupted attempt with another queries.index has done counts as well
        stage.queries = {query: queries.fingerprints[query] for query in results}
        stage.finish(
            {
                "device": str(work.inputs.device),
                **unlearner.facts(),
                "trainable": unlearner.trainable,
                "processes": processes.count(),
                "counts": {"queries": len(results), "trainable_tensors": len(unlearner.trainable)},
                "results": [results[query] for query in sorted(results)],
            },
            [*(query_file(folder, query) for query in sorted(results)), folder / "log.jsonl"],
        )


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
    keep_log_of(stage.folder / "log.jsonl", set(results))
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
