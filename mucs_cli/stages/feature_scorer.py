"""Scores from gradient features: dot products, directly or through the inverse of the features' kernel."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mucs_cli.attribution.feature_scores import (
    CHUNK_ENTRIES,
    DampedKernel,
    Features,
    das_scores,
    tracin_scores,
)
from mucs_cli.attribution.gradient_features import residuals
from mucs_cli.attribution.scoring import Block
from mucs_cli.block_file import as_tensor
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress, log
from mucs_cli.stages.feature_store import GROUP, FeatureStore
from mucs_cli.stages.memory import free_memory
from mucs_cli.stages.scorer import Scorer

UNUSED_KEYS = {"identity": ("num_projections", "nonzeros"), "gaussian": ("nonzeros",), "sparse": ()}
"""Keys that have no effect with a projection."""


class FeatureScorer(Scorer):
    """Scores of the queries from their own and the training images' features.

    Args:
        store: the features.
    """

    def __init__(self, store: FeatureStore):
        super().__init__(store.work)
        self.store = store
        self.inputs = {"features": store.fingerprint}
        for key in UNUSED_KEYS[store.config.projection]:
            if f"method.{key}" in store.work.context.typed:
                log.warning("method.%s has no effect with method.projection=%s", key, store.config.projection)

    def prepare(self) -> None:
        self.training = self.store.training()

    def passes(self, queries: Sequence[int]) -> list[Sequence[int]]:
        """Queries that are computed together; see ``GROUP``."""
        groups: dict[int, list[int]] = {}
        for query in queries:
            groups.setdefault(query // GROUP, []).append(query)
        return list(groups.values())

    def load(self, queries: Sequence[int]) -> Tensor:
        """Scores of a pass for all training images; [len(queries), N]."""
        rows = [query % GROUP for query in queries]
        features = torch.zeros(GROUP, self.store.k)
        features[rows] = self.store.query_features(queries)
        return self.all_scores(features)[rows]

    @abstractmethod
    def all_scores(self, queries: Features) -> Tensor:
        """Scores of [16, k] features; [16, N], float32."""

    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        progress.advance(self.cost(block, queries))
        found: Tensor = loaded[:, block.start : block.stop]
        return found

    def shrink(self, error: RuntimeError) -> None:
        self.store.shrink(error)

    def facts(self) -> dict[str, Any]:
        return {
            "seeds": {"features": self.store.config.seed},
            "block_size": self.store.block_size,
            "threads": torch.get_num_threads(),
            "draws": len(self.store.sigma),
            "parameters": self.store.num_parameters,
            "projections": self.store.k,
        }


class DotProductScorer(FeatureScorer):
    """phi_q . phi_i."""

    def all_scores(self, queries: Features) -> Tensor:
        return tracin_scores(self.training, queries, self.store.device)


class KernelScorer(FeatureScorer):
    """Scores through the inverse of the damped kernel.

    Args:
        store: the features; its configuration is a ``KernelConfig``.
        of_kernel: (kernel, features of queries [16, k]) -> [16, N].
    Raises:
        UserError: the kernel does not fit into memory.
    """

    def __init__(self, store: FeatureStore, of_kernel: Callable[[DampedKernel, Features], Tensor]):
        super().__init__(store)
        self.of_kernel = of_kernel
        refuse_too_large(store)

    @cached_property
    def kernel(self) -> DampedKernel:
        """Of the training images' features; made where scores are, in one of several processes."""
        damping = self.store.config.damping  # type: ignore[attr-defined]  # of a KernelConfig
        try:
            return DampedKernel(self.training, damping, device=self.store.device)
        except ValueError as error:
            raise UserError(
                "method.damping", f"got {damping}; {error}. Set more; the features are kept for the next attempt."
            ) from error

    def all_scores(self, queries: Features) -> Tensor:
        return self.of_kernel(self.kernel, queries)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {
            "kernel": "dual" if self.kernel.is_dual else "primal",
            "damping_lambda": self.kernel.damping_lambda,
        }


class DASScorer(KernelScorer):
    """Scores of DAS; its configuration is a ``DASConfig``."""

    def __init__(self, store: FeatureStore):
        super().__init__(store, self.das_scores)
        if store.normalise_each and "method.raw_output" in store.work.context.typed:
            # eps_hat is affine in the network's output, so that their normalised gradients agree up to one sign
            log.warning("method.raw_output has no effect with method.normalise=true")
        self.residual = torch.ones(store.num_images)
        self.num_clamped = 0

    def prepare(self) -> None:
        super().prepare()
        kind = self.store.work.config.method.residual
        if kind != "none":
            self.residual = residuals(as_tensor(self.store.errors()), kind)

    def das_scores(self, kernel: DampedKernel, queries: Features) -> Tensor:
        config = self.store.work.config.method
        scores, num_clamped = das_scores(kernel, queries, self.residual, config.square, config.leverage)
        if num_clamped and not self.num_clamped:
            log.warning(
                "%d of %d training images have a leverage above 0.999, which is taken as that: their scores are too "
                "small; more method.damping or fewer method.num_projections mends it",
                num_clamped,
                kernel.num_examples,
            )
        self.num_clamped = num_clamped
        return scores

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"leverages_clamped": self.num_clamped}


def kernel_bytes(num_images: int, k: int) -> int:
    """Peak memory of the kernel: its matrix, its factor and its inverse in float64, and a piece of the features."""
    return 3 * 8 * min(num_images, k) ** 2 + 3 * 8 * CHUNK_ENTRIES


def refuse_too_large(store: FeatureStore) -> None:
    """Raises UserError where the kernel does not fit into what memory is free."""
    needed, free = kernel_bytes(store.num_images, store.k), free_memory(store.device)
    if free is not None and needed > free:
        side = int(max(0, free - kernel_bytes(0, 0)) / 24) ** 0.5
        raise UserError(
            "method.num_projections",
            f"got {store.k} dimensions for {store.num_images} training images, whose kernel takes {needed / 2**30:.1f} "
            f"GiB; {free / 2**30:.1f} GiB are free. Set at most {max(1, int(side))}, or find more memory.",
        )
