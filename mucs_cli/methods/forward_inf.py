"""``method=forward_inf``: a few plain steps of gradient ascent on the query, then the difference of losses.

Forward-INF's released code is for a classifier; its settings for diffusion models are unknown, and these are ours.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import II

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.unlearner import Unlearner
    from mucs_cli.stages.work import Work


@dataclass
class ForwardINFConfig(MethodConfig):
    name: str = option("forward_inf", "attribution method; set by method=")
    learning_rate: float | None = option(None, "learning rate; null: a tenth of the training's", above=0)
    num_steps: int = option(10, "updates", minimum=0)
    optimizer: str = option("adamw", "adamw, adam or sgd", choices=("adamw", "adam", "sgd"))
    weight_decay: float = option(0.0, "weight decay", minimum=0)
    forget_batch_size: int = option(100, "noisy copies of the query an update", minimum=1)
    micro_batch_size: int | None = option(
        None, "images a forward pass; null: the whole batch", minimum=1, affects_result=False
    )
    trainable: str = option(
        "all",
        "all; or auto, mlp, all_but_bias, attention, last_blocks, patterns, as in unlearning",
        choices=("auto", "mlp", "all_but_bias", "attention", "all", "last_blocks", "patterns"),
    )
    num_blocks: int | None = option(None, "trainable=last_blocks: how many", minimum=1)
    patterns: list[str] = option([], "trainable=patterns: shell patterns of parameter names")
    seed: int = option(II("seed"), "seed of each query's noise")
    reducer: str = option(
        "difference",
        "losses to a score: difference, absolute_difference, skew or ratio_of_means",
        choices=("difference", "absolute_difference", "skew", "ratio_of_means"),
        scores_only=True,
    )
    epsilon: float = option(1e-3, "added to the denominator of the ratios", minimum=0, scores_only=True)


class ForwardINF(Method):
    name = "forward_inf"
    summary = "plain ascent on the query, then compare losses: mean difference"
    schema = ForwardINFConfig
    sections = ("method", "noise_bank")
    can_race = True

    def unlearning_sections(self, config: Any) -> tuple[str, ...]:
        return ("method",)

    def unlearner(self, work: "Work") -> "Unlearner":
        from mucs_cli.stages.ascent import PlainAscent

        return PlainAscent(work)

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.loss_comparison import LossComparison

        config = work.config
        return LossComparison(work, config.noise_bank, config.method.reducer, config.method.epsilon)


METHOD = ForwardINF()
