"""The weights of the metric sscd, from a published file of SSCD into one that mucs loads.

    python scripts/convert/sscd.py sscd_disc_mixup.torchscript.pt sscd.safetensors

The model may be any of its authors' that are a ResNet-50 with 512 dimensions, in each of their three formats. Only
tensors are read from .torchvision.pt and .classy.pt. A .torchscript.pt is a program: opening it runs code in it, so
convert one that you trust; its embedding of one picture is then compared with that of the converted weights.
"""

import argparse
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from state_dicts import read_state_dict, refuse_difference, require_file, run
from torch import Tensor

from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.metric_weights import write_weights
from mucs_cli.evaluation.measures.sscd import SSCD

EXPECTED = "SSCD's ResNet-50 with 512 dimensions, sscd_disc_mixup.torchscript.pt or .torchvision.pt"
TOLERANCE = 1e-4
CLASSY_NAMES = (
    (r"^initial_block\._module\.0\.", "conv1."),
    (r"^initial_block\._module\.1\.", "bn1."),
    (r"^blocks\.([0-3])\.(?:block\d-)?(\d)\.", lambda match: f"layer{int(match[1]) + 1}.{match[2]}."),
    (r"\.convolutional_block\.0\.", ".conv1."),
    (r"\.convolutional_block\.1\.", ".bn1."),
    (r"\.convolutional_block\.3\.", ".conv2."),
    (r"\.convolutional_block\.4\.", ".bn2."),
    (r"\.convolutional_block\.6\.", ".conv3."),
    (r"(layer\d\.\d)\.bn\.", r"\1.bn3."),
    (r"^embeddings\.1\.", "fc."),
)
"""Classy Vision's names of a ResNet-50's parts, and SSCD's of its last layer -> torchvision's."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="weights of the metric sscd, for mucs")
    parser.add_argument("model", type=Path, help=EXPECTED)
    parser.add_argument("output", type=Path, help="the safetensors file to write")
    options = parser.parse_args(arguments)
    require_file(options.model, EXPECTED)
    script = read_script(options.model) if is_script(options.model) else None
    state = read_state_dict(options.model, EXPECTED) if script is None else script.state_dict()
    tensors = renamed(state)
    network = SSCD().eval()
    refuse_difference(tensors, network, str(options.model), EXPECTED)
    if script is not None:
        network.load_state_dict(tensors, strict=False)  # without the counters of batch normalisation
        refuse_other_embedding(script, network, options.model)
    write_weights(options.output, "sscd", tensors)


def is_script(path: Path) -> bool:
    """Whether a file is a TorchScript archive; torch.save writes no constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_script(path: Path) -> Any:
    try:
        return torch.jit.load(str(path), map_location="cpu").eval()
    except RuntimeError as error:
        text = str(error).strip().split("\n")[0]
        raise UserError(str(path), f"cannot be read as TorchScript ({text}); expected {EXPECTED}.") from error


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under torchvision's names, without the counters of batch normalisation."""
    tensors = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        name = name.removeprefix("backbone.")
        for pattern, replacement in CLASSY_NAMES:
            name = re.sub(pattern, replacement, name)
        tensors[name] = value
    return tensors


@torch.no_grad()
def refuse_other_embedding(script: Any, network: SSCD, path: Path) -> None:
    """Raises UserError where the program computes something else with the weights than the metric does."""
    pixels = torch.randn(1, 3, 288, 288, generator=torch.Generator().manual_seed(0))
    found, expected = network(pixels), script(pixels)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=TOLERANCE):
        raise UserError(
            str(path), f"has the weights of SSCD, but embeds a picture otherwise than SSCD does; expected {EXPECTED}."
        )


if __name__ == "__main__":
    run("sscd", main)
