import itertools

import pytest
import torch

from mucs_cli.attribution.trainable import trainable_names
from mucs_cli.diffusion.augmentation import augment
from mucs_cli.diffusion.checkpoint import load_denoiser, save_denoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.unet import UNet
from mucs_cli.errors import UserError


def tiny(kind, **conditions):
    torch.manual_seed(0)
    if kind == "dit":
        network = DiT(8, 1, 2, 16, 2, 2, **conditions)
        torch.nn.init.normal_(network.proj_out.weight)
        torch.nn.init.normal_(network.modulation_out.weight, std=0.1)
        for block in network.transformer_blocks:
            torch.nn.init.normal_(block.modulation.weight, std=0.1)
    else:
        network = UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8, **conditions)
    return network.eval()


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_noise_level_label_vector_and_augmentation_each_change_the_output(kind):
    sample, c_noise = torch.randn(3, 1, 8, 8), torch.tensor([-0.5, 0.1, 0.6])
    label = torch.tensor([0, 1, 4])
    network = tiny(kind, num_classes=4, augmentation_dim=9)
    base = network(sample, c_noise, label)
    assert base.shape == sample.shape
    assert not torch.allclose(base, network(sample, c_noise + 0.2, label))
    assert not torch.allclose(base[0], network(sample, c_noise, torch.tensor([2, 1, 4]))[0])
    torch.testing.assert_close(base, network(sample, c_noise, label, torch.zeros(3, 9)))
    torch.nn.init.normal_(network.augmentation_embed.weight)
    assert not torch.allclose(base, network(sample, c_noise, label, torch.ones(3, 9)))
    vector = tiny(kind, condition_dim=5)
    assert not torch.allclose(vector(sample, c_noise, torch.ones(3, 5)), vector(sample, c_noise, torch.zeros(3, 5)))


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_conditional_network_needs_its_condition_and_an_unconditional_one_refuses_it(kind):
    sample, c_noise = torch.randn(2, 1, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="needs a condition"):
        tiny(kind, num_classes=4)(sample, c_noise)
    with pytest.raises(ValueError, match="unconditional"):
        tiny(kind)(sample, c_noise, torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_nearby_noise_levels_are_told_apart(kind):
    """c_noise spans 2.6 only; an embedding made for timesteps 0..1000 would hardly see it."""
    network, sample = tiny(kind), torch.randn(1, 1, 8, 8)
    outputs = [network(sample, torch.tensor([c])) for c in (-1.5, -0.7, 0.0, 0.5, 1.0)]
    for a, b in itertools.pairwise(outputs):
        assert float((a - b).detach().abs().max()) > 1e-3


def test_the_paper_sizes_have_their_parameter_counts():
    with torch.device("meta"):
        dit = DiT(32, 3, 2, 768, 12, 12)
        unet = UNet(32, 3)
    assert 125e6 < sum(p.numel() for p in dit.parameters()) < 140e6
    assert 50e6 < sum(p.numel() for p in unet.parameters()) < 80e6
    assert len(unet.unet.down_blocks) == 3
    assert len(unet.unet.down_blocks[0].resnets) == 4
    assert hasattr(unet.unet.down_blocks[1], "attentions")
    assert not hasattr(unet.unet.down_blocks[0], "attentions")


def test_trainable_presets_name_the_matrices_the_method_trains():
    dit = [name for name, _ in tiny("dit", num_classes=4).named_parameters()]
    mlp = trainable_names(dit, "mlp")
    assert mlp == [
        "condition_embed.label_embedding.weight",
        "transformer_blocks.0.ff.net.0.proj.weight",
        "transformer_blocks.0.ff.net.2.weight",
        "transformer_blocks.1.ff.net.0.proj.weight",
        "transformer_blocks.1.ff.net.2.weight",
    ]
    assert trainable_names(dit, "attention") == [
        f"transformer_blocks.{i}.attn.{layer}.weight" for i in (0, 1) for layer in ("to_qkv", "to_out")
    ]
    unet = [name for name, _ in tiny("unet").named_parameters()]
    weights = trainable_names(unet, "all_but_bias")
    assert set(unet) - set(weights) == {name for name in unet if name.endswith(".bias")}
    assert trainable_names(unet, "all") == unet
    assert trainable_names(unet, "attention")
    with pytest.raises(ValueError, match="matches"):
        trainable_names(unet, "mlp")
    with pytest.raises(ValueError, match="matches"):
        trainable_names(dit, "patterns", ["nothing.*"])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_a_saved_denoiser_comes_back_to_the_bit_and_diffusers_reads_its_folder(kind, tmp_path):
    network = tiny(kind, num_classes=4)
    denoiser = EDMDenoiser(network, 0.75, -0.8, 1.1)
    save_denoiser(tmp_path, denoiser, dict(network.named_parameters()))
    back = load_denoiser(tmp_path)
    sample, c_noise, label = torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 4])
    assert (back.sigma_data, back.p_mean, back.p_std) == (0.75, -0.8, 1.1)
    assert torch.equal(network(sample, c_noise, label), back.network(sample, c_noise, label))
    reread = type(network).from_pretrained(tmp_path, use_safetensors=True).eval()
    assert torch.equal(network(sample, c_noise, label), reread(sample, c_noise, label))


def test_truncated_and_foreign_weights_are_named(tmp_path):
    network = tiny("dit")
    files = save_denoiser(tmp_path, EDMDenoiser(network), dict(network.named_parameters()))
    weights = next(f for f in files if f.suffix == ".safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated"):
        load_denoiser(tmp_path)
    weights.write_bytes(whole)
    with pytest.raises(UserError, match="not the file its manifest names"):
        load_denoiser(tmp_path, sha256="0" * 64)
    other = tiny("dit", num_classes=4)
    save_denoiser(tmp_path / "other", EDMDenoiser(other), dict(other.named_parameters()))
    with pytest.raises(UserError, match="does not have"):
        load_denoiser(tmp_path, weights=tmp_path / "other" / weights.name)


def test_augmentation_leaves_images_alone_only_where_its_label_is_zero():
    image = torch.rand(64, 1, 8, 8) * 2 - 1
    moved, label = augment(image, 0.3, torch.Generator().manual_seed(0))
    untouched = (label == 0).all(dim=1)
    assert 0 < int(untouched.sum()) < 64
    torch.testing.assert_close(moved[untouched], image[untouched], atol=1e-5, rtol=0)
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(moved[~untouched], image[~untouched], strict=True))


def test_augmentation_mirrors_exactly_where_it_only_mirrors():
    image = torch.rand(64, 1, 8, 8)
    moved, label = augment(image, 0.0, torch.Generator().manual_seed(0))
    mirrored = label[:, 0] == 1
    assert 10 < int(mirrored.sum()) < 54
    torch.testing.assert_close(moved[mirrored], image[mirrored].flip(3), atol=1e-5, rtol=0)
    assert float(label[:, 1:].abs().sum()) == 0
