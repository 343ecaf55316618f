"""What a kind of data set has to offer, so that everything after it (cache, index, fingerprint, split) is shared."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from mucs_cli.errors import UserError


class Source(ABC):
    """Images in a fixed order.

    Making a source is cheap (a listing), since it happens at every start of every stage; it sets ``state``, ``folder``
    and ``facts``. ``open`` finds out the rest, and images are decoded once a run.

    Attributes:
        state: changes whenever pixels, labels, metadata or conditions may have changed; equal states need no opening.
        folder: where the original files are, or None.
        facts: name, source, licence and citation, for the report.

    Attributes set by ``open``, and narrowed by ``drop``:
        files: relative POSIX paths, or names where there are no files; position is the example_id.
        levels: largest raw value.
        label: int64 [N], or None.
        class_names: name of each label value; distinct.
        label_column: the metadata column that holds each image's class name, or None.
        metadata: further columns, each of N strings.
        condition_shape: (vectors an image, their length), or None.
        condition_state: changes whenever the conditions may have changed.
    """

    state: str
    folder: Path | None = None
    facts: dict[str, str]

    files: list[str]
    levels: int = 255
    label: np.ndarray | None = None
    class_names: list[str]
    label_column: str | None = None
    metadata: dict[str, list[str]]
    condition_shape: tuple[int, int] | None = None
    condition_state: str = ""

    @abstractmethod
    def open(self, scratch: Path) -> None:
        """Reads everything but pixels and vectors.

        Args:
            scratch: a folder that may be made and filled; it is deleted once the images are decoded.
        Raises:
            UserError: labels or metadata cannot be used.
        """

    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W), the same for every image. A source that may skip images drops those that cannot be opened.

        Raises:
            UserError: the images do not have one shape, or cannot be used.
        """

    @abstractmethod
    def read(self, start: int, stop: int) -> Iterator[np.ndarray | UserError]:
        """Decodes images ``start`` to ``stop - 1``, in order; each uint8 [C, H, W]. Called after ``shape``.

        Where a source may skip images, the error that one gives stands in its place.

        Raises:
            UserError: an image cannot be read, and is not to be skipped.
        """

    @property
    def skipped(self) -> dict[str, str]:
        """File -> reason, of the images left out so far because they cannot be read."""
        return {}

    def drop(self, reasons: dict[int, str]) -> None:
        """Leaves out the images at the positions that are the keys; later ones move up."""
        positions: Collection[int] = reasons
        kept = [index for index in range(len(self.files)) if index not in positions]
        self.files = [self.files[index] for index in kept]
        self.metadata = {name: [column[index] for index in kept] for name, column in self.metadata.items()}
        if self.label is not None:
            self.label = self.label[kept]

    def read_conditions(self, start: int, stop: int) -> np.ndarray:
        """Vectors of images ``start`` to ``stop - 1``, float32 [stop - start, *condition_shape].

        Raises:
            UserError: they cannot be read, or are not finite.
        """
        raise NotImplementedError("this data set has no condition vectors")
