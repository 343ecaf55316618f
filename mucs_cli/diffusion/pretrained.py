"""Models to attribute that were not trained in this run: checkpoints of diffusers, and of other runs.

Nothing in a checkpoint is run: its classes are chosen from fixed lists, and its weights are safetensors.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL

from mucs_cli.artifacts import check_file, fingerprint, read_tensors, sha256_file
from mucs_cli.diffusion.checkpoint import (
    MODEL,
    WEIGHTS,
    build_network,
    load_checked,
    load_denoiser,
    load_weights,
    precondition,
)
from mucs_cli.diffusion.denoiser import Denoiser, EDMDenoiser
from mucs_cli.diffusion.latent import LatentCodec
from mucs_cli.diffusion.pretrained_files import SUPPORTED, find_checkpoint, find_weights, read_config
from mucs_cli.diffusion.pretrained_networks import PretrainedDiT, PretrainedNetwork, PretrainedUNet, make_ready
from mucs_cli.errors import UserError
from mucs_cli.records import read_manifest
from mucs_cli.rng import derive_seed

NETWORK_CLASSES: dict[str, type[PretrainedUNet] | type[PretrainedDiT]] = {
    "UNet2DModel": PretrainedUNet,
    "DiTTransformer2DModel": PretrainedDiT,
    "Transformer2DModel": PretrainedDiT,  # what DiT checkpoints of older diffusers say
}
DISCRETE_SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
)
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A loaded model and what its checkpoint says about it.

    denoiser: in evaluation mode, float32, on the CPU. Its ``network`` says ``num_classes``, ``condition_dim`` and
        ``has_null_condition``.
    codec: the autoencoder of a latent model, or None; the denoiser then works on latents.
    image_size, channels: of the images, in pixels.
    sample_shape: (C, H, W) of what the denoiser takes: the image's, or the latent's.
    facts: JSON values for manifests and reports: source, network, scheduler, preconditioning, sizes, parameters.
    fingerprint: SHA-256 over configurations and weight files; the same wherever the folder lies.
    fresh: from a seed, the denoiser with newly initialised weights (the stream ("initial_weights")), or with the
        initial weights that a run of ours saved; for the Monte Carlo null loss.
    """

    denoiser: Denoiser
    codec: LatentCodec | None
    image_size: int
    channels: int
    sample_shape: tuple[int, int, int]
    facts: dict[str, Any]
    fingerprint: str
    fresh: Callable[[int], Denoiser]


def load_pretrained(path: Path) -> Pretrained:
    """Loads a diffusers pipeline or network folder, a finished run, or a run's ``train/model``.

    Args:
        path: the folder.
    Raises:
        UserError: the checkpoint is missing, damaged, unsafe to load, or of a kind that is not supported.
    """
    for folder in (path, path / "model", path / "train" / "model"):
        if (folder / "denoiser.json").exists():
            return load_own(folder)
    return load_diffusers(path)


# --- checkpoints of mucs ---------------------------------------------------------------------------------------------


def load_own(folder: Path) -> Pretrained:
    """A model trained by mucs, checked against its manifest where that is beside it."""
    path, initial = folder.parent / "manifest.json", folder.parent / "initial.safetensors"
    manifest = read_manifest(path) if path.exists() and folder.name == MODEL else {}
    denoiser = load_checked(folder.parent, manifest) if manifest else load_denoiser(folder)
    network: Any = denoiser.network
    channels, side = network.config.in_channels, network.config.sample_size

    def fresh(seed: int) -> Denoiser:
        new = seeded(lambda: build_network(folder), seed)
        if initial.exists():
            if manifest:
                check_file(folder.parent, manifest, initial.name)
            load_weights(new, read_tensors(initial), initial)
        return replace(denoiser, network=new.eval())  # type: ignore[type-var]

    return Pretrained(
        denoiser,
        None,
        side,
        channels,
        (channels, side, side),
        {
            "source": "mucs",
            "network": type(network).__name__,
            "scheduler": None,
            **described(denoiser, side, channels, None),
        },
        fingerprint(plain(network.config), denoiser.facts(), sha256_file(folder / WEIGHTS)),
        fresh,
    )


# --- checkpoints of diffusers ----------------------------------------------------------------------------------------


def load_diffusers(path: Path) -> Pretrained:
    """A folder saved by diffusers."""
    files = find_checkpoint(path)
    config = read_config(files.network / "config.json")
    kind = network_class(config, files.network / "config.json")
    scheduler = read_config(files.scheduler)
    preconditioning = preconditioning_of(scheduler, files.scheduler)
    network = make_ready(load_part(kind, files.network))
    refuse_unusable(network, preconditioning, files.network / "config.json")
    denoiser = precondition(network, preconditioning, str(files.scheduler))
    hashes = [sha256_file(file) for file in find_weights(files.network).files]
    parts: list[Any] = [kind.__name__, plain(network.config), denoiser.facts(), hashes]
    codec = None
    channels, side = network.sample_shape[:2]
    if files.autoencoder is not None:
        codec = load_codec(files.autoencoder, channels)
        parts += [plain(codec.autoencoder.config), [sha256_file(f) for f in find_weights(files.autoencoder).files]]
        channels, side = codec.channels, side * codec.factor

    def fresh(seed: int) -> Denoiser:
        new = seeded(lambda: make_ready(kind.from_config(network.config)), seed)
        return replace(denoiser, network=new)  # type: ignore[type-var]

    return Pretrained(
        denoiser,
        codec,
        side,
        channels,
        network.sample_shape,
        {
            "source": "diffusers",
            "network": config["_class_name"],
            "scheduler": scheduler["_class_name"],
            **described(denoiser, side, channels, codec),
        },
        fingerprint(*parts),
        fresh,
    )


def network_class(config: Mapping[str, Any], path: Path) -> type[PretrainedUNet] | type[PretrainedDiT]:
    """Our counterpart of the network's class; raises UserError where there is none."""
    name = str(config.get("_class_name"))
    if config.get("quantization_config") is not None:
        raise UserError(str(path), "got quantized weights; expected float ones. Save the model before quantizing it.")
    if name == "UNet2DConditionModel" or (name == "Transformer2DModel" and config.get("norm_type") != "ada_norm_zero"):
        raise UserError(str(path), f"got a {name}, a text-to-image network; these are not supported yet. {SUPPORTED}.")
    if name not in NETWORK_CLASSES:
        raise UserError(str(path), f"got a {name}; expected UNet2DModel or DiTTransformer2DModel. {SUPPORTED}.")
    return NETWORK_CLASSES[name]


def load_part(kind: type[Any], folder: Path) -> Any:
    """A network or an autoencoder with exactly its own weights, in float32.

    diffusers' own loading also reads the parameter names of its older versions; what it would only warn about is an
    error here.
    """
    weights = find_weights(folder)
    try:
        part, report = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            variant=weights.variant,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # layers meet impossible sizes with errors of many kinds
        reason = str(error).split(". ")[0]  # diffusers goes on with advice on its own arguments
        raise UserError(
            str(folder), f"its weights and config.json do not fit ({reason}). Save the checkpoint again."
        ) from error
    for problem, said in (
        ("missing_keys", "no weights for"),
        ("unexpected_keys", "weights that config.json has no place for:"),
        ("mismatched_keys", "weights of another shape for"),
    ):
        if report[problem]:
            raise UserError(
                str(folder), f"got {said} {sorted(map(str, report[problem]))[0]}. Save the checkpoint again."
            )
    for name, tensor in part.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(str(folder), f"got values in {name} that are not finite. Save the checkpoint again.")
    return part


def preconditioning_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``Denoiser.facts`` of what a scheduler's config means.

    Values that the config leaves out are the defaults of its class, which differ between classes.

    Raises:
        UserError: the scheduler, or a way of using it, is not supported.
    """
    name = config.get("_class_name")
    if name not in DISCRETE_SCHEDULERS + EDM_SCHEDULERS:
        raise UserError(
            str(path),
            f"got {name}, which is not supported. Supported are {', '.join(DISCRETE_SCHEDULERS + EDM_SCHEDULERS)}: "
            "put the config of the one the model was trained with there.",
        )
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    values = {key: parameter.default for key, parameter in parameters.items() if key != "self"} | dict(config)
    if values.get("use_flow_sigmas") or values.get("timestep_type") == "continuous":
        option = "use_flow_sigmas" if values.get("use_flow_sigmas") else "timestep_type=continuous"
        raise UserError(str(path), f"got {name} with {option}, which is not supported. {SUPPORTED}.")
    if name in EDM_SCHEDULERS:
        defaults = inspect.signature(EDMDenoiser).parameters  # no checkpoint says how its training drew sigma
        return {
            "preconditioning": "edm",
            "p_mean": defaults["p_mean"].default,
            "p_std": defaults["p_std"].default,
            **{key: values[key] for key in ("sigma_data", "prediction_type", "sigma_min", "sigma_max")},
        }
    return {"preconditioning": "ddpm", "scheduler": values}


def refuse_unusable(network: PretrainedNetwork, preconditioning: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where the network cannot be driven by its scheduler, or has a shape that is not supported."""
    config: Any = network.config
    size = config.sample_size
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int) or size < 1:
        raise UserError(
            str(path), f"sample_size: got {config.sample_size}; expected the side of a square, in pixels. Set it there."
        )
    divisor = config.patch_size if isinstance(network, PretrainedDiT) else 2 ** (len(config.block_out_channels) - 1)
    if size % divisor:
        raise UserError(str(path), f"sample_size: got {size}; expected a multiple of {divisor} for this network.")
    channels = network.conv_out.out_channels if isinstance(network, PretrainedUNet) else network.out_channels
    if channels not in (config.in_channels, 2 * config.in_channels):
        raise UserError(
            str(path),
            f"out_channels: got {channels}; expected in_channels={config.in_channels}, or twice that (learned "
            "variance). Networks with further inputs are not supported.",
        )
    if isinstance(network, PretrainedDiT):
        return
    if config.class_embed_type is not None:
        raise UserError(
            str(path),
            f"class_embed_type: got {config.class_embed_type!r}, which is not supported; expected null, with "
            "num_class_embeds for class labels.",
        )
    if config.time_embedding_type == "fourier":
        raise UserError(
            str(path),
            "time_embedding_type: got 'fourier', which takes the logarithm of the timestep and has no value at the "
            "scheduler's lowest ones; expected 'positional' or 'learned'.",
        )
    if config.time_embedding_type == "learned":
        levels = preconditioning.get("scheduler", {}).get("num_train_timesteps", "no")
        if levels != config.num_train_timesteps:
            raise UserError(
                str(path),
                f"num_train_timesteps: got {config.num_train_timesteps} with time_embedding_type='learned'; the "
                f"scheduler has {levels} discrete timesteps, expected the same number.",
            )


def load_codec(folder: Path, latent_channels: int) -> LatentCodec:
    """The autoencoder of a latent model; raises UserError where it is of another kind or does not fit the network."""
    path = folder / "config.json"
    name = read_config(path).get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(str(path), f"got a {name}; expected an AutoencoderKL. {SUPPORTED}.")
    codec = LatentCodec(load_part(AutoencoderKL, folder))
    if codec.latent_channels != latent_channels:
        raise UserError(
            str(path),
            f"latent_channels: got {codec.latent_channels}; the network takes {latent_channels}. Pair the network with "
            "the autoencoder it was trained with.",
        )
    return codec


# --- both ------------------------------------------------------------------------------------------------------------


def seeded(build: Callable[[], Any], seed: int) -> Any:
    """``build()`` under the stream ("initial_weights") of ``seed``; the global random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "initial_weights"))  # layers initialise from it
        return build()


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers config without what depends on where and by which version it was saved."""
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}


def described(denoiser: Denoiser, side: int, channels: int, codec: LatentCodec | None) -> dict[str, Any]:
    """Facts that every kind of checkpoint has."""
    network = denoiser.network
    return {
        "preconditioning": denoiser.facts(),
        "image_size": side,
        "channels": channels,
        "num_classes": network.num_classes,
        "condition_dim": network.condition_dim,
        "has_null_condition": network.has_null_condition,
        "latent": None
        if codec is None
        else {
            "channels": codec.latent_channels,
            "factor": codec.factor,
            "scaling_factor": codec.scaling_factor,
            "shift_factor": codec.shift_factor,
        },
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
