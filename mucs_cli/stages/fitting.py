"""Training a model on images of the run, resumably: what ``mucs train`` and every retraining have in common."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mucs_cli import processes
from mucs_cli.artifacts import write_text
from mucs_cli.data.dataset import ImageDataset
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.training import Trainer, TrainingSettings, learning_rate_at, train
from mucs_cli.errors import UserError
from mucs_cli.interruption import saving
from mucs_cli.rng import ShuffledOrder, generator
from mucs_cli.runtime import REHEARSED_SECONDS, Progress, log
from mucs_cli.schemas import TrainingConfig
from mucs_cli.stages.checkpoints import read_checkpoint, write_checkpoint
from mucs_cli.text import csv_text

METRIC_ROWS = 500


def fit(
    trainer: Trainer,
    data: ImageDataset,
    ids: np.ndarray,
    folder: Path,
    checkpoint_seconds: float,
    device: torch.device,
    title: str = "train",
    in_batches_of: np.ndarray | None = None,
) -> dict[str, Any]:
    """Trains to the end, from where an interrupted attempt was; returns facts for the manifest.

    Several processes train one model together, and all end with the same weights; the first one reads and writes.

    Args:
        trainer: fresh, its network on the device.
        data: the run's.
        ids: example ids of the images to train on; sorted, int64 [n].
        folder: gets ``checkpoint/`` while it trains, then ``metrics.csv`` and, if measured, ``validation.csv``.
        checkpoint_seconds: time between saved states.
        device: where to compute.
        title: of the progress.
        in_batches_of: see ``batch_ids``.
    Raises:
        UserError: the loss is not finite any more, or a file cannot be written.
    """
    settings = trainer.settings
    if processes.is_first():
        resume(trainer, folder / "checkpoint", title)
    if processes.count() > 1:
        trainer.load_state(dict(processes.tensors_of_first(trainer.state())))
    ids_of = batch_ids(ids, settings, in_batches_of)
    conditional = trainer.denoiser.network.is_conditional

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        chosen = ids_of(step)
        condition = None
        if conditional:
            source = generator(settings.seed, "choice_of_condition", step)
            choice = torch.randint(max(1, data.conditions_per_image), (len(chosen),), generator=source)
            condition = data.conditions(chosen, choice)
        return data.images(chosen).to(device), None if condition is None else condition.to(device)

    def save() -> None:
        if processes.is_first():
            write_checkpoint(folder / "checkpoint", trainer.step, trainer.state())

    last_saved = time.monotonic()
    started, first = last_saved, trainer.step
    measure_loss, every = held_out_loss(data, settings, device), settings.validate_every
    measurements = 0 if every is None else settings.num_steps // every - trainer.step // every
    done = trainer.step
    with saving(save), Progress(title, settings.num_steps, "steps", done, REHEARSED_SECONDS, measurements) as progress:

        def measure(denoiser: Denoiser) -> float:
            assert measure_loss is not None
            with progress.setup():
                return processes.on_first(lambda: measure_loss(denoiser))

        def on_step(loss: float) -> None:
            nonlocal last_saved
            held_out = {"held_out_loss": trainer.validation[-1]} if trainer.validation else {}
            progress.advance(numbers={"loss": loss, **held_out})
            if time.monotonic() - last_saved > checkpoint_seconds:
                save()
                last_saved = time.monotonic()

        try:
            if progress.rehearsal is not None and every is not None:
                trainer.validate(measure)  # the first one is further away than a rehearsal goes
            train(trainer, batch, on_step, measure)
        except FloatingPointError as error:
            raise UserError(
                "training.learning_rate",
                f"got a non-finite {error} with {settings.learning_rate}. Lower it; checkpoints up to there are kept "
                f"in {folder / 'checkpoint'}.",
            ) from error
    write_metrics(trainer, folder / "metrics.csv")
    if trainer.validation:
        write_validation(trainer, folder / "validation.csv")
    tail = trainer.losses[-max(1, trainer.step // 20) :]
    return {
        "final_loss": math.fsum(tail) / len(tail),
        "steps_per_second": round((trainer.step - first) / (time.monotonic() - started), 2),
        "best_step": trainer.best_step,
        "processes": processes.count(),
        **({"held_out_loss": min(trainer.validation)} if trainer.validation else {}),
    }


def batch_ids(
    ids: np.ndarray, settings: TrainingSettings, in_batches_of: np.ndarray | None = None
) -> Callable[[int], np.ndarray]:
    """Step -> the example ids of its batch, [batch size].

    Args:
        ids: of the images to train on, [n].
        settings: with batch size and seed.
        in_batches_of: ids of another training's images, which hold ``ids``: its batches, with a random one of ``ids``
            in the place of every image that is not among them. Sigma and noise belong to places in batches, so that two
            such trainings of one seed differ in the replaced images alone. None: ``ids`` are shuffled anew.
    """
    shuffled = ids if in_batches_of is None else in_batches_of
    order = ShuffledOrder(len(shuffled), settings.seed, "order")
    is_kept = None if in_batches_of is None else np.isin(shuffled, ids)

    def of_step(step: int) -> np.ndarray:
        places = order.batch(step, settings.batch_size).numpy()
        chosen = shuffled[places]
        if is_kept is None:
            return chosen
        source = generator(settings.seed, "replacement", step)
        replacement = ids[torch.randint(len(ids), (len(chosen),), generator=source).numpy()]
        return np.where(is_kept[places], chosen, replacement)

    return of_step


def held_out_loss(
    data: ImageDataset, settings: TrainingSettings, device: torch.device
) -> Callable[[Denoiser], float] | None:
    """The mean loss of the held-out images, a fixed draw (sigma, noise) each; None where it is not asked for.

    The draws are of the stream ("held_out_loss", block), whatever the training seed: losses of retrainings compare.
    """
    if settings.validate_every is None:
        return None
    ids, size = data.held_out, settings.micro_batch_size or settings.batch_size

    @torch.no_grad()
    def measure(denoiser: Denoiser) -> float:
        losses = []
        for block, start in enumerate(range(0, len(ids), size)):
            image = data.images(ids[start : start + size])
            source = generator(0, "held_out_loss", block)
            sigma, noise = denoiser.training_sigma(len(image), source), torch.randn(image.shape, generator=source)
            condition = data.conditions(ids[start : start + size]) if denoiser.network.is_conditional else None
            arguments = (image, noise, sigma, condition)
            losses.append(denoiser.loss(*(None if part is None else part.to(device) for part in arguments)).cpu())  # type: ignore[arg-type]
        return float(torch.cat(losses).double().mean())

    return measure


def files_of(folder: Path) -> list[Path]:
    """What ``fit`` left in the folder for good."""
    return [path for name in ("metrics.csv", "validation.csv") if (path := folder / name).exists()]


def resume(trainer: Trainer, folder: Path, title: str) -> None:
    """Loads the newest readable checkpoint, if there is one."""
    tensors = read_checkpoint(folder)
    if tensors:
        trainer.load_state(tensors)
        log.info("%s: going on from step %d (%s)", title, trainer.step, folder)


def write_metrics(trainer: Trainer, path: Path) -> None:
    """``step,loss,learning_rate``: mean losses over windows of steps, about 500 rows."""
    settings, losses = trainer.settings, trainer.losses
    window = max(1, math.ceil(len(losses) / METRIC_ROWS))
    rows: list[list[Any]] = [["step", "loss", "learning_rate"]]
    for start in range(0, len(losses), window):
        part = losses[start : start + window]
        last = start + len(part)
        rows.append([last, f"{math.fsum(part) / len(part):.6g}", f"{learning_rate_at(last - 1, settings):.6g}"])
    write_text(path, csv_text(rows))


def write_validation(trainer: Trainer, path: Path) -> None:
    """``step,loss``: the held-out losses of the averaged weights."""
    every = trainer.settings.validate_every or 1
    rows = [f"{(i + 1) * every},{loss:.6g}" for i, loss in enumerate(trainer.validation)]
    write_text(path, "\n".join(["step,loss", *rows]) + "\n")


def training_settings(c: TrainingConfig) -> TrainingSettings:
    """The section of the configuration, as the trainer takes it."""
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
        validate_every=c.validate_every,
        patience=c.patience,
        seed=c.seed,
    )
