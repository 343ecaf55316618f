"""``mucs evaluate evaluation=counterfactual``: what is removed, trained and generated; statistics from the files."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, mucs, scores_of
from evaluation_runs import results_of, stamps
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import mannwhitneyu, wilcoxon

from mucs_cli.artifacts import sha256_file, write_record
from mucs_cli.evaluation.measures.image_metrics import ssim
from mucs_cli.records import CHECKSUM

NUM_IMAGES, NUM_TARGETS, NUM_CONTROLS, K = 80, 5, 4, 6
SMALL = ["evaluation=counterfactual", f"evaluation.k={K}", f"evaluation.num_controls={NUM_CONTROLS}"]
SMALL += ["evaluation.num_resamples=100"]
RANDOM = "random removal"


def base_run(run: Path, *more: str) -> Path:
    training = ["training.num_steps=4", "training.warmup_steps=1", "training.batch_size=16"]
    mucs("train", "experiment=digits", f"run={run}", "device=cpu", f"data.limit={NUM_IMAGES}", *training, *more)
    mucs("sample", f"run={run}", "sampler.num_steps=2", f"queries.num={NUM_TARGETS}")
    mucs("score", "-m", f"run={run}", "method=pixel,condition")
    return run


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardly trained DiT, and its models without what two methods and chance name; no test changes it."""
    run = base_run(tmp_path_factory.mktemp("counterfactual") / "digits")
    mucs("evaluate", f"run={run}", *SMALL)
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "digits"))


def samples_of(run: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((run / "evaluate" / "counterfactual" / "similarities.csv").open()))


def values(run: Path, method: str, metric: str, role: str) -> np.ndarray:
    rows = [r for r in samples_of(run) if (r["method"], r["metric"], r["role"]) == (method, metric, role)]
    return np.array([float(r["value"]) for r in sorted(rows, key=lambda r: (int(r["seed"]), int(r["picture"])))])


def row_of(run: Path, method: str, baseline: str, metric: str) -> dict:
    (row,) = [
        r
        for r in results_of(run, "counterfactual")["rows"]
        if (r["method"], r["baseline"], r["metric"]) == (method, baseline, metric)
    ]
    return row


def removed_sets(run: Path) -> list[tuple[int, set[int]]]:
    """(training seed, removed ids) of every retrained model."""
    return [
        (json.loads(path.read_text())["seeds"]["training"], set(ids.tolist()))
        for path in sorted((run / "retrain").glob("*/manifest.json"))
        for ids in [load_file(path.parent / "removed.safetensors")["example_id"]]
    ]


def test_what_is_removed_is_the_union_of_the_targets_top_images_and_as_many_at_random(evaluated: Path) -> None:
    removed = results_of(evaluated, "counterfactual")["removed"]
    sets = removed_sets(evaluated)
    for method in ("pixel", "condition"):
        tops = [set(np.argsort(-row, kind="stable")[:K].tolist()) for row in scores_of(evaluated, method)]
        expected = set().union(*tops)
        assert (0, expected) in sets
        assert removed[method] == [len(expected)]
        assert removed[f"random, as many as {method}"] == [len(expected)]
    assert removed[RANDOM][0] <= NUM_TARGETS * K
    # a union a method, one of random sets and two matched ones, none with the base's seed and none with another
    assert len(sets) == 7 and {seed for seed, _ in sets} == {0, 1}


def test_training_again_with_the_same_seed_gives_the_same_pictures_to_the_bit(evaluated: Path) -> None:
    assert results_of(evaluated, "counterfactual")["retrained_with_the_same_seed"] == {
        "identical": True,
        "largest_difference": 0.0,
    }
    weights = (evaluated / "train" / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    again = [
        path.parent / "model" / "diffusion_pytorch_model.safetensors"
        for path in (evaluated / "retrain").glob("*/manifest.json")
        if json.loads(path.read_text())["counts"]["removed"] == 0
    ]
    assert sorted(path.read_bytes() == weights for path in again) == [False, True]


def test_similarities_compare_the_same_pictures_before_and_after(evaluated: Path) -> None:
    (pictures,) = (evaluated / "retrain" / "_pictures").iterdir()
    before = load_file(pictures / "base.safetensors")["picture"]
    assert len(before) == NUM_TARGETS + NUM_CONTROLS
    queries = load_file(evaluated / "sample" / "samples.safetensors")["image"]
    assert torch.allclose(before[:NUM_TARGETS], queries, atol=1e-4)
    assert not any(torch.allclose(control, query) for control in before[NUM_TARGETS:] for query in queries)
    pixel_union = results_of(evaluated, "counterfactual")["removed"]["pixel"][0]
    for path in (evaluated / "retrain").glob("*/manifest.json"):
        if json.loads(path.read_text())["counts"]["removed"] == pixel_union:
            after = load_file(pictures / f"{path.parent.name}.safetensors")["picture"]
            found = ssim(before, after).numpy()
            if np.allclose(found[:NUM_TARGETS], values(evaluated, "pixel", "ssim", "target")):
                break
    else:
        pytest.fail("no model's pictures have the similarities in the file")
    assert np.allclose(found[NUM_TARGETS:], values(evaluated, "pixel", "ssim", "control"))


@pytest.mark.parametrize("metric", ["ssim", "mae", "cosine", "mean"])
def test_statistics_are_those_of_scipy_on_the_file(evaluated: Path, metric: str) -> None:
    for method in ("pixel", "condition", "no removal", "other pictures"):
        row = row_of(evaluated, method, RANDOM, metric)
        for role, side, alternative in (("target", "targets", "less"), ("control", "controls", "two-sided")):
            ours, theirs = values(evaluated, method, metric, role), values(evaluated, RANDOM, metric, role)
            test = mannwhitneyu(theirs, ours, alternative="greater")
            assert row[side]["auc"]["value"] == pytest.approx(test.statistic / len(ours) / len(theirs))
            if method == "other pictures":
                assert row[side]["wilcoxon"] is row[side]["mann_whitney_holm"] is None
            else:
                assert row[side]["wilcoxon"] == pytest.approx(wilcoxon(ours, theirs, alternative=alternative).pvalue)
            assert row[side]["ratio"]["value"] == pytest.approx(100 * np.mean(ours / max(np.median(theirs), 0.01) - 1))
            assert row[side]["count"] == len(ours)
    others = np.mean([values(evaluated, "pixel", name, "target") for name in ("ssim", "mae", "cosine")], axis=0)
    assert np.allclose(values(evaluated, "pixel", "mean", "target"), others)


def test_models_are_trained_in_the_batches_of_the_base_model_unless_new_ones_are_asked_for(run: Path) -> None:
    def trained() -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in (run / "retrain").glob("*/manifest.json")]

    before = trained()
    assert all(("in_batches_of" in m["inputs"]) == (m["counts"]["removed"] > 0) for m in before)
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.batches=new", "overwrite=true")
    added = [manifest for manifest in trained() if manifest not in before]
    assert all("in_batches_of" not in manifest["inputs"] for manifest in added)
    assert sum(manifest["counts"]["removed"] > 0 for manifest in before) == len(added)


def test_a_rerun_is_up_to_date_and_a_new_method_trains_its_own_models_only(run: Path) -> None:
    before = stamps(run)
    mucs("evaluate", f"run={run}", *SMALL)
    assert stamps(run) == before
    before = stamps(run / "retrain")
    shutil.copytree(run / "score" / "pixel", run / "score" / "another")  # the first of all by name
    mucs("evaluate", f"run={run}", *SMALL)
    assert before.items() <= stamps(run / "retrain").items()
    assert len(removed_sets(run)) == 8  # as many at random; its union is that of pixel
    ours, theirs = (row_of(run, name, RANDOM, "ssim") for name in ("another", "pixel"))
    assert ours["targets"]["auc"] == theirs["targets"]["auc"]
    assert ours["targets"]["mann_whitney_holm"] is not None


def test_removing_for_one_query_at_a_time_sets_own_beside_other_removals(run: Path) -> None:
    arguments = ["evaluation.removal=per_query", "evaluation.variants=[pixel]", "evaluation.metrics=[mae]"]
    mucs("evaluate", f"run={run}", *SMALL, *arguments, "overwrite=true")
    tops = [set(np.argsort(-row, kind="stable")[:K].tolist()) for row in scores_of(run, "pixel")]
    assert all((0, top) in removed_sets(run) for top in tops)
    results = results_of(run, "counterfactual")
    assert results["removed"]["pixel"] == [K]
    (pictures,) = (run / "retrain" / "_pictures").iterdir()
    before = load_file(pictures / "base.safetensors")["picture"]
    matrix = np.empty((NUM_TARGETS, NUM_TARGETS))
    for path in (run / "retrain").glob("*/manifest.json"):
        ids = set(load_file(path.parent / "removed.safetensors")["example_id"].tolist())
        if ids in tops:
            after = load_file(pictures / f"{path.parent.name}.safetensors")["picture"]
            matrix[tops.index(ids)] = 1 - (before - after).abs().mean(dim=(1, 2, 3))[:NUM_TARGETS] / 2
    assert np.allclose(values(run, "pixel", "mae", "target"), matrix.diagonal(), atol=1e-6)
    others = (matrix.sum(axis=0) - matrix.diagonal()) / (NUM_TARGETS - 1)
    assert np.allclose(values(run, "pixel, for other targets", "mae", "target"), others, atol=1e-6)
    row = row_of(run, "pixel", "pixel, for other targets", "mae")
    assert row["controls"] is None  # which no removal is for
    assert row["targets"]["difference"]["value"] == pytest.approx(np.mean(matrix.diagonal() - others), abs=1e-6)


def test_several_training_seeds_are_clusters_of_the_intervals(run: Path) -> None:
    more = ["evaluation.num_seeds=3", "evaluation.variants=[pixel]", "evaluation.metrics=[mae]", "overwrite=true"]
    shutil.rmtree(run / "retrain")
    mucs("evaluate", f"run={run}", *SMALL, *more, "evaluation.num_controls=0")
    results = results_of(run, "counterfactual")
    union = set().union(*(np.argsort(-row, kind="stable")[:K].tolist() for row in scores_of(run, "pixel")))
    of_seed = {seed: [ids for other, ids in removed_sets(run) if other == seed] for seed in range(4)}
    drawn = [frozenset(ids) for seed in range(3) for ids in of_seed[seed] if ids and ids != union]
    assert all(union in of_seed[seed] and set() in of_seed[seed] for seed in range(3))
    assert of_seed[3] == [set()]
    assert len(drawn) == len(set(drawn)) == 6  # other random images for each seed
    assert {len(ids) for ids in drawn} == {len(union), *results["removed"][RANDOM]}
    title = (run / "evaluate" / "counterfactual" / "table.md").read_text().splitlines()[0]
    assert "95% intervals over 3 training seeds (so few that they cover 75% at most)" in title
    assert row_of(run, "pixel", RANDOM, "mae")["controls"] is None
    assert (results["seeds"], results["floor_seeds"], results["clusters"]) == ([0, 1, 2], [3, 1, 2], "seed")
    assert row_of(run, "pixel", RANDOM, "mae")["targets"]["auc"]["num_clusters"] == 3
    assert len(values(run, "pixel", "mae", "target")) == 3 * NUM_TARGETS


def test_runs_of_other_seeds_are_pooled_and_others_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = base_run(tmp_path / "other", "seed=5")
    mucs("evaluate", f"run={other}", *SMALL)
    pooled = [f"run={run}", *SMALL, f"evaluation.runs=[{other}]"]
    before = stamps(run)
    for runs, expected in ((f"{other},{other}", f"base model of {other}"), (str(run), "which is this run")):
        assert expected in fails(capsys, "evaluate", f"run={run}", *SMALL, f"evaluation.runs=[{runs}]")
    for path, old, new, expected in (
        ("evaluate/counterfactual/manifest.json", '"k": 6', '"k": 7', f"{other}, which has evaluation.k=7; expected 6"),
        ("train/manifest.json", '"num_steps": 4', '"num_steps": 400', "training.num_steps=400; expected 4"),
        ("score/pixel/manifest.json", '"cosine"', '"euclidean"', "method.similarity of pixel='euclidean'"),
        ("evaluate/counterfactual/similarities.csv", ",pixel,", ",pixels,", "is not the file its manifest names"),
    ):
        text = (other / path).read_text()
        assert old in text
        amended = text.replace(old, new)
        if path.endswith(".json"):
            write_record(other / path, {key: value for key, value in json.loads(amended).items() if key != CHECKSUM})
        else:
            (other / path).write_text(amended)
        assert expected in fails(capsys, "evaluate", *pooled)
        (other / path).write_text(text)
    shutil.copytree(run / "score" / "pixel", run / "score" / "another")
    assert f"got {other}, which has no another under ssim" in fails(capsys, "evaluate", *pooled)
    shutil.rmtree(run / "score" / "another")
    assert stamps(run) == before
    alone = results_of(run, "counterfactual")
    mucs("evaluate", *pooled)
    row = row_of(run, "pixel", RANDOM, "mae")
    both = [np.concatenate([values(r, m, "mae", "target") for r in (run, other)]) for m in ("pixel", RANDOM)]
    test = mannwhitneyu(both[1], both[0], alternative="greater")
    assert row["targets"]["auc"]["value"] == pytest.approx(test.statistic / len(both[0]) ** 2)
    assert row["num_removed"] == alone["removed"]["pixel"] + results_of(other, "counterfactual")["removed"]["pixel"]
    assert results_of(run, "counterfactual")["num_clusters"] == 2


def test_what_workers_leave_unfinished_is_finished_and_the_results_are_those_of_one_undisturbed_process(
    evaluated: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "retrain")
    shutil.rmtree(run / "evaluate")
    command = [sys.executable, "-m", "mucs_cli", "evaluate", f"run={run}", *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([*command, f"evaluation.worker={worker}"], env=environment, stderr=subprocess.DEVNULL)
        for worker in range(2)
    ]
    while workers[0].poll() is None and not list((run / "retrain").glob("*/manifest.json")):
        time.sleep(0.01)
    workers[0].kill()
    assert workers[1].wait(timeout=120) == 0
    workers[0].wait()
    assert not (run / "evaluate" / "counterfactual" / "results.json").exists()
    capsys.readouterr()
    mucs("evaluate", f"run={run}", *SMALL)
    assert "7 models, 0 of them to be trained" in capsys.readouterr().err
    for name in ("results.json", "similarities.csv", "table.csv"):
        one, several = (folder / "evaluate" / "counterfactual" / name for folder in (evaluated, run))
        assert one.read_bytes() == several.read_bytes()


def test_a_plan_counts_the_models_and_trains_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = stamps(run)
    capsys.readouterr()
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.removal=per_query", "plan=true")
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "retrain, models" in line)
    # one with the base's seed and one with another are there; a model a target for each of two methods and chance
    assert row[3:6] == [str(2 + 3 * NUM_TARGETS), "2", str(3 * NUM_TARGETS)]
    assert stamps(run) == before


def test_scores_without_a_top_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "score" / "pixel"
    path, manifest = folder / "scores.safetensors", json.loads((folder / "manifest.json").read_text())
    tensors = load_file(path)
    tensors["score"][3] = 0.5
    save_file(tensors, path)
    manifest["outputs"][path.name]["sha256"] = sha256_file(path)
    write_record(folder / "manifest.json", manifest)
    line = fails(capsys, "evaluate", f"run={run}", *SMALL)
    assert "evaluation.variants: got pixel, whose scores of query 3 are all the same" in line
    mucs("evaluate", f"run={run}", *SMALL, "queries.index=[0,1]", "plan=true")


def test_pictures_that_the_model_did_not_sample_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sample", "score", "evaluate"):
        shutil.rmtree(run / name)
    (tmp_path / "queries" / "3").mkdir(parents=True)
    Image.new("L", (8, 8), 100).save(tmp_path / "queries" / "3" / "a.png")
    queries = ["queries=folder", f"queries.path={tmp_path / 'queries'}"]
    mucs("sample", f"run={run}", *queries)
    mucs("score", f"run={run}", *queries, "method=pixel")
    line = fails(capsys, "evaluate", f"run={run}", *SMALL)
    assert line.startswith("mucs: error: queries: got a folder; expected queries that the model sampled")


def test_what_cannot_be_evaluated_is_named_before_anything_is_trained_or_replaced(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(run)
    for arguments, expected in (
        (["evaluation.k=70"], "evaluation.k: got 70, with which "),
        ([f"evaluation.k={NUM_IMAGES}"], f"evaluation.k: got {NUM_IMAGES}; expected less than the {NUM_IMAGES}"),
        (["evaluation.metrics=[lpips]"], "evaluation.lpips_path: is not set"),
        (["evaluation.metrics=[sim]"], "evaluation.metrics: got 'sim'"),
        (["evaluation.variants=[mucs]"], "evaluation.variants: got 'mucs'"),
        (["evaluation.runs=[elsewhere]"], "elsewhere"),
    ):
        assert expected in fails(capsys, "evaluate", f"run={run}", *SMALL, *arguments, "overwrite=true")
    assert stamps(run) == before


def test_the_table_shows_what_was_removed_beside_every_number(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = list(csv.DictReader((run / "evaluate" / "counterfactual" / "table.csv").open()))
    removed = results_of(run, "counterfactual")["removed"]
    assert {(row["method"], row["baseline"]) for row in rows} == {
        *((name, RANDOM) for name in ("condition", "pixel", "no removal", "other pictures")),
        *((name, f"random, as many as {name}") for name in ("condition", "pixel")),
    }
    for row in rows:
        assert float(row["removed"]) == removed[row["method"]][0]
        assert float(row["removed_share"]) == removed[row["method"]][0] / NUM_IMAGES
        assert float(row["baseline_removed"]) == removed[row["baseline"]][0]
        assert float(row["auc_low"]) <= float(row["auc"]) <= float(row["auc_high"])
    capsys.readouterr()
    mucs("evaluate", f"run={run}", *SMALL)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for row in rows:
        assert any(line.startswith(f"{row['method']} {row['baseline']} {row['metric']} ") for line in lines)
