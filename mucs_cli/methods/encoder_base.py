"""What ``method=clip`` and ``method=dino`` share: an image encoder's embeddings, compared by their cosine."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class EncoderConfig(MethodConfig):
    path: str = option(
        MISSING, "folder of the encoder in safetensors, or its name on the hub", affects_result=False
    )  # the weights decide the scores, wherever they lie


class EncoderMethod(Method):
    """A method of one kind of encoder, which is its name."""

    def label(self, config: Any) -> str:
        from mucs_cli.stages.context import spell

        return f"{self.name}__path-{spell(PurePath(config.method.path).name)}"

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.stages.embeddings import EmbeddingScorer

        return EmbeddingScorer(work, self.name)
