"""What ``mucs evaluate`` asks of an evaluation: its inputs, its results, and how they look as a table and charts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mucs_cli.reporting.tables import Table
from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import load_inputs
from mucs_cli.stages.retraining import Retraining, Retrainings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.json"


class Evaluator(ABC):
    """One evaluation of one run. Making one checks what it needs, and is quick.

    Attributes:
        context: the command.
        inputs: fingerprints of what the results depend on beyond the configuration; name -> JSON value other than an
            object. Where one has changed, the evaluation is done again.
    """

    def __init__(self, context: Context):
        self.context = context
        self.inputs: dict[str, Any] = {}

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """The results, JSON values; what takes long is kept below the run's folder and goes on where it stopped."""

    @abstractmethod
    def table(self, results: dict[str, Any]) -> Table:
        """The results, as ``evaluate`` gave them, for the reader."""

    def files(self, folder: Path) -> list[Path]:
        """Writes what else belongs to the results, after ``evaluate``; returns the files."""
        return []

    def charts(self, results: dict[str, Any]) -> "dict[str, Figure]":
        """The results as charts; file name without suffix -> figure. The same results give the same charts."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What the manifest is to record."""
        return {}


class RetrainingEvaluator(Evaluator):
    """An evaluation that needs models trained anew.

    Attributes:
        base: device, data and base model.
        models: the retrained models.
    Raises:
        UserError: the base model was not trained in this run.
    """

    def __init__(self, context: Context):
        super().__init__(context)
        self.base = load_inputs(context)
        self.models = Retrainings(context, self.base)

    @property
    def only_trains(self) -> bool:
        """The command is to plan or to train, and not to evaluate: scores may still be missing."""
        config = self.context.config
        return config.evaluation.worker is not None or config.plan

    @abstractmethod
    def retrainings(self) -> Sequence[Retraining]:
        """The models that ``evaluate`` needs; some may be there already."""
