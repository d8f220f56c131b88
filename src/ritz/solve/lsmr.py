"""LSMR for least-squares problems, many right-hand sides sharing every product."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..result import Status
from .system import (
    HALVED,
    Outcome,
    Product,
    Scalars,
    add,
    check_scalars,
    check_settings,
    default_rtol,
    default_steps,
    divide,
    norms,
    row,
    take,
)

if TYPE_CHECKING:
    from ..operators import LinearOperator


@dataclass(frozen=True)
class LSMR:
    """MINRES on the normal equations AᴴA x = Aᴴb, by Golub–Kahan bidiagonalisation of A, which is never squared.

    Each column stops when its *recomputed* normal residual has ‖Aᴴ(b − A x)‖ ≤ rtol·‖Aᴴb‖, which falls at every step.
    Of the solutions that a matrix without full column rank leaves, it finds the one of smallest norm.

    Args:
        rtol: relative tolerance; None is 1e-6 in float64 and 1e-4 in float32.
        max_steps: iterations per column; None is 10 n, at least 100 and at most 10 000.

    Cost: one product with A and one with Aᴴ a step, of the columns that are not done, and two of each to check them.
    Memory: the solution, three more vectors of its length and one of b's length a column.
    Reference: Fong, Saunders, LSMR: an iterative algorithm for sparse least-squares problems, 2011.
    """

    rtol: float | None = None
    max_steps: int | None = None

    def __post_init__(self) -> None:
        check_settings("LSMR", self.rtol, 0.0, self.max_steps)

    def resolve(self, A: LinearOperator) -> LSMR:
        """The same method with the defaults filled in for an operator."""
        return replace(
            self,
            rtol=default_rtol(A.dtype) if self.rtol is None else self.rtol,
            max_steps=default_steps(min(A.shape)) if self.max_steps is None else self.max_steps,
        )


def minimise(matmat: Product, rmatmat: Product, B: Tensor, rtol: float, max_steps: int) -> tuple[Outcome, Tensor]:
    """argmin ‖A x − b‖ of every column of B, and the residuals B − A X.

    ``Outcome.residual`` is the recomputed ‖Aᴴ(b − A x)‖ / ‖Aᴴb‖. A column whose claim was wrong goes on from its
    recomputed residual, and has stagnated where that does not halve the normal one.
    """
    k, G = B.shape[1], rmatmat(B)
    # With A / c in the place of A, and c x in that of x: the size of A must not under- or overflow in squares.
    c = float(G.abs().max()) if G.numel() else 1.0
    if 0 < c < math.inf:
        out, R = _minimise(lambda V: matmat(V / c), lambda U: rmatmat(U) / c, B, G / c, rtol, max_steps)
        out.X = out.X / c
        return out, R
    check_scalars(np.array([c]), 0)
    return Outcome(torch.zeros_like(G), np.zeros(k), [0] * k, [Status.CONVERGED] * k), B.clone()


def _minimise(
    matmat: Product, rmatmat: Product, B: Tensor, G: Tensor, rtol: float, max_steps: int
) -> tuple[Outcome, Tensor]:
    """The same for A of a moderate size, with G = AᴴB."""
    k, first = B.shape[1], norms(G)
    X, R, now = torch.zeros_like(G), B.clone(), np.where(first > 0, 1.0, 0.0)
    steps, status = [0] * k, [Status.CONVERGED if r <= rtol else Status.MAX_STEPS for r in now]
    todo = [j for j in range(k) if status[j] is not Status.CONVERGED]
    while todo:
        left = max_steps - max(steps[j] for j in todo)
        dX, spent = _steps(matmat, rmatmat, take(R, todo), divide(rtol * first[todo], now[todo] * first[todo]), left)
        R_new = take(R, todo) - matmat(dX)
        after = divide(norms(rmatmat(R_new)), first[todo])
        check_scalars(after, max(spent))
        again = []
        for i, j in enumerate(todo):
            steps[j] += spent[i]
            gained, before = after[i] <= HALVED * now[j], now[j]
            if after[i] <= before:
                X[:, j] += dX[:, i]
                R[:, j], now[j] = R_new[:, i], after[i]
            if now[j] <= rtol:
                status[j] = Status.CONVERGED
            elif not gained and steps[j] < max_steps:
                status[j] = Status.STAGNATED
            elif steps[j] < max_steps:
                again.append(j)
        todo = again
    return Outcome(X, now, steps, status), R


@np.errstate(all="ignore")
def _steps(matmat: Product, rmatmat: Product, B: Tensor, target: Scalars, max_steps: int) -> tuple[Tensor, list[int]]:
    """Fong and Saunders' recurrences from zero until |ζ̄| = ‖Aᴴr‖ ≤ target·‖Aᴴb‖, or nothing new is found."""
    k = B.shape[1]
    columns, spent = np.arange(k), [0] * k
    beta = norms(B)
    U = B * row(divide(np.ones(k), beta), B)
    V = rmatmat(U)
    alpha = norms(V)
    V = V * row(divide(np.ones(k), alpha), V)
    result, X, H, H_bar = torch.zeros_like(V), torch.zeros_like(V), V.clone(), torch.zeros_like(V)
    zeta_bar, alpha_bar, start = alpha * beta, alpha, alpha * beta
    rho = rho_bar = c_bar = np.ones(k)
    s_bar = np.zeros(k)
    tiny = torch.finfo(B.dtype).eps
    largest = alpha  # ‖A‖ from below
    for step in range(1, max_steps + 1):
        U = matmat(V) - U * row(alpha, U)
        beta = norms(U)
        largest = np.maximum(largest, np.hypot(alpha, beta))
        beta = np.where(beta <= tiny * largest, 0.0, beta)
        U = U * row(divide(np.ones_like(beta), beta), U)
        V_next = rmatmat(U) - V * row(beta, V)
        alpha = norms(V_next)
        largest = np.maximum(largest, np.hypot(alpha, beta))
        alpha = np.where(alpha <= tiny * largest, 0.0, alpha)
        V = V_next * row(divide(np.ones_like(alpha), alpha), V)
        rho_old, rho = rho, np.hypot(alpha_bar, beta)
        c, s = divide(alpha_bar, rho), divide(beta, rho)
        theta, alpha_bar = s * alpha, c * alpha
        rho_bar_old, theta_bar, turned = rho_bar, s_bar * rho, c_bar * rho
        rho_bar = np.hypot(turned, theta)
        c_bar, s_bar = divide(turned, rho_bar), divide(theta, rho_bar)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        H_bar = add(H_bar, H, np.ones_like(rho), scale=-divide(theta_bar * rho, rho_old * rho_bar_old))
        add(X, H_bar, divide(zeta, rho * rho_bar))
        H = add(H, V, np.ones_like(rho), scale=-divide(theta, rho))
        check_scalars(zeta_bar + largest, step)
        leave = (abs(zeta_bar) <= target * start) | (alpha == 0) | (step == max_steps)
        if leave.any():
            gone, keep = leave.nonzero()[0], (~leave).nonzero()[0]
            result[:, torch.as_tensor(columns[gone], device=B.device)] = take(X, gone)
            for j in columns[gone].tolist():
                spent[j] = step
            if not keep.size:
                break
            columns, target, start = columns[keep], target[keep], start[keep]
            U, V, X, H, H_bar = (take(x, keep) for x in (U, V, X, H, H_bar))
            alpha, alpha_bar, zeta_bar, largest = alpha[keep], alpha_bar[keep], zeta_bar[keep], largest[keep]
            rho, rho_bar, c_bar, s_bar = rho[keep], rho_bar[keep], c_bar[keep], s_bar[keep]
    return result, spent
