"""``method=dino``: how alike the pictures are to a DINO or DINOv2 image encoder."""

from dataclasses import dataclass

from mucs_cli.methods.encoder_base import EncoderConfig, EncoderMethod
from mucs_cli.schemas import option


@dataclass
class DINOConfig(EncoderConfig):
    name: str = option("dino", "attribution method; set by method=")


class DINO(EncoderMethod):
    name = "dino"
    summary = "cosine of DINO or DINOv2 class tokens"
    schema = DINOConfig


METHOD = DINO()
