"""Tables of results: one content, four forms."""

import csv
import io
from dataclasses import replace

import pytest
from rich.text import Text

from mucs_cli.reporting.tables import Estimate, Table, marked, print_table, to_csv, to_latex, to_markdown

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


def test_a_small_p_is_no_zero() -> None:
    table = Table("p", ("p", "x"), [(0.0004, 0.0), (0.0006, -0.0004)])
    assert to_markdown(table).splitlines()[4:] == ["| < 0.001 | 0.000 |", "| 0.001 | -0.000 |"]
    assert r"\textless{} 0.001 & 0.000 \\" in to_latex(table)


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_wide_table_keeps_its_names_in_a_pipe_and_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Estimate(0.7, 0.54, 1.0)] * 8
    wide = Table("AUC", ("method", *(f"auc_{place}" for place in range(8))), [("random removal", *cells)])
    pipe, terminal = io.StringIO(), Terminal()
    print_table(wide, pipe)
    assert pipe.getvalue().splitlines()[-2].split("0.700 [0.540, 1.000]")[0].strip() == "random removal"
    assert pipe.getvalue().count("0.700 [0.540, 1.000]") == 8
    monkeypatch.setenv("COLUMNS", "110")
    print_table(wide, terminal)
    shown = Text.from_ansi(terminal.getvalue()).plain
    assert max(map(len, shown.splitlines())) <= 110
    words = shown.split()
    assert {"random", "removal"} <= set(words) and words.count("0.700") == words.count("1.000]") == 8


# --- marks -----------------------------------------------------------------------------------------------------------

MARKED = Table(
    "AUC",
    ("method", "auc"),
    [
        ("a", Estimate(0.7, 0.6, 0.8, "best")),
        ("b", Estimate(0.68, 0.5, 0.8, "tied")),
        ("c", Estimate(0.5, 0.4, 0.6)),
        ("d", Estimate(None, None, None)),
    ],
)


def test_marks_are_shown_and_explained_in_each_notation() -> None:
    markdown = to_markdown(MARKED).splitlines()
    assert markdown[0] == "AUC; **best**; _not distinguishable from the best_"
    assert markdown[4:7] == [
        "| a | **0.700 [0.600, 0.800]** |",
        "| b | _0.680 [0.500, 0.800]_ |",
        "| c | 0.500 [0.400, 0.600] |",
    ]
    latex = to_latex(MARKED).splitlines()
    assert latex[0] == r"% AUC; \textbf{best}; \underline{not distinguishable from the best}"
    assert r"a & \textbf{0.700 [0.600, 0.800]} \\" in latex
    assert r"b & \underline{0.680 [0.500, 0.800]} \\" in latex
    assert r"c & 0.500 [0.400, 0.600] \\" in latex


def test_marks_are_read_in_a_terminal_without_styles_and_digits_stay_below_each_other() -> None:
    stream = io.StringIO()
    print_table(replace(MARKED, columns=("method", "auc_of_all_targets_of_this_run_against_random")), stream)
    lines = stream.getvalue().splitlines()
    assert lines[0].rstrip() == "AUC; * best; = not distinguishable from the best"
    assert any("* 0.700 [" in line for line in lines) and any("= 0.680 [" in line for line in lines)
    assert len({line.index("[") for line in lines if "[" in line}) == 1


def test_numbers_stay_unmarked_in_the_csv() -> None:
    unmarked = replace(MARKED, rows=[(name, replace(cell, mark="")) for name, cell in MARKED.rows])
    assert to_csv(MARKED) == to_csv(unmarked)
    assert to_markdown(MARKED) != to_markdown(unmarked)


def test_only_marks_that_a_table_has_are_explained() -> None:
    alone = replace(MARKED, rows=[MARKED.rows[0], MARKED.rows[2]])
    assert to_markdown(alone).splitlines()[0] == "AUC; **best**"
    assert to_markdown(TABLE).splitlines()[0] == "what it is"


@pytest.mark.parametrize(
    ("higher_is_better", "marks"), [(True, ["", "best", "tied", ""]), (False, ["best", "", "tied", ""])]
)
def test_the_best_and_those_that_the_caller_cannot_tell_from_it_are_marked(
    higher_is_better: bool, marks: list[str]
) -> None:
    estimates = [Estimate(value, None, None) for value in (-0.3, 0.4, 0.2, None)]
    asked = []

    def distinguishable(place: int, best: int) -> bool:
        asked.append((place, best))
        return place != 2

    found = marked(estimates, distinguishable, higher_is_better)
    assert [estimate.mark for estimate in found] == marks
    assert [replace(estimate, mark="") for estimate in found] == estimates
    assert {best for _, best in asked} == {marks.index("best")}


def test_nothing_is_best_where_nothing_has_a_value() -> None:
    estimates = [Estimate(None, None, None)] * 2
    assert marked(estimates, lambda place, best: False) == estimates
