"""``method=das``: the change of the model's output when a training image is left out, linearised.

Lin et al., arXiv 2410.18639; averaged over the draws before the projection.
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
class DASConfig(KernelConfig):
    name: str = option("das", "attribution method; set by method=")
    num_projections: int = option(
        4096, "dimensions to project to; from the number of parameters on nothing is projected", minimum=1
    )
    normalise: bool = option(True, "divide each draw's gradient by its norm before averaging")
    square: bool = option(
        True, "square the scores: an image that speaks against the query then ranks with those for it"
    )
    leverage: bool = option(True, "divide by 1 - h, with h the training image's leverage")
    residual: str = option(
        "raw",
        "factor of a training image: raw, the root mean square error of its noise; code, as in the release; none",
        choices=("raw", "code", "none"),
    )


class DAS(Method):
    name = "das"
    summary = "output gradients: the output's change, linearised, when an image is left out"
    schema = DASConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.feature_scorer import DASScorer
        from mucs_cli.stages.feature_store import FeatureStore

        config = work.config.method
        return DASScorer(FeatureStore(work, "mean_output", config.normalise))


METHOD = DAS()
