"""MUCS's unlearning in a run: the bound, the retain batches, and the engine's settings from the configuration."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint, read_kept, write_tensors
from mucs_cli.attribution.null_loss import BATCH_SIZE, MAX_BATCHES, monte_carlo_null_loss
from mucs_cli.attribution.unlearning import (
    UnlearningResult,
    UnlearningSettings,
    batch_source,
    choose_stack_size,
    step_seconds,
    unlearn,
    unlearn_stacked,
)
from mucs_cli.attribution.unlearning_batch import BatchSource, InstanceWeight, RetainBatch, similarity_weight
from mucs_cli.config import NULL_LOSSES, number_or_word
from mucs_cli.errors import UserError
from mucs_cli.interruption import saving
from mucs_cli.rng import ShuffledOrder
from mucs_cli.runtime import is_out_of_memory, log, smaller_batch
from mucs_cli.stages.engine import prepare_bank
from mucs_cli.stages.loading import fixed_fact
from mucs_cli.stages.unlearner import Unlearner, choose_trainable
from mucs_cli.stages.work import Work


class MirroredUnlearner(Unlearner):
    """Bounded mirrored gradient ascent, as ``unlearning`` configures it."""

    learning_rate_key = "unlearning.learning_rate"

    def __init__(self, work: Work):
        config = work.config.unlearning
        super().__init__(work, choose_trainable(work, config.trainable, config.patterns, config.num_blocks))
        network = work.inputs.model.denoiser.network
        self.choice = number_or_word(config.null_loss, "unlearning.null_loss", NULL_LOSSES)
        if self.choice == "closed_form" and not network.zero_initialised_head:
            raise UserError(
                "unlearning.null_loss",
                "got closed_form; this network's output does not start at zero, so that it has none. Use monte_carlo.",
            )
        self.noise_levels: Tensor | None = None
        if config.schedule == "grid":
            bank, _ = prepare_bank(work.context, work.config.noise_bank, work.inputs)
            self.noise_levels = bank.sigma
            self.inputs["noise_levels"] = fingerprint(bank.sigma)

    def prepare(self) -> None:
        super().prepare()
        config = self.work.config.unlearning
        bound, self.null_loss_source = processes.on_first(self.null_loss)
        shown = "none" if bound is None else f"{bound:.4f}"
        log.info(
            "unlearn: bound (null loss) %s, %s; %d trainable tensors", shown, self.null_loss_source, len(self.trainable)
        )
        log.debug("trainable: %s", ", ".join(self.trainable))
        self.settings = UnlearningSettings(
            null_loss=bound,
            learning_rate=config.learning_rate or self.work.inputs.model.learning_rate / 10,
            forget_weight=config.forget_weight,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            forget_batch_size=config.forget_batch_size,
            tolerance=config.tolerance,
            max_steps=config.max_steps,
            num_steps=config.num_steps,
            micro_batch_size=config.micro_batch_size,
            same_noise=config.same_noise,
            horizontal_flip=config.horizontal_flip,
            augmentation=config.augmentation,
        )
        self.stack_size = processes.on_first(self._stack_size)

    def null_loss(self) -> tuple[float | None, str]:
        """The bound, and its source: a number, the closed form of a zero head, Monte Carlo over the initial weights."""
        if isinstance(self.choice, float):
            return self.choice, "given"
        if self.choice == "none":
            return None, "none asked for"
        model, data = self.work.inputs.model, self.work.inputs.data
        if self.choice != "monte_carlo" and model.denoiser.network.zero_initialised_head:
            return model.denoiser.null_loss(data.mean_square), "closed form of a zero output"
        seed = self.work.config.unlearning.seed
        fresh = model.fresh(seed)
        fresh.network.requires_grad_(False).to(self.work.inputs.device)
        conditional = fresh.network.is_conditional

        path = self.checkpoints.folder / "null_loss.safetensors"
        kept = read_kept(path, {"sum": "float64", "count": "int64"})
        sums = (float(kept["sum"]), int(kept["count"])) if kept else (0.0, 0)
        saved = time.monotonic()

        def save() -> None:
            write_tensors(path, {"sum": torch.tensor(sums[0], dtype=torch.float64), "count": torch.tensor(sums[1])})

        def on_batch(*present: Any) -> None:
            nonlocal sums, saved
            sums = present
            if time.monotonic() - saved > self.checkpoints.every_seconds:
                save()
                saved = time.monotonic()

        def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
            order = ShuffledOrder(len(data.training), seed, "null_loss_order")
            count = min(MAX_BATCHES * BATCH_SIZE, len(data.training))
            for start in range(math.ceil(sums[1] / BATCH_SIZE) * BATCH_SIZE, count, BATCH_SIZE):
                rows = order.batch(start // BATCH_SIZE, BATCH_SIZE)[: count - start]
                ids = data.training[rows.numpy()]
                yield data.images(ids), data.conditions(ids) if conditional else None

        with saving(save):
            loss = monte_carlo_null_loss(fresh, batches(), seed, self.work.inputs.device, sums, on_batch)
        save()
        return loss, "Monte Carlo over the model's initial weights"

    def results(self, queries: Sequence[int]) -> Iterator[tuple[int, UnlearningResult]]:
        left = list(queries)
        while left:
            begun = self._begun_with(left[0])
            chosen = begun or left[: self.stack_size]
            self.num_at_once = len(chosen)
            alone = len(chosen) == 1 and not begun
            try:
                for query, result in super().results(chosen) if alone else self.stacked_results(chosen):
                    self.num_at_once -= 1
                    if query in left:  # else it was saved before an interruption, and only the others need it again
                        left.remove(query)
                        yield query, result
            except RuntimeError as error:  # out of memory for weights and gradients: a pass gets smaller by itself
                self.checkpoints.forget()  # else the models that were too many stay beside the next ones
                self.stack_size = smaller_batch(error, self.stack_size, "unlearning.stack_size")

    def stacks(self, queries: Sequence[int]) -> Iterator[list[int]]:
        left = list(queries)
        while left:
            stack = self._begun_with(left[0]) or left[: self.stack_size]
            yield [query for query in left if query in stack]
            left = [query for query in left if query not in stack]

    def _begun_with(self, query: int) -> list[int]:
        """The stack in which an interrupted attempt began the query, where stacks may be as large now."""
        begun = self.checkpoints.stack_of(query)
        return begun if len(begun) <= self.stack_size else []

    def stacked_results(self, queries: Sequence[int]) -> Iterator[tuple[int, UnlearningResult]]:
        """The queries unlearned at once, each result as soon as its query has stopped."""
        self.restore()
        sources = [self.source(query) for query in queries]
        with self.divergence_named():
            yield from unlearn_stacked(
                self.work.inputs.model.denoiser,
                self.trainable,
                sources,
                self.settings,
                self.on_step,
                checkpoints=self.checkpoints,
            )
        self.checkpoints.finish()

    def source(self, query: int) -> BatchSource:
        """A query's batches, the same as in ``unlearn``."""
        image, condition = self.query(query)
        retain_batch = self.retain_batches(query)
        return batch_source(
            self.work.inputs.model.denoiser,
            image,
            condition,
            retain_batch,
            self.settings,
            self.work.config.unlearning.seed,
            query,
            self.noise_levels,
            self.instance_weight(image, retain_batch),
        )

    def _stack_size(self) -> int:
        """From the config, else from the run's earlier measurement, else measured now and stored in the run."""
        config, run, queries = self.work.config.unlearning, self.work.context.run, self.work.queries.selected
        if config.stack_size is not None:
            return int(config.stack_size)
        what = (self.work.inputs.device.type, config.retain_batch_size, config.forget_batch_size, len(queries))
        key = "/".join(map(str, [*what, fingerprint(self.trainable)[:16]]))

        def measure() -> int:
            with self.divergence_named():
                size = choose_stack_size(self._step_seconds, len(queries))
            log.info("unlearn: %d queries at once (measured; kept in machine.json)", size)
            return size

        return fixed_fact(run, "unlearning_stack_size", measure, key)

    def _step_seconds(self, count: int) -> float:
        """Seconds a query of a step with the first queries at once; infinity where they do not fit into memory."""
        sources = [self.source(query) for query in self.work.queries.selected[:count]]
        try:
            return step_seconds(self.work.inputs.model.denoiser, self.trainable, sources, self.settings)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return math.inf
            raise

    def unlearn(self, query: int) -> UnlearningResult:
        image, condition = self.query(query)
        retain_batch = self.retain_batches(query)
        return unlearn(
            self.work.inputs.model.denoiser,
            self.trainable,
            image,
            condition,
            retain_batch,
            self.settings,
            self.work.config.unlearning.seed,
            query,
            self.on_step,
            noise_levels=self.noise_levels,
            instance_weight=self.instance_weight(image, retain_batch),
            checkpoints=self.checkpoints,
        )

    def retain_batches(self, query: int) -> RetainBatch:
        """Training images in an order of the query's own."""
        config, data, device = self.work.config.unlearning, self.work.inputs.data, self.work.inputs.device
        order = ShuffledOrder(len(data.training), config.seed, "retain_order", query)

        def retain_batch(number: int) -> tuple[Tensor, Tensor | None]:
            ids = data.training[order.batch(number, config.retain_batch_size).numpy()]
            conditions = data.conditions(ids) if self.work.is_conditional else None
            return data.images(ids).to(device), None if conditions is None else conditions.to(device)

        return retain_batch

    def instance_weight(self, image: Tensor, retain_batch: RetainBatch) -> InstanceWeight | None:
        """Weights of the retain images by likeness to the query; None where all count the same."""
        sharpness = self.work.config.unlearning.similarity_weight
        if sharpness == 0:
            return None
        return lambda number: similarity_weight(retain_batch(number)[0], image, sharpness)

    def facts(self) -> dict[str, Any]:
        return {
            "seeds": {"unlearning": self.work.config.unlearning.seed},
            "learning_rate": self.settings.learning_rate,
            "null_loss": self.settings.null_loss,
            "null_loss_source": self.null_loss_source,
            "stack_size": self.stack_size,
        }
