"""Scores summed up by group: which artist, which licence, which class.

A group is all scored images with one value in one metadata column. The top is the query's k highest scores; a group's
share of it stands beside the group's share of all images, which is what chance alone would give.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mucs_cli.errors import UserError, did_you_mean

NO_VALUE = "(none)"
"""The group of images whose cell is missing or empty."""
MAX_GROUPS = 50
"""A column of more values is not summed up unless it is asked for."""
MIN_K = 10

GROUP_COLUMNS = (
    "query",
    "column",
    "group",
    "num_images",
    "mean",
    "max",
    "top_k_mean",
    "share_of_top_k",
    "share_of_images",
)


@dataclass(frozen=True)
class Grouping:
    """Which group each image is in.

    Args:
        names: the G groups, sorted, each with at least one image.
        index: [N] int64, in 0..G-1.
    """

    names: list[str]
    index: NDArray[np.int64]

    @classmethod
    def of(cls, values: Sequence[str]) -> "Grouping":
        """Groups images by the value of a column; a cell that lists several values is one value.

        Args:
            values: N cells; empty ones form the group ``NO_VALUE``.
        """
        groups = [value if value.strip() else NO_VALUE for value in values]
        names = sorted(set(groups))
        number = {name: i for i, name in enumerate(names)}
        return cls(names, np.array([number[group] for group in groups], np.int64))


@dataclass(frozen=True)
class GroupScore:
    """What one query's scores say of one group.

    Args:
        group: the value that its images share.
        num_images: how many were scored.
        mean, max: over the group's scores.
        top_k_mean: mean of the group's own k highest scores, or of all where it has fewer.
        share_of_top_k: share of the query's k highest scores that belong to the group, in [0, 1].
        share_of_images: share of all scored images that do, in [0, 1].
    """

    group: str
    num_images: int
    mean: float
    max: float
    top_k_mean: float
    share_of_top_k: float
    share_of_images: float


@dataclass(frozen=True)
class GroupMean:
    """A group's shares, as means over several queries; ``num_images`` of the query where most were scored."""

    group: str
    num_images: int
    share_of_top_k: float
    share_of_images: float


def group_scores(scores: NDArray[np.float32], grouping: Grouping, k: int) -> list[GroupScore]:
    """The groups of one query, by share of the top, then by mean, highest first.

    Args:
        scores: [N], finite; of equal ones the earlier ranks higher.
        grouping: of the same images; a group without an image here is left out.
        k: how many of the highest scores are the top, 1 to N.

    Raises:
        ValueError: the lengths differ, or there is no such k.
    """
    if len(scores) != len(grouping.index) or not 1 <= k <= len(scores):
        raise ValueError(f"{len(scores)} scores, {len(grouping.index)} images in groups, k = {k}")
    order = np.argsort(-scores, kind="stable")
    in_top = np.bincount(grouping.index[order[:k]], minlength=len(grouping.names))
    num_images = np.bincount(grouping.index, minlength=len(grouping.names))
    # group after group, each with its highest score first
    sorted_scores = scores[order[np.argsort(grouping.index[order], kind="stable")]].astype(np.float64)
    ends = np.cumsum(num_images)
    found = []
    for name, count, top, end in zip(grouping.names, num_images, in_top, ends, strict=True):
        if count:
            own = sorted_scores[end - count : end]
            found.append(
                GroupScore(
                    group=name,
                    num_images=int(count),
                    mean=float(own.mean()),
                    max=float(own[0]),
                    top_k_mean=float(own[:k].mean()),
                    share_of_top_k=float(top / k),
                    share_of_images=float(count / len(scores)),
                )
            )
    return sorted(found, key=lambda g: (-g.share_of_top_k, -g.mean, g.group))


def mean_groups(queries: Sequence[Sequence[GroupScore]]) -> list[GroupMean]:
    """The groups of several queries, by mean share of the top, then by least share of the images.

    Args:
        queries: of each query all groups; a group that one lacks has no share there.
    """
    records: dict[str, list[GroupScore]] = {}
    for groups in queries:
        for group in groups:
            records.setdefault(group.group, []).append(group)
    found = [
        GroupMean(
            group=name,
            num_images=max(g.num_images for g in own),
            share_of_top_k=sum(g.share_of_top_k for g in own) / len(queries),
            share_of_images=sum(g.share_of_images for g in own) / len(queries),
        )
        for name, own in records.items()
    ]
    return sorted(found, key=lambda g: (-g.share_of_top_k, g.share_of_images, g.group))


# --- what is asked for -----------------------------------------------------------------------------------------------


def choose_groupings(
    asked: Sequence[str] | None, columns: Mapping[str, Sequence[str]], key: str
) -> dict[str, Grouping]:
    """The groupings of the columns that are asked for, in that order.

    Args:
        asked: names of columns; None: every column of 2 to ``MAX_GROUPS`` groups, and at most half as many as images.
        columns: metadata column -> N cells.
        key: the configuration key of ``asked``, for the message.

    Raises:
        UserError: there is no such column.
    """
    if asked is None:
        found = {name: Grouping.of(values) for name, values in columns.items()}
        return {
            name: grouping
            for name, grouping in found.items()
            if 2 <= len(grouping.names) <= min(MAX_GROUPS, len(grouping.index) // 2)
        }
    for name in asked:
        if name not in columns:
            known = f"one of {', '.join(columns)}" if columns else "a metadata column, but the data has none"
            raise UserError(key, f"got {name!r}; expected {known}.{did_you_mean(name, columns) or ' Correct it.'}")
    return {name: Grouping.of(columns[name]) for name in asked}


def choose_k(asked: int | None, num_images: int, key: str) -> int:
    """How many of a query's highest scores are its top; by default 1 % of the images, at least ``MIN_K``, at most all.

    Raises:
        UserError: more are asked for than there are.
    """
    if asked is None:
        return min(max(MIN_K, round(num_images / 100)), num_images)
    if asked > num_images:
        raise UserError(key, f"got {asked}; expected at most {num_images}, the training images scored. Choose fewer.")
    return asked


def group_row(query: int, column: str, group: GroupScore) -> list[Any]:
    """The values of ``GROUP_COLUMNS``; numbers with nine digits, which is all that float32 has."""
    numbers = (group.mean, group.max, group.top_k_mean, group.share_of_top_k, group.share_of_images)
    return [query, column, group.group, group.num_images, *[f"{number:.9g}" for number in numbers]]
