"""Real images: crops of scikit-learn's two photographs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images


@pytest.fixture(scope="session")
def photographs() -> list[np.ndarray]:
    """china.jpg and flower.jpg, uint8 [427, 640, 3] each."""
    return load_sample_images().images


@pytest.fixture
def crop(photographs: list[np.ndarray]) -> Callable[..., np.ndarray]:
    """``crop(i)``: the i-th piece of a photograph, uint8 [16, 16, 3]; ``crop(i, height, width)`` for other sizes."""

    def cut(index: int, height: int = 16, width: int = 16) -> np.ndarray:
        row, column = 20 * (index % 15) + 60, 20 * (index // 15)
        return photographs[index % 2][row : row + height, column : column + width]

    return cut


@pytest.fixture
def photo_folder(tmp_path: Path, crop: Callable[..., np.ndarray]) -> Path:
    """Six colour PNG files in two nested class folders."""
    folder = tmp_path / "photos"
    for index in range(6):
        path = folder / ("china", "flower")[index % 2] / "deep" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop(index)).save(path)
    return folder
