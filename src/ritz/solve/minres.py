"""MINRES for Hermitian systems that need not be positive definite, many right-hand sides sharing every product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..result import Status
from .settings import Iterative
from .system import (
    ROUNDING,
    Kernel,
    Outcome,
    Pass,
    Product,
    Scalars,
    System,
    add,
    check_preconditioner,
    check_scalars,
    divide,
    drive,
    inner,
    norms,
    row,
    take,
)

if TYPE_CHECKING:
    from ..operators import LinearOperator

# ‖A r‖ / (‖A‖ ‖r‖) at which only a least-squares solution is left, in units of ROUNDING·eps: the new Lanczos vector of
# an exhausted space is this large, because rounding has grown on the way there.
SINGULAR = 10.0


@dataclass(frozen=True)
class MINRES(Iterative):
    """Minimal residuals, for Hermitian operators, definite or not.

    Each column stops when its *recomputed* residual has ‖b − A x‖ ≤ max(rtol·‖b‖, atol), SciPy's meaning. A singular
    system with b in the range of A is solved, from x0 = 0 and without a preconditioner by the solution of smallest
    norm. With b outside of the range the iteration stops as STAGNATED near a least-squares solution, which need not
    be the one of smallest norm.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.

    Cost: one block product a step, of the columns that are not done, and one to check each column. Memory: the
    solution and six more vectors a column (eight with a preconditioner). Two synchronisations a step.
    Reference: Paige, Saunders, Solution of sparse indefinite systems of linear equations, 1975.
    """

    def bind(self, A: LinearOperator, precondition: Product | None) -> Kernel:
        """The solver of unit-norm blocks."""
        limit = self.limit(A.shape[0])

        def kernel(
            product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
        ) -> Outcome:
            return drive(iterate, System(product, precondition, shift), B, X0, target, limit, monotone=True)

        return kernel


@np.errstate(all="ignore")
def iterate(system: System, R: Tensor, target: Scalars, max_steps: int) -> Pass:
    """Lanczos and one Givens rotation [c s; s −c] a step, for every column of ``R``, until ‖r‖ ≤ target.

    Without a preconditioner ‖r‖ is φ, the last entry of the rotated right-hand side. With one, φ is ‖r‖ in the norm
    of P⁻¹, so the residual itself is carried along: r ← s² r − φ c z with the last Lanczos vector z.
    ‖A r‖ = φ·hypot(γ̄, δ̄) tells when only a least-squares solution is left to find.
    """
    result = Pass(R)
    columns = np.arange(R.shape[1])
    tol = ROUNDING * torch.finfo(R.dtype).eps
    precondition = system.precondition

    def length(V: Tensor, PV: Tensor) -> Scalars:
        if precondition is None:
            return norms(V)
        square = inner(V, PV)
        check_preconditioner(square, norms(V))
        return np.sqrt(square)

    V, X = R.clone(), torch.zeros_like(R)  # V is the unnormalised Lanczos vector, PV = P⁻¹ V
    PV = V if precondition is None else precondition(V)
    beta = length(V, PV)
    V_old, W, W_old = torch.zeros_like(R), torch.zeros_like(R), torch.zeros_like(R)
    zero, one = np.zeros_like(beta), np.ones_like(beta)
    beta_old = scale = s = epsilon = delta_bar = zero
    phi, c = beta, -one
    for step in range(1, max_steps + 1):
        direction = PV * row(divide(one, beta), PV)
        U = V_old if step > 1 else torch.zeros_like(V)
        U = add(U, system.product(direction), one, scale=-divide(beta, beta_old))
        alpha = inner(direction, U)
        add(U, V, -divide(alpha, beta))
        V_old, V = V, U
        PV = V if precondition is None else precondition(V)
        beta_old, beta = beta, length(V, PV)
        scale = np.maximum(scale, np.sqrt(alpha**2 + beta**2 + (beta_old**2 if step > 1 else 0.0)))
        beta = np.where(beta <= tol * scale, 0.0, beta)  # the Krylov space is exhausted
        # The new column of T, rotated by the last two rotations.
        epsilon_old, delta = epsilon, c * delta_bar + s * alpha
        gamma_bar = s * delta_bar - c * alpha
        epsilon, delta_bar = s * beta, -c * beta
        steepness = np.hypot(gamma_bar, delta_bar)  # ‖A r‖ / φ, of the residual before this step
        gamma = np.hypot(gamma_bar, beta)
        singular = (gamma <= tol * scale) | (steepness <= SINGULAR * tol * scale)
        c, s = divide(gamma_bar, gamma), divide(beta, gamma)
        tau, phi = np.where(singular, 0.0, c * phi), np.where(singular, phi, s * phi)
        W_new = add(W_old, direction, one, scale=-epsilon_old)
        add(W_new, W, -delta)
        W_old, W = W, W_new.mul_(row(divide(one, gamma), W_new))
        add(X, W, tau)
        norm = phi
        if precondition is not None:
            add(R, V, -divide(phi * c, beta), scale=s * s)
            norm = norms(R)
        leave = (norm <= target) | singular | (beta == 0) | ~np.isfinite(norm + scale)
        if leave.any():
            check_scalars(norm + scale, step)
            gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
            reasons = [Status.STAGNATED if bad else Status.CONVERGED for bad in (singular & (norm > target))[gone]]
            result.leave(columns[gone], take(X, gone), step, reasons)
            if not keep.size:
                return result
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, V, V_old, W, W_old = (take(x, keep) for x in (X, V, V_old, W, W_old))
            PV = V if precondition is None else take(PV, keep)
            R = R if precondition is None else take(R, keep)
            beta, beta_old, scale, phi = beta[keep], beta_old[keep], scale[keep], phi[keep]
            c, s, epsilon, delta_bar, one = c[keep], s[keep], epsilon[keep], delta_bar[keep], one[keep]
    result.leave(columns, X, max_steps, [Status.MAX_STEPS] * len(columns))
    return result
