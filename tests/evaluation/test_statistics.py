import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from mucs_cli.evaluation.measures import statistics
from mucs_cli.evaluation.measures.statistics import (
    auc,
    bootstrap,
    coverage_limit,
    hit_rate,
    holm,
    mann_whitney,
    ratio,
    resampled_counts,
    weighted_auc,
    weighted_mean,
    weighted_ratio,
    wilcoxon,
)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0):
    return np.random.default_rng(seed)


# --- AUC, ratio, hit rate --------------------------------------------------------------------------------------------


def test_auc_is_one_where_the_method_is_strictly_lower_and_half_for_a_sample_against_itself():
    random = draws().random(30)
    assert auc(random - 2, random) == 1.0
    assert auc(random + 2, random) == 0.0
    assert auc(random, random) == 0.5


def test_auc_is_the_mann_whitney_u_over_the_number_of_pairs_with_ties_and_unlike_sizes():
    method, random = draws(1).integers(0, 6, 25) / 5, draws(2).integers(0, 6, 40) / 5
    u = stats.mannwhitneyu(random, method).statistic
    loop = sum((r > m) + 0.5 * (r == m) for m in method for r in random)
    assert u == loop and len(set(method) & set(random)) > 2
    assert auc(method, random) == pytest.approx(u / (25 * 40), abs=1e-15)


def test_ratio_is_the_formula_and_the_lower_median_is_that_of_torch():
    method, random = np.array([0.2, 0.4]), np.array([0.8, 0.1, 0.6, 0.4])
    assert ratio(method, random) == pytest.approx(100 * (0.3 / 0.5 - 1))
    assert torch.tensor(random).median().item() == 0.4
    assert ratio(method, random, lower_median=True) == pytest.approx(100 * (0.3 / 0.4 - 1))
    assert ratio(method, random[:3], lower_median=True) == ratio(method, random[:3])


def test_ratio_divides_by_no_less_than_a_hundredth():
    assert ratio([0.02, 0.04], [-0.5, 0.001, 0.002]) == pytest.approx(100 * (0.03 / 0.01 - 1))


def test_hits_are_pairs_lower_by_five_percent_and_equal_negative_similarities_are_none():
    assert hit_rate([0.94, 0.96, 0.1, -0.5], [1.0, 1.0, 0.2, -0.5]) == 0.5


def test_what_is_not_finite_is_left_out_and_nothing_left_gives_none():
    assert auc([0.1, np.nan], [0.5, np.inf, 0.05]) == 0.5
    assert ratio([np.nan, 0.3], [0.6, np.nan]) == pytest.approx(-50)
    assert hit_rate([0.1, np.nan, 0.2], [0.5, 0.5, np.nan]) == 1.0
    nothing = [np.nan]
    assert auc([], [1.0]) is None and auc([1.0], nothing) is None and ratio([1.0], []) is None
    assert hit_rate(nothing, [1.0]) is None and wilcoxon(nothing, [1.0], "less") is None
    assert mann_whitney([1.0], nothing, "less") is None
    with pytest.raises(ValueError, match="pairs of shapes"):
        hit_rate([1.0, 2.0], [1.0])


# --- tests -----------------------------------------------------------------------------------------------------------


def rank_sum_by_all_splits(method, random):
    """P(sum of the method's ranks is at most the one seen) over all ways to split the pooled values."""
    ranks = stats.rankdata(np.concatenate([method, random]))
    splits = [ranks[list(chosen)].sum() for chosen in itertools.combinations(range(len(ranks)), len(method))]
    return np.mean(np.array(splits) <= ranks[: len(method)].sum() + 1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_mann_whitney_is_the_share_of_splits_with_as_low_a_rank_sum(tied):
    method, random = draws(3).random(6), draws(4).random(7) + 0.3
    if tied:
        method, random = np.round(method * 4), np.round(random * 4)
        assert len(set(method) & set(random)) > 1
    expected = rank_sum_by_all_splits(method, random)
    assert 0 < expected < 0.5
    assert mann_whitney(method, random, "less") == pytest.approx(expected, abs=1e-12)
    other = rank_sum_by_all_splits(-method, -random)
    assert mann_whitney(method, random, "two-sided") == pytest.approx(min(1, 2 * min(expected, other)), abs=1e-12)


def test_mann_whitney_of_larger_samples_is_near_a_permutation_test():
    method, random = np.round(draws(5).normal(size=40), 1), np.round(draws(67).normal(size=40), 1)
    pooled, shuffle = np.concatenate([method, random]), draws(7)
    ranks = stats.rankdata(pooled)
    sums = np.array([shuffle.permutation(ranks)[:40].sum() for _ in range(20_000)])
    permuted = np.mean(sums <= ranks[:40].sum())
    assert 0.001 < permuted < 0.3
    assert mann_whitney(method, random, "less") == pytest.approx(permuted, abs=0.006)


def test_equal_samples_are_no_evidence():
    assert mann_whitney([1.0] * 4, [1.0] * 5, "two-sided") == 1.0
    assert mann_whitney([1.0] * 30, [1.0] * 30, "less") == 1.0
    assert wilcoxon([0.3, 0.4], [0.3, 0.4], "less") == wilcoxon([0.3, 0.4], [0.3, 0.4], "two-sided") == 1.0


@pytest.mark.parametrize("tied", [False, True])
def test_wilcoxon_is_the_share_of_sign_flips_with_as_low_a_rank_sum_of_the_gains(tied):
    difference = draws(8).normal(-0.4, 1, 10)
    if tied:
        difference = np.round(difference)
        assert len(np.unique(np.abs(difference))) < 5 and (difference == 0).any()
    nonzero = difference[difference != 0]
    ranks = stats.rankdata(np.abs(nonzero))
    seen = ranks[nonzero > 0].sum()
    flips = [np.dot(signs, ranks) for signs in itertools.product([0, 1], repeat=len(ranks))]
    expected = np.mean(np.array(flips) <= seen + 1e-9)
    assert 0 < expected < 0.5
    base = np.zeros(len(difference))  # so that rounding makes no ties that are none
    assert wilcoxon(difference, base, "less") == pytest.approx(expected, abs=1e-12)


def test_pairs_without_a_difference_leave_the_signed_rank_test_exact():
    difference = draws(16).normal(-0.3, 1, 20)
    with_zeros = np.concatenate([difference, np.zeros(5)])
    exact = stats.wilcoxon(difference, alternative="less", method="exact").pvalue
    assert wilcoxon(with_zeros, np.zeros(25), "less") == exact
    assert exact != pytest.approx(stats.wilcoxon(difference, alternative="less", method="asymptotic").pvalue, rel=1e-3)


def test_pairing_finds_a_small_effect_that_unpaired_samples_hide():
    random = draws(9).normal(size=30)
    method = random - 0.05 * draws(10).random(30)
    unpaired, paired = mann_whitney(method, random, "less"), wilcoxon(method, random, "less")
    assert unpaired is not None and paired is not None
    assert unpaired > 0.3 and paired < 1e-6


def test_holm_is_the_step_down_rule_and_leaves_out_tests_that_were_not_made():
    # 4 tests: 4 * 0.01, 3 * 0.02, then 2 * 0.03 = 0.06 and 0.04, raised to 0.06.
    assert holm([0.04, None, 0.01, 0.03, 0.02]) == pytest.approx([0.06, None, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([None, None]) == [None, None]
    assert holm([0.02]) == [0.02]


def test_holm_rejects_what_the_sequential_definition_rejects():
    for seed in range(50):
        p_values = (draws(seed).random(7) ** 3).tolist()
        rejected = set()
        for step, place in enumerate(np.argsort(p_values)):
            if p_values[place] > 0.05 / (7 - step):
                break
            rejected.add(int(place))
        adjusted = holm(p_values)
        assert {place for place, p in enumerate(adjusted) if p is not None and p <= 0.05} == rejected


# --- bootstrap -------------------------------------------------------------------------------------------------------


def test_statistics_of_counts_are_those_of_the_repeated_sample():
    method, random = draws(11).integers(0, 8, 9) / 8, draws(12).integers(0, 8, 9) / 8
    counts = resampled_counts(9, 50, source())
    assert counts.sum(axis=1).tolist() == [9] * 50 and (counts > 1).any()
    repeated = [row.astype(int) for row in counts]
    for statistic, plain in (
        (weighted_auc(method, random), auc),
        (weighted_ratio(method, random), ratio),
        (weighted_ratio(method, random, lower_median=True), lambda m, r: ratio(m, r, lower_median=True)),
        (weighted_mean(method - random), lambda m, r: float(np.mean(m - r))),
    ):
        expected = [plain(np.repeat(method, row), np.repeat(random, row)) for row in repeated]
        np.testing.assert_allclose(statistic(counts), expected, rtol=1e-12, atol=1e-14)
        assert len(set(np.round(expected, 6))) > 5


def test_a_drawn_cluster_brings_all_that_belongs_to_it():
    values = np.array([1.0, 1.0, 5.0, 9.0, 9.0, 9.0])
    clusters = ["a", "a", "b", "c", "c", "c"]
    seen = []
    weight = weighted_mean(values)

    def spy(counts):
        seen.append(counts)
        return weight(counts)

    found = bootstrap(spy, clusters, source(), num_resamples=200)
    counts = seen[1]
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[:, 3:] == counts[:, 3:4]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 3] == 3).all()
    assert found.value == pytest.approx(34 / 6) and (found.count, found.num_clusters) == (6, 3)
    assert found.low is not None and found.high is not None and 1 <= found.low < 34 / 6 < found.high <= 9


def test_an_interval_over_clusters_is_wider_than_one_that_takes_pictures_of_a_seed_for_independent():
    seeds = np.repeat(np.arange(8), 20)
    values = draws(13).normal(size=8)[seeds] + 0.1 * draws(14).normal(size=160)
    clustered = bootstrap(weighted_mean(values), seeds, source())
    naive = bootstrap(weighted_mean(values), np.arange(160), source())
    width = [e.high - e.low for e in (clustered, naive) if e.high is not None and e.low is not None]
    assert clustered.value == naive.value
    assert width[0] > 3 * width[1] > 0


def test_the_percentile_interval_of_a_mean_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for trial in range(200):
        sample = draws(100 + trial).normal(size=30)
        found = bootstrap(weighted_mean(sample), np.arange(30), source(trial), num_resamples=400)
        assert found.low is not None and found.high is not None
        covered += found.low < 0 < found.high
    assert 0.87 <= covered / 200 <= 0.99  # percentile intervals of 30 cover a little less than 95 %


def test_too_few_clusters_and_undefined_statistics_have_no_interval():
    values = np.arange(10.0)
    two = bootstrap(weighted_mean(values), values % 2, source())
    assert (two.value, two.low, two.high, two.num_clusters) == (4.5, None, None, 2)
    empty = bootstrap(weighted_mean(np.zeros(0)), [], source())
    assert (empty.value, empty.low, empty.count, empty.coverage_limit) == (None, None, 0, 0.0)
    undefined = bootstrap(lambda counts: np.where((counts == 1).all(axis=1), 1.0, np.nan), values, source())
    assert (undefined.value, undefined.low, undefined.high) == (1.0, None, None)


def test_the_coverage_limit_is_what_the_range_of_the_clusters_covers():
    assert [coverage_limit(k) for k in (3, 6)] == [0.75, 0.96875]
    inside = [np.ptp(np.sign(draws(trial).normal(size=3))) > 0 for trial in range(2000)]
    assert np.mean(inside) == pytest.approx(0.75, abs=0.03)


def test_resamples_are_a_function_of_the_generator_alone():
    values = draws(15).normal(size=12)
    again = [bootstrap(weighted_mean(values), np.arange(12), source(seed)) for seed in (3, 3, 4)]
    assert again[0] == again[1] != again[2]
    assert statistics.NUM_RESAMPLES >= 2000
    assert math.isclose(again[0].value or 0, values.mean())
