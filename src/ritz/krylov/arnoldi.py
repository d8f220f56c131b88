"""Arnoldi factorisation of a general operator, A Q = Q H + r e_kᵀ with H upper Hessenberg, and its reverse mode.

m starting vectors run as independent iterations that share one block product a step.
Derivation of the adjoint: docs/derivations/arnoldi.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import in_transform
from . import one
from .adjoint import Product, adjoint_one_pass, adjoint_orthonormal, mask_rows
from .orthogonalize import basis_of, columns, norms, project_out, safe_norms
from .progress import progress


@dataclass(frozen=True)
class ArnoldiState:
    """A finished run. Row j of Q[i] is the basis vector q_{j+1} of starting vector i.

    Past ``depth`` a run is masked: Q rows are zero, the residual is zero, and H is zero but for H[:, 0, 0] on the
    diagonal (so that functions of H stay harmless there). A zero residual says that a run broke down.
    """

    Q: Tensor  # (m, k, n), orthonormal rows
    H: Tensor  # (m, k, k), H[:, i, j] = q_iᴴ A q_j for i <= j, real and >= 0 for i = j + 1, else 0
    residual: Tensor  # (m, n), not normalised
    norm: Tensor  # (m,) real, norm of the starting vector
    depth: Tensor  # (m,) int64, number of basis vectors that exist


def run_arnoldi(
    matmat: Product,
    V: Tensor,
    k: int,
    *,
    reorthogonalize: bool = True,
    state: ArnoldiState | None = None,
    room: int = 0,
) -> ArnoldiState:
    """Run k Arnoldi steps from every column of V.

    Args:      matmat: the product with A, (n, m) → (n, m).  V: starting vectors (n, m), columns may be zero.
               k: steps, ≥ 1; more than n is allowed (breakdown ends the run).  reorthogonalize: classical
               Gram–Schmidt twice a step; otherwise one pass of classical Gram–Schmidt, whose basis loses
               orthogonality like eps·cond([q₁ Aq₁ … ])².  state: a run from the same V and A to continue up to k, with
               the numbers of an uninterrupted run.  room: rows to set aside for that.
    Returns:   :class:`ArnoldiState`.
    Raises:    NonFiniteError: a product, or a starting vector, with NaN or Inf; names the step.
    Cost:      k products with a block of m vectors, m·(k + 3) vectors of memory, and 4 readings of the basis a step (2
               without reorthogonalisation). One host synchronisation a step on the CPU, one in 8 steps elsewhere.
    Reference: Arnoldi 1951; Krämer, Moreno-Muñoz, Roy, Hauberg 2024, "Gradients of functions of large matrices".
    """
    n, m = V.shape
    first = 0 if state is None else state.Q.shape[1]
    if k <= first:
        raise ValueError(f"k = {k} steps were asked for; expected k >= {first + 1}")
    Q, H = basis_of(V, k, room, None if state is None else state.Q), V.new_zeros(m, k, k)
    if one.fits(V, reorthogonalize=True) and not in_transform():
        return _run_one(matmat, V, Q, H, first, 2 if reorthogonalize else 1, state)
    if state is None:
        W, norm = V.mT, safe_norms(V.mT)
        run = progress(norm)
    else:
        W, norm = state.residual, state.norm
        H[:, :first, :first] = state.H
        last = norms(state.residual)
        H[:, first, first - 1] = last
        run = progress(last, _largest(state.H, last))
    rows = Q.unbind(1)
    passes = 2 if reorthogonalize else 1
    j = first
    while j < k and run.any():
        q = rows[j]
        torch.div(W, run.divisor(), out=q)
        W, c = project_out(Q[:, : j + 1], matmat(columns(q)).mT, passes)
        run.record(norms(c), norms(W))
        H[:, : j + 1, j] = c
        if j + 1 < k:
            H[:, j + 1, j] = run.length
        j += 1
    Q[:, j:] = 0
    run.history(norm, first, k - j)  # raises on NaN and Inf
    depth = run.depth if state is None else run.depth + state.depth
    if j < k or not run.all():
        past = torch.arange(k, device=V.device) >= depth.unsqueeze(1)
        H.diagonal(dim1=1, dim2=2).copy_(torch.where(past, H[:, 0, :1], H.diagonal(dim1=1, dim2=2)))
        W = W * run.live.unsqueeze(1)
    return ArnoldiState(Q, H, W, norm, depth)


def _run_one(
    matmat: Product, V: Tensor, Q: Tensor, H: Tensor, first: int, passes: int, state: ArnoldiState | None
) -> ArnoldiState:
    k = Q.shape[1]
    if state is None:
        w, largest = V[:, 0], 0.0
        length = one.start_norm(w)
        norm = torch.tensor([length], dtype=V.dtype)
    else:
        w, norm, length = state.residual[0], state.norm, one.norm(state.residual[0])
        H[0, :first, :first] = state.H[0]
        H[0, first, first - 1] = length
        largest = float(_largest(state.H, torch.tensor([length], dtype=V.dtype)))
    w, steps, length = one.arnoldi_steps(matmat, Q[0], H[0], first, w, length, largest, passes=passes)
    depth = steps if state is None else int(state.depth) + steps
    if depth < k:
        Q[:, depth:] = 0
        H[0].diagonal()[depth:] = H[0, 0, 0].clone()
    if not length > 0:
        w = torch.zeros_like(w)
    return ArnoldiState(Q, H, w.unsqueeze(0), norm, torch.tensor([depth]))


def _largest(H: Tensor, last: Tensor) -> Tensor:
    """Return the estimate of ‖A‖ (m,) that a run had reached: column norms of H, subdiagonal added."""
    sub = torch.cat([H.diagonal(-1, 1, 2).abs(), last.unsqueeze(1)], 1)
    return (torch.linalg.vector_norm(H.triu(), dim=1) + sub).amax(1)


def adjoint_arnoldi(
    rmatmat: Product,
    state: ArnoldiState,
    *,
    Q_bar: Tensor | None = None,
    H_bar: Tensor | None = None,
    residual_bar: Tensor | None = None,
    norm_bar: Tensor | None = None,
    reorthogonalize: bool = True,
    project: bool = True,
) -> tuple[Tensor, Tensor]:
    """Reverse mode of :func:`run_arnoldi`: multipliers Λ and v̄ with dℓ = Σ_j Re⟨λ_j, dA q_j⟩ + Re⟨v̄, dv⟩.

    Args:      rmatmat: the product with Aᴴ, (n, m) → (n, m).  state: the finished run.  Q_bar (m, k, n), H_bar
               (m, k, k), residual_bar (m, n), norm_bar (m,): cotangents, None for zero. Only the Hessenberg part of
               H_bar is read, and of its subdiagonal the real part; cotangents of masked entries are ignored, but those
               of the filler diagonal belong to H[0, 0].  reorthogonalize: as in the run.  project: see
               :func:`adjoint_orthonormal`; False only for the study of the effect.
    Returns:   (Λ (m, k, n), zero past the depth; v̄ (n, m), zero for v = 0).
    Cost:      k products with Aᴴ on a block of m, about 5 readings of the basis a step, m·k vectors of memory.
    """
    m, k, _ = state.Q.shape
    depth = state.depth
    past = torch.arange(k, device=depth.device) >= depth.unsqueeze(1)
    if H_bar is None:
        H_bar = torch.zeros_like(state.H)
    else:
        filler = (H_bar.diagonal(0, 1, 2) * past).sum(1)
        H_bar = H_bar.masked_fill(past.unsqueeze(1) | past.unsqueeze(2), 0)
        H_bar[:, 0, 0] += filler * (depth > 0)
    H = state.H.masked_fill(past.unsqueeze(1), 0)
    if residual_bar is not None:
        residual_bar = residual_bar * (norms(state.residual) > 0).unsqueeze(1)
    Q, r, Q_bar = state.Q, state.residual, mask_rows(Q_bar, depth)
    if not reorthogonalize:
        return adjoint_one_pass(
            rmatmat, Q, H, r, state.norm, Q_bar=Q_bar, H_bar=H_bar, residual_bar=residual_bar, norm_bar=norm_bar
        )
    return adjoint_orthonormal(
        rmatmat,
        Q,
        H,
        r,
        state.norm,
        depth,
        Q_bar=Q_bar,
        H_bar=H_bar,
        residual_bar=residual_bar,
        norm_bar=norm_bar,
        band=k,
        project=project,
    )
