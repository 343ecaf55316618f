"""The weights of the metric lpips, from the two published files into one that mucs loads.

    python scripts/convert/lpips.py vgg16-397923af.pth vgg.pth lpips.safetensors

The first is torchvision's VGG16 (ImageNet weights), of which the convolutions are taken; the second holds the linear
heads of LPIPS version 0.1 for VGG, lpips/weights/v0.1/vgg.pth in its authors' repository.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from state_dicts import read_state_dict, refuse_difference, run
from torch import Tensor

from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.lpips import LPIPS, WIDTHS
from mucs_cli.evaluation.measures.metric_weights import write_weights

BACKBONE = "torchvision's VGG16 without batch normalisation, vgg16-397923af.pth"
HEADS = "the linear heads of LPIPS 0.1 for VGG, vgg.pth"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="weights of the metric lpips, for mucs")
    parser.add_argument("backbone", type=Path, help=BACKBONE)
    parser.add_argument("heads", type=Path, help=HEADS)
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    options = parser.parse_args(arguments)
    heads = read_heads(options.heads)
    state = read_state_dict(options.backbone, BACKBONE)
    features = {name: value for name, value in state.items() if name.startswith("features.")}
    refuse_difference(features | heads, LPIPS(), str(options.backbone), BACKBONE)
    write_weights(options.output, "lpips", features | heads)


def read_heads(path: Path) -> dict[str, Tensor]:
    """The heads under the names that the metric has for them."""
    state = read_state_dict(path, HEADS)
    heads = {}
    for block, width in enumerate(WIDTHS):
        name = f"lin{block}.model.1.weight"
        if name not in state or state[name].shape != (1, width, 1, 1):
            raise UserError(str(path), f"has no {name} of shape [1, {width}, 1, 1]; expected {HEADS}. Use that one.")
        heads[f"heads.{block}"] = state[name].flatten()
    return heads


if __name__ == "__main__":
    run("lpips", main)
