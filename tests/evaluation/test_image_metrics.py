import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from mucs_cli.evaluation.measures.image_metrics import (
    PIXEL_METRICS,
    mae_similarity,
    pixel_cosine,
    ssim,
    window_weights,
)


def pictures(seed, *shape):
    """Smooth pictures in [-1, 1], so that structure is there to compare."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = gaussian_filter(noise, (0, 0, 1.5, 1.5)) * 2
    return torch.from_numpy(np.clip(smooth, -1, 1))


def ssim_of_scipy(first, second):
    """The mean over whole windows of one channel in [0, 1], from scipy's Gaussian filter; [H, W] each."""

    def blur(image):
        return gaussian_filter(image, 1.5, truncate=3.5)  # radius 5: 11 x 11

    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = blur(first), blur(second)
    variance_x, variance_y = blur(first**2) - mean_x**2, blur(second**2) - mean_y**2
    covariance = blur(first * second) - mean_x * mean_y
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return index[5:-5, 5:-5].mean()


@pytest.mark.parametrize("size", [(11, 11), (16, 24), (32, 32)])
def test_ssim_is_that_of_scipys_gaussian_filter_averaged_over_channels(size):
    first, second = pictures(0, 4, 3, *size), pictures(1, 4, 3, *size)
    second[0] = 0.7 * first[0] + 0.1
    unit = [((images + 1) / 2).numpy() for images in (first, second)]
    expected = [np.mean([ssim_of_scipy(unit[0][b, c], unit[1][b, c]) for c in range(3)]) for b in range(4)]
    np.testing.assert_allclose(ssim(first, second).numpy(), expected, atol=1e-10)
    assert expected[0] > 0.8 and min(expected) < 0.5


def test_a_small_picture_has_cut_and_renormalised_windows_on_every_pixel():
    first, second = pictures(2, 1, 1, 6, 8), pictures(3, 1, 1, 6, 8)
    x, y = ((images[0, 0].numpy() + 1) / 2 for images in (first, second))
    values = []
    for row in range(6):
        for column in range(8):
            i, j = np.mgrid[:6, :8]
            weight = np.exp(-((i - row) ** 2 + (j - column) ** 2) / (2 * 1.5**2))
            weight *= (abs(i - row) <= 5) & (abs(j - column) <= 5)
            weight /= weight.sum()
            mx, my = (weight * x).sum(), (weight * y).sum()
            vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
            cov = (weight * (x - mx) * (y - my)).sum()
            values.append((2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4) * (2 * cov + 9e-4) / (vx + vy + 9e-4))
    assert ssim(first, second).item() == pytest.approx(np.mean(values), abs=1e-12)
    assert ssim(first, second).item() < 0.9


def test_windows_sum_to_one_and_lie_inside_pictures_that_have_room_for_them():
    assert window_weights(11).shape == (1, 11) and window_weights(32).shape == (22, 32)
    assert window_weights(10).shape == (10, 10)
    for side in (1, 10, 11, 32):
        np.testing.assert_allclose(window_weights(side).sum(dim=1), 1, rtol=1e-14)
    assert window_weights(11)[0, 5] == window_weights(11).max()


@pytest.mark.parametrize("name", PIXEL_METRICS)
@pytest.mark.parametrize("size", [8, 32])
def test_identical_pictures_have_similarity_one_and_different_ones_less(name, size):
    images = pictures(4, 5, 3, size, size).float()
    same = PIXEL_METRICS[name](images, images.clone())
    np.testing.assert_allclose(same, 1, rtol=0, atol=0 if name != "cosine" else 1e-14)
    apart = PIXEL_METRICS[name](images, images.flip(0))
    assert (apart[[0, 1, 3, 4]] < 0.97).all() and apart[2] == same[2]


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_similarities_are_symmetric_and_fall_with_noise(name):
    images, noise = pictures(5, 1, 3, 16, 16), pictures(6, 1, 3, 16, 16)
    noisy = [(images + level * noise).clamp(-1, 1) for level in (0.05, 0.3, 1.0)]
    values = [PIXEL_METRICS[name](images, other).item() for other in noisy]
    assert 1 > values[0] > values[1] > values[2]
    assert PIXEL_METRICS[name](noisy[1], images).item() == pytest.approx(values[1], abs=1e-14)


@pytest.mark.parametrize("name", PIXEL_METRICS)
@pytest.mark.parametrize("size", [8, 32])
def test_a_pair_does_not_depend_on_the_batch_nor_on_the_range_it_is_stored_in(name, size):
    first, second = pictures(7, 6, 1, size, size), pictures(8, 6, 1, size, size)
    metric = PIXEL_METRICS[name]
    together = metric(first, second)
    alone = torch.cat([metric(first[i : i + 1], second[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-13)
    in_unit_range = metric((first + 1) / 2, (second + 1) / 2, low=0.0, high=1.0)
    np.testing.assert_allclose(together, in_unit_range, rtol=0, atol=1e-13)
    assert together.shape == (6,) and len(set(together.tolist())) == 6


def test_mae_and_cosine_are_their_formulas():
    black, white = -torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    assert mae_similarity(black, white).item() == 0.0
    assert mae_similarity(black, torch.zeros(1, 1, 4, 4)).item() == 0.5
    half = black.clone()
    half[..., :2] = 1
    assert pixel_cosine(half, white).item() == pytest.approx(np.sqrt(0.5), abs=1e-14)
    assert (pixel_cosine(black, white).item(), pixel_cosine(black, black).item()) == (0.0, 1.0)


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_a_broken_picture_is_not_a_number_and_leaves_the_others_alone(name):
    first, second = pictures(9, 3, 1, 12, 12), pictures(10, 3, 1, 12, 12)
    whole = PIXEL_METRICS[name](first, second)
    first[1, 0, 6, 6] = torch.nan
    broken = PIXEL_METRICS[name](first, second)
    assert broken.isnan().tolist() == [False, True, False] and broken[[0, 2]].tolist() == whole[[0, 2]].tolist()


@pytest.mark.parametrize("name", PIXEL_METRICS)
def test_wrong_shapes_and_ranges_are_refused(name):
    images = pictures(11, 2, 1, 12, 12)
    with pytest.raises(ValueError, match="shapes"):
        PIXEL_METRICS[name](images, images[:1])
    with pytest.raises(ValueError, match="shapes"):
        PIXEL_METRICS[name](images[0], images[0])
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        PIXEL_METRICS[name](images, images, low=0.0)
