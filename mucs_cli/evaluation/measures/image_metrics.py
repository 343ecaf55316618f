"""How alike two pictures are, pixel by pixel: similarities, higher is more alike, one for each pair of a batch.

All are computed in float64 from pixels mapped to [0, 1], so that the same pictures stored in [-1, 1] and in [0, 1] have
the same similarities. A picture with a pixel that is not a number has similarity NaN and leaves the others alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SSIM_SIGMA = 1.5
SSIM_WINDOW = 11
K1, K2 = 0.01, 0.03
RANGE_TOLERANCE = 1e-4


def ssim(first: Tensor, second: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Structural similarity, averaged over windows, then channels. Wang et al. 2004.

    (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)), C1 = K1^2, C2 = K2^2 for pixels in
    [0, 1], with means m, variances s^2 and covariance s_xy under a Gaussian window of sigma 1.5 and 11 x 11 pixels.

    Windows lie inside the picture. Along a side shorter than 11 pixels no window does: there one is centred on every
    pixel, cut off at the border, and its weights are made to sum to 1 again.

    Args:
        first, second: [B, C, H, W], in [low, high].
        low, high: darkest and brightest pixel value.
    Returns:
        [B], float64, in [-1, 1]; exactly 1 for identical pictures.
    Raises:
        ValueError: shapes differ, are not [B, C, H, W], or pixels are out of range.
    """
    x, y = unit_range(first, low, high), unit_range(second, low, high)
    check_shapes(x, y)
    rows, columns = (window_weights(side).to(x.device) for side in x.shape[-2:])

    def local_mean(image: Tensor) -> Tensor:
        return rows @ image @ columns.T

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x * mean_x
    variance_y = local_mean(y * y) - mean_y * mean_y
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def window_weights(side: int) -> Tensor:
    """The Gaussian window at each of its places along one side; [places, side], float64, rows sum to 1."""
    half = SSIM_WINDOW // 2
    centre = torch.arange(half, side - half) if side >= SSIM_WINDOW else torch.arange(side)
    distance = (torch.arange(side)[None, :] - centre[:, None]).double()
    weights = torch.exp(-distance.square() / (2 * SSIM_SIGMA**2)) * (distance.abs() <= half)
    return weights / weights.sum(dim=1, keepdim=True)


def mae_similarity(first: Tensor, second: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """1 - mean |x - y| of pixels in [0, 1]; [B], float64, in [0, 1]. Arguments and errors as in ``ssim``."""
    x, y = unit_range(first, low, high), unit_range(second, low, high)
    check_shapes(x, y)
    return 1 - (x - y).abs().mean(dim=(1, 2, 3))


def pixel_cosine(first: Tensor, second: Tensor, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Cosine of the angle between pictures as vectors of pixels in [0, 1]; arguments and errors as in ``ssim``.

    Returns:
        [B], float64, in [0, 1]; 0 where one picture is wholly black and the other is not, 1 where both are.
    """
    x, y = (unit_range(images, low, high) for images in (first, second))
    check_shapes(x, y)
    x, y = x.flatten(1), y.flatten(1)
    length_x, length_y = x.norm(dim=1), y.norm(dim=1)
    cosine = (x * y).sum(dim=1) / (length_x * length_y)
    black_x, black_y = length_x == 0, length_y == 0
    return torch.where(black_x | black_y, (black_x & black_y).double(), cosine.clamp(max=1))


PIXEL_METRICS: dict[str, Callable[..., Tensor]] = {
    "ssim": ssim,
    "mae": mae_similarity,
    "cosine": pixel_cosine,
}
"""The metrics that need no other model, by the name that tables give them."""


def unit_range(images: Tensor, low: float, high: float) -> Tensor:
    """Pixels from [low, high] to [0, 1], float64; raises ValueError where they are out of range."""
    margin = RANGE_TOLERANCE * (high - low)
    if ((images < low - margin) | (images > high + margin)).any():
        raise ValueError(f"pixels from {images.min():.4g} to {images.max():.4g}; expected [{low:g}, {high:g}]")
    return ((images.double() - low) / (high - low)).clamp(0, 1)


def check_shapes(first: Tensor, second: Tensor) -> None:
    if first.ndim != 4 or first.shape != second.shape:
        raise ValueError(f"pictures of shapes {tuple(first.shape)} and {tuple(second.shape)}; expected [B, C, H, W]")
