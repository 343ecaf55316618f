"""``method=journey_trak``: TRAK with the query's gradients taken along the way on which it was sampled.

Georgiev et al., arXiv 2312.06205.
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
class JourneyTRAKConfig(KernelConfig):
    name: str = option("journey_trak", "attribution method; set by method=")
    num_journey_steps: int | None = option(
        None, "evenly spaced steps of the sampler whose predicted images count; null: all", minimum=1
    )


class JourneyTRAK(Method):
    name = "journey_trak"
    summary = "as trak, with the query's gradients along its sampling trajectory"
    schema = JourneyTRAKConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.attribution.feature_scores import trak_scores
        from mucs_cli.stages.feature_scorer import KernelScorer
        from mucs_cli.stages.journey import JourneyStore

        return KernelScorer(JourneyStore(work), trak_scores)


METHOD = JourneyTRAK()
