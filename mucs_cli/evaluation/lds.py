"""``evaluation=lds``: do the scores predict the losses of models trained on parts of the data?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.evaluation.base import Evaluation
from mucs_cli.schemas import MILLION, RetrainingEvaluationConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.evaluator import Evaluator


@dataclass
class LdsConfig(RetrainingEvaluationConfig):
    name: str = option("lds", "evaluation; set by evaluation=")
    num_subsets: int = option(64, "M, models trained on random parts of the images", minimum=3, maximum=MILLION)
    share: float = option(0.5, "alpha, the part of the images that each is trained on", above=0, below=1)
    seeds_per_subset: int = option(
        1, "models a subset, whose losses are averaged; from two on the ceiling is measured", minimum=1
    )
    stratify: bool = option(True, "every class has its share of every subset, where there are classes")
    num_draws: int = option(
        256, "fixed draws (sigma, noise) that a query's loss is the mean of", minimum=1, maximum=MILLION
    )
    part: str = option(
        "all",
        "all; or one of two disjoint halves of subsets and queries: selection, to choose settings on, and report",
        choices=("all", "selection", "report"),
    )
    runs: list[str] | None = option(
        None,
        "folders of other runs whose finished evaluations with the same settings are pooled with this one",
        affects_result=False,
    )
    num_resamples: int = option(
        2000, "bootstrap resamples of subsets and queries for the 95 % intervals", minimum=100, maximum=MILLION
    )
    seed: int = option(II("seed"), "seed of subsets, draws, halves and resamples")


class LinearDatamodelingScore(Evaluation):
    name = "lds"
    summary = "rank correlation of summed scores with the losses of models trained on random subsets"
    schema = LdsConfig

    def evaluator(self, context: "Context") -> "Evaluator":
        from mucs_cli.stages.lds import LdsEvaluator

        return LdsEvaluator(context)


EVALUATION = LinearDatamodelingScore()
