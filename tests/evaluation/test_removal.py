import numpy as np
import pytest

from mucs_cli.evaluation.measures.removal import (
    default_count,
    expected_union,
    own_and_others,
    random_matched,
    reference_partners,
    top_ids,
    union,
)
from mucs_cli.rng import generator


def draws(seed=0):
    return np.random.default_rng(seed)


# --- queries ---------------------------------------------------------------------------------------------------------


def test_no_query_is_its_own_reference_and_ten_rolls_compare_it_with_ten_others():
    partners = reference_partners(20)
    assert partners.shape == (10, 20) and (partners != np.arange(20)).all()
    assert all(len(set(column)) == 10 for column in partners.T.tolist())
    assert reference_partners(3).tolist() == [[1, 2, 0], [2, 0, 1]]
    assert reference_partners(1).shape == (0, 1)


# --- removed images --------------------------------------------------------------------------------------------------


def test_the_default_is_twice_one_percent():
    counts = [default_count(n) for n in (50_000, 118_287, 1797, 10)]
    assert counts == [1000, 2366, 36, 1]


def test_top_ids_are_the_highest_scores_with_nan_last():
    scores = np.array([[0.1, 0.9, np.nan, 0.5], [4.0, 3.0, 2.0, 1.0]])
    assert top_ids(scores, [10, 20, 30, 40], 3).tolist() == [[20, 40, 10], [10, 20, 30]]
    assert top_ids(scores, [10, 20, 30, 40], 4)[0, 3] == 30
    assert top_ids(np.zeros((0, 4)), [10, 20, 30, 40], 2).shape == (0, 2)
    with pytest.raises(ValueError, match="top 5"):
        top_ids(scores, [10, 20, 30, 40], 5)


def test_the_union_has_each_image_once_and_is_smaller_the_more_the_sets_overlap():
    same, apart = np.array([[3, 1, 2]] * 4), np.arange(12).reshape(4, 3)
    assert union(same).tolist() == [1, 2, 3]
    assert union(apart).tolist() == list(range(12))
    assert union([np.array([5]), np.array([7, 5])]).tolist() == [5, 7] and union([]).tolist() == []


def test_the_union_of_random_sets_has_its_expected_size():
    assert expected_union(50_000, 1000, 20) == pytest.approx(16_620, abs=1)
    sizes = [len(union(top_ids(draws(seed).random((8, 300)), np.arange(300), 15))) for seed in range(200)]
    assert np.mean(sizes) == pytest.approx(expected_union(300, 15, 8), abs=1.5)
    assert np.std(sizes) > 1


def test_matched_random_removal_has_the_size_of_the_union_and_other_images():
    ids = np.arange(500, 1000)
    removed = union(top_ids(draws(1).random((5, 500)), ids, 20))
    matched = random_matched(ids, len(removed), generator(0, "matched"))
    assert len(set(matched.tolist())) == len(removed) and set(matched.tolist()) <= set(ids.tolist())
    assert len(np.intersect1d(matched, removed)) < len(removed) / 2
    assert random_matched(ids, 500, generator(0, "matched")).tolist() == ids.tolist()
    with pytest.raises(ValueError, match="501 of 500"):
        random_matched(ids, 501, generator(0, "matched"))


def test_own_and_others_are_the_diagonal_and_the_mean_of_the_rest_of_the_column():
    own, others = own_and_others([[0.1, 0.8, 0.6], [0.9, 0.2, 0.4], [0.7, 1.0, 0.3]])
    assert own.tolist() == [0.1, 0.2, 0.3]
    np.testing.assert_allclose(others, [0.8, 0.9, 0.5])
    broken = own_and_others([[np.nan, 0.8], [0.9, 0.2]])
    assert np.isnan(broken[0]).tolist() == [True, False] and broken[1].tolist() == [0.9, 0.8]
    assert np.isnan(own_and_others([[0.5]])[1]).all()
    with pytest.raises(ValueError, match=r"expected \[Q, Q\]"):
        own_and_others([[0.1, 0.2]])
