"""``method=condition``: how alike the conditions are: the same class, or the cosine of two condition vectors."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class ConditionConfig(MethodConfig):
    name: str = option("condition", "attribution method; set by method=")
    seed: int = option(II("seed"), "seed of the order of images whose conditions are equally alike")


class Condition(Method):
    name = "condition"
    summary = "likeness of the conditions: the same class, or the cosine of two vectors"
    schema = ConditionConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.similarity import ConditionScorer

        return ConditionScorer(work)


METHOD = Condition()
