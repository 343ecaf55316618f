"""``method=dtrak``: TRAK on the gradient of the squared output, which knows no target.

Zheng et al., arXiv 2311.00500.
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
class DTRAKConfig(KernelConfig):
    name: str = option("dtrak", "attribution method; set by method=")


class DTRAK(Method):
    name = "dtrak"
    summary = "D-TRAK: as trak, with gradients of the squared output in place of the loss"
    schema = DTRAKConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.attribution.feature_scores import trak_scores
        from mucs_cli.stages.feature_scorer import KernelScorer
        from mucs_cli.stages.feature_store import FeatureStore

        return KernelScorer(FeatureStore(work, "squared_output"), trak_scores)


METHOD = DTRAK()
