"""Per-example gradients of a denoiser with respect to its parameters, by ``torch.func``."""

import copy
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from mucs_cli.diffusion.denoiser import Denoiser

Output = Callable[[Denoiser, Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(denoiser, image [1, C, H, W], noise [1, C, H, W], sigma [1], condition [1, ...] or None) -> [1] or a scalar."""


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
    """The gradient of ``output`` for every example of a batch by itself.

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
        name -> [B, *parameter shape].
    """
    parameters = {name: p.detach() for name, p in denoiser.network.named_parameters()}
    wanted = {name: parameters.pop(name) for name in names}

    def value(
        chosen: Mapping[str, Tensor], image: Tensor, noise: Tensor, sigma: Tensor, condition: Tensor | None
    ) -> Tensor:
        stateless = with_parameters(denoiser, {**parameters, **chosen})
        ready = None if condition is None else condition[None]
        return output(stateless, image[None], noise[None], sigma[None], ready).sum()

    dims = (None, 0, 0, 0, None if condition is None else 0)
    with sdpa_kernel(SDPBackend.MATH):
        gradients: dict[str, Tensor] = vmap(grad(value), in_dims=dims)(wanted, image, noise, sigma, condition)
    return gradients


def with_parameters(denoiser: Denoiser, parameters: Mapping[str, Tensor]) -> Denoiser:
    """The denoiser with its network called under other parameters; nothing is copied or changed in place."""
    network = denoiser.network
    stateless = copy.copy(denoiser)
    stateless.network = lambda *inputs: functional_call(network, dict(parameters), inputs)  # type: ignore[assignment]
    return stateless
