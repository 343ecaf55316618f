"""``method=ensemble``: finished scores of several variants as one."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class EnsembleConfig(MethodConfig):
    name: str = option("ensemble", "attribution method; set by method=")
    members: list[str] | None = option(
        None, "finished variants, folder names below score/, for example [mucs,pixel]; null: all but ensembles"
    )
    combine: str = option(
        "rank_mean",
        "weighted mean over members of the rank (rank_mean), of the standardised score (z_mean), or of the points "
        "k, k - 1, ... 1 of the k highest scores (borda)",
        choices=("rank_mean", "z_mean", "borda"),
    )
    k: int | None = option(
        None,
        "highest scores of a member that borda gives points, and whose overlap members.json has; null: 1 % of the "
        "images, at least 10",
        minimum=1,
    )
    weights: list[float] | None = option(None, "a number >= 0 for each of members, in their order; null: all the same")


class Ensemble(Method):
    name = "ensemble"
    summary = "finished scores of several variants as one: mean rank, mean z score or Borda count"
    schema = EnsembleConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.ensemble import EnsembleScorer

        return EnsembleScorer(work)


METHOD = Ensemble()
