"""Which parameters unlearning may change, and gradients are taken of: presets and patterns of names."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

PRESETS: dict[str, tuple[str, ...]] = {
    "mlp": (
        "transformer_blocks.*.ff.*.weight",
        "*condition_embed.label_embedding.weight",
        "*condition_embed.projection.weight",
        "*.class_embedder.embedding_table.weight",
    ),
    "attention": ("transformer_blocks.*.attn*.weight", "*attentions.*.weight"),
    "all": ("*",),
}
"""Name patterns of each preset. "mlp" is what the release trains in its DiT: the MLP's weight matrices, and the label
embedding of a conditional model."""


def trainable_names(
    names: Iterable[str], preset: str, patterns: Sequence[str] = (), num_blocks: int | None = None
) -> list[str]:
    """The parameters that unlearning may change.

    Args:
        names: all parameter names of the network.
        preset: mlp, all_but_bias, attention, all, last_blocks, or patterns. "last_blocks" is "mlp" in a transformer and
            "all_but_bias" in a U-Net, in the last blocks (a U-Net's last up blocks) only.
        patterns: shell patterns, for preset "patterns".
        num_blocks: how many blocks, for preset "last_blocks".
    Raises:
        ValueError: unknown preset, or nothing matches (for "mlp": nothing but a label embedding), or there are fewer
            than ``num_blocks`` blocks.
    """
    names = list(names)
    if preset == "all_but_bias":
        chosen = [name for name in names if not name.endswith(".bias")]
    elif preset == "last_blocks":
        chosen = _names_in_last_blocks(names, num_blocks)
    elif preset == "patterns" or preset in PRESETS:
        wanted = patterns if preset == "patterns" else PRESETS[preset]
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
    else:
        raise ValueError(f"unknown preset {preset!r}")
    if not chosen or (preset == "mlp" and not any(".ff." in name for name in chosen)):
        raise ValueError("no parameter of this network matches")
    return chosen


def _names_in_last_blocks(names: list[str], num_blocks: int | None) -> list[str]:
    """The default-trainable parameters of the last blocks."""
    is_transformer = any(name.startswith("transformer_blocks.") for name in names)
    place = re.compile(r"^transformer_blocks\.(\d+)\." if is_transformer else r"(?:^|\.)up_blocks\.(\d+)\.")
    block_of = {name: int(match[1]) for name in names if (match := place.search(name))}
    count = max(block_of.values(), default=-1) + 1
    if num_blocks is None or not 1 <= num_blocks <= count:
        kind = "transformer blocks" if is_transformer else "up blocks"
        raise ValueError(f"num_blocks={num_blocks}, and the network has {count} {kind}")
    default = trainable_names(names, "mlp" if is_transformer else "all_but_bias")
    return [name for name in default if block_of.get(name, -1) >= count - num_blocks]
