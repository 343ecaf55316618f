import pytest
import torch
from torch import nn

from mucs_cli.attribution import scoring
from mucs_cli.attribution.scoring import (
    bank_losses,
    blocks_of,
    choose_block_size,
    fitted_block_size,
    independent_noise,
    replaced_parameters,
)
from mucs_cli.attribution.skew import mean_skew
from mucs_cli.diffusion.denoiser import EDMDenoiser
from mucs_cli.diffusion.networks import DiT
from mucs_cli.diffusion.noise_bank import draw_noise_bank
from mucs_cli.diffusion.unet import UNet


def model(kind):
    torch.manual_seed(0)
    if kind == "dit":
        network = DiT(8, 1, 2, 32, 2, 2)
        for name, parameter in network.named_parameters():
            if "modulation" in name or "proj_out" in name:
                nn.init.normal_(parameter, std=0.2)
    else:
        network = UNet(8, 1, 8, (1, 2), 1, (4,), norm_groups=8)
    return EDMDenoiser(network.eval().requires_grad_(False), 0.5)


IMAGES = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
BANK = draw_noise_bank(6, (1, 8, 8))


def changed(denoiser, seed):
    source = torch.Generator().manual_seed(seed)
    name, parameter = next((n, p) for n, p in denoiser.network.named_parameters() if p.dim() > 1)
    return {name: parameter + 0.1 * torch.randn(parameter.shape, generator=source)}


def scores(denoiser, models, size, images=IMAGES):
    """[M, N], block by block as the stage does it."""
    parts = []
    for block in blocks_of(len(images), size):
        losses = bank_losses(denoiser, images[block.rows()], None, BANK, [{}, *models])[:, : len(block)]
        parts.append(torch.stack([mean_skew(losses[0], other) for other in losses[1:]]))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_losses_equal_a_plain_loop_over_images_draws_and_models(kind):
    denoiser = model(kind)
    tensors = changed(denoiser, 5)
    losses = bank_losses(denoiser, IMAGES[:16], None, BANK, [{}, tensors])
    for m, change in enumerate([{}, tensors]):
        other = model(kind)
        other.network.load_state_dict(change, strict=False)
        for i in (0, 7, 15):
            for n in range(len(BANK)):
                with torch.no_grad():
                    one = other.loss(IMAGES[i : i + 1], BANK.noise[n][None], BANK.sigma[n][None])
                assert float(losses[m, i, n]) == pytest.approx(float(one), rel=2e-5)
    assert not torch.allclose(losses[0], losses[1])


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_scores_are_bit_equal_for_other_query_orders_subsets_and_reruns(kind):
    denoiser = model(kind)
    models = [changed(denoiser, seed) for seed in range(4)]
    whole = scores(denoiser, models, 32)
    assert torch.equal(whole, scores(denoiser, models, 32))
    assert torch.equal(whole.flip(0), scores(denoiser, models[::-1], 32))
    assert torch.equal(whole[[2]], scores(denoiser, [models[2]], 32))
    assert len({tuple(row) for row in whole.tolist()}) == 4


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_scores_of_other_block_sizes_agree_within_float_tolerance(kind):
    denoiser = model(kind)
    models = [changed(denoiser, 0)]
    torch.testing.assert_close(scores(denoiser, models, 16), scores(denoiser, models, 96), rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_scores_under_other_numbers_of_threads_agree_within_float_tolerance(kind):
    denoiser, before, found = model(kind), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.get_num_threads() == threads
            found.append(scores(denoiser, [changed(denoiser, 0)], 96))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("kind", ["dit", "unet"])
def test_the_bits_of_a_block_do_not_depend_on_what_pads_it(kind):
    denoiser = model(kind)
    models = [changed(denoiser, 0)]
    padded = scores(denoiser, models, 32)[:, 64:]  # 26 images and 6 of padding
    filled = scores(denoiser, models, 32, torch.cat([IMAGES, IMAGES[:6]]))[:, 64:90]
    assert torch.equal(padded, filled)


def test_an_unchanged_model_scores_exactly_zero():
    denoiser = model("dit")
    assert torch.equal(scores(denoiser, [{}], 32), torch.zeros(1, 90, dtype=torch.float64))


def test_independent_noise_differs_between_images_models_and_draws_and_depends_on_nothing_else():
    ids = list(range(16))
    whole = independent_noise(3, 2, ids, 4, IMAGES[:16])
    assert torch.equal(whole.flip(0), independent_noise(3, 2, ids[::-1], 4, IMAGES[:16]))
    assert torch.equal(whole[5:9], independent_noise(3, 2, ids[5:9], 4, IMAGES[5:9]))
    others = [independent_noise(*key, IMAGES[:16]) for key in ((4, 2, ids, 4), (3, -1, ids, 4), (3, 2, ids, 5))]
    rows = {tuple(row) for noise in (whole, *others) for row in noise.flatten(1).tolist()}
    assert len(rows) == 64
    assert float(whole.mean()) == pytest.approx(0, abs=4 / 32)  # 1,024 numbers
    assert float(whole.var()) == pytest.approx(1, abs=4 * 2**0.5 / 32)


def test_independent_noise_takes_the_banks_levels_and_an_unchanged_model_no_longer_scores_zero():
    denoiser, ids = model("dit"), list(range(16))

    def noise(m, n):
        return independent_noise(3, m - 1, ids, n, IMAGES[:16])

    losses = bank_losses(denoiser, IMAGES[:16], None, BANK, [{}, {}], noise=noise)
    for m, i, n in ((0, 0, 0), (1, 7, 5), (1, 15, 2)):
        with torch.no_grad():
            one = denoiser.loss(IMAGES[i : i + 1], noise(m, n)[i : i + 1], BANK.sigma[n : n + 1])
        assert float(losses[m, i, n]) == pytest.approx(float(one), rel=2e-5)
    assert (mean_skew(losses[0], losses[1]).abs() > 1e-4).all()


def test_replaced_parameters_come_back_even_after_an_error():
    denoiser = model("dit")
    before = {n: p.clone() for n, p in denoiser.network.named_parameters()}
    parameters = dict(denoiser.network.named_parameters())
    with pytest.raises(RuntimeError, match="stop"), replaced_parameters(parameters, changed(denoiser, 1)):
        raise RuntimeError("stop")
    assert all(torch.equal(p, before[n]) for n, p in denoiser.network.named_parameters())


def test_blocks_cover_every_row_once_and_have_one_size():
    blocks = blocks_of(100, 32)
    assert [row for b in blocks for row in range(b.start, b.stop)] == list(range(100))
    assert {len(b.rows()) for b in blocks} == {32}
    assert [len(b) for b in blocks] == [32, 32, 32, 4]
    assert int(blocks[-1].rows().max()) == 99


def test_fitted_block_sizes_waste_little_and_are_multiples_of_sixteen():
    for count in (90, 1797, 50_000):
        for candidate in (64, 256, 512):
            size = fitted_block_size(count, candidate)
            blocks = -(-count // size)
            assert size % 16 == 0
            assert blocks * size - count < 16 * blocks


def test_the_chosen_block_size_is_one_of_the_fitted_candidates():
    size = choose_block_size(model("dit"), IMAGES, None, BANK, 90, candidates=(32, 96), seconds=0.01)
    assert size in {fitted_block_size(90, 32), fitted_block_size(90, 96)}


@pytest.mark.parametrize(("an_image", "tried", "chosen"), [(1e-3, {64, 128, 32, 16}, 32), (1e-5, {64, 128, 256}, 256)])
def test_of_slow_models_smaller_blocks_are_tried_and_no_larger_ones(
    an_image: float, tried: set[int], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = [0.0], set()

    def losses(denoiser: object, image: torch.Tensor, *_: object) -> None:
        calls.add(len(image))
        now[0] += len(image) * an_image * (0.5 if len(image) == chosen else 1.0)

    monkeypatch.setattr(scoring, "bank_losses", losses)
    monkeypatch.setattr(scoring.time, "perf_counter", lambda: now[0])
    size = choose_block_size(model("dit"), IMAGES, None, BANK, 2560, candidates=(64, 128, 256), seconds=0.03)
    assert (calls, size) == (tried, chosen)
