"""Scores that need no diffusion model: how alike a query and a training image are, by pixels, embeddings or conditions.

A score of a query is computed by itself, in float64, and rounded to float32 once: it depends on neither the other
queries nor the other rows of a block of fixed shape.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mucs_cli.rng import generator

FLOAT32_SUBNORMALS = 0x007FFFFF


# --- vectors ---------------------------------------------------------------------------------------------------------


def cosine(query: Tensor, training: Tensor) -> Tensor:
    """Cosine of the angle between each query and each training vector; 0 where one of them is the zero vector.

    Args:
        query: [Q, d].
        training: a block of a fixed shape; [B, d].
    Returns:
        [Q, B], float32, in [-1, 1].
    Raises:
        ValueError: the lengths of the vectors differ.
    """
    unit = unit_vectors(training)
    return by_query(query, training, lambda vector: unit @ unit_vectors(vector))


def negative_distance(query: Tensor, training: Tensor) -> Tensor:
    """Minus the Euclidean distance between each query and each training vector, so that nearer is higher.

    Args:
        query: [Q, d].
        training: a block of a fixed shape; [B, d].
    Returns:
        [Q, B], float32, <= 0, in the unit of the vectors.
    Raises:
        ValueError: the lengths of the vectors differ.
    """
    wide = training.double()
    # Differences, not the expanded square: copies are at exactly 0 and near vectors lose no digits.
    return by_query(query, training, lambda vector: 0.0 - (wide - vector).square().sum(dim=1).sqrt())


def by_query(query: Tensor, training: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    """``score`` of one float64 query [d] after the other; float32 [Q, B]."""
    if query.ndim != 2 or training.ndim != 2 or query.shape[1] != training.shape[1]:
        raise ValueError(f"vectors of shapes {tuple(query.shape)} and {tuple(training.shape)}; expected [Q, d], [B, d]")
    rows = [score(vector).float() for vector in query.double()]
    return torch.stack(rows) if rows else query.new_zeros((0, len(training)), dtype=torch.float32)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Divided by their length, in float64; a zero vector stays zero. [..., d]."""
    wide = vectors.double()
    # By the largest entry first: the square of a tiny or huge entry would leave the range of floats.
    largest = wide.abs().amax(dim=-1, keepdim=True)
    scaled = wide / torch.where(largest > 0, largest, 1.0)
    length = scaled.square().sum(dim=-1, keepdim=True).sqrt()
    return scaled / torch.where(length > 0, length, 1.0)


def condition_similarity(query: Tensor, training: Tensor) -> Tensor:
    """Whether two labels are the same (the cosine of their one-hot vectors), or the cosine of two condition vectors.

    An image with several condition vectors, one a caption, counts with the first.

    Args:
        query: labels, int64 [Q], or vectors, floating [Q, d] or [Q, k, d].
        training: the same kind; [B], [B, d] or [B, k, d].
    Returns:
        [Q, B], float32; 0 or 1 for labels.
    Raises:
        ValueError: one side holds labels and the other vectors.
    """
    if query.is_floating_point() != training.is_floating_point() or (query.ndim == 1) != (training.ndim == 1):
        raise ValueError(f"conditions {query.dtype} {tuple(query.shape)}, {training.dtype} {tuple(training.shape)}")
    if query.ndim == 1:
        return (query[:, None] == training[None, :]).float()
    return cosine(first_vector(query), first_vector(training))


def first_vector(condition: Tensor) -> Tensor:
    return condition[:, 0] if condition.ndim == 3 else condition


# --- chance ----------------------------------------------------------------------------------------------------------


def random_scores(seed: int, query_ids: Sequence[int], num_examples: int) -> Tensor:
    """Uniform scores, the baseline of every comparison; one stream a query id, whatever other queries there are.

    Args:
        seed: the method's seed.
        query_ids: Q indices of queries.
        num_examples: N, training images.
    Returns:
        [Q, N], float32, in [0, 1).
    """
    scores = torch.empty(len(query_ids), num_examples)
    for row, query_id in zip(scores, query_ids, strict=True):
        row.uniform_(generator=generator(seed, "random_scores", query_id))
    return scores


def break_ties(scores: Tensor, seed: int, query_id: int) -> Tensor:
    """The same scores, with equal ones put into a random order by moving them up by the least float32 steps.

    Scores that differ keep their order, and their values as long as the tied ones below do not reach them. One-hot
    labels tie by the thousand; without this, the order of the files would decide which of them rank first. Numbers
    below the normal range of float32 count as 0, because accelerators may flush them.

    Args:
        scores: one query's; float32 [N], finite.
        seed: the method's seed.
        query_id: names the stream, so that a query's order does not depend on the other queries.
    Returns:
        [N], float32, all values distinct.
    Raises:
        ValueError: the scores are not one finite float32 row.
    """
    if scores.dtype != torch.float32 or scores.ndim != 1 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores {scores.dtype} {tuple(scores.shape)}; expected one finite float32 row")
    shuffled = torch.randperm(len(scores), generator=generator(seed, "ties", query_id))
    order = shuffled[torch.argsort(scores[shuffled], stable=True)]
    position = torch.arange(len(scores))
    # The least strictly increasing whole numbers that are nowhere below the scores' own.
    number = torch.cummax(float_to_number(scores[order]) - position, dim=0).values + position
    distinct = torch.empty_like(scores)
    distinct[order] = number_to_float(number)
    return distinct


def float_to_number(values: Tensor) -> Tensor:
    """Float32 as consecutive int64 in the same order, 0 at 0, without the subnormal ones."""
    magnitude = values.abs().view(torch.int32).long()  # IEEE 754: the bits of positive floats are ordered as they are
    return values.sign().long() * (magnitude - FLOAT32_SUBNORMALS).clamp(min=0)


def number_to_float(number: Tensor) -> Tensor:
    """The inverse of ``float_to_number``."""
    magnitude = torch.where(number == 0, 0, number.abs() + FLOAT32_SUBNORMALS)
    return magnitude.int().view(torch.float32) * number.sign()
