"""What ``mucs score`` asks of a method: inputs, a long preparation, and scores block by block."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mucs_cli.attribution.scoring import Block, blocks_of
from mucs_cli.runtime import Progress
from mucs_cli.stages.work import Work

BLOCK_SIZE = 1024
"""Training images that are scored at once by methods without a forward pass of the model."""


class Scorer(ABC):
    """Scores of some queries for all training images. Making one checks what the method needs, and is quick.

    Attributes:
        work: what it works with.
        inputs: fingerprints of what the scores depend on beyond model, data, queries and configuration; a mapping is
            one fingerprint a query.
        unit: what ``cost`` counts, for the progress line.
        is_long: whether several processes share the blocks: ``load`` and ``scores`` run in all of them then, else in
            the first one only. ``prepare`` runs in all.
    """

    unit = "scores"
    is_long = False

    def __init__(self, work: Work):
        self.work = work
        self.inputs: dict[str, Any] = {}

    def prepare(self) -> None:
        """Whatever takes long and is kept: features, base losses. Goes on where an interrupted attempt stopped."""
        return

    def blocks(self) -> list[Block]:
        """The blocks of the training images."""
        return blocks_of(self.work.num_images, min(BLOCK_SIZE, self.work.num_images))

    def passes(self, queries: Sequence[int]) -> list[Sequence[int]]:
        """The queries of each pass over the training images."""
        return [queries]

    def cost(self, block: Block, queries: Sequence[int]) -> int:
        """How much of ``unit`` a block takes."""
        return len(block) * len(queries)

    def load(self, queries: Sequence[int]) -> Any:
        """What a pass needs."""
        return None

    @abstractmethod
    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        """Scores of a pass's queries for one block, and the block's ``cost`` told to ``progress``.

        Returns:
            [len(queries), len(block)], finite, higher = more influential.
        """

    def shrink(self, error: RuntimeError) -> None:
        """Makes the blocks smaller after running out of memory; any other error is raised again."""
        raise error

    def write_files(self, folder: Path, query_ids: Sequence[int]) -> list[Path]:
        """Writes what belongs beside the scores, into ``folder``; returns the paths.

        Args:
            query_ids: all queries of the score file, those of earlier commands included.
        """
        return []

    def facts(self) -> dict[str, Any]:
        """What the manifest is to record."""
        return {}
