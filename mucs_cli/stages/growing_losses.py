"""The base model's losses, computed image by image and draw by draw as they are asked for, and kept for all queries."""

import zlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mucs_cli.artifacts import fingerprint, map_tensor, write_tensors
from mucs_cli.locks import locked
from mucs_cli.stages.engine import BASE_MODEL, Engine, loss_inputs
from mucs_cli.stages.work import Work


class GrowingLosses:
    """Losses [N, n] of the base model in a file that grows.

    A row is believed where its checksum is right: after a crash, or where another process is just writing the same
    numbers, it is computed again.

    Args:
        work: names dataset and base model.
        engine: computes them.
        bank_print: the bank's fingerprint.
    Attributes:
        loss: [N, n], float32, memory-mapped; NaN where nothing was computed.
    """

    def __init__(self, work: Work, engine: Engine, bank_print: str):
        self.engine = engine
        shape = (engine.num_images, len(engine.bank))
        inputs = loss_inputs(work, engine, bank_print, BASE_MODEL)
        path = work.context.folder("score", "_growing", fingerprint(inputs)[:16], "losses.safetensors")
        create(path, shape)
        self.loss = map_tensor(path, "loss", writable=True)
        self.check = map_tensor(path, "crc32", writable=True)
        checks = np.fromiter((zlib.crc32(row) for row in np.asarray(self.loss)), np.int64, shape[0])
        self.believed = checks == self.check

    def require(self, rows: NDArray[np.int64], draws: NDArray[np.int64]) -> None:
        """Computes and keeps what is missing of the losses of pairs of a training row and a draw, [P] each.

        Raises:
            UserError: one is not finite.
        """
        missing = ~self.believed[rows] | np.isnan(self.loss[rows, draws])
        if missing.any():
            self._compute(rows[missing], draws[missing])

    def _compute(self, rows: NDArray[np.int64], draws: NDArray[np.int64]) -> None:
        loss = self.engine.pair_losses(rows, draws, {}).numpy()
        if not np.isfinite(loss).all():
            self.engine.refuse_image(int(rows[~np.isfinite(loss)][0]))
        touched = np.unique(rows)
        self.loss[touched[~self.believed[touched]]] = np.nan
        self.loss[rows, draws] = loss
        self.check[touched] = [zlib.crc32(row) for row in np.asarray(self.loss[touched])]
        self.believed[touched] = True


def create(path: Path, shape: tuple[int, int]) -> None:
    """A file without losses, where there is none."""
    with locked(path.parent):
        if not path.exists():
            loss = torch.full(shape, torch.nan)
            check = torch.full(shape[:1], zlib.crc32(loss[0].numpy().data), dtype=torch.int64)
            write_tensors(path, {"loss": loss, "crc32": check})
