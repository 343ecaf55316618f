"""Slices: some of the queries, as ``queries.index`` chooses them, computed side by side with other slices of a variant.

A slice is computed in a folder of its own (in ``_slices/``), where the same command goes on after an interruption, and
then added to the variant's. Only for that does it wait for others that fill the same folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mucs_cli import locks, processes
from mucs_cli.artifacts import empty
from mucs_cli.runtime import stage_log
from mucs_cli.stage_folder import Stage, require_manifest
from mucs_cli.stages.context import Context


def fill(
    context: Context,
    stage: Stage,
    compute: Callable[[Stage], None],
    add: Callable[[Stage, Path, Mapping[str, Any]], None],
) -> bool:
    """Has a stage's queries computed, unless they are there.

    Args:
        context: the command's.
        stage: knows the queries that are wanted.
        compute: fills the folder of the stage that it gets, which has begun, and finishes it.
        add: adds to the stage what a slice holds, and finishes it; gets the stage, which has begun, the slice's folder
            and its manifest. The slice stays as it is: an interruption may come at any time. Of several processes the
            first one calls it, working alone.
    Returns:
        whether anything had to be done.
    """
    if context.config.queries.index is None:
        if stage.is_done():
            return False
        stage.begin()
        with stage_log(stage.folder):
            compute(stage)
        return True
    is_done = stage.is_done(claim=False)
    part = stage.part()
    if is_done:
        processes.on_first(lambda: take_away(part))  # an interruption may have come before
        return False
    with stage_log(stage.folder):
        if not part.is_done():
            if stage.is_done(claim=False):  # another process had the slice, has added it and taken it away
                processes.on_first(lambda: take_away(part))
                locks.release(part.folder)
                return False
            part.begin()
            compute(part)
        if not stage.is_done(wait=True):
            stage.begin()
            processes.on_first(lambda: add(stage, part.folder, require_manifest(part.folder, stage.command)))
        processes.on_first(lambda: take_away(part))
    return True


def take_away(part: Stage) -> None:
    """Deletes a slice that has been added, unless another process is at it, which does so."""
    with locks.locked(part.folder, wait=False) as is_ours:
        if is_ours:
            empty(part.folder)
