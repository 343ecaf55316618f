"""Filling a file block by block: passes over the training images that go on where an interrupted attempt stopped."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mucs_cli.artifacts import BlockFile, Stage, fingerprint, map_tensor
from mucs_cli.attribution.scoring import Block
from mucs_cli.runtime import REHEARSED_SECONDS, Progress

Arrays = dict[str, np.memmap]


class BlockWork(ABC):
    """What is computed for every block of training images, in one or several passes over them.

    Attributes:
        title, unit: for the progress line.
        tensors: of the file; name -> (dtype, shape), see ``BlockFile``.
        passes: what each pass is for, for example its queries.
    """

    title: str
    unit: str = "evaluations"
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    passes: Sequence[Sequence[int]]

    @abstractmethod
    def blocks(self) -> list[Block]:
        """The blocks of the training images; all of one size."""

    @abstractmethod
    def cost(self, block: Block, part: Sequence[int]) -> int:
        """How much of ``unit`` a block of a pass takes."""

    def begin(self, arrays: Arrays) -> None:
        """Fills in what needs no computation."""
        return

    def load(self, part: Sequence[int]) -> Any:
        """What a pass needs; loaded once a pass, and only if a block of it is left."""
        return None

    @abstractmethod
    def fill(self, arrays: Arrays, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> None:
        """Computes a block of a pass and stores it in ``arrays``."""

    def shrink(self, error: RuntimeError) -> None:
        """Makes the blocks smaller after running out of memory; any other error is raised again."""
        raise error


def fill_file(path: Path, identity: str, work: BlockWork) -> None:
    """Computes every block of every pass that an interrupted attempt has not, and puts the file in place.

    Args:
        path: the finished file.
        identity: of what is being computed; a partial file of another identity, or of other blocks, is begun afresh.
        work: what to compute.
    """
    while True:
        blocks = work.blocks()
        size = blocks[0].size if blocks else 0
        file = BlockFile(path, work.tensors, f"{identity}/{size}")
        work.begin(file.arrays)
        todo = [[b for b in blocks if p * len(blocks) + b.index not in file.done] for p in range(len(work.passes))]
        total = sum(work.cost(b, part) for part in work.passes for b in blocks)
        left = sum(work.cost(b, part) for part, some in zip(work.passes, todo, strict=True) for b in some)
        try:
            setups = sum(bool(some) for some in todo)
            with Progress(work.title, total, work.unit, total - left, REHEARSED_SECONDS, setups) as progress:
                for p, part in enumerate(work.passes):
                    if not todo[p]:
                        continue
                    with progress.setup():
                        loaded = work.load(part)
                    for block in todo[p]:
                        work.fill(file.arrays, block, part, loaded, progress)
                        file.commit(p * len(blocks) + block.index)
            file.finish(keep_journal=True)
            return
        except RuntimeError as error:
            work.shrink(error)


# --- what several variants share -------------------------------------------------------------------------------------


def find_kept(path: Path, name: str, inputs: Mapping[str, Any]) -> np.ndarray | None:
    """A tensor that ``kept_tensor`` left, memory-mapped; None where it is not there, or is damaged.

    Args:
        path: its file, in a folder of its own.
        name: of the tensor.
        inputs: all that it depends on; JSON values.
    """
    return map_tensor(path, name) if shared_stage(path, inputs).is_done(claim=False) else None


def kept_tensor(
    path: Path, name: str, inputs: Mapping[str, Any], work: BlockWork, facts: Mapping[str, Any] | None = None
) -> np.ndarray:
    """A tensor over all training images, memory-mapped: as it was left, or computed and left for other variants.

    Where another process is computing it, for another variant perhaps, it is waited for.

    Args:
        path, name, inputs: as in ``find_kept``.
        work: what computes it.
        facts: what else its manifest is to record.
    """
    stage = shared_stage(path, inputs)
    if not stage.is_done():
        stage.begin()
        fill_file(path, fingerprint(inputs), work)
        stage.finish({"counts": {"images": work.tensors[name][1][0]}, **(facts or {})}, [path])
    return map_tensor(path, name)


def shared_stage(path: Path, inputs: Mapping[str, Any]) -> Stage:
    return Stage(path.parent, "score", {"config": {}, "inputs": dict(inputs)}, replace=True)
