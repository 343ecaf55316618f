"""What an evaluation says of itself."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from mucs_cli.schemas import EvaluationConfig

if TYPE_CHECKING:
    from mucs_cli.stages.context import Context
    from mucs_cli.stages.evaluator import Evaluator


class Evaluation(ABC):
    """A way to judge or compare finished scores.

    Attributes:
        name: what ``evaluation=`` selects, and the folder's name below ``evaluate/``.
        summary: one line for lists of evaluations.
        schema: its section of the configuration.
        sections: of the configuration, those that decide its results.
    """

    name: str
    summary: str
    schema: type[EvaluationConfig]
    sections: tuple[str, ...] = ("evaluation",)

    @abstractmethod
    def evaluator(self, context: "Context") -> "Evaluator":
        """What computes it for one run.

        Raises:
            UserError: the run lacks what it needs. Nothing long has started by then.
        """
