"""A diffusers checkpoint on disk: where its parts are, and what is refused before anything is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mucs_cli.errors import UserError

WEIGHTS_STEM = "diffusion_pytorch_model"
LORA_FILES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TEXT_COMPONENTS = ("text_encoder", "tokenizer", "prior", "image_encoder")  # and those numbered or suffixed
IDLE_COMPONENTS = ("safety_checker", "feature_extractor")
SUPPORTED = (
    "Supported are DDPMPipeline, DDIMPipeline and DiTPipeline folders, and UNet2DModel or DiTTransformer2DModel "
    "folders with a scheduler_config.json"
)


@dataclass(frozen=True)
class CheckpointFiles:
    """network: folder of the network; scheduler: its config file; autoencoder: folder, or None in a pixel model."""

    network: Path
    scheduler: Path
    autoencoder: Path | None


def find_checkpoint(path: Path) -> CheckpointFiles:
    """The parts of a pipeline folder, or of a bare network with its scheduler in it, in it or beside it.

    Raises:
        UserError: there is no such folder, it holds no such checkpoint, or one of a kind that is not supported.
    """
    if path.is_file():
        hint = convert_hint(path) if path.suffix in PICKLES else "Save the model with diffusers' save_pretrained."
        raise UserError(str(path), f"got a file; expected a folder saved by diffusers. {hint}")
    if not path.is_dir():
        raise UserError(
            str(path),
            "not found; expected a folder saved by diffusers. Correct model.path; download a model of a hub first.",
        )
    for name in LORA_FILES:
        if (path / name).exists():
            raise UserError(
                str(path / name), "got a LoRA checkpoint; these are not supported yet. Merge it into its base model."
            )
    index = path / "model_index.json"
    if index.exists():
        refuse_foreign_components(index)
    network = next(
        (folder for folder in (path / "unet", path / "transformer") if (folder / "config.json").exists()), path
    )
    if not (network / "config.json").exists():
        pickle = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLES), None)
        hint = f"{SUPPORTED}." if pickle is None else convert_hint(pickle)
        raise UserError(str(path), f"got a folder without a network's config.json; expected a diffusers model. {hint}")
    places = (network, network / "scheduler", network.parent / "scheduler", network.parent)
    scheduler = next((p / "scheduler_config.json" for p in places if (p / "scheduler_config.json").exists()), None)
    if scheduler is None:
        raise UserError(
            str(network),
            "got a network without a scheduler; expected scheduler_config.json in it, or in scheduler/ in it or beside "
            "it. Save the scheduler it was trained with there (scheduler.save_pretrained).",
        )
    autoencoder = next((p / "vae" for p in (network, network.parent) if (p / "vae" / "config.json").exists()), None)
    return CheckpointFiles(network, scheduler, autoencoder)


def refuse_foreign_components(index: Path) -> None:
    """Raises UserError where a pipeline has parts that cannot be used, or whose code is not diffusers' own."""
    for name, entry in read_config(index).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        library, kind = entry
        if name.startswith(TEXT_COMPONENTS):
            raise UserError(
                str(index),
                f"got a pipeline with {name} ({kind}), a text- or image-prompted model; these are not supported yet. "
                f"{SUPPORTED}.",
            )
        if name in IDLE_COMPONENTS:
            continue
        if name not in ("unet", "transformer", "scheduler", "vae"):
            raise UserError(
                str(index), f"got a pipeline with {name} ({kind}), which is not supported yet. {SUPPORTED}."
            )
        if library != "diffusers":
            raise UserError(
                str(index),
                f"got {name} from {library!r}; expected one of diffusers: other code is never run. {SUPPORTED}.",
            )


def read_config(path: Path) -> dict[str, Any]:
    """A diffusers config file.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error}). Save the checkpoint again.") from error
    if not isinstance(value, dict):
        raise UserError(str(path), "got no JSON object; expected a config of diffusers. Save the checkpoint again.")
    return value


@dataclass(frozen=True)
class WeightFiles:
    """Safetensors files of one part, and the diffusers ``variant`` in their names (``fp16``, for example), or None."""

    files: tuple[Path, ...]
    variant: str | None


def find_weights(folder: Path) -> WeightFiles:
    """The weights of one part of a checkpoint, in one file or in shards.

    The files in full precision, or, where there are none, those of the only variant.

    Raises:
        UserError: there are none, only pickled ones, several variants, or a file is truncated.
    """
    names = sorted(file.name for file in folder.glob(f"{WEIGHTS_STEM}*.safetensors"))
    stems = [name.removesuffix(".safetensors").split("-0")[0] for name in names]  # -00001-of-00002 numbers a shard
    variants = sorted({stem.removeprefix(WEIGHTS_STEM).removeprefix(".") for stem in stems})
    if not variants:
        pickle = next((file for file in sorted(folder.iterdir()) if file.suffix in PICKLES), None)
        if pickle is not None:
            raise UserError(str(pickle), f"got pickled weights; expected safetensors. {convert_hint(pickle)}")
        raise UserError(str(folder), f"got no weights; expected {WEIGHTS_STEM}.safetensors. Save the checkpoint again.")
    if variants[0] != "" and len(variants) > 1:
        raise UserError(
            str(folder),
            f"got weights of the variants {', '.join(variants)}; expected one. Leave only one of them there.",
        )
    variant = variants[0] or None
    infix = f".{variant}" if variant else ""
    single = folder / f"{WEIGHTS_STEM}{infix}.safetensors"
    if single.exists():
        files = [single]
    else:
        index = folder / f"{WEIGHTS_STEM}.safetensors.index{infix}.json"
        weight_map = read_config(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise UserError(
                str(index), "names no weight files, or files outside its folder. Save the checkpoint again."
            )
        files = [folder / name for name in sorted(set(names))]
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except Exception as error:  # the library meets damaged headers with errors of many kinds
            raise UserError(
                str(file), f"is missing, truncated or no safetensors file ({error}). Copy or save the checkpoint again."
            ) from error
    return WeightFiles(tuple(files), variant)


def convert_hint(pickle: Path) -> str:
    """What to do about a file that is only safe to open where its origin is trusted."""
    return (
        f"{pickle.name} is a pickle, and opening one can run code in it. Where you trust it, load it with diffusers "
        "(from_pretrained, or from_single_file for a lone file) and save it with "
        "save_pretrained(NEW_FOLDER, safe_serialization=True); then set model.path=NEW_FOLDER."
    )
