"""Dense factorisation: the right choice for small systems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..numerics import unwrap
from ..operators import Diagonal, Identity
from ..result import Status
from .system import Kernel, Outcome, Product, Scalars, check_settings, default_rtol, norms

if TYPE_CHECKING:
    from ..operators import LinearOperator

# (block, shifts or None, adjoint) -> solution
Factor = Callable[[Tensor, Tensor | None, bool], Tensor]

# Largest size for which a failure message pays for all eigenvalues.
EIGENVALUES_UP_TO = 4000


@dataclass(frozen=True)
class Direct:
    """Dense factorisation of ``A.to_dense()``.

    Cholesky where A is known to be positive semidefinite, LU otherwise, one eigendecomposition for all shifts of a
    Hermitian A, a division where A is diagonal. The gradient reuses the factors.

    Args:
        rtol: the recomputed ‖b − A x‖ / ‖b‖ above which the result is reported as not converged (rounding in an
            ill-conditioned matrix); None is 1e-6 in float64 and 1e-4 in float32. It changes nothing else.
        max_bytes: refuse when matrix and factor need more memory than this.

    Cost: n³/3 (Cholesky) or 2n³/3 (LU) multiplications, about 9 n³ with shifts; 2 n² numbers, kept until backward;
    n products for an operator that is known by products only.
    """

    rtol: float | None = None
    max_bytes: int = 8 * 2**30

    @property
    def atol(self) -> float:
        """There is no absolute tolerance."""
        return 0.0

    def __post_init__(self) -> None:
        check_settings("Direct", self.rtol, 0.0, None)

    def resolve(self, A: LinearOperator) -> Direct:
        """The same method with the defaults filled in for an operator."""
        return replace(self, rtol=default_rtol(A.dtype)) if self.rtol is None else self

    def fits(self, A: LinearOperator) -> bool:
        """Whether matrix and factor stay within ``max_bytes``."""
        return isinstance(A, (Diagonal, Identity)) or bytes_needed(A) <= self.max_bytes

    def bind(self, A: LinearOperator, shifted: bool) -> Kernel:
        """Factorise, and return the solver of unit-norm blocks."""
        if not self.fits(A):
            n, size = A.shape[0], bytes_needed(A)
            raise OperandError(
                f"a dense factorisation at n={n} in {A.dtype} needs {size} bytes ({size / 2**30:.1f} GiB) for the "
                f"matrix and its factor; Direct(max_bytes={self.max_bytes}) allows {self.max_bytes / 2**30:.1f} GiB: "
                "raise max_bytes, use float32, or use GMRES(), or declare hermitian=True / psd=True for MINRES() / CG()"
            )
        matrix, factor = factorise(A, shifted)

        def kernel(
            product: Product, B: Tensor, X0: Tensor | None, target: Scalars, shift: Tensor | None, adjoint: bool
        ) -> Outcome:
            X = factor(B, shift, adjoint)
            if matrix is None or not adjoint or A.hermitian:
                Y = product(X)
            else:  # the adjoint product of a callable may not exist
                Y = matrix.mH @ X
            if shift is not None:
                Y = Y + X * shift.to(X.dtype)
            residual = norms(B - Y)
            if not np.isfinite(residual).all():
                raise DomainError(_singular(A, "its solution overflowed"))
            status = [Status.CONVERGED if ok else Status.STAGNATED for ok in residual <= target]
            return Outcome(X, residual, [1] * B.shape[1], status)

        return kernel


def bytes_needed(A: LinearOperator) -> int:
    """Memory of the dense matrix and one factor."""
    return 2 * A.shape[0] * A.shape[1] * A.dtype.itemsize


def factorise(A: LinearOperator, shifted: bool) -> tuple[Tensor | None, Factor]:
    """The dense matrix (None where it is diagonal), and a solver from its factors."""
    if isinstance(A, (Diagonal, Identity)):
        return None, _diagonal(A)
    matrix = unwrap(A.to_dense()).detach()
    if shifted:
        if not A.hermitian:
            raise OperandError(
                "shifts= needs a Hermitian operator; declare hermitian=True if it is, or solve with A.shift(sigma) for "
                "one shift at a time"
            )
        return matrix, _eigen(A, matrix)
    return matrix, _cholesky(A, matrix) if A.psd else _lu(A, matrix)


def _diagonal(A: LinearOperator) -> Factor:
    d = unwrap(A.diagonal()).detach().unsqueeze(1)

    def solve(B: Tensor, shift: Tensor | None, adjoint: bool) -> Tensor:
        entries = d.conj() if adjoint else d
        entries = entries if shift is None else entries + shift.to(d.dtype)
        if not bool((entries != 0).all()):
            raise DomainError(_singular(A, f"{int((entries == 0).sum())} diagonal entries are zero"))
        return B / entries

    return solve


def _cholesky(A: LinearOperator, matrix: Tensor) -> Factor:
    L, order = torch.linalg.cholesky_ex(matrix)
    if int(order) > 0:
        raise DomainError(not_positive_definite(matrix, int(order)))
    return lambda B, shift, adjoint: torch.cholesky_solve(B, L)


def _lu(A: LinearOperator, matrix: Tensor) -> Factor:
    LU, pivots, order = torch.linalg.lu_factor_ex(matrix)
    if int(order) > 0:
        raise DomainError(_singular(A, f"pivot {int(order)} of its LU factorisation is exactly zero"))
    return lambda B, shift, adjoint: torch.linalg.lu_solve(LU, pivots, B, adjoint=adjoint)


def _eigen(A: LinearOperator, matrix: Tensor) -> Factor:
    w, U = torch.linalg.eigh(matrix)

    def solve(B: Tensor, shift: Tensor | None, adjoint: bool) -> Tensor:
        values = w.unsqueeze(1) if shift is None else w.unsqueeze(1) + shift.to(w.dtype)
        if A.psd and not bool((values > 0).all()):
            raise DomainError(
                f"A + σI is not positive definite at n={A.shape[0]} in {A.dtype}: its smallest eigenvalue is "
                f"{float(values.min()):.3g}; use larger shifts, float64, or drop psd=True"
            )
        if not bool((values != 0).all()):
            raise DomainError(_singular(A, "a shift is minus an eigenvalue"))
        return U @ ((U.mH @ B) / values.to(U.dtype))

    return solve


def not_positive_definite(matrix: Tensor, order: int) -> str:
    """What to say when the Cholesky factorisation of a matrix fails at its leading minor of size ``order``."""
    n = matrix.shape[0]
    mean = float(matrix.diagonal().real.mean())
    found = f"its leading minor of size {order} is not positive"
    if n <= EIGENVALUES_UP_TO:
        w = torch.linalg.eigvalsh(matrix)
        found = f"its smallest eigenvalue is {float(w[0]):.3g} and its largest {float(w[-1]):.3g}"
    eps = torch.finfo(matrix.dtype).eps
    finer = "" if matrix.dtype in (torch.float64, torch.complex128) else "work in float64, or "
    return (
        f"the matrix (n={n}, {matrix.dtype}) is not positive definite: {found}; expected a smallest eigenvalue well "
        f"above {eps * n * abs(mean):.2g}: {finer}add a shift (noise, jitter; the mean diagonal is {mean:.3g}), remove "
        "duplicated rows, or drop psd=True if the matrix is indefinite"
    )


def _singular(A: LinearOperator, found: str) -> str:
    return (
        f"the matrix (n={A.shape[0]}, {A.dtype}) is singular: {found}; expected an invertible matrix: add a shift, or "
        "use MINRES() for a Hermitian system whose right-hand side lies in the range"
    )
