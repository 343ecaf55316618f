"""What our networks share, and a DiT of our own; the U-Net is in ``unet.py``.

Both are conditioned on the noise level, a label or a vector, and an augmentation. Both are diffusers models
(``save_pretrained`` and ``from_pretrained`` work) and share one call:
``network(sample, timestep, condition, augmentation) -> [B, C, H, W]``, where ``timestep`` is the
denoiser's ``c_noise`` (any real number per example, [B], or one for the whole batch, [1]). Networks of diffusers' own
checkpoints offer the same call, in ``pretrained_networks.py``.

The DiT is our own because diffusers' ``DiTTransformer2DModel`` conditions on labels only, and draws its label dropout
from the global random state. Peebles and Xie, arXiv 2212.09748; parameter names follow diffusers.
"""

import math

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

AUGMENTATION_DIM = 9
"""Length of an EDM augmentation vector (Karras et al., arXiv 2206.00364, appendix F.2)."""


def sinusoidal_embedding(position: Tensor, dim: int) -> Tensor:
    """Sines and cosines of ``position`` [B] at ``dim/2`` geometric frequencies from 1 to 1e-4; returns [B, dim]."""
    step = torch.arange(dim // 2, device=position.device, dtype=position.dtype) / (dim // 2)
    angle = position[:, None] * torch.exp(-math.log(1e4) * step)[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def position_table(grid_size: int, dim: int) -> Tensor:
    """Fixed 2-D sine-cosine code of the places in a ``grid_size`` x ``grid_size`` grid; [1, grid_size**2, dim]."""
    axis = torch.arange(grid_size, dtype=torch.float32)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    halves = [sinusoidal_embedding(c.flatten(), dim // 2) for c in (row, column)]
    return torch.cat(halves, dim=1)[None]


class ConditionEmbedding(nn.Module):
    """Embeds a label, a vector, or nothing. The null condition is the label ``num_classes``, or the zero vector."""

    def __init__(self, num_classes: int, condition_dim: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.condition_dim = condition_dim
        if num_classes:
            self.label_embedding = nn.Embedding(num_classes + 1, width)
            nn.init.normal_(self.label_embedding.weight, std=0.02)
        if condition_dim:
            self.projection = nn.Linear(condition_dim, width)

    def forward(self, condition: Tensor | None) -> Tensor | None:
        if not self.num_classes and not self.condition_dim:
            if condition is not None:
                raise ValueError("an unconditional network was given a condition")
            return None
        if condition is None:
            raise ValueError("a conditional network needs a condition")
        if self.num_classes:
            return self.label_embedding(condition)
        return self.projection(condition)


class FeedForward(nn.Module):
    """The two-layer perceptron of a transformer block, named as in diffusers (``net.0.proj``, ``net.2``)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden)
        self.net = nn.ModuleList([first, nn.Dropout(dropout), nn.Linear(hidden, width)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.net[0].get_submodule("proj")(x), approximate="tanh")
        return self.net[2](self.net[1](x))


class Attention(nn.Module):
    """Multi-head self-attention over [B, T, width]."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.to_qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, width/heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.to_out(mixed.transpose(1, 2).reshape(batch, tokens, width)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each with an adaptive layer norm and a gate that starts at zero (adaLN-Zero)."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, num_heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width, int(width * mlp_ratio), dropout)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: [B, T, width]; embedding: [B, width] or [1, width], already activated."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=2)
        x = torch.addcmul(x, gate1, self.attn(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))
        return torch.addcmul(x, gate2, self.ff(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Network(ModelMixin, ConfigMixin):
    """What all networks share: their conditions, and how they are saved."""

    has_null_condition = True
    """Whether a conditional network can also be asked without its condition, as guidance needs."""

    zero_initialised_head: bool
    """Whether the output is exactly zero before training, so that the null loss has a closed form."""

    condition_embed: ConditionEmbedding

    @property
    def num_classes(self) -> int:
        """0 for a network without class labels."""
        return self.condition_embed.num_classes

    @property
    def condition_dim(self) -> int:
        """0 for a network without vector conditions."""
        return self.condition_embed.condition_dim

    @property
    def is_conditional(self) -> bool:
        return bool(self.num_classes or self.condition_dim)

    def null_condition(self, condition: Tensor) -> Tensor:
        """The condition that stands for "none", in the shape of ``condition``: label ``num_classes``, or zeros.

        Raises:
            ValueError: the network was made without one.
        """
        if not self.has_null_condition:
            raise ValueError("the network has no null condition")
        return torch.full_like(condition, self.num_classes) if self.num_classes else torch.zeros_like(condition)

    def _add_conditions(self, num_classes: int, condition_dim: int, augmentation_dim: int, width: int) -> None:
        self.condition_embed = ConditionEmbedding(num_classes, condition_dim, width)
        self.augmentation_embed = None
        if augmentation_dim:
            self.augmentation_embed = nn.Linear(augmentation_dim, width, bias=False)
            nn.init.zeros_(self.augmentation_embed.weight)


class DiT(Network):
    """Diffusion transformer with adaLN-Zero blocks and a zero-initialised output.

    Args:
        sample_size: height and width in pixels, a multiple of ``patch_size``.
        in_channels: image channels.
        patch_size: side of a token's square, pixels.
        width: channels of a token, a multiple of 4 and of ``num_heads``.
        num_layers, num_heads, mlp_ratio: depth, attention heads, and the MLP's hidden width over ``width``.
        dropout: probability in [0, 1), after the attention's output and inside the MLP; training only.
        num_classes: labels 0..num_classes-1, and ``num_classes`` for "no label"; 0 for an unconditional network.
        condition_dim: length of a vector condition; 0 for none. At most one of the two is non-zero.
        augmentation_dim: length of the augmentation vector; 0 if the network is trained without augmentation.
        timestep_scale: c_noise is multiplied by it before its sinusoids; the preconditioning's own.
    """

    zero_initialised_head = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        patch_size: int = 2,
        width: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        num_classes: int = 0,
        condition_dim: int = 0,
        augmentation_dim: int = 0,
        timestep_scale: float = 250.0,
    ):
        super().__init__()
        self.patch_embed = nn.Linear(in_channels * patch_size**2, width)
        self.time_embed = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self._add_conditions(num_classes, condition_dim, augmentation_dim, width)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, mlp_ratio, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(width, 2 * width)
        self.proj_out = nn.Linear(width, in_channels * patch_size**2)
        for layer in (self.modulation_out, self.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.register_buffer("positions", position_table(sample_size // patch_size, width), persistent=False)
        self.sample_size, self.in_channels, self.patch_size = sample_size, in_channels, patch_size
        self.timestep_scale = timestep_scale

    def forward(
        self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """sample: [B, C, H, W]; timestep: c_noise, [B] or [1]; condition: [B] labels or [B, d]; gives [B, C, H, W]."""
        position = timestep.to(sample.dtype) * self.timestep_scale
        embedding = self.time_embed(sinusoidal_embedding(position, 256))
        conditional = self.condition_embed(condition)
        if conditional is not None:
            embedding = embedding + conditional
        if augmentation is not None and self.augmentation_embed is not None:
            embedding = embedding + self.augmentation_embed(augmentation)
        embedding = F.silu(embedding)
        x = self.patch_embed(self._to_tokens(sample)) + self.positions
        for block in self.transformer_blocks:
            x = block(x, embedding)
        shift, scale = self.modulation_out(embedding)[:, None].chunk(2, dim=2)
        return self._to_image(self.proj_out(torch.addcmul(shift, self.norm_out(x), 1 + scale)))

    def _to_tokens(self, image: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        p = self.patch_size
        x = image.reshape(batch, channels, height // p, p, width // p, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)

    def _to_image(self, tokens: Tensor) -> Tensor:
        p, size, channels = self.patch_size, self.sample_size, self.in_channels
        x = tokens.reshape(-1, size // p, size // p, channels, p, p)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, size, size)
