"""What an attribution method says of itself."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from mucs_cli.schemas import MethodConfig

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.unlearner import Unlearner
    from mucs_cli.stages.work import Work


class Method(ABC):
    """An attribution method.

    Attributes:
        name: what ``method=`` selects.
        summary: one line for lists of methods.
        schema: its section of the configuration.
        sections: of the configuration, those that decide its scores, of ``method``, ``unlearning``, ``noise_bank``.
    """

    name: str
    summary: str
    schema: type[MethodConfig]
    sections: tuple[str, ...] = ("method",)
    can_race: bool = False
    """Whether its scorer is a ``LossComparison`` whose draws can be raced over: ``score.mode=adaptive``."""

    @abstractmethod
    def scorer(self, work: "Work") -> "Scorer":
        """What scores every training image for the wanted queries.

        Raises:
            UserError: the model, the data or the run lack what the method needs. Nothing long has started by then.
        """

    def label(self, config: Any) -> str:
        """What the names of its variants begin with; more than its own name where a key that is no value tells apart.

        Args:
            config: the whole configuration.
        """
        return self.name

    def unlearning_sections(self, config: Any) -> tuple[str, ...]:
        """The sections that decide its unlearned models; empty for a method that does not unlearn.

        Args:
            config: the whole configuration.
        """
        return ()

    def unlearner(self, work: "Work") -> "Unlearner":
        """What unlearns one query; called only where there are ``unlearning_sections``.

        Raises:
            UserError: as in ``scorer``.
        """
        raise NotImplementedError(f"{self.name} does not unlearn")
