"""Models trained as the run's base model was, without some of the images: what evaluations by retraining rest on.

Each lies in ``retrain/<key>/``, the key being a fingerprint of the data set, the removed images, the recipe and the
training seed, so that methods and evaluations share it. Several processes may train at once: each takes a model that
no other one is at.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint, write_tensors
from mucs_cli.config import result_config
from mucs_cli.diffusion.checkpoint import load_checked, save_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.training import Trainer
from mucs_cli.errors import DamagedError, UserError
from mucs_cli.locks import locked
from mucs_cli.rehearsal import Loop, StagePlan
from mucs_cli.runtime import log, stage_log
from mucs_cli.schemas import PretrainedConfig
from mucs_cli.stage_folder import Stage, require_manifest
from mucs_cli.stages.context import Context
from mucs_cli.stages.fitting import files_of, fit, training_settings
from mucs_cli.stages.loading import Inputs
from mucs_cli.stages.new_model import build_denoiser

RECIPE = ("model", "diffusion", "training")
"""Sections that say how the base model was trained."""


@dataclass(frozen=True)
class Retraining:
    """One model.

    removed: sorted example ids that it does without.
    seed: its training seed.
    in_batches_of_all: trained in the batches of all images, with random images in the place of removed ones, see
        ``fitting.batch_ids``; else the images that are left are shuffled anew.
    """

    removed: tuple[int, ...]
    seed: int
    in_batches_of_all: bool = False

    @classmethod
    def of(cls, removed: Sequence[int] | np.ndarray, seed: int, in_batches_of_all: bool = False) -> "Retraining":
        """From example ids in any order. With nothing removed both ways of making batches are one."""
        ids = tuple(sorted(int(example) for example in removed))
        return cls(ids, seed, in_batches_of_all and len(ids) > 0)


class Retrainings:
    """The retrained models of a run.

    Args:
        context: the command.
        inputs: data and base model.
    Attributes:
        base_seed: the training seed of the base model.
    Raises:
        UserError: the model was not trained in this run, so that how is not known.
    """

    def __init__(self, context: Context, inputs: Inputs):
        if isinstance(context.config.model, PretrainedConfig):
            raise UserError(
                "evaluation",
                f"got {context.config.evaluation.name}, which retrains; with model=pretrained it is not known "
                "how. Train one here (mucs train), or use evaluation=overlap or evaluation=retrieval.",
            )
        self.context, self.inputs = context, inputs
        self.base_seed: int = context.config.training.seed
        self.base = require_manifest(context.folder("train"), "train")
        self.training_ids = set(inputs.data.training.tolist())

    def identity(self, wanted: Retraining) -> dict[str, Any]:
        """What decides the weights."""
        config = {section: result_config(getattr(self.context.config, section)) for section in RECIPE}
        config["training"] |= {"seed": wanted.seed}
        inputs = {"dataset": self.inputs.data.fingerprint, "removed": fingerprint(list(wanted.removed))}
        if wanted.in_batches_of_all:
            inputs["in_batches_of"] = "all"
        return {"config": config, "inputs": inputs}

    def key(self, wanted: Retraining) -> str:
        """The name of the model's folder."""
        return fingerprint(self.identity(wanted))[:16]

    def folder(self, wanted: Retraining) -> Path:
        return self.context.folder("retrain", self.key(wanted))

    def is_done(self, wanted: Retraining) -> bool:
        return (self.folder(wanted) / "manifest.json").exists()

    def denoiser(self, wanted: Retraining) -> Denoiser:
        """A finished model, on the device, in evaluation mode.

        Raises:
            UserError: it has not been trained, or its file is damaged.
        """
        folder = self.folder(wanted)
        try:
            denoiser = load_checked(folder, require_manifest(folder, "evaluate"))
        except DamagedError as error:
            raise DamagedError(
                str(folder),
                f"holds a damaged model ({Path(error.subject).name}). Delete the folder and run mucs evaluate again: "
                "of the models trained again, only this one is.",
            ) from error
        denoiser.network.requires_grad_(False).to(self.inputs.device)
        return denoiser

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, wanted: Sequence[Retraining]) -> None:
        """Trains those that are missing; where another command is at one, it is waited for in the end.

        Several processes of one command share them out; each model is trained by one.

        Raises:
            UserError: an image to remove is no training image, or none is left; or training fails.
        """
        tasks = list(dict.fromkeys(wanted))
        for task in tasks:
            self._check(task)
        left = processes.on_first(lambda: self._missing(tasks))
        log.info("retrain: %d models, %d of them to be trained", len(tasks), len(left))

        def train_unless_locked(number: int) -> list[int]:
            with locked(self.folder(tasks[number]), wait=False) as is_mine:
                if is_mine:
                    self._train(tasks[number], f"retrain {number + 1}/{len(tasks)}")
            return [number]

        while left:
            for number, _ in processes.share_out(left, train_unless_locked):
                log.debug("retrain: %d is done, or another command is at it", number)
            left = processes.on_first(lambda: self._missing(tasks))
            if left:
                log.info("retrain: waiting for other commands, which are at %d models", len(left))
                with locked(self.folder(tasks[left[0]])):
                    pass

    def _missing(self, tasks: Sequence[Retraining]) -> list[int]:
        """Positions of those that have not been trained."""
        return [number for number, task in enumerate(tasks) if not self.is_done(task)]

    def _check(self, task: Retraining) -> None:
        unknown = set(task.removed) - self.training_ids
        if unknown or len(task.removed) >= len(self.training_ids):
            what = f"image {min(unknown)}, which is not trained on" if unknown else "all training images"
            raise UserError("evaluation", f"got {what} to remove. Remove fewer (evaluation.k, evaluation.share).")

    def _train(self, task: Retraining, title: str) -> None:
        if self.is_done(task):
            return
        folder, data, device = self.folder(task), self.inputs.data, self.inputs.device
        training = replace(self.context.config.training, seed=task.seed)
        stage = Stage(folder, "evaluate", self.identity(task))
        stage.begin()
        with stage_log(folder):
            denoiser = build_denoiser(replace(self.context.config, training=training), data)
            denoiser.network.to(device)
            trainer = Trainer(denoiser, training_settings(training))
            ids = np.setdiff1d(data.training, np.array(task.removed, dtype=np.int64))
            in_batches_of = data.training if task.in_batches_of_all else None
            saved_every = self.context.config.checkpoint.every_seconds
            facts = fit(trainer, data, ids, folder, saved_every, device, title, in_batches_of)
            files = save_denoiser(folder / "model", denoiser, trainer.result())
            write_tensors(folder / "removed.safetensors", {"example_id": torch.tensor(task.removed, dtype=torch.int64)})
            counts = {"training_images": len(ids), "removed": len(task.removed), "steps": trainer.step}
            outputs = [*files, folder / "removed.safetensors", *files_of(folder)]
            stage.finish(facts | {"device": str(device), "seeds": {"training": task.seed}, "counts": counts}, outputs)
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)  # a hundred models' would fill the disk

    # --- what it costs ------------------------------------------------------------------------------------------------

    def plan(self, wanted: Sequence[Retraining]) -> StagePlan:
        """How many models there are to train, with the time and disk that takes, judged by the base model's."""
        tasks = list(dict.fromkeys(wanted))
        missing = [task for task in tasks if not self.is_done(task)]
        steps, rate = self.base["counts"]["steps"], self.base["steps_per_second"]
        seconds = len(missing) * steps / rate if rate else None
        size = sum(record["bytes"] for name, record in self.base["outputs"].items() if name.startswith("model/"))
        return StagePlan(
            "evaluate",
            [Loop("retrain", "models", len(tasks), len(tasks) - len(missing), seconds=seconds)],
            disk=len(missing) * size,
            notes=(
                f"{steps} updates a model at {rate}/s, as the base model was trained; a worker trains "
                "one model at a time",
            ),
        )
