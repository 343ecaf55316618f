"""Captions to condition vectors, by a CLIP text model from ``transformers`` (safetensors only)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mucs_cli.data.transformers_models import import_transformers, load_model, loading
from mucs_cli.files import user_path

KEY = "data.text_encoder"
EXPECTED = "a CLIP text model in safetensors, with its projection"
CAPTIONS_AT_ONCE = 64


def encoder_state(path: str) -> str:
    """Changes where the text model may be another one: sizes and times of a local folder's files, or the hub's name."""
    folder = user_path(path)
    if not folder.is_dir():
        return path
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return "; ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


class CaptionEncoder:
    """A CLIP text model with its tokenizer and projection, in eval mode, float32, on the GPU where there is one.

    Args:
        path: a local folder, or a name on the hub.
    Raises:
        UserError: ``transformers`` is not installed, or the path holds no CLIP text model with projection in
            safetensors.
    """

    def __init__(self, path: str):
        transformers = import_transformers(KEY, path, "text")
        name = str(user_path(path)) if user_path(path).is_dir() else path
        with loading(KEY, path, EXPECTED):
            # Unless it is told not to, the library asks on the terminal whether to run code that the folder brings.
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = load_model(transformers.CLIPTextModelWithProjection, name, KEY, path, EXPECTED)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = model.to(self.device)
        self.condition_dim = int(model.config.projection_dim)
        self.max_tokens = int(model.config.max_position_embeddings)

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """Projected text embeddings of unit length; float32 [B, condition_dim]. Longer captions are cut off."""
        pieces = []
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            # Padded to one length: a caption's vector does not depend on its neighbours'.
            tokens = self.tokenizer(
                list(captions[start : start + CAPTIONS_AT_ONCE]),
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self.device)
            embedding = self.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds
            pieces.append(torch.nn.functional.normalize(embedding, dim=-1).cpu())
        return torch.cat(pieces).numpy()
