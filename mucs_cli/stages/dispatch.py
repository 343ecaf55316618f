"""Running a stage by its name, in all processes of the command or in the first one."""

import importlib

from mucs_cli import processes
from mucs_cli.stages.context import Context

SHARED = ("train", "unlearn", "score", "evaluate", "run")
"""What several processes do together; anything else is done by the first one, for which the others wait."""


def run_stage(stage: str, context: Context) -> None:
    """Runs a module of this package.

    Raises:
        UserError: as the stage itself.
    """
    run = importlib.import_module(f"mucs_cli.stages.{stage}").run
    if stage in SHARED:
        run(context)
    else:
        processes.on_first(lambda: run(context))
