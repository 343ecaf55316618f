"""Which images a training step sees: shuffled anew, or in the batches of another training."""

import numpy as np

from mucs_cli.diffusion.training import TrainingSettings
from mucs_cli.stages.fitting import batch_ids

SETTINGS = TrainingSettings(num_steps=100, batch_size=16, seed=3)
ALL = np.arange(100, 200)


def batches(ids: np.ndarray, in_batches_of: np.ndarray | None = None) -> np.ndarray:
    """[steps, batch size]"""
    of_step = batch_ids(ids, SETTINGS, in_batches_of)
    return np.stack([of_step(step) for step in range(SETTINGS.num_steps)])


def test_in_the_batches_of_all_only_removed_images_are_replaced() -> None:
    removed = np.array([103, 150, 199])
    kept = np.setdiff1d(ALL, removed)
    base, without = batches(ALL), batches(kept, ALL)
    assert not np.isin(without, removed).any()
    gone = np.isin(base, removed)
    assert 30 < gone.sum() < 60  # 3 % of 1,600 places
    assert (without[~gone] == base[~gone]).all()
    assert len(set(without[gone].tolist())) > 25  # random ones, not always the same


def test_with_nothing_removed_both_ways_give_the_same_batches() -> None:
    assert (batches(ALL, ALL) == batches(ALL)).all()


def test_replacements_do_not_depend_on_what_else_is_removed_where_as_many_are() -> None:
    first = batches(np.setdiff1d(ALL, [103, 150]), ALL)
    second = batches(np.setdiff1d(ALL, [103, 151]), ALL)
    gone = batches(ALL) == 103
    assert (first[gone] == second[gone]).mean() > 0.9


def test_shuffled_anew_hardly_a_place_is_the_same() -> None:
    assert (batches(ALL[1:]) == batches(ALL)).mean() < 0.05
    assert sorted(batches(ALL[1:])[:7].ravel()[:99]) == ALL[1:].tolist()
