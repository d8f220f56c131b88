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
    """2m products for the diagonal: far better than 2m probes where the spectrum decays, never much worse.

    With Y = A Ω, Q its orthonormal basis and Q_i that of Y without column i, the estimate is the mean over i of
    diag(Q_i Q_iᵀ A) + ω_i ∘ (I − Q_i Q_iᵀ) A ω_i: every probe is used for the space of the others, and for what that
    space leaves over. Real operators with an adjoint product.

    Reference: Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace estimation" (2024).
    """

    m: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.m, int) or self.m < 2:
            raise OperandError(f"XDiag(m={self.m!r}); expected a whole number of probes, at least two")


def xdiag(A: LinearOperator, estimator: XDiag, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The diagonal (n,) and its standard error; 2m products, differentiable by the operator's own rules."""
    n, m = A.shape[0], estimator.m
    if A.dtype.is_complex:
        raise OperandError("XDiag is for real operators; use Hutchinson(m) for a complex one")
    Omega = Hutchinson(m, estimator.seed).probes(n, A.dtype, A.device, generator)
    Q, R = torch.linalg.qr(A @ Omega)
    wide = R.double()
    # Where the rank is below m, R is singular: its inverse serves for directions only, which a tiny shift keeps finite.
    size = wide.detach().abs().max()
    floor = torch.finfo(A.dtype).eps * torch.where(size > 0, size, 1.0)
    pivots = torch.where(wide.diagonal().abs() < floor, floor, wide.diagonal())
    wide = torch.triu(wide, 1) + torch.diag(pivots)
    inverse = torch.linalg.solve_triangular(wide, torch.eye(m, dtype=wide.dtype, device=wide.device), upper=True).mT
    lengths = torch.linalg.vector_norm(inverse, dim=0)
    S = (inverse / lengths).to(A.dtype)  # s_i: orthogonal to every column of R but the i-th
    Z = A.mH @ Q
    whole = (Q * Z).sum(1, keepdim=True)
    left = Q @ S
    rest = left * (S * R).sum(0)  # (I − Q_i Q_iᵀ) A ω_i
    samples = whole - left * (Z @ S) + Omega * rest
    return mean_and_error(samples, False)
