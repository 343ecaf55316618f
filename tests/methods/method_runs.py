"""What the tests of methods share: sizes of the runs in conftest.py, and commands and files of a run."""

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits, load_sample_images

NUM_IMAGES, NUM_QUERIES = 90, 3
"""Of the run of digits, ``finished``."""
NUM_PICTURES, SIDE = 40, 16
"""Of the run of pictures in a folder, ``planted``."""
PLANTED = (7, 22)
"""Training images of the folder of which the two queries are exact copies."""


def queries_of(run: Path) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in load_file(run / "sample" / "samples.safetensors").items()}


def stamps(folder: Path) -> dict[Path, int]:
    """When each file was written; logs grow with every command."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}


def digits() -> np.ndarray:
    """The training pictures of ``finished`` from their source, [N, 64] in [-1, 1]."""
    return load_digits().images[:NUM_IMAGES].reshape(NUM_IMAGES, -1) / 8 - 1


def cut_photographs(folder: Path) -> list[Path]:
    """Colour squares of two photographs as PNG, in a folder a class; sorted, and so in the order of their ids."""
    for number, picture in enumerate(load_sample_images().images):
        for i in range(NUM_PICTURES // 2):
            top, left = 40 + 17 * i, 25 + 29 * i
            path = folder / ("temple", "flower")[number] / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture[top : top + SIDE, left : left + SIDE]).save(path)
    return sorted(folder.glob("*/*.png"))
