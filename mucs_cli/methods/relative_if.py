"""``method=relative_if``: influence per unit of change of the parameters, so that unusual images do not always win.

Barshan et al., arXiv 2003.11630, with the kernel of TRAK in place of the Hessian.
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
class RelativeIFConfig(KernelConfig):
    name: str = option("relative_if", "attribution method; set by method=")


class RelativeIF(Method):
    name = "relative_if"
    summary = "relative influence: trak's score over the size of the training image's influence"
    schema = RelativeIFConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.attribution.feature_scores import relative_influence_scores
        from mucs_cli.stages.feature_scorer import KernelScorer
        from mucs_cli.stages.feature_store import FeatureStore

        return KernelScorer(FeatureStore(work, "loss"), relative_influence_scores)


METHOD = RelativeIF()
