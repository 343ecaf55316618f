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


class ShuffledOrder:
    """An endless stream of indices: one fresh permutation of 0..count-1 an epoch, as a function of the position alone.

    Any batch can be asked for in any order, so that an interrupted run goes on with the batch it would have seen. A
    batch may span epochs; with fewer items than the batch holds, items repeat.

    Args:
        count: number of items, >= 1.
        seed, stream, index: name the stream, as in ``derive_seed``.
    """

    def __init__(self, count: int, seed: int, stream: str, *index: int):
        if count < 1:
            raise ValueError("an order needs at least one item")
        self.count = count
        self.seed, self.stream, self.index = seed, stream, index
        self._permutations: dict[int, torch.Tensor] = {}

    def batch(self, step: int, size: int) -> torch.Tensor:
        """Items ``step * size`` to ``(step + 1) * size`` of the stream; [size], int64."""
        start = step * size
        pieces = []
        while start < (step + 1) * size:
            epoch, offset = divmod(start, self.count)
            stop = min((step + 1) * size, (epoch + 1) * self.count)
            pieces.append(self._permutation(epoch)[offset : offset + stop - start])
            start = stop
        return torch.cat(pieces)

    def _permutation(self, epoch: int) -> torch.Tensor:
        if epoch not in self._permutations:
            if len(self._permutations) > 1:  # neighbours only: a batch spans few epochs
                self._permutations.pop(min(self._permutations))
            source = generator(self.seed, self.stream, *self.index, epoch)
            self._permutations[epoch] = torch.randperm(self.count, generator=source)
        return self._permutations[epoch]
