"""The posterior of a Gaussian process at new points: mean and variance from one cached factor or solution."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OperandError
from ..numerics import check_finite, full_precision
from ..result import Info
from ..solve import CG, Direct, RandomlyPivotedCholesky, solve
from . import likelihood

if TYPE_CHECKING:
    from .exact import ExactGP

BLOCK_BYTES = 64 * 2**20  # of cross-covariances n × b that are held at a time
RANK = 100  # of the preconditioner of the solves
# Conditioning is done once and asked for many points: up to here a dense factor (n³/3 operations, n² numbers) costs
# less than the tens of products for every test point's variance that CG would need. solver=CG(...) overrides it.
FACTOR_UP_TO = 20000
DOUBLE_UP_TO = 5000  # in float64 up to here, beyond in the dtype of the points
ROWS_AT_ONCE = 32  # of a dense covariance: their float64 distances stay in the second-level cache


class Posterior:
    """N(mean(Xs), variance(Xs)) given the observations that it was made with.

    The hyper-parameters are a copy, so that later training of the process does not reach into what is cached here.
    Gradients flow to the test points.

    Attributes:
        X, y: observations.
        weights: K̂⁻¹ (y − m), (n,).
        info: report of the solve behind the weights (None on the dense path).

    Cost: n ≤ 20000: one factorisation, in float64 for n ≤ 5000 and in the dtype of X beyond, then n² per test point.
    Larger n, or ``solver=CG(...)``: one preconditioned CG solve, n per test point for the mean, and CG on blocks of
    test points for variances.
    """

    def __init__(self, gp: ExactGP, X: Tensor, y: Tensor) -> None:
        self.gp = copy.deepcopy(gp).requires_grad_(False)
        self.X, self.y = X, y
        self.info: Info | None = None
        self._L: Tensor | None = None
        with torch.no_grad():
            r = y - self.gp.mean(X)
            solver = self.gp.solver
            if isinstance(solver, Direct) or (not isinstance(solver, CG) and X.shape[0] <= FACTOR_UP_TO):
                self._L = L = self._factor()
                with full_precision():
                    r = r.to(L.dtype).unsqueeze(1)
                    w = torch.cholesky_solve(r, L)
                    if L.dtype != torch.float64:  # one step of refinement, the residual by a product
                        w += torch.cholesky_solve(r - self.gp.covariance(X) @ w, L)
                    self.weights = w.squeeze(1).to(y.dtype)
                return
            self._A = self.gp.covariance(X)
            likelihood.warn_of_rounding(self._A, self.gp.noise)
            self._P = RandomlyPivotedCholesky(min(RANK, X.shape[0])).build(self._A)
            self.weights, self.info = solve(
                self._A, r, method=self._solver(), preconditioner=self._P, return_info=True
            )

    def _solver(self) -> CG:
        return self.gp.solver if isinstance(self.gp.solver, CG) else CG()

    def mean(self, Xs: Tensor) -> Tensor:
        """m(Xs) + K(Xs, X) K̂⁻¹ (y − m), shape (n*,); differentiable in Xs."""
        Xs = self._check(Xs)
        return self.gp.mean(Xs) + self.gp.kernel(Xs, self.X) @ self.weights

    def variance(self, Xs: Tensor, *, noise: bool = False) -> Tensor:
        """The variance of f(Xs), or with ``noise=True`` that of a new observation there, shape (n*,).

        Never negative. Dense path: k** − ‖L⁻¹k*‖², where only rounding, at most n·eps·k**, is cut off.
        Iterative path: k** − (2 k*ᵀx − xᵀK̂x) with x from CG. What is subtracted is k*ᵀK̂⁻¹k* − ‖x − K̂⁻¹k*‖²_K̂, so that
        an unconverged x can only enlarge the variance, and the error is the square of that of x.
        """
        Xs = self._check(Xs)
        n, size = self.X.shape[0], self.X.element_size()
        block = max(16, min(512, BLOCK_BYTES // (n * size)))
        parts = [self._variance(Xs[a : a + block]) for a in range(0, Xs.shape[0], block)]
        v = torch.cat(parts) if parts else Xs.new_zeros(0)
        return v + self.gp.noise.to(v.dtype) if noise else v

    @torch.no_grad()
    def _factor(self) -> Tensor:
        """The Cholesky factor of K̂, in the place of the dense matrix."""
        n = self.X.shape[0]
        double = n <= DOUBLE_UP_TO or isinstance(self.gp.solver, Direct)
        X = self.X.double() if double else self.X
        K = torch.empty(n, n, dtype=X.dtype, device=X.device)
        for a in range(0, n, ROWS_AT_ONCE):
            K[a : a + ROWS_AT_ONCE] = self.gp.kernel(X[a : a + ROWS_AT_ONCE], X).to_dense()
        K.diagonal().add_(self.gp.noise.to(X.dtype))
        with full_precision():
            return likelihood.cholesky(K, self.X, self.gp.noise, overwrite=True)

    def _variance(self, Xs: Tensor) -> Tensor:
        prior = torch.cat([self.gp.kernel(Xs[a : a + 64]).diagonal() for a in range(0, Xs.shape[0], 64)])
        if self._L is not None:
            dtype = self._L.dtype
            C = torch.cat([self.gp.kernel(P, self.X.to(dtype)).to_dense() for P in Xs.to(dtype).split(ROWS_AT_ONCE)])
            white = torch.linalg.solve_triangular(self._L, C.mT, upper=False)
            return (prior.to(dtype) - white.square().sum(0)).clamp_min(0.0).to(Xs.dtype)
        C = self.gp.kernel(self.X, Xs).to_dense()
        with torch.no_grad():
            x = solve(self._A, C.detach(), method=self._solver(), preconditioner=self._P)
            energy = (x * (self._A @ x)).sum(0)
        return (prior - (2 * (C * x).sum(0) - energy)).clamp_min(0.0)

    def predict(self, Xs: Tensor, *, noise: bool = False) -> tuple[Tensor, Tensor]:
        """(mean, variance) at Xs; with ``noise=True`` the variance of a new observation."""
        return self.mean(Xs), self.variance(Xs, noise=noise)

    def _check(self, Xs: Tensor) -> Tensor:
        Xs = Xs.unsqueeze(1) if isinstance(Xs, Tensor) and Xs.ndim == 1 else Xs
        if not isinstance(Xs, Tensor) or Xs.ndim != 2 or Xs.shape[1] != self.X.shape[1] or Xs.dtype != self.X.dtype:
            what = f"{tuple(Xs.shape)} {Xs.dtype}" if isinstance(Xs, Tensor) else type(Xs).__name__
            raise OperandError(f"Xs is {what}; expected (n*, {self.X.shape[1]}) in {self.X.dtype}")
        check_finite(Xs, "Xs")
        return Xs

    def __repr__(self) -> str:
        how = "Cholesky factor" if self._L is not None else f"{self._solver()}"
        return f"Posterior({self.X.shape[0]} observations, {how})"
