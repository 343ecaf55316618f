"""A finished run read back from disk: its data, queries and scores, and the rankings that follow from them.

Nothing is computed again and no configuration is needed: a ranking is a sort of ``score/<variant>/scores.safetensors``.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli.artifacts import check_file, fingerprint, read_tensors
from mucs_cli.block_file import map_tensor
from mucs_cli.data.record import COLUMNS, INDEX, read_index
from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.evaluation.measures.near_duplicates import NearDuplicates, near_duplicates
from mucs_cli.records import is_query, read_manifest
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.rng import generator
from mucs_cli.stage_folder import require_manifest
from mucs_cli.tensor_forms import IMAGE_FORMS, SAMPLE_FORMS, require_finite, require_forms, require_scores

QUERY_COLUMNS = ("query", "file")
"""Columns of sample/queries.csv that are not the metadata of the queries' folder."""
TRAINED = "training"
"""The split of the images that the model was trained on."""
REFERENCE_SEED = 0
"""Of the training images whose distances from each other say what is near; the same for every run."""
TARGET, HELD_OUT = 0, 2
"""Roles of queries: generated, and held out of training."""


@dataclass(frozen=True)
class Ranked:
    """A training image's place in a query's ranking.

    ``rank`` counts from 1 for the highest score; where exact copies are left out, the others move up.
    """

    rank: int
    example_id: int
    file: str
    score: float
    exact_copy: bool
    metadata: dict[str, str]


@dataclass(frozen=True)
class Variant:
    """The scores of one variant, and what its manifests say of them.

    Args:
        name: the folder's name below ``score/``.
        manifest: of ``score/<name>/``.
        unlearn: manifest of the unlearned models, empty where the method needs none or they were deleted.
        score: [Q, N] float32, higher = more influential.
        query_ids: [Q], index of each row in the queries.
        example_ids: [N] int64, the training image of each column.
    """

    name: str
    manifest: dict[str, Any]
    unlearn: dict[str, Any]
    score: NDArray[np.float32]
    query_ids: list[int]
    example_ids: NDArray[np.int64]

    def scores_of(self, query: int) -> NDArray[np.float32]:
        """The scores of one query, [N].

        Raises:
            UserError: the variant has no such query.
        """
        if query not in self.query_ids:
            raise UserError("query", f"got {query}; expected {spell_ids(self.query_ids)}, the queries of {self.name}.")
        return self.score[self.query_ids.index(query)]

    @property
    def num_settled(self) -> int | None:
        """How many of the highest scores are settled; None where all are, exactly."""
        count: int | None = self.manifest.get("top_k")
        return count

    def require_settled(self, k: int, key: str, left_out: int = 0) -> None:
        """Raises UserError where the race over draws has not settled the ``k`` highest scores.

        Args:
            key: the configuration key that ``k`` came from.
            left_out: how many of the highest do not count.
        """
        if self.num_settled is not None and k + left_out > self.num_settled:
            among = ", exact copies of the query among them" if left_out else ""
            raise UserError(
                key,
                f"got {k}; score.mode=adaptive has settled the {self.num_settled} highest scores of {self.name}{among}"
                ", no more. Choose fewer.",
            )

    @property
    def null_loss(self) -> float | None:
        """The bound of its unlearning; None without unlearning or bound."""
        bound: float | None = self.unlearn.get("null_loss")
        return bound

    def unlearning_of(self, query: int) -> dict[str, Any]:
        """What the unlearning manifest records for one query; empty where it records nothing."""
        return next((record for record in self.unlearn.get("results", []) if record.get("query") == query), {})


class RunResults:
    """What a finished run holds. Manifests are read at once, tensors when asked for.

    Args:
        run: the run's folder.

    Raises:
        UserError: no such run, or its queries or scores are not finished.
    """

    def __init__(self, run: Path):
        if not run.is_dir():
            raise UserError("run", f"got {run}; expected the folder of a finished run. Make one: mucs run run={run}")
        self.run = run
        self.data = require_manifest(run / "data", "train")
        self.sample = require_manifest(run / "sample", "sample")
        self.train = optional_manifest(run / "train")
        folders = [path for path in sorted((run / "score").glob("*/")) if not path.name.startswith("_")]
        self.unfinished = [path.name for path in folders if not (path / "manifest.json").exists()]
        self.variant_names = sorted(
            (path.name for path in folders if path.name not in self.unfinished), key=variant_order
        )
        if not self.variant_names:
            require_manifest(run / "score" / (self.unfinished[0] if self.unfinished else "mucs"), "score")
        evaluations = {path.name: path for path in sorted((run / "evaluate").glob("*/"))}
        found = {name: optional_manifest(path) for name, path in evaluations.items()}
        self.evaluations = {name: manifest for name, manifest in found.items() if manifest}
        """Name -> manifest of the finished ones."""
        self.unfinished_evaluations = [name for name in found if name not in self.evaluations]
        self._variants: dict[str, Variant] = {}

    # --- variants ----------------------------------------------------------------------------------------------------

    def variant(self, name: str) -> Variant:
        """The scores of a variant, loaded once and checked against the hash in its manifest.

        Raises:
            UserError: no such variant, or its files are damaged or those of another data set.
        """
        if name not in self.variant_names:
            known = ", ".join(self.variant_names)
            raise UserError(
                "variant", f"got {name!r}; expected one of {known}.{did_you_mean(name, self.variant_names)}"
            )
        if name not in self._variants:
            folder = self.run / "score" / name
            manifest = require_manifest(folder, "score")
            tensors = read_output(folder, manifest, "scores.safetensors")
            require_scores(folder / "scores.safetensors", tensors)
            unlearned = manifest.get("unlearn_variant")
            self._variants[name] = Variant(
                name,
                manifest,
                optional_manifest(self.run / "unlearn" / unlearned) if unlearned else {},
                tensors["score"].numpy(),
                tensors["query_id"].tolist(),
                tensors["example_id"].numpy(),
            )
            self._check(self._variants[name], folder)
        return self._variants[name]

    def _check(self, variant: Variant, folder: Path) -> None:
        """Scores of other images or other queries than this run holds would be shown beside the wrong pictures.

        Queries are compared one by one: the run may hold more than were scored.
        """
        ours, theirs = self.sample.get("queries", {}), variant.manifest.get("queries", {})
        compared = [("dataset", self.data["fingerprint"], variant.manifest.get("inputs", {}).get("dataset"))]
        compared += [(f"query {query}", ours.get(str(query)), theirs.get(str(query))) for query in variant.query_ids]
        for what, here, scored in compared:
            if here != scored:
                raise UserError(
                    str(folder / "manifest.json"),
                    f"scores another {what} ({short(scored)}) than this run has ({short(here)}). "
                    "Rerun mucs score with overwrite=true.",
                )
        if not np.isfinite(variant.score).all():
            raise UserError(
                str(folder / "scores.safetensors"),
                "has scores that are not finite. Rerun mucs score with overwrite=true.",
            )
        for what, ids, count in (
            ("image", variant.example_ids.tolist(), len(self.index)),
            ("query", variant.query_ids, len(self.queries)),
        ):
            wrong = [number for number in ids if number >= count]
            if wrong:
                raise UserError(
                    str(folder),
                    f"scores {what} {wrong[0]}; this run has {count}. Rerun mucs score with overwrite=true.",
                )

    @property
    def variants(self) -> list[Variant]:
        return [self.variant(name) for name in self.variant_names]

    def pick_variant(self, name: str | None) -> Variant:
        """The variant ``name``; without a name the only one, or ``mucs``.

        Raises:
            UserError: no such variant, or none was named and there are several, none of them ``mucs``.
        """
        if name is None and len(self.variant_names) > 1 and "mucs" not in self.variant_names:
            raise UserError("variant", f"is not set; expected one of {', '.join(self.variant_names)}. Add variant=...")
        return self.variant(name or self.variant_names[0])

    # --- data and queries --------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> list[dict[str, str]]:
        """Rows of data/index.csv; row i is example_id i."""
        path = self.run / "data" / INDEX
        check_file(path.parent, self.data, path.name)
        columns = read_index(path)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """Raw training images, memory-mapped; [N, C, H, W], 0 to ``levels``.

        Raises:
            UserError: the file is missing, or not the one that the manifest names.
        """
        path = self.run / "data" / "images.safetensors"
        check_file(path.parent, self.data, path.name)
        image = map_tensor(path, "image")
        require_forms(path, {"image": image}, IMAGE_FORMS, "train", N=len(self.index))
        return image

    @property
    def levels(self) -> int:
        """The largest raw value, which stands for 1.0 (255 for ordinary images)."""
        return int(self.data["levels"])

    @cached_property
    def samples(self) -> dict[str, Tensor]:
        tensors = read_output(self.run / "sample", self.sample, "samples.safetensors")
        path = self.run / "sample" / "samples.safetensors"
        require_forms(path, tensors, SAMPLE_FORMS, "sample")
        require_finite(path, tensors, "sample")
        return tensors

    @property
    def queries(self) -> NDArray[np.float32]:
        """The queries as pictures, [Q, C, H, W] in [-1, 1]; where what is attributed is a latent, its picture."""
        return self.samples.get("picture", self.samples["image"]).numpy()

    @cached_property
    def query_rows(self) -> dict[int, dict[str, str]]:
        """Rows of sample/queries.csv by query; none for queries that were not read from a folder."""
        path = self.run / "sample" / "queries.csv"
        if path.name not in self.sample.get("outputs", {}):
            return {}
        check_file(path.parent, self.sample, path.name)
        rows = read_rows(path, "sample")
        if not all(is_query(row.get("query", "")) and "file" in row for row in rows):
            raise UserError(
                str(path), "expected columns query (a number) and file. Rerun mucs sample with overwrite=true."
            )
        return {int(row["query"]): row for row in rows}

    def query_file(self, query: int) -> str | None:
        """The file a query was read from; None for a sampled one."""
        return self.query_rows.get(query, {}).get("file")

    def is_held_out(self, query: int) -> bool:
        """Whether a query is an image held out of training, not a generated one."""
        return "role" in self.samples and int(self.samples["role"][query]) == HELD_OUT

    def query_metadata(self, query: int) -> dict[str, str]:
        """The columns of the queries' folder for one query."""
        return {key: value for key, value in self.query_rows.get(query, {}).items() if key not in QUERY_COLUMNS}

    def unscored(self, variant: Variant) -> list[int]:
        """The queries of the run that a variant has not scored; controls are not meant to be."""
        count = len(self.samples["image"])
        roles = self.samples["role"].tolist() if "role" in self.samples else [TARGET] * count
        return [query for query in range(count) if roles[query] == TARGET and query not in variant.query_ids]

    @cached_property
    def near_duplicates(self) -> NearDuplicates | None:
        """For each query its nearest training image; None where queries and images are of different shapes, or no
        image is of training."""
        trained = np.array([i for i, row in enumerate(self.index) if row["split"] == TRAINED], np.int64)
        if self.queries.shape[1:] != self.images.shape[1:] or not len(trained):
            return None
        return near_duplicates(
            self.queries, self.images, self.levels, trained, generator(REFERENCE_SEED, "near_duplicates")
        )

    def training_image(self, example_id: int) -> NDArray[np.float32]:
        """[C, H, W] in [-1, 1]."""
        return self.images[example_id].astype(np.float32) * (2 / self.levels) - 1

    def metadata(self, example_id: int) -> dict[str, str]:
        """The data set's own columns for one image, for example its label."""
        return {key: value for key, value in self.index[example_id].items() if key not in COLUMNS}

    @cached_property
    def exact_copies(self) -> dict[int, list[int]]:
        """For each query, the example_ids whose raw pixels equal the query's, rounded to the data's levels.

        Compared by the SHA-256 of the raw pixels in data/index.csv, so that no image has to be read.
        """
        holders: dict[str, list[int]] = {}
        for example_id, row in enumerate(self.index):
            holders.setdefault(row["sha256"], []).append(example_id)
        rounded = np.rint((self.queries.clip(-1, 1) + 1) * (self.levels / 2)).astype(np.uint8)
        return {query: holders.get(fingerprint(pixels), []) for query, pixels in enumerate(rounded)}

    # --- rankings ----------------------------------------------------------------------------------------------------

    def ranking(
        self,
        variant: Variant,
        query: int,
        k: int,
        *,
        bottom: bool = False,
        exclude_exact: bool = False,
        key: str = "k",
    ) -> list[Ranked]:
        """The ``k`` highest scores of a query, highest first; with ``bottom`` the lowest, lowest first.

        Equal scores are ordered by example_id.

        Args:
            variant: whose scores.
            query: index in the queries.
            k: how many.
            bottom: the other end of the ranking; ranks still count from the highest score.
            exclude_exact: leave exact copies of the query out.
            key: the configuration key that ``k`` came from, for the message.

        Raises:
            UserError: no such query, or ``k`` is more than there is to rank, or more than the race over draws settled.
        """
        scores, copies = variant.scores_of(query), set(self.exact_copies[query])
        # a stable sort of columns that are first put in the order of their ids
        by_id = np.argsort(variant.example_ids, kind="stable")
        order = by_id[np.argsort(-scores[by_id], kind="stable")]
        if exclude_exact:
            order = order[~np.isin(variant.example_ids[order], list(copies))]
        if k > len(order):
            left_out = ", exact copies of the query left out" if exclude_exact and copies else ""
            raise UserError(
                key, f"got {k}; expected at most {len(order)}, the training images scored{left_out}. Choose fewer."
            )
        if variant.num_settled is not None and bottom:
            raise UserError(
                "bottom",
                f"got true; score.mode=adaptive has not settled the lowest scores of {variant.name}. Leave it out.",
            )
        variant.require_settled(k, key, len(copies) if exclude_exact else 0)
        ranks = range(len(order) - 1, len(order) - k - 1, -1) if bottom else range(k)
        return [self._ranked(variant, scores, copies, int(order[position]), position + 1) for position in ranks]

    def _ranked(
        self, variant: Variant, scores: NDArray[np.float32], copies: set[int], column: int, rank: int
    ) -> Ranked:
        example_id = int(variant.example_ids[column])
        return Ranked(
            rank=rank,
            example_id=example_id,
            file=self.index[example_id]["file"],
            score=float(scores[column]),
            exact_copy=example_id in copies,
            metadata=self.metadata(example_id),
        )


def read_output(folder: Path, manifest: dict[str, Any], name: str) -> dict[str, Tensor]:
    """The tensors of one output of a stage, checked against its manifest's hash."""
    return read_tensors(folder / name, manifest.get("outputs", {}).get(name, {}).get("sha256"))


def optional_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that a run can do without; empty where there is none."""
    path = folder / "manifest.json"
    return read_manifest(path) if path.exists() else {}


def variant_order(name: str) -> tuple[bool, bool, list[tuple[bool, float, str]]]:
    """A sort key: ``mucs`` first, then its variants, then by name, where numbers in names are numbers (5 before 10)."""
    parts = [part for part in re.split(r"(\d+(?:\.\d+)?)", name) if part]
    return (
        name != "mucs",
        not name.startswith("mucs__"),
        [(part[0].isdigit(), float(part) if part[0].isdigit() else 0.0, part) for part in parts],
    )


def short(value: Any) -> str:
    """The beginning of a fingerprint, or of what stands in its place."""
    return str(value)[:16] if value else "not recorded"


def spell_ids(ids: Iterable[int]) -> str:
    """``0 to 9`` where the ids have no gap, else the ids themselves."""
    ordered = sorted(ids)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return "one of " + ", ".join(map(str, ordered))


def score_text(score: float) -> str:
    """A score with its sign: four decimals, two of a large one; in scientific notation where it is huge or tiny."""
    if abs(score) >= 10:
        return f"{score:+.2f}" if abs(score) < 1e5 else f"{score:+.4e}"
    return f"{score:+.4f}" if abs(score) >= 5e-4 or score == 0 else f"{score:+.1e}"
