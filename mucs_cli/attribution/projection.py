"""Random projections of flattened gradients to few dimensions, made block by block and never held whole.

Johnson and Lindenstrauss: dot products survive. Nothing is scaled by 1/sqrt(k), as in the release of D-TRAK
(Zheng et al., arXiv 2311.00500), so that E ||P^T g||^2 = k ||g||^2 for both random kinds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mucs_cli.rng import generator

KINDS = ("gaussian", "sparse", "identity")

GAUSSIAN_ENTRIES = 2**22
"""Entries of a Gaussian block: 16 MB, so that it stays near the processor between being drawn and being used."""

SPARSE_ROWS = 2**14
"""Parameters of a sparse block."""


@dataclass(frozen=True)
class Projection:
    """A fixed random matrix P, [num_parameters, k], and its products with gradients.

    P is a function of the arguments alone. Block b, a range of parameters, is drawn on the CPU from the stream
    ("projection", b); neither the batch nor earlier calls nor the device change it. Every call draws all of P
    again (num_parameters x k normal numbers for ``gaussian``), which large batches make cheap.

    - ``gaussian``: independent N(0, 1) entries.
    - ``sparse``: ``nonzeros`` entries +-sqrt(k/nonzeros) a parameter, one in each of as many equal parts of the k
      places; a product costs num_parameters x nonzeros, whatever k is. Kane and Nelson, arXiv 1012.1577.
    - ``identity``: the gradients themselves.

    Args:
        kind: gaussian, sparse or identity.
        num_parameters: length of a flattened gradient, >= 1.
        k: dimensions to project to, >= 1; ``num_parameters`` for ``identity``.
        seed: any integer.
        nonzeros: of ``sparse``, >= 1; at most k are used.
    Raises:
        ValueError: an unknown kind, or a number out of its range.
    """

    kind: str
    num_parameters: int
    k: int
    seed: int
    nonzeros: int = 4

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.num_parameters < 1 or self.k < 1 or self.nonzeros < 1:
            raise ValueError(
                f"num_parameters={self.num_parameters}, k={self.k}, nonzeros={self.nonzeros}: expected at least 1"
            )
        if self.kind == "identity" and self.k != self.num_parameters:
            raise ValueError(f"k={self.k}: expected num_parameters={self.num_parameters} for the identity")

    @property
    def block_size(self) -> int:
        """Parameters a block."""
        return max(1, GAUSSIAN_ENTRIES // self.k) if self.kind == "gaussian" else SPARSE_ROWS

    def project(self, gradients: Tensor) -> Tensor:
        """P^T g of every row.

        Args:
            gradients: [B, num_parameters].
        Returns:
            [B, k], float32, on the gradients' device.
        Raises:
            ValueError: another shape.
        """
        return self.project_named({"gradients": gradients})

    def project_named(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``project`` of the tensors' concatenation in the mapping's order; no more than a block is concatenated.

        Sums over blocks are kept in float64.

        Args:
            gradients: name -> [B, *shape], num_parameters numbers a row in total.
        Returns:
            [B, k], float32, on the gradients' device.
        Raises:
            ValueError: the shapes do not fit.
        """
        flat = [tensor.flatten(1) for tensor in gradients.values()]
        sizes = [tensor.shape[1] for tensor in flat]
        if sum(sizes) != self.num_parameters or len({len(tensor) for tensor in flat}) != 1:
            shapes = [tuple(tensor.shape) for tensor in gradients.values()]
            raise ValueError(
                f"gradients of shapes {shapes}: expected [B, ...] with {self.num_parameters} numbers a row"
            )
        if self.kind == "identity":
            return torch.cat(flat, dim=1).float()
        total = torch.zeros(self.k, len(flat[0]), dtype=torch.float64, device=flat[0].device)
        for index, block in enumerate(blocks_of_columns(flat, self.block_size)):
            if self.kind == "gaussian":
                total += self.gaussian_block(index, block.shape[1]).to(block).T @ block.T
            else:
                place, sign = (part.to(block.device) for part in self.sparse_block(index, block.shape[1]))
                rows = block.T.double()
                for j in range(len(place)):
                    total.index_add_(0, place[j], rows * sign[j, :, None])
        if self.kind == "sparse":
            total *= (self.k / min(self.nonzeros, self.k)) ** 0.5
        return total.T.float().contiguous()

    def gaussian_block(self, index: int, size: int) -> Tensor:
        """The rows of P that belong to the ``size`` parameters of block ``index``; [size, k], float32."""
        return torch.randn(size, self.k, generator=generator(self.seed, "projection", index))

    def sparse_block(self, index: int, size: int) -> tuple[Tensor, Tensor]:
        """Places in 0..k-1 and signs +-1 of the entries of block ``index``; [nonzeros, size], int64 and float64."""
        source = generator(self.seed, "projection", index)
        nonzeros = min(self.nonzeros, self.k)
        edges = torch.arange(nonzeros + 1) * self.k // nonzeros
        draw = torch.rand(nonzeros, size, generator=source, dtype=torch.float64)
        place = edges[:-1, None] + (draw * edges.diff()[:, None]).long()
        sign = torch.randint(2, (nonzeros, size), generator=source) * 2.0 - 1
        return place, sign.double()


def blocks_of_columns(tensors: list[Tensor], size: int) -> Iterator[Tensor]:
    """The concatenation of [B, n_i] tensors along their columns, cut into [B, size] blocks; the last may be shorter."""
    pieces: list[Tensor] = []
    held = 0
    for tensor in tensors:
        start = 0
        while start < tensor.shape[1]:
            piece = tensor[:, start : start + size - held]
            pieces.append(piece)
            start += piece.shape[1]
            held += piece.shape[1]
            if held == size:
                yield torch.cat(pieces, dim=1)
                pieces, held = [], 0
    if pieces:
        yield torch.cat(pieces, dim=1)
