import numpy as np
import pytest
import torch
from scipy.stats import rankdata, spearmanr

from mucs_cli.evaluation.measures.lds import (
    averaged,
    ceiling,
    lds,
    lds_estimates,
    noise_floor,
    predictions,
    resampled_lds,
    spearman,
    split_halves,
    subset_masks,
)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def world():
    """Masks of 40 subsets, scores of 6 queries, and the losses that these scores explain wholly."""
    masks = subset_masks(50, 40, 0.5, seed=3)
    scores = draws(0).normal(size=(6, 50))
    losses = 7 - np.array([[scores[q][mask].sum() for mask in masks] for q in range(6)])
    return masks, scores, losses


# --- subsets ---------------------------------------------------------------------------------------------------------


def test_subsets_have_one_size_differ_and_hold_every_image_equally_often():
    masks = subset_masks(31, 600, 0.4, seed=0)
    assert masks.sum(axis=1).tolist() == [12] * 600
    assert len({mask.tobytes() for mask in masks}) == 600
    np.testing.assert_allclose(masks.mean(axis=0), 12 / 31, atol=0.08)  # standard deviation 0.02


def test_more_subsets_leave_the_first_ones_and_another_seed_changes_them():
    masks = subset_masks(40, 10, 0.5, seed=1)
    assert (subset_masks(40, 4, 0.5, seed=1) == masks[:4]).all()
    assert (subset_masks(40, 10, 0.5, seed=2) != masks).any(axis=1).all()


def test_every_class_has_its_share_of_every_subset_and_every_image_the_same_chance():
    labels = np.repeat([4, 9, 2, 7], [21, 10, 3, 1])
    draws(1).shuffle(labels)
    masks = subset_masks(35, 1200, 0.5, seed=0, labels=labels)
    assert masks.sum(axis=1).tolist() == [18] * 1200
    for label, size in ((4, 21), (9, 10), (2, 3), (7, 1)):
        held = masks[:, labels == label].sum(axis=1)
        assert (np.abs(held - 18 / 35 * size) < 1).all()
    np.testing.assert_allclose(masks.mean(axis=0), 18 / 35, atol=0.06)  # standard deviation 0.0144
    unstratified = subset_masks(35, 1200, 0.5, seed=0)[:, labels == 9].sum(axis=1)
    assert np.ptp(unstratified) > 4


def test_subsets_of_none_or_all_and_labels_of_other_images_are_refused():
    for share in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(ValueError, match="subsets of"):
            subset_masks(20, 2, share, seed=0)
    with pytest.raises(ValueError, match="labels of shape"):
        subset_masks(20, 2, 0.5, seed=0, labels=np.zeros(19))


def test_halves_are_disjoint_and_together_everything():
    selection, report = split_halves(21, source())
    assert (len(selection), len(report)) == (10, 11)
    assert sorted([*selection.tolist(), *report.tolist()]) == list(range(21))
    assert selection.tolist() != list(range(10)) and (np.diff(selection) > 0).all()


# --- score -----------------------------------------------------------------------------------------------------------


def test_scores_that_explain_the_losses_reach_one_and_their_negatives_minus_one(world):
    masks, scores, losses = world
    assert lds(predictions(masks, scores), losses).mean == pytest.approx(1)
    assert lds(predictions(masks, -scores), losses).mean == pytest.approx(-1)


def test_predictions_are_minus_the_sums_of_the_scores_in_the_subset(world):
    masks, scores, losses = world
    np.testing.assert_allclose(predictions(masks, scores), losses - 7, atol=1e-9)
    np.testing.assert_allclose(predictions(masks, scores * 1e-30), (losses - 7) * 1e-30, atol=1e-39)
    np.testing.assert_allclose(predictions(masks, scores + 1000), losses - 7 - 25_000, atol=1e-7)
    assert (predictions(masks, scores.astype(np.float32)) != predictions(masks, scores)).any()


def test_increasing_maps_of_the_losses_and_shifts_of_the_scores_change_nothing(world):
    masks, scores, losses = world
    noisy = losses + draws(2).normal(scale=5, size=losses.shape)
    found = lds(predictions(masks, scores), noisy).per_query
    assert 0.3 < found.mean() < 0.9
    for mapped in (np.exp(noisy / 5), noisy**3, 2 * noisy - 1):
        assert lds(predictions(masks, scores), mapped).per_query.tolist() == found.tolist()
    shifted = scores + 10 * draws(3).normal(size=(6, 1))
    assert lds(predictions(masks, shifted), noisy).per_query.tolist() == found.tolist()
    assert lds(predictions(masks, scores**3), noisy).per_query.tolist() != found.tolist()


def test_what_the_subset_lacks_predicts_as_well_as_what_it_has(world):
    masks, scores, losses = world
    noisy = losses + draws(4).normal(scale=5, size=losses.shape)
    removed = -predictions(~masks, scores)
    np.testing.assert_allclose(lds(removed, noisy).per_query, lds(predictions(masks, scores), noisy).per_query)


def test_shuffled_losses_give_mean_zero_and_per_query_deviation_one_over_root_m_minus_one():
    masks = subset_masks(60, 64, 0.5, seed=0)
    predicted = predictions(masks, draws(5).normal(size=(1, 60)))
    shuffled = np.array([draws(seed).permutation(64) for seed in range(3000)], dtype=float)
    found = spearman(np.repeat(predicted, 3000, axis=0), shuffled)
    assert found.mean() == pytest.approx(0, abs=0.01)  # standard deviation 0.0023
    assert found.std() == pytest.approx(1 / np.sqrt(63), rel=0.06)


def test_spearman_is_that_of_scipy_with_ties(world):
    first, second = draws(6).integers(0, 5, (4, 20)), draws(7).integers(0, 5, (4, 20))
    expected = [spearmanr(a, b).statistic for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(spearman(first, second), expected, atol=1e-14)
    assert np.ptp(expected) > 0.05


def test_constant_and_broken_scores_are_undefined_count_as_zero_and_are_reported(world):
    masks, scores, losses = world
    spoiled = scores.copy()
    spoiled[1] = 0.1
    spoiled[4, 7] = np.nan
    found = lds(predictions(masks, spoiled), losses)
    assert np.isnan(found.per_query).tolist() == [False, True, False, False, True, False]
    assert found.num_undefined == 2 and found.mean == pytest.approx(4 / 6)


def test_scores_of_the_class_alone_are_constant_on_stratified_subsets_to_the_bit():
    labels = np.repeat(np.arange(10), 40)
    draws(8).shuffle(labels)
    masks = subset_masks(400, 30, 0.5, seed=0, labels=labels)
    of_class = draws(9).normal(size=10)
    assert lds(predictions(masks, of_class[labels][None]), draws(10).normal(size=(1, 30))).num_undefined == 1
    plain = masks.astype(float) @ of_class[labels]
    assert np.ptp(plain) < 1e-12  # equal but for rounding, which would have been ranked
    random = subset_masks(400, 30, 0.5, seed=0)
    assert lds(predictions(random, of_class[labels][None]), draws(10).normal(size=(1, 30))).num_undefined == 0


def test_wrong_shapes_and_missing_measurements_are_refused(world):
    masks, scores, losses = world
    with pytest.raises(ValueError, match="expected"):
        predictions(masks[:, :-1], scores)
    with pytest.raises(ValueError, match="shapes"):
        lds(predictions(masks, scores), losses[:, :-1])
    with pytest.raises(ValueError, match="M >= 3"):
        lds(np.ones((2, 2)), np.ones((2, 2)))
    broken = losses.copy()
    broken[0, 0] = np.inf
    with pytest.raises(ValueError, match="not finite"):
        lds(predictions(masks, scores), broken)


# --- intervals -------------------------------------------------------------------------------------------------------


def noisy_methods(world):
    masks, scores, losses = world
    noisy = losses + draws(11).normal(scale=4, size=losses.shape)
    methods = {
        "exact": scores,
        "blurred": scores + draws(12).normal(size=scores.shape),
        "random": draws(13).random((6, 50)),
    }
    return {name: predictions(masks, s) for name, s in methods.items()}, noisy


def test_a_resample_of_subsets_is_spearman_of_the_repeated_subsets(world):
    predicted, losses = noisy_methods(world)
    rounded = {name: np.round(rows / 4) for name, rows in predicted.items()}  # ties
    found = resampled_lds(rounded, losses, source(5), over="subsets", num_resamples=20)
    drawn = torch.randint(40, (20, 40), generator=source(5)).numpy()
    constant = 0
    for name, rows in rounded.items():
        expected = np.zeros(20)
        for resample, taken in enumerate(drawn):
            for p, y in zip(rows[:, taken], losses[:, taken], strict=True):
                constant += np.ptp(p) == 0
                expected[resample] += spearmanr(p, y).statistic / 6 if np.ptp(p) else 0
        np.testing.assert_allclose(found[name], expected, atol=1e-12)
    assert constant > 0  # counted as 0 there too


def test_a_resample_of_queries_is_the_mean_of_their_correlations(world):
    predicted, losses = noisy_methods(world)
    found = resampled_lds(predicted, losses, source(5), over="queries", num_resamples=20)["exact"]
    drawn = torch.randint(6, (20, 6), generator=source(5)).numpy()
    np.testing.assert_allclose(found, spearman(predicted["exact"], losses)[drawn].mean(axis=1), atol=1e-14)


def test_both_kinds_of_resamples_together_spread_more_than_either(world):
    predicted, losses = noisy_methods(world)
    spread = {
        over: resampled_lds(predicted, losses, source(6), over=over, num_resamples=2000)["blurred"].std()
        for over in ("subsets", "queries", "both")
    }
    assert spread["both"] > spread["subsets"] > 0 and spread["both"] > spread["queries"] > 0


def test_differences_are_paired_and_tell_methods_apart_whose_own_intervals_overlap():
    masks = subset_masks(50, 40, 0.5, seed=3)
    scores = draws(0).normal(size=(3, 50))
    near = scores + 0.5 * draws(1).normal(size=scores.shape)
    losses = -(scores @ masks.T) + draws(2).normal(scale=4, size=(3, 40))
    predicted = {"exact": predictions(masks, scores), "near": predictions(masks, near)}
    estimates, differences = lds_estimates([(predicted, losses)], source(), over="subsets")
    assert list(differences) == [("exact", "near")]
    gap, exact, other = differences["exact", "near"], estimates["exact"], estimates["near"]
    assert exact.value is not None and other.value is not None and gap.value == exact.value - other.value
    widths = [e.high - e.low for e in (gap, exact, other) if e.high is not None and e.low is not None]
    assert 0 < widths[0] < 0.7 * np.hypot(widths[1], widths[2])
    assert exact.num_clusters == 40 and exact.count == 3
    unpaired, _ = lds_estimates([({"near": predicted["near"]}, losses)], source(), over="subsets")
    assert unpaired["near"] == other  # a method's interval does not depend on which others are there


def test_runs_are_pooled_by_their_queries_and_each_is_resampled_and_shuffled_alone(world):
    predicted, losses = noisy_methods(world)
    few = ({name: rows[:2, :30] for name, rows in predicted.items()}, losses[:2, :30])
    estimates, differences = lds_estimates([(predicted, losses), few], source(3), num_resamples=500)
    all_queries = np.concatenate([lds(p["exact"], measured).per_query for p, measured in ((predicted, losses), few)])
    exact, blurred = estimates["exact"], estimates["blurred"]
    assert exact.value == pytest.approx(all_queries.mean()) and exact.count == 8 and exact.num_clusters == 2
    assert exact.low is None  # of two queries no interval can be drawn
    both = [(predicted, losses), ({name: rows[::-1] for name, rows in predicted.items()}, losses[::-1])]
    estimates, differences = lds_estimates(both, source(3), num_resamples=500)
    draw = source(3)
    expected = np.mean([resampled_lds(*run, draw, num_resamples=500)["blurred"] for run in both], axis=0)
    assert (estimates["blurred"].low, estimates["blurred"].high) == pytest.approx(np.quantile(expected, [0.025, 0.975]))
    assert differences["exact", "blurred"].value == pytest.approx(exact.value - blurred.value, abs=0.2)
    one = noise_floor([(predicted["exact"], losses)], source(), num_permutations=4000)
    two = noise_floor([(p["exact"], measured) for p, measured in both], source(), num_permutations=4000)
    assert two.deviation == pytest.approx(one.deviation / np.sqrt(2), rel=0.1)


def test_two_queries_give_no_interval_over_queries(world):
    predicted, losses = noisy_methods(world)
    few = {name: rows[:2] for name, rows in predicted.items()}
    estimates, _ = lds_estimates([(few, losses[:2])], source(), over="both", num_resamples=50)
    assert estimates["exact"].value is not None and estimates["exact"].low is None


# --- ceiling and floor -----------------------------------------------------------------------------------------------


def test_the_ceiling_is_one_without_training_noise_near_zero_with_nothing_else_and_rises_with_the_signal():
    subset_effect, noise = draws(14).normal(size=(8, 60)), draws(15).normal(size=(4, 8, 60))
    levels = [ceiling(signal * subset_effect + noise) for signal in (0, 0.5, 1, 3)]
    assert None not in levels and levels == sorted(levels)
    assert levels[0] == pytest.approx(0, abs=0.1) and levels[3] > 0.9
    assert ceiling(np.stack([subset_effect, subset_effect, subset_effect])) == pytest.approx(1)
    assert ceiling(subset_effect[None]) is None


def test_the_ceiling_is_the_plain_loop_over_seeds():
    measured = draws(16).normal(size=(3, 2, 12)) + 2 * draws(17).normal(size=(2, 12))
    values = [
        spearmanr(measured[s][q], np.mean([measured[o][q] for o in range(3) if o != s], axis=0)).statistic
        for s in range(3)
        for q in range(2)
    ]
    assert ceiling(measured) == pytest.approx(np.mean(values), abs=1e-12)


def test_averaging_seeds_raises_the_lds_of_exact_scores(world):
    masks, scores, losses = world
    measured = losses + draws(18).normal(scale=10, size=(6, *losses.shape))
    exact = predictions(masks, scores)
    np.testing.assert_allclose(averaged(measured), measured.sum(axis=0) / 6)
    assert lds(exact, averaged(measured)).mean > lds(exact, measured[0]).mean + 0.15
    measured[2, 0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        averaged(measured)


def test_the_noise_floor_of_one_query_is_one_over_root_m_minus_one_and_of_like_queries_no_smaller(world):
    masks, scores, losses = world
    one = noise_floor([(predictions(masks, scores[:1]), losses[:1])], source(), num_permutations=4000)
    assert one.deviation == pytest.approx(1 / np.sqrt(39), rel=0.05)
    assert one.upper == pytest.approx(1.96 / np.sqrt(39), rel=0.1)
    same = (np.repeat(predictions(masks, scores[:1]), 5, axis=0), np.repeat(losses[:1], 5, axis=0))
    assert noise_floor([same], source(), num_permutations=4000).deviation == pytest.approx(one.deviation, rel=1e-9)
    apart = noise_floor([(predictions(masks, scores), losses)], source(), num_permutations=4000)
    assert apart.deviation < 0.7 * one.deviation


def test_the_noise_floor_is_the_lds_of_shuffled_losses(world):
    masks, scores, losses = world
    scores = scores.copy()
    scores[2] = 1.0
    predicted = predictions(masks, scores)
    found = noise_floor([(predicted, losses)], source(9), num_permutations=5)
    orders = torch.rand(5, 40, generator=source(9), dtype=torch.float64).argsort(dim=1).numpy()
    shuffled = [lds(predicted, losses[:, order]).mean for order in orders]
    assert found.deviation == pytest.approx(np.sqrt(np.mean(np.square(shuffled))), abs=1e-12)
    assert found.p_value == 1 / 6
    nothing = noise_floor([(np.ones_like(predicted), losses)], source(), num_permutations=5)
    assert (nothing.deviation, nothing.p_value) == (0.0, 1.0)


def test_p_values_of_unrelated_scores_are_uniform():
    p_values = []
    for trial in range(150):
        predicted, losses = draws(trial).normal(size=(3, 20)), draws(1000 + trial).normal(size=(3, 20))
        p_values.append(noise_floor([(predicted, losses)], source(trial), num_permutations=200).p_value)
    assert np.abs(np.sort(p_values) - (np.arange(150) + 0.5) / 150).max() < 0.13  # 99 % point of Kolmogorov-Smirnov


# --- a world with a known answer -------------------------------------------------------------------------------------


def fit(inputs, outputs, penalty=3.0):
    return np.linalg.solve(inputs.T @ inputs + penalty * np.eye(inputs.shape[1]), inputs.T @ outputs)


def test_exact_leave_one_out_scores_of_a_ridge_regression_predict_retraining_on_subsets():
    rng = draws(19)
    inputs = rng.normal(size=(120, 4)) * rng.gamma(2, 1, size=(120, 1))
    outputs = inputs @ rng.normal(size=4) + rng.normal(size=120)
    queries, answers = rng.normal(size=(15, 4)), 8 + rng.normal(size=15)  # far off, so that the loss is near linear

    def losses(kept):
        return (queries @ fit(inputs[kept], outputs[kept]) - answers) ** 2

    full = np.ones(120, dtype=bool)
    scores = np.stack([losses(full & (np.arange(120) != i)) - losses(full) for i in range(120)], axis=1)
    masks = subset_masks(120, 100, 0.75, seed=0)
    measured = np.stack([losses(mask) for mask in masks], axis=1)
    exact = lds(predictions(masks, scores), measured)
    assert exact.mean > 0.95 and exact.num_undefined == 0
    random = predictions(masks, rng.random((15, 120)))
    assert abs(lds(random, measured).mean) < 3 * noise_floor([(random, measured)], source()).deviation < 0.25
    assert rankdata(measured[0]).max() == 100  # every retraining is another one
