"""``method=mucs``: bounded mirrored unlearning of the query, and the skew of every training image's losses.

MUCS, arXiv 2605.17938.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.unlearner import Unlearner
    from mucs_cli.stages.work import Work


@dataclass
class MUCSConfig(MethodConfig):
    name: str = option("mucs", "attribution method; set by method=")
    reducer: str = option(
        "skew",
        "losses u, t of the unlearned and the base model to a score: skew, mean of (u-t)/(u+t); ratio_of_means; "
        "difference; absolute_difference",
        choices=("skew", "ratio_of_means", "difference", "absolute_difference"),
        scores_only=True,
    )
    epsilon: float = option(1e-3, "added to the denominator of the ratios", minimum=0, scores_only=True)


class MUCS(Method):
    name = "mucs"
    summary = "unlearn the query, then compare losses: mean normalised skew"
    schema = MUCSConfig
    sections = ("method", "unlearning", "noise_bank")
    can_race = True

    def unlearning_sections(self, config: Any) -> tuple[str, ...]:
        return ("unlearning", "noise_bank") if config.unlearning.schedule == "grid" else ("unlearning",)

    def unlearner(self, work: "Work") -> "Unlearner":
        from mucs_cli.stages.mirrored import MirroredUnlearner

        return MirroredUnlearner(work)

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.loss_comparison import LossComparison

        config = work.config
        return LossComparison(work, config.noise_bank, config.method.reducer, config.method.epsilon)


METHOD = MUCS()
