"""A trained denoiser on disk: the network as diffusers saves it, and ``denoiser.json`` for the preconditioning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mucs_cli.artifacts import check_file, read_tensors, write_atomic, write_json, write_tensors
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import Denoiser, EDMDenoiser
from mucs_cli.diffusion.networks import DiT, Network
from mucs_cli.diffusion.vp import VPDenoiser
from mucs_cli.errors import UserError
from mucs_cli.records import read_json

NETWORKS = ("DiT", "UNet")
"""Names of our networks' classes."""
PRECONDITIONINGS: dict[str, type[EDMDenoiser] | type[VPDenoiser] | type[DDPMDenoiser]] = {
    "edm": EDMDenoiser,
    "vp": VPDenoiser,
    "ddpm": DDPMDenoiser,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
"""diffusers' own file name, so that ``from_pretrained`` of the network's class reads the folder."""
CONFIG, FACTS, MODEL = "config.json", "denoiser.json", "model"
"""The network's configuration, the preconditioning's, and the folder of a stage that they and the weights lie in."""


def precondition(network: Network, facts: Mapping[str, Any], subject: str) -> Denoiser:
    """The denoiser of ``network`` that ``facts`` describes, see ``Denoiser.facts``.

    Args:
        network: made with the preconditioning's ``timestep_scale`` where it is one of ours.
        facts: ``preconditioning``, one of edm, vp, ddpm, and its numbers.
        subject: the key or file that the facts come from, for the error.
    Raises:
        UserError: the facts describe no denoiser.
    """
    name = facts.get("preconditioning") if isinstance(facts, Mapping) else facts
    if not isinstance(name, str) or name not in PRECONDITIONINGS:
        raise UserError(subject, f"got preconditioning {name!r}; expected one of {', '.join(PRECONDITIONINGS)}.")
    try:
        return PRECONDITIONINGS[name].from_facts(network, facts)
    except Exception as error:  # diffusers' schedulers meet impossible numbers with errors of many kinds
        raise UserError(subject, f"got an impossible {name} preconditioning: {error}. Correct it.") from error


def save_denoiser(folder: Path, denoiser: Denoiser, weights: dict[str, Tensor]) -> list[Path]:
    """Writes the network's configuration, ``weights`` and the preconditioning; returns the files."""
    write_atomic(folder / CONFIG, denoiser.network.to_json_file)
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    write_json(folder / FACTS, denoiser.facts())
    return [folder / CONFIG, folder / WEIGHTS, folder / FACTS]


def load_denoiser(folder: Path, sha256: str | None = None, weights: Path | None = None) -> Denoiser:
    """The denoiser saved in ``folder``, in evaluation mode, on the CPU.

    Args:
        folder: what ``save_denoiser`` wrote.
        sha256: expected hash of the weights file; None to trust it.
        weights: another weights file for the same network (the initial weights, for example).
    Raises:
        UserError: a file is missing, truncated or of another kind, or the weights do not fit the configuration.
    """
    network = build_network(folder)
    path = weights or folder / WEIGHTS
    load_weights(network, read_tensors(path, sha256), path)
    facts = folder / FACTS
    return precondition(network.eval(), read_json(facts), str(facts))


def load_checked(folder: Path, manifest: Mapping[str, Any]) -> Denoiser:
    """The denoiser in ``model/`` below a finished stage's folder, every file of it held against the manifest.

    Raises:
        UserError: as ``load_denoiser``, or a file is not the one that was written.
    """
    for path in (CONFIG, FACTS):
        check_file(folder, manifest, f"{MODEL}/{path}")
    return load_denoiser(folder / MODEL, manifest.get("outputs", {}).get(f"{MODEL}/{WEIGHTS}", {}).get("sha256"))


def build_network(folder: Path) -> Network:
    """The network of a saved denoiser, freshly initialised from the global random state.

    Raises:
        UserError: its configuration is of no network of ours, or of an impossible one.
    """
    path = folder / CONFIG
    config = read_json(path)
    name = config.get("_class_name") if isinstance(config, dict) else config
    if not isinstance(name, str) or name not in NETWORKS:
        raise UserError(str(path), f"got a {name}; expected a network trained by mucs ({', '.join(NETWORKS)}).")
    try:
        network: Network = network_class(name).from_config(config)
    except Exception as error:  # whatever layers raise whose sizes are impossible
        raise UserError(str(path), f"got an impossible {name} ({error}). Restore the file from a copy.") from error
    return network


def network_class(name: str) -> type[Network]:
    """One of ``NETWORKS``; diffusers' U-Net is imported only where it is used."""
    if name == "DiT":
        return DiT
    from mucs_cli.diffusion.unet import UNet

    return UNet


def load_weights(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copies ``tensors`` into the network; names and shapes must match exactly."""
    with torch.no_grad():
        own = dict(network.named_parameters())
        for name, parameter in own.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                got = "nothing" if name not in tensors else f"shape {tuple(tensors[name].shape)}"
                raise UserError(str(path), f"got {got} for {name}; expected shape {tuple(parameter.shape)}.")
            if not tensors[name].isfinite().all():
                raise UserError(str(path), f"got values in {name} that are not finite. Train or save the model again.")
            parameter.copy_(tensors[name])
    surplus = sorted(set(tensors) - set(own))
    if surplus:
        raise UserError(str(path), f"got {surplus[0]}, which the network of config.json does not have.")
