"""What progress leaves in a stage's folder: ``progress.jsonl``, and TensorBoard's files where ``tracker`` says so.

A line of ``progress.jsonl`` is a JSON object: ``time`` (ISO 8601, UTC), ``title``, ``done``, ``total``, ``unit``,
``rate`` (units a second of this attempt, or null), ``seconds_left`` (or null), and the numbers of the loop, such as
``loss``. Later attempts append; a crash can cut the last line short.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mucs_cli.errors import UserError
from mucs_cli.files import read_regular, unlinked

PROGRESS = "progress.jsonl"
EVENTS = "tensorboard"
"""The folder of TensorBoard's files."""
Number = int | float | None

_tracker = "none"
_folders: list["ProgressFolder"] = []  # of the stages that are going on; the innermost last


def use(tracker: str) -> None:
    """Chooses what stages write from now on beside ``progress.jsonl``: none or tensorboard.

    Raises:
        UserError: it is not installed.
    """
    global _tracker
    if tracker == "tensorboard":
        try:
            importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise UserError(
                "tracker",
                f"got tensorboard, which cannot be imported ({error}). Run pip install 'mucs[tensorboard]', or use "
                "tracker=none.",
            ) from error
    _tracker = tracker


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Progress within it goes to this stage's folder."""
    place = ProgressFolder(folder)
    _folders.append(place)
    try:
        yield
    finally:
        _folders.pop()
        place.close()


def write(title: str, done: int, total: int, unit: str, rate: float | None, numbers: Mapping[str, Number]) -> None:
    """A line in the folder of the stage that is going on; nothing outside of one."""
    if _folders:
        left = round((total - done) / rate, 1) if rate else None
        facts = {"title": title, "done": done, "total": total, "unit": unit, "rate": rate and float(f"{rate:.4g}")}
        _folders[-1].write(facts | {"seconds_left": left}, numbers)


def last_line(folder: Path) -> dict[str, Any]:
    """The newest whole line of a stage's folder; empty where there is none."""
    try:
        lines = read_regular(folder / PROGRESS).decode().splitlines()
    except (OSError, ValueError):
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                return record
    return {}


class ProgressFolder:
    """One stage's folder. That a line cannot be written stops nothing: the stage's own files say what is wrong.

    Nothing is written through a link, which in a folder from others could lead anywhere.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._events: Any = None

    def write(self, facts: Mapping[str, Any], numbers: Mapping[str, Number]) -> None:
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **facts, **numbers}
        with contextlib.suppress(OSError), open(self.folder / PROGRESS, "ab+", opener=unlinked) as file:
            if file.tell():
                file.seek(-1, 2)
            whole = file.read(1) in (b"", b"\n")  # what is cut short stays alone on its line
            file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")
        if _tracker == "tensorboard" and not (self.folder / EVENTS).is_symlink():
            with contextlib.suppress(OSError):
                self._add_scalars(facts, numbers)

    def _add_scalars(self, facts: Mapping[str, Any], numbers: Mapping[str, Number]) -> None:
        """A curve a number; within a query over its own steps, else over what is counted."""
        if self._events is None:
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
            self._events = writer(str(self.folder / EVENTS))
        curve = facts["title"] + (f"/query {numbers['query']}" if "query" in numbers else "")
        step = int(numbers.get("step") or facts["done"])
        for name, value in {"rate": facts["rate"], **numbers}.items():
            if value is not None and name not in ("query", "step"):
                self._events.add_scalar(f"{curve}/{name}", value, step)
        self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
