"""Rankings and groups in the terminal, as JSON and as CSV."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mucs_cli.reporting.group_views import share_text
from mucs_cli.reporting.groups import GROUP_COLUMNS, GroupScore, group_row
from mucs_cli.reporting.results import Ranked, RunResults, score_text
from mucs_cli.text import csv_text, inert, printable

Rankings = dict[int, list[Ranked]]
"""Query -> its ranked training images."""
Groups = dict[int, list[GroupScore]]
"""Query -> all its groups."""


@dataclass(frozen=True)
class Described:
    """Where a query comes from: its file and its metadata; None and nothing for a sampled one."""

    file: str | None
    metadata: dict[str, str]


def describe(results: RunResults, queries: Iterable[int]) -> dict[int, Described]:
    return {query: Described(results.query_file(query), results.query_metadata(query)) for query in queries}


def query_title(query: int, described: Described) -> Text:
    """``query 0``, with file and metadata where it has them."""
    title = Text(f"query {query}", style="bold")
    if described.file is not None:
        title.append(f"  {printable(described.file)}")
    values = [f"{printable(key)} {printable(value)}" for key, value in described.metadata.items() if value]
    return title.append("".join(f"  {value}" for value in values), style="not bold")


def print_tables(rankings: Rankings, described: dict[int, Described], heading: str, stream: TextIO) -> None:
    """A table for each query; fits 80 columns, long file names are folded."""
    console = Console(file=stream, highlight=False)
    console.print(Text(printable(heading)))
    for query, ranked in rankings.items():
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        columns = list(ranked[0].metadata) if ranked else []
        for name in ("rank", "example_id", "score"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("file", overflow="fold")
        for name in columns:
            table.add_column(Text(printable(name)), overflow="fold")
        for item in ranked:
            file = Text(printable(item.file))
            if item.exact_copy:
                file.append(" (exact copy)", style="yellow")
            values = [Text(printable(item.metadata[name])) for name in columns]
            table.add_row(str(item.rank), str(item.example_id), score_text(item.score), file, *values)
        console.print(query_title(query, described[query]))
        console.print(table)


def print_group_tables(
    groups: Groups, described: dict[int, Described], column: str, k: int, num_shown: int, heading: str, stream: TextIO
) -> None:
    """A table for each query with its first ``num_shown`` groups; fits 80 columns, long names are folded."""
    console = Console(file=stream, highlight=False)
    console.print(Text(printable(heading)))
    for query, found in groups.items():
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)  # leaves names more room
        table.add_column(Text(printable(column)), overflow="fold")
        for name in ("images", "mean", "max", f"top-{k} mean", f"of top {k}", "of images"):
            table.add_column(name, justify="right", no_wrap=True)
        for group in found[:num_shown]:
            scores = [score_text(score) for score in (group.mean, group.max, group.top_k_mean)]
            shares = [share_text(share) for share in (group.share_of_top_k, group.share_of_images)]
            table.add_row(Text(printable(group.group)), f"{group.num_images:,}", *scores, *shares)
        console.print(query_title(query, described[query]))
        console.print(table)
        if len(found) > num_shown:
            console.print(f"and {len(found) - num_shown} more; k={len(found)} shows all\n")


def print_summary(rankings: Rankings, heading: str, stream: TextIO) -> None:
    """A few lines for each query: example_id, label and score of its top images, in columns."""
    console = Console(file=stream, highlight=False)
    console.print(Text(printable(heading)))
    entries = {query: [entry_text(item) for item in ranked] for query, ranked in rankings.items()}
    width = max((len(text) for texts in entries.values() for text in texts), default=0)
    per_line = max((console.width - 10) // (width + 3), 1)
    for query, texts in entries.items():
        for start in range(0, len(texts), per_line):
            line = Text(f"{f'query {query}' if start == 0 else '':<10}", style="bold")
            line.append(
                "   ".join(text.ljust(width) for text in texts[start : start + per_line]).rstrip(), style="not bold"
            )
            console.print(line, no_wrap=True, overflow="ellipsis")
    if any(item.exact_copy for ranked in rankings.values() for item in ranked):
        console.print("* an exact copy of the query")


def entry_text(item: Ranked) -> str:
    label = f" ({printable(item.metadata['label'])})" if item.metadata.get("label") else ""
    return f"{item.example_id}{label} {score_text(item.score)}{'*' if item.exact_copy else ''}"


def print_json(rankings: Rankings, described: dict[int, Described], facts: dict[str, Any], stream: TextIO) -> None:
    """One object: the facts, and under ``queries`` each query with its ranked images."""
    queries = [
        {
            **query_facts(query, described[query]),
            "images": [
                {
                    "rank": item.rank,
                    "example_id": item.example_id,
                    "file": item.file,
                    "score": item.score,
                    "exact_copy": item.exact_copy,
                    "metadata": item.metadata,
                }
                for item in ranked
            ],
        }
        for query, ranked in rankings.items()
    ]
    stream.write(json.dumps({**facts, "queries": queries}, indent=2) + "\n")


def print_groups_json(groups: Groups, described: dict[int, Described], facts: dict[str, Any], stream: TextIO) -> None:
    """One object: the facts, and under ``queries`` each query with all its groups."""
    queries = [
        {**query_facts(query, described[query]), "groups": [asdict(group) for group in found]}
        for query, found in groups.items()
    ]
    stream.write(json.dumps({**facts, "queries": queries}, indent=2) + "\n")


def query_facts(query: int, described: Described) -> dict[str, Any]:
    return {"query": query, "query_file": described.file, "query_metadata": described.metadata}


def print_groups_csv(groups: Groups, column: str, stream: TextIO) -> None:
    """A row for each query and group, after a header; the columns of ``groups.csv``."""
    rows = (group_row(query, column, group) for query, found in groups.items() for group in found)
    write_rows([GROUP_COLUMNS, *rows], stream)


def print_csv(rankings: Rankings, metadata: Sequence[str], stream: TextIO) -> None:
    """A row for each image, after a header; the columns of ``top.csv``, ``exact_copy``, then the data's metadata."""
    header = ["query", "rank", "example_id", "file", "score", "exact_copy", *metadata]
    write_rows([header, *csv_rows(rankings, metadata)], stream)


def write_rows(rows: Iterable[Sequence[Any]], stream: TextIO) -> None:
    """CSV that a spreadsheet does not compute; on a terminal, nothing in it steers that."""
    text = csv_text([inert(cell) for cell in row] for row in rows)
    stream.write(printable(text) if stream.isatty() else text)


def csv_rows(rankings: Rankings, metadata: Sequence[str]) -> Iterable[list[Any]]:
    for query, ranked in rankings.items():
        for item in ranked:
            facts = [item.rank, item.example_id, item.file, item.score, str(item.exact_copy).lower()]
            yield [query, *facts, *[item.metadata[name] for name in metadata]]
