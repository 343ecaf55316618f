"""Finished runs on which methods are tried, made once a session through the command line."""

import shutil
from pathlib import Path

import pytest
from commands import mucs
from method_runs import NUM_IMAGES, NUM_QUERIES, PLANTED, cut_photographs


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional DiT on a few digits, and queries; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    training = ["training.num_steps=150", "training.batch_size=32", "training.warmup_steps=5"]
    mucs("train", "experiment=digits", f"run={run}", "device=cpu", f"data.limit={NUM_IMAGES}", *training)
    mucs("sample", f"run={run}", "sampler.num_steps=4", f"queries.num={NUM_QUERIES}")
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of ``finished`` to do things to."""
    return Path(shutil.copytree(finished, tmp_path / "digits"))


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional DiT on squares of photographs; query i is an exact copy of training image ``PLANTED[i]``."""
    place = tmp_path_factory.mktemp("planted")
    pictures = cut_photographs(place / "pictures")
    for query, example in enumerate(PLANTED):
        target = place / "queries" / pictures[example].parent.name / f"{query}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[example], target)
    run = place / "run"
    mucs(
        "train",
        f"run={run}",
        "device=cpu",
        "data=image_folder",
        f"data.path={place / 'pictures'}",
        "data.labels=folder",
        "diffusion=edm_auto",
        "model=dit",
        "model.size=tiny",
        "model.conditional=true",
        "model.dropout=0",
        "training.num_steps=120",
        "training.batch_size=40",
        "training.learning_rate=2e-3",
        "training.warmup_steps=10",
        "training.ema_decay=0.95",
    )
    mucs("sample", f"run={run}", "queries=folder", f"queries.path={place / 'queries'}")
    return run
