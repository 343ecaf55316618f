"""``mucs status``: the stages found in a run's folder, their state and size, and what can be computed again.

Reads JSON and file sizes only: no tensor is opened and torch is not needed. What links lead to is listed and never
deleted: in a folder from others they could lead to another run, or anywhere.
"""

import contextlib
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mucs_cli import locks, tracking
from mucs_cli.errors import UserError
from mucs_cli.files import read_regular
from mucs_cli.records import SLICES, flatten, read_manifest
from mucs_cli.stages.context import Context
from mucs_cli.text import printable

log = logging.getLogger("mucs")
PIPE_WIDTH = 160
"""Columns where stdout is no terminal: enough that no cell is cut."""


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Args:
        name: the stage's folder, relative to the run.
        state: done, unfinished (with progress where it is known) or absent; or how many models there are.
        when: end of the stage, ISO 8601, UTC; empty unless done.
        seconds: how long it took, all models together; None unless done.
        size: bytes on disk.
        cleanable: files and folders that can be computed again.
    """

    name: str
    state: str
    when: str
    seconds: float | None
    size: int
    cleanable: tuple[Path, ...]


def run(context: Context) -> None:
    """Prints the table; with ``clean=true`` first deletes what can be computed again.

    Raises:
        UserError: there is no such run, or a file cannot be deleted.
    """
    if not context.run.is_dir():
        raise UserError("run", f"got {context.run}; expected the folder of a run. Make one: mucs run run={context.run}")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    entries = list(entries_of(context.run))
    if context.config.clean:
        freed = sum(clean(context.run / entry.name, entry.cleanable) for entry in entries if entry.cleanable)
        console.print(f"deleted {bytes_text(freed)} ({freed} bytes) that can be computed again")
        entries = list(entries_of(context.run))
    console.print(table_of(context.run, entries))
    spare = sum(size_of(path) for entry in entries for path in entry.cleanable)
    if spare:
        console.print(f"clean=true would delete {bytes_text(spare)} that can be computed again")


# --- what is there ---------------------------------------------------------------------------------------------------


def entries_of(run: Path) -> Iterator[Entry]:
    """The stages of a run, in the order in which they are made."""
    shared = sorted((run / "score").glob("_*/*/"))  # beside the variants
    variants = [path for path in sorted((run / "score").glob("*/")) if not path.name.startswith("_")]
    unlearned = sorted((run / "unlearn").glob("*/"))
    yield entry_of(run, run / "data", [run / "data" / "images.safetensors"])
    if not is_pretrained(run):
        yield entry_of(run, run / "train", [run / "train" / "checkpoint"])
    yield entry_of(run, run / "sample", [])
    for folder in unlearned or [run / "unlearn"]:
        if folder.name.startswith("_"):
            yield from (shared_entry(run, kept) for kept in sorted(folder.glob("*/")))
        else:
            yield entry_of(run, folder, [])
    yield entry_of(run, run / "noise_bank", [])
    for folder in shared:
        yield shared_entry(run, folder)
    for folder in variants or [run / "score"]:
        yield entry_of(run, folder, [])
    if (run / "retrain").is_dir():
        yield retrained(run / "retrain")
    for folder in sorted((run / "evaluate").glob("*/")) or [run / "evaluate"]:
        yield entry_of(run, folder, [])
    yield entry_of(run, run / "report", [])


def shared_entry(run: Path, folder: Path) -> Entry:
    """A folder beside the variants: what they have in common, or a slice of one, which can go once that has it all."""
    if folder.parent.name != SLICES:
        return entry_of(run, folder, [folder])
    entry = entry_of(run, folder, [])
    variant = folder.parent.parent / folder.name.rpartition("__")[0]
    whole, part = read(variant / "manifest.json"), read(folder / "manifest.json") or read(folder / "state.json")
    is_in_it = holds(variant, whole, part) and not leads_away(run, folder)
    return replace(entry, cleanable=(folder,) if is_in_it else ())


def holds(variant: Path, whole: dict[str, Any], part: dict[str, Any]) -> bool:
    """Whether a variant has all that a slice has or was to have, of the same model and settings; by their manifests."""
    wanted = {key: part.get(key, {}) for key in ("config", "inputs", "queries")}
    return (
        bool(part.get("queries"))
        and flatten(wanted).items() <= flatten(whole).items()
        and all(size_of(variant / name) == entry["bytes"] for name, entry in whole.get("outputs", {}).items())
    )


def is_pretrained(run: Path) -> bool:
    """Whether the run's model was trained elsewhere: nothing is trained here then."""
    model = read(run / "run.json").get("config", {}).get("model")
    return isinstance(model, dict) and model.get("name") == "pretrained"


def retrained(folder: Path) -> Entry:
    """One line for all models trained again; they take hours, so that cleaning leaves them."""
    models = [path for path in folder.glob("*/") if not path.name.startswith("_")]
    manifests = [manifest for path in models if (manifest := read(path / "manifest.json"))]
    unfinished = len(models) - len(manifests)
    return Entry(
        name=folder.name,
        state=f"{len(manifests)} models" + (f", {unfinished} unfinished" if unfinished else ""),
        when=max((str(manifest.get("ended", "")) for manifest in manifests), default=""),
        seconds=sum(manifest.get("seconds", 0.0) for manifest in manifests),
        size=size_of(folder),
        cleanable=(),
    )


def entry_of(run: Path, folder: Path, again: list[Path]) -> Entry:
    """One stage's folder.

    Args:
        run: the run's folder.
        folder: the stage's.
        again: what can be computed again once the stage is done; leftovers of block files are added.
    """
    path = folder / "manifest.json"
    manifest = read(path)
    is_damaged = path.exists() and not manifest
    done = bool(manifest) or any(folder.glob("*.growing"))
    done = done or (folder.name == "noise_bank" and any(folder.glob("*.safetensors")))
    if done:
        leftovers = [path for pattern in ("*.partial", "*.journal") for path in sorted(folder.rglob(pattern))]
        kept = [path for path in leftovers if not any(parent in again for parent in path.parents)]
        cleanable = tuple(path for path in [*again, *kept] if path.exists() and not leads_away(run, path))
    else:
        cleanable = ()
    return Entry(
        name=folder.relative_to(run).as_posix(),
        state="damaged" if is_damaged else "done" if done else progress_of(folder),
        when=str(manifest.get("ended", "")),
        seconds=manifest.get("seconds"),
        size=size_of(folder),
        cleanable=cleanable,
    )


def leads_away(run: Path, path: Path) -> bool:
    """Whether the path, or a folder between the run's and it, is a link."""
    return any(part.is_symlink() for part in (path, *path.parents) if part != run and part.is_relative_to(run))


def progress_of(folder: Path) -> str:
    """``absent``, or ``unfinished`` with what its progress.jsonl or finished blocks tell."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return "absent"
    line, blocks = tracking.last_line(folder), 0
    for journal in folder.rglob("*.journal"):
        with contextlib.suppress(OSError):
            blocks += read_regular(journal).count(b'"block"')
    if line.keys() >= {"done", "total", "unit"}:
        return f"unfinished, {line['done']} of {line['total']} {line['unit']}"
    return f"unfinished, {blocks} blocks" if blocks else "unfinished"


def read(path: Path) -> dict[str, Any]:
    """A record; empty where there is no file or none that can be read: the table still shows the rest."""
    try:
        return read_manifest(path)
    except UserError:
        return {}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is nothing."""
    if path.is_dir():
        return sum(map(size_of_file, path.rglob("*")))
    return size_of_file(path)


def size_of_file(path: Path) -> int:
    """0 for all that is no file, and for one that another command has just renamed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


# --- what is done with it --------------------------------------------------------------------------------------------


def clean(folder: Path, paths: Sequence[Path]) -> int:
    """Deletes files and folders of a stage's folder, unless another command is at it; returns the bytes freed."""
    freed = 0
    with locks.locked(folder, wait=False) as is_ours:
        if not is_ours:
            log.warning("%s is left: %s is at it", folder, locks.holder_text(locks.lock_path(folder)))
            return 0
        for path in paths:
            size = size_of(path)
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(str(path), f"cannot be deleted ({error.strerror}). Change its permissions.") from error
            freed += size
    return freed


def table_of(run: Path, entries: list[Entry]) -> Table:
    table = Table(title=Text(printable(str(run))), title_justify="left", box=None, pad_edge=False)
    table.add_column("stage", overflow="fold")
    for column in ("state", "ended (UTC)"):
        table.add_column(column, no_wrap=True)
    for column in ("seconds", "size", "can be cleaned"):
        table.add_column(column, justify="right", no_wrap=True)
    for entry in entries:
        spare = sum(size_of(path) for path in entry.cleanable)
        table.add_row(
            Text(printable(entry.name)),
            Text(printable(entry.state)),
            Text(printable(entry.when.removesuffix("+00:00").replace("T", " "))),
            "" if entry.seconds is None else f"{entry.seconds:.1f}",
            bytes_text(entry.size) if entry.size else "",
            bytes_text(spare) if spare else "",
        )
    return table


def bytes_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
