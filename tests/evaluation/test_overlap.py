import itertools

import numpy as np
import pytest
import torch

from mucs_cli.evaluation.measures.overlap import common_ids, expected_overlap, id_overlap, overlaps


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def random_sets(seed, count, size, num_examples):
    draw = np.random.default_rng(seed)
    return [draw.choice(num_examples, size, replace=False) for _ in range(count)]


def share(a, b):
    return len(set(a.tolist()) & set(b.tolist())) / min(len(a), len(b))


# --- common ids ------------------------------------------------------------------------------------------------------


def test_common_ids_is_the_plain_loop_over_pairs_of_sets_of_any_size():
    sets = [ids[: 5 + 3 * query] for query, ids in enumerate(random_sets(0, 6, 30, 50))]
    found = common_ids(sets, 50, source())
    pairs = list(itertools.combinations(sets, 2))
    assert found.count == 15
    assert found.mean == pytest.approx(sum(share(a, b) for a, b in pairs) / 15)
    assert found.expected == pytest.approx(sum(max(len(a), len(b)) / 50 for a, b in pairs) / 15)
    assert overlaps(sets)[0, 5] == share(sets[0], sets[5]) and 0 < overlaps(sets)[0, 5] < 1


def test_identical_sets_overlap_wholly_in_whatever_order_and_disjoint_ones_not_at_all():
    ids = np.array([4, 9, 1])
    same = common_ids([ids, ids[::-1], ids[[1, 0, 2]]], 100, source())
    assert (same.mean, same.low, same.high) == (1.0, 1.0, 1.0)
    apart = common_ids([ids, ids + 20, ids + 40], 100, source())
    assert (apart.mean, apart.low, apart.high) == (0.0, 0.0, 0.0)
    assert same.expected == apart.expected == pytest.approx(0.03)


def test_random_sets_share_k_of_n():
    sets = random_sets(1, 60, 100, 500)
    found = common_ids(sets, 500, source())
    assert found.expected == expected_overlap(100, 100, 500) == 0.2
    assert found.mean == pytest.approx(0.2, abs=0.005)  # sd of a pair 0.036, of the mean of 1770 about 0.001
    assert found.low is not None and found.high is not None
    assert 0 < found.high - found.low < 0.02


def test_random_sets_of_unlike_sizes_share_the_larger_of_n():
    draw = np.random.default_rng(2)
    ratios = [share(draw.choice(50, 5, replace=False), draw.choice(50, 20, replace=False)) for _ in range(3000)]
    assert expected_overlap(5, 20, 50) == expected_overlap(20, 5, 50) == 0.4
    assert np.mean(ratios) == pytest.approx(0.4, abs=0.02)


def test_its_interval_is_that_of_resampled_queries_without_pairs_of_one_query():
    sets = random_sets(3, 5, 20, 40)
    found = common_ids(sets, 40, source(7), num_resamples=2000, confidence=0.9)
    drawn = torch.randint(5, (2000, 5), generator=source(7)).tolist()
    means = []
    for queries in drawn:
        ratios = [share(sets[a], sets[b]) for a, b in itertools.permutations(queries, 2) if a != b]
        if ratios:
            means.append(sum(ratios) / len(ratios))
    assert found.low == pytest.approx(np.quantile(means, 0.05))
    assert found.high == pytest.approx(np.quantile(means, 0.95))
    assert found.low < found.mean < found.high


def test_two_queries_make_one_pair_without_interval_and_one_makes_none():
    sets = random_sets(4, 2, 10, 20)
    found = common_ids(sets, 20, source())
    assert (found.mean, found.low, found.high, found.count) == (share(*sets), None, None, 1)
    with pytest.raises(ValueError, match="no pair"):
        common_ids(sets[:1], 20, source())


# --- id overlap ------------------------------------------------------------------------------------------------------


def test_id_overlap_is_the_mean_over_queries_of_what_two_methods_share():
    first = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7])]
    second = [np.array([3, 2, 9, 8]), np.array([7, 6, 5, 0])]
    found = id_overlap(first, second, 16, source())
    assert (found.mean, found.expected, found.count) == ((0.5 + 0.75) / 2, 0.25, 2)
    assert (found.low, found.high) == (None, None)  # of two queries
    assert id_overlap(first, first[::-1], 16, source()).mean == 0.0
    assert id_overlap(first, [a[::-1] for a in first], 16, source()).mean == 1.0


def test_id_overlap_of_sets_of_unlike_sizes_counts_by_the_smaller():
    found = id_overlap([np.arange(10)], [np.arange(8, 12)], 20, source())
    assert (found.mean, found.expected) == (0.5, 0.5)
    assert (found.low, found.high, found.count) == (None, None, 1)


def test_its_interval_narrows_with_the_root_of_the_number_of_queries_and_covers_the_expectation():
    widths = []
    for count in (50, 800):
        found = id_overlap(random_sets(5, count, 30, 100), random_sets(6, count, 30, 100), 100, source())
        assert found.low < 0.3 < found.high and found.low < found.mean < found.high
        widths.append(found.high - found.low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)
    ratios = [share(a, b) for a, b in zip(random_sets(5, 800, 30, 100), random_sets(6, 800, 30, 100), strict=True)]
    assert widths[1] == pytest.approx(2 * 1.96 * np.std(ratios) / 800**0.5, rel=0.1)


# --- both ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_generators_seed():
    sets = random_sets(7, 12, 20, 60)
    assert common_ids(sets, 60, source(1)) == common_ids(sets, 60, source(1))
    assert common_ids(sets, 60, source(1)).low != common_ids(sets, 60, source(2)).low
    first, second = [ids[: 9 + query] for query, ids in enumerate(sets[:6])], sets[6:]
    assert id_overlap(first, second, 60, source(1)) == id_overlap(first, second, 60, source(1))
    assert id_overlap(first, second, 60, source(1)).low != id_overlap(first, second, 60, source(3)).low


@pytest.mark.parametrize("wrong", [np.array([], dtype=np.int64), np.array([1, 1]), np.arange(9), np.zeros((2, 2))])
def test_sets_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="top images"):
        common_ids([np.array([1, 2]), wrong], 8, source())
    with pytest.raises(ValueError, match="top images"):
        id_overlap([np.array([1, 2])], [wrong], 8, source())
    with pytest.raises(ValueError, match="of 1 and of 0 queries"):
        id_overlap([np.array([1, 2])], [], 8, source())
