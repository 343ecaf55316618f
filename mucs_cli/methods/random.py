"""``method=random``: uniform scores, the baseline of every comparison."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class RandomConfig(MethodConfig):
    name: str = option("random", "attribution method; set by method=")
    seed: int = option(II("seed"), "seed of the scores")


class Random(Method):
    name = "random"
    summary = "uniform scores, independent for each query: the baseline"
    schema = RandomConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.similarity import RandomScorer

        return RandomScorer(work)


METHOD = Random()
