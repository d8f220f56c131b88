"""Shift-and-invert Krylov: e^{tA}v from the space of (I − γA)⁻¹, for stiff A where products with A get nowhere.

A polynomial space needs about √‖tA‖ products of a Hermitian A; this one about 15 solves whatever ‖tA‖, as the
resolvent hides the part of the spectrum that has long decayed. f(A) = g(B) with B = (I − γA)⁻¹ and
g(x) = f((1 − 1/x)/γ), so that everything built for functions of operators serves, with B's own pairing:
dB = γ B dA B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import DomainError, OperandError
from ..methods import Arnoldi, Lanczos
from ..operators.assemble import Assembled, assemble
from ..operators.base import Gradients, LinearOperator
from .scalar import ScalarFunction

DENSE = 2000  # rows up to which a matrix that cannot be assembled is factored as a dense one
SHARE = 0.1  # γ is this share of t
TINY = 1e-30  # stands for eigenvalues of the resolvent that are zero, or negative by rounding
ROUNDING = 1e-5  # relative to one: resolvents are never that negative but by rounding

Solve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ShiftInvert:
    """Method for :func:`ritz.expm_multiply`: Krylov space of the resolvent (I − γA)⁻¹.

    Args:
        gamma: the shift; None is t/10, t the largest of the times.
        solver: None factors I − γA once: sparse LU (SciPy) where A can be assembled, dense LU up to 2000 rows.
            Otherwise a callable (A, gamma) -> solve, X ↦ (I − γA)⁻¹X on blocks (n, k) (multigrid, an iterative method
            of a tolerance well below the one asked for); for an A that is not Hermitian it returns the two functions
            (solve, solve_adjoint).
        krylov: the space's method, ``Lanczos(...)`` or ``Arnoldi(...)``; None is the adaptive one that fits A.

    For real times of one sign, and an A whose spectrum times that sign has no large positive part. Gradient: every
    column of the pairing costs two solves, about ten columns each of them.
    Source: van den Eshof and Hochbruck 2006; Moret and Novati 2004.
    """

    gamma: float | None = None
    solver: Any = None
    krylov: Lanczos | Arnoldi | None = None

    def __post_init__(self) -> None:
        if self.gamma is not None and not (isinstance(self.gamma, Real) and math.isfinite(self.gamma) and self.gamma):
            raise OperandError(f"gamma={self.gamma!r}; expected a finite number other than zero, or None for t/10")


@dataclass(frozen=True)
class OfInverse(ScalarFunction):
    """g(x) = f((1 − 1/x)/γ), so that g((I − γA)⁻¹) = f(A); g[x, y] = f[a, b]/(γxy)."""

    f: ScalarFunction
    gamma: float

    def _inside(self, x: Tensor) -> Tensor:
        return torch.where((x < TINY) & (x > -ROUNDING), TINY, x)

    def __call__(self, x: Tensor) -> Tensor:
        return self.f((1 - 1 / self._inside(x)) / self.gamma)

    def divided_difference(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = self._inside(a), self._inside(b)
        return self.f.divided_difference((1 - 1 / x) / self.gamma, (1 - 1 / y) / self.gamma) / (self.gamma * x * y)

    def matrix(self, H: Tensor) -> Tensor:
        eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
        inverse, singular = torch.linalg.inv_ex(H)
        if bool(singular.any()):
            raise DomainError(
                "the small matrix of (I − γA)⁻¹ is singular: A is far from normal, rounding as large as the result; "
                "use Arnoldi()"
            )
        return self.f.matrix((eye - inverse) / self.gamma)

    def in_time(self) -> ScalarFunction:
        return OfInverse(self.f.in_time(), self.gamma)


class Resolvent(LinearOperator):
    """B = (I − γA)⁻¹ by a factorisation or a given solver; its pairing is ⟨Λ, dB Q⟩ = ⟨γBᴴΛ, dA BQ⟩."""

    def __init__(self, A: LinearOperator, gamma: float, solve: Solve, solve_adjoint: Solve) -> None:
        super().__init__(A.shape, A.dtype, A.device, hermitian=A.hermitian)
        self.A, self.gamma = A, gamma
        self.solve, self.solve_adjoint = solve, solve_adjoint

    @property
    def children(self) -> tuple[LinearOperator, ...]:
        return (self.A,)

    def rebuild(self, children: Sequence[LinearOperator]) -> LinearOperator:
        return Resolvent(children[0], self.gamma, self.solve, self.solve_adjoint)

    def capture(self, X: Tensor) -> tuple[Tensor, LinearOperator]:
        # The solver was made before and touches nothing that a callable closes over; one product of A shows that.
        _, bound = self.A.capture(X[:, :1])
        with torch.no_grad():
            return self._matmat(X), self.rebuild([bound])

    def _matmat(self, X: Tensor) -> Tensor:
        self._refuse_recording(X)
        return self.solve(X)

    def _rmatmat(self, X: Tensor) -> Tensor:
        self._refuse_recording(X)
        return self.solve_adjoint(X)

    def _refuse_recording(self, X: Tensor) -> None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in (X, *self.A.tensors())):
            raise OperandError(
                "a solve inside of ShiftInvert() cannot be recorded by autograd (a callable that hides its tensors, "
                "Unrolled(), or torch.func was asked for): use gradient=Frechet() or Adjoint() on an operator of ritz"
            )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.A.tensors()

    def pair(self, Lam: Tensor, Q: Tensor) -> Gradients:
        return self.A.pair(self.gamma * self.solve_adjoint(Lam), self.solve(Q))


def resolvent(A: LinearOperator, gamma: float, solver: Any) -> Resolvent:
    """The operator of :class:`ShiftInvert`, factored."""
    if solver is None:
        return Resolvent(A, gamma, *_factor(A, gamma))
    if not callable(solver):
        raise OperandError(f"solver={solver!r}; expected a callable (A, gamma) -> solve, or None to factor I − γA")
    with torch.no_grad():
        made = solver(A, gamma)
    if not isinstance(made, tuple):
        if A.hermitian is not True:
            raise OperandError(
                "the solver of ShiftInvert gave one function for an operator that is not known to be Hermitian; "
                "expected (solve, solve_adjoint), or A.declare(hermitian=True)"
            )
        made = (made, made)
    return Resolvent(A, gamma, *made)


def _factor(A: LinearOperator, gamma: float) -> tuple[Solve, Solve]:
    entries = assemble(A)
    if entries is None:
        if A.shape[0] > DENSE:
            raise OperandError(
                f"ShiftInvert() cannot factor {A!r}: it has no sparse entries and more than {DENSE} rows; give "
                "solver=(A, gamma) -> solve, or an operator with .assemble()"
            )
        with torch.no_grad():
            M = torch.eye(A.shape[0], dtype=A.dtype, device=A.device) - gamma * A.to_dense()
            LU, pivots, zero = torch.linalg.lu_factor_ex(M.to(torch.complex128 if M.is_complex() else torch.float64))
        if bool(zero):
            raise _singular(gamma)
        wide = LU.dtype
        return (
            lambda X: torch.linalg.lu_solve(LU, pivots, X.to(wide)).to(X.dtype),
            lambda X: torch.linalg.lu_solve(LU, pivots, X.to(wide), adjoint=True).to(X.dtype),
        )
    return _sparse_factor(entries, gamma, A)


def _singular(gamma: float) -> DomainError:
    return DomainError(
        f"I − γA is singular at γ = {gamma:.6g}: 1/γ is an eigenvalue of A; give ShiftInvert(gamma=...) another value, "
        "of the sign of t"
    )


def _sparse_factor(entries: Assembled, gamma: float, A: LinearOperator) -> tuple[Solve, Solve]:
    try:
        from scipy.sparse import coo_matrix, identity
        from scipy.sparse.linalg import splu
    except ImportError as error:
        raise OperandError(
            "ShiftInvert() factors sparse matrices by SciPy, which is not installed; pip install scipy, or give "
            "solver=(A, gamma) -> solve"
        ) from error
    row, col, values = (x.detach().cpu().numpy() for x in entries)
    wide = "complex128" if values.dtype.kind == "c" else "float64"
    M = identity(A.shape[0], dtype=wide, format="csc") - gamma * coo_matrix((values.astype(wide), (row, col)), A.shape)
    # A Hermitian definite matrix needs no pivoting, and a symmetric ordering fills in less.
    options = {"permc_spec": "COLAMD"}
    if A.hermitian:
        options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    try:
        factor = splu(M.tocsc(), **options)
    except RuntimeError as error:
        raise _singular(gamma) from error

    def solve(X: Tensor, trans: str = "N") -> Tensor:
        Y = factor.solve(X.detach().cpu().numpy().astype(wide), trans)
        return torch.from_numpy(Y).to(X.dtype).to(X.device)

    return solve, solve if A.hermitian else lambda X: solve(X, "H")
