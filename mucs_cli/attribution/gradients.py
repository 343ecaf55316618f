"""Per-example gradients of a denoiser with respect to its parameters, by ``torch.func``."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mucs_cli.diffusion.denoiser import Denoiser

Output = Callable[[Denoiser, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(denoiser, image [S, C, H, W], noise [S, C, H, W], sigma [S], condition [S, ...] or None) -> [S], a number a row."""


def loss_output(denoiser: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
    """The denoiser's own loss."""
    return denoiser.loss(image, noise, sigma, condition)


def per_example_gradients(
    denoiser: Denoiser,
    names: Sequence[str],
    image: Tensor,
    noise: Tensor,
    sigma: Tensor,
    condition: Tensor | None,
    output: Output = loss_output,
) -> dict[str, Tensor]:
    """The gradient of ``output`` for every example of a batch by itself, each under its own draw.

    Attention runs as plain matrix products: under ``vmap`` the fused kernels fall back to a loop over examples.

    Args:
        denoiser: in evaluation mode.
        names: the parameters to differentiate by.
        image: [B, C, H, W].
        noise: unit variance; [B, C, H, W].
        sigma: [B].
        condition: [B] labels, [B, d] vectors, or None.
        output: what is differentiated, a number an example.
    Returns:
        name -> [B, *parameter shape], in the order of ``names``.
    """

    def value(
        stateless: Denoiser, image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        return output(stateless, image[None], noise[None], sigma[None], None if condition is None else condition[None])

    return _mapped_gradients(denoiser, names, value, image, noise, sigma, condition)


def summed_gradients(
    denoiser: Denoiser,
    names: Sequence[str],
    image: Tensor,
    noise: Tensor,
    sigma: Tensor,
    condition: Tensor | None,
    output: Output = loss_output,
) -> dict[str, Tensor]:
    """For every example the gradient of the sum of ``output`` over draws that all examples share.

    The draws of an example are one batch for the network, so that its gradient is never held draw by draw.

    Args:
        denoiser, names, condition: as in ``per_example_gradients``.
        image: [B, C, H, W].
        noise: unit variance; [S, C, H, W].
        sigma: [S].
        output: what is differentiated, a number a draw.
    Returns:
        name -> [B, *parameter shape], in the order of ``names``.
    """

    def value(stateless: Denoiser, image: Tensor, condition: Tensor | None = None) -> Tensor:
        ready = None if condition is None else condition.expand(len(sigma), *condition.shape)
        return output(stateless, image.expand(len(sigma), *image.shape), noise, sigma, ready)

    return _mapped_gradients(denoiser, names, value, image, condition)


def _mapped_gradients(
    denoiser: Denoiser, names: Sequence[str], value: Callable[..., Tensor], *inputs: Tensor | None
) -> dict[str, Tensor]:
    """Gradients of the sum of ``value(denoiser, *row of the inputs)``, for every row by itself."""
    parameters = {name: p.detach() for name, p in denoiser.network.named_parameters()}
    wanted = {name: parameters.pop(name) for name in names}
    given = [x for x in inputs if x is not None]  # only the last one, the condition, may be missing

    def scalar(chosen: Mapping[str, Tensor], *row: Tensor) -> Tensor:
        return value(with_parameters(denoiser, {**parameters, **chosen}), *row).sum()

    with sdpa_kernel(SDPBackend.MATH):
        gradients: dict[str, Tensor] = vmap(grad(scalar), in_dims=(None, *[0] * len(given)))(wanted, *given)
    return gradients


def with_parameters(denoiser: Denoiser, parameters: Mapping[str, Tensor]) -> Denoiser:
    """The denoiser with its network called under other parameters; nothing is copied or changed in place."""
    network = denoiser.network
    stateless = copy.copy(denoiser)
    stateless.network = lambda *inputs: functional_call(network, dict(parameters), inputs)  # type: ignore[assignment]
    return stateless
