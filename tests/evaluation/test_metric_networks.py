"""Similarities that need a network, on random weights: against formulas written here, and through the converters."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mucs_cli.composition import compose
from mucs_cli.errors import UserError
from mucs_cli.evaluation.measures.image_metrics import PIXEL_METRICS
from mucs_cli.evaluation.measures.lpips import LPIPS
from mucs_cli.evaluation.measures.network_metrics import embedding_cosine
from mucs_cli.evaluation.measures.sscd import SSCD
from mucs_cli.evaluation.metrics import NAMES, NETWORK_NAMES, load_metrics, metric_paths
from mucs_cli.schemas import MetricsConfig
from mucs_cli.stages.context import as_values

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # what SSCD is published in

CPU = torch.device("cpu")
CONVERTERS = Path(__file__).parents[2] / "scripts" / "convert"
CONVOLUTIONS = [(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]
MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


@pytest.fixture(scope="module")
def converters() -> dict[str, ModuleType]:
    sys.path.insert(0, str(CONVERTERS))  # where their shared file is found, as when they are run
    modules = {}
    for name in ("lpips", "sscd"):
        specification = importlib.util.spec_from_file_location(f"convert_{name}", CONVERTERS / f"{name}.py")
        assert specification is not None and specification.loader is not None
        modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(modules[name])
    sys.path.remove(str(CONVERTERS))
    return modules


# --- published files, with random weights ----------------------------------------------------------------------------


class Published(nn.Module):
    """SSCD as its authors publish it: weights under other names, and a program that computes with them."""

    def __init__(self, state: dict[str, Tensor], names: dict[str, str], power: float) -> None:
        super().__init__()
        self.names, self.power = names, power
        for name, published in names.items():
            *parents, leaf = published.split(".")
            node: nn.Module = self
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, nn.Module())
                node = getattr(node, parent)
            node.register_buffer(leaf, state[name].clone())

    def forward(self, pixels: Tensor) -> Tensor:
        buffers = dict(self.named_buffers())
        state = {name: buffers[published] for name, published in self.names.items()}
        return functional.normalize(sscd_formula(state, pixels, self.power))


def sscd_formula(state: dict[str, Tensor], x: Tensor, power: float = 3.0) -> Tensor:
    """ResNet-50 with torchvision's names, GeM, linear; layer after layer."""

    def normalised(x: Tensor, name: str) -> Tensor:
        mean, variance, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(variance + 1e-5) * scale + shift

    x = functional.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = functional.max_pool2d(normalised(x, "bn1").clamp(min=0), 3, 2, 1)
    for layer, count in enumerate((3, 4, 6, 3), start=1):
        for block in range(count):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            y = normalised(functional.conv2d(x, state[f"{at}.conv1.weight"]), f"{at}.bn1").clamp(min=0)
            y = functional.conv2d(y, state[f"{at}.conv2.weight"], stride=stride, padding=1)
            y = normalised(y, f"{at}.bn2").clamp(min=0)
            y = normalised(functional.conv2d(y, state[f"{at}.conv3.weight"]), f"{at}.bn3")
            if block == 0:
                x = functional.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
                x = normalised(x, f"{at}.downsample.1")
            x = (x + y).clamp(min=0)
    pooled = (x.clamp(min=1e-6) ** power).flatten(2).mean(dim=2) ** (1 / power)
    return pooled @ state["fc.weight"].T + state["fc.bias"]


def classy_name(name: str) -> str:
    """Classy Vision's name of a weight of torchvision's ResNet-50."""
    first, _, rest = name.partition(".")
    if first in ("conv1", "bn1"):
        return f"backbone.initial_block._module.{int(first == 'bn1')}.{rest}"
    if first == "fc":
        return f"embeddings.1.{rest}"
    layer = int(first.removeprefix("layer")) - 1
    block, part, leaf = rest.split(".", 2)
    place = f"backbone.blocks.{layer}.block{layer}-{block}"
    if part in ("downsample", "bn3"):
        return f"{place}.{part.replace('bn3', 'bn')}.{leaf}"
    inner = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}[part]
    return f"{place}.convolutional_block.{inner}.{leaf}"


@pytest.fixture(scope="module")
def sscd_state() -> dict[str, Tensor]:
    """Random weights and statistics, under torchvision's names; embeddings are centred, so that they differ."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    state = SSCD().state_dict()
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif "bn" in name or name.endswith("running_mean"):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    state["fc.bias"] -= sscd_formula(state, pictures(20, 1, height=288, width=288))[0]
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, sscd_state: dict[str, Tensor]) -> Path:
    """Files with the names inside that the published ones have."""
    place = tmp_path_factory.mktemp("published")
    generator = torch.Generator().manual_seed(1)
    vgg = {"classifier.0.weight": torch.zeros(2, 3)}
    num_channels = 3
    for indices, width in zip(CONVOLUTIONS, (64, 128, 256, 512, 512), strict=True):
        for i in indices:
            scale = (2 / num_channels / 9) ** 0.5
            vgg[f"features.{i}.weight"] = scale * torch.randn(width, num_channels, 3, 3, generator=generator)
            vgg[f"features.{i}.bias"] = 0.1 * torch.randn(width, generator=generator)
            num_channels = width
    torch.save(vgg, place / "vgg16.pth")
    widths = (64, 128, 256, 512, 512)
    heads = {
        f"lin{k}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) * 20 / w for k, w in enumerate(widths)
    }
    torch.save(heads, place / "heads.pth")
    torch.save(
        {f"backbone.{name}": value for name, value in sscd_state.items()}
        | {"backbone.bn1.num_batches_tracked": torch.tensor(7)},
        place / "sscd.torchvision.pt",
    )
    names = {name: classy_name(name) for name in sscd_state}
    torch.save({names[name]: value for name, value in sscd_state.items()}, place / "sscd.classy.pt")
    example = torch.zeros(1, 3, 64, 64)
    for file, power in (("sscd", 3.0), ("other", 1.0)):
        script = torch.jit.trace(Published(sscd_state, names, power).eval(), example, check_trace=False)
        torch.jit.save(script, str(place / f"{file}.torchscript.pt"))
    return place


@pytest.fixture(scope="module")
def paths(published: Path, converters: dict[str, ModuleType]) -> dict[str, str | None]:
    """Name of a metric -> its weights: written by the converters, or by the library."""
    converters["lpips"].main([str(published / name) for name in ("vgg16.pth", "heads.pth", "lpips.safetensors")])
    converters["sscd"].main([str(published / name) for name in ("sscd.torchscript.pt", "sscd.safetensors")])
    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sides = {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    clip = transformers.CLIPVisionConfig(**small, **sides, projection_dim=24)
    dino = transformers.Dinov2Config(**small, image_size=28, patch_size=14)
    transformers.CLIPVisionModelWithProjection(clip).save_pretrained(published / "clip")
    transformers.Dinov2Model(dino).save_pretrained(published / "dino")
    files = {"lpips": "lpips.safetensors", "sscd": "sscd.safetensors", "clip": "clip", "dino": "dino"}
    return {name: str(published / file) for name, file in files.items()}


@pytest.fixture(scope="module")
def metrics(paths: dict[str, str | None]) -> dict[str, Any]:
    return dict(load_metrics(NAMES, paths, CPU))


def pictures(seed: int, count: int, channels: int = 3, height: int = 24, width: int = 24) -> Tensor:
    """Soft shapes in [-1, 1]."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse, (height, width), mode="bilinear") * 2 - 1


# --- what they are ---------------------------------------------------------------------------------------------------


def test_lpips_is_the_weighted_square_distance_of_unit_features(published: Path, metrics: dict[str, Any]) -> None:
    state = {**torch.load(published / "vgg16.pth"), **torch.load(published / "heads.pth")}
    first, second = pictures(0, 2, height=30, width=40), pictures(1, 2, height=30, width=40)
    second[1] = 0.9 * first[1]
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))

    def features(image: Tensor) -> list[Tensor]:
        x = functional.interpolate(image[None], (224, 224), mode="bilinear", antialias=True)
        x, found = (x - shift) / scale, []
        for block, indices in enumerate(CONVOLUTIONS):
            x = functional.max_pool2d(x, 2) if block else x
            for i in indices:
                x = functional.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1)
                x = x.clamp(min=0)
            found.append(x[0].double())
        return found

    expected = []
    for pair in zip(first, second, strict=True):
        distance = 0.0
        for block, (x, y) in enumerate(zip(*map(features, pair), strict=True)):
            x, y = x / x.square().sum(0).sqrt(), y / y.square().sum(0).sqrt()
            weight = state[f"lin{block}.model.1.weight"].double()
            distance += functional.conv2d((x - y).square()[None], weight).mean().item()
        expected.append(1 - distance)
    np.testing.assert_allclose(metrics["lpips"](first, second), expected, atol=1e-6)
    assert expected[0] < 0.9 < expected[1] < 1 - 1e-4


def test_sscd_is_the_cosine_of_the_published_networks_embeddings(
    sscd_state: dict[str, Tensor], metrics: dict[str, Any]
) -> None:
    first, second = pictures(2, 1, height=20, width=30), pictures(3, 1, height=20, width=30)
    embeddings = []
    for image in (first, second):
        pixels = functional.interpolate((image + 1) / 2, (288, 432), mode="bilinear", antialias=True)
        embeddings.append(sscd_formula(sscd_state, (pixels - MEAN) / STD).double())
    expected = functional.cosine_similarity(*embeddings).item()
    assert metrics["sscd"](first, second).item() == pytest.approx(expected, abs=1e-6)
    assert embeddings[0].shape == (1, 512) and expected < 1 - 1e-4


def test_clip_and_dino_are_cosines_of_the_librarys_embeddings(
    paths: dict[str, str | None], metrics: dict[str, Any]
) -> None:
    first, second = pictures(4, 3), pictures(5, 3)
    models = {
        "clip": (transformers.CLIPVisionModelWithProjection, (0.48145466, 0.4578275, 0.40821073)),
        "dino": (transformers.Dinov2Model, (0.485, 0.456, 0.406)),
    }
    for name, (model_class, mean) in models.items():
        side, std = (32, (0.26862954, 0.26130258, 0.27577711)) if name == "clip" else (224, STD.flatten().tolist())
        model = model_class.from_pretrained(paths[name]).eval()
        embeddings = []
        for images in (first, second):
            resized = functional.interpolate((images + 1) / 2, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            pixels = (resized - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
            with torch.no_grad():
                output = model(pixel_values=pixels)
            embeddings.append(output.image_embeds if name == "clip" else output.last_hidden_state[:, 0])
        expected = functional.cosine_similarity(embeddings[0].double(), embeddings[1].double())
        np.testing.assert_allclose(metrics[name](first, second), expected, atol=1e-5)
        assert expected.max() < 1 - 1e-4


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_pixel_metrics_are_those_of_the_core(name: str, metrics: dict[str, Any]) -> None:
    first, second = pictures(17, 3), pictures(18, 3)
    np.testing.assert_allclose(metrics[name](first, second), PIXEL_METRICS[name](first, second), rtol=0, atol=1e-12)


# --- what holds for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_identical_pictures_have_similarity_one_and_noisier_ones_less(name: str, metrics: dict[str, Any]) -> None:
    images = pictures(6, 1) * 0.5
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(7))
    second = torch.cat([images, *((images + level * noise).clamp(-1, 1) for level in (0.03, 0.3))])
    values = metrics[name](images.expand(3, -1, -1, -1), second)
    assert values.shape == (3,) and values.dtype == torch.float64 and values.device == CPU
    assert values[0].item() == pytest.approx(1, abs=1e-12)
    assert 1 - 1e-9 > values[1] > values[2]


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_changes_nothing_and_each_pair_stands_alone(
    name: str, metrics: dict[str, Any], paths: dict[str, str | None]
) -> None:
    first, second = pictures(8, 2, height=20), pictures(9, 2, height=20)
    together = metrics[name](first, second)
    small = load_metrics([name], paths, CPU, batch_size=1)[name]
    np.testing.assert_allclose(small(first, second), together, rtol=0, atol=1e-5)
    np.testing.assert_allclose(metrics[name](second[1:2], first[1:2]), together[1:2], rtol=0, atol=1e-5)
    assert len({round(value, 4) for value in together.tolist()}) == 2


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_a_grayscale_picture_counts_as_three_equal_channels(name: str, metrics: dict[str, Any]) -> None:
    first, second = pictures(10, 1, channels=1, height=8, width=8), pictures(11, 1, channels=1, height=8, width=8)
    coloured = metrics[name](first.repeat(1, 3, 1, 1), second.repeat(1, 3, 1, 1))
    np.testing.assert_allclose(metrics[name](first, second), coloured, rtol=0, atol=1e-6)
    assert coloured.item() < 1 - 1e-5


@pytest.mark.parametrize("name", NETWORK_NAMES)
def test_a_broken_picture_is_not_a_number_and_wrong_pictures_are_refused(name: str, metrics: dict[str, Any]) -> None:
    first, second = pictures(12, 2), pictures(13, 2)
    first[0, 0, 3, 3] = torch.nan
    assert metrics[name](first, second).isnan().tolist() == [True, False]
    with pytest.raises(ValueError, match=r"expected \[-1, 1\]"):
        metrics[name](second * 3, second)
    with pytest.raises(ValueError, match="shapes"):
        metrics[name](second, second[:1])


def test_a_picture_in_many_pairs_is_embedded_once() -> None:
    seen: list[Tensor] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(images)
        return images.flatten(1)

    images = pictures(14, 3)
    values = embedding_cosine(encode, images[[0, 0, 1, 2]], images[[0, 1, 2, 0]], batch_size=2)
    assert [len(part) for part in seen] == [2, 1]
    flat = images.flatten(1).double()
    expected = functional.cosine_similarity(flat[[0, 0, 1, 2]], flat[[0, 1, 2, 0]])
    np.testing.assert_allclose(values, expected, atol=1e-12)


def test_metrics_compute_without_gradients_and_name_their_weights(metrics: dict[str, Any]) -> None:
    first = pictures(15, 1).requires_grad_()
    assert not any(metrics[name](first, pictures(16, 1)).requires_grad for name in NAMES)
    prints = {name: metrics[name].fingerprint for name in NAMES}
    assert [name for name in NAMES if prints[name] is None] == list(PIXEL_METRICS)
    assert len(set(prints.values())) == 5


# --- converters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torchvision", "classy"])
def test_every_published_format_of_sscd_becomes_the_same_file(
    kind: str, published: Path, paths: dict[str, str | None], converters: dict[str, ModuleType], tmp_path: Path
) -> None:
    converters["sscd"].main([str(published / f"sscd.{kind}.pt"), str(tmp_path / "sscd.safetensors")])
    assert (tmp_path / "sscd.safetensors").read_bytes() == Path(str(paths["sscd"])).read_bytes()


def test_converted_weights_are_the_published_ones(published: Path, paths: dict[str, str | None]) -> None:
    converted = load_file(str(paths["lpips"]))
    vgg, heads = torch.load(published / "vgg16.pth"), torch.load(published / "heads.pth")
    assert set(converted) == set(LPIPS().state_dict()) and len(converted) == 31
    assert all(torch.equal(converted[name], vgg[name]) for name in converted if name.startswith("features"))
    assert all(torch.equal(converted[f"heads.{k}"], heads[f"lin{k}.model.1.weight"].flatten()) for k in range(5))


def test_a_converter_ends_with_one_line_and_code_two(published: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(CONVERTERS / "lpips.py"), str(published / "heads.pth")]
    result = subprocess.run(
        [*command, str(published / "vgg16.pth"), str(tmp_path / "out.safetensors")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CONVERTERS.parents[1])},
    )
    assert result.returncode == 2 and not (tmp_path / "out.safetensors").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        f"lpips: error: {published / 'vgg16.pth'}: has no lin0.model.1.weight of shape [1, 64, 1, 1]"
    )


def test_converters_refuse_other_files(
    published: Path, converters: dict[str, ModuleType], sscd_state: dict[str, Tensor], tmp_path: Path
) -> None:
    def refusal(converter: str, *inputs: Path) -> str:
        with pytest.raises(UserError) as caught:
            converters[converter].main([*map(str, inputs), str(tmp_path / "out.safetensors")])
        return str(caught.value)

    other = tmp_path / "other.pt"
    vgg, heads = published / "vgg16.pth", published / "heads.pth"
    assert "other.pt: not found; expected" in refusal("sscd", other)
    other.write_text("<html>")
    assert "cannot be read as tensors" in refusal("sscd", other)
    torch.save([1, 2], other)
    assert "got no mapping of names to tensors" in refusal("lpips", other, heads)
    state = torch.load(vgg)
    torch.save({name: value for name, value in state.items() if name != "features.28.bias"}, other)
    assert "lacks features.28.bias" in refusal("lpips", other, heads)
    torch.save(state | {"features.5.weight": torch.zeros(128, 64, 1, 1)}, other)
    assert "has features.5.weight of shape [128, 64, 1, 1], where [128, 64, 3, 3]" in refusal("lpips", other, heads)
    torch.save(sscd_state | {"fc.weight": torch.zeros(1000, 2048)}, other)
    assert "has fc.weight of shape [1000, 2048], where [512, 2048] is expected" in refusal("sscd", other)
    torch.save(sscd_state | {"fc.bias": torch.full((512,), torch.nan)}, other)
    assert "has fc.bias with values that are not finite" in refusal("sscd", other)
    torch.save(sscd_state | {"layer3.6.conv1.weight": torch.zeros(1)}, other)
    assert "has layer3.6.conv1.weight, which is not known" in refusal("sscd", other)
    assert "embeds a picture otherwise than SSCD does" in refusal("sscd", published / "other.torchscript.pt")
    assert not (tmp_path / "out.safetensors").exists()


# --- configuration ---------------------------------------------------------------------------------------------------


def test_names_and_paths_that_cannot_be_are_refused_by_their_key(
    paths: dict[str, str | None], published: Path, tmp_path: Path
) -> None:
    def refusal(names: list[str], **changed: str | Path | None) -> str:
        given = {**paths, **{name: path if path is None else str(path) for name, path in changed.items()}}
        with pytest.raises(UserError) as caught:
            load_metrics(names, given, CPU)
        return str(caught.value)

    assert refusal([]).startswith("evaluation.metrics: got none; expected some of ssim, mae, cosine, lpips,")
    assert refusal(["ssim", "lpip"]).endswith("Did you mean 'lpips'?")
    for name in NETWORK_NAMES:
        key = f"evaluation.{name}_path"
        assert refusal(["ssim", name], **{name: None}).startswith(f"{key}: is not set; evaluation.metrics has {name},")
        assert refusal([name], **{name: "/nowhere/x"}).startswith(f"{key}: got /nowhere/x, which is not there")
    assert refusal(["clip"], clip=paths["dino"]).startswith("evaluation.clip_path: got ")
    assert "the weights of sscd; expected the file that scripts/convert/lpips.py wrote" in refusal(
        ["lpips"], lpips=paths["sscd"]
    )
    assert "truncated or no safetensors file" in refusal(["lpips"], lpips=published / "vgg16.pth")
    file = tmp_path / "x.safetensors"
    tensors = load_file(str(paths["lpips"]))
    save_file(tensors, file)
    assert "a safetensors file of something else" in refusal(["lpips"], lpips=file)
    save_file({name: value for name, value in tensors.items() if name != "heads.2"}, file, {"mucs_metric": "lpips"})
    assert "x.safetensors, which lacks heads.2; expected" in refusal(["lpips"], lpips=file)
    file.write_bytes(Path(str(paths["lpips"])).read_bytes()[:-100])
    assert "truncated or no safetensors file" in refusal(["lpips"], lpips=file)


def test_without_transformers_the_key_and_the_command_that_installs_it_are_named(
    paths: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"evaluation\.clip_path: .* is not installed. Run: pip install 'mucs\[enc"):
        load_metrics(["clip"], paths, CPU)
    assert load_metrics(["ssim", "lpips"], paths, CPU).keys() == {"ssim", "lpips"}


def test_the_mixins_keys_are_what_is_loaded(paths: dict[str, str | None]) -> None:
    config = MetricsConfig(name="x", metrics=["mae"], clip_path="a", sscd_path="b")
    assert metric_paths(config) == {"lpips": None, "clip": "a", "dino": None, "sscd": "b"}
    assert MetricsConfig(name="x").metrics == ["ssim", "mae", "cosine"]
    assert load_metrics(config.metrics, metric_paths(config), CPU).keys() == {"mae"}


def test_paths_are_made_absolute_and_hub_names_are_left(tmp_path: Path) -> None:
    cfg = compose("evaluate", ["run=r"])
    before = as_values(cfg, tmp_path)
    assert not [key for key in before["evaluation"] if key.endswith("_path")]
    (tmp_path / "dino").mkdir()
    typed = {"lpips_path": "l.safetensors", "sscd_path": None, "clip_path": "owner/clip", "dino_path": "dino"}
    values = as_values(type(cfg)({**before, "evaluation": typed}), tmp_path)["evaluation"]
    assert values == typed | {"lpips_path": str(tmp_path / "l.safetensors"), "dino_path": str(tmp_path / "dino")}


def test_the_registry_imports_nothing_slow() -> None:
    code = "import sys, json, mucs_cli.evaluation.metrics; print(json.dumps([*sys.modules]))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "safetensors", "numpy"} & set(json.loads(output))
