"""Conjugate gradients for A + σ I at many shifts σ, from the products of one run."""

from __future__ import annotations

import torch
from torch import Tensor

from . import cg
from .system import ROUNDING, Outcome, Product, System, check_scalars, drive, inner, quotient


def solve_shifted(product: Product, B: Tensor, shifts: Tensor, target: Tensor, max_steps: int) -> Outcome:
    """Solve (A + σ_i I) x_ij = b_j for every shift and every right-hand side.

    Krylov spaces do not change under shifts, and the residuals of A + σ_i I are multiples ζ_i r of those of the
    smallest shift, which is the slowest to converge. So one run for the smallest shift gives all.

    Args:
        product: A X.
        B: right-hand sides of unit norm (n, k).
        shifts: (s,) real float64; every A + σ_i I should be positive definite.
        target: norms of the residual to reach, one per right-hand side (k,) float64.
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
    X, steps = _one_run(product, B, shifts[order], target, max_steps)
    back = torch.argsort(order)
    guess = X[back].permute(1, 0, 2).reshape(n, s * k)
    system = System(product, None, shifts.repeat_interleave(k))
    spent = [min(m, max_steps - 1) for m in steps] * s  # what failed its check may go on
    out = drive(cg.iterate, system, B.repeat(1, s), guess, target.repeat(s), max_steps, spent=spent)
    out.details["steps of the shared run"] = max(steps)
    return out


def _one_run(
    product: Product, B: Tensor, shifts: Tensor, target: Tensor, max_steps: int
) -> tuple[Tensor, list[int]]:
    """CG for the smallest (first) shift; the others follow by their ratios φ_m = ζ_{m+1}/ζ_m in (0, 1]:

        1/φ_m = 1 + δ α_m + (α_m β_{m−1}/α_{m−1}) (1 − φ_{m−1}),     δ = σ − σ_min

    with steps α φ_m and directions d ← ζ r + β φ_m² d. Done shifts are a suffix, because φ falls with δ.
    """
    n, k = B.shape
    s = shifts.numel()
    delta = (shifts - shifts[0]).unsqueeze(1)  # (s, 1)
    tol = ROUNDING * torch.finfo(B.dtype).eps
    out = torch.zeros(s, n, k, dtype=B.dtype, device=B.device)
    steps = [0] * k
    columns = torch.arange(k, device=B.device)
    system = System(product, None, shifts[:1].expand(k))

    R, X = B.clone(), torch.zeros_like(out)
    D = B.repeat(s, 1, 1)
    rho = inner(R, R)
    size, top = rho, torch.zeros_like(rho)
    alpha_old, beta_old = torch.ones_like(rho), torch.zeros_like(rho)
    phi = torch.ones(s, k, dtype=torch.float64, device=B.device)
    zeta = torch.ones_like(phi)
    active = s
    for step in range(1, max_steps + 1):
        Q = system.product(D[0])
        curvature = inner(D[0], Q)
        theta = curvature / size
        top = torch.maximum(top, theta.abs())
        flat = theta <= tol * top
        alpha = torch.where(flat, 0.0, rho / curvature)
        phi = 1 / (1 + delta[:active] * alpha + quotient(alpha * beta_old, alpha_old) * (1 - phi[:active]))
        zeta = zeta[:active] * phi
        X[:active].addcmul_(D[:active], (alpha * phi).to(B.dtype).unsqueeze(1))
        R.addcmul_(Q, alpha.to(B.dtype), value=-1)
        rho_new = inner(R, R)
        norm = rho_new.sqrt()
        leave = flat | (norm <= target) | ~torch.isfinite(norm)
        done = (zeta * norm <= target).all(1)
        count = int((~done).sum()) if step < max_steps else 0
        if bool(leave.any()):
            check_scalars(theta, step)
            check_scalars(norm, step)
            out[:, :, columns[leave]] = X[:, :, leave]
            for j in columns[leave].tolist():
                steps[j] = step
            keep = (~leave).nonzero().squeeze(1)
            if keep.numel() == 0:
                return out, steps
            system, columns, target = system.select(keep), columns[keep], target[keep]
            X, D, R = X[:, :, keep], D[:, :, keep], R[:, keep]
            rho, rho_new, size, top, alpha = rho[keep], rho_new[keep], size[keep], top[keep], alpha[keep]
            phi, zeta = phi[:, keep], zeta[:, keep]
        active = max(min(active, count), 1)
        beta = rho_new / rho
        weight = (beta * phi[:active] * phi[:active]).to(B.dtype).unsqueeze(1)
        D[:active].mul_(weight).addcmul_(R.unsqueeze(0), zeta[:active].to(B.dtype).unsqueeze(1))
        size = rho_new + beta * beta * size
        rho, alpha_old, beta_old = rho_new, alpha, beta
    out[:, :, columns] = X
    for j in columns.tolist():
        steps[j] = max_steps
    return out, steps
