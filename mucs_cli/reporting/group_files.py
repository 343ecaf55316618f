"""``groups.csv``: the groups of every query of one variant."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mucs_cli.artifacts import write_text
from mucs_cli.reporting.groups import GROUP_COLUMNS, Grouping, group_row, group_scores


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
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(GROUP_COLUMNS)
    for query, row in zip(query_ids, scores, strict=True):
        for column, grouping in groupings.items():
            rows.writerows(group_row(query, column, group) for group in group_scores(row, grouping, k))
    if not path.exists() or path.read_bytes() != text.getvalue().encode():
        write_text(path, text.getvalue())
