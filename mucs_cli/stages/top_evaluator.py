"""What evaluations of the highest finished scores have in common: variants, queries, and what they depend on."""

from typing import Any

from mucs_cli.errors import UserError
from mucs_cli.reporting.groups import choose_k
from mucs_cli.stages.context import Context
from mucs_cli.stages.evaluator import Evaluator
from mucs_cli.stages.finished import SCORES, FinishedScores, ScoreFiles
from mucs_cli.stages.loading import chosen_queries


class TopEvaluator(Evaluator):
    """One that looks at the ``k`` highest finished scores of every query that ``queries.index`` chooses.

    Attributes:
        config: the evaluation's section, with ``variants`` and ``k``.
        num_images: N.
        k: highest scores that count.
        variants: the scores.
        chosen: queries, sorted; None for all that a variant has.
    Raises:
        UserError: no scores have finished, or a variant or ``k`` cannot be used, or a variant lacks a chosen query.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.config = context.config.evaluation
        files = ScoreFiles(context.run, "evaluation.variants")
        names = files.choose(self.config.variants)
        if not names:
            raise UserError(
                "evaluation.variants", f"got none; no scores have finished. Run mucs score run={context.run} first."
            )
        self.num_images = files.num_images
        self.k = choose_k(self.config.k, self.num_images, "evaluation.k")
        self.variants = [files.read(name) for name in names]
        index = context.config.queries.index
        self.chosen = None if index is None else chosen_queries(index, len(files.queries))
        for variant in self.variants:
            variant.require(self.chosen or (), "evaluation.variants")
            variant.require_settled(self.k, "evaluation.k")
        self.inputs = {
            "dataset": files.dataset,
            "model": files.model,
            "variants": names,
            "queries": "all" if self.chosen is None else self.chosen,
            **{f"scores of {v.name}": v.manifest["outputs"][SCORES]["sha256"] for v in self.variants},
        }

    def queries_of(self, variant: FinishedScores) -> list[int]:
        """The queries of a variant that count."""
        return variant.query_ids if self.chosen is None else self.chosen

    def facts(self) -> dict[str, Any]:
        return {
            "seeds": {f"{self.config.name}_resamples": self.config.seed},
            "counts": {
                "variants": len(self.variants),
                "queries": len({query for variant in self.variants for query in self.queries_of(variant)}),
            },
        }
