import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mucs_cli.evaluation.measures import near_duplicates as module
from mucs_cli.evaluation.measures.near_duplicates import near_duplicates

RAW = load_digits().images.astype(np.uint8)[:, None]  # [1797, 1, 8, 8], 0 to 16
LEVELS, TRAINING = 16, np.arange(0, 1200, 2)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def as_queries(raw):
    return (raw * (2 / LEVELS) - 1).astype(np.float32)


def plain_distances(queries, images):
    """[Q, N]: root mean square differences of pixels in [0, 1], pair by pair."""
    return np.array([[np.sqrt((((q + 1) / 2 - r / LEVELS) ** 2).mean()) for r in images] for q in queries])


def test_the_nearest_image_and_the_datas_own_distance_are_those_of_a_plain_loop():
    queries = as_queries(RAW[1500:1520]) + 0.01
    found = near_duplicates(queries, RAW, LEVELS, TRAINING, source())
    distances = plain_distances(queries, RAW[TRAINING])
    assert found.example_id.tolist() == TRAINING[distances.argmin(axis=1)].tolist()
    assert found.distance == pytest.approx(distances.min(axis=1))
    drawn = torch.randperm(len(TRAINING), generator=source())[:500].numpy()
    own = plain_distances(as_queries(RAW[TRAINING[drawn]]), RAW[TRAINING])
    own[np.arange(500), drawn] = np.inf
    assert found.own_distance == pytest.approx(np.quantile(own.min(axis=1), 0.01), abs=1e-8)
    assert found.is_near.tolist() == (found.distance < found.own_distance).tolist()


def test_copies_and_invisibly_changed_ones_are_near_and_images_left_out_of_training_hardly_ever():
    noise = np.random.default_rng(0).normal(scale=0.02, size=(30, 1, 8, 8)).astype(np.float32)
    copies = as_queries(RAW[TRAINING[:30]])
    others = as_queries(RAW[1200:1500])
    found = near_duplicates(np.concatenate([copies, copies + noise, others]), RAW, LEVELS, TRAINING, source())
    assert found.example_id[:60].tolist() == [*TRAINING[:30], *TRAINING[:30]]
    assert found.distance[:30] == pytest.approx(0, abs=1e-6)
    assert found.distance[30:60].min() > 0.005 and found.distance[30:60].max() < 0.015
    assert found.is_near[:60].all()
    assert found.is_near[60:].mean() < 0.03


def test_only_training_images_count():
    query = as_queries(RAW[1:2])  # example 1 is not in training
    found = near_duplicates(query, RAW, LEVELS, TRAINING, source())
    assert found.example_id[0] in TRAINING and found.distance[0] > 0.05
    assert near_duplicates(query, RAW, LEVELS, np.arange(1200), source()).example_id.tolist() == [1]


def test_where_the_data_has_copies_of_its_own_the_invisible_difference_decides():
    twins = np.concatenate([RAW[:50], RAW[:50]])
    queries = as_queries(RAW[:2])
    queries[1] += 0.3
    found = near_duplicates(queries, twins, LEVELS, np.arange(100), source())
    assert found.own_distance == 0 and found.is_near.tolist() == [True, False]


def test_a_single_training_image_has_no_own_distance():
    found = near_duplicates(as_queries(RAW[:2]), RAW, LEVELS, np.array([1]), source())
    assert found.own_distance is None
    assert found.example_id.tolist() == [1, 1] and found.is_near.tolist() == [False, True]


def test_the_sample_depends_on_the_generator_and_the_block_size_changes_nothing(monkeypatch):
    queries = as_queries(RAW[1500:1540])
    first = near_duplicates(queries, RAW, LEVELS, TRAINING, source(), num_references=60)
    assert near_duplicates(queries, RAW, LEVELS, TRAINING, source(1), num_references=60).own_distance != (
        first.own_distance
    )
    monkeypatch.setattr(module, "BLOCK_BYTES", 17 * 64 * 8)
    again = near_duplicates(queries, RAW, LEVELS, TRAINING, source(), num_references=60)
    assert again.example_id.tolist() == first.example_id.tolist()
    assert again.distance.tolist() == first.distance.tolist() and again.own_distance == first.own_distance


def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 2**18)
    peaks = []
    for count in (2_000, 20_000):
        raw = np.memmap(tmp_path / f"{count}", np.uint8, "w+", shape=(count, 1, 8, 8))
        raw[:] = np.random.default_rng(0).integers(0, 17, raw.shape)
        training = np.arange(count)
        tracemalloc.start()
        near_duplicates(as_queries(RAW[:20]), raw, LEVELS, training, source(), num_references=50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20_000 * 64 * 8


def test_pictures_of_another_shape_and_no_training_image_are_refused():
    for queries, training in ((as_queries(RAW[:1, :, :4]), TRAINING), (as_queries(RAW[:1]), TRAINING[:0])):
        with pytest.raises(ValueError, match="queries of shape"):
            near_duplicates(queries, RAW, LEVELS, training, source())
