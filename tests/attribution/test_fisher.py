import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from mucs_cli.attribution.fisher import DiagonalFisher, damped_inverse
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.unet import UNet
from mucs_cli.rng import generator

DIGITS = torch.from_numpy(load_digits().images[:12, None]) / 8 - 1  # [12, 1, 8, 8], float64, in [-1, 1]
LABELS = torch.from_numpy(load_digits().target[:12])


def model(kind):
    """A denoiser in float64, its labels (or None), and the parameters to measure."""
    torch.manual_seed(0)
    if kind == "unet":
        network, labels, wanted = UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8), None, "conv1.weight"
    else:
        network, labels, wanted = DiT(8, 1, 4, 16, 1, 2, num_classes=10), LABELS, "ff"
        for name, parameter in network.named_parameters():
            if "modulation" in name or "proj_out" in name:
                nn.init.normal_(parameter, std=0.2)
    network = network.double().eval()
    denoiser = DDPMDenoiser(network) if kind == "ddpm" else EDMDenoiser(network, 0.5)
    return denoiser, labels, [name for name, _ in network.named_parameters() if wanted in name]


def fisher_of(kind="dit", passes=1, batch=12, flip=False, seed=5, ids=range(12)):
    denoiser, labels, names = model(kind)
    fisher = DiagonalFisher(denoiser, names, seed, flip)
    for index in range(passes):
        for rows in torch.tensor(list(ids)).split(batch):
            fisher.add(DIGITS[rows], None if labels is None else labels[rows], rows.tolist(), index)
    return fisher


@pytest.mark.parametrize("kind", ["dit", "unet", "ddpm"])
def test_it_is_the_mean_of_squared_gradients_over_a_plain_loop_of_visits(kind):
    measured = fisher_of(kind, passes=2, flip=True, batch=5).diagonal()
    denoiser, labels, names = model(kind)
    parameters = dict(denoiser.network.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for index in range(2):
        for i in range(12):
            for visit in range(2):
                source = generator(5, "fisher", index, i, visit)
                sigma = denoiser.training_sigma(1, source).double()
                noise = torch.randn(1, 8, 8, generator=source).double()[None]
                image = DIGITS[i : i + 1].flip(3) if visit else DIGITS[i : i + 1]
                loss = denoiser.loss(image, noise, sigma, None if labels is None else labels[i : i + 1]).sum()
                gradient = torch.autograd.grad(loss, [parameters[name] for name in names])
                for name, g in zip(names, gradient, strict=True):
                    total[name] += g**2
    for name in names:
        torch.testing.assert_close(measured[name], total[name].detach() / 48, rtol=1e-9, atol=1e-15)
        assert float(measured[name].max()) > 1e-8


def test_each_image_adds_its_own_share_whatever_else_is_visited():
    fisher = fisher_of().diagonal()
    one = [fisher_of(ids=[i]).diagonal() for i in range(12)]
    for name, tensor in fisher.items():
        torch.testing.assert_close(tensor, sum(f[name] for f in one) / 12, rtol=1e-10, atol=1e-16)
    assert not torch.allclose(
        one[0]["transformer_blocks.0.ff.net.2.weight"], fisher["transformer_blocks.0.ff.net.2.weight"]
    )


def test_batches_and_an_interruption_leave_the_sums_as_they_are():
    whole = fisher_of(passes=2, batch=4)
    first = fisher_of(passes=1, batch=4)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = fisher_of(passes=0)
    resumed.load_state(saved)
    for rows in torch.arange(12).split(4):
        resumed.add(DIGITS[rows], LABELS[rows], rows.tolist(), 1)
    assert resumed.num_visits == whole.num_visits == 24
    for name, square in whole.squares.items():
        assert square.dtype == torch.float64
        assert torch.equal(square, resumed.squares[name])
        torch.testing.assert_close(square, fisher_of(passes=2, batch=5).squares[name], rtol=1e-10, atol=1e-16)


def test_passes_seed_and_flip_change_it():
    outcomes = [fisher_of(), fisher_of(passes=2), fisher_of(seed=6), fisher_of(flip=True)]
    firsts = [next(iter(fisher.diagonal().values())) for fisher in outcomes]
    assert all(not torch.allclose(a, b, rtol=1e-3) for i, a in enumerate(firsts) for b in firsts[:i])
    assert [fisher.num_visits for fisher in outcomes] == [12, 24, 12, 24]


def test_float32_gradients_are_summed_in_float64():
    denoiser, labels, names = model("dit")
    denoiser.network.float()
    fisher = DiagonalFisher(denoiser, names, 5)
    fisher.add(DIGITS.float(), labels, range(12), 0)
    for name, tensor in fisher.diagonal().items():
        assert tensor.dtype == torch.float64
        torch.testing.assert_close(tensor, fisher_of().diagonal()[name], rtol=1e-3, atol=1e-9)


def test_the_inverse_adds_a_share_of_each_tensors_own_mean():
    fisher = {"a": torch.tensor([0.0, 1.0, 5.0]).double(), "b": torch.tensor([[300.0]]).double()}
    inverse = damped_inverse(fisher, 0.1)
    torch.testing.assert_close(inverse["a"], 1 / torch.tensor([0.2, 1.2, 5.2]).double())
    assert float(inverse["b"]) == pytest.approx(1 / 330)
    assert float(damped_inverse(fisher, 1.0)["a"][0]) == pytest.approx(0.5)


def test_what_has_no_inverse_or_no_visits_or_no_finite_gradient_is_refused():
    fisher = {"dead": torch.zeros(3).double()}
    with pytest.raises(ValueError, match="dead"):
        damped_inverse(fisher)
    with pytest.raises(ValueError, match="half"):
        damped_inverse({"half": torch.tensor([0.0, 1.0])}, damping=0.0)
    with pytest.raises(ValueError, match="no image"):
        fisher_of(passes=0).diagonal()
    denoiser, labels, names = model("dit")
    with pytest.raises(FloatingPointError, match=names[0]):
        DiagonalFisher(denoiser, names, 0).add(DIGITS[:2] * float("nan"), labels[:2], [0, 1], 0)
