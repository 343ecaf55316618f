"""Tiny runs for the tests of the methods on gradient features, and their scores through the command line."""

import csv
from pathlib import Path

import torch
from commands import mucs
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

NUM_IMAGES, NUM_QUERIES, NUM_DRAWS = 40, 3, 3
NUM_COPIES = 4
TINY = [
    "device=cpu",
    "diffusion=edm_auto",
    "model=dit",
    "model.dropout=0",
    "model.width=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "training.batch_size=32",
    "training.warmup_steps=5",
    "training.learning_rate=4e-3",
    "training.decay=cosine",
    "training.ema_decay=0.99",
    "stages=[train,sample]",
]
SAMPLED = ["model.conditional=true", "training.num_steps=150", "sampler.num_steps=4", f"queries.num={NUM_QUERIES}"]
PLANTED = ["training.num_steps=400", "queries=folder"]
QUICK = [f"method.num_draws={NUM_DRAWS}", "method.num_projections=64"]
GRADIENT_METHODS = ("trak", "dtrak", "das", "tracin", "relative_if", "journey_trak")


def make_run(run: Path) -> Path:
    """A class-conditional DiT trained on the first digits, and three sampled queries."""
    mucs("run", *TINY, *SAMPLED, "data=digits", f"data.limit={NUM_IMAGES}", f"run={run}")
    return run


def make_planted_run(folder: Path) -> Path:
    """A run on pictures of digits, among them copies of one that stands on its head; a query is that picture."""
    digits = load_digits().images / 16 * 255
    planted = digits[500][::-1]
    pictures = {f"digit_{i:02d}": digits[i] for i in range(60)} | {f"copy_{i}": planted for i in range(NUM_COPIES)}
    for name, pixels in pictures.items():
        save(folder / "data" / f"{name}.png", pixels)
    save(folder / "queries" / "planted.png", planted)
    data = ["data=image_folder", f"data.path={folder / 'data'}", f"queries.path={folder / 'queries'}"]
    run = folder / "run"
    mucs("run", *TINY, *PLANTED, *data, f"run={run}")
    return run


def save(path: Path, pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().astype("uint8")).save(path)


def variants(run: Path) -> set[Path]:
    return {path for path in (run / "score").glob("*/") if not path.name.startswith("_")}


def score(run: Path, method: str, *keys: str) -> Tensor:
    """Scores, [Q, N], of a variant that is not there yet."""
    before = variants(run)
    mucs("score", f"run={run}", f"method={method}", *keys)
    (new,) = variants(run) - before
    return load_file(new / "scores.safetensors")["score"]


def ranked_files(run: Path) -> list[str]:
    """Of the only variant and query, highest score first."""
    (folder,) = variants(run)
    return [row["file"] for row in csv.DictReader((folder / "top.csv").open())]


def digits(count: int) -> tuple[Tensor, Tensor]:
    """The first digits, [N, 1, 8, 8] in float64, and their labels."""
    whole = load_digits()
    images = torch.tensor(whole.images[:count] / 8 - 1, dtype=torch.float64)[:, None]
    return images, torch.tensor(whole.target[:count])
