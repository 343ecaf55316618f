"""Data sets of the ``datasets`` library in every local form, and the prepared ones on tiny data of the same schema."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mucs_cli.composition import compose
from mucs_cli.config import COMMANDS, validate
from mucs_cli.data import huggingface
from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.errors import UserError
from mucs_cli.schemas import HuggingFaceConfig

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")

Crop = Callable[..., np.ndarray]
NAMES = ["roof", "wall", "sky"]
LABELS = [2, 0, 0, 1, 2, 2]


def png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


@pytest.fixture
def rows(crop: Crop) -> dict[str, list]:
    return {
        "img": [{"bytes": png(crop(index)), "path": None} for index in range(6)],
        "label": LABELS,
        "caption": [f"piece {index}" for index in range(6)],
        "tags": [["a"], [], ["b", "ü"], None, ["c"], ["d"]],
    }


@pytest.fixture
def table(rows: dict[str, list]) -> "datasets.Dataset":
    features = {
        "img": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "caption": datasets.Value("string"),
        "tags": [datasets.Value("string")],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def load(path: Path | str, run: Path, **keys: object) -> ImageDataset:
    return load_dataset(HuggingFaceConfig(**{"seed": 0, "path": str(path), **keys}), run)


def refusal(path: Path | str, run: Path, **keys: object) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, run, **keys)
    assert "\n" not in str(caught.value)
    return caught.value


def composed(name: str, *overrides: str) -> HuggingFaceConfig:
    """The ``data`` section of ``mucs train data=<name>``."""
    config = validate(compose("train", ["run=unused", f"data={name}", *overrides]), COMMANDS["train"].schema).data
    assert isinstance(config, HuggingFaceConfig)
    return config


# --- local forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["saved", "saved splits", "parquet", "parquet folder", "arrow", "splits in names"])
def test_every_local_form_gives_the_same_images_classes_and_metadata(
    tmp_path: Path, table: "datasets.Dataset", crop: Crop, form: str
) -> None:
    path = tmp_path / "data"
    other = table.select([5])
    if form == "saved":
        table.save_to_disk(path)
    elif form == "saved splits":
        datasets.DatasetDict({"train": table, "test": other}).save_to_disk(path)
    elif form == "parquet":
        path = tmp_path / "data.parquet"
        table.to_parquet(path)
    elif form == "arrow":
        table.save_to_disk(tmp_path / "saved")
        path = next((tmp_path / "saved").glob("*.arrow"))
    else:
        path.mkdir()
        names = ["0.parquet", "1.parquet"]
        if form == "splits in names":
            names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
            other.to_parquet(path / "test-00000-of-00001.parquet")
        table.select(range(4)).to_parquet(path / names[0])
        table.select([4, 5]).to_parquet(path / names[1])
    dataset = load(path, tmp_path / "run")
    assert np.array_equal(dataset.raw, [crop(index).transpose(2, 0, 1) for index in range(6)])
    assert dataset.labels(range(6)).tolist() == LABELS and dataset.class_names == NAMES
    assert dataset.file == [f"train[{index}]" for index in range(6)]
    assert dataset.metadata == {
        "label": [NAMES[label] for label in LABELS],
        "caption": [f"piece {index}" for index in range(6)],
        "tags": ['["a"]', "[]", '["b", "ü"]', "", '["c"]', '["d"]'],
    }
    assert sorted(file.name for file in (tmp_path / "run/data").iterdir()) == [
        "images.safetensors",
        "index.csv",
        "manifest.json",
        "progress.jsonl",
    ]


def test_an_imagefolder_has_its_folders_as_classes_its_metadata_and_its_file_names(tmp_path: Path, crop: Crop) -> None:
    for split, indices in (("train", range(6)), ("test", [6])):
        for index in indices:
            path = tmp_path / "data" / split / NAMES[index % 3] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(crop(index)).save(path)
    dataset = load(tmp_path / "data", tmp_path / "run")
    assert len(dataset) == 6 and dataset.class_names == sorted(NAMES)
    for index, (file, name) in enumerate(zip(dataset.metadata["file_name"], dataset.metadata["label"], strict=True)):
        assert file.startswith(f"train/{name}/") and dataset.class_names[dataset.label[index]] == name
        assert np.array_equal(dataset.raw[index], crop(int(Path(file).stem)).transpose(2, 0, 1))
    assert load(tmp_path / "data", tmp_path / "test", split="test").metadata["file_name"] == ["test/roof/6.png"]


def test_a_later_load_and_a_moved_copy_open_nothing_and_do_not_import_the_library(
    tmp_path: Path, table: "datasets.Dataset"
) -> None:
    table.save_to_disk(tmp_path / "data")
    first = load(tmp_path / "data", tmp_path / "run", holdout=1)
    (tmp_path / "data").rename(tmp_path / "moved")
    code = f"""
import sys
from pathlib import Path
from mucs_cli.schemas import HuggingFaceConfig
from mucs_cli.data.dataset import load_dataset
config = HuggingFaceConfig(seed=0, path={str(tmp_path / "moved")!r}, holdout=1)
dataset = load_dataset(config, Path({str(tmp_path / "run")!r}))
print(dataset.fingerprint, dataset.class_names, dataset.label.tolist(), "datasets" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split(maxsplit=1) == [first.fingerprint, f"{NAMES} {LABELS} False\n"]


def test_changed_rows_are_refused(tmp_path: Path, table: "datasets.Dataset") -> None:
    table.save_to_disk(tmp_path / "data")
    load(tmp_path / "data", tmp_path / "run")
    table.select([0, 1, 2, 3, 5, 4]).save_to_disk(tmp_path / "other")
    error = refusal(tmp_path / "other", tmp_path / "run")
    assert error.subject == "data.path" and "train[4] has changed" in error.message
    table.select([0, 1]).save_to_disk(tmp_path / "fewer")
    assert "train[2] is gone" in refusal(tmp_path / "fewer", tmp_path / "run").message


# --- columns ---------------------------------------------------------------------------------------------------------


def test_columns_can_be_named_and_plain_bytes_strings_and_numbers_do(
    tmp_path: Path, rows: dict[str, list], crop: Crop
) -> None:
    plain = {
        "a": [image["bytes"] for image in rows["img"]],
        "b": [image["bytes"] for image in rows["img"][::-1]],
        "style": ["x", "y", "x", "z", "y", "x"],
        "number": [10, 2, 2, 10, 7, 7],
    }
    datasets.Dataset.from_dict(plain).to_parquet(tmp_path / "data.parquet")

    def named(run: str, **keys: object) -> ImageDataset:
        return load(tmp_path / "data.parquet", tmp_path / run, **keys)

    dataset = named("style", image_column="b", label_column="style", metadata_columns=["number"])
    assert np.array_equal(dataset.raw[0], crop(5).transpose(2, 0, 1))
    assert dataset.class_names == ["x", "y", "z"] and dataset.label.tolist() == [0, 1, 0, 2, 1, 0]
    assert dataset.metadata == {"style": plain["style"], "number": ["10", "2", "2", "10", "7", "7"]}
    assert named("n", image_column="a", label_column="number").class_names == ["2", "7", "10"]
    kept = named("k", image_column="a", label_column="number", num_classes=20)
    assert kept.label.tolist() == plain["number"] and kept.num_classes == 20


def test_limit_sizes_and_colours_work_as_in_a_folder(tmp_path: Path, table: "datasets.Dataset") -> None:
    table.save_to_disk(tmp_path / "data")
    dataset = load(tmp_path / "data", tmp_path / "run", limit=4, image_size=8, color="grayscale")
    assert dataset.raw.shape == (4, 1, 8, 8) and len(dataset.metadata["caption"]) == 4


def test_rows_that_cannot_be_read_stop_or_are_skipped(tmp_path: Path, rows: dict[str, list], crop: Crop) -> None:
    rows["img"][1] = {"bytes": rows["img"][1]["bytes"][:60], "path": None}
    rows["img"][3] = None
    features = {"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    table = datasets.Dataset.from_dict({name: rows[name] for name in features}, datasets.Features(features))
    table.to_parquet(tmp_path / "data.parquet")
    error = refusal(tmp_path / "data.parquet", tmp_path / "run")
    assert "row 3: got no image" in str(error) or "train[1]: cannot be read" in str(error)
    dataset = load(tmp_path / "data.parquet", tmp_path / "run2", on_error="skip")
    assert dataset.file == ["train[0]", "train[2]", "train[4]", "train[5]"]
    assert np.array_equal(dataset.raw[2], crop(4).transpose(2, 0, 1)) and dataset.label.tolist() == [2, 0, 2, 2]


def test_a_split_published_without_labels_has_none(tmp_path: Path, rows: dict[str, list]) -> None:
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    table = datasets.Dataset.from_dict({"img": rows["img"], "label": [-1] * 6}, features=features)
    table.save_to_disk(tmp_path / "data")
    dataset = load(tmp_path / "data", tmp_path / "run")
    assert dataset.label is None and dataset.metadata == {"label": [""] * 6}
    assert "got no class in column label" in refusal(tmp_path / "data", tmp_path / "r", label_column="label").message


@pytest.mark.parametrize("wrong", [3, -2])
@pytest.mark.parametrize("keys", [{}, {"metadata_columns": []}])
def test_a_class_that_there_is_not_is_refused(
    tmp_path: Path, table: "datasets.Dataset", wrong: int, keys: dict[str, object]
) -> None:
    table = table.remove_columns("label").add_column("label", [0, 1, wrong, 0, 0, 0])
    cast = pyarrow.table(table.data.table.to_pydict(), schema=table.features.arrow_schema)
    features = datasets.Features({**table.features, "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset(cast, info=datasets.DatasetInfo(features=features)).save_to_disk(tmp_path / "data")
    error = refusal(tmp_path / "data", tmp_path / "run", **keys)
    assert str(error).startswith(f"train[2]: got class {wrong} in column label; expected 0 to 2.")


def test_a_row_of_a_data_set_on_the_hub_names_no_file_outside_the_hubs_caches(
    tmp_path: Path, rows: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    inside, outside = tmp_path / "cache" / "a.png", tmp_path / "private.png"
    for path in (inside, outside):
        path.write_bytes(rows["img"][0]["bytes"])
    (tmp_path / "cache" / "b.png").symlink_to(outside)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    source = huggingface.HuggingFaceSource(HuggingFaceConfig(path="somebody/pictures"))
    source.image_column = "img"
    source.dataset = [
        {"img": {"bytes": None, "path": str(path)}} for path in (inside, outside, tmp_path / "cache" / "b.png")
    ]
    assert source.content(0) == inside
    for row in (1, 2):
        with pytest.raises(UserError, match="which is not in the data set"):
            source.content(row)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "subject", "said"),
    [
        ({"split": "trian"}, "data.split", "has train, test. Did you mean 'train'?"),
        ({"image_column": "image"}, "data.image_column", "got image; the data set has img, label, caption, tags."),
        ({"image_column": "label"}, "data.image_column", "got label, of ClassLabel"),
        ({"label_column": "lable"}, "data.label_column", "Did you mean 'label'?"),
        ({"label_column": "tags"}, "data.label_column", "expected whole numbers or names"),
        ({"metadata_columns": ["artist"]}, "data.metadata_columns", "got artist; the data set has"),
        ({"caption_column": "text"}, "data.caption_column", "got text; the data set has"),
        ({"text_encoder": "clip"}, "data.caption_column", "got null with data.text_encoder"),
    ],
)
def test_wrong_names_are_refused_by_their_keys(
    tmp_path: Path, table: "datasets.Dataset", keys: dict, subject: str, said: str
) -> None:
    if keys.get("label_column") == "tags":
        table = table.map(lambda row: {"tags": ["x"]}, features=table.features)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "data")
    error = refusal(tmp_path / "data", tmp_path / "run", **keys)
    assert error.subject == subject and said in error.message


def test_several_image_or_class_columns_must_be_told_apart(tmp_path: Path, table: "datasets.Dataset") -> None:
    twice = table.add_column("fine", LABELS).cast_column("fine", datasets.ClassLabel(names=NAMES))
    twice.save_to_disk(tmp_path / "data")
    error = refusal(tmp_path / "data", tmp_path / "run")
    assert error.subject == "data.label_column" and "label, fine hold classes" in error.message
    assert load(tmp_path / "data", tmp_path / "run", label_column="fine").label.tolist() == LABELS
    table.remove_columns("img").save_to_disk(tmp_path / "none")
    assert "0 of the columns label, caption, tags hold images" in refusal(tmp_path / "none", tmp_path / "r").message


def test_pickles_scripts_and_other_files_are_never_opened(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    content = b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(trap)
    (tmp_path / "data").mkdir()
    for name in ("data.pkl", "data.pickle", "data.pt", "data.npy"):
        (tmp_path / "data" / name).write_bytes(content)
        assert "pickled files never are" in refusal(tmp_path / "data" / name, tmp_path / "run").message
    (tmp_path / "data" / "data.py").write_text(f"open({str(trap)!r}, 'w')")
    assert "pickled files never are" in refusal(tmp_path / "data", tmp_path / "run").message
    assert not trap.exists()


def test_damaged_files_and_paths_that_lead_nowhere_are_refused(tmp_path: Path, table: "datasets.Dataset") -> None:
    table.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "data.parquet").write_bytes((tmp_path / "data.parquet").read_bytes()[:500])
    error = refusal(tmp_path / "data.parquet", tmp_path / "run")
    assert error.subject == "data.path" and "cannot be opened as a data set" in error.message
    assert "nothing there" in refusal("./nowhere", tmp_path / "run").message


def test_a_name_that_the_hub_does_not_give_is_refused(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from mucs_cli.schemas import HuggingFaceConfig
from mucs_cli.data.dataset import load_dataset
load_dataset(HuggingFaceConfig(seed=0, path="nobody/nothing"), Path({str(tmp_path / "run")!r}))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "UserError: data.path: got nobody/nothing, which cannot be opened as a data set" in ran.stderr.replace(
        "mucs_cli.errors.", ""
    )


def test_a_row_that_names_a_picture_out_of_the_data_set_is_refused(tmp_path: Path, crop: Crop) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "data").mkdir()
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for place, is_inside in (("data", True), (".", False)):
        path = tmp_path / place / "picture.png"
        Image.fromarray(crop(0)).save(path)
        column = pyarrow.array([{"bytes": None, "path": str(path)}], image)
        pyarrow.parquet.write_table(pyarrow.table({"img": column}), tmp_path / "data" / "0.parquet")
        if is_inside:
            dataset = load(tmp_path / "data", tmp_path / "inside")
            assert np.array_equal(dataset.raw[0], crop(0).transpose(2, 0, 1))
            assert dataset.metadata == {"file_name": ["picture.png"]}
        else:
            assert f"got {path}, which is not in the data set" in refusal(tmp_path / "data", tmp_path / "out").message


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'mucs\[datasets\]'"):
        huggingface.import_datasets()


# --- prepared data sets ----------------------------------------------------------------------------------------------


def test_cifar10_reads_its_schema(tmp_path: Path, crop: Crop) -> None:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    images = [{"bytes": png(crop(index, 32, 32)), "path": None} for index in range(4)]
    table = datasets.Dataset.from_dict({"img": images, "label": [9, 0, 3, 3]}, features=features)
    (tmp_path / "plain_text").mkdir()
    table.to_parquet(tmp_path / "plain_text" / "train-00000-of-00001.parquet")
    table.select([0]).to_parquet(tmp_path / "plain_text" / "test-00000-of-00001.parquet")
    dataset = load_dataset(composed("cifar10", f"data.path={tmp_path / 'plain_text'}"), tmp_path / "run")
    assert dataset.raw.shape == (4, 3, 32, 32) and dataset.class_names == classes
    assert dataset.metadata == {"label": ["truck", "airplane", "cat", "cat"]}
    assert np.array_equal(dataset.raw[2], crop(2, 32, 32).transpose(2, 0, 1))
    assert composed("cifar10").path == "uoft-cs/cifar10"


def test_artbench10_reads_its_folders(tmp_path: Path, photographs: list[np.ndarray]) -> None:
    styles = ["art_nouveau", "baroque", "ukiyo_e"]
    for split, count in (("train", 2), ("test", 1)):
        for style in styles:
            for index in range(count):
                path = tmp_path / "artbench" / split / style / f"{style}-{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photographs[index][:256, :256]).save(path)
    dataset = load_dataset(composed("artbench10", f"data.path={tmp_path / 'artbench'}"), tmp_path / "run")
    assert dataset.raw.shape == (6, 3, 32, 32) and dataset.class_names == styles
    assert sorted(dataset.label.tolist()) == [0, 0, 1, 1, 2, 2]


CAPTIONS = [["a roof", "a red roof", "roof tiles"], ["a wall"], ["the sky", "blue sky"], ["a", "b", "c", "d"]]


@pytest.fixture
def coco(tmp_path: Path, photographs: list[np.ndarray]) -> Path:
    folder = tmp_path / "train2017"
    folder.mkdir()
    lines = []
    for index, captions in enumerate(CAPTIONS):
        Image.fromarray(photographs[0][: 120 + 10 * index, :100]).save(folder / f"{index:012d}.jpg")
        lines.append(json.dumps({"file_name": f"{index:012d}.jpg", "captions": captions}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text model of random weights with a byte-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    vocabulary = [*letters, *[f"{letter}</w>" for letter in letters], "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        projection_dim=24,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
    )
    torch.manual_seed(0)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def test_coco_captions_become_unit_vectors_one_a_caption_and_repeat_where_there_are_fewer(
    tmp_path: Path, coco: Path, text_encoder: Path
) -> None:
    overrides = [f"data.path={coco}", f"data.text_encoder={text_encoder}", "data.captions_per_image=3"]
    dataset = load_dataset(composed("coco", *overrides), tmp_path / "run")
    assert dataset.raw.shape == (4, 3, 64, 64) and dataset.label is None
    assert dataset.condition.shape == (4, 3, 24) and dataset.condition_dim == 24
    order = [int(Path(name).stem) for name in dataset.metadata["file_name"]]
    assert [json.loads(text) for text in dataset.metadata["captions"]] == [CAPTIONS[index] for index in order]
    assert np.allclose(np.linalg.norm(dataset.condition, axis=2), 1, atol=1e-6)
    one, two, three, four = (dataset.condition[order.index(index)] for index in range(4))
    assert np.array_equal(two[0], two[1]) and np.array_equal(two[0], two[2])
    assert np.array_equal(three[0], three[2]) and not np.allclose(three[0], three[1], atol=1e-3)
    assert len({vector.tobytes() for vector in (*one, *four)}) == 6


def test_a_captions_vector_is_the_text_models_and_does_not_depend_on_the_others(text_encoder: Path) -> None:
    import torch
    import transformers

    from mucs_cli.data.captions import CaptionEncoder

    encoder = CaptionEncoder(str(text_encoder))
    both, alone = encoder.encode(["a red roof", "sky"]), encoder.encode(["sky"])
    assert both.dtype == np.float32 and np.allclose(both[1], alone[0], atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(text_encoder)
    model = transformers.CLIPTextModelWithProjection.from_pretrained(text_encoder).eval()
    with torch.no_grad():
        plain = model(**tokenizer(["sky"], return_tensors="pt")).text_embeds[0]
    assert np.allclose(alone[0], plain / plain.norm(), atol=1e-5)
    assert np.isfinite(encoder.encode(["word " * 500])).all()  # cut off at the model's length


def test_cleaned_images_are_decoded_again_without_embedding_again(
    tmp_path: Path, coco: Path, text_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed("coco", f"data.path={coco}", f"data.text_encoder={text_encoder}")
    first = load_dataset(config, tmp_path / "run")
    (tmp_path / "run/data/images.safetensors").unlink()
    monkeypatch.setattr(huggingface.CaptionEncoder, "encode", None)
    assert load_dataset(config, tmp_path / "run").fingerprint == first.fingerprint


def test_a_text_model_that_is_missing_pickled_or_without_projection_is_refused(
    tmp_path: Path, coco: Path, text_encoder: Path
) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    def refused(folder: Path) -> str:
        overrides = [f"data.path={coco}", f"data.text_encoder={folder}"]
        with pytest.raises(UserError) as caught:
            load_dataset(composed("coco", *overrides), tmp_path / "run")
        assert caught.value.subject == "data.text_encoder"
        return caught.value.message

    weights = load_file(text_encoder / "model.safetensors")
    pickled, cut = tmp_path / "pickled", tmp_path / "cut"
    for folder in (pickled, cut):
        shutil.copytree(text_encoder, folder)
        (folder / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    assert "expected a CLIP text model in safetensors" in refused(pickled)
    save_file(
        {name: w for name, w in weights.items() if "projection" not in name},
        cut / "model.safetensors",
        {"format": "pt"},
    )
    assert "lacks text_projection.weight" in refused(cut)


def test_code_that_a_text_model_brings_is_not_run_whatever_the_user_would_say_to_it(
    tmp_path: Path, coco: Path, text_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    folder = Path(shutil.copytree(text_encoder, tmp_path / "brings"))
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'acted')!r}).touch()\nEvil = None\n"
    )
    path = folder / "tokenizer_config.json"
    brought = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | brought))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError) as caught:
        load_dataset(composed("coco", f"data.path={coco}", f"data.text_encoder={folder}"), tmp_path / "run")
    assert caught.value.subject == "data.text_encoder"
    assert not (tmp_path / "acted").exists()


@pytest.mark.parametrize("value", [[], None, [None], True, 5, {"a": "b"}])
def test_a_picture_without_a_caption_is_refused_by_name(value: object) -> None:
    with pytest.raises(
        UserError, match=r"^train\[3\]: got .* in column captions; expected a caption, or a list of them"
    ):
        huggingface.captions_of(value, "train[3]", "captions")
