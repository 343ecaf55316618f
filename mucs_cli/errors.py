"""What a user can cause: one line, exit code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that a user caused and can mend; printed as one line, without a traceback, exit code 2.

    Written as ``UserError("<key or path>", "got X; expected Y. Do Z.")``. Both arguments are positional, so that the
    exception survives pickling (launchers send it between processes).
    """

    def __init__(self, subject: str, message: str):
        super().__init__(subject, message)
        self.subject = subject
        self.message = message

    def __str__(self) -> str:
        return " ".join(f"{self.subject}: {self.message}".split())


class DamagedError(UserError):
    """A file of a run that is not as it was written, or gone."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
