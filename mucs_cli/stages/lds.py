"""The linear datamodeling score of finished variants, for generated and for held-out queries.

Models are trained on random subsets; the loss of every query is measured under each of them with the same draws, and
compared with what the scores of the subset's images predict. The mathematics is in ``evaluation/measures/lds.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_kept, read_tensors, sha256_file, write_tensors
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.evaluation.measures.lds import (
    averaged,
    ceiling,
    lds,
    lds_estimates,
    noise_floor,
    predictions,
    split_halves,
    subset_masks,
    weighted_mean,
)
from mucs_cli.evaluation.measures.statistics import CONFIDENCE, Floats
from mucs_cli.records import read_json, reading
from mucs_cli.reporting.charts import Bars, interval_bars
from mucs_cli.reporting.tables import Estimate, Table, cell_text, heading, leaves_out_zero, marked
from mucs_cli.rng import generator
from mucs_cli.runtime import Progress, smaller_batch
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluator import RESULTS, RetrainingEvaluator
from mucs_cli.stages.finished import SCORES, ScoreFiles
from mucs_cli.stages.loading import ROLES, load_queries
from mucs_cli.stages.pooled_runs import missing_in, other_runs, require_output
from mucs_cli.stages.retraining import Retraining
from mucs_cli.tensor_forms import require_forms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASUREMENT_BATCH = 256
SUBSETS = "subsets.safetensors"
COMMAND = "evaluate evaluation=lds"
PREDICTED = "predicted/"
"""In ``subsets.safetensors``, before the name of a variant."""


@dataclass(frozen=True)
class Rows:
    """What an LDS is computed from: queries of one run, a row each.

    queries: their Q ids. predicted: variant -> [Q, M]. measured: losses, [seeds, Q, M].
    """

    queries: list[int]
    predicted: dict[str, Floats]
    measured: Floats

    def of(self, queries: Sequence[int]) -> "Rows":
        """Those of some queries."""
        rows = [self.queries.index(query) for query in queries]
        return Rows(
            list(queries), {name: of_all[rows] for name, of_all in self.predicted.items()}, self.measured[:, rows]
        )


def read_rows(folder: Path, manifest: dict[str, Any], variants: Sequence[str]) -> tuple[Rows, dict[str, list[int]]]:
    """What another run's evaluation wrote, and which queries are of which kind.

    Raises:
        UserError: a variant is missing, or a file is not the one that its manifest names.
    """
    path = require_output(folder, manifest, SUBSETS)
    tensors = read_tensors(path)
    for name in variants:
        if PREDICTED + name not in tensors:
            raise missing_in(folder.parent.parent, name)
    forms = {"loss": "float64 S Q M", "query_id": "int64 Q"} | {PREDICTED + name: "float64 Q M" for name in variants}
    require_forms(path, tensors, forms, COMMAND)
    predicted = {name: tensors[PREDICTED + name].numpy() for name in variants}
    rows = Rows(tensors["query_id"].tolist(), predicted, tensors["loss"].numpy())
    path = require_output(folder, manifest, RESULTS)
    with reading(path, COMMAND):
        kinds = {
            str(kind): [int(query) for query in entry["ids"]] for kind, entry in read_json(path)["queries"].items()
        }
    unknown = sorted({query for ids in kinds.values() for query in ids} - set(rows.queries))
    if unknown:
        raise DamagedError(str(path), f"got query {unknown[0]}, which {SUBSETS} has not. Rerun mucs {COMMAND}.")
    return rows, kinds


class LdsEvaluator(RetrainingEvaluator):
    """Scores of the chosen variants against models trained on subsets.

    Raises:
        UserError: no scores have finished, a variant cannot be used or lacks a chosen query, a subset would be empty or
            hold all images, a half is too small, or the base model was not trained in this run.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.config = context.config.evaluation
        self.queries = load_queries(context, self.base.model)
        files = ScoreFiles(context.run, "evaluation.variants")
        names = files.choose_exact(self.config.variants)
        if not names and not self.only_trains:
            raise UserError(
                "evaluation.variants", f"got none; no scores have finished. Run mucs score run={context.run} first."
            )
        self.variants = [files.read(name) for name in names]
        for variant in self.variants:
            variant.require(self.queries.selected, "evaluation.variants")
        self.masks = self._subsets()
        self.subsets, self.chosen = self._part()
        self.others = other_runs(
            self.config.runs, context, files.model, names, lambda folder, manifest: read_rows(folder, manifest, names)
        )
        self.inputs = {
            "dataset": files.dataset,
            "model": files.model,
            "variants": names,
            "queries": fingerprint(self.queries.wanted),
            "runs": [sha256_file(run / SUBSETS) for run in self.others],
            **{f"scores of {v.name}": v.manifest["outputs"][SCORES]["sha256"] for v in self.variants},
        }

    def _subsets(self) -> NDArray[np.bool_]:
        """[M, N] over the training images, in the order of their ids."""
        data = self.base.data
        labels = data.label[data.training] if self.config.stratify and data.label is not None else None
        arguments = (len(data.training), self.config.num_subsets, self.config.share, self.config.seed, labels)
        try:
            return subset_masks(*arguments)
        except ValueError as error:
            raise UserError(
                "evaluation.share", f"got {self.config.share}, which gives {error}. Choose another."
            ) from error

    def _part(self) -> tuple[list[int], dict[str, list[int]]]:
        """The subsets, and the queries of each kind, that are evaluated: all, or those of one half."""
        by_kind = {
            kind: [query for query in self.queries.selected if self.queries.role[query] == role]
            for kind, role in ROLES.items()
        }
        found = {kind: queries for kind, queries in by_kind.items() if queries}
        subsets = list(range(len(self.masks)))
        if self.config.part == "all":
            return subsets, found
        half = ("selection", "report").index(self.config.part)

        def part_of(items: list[int], *index: int) -> list[int]:
            halves = split_halves(len(items), generator(self.config.seed, "lds_halves", *index))
            return [items[place] for place in halves[half]]

        found = {kind: part_of(queries, ROLES[kind]) for kind, queries in found.items()}
        subsets = part_of(subsets)
        if len(subsets) < 3 or not all(found.values()):
            counts = " and ".join(f"{len(queries)} {kind} queries" for kind, queries in found.items())
            raise UserError(
                "evaluation.part",
                f"got {self.config.part}, which has {len(subsets)} subsets and {counts}; expected at least 3 subsets "
                "and 1 query of each kind. Use more, or evaluation.part=all.",
            )
        return subsets, found

    def retrainings(self) -> Sequence[Retraining]:
        # One training seed for all subsets: what it does to all losses alike then leaves their order as it is.
        return [
            Retraining.of(self.base.data.training[~mask], self.models.base_seed + repeat)
            for repeat in range(self.config.seeds_per_subset)
            for mask in self.masks[self.subsets]
        ]

    # --- measured losses ----------------------------------------------------------------------------------------------

    @cached_property
    def draws(self) -> tuple[Tensor, Callable[[int], Tensor]]:
        """Noise levels [D], evenly through those of training, and query -> its noise [D, C, H, W]."""
        sigma = self.base.model.denoiser.even_sigma(self.config.num_draws)
        shape = (self.config.num_draws, *self.queries.image.shape[1:])
        return sigma, lambda query: torch.randn(shape, generator=generator(self.config.seed, "lds_noise", query))

    @cached_property
    def measured(self) -> Floats:
        """Mean loss of each chosen query under each model, [seeds, Q, M]; kept, a file a model."""
        queries = [query for chosen in self.chosen.values() for query in chosen]
        wanted = {query: self.queries.fingerprints[query] for query in queries}
        key = fingerprint(wanted, self.config.num_draws, self.config.seed)[:16]
        tasks = self.retrainings()
        losses = []
        with Progress("measure", len(tasks), "models") as progress:
            for task in tasks:
                path = self.context.folder("retrain", "_losses", key, f"{self.models.key(task)}.safetensors")
                kept = read_kept(path, {"loss": "float64 Q"}, Q=len(queries))
                if not kept:
                    kept = {"loss": self._losses(self.models.denoiser(task), queries)}
                    write_tensors(path, kept)
                losses.append(kept["loss"].cpu().numpy())
                progress.advance()
        return (
            np.stack(losses).reshape(self.config.seeds_per_subset, len(self.subsets), len(queries)).transpose(0, 2, 1)
        )

    @torch.no_grad()
    def _losses(self, denoiser: Denoiser, queries: list[int]) -> Tensor:
        """[Q], float64."""
        sigma, noise_of = self.draws
        device, size = self.base.device, MEASUREMENT_BATCH
        means = []
        for query in queries:
            image = self.queries.image[query : query + 1]
            condition, noise = self.queries.condition_of(query), noise_of(query)
            losses: list[Tensor] = []
            start = 0
            while start < len(sigma):
                part = slice(start, start + size)
                count = len(sigma[part])
                repeated = None if condition is None else condition.expand(count, *condition.shape[1:]).to(device)
                try:
                    images = image.expand(count, -1, -1, -1).to(device)
                    losses.append(denoiser.loss(images, noise[part].to(device), sigma[part].to(device), repeated).cpu())
                except RuntimeError as error:
                    size = smaller_batch(error, min(size, len(sigma)), "evaluation.num_draws")
                    continue
                start += count
            means.append(torch.cat(losses).double().mean())
        return torch.stack(means)

    # --- results ------------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        return {
            "num_images": self.masks.shape[1],
            "subset_size": int(self.masks[0].sum()),
            "part": self.config.part,
            "subsets": self.subsets,
            "seeds_per_subset": self.config.seeds_per_subset,
            "num_draws": self.config.num_draws,
            "num_resamples": self.config.num_resamples,
            "confidence": CONFIDENCE,
            "seed": self.config.seed,
            "pooled_runs": len(self.others),
            "queries": {
                kind: {
                    "ids": queries,
                    **self._results_of([self.rows.of(queries), *self._rows_of_others(kind)]),
                }
                for kind, queries in self.chosen.items()
            },
        }

    @cached_property
    def rows(self) -> Rows:
        """Of this run."""
        queries = [query for chosen in self.chosen.values() for query in chosen]
        masks = self.masks[self.subsets]
        predicted = {variant.name: predictions(masks, variant.rows(queries).numpy()) for variant in self.variants}
        return Rows(queries, predicted, self.measured)

    def _rows_of_others(self, kind: str) -> list[Rows]:
        return [rows.of(kinds[kind]) for rows, kinds in self.others.values() if kind in kinds]

    def _results_of(self, runs: list[Rows]) -> dict[str, Any]:
        """Of the queries of one kind."""
        losses = [averaged(rows.measured) for rows in runs]
        counts = [len(rows.queries) for rows in runs]
        settings = (self.config.num_resamples, CONFIDENCE)
        pairs = [(rows.predicted, of_run) for rows, of_run in zip(runs, losses, strict=True)]
        estimates = {
            over: lds_estimates(pairs, generator(self.config.seed, "lds_resamples"), over, *settings)
            for over in ("both", "subsets", "queries")
        }
        ceilings = [found for rows in runs if (found := ceiling(rows.measured)) is not None]
        variants = []
        for variant in self.variants:
            of_variant = [(predicted[variant.name], of_run) for predicted, of_run in pairs]
            of_runs = [lds(*pair) for pair in of_variant]
            variants.append(
                {
                    "variant": variant.name,
                    **{f"lds_over_{over}": asdict(of[variant.name]) for over, (of, _) in estimates.items()},
                    "per_run": [found.mean for found in of_runs],
                    "per_query": [[number_or_none(value) for value in found.per_query] for found in of_runs],
                    "num_undefined": sum(found.num_undefined for found in of_runs),
                    "noise_floor": asdict(noise_floor(of_variant, generator(self.config.seed, "lds_floor"))),
                }
            )
        return {
            "num_queries": sum(counts),
            "ceiling": weighted_mean(ceilings, counts) if ceilings else None,
            "variants": variants,
            "differences": [
                {"variants": list(pair), **asdict(difference)} for pair, difference in estimates["both"][1].items()
            ],
        }

    def table(self, results: dict[str, Any]) -> Table:
        ceilings = ", ".join(
            f"{heading(kind)} {'not measured' if entry['ceiling'] is None else cell_text(entry['ceiling'])}"
            for kind, entry in results["queries"].items()
        )
        pooled = results["pooled_runs"] > 0
        of_models = f" for each of {results['pooled_runs'] + 1} base models" if pooled else ""
        of_columns = "; lowest, highest: of the base models" if pooled else ""
        return Table(
            f"linear datamodeling score: {len(results['subsets'])} subsets of {results['subset_size']} of "
            f"{results['num_images']} images{of_models}, {results['seeds_per_subset']} training seeds each, intervals "
            f"of {results['confidence']:.0%} over subsets and queries; floor: 97.5 % of shuffled subsets lie below; p: "
            f"of shuffled subsets, one-sided{of_columns}; ceiling (one training seed against the others): {ceilings}",
            (
                *("queries", "variant", "count", "lds", "over_subsets"),
                *(("lowest", "highest") if pooled else ()),
                *("floor", "p", "undefined"),
            ),
            [
                (
                    heading(kind),
                    row["variant"],
                    entry["num_queries"],
                    estimate,
                    shown(row["lds_over_subsets"]),
                    *((min(row["per_run"]), max(row["per_run"])) if pooled else ()),
                    row["noise_floor"]["upper"],
                    row["noise_floor"]["p_value"],
                    row["num_undefined"],
                )
                for kind, entry in results["queries"].items()
                for row, estimate in zip(entry["variants"], with_marks(entry), strict=True)
            ],
        )

    def charts(self, results: dict[str, Any]) -> "dict[str, Figure]":
        panels = [
            Bars(
                f"{heading(kind)} queries",
                {"lds": [shown(row["lds_over_both"]) for row in entry["variants"]]},
                None if entry["ceiling"] is None else Estimate(entry["ceiling"], None, None),
            )
            for kind, entry in results["queries"].items()
        ]
        axis = f"linear datamodeling score, {results['confidence']:.0%} interval; dotted: ceiling"
        return {"lds": interval_bars([variant.name for variant in self.variants], panels, axis)}

    def files(self, folder: Path) -> list[Path]:
        """``subsets.safetensors``, for other software: who was in, what was measured, what each variant predicted."""
        tensors = {
            "subset": torch.from_numpy(self.masks[self.subsets].astype(np.uint8)),
            "example_id": torch.from_numpy(self.base.data.training),
            "query_id": torch.tensor(self.rows.queries),
            "loss": torch.from_numpy(np.ascontiguousarray(self.measured)),
            **{PREDICTED + name: torch.from_numpy(rows) for name, rows in self.rows.predicted.items()},
        }
        # One entry: the library writes several in random order, and equal tensors are to give equal files.
        shapes = "loss [seeds, queries, subsets]; subset 1: trained on; predicted [queries, subsets]"
        write_tensors(folder / SUBSETS, tensors, {"shapes": shapes})
        return [folder / SUBSETS]

    def facts(self) -> dict[str, Any]:
        return {
            "seeds": {"lds": self.config.seed},
            "counts": {
                "variants": len(self.variants),
                "models": len(self.subsets) * self.config.seeds_per_subset,
                "queries": sum(map(len, self.chosen.values())),
            },
        }


def with_marks(entry: dict[str, Any]) -> list[Estimate]:
    """The LDS of each variant on queries of one kind; the best, and those whose difference from it may be 0, marked."""
    names = [row["variant"] for row in entry["variants"]]
    differs = {
        frozenset(difference["variants"]): leaves_out_zero(difference["low"], difference["high"])
        for difference in entry["differences"]
    }
    estimates = [shown(row["lds_over_both"]) for row in entry["variants"]]
    return marked(estimates, lambda place, best: differs[frozenset((names[place], names[best]))])


def shown(estimate: dict[str, Any]) -> Estimate:
    """A statistic, as it is on disk, for a table."""
    return Estimate(estimate["value"], estimate["low"], estimate["high"])


def number_or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
