"""Rehearsals, which ``plan=true`` rests on: a command runs, but leaves each long loop after a few seconds.

How long the whole of a loop takes follows from the pace of what was done of it. What is outside of such loops is done
in full, and takes the time that it takes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Enough(BaseException):
    """Leaves a loop whose pace is known; no error, and taken by the ``Progress`` around the loop."""


@dataclass(frozen=True)
class Loop:
    """A loop as it was rehearsed.

    Args:
        title, unit: what is being done, and what is counted.
        total: how many units there are.
        finished: how many were done before.
        rehearsed: how many the rehearsal did.
        spent: seconds of the rehearsal.
        seconds: predicted for all that is left to do; None where no unit was even begun.
    """

    title: str
    unit: str
    total: int
    finished: int
    rehearsed: int = 0
    spent: float = 0.0
    seconds: float | None = None

    @property
    def left(self) -> int:
        """Units that are to be done."""
        return self.total - self.finished

    @property
    def is_cut(self) -> bool:
        """Whether the rehearsal left some of them out."""
        return self.rehearsed < self.left


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes.

    Args:
        stage: its command.
        loops: its long loops.
        other_seconds: of everything else: loading, saving, what is too short to be left early; None if unknown.
        memory: bytes, the highest use by the end of the stage: of the process, or of the CUDA device; None if unknown.
        disk: bytes that it adds to the run's folder.
        notes: what else there is to say, a sentence each.
    """

    stage: str
    loops: list[Loop] = field(default_factory=list)
    other_seconds: float | None = None
    memory: int | None = None
    disk: int = 0
    notes: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Predicted; without what is unknown."""
        return sum(seconds for seconds in self._parts if seconds is not None)

    @property
    def is_known(self) -> bool:
        """Whether nothing of its time is unknown."""
        return None not in self._parts

    @property
    def _parts(self) -> list[float | None]:
        return [self.other_seconds, *(loop.seconds for loop in self.loops)]

    @property
    def is_cut(self) -> bool:
        return any(loop.is_cut for loop in self.loops)


@dataclass
class Pace:
    """Times of the units of one loop, and how long all of them take.

    The first step of a loop counts as it was: it is slower where memory is taken and kernels are chosen. A setup is
    what has to be ready before a pass over the units.

    Args:
        left: units that are to be done.
        setups: setups that are to be done.
        started: seconds of a clock, as ``now`` below.
    """

    left: float
    setups: int
    started: float
    units: float = 0.0
    begun: float = 0.0
    first_units: float = 0.0
    first_seconds: float = 0.0
    num_setups: int = 0
    setup_seconds: float = 0.0

    def set_up(self, seconds: float) -> None:
        """One more setup, of so many seconds."""
        self.num_setups += 1
        self.setup_seconds += seconds

    def advance(self, count: float, begun: float, now: float) -> None:
        """``count`` more units are done, and so much of the next ones."""
        if count and not self.units:
            self.first_units, self.first_seconds = count, now - self.started - self.setup_seconds
        self.units += count
        self.begun = begun

    def predicted(self, now: float) -> float | None:
        """Seconds for all units and setups; None before any unit was begun."""
        seconds, units = now - self.started - self.setup_seconds, self.units + self.begun
        if units <= 0:
            return None
        setups = self.setups * self.setup_seconds / max(1, self.num_setups)
        if self.units <= self.first_units:
            return setups + seconds * self.left / units
        each = (seconds - self.first_seconds) / (units - self.first_units)
        return setups + self.first_seconds + each * (self.left - self.first_units)


class Rehearsal:
    """A rehearsal that is going on, and the loops that it has been through."""

    def __init__(self) -> None:
        self.loops: list[Loop] = []


_going_on: list[Rehearsal] = []


@contextmanager
def rehearsing() -> Iterator[Rehearsal]:
    """Within it, every ``Progress`` that may be left early is."""
    rehearsal = Rehearsal()
    _going_on.append(rehearsal)
    try:
        yield rehearsal
    finally:
        _going_on.pop()


def current_rehearsal() -> Rehearsal | None:
    return _going_on[-1] if _going_on else None
