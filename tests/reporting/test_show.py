"""``mucs show``: what stands on stdout."""

import csv
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reporting_runs import RunBuilder, show_run

from mucs_cli.errors import UserError
from mucs_cli.stages.show import print_top


def top_ids(run: RunBuilder, query: int, k: int) -> list[int]:
    return [int(i) for i in np.argsort(-run.score[query], kind="stable")[:k]]


def test_table_has_a_row_for_each_image_and_fits_80_columns(
    finished: RunBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    show_run(finished.run, k=3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line for line in lines if line.startswith("query")] == ["query 0", "query 1", "query 2"]
    first = top_ids(finished, 0, 1)[0]
    row = next(line.split() for line in lines if line.split()[:2] == ["1", str(first)])
    assert row == ["1", str(first), f"{finished.score[0, first]:+.4f}", f"digits[{first}]", str(finished.label[first])]
    assert "exact copy" in next(line for line in lines if line.split()[:2] == ["1", "3"])


def test_json_is_the_whole_output_and_holds_the_exact_scores(
    finished: RunBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    show_run(finished.run, k=4, format="json", query=2)
    shown = json.loads(capsys.readouterr().out)
    assert (shown["variant"], shown["num_scored"]) == ("mucs", 60)
    (query,) = shown["queries"]
    assert query["query"] == 2
    assert [image["example_id"] for image in query["images"]] == top_ids(finished, 2, 4)
    assert [image["exact_copy"] for image in query["images"]] == [True, False, False, False]
    assert query["images"][0]["score"] == float(finished.score[2, 3])
    assert query["images"][0]["metadata"] == {"label": "3"}


def test_csv_parses_with_awkward_file_names(finished: RunBuilder, capsys: pytest.CaptureFixture[str]) -> None:
    finished.files = [f'a "quoted", name\n{i}' for i in range(60)]
    for name in ("manifest.json", "index.csv"):
        (finished.run / "data" / name).unlink()
    finished.data()
    show_run(finished.run, k=2, format="csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["query", "rank", "example_id", "file", "score", "exact_copy", "label"]
    assert [(row["query"], row["rank"]) for row in rows] == [(str(q), str(r)) for q in range(3) for r in (1, 2)]
    assert [int(row["example_id"]) for row in rows] == [i for q in range(3) for i in top_ids(finished, q, 2)]
    assert rows[0]["file"] == f'a "quoted", name\n{rows[0]["example_id"]}'
    assert np.float32(rows[0]["score"]) == finished.score[0].max()


def test_bottom_and_exclude_exact_reach_the_output(finished: RunBuilder, capsys: pytest.CaptureFixture[str]) -> None:
    show_run(finished.run, k=1, query=2, format="json", bottom=True)
    (image,) = json.loads(capsys.readouterr().out)["queries"][0]["images"]
    assert (image["rank"], image["example_id"]) == (60, int(finished.score[2].argmin()))
    show_run(finished.run, k=1, query=2, format="json", exclude_exact=True)
    (image,) = json.loads(capsys.readouterr().out)["queries"][0]["images"]
    assert (image["rank"], image["example_id"]) == (1, top_ids(finished, 2, 2)[1])


def test_control_characters_and_markup_in_names_do_not_reach_the_terminal(
    finished: RunBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.files = [f"\x1b[31m[bold]{i}" for i in range(60)]
    for name in ("manifest.json", "index.csv"):
        (finished.run / "data" / name).unlink()
    finished.data()
    show_run(finished.run, k=1, query=0)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert f"\\x1b[31m[bold]{top_ids(finished, 0, 1)[0]}" in out


def test_it_needs_no_decoded_images(finished: RunBuilder, capsys: pytest.CaptureFixture[str]) -> None:
    (finished.run / "data" / "images.safetensors").unlink()
    show_run(finished.run, k=1, query=2)
    assert "exact copy" in capsys.readouterr().out


def test_too_large_k_names_the_key(finished: RunBuilder) -> None:
    with pytest.raises(UserError, match=r"^k: got 61; expected at most 60"):
        show_run(finished.run, k=61)


def test_print_top_gives_each_query_its_ids_in_order(finished: RunBuilder, capsys: pytest.CaptureFixture[str]) -> None:
    print_top(finished.run, "mucs", 5)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(lines[1:])
    for query in range(3):
        part = text.split(f"query {query}")[1].split("query")[0]
        ids = [int(entry.split(" (")[0]) for entry in part.split("   ") if "(" in entry]
        assert ids == top_ids(finished, query, 5)
    assert f"3 (3) {finished.score[2, 3]:+.4f}*" in text
    assert lines[-1] == "* an exact copy of the query"


ARTISTS = ["Ann Lee", "Bob", "", "[b]E\x1b[31m"]


@pytest.fixture
def grouped(make_run: Callable[..., RunBuilder]) -> RunBuilder:
    """A run whose images have artists; query 2 is an exact copy of image 3, Eve's."""
    run = make_run()
    run.data(metadata={"artist": [ARTISTS[i % 4] for i in range(60)]})
    run.sample()
    run.variant()
    return run


def test_groups_are_a_table_a_query_that_fits_80_columns(
    grouped: RunBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    show_run(grouped.run, group_by="artist", group_k=12)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out and "[b]E\\x1b[31m" in out
    assert lines[0] == "mucs: 60 scores by artist"
    assert [line for line in lines if line.startswith("query")] == ["query 0", "query 1", "query 2"]
    own = grouped.score[0, 0::4]
    in_top = sum(i % 4 == 0 for i in top_ids(grouped, 0, 12))
    row = next(line for line in lines if line.startswith(" Ann Lee"))
    assert row.split() == [
        *["Ann", "Lee", "15", f"{own.mean():+.4f}", f"{own.max():+.4f}", f"{np.sort(own)[-12:].mean():+.4f}"],
        *[f"{100 * in_top / 12:.1f}", "%", "25.0", "%"],
    ]
    assert next(line for line in lines if "images" in line).split() == [
        *["artist", "images", "mean", "max", "top-12", "mean", "of", "top", "12", "of", "images"]
    ]


def test_a_table_of_groups_is_cut_at_k_and_json_and_csv_are_not(
    grouped: RunBuilder, capsys: pytest.CaptureFixture[str]
) -> None:
    show_run(grouped.run, group_by="artist", query=1, k=3)
    out = capsys.readouterr().out
    assert out.count("\N{NO-BREAK SPACE}%") == 3 * 2
    assert out.splitlines()[-2] == "and 1 more; k=4 shows all"
    show_run(grouped.run, group_by="artist", query=1, k=3, format="json")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["group_by"], shown["group_k"], shown["num_scored"]) == ("artist", 10, 60)
    groups = shown["queries"][0]["groups"]
    assert {group["group"] for group in groups} == {*ARTISTS, "(none)"} - {""}
    assert [group["share_of_top_k"] for group in groups] == sorted((g["share_of_top_k"] for g in groups), reverse=True)
    show_run(grouped.run, group_by="artist", query=1, k=3, format="csv")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0])[:4] == ["query", "column", "group", "num_images"]
    assert [row["group"] for row in rows] == [group["group"] for group in groups]
    assert {(row["query"], row["column"]) for row in rows} == {("1", "artist")}
    assert [float(row["mean"]) for row in rows] == pytest.approx([group["mean"] for group in groups], rel=1e-8)


def test_groups_leave_exact_copies_out_when_asked(grouped: RunBuilder, capsys: pytest.CaptureFixture[str]) -> None:
    counts, highest = [], []
    for exclude in (False, True):
        show_run(grouped.run, group_by="artist", query=2, format="json", exclude_exact=exclude)
        (query,) = json.loads(capsys.readouterr().out)["queries"]
        eve = next(group for group in query["groups"] if group["group"] == ARTISTS[3])
        counts.append(eve["num_images"])
        highest.append(eve["max"])
    assert counts == [15, 14]
    assert highest == [float(v) for v in np.sort(grouped.score[2, 3::4])[[-1, -2]]]


def test_an_unknown_column_is_refused_with_the_columns_there_are(grouped: RunBuilder) -> None:
    with pytest.raises(UserError, match=r"^group_by: got 'artists'; expected one of label, artist\. Did you mean"):
        show_run(grouped.run, group_by="artists")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_k": 5}, r"^group_k: got 5 without group_by"),
        ({"group_by": "artist", "bottom": True}, r"^bottom: got true with group_by"),
        ({"group_by": "artist", "group_k": 61}, r"^group_k: got 61; expected at most 60"),
    ],
)
def test_keys_that_make_no_sense_with_groups_are_refused(
    grouped: RunBuilder, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        show_run(grouped.run, **settings)


def test_a_query_from_a_file_is_named_with_its_metadata(
    make_run: Callable[..., RunBuilder], capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run()
    run.data()
    run.sample(files=["a.png", "\x1b[2Jb.png", "c.png"])
    run.variant()
    show_run(run.run, k=1, query=1)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "query 1  \\x1b[2Jb.png  prompt prompt of \\x1b[2Jb.png" in out.splitlines()
    for settings in ({}, {"group_by": "label"}):
        show_run(run.run, k=1, query=2, format="json", **settings)
        (query,) = json.loads(capsys.readouterr().out)["queries"]
        assert (query["query_file"], query["query_metadata"]) == ("c.png", {"prompt": "prompt of c.png"})
