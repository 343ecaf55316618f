"""Files of a run: atomic writes, tensors, fingerprints, stage manifests, and files filled block by block.

A stage is done if and only if its folder holds ``manifest.json``, which is written last. Until then ``state.json`` says
what the folder is being filled with. Nothing here knows what a stage computes.
"""

import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mucs_cli import __version__, locks, processes
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.records import FORMAT_VERSION, read_manifest, sealed
from mucs_cli.records import flatten as flatten
from mucs_cli.records import read_json as read_json

log = logging.getLogger("mucs")
SAFETENSORS_DTYPE = {"float32": "F32", "float64": "F64", "int64": "I64", "int16": "I16", "uint8": "U8"}
NUMPY_DTYPE = {code: name for name, code in SAFETENSORS_DTYPE.items()}
TENSOR_CHECKSUM = "crc32"
TENSOR_ENTRY = ("dtype", "shape", "data_offsets")
LARGEST_HEADER = 100_000_000
"""Bytes of a safetensors file's header, by the format's own definition."""
REDO = "Restore it from a copy, or redo its stage with overwrite=true."


# --- atomic writes ---------------------------------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary path beside ``path``, makes the bytes durable, and renames it into place.

    Of several processes only the first one does.

    Raises:
        UserError: the folder cannot be created or written, or the disk is full.
    """
    if not processes.is_first():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(str(path), f"cannot be written ({error}). Choose another run=, or free the disk.") from error


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomic(path, write)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object with its checksum; ``records.read_record`` reads it."""
    write_json(path, sealed(record))


def empty(folder: Path) -> None:
    """Deletes a stage's folder; what says whose files these are goes last, in case of an interruption.

    Where the folder is a link, to a larger disk perhaps, what it leads to is emptied instead.
    """
    if not folder.exists():
        return
    for path in sorted(folder.iterdir(), key=lambda path: path.name in ("manifest.json", "state.json")):
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
    if not folder.is_symlink():
        folder.rmdir()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Saves tensors as safetensors, atomically.

    Without ``metadata`` that is a checksum of them. Not both: the library writes several entries in random order, and
    equal tensors are to give equal files.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    facts = metadata or {TENSOR_CHECKSUM: tensor_checksum(ready)}
    write_atomic(path, lambda temporary: save_file(ready, temporary, metadata=facts))


def tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of names, types, shapes and values, in the order of the names."""
    found = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        found = zlib.crc32(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Loads a safetensors file on the CPU, and checks it: by ``sha256``, else by its own checksum where it has one.

    Raises:
        UserError: the file is missing, truncated, no safetensors file, or not the one that was written.
    """
    if not path.is_file():
        raise DamagedError(str(path), f"not found; expected a safetensors file. {REDO}")
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            checksum = (file.metadata() or {}).get(TENSOR_CHECKSUM)
    except MemoryError:
        raise
    except Exception as error:  # the library meets damaged headers with errors of many kinds
        raise DamagedError(str(path), f"is truncated or no safetensors file ({error}). {REDO}") from error
    if sha256 is not None:
        if sha256_file(path) != sha256:
            raise DamagedError(str(path), f"is not the file its manifest names (SHA-256 differs). {REDO}")
    elif checksum is not None and checksum != tensor_checksum(tensors):
        raise DamagedError(str(path), f"is damaged (its checksum differs). {REDO}")
    return tensors


def read_file(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """One output of a stage, checked against the hash in its manifest.

    Raises:
        UserError: it is missing, or not the file that was written.
    """
    path = folder / name
    check_file(folder, manifest, name)
    return path.read_bytes()


def is_whole(folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
    """Whether an output of a stage is the file that was written."""
    path = folder / name
    return path.is_file() and sha256_file(path) == manifest.get("outputs", {}).get(name, {}).get("sha256")


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Raises UserError where an output of a stage is missing, or not the file that was written."""
    path = folder / name
    if not path.is_file():
        raise DamagedError(str(path), f"not found; {folder / 'manifest.json'} names it. {REDO}")
    if not is_whole(folder, manifest, name):
        raise DamagedError(str(path), f"is not the file its manifest names (SHA-256 differs). {REDO}")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """SHA-256 (hex) of tensors, arrays, strings and JSON values; tensors count with dtype and shape."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def is_fingerprint(value: Any) -> bool:
    """Whether a value is written as ``fingerprint`` writes it."""
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def versions() -> dict[str, str]:
    """Versions of what decides the numbers, and the git revision where the package is run from a checkout."""
    found = {"mucs": __version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "hydra-core", "omegaconf", "safetensors", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    revision = (
        subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if (Path(__file__).parent.parent / ".git").exists() and shutil.which("git")
        else None
    )
    if revision is not None and revision.returncode == 0:
        found["git"] = revision.stdout.strip()
    return found


# --- stages ----------------------------------------------------------------------------------------------------------


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
        queries: id -> fingerprint of the queries that are wanted; None for a stage that knows no queries.
        may_grow: dotted keys of the identity that a finished stage may have smaller.
        cleanable: outputs that a finished stage may lack: they can be made again.
        file_of: from a query's id, the output that holds its result: where that is gone, the stage lacks the query.
        replace: take away what another identity left here, or what is damaged, without being asked: a cache.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        identity: dict[str, Any],
        overwrite: bool = False,
        on_begin: Callable[[], None] | None = None,
        queries: Mapping[int, str] | None = None,
        may_grow: Sequence[str] = (),
        cleanable: Sequence[str] = (),
        replace: bool = False,
        file_of: Callable[[int], str] | None = None,
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
        self.started, self._clock = datetime.now(UTC), time.monotonic()
        self.progress: dict[str, Any] = {}
        """What an unfinished attempt with the same identity has done; see ``save_progress``."""
        self.previous: dict[str, Any] = {}
        """The manifest of a finished stage that lacks some of the queries; see ``is_done``."""
        self._attempted: dict[str, str] = {}  # queries of this attempt and of unfinished ones, with their fingerprints

    def is_done(self, claim: bool = True) -> bool:
        """True where the folder already holds this result.

        Where it does not, the folder is this process's from here on, until it is finished or the command ends. Another
        process that is at it is waited for, and has then done the work. With ``overwrite`` it is not: what it is
        writing would be deleted.

        Args:
            claim: false to look only.
        Raises:
            UserError: it holds another result, finished or not, or a damaged one, and may not be overwritten; or it is
                to be overwritten and another process is at it.
        """
        done, self.previous = processes.on_first(lambda: (self._is_done(claim), self.previous))
        return done

    def _is_done(self, claim: bool) -> bool:
        if self._holds_result():
            return True
        if not claim:
            return False
        locks.hold(self.folder, wait=not self.overwrite)
        return self._holds_result(delete=True)

    def _holds_result(self, delete: bool = False) -> bool:
        """As ``is_done``, of what lies in the folder now; ``delete``: what may be overwritten."""
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
                    empty(self.folder)
                    self.previous = {}
                return False
        return False

    def _other_result(self, path: Path, key: str, ours: Any, theirs: Any) -> UserError:
        if is_fingerprint(ours) and is_fingerprint(theirs):
            ours, theirs = ours[:16], theirs[:16]  # which tells them apart
        return UserError(
            key.removeprefix("config."),
            f"got {ours!r}; {path} has {theirs!r}. Use another run=, or overwrite=true to redo this stage.",
        )

    def _require_outputs(self, manifest: Mapping[str, Any]) -> None:
        """Raises DamagedError where a file is gone or has another size; or other bytes, where it may be replaced.

        Those of other stages are compared when they are read: a run may hold more than is worth reading every time.
        """
        files = [self.file_of(int(query)) for query in manifest.get("queries", {})] if self.file_of else []
        for name in manifest.get("outputs", {}):
            if name in self.cleanable or name in files:
                continue
            if not self._is_there(manifest, name) or (self.replace and not is_whole(self.folder, manifest, name)):
                raise DamagedError(
                    str(self.folder / name),
                    f"is gone or not whole; {self.folder / 'manifest.json'} has its size and hash. {REDO}",
                )

    def _difference(self, record: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
        """What in the record contradicts this stage, as ``first_difference`` gives it."""
        ours, theirs = per_query(self.identity), per_query(record)
        ours["queries"] = {str(query): mine for query, mine in (self.queries or {}).items()}
        theirs["queries"] = record.get("queries", {})
        for name, mapping in ours.items():
            for query, mine in mapping.items():
                other = theirs.get(name, {}).get(query, mine)
                if other != mine:
                    return f"{name} of query {query}", mine[:16], other[:16]
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
        """Whether an output is there, in its size."""
        path, entry = self.folder / name, manifest.get("outputs", {}).get(name, {})
        return path.is_file() and path.stat().st_size == entry.get("bytes")

    def known_queries(self) -> dict[int, str]:
        """id -> fingerprint of the queries that the folder already has results for."""
        return {int(query): print_ for query, print_ in self.previous.get("queries", {}).items()}

    def begin(self) -> None:
        """Records what the folder is being filled with. Files and progress of an unfinished attempt stay."""
        processes.meet()  # none may still be reading what changes now
        self.progress = processes.on_first(self._begin)

    def _begin(self) -> dict[str, Any]:
        if self.on_begin is not None:
            self.on_begin()
        path = self.folder / "state.json"
        state = read_manifest(path) if path.exists() else {}
        self._attempted = state.get("queries", {}) | {str(query): mine for query, mine in (self.queries or {}).items()}
        self.save_progress(state.get("progress", {}))
        return self.progress

    def save_progress(self, progress: dict[str, Any]) -> None:
        """Records what is done so far, for a rerun after an interruption and for ``mucs status``."""
        self.progress = progress
        state = {
            "stage": self.command,
            "status": "running",
            **self.identity,
            "queries": self._attempted,
            "progress": progress,
        }
        write_record(self.folder / "state.json", state)

    def finish(self, facts: dict[str, Any], outputs: list[Path]) -> dict[str, Any]:
        """Writes the manifest, last; returns it. Of several processes the first one does, the others wait.

        Args:
            facts: what else to record (counts, seeds, device, ...).
            outputs: files to record with their SHA-256 and size.
        """
        return processes.on_first(lambda: self._finish(facts, outputs))

    def _finish(self, facts: dict[str, Any], outputs: list[Path]) -> dict[str, Any]:
        queries = self.known_queries() | dict(self.queries or {})
        known = per_query(self.previous)
        inputs = self.identity.get("inputs", {})
        merged = {name: known.get(name, {}) | mapping for name, mapping in per_query(self.identity).items()}
        manifest = {
            "stage": self.command,
            "status": "done",
            "format_version": FORMAT_VERSION,
            **self.identity,
            "inputs": inputs | merged,
            **({} if self.queries is None else {"queries": {str(query): queries[query] for query in sorted(queries)}}),
            **facts,
            "outputs": {
                path.relative_to(self.folder).as_posix(): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                for path in outputs
            },
            "versions": versions(),
            "started": self.started.isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._clock, 1),  # the clock on the wall may be set back
        }
        write_record(self.folder / "manifest.json", manifest)
        (self.folder / "state.json").unlink(missing_ok=True)
        for path in outputs:
            journal_of(path).unlink(missing_ok=True)
            kept_aside(path).unlink(missing_ok=True)
        locks.release(self.folder)
        return manifest

    def keep_aside(self, name: str) -> None:
        """Before a file of the finished stage is replaced: until the manifest says so, an interruption needs the old.

        ``previous_tensors`` finds it.
        """
        path = self.folder / name
        if self.previous and sha256_file(path) == self.previous["outputs"][name]["sha256"]:
            kept_aside(path).unlink(missing_ok=True)
            try:
                os.link(path, kept_aside(path))
            except OSError:  # a file system without links
                shutil.copyfile(path, kept_aside(path))

    def previous_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a file of the finished stage that lacks some queries, as its manifest names it.

        Raises:
            UserError: it is not there, or damaged.
        """
        aside, recorded = kept_aside(self.folder / name), self.previous["outputs"][name]["sha256"]
        is_aside = aside.exists() and sha256_file(aside) == recorded
        return read_tensors(aside if is_aside else self.folder / name, recorded)


def kept_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


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


def command_hint(folder: Path, command: str) -> str:
    run = next((p for p in folder.parents if (p / "run.json").exists()), folder.parent)
    return f"mucs {command} run={run}"


# --- files filled block by block -------------------------------------------------------------------------------------


def journal_of(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


class BlockFile:
    """A safetensors file that is filled block by block and survives an interruption.

    The file is preallocated as ``<name>.partial`` and memory-mapped; ``<name>.journal`` lists the finished blocks, a
    line each, appended after the block's bytes are durable. ``finish`` renames the file into place. A journal that is
    still there then says that the file is whole, though no manifest names it yet.

    Args:
        path: the finished file.
        tensors: name -> (dtype, shape), dtype a NumPy name ("float32", "int64", "int16", "uint8").
        identity: what is being written; a partial file of another identity is started afresh.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], identity: str):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = journal_of(path)
        offset = 0
        header: dict[str, dict[str, Any]] = {}
        for name, (dtype, shape) in tensors.items():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": SAFETENSORS_DTYPE[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self.identity = identity
        start = 8 + len(encoded)
        self.done: set[int] = self._finished_blocks(start + offset)
        try:
            if not self.done:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The journal first: what it lists is not in the new file. Either may be a link, and written through.
                for old in (self.journal, self.partial):
                    old.unlink(missing_ok=True)
                with self.partial.open("wb") as file:
                    file.write(len(encoded).to_bytes(8, "little") + encoded)
                    os.posix_fallocate(file.fileno(), 0, 8 + len(encoded) + max(offset, 1))
                    file.truncate(8 + len(encoded) + offset)
                self.journal.write_text(json.dumps({"identity": identity}) + "\n")
        except OSError as error:
            raise UserError(
                str(path), f"cannot be written ({error}). Choose another run=, or free the disk."
            ) from error
        self.arrays: dict[str, np.memmap] = {
            name: np.memmap(self.partial, dtype, "r+", start + header[name]["data_offsets"][0], shape)
            for name, (dtype, shape) in tensors.items()
        }

    def _finished_blocks(self, size: int) -> set[int]:
        """The blocks of an interrupted attempt; none of one whose file is not of this size any more."""
        if not self.journal.is_file() or self.journal.is_symlink():
            return set()
        first, *lines = self.journal.read_text(errors="replace").splitlines() or [""]
        if first != json.dumps({"identity": self.identity}):
            return set()
        if not self.partial.exists() and self.path.is_file():
            self.path.replace(self.partial)  # an interruption came just after it was put in place
        if not self.partial.is_file() or self.partial.is_symlink() or self.partial.stat().st_size != size:
            return set()
        # A line that a crash cut short or that was damaged is none of these: its block is redone.
        found = {int(number) for line in lines for number in re.findall(r'"block": (\d{1,18}),', line)}
        whole = set(lines)
        return {block for block in found if self._line(block) in whole}

    def _line(self, block: int) -> str:
        """A block's line in the journal; with a check, as a digit that flips would name another block."""
        return json.dumps({"block": block, "check": zlib.crc32(f"{self.identity} {block}".encode())})

    def commit(self, block: int) -> None:
        """Makes the arrays durable, then records ``block`` as finished."""
        for array in self.arrays.values():
            array.flush()
        with self.journal.open("a") as file:
            file.write(f"\n{self._line(block)}\n")  # whatever the last line was cut short to stays a line of its own
            file.flush()
            os.fsync(file.fileno())
        self.done.add(block)

    def finish(self, keep_journal: bool = False) -> None:
        """Renames the file into place and removes the journal.

        Args:
            keep_journal: until ``Stage.finish`` has recorded the file: an interruption before that loses nothing.
        """
        for array in self.arrays.values():
            array.flush()
        self.arrays.clear()
        sync(self.partial)
        self.partial.replace(self.path)
        sync(self.path.parent)
        if not keep_journal:
            self.journal.unlink()

    def discard(self) -> None:
        """Removes what was written: it has been used."""
        self.arrays.clear()
        self.journal.unlink()
        self.partial.unlink()


def map_tensor(path: Path, name: str, writable: bool = False) -> np.memmap:
    """A memory map of one tensor of a safetensors file, read-only unless it is to be ``writable``.

    Raises:
        UserError: the file is missing or truncated, or has no such tensor.
    """
    try:
        dtype, start, shape = locate(path, name)
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        return np.memmap(path, dtype, mode, start, shape)
    except (OSError, ValueError, KeyError) as error:
        reason = error.args[0] if isinstance(error, ValueError) else repr(error)
        raise UserError(
            str(path), f"cannot be read ({reason}); expected a safetensors file with {name!r}. {REDO}"
        ) from error


def locate(path: Path, name: str) -> tuple[str, int, tuple[int, ...]]:
    """NumPy dtype, position in bytes, and shape of one tensor of a safetensors file.

    Raises:
        ValueError, KeyError: the file is truncated or no safetensors file, or has no such tensor.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise ValueError("it is truncated")
        try:
            header = json.loads(file.read(length))
        except RecursionError as error:
            raise ValueError("its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    entry = header[name]
    values: list[Any] = [entry.get(key) if isinstance(entry, dict) else None for key in TENSOR_ENTRY]
    dtype, shape, offsets = values
    if not (isinstance(dtype, str) and dtype in NUMPY_DTYPE and are_counts(shape) and are_counts(offsets)):
        raise ValueError(f"its header describes {name!r} in no known way")
    start, end = (8 + length + offset for offset in offsets) if len(offsets) == 2 else (0, -1)
    if end - start != math.prod(shape) * np.dtype(NUMPY_DTYPE[dtype]).itemsize or end > size:
        raise ValueError("it is truncated, or its header is wrong")
    return NUMPY_DTYPE[dtype], start, tuple(shape)


def are_counts(values: Any) -> bool:
    """Whether a JSON value is a list of whole numbers, none of them negative."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values."""
    return torch.from_numpy(np.array(array))
