"""Text from outside: nothing in it steers a terminal, is computed by a spreadsheet, or breaks a CSV file."""

import csv
import io

import pytest

from mucs_cli.text import csv_cells, csv_text, inert, printable


def test_everything_that_steers_a_terminal_is_spelled_out() -> None:
    hostile = "a\x1b[31mred\x07\x9b2J\u202egnp.exe\r\x00\u2028ü\tb"
    assert printable(hostile) == r"a\x1b[31mred\x07\x9b2J\u202egnp.exe\r\x00\u2028ü\tb"
    assert printable("line\nline") == "line\nline"


@pytest.mark.parametrize(
    "cell", ['=HYPERLINK("x")', "+1+1", "-1-1", "@SUM(A1)", "\t=1", "\r=1", "＝1+1", "-", "=", "--1"]
)
def test_formulas_are_made_text(cell: str) -> None:
    assert inert(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["-3.5", "+1", "-1e-05", "-inf", "a=b", "", "'=1", "0-1", -3, 2.5, None])
def test_numbers_and_all_other_cells_stay_as_they_are(cell: object) -> None:
    assert inert(cell) == cell


def test_any_cell_survives_csv_and_only_rows_that_need_it_are_quoted_throughout() -> None:
    rows = [["a", "b"], ["x\ry", ""], ['"', "a,b"], ["\r\n", "\n"], ["", "\r"], ["plain", "-1"]]
    text = csv_text(rows)
    assert csv_cells(text) == rows
    assert text.endswith("\nplain,-1\n") and '"x\ry",""' in text
    assert [row for row in csv.reader(io.StringIO(text, newline=""))] == rows


def test_a_cell_may_be_longer_than_csv_allows_by_itself() -> None:
    rows = [["x" * 200_000]]
    assert csv_cells(csv_text(rows)) == rows
    assert csv.field_size_limit() == 131_072
