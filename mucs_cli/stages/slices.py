"""Slices: some of the queries, as ``queries.index`` chooses them, computed side by side with other slices of a variant.

A slice is computed in a folder of its own (in ``_slices/``), where the same command goes on after an interruption, and
then added to the variant's. Only for that does it wait for others that fill the same folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mucs_cli import locks, processes
from mucs_cli.artifacts import empty
from mucs_cli.files import unlinked
from mucs_cli.runtime import LOG, stage_log
from mucs_cli.stage_folder import Stage, require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.tracking import PROGRESS


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
        return not stage.is_done() and compute_in(stage, compute)
    is_done = stage.is_done(claim=False)
    part = stage.part()
    if is_done:
        processes.on_first(lambda: take_away(part))  # an interruption may have come before
        return False
    if not part.queries:  # all are there, but an interruption came while others were being added
        return not stage.is_done(wait=True) and compute_in(stage, compute)
    if not part.is_done(wait=True):
        if stage.is_done(claim=False):  # another process had the slice, has added it and taken it away
            processes.on_first(lambda: take_away(part))
            locks.release(part.folder)
            return False
        compute_in(part, compute)
    if not stage.is_done(wait=True):
        stage.begin()
        processes.on_first(lambda: add_part(stage, part, add))
    processes.on_first(lambda: take_away(part))
    return True


def compute_in(stage: Stage, compute: Callable[[Stage], None]) -> bool:
    """True: it had to be done."""
    stage.begin()
    with stage_log(stage.folder):
        compute(stage)
    return True


def add_part(stage: Stage, part: Stage, add: Callable[[Stage, Path, Mapping[str, Any]], None]) -> None:
    """Adds a slice, and what was logged about it."""
    for name in (LOG, PROGRESS):
        if (part.folder / name).exists():
            with open(stage.folder / name, "ab", opener=unlinked) as file:
                file.write((part.folder / name).read_bytes())
    with stage_log(stage.folder):
        add(stage, part.folder, require_manifest(part.folder, stage.command))


def take_away(part: Stage) -> None:
    """Deletes a slice that has been added, unless another process is at it, which does so."""
    with locks.locked(part.folder, wait=False) as is_ours:
        if is_ours:
            (part.folder / "manifest.json").unlink(missing_ok=True)  # first: who looks now is not to find a part of it
            empty(part.folder)
