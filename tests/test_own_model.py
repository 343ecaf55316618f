"""A practitioner's own checkpoint, images and generated pictures: ``experiment=attribute`` through the command line.

The checkpoints are tiny and trained for a few hundred steps by diffusers alone, on crops of photographs in which one
picture is repeated until it is memorised. Its copies must rank first for it.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import fails, mucs
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

SIDE, NUM_CROPS, NUM_COPIES = 16, 60, 6
COPIES = {f"planted/{i}.png" for i in range(NUM_COPIES)}
QUICK = ["device=cpu", "noise_bank.num_draws=10", "score.batch_size=32", "report.k=6"]
BATCHES = ["unlearning.retain_batch_size=24", "unlearning.forget_batch_size=24"]
UNLEARN = [*BATCHES, "unlearning.learning_rate=1e-3", "unlearning.forget_weight=0.5", "unlearning.num_steps=40"]
TWO_STEPS = [*BATCHES, "unlearning.num_steps=2"]


def variant(run: Path) -> Path:
    (folder,) = [path for path in (run / "score").iterdir() if not path.name.startswith("_")]
    return folder


def top(run: Path, query: int = 0) -> list[dict[str, str]]:
    """The first rows of a query in top.csv, as many as there are copies."""
    rows = csv.DictReader((variant(run) / "top.csv").open())
    return [row for row in rows if row["query"] == str(query) and int(row["rank"]) <= NUM_COPIES]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images/``: crops of two photographs in a folder each, copies of one more in a third; ``queries/``: that one."""
    root = tmp_path_factory.mktemp("pictures")
    temple, flower = load_sample_images().images
    lines = []
    for name, photograph in (("temple", temple), ("flower", flower)):
        (root / "images" / name).mkdir(parents=True)
        for i in range(NUM_CROPS // 2):
            place, top, left = f"{name}/{i:02d}.{('png', 'jpg', 'webp')[i % 3]}", 37 * i % 390, 53 * i % 590
            crop = Image.fromarray(photograph[top : top + 32, left : left + 32])
            crop.save(root / "images" / place, lossless=True, quality=95)
            lines.append({"file_name": place, "artist": f"{name} painter", "year": 1900 + i})
    planted = Image.fromarray(temple[100:132, 300:332, ::-1].copy()).rotate(90)
    planted = planted.resize((SIDE, SIDE), Image.Resampling.BOX)
    for copy in sorted(COPIES):
        (root / "images" / copy).parent.mkdir(exist_ok=True)
        planted.save(root / "images" / copy)
        lines.append({"file_name": copy, "artist": "copyist"})
    (root / "images" / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "queries").mkdir()
    planted.save(root / "queries" / "b.png")
    return root


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.*") if path.suffix != ".jsonl")


def tensors_of(folder: Path) -> tuple[Tensor, Tensor]:
    """Every picture at the model's size in [-1, 1], and the number of its folder among the sorted ones."""
    files = files_below(folder)
    folders = sorted({path.parent.name for path in files})
    raw = [np.asarray(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)) for path in files]
    image = torch.tensor(np.stack(raw)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return image, torch.tensor([folders.index(path.parent.name) for path in files])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def unet(num_classes: int | None = None) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=SIDE,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=num_classes,
    )


def fit(network: torch.nn.Module, loss: Callable[[Tensor], Tensor], count: int, steps: int) -> None:
    """Trains by AdamW on batches of row numbers."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    source = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps) + 1e-5
        optimizer.zero_grad()
        loss(torch.randint(count, (24,), generator=source)).backward()
        optimizer.step()


def train_discrete(
    network: torch.nn.Module, scheduler: DDPMScheduler, image: Tensor, label: Tensor | None, steps: int
) -> None:
    """The training loop of diffusers' own documentation, with the scheduler's noise and targets."""
    source = torch.Generator().manual_seed(1)
    kind = scheduler.config.prediction_type

    def loss(rows: Tensor) -> Tensor:
        clean, noise = image[rows], torch.randn(image[rows].shape, generator=source)
        timestep = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=source)
        noised = scheduler.add_noise(clean, noise, timestep)
        target = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, timestep)}
        labels = {} if label is None else {"class_labels": label[rows]}
        return F.mse_loss(network(noised, timestep, **labels).sample[:, : clean.shape[1]], target[kind])

    fit(network, loss, len(image), steps)


def discrete(folder: Path, pictures: Path, steps: int = 170, num_classes: int | None = None, **config: Any) -> Path:
    """A DDPM pipeline trained on the pictures."""
    image, label = tensors_of(pictures / "images")
    network, scheduler = unet(num_classes), DDPMScheduler(**config)
    train_discrete(network, scheduler, image, label if num_classes else None, steps)
    DDPMPipeline(network, scheduler).save_pretrained(folder, safe_serialization=True)
    return folder


def edm(folder: Path, pictures: Path) -> Path:
    """A U-Net with an EDM scheduler, trained with EDM's loss (Karras et al. 2022, equation 8)."""
    image, _ = tensors_of(pictures / "images")
    network, scheduler = unet(), EDMEulerScheduler(sigma_data=0.5)
    source = torch.Generator().manual_seed(1)

    def loss(rows: Tensor) -> Tensor:
        clean = image[rows]
        sigma = (torch.randn(len(rows), 1, 1, 1, generator=source) * 1.2 - 1.2).exp()
        noised = clean + sigma * torch.randn(clean.shape, generator=source)
        inside = scheduler.precondition_inputs(noised, sigma)
        output = network(inside, scheduler.precondition_noise(sigma).flatten()).sample
        denoised = scheduler.precondition_outputs(noised, output, sigma)
        weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
        return (weight * (denoised - clean) ** 2).mean()

    fit(network, loss, len(image), 170)
    network.save_pretrained(folder / "unet", safe_serialization=True)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


KINDS: dict[str, Callable[[Path, Path], Path]] = {
    "epsilon": discrete,
    "v_prediction": lambda folder, pictures: discrete(
        folder, pictures, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True
    ),
    "edm": edm,
}


def attribute(run: Path, model: Path, pictures: Path, queries: Path, *more: str) -> Path:
    paths = [f"data.path={pictures / 'images'}", f"queries.path={queries}", f"model.path={model}"]
    mucs("run", "experiment=attribute", f"run={run}", *paths, *QUICK, *more)
    return run


@pytest.fixture(scope="module", params=KINDS)
def attributed(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on one kind of checkpoint, for the repeated picture and another one; no test changes it."""
    root = tmp_path_factory.mktemp(request.param)
    queries = Path(shutil.copytree(pictures / "queries", root / "queries"))
    shutil.copy(pictures / "images" / "flower" / "15.png", queries / "z.png")
    return attribute(root / "run", KINDS[request.param](root / "model", pictures), pictures, queries, *UNLEARN)


@pytest.fixture(scope="module")
def untrained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a checkpoint of two training steps, where only the bookkeeping matters; no test changes it."""
    root = tmp_path_factory.mktemp("untrained")
    model = discrete(root / "model", pictures, steps=2)
    return attribute(root / "run", model, pictures, pictures / "queries", *TWO_STEPS)


# --- what comes out --------------------------------------------------------------------------------------------------


def test_copies_of_the_query_rank_first_and_everything_is_read_from_the_checkpoint(attributed: Path) -> None:
    assert {row["file"] for row in top(attributed)} == COPIES
    assert all(float(row["score"]) > 0.05 for row in top(attributed))
    data = json.loads((attributed / "data" / "manifest.json").read_text())
    assert data["shape"] == [3, SIDE, SIDE]
    assert not (attributed / "train").exists()
    assert (attributed / "sample" / "queries.csv").read_text() == "query,file\n0,b.png\n1,z.png\n"


def test_another_picture_has_other_images_at_the_top(attributed: Path) -> None:
    assert not {row["file"] for row in top(attributed, query=1)} & COPIES


@pytest.mark.parametrize("num_steps", [0, 40])
def test_a_model_that_has_learned_nothing_has_nothing_to_unlearn(
    num_steps: int, untrained: Path, pictures: Path, tmp_path: Path
) -> None:
    model, queries = untrained.parent / "model", pictures / "queries"
    run = attribute(tmp_path / "run", model, pictures, queries, *UNLEARN, f"unlearning.num_steps={num_steps}")
    scores = load_file(variant(run) / "scores.safetensors")["score"]
    assert float(scores.max()) == 0 if num_steps == 0 else float(scores.max()) < 0


def test_metadata_reaches_the_ranking_the_report_and_the_groups(
    attributed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [(row["artist"], row["year"]) for row in top(attributed)] == [("copyist", "")] * NUM_COPIES
    page = (attributed / "report" / "index.html").read_text()
    assert page.count("copyist") >= NUM_COPIES
    capsys.readouterr()
    mucs("show", f"run={attributed}", "group_by=artist", f"group_k={NUM_COPIES}", "format=json")
    query, _ = json.loads(capsys.readouterr().out)["queries"]
    first, *others = query["groups"]
    assert (first["group"], first["num_images"], first["share_of_top_k"]) == ("copyist", NUM_COPIES, 1.0)
    assert [(group["num_images"], group["share_of_top_k"]) for group in others] == [(NUM_CROPS // 2, 0.0)] * 2
    assert first["mean"] > max(group["max"] for group in others)
    rows = list(csv.DictReader((variant(attributed) / "groups.csv").open()))
    written = {(row["query"], row["column"], row["group"]): row for row in rows}
    copyist = written["0", "artist", "copyist"]
    assert float(copyist["mean"]) == pytest.approx(first["mean"])
    assert float(copyist["share_of_top_k"]) == NUM_COPIES / 10  # of the ten highest, as nothing else was asked for


def test_a_report_is_made_again_after_the_decoded_images_were_cleaned(attributed: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(attributed, tmp_path / "run"))
    page = (run / "report" / "index.html").read_bytes()
    mucs("status", f"run={run}", "clean=true")
    assert not (run / "data" / "images.safetensors").exists()
    shutil.rmtree(run / "report")
    mucs("report", f"run={run}", "report.k=6")
    assert (run / "report" / "index.html").read_bytes() == page


def test_pictures_added_to_the_folder_are_the_only_ones_that_are_computed(
    untrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    queries = Path(shutil.copytree(pictures / "queries", tmp_path / "queries"))
    for name, source in (("a.png", "temple/00.png"), ("c.jpg", "flower/01.jpg")):
        shutil.copy(pictures / "images" / source, queries / name)
    (queries / "metadata.csv").write_text("file_name,prompt\na.png,a temple\n")
    before = load_file(variant(run) / "scores.safetensors")
    old = {path: path.stat().st_mtime_ns for path in (run / "unlearn").rglob("query_0000.safetensors")}
    base = {path: path.stat().st_mtime_ns for path in (run / "score" / "_base").rglob("*")}
    capsys.readouterr()
    mucs("run", f"run={run}", f"queries.path={queries}", *QUICK, *TWO_STEPS)
    said = capsys.readouterr().err
    assert "sample: 3 queries, 2 of them new" in said
    assert "unlearn: query 0" not in said
    assert "score: 2 queries x" in said
    after = load_file(variant(run) / "scores.safetensors")
    assert after["query_id"].tolist() == [0, 1, 2]
    assert torch.equal(after["score"][:1], before["score"])
    assert {path: path.stat().st_mtime_ns for path in old} == old
    assert {path: path.stat().st_mtime_ns for path in base} == base
    rows = list(csv.DictReader((run / "sample" / "queries.csv").open()))
    assert [row["file"] for row in rows] == ["b.png", "a.png", "c.jpg"]  # those that were there keep their numbers
    assert [row["prompt"] for row in rows] == ["", "a temple", ""]

    whole = tmp_path / "whole"
    paths = [f"data.path={pictures / 'images'}", f"queries.path={queries}", f"model.path={untrained.parent / 'model'}"]
    mucs("run", "experiment=attribute", f"run={whole}", *paths, *QUICK, *TWO_STEPS)
    once = load_file(variant(whole) / "scores.safetensors")["score"]  # a.png is query 0 there, b.png query 1
    assert once.shape == (3, NUM_CROPS + NUM_COPIES)
    assert torch.equal(once[2], after["score"][2])


def test_a_picture_that_changed_or_is_gone_is_named(
    untrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    queries = tmp_path / "queries"
    queries.mkdir()
    command = ["sample", f"run={run}", f"queries.path={queries}"]
    assert f"queries.path: got {queries}, which holds no image" in fails(capsys, *command)
    shutil.copy(pictures / "images" / "temple" / "00.png", queries / "b.png")
    assert "queries of query 0: got" in fails(capsys, *command)
    (queries / "b.png").rename(queries / "a.png")
    assert "queries.path: got a folder without b.png" in fails(capsys, *command)
    mucs(*command, "overwrite=true")
    assert (run / "sample" / "queries.csv").read_text() == "query,file\n0,a.png\n"
    assert "queries of query 0: got" in fails(capsys, "unlearn", f"run={run}", *TWO_STEPS)


def test_more_seeds_add_to_sampled_queries_and_an_index_chooses_among_them(
    untrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    common = [
        *("experiment=attribute", f"run={run}", "queries=sampled", *QUICK, "sampler.num_steps=3"),
        *(f"data.path={pictures / 'images'}", f"model.path={untrained.parent / 'model'}", *TWO_STEPS),
    ]
    mucs("run", *common, "queries.num=3", "queries.index=1")
    first = load_file(run / "sample" / "samples.safetensors")
    scores = load_file(variant(run) / "scores.safetensors")
    assert scores["query_id"].tolist() == [1]
    assert len(list((run / "unlearn").rglob("query_*"))) == 1
    mucs("run", *common, "queries.num=5", "queries.index='1:4'")
    more = load_file(run / "sample" / "samples.safetensors")
    assert torch.equal(more["image"][:3], first["image"])
    assert more["image"].shape[0] == 5
    grown = load_file(variant(run) / "scores.safetensors")
    assert grown["query_id"].tolist() == [1, 2, 3]
    assert torch.equal(grown["score"][:1], scores["score"])
    mucs("show", f"run={run}", "query=3")
    at_once = tmp_path / "at_once"
    mucs("run", *[part.replace(str(run), str(at_once)) for part in common], "queries.num=5", "queries.index=[3,1,2]")
    image = load_file(at_once / "sample" / "samples.safetensors")["image"]
    torch.testing.assert_close(image, more["image"], rtol=0, atol=1e-4)  # other batches add up in another order
    score = load_file(variant(at_once) / "scores.safetensors")["score"]
    torch.testing.assert_close(score, grown["score"], rtol=0, atol=1e-4)
    line = fails(capsys, "score", f"run={run}", *TWO_STEPS, "noise_bank.num_draws=10", "queries.index=4")
    assert "has no unlearned model of query 4" in line
    assert f"mucs unlearn run={run}" in line
    assert "queries.index: got 5; expected 0 to 4" in fails(capsys, "unlearn", f"run={run}", "queries.index=5")
    assert "queries.index: got '9:', which chooses none" in fails(capsys, "unlearn", f"run={run}", "queries.index='9:'")
    assert "queries.index: got 'x'" in fails(capsys, "unlearn", f"run={run}", "queries.index=x")
    assert "queries.num: got 4" in fails(capsys, "sample", f"run={run}", "queries.num=4")
    assert "sampler.rho: has no effect on a discrete" in fails(capsys, "sample", f"run={run}", "sampler.rho=5")


# --- classes and latents ---------------------------------------------------------------------------------------------


def test_a_class_conditional_checkpoint_takes_the_classes_of_images_and_queries_from_their_folders(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = discrete(tmp_path / "model", pictures, num_classes=3), tmp_path / "run"
    queries = tmp_path / "queries"
    paths = [f"data.path={pictures / 'images'}", f"queries.path={queries}", f"model.path={model}"]
    shutil.copytree(pictures / "queries", queries)
    line = fails(capsys, "sample", "experiment=attribute", f"run={run}", *paths)
    assert f"queries.path: got {queries}; the model is conditional" in line
    (queries / "planted").mkdir()
    (queries / "b.png").rename(queries / "planted" / "b.png")
    mucs("run", "experiment=attribute", f"run={run}", *paths, *QUICK, *UNLEARN)
    assert load_file(run / "sample" / "samples.safetensors")["condition"].tolist() == [1]  # flower, planted, temple
    assert {row["file"] for row in top(run)} == COPIES


def test_a_part_of_the_classes_is_named_by_their_numbers_in_training(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = discrete(tmp_path / "model", pictures, steps=1, num_classes=5), f"run={tmp_path / 'run'}"
    images, queries = tmp_path / "images", tmp_path / "queries"
    shutil.copytree(pictures / "images" / "flower", images / "flower")
    shutil.copytree(pictures / "queries", queries)
    paths = ["experiment=attribute", f"model.path={model}", f"data.path={images}", f"queries.path={queries}"]
    line = fails(capsys, "sample", run, *paths)
    assert "data.labels: got data of 1 classes (flower)" in line
    assert "0 to 4" in line
    (images / "flower").rename(images / "2")  # a refused attempt leaves nothing that the next one has to overwrite
    (queries / "metadata.csv").write_text("file_name,label\nb.png,4\n")
    mucs("sample", run, *paths)
    data = json.loads((tmp_path / "run" / "data" / "manifest.json").read_text())
    assert data["class_names"] == ["0", "1", "2", "3", "4"]
    assert load_file(tmp_path / "run" / "sample" / "samples.safetensors")["condition"].tolist() == [4]
    (queries / "metadata.csv").write_text("file_name,label\nb.png,flower\n")
    assert "got class 'flower'; expected one of the training data's 5" in fails(capsys, "sample", run, *paths)


def test_what_does_not_fit_the_checkpoint_is_named_before_a_picture_is_decoded(
    untrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = untrained.parent / "model", tmp_path / "run"
    paths = [f"data.path={pictures / 'images'}", f"queries.path={pictures / 'queries'}", f"model.path={model}"]
    command = ["run", "experiment=attribute", *paths]
    assert "run: is not set" in fails(capsys, *command)
    command.append(f"run={run}")
    assert "data.image_size: got 32 and so images of (3, 32, 32)" in fails(capsys, *command, "data.image_size=32")
    assert "data.color: got 1 and so images of (1, 16, 16)" in fails(capsys, *command, "data.color=grayscale")
    assert not (run / "data").exists()
    assert "training.num_steps: has no effect" in fails(capsys, *command, "training.num_steps=3")
    sampled = ["run", "experiment=attribute", f"run={run}", paths[0], paths[2], "queries=sampled"]
    assert "sampler.guidance: has no effect" in fails(capsys, *sampled, "sampler.guidance=2")
    (tmp_path / "queries").mkdir()
    (tmp_path / "queries" / "broken.png").write_bytes(b"no picture")
    line = fails(capsys, *command, f"queries.path={tmp_path / 'queries'}")
    assert str(tmp_path / "queries" / "broken.png") in line
    assert "on_error" not in line


def test_another_checkpoint_needs_another_run_or_overwrite(
    untrained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(untrained, tmp_path / "run"))
    model = discrete(tmp_path / "model", pictures, steps=1, beta_schedule="scaled_linear")
    command = ["run", f"run={run}", f"model.path={model}", *QUICK, *TWO_STEPS]
    assert f"model.path: got {model}, which holds another model" in fails(capsys, *command)
    before = load_file(variant(run) / "scores.safetensors")["score"]
    mucs(*command, "overwrite=true")
    assert not torch.equal(load_file(variant(run) / "scores.safetensors")["score"], before)


@pytest.fixture(scope="module")
def latent_model(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional DiT on the latents of a small autoencoder, both trained a little on the pictures."""
    folder = tmp_path_factory.mktemp("latent") / "model"
    image, label = tensors_of(pictures / "images")
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(16, 16),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=0.7,
    )
    fit(autoencoder, lambda rows: F.mse_loss(autoencoder(image[rows]).sample, image[rows]), len(image), 80)
    with torch.no_grad():
        latent = autoencoder.encode(image).latent_dist.mean * 0.7
    transformer = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=SIDE // 2,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=200)
    train_discrete(transformer, scheduler, latent, label, 300)
    DiTPipeline(transformer, autoencoder, scheduler).save_pretrained(folder, safe_serialization=True)
    return folder


def test_a_latent_pipeline_works_on_latents_encoded_once_and_reports_in_pixels(
    latent_model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    queries, run = tmp_path / "queries" / "planted", tmp_path / "run"
    shutil.copytree(pictures / "queries", queries)
    paths = [f"data.path={pictures / 'images'}", f"queries.path={queries.parent}", f"model.path={latent_model}"]
    mucs("run", "experiment=attribute", f"run={run}", *paths, *QUICK, *UNLEARN)
    assert {row["file"] for row in top(run)} == COPIES
    autoencoder = AutoencoderKL.from_pretrained(latent_model / "vae")
    image, _ = tensors_of(pictures / "queries")
    with torch.no_grad():
        expected = autoencoder.encode(image).latent_dist.mean * 0.7
    samples = load_file(run / "sample" / "samples.safetensors")
    torch.testing.assert_close(samples["image"], expected, rtol=1e-4, atol=1e-4)
    assert samples["picture"].shape == (1, 3, SIDE, SIDE)
    (latents,) = (run / "data" / "latents").glob("*/latents.safetensors")
    assert load_file(latents)["latent"].shape == (NUM_CROPS + NUM_COPIES, 4, SIDE // 2, SIDE // 2)
    index = list(csv.DictReader((run / "data" / "index.csv").open()))
    copy = next(int(row["example_id"]) for row in index if row["file"] in COPIES)
    torch.testing.assert_close(load_file(latents)["latent"][copy], expected[0], rtol=1e-4, atol=1e-4)
    before = latents.stat().st_mtime_ns
    mucs("run", f"run={run}", *QUICK, *UNLEARN)
    assert latents.stat().st_mtime_ns == before


def test_a_latent_pipeline_samples_queries_with_guidance_and_decodes_them(
    latent_model: Path, pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = ["queries=sampled", "queries.num=3", "sampler.num_steps=4", "sampler.guidance=1.5"]
    paths = [f"data.path={pictures / 'images'}", f"model.path={latent_model}"]
    mucs("sample", "experiment=attribute", f"run={run}", *paths, *common)
    samples = load_file(run / "sample" / "samples.safetensors")
    assert samples["image"].shape == (3, 4, SIDE // 2, SIDE // 2)
    assert samples["condition"].tolist() == [0, 1, 2]
    autoencoder = AutoencoderKL.from_pretrained(latent_model / "vae")
    with torch.no_grad():
        decoded = autoencoder.decode(samples["image"] / 0.7).sample.clamp(-1, 1)
    torch.testing.assert_close(samples["picture"], decoded, rtol=1e-4, atol=1e-4)
    assert float(samples["picture"].std()) > 0.05


def test_vectors_for_queries_are_read_beside_the_pictures(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of ours conditioned on vectors lends itself to a run on a folder of queries."""
    vectors = torch.randn(len(files_below(pictures / "images")), 5, generator=torch.Generator().manual_seed(0))
    save_file({"condition": vectors}, tmp_path / "vectors.safetensors")
    data = ["data=image_folder", f"data.path={pictures / 'images'}", "data.image_size=16"]
    data.append(f"data.condition_file={tmp_path / 'vectors.safetensors'}")
    run = f"run={tmp_path / 'run'}"
    small = ["model.size=tiny", "model.conditional=true", "training.num_steps=3", "training.batch_size=8", "device=cpu"]
    mucs("train", run, *data, *small)
    queries = ["queries=folder", f"queries.path={pictures / 'queries'}"]
    assert "set queries.condition_file" in fails(capsys, "sample", run, *queries)
    assert "queries.condition_file: got nowhere" in fails(
        capsys, "sample", run, *queries, "queries.condition_file=nowhere"
    )
    save_file({"condition": vectors[:1]}, tmp_path / "query.safetensors")
    mucs("sample", run, *queries, f"queries.condition_file={tmp_path / 'query.safetensors'}")
    assert torch.equal(load_file(tmp_path / "run" / "sample" / "samples.safetensors")["condition"], vectors[:1])
    assert "sampler.rho: has no effect with queries=folder" in fails(capsys, "sample", run, *queries, "sampler.rho=5")
