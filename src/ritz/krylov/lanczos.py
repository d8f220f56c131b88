"""Lanczos tridiagonalisation of a Hermitian operator: A Q = Q T + r e_kᵀ.

m starting vectors run as independent iterations that share one block product a step. This file is the forward run;
its reverse mode is in ``lanczos_adjoint.py`` (derivation: docs/derivations/lanczos.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .orthogonalize import dots, norms, project_out, safe_norms
from .progress import progress

Product = Callable[[Tensor], Tensor]

@dataclass(frozen=True)
class LanczosState:
    """A finished run. Row j of Q[i] is the basis vector q_{j+1} of starting vector i.

    Past ``depth`` a run is masked: Q rows and beta are zero, the residual is zero, alpha repeats alpha[:, 0] (so that
    functions of T stay harmless there: a zero would bring log 0). ``beta[:, -1] == 0`` says that a run broke down.
    """

    Q: Tensor  # (m, k, n), orthonormal rows
    alpha: Tensor  # (m, k) real, diagonal of T
    beta: Tensor  # (m, k) real; beta[:, j] is the norm of the residual after step j + 1, off-diagonal of T for j < k-1
    residual: Tensor  # (m, n), not normalised
    norm: Tensor  # (m,) real, norm of the starting vector
    depth: Tensor  # (m,) int64, number of basis vectors that exist


def run_lanczos(
    matmat: Product, V: Tensor, k: int, *, reorthogonalize: bool = True, state: LanczosState | None = None
) -> LanczosState:
    """Run k Lanczos steps from every column of V.

    Args:      matmat: the product with A, (n, m) → (n, m).  V: starting vectors (n, m), columns may be zero.
               k: steps, ≥ 1; more than n is allowed (breakdown ends the run).  reorthogonalize: every new vector
               is made orthogonal to all earlier ones by classical Gram–Schmidt applied twice; otherwise the plain
               three-term recurrence.  state: a run from the same V and A to continue up to k, with the numbers of
               an uninterrupted run.
    Returns:   :class:`LanczosState`. With q_j the rows of Q[i], A Qᵀ = QᵀT + r e_kᵀ for every run that did not break
               down, on the leading ``depth`` vectors otherwise.
    Raises:    NonFiniteError: a product, or a starting vector, with NaN or Inf; names the step.
    Cost:      k products with a block of m vectors (fewer after breakdown of all), m·(k + 3) vectors of memory, and
               4 readings of the basis a step with reorthogonalisation. One host synchronisation a step on the CPU,
               one in 8 steps elsewhere.
    Reference: Lanczos 1950; Krämer, Moreno-Muñoz, Roy, Hauberg 2024, "Gradients of functions of large matrices".
    """
    n, m = V.shape
    first = 0 if state is None else state.Q.shape[1]
    if k <= first:
        raise ValueError(f"k = {k} steps were asked for; expected k >= {first + 1}")
    Q = V.new_empty(m, k, n)
    if state is None:
        W, norm = V.mT, safe_norms(V.mT)
        run = progress(norm)
    else:
        W, norm = state.residual, state.norm
        Q[:, :first] = state.Q
        run = progress(state.beta[:, -1], (state.alpha.abs() + state.beta).amax(1))
    rows = Q.unbind(1)
    j = first
    while j < k and run.any():
        q = rows[j]
        torch.div(W, run.divisor(), out=q)
        W = matmat(q.mT).mT
        if reorthogonalize:
            W, c = project_out(Q[:, : j + 1], W)
            a = c[:, j]
        else:
            W, a = _three_term(q, rows[j - 1] if j else None, W, run.length)
        run.record(a.real if a.is_complex() else a, norms(W))
        j += 1
    Q[:, j:] = 0
    alpha, beta = run.history(norm, first, k - j)
    depth = run.depth
    if state is not None:
        alpha, beta, depth = torch.cat([state.alpha, alpha], 1), torch.cat([state.beta, beta], 1), depth + state.depth
    if j < k or not run.all():
        past = torch.arange(k, device=V.device) >= depth.unsqueeze(1)
        alpha = torch.where(past, alpha[:, :1], alpha)
        W = W * run.live.unsqueeze(1)
    return LanczosState(Q, alpha, beta, W, norm, depth)


def _three_term(q: Tensor, before: Tensor | None, W: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The plain recurrence: w ← A q_j − β_{j−1} q_{j−1}, α_j = Re q_jᴴ w, w ← w − α_j q_j. Returns w and α_j (m,)."""
    if before is not None:
        W = torch.addcmul(W, before, beta.unsqueeze(1).to(W.dtype), value=-1)
    alpha = dots(q, W)
    alpha = alpha.real.contiguous() if alpha.is_complex() else alpha
    return torch.addcmul(W, q, alpha.unsqueeze(1).to(W.dtype), value=-1), alpha
