"""The score engine at work in a run: losses of any models over all training images, block by block, kept on disk."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint, read_tensors, write_tensors
from mucs_cli.attribution.scoring import (
    GRANULE,
    Block,
    bank_losses,
    blocks_of,
    choose_block_size,
    independent_noise,
    replaced_parameters,
)
from mucs_cli.diffusion.noise_bank import NoiseBank, draw_noise_bank
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress, log, matmul_precision, smaller_batch
from mucs_cli.schemas import NoiseBankConfig
from mucs_cli.stages.blocks import BlockWork, find_kept, kept_tensor
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import Inputs, fixed_fact, save_fact
from mucs_cli.stages.work import Work

BASE_MODEL = -1
"""Stands for the base model where unlearned models are numbered by their queries."""


class Engine:
    """Losses of any models over all training images under one bank, in blocks of one size.

    Args:
        context, inputs: the command, and what it loaded.
        bank: the draws.
        noise_bank: their configuration: ``consistent=false`` gives every image and model noise of its own.
        flip: the training images' mirror images instead.
    """

    def __init__(
        self, context: Context, inputs: Inputs, bank: NoiseBank, noise_bank: NoiseBankConfig, flip: bool = False
    ):
        self.context = context
        self.denoiser = inputs.model.denoiser
        self.data = inputs.data
        self.bank = bank.to(inputs.device)
        self.device = inputs.device
        self.conditional = self.denoiser.network.is_conditional
        self.noise_bank = noise_bank
        self.flip = flip
        self.precision: str = context.config.score.precision
        self.block_size = processes.on_first(self._block_size)
        self.evaluations = 0
        self.seconds = 0.0

    @property
    def num_images(self) -> int:
        return len(self.data.training)

    def blocks(self) -> list[Block]:
        return blocks_of(self.num_images, self.block_size)

    def load(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images and their own conditions, on the device."""
        ids = self.data.training[rows.numpy()]
        conditions = self.data.conditions(ids) if self.conditional else None
        image = self.data.images(ids)
        image = (image.flip(3) if self.flip else image).to(self.device)
        return image, None if conditions is None else conditions.to(self.device)

    def losses(
        self, block: Block, models: Sequence[Mapping[str, Tensor]], progress: Progress, model_ids: Sequence[int]
    ) -> Tensor:
        """Losses of some models on a block, [M, len(block), n].

        Args:
            block: which training images.
            models: the tensors in which each differs from the base model.
            progress: is told of every forward pass.
            model_ids: the query of each model, or ``BASE_MODEL``; names its noise where that is not consistent.
        """
        image, condition = self.load(block.rows())
        ids = self.data.training[block.rows().numpy()].tolist()

        def own_noise(m: int, n: int) -> Tensor:
            return independent_noise(self.noise_bank.seed, model_ids[m], ids, n, image)

        noise = None if self.noise_bank.consistent else own_noise
        started = time.perf_counter()
        with matmul_precision(self.device, self.precision):
            losses = bank_losses(
                self.denoiser, image, condition, self.bank, models, lambda _: progress.advance(len(block)), noise
            )
        self.seconds += time.perf_counter() - started
        self.evaluations += len(models) * len(block) * len(self.bank)
        return losses[:, : len(block)]

    @torch.inference_mode()
    def pair_losses(self, rows: NDArray[np.int64], draws: NDArray[np.int64], tensors: Mapping[str, Tensor]) -> Tensor:
        """One model's losses on pairs of an image and a draw, in batches that are all as large as a block.

        A pair's loss has the same bits whichever pairs it is computed with.

        Args:
            rows: training rows, [P]; equal ones side by side are loaded once.
            draws: indices in the bank, [P].
            tensors: those in which the model differs from the base model.
        Returns:
            [P], float32, on the CPU.
        """
        found, started = [], time.perf_counter()
        parameters = dict(self.denoiser.network.named_parameters())
        with matmul_precision(self.device, self.precision), replaced_parameters(parameters, tensors):
            for start in range(0, len(rows), self.block_size):
                pairs = np.arange(start, start + self.block_size).clip(max=len(rows) - 1)  # padded with the last pair
                some, places = torch.unique_consecutive(torch.from_numpy(rows[pairs]), return_inverse=True)
                image, condition = self.load(some)
                places, draw = places.to(self.device), torch.from_numpy(draws[pairs]).to(self.device)
                found.append(
                    self.denoiser.loss(
                        image[places],
                        self.bank.noise[draw],
                        self.bank.sigma[draw],
                        None if condition is None else condition[places],
                    ).cpu()
                )
        self.seconds += time.perf_counter() - started
        self.evaluations += len(rows)
        return torch.cat(found)[: len(rows)]

    def shrink(self, error: RuntimeError) -> None:
        """A smaller block after running out of memory; any other error is raised again."""
        self.block_size = smaller_batch(error, self.block_size, "score.batch_size", GRANULE)
        save_fact(self.context.run, "score_block_size", self.block_size, self._key())

    def refuse_image(self, row: int) -> NoReturn:
        """Raises UserError: the base model's loss on a training row is not finite."""
        example = int(self.data.training[row])
        raise UserError(
            f"example {example} ({self.data.file[example]})",
            "got a base-model loss that is not finite. Check the image, or train the model longer.",
        )

    def throughput(self) -> float | None:
        """Evaluations (an image under a draw, through one model) a second; None where nothing was computed."""
        return round(self.evaluations / self.seconds, 1) if self.seconds else None

    def _block_size(self) -> int:
        """From the config, else from the run's earlier measurement, else measured now and stored in the run."""
        given = self.context.config.score.batch_size
        if given is not None:
            return int(given)

        def measure() -> int:
            rows = torch.arange(min(self.num_images, 256))
            image, condition = self.load(rows)
            with matmul_precision(self.device, self.precision):
                size = choose_block_size(self.denoiser, image, condition, self.bank, self.num_images)
            log.info("score: %d images a forward pass (measured; kept in machine.json)", size)
            return size

        return fixed_fact(self.context.run, "score_block_size", measure, self._key())

    def _key(self) -> str:
        precision = "" if self.precision == "float32" else f"/{self.precision}"
        return f"{self.device.type}/{self.num_images}{precision}"


def prepare_bank(context: Context, config: NoiseBankConfig, inputs: Inputs) -> tuple[NoiseBank, str]:
    """Draws the bank, at noise levels the model can take, and stores it under its fingerprint unless it is there.

    Returns:
        The bank, and its fingerprint.
    """
    data = inputs.data
    bank = draw_noise_bank(
        config.num_draws,
        (data.channels, data.height, data.width),
        grid=config.grid,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        rho=config.rho,
        seed=config.seed,
        antithetic=config.antithetic,
        nearest_sigma=inputs.model.denoiser.nearest_sigma,
        even_sigma=inputs.model.denoiser.even_sigma,
    )
    bank_print = fingerprint(bank.sigma, bank.noise)
    path = context.folder("noise_bank", f"{bank_print[:16]}.safetensors")
    if not holds_bank(path, bank_print):
        write_tensors(path, {"sigma": bank.sigma, "noise": bank.noise})
    return bank, bank_print


def holds_bank(path: Path, bank_print: str) -> bool:
    """Whether a file is there and holds the bank of that fingerprint, whole."""
    if not path.exists():
        return False
    try:
        found = read_tensors(path)
        if fingerprint(found["sigma"], found["noise"]) == bank_print:
            return True
    except (UserError, KeyError):
        pass
    log.warning("%s is damaged; drawing it again", path)
    return False


class ModelLosses(BlockWork):
    """One model's losses [N, n] under the engine's bank.

    Args:
        engine: computes them.
        tensors: gives those in which the model differs from the base model.
        model_id: its query, or ``BASE_MODEL``.
    """

    passes = ((0,),)
    tells_progress = True

    def __init__(self, engine: Engine, tensors: Callable[[], Mapping[str, Tensor]], model_id: int):
        self.engine, self.tensors_of_model, self.model_id = engine, tensors, model_id
        self.title = "score: base model" if model_id == BASE_MODEL else f"score: query {model_id}"
        self.tensors = {"loss": ("float32", (engine.num_images, len(engine.bank)))}

    def blocks(self) -> list[Block]:
        return self.engine.blocks()

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block) * len(self.engine.bank)

    def load(self, part: Sequence[int]) -> Mapping[str, Tensor]:
        return self.tensors_of_model()

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        loss = self.engine.losses(block, [loaded], progress, [self.model_id])[0]
        finite = loss.isfinite().all(dim=1)
        if not finite.all() and self.model_id == BASE_MODEL:
            self.engine.refuse_image(block.start + int((~finite).nonzero()[0]))
        return loss

    def shrink(self, error: RuntimeError) -> None:
        self.engine.shrink(error)


def base_losses(work: Work, engine: Engine, bank_print: str) -> np.ndarray:
    """The base model's losses [N, n] under the bank: from ``score/_base/``, or computed into it."""
    found = stored_losses(work, engine, bank_print, BASE_MODEL, "", lambda: {})
    assert found is not None
    return found


def stored_losses(
    work: Work,
    engine: Engine,
    bank_print: str,
    model_id: int,
    unlearned_print: str,
    load: Callable[[], Mapping[str, Tensor]] | None,
) -> np.memmap | None:
    """A model's losses [N, n] under the bank: from ``score/_base/`` or ``score/_losses/``, or computed into it.

    Args:
        work: names dataset and base model.
        engine: computes them.
        bank_print: the bank's fingerprint.
        model_id: a query, or ``BASE_MODEL``.
        unlearned_print: fingerprint of the query's unlearned model.
        load: gives the tensors in which it differs from the base model; None to compute nothing.
    Returns:
        None where they are not there and nothing is to be computed.
    """
    inputs = loss_inputs(work, engine, bank_print, model_id)
    if model_id != BASE_MODEL:
        inputs["unlearned_model"] = unlearned_print
    where = "_base" if model_id == BASE_MODEL else "_losses"
    path = work.context.folder("score", where, fingerprint(inputs)[:16], "losses.safetensors")
    if load is None:
        found = find_kept(path, "loss", inputs)
        return None if found is None or found.shape != (engine.num_images, len(engine.bank)) else found
    return kept_tensor(path, "loss", inputs, ModelLosses(engine, load, model_id), {"draws": len(engine.bank)})


def loss_inputs(work: Work, engine: Engine, bank_print: str, model_id: int) -> dict[str, str]:
    """All that losses depend on, but for the unlearned model; arguments as in ``stored_losses``."""
    inputs = {"dataset": engine.data.fingerprint, "model": work.inputs.model.fingerprint, "noise_bank": bank_print}
    if engine.precision != "float32":
        inputs["precision"] = engine.precision
    if engine.flip:
        inputs["images"] = "mirrored"
    if not engine.noise_bank.consistent:
        inputs["noise"] = f"of each image's own, seed {engine.noise_bank.seed}, model {model_id}"
    return inputs
