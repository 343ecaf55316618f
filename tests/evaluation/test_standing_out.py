import numpy as np
import pytest
from scipy import stats

from mucs_cli.evaluation.measures.standing_out import MIN_IMAGES, StandingOut, largest_z, standing_out


def share(draw, num_images, count):
    """How many of ``count`` queries stand out."""
    draws = np.random.default_rng(num_images)
    return np.mean([standing_out(draw(draws, num_images)).stands_out for _ in range(count)])


def normal(draws, num_images):
    return draws.normal(5, 0.01, num_images)


def test_z_is_the_distance_from_the_median_in_robust_standard_deviations():
    scores = np.arange(21.0)  # median 10, median absolute deviation 5
    scores[20] = 100
    found = standing_out(scores)
    assert found.z == pytest.approx(90 / 5 * 0.674489750196)
    assert found.threshold == largest_z(21) and found.stands_out


@pytest.mark.parametrize("num_images", [20, 50, 300, 3000])
def test_normal_scores_stand_out_in_about_five_per_cent_of_draws_and_never_more(num_images):
    found = share(normal, num_images, 1000)
    assert found < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)
    if num_images >= 300:
        assert found > 0.05 - 3 * np.sqrt(0.05 * 0.95 / 1000)


@pytest.mark.parametrize("num_images", [20, 21, 50, 300, 3000])
def test_uniform_scores_do_not_stand_out(num_images):
    assert share(lambda draws, n: draws.random(n), num_images, 500) <= 0.01
    if num_images >= 50:
        assert share(lambda draws, n: draws.random(n), num_images, 500) == 0


@pytest.mark.parametrize("num_images", [20, 300, 3000])
@pytest.mark.parametrize("num_planted", [1, 3])
def test_planted_images_stand_out(num_images, num_planted):
    def planted(draws, n):
        scores = normal(draws, n)
        scores[:num_planted] += 0.15  # fifteen standard deviations
        return scores

    assert share(planted, num_images, 200) > 0.98


def test_the_decision_depends_on_neither_scale_nor_place_nor_order():
    draws = np.random.default_rng(0)
    for scores in (draws.normal(size=200), draws.standard_t(2, size=200)):
        found = standing_out(scores)
        for same in (7e-5 * scores - 3, scores[draws.permutation(200)]):
            other = standing_out(same)
            assert other.z == pytest.approx(found.z) and other.stands_out == found.stands_out


def test_low_scores_do_not_make_the_top_stand_out():
    scores = np.random.default_rng(1).random(100)
    scores[:10] = -1000
    assert not standing_out(scores).stands_out


def test_heavy_tails_pass_so_that_passing_proves_nothing():
    assert share(lambda draws, n: draws.standard_t(3, size=n), 1000, 100) > 0.9


@pytest.mark.parametrize(
    "scores",
    [np.full(50, 0.3), np.r_[np.zeros(40), np.ones(10)], np.r_[np.random.default_rng(0).normal(size=18), 1e6]],
    ids=["constant", "bulk of equal scores", "too few"],
)
def test_without_a_spread_of_the_bulk_nothing_is_claimed(scores):
    assert standing_out(scores) == StandingOut(None, None, False)


def test_the_threshold_is_the_quantile_of_the_maximum_of_normal_values_for_many_and_larger_for_few():
    for num_images, tolerance in ((100_000, 5e-3), (2_000, 0.05)):
        exact = stats.norm.ppf(0.95 ** (1 / num_images))
        assert exact < largest_z(num_images) < exact + tolerance
    assert largest_z(MIN_IMAGES) > 1.4 * stats.norm.ppf(0.95 ** (1 / MIN_IMAGES))
    assert largest_z(100, 0.99) > largest_z(100)


def test_scores_that_are_no_numbers_are_refused():
    for wrong in ([*np.arange(30.0), np.nan], np.zeros((2, 30))):
        with pytest.raises(ValueError, match="all finite"):
            standing_out(wrong)
