"""``mucs run``: the stages listed in the configuration, in order; each says by itself what is up to date."""

import time
from collections.abc import Iterator

from mucs_cli import processes
from mucs_cli.runtime import log
from mucs_cli.schemas import PretrainedConfig
from mucs_cli.stages.context import Context
from mucs_cli.stages.dispatch import run_stage
from mucs_cli.stages.show import print_top
from mucs_cli.text import printable

SHOWN = 5
"""Training images printed for each query."""


def run(context: Context) -> None:
    """Runs the stages, then prints each query's top training images and where to look."""
    started = time.monotonic()
    for stage in stages_of(context):
        run_stage(stage, context.for_stage(stage))
    processes.on_first(lambda: print_results(context))
    log.info("run: %.0f seconds", time.monotonic() - started)


def print_results(context: Context) -> None:
    """Each query's top training images, and where to look."""
    if "score" in context.config.stages:
        print_top(context.run, context.score_variant(), min(SHOWN, context.config.report.k))
    for what, path in (
        ("report", context.folder("report", "index.html")),
        ("picture", context.folder("report", "top.png")),
        ("queries", context.folder("sample", "grid.png")),
    ):
        if path.exists():
            print(printable(f"{what + ':':<9}{path}"))


def stages_of(context: Context) -> Iterator[str]:
    """The stages that are to be run: without training where the model is there."""
    for stage in context.config.stages:
        if stage == "train" and isinstance(context.config.model, PretrainedConfig):
            log.info("train: nothing to do for model=pretrained (%s)", context.config.model.path)
        else:
            yield stage
