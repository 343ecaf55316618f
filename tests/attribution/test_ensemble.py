import math

import numpy as np
import pytest
import torch

from mucs_cli.attribution.ensemble import borda, rank_correlations, rank_mean, top_overlaps, z_mean
from mucs_cli.attribution.ranks import average_ranks, shared_worth, top

MEANS = pytest.mark.parametrize("mean", [rank_mean, z_mean], ids=["rank", "z"])
ALL = pytest.mark.parametrize(
    "mean", [rank_mean, z_mean, lambda m, w=None: borda(m, 10, w)], ids=["rank", "z", "borda"]
)


def scores(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def order(row):
    return row.argsort(stable=True)


# --- ranks -----------------------------------------------------------------------------------------------------------


def test_equal_values_share_the_mean_of_their_ranks():
    assert average_ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert average_ranks(np.array([])).tolist() == []


def test_places_worth_is_shared_and_kept_in_all():
    worth = np.array([0.0, 0.0, 1.0, 5.0])
    assert shared_worth(np.array([7.0, 7.0, 1.0, 2.0]), worth).tolist() == [3.0, 3.0, 0.0, 0.0]
    assert shared_worth(np.ones(4), worth).tolist() == [1.5] * 4


def test_the_top_holds_the_first_of_equal_scores():
    assert top(np.array([0.0, 2.0, 1.0, 2.0, 1.0], dtype=np.float32), 3).tolist() == [1, 3, 2]


# --- combination -----------------------------------------------------------------------------------------------------


def test_rank_mean_of_two_members_by_hand():
    members = torch.tensor([[[10.0, 30.0, 20.0, 20.0]], [[4.0, 3.0, 2.0, 1.0]]])
    assert rank_mean(members).tolist() == [[(1 + 4) / 2, (4 + 3) / 2, (2.5 + 2) / 2, (2.5 + 1) / 2]]
    assert rank_mean(members, [3, 1]).tolist() == [[(3 + 4) / 4, (12 + 3) / 4, (7.5 + 2) / 4, (7.5 + 1) / 4]]


def test_z_mean_is_the_plain_formula_with_outliers_limited():
    members = scores(0, (3, 2, 60))
    members[1, 0, 5] = 300.0
    found = z_mean(members)
    for query in range(2):
        for i in range(60):
            total = 0.0
            for member in members[:, query].double().tolist():
                mu = sum(member) / 60
                sd = math.sqrt(sum((value - mu) ** 2 for value in member) / 60)
                total += min(max((member[i] - mu) / (sd + 1e-9), -5.0), 5.0)
            assert float(found[query, i]) == pytest.approx(total / 3, abs=1e-6)
    assert float(z_mean(members[1:2])[0, 5]) == 5.0


def test_borda_by_hand_and_ties_share_their_points():
    members = torch.tensor([[[9.0, 8.0, 7.0, 1.0, 2.0]], [[1.0, 5.0, 5.0, 5.0, 0.0]]])
    # member 2: places 1 to 3 are tied, so that each gets (3 + 2 + 1) / 3
    assert borda(members, 3).tolist() == [[1.5, 2.0, 1.5, 1.0, 0.0]]
    assert borda(members, 2)[0].tolist() == [1.0, 1.0, 0.5, 0.5, 0.0]
    for k in (1, 2, 3, 5):
        assert float(borda(members, k).sum()) == pytest.approx(k * (k + 1) / 2)
    assert borda(members[:1], 7).tolist() == [[7.0, 6.0, 5.0, 3.0, 4.0]]


@MEANS
def test_an_ensemble_of_identical_methods_ranks_as_that_method(mean):
    one = scores(1, (1, 4, 200))
    found = mean(one.expand(3, 4, 200), [0.2, 0.3, 0.5])
    for query in range(4):
        assert torch.equal(order(found[query]), order(one[0, query]))


def test_borda_of_identical_methods_has_that_methods_top_in_its_order():
    one = scores(1, (1, 4, 200))
    found = borda(one.expand(3, 4, 200), 20)
    for query in range(4):
        best = one[0, query].argsort(descending=True)
        assert torch.equal(found[query].argsort(descending=True)[:20], best[:20])
        assert (found[query][best[20:]] == 0).all() and found[query][best[19]] == 1


def test_rank_mean_does_not_change_under_increasing_maps_of_a_member_and_z_mean_does():
    members = scores(2, (2, 3, 100))
    mapped = torch.stack([members[0].exp() * 5 - 3, members[1]])
    assert torch.equal(rank_mean(mapped), rank_mean(members))
    assert torch.equal(borda(mapped, 10), borda(members, 10))
    assert not torch.allclose(z_mean(mapped), z_mean(members), atol=0.1)


@pytest.mark.parametrize(("scale", "shift"), [(7.0, 2.0), (1e-3, 0.0), (1e-12, 0.0), (1e12, 5.0)])
def test_z_mean_does_not_change_under_increasing_affine_maps_of_a_member_however_small(scale, shift):
    members = scores(3, (2, 3, 100))
    mapped = torch.stack([members[0] * scale + shift, members[1]])
    assert torch.allclose(z_mean(mapped), z_mean(members), atol=2e-6)
    assert not torch.allclose(z_mean(torch.stack([-members[0], members[1]])), z_mean(members), atol=0.1)


@ALL
def test_reordering_images_queries_or_members_reorders_the_scores_alike(mean):
    members = scores(4, (3, 5, 80)).round(decimals=1)  # with ties
    images, queries = scores(20, (80,)).argsort(), scores(21, (5,)).argsort()
    found = mean(members)
    assert torch.allclose(mean(members[:, :, images]), found[:, images], atol=1e-6)
    assert torch.equal(mean(members[:, queries]), found[queries])
    assert torch.allclose(mean(members[[2, 0, 1]], [1.0, 2.0, 3.0]), mean(members, [2.0, 3.0, 1.0]), atol=1e-6)
    assert not torch.allclose(mean(members, [1.0, 2.0, 3.0]), mean(members, [2.0, 3.0, 1.0]), atol=1e-2)


@MEANS
def test_a_method_and_its_opposite_tie_everywhere(mean):
    one = scores(5, (2, 90))
    found = mean(torch.stack([one, -one]))
    assert torch.equal(found, found[:, :1].expand_as(found))
    assert float(found[0, 0]) == {"rank_mean": 45.5, "z_mean": 0.0}[mean.__name__]


@ALL
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_member_is_ignored_where_it_is_constant(mean, value):
    members = scores(6, (3, 2, 50))
    members[1, 0] = value
    found = mean(members, [1.0, 4.0, 2.0])
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], mean(members[[0, 2]], [1.0, 2.0])[0])
    assert torch.equal(found[1:], mean(members[:, 1:], [1.0, 4.0, 2.0]))
    assert not torch.equal(found[1], mean(members[[0, 2]], [1.0, 2.0])[1])
    assert torch.equal(mean(torch.full((2, 1, 50), value)), torch.zeros(1, 50))


@ALL
def test_a_member_of_weight_zero_has_no_say(mean):
    members = scores(7, (2, 3, 40))
    assert torch.equal(mean(members, [1, 0]), mean(members[:1]))
    constant = torch.stack([torch.ones(3, 40), members[1]])
    assert torch.equal(mean(constant, [1, 0]), torch.zeros(3, 40))


@ALL
def test_weights_and_members_that_make_no_mean_are_refused(mean):
    members = scores(8, (2, 3, 10))
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="weights"):
            mean(members, weights)
    for wrong in (members[0], torch.full((2, 3, 10), float("nan"))):
        with pytest.raises(ValueError, match="finite scores"):
            mean(wrong)


def test_independent_noisy_views_of_one_truth_agree_with_it_better_together():
    truth = scores(9, (1, 1, 500))
    views = truth + 1.5 * scores(10, (6, 1, 500))
    alone = rank_correlations(torch.cat([truth, views]))[0, 1:]
    for mean in (rank_mean, z_mean):
        together = rank_correlations(torch.cat([truth, mean(views)[None]]))[0, 1]
        assert together > alone.max() + 0.1


# --- diversity -------------------------------------------------------------------------------------------------------


def test_rank_correlations_are_the_closed_form_averaged_over_queries():
    members = torch.tensor([[[1.0, 2, 3, 4, 5], [1, 2, 3, 4, 5]], [[2.0, 1, 3, 4, 5], [5, 4, 3, 2, 1]]])
    found = rank_correlations(members)
    first = 1 - 6 * 2 / (5 * 24)  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert found[0, 1] == pytest.approx((first - 1) / 2) and found[0, 1] == found[1, 0]
    assert found.diagonal().tolist() == pytest.approx([1.0, 1.0])
    assert torch.allclose(rank_correlations(torch.stack([members[0], members[1].exp()])), found)


def test_rank_correlations_with_ties_are_pearsons_of_average_ranks():
    members = scores(11, (3, 1, 60)).round()
    expected = np.corrcoef([average_ranks(row[0].numpy()) for row in members])
    assert np.allclose(rank_correlations(members).numpy(), expected, atol=1e-12)


def test_top_overlaps_are_counted_over_queries():
    members = torch.tensor([[[9.0, 8, 7, 1, 0], [9, 8, 7, 1, 0]], [[9.0, 0, 8, 1, 2], [0, 1, 2, 8, 9]]])
    assert top_overlaps(members, 2).tolist() == [[1.0, (1 / 2 + 0) / 2], [(1 / 2 + 0) / 2, 1.0]]
    assert top_overlaps(members, 3)[0, 1] == (2 / 3 + 1 / 3) / 2
    assert top_overlaps(members, 99).tolist() == [[1.0, 1.0], [1.0, 1.0]]
    with pytest.raises(ValueError, match="top 0"):
        top_overlaps(members, 0)


def test_diversity_counts_only_queries_where_both_members_say_something():
    members = scores(12, (3, 2, 30))
    members[1, 0] = 0.5
    members[2] = 1.0
    alone = members[:2, 1:]
    for found, expected in (
        (rank_correlations(members), rank_correlations(alone)),
        (top_overlaps(members, 5), top_overlaps(alone, 5)),
    ):
        assert found[0, 1] == expected[0, 1] and found[0, 0] == pytest.approx(1.0)
        assert found[2].isnan().all() and found[:, 2].isnan().all() and found[:2, :2].isfinite().all()
