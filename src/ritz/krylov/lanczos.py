"""Lanczos tridiagonalisation of a Hermitian operator, A Q = Q T + r e_kᵀ, and its reverse mode.

m starting vectors run as independent iterations that share one block product a step.
Derivation of the adjoint: docs/derivations/lanczos.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import in_transform
from . import one
from .adjoint import Product, adjoint_orthonormal, guarded, mask_rows, real_dots, start_gradient
from .orthogonalize import basis_of, columns, dots, norms, project_out, safe_norms
from .progress import Progress, progress


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
    matmat: Product,
    V: Tensor,
    k: int,
    *,
    reorthogonalize: bool = True,
    state: LanczosState | None = None,
    room: int = 0,
) -> LanczosState:
    """Run k Lanczos steps from every column of V.

    Args:      matmat: the product with A, (n, m) → (n, m).  V: starting vectors (n, m), columns may be zero.
               k: steps, ≥ 1; more than n is allowed (breakdown ends the run).  reorthogonalize: every new vector is
               made orthogonal to all earlier ones by two passes of classical Gram–Schmidt, of which the first needs
               only two vectors (the recurrence); otherwise the plain three-term recurrence.  state: a run from the
               same V and A to continue up to k, with the numbers of an uninterrupted run.  room: rows to set aside for
               that.
    Returns:   :class:`LanczosState`. With q_j the rows of Q[i], A Qᵀ = QᵀT + r e_kᵀ for every run that did not break
               down, on the leading ``depth`` vectors otherwise.
    Raises:    NonFiniteError: a product, or a starting vector, with NaN or Inf; names the step.
    Cost:      k products with a block of m vectors (fewer after breakdown of all), m·(k + 3) vectors of memory, and
               2 readings of the basis a step with reorthogonalisation. One host synchronisation a step on the CPU,
               one in 8 steps elsewhere.
    Reference: Lanczos 1950; Krämer, Moreno-Muñoz, Roy, Hauberg 2024, "Gradients of functions of large matrices".
    """
    n, m = V.shape
    first = 0 if state is None else state.Q.shape[1]
    if k <= first:
        raise ValueError(f"k = {k} steps were asked for; expected k >= {first + 1}")
    Q = basis_of(V, k, room, None if state is None else state.Q)
    if one.fits(V, reorthogonalize) and not in_transform():
        return _run_one(matmat, V, Q, first, reorthogonalize, state)
    W, norm, run = begin(V, state)
    rows = Q.unbind(1)
    j = first
    while j < k and run.any():
        q = rows[j]
        torch.div(W, run.divisor(), out=q)
        W = matmat(columns(q)).mT
        W, a = three_term(q, rows[j - 1] if j else None, W, run.length)
        if reorthogonalize:
            # For a Hermitian A the recurrence is a Gram–Schmidt pass already: all other coefficients vanish up to
            # rounding. So the second pass of "twice is enough" is the only one that has to read the basis.
            W, c = project_out(Q[:, : j + 1], W, passes=1)
            a = a + (c[:, j].real if c.is_complex() else c[:, j])
        run.record(a, norms(W))
        j += 1
    Q[:, j:] = 0
    return LanczosState(Q, *finish(run, W, norm, state, k))


def begin(V: Tensor, state: LanczosState | None) -> tuple[Tensor, Tensor, Progress]:
    """Residuals (m, n), norms of the starting vectors and the bookkeeping of a loop that starts, or goes on."""
    if state is None:
        norm = safe_norms(V.mT)
        return V.mT, norm, progress(norm)
    return state.residual, state.norm, progress(state.beta[:, -1], (state.alpha.abs() + state.beta).amax(1))


def finish(
    run: Progress, W: Tensor, norm: Tensor, state: LanczosState | None, k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(alpha, beta, residual, norm, depth) of a loop that made the steps up to k, or ended before; masked."""
    first = 0 if state is None else state.alpha.shape[1]
    made = len(run.sizes)
    alpha, beta = run.history(norm, first, k - first - made)
    depth = run.depth
    if state is not None:
        alpha, beta, depth = torch.cat([state.alpha, alpha], 1), torch.cat([state.beta, beta], 1), depth + state.depth
    if first + made < k or not run.all():
        past = torch.arange(k, device=W.device) >= depth.unsqueeze(1)
        alpha = torch.where(past, alpha[:, :1], alpha)
        W = W * run.live.unsqueeze(1)
    return alpha, beta, W, norm, depth


def _run_one(
    matmat: Product, V: Tensor, Q: Tensor, first: int, reorthogonalize: bool, state: LanczosState | None
) -> LanczosState:
    k = Q.shape[1]
    if state is None:
        w, largest = one.as_real(V[:, 0]), 0.0
        length = one.start_norm(w)
        norm = torch.tensor([length], dtype=V.dtype.to_real())
    else:
        w, norm, length = one.as_real(state.residual[0]), state.norm, state.beta[0, -1].item()
        largest = (state.alpha.abs() + state.beta).max().item()
    rows = one.as_real(Q[0])
    loop = None if reorthogonalize or not hasattr(matmat, "lanczos_loop") else matmat.lanczos_loop()
    if loop is not None:
        w, a, b = loop(rows, first, w, length, largest, one.negligible(V.dtype))
    else:
        product = one.on_real(matmat, V.dtype)
        w, a, b = one.lanczos_steps(product, rows, first, w, length, largest, reorthogonalize=reorthogonalize)
    depth = len(a)
    missing = k - first - depth
    if state is not None:
        a, b, depth = state.alpha[0].tolist() + a, state.beta[0].tolist() + b, int(state.depth) + depth
    if missing:
        Q[:, k - missing :] = 0
        a, b = a + [a[0] if a else 0.0] * missing, b + [0.0] * missing
    if not b[-1] > 0:
        w = torch.zeros_like(w)
    alpha, beta = (torch.tensor([x], dtype=V.dtype.to_real()) for x in (a, b))
    w = torch.view_as_complex(w.view(-1, 2)) if V.is_complex() else w
    return LanczosState(Q, alpha, beta, w.unsqueeze(0), norm, torch.tensor([depth]))


def three_term(q: Tensor, before: Tensor | None, W: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """The plain recurrence: w ← A q_j − β_{j−1} q_{j−1}, α_j = Re q_jᴴ w, w ← w − α_j q_j. Returns w and α_j (m,)."""
    if before is not None:
        W = torch.addcmul(W, before, beta.unsqueeze(1).to(W.dtype), value=-1)
    alpha = dots(q, W)
    alpha = alpha.real.contiguous() if alpha.is_complex() else alpha
    return torch.addcmul(W, q, alpha.unsqueeze(1).to(W.dtype), value=-1), alpha


def adjoint_lanczos(
    rmatmat: Product,
    state: LanczosState,
    *,
    Q_bar: Tensor | None = None,
    alpha_bar: Tensor | None = None,
    beta_bar: Tensor | None = None,
    residual_bar: Tensor | None = None,
    norm_bar: Tensor | None = None,
    reorthogonalize: bool = True,
    project: bool = True,
) -> tuple[Tensor, Tensor]:
    """Reverse mode of :func:`run_lanczos`: multipliers Λ and v̄ with dℓ = Σ_j Re⟨λ_j, dA q_j⟩ + Re⟨v̄, dv⟩.

    dA need not be Hermitian: the derivative is that of the loop, which reads A through its products only.

    Args:      rmatmat: the product with Aᴴ, (n, m) → (n, m).  state: the finished run.  Q_bar (m, k, n), alpha_bar
               (m, k), beta_bar (m, k - 1) for the off-diagonal of T, residual_bar (m, n) for the unnormalised residual,
               norm_bar (m,): cotangents, None for zero. Those of masked entries are ignored, but those of the filler
               in alpha belong to alpha[0].  reorthogonalize: as in the run; True differentiates the orthogonalised
               loop, False the three-term recurrence.  project: see :func:`adjoint_orthonormal`; False only
               for the study of the effect.
    Returns:   (Λ (m, k, n), zero past the depth; v̄ (n, m), zero for v = 0).
    Cost:      k products with Aᴴ on a block of m, m·k vectors of memory; 4 readings of the basis a step with
               reorthogonalisation, none without.
    Reference: Krämer, Moreno-Muñoz, Roy, Hauberg 2024, Theorem 4.2.
    """
    m, k, _ = state.Q.shape
    depth = state.depth
    past = torch.arange(k, device=depth.device) >= depth.unsqueeze(1)
    Q_bar = mask_rows(Q_bar, depth)
    if alpha_bar is None:
        alpha_bar = torch.zeros_like(state.alpha)
    else:
        filler = (alpha_bar * past).sum(1)
        alpha_bar = alpha_bar.masked_fill(past, 0)
        alpha_bar[:, 0] += filler * (depth > 0)
    beta = state.beta[:, :-1]
    beta_bar = torch.zeros_like(beta) if beta_bar is None else beta_bar.masked_fill(past[:, 1:], 0)
    if residual_bar is not None:
        residual_bar = residual_bar * (state.beta[:, -1:] > 0)
    alpha = state.alpha.masked_fill(past, 0)
    if not reorthogonalize:
        return _adjoint_three_term(rmatmat, state, alpha, Q_bar, alpha_bar, beta_bar, residual_bar, norm_bar)
    dtype = state.Q.dtype
    return adjoint_orthonormal(
        rmatmat,
        state.Q,
        (torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)).to(dtype),
        state.residual,
        state.norm,
        depth,
        Q_bar=Q_bar,
        H_bar=(torch.diag_embed(alpha_bar) + torch.diag_embed(beta_bar, -1)).to(dtype),
        residual_bar=residual_bar,
        norm_bar=norm_bar,
        band=2,
        project=project,
    )


def _adjoint_three_term(
    rmatmat: Product,
    state: LanczosState,
    alpha: Tensor,
    Q_bar: Tensor | None,
    alpha_bar: Tensor,
    beta_bar: Tensor,
    residual_bar: Tensor | None,
    norm_bar: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Reverse mode of the plain recurrence, statement by statement, with r̄_j the cotangent of the residual of step j:

    ν = ᾱ_j − Re q_jᴴr̄_j,  λ_j = r̄_j + ν q_j,  x = q̄_j + Aᴴλ_j − α_j λ_j − β_j λ_{j+1} + ν r_j,
    r̄_{j−1} = (x − q_j Re q_jᴴx)/β_{j−1} + (β̄_{j−1} − Re q_{j−1}ᴴλ_j) q_j .
    """
    Q, beta = state.Q, state.beta
    k = Q.shape[1]
    Lam = torch.zeros_like(Q)
    r_bar = torch.zeros_like(state.residual) if residual_bar is None else residual_bar
    wide = Q.dtype  # addcmul wants one dtype: the real numbers α, β, ν as complex where Q is
    for j in range(k - 1, -1, -1):
        q = Q[:, j]
        nu = (alpha_bar[:, j : j + 1] - real_dots(q, r_bar)).to(wide)
        lam = torch.addcmul(r_bar, nu, q)
        Lam[:, j] = lam
        x = torch.addcmul(rmatmat(columns(lam)).mT, alpha[:, j : j + 1].to(wide), lam, value=-1)
        if j + 1 < k:
            b = beta[:, j : j + 1].to(wide)
            x.addcmul_(b, Lam[:, j + 1], value=-1).addcmul_(nu * b, Q[:, j + 1])
        else:
            x.addcmul_(nu, state.residual)
        if Q_bar is not None:
            x += Q_bar[:, j]
        if j == 0:
            break
        x.addcmul_(real_dots(q, x).to(wide), q, value=-1).div_(guarded(beta[:, j - 1]))
        r_bar = x.addcmul_((beta_bar[:, j - 1 : j] - real_dots(Q[:, j - 1], lam)).to(wide), q)
    return Lam, start_gradient(x, Q[:, 0], state.norm, norm_bar)
