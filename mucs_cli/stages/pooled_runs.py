"""Finished evaluations of several runs together: which fit, and the similarities of counterfactual ones."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mucs_cli.artifacts import check_file, write_text
from mucs_cli.config import result_config
from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.counterfactual import Similarities
from mucs_cli.files import user_path
from mucs_cli.records import flatten, read_json, reading
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.stage_folder import first_difference, require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluator import RESULTS
from mucs_cli.text import csv_text

RUNS = "evaluation.runs"
COMMAND = "evaluate evaluation=counterfactual"
SIMILARITIES = "similarities.csv"
COLUMNS = ("seed", "role", "picture", "method", "metric", "value")
TARGET, CONTROL = "target", "control"
SEEDS_A_RUN = 1000
"""In pooled evaluations, training seed r of the i-th run is cluster 1000 i + r."""

Key = tuple[str, str, str]
"""method, metric, role"""
Part = TypeVar("Part")


@dataclass(frozen=True)
class Pooled:
    """Finished evaluations of this run and others.

    samples: (method, metric, role) -> similarities. removed: method -> numbers of removed images, one a training seed.
    """

    samples: dict[Key, Similarities]
    removed: dict[str, list[int]]


def write_samples(samples: Mapping[Key, Similarities], folder: Path) -> Path:
    """Writes ``similarities.csv`` with all digits; returns it."""
    rows: list[tuple[Any, ...]] = [COLUMNS]
    for (method, metric, role), sample in samples.items():
        for seed, picture, value in zip(sample.seed, sample.query, sample.value, strict=True):
            rows.append((seed, role, picture, method, metric, repr(float(value))))
    write_text(folder / SIMILARITIES, csv_text(rows))
    return folder / SIMILARITIES


def other_runs(
    runs: Sequence[str] | None,
    context: Context,
    model: str,
    methods: Sequence[str],
    read: Callable[[Path, dict[str, Any]], Part],
) -> dict[Path, Part]:
    """Folder of each other run's finished evaluation -> what ``read`` makes of it.

    Args:
        runs: folders of the runs, ``evaluation.runs``.
        context: the command, on this run.
        model: fingerprint of this run's base model.
        methods: variants that are pooled.
        read: of the folder and its manifest; raises where it lacks something.
    Raises:
        UserError: a run has no finished evaluation, its settings are others in more than seeds, or it has the base
            model of another one.
    """
    name = context.config.evaluation.name
    found: dict[Path, Part] = {}
    run_of_model = {model: context.run}
    for run in map(user_path, runs or []):
        folder = run / "evaluate" / name
        if run.resolve() == context.run.resolve():
            raise UserError(RUNS, f"got {run}, which is this run. Leave it out: it is always pooled.")
        manifest = require_manifest(folder, f"evaluate evaluation={name}")
        theirs = manifest["inputs"]["model"]
        if theirs in run_of_model:
            raise UserError(
                RUNS,
                f"got {run}, which has the base model of {run_of_model[theirs]}: that is no further evidence. "
                "Pool runs of different training seeds.",
            )
        run_of_model[theirs] = run
        part = read(folder, manifest)
        ours = settings_of(context.run, methods, result_config(context.config.evaluation))
        difference = first_difference(ours, settings_of(run, methods, manifest["config"]["evaluation"]))
        if difference is not None:
            name, mine, other = difference
            raise UserError(
                RUNS,
                f"got {run}, which has {name}={other!r}; expected {mine!r} as here. Pool runs that differ in seeds.",
            )
        found[folder] = part
    return found


def require_output(folder: Path, manifest: Mapping[str, Any], name: str) -> Path:
    """The file, which is checked to be the one that the evaluation wrote."""
    check_file(folder, manifest, name)
    return folder / name


def missing_in(run: Path, method: str, where: str = "") -> UserError:
    """That another run's evaluation lacks a method."""
    return UserError(
        RUNS,
        f"got {run}, which has no {method}{where}. Score it there and evaluate again, or choose evaluation.variants.",
    )


def settings_of(run: Path, methods: Sequence[str], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """What decides an evaluation of a run, but for seeds; dotted key -> value."""
    found = flatten({"evaluation": evaluation})
    found.pop("evaluation.variants", None)  # of which only those named here are pooled
    for stage in ("train", "sample"):
        found |= flatten(require_manifest(run / stage, stage)["config"])
    for method in methods:
        scored = require_manifest(run / "score" / method, "score")["config"]
        found |= {f"{key} of {method}": value for key, value in flatten(scored).items() if not is_seed(key)}
    return {key: value for key, value in found.items() if not is_seed(key)}


def is_seed(key: str) -> bool:
    """Whether a dotted key is a seed: training.seed, method.noise_seed."""
    name = key.rpartition(".")[2]
    return name == "seed" or name.endswith("_seed")


def read_samples(folder: Path, manifest: Mapping[str, Any], methods: Sequence[str], metrics: Sequence[str]) -> Pooled:
    """The similarities that another run's evaluation wrote.

    Raises:
        UserError: a method or metric is missing, or a file is not the one that its manifest names.
    """
    path = require_output(folder, manifest, SIMILARITIES)
    columns: dict[Key, list[tuple[int, int, float]]] = {}
    with reading(path, COMMAND):
        for row in read_rows(path, COMMAND):
            key = (row["method"], row["metric"], row["role"])
            columns.setdefault(key, []).append((int(row["seed"]), int(row["picture"]), float(row["value"])))
    samples = {}
    for key, rows in columns.items():
        seed, picture, value = zip(*rows, strict=True)
        samples[key] = Similarities(np.array(seed), np.array(picture), np.array(value))
    for method, metric in itertools.product(methods, metrics):
        if (method, metric, TARGET) not in samples:
            raise missing_in(folder.parent.parent, method, f" under {metric}")
    count = len({seed for rows in columns.values() for seed, _, _ in rows})
    path = require_output(folder, manifest, RESULTS)
    with reading(path, COMMAND):
        removed = {str(name): list(map(int, sizes[:count])) for name, sizes in read_json(path)["removed"].items()}
    return Pooled(samples, removed)


def pool(own: Pooled, others: Sequence[Pooled]) -> Pooled:
    """All samples of this run's methods, each run's training seeds as clusters of their own."""
    samples = {}
    for key, sample in own.samples.items():
        if len(sample.seed):  # no controls, no samples of them
            found = [sample, *(part.samples[key] for part in others)]
            sample = Similarities(
                np.concatenate([SEEDS_A_RUN * i + ranks(each.seed) for i, each in enumerate(found)]),
                np.concatenate([each.query for each in found]),
                np.concatenate([each.value for each in found]),
            )
        samples[key] = sample
    removed = {
        name: [*sizes, *(n for part in others for n in part.removed[name])] for name, sizes in own.removed.items()
    }
    return Pooled(samples, removed)


def ranks(seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each training seed among a run's own."""
    return np.unique(seeds, return_inverse=True)[1]
