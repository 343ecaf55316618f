"""``method=abu``: one step of natural-gradient ascent on the query, then the difference of losses.

Attribution by Unlearning: Wang et al., "Data attribution for text-to-image models by unlearning synthesized images",
arXiv 2406.09408. The defaults are its settings for MSCOCO; damping is ours, after its successor.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import II

from mucs_cli.methods.base import Method
from mucs_cli.schemas import MILLION, MethodConfig, NoiseBankConfig, option

if TYPE_CHECKING:
    from mucs_cli.stages.scorer import Scorer
    from mucs_cli.stages.unlearner import Unlearner
    from mucs_cli.stages.work import Work


@dataclass
class AbUConfig(MethodConfig):
    name: str = option("abu", "attribution method; set by method=")
    eta: float = option(0.01, "step size: the update is eta/N times the inverse Fisher times the gradient", above=0)
    num_steps: int = option(1, "updates", minimum=1)
    forget_batch_size: int = option(80, "noisy copies of the query a batch", minimum=1)
    num_batches: int = option(625, "batches whose mean gradient makes an update", minimum=1)
    micro_batch_size: int | None = option(
        None, "images a forward pass; null: the whole batch", minimum=1, affects_result=False
    )
    fisher_passes: int = option(5, "passes over the training images for the Fisher information", minimum=1)
    fisher_flip: bool = option(True, "mirror images count in the Fisher information")
    damping: float = option(0.1, "share of a tensor's mean Fisher information added to it", minimum=0)
    trainable: str = option(
        "key_value",
        "key_value (of attention; in a network without attention auto), or as in unlearning",
        choices=("key_value", "auto", "mlp", "all_but_bias", "attention", "all", "last_blocks", "patterns"),
    )
    num_blocks: int | None = option(None, "trainable=last_blocks: how many", minimum=1)
    patterns: list[str] = option([], "trainable=patterns: shell patterns of parameter names")
    seed: int = option(II("seed"), "seed of the noise in Fisher information and steps")
    num_draws: int = option(
        20, "draws (sigma, noise) an image in scoring", minimum=1, maximum=MILLION, scores_only=True
    )
    grid: str = option(
        "auto",
        "noise levels in scoring: auto (even for a discrete schedule, else full), or as noise_bank.grid",
        choices=("auto", "truncated", "exact", "full", "even"),
        scores_only=True,
    )
    flip: bool = option(True, "score an image by the larger of its own and its mirror image's", scores_only=True)
    noise_seed: int = option(II("seed"), "seed of the noise in scoring", scores_only=True)


class AbU(Method):
    name = "abu"
    summary = "one natural-gradient step on the query, then compare losses: mean difference"
    schema = AbUConfig

    def unlearning_sections(self, config: Any) -> tuple[str, ...]:
        return ("method",)

    def unlearner(self, work: "Work") -> "Unlearner":
        from mucs_cli.stages.ascent import NaturalAscent

        return NaturalAscent(work)

    def scorer(self, work: "Work") -> "Scorer":
        from mucs_cli.diffusion.ddpm import DDPMDenoiser
        from mucs_cli.stages.loss_comparison import LossComparison

        config = work.config.method
        grid = config.grid
        if grid == "auto":
            grid = "even" if isinstance(work.inputs.model.denoiser, DDPMDenoiser) else "full"
        bank = NoiseBankConfig(num_draws=config.num_draws, grid=grid, seed=config.noise_seed)
        return LossComparison(work, bank, "difference", flip=config.flip)


METHOD = AbU()
