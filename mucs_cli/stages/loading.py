"""What several stages load: the machine's settings, the data, the base model and the queries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import check_file, fingerprint, read_tensors, write_record
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.decode import SUFFIXES
from mucs_cli.data.image_folder import class_texts
from mucs_cli.data.labels import is_whole
from mucs_cli.data.metadata import has_column
from mucs_cli.diffusion.checkpoint import load_checked, load_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.evaluation.measures.removal import default_count
from mucs_cli.locks import locked
from mucs_cli.records import read_record
from mucs_cli.reporting.groups import choose_groupings, choose_k
from mucs_cli.runtime import log, pick_device
from mucs_cli.schemas import MOST_THREADS, DataConfig, ImageFolderConfig, PictureConfig, PretrainedConfig
from mucs_cli.stage_folder import require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.stages.encoding import encode_dataset
from mucs_cli.tensor_forms import SAMPLE_FORMS, require_finite, require_forms

if TYPE_CHECKING:  # diffusers takes seconds to import its networks
    from mucs_cli.diffusion.latent import LatentCodec
    from mucs_cli.diffusion.pretrained import Pretrained

MIN_TOP_K = 50
"""Highest scores that a race settles by default in small data sets: more than reports show."""
UNKNOWN_LEARNING_RATE = 1e-4
"""Taken for a model whose training is not on record; unlearning uses a tenth of it."""


def prepare_device(context: Context) -> torch.device:
    """The device, with the thread count that the run's first stage used: another one sums in another order."""
    asked = context.config.threads
    fixed = fixed_fact(context.run, "threads", lambda: asked or torch.get_num_threads())
    threads = asked or fixed
    if threads > MOST_THREADS:
        raise UserError(
            str(context.run / MACHINE), f"got threads {threads}; expected at most {MOST_THREADS}. Delete the file."
        )
    if threads != fixed:
        log.info("using %d threads; the run's first stage used %d, which rounds otherwise", threads, fixed)
    elif threads != torch.get_num_threads():
        log.info("using %d threads, as the run's first stage did (%s)", threads, context.run / MACHINE)
    torch.set_num_threads(threads)
    return pick_device(context.config.device)


MACHINE = "machine.json"
"""The file with what a run has fixed about the machine: thread count and measured sizes."""


def fixed_fact(run: Path, name: str, choose: Callable[[], int], key: str | None = None) -> int:
    """What the run has fixed, or else what is chosen now and kept for all later commands, and for those at it as well.

    Args:
        run: the run's folder.
        name: of the fact.
        choose: measures or decides; called where nothing is fixed yet.
        key: what the fact is of, where there are several.
    """
    known = read_fact(run, name, key)
    if known is None:
        known = choose()
        with locked(run / MACHINE):
            other = read_fact(run, name, key)  # another process may have chosen meanwhile
            if other is not None:
                return other
            save_fact(run, name, known, key)
    return known


def read_fact(run: Path, name: str, key: str | None = None) -> int | None:
    """See ``fixed_fact``; None where nothing is fixed.

    Raises:
        UserError: the file is damaged.
    """
    path = run / MACHINE
    value = read_record(path).get(name) if path.exists() else None
    if key is not None and value is not None:
        value = value.get(key) if isinstance(value, dict) else 0
    if value is not None and not (type(value) is int and value > 0):
        raise UserError(str(path), f"got {name} {value!r}; expected a whole number above 0. Delete the file.")
    return value


def save_fact(run: Path, name: str, value: int, key: str | None = None) -> None:
    """Fixes a fact anew; other facts stay."""
    path = run / MACHINE
    with locked(path):
        facts = read_record(path) if path.exists() else {}
        write_record(path, {**facts, name: value if key is None else {**facts.get(name, {}), key: value}})


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
    codec: "LatentCodec | None" = None


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
    return processes.first_then_all(lambda: read_inputs(context))


def read_inputs(context: Context) -> Inputs:
    """What ``load_inputs`` gives, in one process."""
    device = prepare_device(context)
    if isinstance(context.config.model, PretrainedConfig):
        return load_pretrained_inputs(context, Path(context.config.model.path), device)
    data = load_data(context)
    return Inputs(device, data, data, load_trained_model(context, data, device))


def load_data(context: Context, config: DataConfig | None = None) -> ImageDataset:
    """The run's data; the run's first stage redoes it with ``overwrite``, or where nothing rests on it yet.

    Raises:
        UserError: the data cannot be used, or a later stage of ``mucs run`` would refuse what it is asked for.
    """
    first = "sample" if isinstance(context.config.model, PretrainedConfig) else "train"
    overwrite = context.command == first and (context.config.overwrite or not context.folder(first).exists())
    config = config or context.config.data
    if not processes.is_first():  # what the first process has checked
        overwrite, config = False, replace(config, verify=False) if isinstance(config, PictureConfig) else config
    data = load_dataset(config, context.run, overwrite)
    check_later_stages(context, data)
    return data


def check_later_stages(context: Context, data: ImageDataset) -> None:
    """Refuses, before the long stages of ``mucs run``, counts and columns that the data does not have.

    Raises:
        UserError: ``k``, ``group_k`` or ``group_by`` of a stage that is to come.
    """
    settled = num_settled(context.config.score.top_k, len(data.training)) if context.races else len(data.training)
    for stage in getattr(context.config, "stages", ()):
        if stage not in ("score", "report"):
            continue
        settings = getattr(context.config, stage)
        choose_groupings(settings.group_by, data.metadata, f"{stage}.group_by")
        choose_k(settings.group_k, len(data.training), f"{stage}.group_k")
        refuse_unsettled(settings.group_k, settled, f"{stage}.group_k")
        if stage == "report":
            choose_k(settings.k, len(data.training), "report.k")
            refuse_unsettled(settings.k, settled, "report.k")


def num_settled(top_k: int | None, num_images: int) -> int:
    """How many highest scores a race settles; by default as many as counterfactual retraining removes, at least 50.

    Raises:
        UserError: more are asked for than there are images.
    """
    if top_k is None:
        return min(max(MIN_TOP_K, default_count(num_images)), num_images)
    return choose_k(top_k, num_images, "score.top_k")


def refuse_unsettled(k: int | None, settled: int, key: str) -> None:
    """Raises UserError where a race will not settle as many places as ``key`` asks for."""
    if k is not None and k > settled:
        raise UserError(
            key, f"got {k}; score.mode=adaptive settles the {settled} highest scores only. Raise score.top_k."
        )


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
            f"got a data set of fingerprint {data.fingerprint[:16]}; {folder / 'manifest.json'} has "
            f"{str(trained_on)[:16]}. Restore the data, or use another run=.",
        )
    denoiser = load_checked(folder, manifest)
    denoiser.network.requires_grad_(False).to(device)

    def fresh(seed: int) -> Denoiser:
        check_file(folder, manifest, "initial.safetensors")
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
    from mucs_cli.diffusion.pretrained import load_pretrained

    other = load_pretrained(path)
    config = fitted(context.config.data, other)
    if isinstance(config, PictureConfig):  # what was typed is refused before anything is decoded
        channels = {"grayscale": 1, "rgb": 3}.get(config.color, other.channels)
        refuse_other_shape(other, (channels, config.image_size or 0, config.image_size or 0), path)
    pixels = load_data(context, config)
    refuse_other_shape(other, (pixels.channels, pixels.height, pixels.width), path)
    refuse_other_conditions(other, pixels, path)
    other.denoiser.network.requires_grad_(False).to(device)
    model = BaseModel(other.denoiser, other.fingerprint, UNKNOWN_LEARNING_RATE, other.fresh, other.codec)
    if other.codec is None:
        return Inputs(device, pixels, pixels, model)
    other.codec.to(device)
    return Inputs(device, pixels, encode_dataset(context, pixels, other.codec, other.fingerprint, device), model)


def fitted(config: DataConfig, model: "Pretrained") -> DataConfig:
    """The data's configuration with what the user left open as the model needs it: size, colours, where classes are."""
    if not isinstance(config, PictureConfig):
        return config
    color = {1: "grayscale", 3: "rgb"}.get(model.channels, config.color)
    config = replace(
        config,
        image_size=model.image_size if config.image_size is None else config.image_size,
        color=color if config.color == "auto" else config.color,
    )
    num_classes = model.denoiser.network.num_classes
    if not isinstance(config, ImageFolderConfig) or not num_classes:
        return config
    if config.labels == "none" and has_column(config.path, config.label_column):
        config = replace(config, labels="metadata")
    elif config.labels == "none" and in_folders(Path(config.path)):
        config = replace(config, labels="folder")
    texts = class_texts(config) if config.num_classes is None else set()
    if texts and all(is_whole(text) and int(text) < num_classes for text in texts):
        config = replace(config, num_classes=num_classes)  # numbers as in training, though some have no image here
    return config


def in_folders(path: Path) -> bool:
    """Whether every picture of a folder lies in a folder below it."""
    return path.is_dir() and not any(file.is_file() and file.suffix.lower() in SUFFIXES for file in path.iterdir())


def recorded_data(config: DataConfig, run: Path) -> DataConfig:
    """The data's configuration as the run decoded it, where size, colours or classes were read from its model."""
    if not isinstance(config, PictureConfig):
        return config
    decoded = require_manifest(run / "data", "train")["config"]["data"]
    names = [name for name in ("image_size", "color", "labels", "num_classes") if hasattr(config, name)]
    return replace(config, **{name: decoded[name] for name in names})


def refuse_other_shape(other: "Pretrained", got: tuple[int, int, int], path: Path) -> None:
    """Raises UserError where the model takes images of another (channels, height, width) than the data has."""
    wanted = (other.channels, other.image_size, other.image_size)
    if wanted != got:
        key, value = ("data.color", got[0]) if wanted[1:] == got[1:] else ("data.image_size", got[1])
        raise UserError(
            key,
            f"got {value} and so images of {got} (channels, height, width); {path} takes {wanted}. Leave out "
            "data.image_size and data.color: they are read from the model.",
        )


def refuse_other_conditions(other: "Pretrained", data: ImageDataset, path: Path) -> None:
    """Raises UserError where the model takes classes or vectors, and the data has none or others."""
    network = other.denoiser.network
    if network.condition_dim and network.condition_dim != data.condition_dim:
        has = f"vectors of length {data.condition_dim}" if data.condition_dim else "no vectors"
        raise UserError(
            "data.condition_file",
            f"got data with {has}; {path} was trained on condition vectors of length {network.condition_dim}. Set it "
            "to a safetensors file of them.",
        )
    if network.num_classes and data.condition_dim:
        raise UserError(
            "data.condition_file", f"got condition vectors; {path} was trained on classes instead. Leave it out."
        )
    if network.num_classes and not data.num_classes:
        raise UserError(
            "data.labels",
            f"got data without classes; {path} has {network.num_classes}. Put the images into a folder a class, or add "
            "a column label to the metadata (another column: data.labels=metadata data.label_column=NAME).",
        )
    if network.num_classes and network.num_classes != data.num_classes:
        some = ", ".join(data.class_names[:5]) + (", ..." if data.num_classes > 5 else "")
        raise UserError(
            "data.labels",
            f"got data of {data.num_classes} classes ({some}); {path} has {network.num_classes}. Name all of them; or, "
            f"where images of some are missing, give each image the number of its class in training, 0 to "
            f"{network.num_classes - 1}, as its folder or in the metadata's column.",
        )


# --- queries ---------------------------------------------------------------------------------------------------------


ROLES = {"generated": 0, "held_out": 2}
"""What a query is -> its number in samples.safetensors (1 is what files call a control)."""


@dataclass(frozen=True)
class Queries:
    """All queries of the run, and which of them this command works on.

    image: [Q, C, H, W] in the model's space. picture: [Q, C, H, W] in [-1, 1], the same where that is no latent space.
    condition: [Q] labels, [Q, d] vectors or None; query i is row i.
    role: of every query, see ``ROLES``. fingerprints: of every query, by id. selected: ids, sorted, as
    ``queries.index`` chooses them.
    """

    image: Tensor
    picture: Tensor
    condition: Tensor | None
    role: list[int]
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
            f"got queries of the model {str(sampled_from)[:16]}; the run's model is {model.fingerprint[:16]}. "
            f"Rerun mucs sample with overwrite=true, or use another run=.",
        )
    path = folder / "samples.safetensors"
    tensors = read_tensors(path, manifest["outputs"][path.name]["sha256"])
    fingerprints = {int(query): print_ for query, print_ in manifest["queries"].items()}
    require_forms(path, tensors, SAMPLE_FORMS, "sample", Q=len(fingerprints))
    require_finite(path, tensors, "sample")
    if sorted(fingerprints) != list(range(len(fingerprints))):
        raise DamagedError(
            str(folder / "manifest.json"),
            "got queries that are not numbered from 0. Rerun mucs sample with overwrite=true.",
        )
    selected = chosen_queries(context.config.queries.index, len(fingerprints))
    image = tensors["image"]
    picture, condition = tensors.get("picture", image), tensors.get("condition")
    role = tensors["role"].tolist() if "role" in tensors else [ROLES["generated"]] * len(image)
    return Queries(image, picture, condition, role, fingerprints, selected)


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
