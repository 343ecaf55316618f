import pytest
import torch

from mucs_cli.attribution.reducers import REDUCERS, reduce
from mucs_cli.attribution.skew import mean_skew


def losses(seed, shape=(7, 20)):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 3


BASE, UNLEARNED = losses(0), losses(1)


@pytest.mark.parametrize("name", REDUCERS)
def test_each_reducer_is_its_formula_over_plain_lists(name):
    score = reduce(name, BASE, UNLEARNED, 0.01)
    assert score.dtype == torch.float64
    for row in range(7):
        t, u = BASE[row].tolist(), UNLEARNED[row].tolist()
        mean_t, mean_u = sum(t) / 20, sum(u) / 20
        expected = {
            "skew": sum((b - a) / (b + a + 0.01) for a, b in zip(t, u, strict=True)) / 20,
            "ratio_of_means": (mean_u - mean_t) / (mean_u + mean_t + 0.01),
            "difference": mean_u - mean_t,
            "absolute_difference": abs(mean_u - mean_t),
        }[name]
        assert float(score[row]) == pytest.approx(expected, rel=1e-12)


def test_the_reducers_rank_images_differently():
    """One draw with a large loss decides the means, and hardly counts in the mean of ratios."""
    base = torch.tensor([[1.0, 0.1], [1.0, 0.1]])
    unlearned = torch.tensor([[1.0, 0.3], [1.3, 0.1]])
    ratios = reduce("skew", base, unlearned, 0.0)
    means = reduce("ratio_of_means", base, unlearned, 0.0)
    assert ratios.tolist() == pytest.approx([0.25, 0.3 / 2.3 / 2], rel=1e-6)
    assert means.tolist() == pytest.approx([0.2 / 2.4, 0.3 / 2.5], rel=1e-6)
    assert int(ratios.argmax()) == 0
    assert int(means.argmax()) == 1


def test_the_sign_is_dropped_by_the_absolute_difference_alone():
    swapped = {name: reduce(name, UNLEARNED, BASE) for name in REDUCERS}
    for name, score in swapped.items():
        sign = 1 if name == "absolute_difference" else -1
        assert torch.equal(score, sign * reduce(name, BASE, UNLEARNED))
    assert (swapped["difference"] < 0).any()


@pytest.mark.parametrize("name", REDUCERS)
def test_blocks_do_not_change_the_bits_and_equal_losses_score_zero(name):
    base, unlearned = losses(2, (50, 101)), losses(3, (50, 101))
    whole = reduce(name, base, unlearned)
    pieces = [reduce(name, base[start : start + 7], unlearned[start : start + 7]) for start in range(0, 50, 7)]
    assert torch.equal(whole, torch.cat(pieces))
    assert torch.equal(reduce(name, base, base), torch.zeros(50, dtype=torch.float64))


def test_epsilon_shrinks_the_ratios_and_plays_no_part_in_the_differences():
    higher = BASE + UNLEARNED  # no draw's skew is negative, so that none cancels
    for name in REDUCERS:
        small, large = (reduce(name, BASE, higher, epsilon) for epsilon in (1e-3, 0.5))
        if name in ("skew", "ratio_of_means"):
            assert (large < small).all()
        else:
            assert torch.equal(large, small)


def test_the_skew_is_the_score_of_mucs_to_the_bit():
    assert torch.equal(reduce("skew", BASE, UNLEARNED), mean_skew(BASE, UNLEARNED))


def test_an_unknown_name_and_losses_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="'median'"):
        reduce("median", BASE, UNLEARNED)
    for name in REDUCERS:
        with pytest.raises(ValueError, match="shapes"):
            reduce(name, BASE, UNLEARNED[:, :19])
