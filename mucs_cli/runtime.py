"""The machine: device, threads, memory, progress and log lines."""

import ctypes
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from mucs_cli import processes, tracking
from mucs_cli.errors import UserError
from mucs_cli.files import unlinked
from mucs_cli.rehearsal import Enough, Loop, Pace, current_rehearsal
from mucs_cli.text import printable

log = logging.getLogger("mucs")
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
LOG = "log.txt"
LINE_SECONDS = 10.0
REHEARSED_SECONDS = 4.0
"""Of a loop that a rehearsal leaves early: enough for its pace."""
LONG_REHEARSAL = 20.0
"""Seconds, where units differ, as queries do in their updates and a race in its rounds: a few whole ones say most."""


# --- device ----------------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; asking for CUDA without one is a UserError.

    Each of several processes takes a device of its own, the one of its number on its machine.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "got cuda; no CUDA device is available. Use device=cpu or device=auto.")
    torch.backends.cudnn.allow_tf32 = (
        False  # torch's default is True, which convolutions would take without being asked
    )
    device = torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")
    if device.type == "cuda" and processes.launched() > 1:
        number, available = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= available:
            raise UserError(
                "LOCAL_RANK",
                f"got {number}; this machine has {available} CUDA devices, one a process. Start fewer processes a "
                "machine, or use device=cpu.",
            )
        torch.cuda.set_device(number)
    return device


@contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Matrix products and convolutions in ``precision`` within the context: float32, tf32 or bfloat16.

    Weights and what is added up stay float32. Casts of weights are not kept: they may change within the context.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of returning them to the kernel after every tensor.

    Without it each large activation may be mapped and unmapped anew, at the price of page faults: up to a third of a
    small network's time on the CPU, nothing in other runs (scripts/bench/score_throughput.py, with and without
    --keep-malloc). Without glibc it does nothing.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's out-of-memory error and for the CPU allocator's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def smaller_batch(error: BaseException, size: int, what: str, multiple: int = 1) -> int:
    """Half of ``size`` (a multiple of ``multiple``) after an out-of-memory error, said in the log.

    Raises:
        the error itself where it is another one.
        UserError: the batch cannot be made smaller.
    """
    if not is_out_of_memory(error):
        raise error
    half = size // 2 // multiple * multiple
    if half < 1:
        raise UserError(what, f"got out of memory at {size}, the smallest batch. Use a machine with more.") from error
    log.warning("out of memory at %s=%d: going on with %d", what, size, half)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return half


# --- log and progress ------------------------------------------------------------------------------------------------


class ConsoleHandler(logging.Handler):
    """Log lines on stderr, through the console that also draws the progress bar: neither garbles the other.

    Of several processes only the first one speaks.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if not processes.speaks():
            return
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        console.print(printable(prefix + self.format(record)), markup=False)


class LogFileHandler(logging.FileHandler):
    """Appends to a log file, never through a link: one in a folder from others could lead anywhere."""

    def _open(self) -> TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=unlinked)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """A disk that is full ends the command where results are written, not where it talks about them."""


def set_up_logging() -> None:
    log.setLevel(logging.INFO)
    log.propagate = False
    if not any(isinstance(handler, ConsoleHandler) for handler in log.handlers):
        log.addHandler(ConsoleHandler())


@contextmanager
def stage_log(folder: Path) -> Iterator[None]:
    """Also writes the log to ``log.txt`` in a stage's folder, with times, and its progress to ``progress.jsonl``.

    Of several processes the first one does.
    """
    if not processes.is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handler = LogFileHandler(folder / LOG)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        with tracking.in_folder(folder):
            yield
    finally:
        log.removeHandler(handler)
        handler.close()


def is_live() -> bool:
    """Whether a moving bar may be drawn: a terminal, not a worker of a launcher, not CI."""
    worker = (
        multiprocessing.parent_process() is not None
        or "SUBMITIT_EXECUTOR" in os.environ
        or "SLURM_JOB_ID" in os.environ
    )
    return (
        sys.stderr.isatty()
        and processes.speaks()
        and not worker
        and "CI" not in os.environ
        and os.environ.get("TERM") != "dumb"
    )


class Progress:
    """Progress with rate and time left: a bar on a terminal, otherwise a line every ten seconds.

    At the same pace, and at the end, a line goes to the stage's ``progress.jsonl``, see ``tracking``.

    Args:
        title: what is being done, for example "train".
        total: how many units there are.
        unit: what is counted, plural, for example "steps".
        done: how many were done before (a resumed run).
        leave_after: seconds after which a rehearsal leaves the ``with`` block, whose other units must not be needed by
            what follows; None: never.
        setups: how often ``setup`` will be called.
    """

    def __init__(
        self, title: str, total: int, unit: str, done: int = 0, leave_after: float | None = None, setups: int = 0
    ):
        self.title, self.total, self.unit = title, total, unit
        self.done = self.first = done
        self.is_tracked = True
        self.numbers: Mapping[str, tracking.Number] = {}
        self.started = self.last_line = time.monotonic()
        self.bar: RichProgress | None = None
        self.leave_after = leave_after
        self.rehearsal = None if leave_after is None else current_rehearsal()
        self.pace = Pace(total - done, setups, self.started)

    def __enter__(self) -> "Progress":
        if is_live():
            self.bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self.bar is not None:
            self.bar.stop()
        if not self.is_tracked:
            self._track(time.monotonic())
        if self.rehearsal is not None and (error is None or isinstance(error, Enough)):
            now = time.monotonic()
            rehearsed, spent = self.done - self.first, now - self.started
            predicted = self.pace.predicted(now)
            self.rehearsal.loops.append(
                Loop(self.title, self.unit, self.total, self.first, rehearsed, spent, predicted)
            )
        return isinstance(error, Enough)

    @contextmanager
    def setup(self) -> Iterator[None]:
        """Around what has to be ready before a pass over the units."""
        started = time.monotonic()
        yield
        self.pace.set_up(time.monotonic() - started)

    def advance(self, count: int = 1, numbers: Mapping[str, tracking.Number] | None = None, begun: float = 0.0) -> None:
        """Counts ``count`` more units.

        Args:
            count: how many were finished.
            numbers: stand beside them (the loss, for example).
            begun: how many of the next ones are done, as far as can be told; for a rehearsal.
        """
        self.done += count
        self.numbers = numbers or {}
        self.is_tracked = False
        self._show()
        now = time.monotonic()
        self.pace.advance(count, begun, now)
        if self.rehearsal is not None and self.done < self.total and now - self.started > (self.leave_after or 0):
            raise Enough

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=note_of(self.numbers))
        now = time.monotonic()
        if now - self.last_line < LINE_SECONDS:
            return
        self.last_line = now
        self._track(now)
        if self.bar is None:
            rate = self._rate(now)
            left = timedelta(seconds=round((self.total - self.done) / rate)) if rate else "?"
            note = note_of(self.numbers)
            log.info(
                "%s: %d/%d %s, %s, %s left%s",
                self.title,
                self.done,
                self.total,
                self.unit,
                "?/s" if rate is None else f"{rate:.3g}/s",
                left,
                note and f", {note}",
            )

    def _track(self, now: float) -> None:
        self.is_tracked = True
        if current_rehearsal() is None:
            tracking.write(self.title, self.done, self.total, self.unit, self._rate(now), self.numbers)

    def _rate(self, now: float) -> float | None:
        """Units a second of this attempt; None before the first."""
        return (self.done - self.first) / max(now - self.started, 1e-9) if self.done > self.first else None


def note_of(numbers: Mapping[str, tracking.Number]) -> str:
    """``query 3, step 12, retain loss 0.182, forget loss 1.024``; what is None is left out."""
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3f}' if isinstance(value, float) else value}"
        for name, value in numbers.items()
        if value is not None
    )
