"""Gradient features of the TRAK family: what is differentiated, and the projected gradient of every image.

TRAK: Park et al., arXiv 2303.14186. D-TRAK: Zheng et al., arXiv 2311.00500. DAS: Lin et al., arXiv 2410.18639.

With noised = image + sigma noise, the network's view of the noise is eps_hat = (noised - D)/sigma, whatever the
preconditioning. A feature is phi = P^T (1/T) sum_t grad f_t over T draws (sigma_t, noise_t) that all images share.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from mucs_cli.attribution.gradients import Output, loss_output, summed_gradients
from mucs_cli.attribution.projection import Projection
from mucs_cli.diffusion.denoiser import Denoiser

OUTPUT_NAMES = ("loss", "squared_output", "mean_output")

RESIDUALS = ("raw", "code", "none")


def noise_error(denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """eps_hat - noise, as (image - D)/sigma, which rounds once less than the difference of the two; [S, C, H, W]."""
    level = sigma.view(-1, 1, 1, 1)
    return (image - denoiser(image + level * noise, sigma, condition)) / level


def predicted_noise(
    denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None
) -> Tensor:
    """eps_hat = (noised - D)/sigma; [S, C, H, W]. The noise is part of the input here and no target.

    Args:
        image, noise: [S, C, H, W].
        sigma: > 0 and finite; [S].
        condition: [S], [S, d] or None.
    """
    level = sigma.view(-1, 1, 1, 1)
    noised = image + level * noise
    return (noised - denoiser(noised, sigma, condition)) / level


def network_output(denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """F, what the network itself returns (noise, velocity or image) inside D; [S, C, H, W]."""
    network, outputs = denoiser.network, []

    def record(*inputs: Tensor | None) -> Tensor:
        outputs.append(network(*inputs))
        return outputs[-1]

    recording = copy.copy(denoiser)
    recording.network = record  # type: ignore[assignment]
    recording(image + sigma.view(-1, 1, 1, 1) * noise, sigma, condition)
    return outputs[0]


def make_output(name: str, raw_output: bool = False) -> Output:
    """What a method differentiates, a number a row.

    - ``loss``, of TRAK: mean (eps_hat - noise)^2; raw: the loss that the network is trained with, mean (F - target)^2.
    - ``squared_output``, of D-TRAK: mean eps_hat^2; raw: mean F^2.
    - ``mean_output``, of DAS: mean eps_hat; raw: mean F.

    Args:
        name: loss, squared_output or mean_output.
        raw_output: use the network's output F in place of eps_hat. They are the same for vp and for ddpm with epsilon
            prediction.
    Raises:
        ValueError: another name.
    """
    if name not in OUTPUT_NAMES:
        raise ValueError(f"output {name!r}: expected one of {', '.join(OUTPUT_NAMES)}")
    if name == "loss":
        return loss_output if raw_output else noise_loss
    prediction = network_output if raw_output else predicted_noise

    def output(denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        predicted = prediction(denoiser, image, noise, sigma, condition)
        return (predicted.square() if name == "squared_output" else predicted).mean(dim=(1, 2, 3))

    return output


def noise_loss(denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """mean (eps_hat - noise)^2; [S]."""
    return noise_error(denoiser, image, noise, sigma, condition).square().mean(dim=(1, 2, 3))


def features(
    denoiser: Denoiser,
    names: Sequence[str],
    image: Tensor,
    condition: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
    output: Output,
    projection: Projection,
    normalise_each: bool = False,
    micro_batch_size: int = 64,
) -> Tensor:
    """Projected gradients of a batch of images: P^T of the mean over the draws, which is the mean of the P^T.

    Holds one gradient an image, B x num_parameters numbers, and the activations of ``micro_batch_size`` noised images.

    Args:
        denoiser: in evaluation mode.
        names: the parameters to differentiate by; their order is that of the projection's rows.
        image: [B, C, H, W] in [-1, 1], on the model's device.
        condition: [B] labels, [B, d] vectors, or None.
        sigma: the noise levels of the T draws, > 0 and finite; [T].
        noise: their unit-variance noise; [T, C, H, W].
        output: from ``make_output``.
        projection: of the parameters ``names``, flattened.
        normalise_each: divide each draw's gradient by its norm before the mean, as DAS does; zero stays zero.
        micro_batch_size: noised images differentiated at once, >= 1; changes the rounding only.
    Returns:
        [B, k], float32, on the images' device.
    Raises:
        ValueError: shapes that do not fit, a noise level out of range, or a gradient that is not finite.
    """
    _check_draws(image, sigma, noise)
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size={micro_batch_size}: expected at least 1")
    parameters = dict(denoiser.network.named_parameters())
    mean = {name: parameters[name].new_zeros(len(image), *parameters[name].shape) for name in names}
    num_draws = 1 if normalise_each else min(len(sigma), micro_batch_size)
    num_images = max(1, micro_batch_size // num_draws)
    for start in range(0, len(image), num_images):
        rows = slice(start, start + num_images)
        part = None if condition is None else condition[rows]
        for first in range(0, len(sigma), num_draws):
            draws = slice(first, first + num_draws)
            gradients = summed_gradients(denoiser, names, image[rows], noise[draws], sigma[draws], part, output)
            scale = (_inverse_norms(gradients) if normalise_each else image.new_ones(len(image[rows]))) / len(sigma)
            for name, gradient in gradients.items():
                mean[name][rows] += gradient * scale.view(-1, *[1] * (gradient.dim() - 1))
    projected = projection.project_named(mean)
    finite = projected.isfinite().all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"the gradient of row {int(finite.int().argmin())} is not finite")
    return projected


def _inverse_norms(gradients: dict[str, Tensor]) -> Tensor:
    """1/norm of every row over all parameters, 0 for a row of zeros; [B]."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients.values()])
    norm = torch.linalg.vector_norm(norms, dim=0)
    return torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))


@torch.no_grad()
def noise_errors(
    denoiser: Denoiser,
    image: Tensor,
    condition: Tensor | None,
    sigma: Tensor,
    noise: Tensor,
) -> Tensor:
    """mean (eps_hat - noise)^2 of every image under every draw: what the residuals of DAS are made of.

    Args:
        denoiser, image, condition, sigma, noise: as in ``features``.
    Returns:
        [B, T], float32, on the CPU.
    Raises:
        ValueError: as in ``features``.
    """
    _check_draws(image, sigma, noise)
    errors = torch.empty(len(image), len(sigma))
    for t in range(len(sigma)):
        errors[:, t] = noise_loss(denoiser, image, noise[t : t + 1], sigma[t : t + 1], condition)
    return errors


def residuals(errors: Tensor, kind: str = "raw") -> Tensor:
    """The residual r of every training image in the score of DAS.

    - ``raw``: sqrt(mean_t error), a root mean square error.
    - ``code``, as in the release: sqrt(error) normalised to unit norm over the draws, then averaged over them. It
      lies in [1/T, 1/sqrt(T)] whatever the size of the errors, so it is nearly constant. 0 where all errors are.
    - ``none``: 1.

    Args:
        errors: from ``noise_errors``, >= 0; [N, T].
        kind: raw, code or none.
    Returns:
        [N], float64.
    Raises:
        ValueError: another kind, or another shape.
    """
    if kind not in RESIDUALS:
        raise ValueError(f"residual {kind!r}: expected one of {', '.join(RESIDUALS)}")
    if errors.dim() != 2 or errors.shape[1] == 0:
        raise ValueError(f"errors of shape {tuple(errors.shape)}: expected [N, T] with T >= 1")
    errors = errors.double()
    if kind == "raw":
        return errors.mean(dim=1).sqrt()
    if kind == "code":
        return torch.nn.functional.normalize(errors.sqrt(), dim=1).mean(dim=1)
    return errors.new_ones(len(errors))


def _check_draws(image: Tensor, sigma: Tensor, noise: Tensor) -> None:
    if len(sigma) == 0 or noise.shape != (len(sigma), *image.shape[1:]):
        raise ValueError(
            f"sigma of shape {tuple(sigma.shape)} and noise of shape {tuple(noise.shape)}: "
            f"expected [T] and [T, {', '.join(map(str, image.shape[1:]))}] with T >= 1"
        )
    if not bool(((sigma > 0) & sigma.isfinite()).all()):
        raise ValueError("noise levels must be positive and finite")
