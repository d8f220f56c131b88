"""Golub–Kahan bidiagonalisation, A V = U B and Aᴴ U = V Bᴴ + r e_kᵀ with B upper bidiagonal, and its reverse mode.

It is Lanczos on [[0, A], [Aᴴ, 0]] with 2k steps from (0, v), run on half vectors. m starting vectors run as independent
iterations that share the block products. Derivation of the adjoint: docs/derivations/golub_kahan.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .adjoint import Product, adjoint_row, guarded, mask_rows, real_dots, start_gradient
from .orthogonalize import columns, norms, project_out, safe_norms
from .progress import progress


@dataclass(frozen=True)
class GolubKahanState:
    """A finished run; A is p×n. Row j of U[i] and V[i] are the basis vectors u_{j+1}, v_{j+1} of starting vector i.

    Past ``depth`` a run is masked: rows of U and V and beta are zero, alpha repeats alpha[:, 0]. Breakdown comes in
    two kinds. Aᴴu_j has nothing new: the residual is zero. A v_{j+1} has nothing new: u_{j+1} does not exist, and the
    residual β_j v_{j+1} of the j complete pairs is kept. Both identities hold on the leading ``depth`` pairs.
    """

    U: Tensor  # (m, k, p), orthonormal rows
    V: Tensor  # (m, k, n), orthonormal rows
    alpha: Tensor  # (m, k) real, diagonal of B
    beta: Tensor  # (m, k - 1) real, superdiagonal of B
    residual: Tensor  # (m, n), not normalised
    norm: Tensor  # (m,) real, norm of the starting vector
    depth: Tensor  # (m,) int64, number of complete pairs (u_j, v_j)


def run_golub_kahan(
    matmat: Product, rmatmat: Product, V: Tensor, k: int, reorthogonalize: bool = True
) -> GolubKahanState:
    """Run k Golub–Kahan steps from every column of V.

    Args:      matmat: the product with A, (n, m) → (p, m).  rmatmat: the product with Aᴴ, (p, m) → (n, m).  V: starting
               vectors (n, m), n the number of columns of A; columns may be zero.  k: steps, ≥ 1.  reorthogonalize:
               both bases by classical Gram–Schmidt applied twice, otherwise the plain two-term recurrences.
    Returns:   :class:`GolubKahanState`.
               A zero starting block costs one product, to learn p.
    Raises:    NonFiniteError: a product, or a starting vector, with NaN or Inf; names the half step (2j − 1: A v_j,
               2j: Aᴴu_j).
    Cost:      k products with A and k with Aᴴ on a block of m vectors, k·m vectors of each length, 4 readings of both
               bases a step with reorthogonalisation. Host synchronisations as in Lanczos, per half step.
    Reference: Golub, Kahan 1965; Krämer, Moreno-Muñoz, Roy, Hauberg 2024.
    """
    n, m = V.shape
    if k < 1:
        raise ValueError(f"k = {k} steps were asked for; expected k >= 1")
    R, norm = V.mT, safe_norms(V.mT)
    run = progress(norm)
    right = V.new_empty(m, k, n)
    left = V.new_empty(0)  # the number of rows of A is known after the first product
    previous = torch.zeros_like(norm)
    j = 0
    while j < k and run.any():
        v = right[:, j]
        torch.div(R, run.divisor(), out=v)
        W = matmat(columns(v)).mT
        if j == 0:
            left = V.new_zeros(m, k, W.shape[1])
        else:
            W = _remove(left[:, :j], previous, W, reorthogonalize)
        run.record(previous, norms(W))
        alpha = run.length
        u = left[:, j]
        torch.div(W, run.divisor(), out=u)
        R = _remove(right[:, : j + 1], alpha, rmatmat(columns(u)).mT, reorthogonalize)
        run.record(alpha, norms(R))
        previous = run.length
        j += 1
    if j == 0:
        left = V.new_zeros(m, k, matmat(torch.zeros_like(V)).shape[0])
    _, lengths = run.history(norm, 0, 2 * (k - j))
    alpha, beta = lengths[:, 0::2], lengths[:, 1::2]
    depth = run.depth // 2
    right[:, j:] = 0
    R = R * run.live.unsqueeze(1)
    if j < k or not run.all():
        # An odd number of half steps: v_{d+1} exists, u_{d+1} does not; the residual of the d pairs is β_d v_{d+1}.
        at = depth.clamp(max=k - 1)
        kept = right.gather(1, at.view(m, 1, 1).expand(m, 1, n)).squeeze(1)
        kept = kept * beta.gather(1, (depth - 1).clamp(min=0).unsqueeze(1))
        R = torch.where(((run.depth % 2 == 1) & (depth > 0)).unsqueeze(1), kept, R)
        past = torch.arange(k, device=V.device) >= depth.unsqueeze(1)
        right.masked_fill_(past.unsqueeze(2), 0)
        alpha = torch.where(past, alpha[:, :1], alpha)
        beta = beta.masked_fill(torch.cat([past[:, 1:], past[:, -1:]], 1), 0)
    return GolubKahanState(left, right, alpha, beta[:, :-1], R, norm, depth)


def _remove(Q: Tensor, length: Tensor, W: Tensor, everything: bool) -> Tensor:
    """Take out of W its parts in all rows of Q, or only ``length`` times the last row (the two-term recurrence)."""
    if everything:
        return project_out(Q, W)[0]
    return torch.addcmul(W, Q[:, -1], length.unsqueeze(1).to(W.dtype), value=-1)


def adjoint_golub_kahan(
    matmat: Product,
    rmatmat: Product,
    state: GolubKahanState,
    *,
    U_bar: Tensor | None = None,
    V_bar: Tensor | None = None,
    alpha_bar: Tensor | None = None,
    beta_bar: Tensor | None = None,
    residual_bar: Tensor | None = None,
    norm_bar: Tensor | None = None,
    reorthogonalize: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse mode of :func:`run_golub_kahan`: dℓ = Σ_j Re⟨λ_j, dA v_j⟩ + Σ_j Re⟨μ_j, dAᴴ u_j⟩ + Re⟨v̄, dv⟩.

    Args:      matmat, rmatmat, reorthogonalize: as in the run.  state: the finished run.  U_bar (m, k, p), V_bar
               (m, k, n), alpha_bar (m, k), beta_bar (m, k - 1), residual_bar (m, n), norm_bar (m,): cotangents, None
               for zero. Those of masked entries are ignored, but those of the filler in alpha belong to alpha[0].
    Returns:   (Λ (m, k, p), paired with V through A; M (m, k, n), paired with U through Aᴴ; v̄ (n, m)).
    Cost:      k products with A and k with Aᴴ on a block of m, k·m vectors of each length, about 4 readings of
               both bases a step with reorthogonalisation.
    """
    U, V, k = state.U, state.V, state.V.shape[1]
    depth = state.depth
    past = torch.arange(k, device=depth.device) >= depth.unsqueeze(1)
    U_bar, V_bar = mask_rows(U_bar, depth), mask_rows(V_bar, depth)
    if alpha_bar is None:
        alpha_bar = torch.zeros_like(state.alpha)
    else:
        filler = (alpha_bar * past).sum(1)
        alpha_bar = alpha_bar.masked_fill(past, 0)
        alpha_bar[:, 0] += filler * (depth > 0)
    beta_bar = torch.zeros_like(state.beta) if beta_bar is None else beta_bar.masked_fill(past[:, 1:], 0)
    r = state.residual
    if residual_bar is None:
        residual_bar = torch.zeros_like(r)
    else:
        residual_bar = residual_bar * (norms(r) > 0).unsqueeze(1)
    alpha, beta = state.alpha.masked_fill(past, 0), state.beta
    wide = V.dtype
    ends = set(depth.tolist())
    S, P = V.new_zeros(V.shape[0], k, k), V.new_zeros(V.shape[0], k, k)
    Lam, Mu = torch.zeros_like(U), torch.zeros_like(V)
    if reorthogonalize:  # μ at each run's last step: the part of r̄ outside the basis, VᴴM e_k = 0
        residual_bar, gamma = project_out(V, residual_bar)
        gamma = gamma.neg().conj_physical() if gamma.is_complex() else gamma.neg()
    mu = residual_bar * (depth == k).unsqueeze(1)
    for j in range(k - 1, -1, -1):  # counted from 0: beta[:, j - 1] is the β_{j−1} that made v_j
        a = alpha[:, j : j + 1]
        Mu[:, j] = mu
        z = matmat(columns(mu)).mT  # the adjoint of Aᴴ is A
        z = z + U_bar[:, j] if U_bar is not None else z.clone()
        if j + 1 < k:
            z.addcmul_(beta[:, j : j + 1].to(wide), Lam[:, j + 1], value=-1)
        if reorthogonalize:
            lam = adjoint_row(U, S, z, alpha[:, j], _last(alpha_bar[:, j], j, wide), j)
        else:
            u = U[:, j]
            target = alpha_bar[:, j : j + 1] - real_dots(V[:, j], mu)
            lam = (z - u * real_dots(u, z)) / guarded(alpha[:, j]) + u * target
        Lam[:, j] = lam
        y = torch.addcmul(rmatmat(columns(lam)).mT, a.to(wide), mu, value=-1)
        if V_bar is not None:
            y += V_bar[:, j]
        if reorthogonalize:
            y.addcmul_(r, gamma[:, j : j + 1])
        if j == 0:
            break
        if reorthogonalize:
            mu = adjoint_row(V, P, y, beta[:, j - 1], _last(beta_bar[:, j - 1], j, wide), j)
        else:
            v = V[:, j]
            target = beta_bar[:, j - 1 : j] - real_dots(U[:, j - 1], lam)
            mu = (y - v * real_dots(v, y)) / guarded(beta[:, j - 1]) + v * target
        if j in ends:
            mu = mu + residual_bar * (depth == j).unsqueeze(1)
    if reorthogonalize and k > 1:
        y = torch.baddbmm(y.unsqueeze(1), P[:, 1:, 0].unsqueeze(1), V[:, 1:]).squeeze(1)
    return Lam, Mu, start_gradient(y, V[:, 0], state.norm, norm_bar)


def _last(value: Tensor, j: int, dtype: torch.dtype) -> Tensor:
    """Return (0, …, 0, value) (m, j + 1): the prescribed inner products of a multiplier with q_1 … q_{j+1}."""
    known = value.new_zeros(value.shape[0], j + 1, dtype=dtype)
    known[:, j] = value
    return known
