"""diffusers' U-Net behind the call that all our networks share; apart, as importing it takes a second."""

from diffusers import UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from mucs_cli.diffusion.networks import Network


class UNet(Network):
    """diffusers' ``UNet2DModel`` with our conditions added to its time embedding.

    Args:
        sample_size: height and width in pixels, a multiple of 2**(levels - 1).
        in_channels: image channels.
        channels: channels of the first level before its multiplier; a multiple of ``norm_groups``.
        multipliers: one per level, from the full resolution down.
        layers_per_block: residual blocks a level.
        attention_resolutions: sides, in pixels, of the levels that have self-attention.
        dropout: probability in [0, 1), inside the residual blocks; training only.
        norm_groups: groups of every group norm.
        num_classes, condition_dim, augmentation_dim, timestep_scale: as in ``DiT``.
    """

    zero_initialised_head = False

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        channels: int = 128,
        multipliers: tuple[int, ...] = (2, 2, 2),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        norm_groups: int = 32,
        num_classes: int = 0,
        condition_dim: int = 0,
        augmentation_dim: int = 0,
        timestep_scale: float = 250.0,
    ):
        super().__init__()
        attends = [sample_size // 2**level in attention_resolutions for level in range(len(multipliers))]
        width = channels * multipliers[0] * 4  # of UNet2DModel's time embedding
        self._add_conditions(num_classes, condition_dim, augmentation_dim, width)
        self.unet = UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=in_channels,
            block_out_channels=tuple(channels * m for m in multipliers),
            layers_per_block=layers_per_block,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
            attention_head_dim=min(64, channels),
            norm_num_groups=norm_groups,
            dropout=dropout,
            time_embedding_type="positional",
            class_embed_type="identity" if num_classes or condition_dim or augmentation_dim else None,
        )
        self.timestep_scale = timestep_scale

    def forward(
        self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """As ``DiT.forward``."""
        embedding = self.condition_embed(condition)
        if self.augmentation_embed is not None:
            if augmentation is None:
                augmentation = sample.new_zeros(len(sample), self.augmentation_embed.in_features)
            extra = self.augmentation_embed(augmentation)
            embedding = extra if embedding is None else embedding + extra
        timestep = (timestep.to(sample.dtype) * self.timestep_scale).expand(len(sample))
        return self.unet(sample, timestep, class_labels=embedding, return_dict=False)[0]
