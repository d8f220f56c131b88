"""Conjugate gradients for Hermitian positive definite systems, many right-hand sides sharing every product."""

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
    take,
)

if TYPE_CHECKING:
    from ..operators import LinearOperator

# Steps between two looks at whether the recurrence's residual has fallen below what rounding makes of the true one.
LOOK_EVERY = 50

# A column whose recurrence has not found a smaller residual for this share of its steps (at least 100) has stagnated.
PATIENCE = 4


@dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradients, for Hermitian positive definite operators.

    Each column stops when its *recomputed* residual has ‖b − A x‖ ≤ max(rtol·‖b‖, atol), SciPy's meaning.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.

    Cost: one block product a step, of the columns that are not done, and one to check each column. Memory: the
    solution and three more vectors a column. Two synchronisations a step.
    Reference: Hestenes, Stiefel, Methods of conjugate gradients for solving linear systems, 1952.
    """

    def bind(self, A: LinearOperator, precondition: Product | None) -> Kernel:
        """The solver of unit-norm blocks."""
        limit = self.limit(A.shape[0])

        def kernel(
            product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
        ) -> Outcome:
            return drive(iterate, System(product, precondition, shift), B, X0, target, limit)

        return kernel


@np.errstate(all="ignore")
def iterate(system: System, R: Tensor, target: Scalars, max_steps: int) -> Pass:
    """Hestenes and Stiefel's recurrences for every column of ``R``, until ‖r‖ ≤ target or nothing is left to gain.

    Both divisions are guarded. ρ = rᴴ P⁻¹ r must be positive. The curvature dᴴ A d is compared, as the Rayleigh
    quotient θ = dᴴ A d / dᴴ P d, with the largest θ seen: dᴴ P d = ρ + β² (dᴴ P d)_old needs no product. θ below
    −10 eps·θ_max says that A is not positive definite; |θ| below it that A is singular to working precision. A column
    also leaves when ‖r‖ ≤ eps·‖A‖·‖x‖: the recurrence goes on falling there, b − A x does not.
    """
    result = Pass(R)
    columns = np.arange(R.shape[1])
    tol = ROUNDING * torch.finfo(R.dtype).eps
    patience = max(100, max_steps // PATIENCE)
    precondition = system.precondition
    target = np.maximum(target, 1e-140)  # ρ = ‖r‖² must not underflow

    X = torch.zeros_like(R)
    square = inner(R, R)
    Z = R if precondition is None else precondition(R)
    rho = square if precondition is None else _energy(R, Z, square)
    D, size, top = Z.clone(), rho, np.zeros_like(rho)
    largest = np.zeros_like(rho)  # ‖A‖ from below
    best = last_best = np.full_like(rho, np.inf)
    for step in range(1, max_steps + 1):
        Q = system.product(D)
        curvature = inner(D, Q)
        theta = curvature / size
        top = np.maximum(top, abs(theta))
        flat = theta <= tol * top
        alpha = np.where(flat, 0.0, rho / curvature)
        add(X, D, alpha)
        add(R, Q, -alpha)
        square = inner(R, R)
        norm = np.sqrt(square)
        leave = flat | (norm <= target) | ~np.isfinite(norm)
        best = np.minimum(best, norm)
        if step % patience == 0:
            leave, last_best = leave | (best >= last_best), best
        if step % LOOK_EVERY == 0:
            largest = np.maximum(largest, divide(norms(Q), norms(D)))
            leave = leave | (norm <= torch.finfo(R.dtype).eps * largest * np.hypot(norms(X), system.base))
        if leave.any():
            check_scalars(theta, step)
            check_scalars(norm, step)
            gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
            reasons = [
                Status.NOT_POSITIVE if negative else Status.CONVERGED if small else Status.STAGNATED
                for negative, small in zip((theta < -tol * top)[gone], (norm <= target)[gone], strict=True)
            ]
            result.leave(columns[gone], take(X, gone), step, reasons)
            if not keep.size:
                return result
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, R, D = take(X, keep), take(R, keep), take(D, keep)
            rho, size, top, square = rho[keep], size[keep], top[keep], square[keep]
            best, last_best, largest = best[keep], last_best[keep], largest[keep]
        Z = R if precondition is None else precondition(R)
        rho_new = square if precondition is None else _energy(R, Z, square)
        beta = divide(rho_new, rho)
        add(D, Z, np.ones_like(beta), scale=beta)
        size = rho_new + beta * beta * size
        rho = rho_new
    result.leave(columns, X, max_steps, [Status.MAX_STEPS] * len(columns))
    return result


def _energy(R: Tensor, Z: Tensor, square: Scalars) -> Scalars:
    """Rᴴ P⁻¹ R of every column, checked to be positive."""
    rho = inner(R, Z)
    check_preconditioner(rho, np.sqrt(square))
    return rho
