"""Checkpoints that diffusers alone made, loaded by us."""

import json

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file

from mucs_cli.artifacts import write_tensors
from mucs_cli.attribution.null_loss import monte_carlo_null_loss
from mucs_cli.diffusion.checkpoint import save_denoiser
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.pretrained import load_pretrained
from mucs_cli.errors import UserError


def unet(**options):
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**(defaults | options)).eval()


def dit(**options):
    torch.manual_seed(0)
    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "sample_size": 4,
        "num_embeds_ada_norm": 5,
        "norm_num_groups": 4,
    }
    return DiTTransformer2DModel(**(defaults | options)).eval()


def autoencoder(**options):
    torch.manual_seed(1)
    defaults = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8,
        "scaling_factor": 0.3,
    }
    return AutoencoderKL(**(defaults | options)).eval()


def bare(folder, network, scheduler):
    network.save_pretrained(folder)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


IMAGE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
NOISE = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
TIMESTEP = torch.tensor([0, 40, 99])


@pytest.mark.parametrize("kind", ["pipeline", "ddim", "bare", "bare_inside", "unet_of_pipeline"])
def test_every_layout_gives_the_network_and_the_loss_of_diffusers_own_objects(kind, tmp_path):
    network = unet()
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    if kind == "ddim":
        DDIMPipeline(network, DDIMScheduler.from_config(scheduler.config)).save_pretrained(tmp_path)
    elif kind.startswith("bare"):
        network.save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path / "scheduler" if kind == "bare" else tmp_path)
    else:
        DDPMPipeline(network, scheduler).save_pretrained(tmp_path)
    model = load_pretrained(tmp_path / "unet" if kind == "unet_of_pipeline" else tmp_path)

    noisy = scheduler.add_noise(IMAGE, NOISE, TIMESTEP)
    expected = network(noisy, TIMESTEP).sample
    assert torch.equal(model.denoiser.network(noisy, TIMESTEP), expected)
    assert [n for n, _ in model.denoiser.network.named_parameters()] == [n for n, _ in network.named_parameters()]
    sigma = model.denoiser.levels[2, TIMESTEP].float()
    loss = (expected - NOISE).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(model.denoiser.loss(IMAGE, NOISE, sigma), loss, rtol=1e-4, atol=1e-6)
    assert (model.image_size, model.channels, model.sample_shape, model.codec) == (8, 1, (1, 8, 8), None)
    assert model.denoiser.network.num_classes == 0
    json.dumps(model.facts)


def test_a_class_conditional_unet_has_its_labels_and_no_null_class(tmp_path):
    network = unet(num_class_embeds=3)
    model = load_pretrained(bare(tmp_path, network, DDPMScheduler(100)))
    label = torch.tensor([0, 1, 2])
    ours = model.denoiser.network
    assert torch.equal(ours(NOISE, TIMESTEP, label), network(NOISE, TIMESTEP, label).sample)
    assert not torch.allclose(ours(NOISE, TIMESTEP, label), ours(NOISE, TIMESTEP, label.flip(0)))
    assert (ours.num_classes, ours.has_null_condition) == (3, False)
    with pytest.raises(ValueError, match="no null condition"):
        ours.null_condition(label)


@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_schedulers_give_the_edm_denoiser_of_their_preconditioning(scheduler, prediction_type, tmp_path):
    network = unet()
    theirs = scheduler(sigma_data=0.7, prediction_type=prediction_type, sigma_min=0.01, sigma_max=50.0)
    denoiser = load_pretrained(bare(tmp_path, network, theirs)).denoiser
    assert isinstance(denoiser, EDMDenoiser)
    for level in (0.02, 0.9, 30.0):
        sigma = torch.tensor(level)
        noised = IMAGE + sigma * NOISE
        output = network(theirs.precondition_inputs(noised, sigma), theirs.precondition_noise(sigma)).sample
        expected = theirs.precondition_outputs(noised, output, sigma)
        denoised = denoiser(noised, sigma.expand(3))
        torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)
        weight = (level**2 + 0.49) / (level * 0.7) ** 2
        loss = weight * (expected.double() - IMAGE).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(denoiser.loss(IMAGE, NOISE, sigma.expand(3)).double(), loss, rtol=1e-3, atol=0)
    bounded = denoiser.nearest_sigma(torch.tensor([0.002, 1.0, 80.0]))
    torch.testing.assert_close(bounded, torch.tensor([0.01, 1.0, 50.0]))


@pytest.mark.parametrize("layout", ["pipeline", "bare", "older class name"])
def test_a_dit_pipeline_works_in_the_latents_of_its_autoencoder(layout, tmp_path):
    network, codec, scheduler = dit(), autoencoder(), DDIMScheduler(100, clip_sample=False)
    if layout == "bare":
        bare(tmp_path, network, scheduler)
        codec.save_pretrained(tmp_path / "vae")
    else:
        DiTPipeline(network, codec, scheduler).save_pretrained(tmp_path)
    if layout == "older class name":
        edit(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel")
    model = load_pretrained(tmp_path)
    latent, label = torch.randn(2, 4, 4, 4), torch.tensor([3, 5])
    timestep = torch.tensor([7, 7])
    expected = network(latent, timestep, label).sample[:, :4]
    ours = model.denoiser.network
    assert torch.equal(ours(latent, timestep, label), expected)
    state = torch.get_rng_state()
    assert torch.equal(ours.train()(latent, torch.tensor([7]), label), expected)
    assert torch.equal(torch.get_rng_state(), state)
    ours.eval()
    assert (model.image_size, model.channels, model.sample_shape) == (8, 3, (4, 4, 4))
    assert ours.num_classes == 5
    assert ours.null_condition(label).tolist() == [5, 5]

    image = torch.rand(2, 3, 8, 8) * 2 - 1
    encoded = model.codec.encode(image)
    codec.requires_grad_(False)  # torch's CPU kernels round differently for weights that could be trained
    with torch.inference_mode():
        assert torch.equal(encoded, codec.encode(image).latent_dist.mode() * 0.3)
        assert torch.equal(model.codec.decode(encoded), codec.decode(encoded / 0.3).sample)
    with pytest.raises(ValueError, match="multiples of 2"):
        model.codec.encode(image[:, :, :7])


def test_a_shift_factor_is_undone_by_decoding(tmp_path):
    codec = autoencoder(shift_factor=0.25)
    DiTPipeline(dit(), codec, DDIMScheduler(10)).save_pretrained(tmp_path)
    ours, image = load_pretrained(tmp_path).codec, torch.rand(1, 3, 8, 8)
    mean = codec.encode(image).latent_dist.mean
    torch.testing.assert_close(ours.encode(image), (mean - 0.25) * 0.3)
    torch.testing.assert_close(ours.decode(ours.encode(image)), codec.decode(mean).sample)


def test_half_precision_and_sharded_weights_are_read_in_float32(tmp_path):
    network = unet()
    network.half().save_pretrained(tmp_path / "half", variant="fp16")
    network.float().save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("half", "shards"):
        DDPMScheduler(100).save_pretrained(tmp_path / name)
        loaded = load_pretrained(tmp_path / name).denoiser.network
        assert torch.equal(loaded(NOISE, TIMESTEP), network(NOISE, TIMESTEP).sample)


def test_attention_weights_under_the_names_of_older_diffusers_are_read(tmp_path):
    network = unet()
    path = bare(tmp_path, network, DDPMScheduler(100)) / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(path).items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        tensors[name] = tensor
    assert any("proj_attn" in name for name in tensors)
    save_file(tensors, path)
    assert torch.equal(load_pretrained(tmp_path).denoiser.network(NOISE, TIMESTEP), network(NOISE, TIMESTEP).sample)


@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_other_discrete_schedulers_mean_the_same_levels_with_their_own_defaults(name, tmp_path):
    scheduler = getattr(diffusers, name)()
    folder = bare(tmp_path, unet(), scheduler)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": name}))
    denoiser = load_pretrained(folder).denoiser
    torch.testing.assert_close(denoiser.levels[0].square(), scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


def test_the_clipping_of_the_scheduler_is_kept(tmp_path):
    for clips, expected in ((True, 2.5), (False, None)):
        folder = bare(tmp_path / str(clips), unet(), DDIMScheduler(10, clip_sample=clips, clip_sample_range=2.5))
        assert load_pretrained(folder).denoiser.clip_sample_range == expected


def test_the_fingerprint_depends_on_weights_and_schedule_and_not_on_the_place(tmp_path):
    first = load_pretrained(bare(tmp_path / "a", unet(), DDPMScheduler(100)))
    DDPMPipeline(unet(), DDPMScheduler(100)).save_pretrained(tmp_path / "b")
    assert load_pretrained(tmp_path / "b").fingerprint == first.fingerprint
    changed = unet()
    torch.nn.init.zeros_(changed.conv_out.bias)
    assert load_pretrained(bare(tmp_path / "c", changed, DDPMScheduler(100))).fingerprint != first.fingerprint
    assert load_pretrained(bare(tmp_path / "d", unet(), DDPMScheduler(99))).fingerprint != first.fingerprint


def test_fresh_weights_are_a_function_of_the_seed_and_give_a_null_loss_above_the_trained_one(tmp_path):
    model = load_pretrained(bare(tmp_path, unet(), DDPMScheduler(100)))
    state = torch.get_rng_state()
    first, again, other = model.fresh(1), model.fresh(1), model.fresh(2)
    assert torch.equal(torch.get_rng_state(), state)
    outputs = [d.network(NOISE, TIMESTEP) for d in (first, again, other, model.denoiser)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], outputs[3])
    assert not first.network.training
    assert first.facts() == model.denoiser.facts()
    measured = monte_carlo_null_loss(first, [(IMAGE, None)], 0, torch.device("cpu"))
    assert 1 < measured < 3  # unit noise, and what an untrained head adds


def test_a_run_of_ours_is_a_pretrained_model_with_its_saved_initial_weights(tmp_path):
    network = DiT(8, 1, 2, 16, 1, 2, num_classes=3, timestep_scale=1.0)
    initial = {name: p.detach().clone() for name, p in network.named_parameters()}
    torch.nn.init.normal_(network.proj_out.weight)
    denoiser = DDPMDenoiser(network.eval(), 100, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    save_denoiser(tmp_path / "train" / "model", denoiser, dict(network.named_parameters()))
    write_tensors(tmp_path / "train" / "initial.safetensors", initial)
    label, sigma = torch.tensor([0, 1, 3]), torch.tensor([0.5, 2.0, torch.inf])
    for path in (tmp_path, tmp_path / "train", tmp_path / "train" / "model"):
        model = load_pretrained(path)
        assert torch.equal(model.denoiser.loss(IMAGE, NOISE, sigma, label), denoiser.loss(IMAGE, NOISE, sigma, label))
        assert (model.image_size, model.channels, model.facts["source"]) == (8, 1, "mucs")
    fresh = model.fresh(0).network
    assert all(torch.equal(p, initial[name]) for name, p in fresh.named_parameters())


# --- errors ----------------------------------------------------------------------------------------------------------


def refused(path, match):
    with pytest.raises(UserError, match=match) as caught:
        load_pretrained(path)
    return str(caught.value)


def test_a_missing_folder_a_file_and_an_empty_folder_are_named(tmp_path):
    refused(tmp_path / "nowhere", "not found")
    refused(tmp_path, "without a network's config.json")
    lone = tmp_path / "model.ckpt"
    lone.write_bytes(b"x")
    assert "from_single_file" in refused(lone, "got a file")
    assert "model.ckpt is a pickle" in refused(tmp_path, "without a network's config.json")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(suffix, tmp_path):
    bare(tmp_path, unet(), DDPMScheduler(100))
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / f"diffusion_pytorch_model{suffix}")
    assert "safe_serialization=True" in refused(tmp_path, "pickle")


def test_missing_truncated_and_ambiguous_weights_are_named(tmp_path):
    bare(tmp_path, unet(), DDPMScheduler(100))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "truncated")
    weights.unlink()
    refused(tmp_path, "got no weights")
    for variant in ("fp16", "ema"):
        (tmp_path / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(whole)
    refused(tmp_path, "variants ema, fp16")


def test_weights_that_the_network_has_no_place_for_or_lacks_are_errors_and_not_warnings(tmp_path):
    bare(tmp_path, unet(), DDPMScheduler(100))
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"extra.weight": torch.zeros(1)}, path)
    refused(tmp_path, r"no place for: extra\.weight")
    save_file({k: v for k, v in tensors.items() if k != "conv_out.bias"}, path)
    refused(tmp_path, r"no weights for conv_out\.bias")
    save_file(tensors | {"conv_out.bias": torch.zeros(7)}, path)
    refused(tmp_path, "conv_out.bias")


def test_an_index_that_points_outside_its_folder_is_refused(tmp_path):
    bare(tmp_path / "model", unet(), DDPMScheduler(100))
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "model" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model", "outside its folder")


def test_lora_and_text_to_image_checkpoints_are_not_supported_yet(tmp_path):
    for name in ("pytorch_lora_weights.safetensors", "adapter_config.json"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        refused(folder, "LoRA checkpoint; these are not supported yet")
    folder = tmp_path / "pipeline"
    DDPMPipeline(unet(), DDPMScheduler(100)).save_pretrained(folder)
    edit(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"])
    refused(folder, "text_encoder .CLIPTextModel.*not supported yet")
    network = bare(tmp_path / "bare", unet(), DDPMScheduler(100))
    edit(network / "config.json", _class_name="UNet2DConditionModel")
    refused(network, "text-to-image network; these are not supported yet")


def test_foreign_components_schedulers_and_networks_are_named_with_what_is_supported(tmp_path):
    folder = tmp_path / "pipeline"
    DDPMPipeline(unet(), DDPMScheduler(100)).save_pretrained(folder)
    edit(folder / "model_index.json", unet=["my_unet", "UNet2DModel"])
    refused(folder, "other code is never run")
    edit(folder / "model_index.json", unet=["diffusers", "UNet2DModel"], vqvae=["diffusers", "VQModel"])
    refused(folder, "vqvae .VQModel.*DDPMPipeline")
    network = bare(tmp_path / "bare", unet(), DDPMScheduler(100))
    config = network / "scheduler" / "scheduler_config.json"
    edit(config, _class_name="ScoreSdeVeScheduler")
    refused(network, "ScoreSdeVeScheduler.*DDIMScheduler")
    config.unlink()
    refused(network, "without a scheduler")
    edit(network / "config.json", _class_name="VQModel")
    DDPMScheduler(100).save_pretrained(network)
    refused(network, "got a VQModel")
    (network / "config.json").write_text("{")
    refused(network, "cannot be read as JSON")
    (network / "config.json").write_text("[]")
    refused(network, "no JSON object")


@pytest.mark.parametrize(
    ("scheduler", "values", "match"),
    [
        (DDPMScheduler(100), {"rescale_betas_zero_snr": True}, "epsilon with zero terminal SNR"),
        (DDPMScheduler(100), {"prediction_type": "flow_prediction"}, "flow_prediction"),
        (DDPMScheduler(100), {"beta_schedule": "laplacian"}, "laplacian"),
        (DDPMScheduler(100), {"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values"),
        (DDPMScheduler(100), {"beta_end": 1.5}, "between 0 and 1"),
        (EDMEulerScheduler(), {"prediction_type": "sample"}, "prediction_type"),
        (EDMEulerScheduler(), {"sigma_data": 0.0}, "sigma_data"),
        (diffusers.EulerDiscreteScheduler(), {"timestep_type": "continuous"}, "timestep_type=continuous"),
        (diffusers.DPMSolverMultistepScheduler(), {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
)
def test_schedules_that_make_no_sense_are_refused_with_their_file(scheduler, values, match, tmp_path):
    folder = bare(tmp_path, unet(), scheduler)
    edit(folder / "scheduler" / "scheduler_config.json", **values)
    assert "scheduler_config.json" in refused(folder, match)


@pytest.mark.parametrize(
    ("options", "scheduler", "match"),
    [
        ({"sample_size": None}, DDPMScheduler(100), "sample_size: got None"),
        ({"sample_size": (8, 16)}, DDPMScheduler(100), "expected the side of a square"),
        ({"sample_size": 9}, DDPMScheduler(100), "multiple of 2"),
        ({"out_channels": 3}, DDPMScheduler(100), "out_channels: got 3"),
        ({"class_embed_type": "timestep"}, DDPMScheduler(100), "class_embed_type"),
        ({"time_embedding_type": "fourier"}, DDPMScheduler(100), "time_embedding_type"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 9}, DDPMScheduler(100), "100 discrete"),
        ({"time_embedding_type": "learned", "num_train_timesteps": 9}, EDMEulerScheduler(), "no discrete"),
    ],
)
def test_networks_that_cannot_be_used_are_refused_with_the_key_of_their_config(options, scheduler, match, tmp_path):
    assert "config.json" in refused(bare(tmp_path, unet(**options), scheduler), match)


def test_an_autoencoder_of_another_kind_or_size_is_refused(tmp_path):
    DiTPipeline(dit(), autoencoder(latent_channels=3), DDIMScheduler(10)).save_pretrained(tmp_path)
    refused(tmp_path, "latent_channels: got 3; the network takes 4")
    edit(tmp_path / "vae" / "config.json", _class_name="VQModel")
    refused(tmp_path, "got a VQModel; expected an AutoencoderKL")
