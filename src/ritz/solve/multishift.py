"""Conjugate gradients for A + σ I at many shifts σ, from the products of one run."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import cg
from .system import ROUNDING, Outcome, Product, Scalars, System, add, check_scalars, divide, drive, inner, row, take


def solve_shifted(product: Product, B: Tensor, shifts: Tensor, target: Scalars, max_steps: int) -> Outcome:
    """Solve (A + σ_i I) x_ij = b_j for every shift and every right-hand side.

    Krylov spaces do not change under shifts, and the residuals of A + σ_i I are multiples ζ_i r of those of the
    smallest shift, which is the slowest to converge. So one run for the smallest shift gives all.

    Args:
        product: A X.
        B: right-hand sides of unit norm (n, k).
        shifts: (s,) real float64; every A + σ_i I should be positive definite.
        target: norms of the residual to reach, one per right-hand side (k,).
        max_steps: iterations per column.

    Returns:
        The outcome with s·k columns, those of the first shift first. All residuals are recomputed; what is not at its
        target (rounding, or a smallest shift that is not positive definite) is continued by plain CG.

    Cost: k columns a step, and s·k at the end to check the residuals. Memory: 2 s k vectors. Per step 2 s k vector
    updates, of the shifts that are not done.
    Reference: Jegerlehner, Krylov space solvers for shifted linear systems, 1996; here with ratios ζ_{m+1}/ζ_m
    instead of ζ, which underflow.
    """
    n, k = B.shape
    s = shifts.numel()
    order = torch.argsort(shifts)
    X, steps = _one_run(product, B, shifts[order].cpu().numpy(), target, max_steps)
    guess = X[torch.argsort(order)].permute(1, 0, 2).reshape(n, s * k)
    system = System(product, None, shifts.repeat_interleave(k))
    spent = [min(m, max_steps - 1) for m in steps] * s  # what failed its check may go on
    out = drive(cg.iterate, system, B.repeat(1, s), guess, np.tile(target, s), max_steps, spent=spent)
    out.details["steps of the shared run"] = max(steps)
    return out


@np.errstate(all="ignore")
def _one_run(product: Product, B: Tensor, shifts: Scalars, target: Scalars, max_steps: int) -> tuple[Tensor, list[int]]:
    """CG for the smallest (first) shift; the others follow by their ratios φ_m = ζ_{m+1}/ζ_m in (0, 1]:

        1/φ_m = 1 + δ α_m + (α_m β_{m−1}/α_{m−1}) (1 − φ_{m−1}),     δ = σ − σ_min

    with steps α φ_m and directions d ← ζ r + β φ_m² d. Done shifts are a suffix, because φ falls with δ.
    """
    n, k = B.shape
    delta = (shifts - shifts[0])[:, None]  # (s, 1)
    tol = ROUNDING * torch.finfo(B.dtype).eps
    steps = np.zeros(k, dtype=int)
    columns = np.arange(k)
    active = len(shifts)
    out = torch.zeros(active, n, k, dtype=B.dtype, device=B.device)
    system = System(product, None, torch.full((k,), shifts[0], dtype=torch.float64, device=B.device))

    R, X, D = B.clone(), torch.zeros_like(out), B.repeat(active, 1, 1)
    rho = inner(R, R)
    size, top = rho, np.zeros_like(rho)
    alpha_old, beta_old = np.ones_like(rho), np.zeros_like(rho)
    phi = zeta = np.ones((active, k))
    for step in range(1, max_steps + 1):
        Q = system.product(D[0])
        curvature = inner(D[0], Q)
        theta = curvature / size
        top = np.maximum(top, abs(theta))
        flat = theta <= tol * top
        alpha = np.where(flat, 0.0, rho / curvature)
        phi = 1 / (1 + delta[:active] * alpha + divide(alpha * beta_old, alpha_old) * (1 - phi[:active]))
        zeta = zeta[:active] * phi
        X[:active].addcmul_(D[:active], row(alpha * phi, B).unsqueeze(1))
        add(R, Q, -alpha)
        rho_new = inner(R, R)
        norm = np.sqrt(rho_new)
        leave = flat | (norm <= target) | ~np.isfinite(norm)
        active = max(1, int((zeta * norm > target).any(1).sum()))
        if leave.any():
            check_scalars(theta, step)
            check_scalars(norm, step)
            gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
            out[:, :, torch.as_tensor(columns[gone])] = take(X, gone)
            steps[columns[gone]] = step
            if not keep.size:
                return out, steps.tolist()
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, D, R = take(X, keep), take(D, keep), take(R, keep)
            rho, rho_new, size, top, alpha = rho[keep], rho_new[keep], size[keep], top[keep], alpha[keep]
            phi, zeta = phi[:, keep], zeta[:, keep]
        beta = rho_new / rho
        weight = row(beta * phi[:active] ** 2, B).unsqueeze(1)
        D[:active].mul_(weight).addcmul_(R.unsqueeze(0), row(zeta[:active], B).unsqueeze(1))
        size = rho_new + beta * beta * size
        rho, alpha_old, beta_old = rho_new, alpha, beta
    out[:, :, torch.as_tensor(columns)] = X
    steps[columns] = max_steps
    return out, steps.tolist()
