"""``data=digits``: the handwritten digits that come with scikit-learn; real images, no download."""

import gzip
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.source import Source
from mucs_cli.schemas import DigitsConfig


class DigitsSource(Source):
    """1,797 grayscale images of 8x8 pixels, values 0 to 16 (the number of ink pixels in a 4x4 block), ten classes."""

    levels = 16

    def __init__(self, config: DigitsConfig):
        table = read_digits()[: config.limit]
        self.image = table[:, :-1].reshape(-1, 1, 8, 8)
        self.label = table[:, -1].astype(np.int64)
        self.class_names = [str(digit) for digit in range(10)]
        self.label_column = "label"
        self.files = [f"digits[{index}]" for index in range(len(table))]
        self.metadata = {"label": [self.class_names[label] for label in self.label]}
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


def read_digits() -> np.ndarray:
    """scikit-learn's digits, uint8 [1797, 65]: 64 pixels a row, and the label.

    From the file that ``load_digits`` reads, where it is: importing scikit-learn takes every command a second.
    """
    package = find_spec("sklearn")
    folders = [] if package is None else package.submodule_search_locations or []
    path = Path(*folders[:1], "datasets", "data", "digits.csv.gz")
    if path.is_file():
        with gzip.open(path, "rt") as file:
            return np.loadtxt(file, delimiter=",", dtype=np.float64).astype(np.uint8)
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return np.column_stack([bundle.data, bundle.target]).astype(np.uint8)
