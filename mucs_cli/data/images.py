"""The training images of a run as the rest of the package sees them: pixels, labels, conditions, metadata."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Raw pixels decoded, or read back for statistics, at once."""


@dataclass(eq=False)
class ImageDataset:
    """Images with stable ids; ``example_id`` is the position along the first axis of ``raw``.

    Attributes:
        raw: uint8 [N, C, H, W], memory-mapped, read-only; pixel = 2 * raw / levels - 1.
        levels: largest raw value (255 for 8-bit files, 16 for the digits).
        file: N relative POSIX paths, or names such as "digits[17]".
        sha256: N hashes of the raw pixels with their shape; equal for exact copies.
        label: int64 [N]; None without labels.
        num_classes: 0 without labels.
        class_names: the name of each label value.
        metadata: further columns of N strings, shown in scores and report.
        training: int64, sorted example_ids that are trained on and scored: all but the held-out ones.
        facts: name, source, licence, citation.
        fingerprint: SHA-256 of pixels, levels, ids, files, labels, conditions and split; not of where the folder lies.
        folder: where the original files are; None where there are none.
        condition: vectors, float32 [N, k, d], memory-mapped, read-only, k of them an image; None without vectors.
    """

    raw: np.ndarray
    levels: int
    file: list[str]
    sha256: list[str]
    label: np.ndarray | None
    num_classes: int
    class_names: list[str]
    metadata: dict[str, list[str]]
    training: np.ndarray
    facts: dict[str, str]
    fingerprint: str
    folder: Path | None
    condition: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.raw)

    def images(self, example_ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """float32 [B, C, H, W] in [-1, 1], exactly -1 for raw 0 and 1 for raw ``levels``."""
        return to_pixels(np.asarray(self.raw[np.asarray(example_ids)]), self.levels)

    def labels(self, example_ids: Sequence[int] | np.ndarray | Tensor) -> Tensor | None:
        """int64 [B]; None without labels."""
        return None if self.label is None else torch.from_numpy(self.label[np.asarray(example_ids)])

    def conditions(
        self, example_ids: Sequence[int] | np.ndarray | Tensor, choice: Tensor | None = None
    ) -> Tensor | None:
        """What each image is conditioned on: its vector where the data has vectors, else its label, else None.

        Args:
            example_ids: B of them.
            choice: which of the k vectors of each image, int64 [B] in 0..k-1; None: the first.
        Returns:
            float32 [B, d], int64 [B], or None.
        """
        if self.condition is None:
            return self.labels(example_ids)
        ids = np.asarray(example_ids)
        chosen = np.zeros(len(ids), dtype=np.int64) if choice is None else choice.numpy()
        return torch.from_numpy(np.array(self.condition[ids, chosen]))

    @cached_property
    def held_out(self) -> np.ndarray:
        """int64, sorted example_ids that are not trained on."""
        return np.setdiff1d(np.arange(len(self)), self.training)

    @property
    def condition_dim(self) -> int:
        """Length of a condition vector; 0 without vectors."""
        return 0 if self.condition is None else int(self.condition.shape[2])

    @property
    def conditions_per_image(self) -> int:
        """k, the number of vectors an image; 0 without vectors."""
        return 0 if self.condition is None else int(self.condition.shape[1])

    @property
    def channels(self) -> int:
        return int(self.raw.shape[1])

    @property
    def height(self) -> int:
        return int(self.raw.shape[2])

    @property
    def width(self) -> int:
        return int(self.raw.shape[3])

    @property
    def num_duplicates(self) -> int:
        """How many images are exact copies of an earlier one."""
        return len(self.sha256) - len(set(self.sha256))

    @cached_property
    def _raw_counts(self) -> np.ndarray:
        """int64 [levels + 1]: how often each raw value occurs in the training images."""
        counts = np.zeros(self.levels + 1, dtype=np.int64)
        size = block_size(self.raw.shape[1:])
        for start in range(0, len(self.training), size):
            block = self.raw[self.training[start : start + size]]
            counts += np.bincount(block.ravel(), minlength=self.levels + 1)
        return counts

    @property
    def mean_square(self) -> float:
        """m2 of the null loss: mean of pixel^2 over the training images, pixels in [-1, 1], in float64."""
        pixel = 2 * np.arange(self.levels + 1) / self.levels - 1
        return float(np.average(pixel**2, weights=self._raw_counts))

    @property
    def std(self) -> float:
        """Standard deviation over all pixels of the training images, in [-1, 1], in float64."""
        pixel = 2 * np.arange(self.levels + 1) / self.levels - 1
        mean = np.average(pixel, weights=self._raw_counts)
        return float(np.sqrt(np.average((pixel - mean) ** 2, weights=self._raw_counts)))


@dataclass(eq=False)
class LatentDataset(ImageDataset):
    """The same images in the latent space of a model: ``raw`` is float32 [N, c, h, w], taken as it is.

    The fingerprint stays that of the pictures: with the model's, which covers its autoencoder, it decides the latents.
    """

    @classmethod
    def of(cls, pixels: ImageDataset, latent: np.ndarray) -> "LatentDataset":
        """Everything of ``pixels``, with ``latent``, float32 [N, c, h, w], in place of the pixels."""
        same = {entry.name: getattr(pixels, entry.name) for entry in fields(ImageDataset)}
        return cls(**same | {"raw": latent})

    def images(self, example_ids: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """float32 [B, c, h, w]."""
        return torch.from_numpy(np.array(self.raw[np.asarray(example_ids)]))

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """Mean and mean square over all values of the training images' latents, in float64."""
        total, square, count = 0.0, 0.0, 0
        size = block_size(self.raw.shape[1:])
        for start in range(0, len(self.training), size):
            block = self.raw[self.training[start : start + size]].astype(np.float64)
            total, square, count = total + block.sum(), square + (block**2).sum(), count + block.size
        return float(total / count), float(square / count)

    @property
    def mean_square(self) -> float:
        return self._moments[1]

    @property
    def std(self) -> float:
        mean, square = self._moments
        return float(np.sqrt(max(square - mean**2, 0.0)))


def to_pixels(raw: np.ndarray, levels: int) -> Tensor:
    """float32 pixels, 2 * raw / levels - 1, of uint8 raw values of any shape."""
    # Multiplied before divided: 2 * levels / levels is exactly 2, a reciprocal need not be.
    return torch.from_numpy(raw).float().mul_(2).div_(levels).sub_(1)


def block_size(shape: Sequence[int]) -> int:
    """How many uint8 images of ``shape`` are handled at once."""
    return max(1, BLOCK_BYTES // int(np.prod(shape)))
