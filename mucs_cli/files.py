"""Paths and files that others may have made: what may be read, and how something is written to. Imports no torch."""

import errno
import os
import stat
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """A path as it was typed, with ``~`` expanded; of a user that there is not, ``~nosuch`` is a name like others.

    ``Path.expanduser`` raises RuntimeError for it.
    """
    return Path(os.path.expanduser(text))


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file: a pipe would be waited for, a device would be read without end.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return file.read()


def unlinked(path: str, flags: int) -> int:
    """``os.open`` of a path that must be no link: one in a folder from others could lead anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)
