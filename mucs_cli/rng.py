"""Named random streams: every draw is a function of (seed, stream name, index), never of what was drawn before it."""

import hashlib

import torch


def derive_seed(seed: int, stream: str, *index: int) -> int:
    """A 63-bit seed for one stream, from SHA-256 of its name and indices; equal on every machine.

    Args:
        seed: the user's seed, any integer.
        stream: what is drawn, for example "noise" or "order".
        index: position in the stream, for example the training step or the query.
    """
    text = "/".join([str(seed), stream, *map(str, index)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, stream: str, *index: int) -> torch.Generator:
    """A CPU generator seeded for one stream; draws on the CPU are the same whatever device the model is on."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, *index))
