"""A freshly initialised model for the run's data, as the configuration describes it."""

import math
from dataclasses import asdict
from typing import Any

import torch

from mucs_cli.config import PipelineConfig
from mucs_cli.data.dataset import ImageDataset
from mucs_cli.diffusion.checkpoint import PRECONDITIONINGS, network_class, precondition
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.networks import AUGMENTATION_DIM
from mucs_cli.errors import UserError
from mucs_cli.rng import derive_seed
from mucs_cli.schemas import DiffusionConfig, DiTConfig, EDMConfig, NetworkConfig, UNetConfig

DIT_SIZES = {"tiny": (64, 3, 4), "small": (384, 12, 6), "paper": (768, 12, 12)}
"""width, num_layers, num_heads; "paper" is the DiT of MUCS's experiments (a DiT-B)."""
UNET_SIZES: dict[str, tuple[int, list[int], int, list[int]]] = {
    "tiny": (16, [1, 2], 1, [4]),
    "small": (64, [2, 2], 2, [16]),
    "paper": (128, [2, 2, 2], 4, [16]),
}
"""channels, multipliers, layers_per_block, attention_resolutions; "paper" is EDM's DDPM++ for CIFAR-10."""


def build_denoiser(config: PipelineConfig, data: ImageDataset) -> Denoiser:
    """A freshly initialised model for the data, from the stream ("initial_weights").

    Raises:
        UserError: the network does not take the data's image size, or conditions on what the data does not have; or the
            preconditioning cannot be.
    """
    assert isinstance(config.model, NetworkConfig)
    if config.model.conditional and not (data.num_classes or data.condition_dim):
        raise UserError(
            "model.conditional",
            f"got true; the data set {data.facts['name']} has no labels. "
            "Set model.conditional=false, or data.labels or data.condition_file.",
        )
    common = {
        "sample_size": data.height,
        "in_channels": data.channels,
        "dropout": config.model.dropout,
        "num_classes": data.num_classes if config.model.conditional and not data.condition_dim else 0,
        "condition_dim": data.condition_dim if config.model.conditional else 0,
        "timestep_scale": PRECONDITIONINGS[config.diffusion.name].timestep_scale,
        "augmentation_dim": AUGMENTATION_DIM if config.training.augmentation else 0,
    }
    torch.manual_seed(derive_seed(config.training.seed, "initial_weights"))  # layers initialise from the global state
    if isinstance(config.model, DiTConfig):
        network = network_class("DiT")(**dit_arguments(config.model, data.height), **common)
    else:
        assert isinstance(config.model, UNetConfig)
        network = network_class("UNet")(**unet_arguments(config.model, data.height), **common)
    return precondition(network, preconditioning_facts(config.diffusion, data), "diffusion")


def preconditioning_facts(config: DiffusionConfig, data: ImageDataset) -> dict[str, Any]:
    """The preconditioning as ``checkpoint.precondition`` takes it; measures sigma_data where it is "auto"."""
    if isinstance(config, EDMConfig):
        if config.sigma_data == "auto":
            sigma_data = data.std
            p_mean = config.p_mean + math.log(sigma_data / 0.5)
        else:
            sigma_data, p_mean = float(config.sigma_data), config.p_mean
        return {"preconditioning": "edm", "sigma_data": sigma_data, "p_mean": p_mean, "p_std": config.p_std}
    values = asdict(config)
    name = values.pop("name")
    if name == "ddpm":
        return {"preconditioning": name, "scheduler": {**values, "clip_sample": True}}
    return {"preconditioning": name, **values}


def dit_arguments(config: DiTConfig, side: int) -> dict[str, Any]:
    """Constructor arguments of a DiT for images of ``side`` pixels."""
    width, num_layers, num_heads = DIT_SIZES[config.size]
    width, num_layers, num_heads = config.width or width, config.num_layers or num_layers, config.num_heads or num_heads
    if side % config.patch_size:
        raise UserError(
            "model.patch_size",
            f"got {config.patch_size}; the images are {side} pixels wide, which it does not divide. "
            "Set model.patch_size or data.image_size.",
        )
    if width % num_heads or width % 4:
        raise UserError("model.width", f"got {width}; expected a multiple of 4 and of model.num_heads={num_heads}.")
    return {
        "patch_size": config.patch_size,
        "width": width,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_ratio": config.mlp_ratio,
    }


def unet_arguments(config: UNetConfig, side: int) -> dict[str, Any]:
    """Constructor arguments of a U-Net for images of ``side`` pixels."""
    channels, multipliers, layers, attention = UNET_SIZES[config.size]
    channels = config.channels or channels
    multipliers = multipliers if config.multipliers is None else config.multipliers
    if not multipliers or min(multipliers) < 1:
        raise UserError("model.multipliers", f"got {multipliers}; expected one positive integer a level.")
    factor = 2 ** (len(multipliers) - 1)
    if side % factor:
        raise UserError(
            "model.multipliers",
            f"got {len(multipliers)} levels; the images are {side} pixels wide, which {factor} does not divide. "
            "Use fewer levels or set data.image_size.",
        )
    return {
        "channels": channels,
        "multipliers": tuple(multipliers),
        "layers_per_block": config.layers_per_block or layers,
        "attention_resolutions": tuple(
            attention if config.attention_resolutions is None else config.attention_resolutions
        ),
        "norm_groups": math.gcd(32, channels),
    }
