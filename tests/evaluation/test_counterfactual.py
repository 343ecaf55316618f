import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import stats

from mucs_cli.evaluation.measures import statistics
from mucs_cli.evaluation.measures.counterfactual import Contrast, Settings, Similarities, pair, table
from mucs_cli.evaluation.measures.image_metrics import ssim

NUM_SEEDS, NUM_QUERIES = 6, 12
SEEDS = np.repeat(np.arange(NUM_SEEDS), NUM_QUERIES)
TARGETS = np.tile(np.arange(NUM_QUERIES), NUM_SEEDS)
CONTROLS = TARGETS + 100


def draws(seed=0):
    return np.random.default_rng(seed)


def similarities(values, queries=TARGETS, seeds=SEEDS):
    return Similarities(seeds, queries, np.asarray(values, dtype=float))


def base(seed):
    """What random removal leaves: a level for each training seed and each picture."""
    return 0.6 + 0.1 * draws(seed).normal(size=NUM_SEEDS)[SEEDS] + 0.05 * draws(seed + 1).normal(size=len(SEEDS))


def contrast(effect, effect_on_controls=0.0, method="mucs", metric="ssim"):
    targets, controls = base(0), base(10)
    noise = 0.02 * draws(20).normal(size=(2, len(SEEDS)))
    return Contrast(
        method,
        "random",
        metric,
        targets=similarities(targets - effect + noise[0]),
        baseline_targets=similarities(targets),
        num_removed=[30, 34],
        baseline_num_removed=[60, 64],
        controls=similarities(controls - effect_on_controls + noise[1], CONTROLS),
        baseline_controls=similarities(controls, CONTROLS),
    )


QUICK = Settings(num_resamples=400)


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_are_of_the_same_seed_and_query_in_whatever_order_they_come():
    values = draws(1).random(len(SEEDS))
    order = draws(2).permutation(len(SEEDS))
    shuffled = Similarities(SEEDS[order], TARGETS[order], values[order] + 1)
    pairs = pair(similarities(values), shuffled)
    np.testing.assert_allclose(pairs.baseline, pairs.method + 1, rtol=1e-15)
    assert pairs.seed.tolist() == SEEDS.tolist() and pairs.num_undefined == 0


def test_pairs_that_are_not_numbers_are_left_out_and_counted():
    ours, theirs = base(0), base(2)
    ours[3], theirs[[3, 8]] = np.nan, np.nan
    pairs = pair(similarities(ours), similarities(theirs))
    assert len(pairs.method) == len(SEEDS) - 2 and pairs.num_undefined == 2
    assert np.isfinite(pairs.method).all() and np.isfinite(pairs.baseline).all()


def test_other_pictures_repeated_pictures_and_targets_among_controls_are_refused():
    with pytest.raises(ValueError, match=r"\(0, 0\)"):
        pair(similarities(base(0)), similarities(base(0), CONTROLS))
    with pytest.raises(ValueError, match="twice"):
        similarities(base(0), np.zeros_like(TARGETS))
    with pytest.raises(ValueError, match="expected"):
        similarities(base(0)[:-1])
    both = contrast(0.1)
    with pytest.raises(ValueError, match="both target and control"):
        table([replace(both, controls=both.targets, baseline_controls=both.baseline_targets)], 1000, QUICK)
    with pytest.raises(ValueError, match="expected seed or picture"):
        Settings(clusters="query")


# --- rows ------------------------------------------------------------------------------------------------------------


def test_random_against_itself_is_half_on_both_sides():
    same = contrast(0.0)
    row = table([replace(same, targets=same.baseline_targets, controls=same.baseline_controls)], 1000, QUICK)[0]
    assert row.controls is not None and row.separation is not None
    for side in (row.targets, row.controls):
        assert (side.auc.low, side.auc.high) == pytest.approx((0.5, 0.5))  # whatever is drawn, it is drawn for both
        assert side.auc.value == 0.5 and side.difference.value == 0.0 and side.hit_rate == 0.0
        assert side.wilcoxon == side.wilcoxon_holm == 1.0
    assert row.separation.value == 0.0


def test_a_method_that_always_lowers_the_similarity_has_auc_one():
    lower = contrast(3.0)
    row = table([lower], 1000, QUICK)[0]
    assert (row.targets.auc.value, row.targets.auc.low, row.targets.hit_rate) == (1.0, 1.0, 1.0)
    assert row.targets.difference.high is not None and row.targets.difference.high < -2.9
    higher = table([contrast(-3.0)], 1000, QUICK)[0]
    assert higher.targets.auc.value == 0.0 and higher.targets.wilcoxon is not None and higher.targets.wilcoxon > 0.99


def test_every_number_of_a_row_is_that_of_other_software():
    one = contrast(0.03, 0.005)
    row = table([one], 1000, QUICK)[0]
    method, random = one.targets.value, one.baseline_targets.value
    u = stats.mannwhitneyu(random, method).statistic
    targets, controls = row.targets, row.controls
    assert controls is not None and row.separation is not None
    assert targets.auc.value == pytest.approx(u / len(SEEDS) ** 2) and 0.5 < targets.auc.value < 1
    assert targets.ratio.value == pytest.approx(100 * np.mean(method / np.median(random) - 1))
    assert targets.difference.value == pytest.approx(np.mean(method - random))
    assert (targets.mean, targets.baseline_mean) == pytest.approx((method.mean(), random.mean()))
    assert targets.hit_rate == np.mean(method < 0.95 * random)
    assert targets.mann_whitney == pytest.approx(stats.mannwhitneyu(method, random, alternative="less").pvalue)
    assert targets.wilcoxon == pytest.approx(stats.wilcoxon(method, random, alternative="less").pvalue)
    assert one.controls is not None and one.baseline_controls is not None
    other = [one.controls.value, one.baseline_controls.value]
    assert controls.mann_whitney == pytest.approx(stats.mannwhitneyu(*other).pvalue)
    assert controls.wilcoxon == pytest.approx(stats.wilcoxon(*other).pvalue)
    assert row.separation.value == pytest.approx(targets.auc.value - (controls.auc.value or 0))
    assert (targets.count, targets.auc.count, targets.auc.num_clusters) == (72, 72, NUM_SEEDS)
    assert row.num_removed == [30, 34] and (row.removed_share, row.baseline_removed_share) == (0.032, 0.062)


def test_separation_tells_causes_from_general_harm():
    causes, harm = table([contrast(0.2, 0.0), contrast(0.2, 0.2)], 1000, QUICK)
    assert causes.separation is not None and harm.separation is not None
    assert causes.separation.low is not None and causes.separation.low > 0.2
    assert harm.separation.low is not None and harm.separation.high is not None
    assert harm.separation.low < 0 < harm.separation.high and harm.targets.auc.value == causes.targets.auc.value


def test_intervals_over_seeds_are_wider_than_over_pictures_where_seeds_differ():
    seed_effect = 0.2 * draws(30).normal(size=NUM_SEEDS)[SEEDS]
    one = contrast(0.0)
    one = replace(one, targets=similarities(one.targets.value + seed_effect))
    by_seed = table([one], 1000, QUICK)[0].targets.difference
    by_picture = table([one], 1000, Settings(clusters="picture", num_resamples=400))[0].targets.difference
    assert by_picture.num_clusters == 72 and by_seed.value == by_picture.value
    widths = [e.high - e.low for e in (by_seed, by_picture) if e.high is not None and e.low is not None]
    assert widths[0] > 1.5 * widths[1] > 0


def test_two_training_seeds_have_no_interval_and_no_controls_no_separation():
    one = contrast(0.1)
    few = SEEDS < 2
    targets, baseline = (
        similarities(s.value[few], TARGETS[few], SEEDS[few]) for s in (one.targets, one.baseline_targets)
    )
    row = table([Contrast("mucs", "random", "ssim", targets, baseline, [3, 4], [5, 6])], 100, QUICK)[0]
    assert row.targets.auc.value is not None and row.targets.auc.low is None and row.targets.auc.coverage_limit == 0.5
    assert row.controls is None and row.separation is None


def test_p_values_are_corrected_over_the_whole_table_targets_and_controls_for_themselves():
    contrasts = [contrast(effect, effect / 9, metric=str(effect)) for effect in (0.0, 0.004, 0.01, 0.05)]
    del_controls = replace(contrasts[1], controls=None, baseline_controls=None)
    rows = table([contrasts[0], del_controls, *contrasts[2:]], 1000, QUICK)
    raw = [row.targets.wilcoxon for row in rows]
    assert [row.targets.wilcoxon_holm for row in rows] == statistics.holm(raw)
    assert [row.targets.mann_whitney_holm for row in rows] == statistics.holm([r.targets.mann_whitney for r in rows])
    assert rows[3].targets.wilcoxon_holm == pytest.approx(4 * (raw[3] or 0)) and len(set(raw)) == 4
    of_controls = [row.controls for row in rows if row.controls is not None]
    assert [side.wilcoxon_holm for side in of_controls] == statistics.holm([side.wilcoxon for side in of_controls])
    assert rows[1].controls is None and len(of_controls) == 3


def test_a_row_does_not_depend_on_the_others_but_for_the_correction_and_is_json():
    alone, beside = table([contrast(0.02)], 1000, QUICK)[0], table([contrast(0.1), contrast(0.02)], 1000, QUICK)[1]
    assert alone.targets.auc == beside.targets.auc and alone.targets.wilcoxon == beside.targets.wilcoxon
    assert json.loads(json.dumps(asdict(alone), allow_nan=False))["targets"]["auc"]["value"] == alone.targets.auc.value
    assert table([contrast(0.02)], 1000, replace(QUICK, seed=1))[0].targets.auc.low != alone.targets.auc.low


def test_nothing_comparable_gives_none_everywhere():
    nothing = similarities(np.full(len(SEEDS), np.nan))
    row = table([Contrast("mucs", "random", "ssim", nothing, similarities(base(0)), [], [])], 100, QUICK)[0]
    side = row.targets
    assert (side.count, side.num_undefined, side.mean, side.auc.value, side.ratio.value) == (0, 72, None, None, None)
    assert (side.wilcoxon, side.mann_whitney_holm, side.hit_rate, row.removed_share) == (None, None, None, None)
    json.dumps(asdict(row), allow_nan=False)


def test_identical_pictures_before_and_after_are_similar_to_one_and_leave_no_difference():
    pictures = torch.from_numpy(draws(3).uniform(-1, 1, (len(SEEDS), 1, 8, 8)))
    same = ssim(pictures, pictures.clone())
    assert same.tolist() == [1.0] * len(SEEDS)
    again = similarities(same.numpy())
    side = table([Contrast("none", "none", "ssim", again, again, [0], [0])], 100, QUICK)[0].targets
    assert (side.auc.value, side.ratio.value, side.difference.value) == (0.5, 0.0, 0.0)
