"""What benchmarks share: `mucs` as a process, and runs of digits, or of squares of scikit-learn's two photographs."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import spearmanr
from sklearn.datasets import load_sample_images

CUTS = {"photos": (16, 16), "patches": (8, 8), "crops": (8, 3)}
"""Side of the squares that photographs are cut into, and the distance from one to the next; pixels."""


@dataclass(frozen=True)
class Cost:
    """Of a command in a process of its own: wall-clock seconds, and the most memory that it held."""

    seconds: float
    peak_mib: float


def mucs(*arguments: str) -> Cost:
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "mucs_cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed: mucs {' '.join(arguments)}")
    return Cost(time.perf_counter() - started, usage.ru_maxrss / 1024)


def score(run: Path, *keys: str) -> tuple[str, Cost]:
    """The variant that a ``mucs score`` adds to a run, and what it costs."""
    before = variants(run)
    cost = mucs("score", f"run={run}", *keys)
    (name,) = variants(run) - before
    return name, cost


def variants(run: Path) -> set[str]:
    """Those that are finished, by the names of their folders."""
    return {path.parent.name for path in (run / "score").glob("[!_]*/manifest.json")}


def take_away(run: Path, *folders: str) -> None:
    """Deletes what a benchmark is to make, and to time, anew: of a run that was kept, it would find it up to date."""
    for folder in folders:
        shutil.rmtree(run / folder, ignore_errors=True)


def make_run(kind: str, run: Path, num_queries: int) -> None:
    """A trained base model and sampled queries; what is there already is not made again.

    Args:
        kind: ``digits`` (1,797 grey images of 8x8), ``photos`` (2,080 colour images of 16x16), ``patches`` (8,480
            of 8x8) or ``crops`` (59,080 of 8x8, which overlap).
        run: the run's folder.
        num_queries: generated images.
    """
    arguments = ["device=cpu", "data.holdout=0", f"queries.num={num_queries}", "stages=[train,sample]", f"run={run}"]
    if kind == "digits":
        mucs("run", "experiment=digits", *arguments)
        return
    pictures = run.parent / kind
    if not pictures.exists():
        cut_photographs(pictures, *CUTS[kind])
    data = ["data=image_folder", f"data.path={pictures}", "data.labels=folder", "diffusion=edm_auto"]
    model = ["model=dit", "model.size=tiny", "model.conditional=true"]
    training = ["training.num_steps=1500", "training.batch_size=64", "training.learning_rate=2e-3"]
    mucs("run", *data, *model, *training, "training.warmup_steps=100", "training.ema_decay=0.995", *arguments)


def cut_photographs(folder: Path, side: int, distance: int) -> None:
    """Squares of ``side`` pixels of both photographs, one every ``distance`` pixels, in a folder a photograph."""
    for number, picture in enumerate(load_sample_images().images):
        (folder / str(number)).mkdir(parents=True)
        for top in range(0, picture.shape[0] - side + 1, distance):
            for left in range(0, picture.shape[1] - side + 1, distance):
                square = Image.fromarray(picture[top : top + side, left : left + side])
                square.save(folder / str(number) / f"{top:03d}_{left:03d}.png")


def scores_of(run: Path, variant: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a score file, and its manifest."""
    folder = run / "score" / variant
    return load_file(folder / "scores.safetensors"), json.loads((folder / "manifest.json").read_text())


def agreement(exact: np.ndarray, other: np.ndarray, k: int) -> tuple[list[float], list[float]]:
    """For every query, the share of the exact k highest that the other k highest hold, and Spearman's correlation.

    Args:
        exact, other: scores, [Q, N].
    """
    recall, correlation = [], []
    for ours, theirs in zip(exact, other, strict=True):
        top = {name: set(np.argsort(-row, kind="stable")[:k].tolist()) for name, row in (("a", ours), ("b", theirs))}
        recall.append(len(top["a"] & top["b"]) / k)
        correlation.append(float(spearmanr(ours, theirs).statistic))
    return recall, correlation
