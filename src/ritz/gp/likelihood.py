"""The log marginal likelihood of a Gaussian process, by Cholesky or from one Lanczos block."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, DomainError
from ..functions.forms import Term, shared_forms
from ..functions.scalar import inverse, log
from ..methods import Lanczos
from ..numerics import full_precision
from ..operators.base import LinearOperator
from ..result import Info, OnFailure, Status, caller_level
from ..solve import CG, Direct, solve
from ..stochastic.probes import Hutchinson, mean_and_error


def cholesky(K: Tensor, X: Tensor, noise: Tensor, *, overwrite: bool = False) -> Tensor:
    """The factor L of a dense covariance K (n, n) that has the noise on its diagonal; differentiable to any order.

    With ``overwrite`` it takes K's place in memory, without a gradient.

    Nothing is ever added to the diagonal: a jitter changes the model, and so is the caller's to choose.

    Raises:
        DomainError: K is not positive definite in its precision; with what is known about why.
    """
    top = float(K.detach().diagonal().max())
    if overwrite:
        L, failed = K.mT, torch.zeros((), dtype=torch.int32, device=K.device)  # LAPACK works in place on columns
        torch.linalg.cholesky_ex(L, out=(L, failed))
    else:
        L, failed = torch.linalg.cholesky_ex(K)
    if int(failed) == 0:
        return L
    n, order = K.shape[0], int(failed)
    with torch.no_grad():
        smallest = float(L.diagonal()[: order - 1].square().min()) if order > 1 else top
        duplicates = n - torch.unique(X, dim=0).shape[0]
    raise DomainError(
        f"the covariance of n = {n} points in {K.dtype} is not positive definite: pivot {order} of {n} came out <= 0 "
        f"(the smallest before it was {smallest:.3g}, the largest variance is {top:.3g}). The noise variance is "
        f"{float(noise.detach()):.3g}, {duplicates} rows of X repeat another one. Nothing was added to the diagonal. "
        f"Use a larger noise (above n·eps·variance = {n * torch.finfo(K.dtype).eps * top:.1g}), shorter length-scales, "
        "float64, or merge the repeated points"
    )


def dense(K: Tensor, r: Tensor, X: Tensor, noise: Tensor) -> tuple[Tensor, Info]:
    """log N(r; 0, K) by Cholesky, in the precision of K (n, n); plain autograd, so any order of differentiation."""
    with full_precision():
        L = cholesky(K, X, noise)
        white = torch.linalg.solve_triangular(L, r.unsqueeze(1), upper=False).squeeze(1)
        n = r.shape[0]
        value = -0.5 * white.square().sum() - L.diagonal().log().sum() - 0.5 * n * math.log(2 * math.pi)
    return value, Info(Direct(), 0, n, status=Status.CONVERGED, standard_error=torch.zeros_like(value.detach()))


def iterative(
    A: LinearOperator, r: Tensor, method: tuple[Hutchinson, Lanczos], solver: CG | None, on_failure: OnFailure
) -> tuple[Tensor, Info]:
    """log N(r; 0, A) from products: r and the probes of log det A share one Lanczos block.

    rᵀA⁻¹r is a quadratic form, so its gradient (and that of the log-determinant) needs no further product. Where the
    block's depth leaves the column of r with a larger error than ``solver`` asks for, CG solves for x = A⁻¹ r, and
    2 rᵀx − xᵀA x takes the form's place: its error is the square of that of x, its gradient in A is −x xᵀ.
    """
    n = r.shape[0]
    probes, lanczos = method
    Z = probes.probes(n, A.dtype, A.device)
    terms = [Term(inverse, slice(0, 1)), Term(log, slice(1, None))]
    V = torch.cat([r.unsqueeze(1), Z], 1)
    forms, info = shared_forms(A, V, terms, method=lanczos, on_failure=on_failure)
    quadratic = forms[0].squeeze(0)
    logdet, error = mean_and_error(forms[1], probes.is_exact(n))
    assert info.residual is not None
    residual = float(info.residual[0].detach())
    info.method, info.standard_error = method, error / 2
    # In float32 a block may run out of directions by rounding long before it has converged.
    doubtful = info.status is Status.EXHAUSTED and info.depth < n
    if solver is not None and (doubtful or residual > solver.resolve(A).rtol):  # type: ignore[operator]
        with torch.no_grad():
            x, report = solve(A, r.detach(), method=solver, return_info=True, on_failure=on_failure)
        quadratic = 2 * (r @ x) - x @ (A @ x)
        residual = float(report.residual.max())
        info.num_matvecs += report.num_matvecs + 1
        info.details["solve"] = report
    info.details.update(
        quadratic=float(quadratic.detach()), logdet=float(logdet.detach()), quadratic_residual=residual
    )
    return -0.5 * (quadratic + logdet + n * math.log(2 * math.pi)), info


def warn_of_rounding(A: LinearOperator, noise: Tensor) -> float:
    """eps·tr K̂/σ²: how far rounding of the largest eigenvalue may move the smallest one; with one warning above 0.1."""
    with torch.no_grad():
        trace, sigma2 = float(A.diagonal().detach().sum()), float(noise.detach())
    rounding = torch.finfo(A.dtype).eps * trace / sigma2
    if rounding > 0.1:
        what = "work in float64" if A.dtype != torch.float64 else "use a larger noise"
        warnings.warn(
            f"a covariance of {A.shape[0]} points with noise variance {sigma2:.3g} in {A.dtype}: rounding of its "
            f"largest eigenvalue may reach {rounding:.2g} times its smallest, which spoils solves and "
            f"log-determinants; {what}",
            ConvergenceWarning,
            stacklevel=caller_level(),
        )
    return rounding


def parts(info: Info) -> dict[str, Any]:
    """The figures of a likelihood's report as plain numbers (for progress lines and JSON)."""
    out: dict[str, Any] = {"depth": info.depth, "num_matvecs": info.num_matvecs, "status": info.status.value}
    if info.standard_error is not None:
        out["standard_error"] = float(info.standard_error)
    return out | {k: v for k, v in info.details.items() if isinstance(v, float)}
