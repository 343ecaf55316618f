"""What a step of unlearning moves: one model's weights in place, or the stacked weights of several models."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mucs_cli.attribution.gradients import with_parameters
from mucs_cli.attribution.unlearning_batch import UnlearningBatch
from mucs_cli.diffusion.denoiser import Denoiser

NewOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
"""Parameters -> a fresh optimiser of them, elementwise, so that a stack of models is stepped as each alone."""


class Models(Protocol):
    """Models that are unlearned side by side, one a query; all have taken the same number of steps.

    parameters: name -> what the optimiser moves.
    """

    parameters: Mapping[str, Tensor]
    optimizer: torch.optim.Optimizer

    def losses(self, batches: Sequence[UnlearningBatch], part: slice) -> Tensor:
        """Every model's losses on a part of its own batch; [M, b]."""
        ...

    def kept(self, rows: Sequence[int]) -> Self:
        """These models alone, with their gradients and their optimiser's state."""
        ...

    def tensors(self, row: int) -> dict[str, Tensor]:
        """Copies of one model's trainable parameters."""
        ...


class OneModel:
    """The denoiser itself, whose weights change in place."""

    def __init__(self, denoiser: Denoiser, trainable: Sequence[str], new_optimizer: NewOptimizer):
        self.denoiser = denoiser
        self.parameters: Mapping[str, Tensor] = select_parameters(denoiser.network, trainable)
        self.optimizer = new_optimizer(self.parameters.values())

    def losses(self, batches: Sequence[UnlearningBatch], part: slice) -> Tensor:
        (batch,) = batches
        return batch_losses(self.denoiser, batch, part)[None]

    def kept(self, rows: Sequence[int]) -> Self:
        assert list(rows) == [0]
        return self

    def tensors(self, row: int) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


class StackedModels:
    """Copies of the denoiser's trainable parameters, [M, *shape], around the frozen ones that all models share.

    The denoiser keeps its weights. Attention runs as plain matrix products: under ``vmap`` the fused kernels fall back
    to a loop over models.
    """

    def __init__(self, denoiser: Denoiser, trainable: Sequence[str], new_optimizer: NewOptimizer, count: int):
        self.denoiser = denoiser
        self.new_optimizer = new_optimizer
        self._adopt(
            {
                name: parameter.detach().expand(count, *parameter.shape).clone()
                for name, parameter in select_parameters(denoiser.network, trainable).items()
            }
        )

    def _adopt(self, parameters: dict[str, Tensor]) -> None:
        self.parameters: Mapping[str, Tensor] = {name: p.requires_grad_(True) for name, p in parameters.items()}
        self.optimizer = self.new_optimizer(self.parameters.values())

    def losses(self, batches: Sequence[UnlearningBatch], part: slice) -> Tensor:
        def loss(parameters: Mapping[str, Tensor], *inputs: Tensor | None) -> Tensor:
            return with_parameters(self.denoiser, parameters).loss(*inputs)  # type: ignore[arg-type]

        inputs = [
            None if column[0] is None else torch.stack([x[part] for x in column])
            for column in zip(*((b.image, b.noise, b.sigma, b.condition, b.augmentation) for b in batches), strict=True)
        ]
        in_dims = (0, *(None if x is None else 0 for x in inputs))
        with sdpa_kernel(SDPBackend.MATH), _contiguous_group_norms(self.denoiser.network):
            losses: Tensor = vmap(loss, in_dims)(self.parameters, *inputs)
        return losses

    def kept(self, rows: Sequence[int]) -> Self:
        rows = list(rows)
        other = copy.copy(self)
        other._adopt({name: parameter.detach()[rows] for name, parameter in self.parameters.items()})
        for mine, theirs in zip(self.parameters.values(), other.parameters.values(), strict=True):
            theirs.grad = None if mine.grad is None else mine.grad[rows]
            state: dict[str, Tensor] = self.optimizer.state.get(mine, {})
            if state:  # moments of the parameter's shape, and one step count
                other.optimizer.state[theirs] = {
                    name: value[rows] if value.shape == mine.shape else value.clone() for name, value in state.items()
                }
        return other

    def tensors(self, row: int) -> dict[str, Tensor]:
        return {name: parameter[row].detach().clone() for name, parameter in self.parameters.items()}


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


def batch_losses(denoiser: Denoiser, batch: UnlearningBatch, part: slice) -> Tensor:
    """The losses of a part of a batch; [b]."""
    condition = None if batch.condition is None else batch.condition[part]
    augmentation = None if batch.augmentation is None else batch.augmentation[part]
    return denoiser.loss(batch.image[part], batch.noise[part], batch.sigma[part], condition, augmentation)


@contextmanager
def _contiguous_group_norms(network: nn.Module) -> Iterator[None]:
    """Group norm asks for the memory format of any other input, which ``vmap`` cannot tell."""

    def contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.contiguous() for x in inputs)

    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    handles = [norm.register_forward_pre_hook(contiguous) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
