"""Scores of the TRAK family from gradient features, by one factorisation in float64.

Phi, [N, k], holds the training features phi_i as rows; K = Phi^T Phi + lambda I_k. All methods but one are read off
K^-1: TRAK (Park et al., arXiv 2303.14186), D-TRAK (Zheng et al., arXiv 2311.00500), DAS (Lin et al., arXiv 2410.18639),
relative influence (Barshan et al., arXiv 2003.11630). TracIn (Pruthi et al., arXiv 2002.08484) is a plain dot product.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

CHUNK_ENTRIES = 2**23
"""Features that are in memory in float64 at once: 64 MB."""

MIN_ONE_MINUS_LEVERAGE = 1e-3
"""Leverages come close to 1 where k >= N and the damping is small; dividing by less would only enlarge their errors."""

FORMS = ("auto", "primal", "dual")

CPU = torch.device("cpu")

Features = np.ndarray | Tensor
"""[rows, k] floats; a numpy memory map is read in pieces."""


class DampedKernel:
    """K^-1 of training features, factorised once; queries may come at any later time.

    lambda = damping tr(Phi^T Phi)/k. The primal form factorises K, [k, k]. The dual form factorises
    M = Phi Phi^T + lambda I, [N, N], and uses K^-1 Phi^T = Phi^T M^-1. Phi is read in pieces and never held in float64.

    Args:
        features: Phi, training features; [N, k]. Kept, and read again for every set of queries.
        damping: lambda over the mean eigenvalue of Phi^T Phi, dimensionless, >= 0.
        form: primal, dual, or auto for the smaller matrix.
        device: where the algebra runs.
    Raises:
        ValueError: features that are no matrix, not finite, all zero, or singular under this damping; a damping or form
            out of range.
    """

    def __init__(self, features: Features, damping: float, form: str = "auto", device: torch.device = CPU):
        if form not in FORMS:
            raise ValueError(f"form={form!r}: expected one of {', '.join(FORMS)}")
        if not 0 <= damping < float("inf"):
            raise ValueError(f"damping={damping}: expected a finite number, at least 0")
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"features of shape {tuple(features.shape)}: expected [N, k] with N and k at least 1")
        self.features, self.device = features, device
        self.num_examples, self.k = int(features.shape[0]), int(features.shape[1])
        self.is_dual = form == "dual" or (form == "auto" and self.num_examples < self.k)
        gram = self._gram()
        trace = float(gram.trace())
        if not 0 < trace < float("inf"):
            raise ValueError(f"the features' squares sum to {trace}: expected finite features that are not all zero")
        self.damping_lambda = damping * trace / self.k
        gram.diagonal().add_(self.damping_lambda)
        self.factor, failed_at = torch.linalg.cholesky_ex(gram)
        pivots = self.factor.diagonal().square()
        rounding = len(gram) * torch.finfo(torch.float64).eps
        if int(failed_at) or float(pivots.min()) < rounding * float(pivots.max()):
            raise ValueError(f"damping={damping}: the kernel is singular to rounding; expected more damping")

    def _gram(self) -> Tensor:
        """Phi^T Phi, or Phi Phi^T in the dual form; float64."""
        size = self.num_examples if self.is_dual else self.k
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for _, piece in self._columns() if self.is_dual else self._rows():
            factor = piece if self.is_dual else piece.T
            gram.addmm_(factor, factor.T)
        return gram

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        return pieces(self.features, 0, self.device)

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        return pieces(self.features, 1, self.device)

    def products(self, queries: Features) -> Tensor:
        """phi_q^T K^-1 phi_i, on which every score but TracIn's is built.

        Args:
            queries: features of the queries, made with the same draws and projection; [Q, k].
        Returns:
            [Q, N], float64, on the CPU.
        Raises:
            ValueError: another number of columns, or a feature that is not finite.
        """
        _check_queries(queries, self.k)
        if not self.is_dual:
            solved = torch.cholesky_solve(float64(queries, self.device).T, self.factor)  # [k, Q]
            return torch.cat([(piece @ solved).T for _, piece in self._rows()], dim=1).cpu()
        dots = torch.zeros(self.num_examples, len(queries), dtype=torch.float64, device=self.device)
        for columns, piece in self._columns():
            dots.addmm_(piece, float64(queries[:, columns], self.device).T)
        return torch.cholesky_solve(dots, self.factor).T.contiguous().cpu()

    @cached_property
    def one_minus_leverage(self) -> Tensor:
        """1 - h_i with h_i = phi_i^T K^-1 phi_i, in [0, 1]; [N], float64, on the CPU.

        In the dual form it is lambda (M^-1)_ii, which keeps its digits where h_i is close to 1.
        """
        if self.is_dual:
            values = self.damping_lambda * torch.cholesky_inverse(self.factor).diagonal()
        else:
            leverage = [
                torch.linalg.solve_triangular(self.factor, piece.T, upper=False).square().sum(dim=0)
                for _, piece in self._rows()
            ]
            values = 1 - torch.cat(leverage)
        return values.clamp(0, 1).cpu()

    @cached_property
    def solution_norms(self) -> Tensor:
        """|K^-1 phi_i|, by which relative influence divides; [N], float64, on the CPU."""
        if self.is_dual:
            inverse = torch.cholesky_inverse(self.factor)
            squares = torch.zeros(self.num_examples, dtype=torch.float64, device=self.device)
            for _, piece in self._columns():
                squares += (piece.T @ inverse).square().sum(dim=0)
            return squares.sqrt().cpu()
        solved = [torch.cholesky_solve(piece.T, self.factor) for _, piece in self._rows()]
        return torch.cat([torch.linalg.vector_norm(columns, dim=0) for columns in solved]).cpu()


def trak_scores(kernel: DampedKernel, queries: Features) -> Tensor:
    """phi_q^T K^-1 phi_i: TRAK's and D-TRAK's score, which differ in the features only.

    Args:
        kernel: of the training features.
        queries: [Q, k].
    Returns:
        [Q, N], float32; higher means more influential.
    Raises:
        ValueError: the queries' features do not fit.
    """
    return kernel.products(queries).float()


def das_scores(
    kernel: DampedKernel, queries: Features, residual: Tensor, square: bool = True, leverage: bool = True
) -> tuple[Tensor, int]:
    """(phi_q^T K^-1 phi_i r_i/(1 - h_i))^2: the change of the output when image i is left out, linearised. DAS.

    Args:
        kernel: of the training features.
        queries: [Q, k].
        residual: r, of the training images; ones for none; [N].
        square: whether to square; the signed score tells proponents from opponents if the residual has its sign.
        leverage: whether to divide by 1 - h_i, which is taken as at least 1e-3.
    Returns:
        [Q, N], float32; higher means more influential. And for how many training images 1 - h_i was below 1e-3.
    Raises:
        ValueError: features or residuals that do not fit.
    """
    if residual.shape != (kernel.num_examples,) or not bool(residual.isfinite().all()):
        raise ValueError(f"residuals of shape {tuple(residual.shape)}: expected [{kernel.num_examples}] finite numbers")
    factor, num_clamped = residual.double().cpu(), 0
    if leverage:
        num_clamped = int((kernel.one_minus_leverage < MIN_ONE_MINUS_LEVERAGE).sum())
        factor = factor / kernel.one_minus_leverage.clamp(min=MIN_ONE_MINUS_LEVERAGE)
    scores = kernel.products(queries).mul_(factor)
    return (scores.square_() if square else scores).float(), num_clamped


def relative_influence_scores(kernel: DampedKernel, queries: Features) -> Tensor:
    """phi_q^T K^-1 phi_i/|K^-1 phi_i|: influence per unit of change of the parameters.

    Args:
        kernel: of the training features.
        queries: [Q, k].
    Returns:
        [Q, N], float32; higher means more influential; 0 for a training feature that is zero.
    Raises:
        ValueError: the queries' features do not fit.
    """
    norms = kernel.solution_norms
    return kernel.products(queries).div_(torch.where(norms > 0, norms, 1)).float()


def tracin_scores(features: Features, queries: Features, device: torch.device = CPU) -> Tensor:
    """phi_q . phi_i at one checkpoint; the sum over checkpoints, weighted by their learning rates, is TracIn.

    Args:
        features: of the training images; [N, k].
        queries: [Q, k].
        device: where the algebra runs.
    Returns:
        [Q, N], float32; higher means more influential.
    Raises:
        ValueError: the queries' features do not fit.
    """
    _check_queries(queries, features.shape[1])
    right = float64(queries, device).T
    return torch.cat([(piece @ right).T.float() for _, piece in pieces(features, 0, device)], dim=1).cpu()


def pieces(features: Features, axis: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Cuts a matrix along ``axis`` into pieces of at most ``CHUNK_ENTRIES`` numbers (one row or column at least).

    Yields:
        The piece's range along the axis, and the piece in float64 on ``device``.
    """
    step = max(1, CHUNK_ENTRIES // features.shape[1 - axis])
    for start in range(0, features.shape[axis], step):
        part = slice(start, min(start + step, features.shape[axis]))
        yield part, float64(features[part] if axis == 0 else features[:, part], device)


def float64(features: Features, device: torch.device) -> Tensor:
    """In float64 on ``device``; a numpy array is copied, so that a read-only memory map will do."""
    ready = features if isinstance(features, Tensor) else torch.from_numpy(np.array(features, dtype=np.float64))
    return ready.to(device, torch.float64)


def _check_queries(queries: Features, k: int) -> None:
    if queries.ndim != 2 or queries.shape[1] != k:
        raise ValueError(f"query features of shape {tuple(queries.shape)}: expected [Q, {k}]")
    if not bool(float64(queries, CPU).isfinite().all()):
        raise ValueError("a query feature is not finite")
