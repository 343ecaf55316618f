"""The command line on a slice of the digits: the whole chain, its files, reruns, sweeps, interruptions and errors."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, mucs
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits, load_sample_images

from mucs_cli.attribution import scoring
from mucs_cli.attribution.unlearning import NonFiniteLossError, UnlearningResult
from mucs_cli.cli import main
from mucs_cli.diffusion.checkpoint import load_denoiser
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.training import Trainer
from mucs_cli.stages import engine as score_engine
from mucs_cli.stages import mirrored
from mucs_cli.stages.work import Work

NUM_IMAGES, NUM_QUERIES, NUM_DRAWS = 90, 3, 5
SMALL = [
    "experiment=digits",
    "device=cpu",
    f"data.limit={NUM_IMAGES}",
    "training.num_steps=150",
    "training.batch_size=32",
    "training.warmup_steps=5",
]
SAMPLE = ["sampler.num_steps=4", f"queries.num={NUM_QUERIES}"]
UNLEARN = [
    "unlearning.max_steps=4",
    "unlearning.tolerance=1.0",
    "unlearning.retain_batch_size=16",
    "unlearning.forget_batch_size=16",
]
SCORE = [*UNLEARN, f"noise_bank.num_draws={NUM_DRAWS}", "score.batch_size=32"]
VARIANT = "mucs__forget_batch_size-16__max_steps-4__retain_batch_size-16__tolerance-1"
SCORE_VARIANT = "mucs__forget_batch_size-16__max_steps-4__num_draws-5__retain_batch_size-16__tolerance-1"


def chain(run: Path) -> Path:
    """Every command by hand."""
    mucs("train", *SMALL, f"run={run}")
    mucs("sample", f"run={run}", *SAMPLE)
    mucs("unlearn", f"run={run}", *UNLEARN)
    mucs("score", f"run={run}", *SCORE)
    mucs("report", f"run={run}", "report.k=4")
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that no test changes."""
    return chain(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to do things to."""
    return Path(shutil.copytree(finished, tmp_path / "digits"))


def scores_of(run: Path, variant: str = SCORE_VARIANT) -> dict[str, torch.Tensor]:
    return load_file(run / "score" / variant / "scores.safetensors")


def test_every_stage_leaves_its_files_with_the_shapes_the_design_names(finished: Path) -> None:
    samples = load_file(finished / "sample" / "samples.safetensors")
    assert samples["image"].shape == (NUM_QUERIES, 1, 8, 8)
    assert samples["image"].dtype == torch.float32
    assert float(samples["image"].abs().max()) <= 1
    assert samples["condition"].tolist() == [0, 1, 2]
    scores = scores_of(finished)
    assert scores["score"].shape == (NUM_QUERIES, NUM_IMAGES)
    assert scores["score"].dtype == torch.float32
    assert scores["query_id"].tolist() == list(range(NUM_QUERIES))
    assert scores["example_id"].tolist() == list(range(NUM_IMAGES))
    assert (scores["score"].abs() < 1).all()
    (base,) = (finished / "score" / "_base").iterdir()
    assert load_file(base / "losses.safetensors")["loss"].shape == (NUM_IMAGES, NUM_DRAWS)
    for name in ("sample/grid.png", "report/index.html", "report/top.png", "data/index.csv", "train/metrics.csv"):
        assert (finished / name).stat().st_size > 0
    steps = [json.loads(line) for line in (finished / "unlearn" / VARIANT / "log.jsonl").read_text().splitlines()]
    assert {step["query"] for step in steps} == set(range(NUM_QUERIES))
    assert not list(finished.rglob("*.partial"))
    assert not list(finished.rglob("*.tmp"))


def test_scores_equal_a_plain_computation_from_the_files_on_disk(finished: Path) -> None:
    """From the formulas: the mean over draws of (u - t)/(u + t + 1e-3), image by image and draw by draw."""
    base = load_denoiser(finished / "train" / "model")
    unlearned = load_denoiser(finished / "train" / "model")
    query = 1
    change = load_file(finished / "unlearn" / VARIANT / f"query_{query:04d}.safetensors")
    unlearned.network.load_state_dict(change, strict=False)
    bank = draw_noise_bank(NUM_DRAWS, (1, 8, 8))
    stored = load_file(next((finished / "noise_bank").glob("*.safetensors")))
    assert torch.equal(stored["sigma"], bank.sigma)
    assert torch.equal(stored["noise"], bank.noise)
    digits = load_digits()
    scores = scores_of(finished)["score"]
    for example in (0, 31, 89):
        image = torch.tensor(digits.images[example] / 8 - 1, dtype=torch.float32)[None, None]
        label = torch.tensor([int(digits.target[example])])
        total = 0.0
        for sigma, noise in zip(bank.sigma, bank.noise, strict=True):
            with torch.no_grad():
                noised = image + sigma * noise
                weight = (sigma**2 + base.sigma_data**2) / (sigma * base.sigma_data) ** 2
                t = float(weight * (base(noised, sigma[None], label) - image).square().mean())
                u = float(weight * (unlearned(noised, sigma[None], label) - image).square().mean())
            total += (u - t) / (u + t + 1e-3)
        assert float(scores[query, example]) == pytest.approx(total / NUM_DRAWS, abs=2e-5)
    assert float(scores.std()) > 1e-4


def test_top_csv_is_the_ranking_of_the_scores_with_files_and_metadata(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "score" / SCORE_VARIANT / "top.csv").open()))
    scores = scores_of(finished)["score"]
    target = load_digits().target
    for query in range(NUM_QUERIES):
        mine = [row for row in rows if row["query"] == str(query)]
        assert [int(row["rank"]) for row in mine] == list(range(1, NUM_IMAGES + 1))
        order = np.argsort(-scores[query].numpy(), kind="stable")
        assert [int(row["example_id"]) for row in mine] == order.tolist()
        assert all(row["file"] == f"digits[{row['example_id']}]" for row in mine)
        assert all(row["label"] == str(target[int(row["example_id"])]) for row in mine)


def test_manifests_carry_config_inputs_outputs_versions_and_seeds(finished: Path) -> None:
    score = json.loads((finished / "score" / SCORE_VARIANT / "manifest.json").read_text())
    train = json.loads((finished / "train" / "manifest.json").read_text())
    assert score["status"] == train["status"] == "done"
    assert score["config"]["noise_bank"]["num_draws"] == NUM_DRAWS
    assert score["config"]["unlearning"]["max_steps"] == 4
    assert score["inputs"]["dataset"] == train["inputs"]["dataset"]
    assert {"dataset", "model", "noise_bank", "unlearned_models"} == set(score["inputs"])
    sample = json.loads((finished / "sample" / "manifest.json").read_text())
    assert score["queries"] == sample["queries"]
    assert list(score["queries"]) == list(map(str, range(NUM_QUERIES)))
    assert score["versions"]["torch"] == torch.__version__
    assert train["preconditioning"]["sigma_data"] == pytest.approx(
        float(np.std(load_digits().images[:NUM_IMAGES] / 8 - 1)), rel=1e-6
    )


def test_a_run_repeated_elsewhere_gives_the_same_bits(finished: Path, tmp_path: Path) -> None:
    again = chain(tmp_path / "again")
    for name in (
        "train/model/diffusion_pytorch_model.safetensors",
        "sample/samples.safetensors",
        f"unlearn/{VARIANT}/query_0002.safetensors",
        f"score/{SCORE_VARIANT}/scores.safetensors",
        f"score/{SCORE_VARIANT}/top.csv",
    ):
        assert (finished / name).read_bytes() == (again / name).read_bytes(), name


def test_rerunning_says_up_to_date_and_touches_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    capsys.readouterr()
    mucs("run", f"run={run}", *SCORE, "report.k=4")
    said = capsys.readouterr().err
    for stage in ("train", "sample", "unlearn", "score", "report"):
        assert f"{stage}: up to date" in said
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    assert before == after


def test_show_prints_the_top_of_each_query(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    mucs("show", f"run={finished}", "query=1", "k=3", "format=json")
    printed = json.loads(capsys.readouterr().out)
    expected = scores_of(finished)["score"][1].topk(3).indices.tolist()
    assert str(printed).count("example_id") == 3
    for example in expected:
        assert f"'example_id': {example}" in str(printed)


def test_a_sweep_leaves_its_variants_side_by_side_and_shares_what_is_upstream(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = [
        run / "train" / "manifest.json",
        run / "sample" / "manifest.json",
        *(run / "score" / "_base").rglob("*.json"),
    ]
    before = {path: path.read_bytes() for path in shared}
    sweep = "unlearning.forget_weight=0.1,0.2,0.5"
    mucs("unlearn", "-m", f"run={run}", *UNLEARN, sweep)
    mucs("score", "-m", f"run={run}", *SCORE, sweep)
    mucs("report", f"run={run}", "report.k=4")
    assert {path: path.read_bytes() for path in shared} == before
    variants = {
        json.loads((path / "manifest.json").read_text())["config"]["unlearning"]["forget_weight"]: path.name
        for path in (run / "score").iterdir()
        if not path.name.startswith("_")
    }
    assert variants.keys() == {0.1, 0.2, 0.5}
    assert variants[0.2] == SCORE_VARIANT
    names = [variants[0.1], variants[0.5]]
    assert all("forget_weight" in name for name in names)
    values = [scores_of(run, name)["score"] for name in (SCORE_VARIANT, *names)]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])
    page = (run / "report" / "index.html").read_text()
    assert all(name in page for name in names)


def test_a_key_of_scoring_alone_makes_a_variant_of_the_scores_and_shares_the_unlearned_models(run: Path) -> None:
    unlearned = {path.name for path in (run / "unlearn").iterdir()}
    mucs("score", f"run={run}", *SCORE, "method.epsilon=0.5")
    (variant,) = (p.name for p in (run / "score").iterdir() if "epsilon-0.5" in p.name)
    assert {path.name for path in (run / "unlearn").iterdir()} == unlearned
    damped, plain = scores_of(run, variant)["score"], scores_of(run)["score"]
    assert float(damped.abs().sum()) < float(plain.abs().sum())


def interrupt_after(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, calls: int) -> None:
    """Ctrl-C at the ``calls``-th call of a function."""
    whole, seen = getattr(owner, name), []

    def counted(*arguments: object, **keywords: object) -> object:
        seen.append(1)
        if len(seen) > calls:
            raise KeyboardInterrupt
        return whole(*arguments, **keywords)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("command", "owner", "name", "calls", "arguments"),
    [
        ("train", Trainer, "update", 25, [*SMALL, "checkpoint.every_seconds=1e-6"]),
        ("unlearn", mirrored.MirroredUnlearner, "unlearn", 2, UNLEARN),
        ("score", score_engine, "bank_losses", 2, SCORE),
        ("score", score_engine, "bank_losses", 4, SCORE),
    ],
)
def test_an_interrupted_stage_goes_on_to_the_same_bits(
    command: str,
    owner: object,
    name: str,
    calls: int,
    arguments: list[str],
    run: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if command == "train":
        shutil.rmtree(run)
    shutil.rmtree(run / command, ignore_errors=True)
    with monkeypatch.context() as patched:
        interrupt_after(patched, owner, name, calls)
        assert main([command, f"run={run}", *arguments]) == 130
    redone: list[int] = []
    whole = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *a, **k: (redone.append(1), whole(*a, **k))[1])
    mucs(command, f"run={run}", *arguments)
    total = {"train": 150, "unlearn": NUM_QUERIES, "score": 6}[command]  # score: 3 blocks of base, 3 of queries
    assert len(redone) == total - calls
    names = [
        p.relative_to(finished) for p in (finished / command).rglob("*.safetensors") if "checkpoint" not in p.parts
    ]
    assert names
    for path in names:
        assert (run / path).read_bytes() == (finished / path).read_bytes(), path


def test_scoring_goes_on_with_a_smaller_block_after_running_out_of_memory(
    run: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "score")

    def starved(denoiser: object, image: torch.Tensor, *arguments: object) -> torch.Tensor:
        if len(image) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return scoring.bank_losses(denoiser, image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(score_engine, "bank_losses", starved)
    capsys.readouterr()
    mucs("score", f"run={run}", *SCORE)
    assert "score.batch_size=32: going on with 16" in capsys.readouterr().err
    torch.testing.assert_close(scores_of(run)["score"], scores_of(finished)["score"], rtol=0, atol=5e-6)


def test_more_threads_than_any_machine_has_are_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "machine.json").write_text(json.dumps({"threads": 30_000}))
    assert "machine.json: got threads 30000; expected at most 1024." in fails(capsys, "score", f"run={run}", *SCORE)


def test_too_little_memory_for_what_is_asked_is_one_line(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Work, "load", lambda context: torch.empty(10**15))
    line = fails(capsys, "score", f"run={finished}", *SCORE)
    assert line.startswith(f"mucs: error: mucs score run={finished}") and "needs more memory than there is (" in line


def test_a_command_may_take_other_threads_and_the_run_keeps_its_own(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "score")
    own, before = json.loads((run / "machine.json").read_text())["threads"], torch.get_num_threads()
    try:
        mucs("score", f"run={run}", *SCORE, f"threads={own + 1}")
        assert torch.get_num_threads() == own + 1
        assert f"using {own + 1} threads; the run's first stage used {own}" in capsys.readouterr().err
        mucs("score", f"run={run}", *SCORE, "method=random")
        assert torch.get_num_threads() == json.loads((run / "machine.json").read_text())["threads"] == own
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(scores_of(run)["score"], scores_of(finished)["score"], rtol=0, atol=5e-6)


def test_a_query_that_misses_the_bound_is_reported_and_kept(finished: Path) -> None:
    manifest = json.loads((finished / "unlearn" / VARIANT / "manifest.json").read_text())
    assert [query["reached_bound"] for query in manifest["results"]] == [False] * NUM_QUERIES
    assert [query["num_steps"] for query in manifest["results"]] == [4] * NUM_QUERIES
    assert "did not reach its bound" in (finished / "unlearn" / VARIANT / "log.txt").read_text()


# --- a folder of colour photographs and a U-Net ------------------------------------------------------------------


def crops(folder: Path, count: int = 40, side: int = 16) -> Path:
    """Squares cut from photographs, as PNG and JPEG files in two folders."""
    photographs = load_sample_images().images
    for i in range(count):
        picture = photographs[i % 2]
        top, left = 16 * (i // 2) % 400, 37 * i % 600
        target = folder / ("temple" if i % 2 == 0 else "flower") / f"{i:03d}.{'png' if i % 3 else 'jpg'}"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[top : top + side, left : left + side]).save(target)
    return folder


def test_a_unet_on_a_folder_of_colour_photographs_runs_through_with_a_monte_carlo_bound(tmp_path: Path) -> None:
    folder, run = crops(tmp_path / "photographs"), tmp_path / "unet"
    mucs(
        "run",
        f"run={run}",
        "data=image_folder",
        f"data.path={folder}",
        "data.holdout=4",
        "model=unet",
        "model.size=tiny",
        "model.dropout=0",
        "training.num_steps=15",
        "training.batch_size=16",
        "training.horizontal_flip=true",
        "sampler.num_steps=3",
        "queries.num=2",
        *UNLEARN,
        "noise_bank.num_draws=3",
        "report.k=3",
    )
    scored = next(path for path in (run / "score").iterdir() if not path.name.startswith("_"))
    scores = load_file(scored / "scores.safetensors")
    assert scores["score"].shape == (2, 36)
    held_out = [r["example_id"] for r in csv.DictReader((run / "data" / "index.csv").open()) if r["split"] == "holdout"]
    assert len(held_out) == 4
    assert set(scores["example_id"].tolist()) == set(range(40)) - set(map(int, held_out))
    manifest = json.loads(next((run / "unlearn").glob("*/manifest.json")).read_text())
    assert manifest["null_loss_source"].startswith("Monte Carlo")
    assert 0.5 < manifest["null_loss"] < 3
    assert not any(name.endswith(".bias") for name in manifest["trainable"])


@pytest.mark.parametrize(
    "diffusion",
    [
        ["diffusion=vp"],
        ["diffusion=ddpm"],
        ["diffusion=ddpm", "diffusion.prediction_type=v_prediction", "diffusion.rescale_betas_zero_snr=true"],
    ],
)
def test_the_other_preconditionings_run_through_with_their_closed_null_losses(
    diffusion: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    mucs("run", *SMALL, *SAMPLE, *SCORE, *diffusion, f"run={run}", "report.k=3")
    scores = scores_of(run)["score"]
    assert scores.shape == (NUM_QUERIES, NUM_IMAGES)
    assert float(scores.std()) > 0
    unlearned = json.loads((run / "unlearn" / VARIANT / "manifest.json").read_text())
    assert unlearned["null_loss_source"] == "closed form of a zero output"
    if "diffusion.prediction_type=v_prediction" not in diffusion:
        assert unlearned["null_loss"] == pytest.approx(1)
    denoiser = load_denoiser(run / "train" / "model")
    bank = load_file(next((run / "noise_bank").glob("*.safetensors")))
    torch.testing.assert_close(denoiser.nearest_sigma(bank["sigma"]), bank["sigma"])


def test_a_model_conditioned_on_vectors_trains_samples_unlearns_and_scores_under_each_images_own(
    tmp_path: Path,
) -> None:
    folder, run = crops(tmp_path / "photographs"), tmp_path / "vectors"
    vectors = torch.randn(40, 2, 5, generator=torch.Generator().manual_seed(0))
    save_file({"condition": vectors}, folder / "vectors.safetensors")
    mucs(
        "run",
        f"run={run}",
        "data=image_folder",
        f"data.path={folder}",
        f"data.condition_file={folder / 'vectors.safetensors'}",
        "model=dit",
        "model.size=tiny",
        "model.conditional=true",
        "training.num_steps=8",
        "training.batch_size=16",
        "sampler.num_steps=3",
        "queries.num=2",
        *UNLEARN,
        "noise_bank.num_draws=3",
        "report.k=3",
    )
    condition = load_file(run / "sample" / "samples.safetensors")["condition"]
    assert condition.shape == (2, 5)
    assert all(any(torch.equal(row, vector) for vector in vectors[:, 0]) for row in condition)
    assert load_denoiser(run / "train" / "model").network.condition_dim == 5
    trainable = json.loads(next((run / "unlearn").glob("*/manifest.json")).read_text())["trainable"]
    assert "condition_embed.projection.weight" in trainable


# --- a model trained elsewhere -----------------------------------------------------------------------------------


def pipeline(folder: Path) -> Path:
    """An untrained unconditional DDPM, saved by diffusers alone."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    DDPMPipeline(network, DDPMScheduler(num_train_timesteps=50)).save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_diffusers_checkpoint_and_a_folder_of_photographs_are_attributed_without_training(tmp_path: Path) -> None:
    run, model, folder = tmp_path / "ddpm", pipeline(tmp_path / "my-ddpm"), crops(tmp_path / "photographs")
    mucs(
        "run",
        f"run={run}",
        "model=pretrained",
        f"model.path={model}",
        "data=image_folder",
        f"data.path={folder}",
        "sampler.num_steps=3",
        "queries.num=2",
        *UNLEARN,
        "noise_bank.num_draws=3",
        "report.k=3",
    )
    assert not (run / "train").exists()
    scored = next(path for path in (run / "score").iterdir() if not path.name.startswith("_"))
    scores = load_file(scored / "scores.safetensors")["score"]
    assert scores.shape == (2, 40)
    assert float(scores.std()) > 0
    unlearned = json.loads(next((run / "unlearn").glob("*/manifest.json")).read_text())
    assert unlearned["null_loss_source"].startswith("Monte Carlo")
    assert unlearned["learning_rate"] == pytest.approx(1e-5)
    mucs("show", f"run={run}", "k=3")


def test_another_model_than_the_queries_come_from_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("train", f"run={run}", "training.num_steps=3", "overwrite=true")
    line = fails(capsys, "unlearn", f"run={run}", *UNLEARN)
    assert "got queries of the model" in line
    assert "mucs sample" in line


def test_a_class_conditional_checkpoint_on_data_without_its_classes_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gray"
    folder.mkdir()
    for i, picture in enumerate(load_digits().images[:5]):
        Image.fromarray((picture * 15).astype("uint8")).save(folder / f"{i}.png")
    command = ["sample", f"run={tmp_path / 'run'}", "model=pretrained", f"model.path={finished}", "data=image_folder"]
    line = fails(capsys, *command, f"data.path={folder}")
    assert "data.labels: got data without classes" in line
    assert "has 10" in line


def test_a_finished_run_lends_its_model_to_another_run(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "lent"
    common = ["data=digits", f"data.limit={NUM_IMAGES}", "device=cpu", f"run={run}"]
    mucs("sample", *common, "model=pretrained", f"model.path={finished}", *SAMPLE)
    own, lent = (load_file(r / "sample" / "samples.safetensors")["image"] for r in (finished, run))
    assert torch.equal(own, lent)


def test_checkpoints_that_are_not_supported_or_not_safe_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = crops(tmp_path / "photographs", 4)
    model, run = tmp_path / "model", f"run={tmp_path / 'run'}"
    command = ["sample", "model=pretrained", f"model.path={model}", "data=image_folder"]
    command.append(f"data.path={folder}")
    assert str(model) in fails(capsys, *command, run)
    model.mkdir()
    parts = {"text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"]}
    (model / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}))
    assert "not supported yet" in fails(capsys, *command, run)
    shutil.rmtree(model)
    model.mkdir()
    save_file({"lora": torch.zeros(1)}, model / "pytorch_lora_weights.safetensors")
    line = fails(capsys, *command, run)
    assert "LoRA" in line
    assert "not supported yet" in line
    shutil.rmtree(model)
    pipeline(model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").rename(model / "unet" / "diffusion_pytorch_model.bin")
    assert "safe" in fails(capsys, *command, run)
    shutil.rmtree(model)
    pipeline(model)
    assert "data.image_size: got 8 and so images of (3, 8, 8)" in fails(
        capsys, *command, "data.image_size=8", f"run={tmp_path / 'other'}"
    )
    assert "not trained here" in fails(capsys, "train", *command[1:], run)
    assert "diffusion: has no effect with model=pretrained" in fails(capsys, *command, run, "diffusion=vp")


# --- errors ------------------------------------------------------------------------------------------------------


def test_missing_and_unfinished_upstream_stages_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "unlearn")
    line = fails(capsys, "score", f"run={run}", *SCORE)
    assert "no such stage" in line
    assert f"mucs unlearn run={run}" in line
    (run / "train" / "manifest.json").rename(run / "train" / "state.json")
    assert "an unfinished stage" in fails(capsys, "sample", f"run={run}")


def test_other_data_and_model_values_than_the_manifest_has_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "unlearn", f"run={run}", "data.holdout=7", *UNLEARN)
    assert "data.holdout: got 7;" in line
    assert "has 0" in line
    assert "model.width: got 96;" in fails(capsys, "score", f"run={run}", "model.width=96", *SCORE)
    line = fails(capsys, "train", f"run={run}", "training.num_steps=151")
    assert "training.num_steps: got 151;" in line
    assert "has 150" in line
    assert "overwrite=true" in line


def test_overwriting_an_upstream_stage_makes_later_stages_refuse_their_old_results(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("sample", f"run={run}", "queries.seed=5", "overwrite=true")
    assert "queries of query 0: got" in fails(capsys, "unlearn", f"run={run}", *UNLEARN)
    assert "got unlearned models of query 0" in fails(capsys, "score", f"run={run}", *SCORE)
    mucs("unlearn", f"run={run}", *UNLEARN, "overwrite=true")
    mucs("score", f"run={run}", *SCORE, "overwrite=true")


@pytest.mark.parametrize(
    ("name", "command", "arguments"),
    [
        ("train/model/diffusion_pytorch_model.safetensors", "sample", []),
        ("sample/samples.safetensors", "unlearn", UNLEARN),
        (f"unlearn/{VARIANT}/query_0001.safetensors", "score", SCORE),
    ],
)
def test_truncated_and_altered_tensors_are_named(
    name: str, command: str, arguments: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / command)
    path = run / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    line = fails(capsys, command, f"run={run}", *arguments)
    assert str(path) in line
    assert "truncated" in line
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "SHA-256" in fails(capsys, command, f"run={run}", *arguments)


def test_a_folder_without_images_an_unreadable_one_and_a_size_the_model_does_not_take_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    command = ["train", "data=image_folder", f"data.path={folder}", f"run={tmp_path / 'run'}", "model.size=tiny"]
    assert str(folder) in fails(capsys, *command)
    (folder / "a.png").write_bytes(b"\x89PNG no picture")
    assert "a.png" in fails(capsys, *command)
    Image.new("RGB", (9, 9), "red").save(folder / "a.png")
    assert "model.patch_size: got 2; the images are 9 pixels wide" in fails(capsys, *command)
    assert "model.multipliers: got 2 levels" in fails(capsys, *command, "model=unet")
    assert "model.conditional: got true" in fails(capsys, *command, "model.patch_size=3", "model.conditional=true")


def test_zero_queries_and_more_images_than_there_are_are_refused(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "queries.num: got 0; expected at least 1" in fails(capsys, "sample", f"run={finished}", "queries.num=0")
    assert "k: got 91; expected at most 90" in fails(capsys, "show", f"run={finished}", "k=91")
    assert "report.k: got 91; expected at most 90" in fails(capsys, "report", f"run={finished}", "report.k=91")


def test_a_diverging_training_run_is_named_and_keeps_its_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "diverging"
    line = fails(capsys, "train", *SMALL, f"run={run}", "training.learning_rate=1e25", "checkpoint.every_seconds=1e-6")
    assert "training.learning_rate: got a non-finite loss" in line
    assert list((run / "train" / "checkpoint").glob("*.safetensors"))


def test_a_diverging_unlearning_run_keeps_the_queries_before_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unlearning.learning_rate: got a non-finite loss" in fails(
        capsys, "unlearn", f"run={run}", *UNLEARN, "unlearning.learning_rate=1e25"
    )
    shutil.rmtree(run / "unlearn")
    whole = mirrored.unlearn

    def diverges_at_two(*arguments: object, query_id: int = 0, **keywords: object) -> UnlearningResult:
        if arguments[7] == 2:
            raise NonFiniteLossError(3, float("nan"), 2)
        return whole(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(mirrored, "unlearn", diverges_at_two)
    assert "query 2" in fails(capsys, "unlearn", f"run={run}", *UNLEARN)
    assert sorted(path.name for path in (run / "unlearn" / VARIANT).glob("query_*")) == [
        "query_0000.safetensors",
        "query_0001.safetensors",
    ]


def test_patterns_that_match_nothing_and_a_closed_form_that_does_not_hold_are_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "unlearn", f"run={run}", "unlearning.trainable=patterns", "unlearning.patterns=[nothing.*]")
    assert "unlearning.patterns: got ['nothing.*']" in line


def test_an_impossible_preconditioning_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(
        capsys, "train", *SMALL, f"run={tmp_path / 'run'}", "diffusion=ddpm", "diffusion.rescale_betas_zero_snr=true"
    )
    assert "diffusion: got an impossible ddpm preconditioning" in line
    assert "epsilon" in line


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert str(blocked) in fails(capsys, "train", *SMALL, f"run={blocked / 'run'}")
