"""``mucs evaluate``: judges and compares finished scores, by the evaluation that the configuration names."""

import sys

from mucs_cli.artifacts import Stage, first_difference, read_json, write_json, write_text
from mucs_cli.config import EvaluateCommandConfig
from mucs_cli.evaluation import EVALUATIONS
from mucs_cli.reporting.tables import print_table, to_csv, to_latex, to_markdown
from mucs_cli.runtime import log
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluator import Evaluator, RetrainingEvaluator

RESULTS = "results.json"
TABLES = {"table.csv": to_csv, "table.md": to_markdown, "table.tex": to_latex}


def run(context: Context) -> None:
    """Writes ``evaluate/<evaluation>/``, ``results.json`` and the table as CSV, Markdown and LaTeX, and prints it.

    With ``plan=true`` only says what has to be trained; a worker only trains.
    """
    evaluation = EVALUATIONS[context.config.evaluation.name]
    evaluator = evaluation.evaluator(context)
    if isinstance(context.config, EvaluateCommandConfig) and context.config.plan:
        print_plan(evaluator)
        return
    folder = context.folder("evaluate", evaluation.name)
    stage = context.stage(folder, "evaluate", sections=evaluation.sections, inputs=evaluator.inputs)
    redo_for_new_inputs(stage)
    outputs = [folder / name for name in (RESULTS, *TABLES)]
    if stage.is_done() and all(path.exists() for path in outputs):
        log.info("evaluate: up to date (%s)", folder)
    else:
        stage.begin()
        if isinstance(evaluator, RetrainingEvaluator):
            evaluator.models.train(evaluator.retrainings())
            if context.config.evaluation.worker is not None:
                log.info("evaluate: all models are trained; run it without evaluation.worker for the results")
                return
        results = evaluator.evaluate()
        write_json(folder / RESULTS, results)
        for name, write in TABLES.items():
            write_text(folder / name, write(evaluator.table(results)))
        stage.finish(evaluator.facts(), outputs + evaluator.files(folder))
        log.info("evaluate: %s and tables in %s", RESULTS, folder)
    print_table(evaluator.table(read_json(folder / RESULTS)), sys.stdout)


def print_plan(evaluator: Evaluator) -> None:
    """What there is to train, with time and disk."""
    if isinstance(evaluator, RetrainingEvaluator):
        print_table(evaluator.models.plan(evaluator.retrainings()), sys.stdout)
    else:
        print("no model has to be trained: results come at once")


def redo_for_new_inputs(stage: Stage) -> None:
    """Lets the stage replace results of the same configuration: scores that were added or redone ask for new ones."""
    for name in ("manifest.json", "state.json"):
        path = stage.folder / name
        if path.exists():
            recorded = read_json(path).get("config", {})
            stage.overwrite |= first_difference(stage.identity["config"], recorded) is None
            return
