"""Scores that ask no diffusion model: chance, and how alike pictures or conditions are."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mucs_cli.attribution.scoring import GRANULE, Block, blocks_of
from mucs_cli.attribution.similarity import break_ties, condition_similarity, random_scores
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress
from mucs_cli.stages.scorer import BLOCK_SIZE, Scorer
from mucs_cli.stages.work import Work

ROWS_BYTES = 256 * 2**20
"""Of whole rows of scores that are held at once."""
BLOCK_VALUES = 2**22
"""Pixels of a block of training images; twice as much again is needed in float64."""


class PictureScorer(Scorer):
    """Likeness of a query's picture and each training picture; in latent models too, pictures are compared.

    Args:
        work: what it works with.
        describe: pictures [B, C, H, W] in [-1, 1] -> their vectors [B, d], each from its own picture alone.
        compare: vectors of the queries [Q, d] and of a block [B, d] -> scores [Q, B], higher = more alike.
    """

    def __init__(self, work: Work, describe: Callable[[Tensor], Tensor], compare: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(work)
        self.describe, self.compare = describe, compare

    def blocks(self) -> list[Block]:
        pixels = self.work.inputs.pixels
        size = BLOCK_VALUES // (pixels.channels * pixels.height * pixels.width)
        return blocks_of(self.work.num_images, min(max(size, GRANULE), BLOCK_SIZE, self.work.num_images))

    def load(self, queries: Sequence[int]) -> Tensor:
        return self.describe(self.work.queries.picture[list(queries)])

    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        pixels = self.work.inputs.pixels
        training = self.describe(pixels.images(pixels.training[block.rows().numpy()]))
        progress.advance(self.cost(block, queries))
        return self.compare(loaded, training)[:, : len(block)]


class WholeRowScorer(Scorer):
    """Scores of which a query's whole row is made at once."""

    @abstractmethod
    def row(self, query: int) -> Tensor:
        """A query's scores; [N], float32, finite."""

    def passes(self, queries: Sequence[int]) -> list[Sequence[int]]:
        size = max(1, ROWS_BYTES // (4 * self.work.num_images))
        return [queries[start : start + size] for start in range(0, len(queries), size)]

    def load(self, queries: Sequence[int]) -> Tensor:
        return torch.stack([self.row(query) for query in queries])

    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        progress.advance(self.cost(block, queries))
        rows: Tensor = loaded[:, block.start : block.stop]
        return rows


class RandomScorer(WholeRowScorer):
    """Uniform scores in [0, 1), from ``method.seed`` and the query's number."""

    def row(self, query: int) -> Tensor:
        return random_scores(self.work.config.method.seed, [query], self.work.num_images)[0]

    def facts(self) -> dict[str, Any]:
        return {"seeds": {"scores": self.work.config.method.seed}}


class ConditionScorer(WholeRowScorer):
    """1 for the query's class and 0 for others, or the cosine of two condition vectors; ties in a seeded random order.

    Raises:
        UserError: the model is unconditional, or data or queries have no conditions.
    """

    def __init__(self, work: Work):
        super().__init__(work)
        network, data = work.inputs.model.denoiser.network, work.inputs.data
        lacking = [
            what
            for what, is_there in (
                ("a model without conditions", network.is_conditional),
                ("data without classes or condition vectors", data.condition is not None or data.label is not None),
                ("queries without conditions", work.queries.condition is not None),
            )
            if not is_there
        ]
        if lacking:
            raise UserError(
                "method",
                f"got condition with {' and '.join(lacking)}; expected a conditional model. Use another method, or "
                "train with model.conditional=true.",
            )

    def row(self, query: int) -> Tensor:
        data, condition = self.work.inputs.data, self.work.queries.condition_of(query)
        parts = []
        for block in self.blocks():
            training = data.conditions(data.training[block.rows().numpy()])
            assert training is not None and condition is not None  # checked at the start
            parts.append(condition_similarity(condition, training)[0, : len(block)])
        return break_ties(torch.cat(parts), self.work.config.method.seed, query)

    def facts(self) -> dict[str, Any]:
        return {"seeds": {"ties": self.work.config.method.seed}}
