"""Ctrl-C and SIGTERM, the warning of a batch system, as exceptions that leave no state half changed.

A signal raises where the command is; within ``held_back`` it waits for the end. Whatever can go on later from a state
saves it on the way out, see ``saving``.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SAME_SECONDS = 5.0
"""Signals so soon after the first are taken for the same one: launchers pass on what the terminal sent to all."""


class Terminated(BaseException):
    """SIGTERM, as an exception, so that files are closed and work in progress is kept."""


INTERRUPTIONS = (KeyboardInterrupt, Terminated)


class _Signals:
    """What has come: when the first one did, how many blocks hold it back, and which one waits for their end."""

    first: float | None = None
    held = 0
    waiting: int | None = None

    def deliver(self) -> None:
        number, self.waiting = self.waiting, None
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated


_signals = _Signals()


@contextmanager
def handled() -> Iterator[None]:
    """Within it SIGINT raises KeyboardInterrupt and SIGTERM ``Terminated``, once.

    A later signal, while the first one's state is being saved, ends the process at once: as after ``kill -9``, what is
    on disk is whole. A signal that is ignored stays so: a shell starts what it puts into the background that way.
    """
    global _signals
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _signals = _Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _on_signal(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _signals.first is not None:
        if now - _signals.first > SAME_SECONDS:
            os.write(2, b"mucs: ended without waiting for what was being saved\n")
            os._exit(128 + number)
        return
    _signals.first, _signals.waiting = now, number
    if not _signals.held:
        _signals.deliver()


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[None]:
    """Calls ``save`` where an interruption leaves the block, which goes on its way then."""
    try:
        yield
    except INTERRUPTIONS:
        save()
        raise


@contextmanager
def held_back() -> Iterator[None]:
    """Around changes that belong together and take a moment: a signal that comes meanwhile raises at the end."""
    signals = _signals
    signals.held += 1
    try:
        yield
    finally:
        signals.held -= 1
        if not signals.held and signals.waiting is not None:
            signals.deliver()
