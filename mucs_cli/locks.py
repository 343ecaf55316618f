"""Locks between processes that share a run: the jobs of a parallel sweep, or commands in two shells."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mucs_cli import processes
from mucs_cli.errors import UserError


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Holds off other processes that would fill the same folder; the lock ends with the process, however that ends.

    Args:
        folder: made where it is missing.
        wait: for another process that holds the lock; else go on without it.
    Yields:
        whether the lock is held. True as well where the file system has no locks: a single process needs none. Of
        several processes at one command the first one holds it for all.
    Raises:
        UserError: the folder cannot be created.
    """
    if not processes.is_first():
        yield True
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(str(folder), f"cannot be written ({error.strerror}). Choose another run=.") from error
    try:
        yield acquired(descriptor, wait)
    finally:
        os.close(descriptor)


def acquired(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
