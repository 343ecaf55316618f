"""States to go on from after an interruption: of a training, and of queries that are being unlearned.

A state is one safetensors file, written atomically, under the number of the steps that it has taken. The last two stay.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import read_tensors, write_tensors
from mucs_cli.block_file import map_tensor
from mucs_cli.errors import UserError
from mucs_cli.interruption import INTERRUPTIONS
from mucs_cli.runtime import log

KEPT = 2


def write_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Adds a state to the folder, which then holds the last two and nothing else.

    Raises:
        UserError: it cannot be written.
    """
    newest = folder / f"step_{step:09d}.safetensors"
    write_tensors(newest, tensors)
    kept = sorted(path for path in folder.glob("step_*.safetensors") if path <= newest)[-KEPT:]
    # The others are older, or of later steps and cannot be read, or what a killed process left half written.
    for path in folder.iterdir():
        if path not in kept:
            path.unlink()


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The newest state that can be read; empty where there is none."""
    for path in sorted(folder.glob("step_*.safetensors"), reverse=True):
        try:
            return read_tensors(path)
        except UserError as error:
            log.warning("%s; trying the one before", error)
    return {}


class QueryCheckpoints:
    """States of unlearning within a query: a folder for every query that was begun, or for several that are stacked.

    As a context manager around the unlearning: an interruption saves the present state.

    Args:
        folder: holds the folders.
        every_seconds: between two states.
    """

    def __init__(self, folder: Path, every_seconds: float):
        self.folder, self.every_seconds = folder, every_seconds
        self._place = folder  # of what was begun last
        self._state: Callable[[], tuple[int, dict[str, Tensor]]] | None = None
        self._saved = time.monotonic()

    def __enter__(self) -> "QueryCheckpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, INTERRUPTIONS) and self._state is not None:
            self.save()

    def stack_of(self, query: int) -> list[int]:
        """The stack of which a state was saved that holds this query; empty where there is none."""
        return next((ids for ids in self._begun().values() if isinstance(ids, list) and query in ids), [])

    def begin(
        self, queries: int | list[int], state: Callable[[], tuple[int, dict[str, Tensor]]]
    ) -> Mapping[str, Tensor]:
        """What was saved of just this query, or just these stacked ones; empty if nothing was.

        Args:
            queries: what is unlearned from now on.
            state: the steps so far, and a state with ``queries`` as its tensor ``query_id``.
        """
        places = [place for place, begun in self._begun().items() if begun == queries]
        first = queries if isinstance(queries, int) else queries[0]
        self._place = places[0] if places else self.folder / f"query_{first:04d}"
        self._state, self._saved = state, time.monotonic()
        if places:
            left = read_checkpoint(self._place)
            # an older state, which is read where the newest is damaged, may be of a larger stack
            return left if "query_id" in left and left["query_id"].tolist() == queries else {}
        shutil.rmtree(self._place, ignore_errors=True)  # of another stack
        return {}

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved > self.every_seconds:
            self.save()

    def save(self) -> None:
        """Raises UserError where it cannot be written."""
        assert self._state is not None
        with processes.alone():  # the queries of this process are its own
            write_checkpoint(self._place, *self._state())
        self._saved = time.monotonic()

    def forget(self) -> None:
        """What was begun last is not gone on with in this process: its models can go. Saved states stay."""
        self._state = None

    def finish(self) -> None:
        """What was begun last is done, and its results are saved: its states go."""
        if self._state is not None:
            self._state = None
            shutil.rmtree(self._place, ignore_errors=True)

    def _begun(self) -> dict[Path, int | list[int]]:
        """The folders, and the query or the stack of each."""
        found: dict[Path, int | list[int]] = {}
        for place in sorted(self.folder.glob("query_*")):
            try:
                paths = sorted(place.glob("step_*.safetensors"), reverse=True)
            except FileNotFoundError:  # another process has finished it meanwhile
                continue
            for path in paths:
                try:
                    found[place] = map_tensor(path, "query_id").tolist()
                    break
                except UserError:  # said when it is read
                    continue
        return found
