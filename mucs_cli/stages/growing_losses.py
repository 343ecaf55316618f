"""The base model's losses, computed image by image and draw by draw as they are asked for, and kept for all queries."""

import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mucs_cli.artifacts import fingerprint, write_tensors
from mucs_cli.block_file import map_tensor, map_tensors
from mucs_cli.errors import UserError
from mucs_cli.locks import locked
from mucs_cli.runtime import log
from mucs_cli.stages.engine import BASE_MODEL, Engine, loss_inputs
from mucs_cli.stages.work import Work
from mucs_cli.tensor_forms import require_forms

FORMS = {"loss": "float32 N n", "crc32": "int64 N"}
GROWING = "_growing"
"""The folder below ``score/`` that holds the files."""


class GrowingLosses:
    """Losses [N, n] of the base model, in memory and in a file that grows.

    A row of the file is believed where its checksum is right; after a crash it is computed again. Processes that share
    the file add to it one after the other, and read it once.

    Args:
        work: names dataset and base model.
        engine: computes them.
        bank_print: the bank's fingerprint.
    Attributes:
        loss: [N, n], float32; NaN where nothing is known.
    """

    def __init__(self, work: Work, engine: Engine, bank_print: str):
        self.engine = engine
        shape = (engine.num_images, len(engine.bank))
        inputs = loss_inputs(work, engine, bank_print, BASE_MODEL)
        self.path = work.context.folder("score", GROWING, fingerprint(inputs)[:16], "losses.growing")
        with locked(self.path.parent):
            if not is_of_shape(self.path, shape):
                create(self.path, shape)
            shared, check = self._maps()
            self.loss: NDArray[np.float32] = np.array(shared)
            self.loss[[zlib.crc32(row) for row in self.loss] != np.asarray(check)] = np.nan

    def _maps(self) -> tuple[np.memmap, np.memmap]:
        return map_tensor(self.path, "loss", writable=True), map_tensor(self.path, "crc32", writable=True)

    def require(self, rows: NDArray[np.int64], draws: NDArray[np.int64]) -> None:
        """Computes and keeps what is missing of the losses of pairs of a training row and a draw, [P] each.

        Raises:
            UserError: one is not finite.
        """
        missing = np.isnan(self.loss[rows, draws])
        if missing.any():
            self._compute(rows[missing], draws[missing])

    def _compute(self, rows: NDArray[np.int64], draws: NDArray[np.int64]) -> None:
        loss = self.engine.pair_losses(rows, draws, {}).numpy()
        if not np.isfinite(loss).all():
            self.engine.refuse_image(int(rows[~np.isfinite(loss)][0]))
        self.loss[rows, draws] = loss
        with locked(self.path.parent):
            shared, check = self._maps()
            for row in np.unique(rows):
                if zlib.crc32(shared[row].tobytes()) != check[row]:  # a process died while it wrote, or a bit flipped
                    shared[row] = np.nan
            shared[rows, draws] = loss
            for row in np.unique(rows):
                check[row] = zlib.crc32(shared[row].tobytes())


def is_of_shape(path: Path, shape: tuple[int, int]) -> bool:
    """Whether the file is there, with room for losses of that shape; a link, which could lead anywhere, is not."""
    if path.is_symlink() or not path.exists():
        return False
    try:
        found = map_tensors(path, list(FORMS))
        require_forms(path, found, FORMS, "score", N=shape[0], n=shape[1])
        return True
    except UserError:
        pass
    log.warning("%s is damaged; computing it again", path)
    return False


def create(path: Path, shape: tuple[int, int]) -> None:
    """A file without losses."""
    loss = torch.full(shape, torch.nan)
    check = torch.full(shape[:1], zlib.crc32(loss[0].numpy().data), dtype=torch.int64)
    write_tensors(path, {"loss": loss, "crc32": check})
