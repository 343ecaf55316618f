"""``mucs train``: trains the base model and saves its averaged weights."""

import csv
import io
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mucs_cli.artifacts import read_tensors, write_tensors, write_text
from mucs_cli.config import TRAIN_SECTIONS, PipelineConfig
from mucs_cli.data.dataset import ImageDataset
from mucs_cli.diffusion.checkpoint import PRECONDITIONINGS, precondition, save_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.networks import AUGMENTATION_DIM, DiT, UNet
from mucs_cli.diffusion.training import Trainer, TrainingSettings, learning_rate_at, train
from mucs_cli.errors import UserError
from mucs_cli.rng import ShuffledOrder, derive_seed, generator
from mucs_cli.runtime import Progress, log, log_file
from mucs_cli.schemas import DiffusionConfig, DiTConfig, EDMConfig, NetworkConfig, PretrainedConfig, UNetConfig
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import load_data, prepare_device

DIT_SIZES = {"tiny": (64, 3, 4), "small": (384, 12, 6), "paper": (768, 12, 12)}
"""width, num_layers, num_heads; "paper" is the DiT of MUCS's experiments (a DiT-B)."""
UNET_SIZES: dict[str, tuple[int, list[int], int, list[int]]] = {
    "tiny": (16, [1, 2], 1, [4]),
    "small": (64, [2, 2], 2, [16]),
    "paper": (128, [2, 2, 2], 4, [16]),
}
"""channels, multipliers, layers_per_block, attention_resolutions; "paper" is EDM's DDPM++ for CIFAR-10."""
METRIC_ROWS = 500


def run(context: Context) -> None:
    """Writes ``train/``: ``model/`` (averaged weights), ``initial.safetensors``, ``metrics.csv`` and the manifest."""
    config = context.config
    if isinstance(config.model, PretrainedConfig):
        raise UserError("model", "got pretrained, which is not trained here. Start with mucs sample, or mucs run.")
    device = prepare_device(context)
    data = load_data(context)
    folder = context.folder("train")
    stage = context.stage(folder, "train", sections=TRAIN_SECTIONS, inputs={"dataset": data.fingerprint})
    if stage.is_done():
        log.info("train: up to date (%s)", folder)
        return
    denoiser = build_denoiser(config, data)
    stage.begin()
    with log_file(folder / "log.txt"):
        write_tensors(folder / "initial.safetensors", dict(denoiser.network.named_parameters()))
        denoiser.network.to(device)
        trainer = Trainer(denoiser, training_settings(config))
        resume(trainer, folder / "checkpoint")
        facts = fit(trainer, data, folder, config.training.checkpoint_every_seconds, device)
        model_files = save_denoiser(folder / "model", denoiser, trainer.average)
        stage.finish(
            {
                **facts,
                "device": str(device),
                "seeds": {"training": config.training.seed, "data": config.data.seed},
                "preconditioning": denoiser.facts(),
                "parameters": sum(p.numel() for p in trainer.parameters.values()),
                "counts": {"training_images": len(data.training), "steps": trainer.step},
            },
            [*model_files, folder / "initial.safetensors", folder / "metrics.csv"],
        )
        log.info("train: %d steps, loss %.4f, in %s", trainer.step, facts["final_loss"], folder / "model")


def fit(trainer: Trainer, data: ImageDataset, folder: Path, every: float, device: torch.device) -> dict[str, Any]:
    """Trains to the end, with resumable checkpoints; returns facts for the manifest."""
    settings = trainer.settings
    order = ShuffledOrder(len(data.training), settings.seed, "order")
    conditional = trainer.denoiser.network.is_conditional

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids = data.training[order.batch(step, settings.batch_size).numpy()]
        condition = None
        if conditional:
            source = generator(settings.seed, "choice_of_condition", step)
            choice = torch.randint(max(1, data.conditions_per_image), (len(ids),), generator=source)
            condition = data.conditions(ids, choice)
        return data.images(ids).to(device), None if condition is None else condition.to(device)

    last_saved = time.monotonic()
    started, first = last_saved, trainer.step
    with Progress("train", settings.num_steps, "steps", trainer.step) as progress:

        def on_step(loss: float) -> None:
            nonlocal last_saved
            progress.advance(note=f"loss {loss:.3f}")
            if time.monotonic() - last_saved > every:
                save_checkpoint(trainer, folder / "checkpoint")
                last_saved = time.monotonic()

        try:
            train(trainer, batch, on_step)
        except FloatingPointError as error:
            raise UserError(
                "training.learning_rate",
                f"got a non-finite {error} with {settings.learning_rate}. Lower it; checkpoints up to there are kept "
                f"in {folder / 'checkpoint'}.",
            ) from error
    write_metrics(trainer, folder / "metrics.csv")
    tail = trainer.losses[-max(1, settings.num_steps // 20) :]
    return {
        "final_loss": math.fsum(tail) / len(tail),
        "steps_per_second": round((trainer.step - first) / (time.monotonic() - started), 2),
    }


def save_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Writes the state after the current step; the last two stay."""
    write_tensors(folder / f"step_{trainer.step:09d}.safetensors", trainer.state())
    for old in sorted(folder.glob("step_*.safetensors"))[:-2]:
        old.unlink()


def resume(trainer: Trainer, folder: Path) -> None:
    """Loads the newest readable checkpoint, if there is one."""
    for path in sorted(folder.glob("step_*.safetensors"), reverse=True):
        try:
            trainer.load_state(read_tensors(path))
        except UserError as error:
            log.warning("%s; trying the one before", error)
            continue
        log.info("train: going on from step %d (%s)", trainer.step, path)
        return


def write_metrics(trainer: Trainer, path: Path) -> None:
    """``step,loss,learning_rate``: mean losses over windows of steps, about 500 rows."""
    settings, losses = trainer.settings, trainer.losses
    window = max(1, math.ceil(len(losses) / METRIC_ROWS))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "loss", "learning_rate"])
    for start in range(0, len(losses), window):
        part = losses[start : start + window]
        last = start + len(part)
        rows.writerow([last, f"{math.fsum(part) / len(part):.6g}", f"{learning_rate_at(last - 1, settings):.6g}"])
    write_text(path, text.getvalue())


def training_settings(config: PipelineConfig) -> TrainingSettings:
    c = config.training
    return TrainingSettings(
        num_steps=c.num_steps,
        batch_size=c.batch_size,
        micro_batch_size=c.micro_batch_size,
        learning_rate=c.learning_rate,
        weight_decay=c.weight_decay,
        warmup_steps=c.warmup_steps,
        decay=c.decay,
        ema_decay=c.ema_decay,
        condition_dropout=c.condition_dropout,
        horizontal_flip=c.horizontal_flip,
        augmentation=c.augmentation,
        seed=c.seed,
    )


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
        network: DiT | UNet = DiT(**dit_arguments(config.model, data.height), **common)
    else:
        assert isinstance(config.model, UNetConfig)
        network = UNet(**unet_arguments(config.model, data.height), **common)
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
