"""Metadata files, the labels in them, and condition vectors beside the pictures."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from mucs_cli.data.dataset import ImageDataset, load_dataset
from mucs_cli.data.labels import is_number, is_whole, number_classes
from mucs_cli.errors import UserError
from mucs_cli.schemas import ImageFolderConfig

Crop = Callable[..., np.ndarray]
FILES = [f"china/deep/{i}.png" for i in (0, 2, 4)] + [f"flower/deep/{i}.png" for i in (1, 3, 5)]


def load(folder: Path, run: str = "run", **keys: object) -> ImageDataset:
    return load_dataset(ImageFolderConfig(**{"seed": 0, "path": str(folder), **keys}), folder.parent / run)


def refusal(folder: Path, run: str = "run", **keys: object) -> UserError:
    with pytest.raises(UserError) as caught:
        load(folder, run, **keys)
    assert "\n" not in str(caught.value)
    return caught.value


def write_lines(folder: Path, rows: list[dict]) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# --- columns ---------------------------------------------------------------------------------------------------------


def test_every_column_of_a_csv_is_kept_and_pictures_that_no_row_names_have_empty_strings(photo_folder: Path) -> None:
    (photo_folder / "metadata.csv").write_text(
        "\ufeffcaption,file_name,licence\r\n"
        '"A ""big"" pot,\nred",./flower/deep/3.png,CC0\r\n'
        "Dächer,china/deep/2.png,\r\n\r\n",
        encoding="utf-8",
    )
    dataset = load(photo_folder)
    assert dataset.file == FILES and dataset.label is None
    assert dataset.metadata == {
        "caption": ["", "Dächer", "", "", 'A "big" pot,\nred', ""],
        "licence": ["", "", "", "", "CC0", ""],
    }
    assert load(photo_folder).metadata == dataset.metadata  # from the run's own index


def test_json_values_are_kept_as_text_and_every_key_is_a_column(photo_folder: Path) -> None:
    write_lines(
        photo_folder,
        [
            {"file_name": FILES[0], "year": 1999, "ok": True, "tags": ["a", "ü"], "note": "x\ry", "half": "\ud800"},
            {"file_name": FILES[5], "artist": None, "score": 0.5, "split": "train"},
        ],
    )
    metadata = load(photo_folder).metadata
    assert {name: (column[0], column[5]) for name, column in metadata.items()} == {
        "year": ("1999", ""),
        "ok": ("true", ""),
        "tags": ('["a", "ü"]', ""),
        "note": ("x\ny", ""),
        "half": ("?", ""),
        "artist": ("", ""),
        "metadata_score": ("", "0.5"),  # our own tables have columns score and split
        "metadata_split": ("", "train"),
    }
    assert load(photo_folder).metadata == metadata


def test_changed_metadata_are_taken_over_and_the_data_stay_the_same(photo_folder: Path) -> None:
    before = load(photo_folder)
    (photo_folder / "metadata.csv").write_text(f"file_name,artist\n{FILES[1]},Anna\n")
    after = load(photo_folder)
    assert after.metadata == {"artist": ["", "Anna", "", "", "", ""]} and after.fingerprint == before.fingerprint
    index = (photo_folder.parent / "run/data/index.csv").read_text().splitlines()
    assert index[0].endswith(",split,artist") and index[2].endswith(",training,Anna")


def test_limit_keeps_the_rows_of_the_first_pictures(photo_folder: Path) -> None:
    (photo_folder / "metadata.csv").write_text("file_name,n\n" + "".join(f"{f},{i}\n" for i, f in enumerate(FILES)))
    assert load(photo_folder, limit=4).metadata == {"n": ["0", "1", "2", "3"]}


# --- labels ----------------------------------------------------------------------------------------------------------


def test_classes_of_a_column_are_numbered_by_name(photo_folder: Path) -> None:
    write_lines(photo_folder, [{"file_name": f, "style": s} for f, s in zip(FILES, "cabbac", strict=True)])
    dataset = load(photo_folder, labels="metadata", label_column="style")
    assert dataset.class_names == ["a", "b", "c"] and dataset.num_classes == 3
    assert dataset.labels(range(6)).tolist() == [2, 0, 1, 1, 0, 2]
    assert load(photo_folder, labels="metadata", label_column="style").labels([5]).tolist() == [2]


def test_a_limit_numbers_the_classes_of_a_column_as_the_whole_folder_does(photo_folder: Path) -> None:
    write_lines(photo_folder, [{"file_name": f, "style": s} for f, s in zip(FILES, "cabbad", strict=True)])
    dataset = load(photo_folder, labels="metadata", label_column="style", limit=1)
    assert dataset.class_names == ["a", "b", "c", "d"] and dataset.labels([0]).tolist() == [2]


def test_whole_numbers_keep_their_order_and_0_to_k_minus_1_keep_their_values() -> None:
    label, names = number_classes([str(i) for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)], None, "k")
    assert label.tolist() == [10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9] and names[10] == "10"
    label, names = number_classes(["10", "2", "7"], None, "k")
    assert label.tolist() == [2, 0, 1] and names == ["2", "7", "10"]
    assert number_classes(["10", "2", "x"], None, "k")[1] == ["10", "2", "x"]
    label, names = number_classes(["10", "2"], 1000, "k")
    assert label.tolist() == [10, 2] and len(names) == 1000


@pytest.mark.parametrize("value", ["x", "3", "-1", "01"])
def test_with_num_classes_a_label_that_is_no_number_below_it_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.num_classes: got 3; a label is '{value}', expected whole numbers"):
        number_classes(["0", value], 3, "data.num_classes")


def test_another_label_changes_the_data_and_is_refused(photo_folder: Path) -> None:
    write_lines(photo_folder, [{"file_name": f, "label": s} for f, s in zip(FILES, "aabbab", strict=True)])
    load(photo_folder, labels="metadata")
    write_lines(photo_folder, [{"file_name": f, "label": s} for f, s in zip(FILES, "aabbbb", strict=True)])
    assert "got labels, conditions or levels other than" in refusal(photo_folder, labels="metadata").message


def test_a_missing_label_column_file_or_value_is_refused(photo_folder: Path) -> None:
    error = refusal(photo_folder, labels="metadata")
    assert error.subject == "data.label_column" and "there is no metadata file" in error.message
    write_lines(photo_folder, [{"file_name": f, "lable": "a"} for f in FILES[:5]])
    assert "has lable. Did you mean 'lable'?" in refusal(photo_folder, labels="metadata").message
    error = refusal(photo_folder, labels="metadata", label_column="lable")
    assert error.subject == str(photo_folder / FILES[5]) and "gives it no lable" in error.message


def test_with_folder_labels_a_label_column_is_kept_under_another_name(photo_folder: Path) -> None:
    write_lines(photo_folder, [{"file_name": f, "label": "x"} for f in FILES])
    metadata = load(photo_folder, labels="folder").metadata
    assert metadata == {"label": ["china"] * 3 + ["flower"] * 3, "metadata_label": ["x"] * 6}


# --- refused metadata ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("file,label\na,b\n", 1, "got columns file, label; expected one called file_name"),
        ("file_name,a,a\n", 1, "a column name twice"),
        ("file_name,\nchina/deep/0.png,x\n", 2, "got a column named ''"),
        ("file_name,a\nchina/deep/0.png,x\nchina/deep/2.png,x,y\n", 3, "got 3 values; expected 2"),
        ('file_name,a\nchina/deep/0.png,"x" y\n', 2, "is not CSV"),
        ('file_name,a\nchina/deep/0.png,"x\n', 2, "is not CSV"),
        ("file_name,a\n,x\n", 2, "got no file_name"),
        ("file_name,a\nchina/deep/9.png,x\n", 2, "'china/deep/9.png', which does not exist. Did you mean"),
        ("file_name,a\nmetadata.csv,x\n", 2, "'metadata.csv', which is not a picture that is read"),
        ("file_name,a\nchina/deep/0.png,x\n./china/deep/0.png,y\n", 3, "got 'china/deep/0.png' again; line 2 has it"),
        ("file_name,a\n../photos/china/deep/0.png,x\n", 2, "which leads out of"),
        ("file_name,a\n/etc/hostname,x\n", 2, "which leads out of"),
        ("file_name,split,metadata_split\nchina/deep/0.png,x,y\n", 2, "got a column named 'metadata_split'"),
    ],
)
def test_a_bad_csv_is_refused_by_file_and_line(photo_folder: Path, content: str, line: int, said: str) -> None:
    (photo_folder / "metadata.csv").write_text(content)
    error = refusal(photo_folder)
    assert error.subject == f"{photo_folder / 'metadata.csv'}, line {line}" and said in error.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object with a string file_name"),
        ('{"file_name": 3}', "expected a JSON object with a string file_name"),
        ('{"a": "b"}', "expected a JSON object with a string file_name"),
        ('{"file_name": "nothing.png"}', "which does not exist"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_bad_json_line_is_refused_by_file_and_line(photo_folder: Path, text: str, said: str) -> None:
    (photo_folder / "metadata.jsonl").write_text('{"file_name": "china/deep/0.png"}\n\n' + text + "\n")
    error = refusal(photo_folder)
    assert error.subject == f"{photo_folder / 'metadata.jsonl'}, line 3" and said in error.message


def test_text_that_is_not_utf8_two_files_and_an_empty_one_are_refused(photo_folder: Path) -> None:
    (photo_folder / "metadata.csv").write_bytes("file_name,a\nchina/deep/0.png,ä\n".encode("latin-1"))
    assert refusal(photo_folder).subject.endswith("metadata.csv, line 2")
    (photo_folder / "metadata.jsonl").touch()
    assert "got both metadata.csv and metadata.jsonl" in refusal(photo_folder).message
    (photo_folder / "metadata.csv").unlink()
    assert "got no row" in refusal(photo_folder).message


def test_a_row_that_leaves_the_folder_through_a_link_is_refused_and_a_link_within_is_not(
    tmp_path: Path, photo_folder: Path, crop: Crop
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.fromarray(crop(7)).save(outside / "far.png")
    (photo_folder / "inner").symlink_to(photo_folder / "china" / "deep")
    (photo_folder / "metadata.csv").write_text("file_name,a\ninner/0.png,x\n")
    assert load(photo_folder).metadata["a"][-3:] == ["x", "", ""]
    (photo_folder / "linked").symlink_to(outside)
    (photo_folder / "metadata.csv").write_text("file_name,a\nlinked/far.png,x\n")
    error = refusal(photo_folder, "other")
    assert error.subject.endswith("line 2") and "'linked/far.png', which leads out of" in error.message


# --- condition vectors -----------------------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)


def test_condition_rows_follow_the_sorted_files(photo_folder: Path, vectors: np.ndarray) -> None:
    save_file({"condition": vectors[:, 0].copy()}, photo_folder / "c.safetensors")
    dataset = load(photo_folder, condition_file="c.safetensors", labels="folder")
    assert (dataset.condition_dim, dataset.conditions_per_image, dataset.condition.shape) == (4, 1, (6, 1, 4))
    found = dataset.conditions([5, 0])
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), vectors[[5, 0], 0])
    assert dataset.labels([5, 0]).tolist() == [1, 0]
    assert np.array_equal(
        load(photo_folder, condition_file="c.safetensors", labels="folder").condition[:, 0], vectors[:, 0]
    )


def test_condition_index_says_the_row_and_choice_the_vector(photo_folder: Path, vectors: np.ndarray) -> None:
    save_file({"condition": vectors}, photo_folder.parent / "beside.safetensors")
    order = [3, 3, 0, 5, 1, 2]
    write_lines(photo_folder, [{"file_name": f, "condition_index": i} for f, i in zip(FILES, order, strict=True)])
    path = str(photo_folder.parent / "beside.safetensors")
    dataset = load(photo_folder, condition_file=path)
    assert np.array_equal(dataset.condition, vectors[order])
    assert np.array_equal(dataset.conditions([1, 2, 4]), vectors[[3, 0, 1], 0])
    chosen = dataset.conditions(torch.tensor([1, 2, 4]), torch.tensor([2, 0, 1]))
    assert np.array_equal(chosen, vectors[[3, 0, 1], [2, 0, 1]])
    assert np.array_equal(load(photo_folder, "limited", condition_file=path, limit=2).condition, vectors[[3, 3]])


def test_without_vectors_a_condition_is_the_label_or_nothing(photo_folder: Path) -> None:
    assert load(photo_folder).conditions([0]) is None and load(photo_folder).condition_dim == 0
    assert load(photo_folder, "labelled", labels="folder").conditions([0, 5]).tolist() == [0, 1]


def test_vectors_count_in_the_fingerprint_and_changed_ones_are_refused(photo_folder: Path, vectors: np.ndarray) -> None:
    plain = load(photo_folder, "plain").fingerprint
    path = photo_folder / "c.safetensors"
    save_file({"condition": vectors}, path)
    first = load(photo_folder, condition_file="c.safetensors")
    assert first.fingerprint != plain
    (photo_folder.parent / "run/data/images.safetensors").unlink()
    assert load(photo_folder, condition_file="c.safetensors").fingerprint == first.fingerprint
    save_file({"condition": vectors + 1}, path)
    assert "labels, conditions or levels" in refusal(photo_folder, condition_file="c.safetensors").message
    assert np.array_equal(load(photo_folder, "other", condition_file="c.safetensors").condition, vectors + 1)


def test_skipped_pictures_leave_no_gap_in_the_conditions(photo_folder: Path, vectors: np.ndarray) -> None:
    (photo_folder / FILES[1]).write_text("hello")
    save_file({"condition": vectors}, photo_folder / "c.safetensors")
    dataset = load(photo_folder, condition_file="c.safetensors", on_error="skip")
    assert np.array_equal(dataset.condition, vectors[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"condition": np.zeros((5, 4), np.float32)}, "got 5 rows for 6 images"),
        ({"condition": np.zeros((6, 4), np.float64)}, "float64 [6, 4]; expected float32 [N, d] or [N, k, d]"),
        ({"condition": np.zeros(6, np.float32)}, "float32 [6]; expected"),
        ({"other": np.zeros((6, 4), np.float32)}, "expected a safetensors file with 'condition'"),
        ({"condition": np.full((6, 4), np.nan, np.float32)}, "got row 0 with values that are not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(photo_folder: Path, tensors: dict, said: str) -> None:
    save_file(tensors, photo_folder / "c.safetensors")
    error = refusal(photo_folder, condition_file="c.safetensors")
    assert error.subject == str(photo_folder / "c.safetensors") and said in error.message


def test_a_missing_condition_file_and_a_row_that_is_not_there_are_refused(
    photo_folder: Path, vectors: np.ndarray
) -> None:
    assert "got c.safetensors; no file" in refusal(photo_folder, condition_file="c.safetensors").message
    save_file({"condition": vectors}, photo_folder / "c.safetensors")
    write_lines(photo_folder, [{"file_name": f, "condition_index": 6 if f == FILES[2] else 0} for f in FILES])
    error = refusal(photo_folder, condition_file="c.safetensors")
    assert error.subject == FILES[2] and "got condition_index '6'; expected a row of" in error.message
    assert not is_whole("1" * 5000) and not is_number("1" * 5000)
