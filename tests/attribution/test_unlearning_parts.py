"""The parts of the unlearning engine, alone and as Forward-INF and AbU put them together, on handwritten digits."""

import copy
import math
from dataclasses import fields

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from mucs_cli.attribution.fisher import DiagonalFisher, damped_inverse
from mucs_cli.attribution.reducers import reduce
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import NonFiniteLossError, UnlearningSettings, unlearn
from mucs_cli.attribution.unlearning_batch import BatchSource, similarity_weight
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.pretrained_networks import PretrainedUNet
from mucs_cli.diffusion.unet import UNet
from mucs_cli.rng import generator

DIGITS = torch.from_numpy(load_digits().images[:24, None]) / 8 - 1  # [24, 1, 8, 8], float64, in [-1, 1]
LABELS = torch.from_numpy(load_digits().target[:24])
QUERY, QUERY_LABEL = DIGITS[20] * 0.8, LABELS[20:21]
BANK = draw_noise_bank(5, (1, 8, 8))
NUM_TRAINING = 24


def dit(augmentation_dim=0, num_layers=2):
    """A small conditional DiT whose output is not zero, in float64, without training."""
    torch.manual_seed(0)
    network = DiT(8, 1, 4, 16, num_layers, 2, num_classes=10, augmentation_dim=augmentation_dim).double()
    for name, parameter in network.named_parameters():
        if "modulation" in name or "proj_out" in name or "augmentation" in name:
            nn.init.normal_(parameter, std=0.2)
    return EDMDenoiser(network.eval(), 0.5)


def retain(number):
    rows = torch.arange(number * 5, number * 5 + 5) % NUM_TRAINING
    return DIGITS[rows], LABELS[rows]


def run(denoiser=None, preset="mlp", retain_batch=retain, query_id=0, parts=None, **settings):
    denoiser = dit() if denoiser is None else denoiser
    chosen = trainable_names([n for n, _ in denoiser.network.named_parameters()], preset)
    values = {"null_loss": 1e9, "learning_rate": 1e-3, "forget_batch_size": 6, "num_steps": 2} | settings
    return unlearn(
        denoiser, chosen, QUERY, QUERY_LABEL, retain_batch, UnlearningSettings(**values), 0, query_id, **parts or {}
    )


def ascend(denoiser=None, **settings):
    """Plain gradient ascent on the query: no retain term, no bound, SGD."""
    values = {"null_loss": None, "forget_weight": 1.0, "weight_decay": 0.0, "optimizer": "sgd", "num_steps": 1}
    return run(denoiser, retain_batch=None, **values | settings)


def same(a, b):
    return all(torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items())


def bank_loss(denoiser, tensors=None):
    """[N, n], float64, image by image and draw by draw."""
    other = copy.deepcopy(denoiser)
    other.network.load_state_dict(tensors or {}, strict=False)
    sigma, noise = BANK.sigma.double(), BANK.noise.double()
    with torch.no_grad():
        rows = [
            [other.loss(DIGITS[i : i + 1], noise[n][None], sigma[n : n + 1], LABELS[i : i + 1])[0] for n in range(5)]
            for i in range(NUM_TRAINING)
        ]
    return torch.stack([torch.stack(row) for row in rows])


def gradient(denoiser, names, image, noise, sigma, label):
    """The gradient of the mean loss of a batch, by plain autograd; name -> tensor."""
    parameters = dict(denoiser.network.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    loss = denoiser.loss(image, noise, sigma, label).mean()
    return dict(zip(names, torch.autograd.grad(loss, [parameters[name] for name in names]), strict=True))


def query_gradient(denoiser, names, copies=6, batches=1):
    """The mean gradient of the query's loss under the draws that the first step is documented to make."""
    total = {}
    for k in range(batches):
        source = generator(0, "unlearning", 0, 0, k) if k else generator(0, "unlearning", 0, 0)
        sigma = denoiser.training_sigma(copies, source).double()
        noise = torch.randn(copies, 1, 8, 8, generator=source).double()
        part = gradient(denoiser, names, QUERY.expand(copies, 1, 8, 8), noise, sigma, QUERY_LABEL.expand(copies))
        total = {name: total.get(name, 0) + g / batches for name, g in part.items()}
    return total


def influence(denoiser, names, factors=None):
    """sum of g_i * F^-1 * g_q over all weights, for every image i under the bank; [N]."""
    g_q = query_gradient(denoiser, names)
    values = []
    for i in range(NUM_TRAINING):
        image, label = DIGITS[i].expand(5, 1, 8, 8), LABELS[i].expand(5)
        g_i = gradient(denoiser, names, image, BANK.noise.double(), BANK.sigma.double(), label)
        values.append(sum((g_i[name] * (1 if factors is None else factors[name]) * g_q[name]).sum() for name in names))
    return torch.stack(values)


def inverse_fisher(denoiser, names):
    fisher = DiagonalFisher(denoiser, names, seed=1)
    fisher.add(DIGITS, LABELS, range(NUM_TRAINING), 0)
    return damped_inverse(fisher.diagonal())


# --- Forward-INF -----------------------------------------------------------------------------------------------------


def test_one_small_sgd_step_scores_the_dot_products_of_gradients():
    denoiser, rate = dit(), 1e-6
    base = bank_loss(denoiser)
    result = ascend(denoiser, learning_rate=rate)
    score = reduce("difference", base, bank_loss(denoiser))
    expected = influence(dit(), list(result.tensors))
    torch.testing.assert_close(score / rate, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_learning_rate_of_zero_scores_exactly_zero(optimizer):
    denoiser = dit()
    base = bank_loss(denoiser)
    result = ascend(denoiser, optimizer=optimizer, learning_rate=0.0, num_steps=3)
    for reducer in ("skew", "ratio_of_means", "difference", "absolute_difference"):
        assert torch.equal(reduce(reducer, base, bank_loss(denoiser)), torch.zeros(NUM_TRAINING, dtype=torch.float64))
    assert result.query_loss == result.base_query_loss
    assert not torch.equal(base, bank_loss(dit(), ascend(optimizer=optimizer, num_steps=3).tensors))


def test_without_a_bound_it_is_mucs_with_a_bound_that_no_loss_reaches_to_the_bit():
    for batch in (None, retain):
        free = run(retain_batch=batch, null_loss=None)
        assert same(free, run(retain_batch=batch, null_loss=1e300))
        assert not same(free, run(retain_batch=batch, null_loss=1.0))


def test_without_a_retain_term_it_is_mucs_whose_retain_images_weigh_nothing():
    """The retain images' losses are constants here, and all copies share draws wherever in the batch they stand."""

    class Constant(EDMDenoiser):
        def loss(self, image, noise, sigma, condition=None, augmentation=None):
            loss = super().loss(image, BANK.noise[:1].to(image), sigma, condition, augmentation)
            is_query = (image == QUERY).flatten(1).all(dim=1)
            return torch.where(is_query, loss, loss.detach())

        def training_sigma(self, count, generator):
            return torch.linspace(0.2, 3, count)

    with_retain = run(Constant(dit().network, 0.5), weight_decay=0.0)
    without = run(Constant(dit().network, 0.5), weight_decay=0.0, retain_batch=None)
    for name, tensor in with_retain.tensors.items():
        torch.testing.assert_close(tensor, without.tensors[name], rtol=1e-9, atol=1e-12)
    assert without.log[0].forget_loss == pytest.approx(with_retain.log[0].forget_loss, rel=1e-12)
    assert without.log[0].retain_loss is None
    assert with_retain.log[0].retain_loss > 0
    assert not same(run(), run(retain_batch=None))


def test_ascent_raises_the_loss_of_the_query_under_draws_that_no_step_used():
    denoiser = dit()
    source = generator(0, "query_loss", 0)
    sigma = denoiser.training_sigma(6, source).double()
    noise = torch.randn(6, 1, 8, 8, generator=source).double()

    def query_loss():
        with torch.no_grad():
            return float(denoiser.loss(QUERY.expand(6, 1, 8, 8), noise, sigma, QUERY_LABEL.expand(6)).mean())

    before = query_loss()
    result = ascend(denoiser, learning_rate=0.1, num_steps=10)
    assert result.base_query_loss == pytest.approx(before, rel=1e-12)
    assert result.query_loss == pytest.approx(query_loss(), rel=1e-12)
    assert result.query_loss > before * 1.01
    assert result.summary()["query_loss"] == result.query_loss
    assert ascend(learning_rate=0.1, num_steps=20).query_loss > result.query_loss


def test_a_last_update_that_breaks_the_model_is_named():
    with pytest.raises(NonFiniteLossError) as caught:
        ascend(learning_rate=1e200)
    assert caught.value.step == 1
    assert not math.isfinite(caught.value.value)


# --- AbU -------------------------------------------------------------------------------------------------------------


def test_a_small_preconditioned_step_scores_gradients_through_the_inverse_fisher():
    denoiser, eta = dit(), 1e-6
    names = trainable_names([n for n, _ in denoiser.network.named_parameters()], "mlp")
    factors = inverse_fisher(denoiser, names)
    base = bank_loss(denoiser)
    ascend(denoiser, learning_rate=eta / NUM_TRAINING, parts={"preconditioner": factors})
    score = reduce("difference", base, bank_loss(denoiser))
    expected = influence(dit(), names, factors) / NUM_TRAINING
    torch.testing.assert_close(score / eta, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    plain = influence(dit(), names) / NUM_TRAINING
    assert not torch.allclose(plain / plain.norm(), expected / expected.norm(), atol=0.05)


def test_a_fisher_of_ones_is_sgd_ascent_at_rate_eta_over_n():
    eta, denoiser = 0.3, dit()
    names = trainable_names([n for n, _ in denoiser.network.named_parameters()], "mlp")
    before = {n: p.detach().clone() for n, p in denoiser.network.named_parameters()}
    ones = {name: torch.ones_like(before[name]) for name in names}
    result = ascend(denoiser, learning_rate=eta / NUM_TRAINING, parts={"preconditioner": ones})
    g_q = query_gradient(dit(), names)
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(tensor, before[name] + eta / NUM_TRAINING * g_q[name], rtol=1e-12, atol=1e-14)
    assert same(result, ascend(learning_rate=eta / NUM_TRAINING))
    twice = {name: 2 * factor for name, factor in ones.items()}
    assert not same(result, ascend(learning_rate=eta / NUM_TRAINING, parts={"preconditioner": twice}))


def test_the_gradient_of_many_draws_is_the_mean_over_all_batches_of_a_step():
    before = {n: p.detach().clone() for n, p in dit().network.named_parameters()}
    result = ascend(learning_rate=0.1, num_batches=4, micro_batch_size=4)
    g_q = query_gradient(dit(), list(result.tensors), batches=4)
    for name, tensor in result.tensors.items():
        torch.testing.assert_close(tensor, before[name] + 0.1 * g_q[name], rtol=1e-9, atol=1e-12)
    assert len(result.log) == 1
    assert not same(result, ascend(learning_rate=0.1, num_batches=3))


def test_several_batches_a_step_take_the_training_images_in_order():
    seen = []

    def record(number):
        seen.append(number)
        return retain(number)

    run(retain_batch=record, num_batches=3, num_steps=2)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_preconditioner_that_does_not_fit_is_refused():
    names = trainable_names([n for n, _ in dit().network.named_parameters()], "mlp")
    parameters = dict(dit().network.named_parameters())
    ones = {name: torch.ones_like(parameters[name]) for name in names}
    for wrong in ({"optimizer": "adam"}, {"weight_decay": 0.01}):
        with pytest.raises(ValueError, match="optimizer=sgd and weight_decay=0"):
            ascend(parts={"preconditioner": ones}, **wrong)
    with pytest.raises(ValueError, match=names[0]):
        ascend(parts={"preconditioner": ones | {names[0]: torch.ones(3)}})
    with pytest.raises(ValueError, match="nothing"):
        ascend(parts={"preconditioner": {}})


# --- settings --------------------------------------------------------------------------------------------------------


def test_without_a_bound_an_exact_step_count_is_required():
    for bound in (None, math.inf):
        with pytest.raises(ValueError, match="num_steps"):
            UnlearningSettings(null_loss=bound, learning_rate=1e-3)
    with pytest.raises(ValueError, match="'lion'"):
        UnlearningSettings(null_loss=1.0, learning_rate=1e-3, optimizer="lion")


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 2e-3},
        {"forget_weight": 0.5},
        {"weight_decay": 0.5},
        {"forget_batch_size": 7},
        {"num_steps": 3},
        {"null_loss": 1.0},
        {"optimizer": "adam"},
        {"optimizer": "sgd"},
        {"num_batches": 2},
        {"same_noise": True},
        {"horizontal_flip": True},
        {"augmentation": 0.5},
        {"num_steps": None, "null_loss": 1.6, "tolerance": 0.1},
        {"num_steps": None, "max_steps": 5},
    ],
    ids=str,
)
def test_every_setting_changes_the_unlearned_model(change):
    assert not same(run(), run(**change))


def test_the_list_of_settings_above_is_complete():
    tested = {mark for case in test_every_setting_changes_the_unlearned_model.pytestmark[0].args[1] for mark in case}
    not_results = {"micro_batch_size"}
    assert {f.name for f in fields(UnlearningSettings)} - not_results == tested


def test_the_optimisers_are_torchs_own_with_the_same_hyperparameters():
    made = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    for name, kind in made.items():
        denoiser = dit()
        names = trainable_names([n for n, _ in denoiser.network.named_parameters()], "mlp")
        g_q = query_gradient(denoiser, names)
        parameters = dict(denoiser.network.named_parameters())
        optimizer = kind([parameters[n] for n in names], lr=1e-3, weight_decay=0.1)
        for n in names:
            parameters[n].grad = -g_q[n]
        optimizer.step()
        result = ascend(optimizer=name, weight_decay=0.1)
        for n in names:
            torch.testing.assert_close(result.tensors[n], parameters[n].detach(), rtol=1e-9, atol=1e-12)


# --- noise, augmentation, weights ------------------------------------------------------------------------------------


def source_of(denoiser=None, copies=6, **options):
    return BatchSource(denoiser or dit(), QUERY, QUERY_LABEL, retain, 0, 0, num_copies=copies, **options)


@pytest.mark.parametrize("copies", [3, 5, 8])
def test_same_noise_gives_row_i_of_both_parts_one_level_and_one_noise(copies):
    batch = source_of(copies=copies, same_noise=True).batch(0, 0)
    shared = min(5, copies)
    assert torch.equal(batch.noise[:shared], batch.noise[5 : 5 + shared])
    assert torch.equal(batch.sigma[:shared], batch.sigma[5 : 5 + shared])
    assert len(batch) == len(batch.sigma) == len(batch.noise) == 5 + copies
    assert len(batch.sigma.unique()) == max(5, copies)
    independent = source_of(copies=copies).batch(0, 0)
    assert len(independent.sigma.unique()) == 5 + copies


def test_levels_of_a_grid_are_drawn_uniformly_from_it_for_both_parts():
    grid = torch.tensor([0.5, 2.0, 7.0])
    batch = source_of(copies=3000, noise_levels=grid).batch(0, 0)
    counts = [int((batch.sigma == level).sum()) for level in grid]
    assert sum(counts) == 3005
    assert all(abs(count - 3005 / 3) < 4 * math.sqrt(3005 * 2 / 9) for count in counts)
    assert not same(run(), run(parts={"noise_levels": grid}))
    assert not same(run(parts={"noise_levels": grid}), run(parts={"noise_levels": grid + 1}))


def test_flips_mirror_about_half_of_both_parts_and_leave_the_noise_as_it_was():
    plain, flipped = source_of(copies=200).batch(0, 0), source_of(copies=200, horizontal_flip=True).batch(0, 0)
    assert torch.equal(plain.noise, flipped.noise)
    mirrored = [torch.equal(f, p.flip(2)) for p, f in zip(plain.image, flipped.image, strict=True)]
    assert all(m or torch.equal(f, p) for m, p, f in zip(mirrored, plain.image, flipped.image, strict=True))
    assert 0.35 < sum(mirrored[5:]) / 200 < 0.65
    several = [source_of(horizontal_flip=True).batch(step, 0).image[:5] for step in range(6)]
    assert any(not torch.equal(image, source_of().batch(s, 0).image[:5]) for s, image in enumerate(several))
    assert torch.equal(
        source_of(horizontal_flip=True).batch(3, 0).image, source_of(horizontal_flip=True).batch(3, 0).image
    )


def test_only_a_network_that_takes_augmentations_is_told_of_them():
    told = source_of(dit(augmentation_dim=9), augmentation=0.9).batch(0, 0)
    untold = source_of(dit(), augmentation=0.9).batch(0, 0)
    assert told.augmentation.shape == (11, 9)
    assert untold.augmentation is None
    assert torch.equal(told.image, untold.image)
    changed = (told.image - source_of().batch(0, 0).image).abs().flatten(1).amax(dim=1)
    assert (changed[:5] > 0.01).any()
    assert (changed[5:] > 0.01).any()
    torch.manual_seed(0)
    foreign = PretrainedUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    result = unlearn(
        EDMDenoiser(foreign, 0.5),
        ["conv_in.weight"],
        QUERY.float(),
        None,
        lambda number: (DIGITS[:3].float(), None),
        UnlearningSettings(null_loss=9.0, learning_rate=1e-3, num_steps=1, forget_batch_size=2, augmentation=0.9),
        0,
        0,
    )
    assert math.isfinite(result.query_loss)


def test_being_told_of_the_augmentation_changes_the_result():
    def outcome(augmentation_embed):
        denoiser = dit(augmentation_dim=9)
        if not augmentation_embed:
            denoiser.network.augmentation_embed = None
        return run(denoiser, augmentation=0.9)

    assert not same(outcome(True), outcome(False))


def test_the_probe_of_the_query_is_never_augmented():
    options = {"horizontal_flip": True, "augmentation": 0.9}
    assert torch.equal(source_of(**options).probe().image, QUERY.expand(6, 1, 8, 8))


def test_instance_weights_scale_each_retain_gradient_and_have_mean_one():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    denoiser = dit()
    before = {n: p.detach().clone() for n, p in denoiser.network.named_parameters()}
    options = {"optimizer": "sgd", "weight_decay": 0.0, "forget_weight": 0.0, "num_steps": 1}
    result = run(denoiser, parts={"instance_weight": lambda number: weight}, **options)
    batch, plain = source_of().batch(0, 0), dit()
    names = list(result.tensors)
    losses = []
    expected = {name: before[name].clone() for name in names}
    for i in range(5):
        row = slice(i, i + 1)
        g = gradient(plain, names, batch.image[row], batch.noise[row], batch.sigma[row], batch.condition[row])
        loss = plain.loss(batch.image[row], batch.noise[row], batch.sigma[row], batch.condition[row])
        losses.append(float(loss.detach()))
        for name in names:
            expected[name] -= 1e-3 * float(weight[i]) / 2 / 5 * g[name]  # the weights' mean is 2
    for name in names:
        torch.testing.assert_close(result.tensors[name], expected[name], rtol=1e-10, atol=1e-14)
    mean = sum(w / 2 * loss for w, loss in zip(weight.tolist(), losses, strict=True)) / 5
    assert result.log[0].retain_loss == pytest.approx(mean, rel=1e-10)
    assert same(result, run(parts={"instance_weight": lambda number: 7 * weight}, **options))
    assert not same(result, run(**options))
    assert same(run(**options), run(parts={"instance_weight": lambda number: torch.full((5,), 3.0)}, **options))


def test_weights_by_similarity_are_largest_for_the_query_itself_and_equal_at_sharpness_zero():
    images = torch.cat([QUERY[None], DIGITS[:4], -QUERY[None]])
    weight = similarity_weight(images, QUERY, 2.0)
    assert int(weight.argmax()) == 0
    assert int(weight.argmin()) == 5
    assert float(weight[0]) == pytest.approx(math.exp(2.0))
    assert torch.equal(similarity_weight(images, QUERY, 0.0), torch.ones(6, dtype=torch.float64))
    assert int(similarity_weight(images, QUERY, -2.0).argmin()) == 0


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.ones(4), "5 training images"), (torch.zeros(5), "all zero"), (-torch.ones(5), "not negative")],
)
def test_instance_weights_that_mean_nothing_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        run(parts={"instance_weight": lambda number: weight})
    with pytest.raises(ValueError, match="retain term"):
        run(retain_batch=None, parts={"instance_weight": lambda number: weight})


# --- trainable parameters --------------------------------------------------------------------------------------------


def test_last_blocks_of_a_transformer_are_the_mlps_of_the_last_blocks():
    names = [n for n, _ in dit(num_layers=4).network.named_parameters()]
    chosen = trainable_names(names, "last_blocks", num_blocks=2)
    assert sorted(chosen) == sorted(
        f"transformer_blocks.{block}.ff.net.{layer}.weight" for block in (2, 3) for layer in ("0.proj", "2")
    )
    assert set(trainable_names(names, "last_blocks", num_blocks=4)) == {
        name for name in trainable_names(names, "mlp") if ".ff." in name
    }


def test_last_blocks_count_as_numbers_beyond_nine():
    names = [f"transformer_blocks.{i}.ff.net.2.weight" for i in range(12)]
    assert trainable_names(names, "last_blocks", num_blocks=3) == names[9:]


def test_last_blocks_of_a_unet_are_its_last_up_blocks_without_biases():
    names = [n for n, _ in UNet(8, 1, 8, (1, 1, 1), 1, (), norm_groups=4).named_parameters()]
    chosen = trainable_names(names, "last_blocks", num_blocks=2)
    up = {n for n in names if n.startswith(("unet.up_blocks.1.", "unet.up_blocks.2.")) and not n.endswith(".bias")}
    assert set(chosen) == up
    assert len(up) > 4
    bare = [name.removeprefix("unet.") for name in names]
    assert trainable_names(bare, "last_blocks", num_blocks=2) == [name.removeprefix("unet.") for name in chosen]


@pytest.mark.parametrize("num_blocks", [None, 0, 5])
def test_more_blocks_than_there_are_is_an_error_that_says_how_many(num_blocks):
    with pytest.raises(ValueError, match="4 transformer blocks"):
        trainable_names(
            [n for n, _ in dit(num_layers=4).network.named_parameters()], "last_blocks", num_blocks=num_blocks
        )
    with pytest.raises(ValueError, match="2 up blocks"):
        names = [n for n, _ in UNet(8, 1, 8, (1, 1), 1, (), norm_groups=4).named_parameters()]
        trainable_names(names, "last_blocks", num_blocks=num_blocks)


def test_every_preset_trains_its_own_tensors_and_leaves_the_others_bit_identical():
    seen = []
    for preset, num_blocks in (("mlp", None), ("attention", None), ("all", None), ("last_blocks", 1)):
        denoiser = dit()
        before = {n: p.detach().clone() for n, p in denoiser.network.named_parameters()}
        chosen = trainable_names(list(before), preset, num_blocks=num_blocks)
        settings = UnlearningSettings(None, 1e-3, num_steps=1, forget_batch_size=4)
        result = unlearn(denoiser, chosen, QUERY, QUERY_LABEL, None, settings, 0, 0)
        for name, parameter in denoiser.network.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in chosen), name
        seen.append(frozenset(result.tensors))
    assert len(set(seen)) == 4
