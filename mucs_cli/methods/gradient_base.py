"""What the methods on gradient features (the TRAK family) have in common: the keys that decide the features."""

from dataclasses import dataclass

from omegaconf import II

from mucs_cli.schemas import MILLION, MethodConfig, option

PRESETS = ("all", "mlp", "all_but_bias", "attention", "last_blocks", "patterns")


@dataclass
class GradientConfig(MethodConfig):
    """Methods whose values of these keys agree, on the same output, share their features on disk."""

    num_draws: int = option(10, "draws (noise level, noise) whose gradients are averaged", minimum=1, maximum=MILLION)
    projection: str = option(
        "sparse",
        "random projection of the gradients: sparse, gaussian (slow), or identity (none)",
        choices=("sparse", "gaussian", "identity"),
    )
    num_projections: int = option(
        32768, "dimensions to project to; from the number of parameters on nothing is projected", minimum=1
    )
    nonzeros: int = option(4, "projection=sparse: entries a parameter", minimum=1)
    trainable: str = option(
        "all",
        "parameters to differentiate by: all, mlp, all_but_bias, attention, last_blocks, patterns",
        choices=PRESETS,
    )
    num_blocks: int | None = option(
        None, "trainable=last_blocks: how many transformer blocks, or up blocks of a U-Net", minimum=1
    )
    patterns: list[str] = option([], "trainable=patterns: shell patterns of parameter names")
    raw_output: bool = option(
        False, "the network's own output, and the loss it was trained with, in place of its prediction of the noise"
    )
    seed: int = option(II("seed"), "seed of noise and projection")
    micro_batch_size: int = option(64, "noised images differentiated at once", minimum=1, affects_result=False)


@dataclass
class KernelConfig(GradientConfig):
    """Of the methods that invert the features' kernel."""

    damping: float = option(0.1, "added to the kernel's diagonal, in units of its mean eigenvalue", minimum=0)
