"""``method=trak``: gradients of the loss, projected, and compared through the inverse of their kernel.

Park et al., arXiv 2303.14186; for diffusion models as in Zheng et al., arXiv 2311.00500.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mucs_cli.methods.base import Method
from mucs_cli.methods.gradient_base import KernelConfig
from mucs_cli.schemas import option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class TRAKConfig(KernelConfig):
    name: str = option("trak", "attribution method; set by method=")


class TRAK(Method):
    name = "trak"
    summary = "loss gradients, compared through the inverse of their kernel"
    schema = TRAKConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.attribution.feature_scores import trak_scores
        from mucs_cli.stages.feature_scorer import KernelScorer
        from mucs_cli.stages.feature_store import FeatureStore

        return KernelScorer(FeatureStore(work, "loss"), trak_scores)


METHOD = TRAK()
