import math

import pytest
import torch

from mucs_cli.diffusion.noise_bank import draw_noise_bank, grid_positions, spanning_order


def release_grid(n):
    """The formula of methods, written out in plain Python."""
    m = math.floor(n / 0.7)
    high, low = 80 ** (1 / 7), 0.002 ** (1 / 7)
    return [(high + j / (m - 1) * (low - high)) ** 7 for j in range(n)]


def sorted_sigma(n, grid):
    return draw_noise_bank(n, (1, 2, 2), grid=grid).sigma.sort(descending=True).values.tolist()


def test_truncated_grid_of_a_hundred_draws_runs_from_80_to_0_310_with_85_above_one():
    sigma = sorted_sigma(100, "truncated")
    assert sigma == pytest.approx(release_grid(100), rel=1e-6)
    assert sigma[0] == pytest.approx(80)
    assert sigma[-1] == pytest.approx(0.310, abs=5e-4)
    assert sum(s > 1 for s in sigma) == 85


@pytest.mark.parametrize(("n", "end"), [(2, 0.002), (20, 0.304), (50, 0.318)])
def test_truncated_grid_ends_where_the_release_does_for_small_banks(n, end):
    assert sorted_sigma(n, "truncated")[-1] == pytest.approx(end, abs=6e-4)


@pytest.mark.parametrize("n", [2, 20, 100])
def test_exact_grid_ends_at_seven_tenths_and_full_grid_at_sigma_min_whatever_the_count(n):
    at_seven_tenths = (80 ** (1 / 7) + 0.7 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sorted_sigma(n, "exact")[-1] == pytest.approx(at_seven_tenths, rel=1e-6)
    assert sorted_sigma(n, "full")[-1] == pytest.approx(0.002, rel=1e-5)


def test_one_draw_is_at_sigma_max_on_every_grid():
    for grid in ("truncated", "exact", "full"):
        assert sorted_sigma(1, grid) == pytest.approx([80])


def test_every_prefix_of_the_order_spans_the_grid():
    order = spanning_order(100)
    assert sorted(order) == list(range(100))
    for length in (4, 10, 25, 50):
        prefix = sorted(order[:length])
        gaps = [b - a for a, b in zip([0, *prefix], [*prefix, 99], strict=True)]
        assert max(gaps) <= 4 * 100 / length


def test_noise_of_a_grid_index_is_the_same_whatever_the_number_of_draws():
    small, large = draw_noise_bank(8, (1, 4, 4)), draw_noise_bank(16, (1, 4, 4))
    for position, j in enumerate(spanning_order(8)):
        assert torch.equal(small.noise[position], large.noise[spanning_order(16).index(j)])
    assert not torch.equal(small.noise[0], small.noise[1])


def test_bank_depends_on_its_seed_only_and_has_unit_variance():
    first, again, other = (draw_noise_bank(50, (3, 8, 8), seed=s) for s in (1, 1, 2))
    torch.manual_seed(123)
    assert torch.equal(first.noise, again.noise)
    assert not torch.equal(first.noise, other.noise)
    assert torch.equal(first.sigma, other.sigma)
    assert float(first.noise.var()) == pytest.approx(1, abs=0.05)


def test_unknown_grids_and_empty_banks_are_refused():
    with pytest.raises(ValueError, match="grid"):
        grid_positions(3, "cosine")
    with pytest.raises(ValueError, match="draw"):
        draw_noise_bank(0, (1, 2, 2))


@pytest.mark.parametrize("n", [1, 2, 7, 10])
def test_antithetic_pairs_of_neighbouring_levels_share_their_noise_with_opposite_signs(n):
    plain, paired = (draw_noise_bank(n, (1, 4, 4), grid="full", antithetic=a) for a in (False, True))
    grid, places = (bank.sigma.argsort(descending=True) for bank in (plain, paired))  # by place on the grid
    assert torch.equal(paired.sigma[places], plain.sigma[grid])
    for j, place in enumerate(places.tolist()):
        assert torch.equal(paired.noise[place], plain.noise[grid[j - j % 2]] * (-1 if j % 2 else 1))


def test_prefixes_of_an_antithetic_bank_are_whole_pairs_that_span_the_grid():
    bank = draw_noise_bank(100, (1, 2, 2), grid="full", antithetic=True)
    assert torch.equal(bank.noise[1:8:2], -bank.noise[0:8:2])
    positions = bank.sigma.argsort(descending=True).argsort()[:8:2]
    assert positions.max() - positions.min() > 60


def test_antithetic_noise_cancels_what_is_odd_in_it():
    bank = draw_noise_bank(50, (1, 4, 4), antithetic=True)
    assert bank.noise.mean(dim=0).abs().max() < 1e-6
    assert bank.noise.std() == pytest.approx(1, abs=0.1)
