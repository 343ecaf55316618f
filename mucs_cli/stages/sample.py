"""``mucs sample``: generates the queries, each from a random stream of its own, or reads them from a folder."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mucs_cli.artifacts import (
    check_file,
    empty,
    fingerprint,
    sha256_file,
    write_atomic,
    write_record,
    write_tensors,
    write_text,
)
from mucs_cli.data.query_folder import FolderQueries, load_query_folder
from mucs_cli.errors import UserError
from mucs_cli.locks import locked
from mucs_cli.records import read_manifest
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.rng import derive_seed, generator
from mucs_cli.runtime import log, stage_log
from mucs_cli.schemas import FolderQueriesConfig, PretrainedConfig, SampledQueriesConfig
from mucs_cli.stage_folder import Stage, keep_aside, kept_aside, recorded_file
from mucs_cli.stages.context import Context
from mucs_cli.stages.encoding import decode, encode
from mucs_cli.stages.generation import generate, query_conditions, refuse_sampler_keys
from mucs_cli.stages.loading import ROLES, Inputs, load_inputs
from mucs_cli.text import csv_text

QUERIES = "queries.csv"


@dataclass(frozen=True)
class NewQueries:
    """Queries to add to a run.

    Attributes:
        tensors: ``image`` [Q, C, H, W] in the model's space; ``picture`` [Q, C, H, W] in [-1, 1] where that is another;
            ``condition`` if the model has conditions; ``seed`` [Q] of sampled ones.
        fingerprints: of each.
        columns: columns of Q strings for queries.csv; empty for sampled ones.
    """

    tensors: dict[str, Tensor]
    fingerprints: list[str]
    columns: dict[str, list[str]] = field(default_factory=dict)


def run(context: Context) -> None:
    """Writes ``sample/``: ``samples.safetensors``, ``grid.png``, ``queries.csv`` of a folder, and the manifest."""
    inputs = load_inputs(context)
    refuse_other_model(context, inputs)
    if isinstance(context.config.queries, FolderQueriesConfig):
        read_queries(context, inputs, context.config.queries)
    else:
        sample_queries(context, inputs, context.config.queries)


def refuse_other_model(context: Context, inputs: Inputs) -> None:
    """Raises UserError where the run has queries of another model than ``model.path`` holds now."""
    path, model = context.folder("sample", "manifest.json"), context.config.model
    if context.config.overwrite or not isinstance(model, PretrainedConfig) or not path.exists():
        return
    if read_manifest(path)["inputs"]["model"] != inputs.model.fingerprint:
        raise UserError(
            "model.path",
            f"got {model.path}, which holds another model than the one that {path} has queries for. Use another run=, "
            "or overwrite=true to start this one afresh.",
        )


def sample_queries(context: Context, inputs: Inputs, config: SampledQueriesConfig) -> None:
    """Generates the queries that the run does not have yet; those it has stay as they are, to the bit."""
    folder = context.folder("sample")
    refuse_sampler_keys(context, inputs.model)
    held_out = held_out_queries(inputs, config)
    stage = context.stage(
        folder,
        "sample",
        sections=("sampler", "queries"),
        inputs={"model": inputs.model.fingerprint, "dataset": inputs.data.fingerprint},
        queries=dict.fromkeys(range(config.num + len(held_out))),
        # Ids are given once: after held-out images no generated ones can be added.
        may_grow=("config.queries.held_out",) if config.held_out else ("config.queries.num",),
    )
    if stage.is_done():
        log.info("sample: up to date (%s)", folder)
        return
    condition = query_conditions(inputs.model, inputs.data, config)
    stage.begin()
    with stage_log(folder):
        first = len(stage.known_queries())
        seeds = torch.tensor([derive_seed(config.seed, "query", i) for i in range(min(first, config.num), config.num)])
        chosen = None if condition is None else condition[config.num - len(seeds) :]
        images = held_out[max(0, first - config.num) :]
        tensors = joined(
            [
                *([generated_tensors(context, inputs, seeds, chosen)] if len(seeds) else []),
                *([held_out_tensors(inputs, images)] if len(images) else []),
            ]
        )
        decisive = [tensor for name, tensor in tensors.items() if name not in ("picture", "role")]
        prints = [fingerprint(*(tensor[i] for tensor in decisive)) for i in range(len(seeds) + len(images))]
        columns = {"file": [""] * len(seeds) + [inputs.pixels.file[i] for i in images]} if len(images) else {}
        facts = {"device": str(inputs.device), "seeds": {"queries": config.seed}}
        write_queries(stage, NewQueries(tensors, prints, columns), facts)
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def held_out_queries(inputs: Inputs, config: SampledQueriesConfig) -> np.ndarray:
    """Example ids of the held-out images that are queries, from the stream ("held_out_query").

    Raises:
        UserError: there are not so many.
    """
    ids = inputs.data.held_out
    if config.held_out > len(ids):
        raise UserError(
            "queries.held_out",
            f"got {config.held_out}; the data holds {len(ids)} images out. Ask for fewer, or set data.holdout in a new "
            "run.",
        )
    order = torch.randperm(len(ids), generator=generator(config.seed, "held_out_query")).numpy()
    chosen: np.ndarray = ids[order[: config.held_out]]
    return chosen


def generated_tensors(context: Context, inputs: Inputs, seeds: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
    """What is stored of images that are sampled now, one a seed."""
    kept = context.folder("sample", "checkpoint")
    tensors = {"image": generate(context, inputs, seeds, condition, kept), "seed": seeds}
    if inputs.model.codec is not None:
        tensors["picture"] = decode(inputs.model.codec, tensors["image"], inputs.device)
    if condition is not None:
        tensors["condition"] = condition
    return tensors | {"role": torch.full_like(seeds, ROLES["generated"])}


def held_out_tensors(inputs: Inputs, ids: np.ndarray) -> dict[str, Tensor]:
    """What is stored of images of the data; their seed, which nothing was drawn with, is 0."""
    seeds = torch.zeros(len(ids), dtype=torch.int64)
    tensors = {"image": inputs.data.images(ids), "seed": seeds}
    if inputs.model.codec is not None:
        tensors["picture"] = inputs.pixels.images(ids)
    condition = inputs.data.conditions(ids) if inputs.model.denoiser.network.is_conditional else None
    if condition is not None:
        tensors["condition"] = condition
    return tensors | {"role": torch.full_like(seeds, ROLES["held_out"])}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def read_queries(context: Context, inputs: Inputs, config: FolderQueriesConfig) -> None:
    """Reads the folder's pictures; those the run does not have yet come after those it has."""
    folder = context.folder("sample")
    network = inputs.model.denoiser.network
    found = load_query_folder(config.path, inputs.pixels, context.config.data, config.condition_file)
    if network.is_conditional and found.condition is None:
        raise UserError("queries.path", f"got {config.path}; the model is conditional. {condition_hint(inputs)}")
    condition = found.condition if network.is_conditional else None
    prints = [
        fingerprint(sha256, *([] if condition is None else [condition[i]])) for i, sha256 in enumerate(found.sha256)
    ]
    order = order_of(found, folder, context.config.overwrite)
    stage = context.stage(
        folder,
        "sample",
        sections=("queries",),
        inputs={"model": inputs.model.fingerprint, "dataset": inputs.data.fingerprint},
        queries={query: prints[position] for query, position in enumerate(order)},
    )
    if stage.is_done():
        if not take_over_metadata(folder, columns_of(found, order)):
            log.info("sample: up to date (%s)", folder)
        return
    stage.begin()
    with stage_log(folder):
        new = order[len(stage.known_queries()) :]
        tensors = picture_tensors(found.image[new], inputs) if new else {}
        if new and condition is not None:
            tensors["condition"] = condition[new]
        queries = NewQueries(tensors, [prints[position] for position in new], columns_of(found, new))
        write_queries(stage, queries, {"folder": config.path})


def picture_tensors(picture: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """What is stored of pictures that were read, but for their conditions."""
    if inputs.model.codec is None:
        return {"image": picture}
    return {"image": encode(inputs.model.codec, picture, inputs.device), "picture": picture}


def columns_of(found: FolderQueries, order: list[int]) -> dict[str, list[str]]:
    """The columns of queries.csv, for the folder's pictures at these positions."""
    columns = {"file": [], **found.metadata} | {"file": found.file}
    return {name: [cells[i] for i in order] for name, cells in columns.items() if name != "query"}


def take_over_metadata(folder: Path, columns: dict[str, list[str]]) -> bool:
    """Whether the metadata of the folder's pictures has changed since they were read; queries.csv has it now."""
    path = folder / QUERIES
    with locked(folder):
        manifest, text = recorded(folder), columns_text(columns)
        if text == path.read_text(encoding="utf-8"):
            return False
        keep_aside(folder, manifest, path.name)
        write_text(path, text)
        manifest["outputs"][path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        write_record(folder / "manifest.json", manifest)
        kept_aside(path).unlink(missing_ok=True)
    log.info("sample: the queries' metadata has changed; %s has it now", path)
    return True


def condition_hint(inputs: Inputs) -> str:
    """How to say what each picture of a folder was generated under."""
    if not inputs.model.denoiser.network.num_classes:
        return "Give every picture its condition vector: set queries.condition_file."
    names = inputs.pixels.class_names
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"Give every picture a class ({some}): the column label in its metadata.csv, or a folder named after it."


def order_of(found: FolderQueries, folder: Path, overwrite: bool) -> list[int]:
    """Positions of the folder's pictures in the order of query ids: those the run has, then the others.

    Raises:
        UserError: a picture that the run has is gone, and ``overwrite`` is false.
    """
    position = {file: i for i, file in enumerate(found.file)}
    known = recorded_files(folder)
    gone = [file for file in known if file not in position]
    if gone and overwrite:
        empty(folder)
        known = []
    elif gone:
        raise UserError(
            "queries.path",
            f"got a folder without {gone[0]}, which {folder / 'queries.csv'} has. Put it back, or use another run=, or "
            "overwrite=true to read the queries afresh.",
        )
    return [position[file] for file in known] + [i for file, i in position.items() if file not in set(known)]


def recorded(folder: Path) -> dict[str, Any]:
    """The manifest of a finished stage; empty without one."""
    path = folder / "manifest.json"
    return read_manifest(path) if path.exists() else {}


def recorded_files(folder: Path) -> list[str]:
    """File names of the queries of a finished stage, by id; empty without one, or where they were sampled."""
    manifest = recorded(folder)
    if QUERIES not in manifest.get("outputs", {}):
        return []
    path = recorded_file(folder, manifest, QUERIES)
    if path.name == QUERIES:
        check_file(folder, manifest, QUERIES)
    return [row["file"] for row in read_rows(path, "sample")]


def write_queries(stage: Stage, new: NewQueries, facts: dict[str, Any]) -> None:
    """Appends the new queries to those of the finished stage, if there is one, and finishes it."""
    folder, known = stage.folder, stage.known_queries()
    tensors, columns = new.tensors, new.columns
    if new.fingerprints:
        tensors.setdefault("role", torch.full((len(new.fingerprints),), ROLES["generated"]))
    path = folder / "samples.safetensors"
    if known:
        old = stage.previous_tensors(path.name)
        stage.keep_aside(path.name)
        tensors = {name: torch.cat([old[name], tensors[name]]) if name in tensors else old[name] for name in old}
        if QUERIES in stage.previous["outputs"]:
            columns = joined_columns(recorded_file(folder, stage.previous, QUERIES), columns)
            stage.keep_aside(QUERIES)
    stage.queries = known | dict(enumerate(new.fingerprints, len(known)))
    write_tensors(path, tensors, {"role": "0 generated, 2 held out of training"})
    write_grid(tensors.get("picture", tensors["image"]), folder / "grid.png")
    outputs = [path, folder / "grid.png"]
    if columns:
        write_text(folder / QUERIES, columns_text(columns))
        outputs.append(folder / QUERIES)
    stage.finish({**facts, "counts": {"queries": len(stage.queries)}}, outputs)
    added = f", {len(new.fingerprints)} of them new" if known else ""
    log.info("sample: %d queries%s, pictures in %s", len(stage.queries), added, folder / "grid.png")


def joined_columns(path: Path, new: dict[str, list[str]]) -> dict[str, list[str]]:
    """The columns of a queries.csv with the new rows below them; empty cells where one has none."""
    rows = read_rows(path, "sample")
    names = dict.fromkeys([*(name for name in rows[0] if name != "query"), *new])
    length = len(next(iter(new.values()), []))
    return {name: [row.get(name, "") for row in rows] + new.get(name, [""] * length) for name in names}


def columns_text(columns: dict[str, list[str]]) -> str:
    """As CSV: ``query`` and the columns, a row a query."""
    rows = [[query, *cells] for query, cells in enumerate(zip(*columns.values(), strict=True))]
    return csv_text([["query", *columns], *rows])


def write_grid(image: Tensor, path: Path, columns: int = 10, gap: int = 1) -> None:
    """All images in rows of ten with gaps between them, each enlarged to at least 64 pixels."""
    count, channels, height, width = image.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    canvas = torch.zeros(channels, rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i in range(count):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = (image[i] + 1) / 2
    pixels = (canvas * 255).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    scale = max(1, math.ceil(64 / height))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    write_atomic(path, lambda temporary: picture.save(temporary, format="PNG"))
