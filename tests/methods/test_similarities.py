"""Methods that ask no diffusion model, through the command line: random, pixel, condition, clip and dino."""

import csv
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from commands import fails, mucs, scores_of
from method_runs import NUM_IMAGES, NUM_PICTURES, NUM_QUERIES, PLANTED, SIDE, digits, queries_of, stamps
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from mucs_cli.attribution.encoders import ImageEncoder
from mucs_cli.cli import main
from mucs_cli.stages import embeddings


def pictures_of(planted: Path) -> np.ndarray:
    """The folder's pictures as files hold them, [N, C, H, W] in [-1, 1]."""
    rows = csv.DictReader((planted / "data" / "index.csv").open())
    files = [planted.parent / "pictures" / row["file"] for row in rows]
    return np.stack([np.array(Image.open(file)).transpose(2, 0, 1) / 127.5 - 1 for file in files])


# --- pixel -----------------------------------------------------------------------------------------------------------


def test_pixel_scores_are_the_cosine_and_the_distance_that_numpy_finds_in_the_files(run: Path) -> None:
    mucs("score", "-m", f"run={run}", "method=pixel", "method.similarity=cosine,euclidean")
    query, training = queries_of(run)["image"].reshape(NUM_QUERIES, -1).astype(np.float64), digits()
    cosine = query @ training.T / np.outer(np.linalg.norm(query, axis=1), np.linalg.norm(training, axis=1))
    np.testing.assert_allclose(scores_of(run, "pixel"), cosine, atol=1e-6)
    distance = np.linalg.norm(query[:, None] - training[None], axis=2)
    euclidean = scores_of(run, "pixel__similarity-euclidean")
    np.testing.assert_allclose(euclidean, -distance, rtol=1e-6)
    assert (np.argsort(-euclidean[0])[:10] != np.argsort(-cosine[0])[:10]).any()


@pytest.mark.parametrize(("similarity", "of_itself"), [("cosine", 1.0), ("euclidean", 0.0)])
def test_an_exact_copy_is_first_and_as_alike_as_can_be(planted: Path, similarity: str, of_itself: float) -> None:
    mucs("score", f"run={planted}", "method=pixel", f"method.similarity={similarity}")
    scores = scores_of(planted, "pixel" if similarity == "cosine" else "pixel__similarity-euclidean")
    assert scores.argmax(axis=1).tolist() == list(PLANTED)
    for query, example in enumerate(PLANTED):
        assert scores[query, example] == pytest.approx(of_itself, abs=1e-6)
        assert np.sort(scores[query])[-2] < of_itself - 1e-4


def test_pixel_compares_all_colours_of_a_folders_pictures(planted: Path) -> None:
    mucs("score", f"run={planted}", "method=pixel")
    training = pictures_of(planted).reshape(NUM_PICTURES, -1)
    unit = training / np.linalg.norm(training, axis=1, keepdims=True)
    np.testing.assert_allclose(scores_of(planted, "pixel"), (unit @ unit.T)[list(PLANTED)], atol=1e-6)


def latent_pipeline(folder: Path) -> Path:
    """An untrained class-conditional DiT on the latents of an untrained autoencoder that halves the sides."""
    torch.manual_seed(0)
    autoencoder = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIDE,
    )
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=SIDE // 2,
        num_embeds_ada_norm=2,
        norm_num_groups=8,
    )
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50)
    diffusers.DiTPipeline(transformer, autoencoder, scheduler).save_pretrained(folder, safe_serialization=True)
    return folder


def test_pictures_are_compared_and_not_the_latents_of_a_latent_model(planted: Path, tmp_path: Path) -> None:
    run, model = tmp_path / "run", latent_pipeline(tmp_path / "model")
    data = ["data=image_folder", f"data.path={planted.parent / 'pictures'}"]
    sampled = ["sampler.num_steps=2", "queries.num=2"]
    mucs("sample", f"run={run}", "model=pretrained", f"model.path={model}", *data, *sampled)
    mucs("score", f"run={run}", "method=pixel", "method.similarity=euclidean")
    queries = queries_of(run)
    assert queries["image"].shape == (2, 4, SIDE // 2, SIDE // 2)
    difference = queries["picture"][:, None] - pictures_of(planted)[None]
    distance = np.sqrt((difference.astype(np.float64) ** 2).sum(axis=(2, 3, 4)))
    np.testing.assert_allclose(scores_of(run, "pixel__similarity-euclidean"), -distance, rtol=1e-6)


def test_a_method_without_unlearning_needs_no_unlearned_models_and_its_scores_are_shown_and_reported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("run", f"run={run}", "method=pixel", "stages=[unlearn,score,report]", "report.k=3")
    assert not (run / "unlearn").exists()
    capsys.readouterr()
    mucs("show", f"run={run}", "k=1", "query=0", "format=csv")
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert int(row["example_id"]) == scores_of(run, "pixel")[0].argmax()


def test_new_queries_are_added_and_the_others_stay_as_they_are(run: Path) -> None:
    mucs("score", f"run={run}", "method=pixel")
    before = scores_of(run, "pixel")
    mucs("sample", f"run={run}", "queries.num=5")
    mucs("score", f"run={run}", "method=pixel", "queries.index=[4]")
    tensors = load_file(run / "score" / "pixel" / "scores.safetensors")
    assert tensors["query_id"].tolist() == [0, 1, 2, 4]
    assert (tensors["score"][:3].numpy() == before).all()
    query = queries_of(run)["image"][4].reshape(-1)
    assert tensors["score"][3].numpy() == pytest.approx(
        digits() @ query / np.linalg.norm(digits(), axis=1) / np.linalg.norm(query), abs=1e-6
    )


# --- random ----------------------------------------------------------------------------------------------------------


def test_random_scores_are_uniform_differ_by_query_and_follow_the_seed_alone(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    mucs("score", "-m", f"run={run}", "method=random", "method.seed=0,1")
    mucs("score", f"run={other}", "method=random", "queries.index=[2]")
    scores = scores_of(run, "random")
    assert (scores >= 0).all() and (scores < 1).all()
    assert abs(scores.mean() - 0.5) < 4 / np.sqrt(12 * scores.size)
    assert np.abs(np.corrcoef(scores)[np.triu_indices(NUM_QUERIES, 1)]).max() < 4 / np.sqrt(NUM_IMAGES)
    assert (scores_of(run, "random__method.seed-1") != scores).any()
    assert (scores_of(other, "random")[0] == scores[2]).all()


# --- condition -------------------------------------------------------------------------------------------------------


def test_the_images_of_the_querys_class_come_first_in_an_order_that_the_seed_decides(run: Path) -> None:
    mucs("score", "-m", f"run={run}", "method=condition", "method.seed=0,1")
    scores, again = scores_of(run, "condition"), scores_of(run, "condition__method.seed-1")
    target, classes = load_digits().target[:NUM_IMAGES], queries_of(run)["condition"]
    for query, label in enumerate(classes):
        same = target == label
        assert scores[query][same].min() >= 1 > 1e-3 > scores[query][~same].max()
        assert len(np.unique(scores[query])) == NUM_IMAGES  # no ties that the order of files would decide
        first = [np.argsort(-s[query])[: same.sum()].tolist() for s in (scores, again)]
        assert sorted(first[0]) == sorted(first[1]) == np.flatnonzero(same).tolist()
        assert first[0] != first[1]


def test_condition_vectors_are_compared_by_their_cosine(planted: Path, tmp_path: Path) -> None:
    run, folder = tmp_path / "run", planted.parent / "pictures"
    vectors = torch.randn(NUM_PICTURES, 5, generator=torch.Generator().manual_seed(0))
    save_file({"condition": vectors}, tmp_path / "vectors.safetensors")
    data = ["data=image_folder", f"data.path={folder}", f"data.condition_file={tmp_path / 'vectors.safetensors'}"]
    model = ["model=dit", "model.size=tiny", "model.conditional=true", "training.num_steps=2", "device=cpu"]
    mucs("train", f"run={run}", *data, *model)
    mucs("sample", f"run={run}", "sampler.num_steps=2", "queries.num=2")
    mucs("score", f"run={run}", "method=condition")
    unit = torch.nn.functional.normalize(vectors.double(), dim=1).numpy()
    query = queries_of(run)["condition"]
    expected = query @ unit.T / np.linalg.norm(query, axis=1, keepdims=True)
    np.testing.assert_allclose(scores_of(run, "condition"), expected, atol=1e-6)


def test_condition_is_refused_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["device=cpu", "data.limit=20", "training.num_steps=2", "training.warmup_steps=1"]
    mucs("train", "experiment=digits", f"run={run}", "model.conditional=false", *small)
    mucs("sample", f"run={run}", "sampler.num_steps=2", "queries.num=1")
    line = fails(capsys, "score", f"run={run}", "method=condition")
    assert "method: got condition with a model without conditions and queries without conditions;" in line
    assert not (run / "score").exists()


# --- encoders --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny encoders of random weights, as the library saves them."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path_factory.mktemp("encoders")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    sides = {"intermediate_size": 32, "image_size": 16, "patch_size": 4}
    clip = transformers.CLIPVisionConfig(**small, **sides, projection_dim=12)
    models = {
        "clip": transformers.CLIPVisionModelWithProjection(clip),
        "other": transformers.CLIPVisionModelWithProjection(clip),
        "dino": transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=28, patch_size=14)),
    }
    for name, model in models.items():
        model.eval().save_pretrained(place / f"tiny-{name}")
    return {name: place / f"tiny-{name}" for name in models}


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_encoder_scores_are_cosines_of_the_embeddings_and_an_exact_copy_is_first(
    kind: str, planted: Path, encoders: dict[str, Path]
) -> None:
    mucs("score", f"run={planted}", f"method={kind}", f"method.path={encoders[kind]}")
    scores = scores_of(planted, f"{kind}__path-tiny-{kind}")
    encoder = ImageEncoder(str(encoders[kind]), kind, "", torch.device("cpu"))
    pictures = torch.tensor(pictures_of(planted), dtype=torch.float32)
    embedding = np.concatenate([encoder.encode(picture[None]).numpy() for picture in pictures]).astype(np.float64)
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    np.testing.assert_allclose(scores, (unit @ unit.T)[list(PLANTED)], atol=2e-5)
    assert scores.argmax(axis=1).tolist() == list(PLANTED)
    assert [scores[query, example] for query, example in enumerate(PLANTED)] == pytest.approx([1.0] * 2, abs=1e-6)
    (stored,) = [
        path.parent
        for path in planted.glob("score/_embeddings/*/manifest.json")
        if json.loads(path.read_text())["encoder"] == str(encoders[kind])
    ]
    kept = load_file(stored / "embeddings.safetensors")["embedding"].numpy()
    np.testing.assert_allclose(kept, embedding, atol=1e-4 * np.abs(embedding).max())


def test_embeddings_are_computed_once_shared_by_later_commands_and_go_on_after_an_interruption(
    run: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["score", f"run={run}", "method=clip", f"method.path={encoders['clip']}"]
    whole, seen = embeddings.encode_padded, []

    def counted(encoder: ImageEncoder, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(encoder, images)

    monkeypatch.setattr(embeddings, "encode_padded", counted)
    assert main(command) == 130
    mucs(*command)
    assert seen == [16, 16, 16, 16, 16, 16, 10, 3]  # interrupted in the third block; the last call: the queries
    stored, first = stamps(run / "score" / "_embeddings"), scores_of(run, "clip__path-tiny-clip")
    mucs("sample", f"run={run}", "queries.num=4")
    mucs(*command)
    assert seen[8:] == [1]  # the new query alone
    assert stamps(run / "score" / "_embeddings") == stored
    assert (scores_of(run, "clip__path-tiny-clip")[:NUM_QUERIES] == first).all()
    fresh = Path(shutil.copytree(run, run.parent / "fresh"))
    shutil.rmtree(fresh / "score")
    mucs("score", f"run={fresh}", *command[2:])
    assert (scores_of(fresh, "clip__path-tiny-clip") == scores_of(run, "clip__path-tiny-clip")).all()


def test_encoders_have_variants_of_their_own_wherever_their_folders_lie(
    run: Path, encoders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mucs("score", "-m", f"run={run}", "method=clip", f"method.path={encoders['clip']},{encoders['other']}")
    assert (scores_of(run, "clip__path-tiny-clip") != scores_of(run, "clip__path-tiny-other")).any()
    moved = shutil.copytree(encoders["clip"], tmp_path / "elsewhere" / "tiny-clip")
    capsys.readouterr()
    mucs("score", f"run={run}", "method=clip", f"method.path={moved}")
    assert "score: up to date" in capsys.readouterr().err
    shutil.copytree(encoders["other"], moved, dirs_exist_ok=True)
    line = fails(capsys, "score", f"run={run}", "method=clip", f"method.path={moved}")
    assert "inputs.encoder: got " in line and "overwrite=true" in line


def test_a_run_made_with_an_encoder_remembers_its_folder(
    tmp_path: Path, encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(encoders["clip"].parent)
    small = ["device=cpu", "data.limit=20", "training.num_steps=2", "training.warmup_steps=1", "queries.num=1"]
    stages = ["stages=[train,sample,score]", "sampler.num_steps=2"]
    run = tmp_path / "run"
    mucs("run", "experiment=digits", f"run={run}", *small, *stages, "method=clip", "method.path=tiny-clip")
    monkeypatch.chdir(tmp_path)
    before = stamps(run)
    mucs("score", f"run={run}")
    mucs("score", f"run={run}", "method=pixel")
    assert {path: stamp for path, stamp in stamps(run).items() if "pixel" not in path.parts} == before


def test_an_encoder_that_is_not_there_or_not_given_is_named_before_anything_is_written(
    finished: Path, encoders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(finished)
    assert "method.path: is not set; expected folder of the encoder" in fails(
        capsys, "score", f"run={finished}", "method=clip"
    )
    assert "method.path: got /nowhere/clip, which is not there" in fails(
        capsys, "score", f"run={finished}", "method=clip", "method.path=/nowhere/clip"
    )
    assert "a model of type 'dinov2'" in fails(
        capsys, "score", f"run={finished}", "method=clip", f"method.path={encoders['dino']}"
    )
    assert stamps(finished) == before
