import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from mucs_cli.evaluation.measures.retrieval import (
    average_precision,
    precision_at,
    random_average_precision,
    recall_at,
    relevant_by_id,
    relevant_by_value,
    retrieval,
)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0):
    return np.random.default_rng(seed)


# --- one query -------------------------------------------------------------------------------------------------------


def test_a_worked_example():
    scores, relevant = [0.9, 0.1, 0.8, 0.4, 0.3], [True, False, False, True, True]  # ranks 1, 3 and 4
    assert [precision_at(scores, relevant, k) for k in (1, 2, 4, 5)] == [1, 0.5, 0.75, 0.6]
    assert [recall_at(scores, relevant, k) for k in (1, 2, 4)] == pytest.approx([1 / 3, 1 / 3, 1])
    assert average_precision(scores, relevant) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


def test_average_precision_is_that_of_scikit_learn_without_ties():
    for seed in range(20):
        scores, relevant = draws(seed).normal(size=40), draws(100 + seed).random(40) < 0.2
        assert relevant.any()
        assert average_precision(scores, relevant) == pytest.approx(average_precision_score(relevant, scores))


def test_with_ties_every_number_is_its_mean_over_the_orders_of_the_ties():
    scores, relevant = np.array([2, 1, 1, 1, 1, 0, 0.0]), np.array([0, 1, 0, 1, 0, 1, 0], dtype=bool)
    orders = [
        [0, *middle, *last]
        for middle in itertools.permutations([1, 2, 3, 4])
        for last in itertools.permutations([5, 6])
    ]
    broken = []
    for order in orders:
        strict = np.empty(7)
        strict[order] = np.arange(7, 0, -1)
        broken.append(strict)
    for k in range(1, 8):
        expected = np.mean([precision_at(strict, relevant, k) for strict in broken])
        assert precision_at(scores, relevant, k) == pytest.approx(expected)
        assert recall_at(scores, relevant, k) == pytest.approx(expected * k / 3)
    expected = np.mean([average_precision(strict, relevant) for strict in broken])
    assert average_precision(scores, relevant) == pytest.approx(expected)
    assert np.ptp([average_precision(strict, relevant) for strict in broken]) > 0.1


def test_the_best_and_the_worst_ranking():
    relevant = np.arange(20) < 4
    assert average_precision(-np.arange(20.0), relevant) == precision_at(-np.arange(20.0), relevant, 4) == 1.0
    worst = np.arange(20.0)
    assert recall_at(worst, relevant, 16) == 0.0 and recall_at(worst, relevant, 20) == 1.0


def test_scores_that_are_no_numbers_rank_last():
    relevant = np.array([True, False, False])
    assert average_precision([np.nan, 0.0, -5.0], relevant) == pytest.approx(1 / 3)


def test_nothing_to_find_is_undefined_and_a_k_out_of_range_is_refused():
    assert np.isnan(average_precision([1.0, 2.0], [False, False])) and np.isnan(recall_at([1.0], [False], 1))
    assert precision_at([1.0, 2.0], [False, False], 1) == 0.0
    for k in (0, 3):
        with pytest.raises(ValueError, match="of 2 images"):
            precision_at([1.0, 2.0], [True, False], k)
    with pytest.raises(ValueError, match="expected"):
        average_precision([1.0, 2.0], [True])


@pytest.mark.parametrize(("num_examples", "num_relevant"), [(30, 1), (30, 7), (5, 5), (1, 1)])
def test_the_average_precision_of_chance_is_that_of_equal_scores_and_of_random_ones(num_examples, num_relevant):
    relevant = np.arange(num_examples) < num_relevant
    expected = random_average_precision(num_examples, num_relevant)
    assert average_precision(np.zeros(num_examples), relevant) == pytest.approx(expected)
    found = [average_precision(draws(seed).random(num_examples), relevant) for seed in range(1500)]
    assert np.mean(found) == pytest.approx(expected, abs=0.02)


# --- what should be found --------------------------------------------------------------------------------------------


def test_relevant_by_id_marks_the_columns_of_the_ids():
    found = relevant_by_id([[12, 30], [], [11]], [11, 12, 30, 31])
    assert found.astype(int).tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert relevant_by_id([], [1, 2]).shape == (0, 2)
    with pytest.raises(ValueError, match=r"\[13\] are not scored"):
        relevant_by_id([[12, 13]], [11, 12])


def test_relevant_by_value_matches_where_one_value_is_shared_and_nothing_matches_no_value():
    images = [{"ann"}, set(), {"bob", "cid"}, {"ann", "cid"}]
    found = relevant_by_value([{"ann"}, set(), {"bob", "dan"}, {"ann", "cid"}], images)
    assert found.astype(int).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]
    assert relevant_by_value([], images).shape == (0, 4)


# --- all queries -----------------------------------------------------------------------------------------------------


def test_planted_copies_are_found_and_chance_finds_few():
    sets = [[query, query + 20] for query in range(10)]
    relevant = relevant_by_id(sets, np.arange(200))
    scores = draws(1).random((10, 200)) + 2 * relevant
    found = retrieval(scores, relevant, 4, source())
    assert (found.precision.value, found.recall.value, found.average_precision.value) == (0.5, 1.0, 1.0)
    assert (found.random_precision, found.random_recall) == pytest.approx((0.01, 0.02))
    assert found.random_average_precision == pytest.approx(random_average_precision(200, 2)) and found.num_without == 0


def test_random_scores_agree_with_the_label_as_often_as_chance():
    relevant = relevant_by_value(
        list(map(str, draws(3).integers(0, 4, 150))), list(map(str, draws(2).integers(0, 4, 400)))
    )
    found = retrieval(draws(4).random((150, 400)), relevant, 20, source())
    for estimate, chance in (
        (found.precision, found.random_precision),
        (found.recall, found.random_recall),
        (found.average_precision, found.random_average_precision),
    ):
        assert estimate.value == pytest.approx(chance, abs=0.02)
        assert estimate.low is not None and chance is not None and estimate.high is not None
        assert estimate.low < chance < estimate.high
    informed = retrieval(draws(4).random((150, 400)) + 0.3 * relevant, relevant, 20, source())
    assert informed.precision.low is not None and informed.random_precision is not None
    assert informed.precision.low > informed.random_precision + 0.1


def test_queries_without_anything_to_find_are_left_out_and_counted():
    relevant = np.zeros((3, 5), dtype=bool)
    relevant[1, 2] = True
    found = retrieval(np.tile([0.0, 1, 9, 3, 4], (3, 1)), relevant, 1, source())
    assert (found.precision.value, found.precision.count, found.num_without) == (1.0, 1, 2)
    assert found.precision.low is None and found.random_precision == 0.2
    nothing = retrieval(np.zeros((2, 5)), np.zeros((2, 5), dtype=bool), 1, source())
    assert nothing.recall.value is None and nothing.random_recall is None and nothing.num_without == 2
