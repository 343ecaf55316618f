"""``mucs evaluate evaluation=overlap`` on score files, against plain sets."""

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, mucs, scores_of
from evaluation_runs import NUM_IMAGES, NUM_QUERIES, results_of, stamps
from PIL import Image
from safetensors.torch import load_file, save_file

from mucs_cli.artifacts import sha256_file, write_record


def tops(run: Path, variant: str, k: int) -> list[set[int]]:
    return [set(np.argsort(-row, kind="stable")[:k].tolist()) for row in scores_of(run, variant)]


def across(run: Path, variant: str) -> dict:
    return next(entry for entry in results_of(run, "overlap")["across_queries"] if entry["variant"] == variant)


def same(run: Path, *variants: str) -> dict:
    return next(entry for entry in results_of(run, "overlap")["same_query"] if entry["variants"] == list(variants))


def test_overlaps_are_the_shared_ids_of_plain_sets_with_the_expected_ones_beside(run: Path) -> None:
    mucs("evaluate", f"run={run}", "evaluation.k=15")
    for variant in ("condition", "pixel", "random"):
        pairs = itertools.combinations(tops(run, variant, 15), 2)
        entry = across(run, variant)
        assert entry["overlap"] == pytest.approx(np.mean([len(a & b) / 15 for a, b in pairs]))
        assert entry["num_queries"] == NUM_QUERIES
        assert entry["expected"] == pytest.approx(15 / NUM_IMAGES)
        assert entry["low"] <= entry["overlap"] <= entry["high"]
    for first, second in itertools.combinations(("condition", "pixel", "random"), 2):
        sets = zip(tops(run, first, 15), tops(run, second, 15), strict=True)
        assert same(run, first, second)["overlap"] == pytest.approx(np.mean([len(a & b) / 15 for a, b in sets]))
    assert across(run, "condition")["overlap"] < across(run, "pixel")["overlap"]  # the classes of queries differ


def test_random_scores_overlap_as_random_sets_do(run: Path) -> None:
    mucs("score", f"run={run}", "method=random", "method.seed=5")
    mucs("evaluate", f"run={run}", "evaluation.k=30")
    for entry in (across(run, "random"), same(run, "random", "random__method.seed-5"), same(run, "pixel", "random")):
        assert entry["expected"] == 0.25
        # the share of one pair has sd sqrt(p (1 - p) / k) at most: four of them for the mean of a dozen or more
        assert abs(entry["overlap"] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 30 / NUM_QUERIES)


def test_identical_scores_overlap_completely(run: Path) -> None:
    shutil.copytree(run / "score" / "pixel", run / "score" / "copy")
    mucs("evaluate", f"run={run}", "evaluation.variants=[pixel,copy]")
    (entry,) = results_of(run, "overlap")["same_query"]
    assert (entry["overlap"], entry["low"], entry["high"]) == (1.0, 1.0, 1.0)


def test_k_is_one_percent_of_the_images_and_at_least_ten(run: Path) -> None:
    mucs("evaluate", f"run={run}")
    assert results_of(run, "overlap")["k"] == 10


def test_the_tables_hold_the_results_and_the_terminal_shows_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    mucs("evaluate", f"run={run}")
    printed = capsys.readouterr().out
    folder = run / "evaluate" / "overlap"
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [(row["comparison"], row["variant"], row["other_variant"]) for row in rows] == [
        ("across queries", "condition", ""),
        ("across queries", "pixel", ""),
        ("across queries", "random", ""),
        ("same query", "condition", "pixel"),
        ("same query", "condition", "random"),
        ("same query", "pixel", "random"),
    ]
    entry = across(run, "pixel")
    assert float(rows[1]["overlap"]) == pytest.approx(entry["overlap"], rel=1e-8)
    assert float(rows[1]["overlap_low"]) == pytest.approx(entry["low"], rel=1e-8)
    shown = f"{entry['overlap']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    assert f"| across queries | pixel |  | 12 | {shown} | 0.083 |" in markdown
    assert rf"across queries & pixel &  & 12 & {shown} & 0.083 \\" in latex
    assert shown in printed
    manifest = json.loads((folder / "manifest.json").read_text())
    tables = {"results.json", "table.csv", "table.md", "table.tex"}
    assert set(manifest["outputs"]) == tables | {"charts/same_query.svg", "charts/same_query.png"}
    assert manifest["config"] == {
        "evaluation": {"name": "overlap", "variants": None, "k": None, "num_resamples": 2000, "seed": 0}
    }


def test_the_heat_map_holds_the_overlaps_on_the_same_query(run: Path) -> None:
    mucs("evaluate", f"run={run}")
    charts = run / "evaluate" / "overlap" / "charts"
    shown = re.findall("<!-- (.*?) -->", (charts / "same_query.svg").read_text())  # texts, beside their outlines
    names = ("condition", "pixel", "random")
    for first, second in itertools.combinations(names, 2):
        assert f"{same(run, first, second)['overlap']:.2f}" in shown
    cells = [text for text in shown if re.fullmatch(r"\d\.\d\d|–", text)]
    assert len(cells) == 9 and cells[0] == cells[4] == cells[8] == "–"
    assert [cells[1], cells[2], cells[5]] == [cells[3], cells[6], cells[7]]
    assert all(shown.count(name) == 2 for name in names)
    with Image.open(charts / "same_query.png") as picture:
        assert min(picture.size) > 300


def test_one_variant_has_no_heat_map(run: Path) -> None:
    mucs("evaluate", f"run={run}", "evaluation.variants=[pixel]")
    folder = run / "evaluate" / "overlap"
    assert not (folder / "charts").exists()
    before = stamps(folder)
    mucs("evaluate", f"run={run}", "evaluation.variants=[pixel]")
    assert stamps(folder) == before


def test_a_rerun_is_up_to_date_until_there_are_new_scores_which_need_no_overwriting(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("evaluate", f"run={run}")
    before = stamps(run)
    capsys.readouterr()
    mucs("evaluate", f"run={run}")
    captured = capsys.readouterr()
    assert "evaluate: up to date" in captured.err
    assert "across queries" in captured.out
    assert stamps(run) == before
    mucs("score", f"run={run}", "method=pixel", "method.similarity=euclidean")
    mucs("evaluate", f"run={run}")
    assert len(results_of(run, "overlap")["same_query"]) == 6
    mucs("sample", f"run={run}", "queries.num=13")
    mucs("score", f"run={run}", "method=pixel")
    mucs("evaluate", f"run={run}")
    assert across(run, "pixel")["num_queries"] == 13
    assert same(run, "pixel", "random")["num_queries"] == NUM_QUERIES  # those that both have
    for name in ("table.md", "charts/same_query.png"):
        (run / "evaluate" / "overlap" / name).unlink()
        mucs("evaluate", f"run={run}")
        assert (run / "evaluate" / "overlap" / name).exists()


def test_another_configuration_is_refused_without_overwriting(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mucs("evaluate", f"run={run}")
    line = fails(capsys, "evaluate", f"run={run}", "evaluation.k=20")
    assert "evaluation.k: got 20;" in line and "overwrite=true" in line
    mucs("evaluate", f"run={run}", "evaluation.k=20", "overwrite=true")
    assert results_of(run, "overlap")["k"] == 20


def test_the_seed_moves_the_intervals_alone_and_the_same_seed_gives_the_same_bytes(run: Path) -> None:
    found = []
    for seed in (0, 1, 0):
        mucs("evaluate", f"run={run}", f"evaluation.seed={seed}", "overwrite=true")
        found.append((run / "evaluate" / "overlap" / "table.csv").read_bytes())
    assert found[0] == found[2] != found[1]
    first, other = (list(csv.DictReader(text.decode().splitlines())) for text in found[:2])
    assert [row["overlap"] for row in first] == [row["overlap"] for row in other]


def test_a_query_of_equal_scores_has_no_top_and_is_counted(run: Path) -> None:
    folder = run / "score" / "random"
    path, manifest = folder / "scores.safetensors", json.loads((folder / "manifest.json").read_text())
    tensors = load_file(path)
    tensors["score"][:11] = 0.5
    save_file(tensors, path)
    manifest["outputs"][path.name]["sha256"] = sha256_file(path)
    write_record(folder / "manifest.json", manifest)
    mucs("evaluate", f"run={run}")
    entry = across(run, "random")
    assert (entry["num_queries"], entry["num_constant_queries"], entry["overlap"]) == (1, 11, None)
    assert same(run, "pixel", "random")["num_queries"] == 1
    row = next(r for r in csv.DictReader((run / "evaluate" / "overlap" / "table.csv").open()) if r["queries"] == "1")
    assert row["overlap"] == row["overlap_low"] == ""


def test_only_the_chosen_queries_count(run: Path) -> None:
    mucs("evaluate", f"run={run}", "queries.index=[2,5]", "evaluation.variants=[pixel,random]")
    first, second = (tops(run, "pixel", 10)[query] for query in (2, 5))
    entry = across(run, "pixel")
    assert entry["overlap"] == pytest.approx(len(first & second) / 10)
    assert (entry["num_queries"], entry["low"]) == (2, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluation.variants=[pixl]"], "evaluation.variants: got 'pixl'; expected some of condition, pixel, random."),
        (["evaluation.variants=[pixel,pixel]"], "evaluation.variants: got pixel twice;"),
        (["evaluation.k=121"], "evaluation.k: got 121; expected at most 120"),
        (["evaluation.k=0"], "evaluation.k: got 0; expected at least 1"),
        (["evaluation=overlapp"], "retrieval. Did you mean 'overlap'?"),
        (["evaluation.kk=3"], "evaluation.kk: no such key of mucs evaluate."),
        (["method=pixel"], "method: mucs evaluate does not use it; give it to mucs unlearn."),
        (["queries.index=[12]"], "queries.index: got 12; expected 0 to 11"),
    ],
)
def test_what_cannot_be_evaluated_is_named_and_nothing_is_written(
    arguments: list[str], message: str, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(scored)
    assert message in fails(capsys, "evaluate", f"run={scored}", *arguments)
    assert stamps(scored) == before


def test_a_variant_without_a_chosen_query_and_a_run_without_scores_are_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("sample", f"run={run}", "queries.num=13")
    line = fails(capsys, "evaluate", f"run={run}", "queries.index=[12]")
    assert "evaluation.variants: got condition, which has no scores of query 12" in line
    shutil.rmtree(run / "score")
    assert "evaluation.variants: got none; no scores have finished." in fails(capsys, "evaluate", f"run={run}")


def test_a_run_evaluates_as_one_of_its_stages_and_status_lists_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("run", f"run={run}", "method=random", "stages=[score,evaluate]")
    assert torch.isfinite(torch.tensor(across(run, "random")["overlap"]))
    capsys.readouterr()
    mucs("status", f"run={run}")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluate/overlap")]
    assert "done" in line
