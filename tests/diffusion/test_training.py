import pytest
import torch

from mucs_cli import processes
from mucs_cli.artifacts import read_tensors, write_tensors
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.training import Trainer, TrainingSettings, ema_decay_at, learning_rate_at, train

LABELS = torch.arange(20) % 3
IMAGES = (LABELS - 1.0).view(20, 1, 1, 1) + 0.2 * torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def batch(step):
    rows = (torch.arange(8) + 8 * step) % 20
    return IMAGES[rows], LABELS[rows]


def new_trainer(**settings):
    torch.manual_seed(0)
    network = DiT(4, 1, 2, 16, 2, 2, dropout=0.2, num_classes=3, augmentation_dim=9)
    values = {"num_steps": 12, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 3, "decay": "cosine"} | settings
    return Trainer(EDMDenoiser(network, 0.5), TrainingSettings(**values))


def run(trainer):
    train(trainer, batch, lambda loss: None)
    return trainer.state()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_resumed_from_disk_equals_an_uninterrupted_one_to_the_bit(tmp_path):
    settings = {"augmentation": 0.3, "horizontal_flip": True}
    whole = run(new_trainer(**settings))
    first = new_trainer(**settings)
    for step in range(5):
        first.update(*batch(step))
    write_tensors(tmp_path / "state.safetensors", first.state())
    second = new_trainer(**settings)
    torch.manual_seed(999)
    second.load_state(read_tensors(tmp_path / "state.safetensors"))
    assert second.step == 5
    assert equal(whole, run(second))
    assert not equal(whole, run(new_trainer(**settings, seed=1)))


def test_training_lowers_the_loss():
    trainer = new_trainer(num_steps=150, decay="constant")
    run(trainer)
    assert sum(trainer.losses[-20:]) < 0.75 * sum(trainer.losses[:20])


def test_first_step_is_adamw_on_the_mean_loss_and_the_average_follows():
    trainer, plain = new_trainer(condition_dropout=0.0), new_trainer()
    plain.denoiser.network.load_state_dict(trainer.denoiser.network.state_dict())
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    loss = trainer.update(*batch(0))

    from mucs_cli.rng import derive_seed, generator

    image, label = batch(0)
    source = generator(0, "training", 0)
    sigma = plain.denoiser.training_sigma(8, source)
    noise = torch.randn(image.shape, generator=source)
    optimizer = torch.optim.AdamW(plain.parameters.values(), lr=1e-2 / 3, weight_decay=0.01)
    torch.manual_seed(derive_seed(0, "dropout", 0))
    expected = plain.denoiser.loss(image, noise, sigma, label).mean()
    expected.backward()
    optimizer.step()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(parameter, plain.parameters[name], rtol=1e-5, atol=1e-7)
        average = before[name] + 0.9 * (parameter.detach() - before[name])
        torch.testing.assert_close(trainer.average[name], average, rtol=1e-5, atol=1e-7)


def test_condition_dropout_of_one_trains_without_conditions():
    dropped, null = new_trainer(condition_dropout=1.0), new_trainer(condition_dropout=0.0)
    assert dropped.update(*batch(0)) == pytest.approx(null.update(batch(0)[0], torch.full((8,), 3)))
    gradient = dropped.denoiser.network.condition_embed.label_embedding.weight.grad
    assert float(gradient[:3].abs().sum()) == 0


def test_flip_and_augmentation_change_what_is_trained_on():
    losses = {
        new_trainer(**settings).update(*batch(0)) for settings in ({}, {"horizontal_flip": True}, {"augmentation": 0.5})
    }
    assert len(losses) == 3


def test_micro_batches_and_running_out_of_memory_give_the_same_gradient(monkeypatch):
    def trainer(**settings):
        new = new_trainer(**settings)
        for module in new.denoiser.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # its masks depend on the shape of the batch
        return new

    whole, pieces, starved = trainer(), trainer(micro_batch_size=3), trainer()
    forward = starved.denoiser.network.forward

    def small_memory(sample, *arguments):
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *arguments)

    monkeypatch.setattr(starved.denoiser.network, "forward", small_memory)
    losses = [t.update(*batch(0)) for t in (whole, pieces, starved)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert starved.micro_batch_size == 2
    for name, parameter in whole.parameters.items():
        torch.testing.assert_close(parameter, pieces.parameters[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parameter, starved.parameters[name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = new_trainer()
    before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    image, label = batch(0)
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.update(image * float("nan"), label)
    assert all(torch.equal(p, before[name]) for name, p in trainer.parameters.items())


@pytest.mark.parametrize(("decay", "half", "last"), [("constant", 1, 1), ("linear", 0.5, 0.01), ("cosine", 0.5, 0)])
def test_learning_rate_warms_up_then_decays_as_named(decay, half, last):
    settings = TrainingSettings(num_steps=110, warmup_steps=10, learning_rate=2.0, decay=decay)
    assert [learning_rate_at(step, settings) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate_at(10, settings) == pytest.approx(2)
    assert learning_rate_at(60, settings) == pytest.approx(2 * half)
    assert learning_rate_at(109, settings) == pytest.approx(2 * last, abs=1e-3)


def test_the_average_forgets_the_initial_weights_quickly_then_keeps_its_decay():
    assert ema_decay_at(0, 0.999) == pytest.approx(0.1)
    assert ema_decay_at(100_000, 0.999) == 0.999


def validated(**settings):
    """A trainer whose held-out loss after measurement i is the i-th of ``losses``."""
    losses = settings.pop("losses")
    trainer = new_trainer(validate_every=2, **settings)
    averages = []

    def measure(denoiser):
        averages.append({name: p.detach().clone() for name, p in denoiser.network.named_parameters()})
        return losses[len(averages) - 1]

    train(trainer, batch, lambda loss: None, measure)
    return trainer, averages


def test_the_weights_with_the_lowest_held_out_loss_are_used():
    trainer, averages = validated(losses=[5.0, 3.0, 4.0, 3.0, 6.0, 7.0])
    assert trainer.step == 12 and trainer.best_step == 4
    assert equal(trainer.result(), averages[1])
    assert not equal(trainer.result(), trainer.average)


def test_training_stops_after_as_many_measurements_without_a_lower_loss_as_asked():
    trainer, _ = validated(losses=[5.0, 3.0, 4.0, 3.5, 3.1, 1.0], patience=2)
    assert trainer.step == 8 and trainer.best_step == 4


def test_measuring_does_not_change_training():
    trainer, averages = validated(losses=[1.0] * 6)
    plain = new_trainer()
    run(plain)
    assert equal(trainer.average, plain.average)
    assert equal(averages[-1], plain.average)
    assert equal(plain.result(), plain.average)


def test_a_resumed_run_remembers_its_measurements(tmp_path):
    losses = [5.0, 3.0, 4.0, 3.5, 3.2, 3.1]
    whole, _ = validated(losses=losses, patience=3, augmentation=0.3)
    first = new_trainer(validate_every=2, patience=3, augmentation=0.3)
    for step in range(4):
        first.update(*batch(step))
        if first.step % 2 == 0:
            first.validate(lambda denoiser: losses[len(first.validation)])
    write_tensors(tmp_path / "state.safetensors", first.state())
    second = new_trainer(validate_every=2, patience=3, augmentation=0.3)
    second.load_state(read_tensors(tmp_path / "state.safetensors"))
    train(second, batch, lambda loss: None, lambda denoiser: losses[len(second.validation)])
    assert (second.step, second.best_step) == (whole.step, whole.best_step) == (10, 4)
    assert equal(second.result(), whole.result())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_gradients_of_parts_of_a_batch_add_up_to_its_own_unless_each_part_drops_out_by_itself(monkeypatch, dropout):
    def gradients(count, rank):
        trainer = new_trainer(micro_batch_size=3, augmentation=0.3, horizontal_flip=True)
        for module in trainer.denoiser.network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        with torch.no_grad():  # what starts at zero would hide the rest
            for i, parameter in enumerate(trainer.parameters.values()):
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        with processes.seeing(processes.View(count, rank)):
            trainer.update(*batch(0))
        return torch.cat([p.grad.flatten() for p in trainer.parameters.values()])

    monkeypatch.setattr(processes, "sum_up", lambda tensor: None)
    whole, parts = gradients(1, 0), [gradients(3, rank) for rank in range(3)]
    assert all(part.abs().max() > 1e-3 for part in parts)
    assert ((whole - sum(parts)).abs().max() < 1e-5) == (dropout == 0)
    assert torch.equal(gradients(3, 1), parts[1])


@pytest.mark.parametrize("where", ["update", "measurement"])
def test_an_interruption_around_a_measurement_leaves_a_state_that_goes_on_to_the_same_bits(where):
    settings = {"num_steps": 9, "validate_every": 3}

    def measure(denoiser):
        return float(denoiser.loss(IMAGES[:4], IMAGES[4:8], torch.full((4,), 0.5), LABELS[:4]).detach().mean())

    whole = new_trainer(**settings)
    train(whole, batch, lambda loss: None, measure)
    first = new_trainer(**settings)

    def interrupted(denoiser):
        if first.step == 6:
            raise KeyboardInterrupt
        return measure(denoiser)

    if where == "measurement":
        with pytest.raises(KeyboardInterrupt):
            train(first, batch, lambda loss: None, interrupted)
    else:
        for step in range(6):
            first.update(*batch(step))
            if step == 2:
                first.validate(measure)
    assert (first.step, len(first.validation)) == (6, 1)
    second = new_trainer(**settings)
    second.load_state({name: tensor.clone() for name, tensor in first.state().items()})
    train(second, batch, lambda loss: None, measure)
    assert len(whole.validation) == 3
    assert equal(whole.state(), second.state())


def test_a_state_saved_while_the_average_is_measured_holds_the_weights_themselves():
    trainer = new_trainer()
    trainer.update(*batch(0))
    before = {name: tensor.clone() for name, tensor in trainer.state().items()}
    with trainer.averaged():
        assert not torch.equal(next(iter(trainer.parameters.values())), next(iter(trainer._own.values())))
        assert equal(before, trainer.state())
    assert equal(before, trainer.state())
