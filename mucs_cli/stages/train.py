"""``mucs train``: trains the base model and saves its averaged weights."""

from typing import Any

from mucs_cli import processes
from mucs_cli.artifacts import write_tensors
from mucs_cli.config import TRAIN_SECTIONS
from mucs_cli.diffusion.checkpoint import save_denoiser
from mucs_cli.diffusion.training import Trainer
from mucs_cli.errors import UserError
from mucs_cli.runtime import log, stage_log
from mucs_cli.schemas import PretrainedConfig
from mucs_cli.stage_folder import Stage
from mucs_cli.stages.context import Context
from mucs_cli.stages.fitting import files_of, fit, training_settings
from mucs_cli.stages.loading import load_data, prepare_device
from mucs_cli.stages.new_model import build_denoiser


def run(context: Context) -> None:
    """Writes ``train/``: ``model/`` (averaged weights), ``initial.safetensors``, ``metrics.csv`` and the manifest."""
    config = context.config
    if isinstance(config.model, PretrainedConfig):
        raise UserError("model", "got pretrained, which is not trained here. Start with mucs sample, or mucs run.")
    device, data = processes.first_then_all(lambda: (prepare_device(context), load_data(context)))
    folder = context.folder("train")
    stage = context.stage(folder, "train", sections=TRAIN_SECTIONS, inputs={"dataset": data.fingerprint})
    if stage.is_done():
        log.info("train: up to date (%s)", folder)
        return
    denoiser = build_denoiser(config, data)
    stage.begin()
    with stage_log(folder):
        write_tensors(folder / "initial.safetensors", dict(denoiser.network.named_parameters()))
        denoiser.network.to(device)
        trainer = Trainer(denoiser, training_settings(config.training))
        facts = fit(trainer, data, data.training, folder, config.checkpoint.every_seconds, device)
        facts |= {
            "device": str(device),
            "seeds": {"training": config.training.seed, "data": config.data.seed},
            "preconditioning": denoiser.facts(),
            "parameters": sum(p.numel() for p in trainer.parameters.values()),
            "counts": {"training_images": len(data.training), "steps": trainer.step},
        }
        processes.on_first(lambda: save(stage, trainer, facts))
        log.info("train: %d steps, loss %.4f, in %s", trainer.step, facts["final_loss"], folder / "model")


def save(stage: Stage, trainer: Trainer, facts: dict[str, Any]) -> None:
    """Writes the model and the manifest."""
    files = save_denoiser(stage.folder / "model", trainer.denoiser, trainer.result())
    stage.finish(facts, [*files, stage.folder / "initial.safetensors", *files_of(stage.folder)])
