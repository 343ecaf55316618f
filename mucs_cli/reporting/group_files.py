"""``groups.csv``: the groups of every query of one variant."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mucs_cli.artifacts import write_text
from mucs_cli.reporting.groups import GROUP_COLUMNS, Grouping, group_row, group_scores
from mucs_cli.text import csv_text, inert


def write_groups(
    path: Path, groupings: Mapping[str, Grouping], scores: np.ndarray, query_ids: Sequence[int], k: int
) -> None:
    """Writes a row a query, column and group, unless the file says just that already.

    Args:
        path: the file.
        groupings: metadata column -> the groups of the N images; of none, only the header is written.
        scores: [Q, N] float32, images in the order of their ids.
        query_ids: Q ids, one a row of ``scores``.
        k: how many of a query's highest scores are its top, 1 to N.
    """
    rows: list[Sequence[Any]] = [GROUP_COLUMNS]
    for query, row in zip(query_ids, scores, strict=True):
        for column, grouping in groupings.items():
            rows += [group_row(query, column, group) for group in group_scores(row, grouping, k)]
    text = csv_text([inert(cell) for cell in row] for row in rows)
    if not path.exists() or path.read_bytes() != text.encode():
        write_text(path, text)
