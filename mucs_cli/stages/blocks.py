"""Filling a file block by block: passes over the training images that go on where an interrupted attempt stopped.

Several processes share the blocks out: in every round each computes one, the first one writes them. A block's bits do
not depend on which process computed it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint
from mucs_cli.attribution.scoring import Block
from mucs_cli.block_file import BlockFile, map_tensor
from mucs_cli.errors import DamagedError
from mucs_cli.runtime import REHEARSED_SECONDS, Progress, is_out_of_memory
from mucs_cli.stage_folder import Stage

Arrays = dict[str, np.memmap]
T = TypeVar("T")


class BlockWork(ABC):
    """What is computed for every block of training images, in one or several passes over them.

    Attributes:
        title, unit: for the progress line.
        tensors: of the file; name -> (dtype, shape), see ``BlockFile``.
        passes: what each pass is for, for example its queries.
        is_long: whether several processes share the blocks; else the first one computes them all.
        tells_progress: ``compute`` counts as it goes, and not the whole block once it is stored.
    """

    title: str
    unit: str = "evaluations"
    is_long: bool = True
    tells_progress: bool = False
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
    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        """A block of a pass; float32, on the CPU."""

    def places(self, arrays: Arrays, block: Block, part: Sequence[int]) -> list[np.ndarray]:
        """Where a block of a pass goes: a view of the arrays for each row of what ``compute`` gives.

        As it is: the rows of the block's images, in the only tensor.
        """
        (array,) = arrays.values()
        return list(array[block.start : block.stop])

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
    if work.is_long:
        fill_blocks(path, identity, work)
    else:
        processes.on_first(lambda: fill_blocks(path, identity, work))


def fill_blocks(path: Path, identity: str, work: BlockWork) -> None:
    """As ``fill_file``, in all the processes that are there."""
    while True:
        blocks = work.blocks() if work.passes else []
        size = blocks[0].size if blocks else 0
        # blocks are numbered pass by pass: other passes are other blocks
        passes = fingerprint([list(part) for part in work.passes])
        file = BlockFile(path, work.tensors, f"{identity}/{size}/{passes}") if processes.is_first() else None
        if file is not None:
            work.begin(file.arrays)
        done = set(processes.on_first(partial(finished_blocks, file, work, blocks)))
        todo = [[b for b in blocks if p * len(blocks) + b.index not in done] for p in range(len(work.passes))]
        total = sum(work.cost(b, part) for part in work.passes for b in blocks)
        left = sum(work.cost(b, part) for part, some in zip(work.passes, todo, strict=True) for b in some)
        try:
            setups = sum(bool(some) for some in todo)
            with Progress(work.title, total, work.unit, total - left, REHEARSED_SECONDS, setups) as progress:
                for p, part in enumerate(work.passes):
                    if not todo[p]:
                        continue
                    loaded = None  # the last pass's are to go before the next ones come
                    with progress.setup():
                        loaded = within_memory(partial(work.load, part))
                    for start in range(0, len(todo[p]), processes.count()):
                        chosen = todo[p][start : start + processes.count()]
                        found = compute_round(work, chosen, part, loaded, progress)
                        if file is not None:
                            for block, computed in zip(chosen, found, strict=True):
                                places = work.places(file.arrays, block, part)
                                for place, row in zip(places, computed, strict=True):
                                    place[...] = row.numpy()
                                file.commit(p * len(blocks) + block.index, *places)
                                if not work.tells_progress or block is not chosen[0]:
                                    progress.advance(work.cost(block, part))
            if file is not None:
                file.finish(keep_journal=True)
            return
        except RuntimeError as error:
            work.shrink(error)


def finished_blocks(file: BlockFile | None, work: BlockWork, blocks: Sequence[Block]) -> list[int]:
    """The blocks that an interrupted attempt has left, numbered pass by pass."""
    if file is None:
        return []
    numbered = enumerate((part, block) for part in work.passes for block in blocks)
    return [number for number, (part, block) in numbered if file.holds(number, *work.places(file.arrays, block, part))]


def compute_round(
    work: BlockWork, blocks: Sequence[Block], part: Sequence[int], loaded: Any, progress: Progress
) -> list[Tensor]:
    """A block in each process; all of them, in order, in the first process, and nothing in the others."""
    rank = processes.rank()
    mine = partial(work.compute, blocks[rank], part, loaded, progress) if rank < len(blocks) else lambda: None
    return [computed for computed in processes.gather(within_memory(mine)) if computed is not None]


def within_memory(compute: Callable[[], T]) -> T:
    """What ``compute`` gives, unless the memory of any process is too small for what it does there.

    Raises:
        torch.OutOfMemoryError, or the allocator's RuntimeError: in all processes.
    """
    failed: RuntimeError | None = None
    try:
        found = compute()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = error
    if processes.is_true_anywhere(failed is not None):
        raise failed or torch.OutOfMemoryError("in another process")
    return found


# --- what several variants share -------------------------------------------------------------------------------------


def find_kept(path: Path, name: str, inputs: Mapping[str, Any]) -> np.memmap | None:
    """A tensor that ``kept_tensor`` left, memory-mapped; None where it is not there, or is damaged.

    Args:
        path: its file, in a folder of its own.
        name: of the tensor.
        inputs: all that it depends on; JSON values.
    """
    return map_tensor(path, name) if shared_stage(path, inputs).is_done(claim=False) else None


def kept_tensor(
    path: Path, name: str, inputs: Mapping[str, Any], work: BlockWork, facts: Mapping[str, Any] | None = None
) -> np.memmap:
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
    found, (dtype, shape) = map_tensor(path, name), work.tensors[name]
    if (found.dtype.name, found.shape) != (dtype, shape):
        raise DamagedError(
            str(path), f"got {found.dtype} {list(found.shape)}; expected {dtype} {list(shape)}. Delete {path.parent}."
        )
    return found


def shared_stage(path: Path, inputs: Mapping[str, Any]) -> Stage:
    return Stage(path.parent, "score", {"config": {}, "inputs": dict(inputs)}, replace=True)
