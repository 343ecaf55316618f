"""The similarities of a counterfactual evaluation on disk, and those of several runs together."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mucs_cli.artifacts import first_difference, read_json, require_manifest, write_text
from mucs_cli.config import result_config
from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.counterfactual import Similarities
from mucs_cli.stages.context import Context

SIMILARITIES = "similarities.csv"
COLUMNS = ("seed", "role", "picture", "method", "metric", "value")
TARGET, CONTROL = "target", "control"
SEEDS_A_RUN = 1000
"""In pooled evaluations, training seed r of the i-th run is cluster 1000 i + r."""

Key = tuple[str, str, str]
"""method, metric, role"""


@dataclass(frozen=True)
class Pooled:
    """Finished evaluations of this run and others.

    samples: (method, metric, role) -> similarities. removed: method -> numbers of removed images, one a training seed.
    """

    samples: dict[Key, Similarities]
    removed: dict[str, list[int]]


def write_samples(samples: Mapping[Key, Similarities], folder: Path) -> Path:
    """Writes ``similarities.csv`` with all digits; returns it."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for (method, metric, role), sample in samples.items():
        for seed, picture, value in zip(sample.seed, sample.query, sample.value, strict=True):
            rows.writerow([seed, role, picture, method, metric, repr(float(value))])
    write_text(folder / SIMILARITIES, text.getvalue())
    return folder / SIMILARITIES


def other_run(run: Path, context: Context) -> Path:
    """The folder of another run's finished evaluation.

    Raises:
        UserError: there is none, it is this run's own, or its settings are others.
    """
    folder = run / "evaluate" / "counterfactual"
    if run.resolve() == context.run.resolve():
        raise UserError("evaluation.runs", f"got {run}, which is this run. Leave it out: it is always pooled.")
    manifest = require_manifest(folder, "evaluate evaluation=counterfactual")
    ours = {key: value for key, value in result_config(context.config.evaluation).items() if key != "seed"}
    theirs = {key: value for key, value in manifest["config"]["evaluation"].items() if key != "seed"}
    difference = first_difference(ours, theirs)
    if difference is not None:
        key, mine, other = difference
        raise UserError(
            "evaluation.runs",
            f"got {run}, which has {key}={other!r}; expected {mine!r} as here. Evaluate both with the same settings.",
        )
    return folder


def read_finished(folder: Path) -> Pooled:
    """The similarities that another run's evaluation wrote.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / SIMILARITIES
    columns: dict[Key, list[tuple[int, int, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                key = (row["method"], row["metric"], row["role"])
                columns.setdefault(key, []).append((int(row["seed"]), int(row["picture"]), float(row["value"])))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            str(path), f"cannot be read ({error!r}). Evaluate that run again with overwrite=true."
        ) from error
    samples = {}
    for key, rows in columns.items():
        seed, picture, value = zip(*rows, strict=True)
        samples[key] = Similarities(np.array(seed), np.array(picture), np.array(value))
    count = len({seed for rows in columns.values() for seed, _, _ in rows})
    removed = {name: sizes[:count] for name, sizes in read_json(folder / "results.json")["removed"].items()}
    return Pooled(samples, removed)


def pool(parts: Sequence[Pooled], others: Sequence[Path]) -> Pooled:
    """All samples, each run's training seeds as clusters of their own.

    Raises:
        UserError: another run lacks a method or metric of this one.
    """
    samples, removed = {}, {name: list(sizes) for name, sizes in parts[0].removed.items()}
    for key in parts[0].samples:
        for folder, part in zip(others, parts[1:], strict=True):
            if key not in part.samples and len(parts[0].samples[key].seed):
                raise UserError(
                    "evaluation.runs",
                    f"got {folder.parents[1]}, which has no {key[0]} under {key[1]}. Score it there and evaluate "
                    "again, or choose evaluation.variants.",
                )
        found = [part.samples.get(key, parts[0].samples[key]) for part in parts]
        samples[key] = Similarities(
            np.concatenate([SEEDS_A_RUN * i + ranks(sample.seed) for i, sample in enumerate(found)]),
            np.concatenate([sample.query for sample in found]),
            np.concatenate([sample.value for sample in found]),
        )
    for part in parts[1:]:
        for name, sizes in removed.items():
            sizes += part.removed.get(name, [])
    return Pooled(samples, removed)


def ranks(seeds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each training seed among a run's own."""
    return np.unique(seeds, return_inverse=True)[1]
