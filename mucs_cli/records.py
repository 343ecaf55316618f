"""JSON that the tool keeps for itself: run.json, machine.json, manifests and states, sealed against silent damage.

A record holds, as its last key, a checksum of everything else: a flipped byte would otherwise be another learning rate.
One without a checksum is of an earlier version, and taken as it is. Nothing here imports torch.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mucs_cli.errors import DamagedError, UserError
from mucs_cli.files import read_regular

FORMAT_VERSION = 1
SLICES = "_slices"
"""The folder beside a command's variants that holds slices of them, see ``Stage.part``."""
CHECKSUM = "checksum"
DEEPEST = 50
"""Levels of a record: far more than any has, and few enough for what walks through it level by level."""
MAX_DIGITS = 9
"""Of a query's number; Python refuses to read a number of more than 4,300."""


def read_json(path: Path) -> Any:
    """Raises DamagedError where the path is no regular file, or the file not JSON."""
    try:
        return json.loads(read_regular(path))
    except (ValueError, OSError, RecursionError) as error:
        raise DamagedError(str(path), f"cannot be read as JSON ({error}). Delete it and rerun its stage.") from error


@contextlib.contextmanager
def reading(path: Path, command: str) -> Iterator[None]:
    """Blames a file of another form than mucs writes where reading it goes wrong.

    Around code that only reads: whatever goes wrong elsewhere is no fault of the file.

    Args:
        path: the file.
        command: what writes it, for the message.
    Raises:
        DamagedError: in place of what a missing key or a value of another kind raises.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise DamagedError(
            str(path),
            f"is not as mucs writes it ({type(error).__name__}: {error}). Rerun mucs {command} with overwrite=true.",
        ) from error


def checksum(record: Mapping[str, Any]) -> str:
    """Of a record as it reads back from JSON."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode()).hexdigest()[:16]


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its checksum."""
    plain = {key: value for key, value in record.items() if key != CHECKSUM}
    return plain | {CHECKSUM: checksum(plain)}


def read_record(path: Path) -> dict[str, Any]:
    """A sealed record, without its checksum.

    Raises:
        UserError: the file is no JSON object, not as it was written, or of a newer file format.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise DamagedError(str(path), "got no JSON object; expected a record of mucs. Delete it and rerun its stage.")
    found = record.pop(CHECKSUM, None)
    if found is not None and found != checksum(record):
        raise DamagedError(
            str(path),
            "is not as mucs wrote it (its checksum differs): damaged, or edited. Restore it from a copy; or delete it "
            "and rerun its stage.",
        )
    if depth(record) > DEEPEST:
        raise DamagedError(str(path), f"is nested more than {DEEPEST} deep. Delete it and rerun its stage.")
    version = record.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(str(path), f"got file format {version!r}; expected at most {FORMAT_VERSION}. Update mucs.")
    return record


def depth(value: Any) -> int:
    """How many mappings and lists a JSON value has inside each other, and one."""
    level, found = [value], 0
    while level:
        found += 1
        level = [child for node in level if isinstance(node, dict | list) for child in children(node)]
    return found


def children(node: dict[str, Any] | list[Any]) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat


class Part(dict[str, Any]):
    """A manifest, or a mapping in one: a part that is asked for and missing is damage of the file, not a KeyError."""

    def __init__(self, items: Mapping[str, Any], path: Path):
        super().__init__({key: Part(item, path) if isinstance(item, dict) else item for key, item in items.items()})
        self.path = path

    def __missing__(self, key: str) -> Any:
        raise DamagedError(
            str(self.path),
            f"has no {key!r} where mucs writes one. Restore it from a copy; or delete it and rerun its stage.",
        )

    def __or__(self, other: Any) -> "Part":  # type: ignore[override]
        return Part({**self, **other}, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (dict(self), self.path)


def read_manifest(path: Path) -> dict[str, Any]:
    """A stage's manifest or state: a record whose parts, as far as there are any, have the form ``Stage`` gives them.

    Raises:
        UserError: as ``read_record``; or a part has another form, or an output is not in the stage's folder. Later too,
            where a part is asked for by ``[]`` that is not there.
    """
    record = read_record(path)
    for part, form in FORMS.items():
        if part in record and not form(record[part]):
            raise DamagedError(
                str(path), f"got {part} of another form than mucs writes. Delete it and rerun its stage."
            )
    return Part(record, path)


def is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def is_text_mapping(value: Any) -> bool:
    return is_mapping(value) and is_text_list(list(value.values()))


def is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def is_count(value: Any) -> bool:
    """A whole number from 1."""
    return type(value) is int and value > 0


def are_sections(value: Any) -> bool:
    """A stage's configuration; what is a group of keys, and is asked for one, is a mapping."""
    return is_mapping(value) and all(is_mapping(value[name]) for name in SECTIONS if name in value)


def are_skipped(value: Any) -> bool:
    """Files that could not be read."""
    return isinstance(value, list) and all(is_mapping(item) and isinstance(item.get("file"), str) for item in value)


def are_inputs(value: Any) -> bool:
    """Name -> fingerprint or another fact; or several facts by name, one fingerprint a query for example."""
    groups = [item for item in value.values() if isinstance(item, dict)] if isinstance(value, dict) else []
    facts = [fact for group in groups for fact in group.values()]
    return isinstance(value, dict) and not any(isinstance(fact, dict | list) for fact in facts)


def are_queries(value: Any) -> bool:
    """id -> fingerprint."""
    return is_text_mapping(value) and all(map(is_query, value))


def is_query(text: str) -> bool:
    """Whether a text is the number of a query."""
    return text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS


def are_results(value: Any) -> bool:
    """What unlearning records, a mapping a query: its number, how many updates, and whether they met the bound."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and type(entry.get("query")) is int
        and type(entry.get("num_steps")) is int
        and isinstance(entry.get("reached_bound"), bool | None)
        for entry in value
    )


def is_duration(value: Any) -> bool:
    """Seconds: finite, and not negative."""
    return isinstance(value, int | float) and 0 <= value < math.inf


def are_outputs(value: Any) -> bool:
    """Path below the stage's folder -> hash and size."""
    return isinstance(value, dict) and all(
        is_below(name)
        and isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and type(entry.get("bytes")) is int
        for name, entry in value.items()
    )


def is_below(name: str) -> bool:
    """Whether a relative POSIX path stays in the folder that it starts from."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def is_name(value: Any) -> bool:
    """Whether a value names something directly in a folder."""
    return isinstance(value, str) and len(PurePosixPath(value).parts) == 1 and is_below(value)


SECTIONS = ("data", "training", "method", "evaluation")
FORMS = {
    "config": are_sections,
    "inputs": are_inputs,
    "queries": are_queries,
    "outputs": are_outputs,
    "results": are_results,
    "versions": is_text_mapping,
    "counts": is_mapping,
    "seconds": is_duration,
    "ended": lambda value: isinstance(value, str),
    "unlearn_variant": is_name,
    "null_loss": lambda value: isinstance(value, int | float | None),
    "top_k": is_count,
    "races": lambda value: is_mapping(value) and all(map(is_mapping, value.values())),
    "source": is_mapping,
    "facts": is_mapping,
    "fingerprint": lambda value: isinstance(value, str) and value != "",
    "levels": is_count,
    "num_training": is_count,
    "class_names": is_text_list,
    "label_column": lambda value: isinstance(value, str | None),
    "skipped": are_skipped,
}
"""Part of a manifest -> whether a value has its form."""
