"""Unlearning a query: bounded mirrored gradient ascent.

Each step minimises  mean loss(retain) - forget_weight * mean min(loss(forget), null_loss)  over a batch of training
images and a batch of noisy copies of the query. The clamp is per sample, so that a copy the model has already forgotten
pulls no further. MUCS, arXiv 2605.17938.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.rng import generator
from mucs_cli.runtime import smaller_batch

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


def trainable_names(names: Iterable[str], preset: str, patterns: Sequence[str] = ()) -> list[str]:
    """The parameters that unlearning may change.

    Args:
        names: all parameter names of the network.
        preset: mlp, all_but_bias, attention, all, or patterns.
        patterns: shell patterns, for preset "patterns".
    Raises:
        ValueError: unknown preset, or nothing matches (for "mlp": nothing but a label embedding).
    """
    names = list(names)
    if preset == "all_but_bias":
        chosen = [name for name in names if not name.endswith(".bias")]
    elif preset == "patterns" or preset in PRESETS:
        wanted = patterns if preset == "patterns" else PRESETS[preset]
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    else:
        raise ValueError(f"unknown preset {preset!r}")
    if not chosen or (preset == "mlp" and not any(".ff." in name for name in chosen)):
        raise ValueError("no parameter of this network matches")
    return chosen


@dataclass(frozen=True)
class UnlearningSettings:
    """Hyperparameters of one unlearning run; see ``config.UnlearningConfig`` for their meaning."""

    null_loss: float
    learning_rate: float
    forget_weight: float = 0.2
    weight_decay: float = 0.01
    forget_batch_size: int = 100
    tolerance: float = 0.95
    max_steps: int = 1000
    num_steps: int | None = None
    micro_batch_size: int | None = None


@dataclass
class UnlearningStep:
    """Losses of the batch of one step, before its update; dimensionless. ``forget_loss`` is clamped, then averaged."""

    step: int
    retain_loss: float
    forget_loss: float


@dataclass
class UnlearningResult:
    """num_steps: updates taken; reached_bound: whether the stop rule ended the run (None where it was not asked)."""

    tensors: dict[str, Tensor]
    num_steps: int
    reached_bound: bool | None
    log: list[UnlearningStep] = field(default_factory=list)

    def summary(self) -> dict[str, float | int | bool | None]:
        """The last batch's losses, the number of updates and whether the bound was reached."""
        last = asdict(self.log[-1]) if self.log else {"retain_loss": None, "forget_loss": None}
        last.pop("step", None)
        return {**last, "num_steps": self.num_steps, "reached_bound": self.reached_bound}


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
    retain_batch: Callable[[int], tuple[Tensor, Tensor | None]],
    settings: UnlearningSettings,
    seed: int,
    query_id: int,
    on_step: Callable[[UnlearningStep], None] | None = None,
) -> UnlearningResult:
    """Unlearns one query in place of ``denoiser``'s weights, and returns what changed.

    The stop rule is tested before the update: the returned model has not taken the step whose batch met it.
    The network is put into evaluation mode (no dropout) and left with its unlearned weights.

    Args:
        denoiser: holds the base model's weights on entry.
        trainable: parameter names that may change.
        query: [C, H, W], on the network's device.
        query_condition: the query's own condition, [1] or [1, d], or None.
        retain_batch: step -> (image [B, C, H, W], condition), training images in shuffled order.
        settings: hyperparameters and the bound.
        seed, query_id: noise of step i comes from the stream ("unlearning", query_id, i), whatever other queries exist.
        on_step: called with each step's losses.
    Returns:
        The changed tensors (copies), the number of updates and the log.
    Raises:
        NonFiniteLossError: the loss of a batch is not finite.
    """
    network = denoiser.network.eval()
    parameters = select_parameters(network, trainable)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    limit = settings.max_steps if settings.num_steps is None else settings.num_steps
    result = UnlearningResult({}, 0, None if settings.num_steps is not None else False)
    micro = settings.micro_batch_size
    for step in range(limit + 1 if settings.num_steps is None else limit):
        source = generator(seed, "unlearning", query_id, step)
        batch = _mixed_batch(denoiser, query, query_condition, retain_batch(step), settings, source)
        while True:
            try:
                retain_loss, forget_loss = _accumulate_gradient(denoiser, batch, settings, micro)
                break
            except RuntimeError as error:
                micro = smaller_batch(error, micro or len(batch.image), "unlearning.micro_batch_size")
        for value in (retain_loss, forget_loss):
            if not math.isfinite(value):
                raise NonFiniteLossError(step, value)
        result.log.append(UnlearningStep(step, retain_loss, forget_loss))
        if on_step is not None:
            on_step(result.log[-1])
        if settings.num_steps is None:
            if forget_loss >= settings.tolerance * settings.null_loss:
                result.reached_bound = True
                break
            if step == limit:
                break
        optimizer.step()
        result.num_steps += 1
    optimizer.zero_grad()
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


@dataclass(frozen=True)
class _Batch:
    """Retain images first, then noisy copies of the query."""

    image: Tensor
    noise: Tensor
    sigma: Tensor
    condition: Tensor | None
    num_retain: int


def _mixed_batch(
    denoiser: Denoiser,
    query: Tensor,
    query_condition: Tensor | None,
    retain: tuple[Tensor, Tensor | None],
    settings: UnlearningSettings,
    source: torch.Generator,
) -> _Batch:
    """One step's retain and forget samples, with independent noise levels and noise."""
    image, condition = retain
    copies = settings.forget_batch_size
    sigma = [denoiser.training_sigma(count, source) for count in (len(image), copies)]
    noise = torch.randn(len(image) + copies, *query.shape, generator=source)
    if condition is not None and query_condition is not None:
        condition = torch.cat([condition, query_condition.expand(copies, *query_condition.shape[1:])])
    return _Batch(
        image=torch.cat([image, query.expand(copies, *query.shape)]),
        noise=noise.to(query),
        sigma=torch.cat(sigma).to(query),
        condition=condition,
        num_retain=len(image),
    )


def _accumulate_gradient(
    denoiser: Denoiser, batch: _Batch, settings: UnlearningSettings, micro_batch_size: int | None
) -> tuple[float, float]:
    """Leaves the objective's gradient in the parameters; returns the mean retain and the mean clamped forget loss."""
    denoiser.network.zero_grad(set_to_none=True)
    total = len(batch.image)
    size = micro_batch_size or total
    forgets = torch.arange(total, device=batch.image.device) >= batch.num_retain
    values = []
    for start in range(0, total, size):
        part = slice(start, start + size)
        condition = None if batch.condition is None else batch.condition[part]
        loss = denoiser.loss(batch.image[part], batch.noise[part], batch.sigma[part], condition)
        clamped = torch.where(forgets[part], loss.clamp(max=settings.null_loss), loss)
        weight = torch.where(forgets[part], -settings.forget_weight / (total - batch.num_retain), 1 / batch.num_retain)
        (clamped * weight).sum().backward()
        values.append(clamped.detach())
    losses = torch.cat(values).double()
    return float(losses[: batch.num_retain].mean()), float(losses[batch.num_retain :].mean())
