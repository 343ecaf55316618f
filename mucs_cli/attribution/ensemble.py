"""Several methods' scores as one, and how much the methods differ: without difference there is nothing to gain.

Each query is combined by itself. A member that gives a query the same score for every image says nothing about it and
is left out there, with its weight; where all do, the combined score is 0.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mucs_cli.attribution.ranks import average_ranks, shared_worth, top

Row = NDArray[np.float64]
WINSOR = 5.0


# --- combination -----------------------------------------------------------------------------------------------------


def rank_mean(members: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean over members of the average rank, 1 for the lowest score.

    Args:
        members: scores of M methods, higher is more influential; [M, Q, N], finite.
        weights: M numbers >= 0, not all 0; None for equal ones.
    Returns:
        [Q, N], float32; in [1, N].
    Raises:
        ValueError: the members or the weights are not as above.
    """
    return combine(members, average_ranks, weights)


def z_mean(members: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean over members of z = (s - mean) / (sd + 1e-9), limited to [-5, 5]; sd with divisor N.

    Arguments and errors as in ``rank_mean``.

    Returns:
        [Q, N], float32; in [-5, 5].
    """
    return combine(members, z_scores, weights)


def borda(members: Tensor, k: int, weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean over members of the points k - rank + 1 of the k highest scores (rank 1 is the highest), else 0.

    Equal scores share the points of their places, so that every member gives k (k + 1) / 2 in all where k <= N.

    Args:
        k: how many images of each member get points, >= 1.
        members, weights: as in ``rank_mean``.
    Returns:
        [Q, N], float32; in [0, k].
    Raises:
        ValueError: as in ``rank_mean``, or k < 1.
    """
    if k < 1:
        raise ValueError(f"the top {k}")
    points = np.maximum(np.arange(1.0, members.shape[-1] + 1) - (members.shape[-1] - k), 0.0)  # of the lowest first
    return combine(members, lambda row: shared_worth(row, points), weights)


def combine(members: Tensor, transform: Callable[[Row], Row], weights: Sequence[float] | None) -> Tensor:
    """Weighted mean of the transformed scores, in float64; float32 [Q, N]. As ``rank_mean`` says."""
    check(members)
    share = [1.0] * len(members) if weights is None else [float(weight) for weight in weights]
    if len(share) != len(members) or min(share) < 0 or not 0 < sum(share) < float("inf"):
        raise ValueError(f"weights {share} of {len(members)} members")
    combined = torch.zeros(members.shape[1:], dtype=torch.float32)
    for query, rows in enumerate(members.transpose(0, 1)):
        parts = [(transform(row), weight) for row, weight in zip(wide(rows), share, strict=True) if says_something(row)]
        total = sum(weight for _, weight in parts)
        if total > 0:
            combined[query] = torch.from_numpy(sum(values * weight for values, weight in parts) / total)
    return combined


def z_scores(row: Row) -> Row:
    """[N] -> [N], mean 0, sd 1, then limited; the row is not constant."""
    centred = row - row.mean()
    # First to a span of order 1: gradient scores may be far below 1e-9, which must not silence their member.
    centred /= np.abs(centred).max()
    limited: Row = np.clip(centred / (centred.std() + 1e-9), -WINSOR, WINSOR)
    return limited


# --- diversity -------------------------------------------------------------------------------------------------------


def rank_correlations(members: Tensor) -> Tensor:
    """Spearman's correlation of every two members, with average ranks; mean over queries.

    Args:
        members: [M, Q, N], finite.
    Returns:
        [M, M], float64, in [-1, 1]; of the queries where neither member is constant, NaN where there is none.
    """

    def correlation(rows: list[Row]) -> NDArray[np.float64]:
        ranks = np.stack([average_ranks(row) for row in rows])
        centred = ranks - ranks.mean(axis=1, keepdims=True)
        unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        product: NDArray[np.float64] = np.clip(unit @ unit.T, -1.0, 1.0)
        return product

    return mean_over_queries(members, correlation)


def top_overlaps(members: Tensor, k: int) -> Tensor:
    """The share of every two members' k highest scores that both have; mean over queries.

    Args:
        members: [M, Q, N], finite.
        k: >= 1; N where it is more.
    Returns:
        [M, M], float64, in [0, 1]; of the queries where neither member is constant, NaN where there is none.
    Raises:
        ValueError: k < 1.
    """
    if k < 1:
        raise ValueError(f"the top {k}")

    def shared(rows: list[Row]) -> NDArray[np.float64]:
        is_top = np.zeros((len(rows), len(rows[0])))
        for flags, row in zip(is_top, rows, strict=True):
            flags[top(row, k)] = 1
        common: NDArray[np.float64] = is_top @ is_top.T / min(k, is_top.shape[1])
        return common

    return mean_over_queries(members, shared)


def mean_over_queries(members: Tensor, compare: Callable[[list[Row]], NDArray[np.float64]]) -> Tensor:
    """The mean of a query's [M', M'] comparison of its M' members that are not constant; [M, M]."""
    check(members)
    total, count = np.zeros((len(members), len(members))), np.zeros((len(members), len(members)))
    for rows in members.transpose(0, 1):
        ready = wide(rows)
        kept = [index for index, row in enumerate(ready) if says_something(row)]
        if kept:
            total[np.ix_(kept, kept)] += compare([ready[index] for index in kept])
            count[np.ix_(kept, kept)] += 1
    mean = np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
    return torch.from_numpy(mean)


# --- both ------------------------------------------------------------------------------------------------------------


def check(members: Tensor) -> None:
    if members.ndim != 3 or 0 in members.shape or not bool(members.isfinite().all()):
        raise ValueError(f"members of shape {tuple(members.shape)}; expected finite scores, [M, Q, N]")


def wide(rows: Tensor) -> list[Row]:
    """One query's scores of each member, in float64."""
    return list(rows.double().numpy())


def says_something(row: Row) -> bool:
    return bool(row.max() > row.min())
