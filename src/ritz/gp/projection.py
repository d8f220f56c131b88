"""Variances of many points from one cached basis: an upper bound each, and a bound on how far it is from the truth.

For any W (n, r) with WᵀK̂W = I the best approximation of K̂⁻¹k* in its span is W Wᵀk*, and

    k** − ‖Wᵀk*‖² = (k** − k*ᵀK̂⁻¹k*) + rᵀK̂⁻¹r,        r = k* − K̂W Wᵀk*,        rᵀK̂⁻¹r ≤ ‖r‖²/σ²,

so that a basis costs its r products once, and every further point n·r operations instead of a linear solve. The span is
that of r columns K[:, S] with randomly drawn pivots S, which is close to the best of its dimension, the leading
eigenvectors. (Pleiss, Gardner, Weinberger, Wilson, Constant-time predictive distributions for Gaussian processes, 2018,
put a Lanczos basis in the place of solves; there is no bound there.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import full_precision
from ..operators.base import LinearOperator
from ..solve import RandomlyPivotedCholesky
from .inverse import Reduced

COLUMNS_AT_ONCE = 64  # of the basis in a product
ROWS_AT_ONCE = 4096  # of the basis in float64


@dataclass(frozen=True)
class Projection:
    """Variances from a basis of ``rank`` products with K̂ that the posterior makes once and keeps.

    Args:
        rank: size of the basis; at n or above it is exact. The effective dimension tr K(K + σ²)⁻¹ is what it should
            exceed.
        rtol: points whose variance may be too large by more than this, relative, are solved for by conjugate
            gradients; None leaves every point to the basis.
        seed: of the pivots.

    Cost: ``rank`` products with K̂ and 2·rank·n numbers once; then 4·rank·n operations a point, and one kernel row.
    """

    rank: int = 400
    rtol: float | None = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.rtol is not None and not self.rtol > 0):
            raise OperandError(f"{self}; expected rank >= 1, and rtol > 0 or None")

    def build(self, K: LinearOperator, A: LinearOperator, noise: Tensor) -> Basis:
        """The basis for A = K + diag(noise)."""
        with torch.no_grad(), full_precision():
            P = RandomlyPivotedCholesky(min(self.rank, K.shape[0]), seed=self.seed)
            U = torch.linalg.qr(P.build(K, shift=float(noise.mean())).factor).Q.to(K.dtype)
            V = torch.cat([A @ part.contiguous() for part in U.split(COLUMNS_AT_ONCE, 1)], 1) if U.shape[1] else U
            floor = float(noise.min())
            G = torch.zeros(U.shape[1], U.shape[1], dtype=torch.float64, device=U.device)
            for u, v in zip(U.split(ROWS_AT_ONCE), V.split(ROWS_AT_ONCE), strict=True):
                G += u.double().mT @ v.double()
            # UᵀK̂U has no eigenvalue below that of K̂, which has none below the smallest noise
            values, vectors = torch.linalg.eigh((G + G.mT) / 2)
            root = (vectors / values.clamp_min(floor).sqrt()).to(U.dtype)
            return Basis(U @ root, V @ root, floor, U.shape[1])


@dataclass(frozen=True, eq=False)
class Basis:
    """W (n, r) with WᵀK̂W = I, and K̂W; ``floor`` is the smallest noise variance."""

    W: Tensor
    AW: Tensor
    floor: float
    num_matvecs: int

    def reduce(self, C: Tensor) -> Reduced:
        """‖Wᵀk*‖² for the columns of C (n, b), from below k*ᵀK̂⁻¹k* by at most the gap."""
        with full_precision():
            T = self.W.mT @ C
            with torch.no_grad():
                R = torch.addmm(C.detach(), self.AW, T.detach(), alpha=-1)
                gap = R.square().sum(0, dtype=torch.float64) / self.floor
        return Reduced(T.square().sum(0, dtype=torch.float64), gap)
