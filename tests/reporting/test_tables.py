"""Tables of results: one content, four forms."""

import csv
import io

from mucs_cli.reporting.tables import Estimate, Table, print_table, to_csv, to_latex, to_markdown

TABLE = Table(
    "what it is",
    ("variant", "queries", "overlap", "expected"),
    [
        ("a_b|c", 3, Estimate(0.123456789012, 0.1, 0.25), 1 / 3),
        ("50 % & more", 12, Estimate(None, None, None), None),
        ("d\\~", 1, Estimate(0.5, None, None), 0.25),
    ],
)


def test_csv_has_numbers_in_full_and_an_estimate_as_three_columns() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(TABLE))))
    assert rows[0] == {
        "variant": "a_b|c",
        "queries": "3",
        "overlap": "0.123456789",
        "overlap_low": "0.1",
        "overlap_high": "0.25",
        "expected": "0.333333333",
    }
    assert list(rows[1].values()) == ["50 % & more", "12", "", "", "", ""]
    assert [rows[2][name] for name in ("overlap", "overlap_low")] == ["0.5", ""]


def test_markdown_escapes_bars_and_aligns_numbers_to_the_right() -> None:
    lines = to_markdown(TABLE).splitlines()
    assert lines[:4] == [
        "what it is",
        "",
        "| variant | queries | overlap | expected |",
        "| :-- | --: | --: | --: |",
    ]
    assert lines[4] == r"| a_b\|c | 3 | 0.123 [0.100, 0.250] | 0.333 |"
    assert lines[5] == "| 50 % & more | 12 | – | – |"
    assert lines[6].endswith("| 1 | 0.500 | 0.250 |")


def test_latex_escapes_what_it_would_read_as_commands() -> None:
    lines = to_latex(TABLE).splitlines()
    assert r"\begin{tabular}{lrrr}" in lines
    assert r"a\_b|c & 3 & 0.123 [0.100, 0.250] & 0.333 \\" in lines
    assert r"50 \% \& more & 12 & -- & -- \\" in lines
    assert r"d\textbackslash{}\textasciitilde{} & 1 & 0.500 & 0.250 \\" in lines


def test_the_terminal_shows_every_cell_uncut() -> None:
    stream = io.StringIO()
    print_table(TABLE, stream)
    for text in ("what it is", "a_b|c", "0.123 [0.100, 0.250]", "50 % & more", "expected"):
        assert text in stream.getvalue()
