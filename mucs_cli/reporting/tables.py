"""One table of results as CSV, Markdown, LaTeX and in the terminal."""

import csv
import io
from dataclasses import dataclass
from typing import TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

DIGITS = 3
MISSING = "–"
PIPE_WIDTH = 160
"""Columns where the output is no terminal: enough that no cell is cut."""
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    MISSING: "--",
    **{character: "\\" + character for character in "&%$#_{}"},
}


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; None for what cannot be told."""

    value: float | None
    low: float | None
    high: float | None


Cell = str | int | float | None | Estimate


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: one line, with what the numbers are.
        columns: names, as words with underscores.
        rows: a cell a column; a column has cells of one kind, or None. Numbers are shown with three decimals; the CSV
            has them in full, and an estimate as three columns: ``x``, ``x_low``, ``x_high``.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]

    def is_text(self, column: int) -> bool:
        return all(isinstance(row[column], str) for row in self.rows)


def to_csv(table: Table) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    wide = [any(isinstance(row[column], Estimate) for row in table.rows) for column in range(len(table.columns))]
    names: list[str] = []
    for name, is_wide in zip(table.columns, wide, strict=True):
        names += [name, f"{name}_low", f"{name}_high"] if is_wide else [name]
    rows.writerow(names)
    for row in table.rows:
        cells: list[Cell] = []
        for cell in row:
            cells += [cell.value, cell.low, cell.high] if isinstance(cell, Estimate) else [cell]
        rows.writerow(["" if cell is None else f"{cell:.9g}" if isinstance(cell, float) else cell for cell in cells])
    return text.getvalue()


def to_markdown(table: Table) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"

    rule = [":--" if table.is_text(column) else "--:" for column in range(len(table.columns))]
    body = "".join(line([cell_text(cell) for cell in row]) for row in table.rows)
    return f"{table.title}\n\n" + line([heading(name) for name in table.columns]) + line(rule) + body


def to_latex(table: Table) -> str:
    """A ``tabular`` of the package booktabs; the title is a comment above it."""

    def line(cells: list[str]) -> str:
        return " & ".join("".join(LATEX.get(character, character) for character in cell) for cell in cells) + r" \\"

    alignment = "".join("l" if table.is_text(column) else "r" for column in range(len(table.columns)))
    lines = [
        f"% {table.title}",
        r"% needs \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        line([heading(name) for name in table.columns]),
        r"\midrule",
        *(line([cell_text(cell) for cell in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def print_table(table: Table, stream: TextIO) -> None:
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)
    shown = RichTable(title=Text(table.title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(table.columns):
        is_text = table.is_text(column)
        shown.add_column(heading(name), justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell_text(cell)) for cell in row))
    console.print(shown)


def heading(name: str) -> str:
    return name.replace("_", " ")


def cell_text(cell: Cell) -> str:
    """As people read it."""
    if cell is None:
        return MISSING
    if isinstance(cell, Estimate):
        interval = "" if cell.low is None or cell.high is None else f" [{cell_text(cell.low)}, {cell_text(cell.high)}]"
        return cell_text(cell.value) + interval
    return f"{cell:.{DIGITS}f}" if isinstance(cell, float) else str(cell)
