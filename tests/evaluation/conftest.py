"""A small run with scores of some methods, made once through the command line."""

import shutil
from pathlib import Path

import pytest
from commands import mucs
from evaluation_runs import NUM_IMAGES, NUM_QUERIES


@pytest.fixture(scope="session")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardly trained DiT on a few digits with the scores of three cheap methods; no test changes it."""
    run = tmp_path_factory.mktemp("scored") / "digits"
    training = ["training.num_steps=2", "training.warmup_steps=1"]
    mucs("train", "experiment=digits", f"run={run}", "device=cpu", f"data.limit={NUM_IMAGES}", *training)
    mucs("sample", f"run={run}", "sampler.num_steps=2", f"queries.num={NUM_QUERIES}")
    mucs("score", "-m", f"run={run}", "method=random,pixel,condition")
    return run


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Path:
    """A copy of ``scored`` to do things to."""
    return Path(shutil.copytree(scored, tmp_path / "digits"))
