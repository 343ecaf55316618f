"""What ``mucs unlearn`` asks of a method, and what all that unlearn have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import (
    NonFiniteLossError,
    OnStep,
    UnlearningResult,
    UnlearningSettings,
    UnlearningStep,
)
from mucs_cli.errors import UserError
from mucs_cli.stages.checkpoints import QueryCheckpoints
from mucs_cli.stages.work import Work


class Unlearner(ABC):
    """One unlearned model a query. Making one checks what the method needs, and is quick.

    Attributes:
        work: what it works with.
        trainable: names of the parameters that may change.
        inputs: fingerprints of what it depends on beyond model, data, queries and configuration.
        learning_rate_key: the configuration key of the learning rate, for errors.
        on_step: told of every query's every step.
        num_at_once: how many queries are being unlearned side by side now.
        checkpoints: states within a query; set before it is prepared.
        settings: of the updates; ready once it is prepared.
    """

    learning_rate_key = "method.learning_rate"
    checkpoints: QueryCheckpoints
    settings: UnlearningSettings

    def __init__(self, work: Work, trainable: list[str]):
        self.work = work
        self.trainable = trainable
        self.inputs: dict[str, Any] = {}
        self.on_step: OnStep | None = None
        self.num_at_once = 1
        self._first_gap = 0.0

    def prepare(self) -> None:
        """Whatever takes long and is shared by all queries. An override calls this first: it keeps the base weights."""
        wanted = set(self.trainable)
        network = self.work.inputs.model.denoiser.network
        self._base = {name: p.detach().clone() for name, p in network.named_parameters() if name in wanted}

    @abstractmethod
    def unlearn(self, query: int) -> UnlearningResult:
        """Unlearns a query in place of the base model's weights."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the manifest is to record."""

    def result(self, query: int) -> UnlearningResult:
        """``unlearn`` from the base model's weights.

        Raises:
            UserError: the losses have become infinite.
        """
        self.restore()
        with self.divergence_named():
            return self.unlearn(query)

    def results(self, queries: Sequence[int]) -> Iterator[tuple[int, UnlearningResult]]:
        """Every query's result, as soon as it is there.

        Raises:
            UserError: as ``result``.
        """
        for query in queries:
            yield query, self.result(query)
            self.checkpoints.finish()

    def stacks(self, queries: Sequence[int]) -> Iterator[list[int]]:
        """The queries in the order and the stacks in which ``results`` unlearns them, which processes share out."""
        yield from ([query] for query in queries)

    @contextmanager
    def divergence_named(self) -> Iterator[None]:
        """Turns a loss that is not finite into a UserError."""
        try:
            yield
        except NonFiniteLossError as error:
            raise UserError(
                self.learning_rate_key,
                f"got a non-finite loss ({error.value}) at step {error.step} of query {error.query_id} "
                f"with {self.settings.learning_rate:g}. Lower it; the queries that were finished are kept.",
            ) from error

    def share_done(self, step: UnlearningStep) -> float:
        """How much of the current query's updates are done, in (0, 1]; told of every one of them.

        Where a bound ends them, it is judged by the gap between the forget loss and the bound, which shrinks about
        exponentially: a line would foretell half to two thirds of the updates that the digits take.
        """
        settings = self.settings
        if settings.num_steps is not None:
            return (step.step + 1) / settings.num_steps
        gap, last = settings.bound - step.forget_loss, (1 - settings.tolerance) * settings.bound
        if step.step == 0 or not self._first_gap:  # not the first step of a query that goes on after an interruption
            self._first_gap = gap
        if gap <= last:
            return 1.0
        # side by side, another query may have begun, and ended, at its bound
        is_known = 0 < last < self._first_gap
        by_gap = math.log(self._first_gap / gap) / math.log(self._first_gap / last) if is_known else 0.0
        return max((step.step + 1) / (settings.max_steps + 1), by_gap)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the base model's weights back."""
        for name, parameter in self.work.inputs.model.denoiser.network.named_parameters():
            if name in self._base:
                parameter.copy_(self._base[name])

    def query(self, query: int) -> tuple[Tensor, Tensor | None]:
        """A query and its condition, on the device."""
        device, condition = self.work.inputs.device, self.work.queries.condition_of(query)
        return self.work.queries.image[query].to(device), None if condition is None else condition.to(device)


def choose_trainable(
    work: Work, preset: str, patterns: list[str], num_blocks: int | None, section: str = "unlearning"
) -> list[str]:
    """Names of the parameters that may change; "auto" is mlp for a DiT and all_but_bias for a U-Net.

    Args:
        section: the configuration section of ``trainable``, ``patterns`` and ``num_blocks``, for errors.
    Raises:
        UserError: nothing matches.
    """
    names = work.parameter_names()
    if preset == "auto":
        preset = "mlp" if any(name.startswith("transformer_blocks.") for name in names) else "all_but_bias"
    try:
        return trainable_names(names, preset, patterns, num_blocks)
    except ValueError as error:
        key, got = {"patterns": ("patterns", patterns), "last_blocks": ("num_blocks", num_blocks)}.get(
            preset, ("trainable", preset)
        )
        raise UserError(
            f"{section}.{key}", f"got {got}; {error} (its names are like {', '.join(names[:3])}). Choose another."
        ) from error
