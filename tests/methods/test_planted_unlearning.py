"""Every method that unlearns finds the cause that was planted: the copies of the query in the training data."""

import csv
from pathlib import Path

import pytest
from unlearning_runs import NUM_COPIES, attribute, make_planted_run, scores_in

METHODS = {
    "mucs": ["noise_bank.num_draws=20", "unlearning.retain_batch_size=32", "unlearning.forget_batch_size=32"],
    "forward_inf": ["method=forward_inf", "noise_bank.num_draws=20"],
    "abu": ["method=abu", "method.num_batches=20", "method.fisher_passes=2"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_planted_run(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("method", METHODS)
def test_the_copies_of_the_query_rank_first(method: str, run: Path) -> None:
    folder = attribute(run, *METHODS[method], "score.batch_size=64")
    ranked = [row["file"] for row in csv.DictReader((folder / "top.csv").open())]
    assert len(ranked) == 60 + NUM_COPIES
    assert {Path(file).stem for file in ranked[:NUM_COPIES]} == {f"copy_{i}" for i in range(NUM_COPIES)}
    scores = scores_in(folder)[0].sort(descending=True).values
    assert float(scores[NUM_COPIES - 1] - scores[NUM_COPIES]) > 0.1 * float(scores.std())


def test_a_race_for_the_first_places_finds_the_copies(run: Path) -> None:
    race = ["score.mode=adaptive", f"score.top_k={NUM_COPIES}", f"score.group_k={NUM_COPIES}"]
    folder = attribute(run, *METHODS["mucs"], "score.batch_size=64", *race)
    ranked = [row["file"] for row in csv.DictReader((folder / "top.csv").open())]
    assert sorted(Path(file).stem for file in ranked) == [f"copy_{i}" for i in range(NUM_COPIES)]
