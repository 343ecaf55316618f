import math

import pytest
import torch

from mucs_cli.attribution.similarity import (
    break_ties,
    condition_similarity,
    cosine,
    negative_distance,
    random_scores,
)

BOTH = pytest.mark.parametrize("similarity", [cosine, negative_distance])


def vectors(seed, count, width=48):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --- vectors ---------------------------------------------------------------------------------------------------------


def test_cosine_is_the_plain_loops():
    query, training = vectors(0, 3), vectors(1, 5)
    found = cosine(query, training)
    assert found.dtype == torch.float32 and found.shape == (3, 5)
    for q, left in enumerate(query.tolist()):
        for i, right in enumerate(training.tolist()):
            dot = sum(a * b for a, b in zip(left, right, strict=True))
            assert float(found[q, i]) == pytest.approx(dot / math.hypot(*left) / math.hypot(*right), abs=1e-7)


def test_distance_is_the_plain_loops_and_nearer_is_higher():
    query, training = vectors(0, 3), vectors(1, 5)
    found = negative_distance(query, training)
    assert found.dtype == torch.float32 and found.shape == (3, 5)
    for q, left in enumerate(query.tolist()):
        for i, right in enumerate(training.tolist()):
            assert float(found[q, i]) == pytest.approx(-math.dist(left, right), rel=1e-6)
    near = query[:1] + torch.tensor([0.01, 1.0])[:, None]
    assert negative_distance(query[:1], near).diff() < 0


def test_a_copy_scores_one_by_cosine_and_zero_by_distance_and_ranks_first():
    training = vectors(2, 200)
    assert torch.equal(cosine(training, training).diagonal(), torch.ones(200))
    assert torch.equal(negative_distance(training, training).diagonal(), torch.zeros(200))
    for similarity in (cosine, negative_distance):
        assert similarity(training[17:18], training).argmax() == 17


def test_near_copies_far_from_the_origin_keep_their_order_by_distance():
    query = vectors(3, 1) + 1000
    offsets = torch.tensor([0.0, 0.01, 0.02, 0.03])
    found = negative_distance(query, query + offsets[:, None])[0]
    assert (found.diff() < 0).all() and found[0] == 0


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 7.0, 1e30])
def test_cosine_does_not_change_with_the_scale_of_either_side(factor):
    query, training = vectors(0, 3), vectors(1, 5)
    expected = cosine(query, training)
    assert torch.allclose(cosine(query * factor, training), expected, rtol=0, atol=1e-6)
    assert torch.allclose(cosine(query, training * factor), expected, rtol=0, atol=1e-6)
    assert torch.allclose(cosine(-query, training), -expected, rtol=0, atol=1e-7)


def test_a_zero_vector_has_cosine_zero_with_everything():
    zero, some = torch.zeros(1, 48), vectors(0, 4)
    assert torch.equal(cosine(zero, some), torch.zeros(1, 4))
    assert torch.equal(cosine(some, zero), torch.zeros(4, 1))
    assert torch.equal(cosine(zero, zero), torch.zeros(1, 1))


@BOTH
def test_a_row_depends_on_neither_the_other_queries_nor_its_neighbours_in_a_block(similarity):
    query, training = vectors(0, 7, 3072), vectors(1, 32, 3072)
    whole = similarity(query, training)
    order = torch.tensor([5, 0, 3])
    assert torch.equal(similarity(query[order], training), whole[order])
    neighbours = training.clone()
    neighbours[16:] = vectors(9, 16, 3072) * 100
    assert torch.equal(similarity(query, neighbours)[:, :16], whole[:, :16])
    assert not torch.equal(similarity(query, neighbours)[:, 16:], whole[:, 16:])
    alone = torch.cat([similarity(query, training[i : i + 1]) for i in range(32)], dim=1)
    assert torch.allclose(alone, whole, rtol=1e-6, atol=1e-7)


@BOTH
def test_vectors_of_different_lengths_are_refused(similarity):
    with pytest.raises(ValueError, match="shapes"):
        similarity(vectors(0, 2, 3), vectors(0, 2, 4))
    assert similarity(vectors(0, 0, 3), vectors(0, 2, 3)).shape == (0, 2)


# --- conditions ------------------------------------------------------------------------------------------------------


def test_labels_score_one_where_they_are_the_same_which_is_the_cosine_of_their_one_hot_vectors():
    query, training = torch.tensor([2, 0]), torch.tensor([0, 1, 2, 2])
    found = condition_similarity(query, training)
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]))
    one_hot = torch.nn.functional.one_hot
    assert torch.equal(found, cosine(one_hot(query, 3).float(), one_hot(training, 3).float()))


def test_condition_vectors_score_by_cosine_of_the_first_caption():
    query, training = vectors(0, 2), vectors(1, 4)
    expected = cosine(query, training)
    assert torch.equal(condition_similarity(query, training), expected)
    captions = torch.stack([training, vectors(5, 4)], dim=1)
    assert torch.equal(condition_similarity(query, captions), expected)
    assert not torch.equal(condition_similarity(query, captions.flip(1)), expected)


def test_labels_are_not_compared_with_vectors():
    with pytest.raises(ValueError, match="conditions"):
        condition_similarity(torch.tensor([0]), vectors(0, 4))


# --- chance ----------------------------------------------------------------------------------------------------------


def test_a_querys_random_scores_depend_on_its_id_and_the_seed_alone():
    whole = random_scores(0, range(5), 40)
    assert whole.dtype == torch.float32 and whole.shape == (5, 40)
    assert torch.equal(random_scores(0, [4, 1], 40), whole[[4, 1]])
    assert not torch.equal(random_scores(1, [4, 1], 40), whole[[4, 1]])


def test_random_scores_are_uniform_and_queries_are_independent():
    scores = random_scores(3, range(20), 5000)
    assert float(scores.min()) >= 0 and float(scores.max()) < 1
    counts = torch.histc(scores, 10, 0, 1)  # 10 000 a bin, sd 95
    assert (counts - 10_000).abs().max() < 500
    correlation = torch.corrcoef(scores.double()) - torch.eye(20)
    assert correlation.abs().max() < 5 / math.sqrt(5000)


def test_ties_are_broken_at_random_and_distinct_scores_keep_their_order():
    scores = torch.tensor([0.0, 1.0] * 500 + [0.5, -2.0, 0.25])
    found = break_ties(scores, 0, 7)
    assert len(found.unique()) == len(scores)
    for left, right in ((-2.0, 0.0), (0.0, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert found[scores == left].max() < found[scores == right].min()
    assert float((found - scores).abs().max()) < 500 * 2.0**-23
    assert (found[scores == 0] >= 0).all()
    place = found[scores == 1].argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([place, torch.arange(500).double()]))[0, 1])) < 0.2


def test_scores_without_ties_are_left_as_they_are():
    scores = torch.cat([vectors(0, 1, 1000)[0], torch.tensor([0.0, 3e38, -3e38, 2.0**-126])])
    assert torch.equal(break_ties(scores, 0, 0), scores)


def test_the_order_of_ties_is_reproducible_and_differs_between_queries_and_seeds():
    scores = torch.zeros(100)
    first = break_ties(scores, 0, 3)
    assert torch.equal(break_ties(scores, 0, 3), first)
    assert not torch.equal(break_ties(scores, 0, 4), first)
    assert not torch.equal(break_ties(scores, 1, 3), first)


def test_many_ties_just_below_another_score_stay_below_it():
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    scores = torch.cat([torch.full((50,), 1.0), above[None], torch.full((50,), -1.0), torch.tensor([-0.0, 1e-45])])
    found = break_ties(scores, 0, 0)
    assert len(found.unique()) == len(scores)
    assert found[50] > found[:50].max() and found[51:101].max() < found[101:].min()
    assert (found == 0).sum() == 1 and found[101:].max() < 1e-37  # what is below the normal range ties with 0


def test_every_tied_score_is_equally_likely_to_rank_first():
    first = torch.stack([break_ties(torch.zeros(4), 0, query).argmax() for query in range(800)]).bincount(minlength=4)
    assert (first - 200).abs().max() < 5 * math.sqrt(800 * 0.25 * 0.75)


def test_scores_that_cannot_be_ordered_are_refused():
    for scores in (torch.tensor([0.0, float("nan")]), torch.zeros(2, 2), torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="finite float32 row"):
            break_ties(scores, 0, 0)
