"""A stage's folder: what says that it is done, what it is being filled with, and who is at it.

A stage is done if and only if its folder holds ``manifest.json``, which is written last. Until then ``state.json`` says
what the folder is being filled with. Nothing here knows what a stage computes.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from mucs_cli import locks, processes
from mucs_cli.artifacts import (
    REDO,
    empty,
    entry_of,
    fingerprint,
    is_fingerprint,
    is_intact,
    link_or_copy,
    read_tensors,
    sha256_file,
    versions,
    write_record,
)
from mucs_cli.block_file import journal_of
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.records import FORMAT_VERSION, SLICES, Part, flatten, read_manifest

log = logging.getLogger("mucs")
RECORDED = ("stage", "status", "format_version", "config", "inputs", "queries", "outputs", "versions")
TIMES = ("started", "ended", "seconds")


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], may_grow: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first dotted key at which two nested mappings differ, with both values; None where they agree.

    Args:
        may_grow: dotted keys of numbers that agree where ours is larger.
    """
    left, right = flatten(ours), flatten(theirs)
    for key in [*left, *[k for k in right if k not in left]]:
        mine, other = left.get(key), right.get(key)
        grown = key in may_grow and isinstance(mine, int) and isinstance(other, int) and mine > other
        if mine != other and not grown:
            return key, mine, other
    return None


def per_query(record: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The inputs of a manifest, or of a stage's identity, that are one fingerprint a query."""
    return {name: value for name, value in record.get("inputs", {}).items() if isinstance(value, dict)}


def without_per_query(record: Mapping[str, Any]) -> dict[str, Any]:
    """The other inputs, and everything else."""
    inputs = record.get("inputs", {})
    return {**record, "inputs": {name: value for name, value in inputs.items() if not isinstance(value, dict)}}


class Stage:
    """One stage's folder.

    A stage that does something for each query says which ones, by id and fingerprint. A finished one that lacks some of
    them is not done: its manifest becomes ``previous``, and only what is missing has to be added. An input that is a
    mapping is one fingerprint a query; of these, only those of shared queries have to agree.

    Of several processes the first one reads and writes the folder, and the others learn what it found.

    Args:
        folder: where its files go.
        command: the command that fills it, for messages.
        identity: what decides the result: ``{"config": {...}, "inputs": {...}}``, JSON values only.
        overwrite: throw away what another identity left here.
        on_begin: called when the stage begins to fill its folder.
        queries: id -> fingerprint of the queries that are wanted, None where it is not known before they are made;
            None for a stage that knows no queries.
        may_grow: dotted keys of the identity that a finished stage may have smaller.
        cleanable: outputs that a finished stage may lack: they can be made again.
        file_of: from a query's id, the output that holds its result: where that is gone, the stage lacks the query.
        spent: folders in this one that an unfinished attempt goes on from; deleted once no query of one is left.
        replace: take away what another identity left here, or what is damaged, without being asked: a cache.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        identity: dict[str, Any],
        overwrite: bool = False,
        on_begin: Callable[[], None] | None = None,
        queries: Mapping[int, str | None] | None = None,
        may_grow: Sequence[str] = (),
        cleanable: Sequence[str] = (),
        replace: bool = False,
        file_of: Callable[[int], str] | None = None,
        spent: Sequence[str] = (),
    ):
        self.folder = folder
        self.command = command
        self.identity = json.loads(json.dumps(identity))
        self.overwrite = overwrite
        self.on_begin = on_begin
        self.queries = queries
        self.may_grow = may_grow
        self.cleanable = cleanable
        self.replace = replace
        self.file_of = file_of
        self.spent = spent
        self.started, self._clock = datetime.now(UTC), time.monotonic()
        self.previous: dict[str, Any] = {}
        """The manifest of a finished stage that lacks some of the queries, or to which some were being added when an
        interruption came; see ``is_done``."""
        self._attempted: dict[str, str] = {}  # queries of this attempt and of unfinished ones, with their fingerprints

    def part(self) -> "Stage":
        """A stage with a folder of its own for the queries that this one wants and lacks; after ``is_done``.

        Its folder is named after all that are wanted, so that the same command finds it again.
        """
        name = f"{self.folder.name}__{fingerprint(self.identity, self.queries)[:16]}"
        known = self.known_queries()
        return Stage(
            self.folder.parent / SLICES / name,
            self.command,
            self.identity,
            self.overwrite,
            self.on_begin,
            {query: mine for query, mine in (self.queries or {}).items() if query not in known},
            self.may_grow,
            self.cleanable,
            self.replace,
            self.file_of,
            self.spent,
        )

    def is_done(self, claim: bool = True, wait: bool = False) -> bool:
        """True where the folder already holds this result.

        Where it does not, the folder is this process's from here on, until it is finished or the command ends. Another
        process that is at it is waited for, and has then done the work. With ``overwrite`` it is not, unless ``wait``:
        what it is writing would be deleted.

        Args:
            claim: false to look only.
            wait: for another process in any case.
        Raises:
            UserError: it holds another result, finished or not, or a damaged one, and may not be overwritten; or it is
                to be overwritten and another process is at it.
        """
        done, previous = processes.on_first(lambda: (self._is_done(claim, wait), self.previous))
        self.previous = Part(previous, self.folder / "manifest.json")
        return done

    def _is_done(self, claim: bool, wait: bool) -> bool:
        if self._holds_result():
            if claim and (self.folder / "state.json").exists():
                self._finish_interrupted()
            return True
        if not claim:
            return False
        is_taken = locks.hold(self.folder, wait or not self.overwrite)
        is_done = self._holds_result(delete=True)
        if is_done and is_taken:  # by now another process has done it, and others may be waiting to learn that
            locks.release(self.folder)
        return is_done

    def _finish_interrupted(self) -> None:
        """Where an interruption came after the manifest was written: deletes what else ``finish`` would have."""
        with locks.locked(self.folder, wait=False) as is_ours:
            state = self.folder / "state.json"
            if not (is_ours and self._holds_result() and state.exists()):
                return
            manifest = read_manifest(self.folder / "manifest.json")
            self._attempted = read_manifest(state).get("queries", {})
            if self._has_attempted(manifest):
                self._tidy(manifest)

    def _holds_result(self, delete: bool = False) -> bool:
        """As ``is_done``, of what lies in the folder now; ``delete``: what may be overwritten."""
        self.previous = {}
        for name in ("manifest.json", "state.json"):
            path = self.folder / name
            if not path.exists():
                continue
            try:
                record = read_manifest(path)
                difference = self._difference(record)
                if difference is not None:
                    raise self._other_result(path, *difference)
                if name == "manifest.json" and not self._lacks(record):
                    if not self.overwrite and self._is_being_changed(record):
                        self.previous = record
                        continue
                    self._require_outputs(record)
                    return True
            except UserError as error:
                if not path.exists():  # another process has just finished, or begun afresh
                    continue
                if not (self.overwrite or self.replace):
                    raise
                if delete:
                    if isinstance(error, DamagedError):
                        log.warning("%s is damaged; computing it again", error.subject)
                    empty(self.folder) if self.overwrite else self._take_away()
                    self.previous = {}
                return False
        return False

    def _take_away(self) -> None:
        """Removes what the manifest names, and what says that it is there.

        Other files stay: features of single queries, beside those of all images, have a record of their own.
        """
        try:
            outputs = read_manifest(self.folder / "manifest.json").get("outputs", {})
        except DamagedError:
            outputs = {}
        for name in ("manifest.json", "state.json", *outputs):
            (self.folder / name).unlink(missing_ok=True)

    def _other_result(self, path: Path, key: str, ours: Any, theirs: Any) -> UserError:
        if is_fingerprint(ours) and is_fingerprint(theirs):
            ours, theirs = ours[:16], theirs[:16]  # which tells them apart
        return UserError(
            key.removeprefix("config."),
            f"got {ours!r}; {path} has {theirs!r}. Use another run=, or overwrite=true to redo this stage.",
        )

    def _is_being_changed(self, manifest: Mapping[str, Any]) -> bool:
        """Whether outputs are not as the manifest names them because queries are, or were, being added.

        The queries that it names are there then, but the files beside them are to be written again.
        """
        others = [name for name in manifest.get("outputs", {}) if not self._is_there(manifest, name)]
        begun = (self.folder / "state.json").exists() or any(kept_aside(self.folder / name).exists() for name in others)
        return begun and bool(others) and bool(manifest.get("queries"))

    def _require_outputs(self, manifest: Mapping[str, Any]) -> None:
        """Raises DamagedError where a file is not there, see ``_is_there``."""
        files = [self.file_of(int(query)) for query in manifest.get("queries", {})] if self.file_of else []
        for name in manifest.get("outputs", {}):
            if name in self.cleanable or name in files:
                continue
            if not self._is_there(manifest, name):
                raise DamagedError(
                    str(self.folder / name),
                    f"is gone or not whole; {self.folder / 'manifest.json'} has its size and hash. {REDO}",
                )

    def _difference(self, record: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """What in the record contradicts this stage, as ``first_difference`` gives it."""
        ours, theirs = per_query(self.identity), per_query(record)
        ours["queries"] = {str(query): mine for query, mine in (self.queries or {}).items() if mine}
        theirs["queries"] = record.get("queries", {})
        for name, mapping in ours.items():
            for query, mine in mapping.items():
                other = theirs.get(name, {}).get(query, mine)
                if other != mine:
                    return f"{name} of query {query}", str(mine)[:16], str(other)[:16]
        recorded = {key: record.get(key, {}) for key in self.identity}
        return first_difference(without_per_query(self.identity), without_per_query(recorded), self.may_grow)

    def _lacks(self, record: dict[str, Any]) -> bool:
        """Whether a finished stage has not all the queries; keeps then what its manifest says of those it has."""
        files = {query: self.file_of(int(query)) for query in record.get("queries", {})} if self.file_of else {}
        lost = {query: name for query, name in files.items() if not self._is_there(record, name)}
        known = {query: mine for query, mine in record.get("queries", {}).items() if query not in lost}
        outputs = {name: entry for name, entry in record.get("outputs", {}).items() if name not in lost.values()}
        missing = any(str(query) not in known for query in self.queries or {})
        self.previous = record | {"queries": known, "outputs": outputs} if missing else {}
        return missing

    def _is_there(self, manifest: Mapping[str, Any], name: str) -> bool:
        """Whether an output is there, in its size; where it may be replaced or overwritten, with its bytes.

        Others are compared when they are read: a run may hold more than is worth reading every time.
        """
        path, entry = self.folder / name, manifest.get("outputs", {}).get(name, {})
        if not path.is_file() or path.stat().st_size != entry.get("bytes"):
            return False
        return not (self.replace or self.overwrite) or is_intact(self.folder, manifest, name)

    def known_queries(self) -> dict[int, str]:
        """id -> fingerprint of the queries that the folder already has results for."""
        return {int(query): print_ for query, print_ in self.previous.get("queries", {}).items()}

    @property
    def attempted(self) -> dict[int, str]:
        """id -> fingerprint of the queries of this attempt and of unfinished ones; in the first process, once begun."""
        return {int(query): print_ for query, print_ in self._attempted.items()}

    def begin(self) -> None:
        """Records what the folder is being filled with. The files of an unfinished attempt stay."""
        processes.meet()  # none may still be reading what changes now
        processes.on_first(self._begin)

    def _begin(self) -> None:
        if self.on_begin is not None:
            self.on_begin()
        path = self.folder / "state.json"
        state = read_manifest(path) if path.exists() else {}
        known = {str(query): mine for query, mine in (self.queries or {}).items() if mine}
        self._attempted = state.get("queries", {}) | known
        record = {"stage": self.command, "status": "running", **self.identity, "queries": self._attempted}
        write_record(path, record)

    def finish(
        self,
        facts: Mapping[str, Any],
        outputs: Sequence[Path],
        seconds: float | None = None,
        entries: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Writes the manifest, last; returns it. Of several processes the first one does, the others wait.

        Args:
            facts: what else to record (counts, seeds, device, ...).
            outputs: files to record with their SHA-256 and size.
            seconds: that it took; None: since this object was made.
            entries: the records of outputs that were made earlier, by name: what has happened to these since is found
                when they are read.
        """
        return processes.on_first(lambda: self._finish(facts, outputs, seconds, entries or {}))

    def _finish(
        self,
        facts: Mapping[str, Any],
        outputs: Sequence[Path],
        seconds: float | None,
        entries: Mapping[str, Mapping[str, Any]],
    ) -> dict[str, Any]:
        queries = self.known_queries() | {query: mine for query, mine in (self.queries or {}).items() if mine}
        known = per_query(self.previous)
        inputs = self.identity.get("inputs", {})
        merged = {name: known.get(name, {}) | mapping for name, mapping in per_query(self.identity).items()}
        names = [path.relative_to(self.folder).as_posix() for path in outputs]
        manifest = {
            "stage": self.command,
            "status": "done",
            "format_version": FORMAT_VERSION,
            **self.identity,
            "inputs": inputs | merged,
            **({} if self.queries is None else {"queries": {str(query): queries[query] for query in sorted(queries)}}),
            **facts,
            "outputs": {name: entries.get(name) or entry_of(self.folder / name) for name in names},
            "versions": versions(),
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            # the clock on the wall may be set back
            "seconds": round(time.monotonic() - self._clock if seconds is None else seconds, 1),
        }
        write_record(self.folder / "manifest.json", manifest)
        self._tidy(manifest)
        locks.release(self.folder)
        return manifest

    def _has_attempted(self, manifest: Mapping[str, Any]) -> bool:
        """Whether it names all queries of this attempt and of unfinished ones."""
        return self._attempted.items() <= manifest.get("queries", {}).items()

    def _tidy(self, manifest: Mapping[str, Any]) -> None:
        """Deletes what only an unfinished stage needs; what says that there is any goes last."""
        for name in manifest["outputs"]:
            journal_of(self.folder / name).unlink(missing_ok=True)
            kept_aside(self.folder / name).unlink(missing_ok=True)
        for name in self.spent if self._has_attempted(manifest) else ():
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / "state.json").unlink(missing_ok=True)

    def keep_aside(self, name: str) -> None:
        """``keep_aside`` for a file of the finished stage that lacks some queries."""
        keep_aside(self.folder, self.previous, name)

    def previous_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of the finished stage that lacks some queries, as its manifest names it.

        Raises:
            UserError: it is not there, or damaged.
        """
        return read_tensors(recorded_file(self.folder, self.previous, name), self.previous["outputs"][name]["sha256"])


def kept_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def keep_aside(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Before an output is replaced: until the manifest says so, an interruption needs the old one."""
    if is_intact(folder, manifest, name):
        link_or_copy(folder / name, kept_aside(folder / name))


def recorded_file(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """Where an output is as the manifest names it: aside, if an interruption came while it was being replaced."""
    aside, recorded = kept_aside(folder / name), manifest.get("outputs", {}).get(name, {}).get("sha256")
    return aside if aside.is_file() and sha256_file(aside) == recorded else folder / name


def require_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a finished upstream stage.

    Raises:
        UserError: the stage has not run, did not finish, was written by a newer file format, or is damaged.
    """
    path = folder / "manifest.json"
    if not path.exists():
        got = "an unfinished stage" if (folder / "state.json").exists() else "no such stage"
        raise UserError(
            str(path), f"got {got}; expected a finished `mucs {command}`. Run it first: {command_hint(folder, command)}"
        )
    return read_manifest(path)


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage had its manifest record beside what every stage records."""
    return {key: value for key, value in manifest.items() if key not in (*RECORDED, *TIMES)}


def command_hint(folder: Path, command: str) -> str:
    run = next((p for p in folder.parents if (p / "run.json").exists()), folder.parent)
    return f"mucs {command} run={run}"
