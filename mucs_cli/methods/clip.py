"""``method=clip``: how alike the pictures are to a CLIP image encoder."""

from dataclasses import dataclass

from mucs_cli.methods.encoder_base import EncoderConfig, EncoderMethod
from mucs_cli.schemas import option


@dataclass
class CLIPConfig(EncoderConfig):
    name: str = option("clip", "attribution method; set by method=")


class CLIP(EncoderMethod):
    name = "clip"
    summary = "cosine of CLIP image embeddings"
    schema = CLIPConfig


METHOD = CLIP()
