"""Several queries unlearned at once with stacked parameters, against the same queries unlearned one at a time."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from mucs_cli.attribution import unlearning
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import (
    NonFiniteLossError,
    UnlearningSettings,
    batch_source,
    choose_stack_size,
    step_seconds,
    unlearn,
    unlearn_stacked,
)
from mucs_cli.attribution.unlearning_batch import similarity_weight
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.pretrained_networks import PretrainedDiT, PretrainedUNet
from mucs_cli.diffusion.unet import UNet
from mucs_cli.diffusion.vp import VPDenoiser
from mucs_cli.errors import UserError
from mucs_cli.rng import ShuffledOrder

DIGITS = torch.from_numpy(load_digits().images[:24, None]) / 8 - 1  # [24, 1, 8, 8], float64, in [-1, 1]
LABELS = torch.from_numpy(load_digits().target[:24])
QUERY_IDS = (4, 0, 7, 2)
RULE = UnlearningSettings(
    null_loss=4.0, learning_rate=1e-2, forget_weight=3.0, forget_batch_size=6, max_steps=60, tolerance=0.8
)
"""Ends the four queries after different numbers of updates."""
EXACT = replace(RULE, num_steps=4)


def opened(network):
    """In float64 and evaluation mode, with an output that is not zero."""
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "modulation" in name or "proj_out" in name or "augmentation" in name:
            nn.init.normal_(parameter, std=0.2)
    return network.double().eval()


def dit(**options):
    torch.manual_seed(0)
    return EDMDenoiser(opened(DiT(8, 1, 4, 16, 2, 2, num_classes=10, **options)), 0.5)


def names_of(denoiser, preset="mlp"):
    return trainable_names([name for name, _ in denoiser.network.named_parameters()], preset)


def query_of(query_id, denoiser):
    label = LABELS[query_id : query_id + 1] if denoiser.network.is_conditional else None
    return DIGITS[query_id] * 0.8, label


def retain_batch(query_id, denoiser):
    """Training images in an order of the query's own."""
    order = ShuffledOrder(len(DIGITS), 0, "retain_order", query_id)

    def batch(number):
        rows = order.batch(number, 5)
        return DIGITS[rows], LABELS[rows] if denoiser.network.is_conditional else None

    return batch


def parts(query_id, denoiser, sharpness=0.0, retains=True, noise_levels=None):
    image, _ = query_of(query_id, denoiser)
    retain = retain_batch(query_id, denoiser) if retains else None
    weight = None
    if sharpness:
        weight = lambda number: similarity_weight(retain(number)[0], image, sharpness)  # noqa: E731
    return retain, {"noise_levels": noise_levels, "instance_weight": weight}


def one_at_a_time(denoiser, settings=RULE, trainable=None, query_ids=QUERY_IDS, **options):
    results = {}
    for query_id in query_ids:
        retain, extra = parts(query_id, denoiser, **options)
        results[query_id] = unlearn(
            copy.deepcopy(denoiser),
            trainable or names_of(denoiser),
            *query_of(query_id, denoiser),
            retain,
            settings,
            0,
            query_id,
            **extra,
        )
    return results


def stacked(denoiser, settings=RULE, trainable=None, query_ids=QUERY_IDS, on_step=None, **options):
    sources = []
    for query_id in query_ids:
        retain, extra = parts(query_id, denoiser, **options)
        sources.append(batch_source(denoiser, *query_of(query_id, denoiser), retain, settings, 0, query_id, **extra))
    return dict(unlearn_stacked(denoiser, trainable or names_of(denoiser), sources, settings, on_step))


def assert_agree(first, second, rtol=1e-7):
    assert first.keys() == second.keys()
    for query_id, a in first.items():
        b = second[query_id]
        assert (a.num_steps, a.reached_bound) == (b.num_steps, b.reached_bound)
        assert a.base_query_loss == pytest.approx(b.base_query_loss, rel=rtol)
        assert a.query_loss == pytest.approx(b.query_loss, rel=rtol)
        assert [entry.step for entry in a.log] == [entry.step for entry in b.log]
        for mine, other in zip(a.log, b.log, strict=True):
            assert mine.forget_loss == pytest.approx(other.forget_loss, rel=rtol)
            assert mine.retain_loss == (
                None if other.retain_loss is None else pytest.approx(other.retain_loss, rel=rtol)
            )
        assert list(a.tensors) == list(b.tensors)
        for name, tensor in a.tensors.items():
            torch.testing.assert_close(tensor, b.tensors[name], rtol=rtol, atol=1e-9)


def largest_change(results, denoiser):
    base = dict(denoiser.network.named_parameters())
    return min(max(float((t - base[n].detach()).abs().max()) for n, t in r.tensors.items()) for r in results.values())


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_queries_that_stop_at_different_steps_equal_each_alone(optimizer):
    settings = replace(RULE, optimizer=optimizer, weight_decay=0.1, learning_rate=0.05 if optimizer == "sgd" else 1e-2)
    denoiser = dit()
    alone = one_at_a_time(denoiser, settings)
    steps = {result.num_steps for result in alone.values()}
    assert len(steps) > 2  # the stack shrinks more than once
    assert all(result.reached_bound for result in alone.values())
    assert largest_change(alone, denoiser) > 1e-2
    assert_agree(alone, stacked(denoiser, settings))


def test_a_query_that_is_already_forgotten_gets_no_update_and_the_others_go_on():
    denoiser = dit()
    first = {q: r.log[0].forget_loss for q, r in one_at_a_time(denoiser, replace(RULE, num_steps=1)).items()}
    (low, *_, high) = sorted(first, key=first.get)
    bound = (first[high] + sorted(first.values())[-2]) / 2
    settings = replace(RULE, null_loss=1e9, tolerance=bound / 1e9, max_steps=30)
    alone = one_at_a_time(denoiser, settings)
    assert alone[high].num_steps == 0
    assert alone[low].num_steps > 0
    together = stacked(denoiser, settings)
    assert_agree(alone, together)
    base = dict(denoiser.network.named_parameters())
    assert all(torch.equal(tensor, base[name]) for name, tensor in together[high].tensors.items())


def test_a_result_comes_as_soon_as_its_query_has_stopped():
    denoiser, steps = dit(), []
    sources = [batch_source(denoiser, *query_of(q, denoiser), retain_batch(q, denoiser), RULE, 0, q) for q in QUERY_IDS]
    for query_id, result in unlearn_stacked(denoiser, names_of(denoiser), sources, RULE, lambda _, s: steps.append(s)):
        assert max(entry.step for entry in steps) == result.num_steps, query_id
    assert len(steps) > 4


@pytest.mark.parametrize(
    "change",
    [
        {"num_steps": 0},
        {"num_steps": 3, "num_batches": 2},
        {"num_steps": 3, "micro_batch_size": 4},
        {"num_steps": 3, "same_noise": True},
        {"num_steps": 3, "horizontal_flip": True},
        {"max_steps": 3, "tolerance": 1.0},
    ],
    ids=str,
)
def test_every_setting_means_the_same_for_a_stack(change):
    settings = replace(RULE, **change)
    assert_agree(one_at_a_time(dit(), settings), stacked(dit(), settings))


def test_augmentation_labels_instance_weights_and_levels_of_a_grid_reach_every_query():
    denoiser = dit(augmentation_dim=9)
    settings = replace(EXACT, augmentation=0.9)
    options = {"sharpness": 2.0, "noise_levels": torch.tensor([0.3, 1.0, 4.0])}
    alone = one_at_a_time(denoiser, settings, **options)
    assert_agree(alone, stacked(denoiser, settings, **options))
    plain = one_at_a_time(denoiser, EXACT)
    assert all(alone[q].log[0].retain_loss != plain[q].log[0].retain_loss for q in QUERY_IDS)


def test_plain_ascent_without_retain_term_and_bound_equals_each_alone():
    settings = UnlearningSettings(None, 1e-3, forget_weight=1.0, weight_decay=0.0, forget_batch_size=6, num_steps=5)
    denoiser = dit()
    alone = one_at_a_time(denoiser, settings, names_of(denoiser, "all"), retains=False)
    assert all(entry.retain_loss is None for result in alone.values() for entry in result.log)
    assert_agree(alone, stacked(denoiser, settings, names_of(denoiser, "all"), retains=False))


def networks():
    torch.manual_seed(0)
    yield "edm unet", EDMDenoiser(opened(UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=4)), 0.5), "all_but_bias"
    yield "vp dit", VPDenoiser(opened(DiT(8, 1, 4, 16, 2, 2))), "attention"
    for prediction in ("epsilon", "v_prediction"):
        network = opened(UNet(8, 1, 8, (1, 2), 1, (), norm_groups=4, num_classes=10))
        yield f"ddpm {prediction}", DDPMDenoiser(network, prediction_type=prediction), "all"
    foreign = PretrainedUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    )
    yield "pretrained unet", EDMDenoiser(opened(foreign), 0.5), "all_but_bias"
    transformer = PretrainedDiT(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=8,
        patch_size=4,
        num_embeds_ada_norm=10,
    )
    transformer.keep_labels()
    yield "pretrained dit", EDMDenoiser(opened(transformer), 0.5), "all"


@pytest.mark.parametrize(("denoiser", "preset"), [pytest.param(d, p, id=i) for i, d, p in networks()])
def test_every_network_and_preconditioning_can_be_stacked(denoiser, preset):
    trainable = names_of(denoiser, preset)
    alone = one_at_a_time(denoiser, EXACT, trainable)
    assert largest_change(alone, denoiser) > 1e-3
    assert_agree(alone, stacked(denoiser, EXACT, trainable))


def test_the_order_and_the_company_of_queries_do_not_matter():
    whole = stacked(dit())
    assert_agree(whole, {q: stacked(dit(), query_ids=tuple(reversed(QUERY_IDS)))[q] for q in QUERY_IDS})
    assert_agree({q: whole[q] for q in (7, 4)}, stacked(dit(), query_ids=(7, 4)))


def test_the_base_model_keeps_its_weights_to_the_bit():
    denoiser = dit()
    before = {name: p.detach().clone() for name, p in denoiser.network.named_parameters()}
    stacked(denoiser)
    assert all(torch.equal(p, before[name]) for name, p in denoiser.network.named_parameters())


def test_a_loss_that_is_not_finite_names_its_query_and_step():
    with pytest.raises(NonFiniteLossError) as caught:
        stacked(dit(), replace(EXACT, learning_rate=1e200))
    assert caught.value.query_id in QUERY_IDS
    assert caught.value.step >= 1
    assert not math.isfinite(caught.value.value)


def test_the_computing_time_is_shared_out_among_the_queries():
    results = stacked(dit(), EXACT)
    seconds = [result.seconds for result in results.values()]
    assert min(seconds) > 0
    assert max(seconds) == pytest.approx(min(seconds))


# --- how many at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alone", "stacks", "num_queries", "expected"),
    [
        (0.01, {4: 0.004, 16: 0.002}, 40, 16),
        (0.01, {4: 0.002, 16: 0.004}, 40, 4),
        (0.01, {4: 0.009, 16: 0.0085}, 40, 1),  # not clearly faster
        (0.01, {4: 0.004, 7: 0.003}, 7, 7),
        (0.01, {3: 0.004}, 3, 3),
        (0.5, {}, 40, 1),  # long steps: no stack is tried
        (None, {}, 1, 1),  # nothing to stack
        (0.01, {4: math.inf, 16: math.inf}, 40, 1),  # no room
    ],
)
def test_a_stack_is_chosen_where_it_is_clearly_faster(alone, stacks, num_queries, expected):
    measured = {1: alone} | stacks
    asked = []
    assert choose_stack_size(lambda count: (asked.append(count), measured[count])[1], num_queries) == expected
    assert set(asked) == {size for size, seconds in measured.items() if seconds is not None}


@pytest.mark.parametrize("count", [1, 3])
def test_timing_a_step_moves_no_weight(count):
    denoiser = dit()
    before = {name: p.detach().clone() for name, p in denoiser.network.named_parameters()}
    sources = [
        batch_source(denoiser, *query_of(q, denoiser), retain_batch(q, denoiser), RULE, 0, q) for q in QUERY_IDS[:count]
    ]
    assert 0 < step_seconds(denoiser, names_of(denoiser), sources, RULE) < 60
    assert all(torch.equal(p, before[name]) for name, p in denoiser.network.named_parameters())


def test_memory_that_is_too_small_for_one_image_of_a_stack_is_for_whoever_can_stack_fewer(monkeypatch):
    def starved(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(unlearning, "_accumulate_gradient", starved)
    with pytest.raises(torch.OutOfMemoryError):
        stacked(dit())
    with pytest.raises(UserError, match=r"unlearning\.micro_batch_size: got out of memory at 1"):
        stacked(dit(), query_ids=(4,))
