"""K̂⁻¹ as a posterior keeps it: a Cholesky factor, or products with K̂ and a preconditioner.

Both answer three questions: K̂⁻¹ B, k*ᵀK̂⁻¹k* for many k*, and the matrix CᵀK̂⁻¹C. The last two are computed in forms that
cannot exceed the truth by more than rounding, so that a variance k** − k*ᵀK̂⁻¹k* is never too small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SecondDerivativeError
from ..methods import Auto
from ..numerics import full_precision
from ..operators import Diagonal, LinearOperator
from ..result import Info, OnFailure, Status, report
from ..solve import CG, Direct, RandomlyPivotedCholesky, solve
from ..solve.system import worst
from . import likelihood

if TYPE_CHECKING:
    from .exact import ExactGP

RANK = 100  # of the preconditioner of the solves
ENTRIES_AT_ONCE = 2**18  # of a dense covariance: their float64 distances stay in the second-level cache


class Reduced(NamedTuple):
    """What observations take away from the variance of each point.

    Attributes:
        value: k*ᵀK̂⁻¹k* from below (b,), differentiable in the cross-covariances.
        gap: bound on by how much it is too small (b,).
        num_matvecs: columns that went through products with K̂.
        solved: points that needed a linear solve.
        solve: report of that solve, which has not warned yet.
    """

    value: Tensor
    gap: Tensor
    num_matvecs: int = 0
    solved: int = 0
    solve: Info | None = None


def variance_info(method: object, gap: Tensor, blocks: Sequence[tuple[int, int, Info | None]]) -> Info:
    """The report of a variance made in blocks, with the most serious status of their solves, and one warning for all.

    Args:
        method: what made the variances.
        gap: bound on by how much each is too large; becomes ``residual`` (the warning has those of the solves).
        blocks: what follows ``gap`` in the :class:`Reduced` of every block.
    """
    solves = [found for _, _, found in blocks if found is not None]
    status, depth = worst([s.status for s in solves]), max((s.depth for s in solves), default=0)
    products, solved = sum(b[0] for b in blocks), sum(b[1] for b in blocks)
    if not status.success:
        residuals = torch.cat([s.residual for s in solves if s.residual is not None])
        target = getattr(solves[0].method, "rtol", None) or 0.0
        failed = Info(solves[0].method, products, depth, residuals, status=status)
        report(failed, what=f"the solves of {solved} variances", target=target, on_failure="warn")
    details: dict[str, object] = {"solved": solved}
    return Info(method, products, depth, residual=gap.detach(), status=status, details=details)


class Factor:
    """K̂ = L Lᵀ for observations X (n, d), in float64 or in the dtype of X.

    Cost: n³/3 operations and n² numbers once; n² a column from then on.
    """

    def __init__(self, gp: ExactGP, X: Tensor, *, double: bool) -> None:
        self.gp, self.X = gp, X.double() if double else X
        self.noise = gp.observed_noise(X).detach()
        operator, dtype = gp._latent(gp.kernel(self.X)), self.X.dtype
        n = operator.shape[0]
        likelihood.check_memory(gp.solver, n)
        K, rows = torch.empty(n, n, dtype=dtype, device=X.device), max(1, ENTRIES_AT_ONCE // n)
        for a in range(0, n, rows):  # by columns of the symmetric operator: distances are rounded as in the likelihood
            K[a : a + rows] = operator.columns(range(a, min(a + rows, n))).mT
        K.diagonal().add_(self.noise.to(dtype))
        with full_precision():
            self.L = likelihood.cholesky(K, gp._points(X), self.noise.min(), overwrite=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of the cross-covariances that :meth:`reduce` takes."""
        return self.X.dtype

    def solve(self, B: Tensor) -> tuple[Tensor, Info]:
        """K̂⁻¹ B (n, k), and its residual, which costs a product.

        A factor in float32 is followed by a step of refinement.
        """
        A, B = self._covariance(), B.to(self.dtype)
        with full_precision():
            W = torch.cholesky_solve(B, self.L)
            R = B - A @ W
            if self.dtype != torch.float64:
                W += torch.cholesky_solve(R, self.L)
                R = B - A @ W
        products = B.shape[1] * (1 if self.dtype == torch.float64 else 2)
        return W, Info(Direct(), products, 0, residual=_relative(R, B), status=Status.CONVERGED)

    def _covariance(self) -> LinearOperator:
        """K̂ in the dtype of the factor, for products."""
        K, noise = self.gp._latent(self.gp.kernel(self.X)), self.noise.to(self.dtype)
        return K.shift(noise) if noise.ndim == 0 else K + Diagonal(noise)

    def reduce(self, C: Tensor) -> Reduced:
        """‖L⁻¹k*‖² for the columns of C (n, b); its gap is what rounding may make of it."""
        with full_precision():
            value = self._white(C).square().sum(0)
        return Reduced(value, C.shape[0] * torch.finfo(self.dtype).eps * value.detach())

    def gram(self, C: Tensor) -> Tensor:
        """CᵀK̂⁻¹C (b, b) for C (n, b), as a square."""
        with full_precision():
            white = self._white(C)
            return white.mT @ white

    def _white(self, C: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.L, C, upper=False)


class Products:
    """K̂⁻¹ for observations X (n, d) by preconditioned conjugate gradients, of the accuracy that ``method`` states."""

    def __init__(self, gp: ExactGP, X: Tensor, method: CG) -> None:
        self.method, self.X = method, X
        self.noise = gp.observed_noise(X).detach()
        self.floor = float(self.noise.min())
        self.A = gp.covariance(X)
        self.P = self._preconditioner(gp, X)
        likelihood.warn_of_rounding(self.A, self.noise.min(), preconditioned=self.P is not None)

    def _preconditioner(self, gp: ExactGP, X: Tensor) -> Any:
        given = getattr(gp, "preconditioner", None)
        if not isinstance(given, Auto):
            return given.build(self.A) if hasattr(given, "build") else given
        rank = min(RANK, self.A.shape[0])
        return RandomlyPivotedCholesky(rank).build(gp._latent(gp.kernel(X)), shift=float(self.noise.mean()))

    @property
    def dtype(self) -> torch.dtype:
        """Of the cross-covariances that :meth:`reduce` takes."""
        return self.X.dtype

    def solve(self, B: Tensor, method: CG | None = None, on_failure: OnFailure = "warn") -> tuple[Tensor, Info]:
        """K̂⁻¹ B (n, k), and the report of the solve."""
        x, info = solve(
            self.A, B, method=method or self.method, preconditioner=self.P, return_info=True, on_failure=on_failure
        )
        return x, info

    def reduce(self, C: Tensor, method: CG | None = None) -> Reduced:
        """2 k*ᵀx − xᵀK̂x with x ≈ K̂⁻¹k*, for the columns of C (n, b).

        It is k*ᵀK̂⁻¹k* − ‖x − K̂⁻¹k*‖²_K̂, whatever x is: never too large, and the error is the square of that of x. With
        the residual r = k* − K̂x that error is rᵀK̂⁻¹r ≤ ‖r‖²/σ², the gap. A miss of the tolerance does not warn here.
        """
        with torch.no_grad():
            x, R, info = self._solution(C.detach(), method, "ignore")
            gap = R.square().sum(0, dtype=torch.float64) / self.floor
            rest = (x * R).sum(0, dtype=torch.float64)
        C = _First.apply(C)
        # xᵀK̂x = k*ᵀx − xᵀr, so the value is k*ᵀx + xᵀr; its gradient in k* is 2x.
        value = ((2 * C - C.detach()) * x).sum(0, dtype=torch.float64) + rest
        return Reduced(value, gap, info.num_matvecs, C.shape[1], info)

    def gram(self, C: Tensor) -> Tensor:
        """CᵀX + XᵀC − XᵀK̂X with X ≈ K̂⁻¹C, (b, b): below CᵀK̂⁻¹C in the order of symmetric matrices."""
        with torch.no_grad():
            x, R, _ = self._solution(C.detach(), None, "warn")
        C = _First.apply(C)
        with full_precision():
            G = C.mT @ x + x.mT @ (C - C.detach() + R)  # XᵀK̂X = Xᵀ(C − R); the gradient in C is that of CᵀX + XᵀC
        return 0.5 * (G + G.mT)

    def _solution(self, C: Tensor, method: CG | None, on_failure: OnFailure) -> tuple[Tensor, Tensor, Info]:
        """x ≈ K̂⁻¹C, the residual C − K̂x, and the report, which counts that product as well."""
        with full_precision():
            x, info = self.solve(C, method, on_failure)
            info.num_matvecs += C.shape[1]
            return x, C - self.A @ x, info


class _First(torch.autograd.Function):
    """Identity with a first derivative only: x ≈ K̂⁻¹k* is a constant in ours, which a second one would take it for."""

    @staticmethod
    def forward(C: Tensor) -> Tensor:
        return C.view_as(C)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Refuse.apply(g, *ctx.saved_tensors)


class _Refuse(torch.autograd.Function):
    """Identity in g whose backward raises, whether g or C is asked for."""

    @staticmethod
    def forward(g: Tensor, C: Tensor) -> Tensor:
        return g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise SecondDerivativeError(
            "a posterior variance by conjugate gradients was differentiated twice; its rule gives first derivatives "
            "only: condition with solver=Direct() where second ones are needed"
        )


def _relative(R: Tensor, B: Tensor) -> Tensor:
    """‖r_j‖/‖b_j‖ (k,), 0 for a zero column."""
    r, b = (torch.linalg.vector_norm(M, dim=0, dtype=torch.float64) for M in (R, B))
    return torch.where(b > 0, r / b.clamp_min(torch.finfo(torch.float64).tiny), r)
