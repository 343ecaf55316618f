"""A planted cause is found: copies of one image, repeated until the model has memorised it, rank first for it."""

import math

import pytest
import torch
from sklearn.datasets import load_digits

from mucs_cli.attribution.scoring import bank_losses
from mucs_cli.attribution.skew import mean_skew
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.attribution.unlearning import UnlearningSettings, unlearn
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.training import Trainer, TrainingSettings, train
from mucs_cli.diffusion.unet import UNet
from mucs_cli.rng import ShuffledOrder, generator

NUM_DIGITS, NUM_COPIES = 300, 8


@pytest.fixture(scope="module")
def images():
    """Real digits, and among them, at random places, copies of one digit that is not one of them."""
    pixels = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
    planted = pixels[500].flip(2)  # upside down: no digit is near it
    everything = torch.cat([pixels[:NUM_DIGITS], planted.expand(NUM_COPIES, 1, 8, 8)])
    places = torch.randperm(len(everything), generator=generator(0, "places"))
    copies = {int(row) for row in (places >= NUM_DIGITS).nonzero()}
    return everything[places], planted, copies


def trained(network, images, learning_rate, steps):
    std = float(images.std())
    denoiser = EDMDenoiser(network, std, -1.2 + math.log(std / 0.5))
    settings = TrainingSettings(
        num_steps=steps, batch_size=64, learning_rate=learning_rate, warmup_steps=20, decay="cosine", ema_decay=0.98
    )
    trainer, order = Trainer(denoiser, settings), ShuffledOrder(len(images), 0, "order")
    train(trainer, lambda step: (images[order.batch(step, 64)], None), lambda loss: None)
    network.load_state_dict(trainer.average, strict=False)
    return denoiser


def make(kind):
    torch.manual_seed(0)
    if kind == "dit":
        return DiT(8, 1, 2, 32, 2, 2, dropout=0.0), "mlp", 5e-3, 500
    return UNet(8, 1, 16, (1, 2), 1, (4,), norm_groups=8, dropout=0.0), "all_but_bias", 3e-3, 250


@pytest.fixture(scope="module", params=["dit", "unet"])
def scored(request, images):
    """Scores of every image for the planted one, and those with the base model in place of the unlearned one."""
    everything, planted, copies = images
    network, preset, learning_rate, steps = make(request.param)
    denoiser = trained(network, everything, learning_rate, steps)
    bank = draw_noise_bank(20, (1, 8, 8))
    network.eval()
    base = bank_losses(denoiser, everything, None, bank)[0]
    order = ShuffledOrder(len(everything), 0, "retain")
    result = unlearn(
        denoiser,
        trainable_names([name for name, _ in network.named_parameters()], preset),
        planted,
        None,
        lambda step: (everything[order.batch(step, 100)], None),
        UnlearningSettings(
            null_loss=denoiser.null_loss(float(everything.square().mean())), learning_rate=learning_rate / 10
        ),
        seed=0,
        query_id=0,
    )
    unlearned = bank_losses(denoiser, everything, None, bank)[0]
    return result, mean_skew(base, unlearned), mean_skew(base, base), copies


def recall(score, copies):
    return len(set(score.topk(len(copies)).indices.tolist()) & copies) / len(copies)


def test_the_copies_of_the_query_rank_first(scored):
    result, score, _, copies = scored
    assert result.reached_bound is True
    assert recall(score, copies) == 1.0


def test_the_base_model_in_place_of_the_unlearned_one_finds_nothing(scored):
    _, _, score, copies = scored
    assert float(score.abs().max()) == 0
    assert recall(score, copies) < 0.5


def test_shuffled_ids_lose_the_copies(scored):
    _, score, _, copies = scored
    shuffled = score[torch.randperm(len(score), generator=generator(0, "shuffle"))]
    assert recall(shuffled, copies) < 0.5
