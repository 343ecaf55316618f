"""Images to embedding vectors, by a CLIP or DINO model from ``transformers`` (safetensors only)."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mucs_cli.artifacts import fingerprint
from mucs_cli.data.transformers_models import import_transformers, load_model, loading
from mucs_cli.errors import UserError
from mucs_cli.files import user_path

MODEL_CLASSES = {
    "clip": {"clip": "CLIPVisionModelWithProjection", "clip_vision_model": "CLIPVisionModelWithProjection"},
    "dino": {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "vit": "ViTModel"},
}
"""kind -> the model_type of a config.json -> the library's class."""
EXPECTED = {
    "clip": "a CLIP model in safetensors, with its image encoder and projection",
    "dino": "a DINO (ViT) or DINOv2 model in safetensors",
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
HUB_FILES = ["config.json", *PREPROCESSING, WEIGHTS, INDEX, "model-*.safetensors"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
UNIDENTIFYING = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # as Pillow numbers them


# --- preprocessing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before a model sees it, in floating point throughout.

    size: pixels, (height, width) or the shorter side; crop: (height, width) of the centre that is kept, or None;
    interpolation: bilinear or bicubic, antialiased; mean, std: a channel, of values in [0, 1].
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] in [-1, 1], C 1 or 3 -> [B, 3, H', W'], normalised."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images of shape {tuple(images.shape)}; expected [B, 1, H, W] or [B, 3, H, W]")
        values = (images.expand(-1, 3, -1, -1) + 1) / 2
        size = self.resized(images.shape[2], images.shape[3])
        resized = functional.interpolate(values, size, mode=self.interpolation, antialias=True, align_corners=False)
        resized = resized.clamp(0, 1)  # bicubic overshoots at edges; eight-bit images, which models know, cannot
        if self.crop is not None:
            top, left = (size[0] - self.crop[0]) // 2, (size[1] - self.crop[1]) // 2
            resized = resized[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (resized.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (resized - mean) / std

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before the crop."""
        if not isinstance(self.size, int):
            return self.size
        shorter = min(height, width)
        return int(self.size * height / shorter), int(self.size * width / shorter)


def standard_preprocessing(kind: str, side: int) -> Preprocessing:
    """What the models of a kind were trained with: CLIP's own mean and deviation, or ImageNet's for DINO."""
    if kind == "clip":
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    else:
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Preprocessing(side, (side, side), "bicubic", mean, std)


def read_preprocessing(folder: Path, standard: Preprocessing) -> Preprocessing:
    """The preprocessing that a model's folder asks for; ``standard`` for what it leaves open.

    Raises:
        UserError: its file cannot be read, or asks for what is not supported here.
    """
    path = next((folder / name for name in PREPROCESSING if (folder / name).is_file()), None)
    if path is None:
        return standard
    wanted = read_object(path)
    if isinstance(wanted.get("image_processor"), dict):  # in a file that is shared with the tokenizer
        wanted = wanted["image_processor"]
    kind = str(wanted.get("image_processor_type", wanted.get("feature_extractor_type", "")))
    is_vit = kind.startswith("ViT")  # whose numbers are both sides, and which crops nothing unless told
    try:
        for key in ("do_resize", "do_rescale", "do_normalize"):
            if not wanted.get(key, True):
                raise ValueError(f"{key} is false")
        if abs(float(wanted.get("rescale_factor", 1 / 255)) * 255 - 1) > 1e-6:
            raise ValueError(f"rescale_factor is {wanted['rescale_factor']}")
        if wanted.get("resample", 3) not in INTERPOLATIONS:
            raise ValueError(f"resample is {wanted['resample']}")
        size = read_size(wanted.get("size", standard.size), is_shorter_side=not is_vit)
        crop = None
        if wanted.get("do_center_crop", "crop_size" in wanted or not is_vit):
            side = read_size(wanted.get("crop_size", standard.crop), is_shorter_side=False)
            crop = (side, side) if isinstance(side, int) else side
            if min(size if isinstance(size, tuple) else (size,)) < max(crop):
                raise ValueError(f"crop_size is {crop[0]} x {crop[1]}")
        return Preprocessing(
            size=size,
            crop=crop,
            interpolation=INTERPOLATIONS[wanted["resample"]] if "resample" in wanted else standard.interpolation,
            mean=read_channels(wanted.get("image_mean", standard.mean)),
            std=read_channels(wanted.get("image_std", standard.std)),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            str(path),
            f"asks for a preprocessing that is not supported ({error}); expected one that resizes (resample 2 or 3), "
            "crops no more than that, divides by 255 and normalises three channels. Correct it, or delete it for the "
            "kind's usual one.",
        ) from error


def read_size(value: Any, is_shorter_side: bool) -> int | tuple[int, int]:
    """The shorter side, or (height, width); a bare number is the former, or both of the latter."""
    if isinstance(value, dict):
        value = value["shortest_edge"] if "shortest_edge" in value else (value["height"], value["width"])
        is_shorter_side = True
    sides = [int(side) for side in (value if isinstance(value, tuple | list) else (value,))]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(f"a size is {value}")
    if len(sides) == 1 and is_shorter_side:
        return sides[0]
    return sides[0], sides[-1]


def read_channels(value: Any) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in value)
    return red, green, blue


# --- files -----------------------------------------------------------------------------------------------------------


def find_folder(path: str, key: str, kind: str) -> Path:
    """The model's folder: the one named, or where the hub's files of that name were copied to.

    Raises:
        UserError: there is no such folder, and the hub does not give a model of that name.
    """
    local = user_path(path)
    if local.is_dir():
        return local
    if local.is_file() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        got = "which is a file" if local.is_file() else "which is not there"
        raise UserError(key, f"got {path}, {got}; expected the folder of {EXPECTED[kind]}. Correct it.")
    hub: Any = import_module("huggingface_hub")
    try:
        return Path(hub.snapshot_download(path, allow_patterns=HUB_FILES))
    except Exception as error:  # whatever the network, its libraries and the server raise
        text = str(error).strip().split("\n")[0]
        raise UserError(
            key,
            f"got {path}, which is no folder here, and no model that the hub gives ({text}); expected {EXPECTED[kind]}."
            " Correct it, or copy the model here and give its folder.",
        ) from error


def check_weights(folder: Path, path: str, key: str, kind: str) -> None:
    """Raises UserError where a model's folder has no weights in safetensors."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return
    if index.is_file():
        shards = read_object(index).get("weight_map", {}).values()
        if shards and all(Path(name).name == name and (folder / name).is_file() for name in map(str, shards)):
            return
        raise UserError(str(index), "names weight files that are not beside it. Copy the model again.")
    pickle = next((file for file in sorted(folder.iterdir()) if file.suffix in PICKLES), None)
    got = f"no {WEIGHTS}" if pickle is None else f"{pickle.name}, a pickle, and opening one can run code in it"
    raise UserError(
        key,
        f"got {path} with {got}; expected {EXPECTED[kind]}. Where you trust it, convert it in Python: "
        f"transformers.AutoModel.from_pretrained({path!r}).save_pretrained('NEW_FOLDER', safe_serialization=True); "
        f"copy its preprocessor_config.json there, and set {key}=NEW_FOLDER.",
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises UserError where the file holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), f"cannot be read as JSON ({error}). Copy the model again.") from error
    if not isinstance(value, dict):
        raise UserError(str(path), "got no JSON object; expected one. Copy the model again.")
    return value


# --- encoder ---------------------------------------------------------------------------------------------------------


class ImageEncoder:
    """A CLIP model's projected image embedding, or a DINO or DINOv2 model's class token after its last norm.

    Args:
        path: a local folder, or a name on the hub.
        kind: clip or dino.
        key: the configuration's, for messages.
        device: where the model computes.
    Attributes:
        embedding_dim: d.
        preprocessing: what is done to images first.
    Raises:
        UserError: ``transformers`` is not installed, or the path holds no model of that kind in safetensors.
    """

    def __init__(self, path: str, kind: str, key: str, device: torch.device):
        self.path, self.kind, self.key, self.device = path, kind, key, device
        transformers = import_transformers(key, path, "encoders")
        folder = find_folder(path, key, kind)
        if not (folder / "config.json").is_file():
            raise UserError(key, f"got {path} without config.json; expected {EXPECTED[kind]}. Correct it.")
        model_type = read_object(folder / "config.json").get("model_type")
        known = MODEL_CLASSES[kind]
        if model_type not in known:
            raise UserError(
                key,
                f"got {path}, a model of type {model_type!r}; expected {EXPECTED[kind]} (type {', '.join(known)}). "
                "Use another.",
            )
        check_weights(folder, path, key, kind)
        options: dict[str, Any] = {"attn_implementation": "eager"}  # never what the config names, which may be code
        with loading(key, path, EXPECTED[kind]):
            model_class = getattr(transformers, known[model_type])
            if model_type == "clip":  # whose width of embedding is the whole model's, not the image encoder's
                whole = transformers.CLIPConfig.from_pretrained(folder)
                options["config"] = whole.vision_config
                options["config"].projection_dim = whole.projection_dim
            if model_type == "vit":
                options["add_pooling_layer"] = False  # DINO has none
        model = load_model(model_class, str(folder), key, path, EXPECTED[kind], **options)
        side = model.config.image_size
        self.input_size = (side, side) if isinstance(side, int) else tuple(side)
        self.has_one_size = not model_type.startswith("dinov2")  # which interpolate their position embeddings
        standard = standard_preprocessing(kind, max(self.input_size) if self.has_one_size else 224)
        self.preprocessing = read_preprocessing(folder, standard)
        size = self.preprocessing.crop or self.preprocessing.resized(1, 1)
        self._check_size(size)
        self.embedding_dim = int(model.config.projection_dim if kind == "clip" else model.config.hidden_size)
        self.model: Any = model.to(device)

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.has_one_size and size != self.input_size:
            raise UserError(
                self.key,
                f"got {self.path}, whose images would be {size[0]} x {size[1]} after its preprocessing; its model "
                f"expected {self.input_size[0]} x {self.input_size[1]}. Correct its {PREPROCESSING[0]}.",
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the architecture, the preprocessing and the weights, wherever they came from."""
        config = {name: value for name, value in self.model.config.to_dict().items() if name not in UNIDENTIFYING}
        weights = self.model.state_dict()
        named = [part for name in sorted(weights) for part in (name, weights[name])]
        return fingerprint(type(self.model).__name__, config, asdict(self.preprocessing), *named)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Embedding vectors, not normalised; one image's does not depend on the others' values.

        Args:
            images: [B, C, H, W] in [-1, 1]; C is 3, or 1, which is repeated.
        Returns:
            [B, embedding_dim], float32, on the CPU.
        Raises:
            UserError: the images' shape gives another size than the model takes.
        """
        pixels = self.preprocessing(images.to(self.device, torch.float32))
        self._check_size((pixels.shape[2], pixels.shape[3]))
        output = self.model(pixel_values=pixels)
        embedding: Tensor = output.image_embeds if self.kind == "clip" else output.last_hidden_state[:, 0]
        return embedding.float().cpu()
