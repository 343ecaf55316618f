"""Gradient features on disk: of the training images block by block, of every query in a file of its own.

``score/_features/<fingerprint>/`` holds ``features.safetensors``, ``feature [N, k]``, and for every query
``query_<fingerprint>.safetensors``, ``feature [k]``, whose hash is in ``queries.json``. All methods and settings of the
same model, data, parameters, output, draws and projection share them. ``score/_noise_errors/<fingerprint>/`` holds the
errors that DAS asks for.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_tensors, sha256_file, write_record, write_tensors
from mucs_cli.attribution.gradient_features import features, make_output, noise_errors
from mucs_cli.attribution.scoring import Block, blocks_of, fitted_block_size
from mucs_cli.errors import UserError
from mucs_cli.locks import locked
from mucs_cli.methods.gradient_base import GradientConfig
from mucs_cli.records import read_record
from mucs_cli.runtime import Progress, log, smaller_batch
from mucs_cli.stages.blocks import BlockWork, kept_tensor
from mucs_cli.stages.feature_settings import (
    choose_block_size,
    draw_noise,
    make_projection,
    projection_facts,
)
from mucs_cli.stages.loading import fixed_fact, save_fact
from mucs_cli.stages.unlearner import choose_trainable
from mucs_cli.stages.work import Work

FEATURES_VERSION = 1
"""Raised when the numbers change: features that were kept are then computed again."""

GROUP = 16
"""Queries computed together; query q always has row q mod 16, so that its bits do not depend on the others."""

ERROR_IMAGES_AT_ONCE = 64


class FeatureStore:
    """The features of one model, data set and configuration. Making one checks the configuration, and is quick.

    Args:
        work: what it works with; ``work.config.method`` is a ``GradientConfig``.
        output: what is differentiated, see ``make_output``.
        normalise_each: see ``features``.
    Raises:
        UserError: no parameter matches.
    """

    def __init__(self, work: Work, output: str, normalise_each: bool = False):
        config: GradientConfig = work.config.method
        self.work, self.config = work, config
        self.device, self.denoiser = work.inputs.device, work.inputs.model.denoiser
        self.names = choose_trainable(work, config.trainable, config.patterns, config.num_blocks, "method")
        parameters = dict(self.denoiser.network.named_parameters())
        self.num_parameters = sum(parameters[name].numel() for name in self.names)
        self.projection = make_projection(config, self.num_parameters)
        self.output, self.normalise_each = make_output(output, config.raw_output), normalise_each
        data = work.inputs.data
        self.sigma = self.denoiser.even_sigma(config.num_draws)
        self.noise = draw_noise(config.num_draws, (data.channels, data.height, data.width), config.seed)
        self.draws = {
            "dataset": data.fingerprint,
            "model": work.inputs.model.fingerprint,
            "draws": fingerprint(self.sigma, self.noise),
        }
        """What the errors depend on; the features depend on more."""
        self.identity = self.draws | {
            "parameters": fingerprint(self.names),
            "output": output,
            "raw_output": config.raw_output,
            "normalise_each": normalise_each,
            "projection": projection_facts(self.projection),
            "version": FEATURES_VERSION,
        }
        self.fingerprint = fingerprint(self.identity)
        self.folder = work.context.folder("score", "_features", self.fingerprint[:16])

    @property
    def num_images(self) -> int:
        return self.work.num_images

    @property
    def k(self) -> int:
        """Numbers a feature."""
        return self.projection.k

    def load(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Training images and their own conditions, on the device."""
        ids = self.work.inputs.data.training[rows.numpy()]
        condition = self.work.inputs.data.conditions(ids) if self.work.is_conditional else None
        image = self.work.inputs.data.images(ids).to(self.device)
        return image, None if condition is None else condition.to(self.device)

    def features_of(self, image: Tensor, condition: Tensor | None, sigma: Tensor | None = None) -> Tensor:
        """Features of a batch under the draws; [B, k], on the device.

        Args:
            image: [B, C, H, W], on the device.
            condition: [B], [B, d] or None.
            sigma: noise levels in place of the draws' own, [num_draws].
        Raises:
            ValueError: a gradient is not finite.
        """
        most = len(image) * (1 if self.normalise_each else len(self.sigma))
        return features(
            self.denoiser,
            self.names,
            image,
            condition,
            (self.sigma if sigma is None else sigma).to(self.device),
            self.noise.to(self.device),
            self.output,
            self.projection,
            self.normalise_each,
            min(self.config.micro_batch_size, most),  # no more gradients at once than the batch has
        )

    # --- of the training images ---------------------------------------------------------------------------------

    def training(self) -> np.ndarray:
        """Features of all training images, [N, k], memory-mapped; computed unless they are there."""
        path = self.folder / "features.safetensors"
        return kept_tensor(path, "feature", self.identity, TrainingFeatures(self))

    def errors(self) -> np.ndarray:
        """mean (eps_hat - noise)^2 of all training images under every draw, [N, num_draws]; likewise."""
        folder = self.work.context.folder("score", "_noise_errors", fingerprint(self.draws)[:16])
        return kept_tensor(folder / "errors.safetensors", "error", self.draws, NoiseErrors(self))

    def shrink(self, error: RuntimeError) -> None:
        """A smaller block after running out of memory; any other error is raised again."""
        self.block_size = smaller_batch(error, self.block_size, "method.micro_batch_size")
        save_fact(self.work.context.run, "feature_block_size", self.block_size, self._key())

    @cached_property
    def block_size(self) -> int:
        """Training images a block: the run's earlier choice, else by the memory budget, and then stored in the run."""

        def choose() -> int:
            budget = self.work.config.score.memory_budget * 2**30
            return choose_block_size(budget, self.num_parameters, self.num_images, self.projection.kind)

        return fixed_fact(self.work.context.run, "feature_block_size", choose, self._key())

    def _key(self) -> str:
        return f"{self.device.type}/{self.num_images}/{self.num_parameters}/{self.projection.kind}"

    # --- of the queries -----------------------------------------------------------------------------------------

    def query_key(self, query: int) -> str:
        """What a query's features depend on beyond the store's identity; a hash."""
        return self.work.queries.fingerprints[query]

    def query_features(self, queries: Sequence[int]) -> Tensor:
        """Features of the queries, those on disk and those computed now; [len(queries), k], on the CPU.

        Raises:
            UserError: a gradient is not finite.
        """
        found = {query: self._read_query(query) for query in queries}
        size = GROUP if self.block_size >= GROUP else 1
        missing = [query for query in queries if found[query] is None]
        groups: dict[int, list[int]] = {}
        for query in missing:
            groups.setdefault(query // size, []).append(query)
        with Progress("score: query features", len(missing), "queries") as progress:
            for number, group in groups.items():
                rows = [number * size + row if number * size + row in group else group[0] for row in range(size)]
                try:
                    computed = self.compute_queries(rows).cpu()
                except ValueError as error:
                    raise UserError(
                        f"queries {', '.join(map(str, group))}",
                        f"got {error}. Train the model longer, or leave them out.",
                    ) from error
                for query in group:
                    found[query] = computed[query % size].clone()
                    self._write_query(query, computed[query % size])
                progress.advance(len(group))
        return torch.stack([feature for feature in found.values() if feature is not None])

    def compute_queries(self, queries: Sequence[int]) -> Tensor:
        """Features of some queries, ids may repeat; [len(queries), k].

        Raises:
            ValueError: a gradient is not finite.
        """
        image, condition = self.query_batch(queries)
        return self.features_of(image, condition)

    def query_batch(self, queries: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Images and conditions of some queries, on the device."""
        rows, given = list(queries), self.work.queries.condition
        image = self.work.queries.image[rows].to(self.device)
        return image, None if given is None or not self.work.is_conditional else given[rows].to(self.device)

    def _query_path(self, query: int) -> Path:
        return self.folder / f"query_{self.query_key(query)[:16]}.safetensors"

    def _read_query(self, query: int) -> Tensor | None:
        """A query's feature if it is there as it was written."""
        path = self._query_path(query)
        known = self._known_queries().get(path.name)
        if known is None or not path.is_file():
            return None
        if sha256_file(path) != known:
            log.warning("%s is damaged; computing it again", path)
            return None
        return read_tensors(path)["feature"]

    def _write_query(self, query: int, feature: Tensor) -> None:
        path, record = self._query_path(query), self.folder / "queries.json"
        write_tensors(path, {"feature": feature})
        with locked(record):
            known = self._known_queries()
            write_record(record, known | {path.name: sha256_file(path)})

    def _known_queries(self) -> dict[str, Any]:
        """Name of a query's file -> its hash."""
        record = self.folder / "queries.json"
        return read_record(record) if record.exists() else {}


# --- what fills the files --------------------------------------------------------------------------------------------


class TrainingFeatures(BlockWork):
    """``feature [N, k]`` of all training images."""

    title, unit = "score: features", "gradients"
    passes = ((0,),)

    def __init__(self, store: FeatureStore):
        self.store = store
        self.tensors = {"feature": ("float32", (store.num_images, store.k))}

    def blocks(self) -> list[Block]:
        return blocks_of(self.store.num_images, self.store.block_size)

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block) * len(self.store.sigma)

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        image, condition = self.store.load(block.rows())
        try:
            computed = self.store.features_of(image, condition)
        except ValueError as error:
            data = self.store.work.inputs.data
            first = int(data.training[block.start])
            raise UserError(
                f"examples from {first} ({data.file[first]})",
                f"got {error} (rows from 0). Check that image, or train the model longer.",
            ) from error
        return computed[: len(block)].cpu()

    def shrink(self, error: RuntimeError) -> None:
        self.store.shrink(error)


class NoiseErrors(BlockWork):
    """``error [N, num_draws]`` of all training images."""

    title = "score: errors"
    passes = ((0,),)

    def __init__(self, store: FeatureStore):
        self.store = store
        self.size = fitted_block_size(store.num_images, ERROR_IMAGES_AT_ONCE)
        self.tensors = {"error": ("float32", (store.num_images, len(store.sigma)))}

    def blocks(self) -> list[Block]:
        return blocks_of(self.store.num_images, self.size)

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block) * len(self.store.sigma)

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        image, condition = self.store.load(block.rows())
        sigma, noise = self.store.sigma.to(self.store.device), self.store.noise.to(self.store.device)
        errors = noise_errors(self.store.denoiser, image, condition, sigma, noise)
        return errors[: len(block)]

    def shrink(self, error: RuntimeError) -> None:
        self.size = smaller_batch(error, self.size, "score.batch_size")
