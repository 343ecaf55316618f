"""Tiny runs for the tests of the methods that unlearn, and what these leave on disk."""

import json
from pathlib import Path
from typing import Any

import torch
from commands import mucs
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.rng import generator

NUM_IMAGES = 40
NUM_COPIES = 4
TRAINING = [
    "device=cpu",
    "training.batch_size=32",
    "training.warmup_steps=5",
    "training.learning_rate=4e-3",
    "training.decay=cosine",
    "training.ema_decay=0.99",
    "stages=[train,sample]",
]
DIT = [
    "model=dit",
    "model.dropout=0",
    "model.width=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.conditional=true",
    "diffusion=edm_auto",
]
"""A small class-conditional transformer with EDM preconditioning."""
UNET = ["model=unet", "model.size=tiny", "model.dropout=0", "diffusion=ddpm"]
"""A small unconditional U-Net with a discrete schedule."""


def make_run(run: Path, model: list[str] = DIT, num_queries: int = 2, num_steps: int = 150) -> Path:
    """A model trained on the first digits, and queries sampled from it."""
    size = [f"data.limit={NUM_IMAGES}", f"queries.num={num_queries}", f"training.num_steps={num_steps}"]
    mucs("run", *TRAINING, "data=digits", *size, *model, "sampler.num_steps=4", f"run={run}")
    return run


def make_planted_run(folder: Path) -> Path:
    """A run on pictures of digits, among them copies of one that stands on its head; the query is that picture."""
    digits = load_digits().images / 16 * 255
    planted = digits[500][::-1]
    pictures = {f"digit_{i:02d}": digits[i] for i in range(60)} | {f"copy_{i}": planted for i in range(NUM_COPIES)}
    for name, pixels in pictures.items():
        save_picture(folder / "data" / f"{name}.png", pixels)
    save_picture(folder / "queries" / "planted.png", planted)
    data = ["data=image_folder", f"data.path={folder / 'data'}", "queries=folder", f"queries.path={folder / 'queries'}"]
    mucs("run", *TRAINING, *DIT, "model.conditional=false", *data, "training.num_steps=500", f"run={folder / 'run'}")
    return folder / "run"


def save_picture(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().astype("uint8")).save(path)


def variants(run: Path, stage: str) -> set[str]:
    """Names of the folders below ``unlearn/`` or ``score/`` that are no method's own store."""
    return {path.name for path in (run / stage).glob("*/") if not path.name.startswith("_")}


def attribute(run: Path, *keys: str) -> Path:
    """Unlearns and scores a variant that is not there yet; its folder below ``score/``."""
    before = variants(run, "score")
    mucs("run", f"run={run}", "stages=[unlearn,score]", *keys)
    (new,) = variants(run, "score") - before
    return run / "score" / new


def scores_in(folder: Path) -> Tensor:
    """[Q, N]."""
    return load_file(folder / "scores.safetensors")["score"]


def score(run: Path, *keys: str) -> Tensor:
    """Scores, [Q, N], of a variant that is not there yet."""
    return scores_in(attribute(run, *keys))


def manifest_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return record


def unlearned_of(folder: Path) -> Path:
    """The folder below ``unlearn/`` of a variant below ``score/``."""
    return folder.parent.parent / "unlearn" / manifest_of(folder)["unlearn_variant"]


def bank_of(folder: Path) -> dict[str, Tensor]:
    """``sigma`` [n] and ``noise`` [n, C, H, W] under which a variant was scored, in float64."""
    name = manifest_of(folder)["inputs"]["noise_bank"][:16]
    stored = load_file(folder.parent.parent / "noise_bank" / f"{name}.safetensors")
    return {key: tensor.double() for key, tensor in stored.items()}


def base_model(run: Path) -> Denoiser:
    """In float64, in evaluation mode."""
    denoiser = load_denoiser(run / "train" / "model")
    denoiser.network.double().eval()
    return denoiser


def parameters_of(denoiser: Denoiser, names: list[str]) -> list[Tensor]:
    """The named parameters, ready to be differentiated by."""
    known = dict(denoiser.network.named_parameters())
    return [known[name].requires_grad_(True) for name in names]


def digits(count: int = NUM_IMAGES) -> tuple[Tensor, Tensor]:
    """The first digits, [N, 1, 8, 8] in float64, and their labels."""
    whole = load_digits()
    images = torch.tensor(whole.images[:count] / 8 - 1, dtype=torch.float64)[:, None]
    return images, torch.tensor(whole.target[:count])


def query_of(run: Path, query: int) -> tuple[Tensor, Tensor | None]:
    """A query, [C, H, W] in float64, and its condition, [1] or None."""
    samples = load_file(run / "sample" / "samples.safetensors")
    condition = samples["condition"][query : query + 1] if "condition" in samples else None
    return samples["image"][query].double(), condition


def flat_gradient(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    """[P], of all parameters joined."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def query_gradient(run: Path, query: int, names: list[str], copies: int, num_batches: int = 1) -> Tensor:
    """The gradient of the query's mean loss over the draws of step 0, one copy after the other; [P]."""
    denoiser = base_model(run)
    parameters = parameters_of(denoiser, names)
    image, condition = query_of(run, query)
    total = torch.zeros((), dtype=torch.float64)
    for batch in range(num_batches):
        source = generator(0, "unlearning", query, 0, *([batch] if batch else []))
        sigma = denoiser.training_sigma(copies, source).double()
        noise = torch.randn(copies, *image.shape, generator=source).double()
        for i in range(copies):
            total = total + denoiser.loss(image[None], noise[i : i + 1], sigma[i : i + 1], condition)[0]
    return flat_gradient(total / (copies * num_batches), parameters)


def image_gradients(denoiser: Denoiser, bank: dict[str, Tensor], parameters: list[Tensor]) -> Tensor:
    """For every digit the gradient of its mean loss over a bank, one image and draw after the other; [N, P]."""
    images, labels = digits()
    conditional = denoiser.network.is_conditional
    rows = []
    for image, label in zip(images, labels, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for sigma, noise in zip(bank["sigma"], bank["noise"], strict=True):
            label_of = label[None] if conditional else None
            total = total + denoiser.loss(image[None], noise[None], sigma[None], label_of)[0]
        rows.append(flat_gradient(total / len(bank["sigma"]), parameters))
    return torch.stack(rows)
