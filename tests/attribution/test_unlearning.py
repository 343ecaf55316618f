import math

import pytest
import torch
from torch import nn

from mucs_cli.attribution.null_loss import monte_carlo_null_loss
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import NonFiniteLossError, UnlearningSettings, unlearn
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.unet import UNet
from mucs_cli.rng import generator


def model(seed=0):
    """A small DiT whose output is not zero, in float64, without training."""
    torch.manual_seed(seed)
    network = DiT(4, 1, 2, 16, 2, 2, dropout=0.5, num_classes=3).double()
    for name, parameter in network.named_parameters():
        if "modulation" in name or "proj_out" in name:
            nn.init.normal_(parameter, std=0.3)
    return EDMDenoiser(network, 0.5)


IMAGES = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
LABELS = torch.arange(30) % 3
QUERY, QUERY_LABEL = IMAGES[0] * 0.5, LABELS[:1]


def retain(step):
    rows = torch.arange(step * 5, step * 5 + 5) % 30
    return IMAGES[rows], LABELS[rows]


def run(denoiser, preset="mlp", query_id=0, **settings):
    chosen = trainable_names([n for n, _ in denoiser.network.named_parameters()], preset)
    values = {"null_loss": 1e9, "learning_rate": 1e-3, "forget_batch_size": 6, "num_steps": 3} | settings
    return chosen, unlearn(
        denoiser, chosen, QUERY, QUERY_LABEL, retain, UnlearningSettings(**values), seed=0, query_id=query_id
    )


def weights(denoiser):
    return {name: p.detach().clone() for name, p in denoiser.network.named_parameters()}


def test_frozen_tensors_stay_bit_identical_and_every_trainable_one_changes():
    denoiser = model()
    before = weights(denoiser)
    chosen, result = run(denoiser)
    assert set(result.tensors) == set(chosen)
    for name, tensor in weights(denoiser).items():
        if name in chosen:
            assert not torch.equal(tensor, before[name]), name
            assert torch.equal(tensor, result.tensors[name])
        else:
            assert torch.equal(tensor, before[name]), name


def objective(denoiser, step, *, forget_weight, bound, copies=6):
    """The objective of one step, written out sample by sample from the method's formula and the documented streams."""
    source = generator(0, "unlearning", 0, step)
    images, labels = retain(step)
    sigma = torch.cat([denoiser.training_sigma(5, source), denoiser.training_sigma(copies, source)]).double()
    noise = torch.randn(5 + copies, 1, 4, 4, generator=source).double()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        total = total + denoiser.loss(images[i : i + 1], noise[i : i + 1], sigma[i : i + 1], labels[i : i + 1])[0] / 5
    for i in range(5, 5 + copies):
        loss = denoiser.loss(QUERY[None], noise[i : i + 1], sigma[i : i + 1], QUERY_LABEL)[0]
        total = total - forget_weight * (loss if float(loss.detach()) < bound else torch.tensor(bound)) / copies
    return total


@pytest.mark.parametrize("bound", [0.9, 1e9])
def test_three_steps_equal_adamw_on_the_objective_written_out(bound):
    denoiser, plain = model(), model()
    chosen, result = run(denoiser, null_loss=bound, forget_weight=0.3)
    plain.network.eval()
    parameters = [p for n, p in plain.network.named_parameters() if n in chosen]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    for step in range(3):
        optimizer.zero_grad()
        objective(plain, step, forget_weight=0.3, bound=bound).backward()
        optimizer.step()
    expected = weights(plain)
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-10)


def test_a_batch_whose_copies_are_all_clamped_has_exactly_no_forget_gradient():
    bound = 1e-6  # below every loss
    with_forget, without = model(), model()
    _, first = run(with_forget, null_loss=bound, forget_weight=10.0)
    _, second = run(without, null_loss=bound, forget_weight=0.0)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name])
    _, free = run(model(), forget_weight=10.0)
    assert any(not torch.equal(free.tensors[name], second.tensors[name]) for name in free.tensors)


def test_the_clamp_is_per_sample_and_precedes_the_mean():
    denoiser = model()
    source = generator(0, "unlearning", 0, 0)
    sigma = torch.cat([denoiser.training_sigma(5, source), denoiser.training_sigma(6, source)]).double()[5:]
    noise = torch.randn(11, 1, 4, 4, generator=source).double()[5:]
    denoiser.network.eval()
    loss = denoiser.loss(QUERY.expand(6, 1, 4, 4), noise, sigma, QUERY_LABEL.expand(6)).detach()
    bound = float(loss.median())
    _, result = run(denoiser, null_loss=bound, num_steps=1)
    assert result.log[0].forget_loss == pytest.approx(float(loss.clamp(max=bound).mean()), rel=1e-12)
    assert result.log[0].forget_loss < min(float(loss.mean()), bound)


def test_a_query_that_is_already_forgotten_gets_no_update():
    denoiser = model()
    before = weights(denoiser)
    _, result = run(denoiser, null_loss=1e-6, num_steps=None)
    assert result.num_steps == 0
    assert result.reached_bound is True
    assert all(torch.equal(tensor, before[name]) for name, tensor in result.tensors.items())


def test_the_stop_rule_is_tested_before_the_update_and_ascent_reaches_the_bound():
    denoiser = model()
    _, result = run(
        denoiser, preset="all", null_loss=12.0, learning_rate=3e-3, forget_weight=5.0, num_steps=None, max_steps=400
    )
    assert result.reached_bound is True
    assert 1 < result.num_steps < 400
    assert len(result.log) == result.num_steps + 1
    reached = [entry.forget_loss >= 0.95 * 12.0 for entry in result.log]
    assert reached == [False] * result.num_steps + [True]
    _, exact = run(
        model(), preset="all", null_loss=12.0, learning_rate=3e-3, forget_weight=5.0, num_steps=result.num_steps
    )
    assert all(torch.equal(tensor, result.tensors[name]) for name, tensor in exact.tensors.items())


def test_the_step_cap_is_reported_and_exact_step_counts_are_exact():
    _, capped = run(model(), num_steps=None, max_steps=4, tolerance=1.0)
    assert (capped.num_steps, capped.reached_bound) == (4, False)
    _, exact = run(model(), num_steps=2)
    assert (exact.num_steps, exact.reached_bound) == (2, None)


def test_unlearning_runs_without_dropout():
    first, second = model(), model()
    first.network.train()
    torch.manual_seed(1)
    _, a = run(first)
    torch.manual_seed(2)
    _, b = run(second)
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def test_each_query_has_draws_of_its_own():
    _, a = run(model(), query_id=0)
    _, b = run(model(), query_id=1)
    assert a.log[0].forget_loss != b.log[0].forget_loss


def test_micro_batches_give_the_same_update():
    _, whole = run(model())
    _, pieces = run(model(), micro_batch_size=4)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(tensor, pieces.tensors[name], rtol=1e-9, atol=1e-12)


def test_running_out_of_memory_halves_the_micro_batch_and_says_so(caplog, monkeypatch):
    denoiser = model()
    whole = denoiser.network.forward

    def small_memory(sample, *arguments):
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(sample, *arguments)

    monkeypatch.setattr(denoiser.network, "forward", small_memory)
    monkeypatch.setattr("mucs_cli.runtime.log.propagate", True)
    _, result = run(denoiser)
    _, expected = run(model())
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(tensor, result.tensors[name], rtol=1e-9, atol=1e-12)
    assert "going on with 5" in caplog.text
    assert "going on with 2" in caplog.text


def test_a_loss_that_is_not_finite_is_named_with_its_step():
    denoiser = model()
    with pytest.raises(NonFiniteLossError) as caught:
        run(denoiser, learning_rate=1e200, num_steps=5)
    assert caught.value.step >= 1
    assert not math.isfinite(caught.value.value)


def test_monte_carlo_null_loss_of_a_zero_head_is_its_closed_form():
    denoiser = EDMDenoiser(DiT(4, 1, 2, 16, 1, 2).eval(), 0.5)
    image = (IMAGES.float() * 0.9).repeat(300, 1, 1, 1)
    batches = [(part, None) for part in image.split(100)]
    measured = monte_carlo_null_loss(denoiser, batches, 0, torch.device("cpu"))
    assert measured == pytest.approx(denoiser.null_loss(float(image.square().mean())), rel=0.02)


def test_monte_carlo_null_loss_uses_at_most_two_hundred_batches_and_differs_for_an_open_head():
    torch.manual_seed(0)
    unet = EDMDenoiser(UNet(4, 1, 8, (1, 2), 1, (2,), norm_groups=8).eval(), 0.5)
    seen = []

    def batches():
        for i in range(300):
            seen.append(i)
            yield IMAGES[:2].float(), None

    measured = monte_carlo_null_loss(unet, batches(), 0, torch.device("cpu"))
    assert len(seen) == 201
    assert abs(measured - unet.null_loss(float(IMAGES[:2].square().mean()))) > 0.02


def test_a_monte_carlo_null_loss_goes_on_from_its_sums_to_the_same_bits():
    denoiser = model()
    images = torch.rand(230, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2 - 1

    def batches(first):
        return [(images[start : start + 100], torch.zeros(100, dtype=torch.long)) for start in range(first, 200, 100)]

    told = []
    arguments = (0, torch.device("cpu"))
    whole = monte_carlo_null_loss(denoiser, batches(0), *arguments, on_batch=lambda *sums: told.append(sums))
    assert [count for _, count in told] == [100, 200]
    for number, sums in enumerate(told, start=1):
        assert monte_carlo_null_loss(denoiser, batches(100 * number), *arguments, sums) == whole
    assert monte_carlo_null_loss(denoiser, batches(100), *arguments) != whole
