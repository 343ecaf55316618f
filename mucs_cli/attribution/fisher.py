"""The diagonal empirical Fisher information of a denoiser's loss, with which AbU preconditions its update."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mucs_cli.attribution.gradients import per_example_gradients
from mucs_cli.diffusion.denoiser import Denoiser
from mucs_cli.rng import generator


class DiagonalFisher:
    """F = mean over visits of g^2, elementwise, with g the gradient of one image's loss at one (sigma, noise).

    Data Attribution by Unlearning (AbU), arXiv 2406.09408. An image is visited once a pass, or twice with ``flip``:
    as it is and mirrored. Every visit has a noise level from the training distribution and noise of its own. Squares
    are summed in float64, image after image, so that an interruption between batches leaves the sum as it is.

    Args:
        denoiser: the base model, in evaluation mode.
        names: the parameters to measure.
        seed: visit v of an image in a pass draws from the stream ("fisher", pass, example_id, v).
        flip: also visit the mirror image.
    """

    def __init__(self, denoiser: Denoiser, names: Sequence[str], seed: int, flip: bool = False):
        self.denoiser, self.seed, self.flip = denoiser, seed, flip
        parameters = dict(denoiser.network.named_parameters())
        self.squares = {name: torch.zeros_like(parameters[name], dtype=torch.float64).detach() for name in names}
        """Sums of squared gradients, name -> float64 in the parameter's shape."""
        self.num_visits = 0

    def add(self, image: Tensor, condition: Tensor | None, example_ids: Sequence[int], pass_index: int) -> None:
        """Visits a batch of images.

        Args:
            image: [B, C, H, W], on the network's device.
            condition: each image's own, [B], [B, d] or None.
            example_ids: the images' ids, which name their streams.
            pass_index: which pass over the training images this is.
        Raises:
            FloatingPointError: a gradient is not finite.
        """
        for visit, seen in enumerate([image, image.flip(3)] if self.flip else [image]):
            sources = [generator(self.seed, "fisher", pass_index, int(i), visit) for i in example_ids]
            sigma = torch.cat([self.denoiser.training_sigma(1, source) for source in sources]).to(image)
            noise = torch.stack([torch.randn(image.shape[1:], generator=source) for source in sources]).to(image)
            gradients = per_example_gradients(self.denoiser, list(self.squares), seen, noise, sigma, condition)
            for name, gradient in gradients.items():
                if not bool(torch.isfinite(gradient).all()):
                    raise FloatingPointError(f"the gradient of {name} is not finite")
                for row in gradient:
                    self.squares[name] += row.double().square()
            self.num_visits += len(image)

    def diagonal(self) -> dict[str, Tensor]:
        """F: name -> [*parameter shape], float64, >= 0.

        Raises:
            ValueError: no image has been visited.
        """
        if not self.num_visits:
            raise ValueError("no image has been visited")
        return {name: square / self.num_visits for name, square in self.squares.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next visit adds to, as named tensors."""
        sums = {f"square.{name}": square for name, square in self.squares.items()}
        return {"num_visits": torch.tensor(self.num_visits), **sums}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what ``state`` returned."""
        self.num_visits = int(tensors["num_visits"])
        for name, square in self.squares.items():
            square.copy_(tensors[f"square.{name}"])


def damped_inverse(fisher: Mapping[str, Tensor], damping: float = 0.1) -> dict[str, Tensor]:
    """1/(F + damping * mean(F)), with the mean over each tensor by itself.

    Without damping a weight on which no visit depended would get an infinite step.

    Args:
        fisher: F, name -> float64, >= 0.
        damping: share of the tensor's mean that is added, >= 0.
    Returns:
        name -> the same shape, float64, > 0 and finite.
    Raises:
        ValueError: F of a tensor is zero everywhere, or somewhere without damping, so that it has no inverse.
    """
    inverse = {}
    for name, diagonal in fisher.items():
        damped = diagonal + damping * diagonal.mean()
        if not bool((damped > 0).all()):
            raise ValueError(f"the Fisher information of {name} is zero and has no inverse")
        inverse[name] = damped.reciprocal()
    return inverse
