"""The image similarities that an evaluation may use, by name; their weights are checked before anything long starts.

This file is imported to show help, as all in this folder are: torch is imported where something is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from mucs_cli.errors import UserError, did_you_mean
from mucs_cli.files import user_path
from mucs_cli.schemas import MetricsConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIXEL_NAMES = ("ssim", "mae", "cosine")
NETWORK_NAMES = {
    "lpips": "the file that scripts/convert/lpips.py wrote",
    "clip": "the folder of a CLIP model in safetensors, or its name on the hub",
    "dino": "the folder of a DINO or DINOv2 model in safetensors, or its name on the hub",
    "sscd": "the file that scripts/convert/sscd.py wrote",
}
"""Metrics that need weights -> what ``evaluation.<name>_path`` must be."""
NAMES = (*PIXEL_NAMES, *NETWORK_NAMES)
LPIPS_SHARE = 8
"""A pair of pictures under LPIPS takes about as much memory as this many under an encoder."""


@dataclass(frozen=True)
class Metric:
    """How alike two pictures are; higher is more alike.

    Attributes:
        name: as in ``NAMES``.
        compare: what is called.
        fingerprint: SHA-256 of its weights; None where it has none.
    """

    name: str
    compare: "Callable[[Tensor, Tensor], Tensor]"
    fingerprint: str | None = None

    def __call__(self, first: "Tensor", second: "Tensor") -> "Tensor":
        """The similarity of each pair.

        Args:
            first, second: [B, C, H, W], B >= 1, in [-1, 1], C 1 or 3, on any device.
        Returns:
            [B], float64, on the CPU; NaN where a picture has a pixel that is not a number.
        Raises:
            ValueError: shapes differ or are others, or pixels are out of range.
            UserError: an encoder cannot take pictures of this shape.
        """
        return self.compare(first, second)


def metric_paths(config: MetricsConfig) -> dict[str, str | None]:
    """Name of each metric that needs weights -> where they are, or None."""
    return {name: getattr(config, f"{name}_path") for name in NETWORK_NAMES}


def load_metrics(
    names: Sequence[str],
    paths: Mapping[str, str | None],
    device: "torch.device",
    batch_size: int = 64,
    key_prefix: str = "evaluation",
) -> dict[str, Metric]:
    """The metrics of these names, ready to be called.

    Args:
        names: of ``NAMES``.
        paths: as ``metric_paths`` gives them; those of other metrics are not looked at.
        device: where networks compute.
        batch_size: most pictures that are compared at a time.
        key_prefix: of the configuration's keys, for messages.
    Raises:
        UserError: a name is unknown; a path is missing, or holds something else; a library is not installed.
    """
    if not names:
        raise UserError(f"{key_prefix}.metrics", f"got none; expected some of {', '.join(NAMES)}.")
    for name in names:
        if name not in NAMES:
            near = did_you_mean(str(name), NAMES)
            raise UserError(f"{key_prefix}.metrics", f"got {name!r}; expected some of {', '.join(NAMES)}.{near}")
        if name in NETWORK_NAMES and paths.get(name) is None:
            key = f"{key_prefix}.{name}_path"
            raise UserError(
                key,
                f"is not set; {key_prefix}.metrics has {name}, which needs {NETWORK_NAMES[name]}. Add {key}=..., or "
                f"leave {name} out.",
            )
    return {
        name: load_metric(name, paths.get(name) or "", f"{key_prefix}.{name}_path", device, batch_size)
        for name in names
    }


def load_metric(name: str, path: str, key: str, device: "torch.device", batch_size: int) -> Metric:
    from mucs_cli.artifacts import sha256_file
    from mucs_cli.attribution.encoders import ImageEncoder
    from mucs_cli.evaluation.measures.image_metrics import PIXEL_METRICS
    from mucs_cli.evaluation.measures.lpips import LPIPS
    from mucs_cli.evaluation.measures.metric_weights import load_weights
    from mucs_cli.evaluation.measures.network_metrics import embedding_cosine, in_batches
    from mucs_cli.evaluation.measures.sscd import SSCD

    if name in PIXEL_NAMES:
        return Metric(name, partial(in_batches, PIXEL_METRICS[name], batch_size=batch_size))
    if name in ("clip", "dino"):
        encoder = ImageEncoder(path, name, key, device)
        return Metric(name, partial(embedding_cosine, encoder.encode, batch_size=batch_size), encoder.fingerprint)
    if name == "sscd":
        sscd = load_weights(SSCD(), name, path, key).to(device)

        def encode(images: "Tensor") -> "Tensor":
            return sscd.encode(images.to(device))

        compare = partial(embedding_cosine, encode, batch_size=batch_size)
    else:
        lpips = load_weights(LPIPS(), name, path, key).to(device)

        def similarity(first: "Tensor", second: "Tensor") -> "Tensor":
            return 1 - lpips(first.to(device), second.to(device))

        compare = partial(in_batches, similarity, batch_size=max(1, batch_size // LPIPS_SHARE))
    return Metric(name, compare, sha256_file(user_path(path)))
