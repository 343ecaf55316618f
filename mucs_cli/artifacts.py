"""Files of a run: atomic writes, tensors, and fingerprints. What a stage's folder holds: ``stage_folder``."""

import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import shutil
import subprocess
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mucs_cli import __version__, processes
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.records import sealed
from mucs_cli.tensor_forms import require_forms

log = logging.getLogger("mucs")
TENSOR_CHECKSUM = "crc32"
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
    # containers that share a disk may all have process 1
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(
                str(path), f"cannot be written ({error}). Choose another run=, or free the disk."
            ) from error
        raise


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a file, which is never written to again, into another place; what is there is replaced, atomically.

    Of several processes only the first one does.

    Raises:
        UserError: as ``write_atomic``.
    """

    def put(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)

    write_atomic(target, put)


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
        check_hash(path, sha256)
    elif checksum is not None and checksum != tensor_checksum(tensors):
        raise DamagedError(str(path), f"is damaged (its checksum differs). {REDO}")
    return tensors


def read_kept(path: Path, forms: Mapping[str, str], **sizes: int) -> dict[str, Tensor]:
    """What an attempt that was interrupted left of its tensors, to go on from; empty where it left none, or damaged
    ones, which are said.

    Args:
        path: their file.
        forms, sizes: see ``require_forms``.
    """
    if not path.exists():
        return {}
    try:
        found = read_tensors(path)
        require_forms(path, found, forms, "run", **sizes)
        return found
    except DamagedError as error:
        log.warning("%s is damaged; computing it again", error.subject)
        return {}


def read_file(folder: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """One output of a stage, checked against the hash in its manifest.

    Raises:
        UserError: it is missing, or not the file that was written.
    """
    path = folder / name
    check_file(folder, manifest, name)
    return path.read_bytes()


def is_intact(folder: Path, manifest: Mapping[str, Any], name: str) -> bool:
    """Whether an output of a stage is the file that was written."""
    path = folder / name
    return path.is_file() and sha256_file(path) == manifest.get("outputs", {}).get(name, {}).get("sha256")


def check_file(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """Raises UserError where an output of a stage is missing, or not the file that was written."""
    check_hash(folder / name, manifest.get("outputs", {}).get(name, {}).get("sha256"))


def check_hash(path: Path, sha256: str | None) -> None:
    """Raises UserError where a file is not there, or has another hash."""
    if not path.is_file():
        raise DamagedError(str(path), f"not found; a manifest names it. {REDO}")
    if sha256_file(path) != sha256:
        raise DamagedError(str(path), f"is not the file its manifest names (SHA-256 differs). {REDO}")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(path: Path) -> dict[str, Any]:
    """What a manifest records of a file."""
    return {"sha256": sha256_file(path), "bytes": path.stat().st_size}


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
    if (Path(__file__).parent.parent / ".git").exists():
        # without git, with no process left for it, or on a slow disk: a stage does not fail for this
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
            revision = subprocess.run(
                command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
            )
            found["git"] = revision.stdout.strip()
    return found
