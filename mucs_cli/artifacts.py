"""Files of a run: atomic writes, tensors, fingerprints, stage manifests, and files filled block by block.

A stage is done if and only if its folder holds ``manifest.json``, which is written last. Until then ``state.json`` says
what the folder is being filled with. Nothing here knows what a stage computes.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mucs_cli import __version__, processes
from mucs_cli.errors import UserError

FORMAT_VERSION = 1
SAFETENSORS_DTYPE = {"float32": "F32", "float64": "F64", "int64": "I64", "int16": "I16", "uint8": "U8"}
NUMPY_DTYPE = {code: name for name, code in SAFETENSORS_DTYPE.items()}


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


def read_json(path: Path) -> Any:
    """Raises UserError where the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error}). Delete it and rerun its stage.") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Saves tensors as safetensors, atomically."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: save_file(ready, temporary, metadata=metadata))


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Loads a safetensors file on the CPU; with ``sha256``, checks the file's hash first.

    Raises:
        UserError: the file is missing, truncated, no safetensors file, or not the one that was written.
    """
    if not path.is_file():
        raise UserError(str(path), "not found; expected a safetensors file. Rerun the stage that writes it.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            str(path),
            f"is truncated or no safetensors file ({error}). Rerun the stage that writes it with overwrite=true.",
        ) from error
    if sha256 is not None and sha256_file(path) != sha256:
        raise UserError(
            str(path), "is not the file its manifest names (SHA-256 differs). Rerun its stage with overwrite=true."
        )
    return tensors


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


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


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
        grown = key in may_grow and mine is not None and other is not None and mine > other
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
    ):
        self.folder = folder
        self.command = command
        self.identity = json.loads(json.dumps(identity))
        self.overwrite = overwrite
        self.on_begin = on_begin
        self.queries = queries
        self.may_grow = may_grow
        self.started = time.time()
        self.progress: dict[str, Any] = {}
        """What an unfinished attempt with the same identity has done; see ``save_progress``."""
        self.previous: dict[str, Any] = {}
        """The manifest of a finished stage that lacks some of the queries; see ``is_done``."""
        self._attempted: dict[str, str] = {}  # queries of this attempt and of unfinished ones, with their fingerprints

    def is_done(self) -> bool:
        """True where the folder already holds this result.

        Raises:
            UserError: it holds another result, finished or not, and ``overwrite`` is false.
        """
        done, self.previous = processes.on_first(lambda: (self._is_done(), self.previous))
        return done

    def _is_done(self) -> bool:
        for name in ("manifest.json", "state.json"):
            path = self.folder / name
            if not path.exists():
                continue
            record = read_json(path)
            difference = self._difference(record)
            if difference is None:
                if name == "manifest.json" and not self._lacks(record):
                    return True
                continue
            if self.overwrite:
                shutil.rmtree(self.folder)
                self.previous = {}
                return False
            key, ours, theirs = difference
            if is_fingerprint(ours) and is_fingerprint(theirs):
                ours, theirs = ours[:16], theirs[:16]  # which tells them apart
            raise UserError(
                key.removeprefix("config."),
                f"got {ours!r}; {path} has {theirs!r}. Use another run=, or overwrite=true to redo this stage.",
            )
        return False

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
        """Whether a finished stage has not all the queries; keeps its manifest then."""
        known = record.get("queries", {})
        missing = any(str(query) not in known for query in self.queries or {})
        self.previous = record if missing else {}
        return missing

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
        state = read_json(path) if path.exists() else {}
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
        write_json(self.folder / "state.json", state)

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
            "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.time() - self.started, 1),
        }
        write_json(self.folder / "manifest.json", manifest)
        (self.folder / "state.json").unlink(missing_ok=True)
        return manifest


def require_manifest(folder: Path, command: str) -> dict[str, Any]:
    """The manifest of a finished upstream stage.

    Raises:
        UserError: the stage has not run, did not finish, or was written by a newer file format.
    """
    path = folder / "manifest.json"
    if not path.exists():
        got = "an unfinished stage" if (folder / "state.json").exists() else "no such stage"
        raise UserError(
            str(path), f"got {got}; expected a finished `mucs {command}`. Run it first: {command_hint(folder, command)}"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format_version", 0) > FORMAT_VERSION:
        raise UserError(
            str(path),
            f"got file format {manifest.get('format_version')}; expected at most {FORMAT_VERSION}. Update mucs.",
        )
    return manifest


def command_hint(folder: Path, command: str) -> str:
    run = next((p for p in folder.parents if (p / "run.json").exists()), folder.parent)
    return f"mucs {command} run={run}"


# --- files filled block by block -------------------------------------------------------------------------------------


class BlockFile:
    """A safetensors file that is filled block by block and survives an interruption.

    The file is preallocated as ``<name>.partial`` and memory-mapped; ``<name>.journal`` lists the finished blocks, a
    line each, appended after the block's bytes are durable. ``finish`` renames the file into place.

    Args:
        path: the finished file.
        tensors: name -> (dtype, shape), dtype a NumPy name ("float32", "int64", "int16", "uint8").
        identity: what is being written; a partial file of another identity is started afresh.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], identity: str):
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.journal = path.with_name(path.name + ".journal")
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
        self.done: set[int] = self._finished_blocks(identity)
        try:
            if not self.done:
                path.parent.mkdir(parents=True, exist_ok=True)
                with self.partial.open("wb") as file:
                    file.write(len(encoded).to_bytes(8, "little") + encoded)
                    os.posix_fallocate(file.fileno(), 0, 8 + len(encoded) + max(offset, 1))
                    file.truncate(8 + len(encoded) + offset)
                self.journal.write_text(json.dumps({"identity": identity}) + "\n")
        except OSError as error:
            raise UserError(
                str(path), f"cannot be written ({error}). Choose another run=, or free the disk."
            ) from error
        start = 8 + len(encoded)
        self.arrays: dict[str, np.memmap] = {
            name: np.memmap(self.partial, dtype, "r+", start + header[name]["data_offsets"][0], shape)
            for name, (dtype, shape) in tensors.items()
        }

    def _finished_blocks(self, identity: str) -> set[int]:
        if not (self.journal.exists() and self.partial.exists()):
            return set()
        lines = self.journal.read_text().splitlines()
        try:
            records = [json.loads(line) for line in lines]
        except ValueError:  # a line cut short by a crash: only that block is redone
            records = [json.loads(line) for line in lines[:-1]]
        if not records or records[0].get("identity") != identity:
            return set()
        return {record["block"] for record in records[1:]}

    def commit(self, block: int) -> None:
        """Makes the arrays durable, then records ``block`` as finished."""
        for array in self.arrays.values():
            array.flush()
        with self.journal.open("a") as file:
            file.write(json.dumps({"block": block}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(block)

    def finish(self) -> None:
        """Renames the file into place and removes the journal."""
        for array in self.arrays.values():
            array.flush()
        self.arrays.clear()
        sync(self.partial)
        self.partial.replace(self.path)
        sync(self.path.parent)
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
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        entry = header[name]
        start = 8 + length + entry["data_offsets"][0]
        mode: Literal["r", "r+"] = "r+" if writable else "r"
        return np.memmap(path, NUMPY_DTYPE[entry["dtype"]], mode, start, tuple(entry["shape"]))
    except (OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise UserError(
            str(path), f"cannot be read ({error!r}); expected a safetensors file with {name!r}. Rerun its stage."
        ) from error


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values."""
    return torch.from_numpy(np.array(array))
