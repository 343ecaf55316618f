"""Losses of models that share a prefix, against a plain loop over copies of the network that share nothing."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mucs_cli.attribution.scoring import bank_losses, independent_noise
from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT, TransformerBlock
from mucs_cli.diffusion.noise_bank import NoiseBank, draw_noise_bank
from mucs_cli.diffusion.pretrained_networks import PretrainedDiT, PretrainedUNet, make_ready
from mucs_cli.diffusion.unet import UNet

NUM_IMAGES, NUM_DRAWS = 32, 3


def own_dit(**options):
    return EDMDenoiser(DiT(8, 1, 2, 32, 4, 2, **options))


def own_unet(**options):
    return EDMDenoiser(UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8, **options))


def pretrained_unet(**options):
    network = PretrainedUNet(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        **options,
    )
    return DDPMDenoiser(network, 100)


def pretrained_dit():
    network = PretrainedDiT(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_num_groups=4,
    )
    return DDPMDenoiser(make_ready(network), 100)


NETWORKS = {
    "dit": own_dit,
    "dit-labels": lambda: own_dit(num_classes=3),
    "dit-vectors": lambda: own_dit(condition_dim=5),
    "unet": own_unet,
    "unet-labels": lambda: own_unet(num_classes=3),
    "pretrained-unet": pretrained_unet,
    "pretrained-unet-labels": lambda: pretrained_unet(num_class_embeds=3),
    "pretrained-dit": pretrained_dit,
}


def model(kind):
    """With weights such that every module matters."""
    torch.manual_seed(0)
    denoiser = NETWORKS[kind]()
    for parameter in denoiser.network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    denoiser.network.eval().requires_grad_(False)
    return denoiser


def inputs(denoiser):
    source = torch.Generator().manual_seed(1)
    image = torch.rand(NUM_IMAGES, 1, 8, 8, generator=source) * 2 - 1
    condition = None
    if denoiser.network.num_classes:
        condition = torch.randint(0, 3, (NUM_IMAGES,), generator=source)
    elif denoiser.network.condition_dim:
        condition = torch.randn(NUM_IMAGES, denoiser.network.condition_dim, generator=source)
    return image, condition, draw_noise_bank(NUM_DRAWS, (1, 8, 8), nearest_sigma=denoiser.nearest_sigma)


def changed_models(network, names, count=3):
    """The base model among them, and not first."""
    source = torch.Generator().manual_seed(5)
    tensors = dict(network.named_parameters())
    models = [
        {name: tensors[name] + 0.1 * torch.randn(tensors[name].shape, generator=source) for name in names}
        for _ in range(count)
    ]
    models.insert(1, {})
    return models


def plain_losses(denoiser, image, condition, bank, models):
    rows = []
    for tensors in models:
        other = copy.copy(denoiser)
        other.network = copy.deepcopy(denoiser.network)
        other.network.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            draws = range(len(bank))
            row = [other.loss(image, bank.noise[n : n + 1], bank.sigma[n : n + 1], condition) for n in draws]
        rows.append(torch.stack(row, dim=1))
    return torch.stack(rows)


@pytest.fixture
def computed(monkeypatch):
    """The modules with weights whose forward has really run."""
    modules = []
    for kind in (nn.Linear, nn.Conv2d):

        def counted(self, x, whole=kind.forward):
            modules.append(self)
            return whole(self, x)

        monkeypatch.setattr(kind, "forward", counted)
    return modules


def is_untouched(network):
    return not any("forward" in vars(module) for module in network.modules())


CHANGES = [
    (kind, preset, num_blocks)
    for kind in NETWORKS
    for preset, num_blocks in (
        ("last_blocks", 1),
        ("last_blocks", 2),
        ("all", None),
        ("mlp" if "dit" in kind else "attention", None),
    )
]


@pytest.mark.parametrize(("kind", "preset", "num_blocks"), CHANGES)
def test_losses_have_the_bits_of_full_forwards_and_late_changes_cost_less(kind, preset, num_blocks, computed):
    denoiser = model(kind)
    image, condition, bank = inputs(denoiser)
    names = trainable_names([n for n, _ in denoiser.network.named_parameters()], preset, num_blocks=num_blocks)
    models = changed_models(denoiser.network, names)
    expected = plain_losses(denoiser, image, condition, bank, models)
    one_forward = len(computed) // (len(models) * NUM_DRAWS)
    computed.clear()
    losses = bank_losses(denoiser, image, condition, bank, models)
    assert torch.equal(losses, expected)
    assert len({tuple(row.flatten().tolist()) for row in losses}) == len(models)
    full = one_forward * (len(models) * NUM_DRAWS + 1)  # and the trace
    assert len(computed) <= full
    if preset == "last_blocks":
        assert len(computed) < 0.8 * full
    assert is_untouched(denoiser.network)


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
def test_blocks_before_the_first_changed_one_run_once_a_draw(num_blocks, monkeypatch):
    denoiser = model("dit")
    image, condition, bank = inputs(denoiser)
    names = trainable_names([n for n, _ in denoiser.network.named_parameters()], "last_blocks", num_blocks=num_blocks)
    models = changed_models(denoiser.network, names)
    ran, whole = [], TransformerBlock.forward
    monkeypatch.setattr(
        TransformerBlock, "forward", lambda self, *a: (ran.append(len(a[0]) == NUM_IMAGES), whole(self, *a))[1]
    )
    bank_losses(denoiser, image, condition, bank, models)
    assert sum(ran) == NUM_DRAWS * (4 - num_blocks + num_blocks * len(models))
    assert len(ran) - sum(ran) == 4  # the trace, on a few images


def test_a_query_has_the_same_bits_alone_and_in_any_company():
    denoiser = model("unet")
    image, condition, bank = inputs(denoiser)
    names = [n for n, _ in denoiser.network.named_parameters() if "up_blocks.1" in n]
    models = changed_models(denoiser.network, names)
    early = {"unet.conv_in.weight": denoiser.network.unet.conv_in.weight * 1.1}
    together = bank_losses(denoiser, image, condition, bank, [*models, early])
    for m, tensors in enumerate([*models, early]):
        assert torch.equal(together[m], bank_losses(denoiser, image, condition, bank, [tensors])[0])


def test_noise_of_each_models_own_is_not_shared(computed):
    denoiser = model("dit")
    image, condition, bank = inputs(denoiser)
    models = changed_models(denoiser.network, ["transformer_blocks.3.ff.net.2.weight"])

    def noise(m, n):
        return independent_noise(3, m, range(NUM_IMAGES), n, image)

    losses = bank_losses(denoiser, image, condition, bank, models, noise=noise)
    num_computed = len(computed)
    for m, tensors in enumerate(models):
        for n in range(NUM_DRAWS):
            one = NoiseBank(bank.sigma[n : n + 1], noise(m, n))
            with torch.no_grad():
                other = copy.deepcopy(denoiser)
                other.network.load_state_dict(tensors, strict=False)
                expected = other.loss(image, one.noise, one.sigma)
            assert torch.equal(losses[m, :, n], expected)
    assert len(computed) == 2 * num_computed


class ToyDenoiser:
    def __init__(self, network):
        self.network = network.eval().requires_grad_(False)

    def loss(self, image, noise, sigma, condition=None):
        noised = (image + sigma.view(-1, 1, 1, 1) * noise).flatten(1)
        return (self.network(noised, sigma) - image.flatten(1)).square().mean(dim=1)


class Toy(nn.Module):
    """Three layers before the changed one, ``late``; the cases say in which way they are called."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.late = (nn.Linear(64, 64) for _ in range(4))
        self.num_calls = 0


class CalledThrice(Toy):
    def forward(self, x, sigma):
        x = self.first(self.first(x).relu() + x)
        return self.first(self.late(self.second(x)))


class OrderOfTheCall(Toy):
    """The sum is the same in either order."""

    def forward(self, x, sigma):
        self.num_calls += 1
        layers = (self.first, self.second) if self.num_calls % 3 else (self.second, self.first)
        outputs = {layer: layer(x) for layer in layers}
        return self.late(outputs[self.first] + outputs[self.second])


class OrderOfTheLevel(Toy):
    def forward(self, x, sigma):
        layers = [self.first, self.second, self.third]
        if sigma < 1:
            layers = [self.third, self.late, self.second]
        for layer in layers:
            x = layer(x).relu()
        return self.late(x)


class FewerCallsAtLowLevels(Toy):
    def forward(self, x, sigma):
        x = self.first(x)
        if sigma > 1:
            x = self.second(x)
        return F.linear(x, self.late.weight)


class WrittenInto(Toy):
    def forward(self, x, sigma):
        x = self.first(x)
        x += 1
        return self.late(self.second(x)) + x


class WrittenIntoAfterwards(Toy):
    def forward(self, x, sigma):
        x = self.second(self.first(x))
        y = self.late(x)
        x.view(-1).mul_(2)
        return x + y


class InPlaceModule(Toy):
    def __init__(self):
        super().__init__()
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x, sigma):
        x = self.first(x) + 0
        y = self.activation(x)
        return self.late(self.second(y)) + x


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, into=None):
        x = self.layer(x)
        if into is not None:
            into.append(x)
        return [x, x.relu()]


class EmptiesAList(Toy):
    def __init__(self):
        super().__init__()
        self.several = Several()

    def forward(self, x, sigma):
        outputs = self.several(x)
        x = self.second(outputs.pop())
        return self.late(x) + outputs.pop()


class FillsAList(EmptiesAList):
    def forward(self, x, sigma):
        into = []
        self.several(x, into)
        return self.late(self.second(into[0]))


class OneOutputMoreAtLowLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x, sigma):
        return [self.layer(x), x.relu()] if sigma > 1 else [self.layer(x), x.relu(), x.exp()]


class AnotherStructure(Toy):
    def __init__(self):
        super().__init__()
        self.outputs = OneOutputMoreAtLowLevels()

    def forward(self, x, sigma):
        return self.late(self.second(sum(self.outputs(self.first(x), sigma))))


class Box:
    def __init__(self, content):
        self.content = content


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return Box(self.layer(x) + x)


class ReturnsAnObject(Toy):
    def __init__(self):
        super().__init__()
        self.boxed = Boxed()

    def forward(self, x, sigma):
        box = self.boxed(self.first(x))
        box.content = box.content + 1
        return self.late(box.content)


class ReadElsewhere(Toy):
    """The changed weight is used before its module is called."""

    def forward(self, x, sigma):
        x = F.linear(self.first(x), self.late.weight.data)
        return self.late(self.second(x))


class ByList(nn.Linear):
    """As a kernel of another library: no operation of torch's shows what it reads."""

    def forward(self, x):
        return F.linear(x, torch.tensor(self.weight.tolist()), torch.tensor(self.bias.tolist()))


class Foreign(Toy):
    def __init__(self):
        super().__init__()
        self.late = ByList(64, 64)

    def forward(self, x, sigma):
        return self.third(self.late(self.second(self.first(x))))


class Tied(Toy):
    def __init__(self):
        super().__init__()
        self.second.weight = self.late.weight

    def forward(self, x, sigma):
        return self.late(self.third(self.second(self.first(x))))


class KeptAside(Toy):
    """What is read after the changed module depends on its output."""

    def forward(self, x, sigma):
        x = self.first(x)
        y = self.second(x)
        z = self.late(y)
        return z + x if z.sum() > self.late.bias.sum() else z - self.third(y)


class Unused(Toy):
    """The changed parameters are not part of the forward."""

    def forward(self, x, sigma):
        return self.second(self.first(x))


class Plain(Toy):
    def forward(self, x, sigma):
        return self.late(self.third(self.second(self.first(x)).relu()))


SHARING = [
    CalledThrice,
    EmptiesAList,
    FillsAList,
    Foreign,
    InPlaceModule,
    KeptAside,
    Plain,
    ReadElsewhere,
    ReturnsAnObject,
]
NOT_SHARING = [
    AnotherStructure,
    FewerCallsAtLowLevels,
    OrderOfTheCall,
    OrderOfTheLevel,
    Tied,
    WrittenInto,
    WrittenIntoAfterwards,
]


def toy_case(kind):
    torch.manual_seed(3)
    denoiser = ToyDenoiser(kind())
    image = torch.randn(NUM_IMAGES, 1, 8, 8)
    bank = NoiseBank(torch.tensor([2.0, 0.5, 3.0]), torch.randn(3, 1, 8, 8))
    models = changed_models(denoiser.network, [n for n, _ in denoiser.network.named_parameters() if "late" in n])
    return denoiser, image, bank, models


@pytest.mark.parametrize("kind", [*SHARING, *NOT_SHARING, Unused])
def test_awkward_networks_give_the_bits_of_full_forwards(kind, computed):
    denoiser, image, bank, models = toy_case(kind)
    expected = plain_losses(denoiser, image, None, bank, models)
    full = len(computed)
    computed.clear()
    losses = bank_losses(denoiser, image, None, bank, models)
    assert torch.equal(losses, expected)
    assert (len({tuple(row.flatten().tolist()) for row in losses}) == len(models)) == (kind is not Unused)
    if kind in SHARING:
        assert len(computed) < full
    assert is_untouched(denoiser.network)


def test_an_unread_output_in_the_middle_of_a_chain_does_not_outlive_it():
    denoiser, image, bank, models = toy_case(Plain)
    network, outputs, alive = denoiser.network, [], []

    class Watched(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            output = self.layer(x)
            outputs.append(weakref.ref(output))
            return output

    class Watching(nn.Module):
        weight, bias = network.late.weight, network.late.bias

        def forward(self, x):
            alive.append(sum(reference() is not None for reference in outputs))
            return F.linear(x, self.weight, self.bias)

    network.first, network.second, network.third = (
        Watched(layer) for layer in (network.first, network.second, network.third)
    )
    network.late.forward = Watching().forward
    bank_losses(denoiser, image, None, bank, models)
    assert len(outputs) == 3 + 3 * NUM_DRAWS
    assert alive == [1] + NUM_DRAWS * len(models) * [
        2
    ]  # of each draw the second output, which relu reads, and the third
    assert not any(reference() is not None for reference in outputs)


def test_a_networks_own_replaced_forward_stays_in_place():
    denoiser, image, bank, models = toy_case(Plain)
    whole = denoiser.network.second.forward

    def doubled(x):
        return 2 * whole(x)

    denoiser.network.second.forward = doubled
    losses = bank_losses(denoiser, image, None, bank, models)
    assert denoiser.network.second.forward is doubled
    del denoiser.network.second.forward
    assert not torch.equal(losses, bank_losses(denoiser, image, None, bank, models))


@pytest.mark.parametrize("after", [0, 2, 5, 40])
def test_an_error_in_the_network_leaves_nothing_behind(after, monkeypatch):
    denoiser, image, bank, models = toy_case(Plain)
    before = {name: tensor.clone() for name, tensor in denoiser.network.state_dict().items()}
    expected = bank_losses(denoiser, image, None, bank, models)
    ran, whole = [], nn.Linear.forward

    def failing(self, x):
        ran.append(1)
        if len(ran) > after:
            raise RuntimeError("stop")
        return whole(self, x)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Linear, "forward", failing)
        if after == 40:
            bank_losses(denoiser, image, None, bank, models)
        else:
            with pytest.raises(RuntimeError, match="stop"):
                bank_losses(denoiser, image, None, bank, models)
    assert is_untouched(denoiser.network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in denoiser.network.state_dict().items())
    assert torch.equal(expected, bank_losses(denoiser, image, None, bank, models))
