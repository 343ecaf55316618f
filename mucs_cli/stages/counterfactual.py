"""Counterfactual retraining: without the images that a method names, does the model still generate the same pictures?

The model is trained again and the same pictures are generated from the same seeds. The statistics are in
``evaluation/measures/counterfactual.py``.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import (
    fingerprint,
    read_tensors,
    sha256_file,
    write_tensors,
)
from mucs_cli.config import result_config
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures import counterfactual as measures
from mucs_cli.evaluation.measures.counterfactual import Contrast, Settings, Similarities
from mucs_cli.evaluation.measures.removal import (
    default_count,
    expected_union,
    own_and_others,
    random_matched,
    reference_partners,
    top_ids,
    union,
)
from mucs_cli.evaluation.measures.statistics import CONFIDENCE, MIN_CLUSTERS, Floats
from mucs_cli.evaluation.metrics import load_metrics, metric_paths
from mucs_cli.reporting import charts
from mucs_cli.reporting.tables import Estimate, Table, leaves_out_zero, marked
from mucs_cli.rng import derive_seed, generator
from mucs_cli.runtime import Progress
from mucs_cli.schemas import SampledQueriesConfig
from mucs_cli.stages.context import Context
from mucs_cli.stages.encoding import decode
from mucs_cli.stages.evaluator import RetrainingEvaluator
from mucs_cli.stages.finished import SCORES, ScoreFiles
from mucs_cli.stages.generation import generate, query_conditions
from mucs_cli.stages.loading import ROLES, load_queries
from mucs_cli.stages.pooled_runs import (
    CONTROL,
    SIMILARITIES,
    TARGET,
    Key,
    Pooled,
    other_run,
    pool,
    read_finished,
    write_samples,
)
from mucs_cli.stages.retraining import Retraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANDOM = "random removal"
"""The baseline: for each target as many images as for a method, drawn at random."""
NO_REMOVAL = "no removal"
"""The noise floor: nothing is removed, another training seed."""
NUM_SHOWN = 6
"""Targets whose pictures the chart of pairs shows."""
OTHER_PICTURES = "other pictures"
"""The reference: pictures of different queries, before any removal."""
MEAN = "mean"
"""The mean of all metrics, where there are several."""
Ids = np.ndarray


def matched_to(method: str) -> str:
    """The baseline that removes as many images as a method's union has, at random."""
    return f"random, as many as {method}"


def others_of(method: str) -> str:
    """removal=per_query: pictures under the removals for the other targets."""
    return f"{method}, for other targets"


class CounterfactualEvaluator(RetrainingEvaluator):
    """Pictures before and after training without what the chosen variants name.

    Raises:
        UserError: queries were not sampled, no scores have finished, a variant cannot be used or lacks a chosen query,
            ``evaluation.k`` is too large, a metric cannot be loaded or applied, another run does not fit, or the base
            model was not trained in this run.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.config = context.config.evaluation
        if not isinstance(context.config.queries, SampledQueriesConfig):
            raise UserError(
                "queries",
                "got a folder; expected queries that the model sampled: others cannot be generated again. "
                "Use queries=sampled in another run.",
            )
        self.queries = load_queries(context, self.base.model)
        self.targets = [q for q in self.queries.selected if self.queries.role[q] == ROLES["generated"]]
        if not self.targets:
            raise UserError("queries.index", "chooses no generated query. Choose some, or leave it out.")
        files = ScoreFiles(context.run, "evaluation.variants")
        self.names = files.choose(self.config.variants)
        if not self.names:
            raise UserError(
                "evaluation.variants", f"got none; no scores have finished. Run mucs score run={context.run} first."
            )
        self.variants = [files.read(name) for name in self.names]
        for variant in self.variants:
            variant.require(self.targets, "evaluation.variants")
        self.k = self.config.k or default_count(files.num_images)
        if self.k >= files.num_images:
            raise UserError("evaluation.k", f"got {self.k}; expected less than the {files.num_images} training images.")
        self.seeds = [self.models.base_seed + repeat for repeat in range(self.config.num_seeds)]
        self.metrics = load_metrics(self.config.metrics, metric_paths(self.config), self.base.device)
        for metric in self.metrics.values():  # an encoder may not take pictures of this shape
            metric(self.queries.picture[:1], self.queries.picture[:1])
        self.others = [other_run(Path(path), self.context) for path in self.config.runs or []]
        self.inputs = {
            "dataset": files.dataset,
            "model": files.model,
            "variants": self.names,
            "targets": fingerprint({query: self.queries.fingerprints[query] for query in self.targets}),
            "runs": [sha256_file(run / SIMILARITIES) for run in self.others],
            **{f"scores of {v.name}": v.manifest["outputs"][SCORES]["sha256"] for v in self.variants},
            **{f"weights of {name}": m.fingerprint for name, m in self.metrics.items() if m.fingerprint},
        }

    # --- what is removed, and what is trained -------------------------------------------------------------------------

    @cached_property
    def removals(self) -> dict[str, list[Ids]]:
        """Method or baseline -> example ids of each of its removals: one in all, or one a target."""
        ids = self.base.data.training
        seed = self.config.seed
        sets = {
            variant.name: list(top_ids(variant.rows(self.targets).numpy(), variant.example_ids, self.k))
            for variant in self.variants
        }
        sets[RANDOM] = [random_matched(ids, self.k, generator(seed, "random_removal", q)) for q in self.targets]
        if self.config.removal == "per_query":
            return sets
        unions = {name: [union(of_targets)] for name, of_targets in sets.items()}
        if self.config.matched:
            for place, name in enumerate(self.names):
                source = generator(seed, "matched_removal", place)
                unions[matched_to(name)] = [random_matched(ids, len(unions[name][0]), source)]
        return unions

    @property
    def floor_seeds(self) -> list[int]:
        """Training seeds of the noise floor: those of the removals, but for the base model's own a new one."""
        return [self.models.base_seed + self.config.num_seeds, *self.seeds[1:]]

    def retrainings(self) -> Sequence[Retraining]:
        removed = [ids for of_method in self.removals.values() for ids in of_method]
        return [
            Retraining.of([], self.models.base_seed),
            *(Retraining.of([], seed) for seed in self.floor_seeds),
            *(Retraining.of(ids, seed) for seed in self.seeds for ids in removed),
        ]

    # --- pictures -----------------------------------------------------------------------------------------------------

    @cached_property
    def draws(self) -> tuple[Tensor, Tensor | None]:
        """Seeds and conditions of the targets, then of the controls."""
        config, count = self.context.config.queries, self.config.num_controls
        seeds = [derive_seed(config.seed, "query", query) for query in self.targets]
        seeds += [derive_seed(self.config.seed, "control", place) for place in range(count)]
        if self.queries.condition is None:
            return torch.tensor(seeds), None
        condition = self.queries.condition[self.targets]
        if count:
            of_controls = replace(config, num=count, seed=derive_seed(self.config.seed, "control_condition"))
            more = query_conditions(self.base.model, self.base.data, of_controls)
            assert more is not None
            condition = torch.cat([condition, more])
        return torch.tensor(seeds), condition

    def pictures(self, task: Retraining | None) -> Tensor:
        """Targets, then controls, under a retrained model (None: the base model), [P, C, H, W] in [-1, 1]; kept.

        All are generated in one call whatever the model, so that the same weights give the same bits.
        """
        seeds, condition = self.draws
        sampler = result_config(self.context.config.sampler)
        key = fingerprint(self.base.model.fingerprint, sampler, seeds, "none" if condition is None else condition)[:16]
        name = "base" if task is None else self.models.key(task)
        path = self.context.folder("retrain", "_pictures", key, f"{name}.safetensors")
        if not path.exists():
            denoiser = self.base.model.denoiser if task is None else self.models.denoiser(task)
            write_tensors(path, {"picture": self._generate(denoiser, seeds, condition)})
        return read_tensors(path)["picture"]

    def _generate(self, denoiser: Denoiser, seeds: Tensor, condition: Tensor | None) -> Tensor:
        model = replace(self.base.model, denoiser=denoiser)
        images = generate(self.context, replace(self.base, model=model), seeds, condition)
        return images if model.codec is None else decode(model.codec, images, self.base.device)

    # --- similarities -------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        before = self.pictures(None)
        same = self.pictures(Retraining.of([], self.models.base_seed))
        removed = {name: [len(sets[0]) for _ in self.seeds] for name, sets in self.removals.items()}
        removed |= {NO_REMOVAL: [0] * len(self.seeds), OTHER_PICTURES: [0] * len(self.seeds)}
        pooled = pool([Pooled(self.own, removed), *(read_finished(folder) for folder in self.others)], self.others)
        clusters = len({int(seed) for sample in pooled.samples.values() for seed in sample.seed})
        settings = Settings(
            clusters="seed" if clusters >= MIN_CLUSTERS else "picture",
            seed=self.config.seed,
            num_resamples=self.config.num_resamples,
        )
        num_images = len(self.base.data.training)
        rows = measures.table(list(self._contrasts(pooled)), num_images, settings)
        return {
            "removal": self.config.removal,
            "k": self.k,
            "num_images": num_images,
            "targets": self.targets,
            "num_controls": self.config.num_controls,
            "seeds": self.seeds,
            "floor_seeds": self.floor_seeds,
            "pooled_runs": len(self.others),
            "clusters": settings.clusters,
            "num_clusters": clusters,
            "num_resamples": self.config.num_resamples,
            "confidence": CONFIDENCE,
            "removed": pooled.removed,
            "expected_random_union": expected_union(num_images, self.k, len(self.targets)),
            "retrained_with_the_same_seed": {
                "identical": bool(torch.equal(before, same)),
                "largest_difference": float((before - same).abs().max()),
            },
            "rows": [asdict(row) for row in rows],
            "differences": list(self._differences(pooled, settings)),
        }

    def _differences(self, pooled: Pooled, settings: Settings) -> Iterator[dict[str, Any]]:
        """Of the targets' similarities under every two variants, picture by picture."""
        for metric in self._metrics():
            for first, second in itertools.combinations(self.names, 2):
                row = measures.row_of(
                    contrast_of(pooled, first, second, metric), len(self.base.data.training), settings
                )
                yield {"variants": [first, second], "metric": metric, **asdict(row.targets.difference)}

    def _metrics(self) -> list[str]:
        """All that is reported."""
        return [*self.metrics, *([MEAN] if len(self.metrics) > 1 else [])]

    @cached_property
    def own(self) -> dict[Key, Similarities]:
        """The similarities of this run."""
        return dict(self._samples(self.pictures(None)))

    def _samples(self, before: Tensor) -> Iterator[tuple[Key, Similarities]]:
        """(method, metric, role) -> similarities to the base model's pictures, of everything that was trained."""
        num_targets, num_pictures = len(self.targets), len(before)
        values: dict[str, dict[str, list[Floats]]] = {}  # method -> metric -> a row a seed
        tasks = [
            (name, repeat, [Retraining.of(ids, self.seeds[repeat]) for ids in sets])
            for name, sets in self.removals.items()
            for repeat in range(len(self.seeds))
        ]
        tasks += [(NO_REMOVAL, repeat, [Retraining.of([], seed)]) for repeat, seed in enumerate(self.floor_seeds)]
        with Progress("compare", sum(len(of_task) for _, _, of_task in tasks), "models") as progress:
            for name, _, of_task in tasks:
                found = []
                for task in of_task:
                    found.append(self._compare(before, self.pictures(task)))
                    progress.advance()
                for metric in found[0]:
                    rows = np.stack([similarity[metric] for similarity in found])  # [removals, P]
                    if len(rows) > 1:
                        own, others = own_and_others(rows[:, :num_targets])
                        controls = rows[:, num_targets:].mean(axis=0)
                        values.setdefault(others_of(name), {}).setdefault(metric, []).append(
                            np.concatenate([others, controls])
                        )
                        row = np.concatenate([own, controls])
                    else:
                        row = rows[0]
                    values.setdefault(name, {}).setdefault(metric, []).append(row)
        partners = reference_partners(num_pictures)
        reference = [self._compare(before, before[torch.from_numpy(roll)]) for roll in partners]
        if reference:
            values[OTHER_PICTURES] = {
                metric: [np.mean([of[metric] for of in reference], axis=0)] * len(self.seeds) for metric in reference[0]
            }
        places = np.array([*self.targets, *range(self.config.num_controls)], dtype=np.int64)
        for name, of_metric in values.items():
            for metric, of_seed in of_metric.items():
                for role, part in ((TARGET, slice(0, num_targets)), (CONTROL, slice(num_targets, None))):
                    ids = places[part]
                    seeds = np.repeat(np.array(self.seeds, dtype=np.int64), len(ids))
                    value = np.concatenate([row[part] for row in of_seed])
                    yield (name, metric, role), Similarities(seeds, np.tile(ids, len(self.seeds)), value)

    def _compare(self, before: Tensor, after: Tensor) -> dict[str, Floats]:
        """Metric -> similarity of each pair of pictures."""
        found = {name: metric(before, after).numpy() for name, metric in self.metrics.items()}
        return found | ({MEAN: np.mean(list(found.values()), axis=0)} if len(found) > 1 else {})

    def _contrasts(self, pooled: Pooled) -> Iterator[Contrast]:
        """What is set beside what; one family for the correction of p-values."""
        pairs = [(name, RANDOM) for name in [*self.names, NO_REMOVAL, OTHER_PICTURES]]
        if self.config.removal == "per_query":
            pairs += [(name, others_of(name)) for name in [*self.names, RANDOM] if len(self.targets) > 1]
        elif self.config.matched:
            pairs += [(name, matched_to(name)) for name in self.names]
        for name, baseline in pairs:
            for metric in self._metrics():
                if (name, metric, TARGET) in pooled.samples:
                    yield contrast_of(pooled, name, baseline, metric)

    # --- what is shown ------------------------------------------------------------------------------------------------

    def table(self, results: dict[str, Any]) -> Table:
        unit = "training seeds" if results["clusters"] == "seed" else "pictures as if independent"
        same = results["retrained_with_the_same_seed"]
        rest = "" if same["identical"] else f"; retrained with the same seed: off by {same['largest_difference']:.2g}"
        return Table(
            f"similarity of pictures after training without images, {results['removal']} removal, {results['k']} of "
            f"{results['num_images']} images a target; auc above 0.5: targets are less alike than under the baseline; "
            f"ratio in percent; {results['confidence']:.0%} intervals over {unit}; p: Mann-Whitney and Wilcoxon, Holm"
            f"{rest}",
            (
                "method",
                "baseline",
                "metric",
                "removed",
                "auc",
                "auc_controls",
                "separation",
                "ratio",
                "hit_rate",
                "p_mann_whitney",
                "p_wilcoxon",
            ),
            [
                (
                    row["method"],
                    row["baseline"],
                    row["metric"],
                    float(np.mean(row["num_removed"])),
                    auc,
                    shown(row["controls"] and row["controls"]["auc"]),
                    shown(row["separation"]),
                    shown(row["targets"]["ratio"]),
                    row["targets"]["hit_rate"],
                    row["targets"]["mann_whitney_holm"],
                    row["targets"]["wilcoxon_holm"],
                )
                for row, auc in zip(results["rows"], self._marked_auc(results), strict=True)
            ],
        )

    def _marked_auc(self, results: dict[str, Any]) -> list[Estimate]:
        """The AUC of every row; of variants beside the same baseline, the best of each metric is marked."""
        rows = results["rows"]
        found = [shown(row["targets"]["auc"]) for row in rows]
        differs = {
            (entry["metric"], frozenset(entry["variants"])): leaves_out_zero(entry["low"], entry["high"])
            for entry in results["differences"]
        }
        for metric in self._metrics():
            places = [
                place
                for place, row in enumerate(rows)
                if row["metric"] == metric and row["baseline"] == RANDOM and row["method"] in self.names
            ]
            names = [rows[place]["method"] for place in places]

            def distinguishable(i: int, best: int, metric: str = metric, names: list[str] = names) -> bool:
                return differs[metric, frozenset((names[i], names[best]))]

            for place, estimate in zip(places, marked([found[p] for p in places], distinguishable), strict=True):
                found[place] = estimate
        return found

    def charts(self, results: dict[str, Any]) -> "dict[str, Figure]":
        methods = [*self.names, RANDOM, NO_REMOVAL]
        samples = {
            metric: {
                name: charts.Similarities(self.own[name, metric, TARGET].value, self.own[name, metric, CONTROL].value)
                for name in methods
            }
            for metric in self.metrics
        }
        compared = [*self.names, NO_REMOVAL]
        auc = {(row["method"], row["metric"]): row for row in results["rows"] if row["baseline"] == RANDOM}
        panels = []
        for metric in self._metrics():
            rows = [auc[name, metric] for name in compared]
            series = {"targets": [shown(row["targets"]["auc"]) for row in rows]}
            if self.config.num_controls:
                series["controls"] = [shown(row["controls"]["auc"]) for row in rows]
            panels.append(charts.Bars(metric, series))
        return {
            "similarities": charts.densities(samples, "similarity to the picture before, higher is more alike", RANDOM),
            "auc": charts.interval_bars(compared, panels, "AUC against random removal", reference=0.5),
            "pictures": self._pairs(),
        }

    def _pairs(self) -> "Figure":
        """The first targets before, and after the first removal of each method that concerns them."""
        columns = [*self.names, RANDOM, NO_REMOVAL]
        before = self.pictures(None)
        shown_targets = range(min(NUM_SHOWN, len(self.targets)))
        after = {}
        for name in columns:
            for place in shown_targets:
                if name == NO_REMOVAL:
                    task = Retraining.of([], self.floor_seeds[0])
                else:
                    sets = self.removals[name]
                    task = Retraining.of(sets[place] if len(sets) > 1 else sets[0], self.seeds[0])
                after[name, place] = self.pictures(task)[place].numpy()
        images = [[before[place].numpy(), *(after[name, place] for name in columns)] for place in shown_targets]
        names = [f"query {self.targets[place]}" for place in shown_targets]
        return charts.image_pairs(names, ["before", *columns], images)

    def files(self, folder: Path) -> list[Path]:
        """``similarities.csv``: a line a picture, training seed, method and metric, of this run alone."""
        return [write_samples(self.own, folder)]

    def facts(self) -> dict[str, Any]:
        models = len(set(self.retrainings()))
        return {
            "seeds": {"counterfactual": self.config.seed},
            "counts": {"variants": len(self.names), "models": models, "targets": len(self.targets)},
        }


def contrast_of(pooled: Pooled, method: str, baseline: str, metric: str) -> Contrast:
    controls, theirs = (pooled.samples[name, metric, CONTROL] for name in (method, baseline))
    has_controls = len(controls.seed) > 0
    return Contrast(
        method,
        baseline,
        metric,
        pooled.samples[method, metric, TARGET],
        pooled.samples[baseline, metric, TARGET],
        pooled.removed[method],
        pooled.removed.get(baseline, pooled.removed[method]),
        # Pictures of controls are numbered from 0 as queries are: told apart by what is below 0.
        replace(controls, query=-1 - controls.query) if has_controls else None,
        replace(theirs, query=-1 - theirs.query) if has_controls else None,
    )


def shown(estimate: dict[str, Any] | None) -> Estimate:
    """A statistic, as it is on disk, for a table."""
    return (
        Estimate(None, None, None) if estimate is None else Estimate(*(estimate[k] for k in ("value", "low", "high")))
    )
