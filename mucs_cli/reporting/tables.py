"""One table of results as CSV, Markdown, LaTeX and in the terminal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from mucs_cli.text import csv_text, inert, printable

DIGITS = 3
MISSING = "–"
PIPE_WIDTH, UNLIMITED = 160, 10_000
"""Columns where the output is no terminal: more where a table is wider, so that no cell is cut."""
NAME_WIDTH = 8
"""Least width of a column of names on a terminal."""
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MISSING: "--",
    "<": r"\textless{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}

Mark = Literal["", "best", "tied"]
MARKS: dict[Mark, str] = {"best": "best", "tied": "not distinguishable from the best"}
"""What each mark says; the title of a table with marks explains those it has, written as they are in its cells."""
IN_MARKDOWN = {"": "{}", "best": "**{}**", "tied": "_{}_"}
IN_LATEX = {"": "{}", "best": r"\textbf{{{}}}", "tied": r"\underline{{{}}}"}
IN_TERMINAL = {"": "{}", "best": "* {}", "tied": "= {}"}
"""Signs, as styles are lost where the output is no terminal; in front, so that digits stay below each other."""
TERMINAL_STYLES = {"": "", "best": "bold", "tied": "underline"}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; None for what cannot be told. ``mark``: see ``marked``."""

    value: float | None
    low: float | None
    high: float | None
    mark: Mark = ""


Cell = str | int | float | None | Estimate


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: one line, with what the numbers are.
        columns: names, as words with underscores.
        rows: a cell a column; a column has cells of one kind, or None. Numbers are shown with three decimals, positive
            ones that would be 0 as "< 0.001"; the CSV has them in full, and an estimate as three columns: ``x``,
            ``x_low``, ``x_high``.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def is_text(self, column: int) -> bool:
        return all(isinstance(row[column], str) for row in self.rows)

    def marks(self) -> list[Mark]:
        """The kinds of marks that it has."""
        found = {mark_of(cell) for row in self.rows for cell in row}
        return [mark for mark in MARKS if mark in found]


def marked(
    estimates: Sequence[Estimate], distinguishable: Callable[[int, int], bool], higher_is_better: bool = True
) -> list[Estimate]:
    """The estimates with the best one marked, and those that may be as good.

    Args:
        estimates: what is compared; one without a value gets no mark. Of equal ones the first is the best.
        distinguishable: whether the i-th estimate differs from the best one: ``distinguishable(i, best)``. Of samples
            that belong together, such as methods judged on the same queries, that is whether the interval of their
            differences leaves out 0; whether their own intervals meet does not tell.
        higher_is_better: else the lowest is the best.
    """
    values = {place: estimate.value for place, estimate in enumerate(estimates) if estimate.value is not None}
    if not values:
        return list(estimates)
    best = (max if higher_is_better else min)(values, key=values.__getitem__)

    def mark(place: int) -> Mark:
        if place == best:
            return "best"
        return "tied" if place in values and not distinguishable(place, best) else ""

    return [replace(estimate, mark=mark(place)) for place, estimate in enumerate(estimates)]


def leaves_out_zero(low: float | None, high: float | None) -> bool:
    """Whether an interval is known, and all of it on one side of 0."""
    return low is not None and high is not None and not low <= 0 <= high


def to_csv(table: Table) -> str:
    wide = [any(isinstance(row[column], Estimate) for row in table.rows) for column in range(len(table.columns))]
    names: list[str] = []
    for name, is_wide in zip(table.columns, wide, strict=True):
        names += [name, f"{name}_low", f"{name}_high"] if is_wide else [name]
    rows: list[list[Cell]] = [list(names)]
    for row in table.rows:
        cells: list[Cell] = []
        for cell in row:
            cells += [cell.value, cell.low, cell.high] if isinstance(cell, Estimate) else [cell]
        rows.append(["" if cell is None else f"{cell:.9g}" if isinstance(cell, float) else cell for cell in cells])
    return csv_text([inert(cell) for cell in row] for row in rows)


def to_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    rule = [":--" if table.is_text(column) else "--:" for column in range(len(table.columns))]
    body = "".join(line([IN_MARKDOWN[mark_of(cell)].format(cell_text(cell)) for cell in row]) for row in table.rows)
    head = line([heading(name) for name in table.columns]) + line(rule)
    return f"{title_with_marks(table, IN_MARKDOWN)}\n\n{head}{body}"


def to_latex(table: Table) -> str:
    """A ``tabular`` of the package booktabs; the title is a comment above it."""

    def line(cells: Sequence[Cell]) -> str:
        return " & ".join(IN_LATEX[mark_of(cell)].format(latex_text(cell_text(cell))) for cell in cells) + r" \\"

    alignment = "".join("l" if table.is_text(column) else "r" for column in range(len(table.columns)))
    lines = [
        f"% {title_with_marks(table, IN_LATEX)}",
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        line([heading(name) for name in table.columns]),
        r"\midrule",
        *(line(row) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def print_table(table: Table, stream: TextIO) -> None:
    """Prints it: in full where the output is no terminal; on one, cells break at spaces and no name disappears."""
    title = Text(printable(title_with_marks(table, IN_TERMINAL)))
    shown = RichTable(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(table.columns):
        is_text = table.is_text(column)
        word = max((len(word) for row in table.rows for word in cell_text(row[column]).split()), default=0)
        least = min(word, NAME_WIDTH) if is_text else word
        shown.add_column(
            Text(printable(heading(name))), justify="left" if is_text else "right", overflow="fold", min_width=least
        )
    for row in table.rows:
        marks = [mark_of(cell) for cell in row]
        texts = [IN_TERMINAL[mark].format(cell_text(cell)) for mark, cell in zip(marks, row, strict=True)]
        shown.add_row(*(Text(printable(text), TERMINAL_STYLES[mark]) for mark, text in zip(marks, texts, strict=True)))
    width = None if stream.isatty() else max(PIPE_WIDTH, Console(width=UNLIMITED).measure(shown).maximum)
    Console(file=stream, highlight=False, width=width).print(shown)


def mark_of(cell: Cell) -> Mark:
    return cell.mark if isinstance(cell, Estimate) else ""


def title_with_marks(table: Table, notation: Mapping[str, str]) -> str:
    """The title, with what the table's marks mean where it has any."""
    return "; ".join([table.title, *(notation[mark].format(MARKS[mark]) for mark in table.marks())])


def latex_text(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in text)


def heading(name: str) -> str:
    return name.replace("_", " ")


def cell_text(cell: Cell) -> str:
    """As people read it."""
    if cell is None:
        return MISSING
    if isinstance(cell, Estimate):
        if cell.value is None:
            return MISSING
        interval = "" if cell.low is None or cell.high is None else f" [{cell.low:.{DIGITS}f}, {cell.high:.{DIGITS}f}]"
        return f"{cell.value:.{DIGITS}f}{interval}"
    if not isinstance(cell, float):
        return str(cell)
    least = 10**-DIGITS
    return f"< {least}" if 0 < cell < least / 2 else f"{cell:.{DIGITS}f}"  # a small p is no 0
