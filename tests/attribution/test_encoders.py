"""Image encoders on tiny models of random weights, against the library's own models and processors, and Pillow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mucs_cli.attribution.encoders import ImageEncoder, Preprocessing, read_preprocessing, standard_preprocessing
from mucs_cli.attribution.similarity import cosine
from mucs_cli.errors import UserError

transformers = pytest.importorskip("transformers")

KEY = "method.encoder"
CPU = torch.device("cpu")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
KINDS = pytest.mark.parametrize(
    ("name", "kind"), [("clip", "clip"), ("clip_image", "clip"), ("dinov2", "dino"), ("vit", "dino")]
)


def random_model(name: str) -> Any:
    torch.manual_seed(len(name))
    sides = {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    if name == "clip":
        text = {**SMALL, "intermediate_size": 32, "vocab_size": 60, "bos_token_id": 58, "eos_token_id": 59}
        config = transformers.CLIPConfig(text_config=text, vision_config={**SMALL, **sides}, projection_dim=24)
        return transformers.CLIPModel(config)
    if name == "clip_image":
        config = transformers.CLIPVisionConfig(**SMALL, **sides, projection_dim=24)
        return transformers.CLIPVisionModelWithProjection(config)
    if name == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=42, patch_size=14))
    return transformers.ViTModel(transformers.ViTConfig(**SMALL, **sides), add_pooling_layer=False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder a name, as the library saves it, with a processor's file."""
    place = tmp_path_factory.mktemp("models")
    clip = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processors = {
        "clip": clip,
        "clip_image": clip,
        "dinov2": transformers.BitImageProcessor(
            size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}, **IMAGENET
        ),
        "vit": transformers.ViTImageProcessor(size={"height": 32, "width": 32}, **IMAGENET),
    }
    for name, processor in processors.items():
        random_model(name).eval().save_pretrained(place / name)
        processor.save_pretrained(place / name)
    return place


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of a CLIP model's folder, to be changed."""
    return Path(shutil.copytree(models / "clip", tmp_path / "model"))


def pictures(seed: int, count: int, height: int = 40, width: int = 40, channels: int = 3) -> torch.Tensor:
    """Eight-bit pictures of soft shapes, as float in [-1, 1]."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth * 255).round() / 127.5 - 1


def as_pillow(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for image in images]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refusal(path: Path | str, kind: str = "clip") -> UserError:
    with pytest.raises(UserError) as caught:
        ImageEncoder(str(path), kind, KEY, CPU)
    return caught.value


# --- preprocessing ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 40), (100, 131), (131, 90)])
def test_preprocessing_is_the_librarys_up_to_its_rounding_to_eight_bits(
    models: Path, name: str, kind: str, height: int, width: int
) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(models / name)
    images = pictures(height, 2, height, width)
    expected = torch.tensor(np.array(processor(as_pillow(images))["pixel_values"]))
    found = ImageEncoder(str(models / name), kind, KEY, CPU).preprocessing(images)
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    assert difference.max() < 2 / 255 / 0.22 and difference.mean() < 0.5 / 255 / 0.22
    assert expected.std() > 0.3


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (100, 100), (60, 40)])
def test_resizing_is_pillows_in_floating_point(name: str, height: int, width: int) -> None:
    images = pictures(1, 2, height, width)
    found = Preprocessing((32, 20), None, name, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))(images)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[name]
    for image, resized in zip((images + 1) / 2, found, strict=True):
        for channel, values in zip(image, resized, strict=True):
            expected = np.asarray(Image.fromarray(channel.numpy()).resize((20, 32), method)).clip(0, 1)
            assert np.abs(values.numpy() - expected).max() < 1e-5


def test_images_are_not_rounded_so_that_a_small_difference_is_seen() -> None:
    standard = standard_preprocessing("clip", 32)
    images = pictures(2, 1) * 0.9
    moved = standard(images + 1e-4) - standard(images)
    assert torch.allclose(moved, (0.5e-4 / torch.tensor(standard.std))[:, None, None].expand_as(moved), atol=1e-6)


def test_a_grayscale_image_is_three_equal_channels_and_latents_are_refused() -> None:
    standard = standard_preprocessing("dino", 28)
    gray = pictures(3, 2, channels=1)
    assert torch.equal(standard(gray), standard(gray.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        standard(torch.zeros(2, 4, 8, 8))


def test_without_a_file_the_kinds_own_preprocessing_is_used_at_the_models_side(models: Path, tmp_path: Path) -> None:
    for name, kind, side, mean in (
        ("clip", "clip", 32, 0.48145466),
        ("vit", "dino", 32, 0.485),
        ("dinov2", "dino", 224, 0.485),
    ):
        bare = Path(shutil.copytree(models / name, tmp_path / name))
        (bare / "preprocessor_config.json").unlink()
        found = ImageEncoder(str(bare), kind, KEY, CPU).preprocessing
        assert found == standard_preprocessing(kind, side)
        assert (found.crop, found.mean[0], found.interpolation) == ((side, side), mean, "bicubic")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"size": 48, "crop_size": 40, "feature_extractor_type": "CLIPFeatureExtractor"}, (48, (40, 40), "bicubic")),
        ({"size": 48, "feature_extractor_type": "ViTFeatureExtractor", "resample": 2}, ((48, 48), None, "bilinear")),
        ({"size": {"height": 30, "width": 48}, "do_center_crop": False}, ((30, 48), None, "bicubic")),
        ({"size": {"shortest_edge": 48}, "crop_size": {"height": 30, "width": 40}}, (48, (30, 40), "bicubic")),
        ({"size": [48, 50], "do_center_crop": False, "resample": 2}, ((48, 50), None, "bilinear")),
        ({}, (32, (32, 32), "bicubic")),
        (
            {"processor_class": "CLIPProcessor", "image_processor": {"size": 48, "crop_size": 40}},
            (48, (40, 40), "bicubic"),
        ),
    ],
)
def test_every_way_in_which_a_processors_file_gives_sizes_is_read(
    tmp_path: Path, content: dict, expected: tuple
) -> None:
    is_shared = "image_processor" in content
    name = "processor_config.json" if is_shared else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps(content))
    found = read_preprocessing(tmp_path, standard_preprocessing("clip", 32))
    assert (found.size, found.crop, found.interpolation) == expected


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"do_normalize": False}, "do_normalize is false"),
        ({"rescale_factor": 1}, "rescale_factor is 1"),
        ({"resample": 1}, "resample is 1"),
        ({"crop_size": 40}, "crop_size is 40 x 40"),
        ({"size": {"longest_edge": 40}}, "height"),
        ({"size": 0}, "a size is 0"),
        ({"image_mean": [0.5]}, "not enough values"),
        ({"image_std": None}, "NoneType"),
    ],
)
def test_preprocessing_that_is_not_supported_is_refused_by_its_file(folder: Path, content: dict, said: str) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    error = refusal(folder)
    assert error.subject == str(folder / "preprocessor_config.json") and said in error.message


def test_a_size_that_the_model_does_not_take_is_refused_at_once_or_by_the_images_shape(
    folder: Path, models: Path
) -> None:
    change(folder / "preprocessor_config.json", size=64, crop_size=48)
    error = refusal(folder)
    assert error.subject == KEY and "48 x 48 after its preprocessing; its model expected 32 x 32" in error.message
    change(folder / "preprocessor_config.json", size={"shortest_edge": 32}, do_center_crop=False)
    encoder = ImageEncoder(str(folder), "clip", KEY, CPU)
    assert encoder.encode(pictures(0, 1, 40, 40)).shape == (1, 24)
    with pytest.raises(UserError, match="32 x 64 after its preprocessing"):
        encoder.encode(pictures(0, 1, 20, 40))
    dino = shutil.copytree(models / "dinov2", folder.parent / "dinov2")
    change(dino / "preprocessor_config.json", size={"shortest_edge": 28}, do_center_crop=False)
    assert ImageEncoder(str(dino), "dino", KEY, CPU).encode(pictures(0, 1, 20, 40)).shape == (1, 16)


# --- embeddings ------------------------------------------------------------------------------------------------------


@KINDS
def test_embeddings_are_the_librarys_models(models: Path, name: str, kind: str) -> None:
    encoder = ImageEncoder(str(models / name), kind, KEY, CPU)
    images = pictures(4, 3)
    found = encoder.encode(images)
    pixels = encoder.preprocessing(images)
    model = random_model(name).eval()  # the same seed, hence the same weights as in the folder
    with torch.no_grad():
        if name == "clip":
            expected = model.visual_projection(model.vision_model(pixels).pooler_output)
        elif name == "clip_image":
            expected = model(pixels).image_embeds
        elif name == "dinov2":
            expected = model(pixels).pooler_output
        else:
            expected = model(pixels).last_hidden_state[:, 0]
    assert found.dtype == torch.float32 and found.shape == (3, encoder.embedding_dim) == (
        3,
        24 if kind == "clip" else 16,
    )
    assert torch.allclose(found, expected, atol=1e-5) and expected.std() > 0.1
    assert not torch.allclose(found.norm(dim=1), torch.ones(3), atol=0.01)
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert not encoder.model.training and not found.requires_grad


@KINDS
def test_an_images_embedding_does_not_depend_on_its_batch(models: Path, name: str, kind: str) -> None:
    encoder = ImageEncoder(str(models / name), kind, KEY, CPU)
    images = pictures(5, 16)
    together = encoder.encode(images)
    alone = torch.cat([encoder.encode(image[None]) for image in images])
    assert torch.allclose(alone, together, rtol=0, atol=1e-5)
    neighbours = torch.cat([images[:8], -images[8:]])
    assert torch.equal(encoder.encode(neighbours)[:8], together[:8])


@KINDS
def test_a_noisy_copy_of_the_query_is_the_nearest_training_image(models: Path, name: str, kind: str) -> None:
    encoder = ImageEncoder(str(models / name), kind, KEY, CPU)
    training = pictures(6, 40)
    noise = torch.randn(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    query = (training[23:24] + 0.02 * noise).clamp(-1, 1)
    scores = cosine(encoder.encode(query), encoder.encode(training))
    assert scores.argmax() == 23 and scores[0, 23] > 0.99


def test_weights_in_half_precision_and_in_shards_are_read_and_computed_in_float32(folder: Path) -> None:
    images = pictures(7, 2)
    expected = ImageEncoder(str(folder), "clip", KEY, CPU).encode(images)
    sharded = folder.parent / "sharded"
    transformers.CLIPModel.from_pretrained(folder).save_pretrained(sharded, max_shard_size="10KB")
    shutil.copy(folder / "preprocessor_config.json", sharded)
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    assert torch.equal(ImageEncoder(str(sharded), "clip", KEY, CPU).encode(images), expected)
    weights = load_file(folder / "model.safetensors")
    save_file({name: w.half() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", dtype="float16", torch_dtype="float16")
    encoder = ImageEncoder(str(folder), "clip", KEY, CPU)
    assert {parameter.dtype for parameter in encoder.model.parameters()} == {torch.float32}
    assert torch.allclose(encoder.encode(images), expected, atol=1e-2)


def test_the_fingerprint_is_that_of_architecture_preprocessing_and_weights_not_of_the_place(folder: Path) -> None:
    def found() -> str:
        return ImageEncoder(str(folder), "clip", KEY, CPU).fingerprint

    first = found()
    moved = Path(shutil.copytree(folder, folder.parent / "moved"))
    assert ImageEncoder(str(moved), "clip", KEY, CPU).fingerprint == first
    change(folder / "config.json", transformers_version="4.45.0")
    assert found() == first
    change(folder / "preprocessor_config.json", resample=2)
    other_preprocessing = found()
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other_weights = found()
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    change(folder / "config.json", vision_config={**vision, "hidden_act": "gelu"})
    assert len({first, other_preprocessing, other_weights, found()}) == 4


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_the_library_the_extra_is_named(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    error = refusal(models / "clip")
    assert error.subject == KEY and "pip install 'mucs[encoders]'" in error.message


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/model", "~/nowhere", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub(path: str) -> None:
    assert refusal(path).message.startswith(f"got {path}, which is not there; expected the folder of a CLIP model")


def test_files_and_folders_without_a_model_are_refused(folder: Path) -> None:
    assert "which is a file" in refusal(folder / "model.safetensors").message
    (folder / "config.json").write_text("[]")
    assert "got no JSON object" in refusal(folder).message
    (folder / "config.json").unlink()
    assert "without config.json" in refusal(folder).message


def test_pickled_weights_are_refused_unopened_with_the_line_that_converts_them(folder: Path) -> None:
    trap = folder.parent / "trap"
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder).message
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(trap))
    error = refusal(folder)
    assert error.subject == KEY and "pytorch_model.bin, a pickle" in error.message and not trap.exists()
    torch.save(weights, folder / "pytorch_model.bin")
    line = error.message.split("in Python: ")[1].split(";")[0]
    converted = folder.parent / "converted"
    exec(line.replace("'NEW_FOLDER'", repr(str(converted))), {"transformers": transformers})
    shutil.copy(folder / "preprocessor_config.json", converted)
    assert ImageEncoder(str(converted), "clip", KEY, CPU).encode(pictures(0, 1)).shape == (1, 24)


def test_damaged_weights_and_those_that_lack_some_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "which lacks visual_projection.weight" in refusal(folder).message
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:3000])
    error = refusal(folder)
    assert error.subject == KEY and "cannot be loaded" in error.message


@pytest.mark.parametrize("name", ["../other.safetensors", "missing.safetensors", 3])
def test_an_index_that_names_files_elsewhere_is_refused(folder: Path, name: object) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"logit_scale": name}}))
    error = refusal(folder)
    assert error.subject == str(folder / "model.safetensors.index.json") and "not beside it" in error.message


def test_a_model_of_another_kind_is_refused_by_its_type(models: Path, folder: Path) -> None:
    assert "a model of type 'clip'; expected a DINO" in refusal(models / "clip", "dino").message
    assert "a model of type 'dinov2'; expected a CLIP" in refusal(models / "dinov2").message
    change(folder / "config.json", model_type="bert")
    assert "a model of type 'bert'" in refusal(folder).message


def test_code_that_a_model_brings_along_is_never_run(folder: Path) -> None:
    trap = folder.parent / "trap"
    expected = ImageEncoder(str(folder), "clip", KEY, CPU).encode(pictures(0, 1))
    names = ("AutoConfig", "AutoModel", "CLIPVisionModelWithProjection", "AutoImageProcessor")
    (folder / "own.py").write_text(f"open({str(trap)!r}, 'w')")
    change(folder / "config.json", auto_map={name: "own.Own" for name in names}, attn_implementation="nobody/kernel")
    change(folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "own.Own"})
    assert torch.equal(ImageEncoder(str(folder), "clip", KEY, CPU).encode(pictures(0, 1)), expected)
    assert not trap.exists()


def test_a_name_that_the_hub_does_not_give_is_refused(tmp_path: Path) -> None:
    code = (
        "import torch; from mucs_cli.attribution.encoders import ImageEncoder; "
        f"ImageEncoder('nobody/nothing', 'dino', {KEY!r}, torch.device('cpu'))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith(f"mucs_cli.errors.UserError: {KEY}: got nobody/nothing, which is no folder here")
    assert "copy the model here and give its folder" in last
