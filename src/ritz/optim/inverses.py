"""KFAC's rule as pure functions: running factors, damping, inverses and eigendecompositions.

Factors are in flat storage of their structure (Dense or Diagonal), one for each side: 0 for inputs, 1 for output
gradients. Formulas: :class:`~ritz.optim.KFAC`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.structured import Dense, Diagonal, Structure


@dataclass(frozen=True)
class Inverse:
    """N = (S_B + λ_B I)⁻¹ G (S_A + λ_A I)⁻¹ by Cholesky factors: damping on each factor."""


@dataclass(frozen=True)
class Eigen:
    """N = Q_B [(Q_Bᵀ G Q_A) / (l_B l_Aᵀ + λ)] Q_Aᵀ by eigendecompositions: damping on the product."""


def running_mean(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """ρ S + (1 − ρ) A, in the dtype of the new statistics."""
    return decay * old.to(new.dtype) + (1.0 - decay) * new


def bias_correction(start: float, decay: float, updates: int) -> float:
    """What a running mean is divided by: 1 − ρᵗ where it started at zero."""
    return 1.0 - decay**updates if start == 0 else 1.0


def split_damping(means: Sequence[float], damping: float, pi: bool) -> tuple[float, float]:
    """(λ_A, λ_B) with λ_A λ_B = λ, in the ratio of the factors' mean diagonals; λ for both without ``pi``."""
    if not pi:
        return damping, damping
    ratio = (max(means[0], 1e-30) / max(means[1], 1e-30)) ** 0.5
    return ratio * damping**0.5, damping**0.5 / ratio


def damped_inverse(structure: Structure, S: Tensor, d: int, damping: float) -> Tensor | None:
    """(S + λI)⁻¹ in flat storage; None where there is no Cholesky factor, in float64 either."""
    if isinstance(structure, Diagonal):
        inverse = 1.0 / (S + damping)
        return inverse if bool(torch.isfinite(inverse).all()) else None
    M = structure.to_dense(S, d)
    M = 0.5 * (M + M.mT) + damping * torch.eye(d, dtype=S.dtype, device=S.device)
    for dtype in dict.fromkeys((S.dtype, torch.float64)):
        factor, info = torch.linalg.cholesky_ex(M.to(dtype))
        # A pivot that is rounding error of its diagonal entry may have either sign: that the root exists says nothing.
        pivots = factor.diagonal().square() > d * torch.finfo(dtype).eps * M.diagonal()
        if not bool(info) and bool(torch.isfinite(factor).all() & pivots.all()):
            return torch.cholesky_inverse(factor).to(S.dtype).flatten()
    return None


def eigen_factor(structure: Structure, S: Tensor, d: int, damping: float) -> tuple[Tensor, Tensor | None] | None:
    """(l, Q) with S = Q diag(l) Qᵀ, Q None for a diagonal factor; None where S alone would have to be inverted.

    Damping of the product of eigenvalues covers zeros of both factors; without it they are rounding errors of either
    sign.
    """
    eigenvalues, Q = S, None
    if isinstance(structure, Dense):
        M = structure.to_dense(S, d)
        eigenvalues, Q = torch.linalg.eigh(0.5 * (M + M.mT))
    zero = d * torch.finfo(S.dtype).eps * eigenvalues.max()
    return None if damping == 0 and bool((eigenvalues <= zero).any()) else (eigenvalues, Q)


def eigen_apply(G: Tensor, l_A: Tensor, Q_A: Tensor | None, l_B: Tensor, Q_B: Tensor | None, damping: float) -> Tensor:
    """Q_B [(Q_Bᵀ G Q_A) / (l_B l_Aᵀ + λ)] Q_Aᵀ in G's dtype; a missing Q is the identity."""
    N = G.to(l_A.dtype)
    N = N if Q_B is None else Q_B.mT @ N
    N = N if Q_A is None else N @ Q_A
    N = N / (l_B.unsqueeze(1) * l_A + damping)
    N = N if Q_B is None else Q_B @ N
    return (N if Q_A is None else N @ Q_A.mT).to(G.dtype)


def damped_quotient(g: Tensor, S: Tensor, damping: float) -> Tensor:
    """g / (S + λ) entry by entry; an entry that never had a gradient, without damping, stays what it is."""
    S = S + damping
    return g / S.where(S > 0, 1.0)
