"""Scores from an image encoder's embeddings; those of the training images are computed once a run and encoder."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint
from mucs_cli.attribution.encoders import ImageEncoder
from mucs_cli.attribution.scoring import GRANULE, Block, blocks_of
from mucs_cli.attribution.similarity import cosine
from mucs_cli.block_file import as_tensor
from mucs_cli.errors import UserError
from mucs_cli.runtime import Progress
from mucs_cli.stages.blocks import BlockWork, kept_tensor
from mucs_cli.stages.scorer import Scorer
from mucs_cli.stages.work import Work

EMBEDDINGS = "embeddings.safetensors"


def encode_padded(encoder: ImageEncoder, images: Tensor) -> Tensor:
    """Embeddings [B, d] of up to ``GRANULE`` images, encoded as that many: no embedding depends on how many there are.

    Raises:
        UserError: one is not finite.
    """
    rows = torch.arange(GRANULE).clamp(max=len(images) - 1)
    embedding = encoder.encode(images[rows])[: len(images)]
    if not bool(embedding.isfinite().all()):
        raise UserError(encoder.key, f"got {encoder.path}, whose embeddings are not finite. Use another encoder.")
    return embedding


class Embeddings(BlockWork):
    """The training images' embeddings, [N, d]."""

    title = "score: embeddings"
    unit = "images"
    passes = ((0,),)

    def __init__(self, work: Work, encoder: ImageEncoder):
        self.work, self.encoder = work, encoder
        self.tensors = {"embedding": ("float32", (work.num_images, encoder.embedding_dim))}

    def blocks(self) -> list[Block]:
        return blocks_of(self.work.num_images, GRANULE)

    def cost(self, block: Block, part: Sequence[int]) -> int:
        return len(block)

    def compute(self, block: Block, part: Sequence[int], loaded: Any, progress: Progress) -> Tensor:
        pixels = self.work.inputs.pixels
        images = pixels.images(pixels.training[block.start : block.stop])
        return encode_padded(self.encoder, images)


def training_embeddings(work: Work, encoder: ImageEncoder) -> np.ndarray:
    """The training images' embeddings [N, d]: from ``score/_embeddings/``, or computed into it."""
    inputs = {"dataset": work.inputs.pixels.fingerprint, "encoder": encoder.fingerprint}
    path = work.context.folder("score", "_embeddings", fingerprint(inputs)[:16], EMBEDDINGS)
    facts = {"encoder": encoder.path, "device": str(encoder.device)}
    return kept_tensor(path, "embedding", inputs, Embeddings(work, encoder), facts)


class EmbeddingScorer(Scorer):
    """Cosine of a query's and each training picture's embeddings.

    Args:
        work: what it works with; ``method.path`` names the encoder.
        kind: clip or dino.
    Raises:
        UserError: there is no such encoder, or it cannot take these pictures.
    """

    def __init__(self, work: Work, kind: str):
        super().__init__(work)
        channels = work.inputs.pixels.channels
        if channels not in (1, 3):
            raise UserError(
                "method", f"got {kind} with pictures of {channels} channels; expected 1 or 3. Use another method."
            )
        self.encoder = ImageEncoder(work.config.method.path, kind, "method.path", work.inputs.device)
        self.encoder.encode(work.queries.picture[:1])  # a shape that it cannot take is named now
        self.inputs = {"encoder": self.encoder.fingerprint}

    def prepare(self) -> None:
        self.training = training_embeddings(self.work, self.encoder)

    def load(self, queries: Sequence[int]) -> Tensor:
        picture = self.work.queries.picture[list(queries)]
        return torch.cat([encode_padded(self.encoder, part) for part in picture.split(GRANULE)])

    def scores(self, queries: Sequence[int], loaded: Any, block: Block, progress: Progress) -> Tensor:
        progress.advance(self.cost(block, queries))
        return cosine(loaded, as_tensor(self.training[block.rows().numpy()]))[:, : len(block)]

    def facts(self) -> dict[str, Any]:
        return {"encoder": {"path": self.encoder.path, "dimensions": self.encoder.embedding_dim}}
