"""The table of the design study, on a tiny run: its figures from the files on disk, its order, its two forms."""

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from mucs_cli.cli import main

PATH = Path(__file__).parent.parent / "scripts" / "tables" / "design_table.py"
KEYS = [
    "device=cpu",
    "data.limit=60",
    "training.num_steps=60",
    "training.warmup_steps=5",
    "sampler.num_steps=3",
    "queries.num=3",
]
STUDY = [
    "queries.index=0:2",
    "unlearning.max_steps=3",
    "unlearning.null_loss=5",
    "unlearning.retain_batch_size=8",
    "unlearning.forget_batch_size=8",
    "noise_bank.num_draws=3",
    "score.batch_size=64",
]


@pytest.fixture(scope="module")
def module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("design_table", PATH)
    assert specification is not None
    assert specification.loader is not None
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default, four variants of it, and one of another method."""
    run = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["run", "experiment=digits", f"run={run}", *KEYS, "stages=[train,sample]"]) == 0
    for choice in (
        ["unlearning.num_steps=2"],
        ["noise_bank.num_draws=5"],
        [],
        ["unlearning.forget_weight=0.5"],
        ["unlearning.forget_weight=0.1"],
        ["method=pixel"],
    ):
        study = [key for key in STUDY if key.partition("=")[0] not in {c.partition("=")[0] for c in choice}]
        assert main(["run", f"run={run}", "stages=[unlearn,score]", *study, *choice]) == 0
    return run


@pytest.fixture(scope="module")
def printed(module: ModuleType, run: Path) -> list[dict[str, str]]:
    module.main([f"run={run}", *STUDY])
    return list(csv.DictReader((run / "tables" / "design_choices.csv").open()))


def test_rows_are_the_default_and_the_variants_of_mucs_by_key_and_value(printed: list[dict[str, str]]) -> None:
    assert [row["choice"] for row in printed] == [
        "default",
        "unlearning.forget_weight=0.1",
        "unlearning.forget_weight=0.5",
        "unlearning.num_steps=2",
        "noise_bank.num_draws=5",
    ]


def test_figures_are_those_of_the_files_on_disk(module: ModuleType, printed: list[dict[str, str]], run: Path) -> None:
    default, other = (
        run / "score" / module.context_of([f"run={run}", *STUDY, *keys]).score_variant()
        for keys in ([], ["unlearning.forget_weight=0.5"])
    )
    plain, changed = (load_file(path / "scores.safetensors")["score"].numpy() for path in (default, other))
    row = printed[2]
    overlaps, correlations, agreements = [], [], []
    labels = load_digits().target[:60]
    for query in range(2):
        tops = [np.argsort(-scores[query], kind="stable")[:10] for scores in (plain, changed)]
        overlaps.append(len(set(tops[0].tolist()) & set(tops[1].tolist())) / 10)
        ranks = [np.argsort(np.argsort(scores[query])) for scores in (plain, changed)]  # no two scores are equal
        correlations.append(float(np.corrcoef(*ranks)[0, 1]))
        agreements.append(float((labels[tops[1]] == query).mean()))  # query i is of class i
    assert float(row["top_overlap"]) == pytest.approx(np.mean(overlaps))
    assert float(row["spearman"]) == pytest.approx(np.mean(correlations))
    assert float(row["label_agreement"]) == pytest.approx(np.mean(agreements))
    assert float(row["spearman"]) < 1
    manifest = json.loads((other / "manifest.json").read_text())
    unlearned = json.loads((run / "unlearn" / manifest["unlearn_variant"] / "manifest.json").read_text())
    assert float(row["query_loss"]) == pytest.approx(np.mean([r["query_loss"] for r in unlearned["results"]]))
    assert (row["updates"], row["bound_reached"]) == ("3", "0 of 2")
    assert float(row["unlearn_seconds"]) == unlearned["seconds"]
    assert float(row["score_seconds"]) == manifest["seconds"]
    assert (printed[0]["spearman"], printed[0]["top_overlap"]) == ("1", "1")
    assert (printed[3]["updates"], printed[3]["bound_reached"]) == ("2", "–")


def test_markdown_has_the_same_rows_under_a_line_that_says_what_the_numbers_are(
    module: ModuleType, run: Path, printed: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    module.main([f"run={run}", *STUDY, "--k", "5"])
    title, _, heading, _, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("2 queries, 60 training images; ")
    assert "random sets overlap by 0.083" in title
    labels = load_digits().target[:60]
    assert f"by chance {np.mean([(labels == query).mean() for query in range(2)]):.3f}" in title
    assert heading.startswith("| choice | updates | bound reached |")
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [row["choice"] for row in printed]


def test_a_share_of_the_defaults_learning_rate_is_printed_for_the_study(
    module: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    module.main([f"run={run}", *STUDY, "--learning-rate-times", "0.3"])
    assert float(capsys.readouterr().out) == pytest.approx(4e-3 / 10 * 0.3)
