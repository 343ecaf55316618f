"""``mucs evaluate evaluation=retrieval`` on score files, against scikit-learn and plain counts."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import fails, mucs, scores_of
from evaluation_runs import NUM_IMAGES, NUM_QUERIES, results_of, stamps
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

LABELS = load_digits().target
NUM_PICTURES, NUM_COPIED, NUM_HELD_OUT = 60, 5, 9
ARTISTS = {"Ann": {"Ann"}, "Bob": {"Bob"}, "Ann; Bob": {"Ann", "Bob"}, "": set(), '["Cid", "Ann"]': {"Ann", "Cid"}}
"""Cells of the column, and the values they stand for; of image and query i the cell i mod 5."""
CAUSES = ("even/00.png;odd/copy.png", "3", '["odd/01.png", 5]', "", "even/04.png")


def evaluate(run: Path, *keys: str) -> dict[str, dict[str, Any]]:
    """Results by variant."""
    mucs("evaluate", f"run={run}", "evaluation=retrieval", "overwrite=true", *keys)
    return {entry["variant"]: entry for entry in results_of(run, "retrieval")["variants"]}


def expected(score: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """Means over the queries that have something to find, by sorting and by scikit-learn; without ties."""
    pairs = [(row, mask) for row, mask in zip(score, relevant, strict=True) if mask.any()]
    hits = [mask[np.argsort(-row)[:k]].sum() for row, mask in pairs]
    return {
        "precision": float(np.mean(hits) / k),
        "recall": float(np.mean([count / mask.sum() for count, (_, mask) in zip(hits, pairs, strict=True)])),
        "average_precision": float(np.mean([average_precision_score(mask, row) for row, mask in pairs])),
    }


def agree(entry: dict[str, Any], numbers: dict[str, float]) -> None:
    assert {name: entry[name]["value"] for name in numbers} == pytest.approx(numbers)


# --- sampled queries of a conditional model --------------------------------------------------------------------------


def test_images_of_the_querys_class_are_counted_as_scikit_learn_counts_them(run: Path) -> None:
    entries = evaluate(run, "evaluation.k=15")
    classes = load_file(run / "sample" / "samples.safetensors")["condition"].numpy()
    relevant = classes[:, None] == LABELS[None, :NUM_IMAGES]
    for variant in ("pixel", "random"):
        agree(entries[variant], expected(scores_of(run, variant), relevant, 15))
        for name in ("precision", "recall", "average_precision"):
            found = entries[variant][name]
            assert found["low"] < found["value"] < found["high"]
    assert entries["random"]["precision"]["random"] == pytest.approx(relevant.mean())
    assert entries["random"]["recall"]["random"] == pytest.approx(15 / NUM_IMAGES)
    assert entries["pixel"]["num_queries"] == NUM_QUERIES and entries["pixel"]["num_without_relevant"] == 0
    counted = results_of(run, "retrieval")["num_relevant"]
    assert counted == {str(query): int(mask.sum()) for query, mask in enumerate(relevant)}


def test_the_scores_of_class_agreement_find_the_class_and_random_ones_do_not(run: Path) -> None:
    entries = evaluate(run)
    assert entries["condition"]["average_precision"]["value"] == 1.0
    found = entries["random"]["average_precision"]
    assert found["low"] < found["random"] < found["high"]


def test_the_table_has_a_row_a_variant_and_the_terminal_shows_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    entries = evaluate(run)
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((run / "evaluate" / "retrieval" / "table.csv").open()))
    assert [row["variant"] for row in rows] == ["condition", "pixel", "random"]
    for row in rows:
        for name, chance in (
            ("precision", "random_precision"),
            ("recall", "random_recall"),
            ("average_precision", "random_average"),
        ):
            found = entries[row["variant"]][name]
            shown = [float(row[column]) for column in (name, f"{name}_low", f"{name}_high", chance)]
            assert shown == pytest.approx([found[key] for key in ("value", "low", "high", "random")], rel=1e-8)
        recall = entries[row["variant"]]["recall"]
        assert f"{recall['value']:.3f} [{recall['low']:.3f}, {recall['high']:.3f}]" in printed
    assert "relevant: those of the query's class" in printed
    manifest = json.loads((run / "evaluate" / "retrieval" / "manifest.json").read_text())
    assert manifest["seeds"] == {"retrieval_resamples": 0}
    assert manifest["counts"] == {"variants": 3, "queries": NUM_QUERIES}


def test_only_the_chosen_queries_and_variants_count(run: Path) -> None:
    entries = evaluate(run, "queries.index=[2,5,7]", "evaluation.variants=[pixel]", "evaluation.k=7")
    classes = load_file(run / "sample" / "samples.safetensors")["condition"].numpy()[[2, 5, 7]]
    relevant = classes[:, None] == LABELS[None, :NUM_IMAGES]
    agree(entries["pixel"], expected(scores_of(run, "pixel")[[2, 5, 7]], relevant, 7))
    assert list(entries) == ["pixel"] and entries["pixel"]["num_queries"] == 3


def test_a_rerun_is_up_to_date_and_another_meaning_of_relevant_is_refused_without_overwriting(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(run)
    before = stamps(run)
    capsys.readouterr()
    mucs("evaluate", f"run={run}", "evaluation=retrieval")
    assert "evaluate: up to date" in capsys.readouterr().err and stamps(run) == before
    line = fails(capsys, "evaluate", f"run={run}", "evaluation=retrieval", "evaluation.k=11")
    assert "evaluation.k: got 11;" in line and "overwrite=true" in line


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["evaluation.relevant=classes"], "evaluation.relevant: got 'classes'; expected one of class, column, copies,"),
        (["evaluation.relevant=column"], "evaluation.column: got None with evaluation.relevant=column; expected a col"),
        (["evaluation.column=label"], "evaluation.column: got label with evaluation.relevant=class; expected a column"),
        (
            ["evaluation.relevant=column", "evaluation.column=label"],
            "evaluation.column: got 'label'; the queries were sampled and have no columns.",
        ),
        (["evaluation.relevant=copies"], "evaluation.relevant: got copies; no training image is with exactly the quer"),
        (["evaluation.k=121"], "evaluation.k: got 121; expected at most 120"),
    ],
)
def test_what_cannot_be_evaluated_is_named_and_nothing_is_written(
    keys: list[str], message: str, scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stamps(scored)
    assert message in fails(capsys, "evaluate", f"run={scored}", "evaluation=retrieval", *keys)
    assert stamps(scored) == before


# --- queries from a folder -------------------------------------------------------------------------------------------


def save(path: Path, digit: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((load_digits().images[digit] * 15).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits in two folders, each its class, by some artists; query i copies digit i, and digit 0 is there twice."""
    place = tmp_path_factory.mktemp("painted")
    names = [f"{('even', 'odd')[digit % 2]}/{digit:02d}.png" for digit in range(NUM_PICTURES)]
    for digit, name in enumerate(names):
        save(place / "images" / name, digit)
    save(place / "images" / "odd" / "copy.png", 0)
    cells = list(ARTISTS)
    lines = [["file_name", "artist"], *([name, cells[digit % 5]] for digit, name in enumerate(names))]
    write(place / "images" / "metadata.csv", lines)
    lines = [["file_name", "artist", "causes"]]
    for query, cause in enumerate(CAUSES):
        name = f"{('even', 'odd')[query % 2]}/{query}.png"
        save(place / "queries" / name, query)
        lines.append([name, cells[query], cause])
    write(place / "queries" / "metadata.csv", lines)
    run = place / "run"
    data = ["data=image_folder", f"data.path={place / 'images'}", "data.labels=folder"]
    data += [f"data.holdout={NUM_HELD_OUT}", "data.seed=1"]  # of which no image that CAUSES names
    training = ["model.size=tiny", "training.num_steps=1", "training.batch_size=8"]
    mucs("train", f"run={run}", "device=cpu", *data, *training)
    mucs("sample", f"run={run}", "queries=folder", f"queries.path={place / 'queries'}")
    mucs("score", "-m", f"run={run}", "method=random,pixel")
    return run


def write(path: Path, lines: list[list[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


@pytest.fixture
def folder_run(painted: Path, tmp_path: Path) -> Path:
    """A copy of ``painted`` to do things to."""
    return Path(shutil.copytree(painted, tmp_path / "painted"))


def images_of(run: Path) -> list[dict[str, str]]:
    """The scored images, in the order of the scores."""
    rows = list(csv.DictReader((run / "data" / "index.csv").open(newline="")))
    scored = load_file(run / "score" / "random" / "scores.safetensors")["example_id"].tolist()
    assert len(scored) == NUM_PICTURES + 1 - NUM_HELD_OUT
    return [rows[example_id] for example_id in scored]


def query_files(run: Path) -> list[str]:
    return [row["file"] for row in csv.DictReader((run / "sample" / "queries.csv").open(newline=""))]


def judge(run: Path, found: list[set[str]], *keys: str) -> dict[str, dict[str, Any]]:
    """Evaluates, and compares with the files that each query should find; queries are in the order of their files."""
    entries = evaluate(run, "evaluation.k=6", *keys)
    relevant = np.array([[row["file"] in files for row in images_of(run)] for files in found])
    agree(entries["random"], expected(scores_of(run, "random"), relevant, 6))
    assert entries["random"]["num_queries"] == relevant.any(axis=1).sum()
    assert entries["random"]["num_without_relevant"] == (~relevant.any(axis=1)).sum()
    return entries


def ordered(run: Path, by_query: list[set[str]]) -> list[set[str]]:
    """From the order in which the queries were made, which their names hold, to that of their files."""
    return [by_query[int(Path(file).stem)] for file in query_files(run)]


def test_images_with_a_value_of_the_querys_column_in_common_are_relevant(folder_run: Path) -> None:
    images, values = images_of(folder_run), list(ARTISTS.values())
    found = [{row["file"] for row in images if ARTISTS[row["artist"]] & own} for own in values]
    assert found[3] == set() and len({len(files) for files in found}) > 2
    judge(folder_run, ordered(folder_run, found), "evaluation.relevant=column", "evaluation.column=artist")


def test_without_a_separator_a_cell_is_one_value_unless_it_is_a_list(folder_run: Path) -> None:
    images = images_of(folder_run)
    same = [{row["file"] for row in images if cell and row["artist"] == cell} for cell in list(ARTISTS)[:4]]
    listed = {row["file"] for row in images if row["artist"] in ("Ann", '["Cid", "Ann"]')}
    same[0] = listed  # which holds Ann as well
    keys = ["evaluation.relevant=column", "evaluation.column=artist", "evaluation.separator=null"]
    judge(folder_run, ordered(folder_run, [*same, listed]), *keys)


def test_training_images_of_exactly_the_querys_pixels_are_relevant_and_nearest_pixels_find_them(
    folder_run: Path,
) -> None:
    scored = {row["file"] for row in images_of(folder_run)}
    copies: list[set[str]] = [{f"{('even', 'odd')[query % 2]}/0{query}.png"} for query in range(NUM_COPIED)]
    copies[0].add("odd/copy.png")
    entries = judge(folder_run, ordered(folder_run, [own & scored for own in copies]), "evaluation.relevant=copies")
    assert entries["pixel"]["average_precision"]["value"] == entries["pixel"]["recall"]["value"] == 1.0


def test_causes_are_named_by_file_or_by_id_several_in_a_cell(folder_run: Path) -> None:
    rows = list(csv.DictReader((folder_run / "data" / "index.csv").open(newline="")))
    causes = [{"even/00.png", "odd/copy.png"}, {rows[3]["file"]}, {"odd/01.png", rows[5]["file"]}, set(), {CAUSES[4]}]
    judge(folder_run, ordered(folder_run, causes), "evaluation.relevant=causes", "evaluation.column=causes")


def test_the_class_of_a_query_that_the_model_does_not_take_is_its_folders(folder_run: Path) -> None:
    assert "condition" not in load_file(folder_run / "sample" / "samples.safetensors")
    files = {row["file"] for row in images_of(folder_run)}
    folders = [query.partition("/")[0] for query in query_files(folder_run)]
    assert set(folders) == {"even", "odd"}
    judge(folder_run, [{file for file in files if file.startswith(folder)} for folder in folders])


def test_causes_that_were_corrected_are_evaluated_again_without_overwriting(folder_run: Path) -> None:
    keys = ["evaluation=retrieval", "evaluation.relevant=causes", "evaluation.column=causes"]
    mucs("evaluate", f"run={folder_run}", *keys)
    name_causes(folder_run, "odd/03.png;even/04.png")
    mucs("evaluate", f"run={folder_run}", *keys)
    assert sum(results_of(folder_run, "retrieval")["num_relevant"].values()) == 7


def name_causes(run: Path, causes: str) -> None:
    """In place of even/04.png, in a copy of the queries' folder."""
    queries = Path(json.loads((run / "sample" / "manifest.json").read_text())["folder"])
    changed = Path(shutil.copytree(queries, run.parent / "queries"))
    text = (changed / "metadata.csv").read_text()
    assert "even/04.png" in text
    (changed / "metadata.csv").write_text(text.replace("even/04.png", causes))
    mucs("sample", f"run={run}", "queries=folder", f"queries.path={changed}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["column", "evaluation.column=artists"], "evaluation.column: got 'artists'; "),
        (
            ["column", "evaluation.column=causes"],
            "evaluation.column: got 'causes'; expected one of the data's (label, ",
        ),
        (
            ["causes", "evaluation.column=cause"],
            "evaluation.column: got 'cause'; the queries have file, artist, causes",
        ),
        (["causes", "evaluation.column=artist"], "queries.csv, query "),
        (
            ["causes", "evaluation.column=causes", "evaluation.separator=null"],
            "got 'even/00.png;odd/copy.png' in causes; expected file names or example_ids of training images, with",
        ),
    ],
)
def test_columns_and_cells_that_name_nothing_are_named(
    keys: list[str], message: str, painted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(
        capsys, "evaluate", f"run={painted}", "evaluation=retrieval", f"evaluation.relevant={keys[0]}", *keys[1:]
    )
    assert message in line


def test_a_cause_that_is_held_out_is_no_training_image(folder_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = csv.DictReader((folder_run / "data" / "index.csv").open(newline=""))
    held_out = next(row["file"] for row in rows if row["split"] == "holdout")
    name_causes(folder_run, held_out)
    keys = ["evaluation=retrieval", "evaluation.relevant=causes", "evaluation.column=causes"]
    assert f"got '{held_out}' in causes" in fails(capsys, "evaluate", f"run={folder_run}", *keys)
