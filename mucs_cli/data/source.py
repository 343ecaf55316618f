"""What a kind of data set has to offer, so that everything after it (cache, index, fingerprint, split) is shared."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Source(ABC):
    """Images in a fixed order, described before any of them is decoded.

    Opening a source is cheap (a listing): it happens at every start of every stage. Decoding happens once a run.

    Attributes:
        files: relative POSIX paths, or names where there are no files; position is the example_id.
        levels: largest raw value.
        label: int64 [N], or None.
        class_names: name of each label value.
        metadata: further columns, each of N strings.
        facts: name, source, licence and citation, for the report.
        folder: where the original files are, or None.
        state: changes whenever pixels or labels may have changed; equal states need no decoding.
    """

    files: list[str]
    levels: int
    label: np.ndarray | None = None
    class_names: list[str]
    metadata: dict[str, list[str]]
    facts: dict[str, str]
    folder: Path | None = None
    state: str

    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for every image.

        Raises:
            UserError: the images do not have one shape, or cannot be used.
        """

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Decodes images ``start`` to ``stop - 1``, in order; each uint8 [C, H, W]. Called after ``shape``.

        Raises:
            UserError: an image cannot be read.
        """
