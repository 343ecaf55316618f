"""``mucs evaluate``: judges and compares finished scores, by the evaluation that the configuration names."""

import sys
from pathlib import Path
from typing import Any

from mucs_cli import processes
from mucs_cli.artifacts import check_file, write_json, write_text
from mucs_cli.evaluation import EVALUATIONS
from mucs_cli.records import read_json, read_manifest, reading
from mucs_cli.rehearsal import StagePlan
from mucs_cli.reporting.charts import write_chart
from mucs_cli.reporting.tables import print_table, to_csv, to_latex, to_markdown
from mucs_cli.runtime import log, stage_log
from mucs_cli.stage_folder import Stage, first_difference, require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluator import RESULTS, Evaluator, RetrainingEvaluator

CHARTS = "charts"
TABLES = {"table.csv": to_csv, "table.md": to_markdown, "table.tex": to_latex}


def run(context: Context) -> None:
    """Writes ``evaluate/<evaluation>/`` and prints the table.

    That is ``results.json``, the table as CSV, Markdown and LaTeX, and ``charts/``, each chart as SVG and PNG.
    A worker only trains. Several processes share out the models that have to be trained; the first one evaluates.
    """
    evaluation = EVALUATIONS[context.config.evaluation.name]
    evaluator = evaluation.evaluator(context)
    folder = context.folder("evaluate", evaluation.name)
    stage = context.stage(folder, "evaluate", sections=evaluation.sections, inputs=evaluator.inputs)
    redo_for_new_inputs(stage)
    if stage.is_done(claim=False):
        log.info("evaluate: up to date (%s)", folder)
    else:
        if isinstance(evaluator, RetrainingEvaluator):  # before the folder is claimed: workers train side by side
            with stage_log(folder):
                evaluator.models.train(evaluator.retrainings())
                if context.config.evaluation.worker is not None:
                    log.info("evaluate: all models are trained; run it without evaluation.worker for the results")
                    return
        if not stage.is_done():
            stage.begin()
            facts = {"processes": processes.count()}
            with stage_log(folder):
                processes.on_first(lambda: finish(evaluator, stage, facts))
        log.info("evaluate: results in %s", folder)
    processes.on_first(lambda: print_results(evaluator, folder))


def finish(evaluator: Evaluator, stage: Stage, facts: dict[str, Any]) -> None:
    """Evaluates, and writes the results and the manifest, with more facts beside the evaluator's."""
    stage.finish({**evaluator.facts(), **facts}, write_results(evaluator, evaluator.evaluate(), stage.folder))


def print_results(evaluator: Evaluator, folder: Path) -> None:
    """The table of the finished results."""
    check_file(folder, require_manifest(folder, "evaluate"), RESULTS)
    path = folder / RESULTS
    with reading(path, "evaluate"):
        table = evaluator.table(read_json(path))
    print_table(table, sys.stdout)


def write_results(evaluator: Evaluator, results: dict[str, Any], folder: Path) -> list[Path]:
    """The files with the results, the table, the charts, and what else the evaluation keeps."""
    write_json(folder / RESULTS, results)
    for name, write in TABLES.items():
        write_text(folder / name, write(evaluator.table(results)))
    charts = [
        path
        for name, figure in evaluator.charts(results).items()
        for path in write_chart(figure, folder / CHARTS, name)
    ]
    return [folder / RESULTS, *[folder / name for name in TABLES], *charts, *evaluator.files(folder)]


def plan(context: Context) -> StagePlan:
    """What there is to train."""
    evaluator = EVALUATIONS[context.config.evaluation.name].evaluator(context)
    if isinstance(evaluator, RetrainingEvaluator):
        return evaluator.models.plan(evaluator.retrainings())
    return StagePlan("evaluate", other_seconds=0.0, notes=("no model has to be trained: results come at once",))


def redo_for_new_inputs(stage: Stage) -> None:
    """Lets the stage replace results of the same configuration: scores that were added or redone ask for new ones.

    Where a file of the results is gone or damaged, they are made again as well: what takes long is kept elsewhere.
    """
    for name in ("manifest.json", "state.json"):
        path = stage.folder / name
        if path.exists():
            recorded = read_manifest(path).get("config", {})
            stage.replace = first_difference(stage.identity["config"], recorded) is None
            return
