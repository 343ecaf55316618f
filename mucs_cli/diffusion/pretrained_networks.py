"""Networks of diffusers' own checkpoints behind the call that the denoisers use; parameters keep diffusers' names."""

from typing import Any

from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from torch import Tensor

from mucs_cli.diffusion.networks import Network


class PretrainedNetwork(Network):
    """What both have in common: labels or nothing as the condition, and a head that is not zero before training."""

    zero_initialised_head = False
    config: Any

    @property
    def condition_dim(self) -> int:
        return 0

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network denoises; a square."""
        size = self.config.sample_size
        side = size if isinstance(size, int) else size[0]
        return self.config.in_channels, side, side

    def _prediction(self, output: Tensor) -> Tensor:
        """The first ``in_channels`` channels: the rest, where there are any, predict the variance."""
        return output[:, : self.config.in_channels]


class PretrainedUNet(UNet2DModel, PretrainedNetwork):
    """A ``UNet2DModel``, unconditional or with class labels; it has no null class."""

    has_null_condition = False

    @property
    def num_classes(self) -> int:
        return self.config.num_class_embeds or 0

    def forward(
        self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """sample: [B, C, H, W]; timestep: [B] or [1]; condition: [B] labels or None; gives [B, C, H, W]."""
        if augmentation is not None:
            raise ValueError("a network of diffusers takes no augmentation")
        output = super().forward(sample, timestep.expand(len(sample)), class_labels=condition, return_dict=False)[0]
        return self._prediction(output)


class PretrainedDiT(DiTTransformer2DModel, PretrainedNetwork):
    """A ``DiTTransformer2DModel``: class labels 0..num_classes-1, and ``num_classes`` for "no label"."""

    @property
    def num_classes(self) -> int:
        return self.config.num_embeds_ada_norm

    def keep_labels(self) -> None:
        """Switches off the network's own dropping of labels, which draws from the global random state."""
        for module in self.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0

    def forward(
        self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """As ``PretrainedUNet.forward``; labels are needed."""
        if augmentation is not None:
            raise ValueError("a network of diffusers takes no augmentation")
        if condition is None:
            raise ValueError("a conditional network needs a condition")
        output = super().forward(sample, timestep.expand(len(sample)), class_labels=condition, return_dict=False)[0]
        return self._prediction(output)


def make_ready(network: PretrainedNetwork) -> PretrainedNetwork:
    """In evaluation mode, drawing nothing of its own."""
    if isinstance(network, PretrainedDiT):
        network.keep_labels()
    return network.eval()
