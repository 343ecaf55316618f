"""``data=digits``: the handwritten digits that come with scikit-learn; real images, no download."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.source import Source
from mucs_cli.schemas import DigitsConfig


class DigitsSource(Source):
    """1,797 grayscale images of 8x8 pixels, values 0 to 16 (the number of ink pixels in a 4x4 block), ten classes."""

    levels = 16

    def __init__(self, config: DigitsConfig):
        bundle = load_digits()
        images = bundle.images[: config.limit]
        self.image = images.astype(np.uint8)[:, None]  # [N, 1, 8, 8]; the bundle holds whole numbers as float64
        self.label = bundle.target[: config.limit].astype(np.int64)
        self.class_names = [str(name) for name in bundle.target_names]
        self.label_column = "label"
        self.files = [f"digits[{index}]" for index in range(len(images))]
        self.metadata = {"label": [self.class_names[label] for label in bundle.target[: config.limit]]}
        self.state = fingerprint(self.image, self.label)
        self.facts = {
            "name": "Optical Recognition of Handwritten Digits: the test set, 1,797 images of 8x8 pixels",
            "source": "UCI Machine Learning Repository, "
            "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits; "
            "the copy in scikit-learn (sklearn.datasets.load_digits)",
            "licence": "CC BY 4.0",
            "citation": "E. Alpaydin, C. Kaynak (1998). Optical Recognition of Handwritten Digits. "
            "UCI Machine Learning Repository. https://doi.org/10.24432/C50P49",
        }

    def open(self, scratch: Path) -> None:
        """Nothing is left to read."""

    def shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def read(self, start: int, stop: int) -> Iterator[np.ndarray]:
        yield from self.image[start:stop]
