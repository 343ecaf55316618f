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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mucs_cli.attribution.unlearning_batch import BatchSource, InstanceWeight, RetainBatch, UnlearningBatch
from mucs_cli.attribution.unlearning_models import Models, OneModel, StackedModels
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.diffusion.optimizer_state import load_optimizer_state, optimizer_state
from mucs_cli.interruption import held_back
from mucs_cli.runtime import smaller_batch

Result = TypeVar("Result")

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
"""Weight decay is AdamW's own in "adamw" and part of the gradient in the others; SGD has no momentum."""


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

    def new_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        make: Any = OPTIMIZERS[self.optimizer]
        optimizer: torch.optim.Optimizer = make(
            parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        return optimizer


@dataclass
class UnlearningStep:
    """Losses of the batch of one step, before its update; dimensionless.

    ``retain_loss`` is the weighted mean, None where there is no retain term. ``forget_loss`` is clamped, then averaged.
    """

    step: int
    retain_loss: float | None
    forget_loss: float


OnStep = Callable[[int, UnlearningStep], None]
"""Is told of a query's id and the losses of its step."""


@dataclass
class UnlearningResult:
    """num_steps: updates taken; reached_bound: whether the stop rule ended the run (None where it was not asked).

    base_query_loss, query_loss: the query's mean loss before and after, not clamped, under draws that no step used.
    seconds: of computing; where queries were unlearned at once, each has its share.
    """

    tensors: dict[str, Tensor]
    num_steps: int
    reached_bound: bool | None
    log: list[UnlearningStep] = field(default_factory=list)
    base_query_loss: float = math.nan
    query_loss: float = math.nan
    seconds: float = 0.0

    def summary(self) -> dict[str, float | int | bool | None]:
        """The last batch's losses, the number of updates, whether the bound was reached, the query's loss, seconds."""
        last = asdict(self.log[-1]) if self.log else {"retain_loss": None, "forget_loss": None}
        last.pop("step", None)
        return {
            **last,
            "num_steps": self.num_steps,
            "reached_bound": self.reached_bound,
            "base_query_loss": self.base_query_loss,
            "query_loss": self.query_loss,
            "seconds": round(self.seconds, 2),
        }


class Checkpoints(Protocol):
    """Where the state of queries on their way is kept, so that an interrupted run goes on from it to the same bits."""

    def begin(
        self, queries: int | list[int], state: Callable[[], tuple[int, dict[str, Tensor]]]
    ) -> Mapping[str, Tensor]:
        """What was kept of just this query, or this stack; ``state`` gives steps and tensors from now on."""
        ...

    def save_if_due(self) -> None:
        """After every step."""
        ...

    def save(self) -> None:
        """Before the first of several queries is done: without it the others could not be stepped to the same bits."""
        ...


class NonFiniteLossError(RuntimeError):
    """A loss became infinite or not a number."""

    def __init__(self, step: int, value: float, query_id: int):
        super().__init__(step, value, query_id)
        self.step, self.value, self.query_id = step, value, query_id


def unlearn(
    denoiser: Denoiser,
    trainable: Sequence[str],
    query: Tensor,
    query_condition: Tensor | None,
    retain_batch: RetainBatch | None,
    settings: UnlearningSettings,
    seed: int,
    query_id: int,
    on_step: OnStep | None = None,
    *,
    preconditioner: Mapping[str, Tensor] | None = None,
    noise_levels: Tensor | None = None,
    instance_weight: InstanceWeight | None = None,
    micro_batch_key: str = "unlearning.micro_batch_size",
    checkpoints: Checkpoints | None = None,
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
        on_step: called with the query's id and each step's losses.
        preconditioner: name -> factors of the gradient, in the parameter's shape, for every trainable parameter.
        noise_levels: levels to draw from uniformly, [L]; None for the distribution the model is trained with.
        instance_weight: weights of the training images of each batch, scaled to mean 1 there.
        micro_batch_key: what messages call ``settings.micro_batch_size``.
        checkpoints: keeps the state between steps; the run goes on from what is there of this query.
    Returns:
        The changed tensors (copies), the number of updates, the log, and the query's loss before and after.
    Raises:
        NonFiniteLossError: the loss of a batch, or of the query in the end, is not finite.
        ValueError: a preconditioner that does not fit the trainable parameters, or that comes with another optimiser
            than plain SGD; instance weights without a retain term, or not one for each training image.
    """
    source = batch_source(
        denoiser, query, query_condition, retain_batch, settings, seed, query_id, noise_levels, instance_weight
    )
    models = OneModel(denoiser, trainable, settings.new_optimizer)
    denoiser.network.eval()
    if preconditioner is not None:
        _check_preconditioner(preconditioner, models.parameters, settings)
    memory = _MemoryLimit(settings.micro_batch_size, micro_batch_key)
    ((_, result),) = _unlearn(models, [source], settings, on_step, memory, preconditioner, checkpoints)
    return result


def unlearn_stacked(
    denoiser: Denoiser,
    trainable: Sequence[str],
    sources: Sequence[BatchSource],
    settings: UnlearningSettings,
    on_step: OnStep | None = None,
    *,
    micro_batch_key: str = "unlearning.micro_batch_size",
    checkpoints: Checkpoints | None = None,
) -> Iterator[tuple[int, UnlearningResult]]:
    """Unlearns several queries at once, with stacked parameters; each as ``unlearn`` does, but for rounding.

    A query that has stopped leaves the stack, so that nothing of it moves any more. The denoiser keeps its weights; its
    network is put into evaluation mode.

    Args:
        denoiser, trainable, settings, micro_batch_key, checkpoints: as in ``unlearn``.
        sources: each query's batches, from ``batch_source``.
        on_step: called with the query's id and each step's losses, query by query.
    Yields:
        A query's id and its result, as soon as it has stopped.
    Raises:
        NonFiniteLossError: as in ``unlearn``; the queries that have not stopped yet are lost.
    """
    denoiser.network.eval()
    models = StackedModels(denoiser, trainable, settings.new_optimizer, len(sources))
    memory = _MemoryLimit(settings.micro_batch_size, micro_batch_key, is_last_resort=len(sources) == 1)
    yield from _unlearn(models, sources, settings, on_step, memory, checkpoints=checkpoints)


LONG_STEP = 0.1
"""Seconds of a step, one query at a time, above which a stack is not tried: arithmetic takes the time, not calls."""
WORTHWHILE_GAIN = 1.2
"""How many times faster a full stack has to be: it loses some of that as its queries stop."""


def choose_stack_size(
    step_seconds: Callable[[int], float], num_queries: int, candidates: Sequence[int] = (4, 16)
) -> int:
    """How many queries to unlearn at once: 1 unless a stack is clearly faster.

    Args:
        step_seconds: how many queries at once -> seconds a query of one step.
        num_queries: how many there are.
        candidates: sizes to try, as far as there are queries.
    """
    if num_queries == 1:
        return 1
    alone = step_seconds(1)
    if alone > LONG_STEP:
        return 1
    seconds = {size: step_seconds(size) for size in {min(size, num_queries) for size in candidates}}
    best = min(seconds, key=lambda size: seconds[size])
    return best if seconds[best] * WORTHWHILE_GAIN <= alone else 1


def step_seconds(
    denoiser: Denoiser, trainable: Sequence[str], sources: Sequence[BatchSource], settings: UnlearningSettings
) -> float:
    """Seconds a query of one step, of one query in place or of several stacked; no weight moves.

    Args:
        denoiser, trainable, sources, settings: as in ``unlearn_stacked``.
    """
    starts: dict[int, float] = {}

    def note(_: int, step: UnlearningStep) -> None:
        starts.setdefault(step.step, time.perf_counter())

    denoiser.network.eval()
    still = replace(settings, learning_rate=0.0, num_steps=4)
    models: Models = (
        OneModel(denoiser, trainable, still.new_optimizer)
        if len(sources) == 1
        else StackedModels(denoiser, trainable, still.new_optimizer, len(sources))
    )
    memory = _MemoryLimit(settings.micro_batch_size, "unlearning.micro_batch_size", is_last_resort=len(sources) == 1)
    for _ in _unlearn(models, sources, still, note, memory):
        pass
    return min(later - earlier for earlier, later in pairwise(starts.values())) / len(sources)


def batch_source(
    denoiser: Denoiser,
    query: Tensor,
    query_condition: Tensor | None,
    retain_batch: RetainBatch | None,
    settings: UnlearningSettings,
    seed: int,
    query_id: int,
    noise_levels: Tensor | None = None,
    instance_weight: InstanceWeight | None = None,
) -> BatchSource:
    """The batches of a run with these settings; arguments as in ``unlearn``."""
    return BatchSource(
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


@dataclass(frozen=True, eq=False)
class _Run:
    """One query on its way: where its batches come from, the draws of its own loss, and what is known so far."""

    source: BatchSource
    probe: UnlearningBatch
    result: UnlearningResult


def _unlearn(
    models: Models,
    sources: Sequence[BatchSource],
    settings: UnlearningSettings,
    on_step: OnStep | None,
    memory: "_MemoryLimit",
    preconditioner: Mapping[str, Tensor] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Iterator[tuple[int, UnlearningResult]]:
    """Steps all models together, and yields each query's result as soon as it has stopped."""
    has_rule = settings.num_steps is None
    limit = settings.max_steps if settings.num_steps is None else settings.num_steps
    runs = [_Run(source, source.probe(), UnlearningResult({}, 0, False if has_rule else None)) for source in sources]
    if checkpoints is not None:
        with held_back():  # until the state is that of the checkpoint
            kept = checkpoints.begin(_ids(models, runs), lambda: _state(models, runs))
            if kept:
                _load_state(models, runs, kept)
    for step in range(runs[0].result.num_steps, limit + 1 if has_rule else limit):
        with _shared_time(runs):
            first = [run.source.batch(step, 0) for run in runs]
            work = partial(_accumulate_gradient, models, [run.source for run in runs], step, first, settings)
            for run, losses in zip(runs, memory.run(work, len(first[0])), strict=True):
                _record(run, UnlearningStep(step, *losses), on_step)
        if has_rule:
            for run in runs:
                run.result.reached_bound = run.result.log[-1].forget_loss >= settings.tolerance * settings.bound
            going = [row for row, run in enumerate(runs) if not run.result.reached_bound and step < limit]
            if checkpoints is not None and 1 < len(runs) > len(going):
                checkpoints.save()  # before the first of a stack is done: the others are stepped beside it once more
            yield from _finished(models, runs, [row for row in range(len(runs)) if row not in going], memory)
            if not going:
                return
            if len(going) < len(runs):
                with held_back():
                    models, runs = models.kept(going), [runs[row] for row in going]
        with _shared_time(runs):
            if step == 0:  # not before: the first batch has settled what fits into memory
                _measure(models, runs, "base_query_loss", memory)
            if preconditioner is not None:
                _multiply_gradient(models.parameters, preconditioner)
            with held_back():
                models.optimizer.step()
                for run in runs:
                    run.result.num_steps += 1
        if checkpoints is not None:
            checkpoints.save_if_due()
    if checkpoints is not None and len(runs) > 1:
        checkpoints.save()
    yield from _finished(models, runs, range(len(runs)), memory)


def _ids(models: Models, runs: Sequence[_Run]) -> int | list[int]:
    """The query, or those of a stack, of one maybe."""
    ids = [run.source.query_id for run in runs]
    return ids[0] if isinstance(models, OneModel) else ids


def _state(models: Models, runs: Sequence[_Run]) -> tuple[int, dict[str, Tensor]]:
    """Steps taken, and what the next one depends on; of a step that is being taken, nothing yet."""
    num_steps = runs[0].result.num_steps
    losses = [[(_number(e.retain_loss), e.forget_loss) for e in run.result.log[:num_steps]] for run in runs]
    return num_steps, {
        "query_id": torch.tensor(_ids(models, runs)),
        "log": torch.tensor(losses, dtype=torch.float64).view(len(runs), num_steps, 2),
        "base_query_loss": torch.tensor([run.result.base_query_loss for run in runs], dtype=torch.float64),
        "seconds": torch.tensor([run.result.seconds for run in runs], dtype=torch.float64),
        **optimizer_state(models.parameters, models.optimizer),
    }


def _load_state(models: Models, runs: Sequence[_Run], tensors: Mapping[str, Tensor]) -> None:
    load_optimizer_state(models.parameters, models.optimizer, tensors)
    for row, run in enumerate(runs):
        losses = tensors["log"][row].tolist()
        run.result.log = [
            UnlearningStep(step, None if math.isnan(retain) else retain, forget)
            for step, (retain, forget) in enumerate(losses)
        ]
        run.result.num_steps = len(losses)
        run.result.base_query_loss = float(tensors["base_query_loss"][row])
        run.result.seconds = float(tensors["seconds"][row])


def _number(loss: float | None) -> float:
    """NaN in the place of a term that is left out; losses themselves are finite."""
    return math.nan if loss is None else loss


@contextmanager
def _shared_time(runs: Sequence[_Run]) -> Iterator[None]:
    """Divides the time that the block takes among the runs."""
    started = time.perf_counter()
    yield
    share = (time.perf_counter() - started) / len(runs)
    for run in runs:
        run.result.seconds += share


def _record(run: _Run, step: UnlearningStep, on_step: OnStep | None) -> None:
    """Adds a step to the log; raises NonFiniteLossError."""
    for value in (step.retain_loss, step.forget_loss):
        if value is not None and not math.isfinite(value):
            raise NonFiniteLossError(step.step, value, run.source.query_id)
    run.result.log.append(step)
    if on_step is not None:
        on_step(run.source.query_id, step)


def _finished(
    models: Models, runs: Sequence[_Run], rows: Sequence[int], memory: "_MemoryLimit"
) -> Iterator[tuple[int, UnlearningResult]]:
    """The results of the runs that have stopped, with their tensors and their queries' losses."""
    if not rows:
        return
    models, runs = models.kept(rows), [runs[row] for row in rows]
    models.optimizer.zero_grad()
    with _shared_time(runs):
        _measure(models, runs, "query_loss", memory)
    for row, run in enumerate(runs):
        result = run.result
        if result.num_steps == 0:
            result.base_query_loss = result.query_loss
        if not math.isfinite(result.query_loss):
            raise NonFiniteLossError(result.num_steps, result.query_loss, run.source.query_id)
        result.tensors = models.tensors(row)
        yield run.source.query_id, result


def _check_preconditioner(
    preconditioner: Mapping[str, Tensor], parameters: Mapping[str, Tensor], settings: UnlearningSettings
) -> None:
    """Raises ValueError unless the factors fit the parameters and the update is theirs alone."""
    if settings.optimizer != "sgd" or settings.weight_decay:
        raise ValueError("a preconditioner goes with optimizer=sgd and weight_decay=0")
    for name, parameter in parameters.items():
        if name not in preconditioner or preconditioner[name].shape != parameter.shape:
            got = tuple(preconditioner[name].shape) if name in preconditioner else "nothing"
            raise ValueError(f"preconditioner of {name}: {got}; expected the shape {tuple(parameter.shape)}")


def _multiply_gradient(parameters: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """In float64: an inverse Fisher spans more orders of magnitude than its product with the gradient."""
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            parameter.grad.copy_(parameter.grad.double() * factors[name].to(parameter.device, torch.float64))


class _MemoryLimit:
    """How many images share a forward pass; halved whenever memory runs out, for the rest of the run.

    Args:
        size: to begin with; None: all.
        key: the configuration key, for the message.
        is_last_resort: else memory that is too small for one image is for the caller, who can stack fewer models.
    """

    def __init__(self, size: int | None, key: str, is_last_resort: bool = True):
        self.size, self.key, self.is_last_resort = size, key, is_last_resort

    def run(self, work: Callable[[int], Result], whole: int) -> Result:
        """``work(size)``, again with half the size after running out of memory; ``whole`` is the first size to try."""
        while True:
            size = self.size or whole
            try:
                return work(size)
            except RuntimeError as error:
                if size == 1 and not self.is_last_resort:
                    raise
                self.size = smaller_batch(error, size, self.key)


def _accumulate_gradient(
    models: Models,
    sources: Sequence[BatchSource],
    step: int,
    first: Sequence[UnlearningBatch],
    settings: UnlearningSettings,
    micro_batch_size: int,
) -> list[tuple[float | None, float]]:
    """Leaves the objective's gradient in the parameters.

    Args:
        first: each model's first batch of the step, which is at hand; the others are made one after the other.
    Returns:
        Each model's mean retain loss and mean clamped forget loss.
    """
    models.optimizer.zero_grad()
    retain_losses, forget_losses = [], []
    for index in range(settings.num_batches):
        batches = [source.batch(step, index) for source in sources] if index else first
        total, retained = len(batches[0]), batches[0].num_retain
        sigma = batches[0].sigma
        forgets = torch.arange(total, device=sigma.device) >= retained
        share = sigma.new_ones(len(batches), total)  # of the images in their own term, [M, B]
        if batches[0].retain_weight is not None:
            share[:, :retained] = torch.stack([batch.retain_weight for batch in batches])  # type: ignore[misc]
        factor = sigma.new_full((total,), -settings.forget_weight / (total - retained) / settings.num_batches)
        if retained:
            factor[:retained] = 1 / retained / settings.num_batches
        values = []
        for start in range(0, total, micro_batch_size):
            part = slice(start, start + micro_batch_size)
            loss = models.losses(batches, part)
            clamped = torch.where(forgets[part], loss.clamp(max=settings.bound), loss)
            (clamped * (share * factor)[:, part]).sum().backward()
            values.append(clamped.detach())
        losses = torch.cat(values, dim=1).double() * share
        forget_losses.append(losses[:, retained:].mean(dim=1))
        if retained:
            retain_losses.append(losses[:, :retained].mean(dim=1))
    forget = torch.stack(forget_losses).mean(dim=0).tolist()
    retain = torch.stack(retain_losses).mean(dim=0).tolist() if retain_losses else [None] * len(forget)
    return list(zip(retain, forget, strict=True))


def _measure(models: Models, runs: Sequence[_Run], name: str, memory: _MemoryLimit) -> None:
    """Stores every query's mean loss under its probe, not clamped, as ``name`` of its result."""
    probes = [run.probe for run in runs]

    @torch.no_grad()
    def mean_losses(micro_batch_size: int) -> list[float]:
        starts = range(0, len(probes[0]), micro_batch_size)
        losses = torch.cat([models.losses(probes, slice(i, i + micro_batch_size)) for i in starts], dim=1)
        return losses.double().mean(dim=1).tolist()

    for run, loss in zip(runs, memory.run(mean_losses, len(probes[0])), strict=True):
        setattr(run.result, name, loss)
