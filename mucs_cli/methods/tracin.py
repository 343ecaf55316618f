"""``method=tracin``: dot products of loss gradients.

Pruthi et al., arXiv 2002.08484, at one checkpoint: a run keeps its final model only.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mucs_cli.methods.base import Method
from mucs_cli.methods.gradient_base import GradientConfig
from mucs_cli.schemas import option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class TracInConfig(GradientConfig):
    name: str = option("tracin", "attribution method; set by method=")


class TracIn(Method):
    name = "tracin"
    summary = "TracIn at the final model: dot products of loss gradients"
    schema = TracInConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.feature_scorer import DotProductScorer
        from mucs_cli.stages.feature_store import FeatureStore

        return DotProductScorer(FeatureStore(work, "loss"))


METHOD = TracIn()
