"""Scores summed up by group, and ``groups.csv``."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mucs_cli.errors import UserError
from mucs_cli.reporting.group_files import write_groups
from mucs_cli.reporting.groups import (
    Grouping,
    GroupMean,
    GroupScore,
    choose_groupings,
    choose_k,
    group_scores,
    mean_groups,
)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_groups_agree_with_a_plain_loop(k: int) -> None:
    source = np.random.default_rng(3)
    scores = source.normal(size=40).round(1).astype(np.float32)  # rounded, so that some are equal
    values = [str(v) for v in source.choice(["a", "b", "c", "d"], 40, p=[0.6, 0.2, 0.15, 0.05])]
    ranked = sorted(range(40), key=lambda i: (-scores[i], i))
    expected = {}
    for name in set(values):
        own = [float(scores[i]) for i in ranked if values[i] == name]
        expected[name] = (
            len(own),
            sum(own) / len(own),
            own[0],
            sum(own[:k]) / len(own[:k]),
            sum(values[i] == name for i in ranked[:k]) / k,
            len(own) / 40,
        )
    found = group_scores(scores, Grouping.of(values), k)
    assert len(found) == len(expected) == 4
    for g in found:
        numbers = (g.num_images, g.mean, g.max, g.top_k_mean, g.share_of_top_k, g.share_of_images)
        assert numbers == pytest.approx(expected[g.group], abs=1e-9)
    assert sum(g.share_of_top_k for g in found) == pytest.approx(1)
    assert sum(g.share_of_images for g in found) == pytest.approx(1)


def test_groups_stand_in_the_order_of_their_share_of_the_top_then_of_their_mean() -> None:
    scores = np.array([0.9, 0.8, 0.7, -0.5, 0.2, 0.1], np.float32)
    found = group_scores(scores, Grouping.of(["x", "y", "x", "x", "low", "lower"]), 3)
    assert [(g.group, g.share_of_top_k) for g in found] == [
        ("x", pytest.approx(2 / 3)),
        ("y", pytest.approx(1 / 3)),
        ("low", 0),
        ("lower", 0),
    ]
    assert found[0].mean < found[1].mean  # the share decides first


def test_of_equal_scores_the_earlier_image_is_in_the_top() -> None:
    scores = np.zeros(4, np.float32)
    found = group_scores(scores, Grouping.of(["late" if i > 1 else "early" for i in range(4)]), 2)
    assert {g.group: g.share_of_top_k for g in found} == {"early": 1.0, "late": 0.0}


def test_empty_cells_are_one_group_and_a_cell_of_several_values_is_one_value() -> None:
    grouping = Grouping.of(["Ann", "", "Ann; Bob", "  ", "Bob", "(none)"])
    assert grouping.names == ["(none)", "Ann", "Ann; Bob", "Bob"]
    assert grouping.index.tolist() == [1, 0, 2, 0, 3, 0]


@pytest.mark.parametrize(("num_scores", "k"), [(3, 1), (4, 0), (4, 5)])
def test_other_lengths_and_impossible_k_are_wrong_calls(num_scores: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"{num_scores} scores, 4 images in groups, k = {k}"):
        group_scores(np.zeros(num_scores, np.float32), Grouping.of(list("abcd")), k)


def test_means_over_queries_count_a_missing_group_as_no_share() -> None:
    def group(name: str, num_images: int, top: float, images: float) -> GroupScore:
        return GroupScore(name, num_images, 0.0, 0.0, 0.0, top, images)

    first = [group("a", 3, 0.5, 0.75), group("b", 1, 0.5, 0.25)]
    second = [group("a", 2, 1.0, 1.0)]  # the only image of b is an exact copy of the query, left out
    assert mean_groups([first, second]) == [GroupMean("a", 3, 0.75, 0.875), GroupMean("b", 1, 0.25, 0.125)]
    assert mean_groups([]) == []


def test_without_names_the_columns_are_those_that_divide_the_images() -> None:
    count = 120
    columns = {
        "constant": ["same"] * count,
        "licence": ["CC0" if i % 3 else "" for i in range(count)],
        "fifty": [str(i % 50) for i in range(count)],
        "fifty-one": [str(i % 51) for i in range(count)],
        "caption": [f"a picture of {i}" for i in range(count)],
    }
    assert list(choose_groupings(None, columns, "report.group_by")) == ["licence", "fifty"]
    few = {"half": list("aabbcc"), "more": list("aabbcd")}
    assert list(choose_groupings(None, few, "report.group_by")) == ["half"]


def test_named_columns_are_taken_whatever_they_hold_and_unknown_ones_refused_with_the_choices() -> None:
    columns = {"artist": ["x", "y"], "licence": ["CC0", "CC0"]}
    assert list(choose_groupings(["licence", "artist"], columns, "group_by")) == ["licence", "artist"]
    assert choose_groupings([], columns, "group_by") == {}
    with pytest.raises(
        UserError, match=r"^group_by: got 'artst'; expected one of artist, licence\. Did you mean 'artist'\?$"
    ):
        choose_groupings(["artst"], columns, "group_by")
    with pytest.raises(UserError, match="got 'artist'; expected a metadata column, but the data has none"):
        choose_groupings(["artist"], {}, "group_by")


@pytest.mark.parametrize(("num_images", "k"), [(6, 6), (10, 10), (900, 10), (4000, 40), (4060, 41)])
def test_the_top_is_one_per_cent_of_the_images_at_least_ten_at_most_all(num_images: int, k: int) -> None:
    assert choose_k(None, num_images, "group_k") == k


def test_a_larger_top_than_there_are_images_names_the_key() -> None:
    assert choose_k(60, 60, "score.group_k") == 60
    with pytest.raises(UserError, match=r"^score\.group_k: got 61; expected at most 60, the training images scored"):
        choose_k(61, 60, "score.group_k")


def test_the_file_holds_every_query_column_and_group(tmp_path: Path) -> None:
    scores = np.array([[0.5, 0.25, -0.125, 0.0], [0.0, 0.1, 0.2, 0.3]], np.float32)
    columns = {"artist": ["Ann, the\nfirst", "Bob", "Bob", ""], "licence": ["CC0", "CC0", "BY", "BY"]}
    path = tmp_path / "groups.csv"
    write_groups(path, choose_groupings(None, columns, "score.group_by"), scores, [3, 8], 2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["query"], row["column"], row["group"]) for row in rows] == [
        ("3", "licence", "CC0"),
        ("3", "licence", "BY"),
        ("8", "licence", "BY"),
        ("8", "licence", "CC0"),
    ]  # three artists are too many for four images
    assert rows[0] == {
        "query": "3",
        "column": "licence",
        "group": "CC0",
        "num_images": "2",
        "mean": "0.375",
        "max": "0.5",
        "top_k_mean": "0.375",
        "share_of_top_k": "1",
        "share_of_images": "0.5",
    }
    write_groups(path, choose_groupings(["artist"], columns, "score.group_by"), scores, [3, 8], 2)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows[:3]] == ["Ann, the\nfirst", "Bob", "(none)"]


def test_the_file_is_left_alone_where_it_says_the_same_and_holds_float32_exactly(tmp_path: Path) -> None:
    path, scores = tmp_path / "groups.csv", np.array([[0.1, 1 / 3]], np.float32)
    groupings = {"artist": Grouping.of(["é", "b"])}
    write_groups(path, groupings, scores, [0], 1)
    before = path.stat()
    write_groups(path, groupings, scores, [0], 1)
    assert path.stat().st_ino == before.st_ino
    with path.open(newline="", encoding="utf-8") as file:
        highest = [np.float32(row["max"]) for row in csv.DictReader(file)]
    assert highest == [scores[0, 1], scores[0, 0]]
    write_groups(path, groupings, scores + 1, [0], 1)
    assert path.stat().st_ino != before.st_ino
