"""Reverse mode of an orthonormal Krylov factorisation A Q = Q H + r e_kᵀ, QᴴQ = I, Qᴴr = 0, ‖v‖ q₁ = v.

The gradient of a loss ℓ(Q, H, r, ‖v‖) is Σ_j Re⟨λ_j, dA q_j⟩ + Re⟨v̄, dv⟩. The λ_j are Lagrange multipliers, and
stationarity gives them from j = k down to 1 with one product with Aᴴ each. Derivation: docs/derivations/arnoldi.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .orthogonalize import add, coefficients, columns, dots, subtract

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

    Args:      rmatmat: the product with Aᴴ, (n, m) → (n, m).  Q (m, k, n), H (m, k, k), residual (m, n), norm (m,),
               depth (m,): the finished run.  Q_bar, H_bar, residual_bar, norm_bar: cotangents, already zero past the
               depth; only the Hessenberg part of H_bar is read.  band: nonzeros of H right of and on the diagonal
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
    start = torch.zeros_like(residual) if residual_bar is None else residual_bar.clone()
    if residual_bar is not None:
        gamma = gamma - coefficients(Q, start)
    start = add(Q, gamma, start)
    gamma_conj = gamma.conj_physical() if gamma.is_complex() else gamma
    ends = set(depth.tolist())
    ragged = ends != {k}
    lam = start * (depth == k).unsqueeze(1) if ragged else start
    for j in range(k - 1, -1, -1):  # counted from 0: H[:, j, j - 1] is the β_{j−1} of the formula
        Lam[:, j] = lam
        z = subtract(Lam[:, j : j + band], H_conj[:, j, j : j + band], rmatmat(columns(lam)).mT)
        if Q_bar is not None:
            z += Q_bar[:, j]
        z.addcmul_(residual, gamma_conj[:, j : j + 1])
        if j == 0:
            break
        beta = H[:, j, j - 1].real if H.is_complex() else H[:, j, j - 1]
        known = H_bar[:, : j + 1, j - 1]
        if ragged:  # where a run ends at j − 1, its multiplier is ``start``; nothing is prescribed twice
            known = known * (depth > j).unsqueeze(1)
        if project:
            lam = adjoint_row(Q, S, z, beta, known, j, again=band > 2)
        else:
            c = _inner_products_by_identities(Q[:, : j + 1], z, Lam, H_conj, H_bar, residual, gamma_conj, j)
            lam = add(Q, _fill(S, known * beta.unsqueeze(1) - c, j), z).div_(guarded(beta))
        if ragged and j in ends:
            lam = lam + start * (depth == j).unsqueeze(1)
    z = add(Q[:, 1:], S[:, 1:, 0], z) if k > 1 else z
    return Lam, start_gradient(z, Q[:, 0], norm, norm_bar)


def adjoint_row(
    Q: Tensor, S: Tensor, z: Tensor, length: Tensor, known: Tensor, j: int, *, again: bool = True
) -> Tensor:
    """Return λ = (z + Q S e_j)/length with the column S e_j (and its mirror) such that q_iᴴλ is ``known`` for i ≤ j.

    z (m, n) is overwritten, S (m, k, k) receives the column; length (m,) is zero for runs that have ended, λ = 0 there.
    The last of ``known`` (m, j + 1) is prescribed in its real part only. The division by a small length amplifies what
    rounding left in z + Q S e_j along the basis; the second projection takes that out ``again``. (It gains three digits
    for Arnoldi on Hilbert matrices and nothing measurable for Lanczos, which goes without.)
    """
    basis = Q[:, : j + 1]
    s = _fill(S, known * length.unsqueeze(1) - coefficients(basis, z), j)
    lam = add(Q, s, z).div_(guarded(length))
    if not again:
        return lam
    return add(basis, _real_last(known - coefficients(basis, lam)), lam)


def _fill(S: Tensor, s: Tensor, j: int) -> Tensor:
    """Write s (m, j + 1) as the upper part of column j of the Hermitian S and as its mirror; return the column."""
    s = _real_last(s)
    S[:, : j + 1, j] = s
    S[:, j, :j] = s[:, :j].conj()
    return S[:, :, j]


def _real_last(c: Tensor) -> Tensor:
    """Drop the imaginary part of the last entry, in place: β is real, so only a real part is prescribed there."""
    if c.is_complex():
        c[:, -1] = c[:, -1].real.clone()
    return c


def _inner_products_by_identities(
    basis: Tensor, z: Tensor, Lam: Tensor, H_conj: Tensor, H_bar: Tensor, residual: Tensor, gamma_conj: Tensor, j: int
) -> Tensor:
    """q_iᴴz for i ≤ j with q_iᴴλ_l replaced by H̄_il and q_iᴴr by 0: right in exact arithmetic, blind to rounding."""
    plain = add(Lam[:, j:], H_conj[:, j, j:], z.clone()).addcmul_(residual, gamma_conj[:, j : j + 1], value=-1)
    return coefficients(basis, plain) - (H_bar[:, : j + 1, j:] @ H_conj[:, j, j:].unsqueeze(2)).squeeze(2)


def adjoint_one_pass(
    rmatmat: Product,
    Q: Tensor,
    H: Tensor,
    residual: Tensor,
    norm: Tensor,
    *,
    Q_bar: Tensor | None,
    H_bar: Tensor,
    residual_bar: Tensor | None,
    norm_bar: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Reverse mode, statement by statement, of the loop with one pass of classical Gram–Schmidt.

    Nothing here assumes that the basis is orthogonal, so it holds where one pass has lost orthogonality. With r̄_j the
    cotangent of the residual of step j and w_l = A q_l = Σ_i H_il q_i:

        g_j = H̄_{:,j} − Qᴴ r̄_j (rows i ≤ j),   λ_j = r̄_j + Q g_j,
        x_j = q̄_j + Aᴴλ_j − Σ_{l≥j} conj(H_jl) r̄_l + Σ_{l≥j} conj(G_jl) w_l,
        r̄_{j−1} = (x_j − q_j Re q_jᴴx_j)/β_{j−1} + H̄_{j,j−1} q_j .

    Arguments, results and cost as in :func:`adjoint_orthonormal`.
    """
    k = Q.shape[1]
    H_conj = H.conj_physical() if H.is_complex() else H
    G = torch.zeros_like(H)
    Lam = torch.zeros_like(Q)
    r_bar = torch.zeros_like(residual) if residual_bar is None else residual_bar
    for j in range(k - 1, -1, -1):
        basis = Q[:, : j + 1]
        g = H_bar[:, : j + 1, j] - coefficients(basis, r_bar)
        G[:, : j + 1, j] = g
        lam = add(basis, g, r_bar.clone())
        Lam[:, j] = lam
        # Both sums over l in terms of Λ and Q, so that the r̄_l need not be kept: r̄_l = λ_l − Q G e_l.
        h, g_row = H_conj[:, j, j:].unsqueeze(2), G[:, j, j:].conj().unsqueeze(2)
        s = (G[:, :, j:] @ h + H[:, :, j:] @ g_row).squeeze(2)
        x = add(Q, s, subtract(Lam[:, j:], H_conj[:, j, j:], rmatmat(columns(lam)).mT))
        x.addcmul_(residual, g_row[:, -1])
        if Q_bar is not None:
            x += Q_bar[:, j]
        if j == 0:
            break
        q, beta = Q[:, j], H[:, j, j - 1].abs()
        known = H_bar[:, j, j - 1 : j]
        r_bar = (x - q * real_dots(q, x)) / guarded(beta) + q * (known.real if known.is_complex() else known)
    return Lam, start_gradient(x, Q[:, 0], norm, norm_bar)
