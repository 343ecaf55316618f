"""``method=pixel``: how alike the pictures are, pixel by pixel. No model is asked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MethodConfig, option

if TYPE_CHECKING:
    from torch import Tensor

    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.work import Work


@dataclass
class PixelConfig(MethodConfig):
    name: str = option("pixel", "attribution method; set by method=")
    similarity: str = option(
        "cosine",
        "of the pixels in [-1, 1]: cosine of the angle between two pictures, or euclidean, minus their distance",
        choices=("cosine", "euclidean"),
    )


class Pixel(Method):
    name = "pixel"
    summary = "likeness of the pixels: cosine, or Euclidean distance"
    schema = PixelConfig

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.attribution.similarity import cosine, negative_distance
        from mucs_cli.stages.similarity import PictureScorer

        def pixels(images: "Tensor") -> "Tensor":
            return images.flatten(1)

        compare = {"cosine": cosine, "euclidean": negative_distance}[work.config.method.similarity]
        return PictureScorer(work, pixels, compare)


METHOD = Pixel()
