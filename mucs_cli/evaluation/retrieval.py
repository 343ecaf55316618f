"""``evaluation=retrieval``: whether the images that should be found are at the top of the rankings."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.evaluation.base import Evaluation
from mucs_cli.schemas import MILLION, EvaluationConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.evaluator import Evaluator


@dataclass
class RetrievalConfig(EvaluationConfig):
    name: str = option("retrieval", "evaluation; set by evaluation=")
    relevant: str = option(
        "class",
        "what should be found: images of the query's class; with a value of its column in common; copies, of exactly "
        "its pixels; or causes, the images that its column names",
        choices=("class", "column", "copies", "causes"),
    )
    column: str | None = option(
        None,
        "relevant=column: a metadata column of images and queries, for example artist; relevant=causes: one of the "
        "queries with file names or example_ids",
    )
    separator: str | None = option(
        ";", "what stands between several values in a cell, besides JSON lists; null: nothing, a cell is one value"
    )
    k: int | None = option(
        None,
        "highest scores of a query that precision and recall count; null: 1 % of the images, at least 10",
        minimum=1,
    )
    num_resamples: int = option(
        2000, "bootstrap resamples of the queries for the 95 % intervals", minimum=100, maximum=MILLION
    )
    seed: int = option(II("seed"), "seed of the resamples")


class Retrieval(Evaluation):
    name = "retrieval"
    summary = "precision and recall of images known beforehand: of the query's class or group, copies, causes"
    schema = RetrievalConfig

    def evaluator(self, context: "Context") -> "Evaluator":
        from mucs_cli.stages.retrieval import RetrievalEvaluator

        return RetrievalEvaluator(context)


EVALUATION = Retrieval()
