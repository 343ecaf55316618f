"""The unlearning engine behind MUCS, Forward-INF and AbU: gradient ascent on one query, in parts that can be left out.

Each step minimises  mean loss(retain) - forget_weight * mean min(loss(forget), null_loss)  over a batch of training
images and a batch of noisy copies of the query.

- MUCS (arXiv 2605.17938) has both terms and a bound. The clamp is per sample, so that a copy the model has already
  forgotten pulls no further, and reaching the bound ends the run.
- Forward-INF has no retain term and no bound: a few plain steps of ascent on the query.
- AbU has neither, and multiplies the gradient by an inverse Fisher information, with plain SGD: with a forget weight of
  1 and a learning rate of eta/N, theta' = theta + (eta/N) F^-1 g_q.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mucs_cli.attribution.unlearning_batch import BatchSource, InstanceWeight, RetainBatch, UnlearningBatch
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.runtime import smaller_batch

Result = TypeVar("Result")

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
"""Weight decay is AdamW's own in "adamw" and part of the gradient in the others; SGD has no momentum."""

PRESETS: dict[str, tuple[str, ...]] = {
    "mlp": (
        "transformer_blocks.*.ff.*.weight",
        "*condition_embed.label_embedding.weight",
        "*condition_embed.projection.weight",
        "*.class_embedder.embedding_table.weight",
    ),
    "attention": ("transformer_blocks.*.attn*.weight", "*attentions.*.weight"),
    "all": ("*",),
}
"""Name patterns of each preset. "mlp" is what the release trains in its DiT: the MLP's weight matrices, and the label
embedding of a conditional model."""


def trainable_names(
    names: Iterable[str], preset: str, patterns: Sequence[str] = (), num_blocks: int | None = None
) -> list[str]:
    """The parameters that unlearning may change.

    Args:
        names: all parameter names of the network.
        preset: mlp, all_but_bias, attention, all, last_blocks, or patterns. "last_blocks" is "mlp" in a transformer and
            "all_but_bias" in a U-Net, in the last blocks (a U-Net's last up blocks) only.
        patterns: shell patterns, for preset "patterns".
        num_blocks: how many blocks, for preset "last_blocks".
    Raises:
        ValueError: unknown preset, or nothing matches (for "mlp": nothing but a label embedding), or there are fewer
            than ``num_blocks`` blocks.
    """
    names = list(names)
    if preset == "all_but_bias":
        chosen = [name for name in names if not name.endswith(".bias")]
    elif preset == "last_blocks":
        chosen = _names_in_last_blocks(names, num_blocks)
    elif preset == "patterns" or preset in PRESETS:
        wanted = patterns if preset == "patterns" else PRESETS[preset]
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    else:
        raise ValueError(f"unknown preset {preset!r}")
    if not chosen or (preset == "mlp" and not any(".ff." in name for name in chosen)):
        raise ValueError("no parameter of this network matches")
    return chosen


def _names_in_last_blocks(names: list[str], num_blocks: int | None) -> list[str]:
    """The default-trainable parameters of the last blocks."""
    is_transformer = any(name.startswith("transformer_blocks.") for name in names)
    place = re.compile(r"^transformer_blocks\.(\d+)\." if is_transformer else r"(?:^|\.)up_blocks\.(\d+)\.")
    block_of = {name: int(match[1]) for name in names if (match := place.search(name))}
    count = max(block_of.values(), default=-1) + 1
    if num_blocks is None or not 1 <= num_blocks <= count:
        kind = "transformer blocks" if is_transformer else "up blocks"
        raise ValueError(f"num_blocks={num_blocks}, and the network has {count} {kind}")
    default = trainable_names(names, "mlp" if is_transformer else "all_but_bias")
    return [name for name in default if block_of.get(name, -1) >= count - num_blocks]


@dataclass(frozen=True)
class UnlearningSettings:
    """Hyperparameters of one unlearning run; see ``config.UnlearningConfig`` for their meaning.

    Args:
        null_loss: the bound of the forget loss; None for no bound, which needs ``num_steps``.
        optimizer: adamw, adam or sgd.
        num_batches: batches whose gradients are averaged into one update.
        same_noise: a training image and a copy of the query share each level and noise; else all are independent.
        horizontal_flip, augmentation: of both kinds of images; ``augmentation`` is a probability.
    Raises:
        ValueError: an unknown optimiser, or no bound and no exact step count.
    """

    null_loss: float | None
    learning_rate: float
    forget_weight: float = 0.2
    weight_decay: float = 0.01
    forget_batch_size: int = 100
    tolerance: float = 0.95
    max_steps: int = 1000
    num_steps: int | None = None
    micro_batch_size: int | None = None
    optimizer: str = "adamw"
    num_batches: int = 1
    same_noise: bool = False
    horizontal_flip: bool = False
    augmentation: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
        if self.num_steps is None and math.isinf(self.bound):
            raise ValueError("num_steps=None without a bound: nothing would end the run")

    @property
    def bound(self) -> float:
        return math.inf if self.null_loss is None else self.null_loss


@dataclass
class UnlearningStep:
    """Losses of the batch of one step, before its update; dimensionless.

    ``retain_loss`` is the weighted mean, None where there is no retain term. ``forget_loss`` is clamped, then averaged.
    """

    step: int
    retain_loss: float | None
    forget_loss: float


@dataclass
class UnlearningResult:
    """num_steps: updates taken; reached_bound: whether the stop rule ended the run (None where it was not asked).

    base_query_loss, query_loss: the query's mean loss before and after, not clamped, under draws that no step used.
    """

    tensors: dict[str, Tensor]
    num_steps: int
    reached_bound: bool | None
    log: list[UnlearningStep] = field(default_factory=list)
    base_query_loss: float = math.nan
    query_loss: float = math.nan

    def summary(self) -> dict[str, float | int | bool | None]:
        """The last batch's losses, the number of updates, whether the bound was reached, the query's loss."""
        last = asdict(self.log[-1]) if self.log else {"retain_loss": None, "forget_loss": None}
        last.pop("step", None)
        return {
            **last,
            "num_steps": self.num_steps,
            "reached_bound": self.reached_bound,
            "base_query_loss": self.base_query_loss,
            "query_loss": self.query_loss,
        }


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number."""

    def __init__(self, step: int, value: float):
        super().__init__(step, value)
        self.step, self.value = step, value


def unlearn(
    denoiser: Denoiser,
    trainable: Sequence[str],
    query: Tensor,
    query_condition: Tensor | None,
    retain_batch: RetainBatch | None,
    settings: UnlearningSettings,
    seed: int,
    query_id: int,
    on_step: Callable[[UnlearningStep], None] | None = None,
    *,
    preconditioner: Mapping[str, Tensor] | None = None,
    noise_levels: Tensor | None = None,
    instance_weight: InstanceWeight | None = None,
    micro_batch_key: str = "unlearning.micro_batch_size",
) -> UnlearningResult:
    """Unlearns one query in place of ``denoiser``'s weights, and returns what changed.

    The stop rule is tested before the update: the returned model has not taken the step whose batch met it.
    The network is put into evaluation mode (no dropout) and left with its unlearned weights.

    Args:
        denoiser: holds the base model's weights on entry.
        trainable: parameter names that may change.
        query: [C, H, W], on the network's device.
        query_condition: the query's own condition, [1] or [1, d], or None.
        retain_batch: batch number -> (image [B, C, H, W], condition), training images in shuffled order; the number is
            the step's where a step has one batch. None leaves the retain term out.
        settings: hyperparameters and the bound.
        seed, query_id: noise of step i comes from the stream ("unlearning", query_id, i), and of its further batches k
            from ("unlearning", query_id, i, k), whatever other queries exist.
        on_step: called with each step's losses.
        preconditioner: name -> factors of the gradient, in the parameter's shape, for every trainable parameter.
        noise_levels: levels to draw from uniformly, [L]; None for the distribution the model is trained with.
        instance_weight: weights of the training images of each batch, scaled to mean 1 there.
        micro_batch_key: what messages call ``settings.micro_batch_size``.
    Returns:
        The changed tensors (copies), the number of updates, the log, and the query's loss before and after.
    Raises:
        NonFiniteLossError: the loss of a batch, or of the query in the end, is not finite.
        ValueError: a preconditioner that does not fit the trainable parameters, or that comes with another optimiser
            than plain SGD; instance weights without a retain term, or not one for each training image.
    """
    parameters = select_parameters(denoiser.network.eval(), trainable)
    if preconditioner is not None:
        _check_preconditioner(preconditioner, parameters, settings)
    draws = BatchSource(
        denoiser,
        query,
        query_condition,
        retain_batch,
        seed,
        query_id,
        num_copies=settings.forget_batch_size,
        num_batches=settings.num_batches,
        noise_levels=noise_levels,
        same_noise=settings.same_noise,
        horizontal_flip=settings.horizontal_flip,
        augmentation=settings.augmentation,
        instance_weight=instance_weight,
    )
    probe = draws.probe()
    make_optimizer: Any = OPTIMIZERS[settings.optimizer]
    optimizer = make_optimizer(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    memory = _MemoryLimit(settings.micro_batch_size, micro_batch_key)
    limit = settings.max_steps if settings.num_steps is None else settings.num_steps
    result = UnlearningResult({}, 0, None if settings.num_steps is not None else False)
    for step in range(limit + 1 if settings.num_steps is None else limit):
        first = draws.batch(step, 0)
        work = partial(_accumulate_gradient, denoiser, partial(draws.batches, step, first), settings)
        retain_loss, forget_loss = memory.run(work, len(first))
        for value in (retain_loss, forget_loss):
            if value is not None and not math.isfinite(value):
                raise NonFiniteLossError(step, value)
        result.log.append(UnlearningStep(step, retain_loss, forget_loss))
        if on_step is not None:
            on_step(result.log[-1])
        if settings.num_steps is None:
            if forget_loss >= settings.tolerance * settings.bound:
                result.reached_bound = True
                break
            if step == limit:
                break
        if step == 0:  # not before: the first batch has settled what fits into memory
            result.base_query_loss = memory.run(partial(_mean_loss, denoiser, probe), len(probe))
        if preconditioner is not None:
            _multiply_gradient(parameters, preconditioner)
        optimizer.step()
        result.num_steps += 1
    optimizer.zero_grad()
    result.query_loss = memory.run(partial(_mean_loss, denoiser, probe), len(probe))
    if result.num_steps == 0:
        result.base_query_loss = result.query_loss
    if not math.isfinite(result.query_loss):
        raise NonFiniteLossError(result.num_steps, result.query_loss)
    result.tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return result


def select_parameters(network: nn.Module, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Lets gradients flow to the named parameters only, and returns them by name."""
    wanted = set(trainable)
    chosen = {}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in wanted)
        parameter.grad = None
        if name in wanted:
            chosen[name] = parameter
    return chosen


def _check_preconditioner(
    preconditioner: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], settings: UnlearningSettings
) -> None:
    """Raises ValueError unless the factors fit the parameters and the update is theirs alone."""
    if settings.optimizer != "sgd" or settings.weight_decay:
        raise ValueError("a preconditioner goes with optimizer=sgd and weight_decay=0")
    for name, parameter in parameters.items():
        if name not in preconditioner or preconditioner[name].shape != parameter.shape:
            got = tuple(preconditioner[name].shape) if name in preconditioner else "nothing"
            raise ValueError(f"preconditioner of {name}: {got}; expected the shape {tuple(parameter.shape)}")


def _multiply_gradient(parameters: Mapping[str, nn.Parameter], factors: Mapping[str, Tensor]) -> None:
    """In float64: an inverse Fisher spans more orders of magnitude than its product with the gradient."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.double() * factors[name].to(parameter.device, torch.float64))


class _MemoryLimit:
    """How many images share a forward pass; halved whenever memory runs out, for the rest of the run."""

    def __init__(self, size: int | None, key: str):
        self.size, self.key = size, key

    def run(self, work: Callable[[int], Result], whole: int) -> Result:
        """``work(size)``, again with half the size after running out of memory; ``whole`` is the first size to try."""
        while True:
            size = self.size or whole
            try:
                return work(size)
            except RuntimeError as error:
                self.size = smaller_batch(error, size, self.key)


def _losses(denoiser: Denoiser, batch: UnlearningBatch, part: slice) -> Tensor:
    condition = None if batch.condition is None else batch.condition[part]
    augmentation = None if batch.augmentation is None else batch.augmentation[part]
    return denoiser.loss(batch.image[part], batch.noise[part], batch.sigma[part], condition, augmentation)


def _accumulate_gradient(
    denoiser: Denoiser,
    batches: Callable[[], Iterable[UnlearningBatch]],
    settings: UnlearningSettings,
    micro_batch_size: int,
) -> tuple[float | None, float]:
    """Leaves the objective's gradient in the parameters; returns the mean retain and the mean clamped forget loss."""
    denoiser.network.zero_grad(set_to_none=True)
    retain_losses, forget_losses = [], []
    for batch in batches():
        total, retained = len(batch), batch.num_retain
        forgets = torch.arange(total, device=batch.image.device) >= retained
        weight = batch.sigma.new_full((total,), -settings.forget_weight / (total - retained) / settings.num_batches)
        if retained:
            weight[:retained] = 1 / retained / settings.num_batches
        if batch.retain_weight is not None:
            weight[:retained] *= batch.retain_weight
        values = []
        for start in range(0, total, micro_batch_size):
            part = slice(start, start + micro_batch_size)
            loss = _losses(denoiser, batch, part)
            clamped = torch.where(forgets[part], loss.clamp(max=settings.bound), loss)
            (clamped * weight[part]).sum().backward()
            values.append(clamped.detach())
        losses = torch.cat(values).double()
        forget_losses.append(float(losses[retained:].mean()))
        if retained:
            kept = losses[:retained]
            if batch.retain_weight is not None:
                kept = kept * batch.retain_weight
            retain_losses.append(float(kept.mean()))
    retain_loss = sum(retain_losses) / len(retain_losses) if retain_losses else None
    return retain_loss, sum(forget_losses) / len(forget_losses)


@torch.no_grad()
def _mean_loss(denoiser: Denoiser, batch: UnlearningBatch, micro_batch_size: int) -> float:
    """The mean loss of a batch, not clamped."""
    starts = range(0, len(batch), micro_batch_size)
    return float(torch.cat([_losses(denoiser, batch, slice(i, i + micro_batch_size)) for i in starts]).double().mean())
