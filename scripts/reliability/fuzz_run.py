"""A finished run for the fuzzer: three pictures, two queries, scores by mucs, by pixels and by both."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import hypothesis.strategies as st
import torch
from fuzz_inputs import cells_of, damaged, json_bytes, tensors_of
from safetensors.torch import load, save

from mucs_cli.data.record import COLUMNS
from mucs_cli.records import sealed
from mucs_cli.reporting.tables import Estimate, Table, to_csv, to_markdown
from mucs_cli.text import csv_text

FILES = ["a/0.png", "a/1.png", "b,\n.png"]
HASH = "0" * 64
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


def outputs_of(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for name, content in files.items()
    }


def data_manifest(outputs: dict[str, Any]) -> dict[str, Any]:
    return {
        "format_version": 1,
        "config": {"data": {}},
        "source": {"folder": None, "state": "", "condition_state": ""},
        "fingerprint": HASH,
        "facts": {"name": "x"},
        "levels": 255,
        "num_training": 3,
        "class_names": [],
        "label_column": None,
        "skipped": [],
        "outputs": outputs,
    }


IMAGES = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
SCORES = {
    "score": torch.tensor([[0.1, 0.3, -0.2], [0.0, -0.5, 0.4]]),
    "query_id": torch.tensor([0, 1]),
    "example_id": torch.tensor([0, 1, 2]),
}
DIVERSITY = {
    "members": ["mucs", "pixel"],
    "weights": [1.0, 1.0],
    "queries": [0, 1],
    "spearman": [[1.0, 0.5], [0.5, 1.0]],
    "k": 2,
    "top_k_overlap": [[1.0, None], [None, 1.0]],
    "expected_top_k_overlap": 0.5,
}
RESULT_TABLE = Table(
    "LDS",
    ("method", "queries", "lds"),
    [("mucs", 2, Estimate(0.5, 0.1, 0.9, "best")), ("pixel", 2, Estimate(0.1, None, None))],
)
RUN_FILES = {
    "data/index.csv": INDEX,
    "data/images.safetensors": save({"image": IMAGES}),
    "sample/samples.safetensors": save({"image": torch.zeros(2, 1, 4, 4), "role": torch.tensor([0, 2])}),
    "sample/queries.csv": csv_text([["query", "file", "artist"], [0, "", ""], [1, "a/1.png", "x"]]).encode(),
    "score/mucs/scores.safetensors": save(SCORES),
    "score/pixel/scores.safetensors": save(SCORES),
    "score/both/scores.safetensors": save(SCORES),
    "score/both/members.json": json.dumps(DIVERSITY).encode(),
    "evaluate/lds/table.md": to_markdown(RESULT_TABLE).encode(),
    "evaluate/lds/table.csv": to_csv(RESULT_TABLE).encode(),
    "evaluate/lds/charts/lds.svg": b"<svg></svg>",
}
FACTS_OF_STAGES = {
    "data": data_manifest({}),
    "sample": {"queries": {"0": HASH, "1": HASH}, "inputs": {"model": HASH}},
    "unlearn/mucs": {"null_loss": 0.5, "results": [{"query": 0, "num_steps": 2, "reached_bound": None}]},
    "score/mucs": {"queries": {"0": HASH, "1": HASH}, "inputs": {"dataset": HASH, "model": HASH}},
    "score/pixel": {"queries": {"0": HASH, "1": HASH}, "inputs": {"dataset": HASH, "model": HASH}, "top_k": 2},
    "score/both": {
        "queries": {"0": HASH, "1": HASH},
        "inputs": {"dataset": HASH, "model": HASH},
        "config": {"method": {"combine": "z_mean"}},
    },
    "evaluate/lds": {
        "config": {"evaluation": {"name": "lds", "num_subsets": 2, "variants": None}},
        "inputs": {"variants": ["mucs", "pixel"], "scores of mucs": HASH, "scores of pixel": HASH},
        "counts": {"queries": 2},
    },
}


def any_change(name: str) -> st.SearchStrategy[bytes]:
    """Another content of a file of the run."""
    sound = RUN_FILES[name]
    match name.rpartition(".")[2]:
        case "safetensors":
            return tensors_of(load(sound))
        case "csv":
            return cells_of(sound)
        case "json":
            return json_bytes(json.loads(sound))
    return damaged(sound)


def manifests(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """Those of all stages, by path; every hash is that of the file as it is."""
    found = {}
    for stage, facts in FACTS_OF_STAGES.items():
        outputs = {name.removeprefix(f"{stage}/"): files[name] for name in files if name.startswith(f"{stage}/")}
        found[f"{stage}/manifest.json"] = sealed(MANIFEST | facts | {"outputs": outputs_of(outputs)})
    return found


def sound_run() -> dict[str, bytes]:
    """Path -> content."""
    return RUN_FILES | {name: json.dumps(manifest).encode() for name, manifest in manifests(RUN_FILES).items()}


@st.composite
def runs(draw: st.DrawFn, names: Sequence[str]) -> dict[str, bytes]:
    """The run, with one of these files or manifests changed."""
    files, victim = dict(RUN_FILES), draw(st.sampled_from(names))
    if victim in files:
        files[victim] = draw(any_change(victim))
    for name, manifest in manifests(files).items():
        files[name] = draw(json_bytes(manifest)) if name == victim else json.dumps(manifest).encode()
    return files


def names_of(*stages: str) -> list[str]:
    """The files of some stages, and their manifests."""
    return [name for stage in stages for name in (f"{stage}/manifest.json", *RUN_FILES) if name.startswith(f"{stage}/")]
