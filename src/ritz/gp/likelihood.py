"""The log marginal likelihood of a Gaussian process, by Cholesky or from one Lanczos block."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceWarning, DomainError, OperandError
from ..functions.forms import Term, shared_forms
from ..functions.scalar import inverse, log
from ..methods import Auto, Frechet, Lanczos
from ..numerics import full_precision, unwrap
from ..operators import Dense
from ..operators.base import Gradients, LinearOperator
from ..result import Info, OnFailure, Status, caller_level, report
from ..solve import CG, Direct, Preconditioned, solve
from ..stochastic.preconditioned import plain_error, preferred, select
from ..stochastic.probes import Hutchinson, mean_and_error

# Tolerance of the pairing relative to that of the Lanczos run. What is cut off the pairing, not the run, is the larger
# part of the gradient's error: at rtol = 1e-3 (Matérn 3/2, n = 300 and 400) the gradient of the fixed-probe objective
# was off by up to 5e-3, 1.4e-3, 2e-4 for factors of 0.1, 0.01, 0.001, with 3.5, 4.5 and 5.5 columns of the pairing per
# column of the block.
PAIRING = 1e-3


def check_memory(solver: Any, n: int) -> None:
    """Refuse a covariance (n, n) and its factor in float64 where ``solver`` is a ``Direct`` that allows less memory.

    A gradient keeps several such matrices more, how many depends on the kernel; they are not counted.
    """
    size = 2 * 8 * n * n
    if isinstance(solver, Direct) and size > solver.max_bytes:
        raise OperandError(
            f"a covariance of size {n} and its Cholesky factor in float64 need {size} bytes ({size / 2**30:.1f} GiB); "
            f"Direct(max_bytes={solver.max_bytes}) allows {solver.max_bytes / 2**30:.1f} GiB: raise max_bytes, take "
            "fewer points, or use solver=CG(), which stores no matrix"
        )


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
    """log N(r; 0, K) by Cholesky, in the precision of K (n, n); plain autograd, so any order of differentiation.

    r (n,), or (n, p) for independent outputs: the sum over them, with that of each in ``details["outputs"]``.
    """
    with full_precision():
        L = cholesky(K, X, noise)
        white = torch.linalg.solve_triangular(L, r.reshape(r.shape[0], -1), upper=False)
        n = r.shape[0]
        values = -0.5 * white.square().sum(0) - L.diagonal().log().sum() - 0.5 * n * math.log(2 * math.pi)
    value = values.sum()
    info = Info(Direct(), 0, n, status=Status.CONVERGED, standard_error=torch.zeros_like(value.detach()))
    if r.ndim == 2:
        info.details["outputs"] = values.detach()
    return value, info


def iterative(
    A: LinearOperator,
    r: Tensor,
    method: tuple[Hutchinson, Lanczos],
    solver: CG | None,
    on_failure: OnFailure,
    *,
    preconditioner: Any = None,
) -> tuple[Tensor, Info]:
    """log N(r; 0, A) from products: r and the probes of log det A share one Lanczos block.

    With a preconditioner P = R Rᴴ the block runs on B = R⁻¹ A R⁻ᴴ, and

        rᵀA⁻¹r = (R⁻¹r)ᵀ B⁻¹ (R⁻¹r),        log det A = log det P + tr log B.

    Both terms are quadratic forms, so their gradients need no further product with A but the one block that reaches P.
    Where the block's depth leaves a column of r with a larger residual than ``solver`` asks for, CG (with P) goes on
    from the block's solution to x = A⁻¹ r, and 2 rᵀx − xᵀA x takes the form's place: its error is the square of that of
    x, its gradient in A is −x xᵀ.

    Args:
        A: covariance with the noise (n, n), Hermitian positive definite.
        r: residuals (n,), or (n, p) for p independent outputs, which share every product.
        method: probes, and how the Krylov space is built. An adaptive depth sets the tolerance of the pairing as well,
            to a thousandth of its own.
        solver: how well A⁻¹ r is to be solved; None leaves it to the block.
        preconditioner: None, a value with ``build``, a built one, or ``Auto()``, which is
            ``RandomlyPivotedCholesky()`` unless the log-determinant's standard error is larger with it: that without
            it is estimated from the same run, and where it is clearly smaller, a run without follows.

    Returns:
        The value, a scalar: the sum over outputs. In ``info.residual``, of the columns of r the recomputed
        ‖r − A x‖/‖r‖ with x from the block (or from CG), of the probes' the error estimate of log(B)z; in
        ``info.details`` ``quadratic``, ``logdet``, ``quadratic_residual`` (the largest over outputs), ``outputs`` (the
        value of each, for (n, p)), after backward ``pairing_width``, and what :func:`ritz.logdet` reports of P.

    Cost: k products with a block of p + m columns, (p + m)·k·n numbers; the gradient one pairing of width about
    5 (p + m), and with P one product of that width.
    """
    n = r.shape[0]
    block = r.reshape(n, -1)
    p = block.shape[1]
    probes, lanczos = method
    Z = probes.probes(n, A.dtype, A.device)
    P, details = select(A, preconditioner, Z, exact=probes.is_exact(n), later=True)
    root = None if P is None else P.inverse_root()
    # Before the block, so that backward comes to it after the block's pairing and not with its n·r numbers in hand.
    known = None if P is None else P.logdet().double()
    narrow = PAIRING * lanczos.tolerance(A.dtype)
    gradient = Frechet() if lanczos.num_matvecs is not None else Frechet(rtol=narrow)
    B = Watched(A if root is None else Preconditioned(A, root), p, details, 1e-2 * gradient.tolerance(A.dtype))
    start = block if root is None else root @ block
    terms = [Term(inverse, slice(0, p)), Term(log, slice(p, None))]
    forms, info = shared_forms(
        B, torch.cat([start, Z], 1), terms, method=lanczos, gradient=gradient, on_failure=on_failure
    )
    quadratic = forms[0].double()
    logdet, error = mean_and_error(forms[1].double(), probes.is_exact(n))
    if P is not None and known is not None:
        if isinstance(preconditioner, Auto) and (plain := plain_error(P, Z, forms[1])) is not None:
            errors = {"plain": plain, "preconditioned": float(error)}
            if not preferred(errors, Z.shape[1]):  # the run was for nothing; rare, and known now
                spent = info.num_matvecs
                value, info = iterative(A, r, method, solver, on_failure)
                assert info.standard_error is not None
                info.num_matvecs += spent
                errors["plain"] = float(info.standard_error) * 2 / p
                info.details.update(standard_errors=errors, preconditioner=None)
                return value, info
            details["standard_errors"] = errors
        logdet = logdet + known
    x, left = B.solution(start.detach())
    if root is not None:
        with torch.no_grad():
            x, left = root._rmatmat(x), P._matmat(root._rmatmat(left))
    size = torch.linalg.vector_norm(block.detach().double(), dim=0)
    residual = torch.linalg.vector_norm(left.double(), dim=0) / torch.where(size > 0, size, 1.0)
    info.method, info.standard_error = method, error.to(r.dtype) * (p / 2)
    details.update(info.details)
    info.details = details  # the dictionary that Watched writes the pairing's width to
    if solver is not None and float(residual.max()) > solver.resolve(A).rtol:  # type: ignore[operator]
        with torch.no_grad():
            first = x.to(r.dtype)
            x, report_ = solve(
                A, block.detach(), method=solver, preconditioner=P, x0=first, return_info=True, on_failure=on_failure
            )
        quadratic = (2 * block.double() * x.double() - x.double() * (A @ x).double()).sum(0)
        residual = report_.residual.double()
        info.num_matvecs += report_.num_matvecs + p
        info.details["solve"] = report_
        if not report_.status.success:
            info.status = report_.status
    elif info.status is Status.EXHAUSTED or (lanczos.num_matvecs is None and info.status.success):
        # In float32 a column may run out of directions by rounding long before it has converged, which its own error
        # estimate takes for the end. (The residual of an x that is right to the tolerance may be larger than it, but
        # not by orders of magnitude.)
        if float(residual.max()) > lanczos.tolerance(A.dtype) ** 0.5:
            info.status = Status.STAGNATED
    assert info.residual is not None
    info.residual[:p] = residual.to(info.residual.dtype)
    if info.status is Status.STAGNATED and "solve" not in details:  # a solve has reported itself
        report(info, what="the likelihood's block", target=lanczos.tolerance(A.dtype), on_failure=on_failure)
    values = -0.5 * (quadratic + logdet + n * math.log(2 * math.pi))
    info.details.update(
        quadratic=float(quadratic.detach().sum()),
        logdet=float(logdet.detach()),
        quadratic_residual=float(info.residual[:p].max()),
    )
    if r.ndim == 2:
        info.details["outputs"] = values.detach()
    return values.sum().to(r.dtype), info


def noise_curve(
    K: LinearOperator, r: Tensor, noises: Tensor, method: tuple[Hutchinson, Lanczos] | Direct
) -> tuple[Tensor, Tensor]:
    """log det(K + σ²I) and rᵀ(K + σ²I)⁻¹r for every noise variance, from one run without a preconditioner.

    Krylov spaces do not see a multiple of the identity: the block of r and the probes runs on K alone. The smallest
    noise decides: an adaptive depth goes on until every one of them has converged, a fixed depth serves large noise
    well and small noise badly (the error falls like that of CG at condition 1 + n·s/σ²), and in float32 noise below
    eps·tr K is out of reach.

    Args:
        K: covariance without noise (n, n), Hermitian positive semidefinite.
        r: residuals (n,), or (n, p) for p independent outputs.
        noises: σ² > 0 (s,).
        method: (probes, Lanczos), or ``Direct()`` for one dense eigendecomposition in float64.

    Returns:
        Both of shape (s,), the quadratic forms summed over outputs.

    Gradient: first order in K's tensors, r and ``noises``.
    """
    n = r.shape[0]
    block = r.reshape(n, -1)
    if isinstance(method, Direct):
        dense_K = K.to_dense().double()
        w = torch.linalg.eigvalsh(dense_K)
        curve = (w + noises.double().unsqueeze(1)).log().sum(1)
        x = solve(Dense(dense_K, hermitian=True), block.double(), method=method, shifts=noises.double())
        return curve, (x * block.double()).sum((1, 2))
    probes, lanczos = method
    p, Z = block.shape[1], probes.probes(n, K.dtype, K.device)
    terms = [Term(inverse, slice(0, p), noises), Term(log, slice(p, None), noises)]
    forms, _ = shared_forms(K, torch.cat([block, Z], 1), terms, method=lanczos)
    return mean_and_error(forms[1], probes.is_exact(n))[0], forms[0].sum(1)


def warn_of_rounding(
    A: LinearOperator, noise: Tensor, *, preconditioned: bool = False, on_failure: OnFailure = "warn"
) -> float:
    """How far rounding may move the smallest eigenvalues of A, relative to them; with one warning above 0.1.

    With ``on_failure="ignore"`` only the number; "raise" warns as well, since it is a bound and not a failure.

    eps·tr A/σ² without a preconditioner: products round relative to the largest eigenvalue, and a Krylov space of A
    knows the smallest ones no better. With one, R⁻¹ A R⁻ᴴ has no large eigenvalues: what is left is the rounding of
    A (R⁻ᴴ x) in the large directions, eps·√(tr A/σ²), and that of A's entries, which add up at random,
    eps·tr A/(√n σ²).
    """
    with torch.no_grad():
        trace, sigma2 = float(A.diagonal().detach().sum()), float(noise.detach().min())
    eps, ratio = torch.finfo(A.dtype).eps, trace / sigma2
    rounding = eps * max(ratio**0.5, ratio / A.shape[0] ** 0.5) if preconditioned else eps * ratio
    if rounding > 0.1 and on_failure != "ignore":
        what = "work in float64" if A.dtype != torch.float64 else "use a larger noise"
        if not preconditioned and A.dtype != torch.float64:
            what += ", or give a preconditioner"
        warnings.warn(
            f"a covariance of {A.shape[0]} points with noise variance {sigma2:.3g} in {A.dtype}: rounding of its "
            f"largest eigenvalue may reach {rounding:.2g} times its smallest, which spoils solves and "
            f"log-determinants; {what}",
            ConvergenceWarning,
            stacklevel=caller_level(),
        )
    return rounding


class Watched(LinearOperator):
    """An operator that keeps what goes through the first p columns of its products, to read solutions off a run.

    Args:
        operator: B, Hermitian positive definite.
        columns: p.
        details: gets ``pairing_width`` when the gradient is taken.
        negligible: columns of the pairing whose share is below this are left out.
    """

    def __init__(
        self,
        operator: LinearOperator,
        columns: int,
        details: dict[str, Any],
        negligible: float,
        _kept: list[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(
            operator.shape, operator.dtype, operator.device, hermitian=operator.hermitian, psd=operator.psd
        )
        self.operator, self.columns_, self.details, self.negligible = operator, columns, details, negligible
        self._kept: list[tuple[Tensor, Tensor]] = [] if _kept is None else _kept

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.operator,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Watched(children[0], self.columns_, self.details, self.negligible, self._kept)

    def _matmat(self, X: Tensor) -> Tensor:
        Y = self.operator._matmat(X)
        p = self.columns_
        self._kept.append((unwrap(X)[:, :p].detach().clone(), unwrap(Y)[:, :p].detach().clone()))
        return Y

    def tensors(self) -> tuple[Tensor, ...]:
        return self.operator.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        share = torch.linalg.vector_norm(Lam, dim=0) * torch.linalg.vector_norm(Q, dim=0)
        keep = share > self.negligible * share.max()
        if not bool(keep.all()) and bool(keep.any()):
            Lam, Q = Lam[:, keep], Q[:, keep]
        self.details["pairing_width"] = int(Q.shape[1])
        return self.operator.pair(Lam, Q)

    def solution(self, V: Tensor) -> tuple[Tensor, Tensor]:
        """x = Q T⁻¹ Qᴴ v from the run that began with V (n, p), and v − B x from its own products; float64.

        The products seen are forgotten.
        """
        X, left = torch.zeros_like(V, dtype=torch.float64), V.to(torch.float64, copy=True)
        for i in range(V.shape[1]):
            Q = torch.stack([q[:, i] for q, _ in self._kept], 1).double()
            BQ = torch.stack([y[:, i] for _, y in self._kept], 1).double()
            alive = torch.linalg.vector_norm(Q, dim=0) > 0.5  # zero past breakdown
            Q, BQ = Q[:, alive], BQ[:, alive]
            if Q.shape[1]:
                T = Q.mT @ BQ
                c = torch.linalg.solve((T + T.mT) / 2, Q.mT @ left[:, i])
                X[:, i] = Q @ c
                left[:, i] -= BQ @ c
        self._kept.clear()
        return X, left


def parts(info: Info) -> dict[str, Any]:
    """The figures of a likelihood's report as plain numbers (for progress lines and JSON)."""
    out: dict[str, Any] = {"depth": info.depth, "num_matvecs": info.num_matvecs, "status": info.status.value}
    if info.standard_error is not None:
        out["standard_error"] = float(info.standard_error)
    return out | {k: v for k, v in info.details.items() if isinstance(v, float)}
