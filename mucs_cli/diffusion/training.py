"""Training of the base model: AdamW with warm-up and decay, and a moving average of the weights.

Every step is a function of (seed, step) and the state, so that a resumed run repeats an uninterrupted one to the bit.
Of several processes each takes a part of every batch, whose order, noise levels and noise are drawn as a whole, as in
one process; their gradients are summed. Dropout is of each process's own.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mucs_cli import processes
from mucs_cli.diffusion.augmentation import augment
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.optimizer_state import load_optimizer_state, optimizer_state
from mucs_cli.interruption import held_back
from mucs_cli.rng import derive_seed, generator
from mucs_cli.runtime import smaller_batch


@dataclass(frozen=True)
class TrainingSettings:
    """Hyperparameters of training; see ``config.TrainingConfig`` for their meaning."""

    num_steps: int
    batch_size: int = 128
    micro_batch_size: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "constant"
    ema_decay: float = 0.999
    condition_dropout: float = 0.1
    horizontal_flip: bool = False
    augmentation: float = 0.0
    validate_every: int | None = None
    patience: int | None = None
    seed: int = 0


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """Learning rate of one update: linear warm-up, then constant, or a half cosine or a line to zero at the end."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, settings.num_steps - warmup)
    return (
        peak
        * {"constant": 1.0, "cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress}[settings.decay]
    )


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of one update; short at first, so that the average forgets the random initial weights."""
    return min(decay, (1 + step) / (10 + step))


class Trainer:
    """The state of a training run, and its update.

    Args:
        denoiser: with freshly initialised weights, on its device.
        settings: hyperparameters.
    """

    def __init__(self, denoiser: Denoiser, settings: TrainingSettings):
        self.denoiser = denoiser
        self.settings = settings
        self.parameters = dict(denoiser.network.named_parameters())
        self.average = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.micro_batch_size = settings.micro_batch_size or settings.batch_size
        self.losses: list[float] = []
        """Mean loss of the batch of every step so far, before its update."""
        self.validation: list[float] = []
        """Held-out loss of the average after every ``validate_every`` updates."""
        self.best: dict[str, Tensor] = {}
        """The average where that was lowest; empty before the first measurement."""
        self._own: dict[str, Tensor] = {}
        """The weights themselves while the average stands in their place."""

    @property
    def step(self) -> int:
        """Updates taken."""
        return len(self.losses)

    @property
    def is_finished(self) -> bool:
        """All updates taken, or no lower held-out loss for ``patience`` measurements."""
        patience, measured = self.settings.patience, self.validation
        if patience is not None and len(measured) - (self._best_measurement() + 1) >= patience:
            return True
        return self.step >= self.settings.num_steps

    @property
    def best_step(self) -> int:
        """The update after which the weights that are used were taken."""
        every = self.settings.validate_every
        return self.step if every is None else (self._best_measurement() + 1) * every

    def _best_measurement(self) -> int:
        """Position of the lowest held-out loss, the first of equal ones; -1 before the first."""
        return min(range(len(self.validation)), key=self.validation.__getitem__, default=-1)

    def result(self) -> dict[str, Tensor]:
        """The weights to use: the average, where it was best on the held-out images if it was measured on them."""
        return self.best or self.average

    @contextmanager
    def averaged(self) -> Iterator[Denoiser]:
        """The denoiser with the averaged weights, in evaluation mode; afterwards it has its own again."""
        self._own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.average[name]
            self.denoiser.network.eval()
            yield self.denoiser
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = self._own[name]
            self._own = {}

    def validate(self, measure: Callable[[Denoiser], float]) -> None:
        """Measures the averaged weights, and keeps a copy where none before were as good.

        Args:
            measure: the held-out loss of a denoiser.
        Raises:
            FloatingPointError: it is not finite.
        """
        with self.averaged() as denoiser:
            loss = measure(denoiser)
        if not math.isfinite(loss):
            raise FloatingPointError(f"held-out loss {loss} at step {self.step}")
        with held_back():
            self.validation.append(loss)
            if self._best_measurement() == len(self.validation) - 1:
                self.best = {name: tensor.clone() for name, tensor in self.average.items()}

    def update(self, image: Tensor, condition: Tensor | None) -> float:
        """One update on a batch; returns its mean loss.

        Args:
            image: [B, C, H, W] in [-1, 1], on the model's device.
            condition: [B] or [B, d], on the model's device, or None.
        Raises:
            FloatingPointError: the loss is not finite; the weights are left as they were.
        """
        settings, step = self.settings, self.step
        source = generator(settings.seed, "training", step)
        sigma = self.denoiser.training_sigma(len(image), source).to(image)
        noise = torch.randn(image.shape, generator=source).to(image)
        if condition is not None:
            drops = (torch.rand(len(image), generator=source) < settings.condition_dropout).to(image.device)
            null = self.denoiser.network.null_condition(condition)
            condition = torch.where(drops.view(-1, *[1] * (condition.dim() - 1)), null, condition)
        if settings.horizontal_flip:
            flips = (torch.rand(len(image), generator=source) < 0.5).to(image.device)
            image = torch.where(flips.view(-1, 1, 1, 1), image.flip(3), image)
        augmentation = None
        if settings.augmentation:
            image, augmentation = augment(image, settings.augmentation, source)

        self.denoiser.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        loss = self._gradient(image, noise, sigma, condition, augmentation)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} at step {step}")
        with held_back(), torch.no_grad():
            self.optimizer.step()
            weight = 1 - ema_decay_at(step, settings.ema_decay)
            torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)
            self.losses.append(loss)
        return loss

    def _gradient(
        self, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None, augmentation: Tensor | None
    ) -> float:
        """Leaves the gradient of the mean loss in the parameters; in smaller pieces after running out of memory."""
        mine = processes.part_of(len(image))
        rank = (processes.rank(),) if processes.count() > 1 else ()
        while True:
            # dropout draws from the global state
            torch.manual_seed(derive_seed(self.settings.seed, "dropout", self.step, *rank))
            self.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            try:
                for start in range(mine.start, mine.stop, self.micro_batch_size):
                    part = slice(start, min(start + self.micro_batch_size, mine.stop))
                    loss = self.denoiser.loss(
                        image[part],
                        noise[part],
                        sigma[part],
                        None if condition is None else condition[part],
                        None if augmentation is None else augmentation[part],
                    ).sum() / len(image)
                    loss.backward()
                    total += loss.item()
                break
            except RuntimeError as error:
                self.micro_batch_size = smaller_batch(error, self.micro_batch_size, "training.micro_batch_size")

        return total if processes.count() == 1 else self._summed(total)

    @torch.no_grad()
    def _summed(self, loss: float) -> float:
        """Sums the gradients of all processes, and their losses; a parameter that none has a gradient of gets none."""
        parameters = list(self.parameters.values())
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        others = torch.tensor([*(p.grad is not None for p in parameters), loss]).to(own[0])
        flat = torch.cat([*(gradient.flatten() for gradient in own), others])
        processes.sum_up(flat)
        *gradients, known, total = flat.split([*(p.numel() for p in parameters), len(parameters), 1])
        for parameter, gradient, is_known in zip(parameters, gradients, known.tolist(), strict=True):
            parameter.grad = gradient.view_as(parameter) if is_known else None
        return total.item()

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, as named tensors; whole at any moment between two statements."""
        return {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "validation": torch.tensor(self.validation, dtype=torch.float64),
            **{f"best.{name}": tensor for name, tensor in self.best.items()},
            **{f"average.{name}": tensor for name, tensor in self.average.items()},
            **optimizer_state(self.parameters, self.optimizer),
            **{f"weight.{name}": tensor for name, tensor in self._own.items()},
        }

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from what ``state`` returned."""
        self.losses = tensors["losses"].tolist()
        self.validation = tensors["validation"].tolist()
        if self.validation:
            self.best = {name: tensors[f"best.{name}"].to(self.average[name].device) for name in self.parameters}
        for name, average in self.average.items():
            average.copy_(tensors[f"average.{name}"])
        load_optimizer_state(self.parameters, self.optimizer, tensors)


def train(
    trainer: Trainer,
    batch: Callable[[int], tuple[Tensor, Tensor | None]],
    on_step: Callable[[float], None],
    measure: Callable[[Denoiser], float] | None = None,
) -> None:
    """Updates until the trainer is finished.

    Args:
        trainer: fresh, or with the state of an interrupted run.
        batch: step -> images and conditions.
        on_step: called with the loss after each update.
        measure: the held-out loss of a denoiser; needed with ``validate_every``.
    """
    every = trainer.settings.validate_every

    def measure_if_due() -> None:
        if every is not None and measure is not None and len(trainer.validation) < trainer.step // every:
            trainer.validate(measure)

    measure_if_due()  # an interruption came between an update and its measurement
    while not trainer.is_finished:
        loss = trainer.update(*batch(trainer.step))
        measure_if_due()
        on_step(loss)
