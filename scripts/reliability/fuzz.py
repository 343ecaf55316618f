"""Throws generated input at everything that reads a file from others, and wants a UserError or a result, never a crash.

Metadata (CSV, JSON lines), captions, manifests and run.json, progress and logs of losses, the run's index, all that a
report reads (scores, evaluations, ensembles), safetensors headers (our own reader and the library's), condition files,
and the configurations of checkpoints. Half of the input is random, half a sound file that was changed
(``fuzz_inputs.py``, ``fuzz_run.py``). Prints one JSON object on stdout, a table on stderr; exit code 1 where something
crashed.

    python scripts/reliability/fuzz.py --inputs 10000
"""

import argparse
import contextlib
import copy
import io
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
from rich.console import Console
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
sys.path.insert(0, str(Path(__file__).parent))
from fuzz_inputs import DEEP, TEXT, VALUE, changed, damaged, flipped, header_bytes, json_bytes, lines
from fuzz_run import FILES, HASH, INDEX, MANIFEST, data_manifest, names_of, outputs_of, runs
from printing import print_result

from mucs_cli.artifacts import read_tensors
from mucs_cli.block_file import map_tensor
from mucs_cli.config import PipelineConfig, validate
from mucs_cli.data.conditions import ConditionFile
from mucs_cli.data.huggingface import captions_of
from mucs_cli.data.metadata import read_metadata
from mucs_cli.data.record import Record
from mucs_cli.diffusion.pretrained import preconditioning_of
from mucs_cli.diffusion.pretrained_files import find_checkpoint, find_weights, read_config
from mucs_cli.errors import UserError
from mucs_cli.records import sealed
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.reporting.ensembles import ensemble_views
from mucs_cli.reporting.evaluations import evaluation_views
from mucs_cli.reporting.facts import fact_tables
from mucs_cli.reporting.results import RunResults
from mucs_cli.stage_folder import Stage, require_manifest
from mucs_cli.stages.context import from_record, read_run_record
from mucs_cli.stages.finished import ScoreFiles
from mucs_cli.stages.status import entries_of, table_of
from mucs_cli.stages.unlearn import losses_in
from mucs_cli.text import csv_cells, csv_text
from mucs_cli.tracking import PROGRESS, last_line

# --- what reads it ---------------------------------------------------------------------------------------------------


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


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


def read_a_status(folder: Path, parts: tuple[bytes, bytes]) -> None:
    """The table as it is printed, of stages that are done and of some that are not."""
    record, progress = parts
    for stage in ("train", "score/\x1b[/x]", "score/[b]", "evaluate/lds", "retrain/a"):
        write(folder / stage / "manifest.json", record)
    for stage in ("unlearn/mucs", "score/mucs", "report"):
        write(folder / stage / "state.json", record)
        write(folder / stage / PROGRESS, progress)
    write(folder / "run.json", record)
    write(folder / "score" / "mucs" / "x.journal", progress)
    Console(file=io.StringIO(), width=160).print(table_of(folder, list(entries_of(folder))))


def read_progress(folder: Path, content: bytes) -> None:
    write(folder / PROGRESS, content)
    assert isinstance(last_line(folder), dict)


def read_losses(folder: Path, content: bytes) -> None:
    """What is kept of a log of losses are whole lines of some queries."""
    path = folder / "log.jsonl"
    write(path, content)
    for query, kept in losses_in(path, {0, 1}).items():
        assert all(json.loads(line)["query"] == query for line in kept)


def read_captions(folder: Path, value: Any) -> None:
    captions = captions_of(value, "train[0]", "caption")
    assert all(isinstance(captions[index % len(captions)], str) for index in range(5))


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


def opened(folder: Path, files: dict[str, bytes]) -> RunResults:
    """A finished run of these files."""
    for name, content in files.items():
        write(folder / name, content)
    return RunResults(folder)


def read_results(folder: Path, files: dict[str, bytes]) -> None:
    """Rankings as ``mucs show`` and the report make them, and what stands beside them."""
    results = opened(folder, files)
    variant = results.pick_variant("mucs")
    for query in variant.query_ids:
        first = results.ranking(variant, query, 1)[0]
        assert first.score == variant.scores_of(query).max()
        assert first.example_id in range(len(results.index))
        results.ranking(variant, query, 1, exclude_exact=True)
        results.ranking(variant, query, 1, bottom=True)
        results.query_metadata(query)
        results.is_held_out(query)
        variant.unlearning_of(query)
    results.unscored(variant)
    results.training_image(0)
    assert results.near_duplicates is None or len(results.near_duplicates.distance) == len(results.queries)
    fact_tables(results)


def read_finished(folder: Path, files: dict[str, bytes]) -> None:
    """Scores as an evaluation or an ensemble takes them."""
    for name, content in files.items():
        write(folder / name, content)
    scores = ScoreFiles(folder, "evaluation.variants")
    for name in scores.choose_exact(None):
        found = scores.read(name)
        assert found.rows(found.query_ids).shape == (len(found.query_ids), scores.num_images)


def read_evaluations(folder: Path, files: dict[str, bytes]) -> None:
    evaluation_views(opened(folder, files), images=True)


def read_ensembles(folder: Path, files: dict[str, bytes]) -> None:
    ensemble_views(opened(folder, files))


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


def with_manifest(index: bytes) -> st.SearchStrategy[tuple[bytes, bytes]]:
    sound = sealed(data_manifest(outputs_of({"index.csv": index})))
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


PROGRESS_LINE = {
    "time": "2026-01-01T00:00:00+00:00",
    "title": "score",
    "done": 1,
    "total": 9,
    "unit": "blocks",
    "rate": None,
}
LOSS_LINE = {"query": 0, "step": 1, "retain_loss": 0.5, "forget_loss": 0.5}


LINE = changed({"file_name": "a/0.png", "x": {"y": [1]}}).map(lambda row: json.dumps(row).encode())
DEEP_LINE = DEEP.map(lambda text: f'{{"file_name": "a/0.png", "x": {text}}}'.encode())
TARGETS = {
    "metadata.csv": Target(damaged(CSV) | tables() | tables().flatmap(damaged), read_table("metadata.csv")),
    "metadata.jsonl": Target(damaged(JSON_LINES) | LINE | DEEP_LINE, read_table("metadata.jsonl")),
    "manifest.json": Target(json_bytes(MANIFEST), read_a_manifest),
    "run.json": Target(json_bytes(RUN), read_a_run),
    "status": Target(st.tuples(json_bytes(MANIFEST), lines(PROGRESS_LINE)), read_a_status),
    "progress.jsonl": Target(lines(PROGRESS_LINE), read_progress),
    "log.jsonl": Target(lines(LOSS_LINE), read_losses),
    "captions": Target(VALUE | st.lists(TEXT, max_size=3), read_captions),
    "results": Target(runs(names_of("data", "sample", "unlearn/mucs", "score/mucs")), read_results),
    "scores": Target(runs(names_of("data", "sample", "score/mucs")), read_finished),
    "evaluations": Target(runs(names_of("evaluate/lds")), read_evaluations),
    "ensembles": Target(runs(["score/both/members.json", "score/both/manifest.json"]), read_ensembles),
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
