"""A user's condition vectors: a safetensors file with tensor ``condition``, which image has which row."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mucs_cli.block_file import map_tensor
from mucs_cli.data.labels import is_number
from mucs_cli.errors import UserError
from mucs_cli.files import user_path

TENSOR = "condition"
INDEX_COLUMN = "condition_index"


def find_file(text: str, folder: Path, key: str = "data.condition_file") -> Path:
    """The condition file that the value of ``key`` names: in ``folder``, or relative to where the command is typed.

    Raises:
        UserError: there is no such file.
    """
    candidates = [folder / text, Path(os.path.abspath(user_path(text)))]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        key,
        f"got {text}; no file {' or '.join(map(str, dict.fromkeys(candidates)))}. Set it to a safetensors file.",
    )


class ConditionFile:
    """The vectors of N images.

    An image's row is its number in the metadata column ``condition_index`` where there is one; otherwise the rows are
    in the order of the sorted file names, one an image.

    Args:
        path: the safetensors file.
        files: names of the N images, sorted.
        index: the column ``condition_index``, or None.
    Attributes:
        vectors: float32 [R, k, d], memory-mapped.
        row: int64 [N].
    Raises:
        UserError: the file cannot be read, has no float32 tensor ``condition`` of rank 2 or 3, or rows and images do
            not match.
    """

    def __init__(self, path: Path, files: Sequence[str], index: Sequence[str] | None):
        self.path = path
        vectors = map_tensor(path, TENSOR)
        if vectors.dtype != np.float32 or vectors.ndim not in (2, 3) or 0 in vectors.shape:
            raise UserError(
                str(path),
                f"got {TENSOR!r} {vectors.dtype} {list(vectors.shape)}; expected float32 [N, d] or [N, k, d]. "
                "Convert it.",
            )
        self.vectors = vectors if vectors.ndim == 3 else vectors[:, None]
        if index is None:
            if len(vectors) != len(files):
                raise UserError(
                    str(path),
                    f"got {len(vectors)} rows for {len(files)} images; expected one an image, in the order of the "
                    f"sorted file names. Add the column {INDEX_COLUMN} to the metadata, or correct the file.",
                )
            self.row = np.arange(len(files))
        else:
            self.row = np.array(
                [self._row(text, file) for text, file in zip(index, files, strict=True)], dtype=np.int64
            )

    def _row(self, text: str, file: str) -> int:
        if not (is_number(text) and int(text) < len(self.vectors)):
            raise UserError(
                file,
                f"got {INDEX_COLUMN} {text!r}; expected a row of {self.path}, 0 to {len(self.vectors) - 1}. "
                "Correct the metadata.",
            )
        return int(text)

    @property
    def shape(self) -> tuple[int, int]:
        """(k, d)"""
        return int(self.vectors.shape[1]), int(self.vectors.shape[2])

    def read(self, rows: Sequence[int]) -> np.ndarray:
        """The vectors of some of the N images; float32 [len(rows), k, d].

        Raises:
            UserError: one is not finite.
        """
        wanted = self.row[np.asarray(rows, dtype=np.int64)]
        vectors = np.array(self.vectors[wanted])
        finite = np.isfinite(vectors).all(axis=(1, 2))
        if not finite.all():
            raise UserError(
                str(self.path), f"got row {wanted[~finite][0]} with values that are not finite. Correct the file."
            )
        return vectors
