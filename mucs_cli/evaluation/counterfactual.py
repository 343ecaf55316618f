"""``evaluation=counterfactual``: is a picture less like itself after training without its top images?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import II

from mucs_cli.evaluation.base import Evaluation
from mucs_cli.schemas import MILLION, MetricsConfig, RetrainingEvaluationConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.evaluator import Evaluator


@dataclass
class CounterfactualConfig(MetricsConfig, RetrainingEvaluationConfig):
    name: str = option("counterfactual", "evaluation; set by evaluation=")
    k: int | None = option(
        None, "images removed for each target; null: two times 1 % of the training images", minimum=1
    )
    removal: str = option(
        "union",
        "union: the images of all targets at once, one model a method; per_query: one model a target and method",
        choices=("union", "per_query"),
    )
    num_controls: int = option(
        20, "further generated pictures, for which nothing is removed", minimum=0, maximum=MILLION
    )
    batches: str = option(
        "base",
        "base: retrained in the base model's batches, with a random image in the place of each removed one, so that as "
        "little as possible differs by chance; new: the images that are left are shuffled anew",
        choices=("base", "new"),
    )
    num_seeds: int = option(1, "models a removal, from training seeds counted up from the base model's", minimum=1)
    matched: bool = option(
        True, "removal=union: beside each method a removal of as many random images as its union holds"
    )
    runs: list[str] | None = option(
        None,
        "folders of other runs whose finished evaluations with the same settings are pooled with this one",
        affects_result=False,
    )
    num_resamples: int = option(2000, "bootstrap resamples for the 95 % intervals", minimum=100, maximum=MILLION)
    seed: int = option(II("seed"), "seed of controls, random removals and resamples")


class Counterfactual(Evaluation):
    name = "counterfactual"
    summary = "pictures generated again after training without what each method names"
    schema = CounterfactualConfig

    def evaluator(self, context: "Context") -> "Evaluator":
        from mucs_cli.stages.counterfactual import CounterfactualEvaluator

        return CounterfactualEvaluator(context)


EVALUATION = Counterfactual()
