"""XDiag: the diagonal from a low-rank part and what probes say of the rest, each probe left out in turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OperandError
from ..operators.base import LinearOperator
from .probes import Hutchinson, mean_and_error


@dataclass(frozen=True)
class XDiag:
    """m columns through A in all for the diagonal: far better than m probes where the spectrum decays.

    With Y = A Ω for p = m/2 probes, Q its orthonormal basis and Q_i that of Y without column i, the estimate is the
    mean over i of diag(Q_i Q_iᵀ A) + ω_i ∘ (I − Q_i Q_iᵀ) A ω_i: every probe is used for the space of the others, and
    for what that space leaves over. Real operators with an adjoint product.

    Args:
        m: columns in all, even, at least 4.
        seed: fixes the probes.

    Reference: Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace estimation" (2024).
    """

    m: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 4 or self.m % 2:
            raise OperandError(f"XDiag(m={self.m!r}); expected an even number of columns, at least four")

    def resolve(self, n: int) -> XDiag | Hutchinson:
        """The same on a matrix of size n; where the space would be all of it, unit vectors do it exactly."""
        return Hutchinson(n) if self.m // 2 >= n else self


def xdiag(A: LinearOperator, estimator: XDiag, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The diagonal (n,) and its standard error, differentiable by the operator's own rules."""
    n, p = A.shape[0], estimator.m // 2
    if A.dtype.is_complex:
        raise OperandError("XDiag is for real operators; use Hutchinson(m) for a complex one")
    Omega = Hutchinson(p, estimator.seed).probes(n, A.dtype, A.device, generator)
    Q, R, S = basis_without_each(A @ Omega)
    Z = A.mH @ Q
    whole = (Q * Z).sum(1, keepdim=True)
    left = Q @ S
    rest = left * (S * R).sum(0)  # (I − Q_i Q_iᵀ) A ω_i
    samples = whole - left * (Z @ S) + Omega * rest
    return mean_and_error(samples, False)


def basis_without_each(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Q R = Y (n, p), and unit vectors S (p, p): the range of Y without column i is that of Q less Q s_i."""
    Q, R = torch.linalg.qr(Y)
    wide = R.to(torch.complex128 if R.is_complex() else torch.float64)
    # Where the rank is below p, R is singular: its inverse serves for directions only, which a tiny shift keeps finite.
    size = wide.detach().abs().max()
    floor = torch.finfo(Y.dtype).eps * torch.where(size > 0, size, 1.0)
    pivots = torch.where(wide.diagonal().abs() < floor, floor.to(wide.dtype), wide.diagonal())
    wide = torch.triu(wide, 1) + torch.diag(pivots)
    unit = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    inverse = torch.linalg.solve_triangular(wide, unit, upper=True).mH
    # s_i is orthogonal to every column of R but the i-th.
    return Q, R, (inverse / torch.linalg.vector_norm(inverse, dim=0)).to(Y.dtype)
