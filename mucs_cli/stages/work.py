"""What a method works with: one command's configuration, and the model, data and queries that it loaded."""

from dataclasses import dataclass
from typing import Any

from mucs_cli.stages.context import Context
from mucs_cli.stages.loading import Inputs, Queries, load_inputs, load_queries


@dataclass(frozen=True)
class Work:
    """Attributes as in ``Context``, ``Inputs`` and ``Queries``."""

    context: Context
    inputs: Inputs
    queries: Queries

    @classmethod
    def load(cls, context: Context) -> "Work":
        """Loads everything but what the method itself needs."""
        inputs = load_inputs(context)
        return cls(context, inputs, load_queries(context, inputs.model))

    @property
    def config(self) -> Any:
        """The whole configuration; ``config.method`` is an instance of the method's schema."""
        return self.context.config

    @property
    def num_images(self) -> int:
        """N: the training images that are scored."""
        return len(self.inputs.data.training)

    @property
    def is_conditional(self) -> bool:
        """Whether the model has conditions."""
        return self.inputs.model.denoiser.network.is_conditional

    def parameter_names(self) -> list[str]:
        """The names of the network's parameters, in its own order."""
        return [name for name, _ in self.inputs.model.denoiser.network.named_parameters()]
