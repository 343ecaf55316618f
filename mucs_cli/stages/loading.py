"""What several stages load: the machine's settings, the data, the base model and the queries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_json, read_tensors, require_manifest, write_json
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.decode import SUFFIXES
from mucs_cli.data.metadata import has_column
from mucs_cli.diffusion.checkpoint import WEIGHTS, load_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.latent import LatentCodec
from mucs_cli.diffusion.pretrained import Pretrained, load_pretrained
from mucs_cli.errors import UserError
from mucs_cli.runtime import log, pick_device
from mucs_cli.schemas import DataConfig, ImageFolderConfig, PictureConfig, PretrainedConfig
from mucs_cli.stages.context import Context
from mucs_cli.stages.encoding import encode_dataset

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


@dataclass(frozen=True)
class BaseModel:
    """The base model, on its device.

    fingerprint: of its weights and configuration. learning_rate: what it was trained with. fresh: from a seed, the same
    model with its initial weights, on the CPU. codec: the autoencoder of a latent model, or None.
    """

    denoiser: Denoiser
    fingerprint: str
    learning_rate: float
    fresh: Callable[[int], Denoiser]
    codec: LatentCodec | None = None


@dataclass(frozen=True)
class Inputs:
    """What every stage after training starts from.

    pixels: the data as pictures. data: the data in the space the model works in: ``pixels``, or their latents.
    """

    device: torch.device
    pixels: ImageDataset
    data: ImageDataset
    model: BaseModel


def load_inputs(context: Context) -> Inputs:
    """Device, data and base model of a stage after training.

    Raises:
        UserError: the model has not been trained or cannot be loaded, a file is damaged, or model and data do not fit.
    """
    device = prepare_device(context)
    if isinstance(context.config.model, PretrainedConfig):
        return load_pretrained_inputs(context, Path(context.config.model.path), device)
    data = load_data(context)
    return Inputs(device, data, data, load_trained_model(context, data, device))


def load_data(context: Context, config: DataConfig | None = None) -> ImageDataset:
    """The run's data; ``overwrite`` redoes it in the run's first stage only: later ones rest on it."""
    first = "sample" if isinstance(context.config.model, PretrainedConfig) else "train"
    overwrite = context.config.overwrite and context.command == first
    return load_dataset(config or context.config.data, context.run, overwrite)


def load_trained_model(context: Context, data: ImageDataset, device: torch.device) -> BaseModel:
    """The run's own model, with its averaged weights.

    Raises:
        UserError: it has not been trained, a file is damaged, or it was trained on other data.
    """
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


def model_fingerprint(train_manifest: dict[str, Any]) -> str:
    """SHA-256 over the hashes of the files that make the base model."""
    outputs = train_manifest["outputs"]
    return fingerprint({name: entry["sha256"] for name, entry in outputs.items() if name.startswith("model/")})


# --- models trained elsewhere ----------------------------------------------------------------------------------------


def load_pretrained_inputs(context: Context, path: Path, device: torch.device) -> Inputs:
    """A model that was not trained in this run, and the data at the size and in the colours that it takes.

    Raises:
        UserError: the model cannot be loaded or is not supported, or the data does not fit it.
    """
    other = load_pretrained(path)
    pixels = load_data(context, fitted(context.config.data, other))
    refuse_misfit(other, pixels, path)
    other.denoiser.network.requires_grad_(False).to(device)
    model = BaseModel(other.denoiser, other.fingerprint, UNKNOWN_LEARNING_RATE, other.fresh, other.codec)
    if other.codec is None:
        return Inputs(device, pixels, pixels, model)
    other.codec.to(device)
    return Inputs(device, pixels, encode_dataset(context, pixels, other.codec, other.fingerprint, device), model)


def fitted(config: DataConfig, model: Pretrained) -> DataConfig:
    """The data's configuration with what the user left open as the model needs it: size, colours, where classes are."""
    if not isinstance(config, PictureConfig):
        return config
    color = {1: "grayscale", 3: "rgb"}.get(model.channels, config.color)
    config = replace(
        config,
        image_size=model.image_size if config.image_size is None else config.image_size,
        color=color if config.color == "auto" else config.color,
    )
    if isinstance(config, ImageFolderConfig) and config.labels == "none" and model.denoiser.network.num_classes:
        if has_column(config.path, config.label_column):
            return replace(config, labels="metadata")
        if in_folders(Path(config.path)):
            return replace(config, labels="folder")
    return config


def in_folders(path: Path) -> bool:
    """Whether every picture of a folder lies in a folder below it."""
    return path.is_dir() and not any(file.is_file() and file.suffix.lower() in SUFFIXES for file in path.iterdir())


def recorded_data(config: DataConfig, run: Path) -> DataConfig:
    """The data's configuration as the run decoded it, where size, colours or classes were read from its model."""
    if not isinstance(config, PictureConfig):
        return config
    decoded = require_manifest(run / "data", "train")["config"]["data"]
    names = [name for name in ("image_size", "color", "labels") if hasattr(config, name)]
    return replace(config, **{name: decoded[name] for name in names})


def refuse_misfit(other: Pretrained, data: ImageDataset, path: Path) -> None:
    """Raises UserError where the model takes images of another shape, or other conditions, than the data has."""
    wanted, got = (other.channels, other.image_size, other.image_size), (data.channels, data.height, data.width)
    if wanted != got:
        key, value = ("data.color", data.channels) if wanted[1:] == got[1:] else ("data.image_size", data.height)
        raise UserError(
            key,
            f"got {value} and so images of {got} (channels, height, width); {path} takes {wanted}. Leave out "
            "data.image_size and data.color: they are read from the model.",
        )
    network = other.denoiser.network
    takes, has = (network.num_classes, network.condition_dim), (data.num_classes, data.condition_dim)
    if network.is_conditional and takes != has:
        raise UserError(
            "model.path",
            f"got a model of {takes[0]} classes and condition vectors of length {takes[1]}; the data has {has[0]} and "
            f"{has[1]}. Set data.labels, data.num_classes or data.condition_file.",
        )


# --- queries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queries:
    """All queries of the run, and which of them this command works on.

    image: [Q, C, H, W] in the model's space. condition: [Q] labels, [Q, d] vectors or None; query i is row i.
    fingerprints: of every query, by id. selected: ids, sorted, as ``queries.index`` chooses them.
    """

    image: Tensor
    condition: Tensor | None
    fingerprints: Mapping[int, str]
    selected: list[int]

    @property
    def wanted(self) -> dict[int, str]:
        """id -> fingerprint of the selected queries."""
        return {query: self.fingerprints[query] for query in self.selected}

    def condition_of(self, query: int) -> Tensor | None:
        """[1] or [1, d]; None for an unconditional model."""
        return None if self.condition is None else self.condition[query : query + 1]


def load_queries(context: Context, model: BaseModel) -> Queries:
    """The queries that ``mucs sample`` generated or read.

    Raises:
        UserError: there are none, they belong to another model, their file is damaged, or ``queries.index`` chooses
            none of them.
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
    fingerprints = {int(query): print_ for query, print_ in manifest["queries"].items()}
    selected = chosen_queries(context.config.queries.index, len(fingerprints))
    return Queries(tensors["image"], tensors.get("condition"), fingerprints, selected)


def chosen_queries(index: Any, count: int) -> list[int]:
    """The ids, sorted, that a value of ``queries.index`` chooses among ``count`` queries.

    Args:
        index: None for all, an id, a list of ids, or a slice as text: ``2:8``, ``:4``, ``::2``.
    Raises:
        UserError: it is none of these, names an id that there is not, or chooses nothing.
    """
    subject = "queries.index"
    if index is None:
        return list(range(count))
    if isinstance(index, str) and ":" in index:
        try:
            chosen = list(range(count))[slice(*(int(part) if part.strip() else None for part in index.split(":")))]
        except (ValueError, TypeError) as error:
            raise UserError(subject, f"got {index!r}; expected a slice such as 0:10.") from error
    else:
        chosen = index if isinstance(index, list) else [index]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in chosen):
            raise UserError(subject, f"got {index!r}; expected an id, a list of ids or a slice such as 0:10.")
        beyond = [i for i in chosen if not 0 <= i < count]
        if beyond:
            raise UserError(subject, f"got {beyond[0]}; expected 0 to {count - 1}, the queries of this run.")
    if not chosen:
        raise UserError(subject, f"got {index!r}, which chooses none of the {count} queries. Choose others.")
    return sorted(set(chosen))
