"""Racing over draws: variances that hold, and who stays in the race."""

import numpy as np
import pytest
from scipy import stats

from mucs_cli.attribution.racing import freedom, margins, means, race_rounds


def draws_of(num_images: int, num_draws: int, seed: int = 0, spreads: tuple[float, float] = (0.2, 2)) -> np.ndarray:
    """Values [B, n]: images of different means and spreads, under draws that move all of them alike."""
    source = np.random.default_rng(seed)
    mean, spread = source.normal(size=(num_images, 1)), source.uniform(*spreads, size=(num_images, 1))
    return mean + spread * source.normal(size=(num_images, num_draws)) + 50 * source.normal(size=num_draws)


@pytest.mark.parametrize(
    ("num_draws", "rounds"),
    [
        (1, [1]),
        (4, [4]),
        (5, [4, 5]),
        (20, [4, 8, 16, 20]),
        (100, [4, 8, 16, 32, 64, 100]),
        (1000, [40, 80, 160, 320, 640, 1000]),
    ],
)
def test_rounds_double_and_end_with_the_whole_bank(num_draws: int, rounds: list[int]) -> None:
    assert race_rounds(num_draws) == rounds


def test_no_draws_make_no_race() -> None:
    with pytest.raises(ValueError, match="at least one"):
        race_rounds(0)


@pytest.mark.parametrize("confidence", [0.8, 0.99])
@pytest.mark.parametrize("m", [4, 16])
@pytest.mark.parametrize(("spreads", "off"), [((1, 1), 0.04), ((0.2, 2), 0.08)])
def test_the_mean_over_all_draws_lies_below_a_quantile_as_often_as_it_says(
    spreads: tuple[float, float], off: float, m: int, confidence: float
) -> None:
    inside = []
    for seed in range(20):
        values = draws_of(200, 40, seed, spreads)
        mean, variance = means(values[:, :m], 40)
        # up to the constant that the images share: what the draws do to all of them
        truth = (values - values.mean(axis=0)).mean(axis=1)
        inside.append((truth <= mean + stats.t.ppf(confidence, freedom(m)) * np.sqrt(variance)).mean())
    assert confidence - 0.02 < np.mean(inside) < confidence + off


def test_nothing_is_uncertain_once_every_draw_is_there() -> None:
    values = draws_of(30, 12)
    mean, variance = means(values, 12)
    np.testing.assert_allclose(variance, 0)
    np.testing.assert_allclose(mean, values.mean(axis=1) - values.mean(), atol=1e-9)


def test_what_a_draw_does_to_all_images_alike_changes_nothing() -> None:
    values = draws_of(30, 8)
    shifted = values + 1e3 * np.arange(8)
    np.testing.assert_allclose(margins(values, 40, 5, 0.9), margins(shifted, 40, 5, 0.9), atol=1e-6)


def test_the_highest_means_always_stay_in_the_race() -> None:
    for seed in range(10):
        values = draws_of(100, 8, seed)
        order = np.argsort(-values.mean(axis=1))
        assert (margins(values, 40, 7, 0.5)[order[:7]] >= 0).all()


def test_more_places_and_a_higher_confidence_keep_more_images() -> None:
    values = draws_of(300, 8)

    def kept(k: int, confidence: float) -> set[int]:
        return set(np.flatnonzero(margins(values, 40, k, confidence) >= 0).tolist())

    assert kept(5, 0.9) < kept(20, 0.9)
    assert kept(20, 0.9) < kept(20, 0.999)
    assert kept(300, 0.9) == set(range(300))


def race(values: np.ndarray, k: int) -> tuple[set[int], int]:
    """Who is left of all images at the default confidence, and how many evaluations that took."""
    alive, before, evaluations = np.arange(len(values)), 0, 0
    num_draws = values.shape[1]
    for m in race_rounds(num_draws):
        evaluations += len(alive) * (m - before)
        before = m
        if m < num_draws:
            alive = alive[margins(values[alive, :m], num_draws, k, 0.99) >= 0]
    return set(alive.tolist()), evaluations


def test_a_race_keeps_the_highest_of_the_whole_bank() -> None:
    """20 races over 100 draws for 10 places: hardly any image is lost, most are dropped."""
    lost, evaluations = 0, 0
    for seed in range(20):
        values = draws_of(400, 100, seed)
        alive, cost = race(values, 10)
        evaluations += cost
        lost += len(set(np.argsort(-values.mean(axis=1))[:10].tolist()) - alive)
    assert lost <= 2  # of 200
    assert evaluations < 0.4 * 20 * 400 * 100


def test_more_places_cost_more_evaluations() -> None:
    for seed in range(10):
        values = draws_of(400, 100, seed)
        costs = [race(values, k)[1] for k in (1, 3, 10, 30, 100, 400)]
        assert costs == sorted(costs)
        assert costs[0] < costs[-1] == 400 * 100
