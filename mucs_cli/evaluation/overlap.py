"""``evaluation=overlap``: how many top images queries share under one method, and methods share on one query."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.evaluation.base import Evaluation
from mucs_cli.schemas import MILLION, EvaluationConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.evaluator import Evaluator


@dataclass
class OverlapConfig(EvaluationConfig):
    name: str = option("overlap", "evaluation; set by evaluation=")
    k: int | None = option(
        None, "highest scores of a query that are compared; null: 1 % of the images, at least 10", minimum=1
    )
    num_resamples: int = option(
        2000, "bootstrap resamples of the queries for the 95 % intervals", minimum=100, maximum=MILLION
    )
    seed: int = option(II("seed"), "seed of the resamples")


class Overlap(Evaluation):
    name = "overlap"
    summary = "top images shared by queries under one method, and by methods on one query"
    schema = OverlapConfig

    def evaluator(self, context: "Context") -> "Evaluator":
        from mucs_cli.stages.overlap import OverlapEvaluator

        return OverlapEvaluator(context)


EVALUATION = Overlap()
