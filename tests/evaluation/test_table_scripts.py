"""scripts/tables on a tiny run of the digits: the commands of docs/evaluation.md, and what lies on disk after them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "tables"
TINY = [
    "experiment=digits",
    "device=cpu",
    "data.limit=60",
    "training.num_steps=4",
    "training.warmup_steps=1",
    "training.batch_size=16",
    "sampler.num_steps=2",
    "queries.num=3",
]
ENVIRONMENT = {
    "PYTHON": sys.executable,
    "SEEDS": "1 2",
    "METHODS": "pixel pixel:method.similarity=euclidean",
    "LDS": "evaluation.num_subsets=3 evaluation.num_draws=4 evaluation.num_resamples=100",
    "COUNTERFACTUAL": "evaluation.k=2 evaluation.num_controls=2 evaluation.num_resamples=100 evaluation.metrics=[mae]",
}


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / name), *arguments],
        env=os.environ | ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def main_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("tables") / "main"
    done = script("main.sh", *TINY, f"run={base}")
    assert done.returncode == 0, done.stderr
    assert "linear datamodeling score" in done.stdout
    assert "similarity of pictures" in done.stdout
    return base


def test_the_main_table_has_every_method_and_seed_and_pools_them(main_run: Path) -> None:
    methods = {"pixel", "pixel__similarity-euclidean"}
    for seed in (1, 2):
        rows = rows_of(main_run / "tables" / f"lds-seed-{seed}.csv")
        assert {(row["variant"], row["count"]) for row in rows} == {(name, "3") for name in methods}
    pooled = rows_of(main_run / "tables" / "lds.csv")
    assert {(row["variant"], row["count"]) for row in pooled} == {(name, "6") for name in methods}
    assert all(float(row["lowest"]) <= float(row["lds"]) <= float(row["highest"]) for row in pooled)
    rows = rows_of(main_run / "tables" / "counterfactual.csv")
    assert {row["method"] for row in rows} >= methods | {"no removal", "other pictures"}
    for name in ("lds", "counterfactual", "lds-seed-2"):
        assert all((main_run / "tables" / f"{name}.{kind}").exists() for kind in ("md", "tex"))


def test_overlap_and_ensembles_use_the_runs_of_the_main_table(main_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in main_run.rglob("model/*")}
    done = script("overlap.sh", *TINY, f"run={main_run}", SEEDS="2")
    assert done.returncode == 0, done.stderr
    assert (main_run / "tables" / "overlap-seed-2.csv").exists()
    done = script("ensembles.sh", *TINY, f"run={main_run}", SEEDS="1", METHODS="pixel random")
    assert done.returncode == 0, done.stderr
    variants = {row["variant"] for row in rows_of(main_run / "tables" / "ensembles-seed-1.csv")}
    assert "pixel" in variants and any(name.startswith("ensemble") for name in variants)
    assert {path: path.stat().st_mtime_ns for path in main_run.rglob("model/*")} == before


def test_the_table_of_times_has_a_row_a_method_and_shares_nothing_between_them(tmp_path: Path) -> None:
    done = script("time.sh", *TINY, f"run={tmp_path}", SEEDS="1")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "tables" / "time.csv")
    assert [row["queries"] for row in rows] == ["3", "3"]
    assert all(float(row["minutes_a_query"]) >= 0 for row in rows)
    assert not list((tmp_path / "seed-1").glob("score/*"))


def test_without_an_experiment_every_script_says_so(tmp_path: Path) -> None:
    for name in ("main.sh", "overlap.sh", "ensembles.sh", "time.sh"):
        done = script(name, f"run={tmp_path}")
        assert (done.returncode, "experiment= is missing" in done.stderr) == (2, True)
