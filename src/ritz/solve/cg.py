"""Conjugate gradients for Hermitian positive definite systems, many right-hand sides sharing every product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..result import Status
from .system import (
    ROUNDING,
    Kernel,
    Outcome,
    Pass,
    Product,
    System,
    check_preconditioner,
    check_scalars,
    check_settings,
    default_rtol,
    default_steps,
    drive,
    inner,
    quotient,
)

if TYPE_CHECKING:
    from ..operators import LinearOperator

# A column whose recurrence has not found a smaller residual for this share of its steps (at least 100) has stagnated.
PATIENCE = 4


@dataclass(frozen=True)
class CG:
    """Conjugate gradients, for Hermitian positive definite operators.

    Each column stops when its *recomputed* residual has ‖b − A x‖ ≤ max(rtol·‖b‖, atol), SciPy's meaning.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        atol: absolute tolerance.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.

    Cost: one block product a step, of the columns that are not done, and one to check each column. Memory: the
    solution and three more vectors a column. One synchronisation a step.
    Reference: Hestenes, Stiefel, Methods of conjugate gradients for solving linear systems, 1952.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_settings("CG", self.rtol, self.atol, self.max_steps)

    def resolve(self, A: LinearOperator) -> CG:
        """The same method with the defaults filled in for an operator."""
        return replace(
            self,
            rtol=default_rtol(A.dtype) if self.rtol is None else self.rtol,
            max_steps=default_steps(A.shape[0]) if self.max_steps is None else self.max_steps,
        )

    def bind(self, A: LinearOperator, precondition: Product | None) -> Kernel:
        """The solver of unit-norm blocks."""
        limit = self.max_steps or default_steps(A.shape[0])

        def kernel(
            product: Product, B: Tensor, X0: Tensor | None, target: Tensor, shift: Tensor | None, adjoint: bool
        ) -> Outcome:
            return drive(iterate, System(product, precondition, shift), B, X0, target, limit)

        return kernel


def iterate(system: System, R: Tensor, target: Tensor, max_steps: int) -> Pass:
    """Hestenes and Stiefel's recurrences for every column of ``R``, until ‖r‖ ≤ target or nothing is left to gain.

    Both divisions are guarded. ρ = rᴴ P⁻¹ r must be positive. The curvature dᴴ A d is compared, as the Rayleigh
    quotient θ = dᴴ A d / dᴴ P d, with the largest θ seen: dᴴ P d = ρ + β² (dᴴ P d)_old needs no product. θ below
    −10 eps·θ_max says that A is not positive definite; |θ| below it that A is singular to working precision.
    """
    result = Pass(R)
    columns = torch.arange(R.shape[1], device=R.device)
    tol = ROUNDING * torch.finfo(R.dtype).eps
    patience = max(100, max_steps // PATIENCE)
    plain = system.precondition is None
    precondition = system.precondition or (lambda V: V)
    target = target.clamp_min(1e-140)  # ρ = ‖r‖² must not underflow

    X = torch.zeros_like(R)
    Z = precondition(R)
    rho = inner(R, Z)
    if not plain:
        check_preconditioner(rho, inner(R, R).sqrt())
    D, size, top = Z.clone(), rho, torch.zeros_like(rho)
    best = last_best = torch.full_like(rho, torch.inf)
    for step in range(1, max_steps + 1):
        Q = system.product(D)
        curvature = inner(D, Q)
        theta = curvature / size
        top = torch.maximum(top, theta.abs())
        flat = theta <= tol * top
        alpha = torch.where(flat, 0.0, rho / curvature)
        a = alpha.to(R.dtype)
        X.addcmul_(D, a)
        R.addcmul_(Q, a, value=-1)
        square = inner(R, R)
        norm = square.sqrt()
        best = torch.minimum(best, norm)
        leave = flat | (norm <= target) | ~torch.isfinite(norm)
        stalled = torch.zeros_like(leave)
        if step % patience == 0:
            stalled = best >= last_best
            leave, last_best = leave | stalled, best
        if bool(leave.any()):
            check_scalars(theta, step)
            check_scalars(norm, step)
            gone = leave.nonzero().squeeze(1)
            negative = theta < -tol * top
            reasons = [
                Status.NOT_POSITIVE if neg else Status.CONVERGED if small else Status.STAGNATED
                for neg, small in zip(negative[gone].tolist(), (norm <= target)[gone].tolist(), strict=True)
            ]
            result.leave(columns[gone], X[:, gone], step, reasons)
            keep = (~leave).nonzero().squeeze(1)
            if keep.numel() == 0:
                return result
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, R, D = X[:, keep], R[:, keep], D[:, keep]
            rho, size, top, best, last_best = rho[keep], size[keep], top[keep], best[keep], last_best[keep]
            square, norm = square[keep], norm[keep]
        Z = precondition(R)
        rho_new = square if plain else inner(R, Z)
        if not plain:
            check_preconditioner(rho_new, norm)
        beta = quotient(rho_new, rho)
        D.mul_(beta.to(D.dtype)).add_(Z)
        size = rho_new + beta * beta * size
        rho = rho_new
    result.leave(columns, X, max_steps, [Status.MAX_STEPS] * len(columns))
    return result
