"""Reverse mode of an orthonormal Krylov factorisation A Q = Q H + r e_kᵀ, QᴴQ = I, Qᴴr = 0, ‖v‖ q₁ = v.

The gradient of a loss ℓ(Q, H, r, ‖v‖) is Σ_j Re⟨λ_j, dA q_j⟩ + Re⟨v̄, dv⟩. The λ_j are Lagrange multipliers; stationarity
gives them from j = k down to 1 with one product with Aᴴ each. Derivation: docs/derivations/arnoldi.md, lanczos.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .orthogonalize import add, coefficients, dots, subtract

Product = Callable[[Tensor], Tensor]


def mask_rows(X: Tensor | None, depth: Tensor) -> Tensor | None:
    """Zero the rows of X (m, k, …) past each run's depth; None stays None."""
    if X is None:
        return None
    keep = torch.arange(X.shape[1], device=X.device) < depth.unsqueeze(1)
    return X.masked_fill(~keep.view(*keep.shape, *[1] * (X.ndim - 2)), 0)


def real_dots(X: Tensor, Y: Tensor) -> Tensor:
    """Return Re x_iᴴ y_i (m, 1)."""
    c = dots(X, Y)
    return (c.real if c.is_complex() else c).unsqueeze(1)


def guarded(length: Tensor) -> Tensor:
    """Return divisors (m, 1): ``length`` (m,), infinity where it is zero, so that ended runs divide to zero."""
    return length.masked_fill(length == 0, math.inf).unsqueeze(1)


def start_gradient(z: Tensor, q: Tensor, norm: Tensor, norm_bar: Tensor | None) -> Tensor:
    """Return v̄ (n, m) of q₁ = v/‖v‖ and ‖v‖: the part of z (m, n) tangent to the sphere, over ‖v‖, plus norm_bar·q₁.

    Complex: the phase of v matters, so only the real part of q₁ᴴz is removed.
    """
    v_bar = (z - q * real_dots(q, z)) / guarded(norm)
    if norm_bar is not None:
        v_bar = v_bar + q * norm_bar.unsqueeze(1)
    return v_bar.mT


def adjoint_orthonormal(
    rmatmat: Product,
    Q: Tensor,
    H: Tensor,
    residual: Tensor,
    norm: Tensor,
    depth: Tensor,
    *,
    Q_bar: Tensor | None,
    H_bar: Tensor,
    residual_bar: Tensor | None,
    norm_bar: Tensor | None,
    band: int,
    project: bool = True,
) -> tuple[Tensor, Tensor]:
    """Multipliers of the fully orthogonalised factorisation.

    With M = QᴴΛ, stationarity in H prescribes M_ij = H̄_ij for i ≤ j and Re M_{j+1,j} = Re H̄_{j+1,j}; the Hermitian
    multiplier S of QᴴQ = I is what makes it so:

        β_{j−1} λ_{j−1} = q̄_j + Aᴴλ_j − Σ_{i≥j} conj(H_ji) λ_i + r conj(γ_j) + Q S e_j .

    Args:      rmatmat: the product with Aᴴ, (n, m) → (n, m).  Q (m, k, n), H (m, k, k), residual (m, n), norm (m,), depth
               (m,): the finished run.  Q_bar, H_bar, residual_bar, norm_bar: cotangents, zero past the depth already;
               only the Hessenberg part of H_bar is read.  band: nonzeros of H right of and on the diagonal
               in each row (2 for Lanczos, k for Arnoldi).  project: compute S from inner products with the vectors at
               hand, and correct every λ by a second projection. False takes these inner products from the
               identities that hold in exact arithmetic instead: errors then grow like Π ‖A‖/β_j (kept for the
               study of that effect in tests/krylov, not for use).
    Returns:   (Λ (m, k, n), v̄ (n, m)).
    Cost:      k products with Aᴴ on a block of m, 4 readings of the basis a step, m·k vectors of memory for Λ.
    Reference: Krämer, Moreno-Muñoz, Roy, Hauberg 2024, Theorem 4.1; here for all outputs, complex and
               per-run depth, with the projection built into the multiplier.
    """
    m, k, n = Q.shape
    H_conj = H.conj_physical() if H.is_complex() else H
    S = torch.zeros_like(H)
    Lam = torch.zeros_like(Q)
    # λ at each run's last step: r̄ + Qγ, with γ such that Qᴴλ is the prescribed column of H̄.
    last = (depth - 1).clamp(min=0)
    gamma = H_bar.gather(2, last.view(m, 1, 1).expand(m, k, 1)).squeeze(2)
    start = torch.zeros_like(residual) if residual_bar is None else residual_bar.clone(memory_format=torch.contiguous_format)
    if residual_bar is not None:
        gamma = gamma - coefficients(Q, start)
    start = add(Q, gamma, start)
    gamma_conj = gamma.conj_physical() if gamma.is_complex() else gamma
    ends = set(depth.tolist())
    lam = start if ends == {k} else start * (depth == k).unsqueeze(1)
    for j in range(k - 1, -1, -1):  # 0-based: H[:, j, j - 1] is β_{j−1} of the page
        Lam[:, j] = lam
        z = subtract(Lam[:, j : j + band], H_conj[:, j, j : j + band], rmatmat(lam.mT).mT)
        if Q_bar is not None:
            z = z.add_(Q_bar[:, j])
        if residual_bar is not None:  # r = 0 for runs that broke down
            z.addcmul_(residual, gamma_conj[:, j : j + 1])
'''
