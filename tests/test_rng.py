import torch

from mucs_cli.rng import ShuffledOrder, derive_seed, generator


def test_streams_differ_by_seed_name_and_index_and_repeat_otherwise():
    seeds = {derive_seed(s, n, i) for s in (0, 1) for n in ("noise", "order") for i in (0, 1)}
    assert len(seeds) == 8
    assert derive_seed(0, "noise", 1) == derive_seed(0, "noise", 1)
    assert derive_seed(0, "noise", 1, 23) != derive_seed(0, "noise", 12, 3)
    assert torch.equal(torch.randn(3, generator=generator(5, "x")), torch.randn(3, generator=generator(5, "x")))


def test_derived_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "noise", 0) == 4847351686998599284


def test_an_order_visits_every_item_once_an_epoch_and_any_batch_can_be_asked_for_first():
    order = ShuffledOrder(10, 3, "order")
    items = torch.cat([order.batch(step, 4) for step in range(10)])
    for epoch in range(4):
        assert sorted(items[epoch * 10 : epoch * 10 + 10].tolist()) == list(range(10))
    assert items[:10].tolist() != items[10:20].tolist()
    assert torch.equal(ShuffledOrder(10, 3, "order").batch(7, 4), items[28:32])


def test_a_batch_larger_than_the_data_repeats_items():
    batch = ShuffledOrder(3, 0, "order").batch(0, 8)
    assert len(batch) == 8
    assert sorted(batch[:6].tolist()) == [0, 0, 1, 1, 2, 2]
