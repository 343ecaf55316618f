"""Locks between processes that share a run: the jobs of a parallel sweep, or commands in two shells.

A lock is a file beside the folder that it is for, locked by the kernel and so free again when its process ends, however
that ends. The file names the holder; it is there only while the folder is held, or after a crash.
"""

import fcntl
import functools
import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mucs_cli import processes
from mucs_cli.errors import UserError

log = logging.getLogger("mucs")
command = "mucs"
"""What this process is doing, as typed; for others that wait for it."""
_held: dict[tuple[Path, int], int] = {}
"""(lock file, thread of this process that has it) -> the open file's descriptor."""


def lock_path(folder: Path) -> Path:
    """Beside the folder, which may be deleted and made again while it is held."""
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds off other processes that would fill the same folder.

    Args:
        folder: need not exist; the one that it is in is made.
        wait: for another process that holds the lock, naming it in the log; else go on without it.
    Yields:
        whether the lock is held. True as well where the file system has no locks: a single process needs none. Of
        several processes at one command the first one holds it for all.
    Raises:
        UserError: the lock's file cannot be created.
    """
    if not processes.is_first() or is_held_here(folder):  # by the first process for all, or by an outer one
        yield True
        return
    is_held = acquire(folder, wait)
    try:
        yield is_held
    finally:
        release(folder)


def hold(folder: Path, wait: bool) -> bool:
    """Takes the lock until ``release`` or ``release_all``, unless this thread has it.

    Returns:
        whether it was taken now.
    Raises:
        UserError: another process has it and is not to be waited for.
    """
    if not processes.is_first() or is_held_here(folder):
        return False
    if not acquire(folder, wait):
        raise UserError(
            "overwrite",
            f"got true, and {holder_text(lock_path(folder))} is at {folder}. Stop it first, or wait until it is done.",
        )
    return True


def release(folder: Path) -> None:
    """Gives a lock of this thread back; nothing where it has none."""
    give_back((lock_path(folder), threading.get_ident()))


def give_back(key: tuple[Path, int]) -> None:
    descriptor = _held.pop(key, None)
    if descriptor is not None:
        try:
            key[0].unlink(missing_ok=True)  # while it is locked: whoever waits finds it gone, and makes another
        finally:
            os.close(descriptor)


def release_all() -> None:
    """Gives all locks of this process back: its command has ended, perhaps by an error."""
    for key in list(_held):
        give_back(key)


def is_held_here(folder: Path) -> bool:
    """Whether this thread has the lock."""
    return (lock_path(folder), threading.get_ident()) in _held


def acquire(folder: Path, wait: bool) -> bool:
    """Whether the lock is held now; without ``wait`` it may not be."""
    path = lock_path(folder)
    is_said = False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UserError(str(folder), f"cannot be written ({error.strerror}). Choose another run=.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                os.close(descriptor)
                return False
            if not is_said:
                log.info("waiting for %s, which is at %s", holder_text(path), folder)
                is_said = True
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except BaseException:
                os.close(descriptor)
                raise
        except OSError as error:
            warn_of_no_locks(str(error.strerror))
        if is_current(descriptor, path):
            write_holder(descriptor)
            _held[path, threading.get_ident()] = descriptor
            return True
        os.close(descriptor)  # the holder gave it back and took the file away


@functools.cache
def warn_of_no_locks(reason: str) -> None:
    """Says, once a process, that nothing keeps two commands apart."""
    log.warning(
        "the run's file system has no locks (%s): start no two commands on one run at once, nor jobs of a sweep", reason
    )


def is_current(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# --- who holds it ----------------------------------------------------------------------------------------------------


def write_holder(descriptor: int) -> None:
    """Says in the lock's file who we are; a full disk does not matter."""
    holder = {
        "process": os.getpid(),
        "host": os.uname().nodename,
        "command": command,
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        pass


def holder_text(path: Path) -> str:
    """``process 123 on host (mucs train run=r, since 2026-11-27T05:00:00+00:00)``, as far as the file says so."""
    try:
        holder: Any = json.loads(path.read_bytes())
        return "process {process} on {host} ({command}, since {since})".format(**holder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
