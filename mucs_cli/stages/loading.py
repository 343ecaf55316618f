"""What several stages load: the machine's settings, the data, the base model and the queries."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_json, read_tensors, require_manifest, write_json
from mucs_cli.config import PretrainedConfig
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.diffusion.checkpoint import WEIGHTS, load_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.pretrained import load_pretrained
from mucs_cli.errors import UserError
from mucs_cli.runtime import log, pick_device
from mucs_cli.stages.context import Context

UNKNOWN_LEARNING_RATE = 1e-4
"""Taken for a model whose training is not on record; unlearning uses a tenth of it."""


def prepare_device(context: Context) -> torch.device:
    """The device, with the thread count that the run's first stage used: another one sums in another order."""
    facts = machine_facts(context.run)
    threads = facts.get("threads")
    if threads is None:
        save_machine_facts(context.run, {**facts, "threads": torch.get_num_threads()})
    elif threads != torch.get_num_threads():
        log.info("using %d threads, as the run's first stage did (%s)", threads, context.run / "machine.json")
        torch.set_num_threads(threads)
    return pick_device(context.config.device)


def machine_facts(run: Path) -> dict[str, Any]:
    """What the run has fixed about the machine: thread count and measured block sizes."""
    path = run / "machine.json"
    return read_json(path) if path.exists() else {}


def save_machine_facts(run: Path, facts: dict[str, Any]) -> None:
    write_json(run / "machine.json", facts)


def load_data(context: Context) -> ImageDataset:
    """The run's data; ``overwrite`` redoes it in the run's first stage only: later ones rest on it."""
    first = "sample" if isinstance(context.config.model, PretrainedConfig) else "train"
    return load_dataset(context.config.data, context.run, context.config.overwrite and context.command == first)


@dataclass(frozen=True)
class BaseModel:
    """The base model, on its device.

    fingerprint: of its weights and configuration. learning_rate: what it was trained with. fresh: from a seed, the same
    model with its initial weights, on the CPU.
    """

    denoiser: Denoiser
    fingerprint: str
    learning_rate: float
    fresh: Callable[[int], Denoiser]


def load_base_model(context: Context, data: ImageDataset, device: torch.device) -> BaseModel:
    """The base model: the run's own, with its averaged weights, or the one that model=pretrained names.

    Raises:
        UserError: it has not been trained, a file is damaged, or it was trained on other data.
    """
    if isinstance(context.config.model, PretrainedConfig):
        return load_other_model(Path(context.config.model.path), data, device)
    folder = context.folder("train")
    manifest = require_manifest(folder, "train")
    trained_on = manifest["inputs"]["dataset"]
    if trained_on != data.fingerprint:
        raise UserError(
            "data",
            f"got a data set of fingerprint {data.fingerprint[:16]}; {folder / 'manifest.json'} has {trained_on[:16]}. "
            "Restore the data, or use another run=.",
        )
    denoiser = load_denoiser(folder / "model", manifest["outputs"][f"model/{WEIGHTS}"]["sha256"])
    denoiser.network.requires_grad_(False).to(device)

    def fresh(seed: int) -> Denoiser:
        return load_denoiser(folder / "model", weights=folder / "initial.safetensors")

    return BaseModel(denoiser, model_fingerprint(manifest), manifest["config"]["training"]["learning_rate"], fresh)


def load_other_model(path: Path, data: ImageDataset, device: torch.device) -> BaseModel:
    """A model that was not trained in this run; its learning rate is unknown.

    Raises:
        UserError: it cannot be loaded, is not supported, or takes images of another shape than the data has.
    """
    other = load_pretrained(path)
    if other.codec is not None:
        raise UserError("model.path", f"got the latent model {path}; latent models are not supported yet. Use another.")
    wanted, got = other.sample_shape, (data.channels, data.height, data.width)
    if wanted != got:
        raise UserError(
            "data.image_size",
            f"got images of {got} (channels, height, width); {path} takes {wanted}. Set data.image_size={wanted[1]} "
            f"and data.color={'grayscale' if wanted[0] == 1 else 'rgb'}.",
        )
    network = other.denoiser.network
    takes, has = (network.num_classes, network.condition_dim), (data.num_classes, data.condition_dim)
    if network.is_conditional and takes != has:
        raise UserError(
            "model.path",
            f"got a model of {takes[0]} classes and condition vectors of length {takes[1]}; the data has {has[0]} and "
            f"{has[1]}. Set data.labels, data.num_classes or data.condition_file.",
        )
    network.requires_grad_(False).to(device)
    return BaseModel(other.denoiser, other.fingerprint, UNKNOWN_LEARNING_RATE, other.fresh)


def model_fingerprint(train_manifest: dict[str, Any]) -> str:
    """SHA-256 over the hashes of the files that make the base model."""
    outputs = train_manifest["outputs"]
    return fingerprint({name: entry["sha256"] for name, entry in outputs.items() if name.startswith("model/")})


@dataclass(frozen=True)
class Queries:
    """image: [Q, C, H, W] in [-1, 1]; condition: [Q] labels or None; query i is row i."""

    image: Tensor
    condition: Tensor | None
    fingerprint: str

    def __len__(self) -> int:
        return len(self.image)


def load_queries(context: Context, model: BaseModel) -> Queries:
    """The sampled queries.

    Raises:
        UserError: they have not been sampled, come from another model, or their file is damaged.
    """
    folder = context.folder("sample")
    manifest = require_manifest(folder, "sample")
    sampled_from = manifest["inputs"]["model"]
    if sampled_from != model.fingerprint:
        raise UserError(
            str(folder / "manifest.json"),
            f"got queries of the model {sampled_from[:16]}; the run's model is {model.fingerprint[:16]}. "
            f"Rerun mucs sample with overwrite=true, or use another run=.",
        )
    sha256 = manifest["outputs"]["samples.safetensors"]["sha256"]
    tensors = read_tensors(folder / "samples.safetensors", sha256)
    return Queries(tensors["image"], tensors.get("condition"), sha256)
