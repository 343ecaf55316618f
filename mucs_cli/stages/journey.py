"""Features of a query along the way on which it was sampled, for Journey-TRAK (Georgiev et al., arXiv 2312.06205)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mucs_cli.artifacts import fingerprint, read_tensors
from mucs_cli.config import result_config
from mucs_cli.diffusion.ddpm import DDPMDenoiser
from mucs_cli.diffusion.sampler import sample
from mucs_cli.errors import UserError
from mucs_cli.schemas import SampledQueriesConfig
from mucs_cli.stage_folder import require_manifest
from mucs_cli.stages.feature_store import FeatureStore
from mucs_cli.stages.loading import ROLES
from mucs_cli.stages.work import Work

LARGEST_DIFFERENCE = 0.05
"""Of a query and the end of its trajectory, in pixels or latents: rounding on another device stays far below."""


class JourneyStore(FeatureStore):
    """Features whose query part is the mean over steps of the sampler.

    At a step of noise level sigma the model predicts an image; its loss gradient is taken at that image noised anew, at
    the same level, under the noise of every draw. The training part is TRAK's, and is shared with it.

    Args:
        work: what it works with; ``work.config.method`` is a ``JourneyTRAKConfig``.
    Raises:
        UserError: the queries, or some of them, were not sampled, or the sampler takes fewer steps than were asked for.
    """

    def __init__(self, work: Work):
        if not isinstance(work.config.queries, SampledQueriesConfig):
            raise UserError(
                "method",
                "got journey_trak with queries from a folder; expected queries=sampled: only what this run sampled has "
                "a trajectory. Choose another method.",
            )
        held_out = [query for query in work.queries.selected if work.queries.role[query] == ROLES["held_out"]]
        if held_out:
            raise UserError(
                "method",
                f"got journey_trak with query {held_out[0]}, a held-out image; expected generated queries: only what "
                "was sampled has a trajectory. Choose them by queries.index, or another method.",
            )
        super().__init__(work, "loss")
        taken, count = num_steps(work), work.config.method.num_journey_steps
        if count is not None and count > taken:
            raise UserError("method.num_journey_steps", f"got {count}; expected at most {taken}, the sampler's steps.")
        self.steps = chosen_steps(taken, taken if count is None else count)
        folder = work.context.folder("sample")
        recorded = require_manifest(folder, "sample")["outputs"]["samples.safetensors"]["sha256"]
        self.seeds = read_tensors(folder / "samples.safetensors", recorded)["seed"]

    def query_key(self, query: int) -> str:
        return fingerprint(super().query_key(query), result_config(self.work.config.sampler), self.steps)

    def compute_queries(self, queries: Sequence[int]) -> Tensor:
        _, condition = self.query_batch(queries)
        trajectory = self.trajectory(queries, condition)
        total = torch.zeros(len(queries), self.k, dtype=torch.float64, device=self.device)
        for step in self.steps:
            sigma, image = trajectory[step]
            level = self.denoiser.nearest_sigma(sigma)  # finite, where the first level is pure noise
            total += self.features_of(image, condition, level.expand(len(self.sigma)))
        return (total / len(self.steps)).float()

    def trajectory(self, queries: Sequence[int], condition: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Noise level, [1], and predicted images, [len(queries), C, H, W], of every step of the sampler.

        Raises:
            UserError: it does not end at the queries.
        """
        settings, network = self.work.config.sampler, self.denoiser.network
        shape = self.noise.shape[1:]
        seeds = self.seeds[list(queries)].tolist()
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        guided = condition is not None and settings.guidance != 1
        steps: list[tuple[Tensor, Tensor]] = []
        end = sample(
            self.denoiser,
            noise.to(self.device),
            condition,
            null_condition=network.null_condition(condition) if condition is not None and guided else None,
            guidance=settings.guidance if guided else 1.0,
            num_steps=settings.num_steps,
            sigma_min=settings.sigma_min,
            sigma_max=settings.sigma_max,
            rho=settings.rho,
            on_step=lambda sigma, image: steps.append((sigma, image)),
        )
        self._check_end(queries, end)
        return [(sigma.clone(), image.clone()) for sigma, image in steps]  # the sampler's own are for inference only

    def _check_end(self, queries: Sequence[int], end: Tensor) -> None:
        end = (end.clamp(-1, 1) if self.work.inputs.model.codec is None else end).cpu()
        difference = (end - self.work.queries.image[list(queries)]).abs().flatten(1).amax(dim=1)
        worst = int(difference.argmax())
        if not float(difference[worst]) < LARGEST_DIFFERENCE:
            raise UserError(
                f"query {queries[worst]}",
                f"got a trajectory that ends {float(difference[worst]):.2g} away from it; expected the same image. "
                "Score on the device that sampled it, or redo mucs sample with overwrite=true.",
            )


def num_steps(work: Work) -> int:
    """Steps of the run's sampler."""
    asked, denoiser = int(work.config.sampler.num_steps), work.inputs.model.denoiser
    return min(asked, denoiser.num_train_timesteps) if isinstance(denoiser, DDPMDenoiser) else asked


def chosen_steps(taken: int, count: int) -> list[int]:
    """``count`` of ``taken`` steps, in the middles of equal parts."""
    return [(2 * i + 1) * taken // (2 * count) for i in range(count)]
