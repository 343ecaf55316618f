"""Finished evaluations of a run as the report shows them: table, charts and what they are of, whatever the kind."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mucs_cli.artifacts import is_fingerprint, read_file
from mucs_cli.errors import DamagedError
from mucs_cli.records import flatten
from mucs_cli.reporting.csv_rows import read_rows
from mucs_cli.reporting.facts import duration, value_text
from mucs_cli.reporting.results import RunResults, optional_manifest
from mucs_cli.reporting.tables import Cell, Estimate, Table, cell_text, heading

BOUNDS = ("_low", "_high")
RASTER = b"<image"
"""What an SVG holds that shows pictures; line art has none."""
MARKS = {"best": re.compile(r"\*\*(.*)\*\*"), "tied": re.compile("_(.*)_")}
"""How table.md marks the best of a column, and what is not distinguishable from it."""


@dataclass(frozen=True)
class Chart:
    """A chart; ``title`` is its file's name as words."""

    title: str
    uri: str


@dataclass(frozen=True)
class CellView:
    """One cell of a table.

    Args:
        text: as people read it.
        mark: a key of ``MARKS``, or "".
        is_number: whether its column holds numbers.
        span: how many rows it stands for; 0 where one above stands for it.
    """

    text: str
    mark: str
    is_number: bool
    span: int


@dataclass(frozen=True)
class EvaluationView:
    """One finished evaluation.

    Args:
        name: of its folder and kind.
        facts: what it is of and when it was made, name and value.
        title: of the table.
        columns: names; those that hold numbers are in ``numeric``.
        rows: of cells.
        marks: those that there are.
        num_left_out: charts that hold pictures, which this report is not to show.
        outdated: variants whose scores have changed since.
    """

    name: str
    facts: list[tuple[str, str]]
    title: str
    columns: list[str]
    numeric: list[bool]
    rows: list[list[CellView]]
    marks: list[str]
    charts: list[Chart]
    num_left_out: int
    outdated: list[str]


def evaluation_views(results: RunResults, images: bool) -> list[EvaluationView]:
    """All finished evaluations, by name.

    Args:
        results: of the run.
        images: whether charts that hold pictures are shown.

    Raises:
        UserError: a file is missing or damaged.
    """
    return [evaluation_view(results, name, manifest, images) for name, manifest in results.evaluations.items()]


def evaluation_view(results: RunResults, name: str, manifest: dict[str, Any], images: bool) -> EvaluationView:
    folder = results.run / "evaluate" / name
    table, marks = read_table(folder, manifest)
    files = [file for file in manifest.get("outputs", {}) if file.startswith("charts/") and file.endswith(".svg")]
    drawings = {file: read_file(folder, manifest, file) for file in files}
    shown = {file: svg for file, svg in drawings.items() if images or RASTER not in svg}
    numeric = [not table.is_text(column) for column in range(len(table.columns))]
    spans = row_spans(table)
    return EvaluationView(
        name=name,
        facts=evaluation_facts(manifest),
        title=table.title,
        columns=[heading(column) for column in table.columns],
        numeric=numeric,
        rows=[
            [
                CellView(cell_text(cell), mark if isinstance(cell, Estimate) else "", is_number, span)
                for cell, mark, is_number, span in zip(cells, marks_of_row, numeric, spans_of_row, strict=True)
            ]
            for cells, marks_of_row, spans_of_row in zip(table.rows, marks, spans, strict=True)
        ],
        marks=[mark for mark in MARKS if any(mark in row for row in marks)],
        charts=[
            Chart(heading(PurePosixPath(file).stem), "data:image/svg+xml;base64," + base64.b64encode(svg).decode())
            for file, svg in shown.items()
        ],
        num_left_out=len(drawings) - len(shown),
        outdated=outdated_variants(results.run, manifest),
    )


def read_table(folder: Path, manifest: dict[str, Any]) -> tuple[Table, list[list[str]]]:
    """The table of an evaluation, and for each row the mark of each cell.

    Raises:
        UserError: a file is missing or damaged, or the two do not fit each other.
    """
    markdown = read_file(folder, manifest, "table.md").decode(errors="replace").splitlines()
    read_file(folder, manifest, "table.csv")
    lines = markdown[4:]  # below title, empty line, columns and rule
    marks = [[mark_of(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    rows = read_rows(folder / "table.csv", "evaluate")
    try:
        table = as_table(without_legend(markdown[0]), rows)
        shape = [len(table.columns)] * len(table.rows)
    except (IndexError, ValueError):  # no title, or a bound that is no number
        shape = None
    if shape is None or [len(row) for row in marks] != shape:
        raise DamagedError(
            str(folder / "table.md"),
            f"does not fit {folder / 'table.csv'}. Rerun mucs evaluate with overwrite=true.",
        )
    return table, marks


def row_spans(table: Table) -> list[list[int]]:
    """How many rows each cell stands for: names that repeat from row to row, from the left, are told once; 0: above."""
    spans = [[1] * len(table.columns) for _ in table.rows]
    num_names = next((column for column in range(len(table.columns)) if not table.is_text(column)), len(table.columns))
    for column in range(num_names):
        first = 0
        for row in range(1, len(table.rows)):
            if table.rows[row][: column + 1] == table.rows[first][: column + 1]:
                spans[first][column] += 1
                spans[row][column] = 0
            else:
                first = row
    return spans


def mark_of(cell: str) -> str:
    """The mark of a cell of table.md, a key of ``MARKS``; "" for none."""
    return next((mark for mark, pattern in MARKS.items() if pattern.fullmatch(cell.strip())), "")


def without_legend(title: str) -> str:
    """The title of table.md without what explains its marks."""
    return "; ".join(clause for clause in title.split("; ") if not mark_of(clause))


def evaluation_facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    inputs, config = manifest.get("inputs", {}), flatten(manifest.get("config", {}).get("evaluation", {}))
    settings = [f"{key} {value_text(value)}" for key, value in config.items() if key != "name" and value is not None]
    ended = manifest.get("ended", "–")
    found = [("made", f"{ended.replace('T', ' ').replace('+00:00', ' UTC')}, in {duration(manifest.get('seconds'))}")]
    named = ((key, inputs[key]) for key in ("variants", "queries") if key in inputs)
    found += [(key, value_text(value)) for key, value in named if not is_fingerprint(value)]
    counts = manifest.get("counts", {}).items()
    found += [("counts", "; ".join(f"{heading(key)} {value_text(value)}" for key, value in counts))] if counts else []
    return [*found, ("settings", "; ".join(settings) or "the defaults")]


def outdated_variants(run: Path, manifest: dict[str, Any]) -> list[str]:
    """Variants whose scores are not those that were evaluated: scored again since, or deleted."""
    recorded = {
        key.removeprefix("scores of "): value
        for key, value in manifest.get("inputs", {}).items()
        if key.startswith("scores of ")
    }
    return [name for name, sha256 in recorded.items() if score_sha256(run / "score" / name) != sha256]


def score_sha256(folder: Path) -> str | None:
    outputs = optional_manifest(folder).get("outputs", {})
    sha256: str | None = outputs.get("scores.safetensors", {}).get("sha256")
    return sha256


def as_table(title: str, rows: Sequence[dict[str, str]]) -> Table:
    """A table of results from the rows of its CSV: ``x``, ``x_low``, ``x_high`` are one estimate again.

    Raises:
        ValueError: one of these is no number.
    """
    names = list(rows[0]) if rows else []
    estimates = {name for name in names if all(name + bound in names for bound in BOUNDS)}
    columns = [name for name in names if not any(name == other + bound for other in estimates for bound in BOUNDS)]
    cells = {name: numbers([row[name] for row in rows]) for name in names}
    shown: list[Sequence[Cell]] = []
    for column in columns:
        if column in estimates:
            numbers_of = [cells[column + end] for end in ("", *BOUNDS)]
            if any(isinstance(cell, str) for cells_of in numbers_of for cell in cells_of):
                raise ValueError(f"an estimate of {column} is no number")
            shown.append([Estimate(*values) for values in zip(*numbers_of, strict=True)])
        else:
            shown.append(cells[column])
    return Table(title, tuple(columns), list(zip(*shown, strict=True)))


def numbers(column: Sequence[str]) -> list[Any]:
    """Whole numbers where all cells are, else floats where all are, None for empty ones; else the text."""
    for kind in (int, float):
        try:
            return [kind(cell) if cell else None for cell in column]
        except ValueError:
            continue
    return list(column)
