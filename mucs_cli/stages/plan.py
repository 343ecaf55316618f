"""``plan=true``: what a command would compute, and the time, memory and disk that this takes, before it starts.

The command is rehearsed in a shadow of the run: its stages run as they are, but leave every long loop after a few
seconds. So whatever a stage or a method does is predicted without a word of its own, where it keeps its long loops in a
``Progress`` that may be left.
"""

import importlib
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from mucs_cli.artifacts import sha256_file, write_record, write_tensors
from mucs_cli.errors import UserError
from mucs_cli.rehearsal import StagePlan, rehearsing
from mucs_cli.reporting.tables import Cell, Table, print_table
from mucs_cli.runtime import log, pick_device
from mucs_cli.stage_folder import require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluate import plan as plan_evaluation
from mucs_cli.stages.memory import free_memory
from mucs_cli.stages.races import RACES
from mucs_cli.stages.run import stages_of
from mucs_cli.stages.status import bytes_text, size_of
from mucs_cli.stages.unlearned import query_file
from mucs_cli.stages.work import Work

WRITTEN_IN_PLACE = (".journal", ".jsonl", ".txt", ".growing")
"""Files that a stage adds to: the shadow has copies. All others are replaced as a whole, so that links do."""
MODEL_STAGES = {"train", "sample"}
"""Without whose results it cannot be told how many updates unlearning takes."""
COLUMNS = ("stage", "what", "total", "finished", "to_do", "time", "peak_memory", "disk")


def run(context: Context) -> None:
    """Prints what the command would take; nothing in the run's folder changes, and of a new run none is left."""
    try:
        print_plan(context, [StagePlan("start", other_seconds=seconds_of_process()), *predict(context)])
    finally:
        for folder in context.made:
            with suppress(OSError):  # another command has begun to fill it
                folder.rmdir()


def predict(context: Context) -> list[StagePlan]:
    """What each stage of the command takes.

    Raises:
        UserError: what the command itself would raise.
    """
    stages = list(stages_of(context)) if context.command == "run" else [context.command]
    plans: list[StagePlan] = []
    with shadow_of(context.run) as shadow, quiet():
        rehearsed = replace(context, run=shadow)
        for stage in stages:
            cut = [plan.stage for plan in plans if plan.is_cut]
            if not MODEL_STAGES.isdisjoint(cut):
                rehearsed = without_bound(rehearsed)
            try:
                plans.append(rehearse(rehearsed.for_stage(stage), cut))
            except UserError as error:
                if not cut:
                    subject, message = (part.replace(str(shadow), str(context.run)) for part in error.args)
                    raise UserError(subject, message) from error
                plans.append(StagePlan(stage, notes=(not_yet(cut),)))
    return plans


def rehearse(context: Context, cut: list[str]) -> StagePlan:
    """What one stage takes; it leaves files that later stages can be rehearsed on.

    Args:
        context: of the stage, in the shadow.
        cut: earlier stages of which the shadow has only the beginning.
    """
    stage = context.command
    if stage == "evaluate":
        return StagePlan(stage, notes=(not_yet(cut),)) if cut else plan_evaluation(context)
    before, started = sizes_of(context.run), time.monotonic()
    with rehearsing() as rehearsal:
        importlib.import_module(f"mucs_cli.stages.{stage}").run(context)
    spent = time.monotonic() - started
    plan = StagePlan(stage, rehearsal.loops, spent - sum(loop.spent for loop in rehearsal.loops), peak_memory(context))
    notes = notes_on_loops(plan)
    if stage == "train" and context.config.training.patience is not None and plan.loops:
        notes += ("at most: training.patience may end it earlier",)
    if stage == "unlearn" and context.method.unlearning_sections(context.config):
        notes += notes_on_updates(context, cut)
        lend_unlearned(context)
    disk = sum(max(0, size - before.get(path, 0)) for path, size in sizes_of(context.run).items())
    if stage == "train" and plan.seconds > context.config.checkpoint.every_seconds:
        # the last two checkpoints: weights, their average and the two moments of AdamW
        disk += 2 * 4 * size_of(context.folder("train", "initial.safetensors"))
    return replace(plan, disk=disk, notes=notes)


# --- the shadow ------------------------------------------------------------------------------------------------------


@contextmanager
def shadow_of(run: Path) -> Iterator[Path]:
    """A folder that reads like the run and takes what is written, beside the run, and so on the same disk."""
    beside = run.parent if os.access(run.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=".mucs-plan-", dir=beside) as folder:
        shadow = Path(folder) / run.name
        seen = {identity(run)}
        for place, folders, names in os.walk(run, followlinks=True):
            # a race that was begun goes on by what it has found, which the shadow lacks
            folders[:] = [name for name in folders if name != RACES and is_entered(Path(place) / name, seen)]
            copy = shadow / Path(place).relative_to(run)
            copy.mkdir()
            for name in names:
                is_lock = name.startswith(".") and name.endswith(".lock")  # who is at the run does not bar the shadow
                if not is_lock and (Path(place) / name).is_file():  # no pipe, which would be waited for
                    mirror(Path(place) / name, copy / name)
        yield shadow


def is_entered(folder: Path, seen: set[tuple[int, int]]) -> bool:
    """Whether a folder of the run is part of the shadow: once, and through a link where a stage's folder is there.

    That may be on a larger disk; any other link could lead in a circle, or to a whole file system.
    """
    if folder.is_symlink() and not any(
        next(folder.glob(f"{below}{name}"), None) for below in ("", "*/") for name in ("manifest.json", "state.json")
    ):
        return False
    found = identity(folder)
    is_new = found not in seen
    seen.add(found)
    return is_new


def identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def mirror(path: Path, copy: Path) -> None:
    """Puts a file of the run into the shadow."""
    if path.suffix == ".partial":  # written through a memory map; of what it holds, the header is enough
        with path.open("rb") as whole, copy.open("wb") as file:
            length = whole.read(8)
            file.write(length + whole.read(int.from_bytes(length, "little")))
            file.truncate(path.stat().st_size)
    elif path.suffix in WRITTEN_IN_PLACE:
        shutil.copyfile(path, copy)
    else:
        copy.symlink_to(path)


def sizes_of(shadow: Path) -> dict[Path, int]:
    """Bytes of its files; those that are being filled count by the names that they will get."""
    return {
        path.with_suffix("") if path.suffix == ".partial" else path: path.stat().st_size
        for path in shadow.rglob("*")
        if path.is_file()
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Without the stages' messages, which are about the shadow."""
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


# --- what the shadow lacks -------------------------------------------------------------------------------------------


def without_bound(context: Context) -> Context:
    """With ``unlearning.max_steps`` updates exactly: where a model that has hardly been trained meets its bound says
    nothing."""
    unlearning = context.config.unlearning
    if unlearning.num_steps is not None:
        return context
    unlearning = replace(unlearning, num_steps=unlearning.max_steps)
    return replace(context, config=replace(context.config, unlearning=unlearning))


def lend_unlearned(context: Context) -> None:
    """Gives the queries that were not unlearned the base model's weights, so that scoring them can be rehearsed."""
    work = Work.load(context)
    folder = context.folder("unlearn", context.unlearn_variant())
    manifest = require_manifest(folder, "unlearn")
    missing = {query: sha256 for query, sha256 in work.queries.wanted.items() if str(query) not in manifest["queries"]}
    if not missing:
        return
    names = set(context.method.unlearner(work).trainable)
    parameters = work.inputs.model.denoiser.network.named_parameters()
    lent = query_file(folder, min(missing))
    write_tensors(lent, {name: parameter for name, parameter in parameters if name in names})
    record = {"sha256": sha256_file(lent), "bytes": lent.stat().st_size}
    for query, sha256 in missing.items():
        path = query_file(folder, query)
        if path != lent:
            path.symlink_to(lent)
        manifest["outputs"][path.name] = record
        manifest["queries"][str(query)] = sha256
    write_record(folder / "manifest.json", manifest)


# --- what is said ----------------------------------------------------------------------------------------------------


def not_yet(cut: list[str]) -> str:
    stages = ",".join(cut)
    return f"cannot be predicted yet. Run stages=[{stages}] first"


def notes_on_loops(plan: StagePlan) -> tuple[str, ...]:
    """Where a loop's length is a guess, or not even that."""
    notes = []
    for loop in plan.loops:
        if loop.seconds is None:
            notes.append(f"how long the {loop.unit} take cannot be told: not even one was begun")
        elif loop.is_cut and not loop.rehearsed:
            notes.append(f"the time of all {loop.unit} is judged by a part of one")
    return tuple(notes)


def notes_on_updates(context: Context, cut: list[str]) -> tuple[str, ...]:
    """How many updates a query takes."""
    config = context.config.unlearning
    if not MODEL_STAGES.isdisjoint(cut) and "unlearning" in context.method.unlearning_sections(context.config):
        return (f"at most: {config.num_steps} updates a query. Run stages=[{','.join(cut)}] first to know better",)
    manifest = require_manifest(context.folder("unlearn", context.unlearn_variant()), "unlearn")
    recorded = [record.get("num_steps") for record in manifest.get("results", [])]
    updates = [num_steps for num_steps in recorded if num_steps is not None]
    return (f"about {fmean(updates):.0f} updates a query",) if updates else ()


def print_plan(context: Context, plans: list[StagePlan]) -> None:
    """The table for people, and the notes below it."""
    free = free_memory(pick_device(context.config.device))
    memory = "an unknown amount" if free is None else bytes_text(free)
    disk = shutil.disk_usage(context.run).free
    title = (
        f"predicted by a rehearsal of a few seconds a loop; {memory} of memory and {bytes_text(disk)} of disk are free"
    )
    print_table(Table(title, COLUMNS, rows_of(plans)), sys.stdout)
    for plan in plans:
        for note in plan.notes:
            print(f"{plan.stage}: {note}")
    if sum(plan.disk for plan in plans) > disk:
        print("disk: more is needed than is free")


def rows_of(plans: list[StagePlan]) -> list[tuple[Cell, ...]]:
    """A row a loop, a row for the rest of each stage, and the total."""
    rows: list[tuple[Cell, ...]] = []
    for plan in plans:
        for loop in plan.loops:
            counts = (loop.total, loop.finished, loop.left)
            rows.append((plan.stage, f"{loop.title}, {loop.unit}", *counts, seconds_text(loop.seconds), "", ""))
        rest = "everything else" if plan.loops or plan.disk else "imports" if plan.stage == "start" else "nothing long"
        ends = (memory_text(plan.memory), bytes_text(plan.disk))
        rows.append((plan.stage, rest, None, None, None, seconds_text(plan.other_seconds), *ends))
    time = seconds_text(sum(plan.seconds for plan in plans)) + ("" if all(plan.is_known for plan in plans) else " + ?")
    memory = max((plan.memory for plan in plans if plan.memory is not None), default=None)
    disk = sum(plan.disk for plan in plans)
    rows.append(("total", "", None, None, None, time, memory_text(memory), bytes_text(disk)))
    return rows


def memory_text(memory: int | None) -> str:
    return "" if memory is None else bytes_text(memory)


def seconds_text(seconds: float | None) -> str:
    """``4.2 s``, ``3 min 5 s``, ``2 h 10 min``; what is not known is not 0."""
    if seconds is None:
        return "?"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory(context: Context) -> int:
    """Bytes: of the CUDA device, else of the process."""
    if pick_device(context.config.device).type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds_of_process() -> float:
    """Since this process began."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began
