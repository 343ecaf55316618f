"""Throws generated input at everything that reads a file from others, and wants a UserError or a result, never a crash.

Metadata (CSV, JSON lines), manifests and run.json, the run's index, safetensors headers (our own reader and the
library's), condition files, and the configurations of checkpoints. Half of the input is random, half a sound file that
was changed. Prints one JSON object on stdout, a table on stderr; exit code 1 where something crashed.

    python scripts/reliability/fuzz.py --inputs 10000
"""

import argparse
import contextlib
import copy
import hashlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from printing import print_result

from mucs_cli.artifacts import read_tensors
from mucs_cli.block_file import map_tensor
from mucs_cli.config import PipelineConfig, validate
from mucs_cli.data.conditions import ConditionFile
from mucs_cli.data.metadata import read_metadata
from mucs_cli.data.record import COLUMNS, Record
from mucs_cli.diffusion.pretrained import preconditioning_of
from mucs_cli.diffusion.pretrained_files import find_checkpoint, find_weights, read_config
from mucs_cli.errors import UserError
from mucs_cli.records import sealed
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.reporting.results import RunResults
from mucs_cli.stage_folder import Stage, require_manifest
from mucs_cli.stages.context import from_record, read_run_record
from mucs_cli.stages.status import entries_of, table_of
from mucs_cli.text import csv_cells, csv_text

FILES = ["a/0.png", "a/1.png", "b,\n.png"]
HASH = "0" * 64

# --- input -----------------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=12) | st.sampled_from(
    ["", "file_name", "../x", "/etc/passwd", "a/0.png", "=1+1", "\x1b[31m", "\r"]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just(10**30)
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
DEEP = st.integers(20, 3000).map(lambda depth: "[" * depth + "]" * depth)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """The bytes with a few of them changed, cut out or put in."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "end"])):
            case "flip" if content:
                content[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[place : place + draw(st.integers(1, 40))]
            case "insert":
                content[place:place] = draw(st.binary(min_size=1, max_size=8))
            case "repeat":
                content[place:place] = content[place : place + draw(st.integers(1, 40))]
            case "end":
                del content[place:]
    return bytes(content)


def flipped(sound: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with one bit turned over."""

    def flip(place: tuple[int, int]) -> bytes:
        byte, bit = place
        return sound[:byte] + bytes([sound[byte] ^ 1 << bit]) + sound[byte + 1 :]

    return st.tuples(st.integers(0, len(sound) - 1), st.integers(0, 7)).map(flip)


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value with one or two of its parts replaced by another value, or left out."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 2))):
        node: Any = value
        parents: list[tuple[Any, Any]] = []
        while isinstance(node, dict | list) and node and (not parents or draw(st.booleans())):
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            parents.append((node, key))
            node = node[key]
        if not parents:
            return draw(VALUE)
        parent, key = parents[-1]
        if draw(st.booleans()):
            parent[key] = draw(VALUE)
        else:
            del parent[key]
    return value


def json_bytes(sound: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: changed, damaged, random, or nested without end; changed ones with a checksum that fits, or none."""

    def seal(value: Any) -> Any:
        return sealed(value) if isinstance(value, dict) else value

    whole = json.dumps(seal(sound)).encode()
    other = changed(sound)
    return (
        other.map(lambda value: json.dumps(value).encode())
        | other.map(lambda value: json.dumps(seal(value)).encode())
        | damaged(whole)
        | flipped(whole)
        | VALUE.map(lambda value: json.dumps(value).encode())
        | DEEP.map(str.encode)
        | st.binary(max_size=60)
    )


def header_bytes(sound: dict[str, Any], data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with a changed header."""

    def file(header: Any, extra: int = 0) -> bytes:
        encoded = json.dumps(header).encode()
        return (len(encoded) + extra).to_bytes(8, "little", signed=False) + encoded + data

    return (
        changed(sound).map(file)
        | st.tuples(changed(sound), st.integers(0, 2**63)).map(lambda pair: file(*pair))
        | damaged(file(sound))
        | flipped(file(sound))
        | DEEP.map(lambda text: len(text).to_bytes(8, "little") + text.encode())
        | st.binary(max_size=60)
    )


# --- what reads it ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """inputs: the strategy; read: what is to take an input, in a folder of its own."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], None]


def read_table(name: str) -> Callable[[Path, bytes], None]:
    """Metadata as read, into the run's index and back."""

    def read(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        columns = read_metadata(folder, FILES)
        rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
        assert not columns or csv_cells(csv_text(rows)) == rows
        assert all(len(cells) == len(FILES) for cells in columns.values())

    return read


def read_a_manifest(folder: Path, content: bytes) -> None:
    (folder / "manifest.json").write_bytes(content)
    require_manifest(folder, "score")
    (folder / "scores.safetensors").write_bytes(b"abc")
    stage = Stage(folder, "score", {"config": {"a": 1}, "inputs": {"b": {"0": HASH}}}, queries={0: HASH})
    stage.is_done(claim=False)


def read_a_run(folder: Path, content: bytes) -> None:
    """run.json as a later command takes it, and as ``mucs status`` does."""
    (folder / "run.json").write_bytes(content)
    record = read_run_record(folder / "run.json")
    validate(from_record(record, copy.deepcopy(COMPOSED)), PipelineConfig)


def read_a_status(folder: Path, content: bytes) -> None:
    for path in ("run.json", "train/manifest.json", "score/\x1b[/x]/manifest.json", "score/[b]/state.json"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    (folder / "score" / "[b]" / "x.journal").write_bytes(content)
    table_of(folder, list(entries_of(folder)))


def read_an_index(folder: Path, parts: tuple[bytes, bytes]) -> None:
    """The run's data as later stages and reports take them, their hashes right whatever they are."""
    index, manifest = parts
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "index.csv").write_bytes(index)
    (folder / "data" / "manifest.json").write_bytes(manifest)
    try:
        Record.read(folder / "data")
    finally:
        read_rows(folder / "data" / "index.csv", "train")


def read_results(folder: Path, content: bytes) -> None:
    for stage in ("data", "sample", "score/mucs"):
        (folder / stage).mkdir(parents=True, exist_ok=True)
        (folder / stage / "manifest.json").write_bytes(content)
    RunResults(folder).pick_variant(None)


def read_a_tensor(folder: Path, content: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    try:
        ours = np.array(map_tensor(path, "condition"))
    except UserError:
        ours = None
    theirs = read_tensors(path)
    if ours is not None and "condition" in theirs:  # where both read it, they read the same
        assert ours.tobytes() == theirs["condition"].numpy().tobytes()


def read_conditions(folder: Path, content: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(content)
    ConditionFile(path, ["a", "b"], None).read([0, 1])
    ConditionFile(path, ["a", "b"], ["1", "0"]).read([0, 1])


def read_a_checkpoint(folder: Path, parts: tuple[bytes, bytes, bytes]) -> None:
    index, scheduler, weights = parts
    (folder / "unet").mkdir(exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "model_index.json").write_bytes(index)
    (folder / "unet" / "config.json").write_bytes(b"{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_bytes(weights)
    (folder / "scheduler" / "scheduler_config.json").write_bytes(scheduler)
    with contextlib.suppress(UserError):
        find_weights(folder / "unet")
    files = find_checkpoint(folder)
    preconditioning_of(read_config(files.scheduler), files.scheduler)


# --- sound files -----------------------------------------------------------------------------------------------------

COMPOSED = {
    "run": "r",
    "device": "auto",
    "overwrite": False,
    "seed": 0,
    "queries": {"name": "sampled", "index": None, "seed": 0},
    "model": {"name": "dit"},
    "data": {"name": "digits", "seed": 0},
    "diffusion": {"name": "edm"},
    "method": {"name": "mucs"},
    "evaluation": {"name": "overlap"},
}
RUN = {
    "format_version": 1,
    "experiment": None,
    "config": {k: v for k, v in COMPOSED.items() if k not in ("run", "device")},
}
MANIFEST = {
    "stage": "score",
    "status": "done",
    "format_version": 1,
    "config": {"a": 1},
    "inputs": {"b": {"0": HASH}},
    "queries": {"0": HASH},
    "unlearn_variant": "mucs",
    "counts": {"queries": 1},
    "outputs": {"scores.safetensors": {"sha256": HASH, "bytes": 3}},
    "versions": {"mucs": "0"},
    "started": "2026-01-01T00:00:00+00:00",
    "ended": "2026-01-01T00:00:01+00:00",
    "seconds": 1.0,
}
INDEX = csv_text([[*COLUMNS, "artist"], *[[i, file, HASH, "training", "x"] for i, file in enumerate(FILES)]]).encode()


def data_manifest(index: bytes) -> dict[str, Any]:
    return {
        "format_version": 1,
        "config": {"data": {}},
        "source": {"folder": None, "state": "", "condition_state": ""},
        "fingerprint": HASH,
        "facts": {"name": "x"},
        "levels": 255,
        "class_names": [],
        "label_column": None,
        "skipped": [],
        "outputs": {"index.csv": {"sha256": hashlib.sha256(index).hexdigest(), "bytes": len(index)}},
    }


def with_manifest(index: bytes) -> st.SearchStrategy[tuple[bytes, bytes]]:
    sound = sealed(data_manifest(index))
    return st.tuples(st.just(index), st.just(json.dumps(sound).encode()) | json_bytes(sound))


CSV = b"file_name,artist\na/0.png,Anna\na/1.png,=1\n"
JSON_LINES = b'{"file_name": "a/0.png", "x": [1, "\\ud800"]}\n{"file_name": "a/1.png", "y": null}\n'
CONDITIONS = {"condition": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
SAVED = save({"condition": torch.arange(6.0).view(2, 3), "other": torch.tensor([1, 2])})
SCHEDULER = {"_class_name": "DDPMScheduler", "num_train_timesteps": 10, "beta_schedule": "linear", "beta_start": 1e-4}
PIPELINE = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}
SHARDS = {"metadata": {}, "weight_map": {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"}}


@st.composite
def tables(draw: st.DrawFn) -> bytes:
    """Metadata as CSV, with any text for names of columns and cells; now and then one of another length."""
    names = draw(st.lists(TEXT.filter(lambda name: name.strip() not in ("", "file_name")), max_size=3, unique=True))
    rows = [[file, *(draw(TEXT) for _ in names)] for file in draw(st.permutations(FILES))[: draw(st.integers(0, 3))]]
    if rows and draw(st.integers(0, 5)) == 0:
        rows[0].append("")
    return csv_text([["file_name", *names], *rows]).encode("utf-8", "replace")


LINE = changed({"file_name": "a/0.png", "x": {"y": [1]}}).map(lambda row: json.dumps(row).encode())
DEEP_LINE = DEEP.map(lambda text: f'{{"file_name": "a/0.png", "x": {text}}}'.encode())
TARGETS = {
    "metadata.csv": Target(damaged(CSV) | tables() | tables().flatmap(damaged), read_table("metadata.csv")),
    "metadata.jsonl": Target(damaged(JSON_LINES) | LINE | DEEP_LINE, read_table("metadata.jsonl")),
    "manifest.json": Target(json_bytes(MANIFEST), read_a_manifest),
    "run.json": Target(json_bytes(RUN), read_a_run),
    "status": Target(json_bytes(MANIFEST), read_a_status),
    "results": Target(json_bytes(MANIFEST), read_results),
    "index.csv": Target((damaged(INDEX) | st.just(INDEX)).flatmap(with_manifest), read_an_index),
    "safetensors": Target(header_bytes(CONDITIONS, b"\0" * 24) | damaged(SAVED) | flipped(SAVED), read_a_tensor),
    "conditions": Target(header_bytes(CONDITIONS, b"\0" * 24) | damaged(SAVED) | flipped(SAVED), read_conditions),
    "checkpoint": Target(st.tuples(json_bytes(PIPELINE), json_bytes(SCHEDULER), json_bytes(SHARDS)), read_a_checkpoint),
}

# --- running ---------------------------------------------------------------------------------------------------------


def run_target(name: str, num_inputs: int, number: int = 0) -> Counter[str]:
    """Reads that many inputs; how many were read and how many refused.

    Raises:
        Exception: whatever is no UserError, with the input that it takes, made as small as can be.
    """
    outcome: Counter[str] = Counter()
    target = TARGETS[name]

    @seed(number)
    @settings(
        max_examples=num_inputs,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(target.inputs)
    def read(content: Any) -> None:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            try:
                target.read(Path(folder), content)
                outcome["read"] += 1
            except UserError as error:
                assert "\n" not in str(error)
                outcome["refused"] += 1

    read()
    return outcome


MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="one of them; all by default")
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    each = -(-options.inputs // len(names))
    started, result, crashes = time.perf_counter(), {}, {}
    for name in names:
        try:
            outcome = run_target(name, each, options.seed)
        except Exception as error:
            crashes[name] = f"{type(error).__name__}: {error}"
            continue
        result[name] = f"{outcome.total()} inputs: {outcome['read']} read, {outcome['refused']} refused"
    print_result(
        {
            "check": "fuzz",
            "seed": options.seed,
            **result,
            "crashes": crashes,
            "seconds": round(time.perf_counter() - started),
        }
    )
    sys.exit(bool(crashes))


if __name__ == "__main__":
    main()
