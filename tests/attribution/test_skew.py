import pytest
import torch

from mucs_cli.attribution.skew import mean_skew, skew


def losses(seed, shape=(7, 20)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_equal_losses_have_zero_skew():
    assert torch.equal(skew(losses(0), losses(0)), torch.zeros(7, 20, dtype=torch.float64))


def test_swapping_the_models_negates_it():
    assert torch.equal(skew(losses(0), losses(1)), -skew(losses(1), losses(0)))


def test_it_lies_strictly_between_minus_one_and_one_even_for_extreme_losses():
    t = torch.tensor([0.0, 1e-12, 1e9, 0.0], dtype=torch.float64)
    u = torch.tensor([1e9, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert (skew(t, u).abs() < 1).all()


def test_it_increases_with_the_unlearned_loss():
    u = torch.linspace(0, 5, 200, dtype=torch.float64)
    assert (skew(torch.full_like(u, 0.8), u).diff() > 0).all()


def test_the_score_is_the_mean_of_ratios_not_the_ratio_of_means():
    t = torch.tensor([[1.0, 0.1]])
    u = torch.tensor([[1.0, 0.3]])
    assert float(mean_skew(t, u, 0.0)) == pytest.approx((0 + 0.5) / 2)
    assert float(mean_skew(t, u, 0.0)) != pytest.approx((1.3 - 1.1) / (1.3 + 1.1))


def test_the_score_is_the_plain_loop_over_draws():
    t, u = losses(2), losses(3)
    for row in range(len(t)):
        expected = sum((b - a) / (b + a + 1e-3) for a, b in zip(t[row].tolist(), u[row].tolist(), strict=True)) / 20
        assert float(mean_skew(t, u)[row]) == pytest.approx(expected, rel=1e-12)


def test_epsilon_shrinks_it_and_mismatched_shapes_are_refused():
    assert (skew(losses(0), losses(1), 0.5).abs() < skew(losses(0), losses(1), 1e-3).abs()).all()
    with pytest.raises(ValueError, match="shapes"):
        skew(losses(0), losses(1, (7, 19)))
