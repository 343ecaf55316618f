"""Unlearning without a retain term or a bound: Forward-INF's plain ascent, and AbU's natural-gradient step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mucs_cli import processes
from mucs_cli.artifacts import fingerprint
from mucs_cli.attribution.fisher import damped_inverse
from mucs_cli.attribution.unlearning import UnlearningResult, UnlearningSettings, unlearn
from mucs_cli.errors import UserError
from mucs_cli.runtime import log
from mucs_cli.stages.fisher_store import load_fisher
from mucs_cli.stages.unlearner import Unlearner, choose_trainable
from mucs_cli.stages.work import Work

KEY_VALUE = ("to_k.weight", "to_v.weight", "to_qkv.weight")
"""Ends of the names of attention's key and value matrices; the last holds the query's in its first third of rows."""


class Ascent(Unlearner):
    """Exactly ``method.num_steps`` updates on the query alone."""

    def unlearn(self, query: int) -> UnlearningResult:
        image, condition = self.query(query)
        return unlearn(
            self.work.inputs.model.denoiser,
            self.trainable,
            image,
            condition,
            None,
            self.settings,
            self.work.config.method.seed,
            query,
            self.on_step,
            preconditioner=self.preconditioner(),
            micro_batch_key="method.micro_batch_size",
            checkpoints=self.checkpoints,
        )

    def preconditioner(self) -> Mapping[str, Tensor] | None:
        """Factors of the gradient; None for the plain one."""
        return None

    def facts(self) -> dict[str, Any]:
        return {"seeds": {"method": self.work.config.method.seed}, "learning_rate": self.settings.learning_rate}


class PlainAscent(Ascent):
    """Forward-INF."""

    def __init__(self, work: Work):
        config = work.config.method
        super().__init__(work, chosen_parameters(work))
        self.settings = UnlearningSettings(
            null_loss=None,
            learning_rate=config.learning_rate or work.inputs.model.learning_rate / 10,
            forget_weight=1.0,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            forget_batch_size=config.forget_batch_size,
            num_steps=config.num_steps,
            micro_batch_size=config.micro_batch_size,
        )


class NaturalAscent(Ascent):
    """AbU: theta' = theta + (eta/N) F^-1 g, with F the diagonal Fisher information over the training images."""

    learning_rate_key = "method.eta"

    def __init__(self, work: Work):
        config = work.config.method
        super().__init__(work, chosen_parameters(work))
        self.settings = UnlearningSettings(
            null_loss=None,
            learning_rate=config.eta / work.num_images,
            forget_weight=1.0,
            optimizer="sgd",
            weight_decay=0.0,
            forget_batch_size=config.forget_batch_size,
            num_batches=config.num_batches,
            num_steps=config.num_steps,
            micro_batch_size=config.micro_batch_size,
        )

    def prepare(self) -> None:
        super().prepare()
        log.info("unlearn: %d trainable tensors: %s", len(self.trainable), ", ".join(self.trainable))
        config = self.work.config.method
        settings = (config.seed, config.fisher_passes, config.fisher_flip)
        fisher = processes.first_then_all(lambda: load_fisher(self.work, self.trainable, *settings))
        try:
            inverse = damped_inverse(fisher, config.damping)
        except ValueError as error:
            raise UserError(
                "method.damping", f"got {config.damping:g}; {error}. Raise it, or choose other parameters."
            ) from error
        if config.trainable == "key_value":
            inverse = {name: without_query(name, factors) for name, factors in inverse.items()}
        self._inverse = {name: factors.to(self.work.inputs.device) for name, factors in inverse.items()}

    def preconditioner(self) -> Mapping[str, Tensor]:
        return self._inverse

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "inverse_fisher": fingerprint(*(self._inverse[name] for name in self.trainable))}


def chosen_parameters(work: Work) -> list[str]:
    """Names of the parameters that ``method.trainable`` and the keys beside it choose.

    Raises:
        UserError: nothing matches.
    """
    config = work.config.method
    preset = config.trainable
    if preset == "key_value":
        names = [name for name in work.parameter_names() if name.endswith(KEY_VALUE)]
        if names:
            return names
        preset = "auto"
    return choose_trainable(work, preset, config.patterns, config.num_blocks, "method")


def without_query(name: str, factors: Tensor) -> Tensor:
    """Zero for the rows of a joint query, key and value matrix that make the query."""
    if not name.endswith("to_qkv.weight"):
        return factors
    kept = torch.ones(len(factors), 1, dtype=factors.dtype)
    kept[: len(factors) // 3] = 0
    return factors * kept
