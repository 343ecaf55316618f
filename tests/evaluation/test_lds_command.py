"""``mucs evaluate evaluation=lds``: trained subsets on disk, and the score recomputed from the files with scipy."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, mucs, scores_of
from evaluation_runs import results_of, stamps
from safetensors.torch import load_file
from scipy.stats import spearmanr

from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.rng import generator

SMALL = ["evaluation=lds", "evaluation.num_subsets=6", "evaluation.num_draws=8", "evaluation.num_resamples=100"]
NUM_HELD_OUT = 20


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardly trained DiT, its subsets' models, and generated and held-out queries; no test changes it."""
    run = tmp_path_factory.mktemp("lds") / "digits"
    training = ["training.num_steps=4", "training.warmup_steps=1", "training.batch_size=16"]
    data = ["data.limit=80", f"data.holdout={NUM_HELD_OUT}"]
    mucs("train", "experiment=digits", f"run={run}", "device=cpu", *data, *training)
    mucs("sample", f"run={run}", "sampler.num_steps=2", "queries.num=4", "queries.held_out=3")
    mucs("score", "-m", f"run={run}", "method=random,pixel,condition")
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.seeds_per_subset=2")
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(evaluated, tmp_path / "digits"))


def subsets_of(run: Path) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in load_file(run / "evaluate" / "lds" / "subsets.safetensors").items()}


def test_the_score_is_the_mean_spearman_of_minus_the_summed_scores_and_the_losses_on_disk(evaluated: Path) -> None:
    found, results = subsets_of(evaluated), results_of(evaluated, "lds")
    losses = found["loss"].mean(axis=0)
    for kind, first in (("generated", 0), ("held_out", 4)):
        entry = results["queries"][kind]
        assert entry["ids"] == found["query_id"].tolist()[first : first + len(entry["ids"])]
        for row in entry["variants"]:
            scores = scores_of(evaluated, row["variant"])
            expected = []
            for query in entry["ids"]:
                predicted = [-scores[query][mask.astype(bool)].astype(np.float64).sum() for mask in found["subset"]]
                defined = np.ptp(np.round(predicted, 9)) > 0  # scores by class alone are the same for all subsets
                expected.append(spearmanr(predicted, losses[query]).statistic if defined else 0.0)
            assert row["lds_over_both"]["value"] == pytest.approx(np.mean(expected), abs=1e-9)
            assert row["lds_over_both"]["low"] <= row["lds_over_both"]["value"] <= row["lds_over_both"]["high"]


def test_every_measured_loss_is_that_of_the_model_trained_on_the_subset(evaluated: Path) -> None:
    found = subsets_of(evaluated)
    image = load_file(evaluated / "sample" / "samples.safetensors")
    num_seeds, _, num_subsets = found["loss"].shape
    assert (num_seeds, num_subsets) == (2, 6)
    matched = 0
    for manifest_path in sorted((evaluated / "retrain").glob("*/manifest.json")):
        manifest, folder = json.loads(manifest_path.read_text()), manifest_path.parent
        removed = load_file(folder / "removed.safetensors")["example_id"].numpy()
        inside = ~np.isin(found["example_id"], removed)
        (subset,) = np.flatnonzero((found["subset"].astype(bool) == inside).all(axis=1))
        denoiser, seed = load_denoiser(folder / "model"), manifest["seeds"]["training"]
        for query in (1, 5):
            noise = torch.randn(8, *image["image"].shape[1:], generator=generator(0, "lds_noise", query))
            condition = image["condition"][query].expand(8)
            pictures = image["image"][query].expand(8, -1, -1, -1)
            with torch.no_grad():
                loss = denoiser.loss(pictures, noise, denoiser.even_sigma(8), condition).double().mean()
            assert found["loss"][seed, query, subset] == pytest.approx(float(loss), rel=1e-5)
        matched += 1
    assert matched == 12


def test_subsets_are_halves_of_each_class_and_all_models_start_from_the_base_models_weights(evaluated: Path) -> None:
    found = subsets_of(evaluated)
    assert (found["subset"].sum(axis=1) == 30).all()
    counts = [json.loads(path.read_text())["counts"] for path in (evaluated / "retrain").glob("*/manifest.json")]
    assert all(count["training_images"] == 30 and count["steps"] == 4 for count in counts)
    index = [line.split(",") for line in (evaluated / "data" / "index.csv").read_text().splitlines()]
    column = index[0].index("label")
    label = np.array([row[column] for row in index[1:]])[found["example_id"]]
    for name in np.unique(label):
        per_subset = found["subset"][:, label == name].sum(axis=1)
        assert np.ptp(per_subset) <= 1


def test_held_out_queries_are_held_out_images_and_nothing_is_trained_on_them(evaluated: Path) -> None:
    samples = load_file(evaluated / "sample" / "samples.safetensors")
    assert samples["role"].tolist() == [0, 0, 0, 0, 2, 2, 2]
    held_out = set(range(80)) - set(subsets_of(evaluated)["example_id"].tolist())
    assert len(held_out) == NUM_HELD_OUT
    raw = load_file(evaluated / "data" / "images.safetensors")["image"]
    originals = [(2 * raw[i].float() / 16 - 1) for i in held_out]
    for picture in samples["image"][4:]:
        assert any(torch.equal(picture, original) for original in originals)


def test_a_method_that_needs_trajectories_refuses_held_out_queries(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = fails(capsys, "score", f"run={run}", "method=journey_trak")
    assert "journey_trak with query 4, a held-out image" in message and "queries.index" in message


def test_more_held_out_queries_are_added_and_generated_ones_after_them_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(run / "sample" / "samples.safetensors")
    mucs("sample", f"run={run}", "queries.held_out=5")
    after = load_file(run / "sample" / "samples.safetensors")
    assert after["role"].tolist() == [0] * 4 + [2] * 5
    assert torch.equal(after["image"][:7], before["image"])
    assert "queries.num" in fails(capsys, "sample", f"run={run}", "queries.num=6")
    assert "queries.held_out: got 21; the data holds 20" in fails(capsys, "sample", f"run={run}", "queries.held_out=21")


def test_a_rerun_is_up_to_date_and_a_new_method_trains_no_model_again(run: Path) -> None:
    before = stamps(run / "retrain")
    results = results_of(run, "lds")
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.seeds_per_subset=2")
    mucs("score", f"run={run}", "method=random", "method.seed=7")
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.seeds_per_subset=2")
    assert stamps(run / "retrain") == before
    names = [row["variant"] for row in results_of(run, "lds")["queries"]["generated"]["variants"]]
    assert "random__method.seed-7" in names and len(names) == 4
    kept = [row for row in results_of(run, "lds")["queries"]["generated"]["variants"] if row["variant"] == "pixel"]
    assert kept == [row for row in results["queries"]["generated"]["variants"] if row["variant"] == "pixel"]


def test_a_model_that_is_missing_is_trained_to_the_same_bits(run: Path) -> None:
    folder = next(path.parent for path in sorted((run / "retrain").glob("*/manifest.json")))
    weights = (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    shutil.rmtree(run / "evaluate" / "lds")
    mucs("evaluate", f"run={run}", *SMALL, "evaluation.seeds_per_subset=2")
    assert (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert not (folder / "checkpoint").exists()


def test_the_halves_share_no_query_and_no_subset(run: Path) -> None:
    found = {}
    for part in ("selection", "report"):
        arguments = ["evaluation.seeds_per_subset=2", f"evaluation.part={part}", "overwrite=true"]
        mucs("evaluate", f"run={run}", *SMALL, *arguments)
        found[part] = results_of(run, "lds")
    assert sorted(found["selection"]["subsets"] + found["report"]["subsets"]) == list(range(6))
    for kind, count in (("generated", 4), ("held_out", 3)):
        ids = [found[part]["queries"][kind]["ids"] for part in found]
        assert len(set(ids[0]) | set(ids[1])) == len(ids[0]) + len(ids[1]) == count


def test_the_ceiling_is_measured_from_two_seeds_on_and_else_said_to_be_missing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = subsets_of(run)["loss"]
    expected = np.mean([spearmanr(losses[0, query], losses[1, query]).statistic for query in range(4)])
    assert results_of(run, "lds")["queries"]["generated"]["ceiling"] == pytest.approx(expected)
    mucs("evaluate", f"run={run}", *SMALL, "overwrite=true")
    assert results_of(run, "lds")["queries"]["generated"]["ceiling"] is None
    assert "not measured" in capsys.readouterr().out


def test_a_plan_counts_the_models_and_trains_none_and_a_worker_only_trains(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["evaluation=lds", "evaluation.num_subsets=8", "evaluation.num_draws=8", "overwrite=true"]
    before, results = stamps(run / "retrain"), results_of(run, "lds")
    capsys.readouterr()
    mucs("evaluate", f"run={run}", *more, "plan=true")
    row = next(line.split() for line in capsys.readouterr().out.splitlines() if "retrain, models" in line)
    assert row[3:6] == ["8", "6", "2"]
    assert stamps(run / "retrain") == before
    mucs("evaluate", "-m", f"run={run}", *more, "evaluation.worker=0,1")
    assert len(list((run / "retrain").glob("*/manifest.json"))) == 14
    assert results_of(run, "lds") == results  # the old ones, until there are new ones
    mucs("evaluate", f"run={run}", *more)
    assert results_of(run, "lds") != results


def test_a_plan_and_a_worker_need_no_scores_yet(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("score", "retrain", "evaluate"):
        shutil.rmtree(run / folder)
    settings = ["evaluation=lds", "evaluation.num_subsets=3", "evaluation.num_draws=8", "evaluation.num_resamples=100"]
    mucs("evaluate", f"run={run}", *settings, "plan=true")
    mucs("evaluate", f"run={run}", *settings, "evaluation.worker=0")
    trained = stamps(run / "retrain")
    assert len([path for path in trained if path.name == "manifest.json"]) == 3
    assert "no scores have finished" in fails(capsys, "evaluate", f"run={run}", *settings)
    mucs("score", f"run={run}", "method=pixel")
    mucs("evaluate", f"run={run}", *settings)
    assert trained.items() <= stamps(run / "retrain").items()


def test_status_counts_the_models_and_cleaning_leaves_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "retrain" / "0123456789abcdef").mkdir()
    before = stamps(run / "retrain")
    capsys.readouterr()
    mucs("status", f"run={run}", "clean=true")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("retrain ")]
    assert "12 models, 1 unfinished" in line
    assert stamps(run / "retrain") == before


def test_runs_of_other_seeds_are_pooled_from_their_files_and_others_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = run.parent / "other"
    training = ["training.num_steps=4", "training.warmup_steps=1", "training.batch_size=16", "seed=1"]
    made_with = ["data.limit=80", f"data.holdout={NUM_HELD_OUT}", *training]
    mucs("train", "experiment=digits", f"run={other}", "device=cpu", *made_with)
    mucs("sample", f"run={other}", "sampler.num_steps=2", "queries.num=4", "queries.held_out=3")
    mucs("score", "-m", f"run={other}", "method=pixel,random")  # a seed of its own, in the method as well
    settings = [*SMALL, "evaluation.seeds_per_subset=2"]
    pooled = [*settings, f"evaluation.runs=[{other}]", "evaluation.variants=[pixel,random]"]
    assert "other" in fails(capsys, "evaluate", f"run={run}", *pooled)
    mucs("evaluate", f"run={other}", *settings)
    for runs, expected in ((f"{other},{other}", f"base model of {other}"), (str(run), "which is this run")):
        assert expected in fails(capsys, "evaluate", f"run={run}", *pooled, f"evaluation.runs=[{runs}]")
    assert "which has no condition" in fails(capsys, "evaluate", f"run={run}", *settings, f"evaluation.runs=[{other}]")
    assert "num_draws" in fails(capsys, "evaluate", f"run={run}", *pooled, "evaluation.num_draws=9")

    capsys.readouterr()
    mucs("evaluate", f"run={run}", *pooled, "overwrite=true")
    assert "for each of 2 base models" in " ".join(capsys.readouterr().out.split())
    results = results_of(run, "lds")
    for place, (kind, rows) in enumerate((("generated", slice(0, 4)), ("held_out", slice(4, 7)))):
        entry = results["queries"][kind]
        assert entry["num_queries"] == 8 - 2 * place and len(entry["variants"]) == 2
        for row in entry["variants"]:
            expected = []
            for found in (subsets_of(run), subsets_of(other)):
                predicted, losses = found[f"predicted/{row['variant']}"][rows], found["loss"].mean(axis=0)[rows]
                pairs = zip(predicted, losses, strict=True)
                expected.append(np.mean([spearmanr(*pair).statistic for pair in pairs]))
            assert row["per_run"] == pytest.approx(expected)
            assert row["lds_over_both"]["value"] == pytest.approx(np.mean(expected))


def test_what_cannot_be_evaluated_is_named_before_anything_is_trained(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(run / "retrain")
    assert "evaluation.share" in fails(capsys, "evaluate", f"run={run}", *SMALL, "evaluation.share=0.001")
    assert "evaluation.variants: got 'mucs'" in fails(
        capsys, "evaluate", f"run={run}", *SMALL, "evaluation.variants=[mucs]"
    )
    few = ["evaluation=lds", "evaluation.num_subsets=5", "evaluation.part=selection"]
    assert "expected at least 3 subsets" in fails(capsys, "evaluate", f"run={run}", *few)
    other = run.parent / "other"
    model = ["model=pretrained", f"model.path={run}", "data=digits", "data.limit=80", f"data.holdout={NUM_HELD_OUT}"]
    mucs("sample", f"run={other}", *model, "queries.num=2", "sampler.num_steps=2")
    mucs("score", f"run={other}", "method=random")
    assert "model=pretrained" in fails(capsys, "evaluate", f"run={other}", *SMALL)
    assert stamps(run / "retrain") == before
