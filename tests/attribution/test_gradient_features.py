import math

import pytest
import torch
from torch import nn

from mucs_cli.attribution.feature_scores import DampedKernel, das_scores, trak_scores
from mucs_cli.attribution.gradient_features import (
    OUTPUT_NAMES,
    features,
    make_output,
    noise_errors,
    predicted_noise,
    residuals,
)
from mucs_cli.attribution.gradients import per_example_gradients
from mucs_cli.attribution.projection import Projection
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.pretrained_networks import PretrainedDiT, PretrainedUNet, make_ready
from mucs_cli.diffusion.unet import UNet
from mucs_cli.diffusion.vp import VPDenoiser


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES, LABELS = draws(7, 1, 4, 4).clamp(-1, 1), torch.arange(7) % 3
NOISE = draws(5, 1, 4, 4, seed=1)

DENOISERS = {
    "edm": lambda network: EDMDenoiser(network),
    "vp": lambda network: VPDenoiser(network),
    "ddpm epsilon": lambda network: DDPMDenoiser(network, 100),
    "ddpm v": lambda network: DDPMDenoiser(
        network, 100, "squaredcos_cap_v2", prediction_type="v_prediction", rescale_betas_zero_snr=True
    ),
    "ddpm sample": lambda network: DDPMDenoiser(network, 100, prediction_type="sample"),
}
NAMES = pytest.mark.parametrize("name", DENOISERS)


def filled(network):
    """Weights that are nowhere zero, in float64, drawn without the global state."""
    source = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=source))
    return network.double().eval()


def dit(**options):
    return filled(DiT(4, 1, 2, 8, 1, 2, timestep_scale=1.0, **options))


def all_names(network):
    return [name for name, _ in network.named_parameters()]


def identity(network, names=None):
    names = all_names(network) if names is None else names
    size = sum(p.numel() for n, p in network.named_parameters() if n in names)
    return Projection("identity", size, size, seed=0)


def written_out(name, network, denoiser, image, noise, sigma, condition):
    """eps_hat of one image and draw: [C, H, W], from each preconditioning's own equations."""
    given = None if condition is None else condition[None]
    a, b = 1 / torch.sqrt(1 + sigma**2), sigma / torch.sqrt(1 + sigma**2)
    if name == "edm":
        total = sigma**2 + 0.25
        noised = image + sigma * noise
        f = network((noised / total.sqrt())[None], sigma.log()[None] / 4, given)[0]
        return noised * sigma / total - 0.5 / total.sqrt() * f, f
    scaled = a * image + b * noise
    if name == "vp":
        time = (torch.sqrt(0.1**2 + 2 * 19.9 * torch.log(1 + sigma**2)) - 0.1) / 19.9
        f = network(scaled[None], 999 * time[None], given)[0]
    else:
        level = (denoiser.levels[2] - sigma).abs().argmin()
        f = network(scaled[None], level[None], given)[0]
    if name == "ddpm v":
        return b * scaled + a * f, f
    return ((scaled - a * f) / b if name == "ddpm sample" else f), f


def plain_features(name, denoiser, names, output, normalise, raw, condition, sigma):
    """One image, one draw, one backward pass at a time."""
    network = denoiser.network
    parameters = [dict(network.named_parameters())[n] for n in names]
    rows = []
    for i, image in enumerate(IMAGES):
        row = 0
        for noise, level in zip(NOISE, sigma.double(), strict=True):
            label = None if condition is None else condition[i]
            eps_hat, f = written_out(name, network, denoiser, image, noise, level, label)
            value = f if raw else eps_hat
            if output == "loss" and raw:
                value = denoiser.loss(image[None], noise[None], level[None], None if label is None else label[None])
            elif output == "loss":
                value = (value - noise) ** 2
            elif output == "squared_output":
                value = value**2
            grads = torch.autograd.grad(value.mean(), parameters)
            gradient = torch.cat([g.flatten() for g in grads])
            row = row + (gradient / gradient.norm() if normalise else gradient)
        rows.append(row / len(NOISE))
    return torch.stack(rows)


@pytest.mark.parametrize("normalise", [False, True], ids=["mean", "normalised"])
@pytest.mark.parametrize("raw", [False, True], ids=["noise", "network"])
@pytest.mark.parametrize("output", OUTPUT_NAMES)
@NAMES
def test_features_of_a_small_dit_equal_plain_autograd_loops_over_images_and_draws(name, output, raw, normalise):
    network = dit(num_classes=3)
    denoiser = DENOISERS[name](network)
    names = [n for n in all_names(network) if "ff." in n or "label" in n or "proj_out" in n]
    sigma = denoiser.even_sigma(5).double()
    found = features(
        denoiser, names, IMAGES, LABELS, sigma, NOISE, make_output(output, raw), identity(network, names), normalise
    )
    assert found.dtype == torch.float32
    expected = plain_features(name, denoiser, names, output, normalise, raw, LABELS, sigma)
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-5, atol=1e-6)
    assert float(expected.norm(dim=1).min()) > 1e-3 * float(scale)


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_one_projection_of_the_mean_is_the_mean_of_the_projections_of_the_draws(kind):
    network = dit()
    denoiser, names = EDMDenoiser(network), all_names(network)
    projection = Projection(kind, identity(network).k, 32, seed=3)
    sigma, output = denoiser.even_sigma(5).double(), make_output("squared_output")
    together = features(denoiser, names, IMAGES, None, sigma, NOISE, output, projection)
    single = [
        features(denoiser, names, IMAGES, None, sigma[t : t + 1], NOISE[t : t + 1], output, projection)
        for t in range(5)
    ]
    torch.testing.assert_close(torch.stack(single).mean(dim=0), together, rtol=1e-5, atol=1e-5 * float(together.max()))
    dense = features(denoiser, names, IMAGES, None, sigma, NOISE, output, identity(network))
    torch.testing.assert_close(projection.project(dense), together, rtol=1e-4, atol=1e-5 * float(together.max()))


def pretrained_dit():
    return make_ready(PretrainedDiT(2, 8, 1, 2, num_layers=1, norm_num_groups=1, sample_size=4, patch_size=2))


def pretrained_unet():
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    return make_ready(PretrainedUNet(4, 1, 1, down_block_types=down, up_block_types=up, **options))


NETWORKS = {
    "dit": lambda: (dit(condition_dim=6), draws(7, 6, seed=3)),
    "unet": lambda: (filled(UNet(4, 1, 8, (1, 2), 1, (2,), norm_groups=4, num_classes=3)), LABELS),
    "pretrained dit": lambda: (filled(pretrained_dit()), LABELS),
    "pretrained unet": lambda: (filled(pretrained_unet()), None),
}


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", NETWORKS)
def test_features_do_not_depend_on_the_batch_nor_on_how_it_is_cut(kind, normalise):
    network, condition = NETWORKS[kind]()
    denoiser = DDPMDenoiser(network, 100)
    names = all_names(network) if "pretrained" not in kind else [n for n in all_names(network) if "to_q" in n]
    projection = Projection("sparse", identity(network, names).k, 16, seed=0)
    sigma, output = denoiser.even_sigma(5).double(), make_output("squared_output")

    def of(rows, micro_batch_size):
        part = None if condition is None else condition[rows]
        return features(
            denoiser, names, IMAGES[rows], part, sigma, NOISE, output, projection, normalise, micro_batch_size
        )

    everything = list(range(7))
    whole = of(everything, 64)
    close = {"rtol": 1e-4, "atol": 1e-5 * float(whole.abs().max())}
    for micro_batch_size in (3, 10):
        torch.testing.assert_close(of(everything, micro_batch_size), whole, **close)
    order = [4, 2, 6, 0]
    torch.testing.assert_close(of(order, 64), whole[order], **close)
    assert len({tuple(row) for row in whole.tolist()}) == 7


def test_per_example_gradients_under_one_draw_are_the_features_of_that_draw():
    network = dit(num_classes=3)
    denoiser, names = VPDenoiser(network), all_names(network)
    sigma = denoiser.even_sigma(1).double()
    output = make_output("loss")
    found = features(denoiser, names, IMAGES, LABELS, sigma, NOISE[:1], output, identity(network))
    one_each = per_example_gradients(
        denoiser, names, IMAGES, NOISE[:1].expand(7, -1, -1, -1), sigma.expand(7), LABELS, output
    )
    flat = torch.cat([one_each[n].flatten(1) for n in names], dim=1)
    torch.testing.assert_close(found, flat.float())


class Recorder(nn.Module):
    """w times a fixed picture that does not look at its input: eps_hat depends on w alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, sample, timestep, condition=None, augmentation=None):
        return self.weight * torch.arange(16.0, dtype=torch.float64).view(1, 1, 4, 4).expand(len(sample), -1, -1, -1)


def test_the_noise_is_no_target_of_the_outputs_of_dtrak_and_das_but_is_trak_s():
    denoiser = VPDenoiser(Recorder())
    sigma = denoiser.even_sigma(5).double()
    projection = Projection("identity", 1, 1, seed=0)
    square = float(torch.arange(16.0).square().mean())
    for name, expected in (("squared_output", 2 * 0.7 * square), ("mean_output", 7.5)):
        for noise in (NOISE, -NOISE):
            for raw in (False, True):
                output = make_output(name, raw)
                found = features(denoiser, ["weight"], IMAGES, None, sigma, noise, output, projection)
                torch.testing.assert_close(found, torch.full((7, 1), expected), rtol=1e-4, atol=0)
    trak = [
        features(denoiser, ["weight"], IMAGES, None, sigma, noise, make_output("loss"), projection)
        for noise in (NOISE, -NOISE)
    ]
    assert not torch.allclose(*trak)


class Linear(nn.Module):
    """A picture of one pixel, theta . x: the identity-projected feature of its square is 2 (theta . x) x."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, sample, timestep, condition=None, augmentation=None):
        return (condition @ self.theta).view(-1, 1, 1, 1)


def test_with_a_linear_output_and_no_projection_the_scores_are_a_dense_solve():
    x, theta = draws(12, 4, seed=2), draws(4, seed=3)
    denoiser = DDPMDenoiser(Linear(theta), 10)
    image, noise, sigma = torch.zeros(12, 1, 1, 1).double(), draws(3, 1, 1, 1), denoiser.even_sigma(3).double()
    found = features(
        denoiser, ["theta"], image, x, sigma, noise, make_output("squared_output"), Projection("identity", 4, 4, 0)
    )
    expected = 2 * (x @ theta)[:, None] * x
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    train, query = expected[:9], expected[9:]
    kernel = DampedKernel(found[:9], 0.3)
    inverse = torch.linalg.inv(train.T @ train + 0.3 * train.square().sum() / 4 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(trak_scores(kernel, found[9:]).double(), query @ inverse @ train.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["trak", "dtrak", "das"])
def test_every_method_finds_the_training_image_that_the_query_copies(method):
    network = dit()
    denoiser, names = EDMDenoiser(network), all_names(network)
    sigma = denoiser.even_sigma(5).double()
    output = make_output({"trak": "loss", "dtrak": "squared_output", "das": "mean_output"}[method])
    projection = Projection("sparse", identity(network).k, 64, seed=0)
    phi = features(denoiser, names, IMAGES, None, sigma, NOISE, output, projection, method == "das")
    kernel, queries = DampedKernel(phi, 1e-3), phi[[2, 5]]
    if method == "das":
        scores, _ = das_scores(kernel, queries, residuals(noise_errors(denoiser, IMAGES, None, sigma, NOISE)))
    else:
        scores = trak_scores(kernel, queries)
    assert scores.argmax(dim=1).tolist() == [2, 5]


@NAMES
def test_noise_errors_are_those_of_the_noise_written_out_at_every_level(name):
    network = dit(num_classes=3)
    denoiser = DENOISERS[name](network)
    sigma = denoiser.even_sigma(5).double()
    errors = noise_errors(denoiser, IMAGES, LABELS, sigma, NOISE)
    assert errors.shape == (7, 5)
    for i in (0, 4):
        for t in range(5):
            with torch.no_grad():
                eps_hat, _ = written_out(name, network, denoiser, IMAGES[i], NOISE[t], sigma[t], LABELS[i])
            expected = float((eps_hat - NOISE[t]).square().mean())
            assert float(errors[i, t]) == pytest.approx(expected, rel=1e-5)


@NAMES
@torch.no_grad()
def test_predicted_noise_in_float32_holds_at_the_lowest_and_the_highest_level(name):
    network = dit()
    denoiser = DENOISERS[name](network)
    low, high = (denoiser.sigma_min or 0.002), min(denoiser.sigma_max, 1e4)
    for level in (low, high):
        sigma = torch.full((5,), level, dtype=torch.float64)
        exact = predicted_noise(denoiser, IMAGES[:5], NOISE, sigma, None)
        assert float(exact.abs().max()) < 1e3
        network.float()
        found = predicted_noise(denoiser, IMAGES[:5].float(), NOISE.float(), sigma.float(), None)
        network.double()
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


def test_residuals_are_root_mean_squares_or_the_mean_of_unit_norm_rows():
    errors = torch.tensor([[1.0, 4.0], [9.0, 9.0], [0.0, 0.25], [0.0, 0.0]])
    raw, code, none = (residuals(errors, kind) for kind in ("raw", "code", "none"))
    assert raw.tolist() == pytest.approx([math.sqrt(2.5), 3, math.sqrt(0.125), 0])
    assert code.tolist() == pytest.approx([1.5 / math.sqrt(5), 1 / math.sqrt(2), 0.5, 0])
    assert none.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(residuals(100 * errors, "code"), code)
    random = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    assert 1 / 8 <= float(residuals(random, "code").min()) < float(residuals(random, "code").max()) <= 1 / math.sqrt(8)


def test_a_gradient_of_zero_stays_zero_when_normalised():
    network = dit()
    with torch.no_grad():
        network.proj_out.weight.zero_()
    sigma = torch.ones(5, dtype=torch.float64)
    names = [n for n in all_names(network) if "ff." in n]
    output = make_output("mean_output")
    found = features(EDMDenoiser(network), names, IMAGES, None, sigma, NOISE, output, identity(network, names), True)
    assert torch.equal(found, torch.zeros_like(found))


def test_wrong_draws_outputs_and_gradients_that_are_not_finite_are_refused():
    network = dit()
    denoiser, names, output = EDMDenoiser(network), all_names(network), make_output("loss")
    sigma = torch.ones(5, dtype=torch.float64)

    def run(sigma=sigma, noise=NOISE, image=IMAGES, micro_batch_size=64):
        return features(
            denoiser, names, image, None, sigma, noise, output, identity(network), micro_batch_size=micro_batch_size
        )

    with pytest.raises(ValueError, match="output 'squared'"):
        make_output("squared")
    for bad in (0.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            run(sigma=torch.tensor([1, 1, 1, 1, bad], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\[T, 1, 4, 4\]"):
        run(noise=NOISE[:4])
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        run(micro_batch_size=0)
    image = IMAGES.clone()
    image[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="row 3 is not finite"):
        run(image=image)
    with pytest.raises(ValueError, match="residual 'rms'"):
        residuals(torch.ones(2, 2), "rms")
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        residuals(torch.ones(2))
