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

from mucs_cli.artifacts import fingerprint, read_kept, sha256_file, write_tensors
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
from mucs_cli.reporting.charts import image_pairs
from mucs_cli.reporting.tables import Table
from mucs_cli.rng import derive_seed, generator
from mucs_cli.runtime import Progress
from mucs_cli.schemas import SampledQueriesConfig
from mucs_cli.stages import counterfactual_views as views
from mucs_cli.stages.context import Context
from mucs_cli.stages.counterfactual_views import MEAN, NO_REMOVAL, OTHER_PICTURES, RANDOM, matched_to, others_of
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
    other_runs,
    pool,
    read_samples,
    write_samples,
)
from mucs_cli.stages.retraining import Retraining

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SHOWN = 6
"""Targets whose pictures the chart of pairs shows."""
Ids = np.ndarray


class CounterfactualEvaluator(RetrainingEvaluator):
    """Pictures before and after training without what the chosen variants name.

    Raises:
        UserError: queries were not sampled, no scores have finished, a variant cannot be used, lacks a chosen query or
            has no top image for it, ``evaluation.k`` leaves no image, a metric cannot be loaded or applied, another run
            does not fit, or the base model was not trained in this run.
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
            for query in self.targets:
                if np.ptp(variant.row(query)) == 0:
                    raise UserError(
                        "evaluation.variants",
                        f"got {variant.name}, whose scores of query {query} are all the same: none is on top. "
                        "Leave it out, or choose other queries by queries.index.",
                    )
        self.k = self.config.k or default_count(files.num_images)
        if self.k >= files.num_images:
            raise UserError("evaluation.k", f"got {self.k}; expected less than the {files.num_images} training images.")
        for variant in self.variants:
            variant.require_settled(self.k, "evaluation.k")
        for name, sets in ((name, sets) for of_seed in self.removals for name, sets in of_seed.items()):
            if any(len(ids) == files.num_images for ids in sets):
                raise UserError(
                    "evaluation.k",
                    f"got {self.k}, with which {name} removes all {files.num_images} training images. Choose a smaller "
                    "one, fewer targets by queries.index, or evaluation.removal=per_query.",
                )
        self.seeds = [self.models.base_seed + repeat for repeat in range(self.config.num_seeds)]
        self.metrics = load_metrics(self.config.metrics, metric_paths(self.config), self.base.device)
        for metric in self.metrics.values():  # an encoder may not take pictures of this shape
            metric(self.queries.picture[:1], self.queries.picture[:1])
        self.others = other_runs(
            self.config.runs,
            context,
            files.model,
            self.names,
            lambda folder, manifest: read_samples(folder, manifest, self.names, self.config.metrics),
        )
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
    def removals(self) -> list[dict[str, list[Ids]]]:
        """For each training seed: method or baseline -> example ids of its removals; one in all, or one a target.

        A method removes the same images for every training seed. Random ones are drawn anew, so that intervals over
        seeds hold for other draws as well.
        """
        tops = {
            variant.name: list(top_ids(variant.rows(self.targets).numpy(), variant.example_ids, self.k))
            for variant in self.variants
        }
        return [self._with_random(tops, repeat) for repeat in range(self.config.num_seeds)]

    def _with_random(self, tops: dict[str, list[Ids]], repeat: int) -> dict[str, list[Ids]]:
        ids, seed = self.base.data.training, self.config.seed
        random = [random_matched(ids, self.k, generator(seed, "random_removal", repeat, q)) for q in self.targets]
        sets = tops | {RANDOM: random}
        if self.config.removal == "per_query":
            return sets
        unions = {name: [union(of_targets)] for name, of_targets in sets.items()}
        if self.config.matched:
            for name in self.names:  # a stream a name: one more method leaves the others' models as they are
                source = generator(seed, f"matched_removal/{name}", repeat)
                unions[matched_to(name)] = [random_matched(ids, len(unions[name][0]), source)]
        return unions

    @property
    def floor_seeds(self) -> list[int]:
        """Training seeds of the noise floor: those of the removals, but for the base model's own a new one."""
        return [self.models.base_seed + self.config.num_seeds, *self.seeds[1:]]

    def retrainings(self) -> Sequence[Retraining]:
        removals = zip(self.seeds, self.removals, strict=True)
        return [
            self._task([], self.models.base_seed),
            *(self._task([], seed) for seed in self.floor_seeds),
            *(self._task(ids, seed) for seed, of_seed in removals for sets in of_seed.values() for ids in sets),
        ]

    def _task(self, removed: Sequence[int] | Ids, seed: int) -> Retraining:
        return Retraining.of(removed, seed, self.config.batches == "base")

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
        kept = read_kept(path, {"picture": "float32 Q C H W"}, Q=len(seeds))
        if not kept:
            denoiser = self.base.model.denoiser if task is None else self.models.denoiser(task)
            kept = {"picture": self._generate(denoiser, seeds, condition).cpu()}
            write_tensors(path, kept)
        return kept["picture"]

    def _generate(self, denoiser: Denoiser, seeds: Tensor, condition: Tensor | None) -> Tensor:
        model = replace(self.base.model, denoiser=denoiser)
        images = generate(self.context, replace(self.base, model=model), seeds, condition)
        return images if model.codec is None else decode(model.codec, images, self.base.device)

    # --- similarities -------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, Any]:
        before = self.pictures(None)
        same = self.pictures(self._task([], self.models.base_seed))
        removed = {name: [len(of_seed[name][0]) for of_seed in self.removals] for name in self.removals[0]}
        removed |= {NO_REMOVAL: [0] * len(self.seeds), OTHER_PICTURES: [0] * len(self.seeds)}
        pooled = pool(Pooled(self.own, removed), list(self.others.values()))
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
            (name, [self._task(ids, seed) for ids in sets])
            for seed, of_seed in zip(self.seeds, self.removals, strict=True)
            for name, sets in of_seed.items()
        ]
        tasks += [(NO_REMOVAL, [self._task([], seed)]) for seed in self.floor_seeds]
        with Progress("compare", sum(len(of_task) for _, of_task in tasks), "models") as progress:
            for name, of_task in tasks:
                found = []
                for task in of_task:
                    found.append(self._compare(before, self.pictures(task)))
                    progress.advance()
                for metric in found[0]:
                    rows = np.stack([similarity[metric] for similarity in found])  # [removals, P]
                    if len(rows) > 1:
                        own, others = own_and_others(rows[:, :num_targets])
                        values.setdefault(others_of(name), {}).setdefault(metric, []).append(others)
                        row = np.concatenate([own, rows[:, num_targets:].mean(axis=0)])
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
                    ids = places[: len(of_seed[0])][part]
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
        return views.table(results, self.names)

    def charts(self, results: dict[str, Any]) -> "dict[str, Figure]":
        return views.charts(results, self.names, self.own) | {"pictures": self._pairs()}

    def _pairs(self) -> "Figure":
        """The first targets before, and after the first removal of each method that concerns them."""
        before = self.pictures(None)
        columns, places = [*self.names, RANDOM, NO_REMOVAL], range(min(NUM_SHOWN, len(self.targets)))

        def after(name: str, place: int) -> np.ndarray:
            sets = self.removals[0].get(name, [np.empty(0, np.int64)])
            seed = self.floor_seeds[0] if name == NO_REMOVAL else self.seeds[0]
            picture: np.ndarray = self.pictures(self._task(sets[place % len(sets)], seed))[place].numpy()
            return picture

        images = [[before[place].numpy(), *(after(name, place) for name in columns)] for place in places]
        return image_pairs([f"query {self.targets[place]}" for place in places], ["before", *columns], images)

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
    has_controls = len(controls.seed) > 0 and len(theirs.seed) > 0
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
        tested=method != OTHER_PICTURES,  # the same values for every training seed: a reference, not observations
    )
